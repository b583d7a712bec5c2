"""The model's tokenizer, without the import of any model: that takes longer than to prepare a small data set."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fullft.errors import BadInput
from fullft.recipe import Model


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        BadInput: no folder or hub name, or a tokenizer without offsets (not a fast one).
    """
    require_folder(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except Exception as error:  # transformers raises many kinds; all mean that there is no usable tokenizer
        raise BadInput(f"model.path: tokenizer of {model.path} cannot be loaded: {first_line(error)}") from None
    if not tokenizer.is_fast:
        raise BadInput(f"model.path: {model.path} has no tokenizer.json (a fast tokenizer), which loss masks need")
    return tokenizer


def require_folder(model: Model) -> None:
    """Local paths must exist; anything else is taken for a hub name."""
    path = Path(model.path)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise BadInput(f"model.path: {path} has no config.json; it must be a Hugging Face model folder")
    elif path.exists() or model.path.startswith((".", "/", "~")) or model.path.count("/") != 1:
        raise BadInput(
            f"model.path: {path} is not a folder (relative paths start at {Path.cwd()}), nor a hub name (owner/name)"
        )


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
