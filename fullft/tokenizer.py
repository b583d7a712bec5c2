"""The model's folder and tokenizer, without the import of any model, which takes longer than to prepare a small set."""

from __future__ import annotations

import functools
import math
from pathlib import Path

from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase

from fullft.data.tokens import vocabulary_size
from fullft.errors import BadInput
from fullft.recipe import Model


@functools.lru_cache(maxsize=4)
def files(model: Model, weights: bool = False) -> Path:
    """The folder of a model; of a hub name that of the hub's cache, where what is lacking is downloaded first.

    Ranks of one node may call this at once: the hub's library lets one download while the others wait on a file lock.

    Raises:
        BadInput: no model folder, and no hub name or one that cannot be had.
    """
    path = Path(model.path)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise BadInput(f"model.path: {path} has no config.json; it must be a Hugging Face model folder")
        return path
    if path.exists() or model.path.startswith((".", "/", "~")) or model.path.count("/") != 1:
        raise BadInput(
            f"model.path: {path} is not a folder (relative paths start at {Path.cwd()}), nor a hub name (owner/name)"
        )
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.jinja", "*.model", "*.txt", "*.py", *(["*.safetensors"] if weights else [])]
    try:
        # Files in folders, and consolidated ones, are the same weights in a form of the model's authors.
        found = snapshot_download(
            model.path, revision=model.revision, allow_patterns=wanted, ignore_patterns=["*/*", "consolidated*"]
        )
    except Exception as error:  # no network, no such name, no permission, no space: all mean that it cannot be had
        raise BadInput(f"model.path: {model.path} cannot be downloaded: {first_line(error)}") from None
    return Path(found)


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with `model.new_tokens`.

    Raises:
        BadInput: no folder or hub name, or a tokenizer without offsets (not a fast one).
    """
    folder = files(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # transformers raises many kinds; all mean that there is no usable tokenizer
        raise BadInput(f"model.path: tokenizer of {model.path} cannot be loaded: {first_line(error)}") from None
    if not tokenizer.is_fast:
        raise BadInput(f"model.path: {model.path} has no tokenizer.json (a fast tokenizer), which loss masks need")
    if known := [token for token in model.new_tokens if token in tokenizer.get_vocab()]:
        raise BadInput(f"model.new_tokens: the tokenizer of {model.path} has {', '.join(known)} already; leave it out")
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in model.new_tokens])
    return tokenizer


def vocabulary_rows(model: Model, tokenizer: PreTrainedTokenizerBase, rows: int) -> int:
    """Rows of the embedding: `rows` of the model, grown for its new tokens and to `model.vocabulary_multiple`."""
    multiple = model.vocabulary_multiple or (1 if model.new_tokens else None)
    if multiple is None:
        return rows
    needed = max(rows, vocabulary_size(tokenizer))
    return math.ceil(needed / multiple) * multiple


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
