"""The documents of a set, cut to one length and packed: made once for each length, then memory-mapped.

A document is never copied for this: a sequence is a list of slices of the set's tokens.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy
from numpy.typing import NDArray

from fullft.data.cache import TokenSet, row_problems, waiting
from fullft.data.packing import pack
from fullft.errors import BadInput
from fullft.recipe import Data

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
    slices, summary = fit(tokens, data, left_out)
    if data.packing:
        order, starts = pack(slices["length"], data.sequence_length)
        slices = slices[order]
    else:
        starts = numpy.arange(len(slices) + 1, dtype=numpy.int64)
    lengths = numpy.add.reduceat(slices["length"], starts[:-1]).astype(numpy.int32)
    summary |= {"sequences": len(lengths), "fill": int(lengths.sum()) / (len(lengths) * data.sequence_length)}
    partial = folder.with_suffix(".partial")  # the lock keeps others off it and off a folder that lost a file
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    partial.mkdir()
    try:
        for name, array in (("slices", slices), ("starts", starts), ("lengths", lengths)):
            numpy.save(partial / f"{name}.npy", array)
        summary["bytes"] = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
        (partial / "summary.json").write_text(json.dumps(summary))
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def fit(tokens: TokenSet, data: Data, left_out: NDArray[numpy.int64]) -> tuple[NDArray[Any], dict[str, Any]]:
    """The documents as slices of at most sequence_length tokens, in order, and what became of those that are longer.

    Raises:
        BadInput: some are too long and data.on_too_long is error, or nothing is left to train on.
    """
    documents, limit = tokens.documents, data.sequence_length
    lengths = documents["length"].astype(numpy.int32)
    wanted = numpy.ones(len(lengths), numpy.bool_)
    wanted[left_out] = False
    long = numpy.flatnonzero(wanted & (lengths > limit))
    if len(long) and data.on_too_long == "error":
        longest = int(long[numpy.argmax(lengths[long])])
        file, row = tokens.place(longest)
        raise BadInput(
            f"data.sequence_length: {len(long)} of {tokens.summary['rows']} rows have more than {limit} tokens, the "
            f"longest {lengths[longest]} ({file} row {row}); raise it, or choose data.on_too_long=drop, truncate or "
            "split"
        )
    short = numpy.flatnonzero(wanted & (lengths <= limit))
    slices = numpy.empty(len(short), SLICE)
    slices["start"], slices["document"], slices["length"] = documents["start"][short], short, lengths[short]
    cut = [] if data.on_too_long == "drop" else [
        (start, document, length, trained)
        for document in long.tolist()
        for start, length, trained in _cut(tokens, document, limit, data.on_too_long)
    ]  # fmt: skip
    useful = [(start, document, length) for start, document, length, trained in cut if trained]
    kept_tokens = int(lengths[short].sum()) + sum(length for _, _, length in useful)
    slices = numpy.concatenate([slices, numpy.array(useful, SLICE)]) if useful else slices
    if useful:
        slices = slices[numpy.argsort(slices["start"], kind="stable")]
    trained_tokens = int(documents["trained"][short].sum()) + sum(trained for *_, trained in cut)
    summary = {
        "documents": len(slices), "tokens": kept_tokens, "trained_tokens": trained_tokens, "too_long_rows": len(long),
        "tokens_cut": int(lengths[long].sum()) - sum(length for _, _, length, _ in cut),
        "trained_tokens_cut": int(documents["trained"][long].sum()) - sum(trained for *_, trained in cut),
        "documents_without_trained_tokens": len(cut) - len(useful), "left_out": len(left_out),
    }  # fmt: skip
    if not len(slices):
        why = (
            f"{len(long)} rows were above data.sequence_length" if len(long) else f"{len(left_out)} rows were left out"
        )
        raise BadInput(f"data set {tokens.name}: nothing left to train on ({why})")
    return slices, summary


def _cut(tokens: TokenSet, document: int, limit: int, on_too_long: str) -> list[tuple[int, int, int]]:
    """(start, length, trained tokens) of the pieces of a long document; the first token of a piece is never trained."""
    start, length = int(tokens.documents["start"][document]), int(tokens.documents["length"][document])
    _, trained = tokens.read(start, length)
    begins = range(0, length, limit) if on_too_long == "split" else [0]
    return [
        (start + begin, len(piece), int(piece[1:].sum()))
        for begin in begins
        if len(piece := trained[begin : begin + limit])
    ]
