"""Training rows that stand in an evaluation set: equal after normalisation, or sharing 13 words in a row.

13-grams as in Brown et al. 2020 (GPT-3, appendix C), which also leaves out those that are common: here, the ones that
stand in more than ten rows of the evaluation set (instructions, boilerplate). System messages are not compared.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy
from numpy.typing import NDArray

from fullft.data.cache import TokenSet, scans_of, waiting
from fullft.data.formats import BadRow, parse_row
from fullft.data.pieces import Scan, pieces, require_unchanged
from fullft.data.prepare import run_pieces
from fullft.data.quality import plain_text, text_key, words
from fullft.data.sources import Piece, hub_dataset, kind_of, read_piece, read_rows
from fullft.errors import BadInput
from fullft.recipe import Source

WORDS = 13
_COMMON = 10  # evaluation rows
_FORMAT = 1  # raise when the same rows give other keys
_SHOWN = 10
_FACTORS = numpy.array([pow(0x9E3779B97F4A7C15, power, 1 << 64) for power in range(1, WORDS + 1)], numpy.uint64)


@dataclass(frozen=True)
class Evaluated:
    """The rows of one evaluation set by key and by 13-gram, both sorted. `fingerprint`: of its contents."""

    name: str
    fingerprint: str
    keys: NDArray[numpy.uint64]
    grams: NDArray[numpy.uint64]


@dataclass(frozen=True)
class Leaks:
    """What of a training set stands in evaluation sets. `counts[evaluation set]`: rows equal and overlapping."""

    documents: NDArray[numpy.int64]
    counts: dict[str, dict[str, int]]
    examples: list[str]

    def describe(self, name: str) -> list[str]:
        """A line for each evaluation set that rows of the training set `name` stand in."""
        return [
            f"{name}: {sum(kinds.values())} rows overlap with {evaluated} ({kinds['equal']} are equal, "
            f"{kinds['overlapping']} share {WORDS} words in a row)"
            for evaluated, kinds in self.counts.items()
            if sum(kinds.values())
        ]


def index(name: str, sources: Sequence[Source], cache: Path) -> Evaluated:
    """The rows of an evaluation set, from the cache. Rows that cannot be used are told where it is measured.

    Raises:
        BadInput: a file of it cannot be read, or changed meanwhile.
    """
    contents: list[Any] = []
    scanned = [(source, scans_of(source, cache)) for source in sources]
    for source, scans in scanned:
        contents += [source.model_dump(exclude={"path"}), [scan.sha256 for scan in scans]]
        contents += [] if scans else [hub_dataset(source)._fingerprint]
        contents += [kind_of(scan.file) for scan in scans]
    key = hashlib.sha256(json.dumps([_FORMAT, contents], default=str).encode()).hexdigest()[:20]
    file = cache / f"evaluation-{key}.npz"
    if (found := _remembered(file)) is None:
        with waiting(filelock.FileLock(file.with_suffix(".lock")), f"{name} is indexed by another process"):
            if (found := _remembered(file)) is None:
                with _unchanged(name, scanned):
                    found = _read_evaluated(sources)
                partial = file.with_suffix(".tmp.npz")
                numpy.savez(partial, keys=found[0], grams=found[1])
                partial.replace(file)
    return Evaluated(name, key, *found)


@contextmanager
def _unchanged(name: str, scanned: Sequence[tuple[Source, list[Scan]]]) -> Iterator[None]:
    """What is read within is remembered for the files as they were scanned: BadInput if they are others by its end."""
    try:
        yield
    except (BadInput, OSError):
        for source, scans in scanned:
            require_unchanged(name, source, scans)  # a file that is gone, or is being written, fails in many ways
        raise
    for source, scans in scanned:
        require_unchanged(name, source, scans)


def _remembered(file: Path) -> tuple[NDArray[numpy.uint64], NDArray[numpy.uint64]] | None:
    """Keys and grams of an index; None if it is not there, or damaged."""
    try:
        with numpy.load(file) as found:
            return found["keys"], found["grams"]
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None


def _read_evaluated(sources: Sequence[Source]) -> tuple[NDArray[numpy.uint64], NDArray[numpy.uint64]]:
    keys, grams = [], []
    hashes = _WordHashes()
    for row, whose in ((row, source) for source in sources for row in read_rows(source)):
        with suppress(BadRow):
            example = parse_row(row.value or {}, whose)
            keys.append(text_key(example))
            grams.append(numpy.unique(_grams(words(plain_text(example)), hashes)))
    all_grams, times = numpy.unique(numpy.concatenate([*grams, numpy.empty(0, numpy.uint64)]), return_counts=True)
    return numpy.unique(numpy.array(keys, numpy.uint64)), all_grams[times <= _COMMON]


class _WordHashes(dict[str, int]):
    """64-bit hash of a word, remembered."""

    def __missing__(self, word: str) -> int:
        if len(self) > 1_000_000:
            self.clear()
        self[word] = value = int.from_bytes(
            hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"
        )
        return value


def _grams(text: list[str], hashes: _WordHashes) -> NDArray[numpy.uint64]:
    """Hash of each 13 words in a row: Σ hash(word i)·factor i, modulo 2⁶⁴."""
    if len(text) < WORDS:
        return numpy.empty(0, numpy.uint64)
    values = numpy.array([hashes[word] for word in text], numpy.uint64)
    windows = numpy.lib.stride_tricks.sliding_window_view(values, WORDS)
    hashed: NDArray[numpy.uint64] = (windows * _FACTORS).sum(axis=1, dtype=numpy.uint64)
    return hashed


def find_leaks(tokens: TokenSet, evaluated: Sequence[Evaluated], executor: Executor | None = None) -> Leaks:
    """The documents of a prepared set that stand in the evaluation sets; remembered beside the set's tokens."""
    if not evaluated or not len(tokens.documents):
        return Leaks(numpy.empty(0, numpy.int64), {}, [])
    content = [(one.name, one.fingerprint) for one in evaluated]
    file = tokens.folder / f"leaks-{hashlib.sha256(repr(content).encode()).hexdigest()[:12]}.json"
    if (found := _read(file)) is None:
        with waiting(filelock.FileLock(file.with_suffix(".lock")), "leaks are looked for by another process"):
            if _read(file) is None:
                _write(tokens, evaluated, file, executor)
        found = json.loads(file.read_text())
    counts = {one.name: {"equal": 0, "overlapping": 0} for one in evaluated}
    for *_, name, kind in found:
        counts[name][kind] += 1
    places = [tokens.place(int(document)) for document, *_ in found[:_SHOWN]]
    examples = [
        f"{path} row {row} stands in {name}"
        if kind == "equal"
        else f"{path} row {row} shares {WORDS} words with {name}"
        for (path, row), (_, name, kind) in zip(places, found, strict=False)
    ]
    return Leaks(numpy.unique([document for document, *_ in found]).astype(numpy.int64), counts, examples)


def _read(file: Path) -> list[Any] | None:
    """What is remembered; None if nothing is, or it is damaged."""
    try:
        found: list[Any] = json.loads(file.read_text())
        return found
    except (OSError, ValueError):
        return None


def _write(tokens: TokenSet, evaluated: Sequence[Evaluated], file: Path, executor: Executor | None) -> None:
    require_unchanged(tokens.name, tokens.source, tokens.scans)
    work = file.with_suffix(".pickle")
    work.write_bytes(pickle.dumps((tokens.source, list(evaluated))))
    try:
        title = f"looking for leaks in {tokens.name}"
        with _unchanged(tokens.name, [(tokens.source, tokens.scans)]):
            parts = dict(enumerate(pieces(tokens.source, tokens.scans)))
            rows = [row for part in run_pieces(search_piece, work, parts, title, executor) for row in part]
    finally:
        work.unlink(missing_ok=True)
    document_of = _documents_at(tokens, [(file_number, row) for file_number, row, *_ in rows])
    found = [(at, name, kind) for at, (*_, name, kind) in zip(document_of, rows, strict=True) if at >= 0]
    partial = file.with_suffix(".tmp")
    partial.write_text(json.dumps(found))
    partial.replace(file)


def _documents_at(tokens: TokenSet, places: list[tuple[int, int]]) -> list[int]:
    """The document of each (file, row); -1 where the row made none."""
    if not places:
        return []
    shift = 1 << 40
    have = tokens.documents["file"].astype(numpy.int64) * shift + tokens.documents["row"]
    wanted = numpy.array([number * shift + row for number, row in places])
    order = numpy.argsort(have, kind="stable")
    at = order[numpy.minimum(numpy.searchsorted(have[order], wanted), len(have) - 1)]
    return [int(one) if have[one] == place else -1 for one, place in zip(at, wanted, strict=True)]


_loaded: dict[Path, Any] = {}


def search_piece(work_file: Path, _: int, piece: Piece) -> list[tuple[int, int, str, str]]:
    """(file, row, evaluation set, equal or overlapping) of the rows of a piece that stand in an evaluation set."""
    if work_file not in _loaded:
        _loaded.clear()
        _loaded[work_file] = pickle.loads(work_file.read_bytes())
    source, evaluated = _loaded[work_file]
    hashes = _WordHashes()
    found = []
    for row in read_piece(source, piece):
        try:
            example = parse_row(row.value or {}, source)
        except BadRow:
            continue
        key, grams = text_key(example), _grams(words(plain_text(example)), hashes)
        for one in evaluated:
            if _contains(one.keys, numpy.array([key], numpy.uint64)):
                found.append((piece.file, row.number, one.name, "equal"))
            elif _contains(one.grams, grams):
                found.append((piece.file, row.number, one.name, "overlapping"))
    return found


def _contains(known: NDArray[numpy.uint64], values: NDArray[numpy.uint64]) -> bool:
    if not len(known) or not len(values):
        return False
    at = numpy.minimum(numpy.searchsorted(known, values), len(known) - 1)
    return bool((known[at] == values).any())
