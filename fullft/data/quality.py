"""What a row's text is like: its words and key for finding it again, its script, and signs of broken encoding."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter

from fullft.data.formats import Conversation, Pretokenized, Text

# Vowel signs and accents belong to words; a letter of a script without spaces between words is a word.
_MARKS = "".join(re.escape(chr(code)) for code in range(0x300, 0xFE30) if unicodedata.category(chr(code))[0] == "M")
_WITHOUT_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_WITHOUT_SPACES}]|(?:(?![{_WITHOUT_SPACES}])[^\W_]|[{_MARKS}])+")
_TO_SPACE = {code: " " for code in range(128) if not chr(code).isalnum()}
_REPLACED, _MOJIBAKE = "replacement characters (�)", "mojibake (UTF-8 read as Latin-1)"
_HTML = "HTML entities or tags"
_NOT_ASCII_SIGNS = (_REPLACED, _MOJIBAKE)
_SIGNS = {
    _REPLACED: re.compile("\ufffd"),
    _MOJIBAKE: re.compile("Ã[\u0080-\u00bf]|Â[\u00a0-\u00bf]|â€[\u0098-\u201d™œ¦]|ï»¿"),
    "control characters": re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]"),
    _HTML: re.compile(r"&(?:amp|lt|gt|quot|nbsp|#\d{2,5});|</?(?:div|span|br|p)\b[^>]*>"),
}
_LOOKED_AT = 500  # characters looked at for the script
_NOT_ASCII, _ASCII_LETTER = re.compile("[^\x00-\x7f]"), re.compile("[A-Za-z]")


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
    if text.isascii():  # the same, in a fifth of the time
        return text.lower().translate(_TO_SPACE).split()
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def text_key(example: Conversation | Text | Pretokenized) -> int:
    """64-bit key of the normalised text; rows with one key are duplicates."""
    if isinstance(example, Pretokenized):
        content = repr(example.ids)
    else:
        text = plain_text(example)
        content = " ".join(words(text)) or text
    return int.from_bytes(hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def troubles(text: str) -> list[str]:
    """Signs of broken encoding in a text, by name."""
    ascii_only = text.isascii()
    markup = "&" in text or "<" in text
    return [
        name for name, sign in _SIGNS.items()
        if not (ascii_only and name in _NOT_ASCII_SIGNS) and (markup or name != _HTML) and sign.search(text)
    ]  # fmt: skip


def script(text: str) -> str:
    """The script that most letters of a text are in: Latin, Cyrillic, CJK, …"""
    if text.isascii():
        return "Latin"
    beginning = text[:_LOOKED_AT]
    others = [letter for letter in _NOT_ASCII.findall(beginning) if letter.isalpha()]
    names = Counter(unicodedata.name(letter, "unknown").split()[0].split("-")[0].capitalize() for letter in others)
    names["Latin"] += len(_ASCII_LETTER.findall(beginning))
    main = names.most_common(1)[0][0]
    return {"Cjk": "CJK", "Hiragana": "Japanese", "Katakana": "Japanese"}.get(main, main)
