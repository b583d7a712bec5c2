"""How a source is shared among processes: its files are hashed once, and cut where each piece can be read by itself."""

from __future__ import annotations

import hashlib
import io
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from fullft.data.sources import (
    Piece,
    hub_dataset,
    jsonl_lines,
    kind_of,
    list_items,
    open_parquet,
    read_by_datasets,
    row_groups,
    source_files,
)
from fullft.errors import BadInput
from fullft.recipe import Source

_SMALLEST_PIECE, _LARGEST_PIECE, _PIECES = 1 << 20, 64 << 20, 256
_BLOCK = 1 << 20  # bytes read at once
_GROUP_PIECES = 16  # of a Parquet row group: each reads, and drops, what is before it in its group


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
        for byte, _ in list_items(file, text):
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
            rows = sum(1 for _ in itertools.islice(jsonl_lines(Path(piece.path), piece), left))
        rows = left if rows is None else min(rows, left)  # None: a damaged .json, where reading ends in any case
        yield replace(piece, rows=rows)
        left -= rows
        if not left:
            return


def _parquet_pieces(file: Path, number: int) -> list[Piece]:
    found, before = [], 0
    for size, rows in row_groups(open_parquet(file)):
        step = max(math.ceil(rows * _step(size // _GROUP_PIECES) / max(size, 1)), 1)
        for start in range(before, before + rows, step):
            count = min(step, before + rows - start)
            found.append(Piece(number, str(file), start, None, start, size * count // rows, count))
        before += rows
    return found
