"""Files, folders and hub names → rows, in pieces that can be read apart from each other.

JSONL and JSON are read here and not by `datasets`, because only so has every row its number in its file, and one bad
line is one bad row. Everything is read as a stream: no file, and no row group of Parquet, needs to fit into memory.
"""

from __future__ import annotations

import glob
import io
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from fullft.data.formats import used_fields
from fullft.errors import BadInput
from fullft.recipe import Source


@dataclass(frozen=True)
class Row:
    file: str
    number: int  # of the row in the file, from 1; line number in .jsonl
    value: dict[str, Any] | None
    problem: str = ""  # why there is no value

    @property
    def where(self) -> str:
        return f"{self.file} row {self.number}"


@dataclass(frozen=True)
class Piece:
    """A part of a source that one process reads: from a byte of .jsonl or .json, or a row of other kinds.

    It names its file, because a folder that is listed anew may hold another one in its place.
    """

    file: int  # its number among the source's; 0 for a set of `datasets`
    path: str | None  # None: a set of `datasets`
    start: int = 0
    end: int | None = None  # byte of .jsonl; None: all of the file
    rows_before: int = 0  # rows (lines) of the file before `start`
    bytes: int = 0  # for the progress bar
    rows: int | None = None  # None: all there are


_BLOCK = 1 << 20
_PARQUET_SLICE, _DICTIONARY_BATCH, _PARQUET_BATCH = 16, 128, 1024  # rows


def source_files(source: Source) -> list[Path]:
    """The local files of a source, sorted; empty for a hub name.

    Raises:
        BadInput: a local path that does not exist, is empty, or is of an unknown kind.
    """
    path = Path(source.path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return files if _is_arrow_folder(path) else _data_files(path, files)
    matches = [path] if path.is_file() else [Path(name) for name in sorted(set(glob.glob(source.path, recursive=True)))]  # noqa: PTH207
    if not matches:
        if _looks_like_hub_name(source.path):
            return []
        raise BadInput(f"data file {source.path} does not exist (relative paths start at {Path.cwd()})")
    problems = [
        f"data file {file}: unknown kind; use .jsonl, .json, .parquet, an Arrow folder or a hub name"
        for file in matches
        if kind_of(file) not in _READABLE
    ]
    if problems := _unusable(matches) + problems:
        raise BadInput(problems)
    return matches


_READABLE = (".jsonl", ".json", ".parquet")
# Endings that no hub name has; a dot alone does not make a file: owner/name-2.5.
_PACKED = (".gz", ".zst", ".zip", ".xz", ".bz2")
_FILES = (*_READABLE, ".txt", ".csv", ".tsv", ".xlsx", ".arrow", *_PACKED)
_HELD_OUT = re.compile(r"(^|[-_.])(test|valid|validation|val|dev|eval)([-_.\d]|$)")


def kind_of(file: Path) -> str:
    """Its ending as it is read: small letters, and .ndjson is .jsonl."""
    ending = file.suffix.lower()
    return ".jsonl" if ending == ".ndjson" else ending


def _is_arrow_folder(folder: Path) -> bool:
    return (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()


def _data_files(folder: Path, files: list[Path]) -> list[Path]:
    """The data files of a folder but for hidden ones; what else may be data is told, not left out."""
    parts = {file: file.relative_to(folder).parts for file in files}
    files = [file for file in files if not any(part.startswith(".") for part in parts[file])]
    found = [file for file in files if kind_of(file) in _READABLE]
    problems = [f"data file {file}: unknown kind; use .jsonl, .json or .parquet, or name the others by a glob"
                for file in files if kind_of(file) in _FILES and kind_of(file) not in _READABLE]  # fmt: skip
    problems += _unusable(found)
    names = {file: [*parts[file][:-1], file.stem] for file in found}
    if held_out := [file for file in found if any(_HELD_OUT.search(name) for name in names[file])]:
        problems.append(
            f"data folder {folder} holds {held_out[0].name}, which looks like evaluation data: name the files to be "
            f"read by a glob, e.g. {folder}/train*"
        )
    if not found and not problems:
        problems.append(f"data folder {folder} has no .jsonl, .json or .parquet file")
    if problems:
        raise BadInput(problems)
    return found


def _unusable(files: list[Path]) -> list[str]:
    """Files that are empty, or that stand twice in a source: a link to another of them."""
    problems, known = [], dict[tuple[int, int], Path]()
    for file in files:
        try:
            stat = file.stat()
        except FileNotFoundError:
            problems.append(f"data file {file} was there a moment ago, and is not any more")
            continue
        if stat.st_size == 0:
            problems.append(f"data file {file} is empty")
        if (first := known.setdefault((stat.st_dev, stat.st_ino), file)) != file:
            problems.append(f"data file {file} is the same file as {first}; its rows would be read twice")
    return problems


def _looks_like_hub_name(path: str) -> bool:
    return (
        not path.startswith((".", "/", "~"))
        and path.count("/") <= 1
        and kind_of(Path(path)) not in _FILES
        and "*" not in path
    )


def read_by_datasets(source: Source) -> bool:
    """Whether a source is read by the library `datasets`: an Arrow folder or a hub name."""
    path = Path(source.path)
    return _is_arrow_folder(path) if path.is_dir() else not source_files(source)


# Reading


def row_groups(file: Any) -> list[tuple[int, int]]:
    """(bytes, rows) of the groups of a Parquet file."""
    groups = (file.metadata.row_group(group) for group in range(file.num_row_groups))
    return [(group.total_byte_size, group.num_rows) for group in groups]


def read_rows(source: Source) -> Iterator[Row]:
    """All rows of a source in file order. A line that is not JSON is a row with a problem, not the end of reading.

    Raises:
        BadInput: a file that is damaged or has no rows.
    """
    yield from itertools.islice(_all_rows(source), source.limit)


def _all_rows(source: Source) -> Iterator[Row]:
    if read_by_datasets(source):
        yield from _dataset_rows(source, 0)
        return
    for number, file in enumerate(source_files(source)):
        rows = _file_rows(source, file, Piece(number, str(file)))
        if (first := next(rows, None)) is None:
            raise without_rows(file)
        yield first
        yield from rows


def without_rows(*files: Path) -> BadInput:
    return BadInput([f"data file {file} has no rows" for file in files])


def read_piece(source: Source, piece: Piece) -> Iterator[Row]:
    """The rows of one piece, numbered as in their file."""
    rows = _file_rows(source, Path(piece.path), piece) if piece.path else _dataset_rows(source, piece.start)
    yield from itertools.islice(rows, piece.rows)


def _file_rows(source: Source, file: Path, piece: Piece) -> Iterator[Row]:
    if kind_of(file) == ".parquet":
        return _parquet_rows(file, piece, used_fields(source))
    return _jsonl_rows(file, piece) if kind_of(file) == ".jsonl" else _json_rows(file, piece)


def _jsonl_rows(file: Path, piece: Piece) -> Iterator[Row]:
    for number, line in jsonl_lines(file, piece):
        yield _parsed(str(file), number, line)


def jsonl_lines(file: Path, piece: Piece) -> Iterator[tuple[int, bytes]]:
    """(number, line) of those that are not blank."""
    with file.open("rb") as lines:
        lines.seek(piece.start)
        at = piece.start
        for number, line in enumerate(lines, start=piece.rows_before + 1):
            if piece.end is not None and at >= piece.end:
                return
            at += len(line)
            if line.strip():
                yield number, line


def _parsed(file: str, number: int, line: bytes) -> Row:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Row(file, number, None, f"not valid JSON: {error}")
    return _row(file, number, value)


def _row(file: str, number: int, value: Any) -> Row:
    if not isinstance(value, dict):
        return Row(file, number, None, f"is a {type(value).__name__}, not an object with fields")
    return Row(file, number, value)


def _json_rows(file: Path, piece: Piece) -> Iterator[Row]:
    try:
        with file.open("rb") as opened, io.TextIOWrapper(opened, "utf-8", newline="") as content:
            opened.seek(piece.start)
            for number, (_, value) in enumerate(list_items(file, content, piece.start), start=piece.rows_before + 1):
                yield _row(str(file), number, value)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"data file {file} is not valid JSON: {error}; one object a line is a .jsonl file") from None


def list_items(file: Path, content: TextIO, start: int = 0) -> Iterator[tuple[int, Any]]:
    """(its first byte, item) of the one list in a .json file, decoded one by one from a window over its text.

    `content` stands at byte `start`: 0, or where an item begins.
    """
    decoder = json.JSONDecoder()
    text, byte = ("", start) if start else _list_start(file, content)
    at, counted, items, after_item = len(text[:1]), 0, 0, False  # text[counted] is at `byte`
    while True:
        at = _not_space(text, at)
        if text.startswith("]", at) and (after_item or not items):
            if rest := (text[at + 1 :] + content.read(_BLOCK)).strip():
                raise ValueError(f"after the list comes {rest[:20]!r}")
            return
        if after_item and text.startswith(",", at):
            at, after_item = at + 1, False
            continue
        if after_item and at < len(text):
            raise ValueError(f"expected ',' or ']' after item {items}, found {text[at : at + 20]!r}")
        byte, counted = byte + len(text[counted:at].encode()), at
        try:
            value, end = decoder.raw_decode(text, at)
            whole = end < len(text) - (4 if isinstance(value, int | float) else 0)  # 1 may go on as 1.5
        except json.JSONDecodeError as error:
            if error.pos < len(text) - 16 and not error.msg.startswith("Unterminated string"):
                raise _item_problem(items + 1, byte, error.msg) from None
            whole = False  # cut off by the end of the window
        except RecursionError:
            raise _item_problem(items + 1, byte, "too deep") from None
        if whole:
            yield byte, value
            at, items, after_item = end, items + 1, True
            continue
        try:
            more = content.read(max(_BLOCK, len(text) - at))
        except UnicodeDecodeError as error:
            raise _item_problem(items + 1, byte, f"not UTF-8, there or behind it: {error.reason}") from None
        if more:
            text, at, counted = text[at:] + more, 0, 0
        else:
            try:
                value, end = decoder.raw_decode(text, at)
            except json.JSONDecodeError as error:
                raise _item_problem(items + 1, byte, error.msg) from None
            if end == len(text):
                raise ValueError("the list does not end")
            yield byte, value
            at, items, after_item = end, items + 1, True


def _item_problem(item: int, byte: int, problem: str) -> ValueError:
    """Where the item begins, because a column of the window over the file says nothing to anyone."""
    return ValueError(f"item {item}, which begins at byte {byte:,}: {problem}")


def _list_start(file: Path, content: TextIO) -> tuple[str, int]:
    """The first text of a .json file, from the [ on, and the byte where that is."""
    text = content.read(_BLOCK)
    byte = 3 if text.startswith("\ufeff") else 0
    text = text.removeprefix("\ufeff")
    while not text.lstrip() and (block := content.read(_BLOCK)):
        text, byte = block, byte + len(text.encode())
    byte += len(text.encode()) - len(text.lstrip().encode())
    text = text.lstrip()
    if text.startswith("{"):
        raise BadInput(
            f"data file {file} must hold a list of rows, it holds an object; one object a line is a .jsonl file"
        )
    if not text.startswith("["):
        kind = type(json.loads(text + content.read(1 << 20))).__name__  # what is no JSON raises here
        raise BadInput(f"data file {file} must hold a list of rows, it holds a {kind}")
    return text, byte


def _not_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def open_parquet(file: Path) -> Any:
    import pyarrow.parquet

    try:
        # So the pages of a group come as they are decoded, and not all before the first row.
        return pyarrow.parquet.ParquetFile(file, buffer_size=_BLOCK, pre_buffer=False)
    except (OSError, ValueError) as error:
        raise BadInput(f"data file {file} is not a Parquet file, or is damaged: {error}") from None


def _parquet_rows(file: Path, piece: Piece, used: set[str]) -> Iterator[Row]:
    """Other columns than those `used` are not read: their values are None."""
    opened = open_parquet(file)
    names: list[str] = opened.schema_arrow.names
    unused = dict.fromkeys(name for name in names if name not in used)
    number = 0
    for group, (_, rows) in enumerate(row_groups(opened)):
        if number + rows <= piece.start:
            number += rows
            continue
        for batch in _batches(file, opened, group, [name for name in names if name in used]):
            before = max(piece.start - number, 0)
            number += min(before, len(batch))
            for start in range(before, len(batch), _PARQUET_SLICE):
                for value in _values(batch[start : start + _PARQUET_SLICE]):
                    number += 1
                    if isinstance(value, str):
                        yield Row(str(file), number, None, value)
                    else:
                        yield Row(str(file), number, _from_columns(value | unused))


def _batches(file: Path, opened: Any, group: int, columns: list[str]) -> Iterator[Any]:
    """Of about a block each: a text that stands in a dictionary once may be decoded for every row."""
    import pyarrow

    about = opened.metadata.row_group(group)
    chunks = [about.column(at) for at in range(about.num_columns)]
    size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns)
    most = _DICTIONARY_BATCH if any(chunk.has_dictionary_page for chunk in chunks) else _PARQUET_BATCH

    def read(rows: int) -> Any:
        return opened.iter_batches(batch_size=rows, row_groups=[group], columns=columns, use_threads=False)

    try:
        of_row = size // max(about.num_rows, 1)
        if about.num_rows > _PARQUET_SLICE and (first := next(read(_PARQUET_SLICE), None)):
            of_row = max(of_row, first.nbytes // len(first))
        yield from read(min(max(_BLOCK // max(of_row, 1), 1), most))
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise BadInput(f"data file {file} is damaged: {error}") from None


def _values(rows: Any) -> list[dict[str, Any] | str]:
    """Of each row its columns, or why they cannot be had: a date after the year 9999, text that is not UTF-8."""
    try:
        return list(rows.to_pylist())
    except (ValueError, OverflowError) as error:
        if len(rows) == 1:
            return [f"a value cannot be read: {error}"]
    return [value for at in range(len(rows)) for value in _values(rows[at : at + 1])]


def _dataset_rows(source: Source, start: int) -> Iterator[Row]:
    loaded = hub_dataset(source)
    part = iter(loaded.select(range(start, len(loaded))))
    for number in itertools.count(start + 1):
        try:
            value = next(part)
        except StopIteration:
            return
        except Exception as error:  # decoding a column may want a library, or find damage
            raise BadInput(f"data set {source.path} row {number} cannot be read: {error}") from None
        yield Row(source.path, number, _from_columns(value))


def _from_columns(row: dict[str, Any]) -> dict[str, Any]:
    """Columns give every key to every message, null where it was absent; chat templates ask what is there."""
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value


def hub_dataset(source: Source) -> Any:
    """An Arrow folder (`Dataset.save_to_disk`) or a hub name, through `datasets`.

    Raises:
        BadInput: it cannot be loaded.
    """
    import datasets

    try:
        if not Path(source.path).is_dir():
            return datasets.load_dataset(source.path, source.subset, split=source.split)
        loaded = datasets.load_from_disk(source.path)
        if not isinstance(loaded, datasets.DatasetDict):
            return loaded
        if source.split not in loaded:
            raise KeyError(f"it has the splits {', '.join(loaded)}")
        return loaded[source.split]
    except Exception as error:  # datasets raises many kinds; all mean that the data cannot be had
        raise BadInput(f"data set {source.path} (split {source.split}) cannot be loaded: {error}") from None
