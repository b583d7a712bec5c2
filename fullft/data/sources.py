"""Files, folders and hub names → rows, in pieces that can be read apart from each other.

JSONL and JSON are read here and not by `datasets`, because only so has every row its number in its file, and one bad
line is one bad row. Everything is read as a stream: no file, and no row group of Parquet, needs to fit into memory.
"""

from __future__ import annotations

import glob
import hashlib
import io
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, TextIO

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


_SMALLEST_PIECE, _LARGEST_PIECE, _PIECES = 1 << 20, 64 << 20, 256
_GROUP_PIECES = 16  # of a Parquet row group: each reads, and drops, what is before it in its group
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


# Scanning: one pass over the bytes of a file for its hash and for where it can be cut


@dataclass(frozen=True)
class Scan:
    """A file, its sha256, (byte, rows before it) where its pieces start if it is .jsonl or .json, and its `stat_of`.

    `rows`: lines of .jsonl, items of .json; None if it is of another kind, or no list in JSON.
    """

    file: Path
    sha256: str
    cuts: list[tuple[int, int]]
    rows: int | None
    stat: list[int]


def stat_of(file: Path) -> list[int]:
    """Size, times of modification and change in nanoseconds, inode: another list, another content."""
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def file_names(source: Source, scans: list[Scan]) -> list[str]:
    """Names of what rows come from, as `Row.file` has them."""
    return [source.path] if read_by_datasets(source) else [str(scan.file) for scan in scans]


def require_unchanged(name: str, source: Source, scans: list[Scan]) -> None:
    """Raises BadInput when the files of a source are not those that were scanned, or not as they were."""
    try:
        same = [(file, stat_of(file)) for file in source_files(source)] == [(scan.file, scan.stat) for scan in scans]
    except (OSError, BadInput):
        same = False
    if not same:
        raise BadInput(f"data set {name}: its files changed while they were prepared; start again")


class _Hashed(io.FileIO):
    """A file that hashes what is read of it, and tells `advance` how many bytes that is."""

    def __init__(self, file: Path, advance: Callable[[int], None]) -> None:
        super().__init__(file)
        self.sha256 = hashlib.sha256()
        self.advance = advance

    def readinto(self, buffer: Any) -> int:
        count = super().readinto(buffer) or 0
        self.sha256.update(memoryview(buffer)[:count])
        self.advance(count)
        return count


def scan_file(file: Path, advance: Callable[[int], None] = lambda _: None) -> Scan:
    """Hash a file, and cut it at ends of lines or between items: pieces depend on its content alone."""
    stat = stat_of(file)
    step = _step(stat[0] // _PIECES)
    cuts, rows = [(0, 0)], None
    with io.BufferedReader(hashed := _Hashed(file, advance), _BLOCK) as content:
        if kind_of(file) == ".jsonl":
            cuts, rows = _cut_lines(content, step)
        elif kind_of(file) == ".json":
            cuts, rows = _cut_items(file, content, step)
        while content.read(_BLOCK):
            pass
    return Scan(file, hashed.sha256.hexdigest(), cuts, rows, stat)


def _step(size: int) -> int:
    return min(max(size, _SMALLEST_PIECE), _LARGEST_PIECE)


def _cut_lines(content: BinaryIO, step: int) -> tuple[list[tuple[int, int]], int]:
    cuts, at, lines, due = [(0, 0)], 0, 0, step
    while block := content.read(_BLOCK):
        while at + len(block) > due and (end := block.find(b"\n", max(due - at, 0))) >= 0:
            cuts.append((at + end + 1, lines + block.count(b"\n", 0, end + 1)))
            due = at + end + 1 + step
        lines += block.count(b"\n")
        at += len(block)
    return [cut for cut in cuts if cut[0] < at] or [(0, 0)], lines


def _cut_items(file: Path, content: BinaryIO, step: int) -> tuple[list[tuple[int, int]], int | None]:
    cuts, items = [(0, 0)], 0
    text = io.TextIOWrapper(content, "utf-8", newline="")
    try:
        for byte, _ in _list_items(file, text):
            if items and byte >= cuts[-1][0] + step:
                cuts.append((byte, items))
            items += 1
    except (ValueError, RecursionError, BadInput):
        return [(0, 0)], None  # who reads it is told why
    finally:
        text.detach()  # it would close `content`
    return cuts, items


def pieces(source: Source, scans: list[Scan]) -> list[Piece]:
    """How a source is shared among processes; `scans` of its files, in order."""
    return list(_first_pieces(source, scans) if source.limit is not None else _all_pieces(source, scans))


def _all_pieces(source: Source, scans: list[Scan]) -> Iterator[Piece]:
    if read_by_datasets(source):
        count = len(hub_dataset(source))
        count = count if source.limit is None else min(count, source.limit)
        step = max(count // 32, 1000)  # each piece loads the set anew
        for start in range(0, max(count, 1), step):
            size = min(step, count - start)
            yield Piece(0, None, start, None, start, size, size)
        return
    for number, scan in enumerate(scans):
        if kind_of(scan.file) == ".parquet":
            yield from _parquet_pieces(scan.file, number)
            continue
        ends = [*scan.cuts[1:], (scan.stat[0], scan.rows)]
        for (start, before), (end, after) in zip(scan.cuts, ends, strict=True):
            rows = after - before if kind_of(scan.file) == ".json" and after is not None else None
            yield Piece(number, str(scan.file), start, end, before, end - start, rows)


def _first_pieces(source: Source, scans: list[Scan]) -> Iterator[Piece]:
    """The pieces with the first `limit` rows, the last of them cut; files behind it are not opened, as in reading."""
    left = source.limit or 0
    for piece in _all_pieces(source, scans):
        rows = piece.rows
        if piece.path is not None and kind_of(Path(piece.path)) == ".jsonl":
            rows = sum(1 for _ in itertools.islice(_jsonl_lines(Path(piece.path), piece), left))
        rows = left if rows is None else min(rows, left)  # None: a damaged .json, where reading ends in any case
        yield replace(piece, rows=rows)
        left -= rows
        if not left:
            return


def _parquet_pieces(file: Path, number: int) -> list[Piece]:
    found, before = [], 0
    for size, rows in _row_groups(_parquet(file)):
        step = max(math.ceil(rows * _step(size // _GROUP_PIECES) / max(size, 1)), 1)
        for start in range(before, before + rows, step):
            count = min(step, before + rows - start)
            found.append(Piece(number, str(file), start, None, start, size * count // rows, count))
        before += rows
    return found


def _row_groups(file: Any) -> list[tuple[int, int]]:
    """(bytes, rows) of the groups of a Parquet file."""
    groups = (file.metadata.row_group(group) for group in range(file.num_row_groups))
    return [(group.total_byte_size, group.num_rows) for group in groups]


# Reading


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
    for number, line in _jsonl_lines(file, piece):
        yield _parsed(str(file), number, line)


def _jsonl_lines(file: Path, piece: Piece) -> Iterator[tuple[int, bytes]]:
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
            for number, (_, value) in enumerate(_list_items(file, content, piece.start), start=piece.rows_before + 1):
                yield _row(str(file), number, value)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"data file {file} is not valid JSON: {error}; one object a line is a .jsonl file") from None


def _list_items(file: Path, content: TextIO, start: int = 0) -> Iterator[tuple[int, Any]]:
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


def _parquet(file: Path) -> Any:
    import pyarrow.parquet

    try:
        # So the pages of a group come as they are decoded, and not all before the first row.
        return pyarrow.parquet.ParquetFile(file, buffer_size=_BLOCK, pre_buffer=False)
    except (OSError, ValueError) as error:
        raise BadInput(f"data file {file} is not a Parquet file, or is damaged: {error}") from None


def _parquet_rows(file: Path, piece: Piece, used: set[str]) -> Iterator[Row]:
    """Other columns than those `used` are not read: their values are None."""
    opened = _parquet(file)
    names: list[str] = opened.schema_arrow.names
    unused = dict.fromkeys(name for name in names if name not in used)
    number = 0
    for group, (_, rows) in enumerate(_row_groups(opened)):
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
