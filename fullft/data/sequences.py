"""The documents of a set, cut to one length and packed: made once for each length, then memory-mapped.

A document is never copied for this: a sequence is a list of slices of the set's tokens.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy
from numpy.typing import NDArray

from fullft.data.cache import TokenSet, row_problems, waiting, write_npy
from fullft.data.packing import pack
from fullft.errors import BadInput
from fullft.recipe import Data

_CHUNK = 1 << 18  # documents packed together; the last sequence of a chunk may stay half empty
SLICE = numpy.dtype([("start", "i8"), ("document", "i4"), ("length", "i4")])  # start: token of the set


@dataclass(frozen=True)
class Sequences:
    """Sequence b is `slices[starts[b]:starts[b + 1]]`, packed from the left. `lengths`: its tokens without padding."""

    tokens: TokenSet
    slices: NDArray[Any]
    starts: NDArray[numpy.int64]
    lengths: NDArray[numpy.int32]
    summary: dict[str, Any]

    def __len__(self) -> int:
        return len(self.lengths)


def open_sequences(tokens: TokenSet, data: Data, left_out: NDArray[numpy.int64] | None = None) -> Sequences:
    """The sequences of a prepared set, made if they are not there.

    Args:
        left_out: documents that are not to be trained on.

    Raises:
        BadInput: rows cannot be used or are too long and the recipe does not say what to do, or none is left.
    """
    problems = row_problems(tokens, data)
    if not len(tokens.documents):
        raise BadInput(problems)
    left_out = numpy.empty(0, numpy.int64) if left_out is None else left_out
    kind = "packed" if data.packing else "single"
    folder = tokens.folder / f"sequences-{data.sequence_length}-{kind}-{data.on_too_long}"
    if len(left_out):
        folder = folder.with_name(f"{folder.name}-{_key(left_out)}")
    if not _is_complete(folder):
        with waiting(filelock.FileLock(folder.with_suffix(".lock")), "sequences are packed by another process"):
            try:
                if not _is_complete(folder):
                    _write(tokens, data, left_out, folder)
            except BadInput as error:
                problems += error.problems
    if problems:
        raise BadInput(problems)
    slices, starts, lengths = (
        numpy.load(folder / f"{name}.npy", mmap_mode="r") for name in ("slices", "starts", "lengths")
    )
    return Sequences(tokens, slices, starts, lengths, json.loads((folder / "summary.json").read_text()))


def _is_complete(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / "summary.json").read_text())["bytes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def _key(documents: NDArray[numpy.int64]) -> str:
    return hashlib.sha256(documents.tobytes()).hexdigest()[:12]


def _write(tokens: TokenSet, data: Data, left_out: NDArray[numpy.int64], folder: Path) -> None:
    """Cut and pack the documents in chunks, so that memory does not grow with their number; only lengths are kept."""
    _require_short(tokens, data, left_out)
    partial = folder.with_suffix(".partial")  # the lock keeps others off it and off a folder that lost a file
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    partial.mkdir()
    totals: Counter[str] = Counter(left_out=len(left_out))
    counts: list[NDArray[numpy.int32]] = []  # slices of each sequence
    lengths: list[NDArray[numpy.int32]] = []
    try:
        with (partial / "slices.raw").open("wb") as written:
            for first, documents in _chunks(tokens):
                slices, what = fit(tokens, documents, first, data, left_out)
                totals.update(what)
                if not len(slices):
                    continue
                starts = numpy.arange(len(slices) + 1)
                if data.packing:
                    order, starts = pack(slices["length"], data.sequence_length)
                    slices = slices[order]
                written.write(slices.tobytes())
                counts.append(numpy.diff(starts).astype(numpy.int32))
                lengths.append(numpy.add.reduceat(slices["length"], starts[:-1]).astype(numpy.int32))
        if not lengths:
            long, out = totals["too_long_rows"], len(left_out)
            why = f"{long} rows were above data.sequence_length" if long else f"{out} rows were left out"
            raise BadInput(f"data set {tokens.name}: nothing left to train on ({why})")
        write_npy(partial / "slices.raw", partial / "slices.npy", SLICE)
        all_lengths = numpy.concatenate(lengths)
        numpy.save(partial / "starts.npy", numpy.concatenate([[0], numpy.cumsum(numpy.concatenate(counts))]))
        numpy.save(partial / "lengths.npy", all_lengths)
        fill = int(all_lengths.sum()) / (len(all_lengths) * data.sequence_length)
        summary: dict[str, Any] = dict(totals) | {"sequences": len(all_lengths), "fill": fill}
        summary["bytes"] = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
        (partial / "summary.json").write_text(json.dumps(summary))
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _chunks(tokens: TokenSet) -> Iterator[tuple[int, NDArray[Any]]]:
    """(number of the first, copies of the documents) of each chunk; mapped anew, as mapped pages count as used."""
    for first in range(0, len(tokens.documents), _CHUNK):
        mapped = numpy.load(tokens.folder / "documents.npy", mmap_mode="r")
        yield first, numpy.array(mapped[first : first + _CHUNK])


def _wanted(first: int, count: int, left_out: NDArray[numpy.int64]) -> NDArray[numpy.bool_]:
    wanted = numpy.ones(count, numpy.bool_)
    wanted[left_out[(left_out >= first) & (left_out < first + count)] - first] = False
    return wanted


def _require_short(tokens: TokenSet, data: Data, left_out: NDArray[numpy.int64]) -> None:
    """Raises BadInput when documents are too long and data.on_too_long is error."""
    if data.on_too_long != "error":
        return
    many = longest = longest_at = 0
    for first, documents in _chunks(tokens):
        lengths = documents["length"] * _wanted(first, len(documents), left_out)
        many += int((lengths > data.sequence_length).sum())
        if lengths.max() > longest:
            longest, longest_at = int(lengths.max()), first + int(lengths.argmax())
    if many:
        file, row = tokens.place(longest_at)
        raise BadInput(
            f"data.sequence_length: {many} of {tokens.summary['rows']} rows have more than {data.sequence_length} "
            f"tokens, the longest {longest} ({file} row {row}); raise it, or choose data.on_too_long=drop, truncate or "
            "split"
        )


def fit(
    tokens: TokenSet, documents: NDArray[Any], first: int, data: Data, left_out: NDArray[numpy.int64]
) -> tuple[NDArray[Any], dict[str, int]]:
    """Documents (from number `first` on) as slices of at most sequence_length tokens, in order, and what became of
    those that are longer."""
    limit = data.sequence_length
    lengths = documents["length"]
    wanted = _wanted(first, len(documents), left_out)
    long = numpy.flatnonzero(wanted & (lengths > limit))
    short = numpy.flatnonzero(wanted & (lengths <= limit))
    slices = numpy.empty(len(short), SLICE)
    slices["start"], slices["document"], slices["length"] = documents["start"][short], short + first, lengths[short]
    cut = [] if data.on_too_long == "drop" else [
        (start, document + first, length, trained)
        for document in long.tolist()
        for start, length, trained in _cut(tokens, documents[document], limit, data.on_too_long)
    ]  # fmt: skip
    useful = [(start, document, length) for start, document, length, trained in cut if trained]
    if useful:
        slices = numpy.concatenate([slices, numpy.array(useful, SLICE)])
        slices = slices[numpy.argsort(slices["start"], kind="stable")]
    return slices, {
        "documents": len(slices), "tokens": int(slices["length"].sum()), "too_long_rows": len(long),
        "trained_tokens": int(documents["trained"][short].sum()) + sum(trained for *_, trained in cut),
        "tokens_cut": int(lengths[long].sum()) - sum(length for _, _, length, _ in cut),
        "trained_tokens_cut": int(documents["trained"][long].sum()) - sum(trained for *_, trained in cut),
        "documents_without_trained_tokens": len(cut) - len(useful),
    }  # fmt: skip


def _cut(tokens: TokenSet, document: Any, limit: int, on_too_long: str) -> list[tuple[int, int, int]]:
    """(start, length, trained tokens) of the pieces of a long document; the first token of a piece is never trained."""
    start, length = int(document["start"]), int(document["length"])
    _, trained = tokens.read(start, length)
    begins = range(0, length, limit) if on_too_long == "split" else [0]
    return [
        (start + begin, len(piece), int(piece[1:].sum()))
        for begin in begins
        if len(piece := trained[begin : begin + limit])
    ]
