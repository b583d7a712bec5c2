"""The tokenized rows of each data set on disk: made once, then memory-mapped by every rank.

One folder a set, named by a fingerprint of everything that its tokens depend on, and of nothing else: length of
sequences, packing, weights and what is done with bad rows are applied when the set is used, so changing them costs no
new tokens. A folder is written under another name and renamed when it is complete.

<cache>/<fingerprint>-<versions>/
  part-00000.tokens   int32 for each token: its id where it is trained, ~id where it is not
  documents.npy       one `DOCUMENT` for each row that can be used
  summary.json        what became of the rows; sizes of the parts
  sequences-…/        documents packed into sequences of one length: see `sequences.py`
  leaks-….json        documents that stand in evaluation sets: see `leaks.py`
<cache>/files.json    hashes of files, and where they are cut; evaluation-….npz: the words of evaluation sets

One process prepares while the others wait on a file lock: no collective is open meanwhile, so no time-out of one can
end the run.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Executor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import filelock
import numpy
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from fullft.data.pieces import Scan, file_names, scan_file, stat_of
from fullft.data.progress import progress
from fullft.data.sources import hub_dataset, kind_of, read_by_datasets, source_files
from fullft.data.tokens import backend
from fullft.errors import BadInput
from fullft.recipe import Data, Source

_FORMAT = 5  # raise when the same input gives other tokens
_SCAN_FORMAT = 2  # raise when a file is scanned for more, or is cut elsewhere
DOCUMENT = numpy.dtype(
    [
        ("start", "i8"),  # of its first token in the set
        ("row", "i8"),  # number in its file, from 1
        ("key", "u8"),  # of its normalised text
        ("length", "i4"),  # tokens
        ("trained", "i4"),  # tokens that are targets of the loss
        ("file", "i4"),  # which of the source's files, in order of their names
    ]
)


@dataclass(frozen=True)
class TokenSet:
    """A prepared data set. `documents`: [documents] `DOCUMENT`, memory-mapped; `scans`: of its files, as they were."""

    name: str
    source: Source
    folder: Path
    summary: dict[str, Any]
    documents: NDArray[Any]
    files: list[str]
    scans: list[Scan] = field(default_factory=list)
    _parts: dict[int, NDArray[numpy.int32]] = field(default_factory=dict, compare=False)

    @property
    def fingerprint(self) -> str:
        """Without the versions of libraries: a run goes on under others if they give as many tokens of each row."""
        return self.folder.name.partition("-")[0]

    def read(self, start: int, length: int) -> tuple[NDArray[numpy.int32], NDArray[numpy.bool_]]:
        """(ids, trained) of `length` tokens of one document from token `start` of the set."""
        firsts = self.summary["part_starts"]
        part = int(numpy.searchsorted(firsts, start, side="right")) - 1
        if part not in self._parts:
            self._parts[part] = numpy.memmap(self.folder / part_name(part), numpy.int32, "r")
        stored = self._parts[part][start - firsts[part] : start - firsts[part] + length]
        trained = stored >= 0
        return numpy.where(trained, stored, ~stored), trained

    def place(self, document: int) -> tuple[str, int]:
        """File and row number of a document."""
        found = self.documents[document]
        return self.files[int(found["file"])], int(found["row"])


def write_npy(raw: Path, npy: Path, dtype: numpy.dtype[Any]) -> None:
    """Put the header of numpy's format before raw records, without holding them in memory."""
    header = {"descr": numpy.lib.format.dtype_to_descr(dtype), "fortran_order": False,
              "shape": (raw.stat().st_size // dtype.itemsize,)}  # fmt: skip
    with npy.open("wb") as out, raw.open("rb") as records:
        numpy.lib.format.write_array_header_1_0(out, header)
        shutil.copyfileobj(records, out, 1 << 20)
        out.flush()
        os.fsync(out.fileno())
    raw.unlink()


def part_name(number: int) -> str:
    return f"part-{number:05}.tokens"


def open_sets(
    data: Data, tokenizer: PreTrainedTokenizerBase, cache_folder: Path, executor: Executor | None = None
) -> list[TokenSet]:
    """The prepared training sets (train, then replay), from the cache; what it lacks is prepared first.

    Args:
        executor: where the pieces are tokenized; None: processes on all cores of this machine.

    Raises:
        BadInput: a set cannot be read, or the cache lacks it and data.on_missing_cache is error.
    """
    try:
        cache_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"data.cache_dir: {cache_folder} cannot be made: {error}") from None
    sets, problems = [], list[str]()
    for name, source in zip(data.names, data.training_sets, strict=True):
        try:
            sets.append(_open_set(name, source, data, tokenizer, cache_folder, executor))
        except BadInput as error:
            problems += error.problems
    if problems:
        raise BadInput(problems)
    return sets


def _open_set(
    name: str, source: Source, data: Data, tokenizer: PreTrainedTokenizerBase, cache: Path, executor: Executor | None
) -> TokenSet:
    from fullft.data.prepare import write_tokens

    scans = scans_of(source, cache)
    folder = cache / f"{fingerprint(source, scans, data.train_on, tokenizer)}-{_libraries()}"
    if not is_complete(folder):
        if data.on_missing_cache == "error" and executor is None:
            raise BadInput(f"data set {name} is not prepared in {cache}: run `fullft prepare` with this recipe first")
        with waiting(filelock.FileLock(folder.with_suffix(".lock")), f"data set {name} is prepared by another process"):
            if not is_complete(folder):
                write_tokens(name, source, scans, tokenizer, data.train_on, folder, executor)
    summary = json.loads((folder / "summary.json").read_text())
    # An array of no documents cannot be mapped.
    mode: Any = "r" if summary["documents"] else None
    documents = numpy.load(folder / "documents.npy", mmap_mode=mode)
    files = file_names(source, scans)  # of today: the cache is found by contents, wherever they lie
    summary["first_bad_rows"] = [f"{files[file]} row {row}: {why}" for file, row, why in summary["first_bad_rows"]]
    for rows in summary["troubled_rows"].values():
        rows[:] = [f"{files[file]} row {row}" for file, row in rows]
    return TokenSet(name, source, folder, summary, documents, files, scans)


def is_complete(folder: Path) -> bool:
    """Whether a prepared set is there whole: a folder that lost a part since is not trusted."""
    try:
        summary = json.loads((folder / "summary.json").read_text())
        sizes = {part_name(at): size for at, size in enumerate(summary["part_bytes"])}
        sizes["documents.npy"] = summary["documents_bytes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


@contextmanager
def waiting(lock: filelock.BaseFileLock, why: str) -> Iterator[None]:
    """Hold the lock; says why it takes long."""
    try:
        lock.acquire(timeout=5)
    except filelock.Timeout:
        print(f"waiting: {why} ({lock.lock_file})", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def fingerprint(source: Source, scans: list[Scan], train_on: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of all that the tokens depend on: contents of files, tokenizer, template, settings. No path decides."""
    parts: list[Any] = [_FORMAT, train_on, source.format, source.fields, source.limit, tokenizer.chat_template]
    parts += [backend(tokenizer).to_str(), tokenizer.special_tokens_map]
    parts += [source.subset, source.split] if read_by_datasets(source) else []  # another part of the same files
    parts += [kind_of(scan.file) for scan in scans]  # it says how a file is read
    parts += [scan.sha256 for scan in scans] or [hub_dataset(source)._fingerprint]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:20]


def _libraries() -> str:
    """Hash of the versions of what renders templates and tokenizes."""
    versions = [version(name) for name in ("tokenizers", "transformers", "jinja2")]
    return hashlib.sha256(repr(versions).encode()).hexdigest()[:6]


def scans_of(source: Source, cache: Path) -> list[Scan]:
    """Hashes of the files of a source. A file is read again only when its size, times or inode have changed."""
    files = source_files(source)
    memo = cache / "files.json"
    known = _known_scans(memo)
    try:
        if not all(_is_known(file, known) for file in files):
            with (
                waiting(filelock.FileLock(cache / "files.lock"), "files are read by another process")
                if os.access(cache, os.W_OK)
                else nullcontext()
            ):
                known = _known_scans(memo)
                known |= _new_scans([file for file in files if not _is_known(file, known)])
                with suppress(OSError):  # only remembers; a cache that cannot be written can still be read
                    partial = memo.with_suffix(".tmp")
                    partial.write_text(json.dumps(known))
                    partial.replace(memo)
    except FileNotFoundError as error:
        raise BadInput(f"data file {error.filename} was there a moment ago, and is not any more") from None
    found = ((file, known[str(file.absolute())]) for file in files)
    return [
        Scan(file, scan["sha256"], [(start, rows) for start, rows in scan["cuts"]], scan["rows"], scan["stat"])
        for file, scan in found
    ]


def _new_scans(files: list[Path]) -> dict[str, Any]:
    """What files.json remembers of the files."""
    found, started = dict[str, Any](), time.time_ns()
    for file, scan in zip(files, _scan_files(files), strict=True):
        # A file written a moment ago may change again within the same tick of its clock.
        settled = started - max(scan.stat[1:3]) > 2e9 and stat_of(file) == scan.stat
        found[str(file.absolute())] = {
            "sha256": scan.sha256, "cuts": scan.cuts, "rows": scan.rows, "stat": scan.stat, "settled": settled,
            "format": _SCAN_FORMAT,
        }  # fmt: skip
    return found


def _scan_files(files: list[Path]) -> list[Scan]:
    """Several at once: the hash of one leaves the interpreter to the others."""
    stopped = threading.Event()
    total = sum(file.stat().st_size for file in files)
    with progress(total, "reading files") as advance, ThreadPoolExecutor() as pool:

        def read(count: int) -> None:
            if stopped.is_set():
                raise CancelledError
            advance(count)

        running = [pool.submit(scan_file, file, read) for file in files]
        try:
            for done in as_completed(running):
                done.result()
        finally:
            stopped.set()  # after Ctrl-C, or one that cannot be read, no file is read to its end
        return [done.result() for done in running]


def _is_known(file: Path, known: dict[str, Any]) -> bool:
    scan = known.get(str(file.absolute()), {})
    return bool(scan.get("settled")) and scan.get("format") == _SCAN_FORMAT and scan.get("stat") == stat_of(file)


def _known_scans(memo: Path) -> dict[str, Any]:
    try:
        known = json.loads(memo.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    scans = known.items() if isinstance(known, dict) else ()
    return {file: scan for file, scan in scans if isinstance(scan, dict) and {"sha256", "cuts", "rows"} <= scan.keys()}


def row_problems(found: TokenSet, data: Data) -> list[str]:
    """Rows that cannot be used, if the recipe does not say to skip them, or if nothing is left."""
    totals = found.summary
    bad, rows, documents = totals["bad_rows"], totals["rows"], totals["documents"]
    if bad and (data.on_bad_row == "error" or not documents):
        shown = totals["first_bad_rows"]
        more = f" (the first {len(shown)} are shown)" if bad > len(shown) else ""
        advice = "mend them, or leave them out with data.on_bad_row=skip" if documents else "no row is left"
        return [f"{bad} of {rows} rows cannot be used{more}; {advice}", *shown]
    return [] if rows else [f"data set {found.source.path} has no rows"]
