"""Rows of data sets, in the shapes they are found in, made into `Conversation` or `Text`.

messages            {"messages": [{"role": ..., "content": ...}, ...]}
prompt_completion   {"prompt": ..., "completion": ...}: two message lists, or two strings used as they are (no template)
alpaca              {"instruction": ..., "input": ... (optional), "output": ..., "system": ... (optional)}
text                {"text": ...}
"""

from __future__ import annotations

import glob
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fullft.errors import BadInput
from fullft.recipe import Source


@dataclass(frozen=True)
class Conversation:
    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    prompt_messages: int = 0  # that many first messages are context, their assistant turns are not trained


@dataclass(frozen=True)
class Text:
    """Text without roles: loss on all of it, or on what follows `prompt`."""

    text: str
    prompt: str = ""


@dataclass(frozen=True)
class Row:
    file: str
    number: int  # of the row in the file, from 1; line number in .jsonl
    value: dict[str, Any] | None
    problem: str = ""  # why there is no value

    @property
    def where(self) -> str:
        return f"{self.file} row {self.number}"


class BadRow(ValueError):
    """This row cannot be trained on; the text says why."""


_ROLES = ("system", "developer", "user", "assistant", "tool")
_FIELDS = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}


def source_files(source: Source) -> list[Path]:
    """The local files of a source, sorted; empty for a hub name.

    Raises:
        BadInput: a local path that does not exist, is empty, or is of an unknown kind.
    """
    path = Path(source.path)
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    matches = [path] if path.is_file() else [Path(name) for name in sorted(glob.glob(source.path, recursive=True))]  # noqa: PTH207
    if not matches:
        if _looks_like_hub_name(source.path):
            return []
        raise BadInput(f"data file {source.path} does not exist (relative paths start at {Path.cwd()})")
    problems = [f"data file {file} is empty" for file in matches if file.stat().st_size == 0]
    problems += [
        f"data file {file}: unknown kind; use .jsonl, .json, .parquet, an Arrow folder or a hub name"
        for file in matches
        if file.suffix not in (".jsonl", ".json", ".parquet")
    ]
    if problems:
        raise BadInput(problems)
    return matches


# Endings that no hub name has; a dot alone does not make a file: owner/name-2.5.
_FILES = (".jsonl", ".json", ".parquet", ".txt", ".csv", ".tsv", ".gz", ".zst", ".zip", ".arrow")


def _looks_like_hub_name(path: str) -> bool:
    return (
        not path.startswith((".", "/", "~"))
        and path.count("/") <= 1
        and Path(path).suffix not in _FILES
        and "*" not in path
    )


def read_rows(source: Source) -> Iterator[Row]:
    """All rows of a source in file order. A line that is not JSON is a row with a problem, not the end of reading."""
    yield from itertools.islice(_all_rows(source), source.limit)


def _all_rows(source: Source) -> Iterator[Row]:
    files = source_files(source)
    if not files or Path(source.path).is_dir():
        yield from _dataset_rows(source)
        return
    readers = {".jsonl": _jsonl_rows, ".json": _json_rows, ".parquet": _parquet_rows}
    for file in files:
        rows = readers[file.suffix](file)
        if (first := next(rows, None)) is None:
            raise BadInput(f"data file {file} has no rows")
        yield first
        yield from rows


def _jsonl_rows(file: Path) -> Iterator[Row]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _parsed(str(file), number, line)


def _parsed(file: str, number: int, line: bytes) -> Row:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Row(file, number, None, f"not valid JSON: {error}")
    if not isinstance(value, dict):
        return Row(file, number, None, f"is a {type(value).__name__}, not an object with fields")
    return Row(file, number, value)


def _json_rows(file: Path) -> Iterator[Row]:
    try:
        rows = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadInput(f"data file {file} is not valid JSON: {error}; one object a line is a .jsonl file") from None
    if not isinstance(rows, list):
        raise BadInput(f"data file {file} must hold a list of rows, it holds a {type(rows).__name__}")
    for number, value in enumerate(rows, start=1):
        if isinstance(value, dict):
            yield Row(str(file), number, value)
        else:
            yield Row(str(file), number, None, f"is a {type(value).__name__}, not an object with fields")


def _parquet_rows(file: Path) -> Iterator[Row]:
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024):
            for value in batch.to_pylist():
                number += 1
                yield Row(str(file), number, value)
    except (OSError, ValueError) as error:
        raise BadInput(f"data file {file} is not a Parquet file, or is damaged: {error}") from None


def _dataset_rows(source: Source) -> Iterator[Row]:
    for number, value in enumerate(hub_dataset(source), start=1):
        yield Row(source.path, number, value)


def hub_dataset(source: Source) -> Any:
    """An Arrow folder (`Dataset.save_to_disk`), a folder of data files, or a hub name, through `datasets`.

    Raises:
        BadInput: it cannot be loaded.
    """
    import datasets

    folder = Path(source.path)
    try:
        if folder.is_dir() and ((folder / "state.json").exists() or (folder / "dataset_dict.json").exists()):
            loaded = datasets.load_from_disk(source.path)
            if not isinstance(loaded, datasets.DatasetDict):
                return loaded
            if source.split not in loaded:
                raise KeyError(f"it has the splits {', '.join(loaded)}")
            return loaded[source.split]
        return datasets.load_dataset(source.path, source.subset, split=source.split)
    except Exception as error:  # datasets raises many kinds; all mean that the data cannot be had
        raise BadInput(f"data set {source.path} (split {source.split}) cannot be loaded: {error}") from None


def parse_row(value: dict[str, Any], source: Source) -> Conversation | Text:
    """One row as what is trained on.

    Raises:
        BadRow: fields missing or of the wrong kind, or roles out of order.
    """
    if absent := [theirs for theirs in source.fields.values() if theirs not in value]:
        raise BadRow(f"has no {_names(absent)}, which `fields` names (fields: {_names(value)})")
    value = value | {ours: value[theirs] for ours, theirs in source.fields.items()}
    kind = source.format if source.format != "auto" else _detect(value)
    if absent := [name for name in _FIELDS[kind] if value.get(name) is None]:
        raise BadRow(f"has no {_names(absent)} (fields: {_names(value)}); name the columns in `fields`")
    match kind:
        case "messages":
            tools = value.get("tools") or None
            if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
                raise BadRow("field 'tools' is not a list of objects")
            return Conversation(_checked_messages(value["messages"]), tools)
        case "prompt_completion":
            return _prompt_completion(value["prompt"], value["completion"])
        case "alpaca":
            return _alpaca(value)
        case _:
            if not isinstance(value["text"], str) or not value["text"]:
                raise BadRow("field 'text' is not a text or is empty")
            return Text(value["text"])


def _detect(value: dict[str, Any]) -> str:
    for kind, names in _FIELDS.items():
        if all(value.get(name) is not None for name in names):
            return kind
    raise BadRow(
        f"has fields {_names(value)}; expected messages, prompt + completion, instruction + output, or text "
        "(other names: map them with `fields`)"
    )


def _names(values: Any) -> str:
    return ", ".join(f"'{value}'" for value in values) or "none"


def _prompt_completion(prompt: Any, completion: Any) -> Conversation | Text:
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion:
            raise BadRow("field 'completion' is empty")
        return Text(completion, prompt)
    if isinstance(prompt, list) and isinstance(completion, list):
        return Conversation(_checked_messages(prompt + completion), prompt_messages=len(prompt))
    raise BadRow("fields 'prompt' and 'completion' must be two texts or two lists of messages")


def _alpaca(value: dict[str, Any]) -> Conversation:
    texts = {name: value.get(name) or "" for name in ("system", "instruction", "input", "output")}
    if wrong := [name for name, text in texts.items() if not isinstance(text, str)]:
        raise BadRow(f"{_names(wrong)} must be text")
    question = "\n\n".join(text for text in (texts["instruction"], texts["input"]) if text)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": texts["output"]}]
    if texts["system"]:
        messages.insert(0, {"role": "system", "content": texts["system"]})
    return Conversation(_checked_messages(messages))


def _checked_messages(messages: Any) -> list[dict[str, Any]]:
    """Messages with known roles in an order that a chat can have: system? then user (assistant|tool …) …"""
    if not isinstance(messages, list) or not messages:
        raise BadRow("field 'messages' is not a list of messages, or is empty")
    before = "the start"
    for position, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or "role" not in message:
            raise BadRow(f"message {position} has no 'role'")
        role = message["role"]
        if role not in _ROLES:
            raise BadRow(f"message {position} has role {role!r}; roles are {', '.join(_ROLES)}")
        if message.get("content") is None and not message.get("tool_calls"):
            raise BadRow(f"message {position} ({role}) has no 'content'")
        if not isinstance(message.get("content"), str | None):
            kind = type(message["content"]).__name__
            raise BadRow(f"message {position} ({role}): 'content' is a {kind}; only text can be trained on")
        allowed = {
            "system": ("the start",), "developer": ("the start",),
            "user": ("the start", "system", "developer", "assistant"),
            "assistant": ("user", "tool"), "tool": ("assistant", "tool"),
        }[role]  # fmt: skip
        if before not in allowed:
            raise BadRow(f"wrong role order: message {position} is '{role}' after {before}")
        before = role
    if all(message["role"] != "assistant" for message in messages):
        raise BadRow("has no assistant message to train on")
    return messages
