"""What a row's text is like: its words and key for finding it again, its script, and signs of broken encoding."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter

from fullft.data.formats import Conversation, Pretokenized, Text

_WORD = re.compile(r"\w+")
_SIGNS = {
    "replacement characters (�)": re.compile("\ufffd"),
    "mojibake (UTF-8 read as Latin-1)": re.compile("Ã[\u0080-\u00bf]|Â[\u00a0-\u00bf]|â€[\u0098-\u201d™œ¦]|ï»¿"),
    "control characters": re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]"),
    "HTML entities or tags": re.compile(r"&(?:amp|lt|gt|quot|nbsp|#\d{2,5});|</?(?:div|span|br|p)\b[^>]*>"),
}
_SAMPLE = 200  # characters that are not ASCII, looked at for the script


def plain_text(example: Conversation | Text | Pretokenized) -> str:
    """What a person would read in a row: all turns but the system's, which many rows share; empty for token ids."""
    match example:
        case Conversation():
            spoken = (message for message in example.messages if message["role"] not in ("system", "developer"))
            return "\n".join(str(message.get("content") or "") for message in spoken)
        case Text():
            return example.prompt + example.text
        case _:
            return ""


def words(text: str) -> list[str]:
    """Words in lower case without punctuation: two texts with the same words are the same after normalisation."""
    return _WORD.findall(text.lower())


def text_key(example: Conversation | Text | Pretokenized) -> int:
    """64-bit key of the normalised text; rows with one key are duplicates."""
    if isinstance(example, Pretokenized):
        content = repr(example.ids)
    else:
        text = plain_text(example)
        content = " ".join(words(text)) or text
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "little")


def troubles(text: str) -> list[str]:
    """Signs of broken encoding in a text, by name."""
    return [name for name, sign in _SIGNS.items() if sign.search(text)]


def script(text: str) -> str:
    """The script that most letters of a text are in: Latin, Cyrillic, CJK, …"""
    if text.isascii():
        return "Latin"
    letters = [letter for letter in text[:4000] if letter.isalpha()]
    sample = [letter for letter in letters if not letter.isascii()][:_SAMPLE]
    names = Counter(unicodedata.name(letter, "unknown").split()[0].split("-")[0].capitalize() for letter in sample)
    names["Latin"] += sum(letter.isascii() for letter in letters)
    main = names.most_common(1)[0][0] if letters else "Latin"
    return {"Cjk": "CJK", "Hiragana": "Japanese", "Katakana": "Japanese"}.get(main, main)
