"""Rows → tokens on disk, piece by piece, on all cores or over hosts by MPI.

A piece is read, tokenized and written by one process, which holds one row at a time (of Parquet, about a MB of
them). A part that is on disk under its own name is whole, so a killed preparation goes on with the parts that are
missing.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy
from transformers import PreTrainedTokenizerBase

from fullft.data.cache import DOCUMENT, part_name, write_npy
from fullft.data.formats import BadRow, Conversation, Pretokenized, Text, parse_row
from fullft.data.pieces import Scan, pieces, require_unchanged
from fullft.data.progress import progress
from fullft.data.quality import plain_text, script, text_key, troubles
from fullft.data.sources import Piece, Row, read_piece, without_rows
from fullft.data.tokens import Tokens, tokenize
from fullft.errors import BadInput
from fullft.recipe import Source

_SHOWN = 10  # rows shown by name


@dataclass(frozen=True)
class Work:
    """What a process needs to tokenize pieces of one set; written to a file, so that any process can take any piece."""

    source: Source
    tokenizer: PreTrainedTokenizerBase
    train_on: str


def write_tokens(
    name: str,
    source: Source,
    scans: list[Scan],
    tokenizer: PreTrainedTokenizerBase,
    train_on: str,
    folder: Path,
    executor: Executor | None,
) -> None:
    """Tokenize all pieces of a set into `folder`, which appears when it is complete. The caller holds the set's lock.

    Raises:
        BadInput: the data cannot be read, changed since `scans`, a file has no rows, or a worker was killed.
        OSError: the disk is full; the parts written so far are used again.
    """
    partial = folder.with_suffix(".partial")
    try:
        cut = pieces(source, scans)
        _write_parts(name, source, [scan.stat for scan in scans], cut, tokenizer, train_on, partial, executor)
    except (BadInput, OSError):
        _require_unchanged(name, source, scans, partial)  # a file that is gone, or is being written, fails in many ways
        raise
    _require_unchanged(name, source, scans, partial)
    _complete(partial, source, scans, cut)
    shutil.rmtree(folder, ignore_errors=True)  # one that has lost a part
    partial.rename(folder)


def _require_unchanged(name: str, source: Source, scans: list[Scan], partial: Path) -> None:
    try:
        require_unchanged(name, source, scans)
    except BadInput:
        shutil.rmtree(partial, ignore_errors=True)  # the folder's name is of what the files held before
        raise


def _write_parts(
    name: str,
    source: Source,
    stats: list[list[int]],
    cut: list[Piece],
    tokenizer: PreTrainedTokenizerBase,
    train_on: str,
    partial: Path,
    executor: Executor | None,
) -> None:
    mark, now = partial / "pieces.json", json.dumps([stats, [astuple(piece) for piece in cut]])
    if partial.exists() and (not mark.exists() or mark.read_text() != now):
        shutil.rmtree(partial)  # parts of other files, or as they were at another time, or cut in another way
    partial.mkdir(parents=True, exist_ok=True)
    for begun in partial.glob("*.tmp"):
        begun.unlink()  # by a process that was killed
    _write(mark, now.encode())
    work = partial / "work.pickle"
    work.write_bytes(pickle.dumps(Work(source, tokenizer, train_on)))
    missing = {number: piece for number, piece in enumerate(cut) if not (partial / f"part-{number:05}.json").exists()}
    if len(missing) < len(cut):
        print(f"{name}: {len(cut) - len(missing)} of {len(cut)} parts were prepared before", flush=True)
    run_pieces(tokenize_piece, work, missing, f"preparing {name}", executor)


def run_pieces(action: Any, work: Path, todo: dict[int, Piece], title: str, executor: Executor | None) -> list[Any]:
    """action(work, number, piece) for all of them, in processes; their results in order of the numbers.

    Raises:
        BadInput: what an action raised, or a process was killed.
    """
    results: dict[int, Any] = {}
    with progress(sum(piece.bytes for piece in todo.values()), title) as advance:
        if executor is None and (len(todo) < 2 or usable_cores() < 2):
            for number, piece in todo.items():
                results[number] = action(work, number, piece)
                advance(piece.bytes)
            return [results[number] for number in sorted(results)]
        with _local_processes(usable_cores()) if executor is None else nullcontext(executor) as pool:
            running = {pool.submit(action, work, number, piece): number for number, piece in todo.items()}
            try:
                for done in as_completed(running):
                    results[running[done]] = done.result()
                    advance(todo[running[done]].bytes)
            except BrokenProcessPool:
                raise BadInput(
                    f"{title}: a worker process was killed (out of memory?); start again, the finished parts are kept"
                ) from None
            except Exception:
                for waiting in running:
                    waiting.cancel()
                raise
    return [results[number] for number in sorted(results)]


def usable_cores() -> int:
    return len(os.sched_getaffinity(0))


@contextmanager
def worker_processes(count: int | None) -> Iterator[Executor | None]:
    """Under mpirun the other ranks, on all hosts; else `count` processes here (default: all cores).

    None on an MPI rank that was a worker, when the work is done.
    """
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ.get("PMI_SIZE") or 1) > 1:
        from mpi4py import MPI
        from mpi4py.futures import MPICommExecutor

        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        with MPICommExecutor(MPI.COMM_WORLD, root=0) as executor:
            yield executor  # type: ignore[misc]  # it has the interface of an Executor
    else:
        with _local_processes(count or usable_cores()) as pool:
            yield pool


@contextmanager
def _local_processes(count: int) -> Iterator[Executor]:
    """A pool of processes that end with this one, however it ends."""
    context = multiprocessing.get_context("fork")  # the tokenizer and its library are there already, and shared
    with ProcessPoolExecutor(count, context, initializer=_end_with, initargs=(os.getpid(),)) as pool:
        try:
            yield pool
        except KeyboardInterrupt:
            for worker in multiprocessing.active_children():
                worker.terminate()  # the pool would else wait for every piece that was begun
            raise


def _end_with(parent: int) -> None:
    """A pool's process waits for ever when its parent was killed; on Ctrl-C, it is for the parent to say something."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


# In the worker


@functools.lru_cache(maxsize=1)
def _work(file: Path) -> Work:
    work = pickle.loads(file.read_bytes())
    assert isinstance(work, Work)
    return work


class _Counts:
    """What became of the rows of a piece, with the first rows of each kind by name."""

    def __init__(self) -> None:
        self.totals: Counter[str] = Counter()
        self.scripts: Counter[str] = Counter()
        self.troubles: Counter[str] = Counter()
        self.bad: list[tuple[int, int, str]] = []
        self.troubled: dict[str, list[tuple[int, int]]] = {}

    def add(self, file: int, row: int, example: Any, tokens: Tokens, trained_tokens: int) -> None:
        self.totals["documents"] += 1
        self.totals["tokens"] += len(tokens)
        self.totals["trained_tokens"] += trained_tokens
        self.totals["rows_with_lost_reasoning"] += tokens.reasoning_lost
        text = plain_text(example)
        self.scripts[script(text)] += 1
        for trouble in troubles(text):
            self.troubles[trouble] += 1
            named = self.troubled.setdefault(trouble, [])
            if len(named) < _SHOWN:
                named.append((file, row))

    def reject(self, file: int, row: int, reason: str) -> None:
        self.totals["bad_rows"] += 1
        if len(self.bad) < _SHOWN:
            self.bad.append((file, row, reason))


def tokenize_piece(work_file: Path, number: int, piece: Piece) -> None:
    """Write part-….tokens, .documents and last .json of one piece; what is there under these names is whole."""
    work = _work(work_file)
    counts = _Counts()
    documents = bytearray()  # of `DOCUMENT`; tuples would take seven times as much
    final = work_file.parent / part_name(number)
    partial = final.with_suffix(f".{os.getpid()}.tmp")
    try:
        with partial.open("wb") as content:
            at = 0
            for row in read_piece(work.source, piece):
                counts.totals["rows"] += 1
                try:
                    example, tokens = row_tokens(row, work.source, work.tokenizer, work.train_on)
                except BadRow as error:
                    counts.reject(piece.file, row.number, str(error))
                    continue
                trained_tokens = tokens.trained.count(True)
                counts.add(piece.file, row.number, example, tokens, trained_tokens)
                ids = numpy.array(tokens.ids, numpy.int32)
                trained = numpy.frombuffer(bytes(tokens.trained), numpy.bool_)  # half the time of a list of bools
                content.write(numpy.where(trained, ids, ~ids).tobytes())
                entry = (at, row.number, text_key(example), len(tokens), trained_tokens, piece.file)
                documents += numpy.array(entry, DOCUMENT).tobytes()
                at += len(tokens)
            _flush(content)
        partial.replace(final)
        _write(final.with_suffix(".documents"), documents)
        _write(final.with_suffix(".json"), json.dumps(vars(counts)).encode())
    finally:
        partial.unlink(missing_ok=True)


def _flush(content: BinaryIO) -> None:
    content.flush()
    os.fsync(content.fileno())


def _write(file: Path, content: bytes | bytearray) -> None:
    partial = file.with_suffix(f"{file.suffix}.{os.getpid()}.tmp")
    try:
        with partial.open("wb") as opened:
            opened.write(content)
            _flush(opened)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def row_tokens(
    row: Row, source: Source, tokenizer: PreTrainedTokenizerBase, train_on: str
) -> tuple[Conversation | Text | Pretokenized, Tokens]:
    """A row as what is trained on, with its token ids and mask.

    Raises:
        BadRow: with the reason, also when no token of it would be trained.
    """
    if row.value is None:
        raise BadRow(row.problem)
    example = parse_row(row.value, source)
    if isinstance(example, Conversation):
        require_chat_template(tokenizer, row)
    try:
        tokens = tokenize(example, tokenizer, train_on)
    except BadRow:
        raise
    except Exception as error:  # a template is a program, and fails in all ways that a program can
        _require_unicode(row)
        raise BadRow(f"the chat template or the tokenizer fails on it: {type(error).__name__}: {error}") from None
    if not any(tokens.trained):
        raise BadRow("no token of it is trained (empty answer, or the chat template drops the assistant's text)")
    return example, tokens


def _require_unicode(row: Row) -> None:
    try:
        json.dumps(row.value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise BadRow("holds half of a surrogate pair, which is not Unicode text") from None


def require_chat_template(tokenizer: PreTrainedTokenizerBase, row: Row) -> None:
    """Raises BadInput when a row is a chat and the tokenizer cannot write chats."""
    if not tokenizer.chat_template:
        raise BadInput(
            f"{row.where} is a chat, but the tokenizer has no chat template: add chat_template.jinja to the model "
            "folder, or use a model that has one"
        )


# When all parts are there


def _complete(partial: Path, source: Source, scans: list[Scan], cut: list[Piece]) -> None:
    """Join the parts' documents and counts; what the workers needed is removed.

    Raises:
        BadInput: a file has no rows, as `read_rows` says it.
    """
    rows_of_file: Counter[int] = Counter()
    totals: Counter[str] = Counter(
        rows=0, documents=0, tokens=0, trained_tokens=0, bad_rows=0, rows_with_lost_reasoning=0
    )
    scripts: Counter[str] = Counter()
    found_troubles: Counter[str] = Counter()
    bad: list[tuple[int, int, str]] = []
    troubled: dict[str, list[tuple[int, int]]] = {}
    starts, sizes = [], []
    with (partial / "documents.raw").open("wb") as joined:
        at = 0
        for number, piece in enumerate(cut):
            tokens = partial / part_name(number)
            counted = json.loads(tokens.with_suffix(".json").read_text())
            documents = numpy.fromfile(tokens.with_suffix(".documents"), DOCUMENT)
            documents["start"] += at
            joined.write(documents.tobytes())
            starts.append(at)
            sizes.append(tokens.stat().st_size)
            at += sizes[-1] // 4
            totals.update(counted["totals"])
            rows_of_file[piece.file] += counted["totals"].get("rows", 0)
            scripts.update(counted["scripts"])
            found_troubles.update(counted["troubles"])
            bad += counted["bad"]
            for trouble, named in counted["troubled"].items():
                troubled.setdefault(trouble, []).extend(named)
    if all(piece.path for piece in cut):
        # Files behind the limit were not read.
        reached = cut[-1].file + 1 if cut and source.limit == totals["rows"] else len(scans)
        if empty := [scan.file for number, scan in enumerate(scans[:reached]) if not rows_of_file[number]]:
            raise without_rows(*empty)
    write_npy(partial / "documents.raw", partial / "documents.npy", DOCUMENT)
    summary: dict[str, Any] = dict(totals) | {
        "first_bad_rows": bad[:_SHOWN], "scripts": dict(scripts.most_common()),
        "troubles": dict(found_troubles), "troubled_rows": {name: named[:_SHOWN] for name, named in troubled.items()},
        "part_starts": starts, "part_bytes": sizes,
        "documents_bytes": (partial / "documents.npy").stat().st_size,
    }  # fmt: skip
    _write(partial / "summary.json", json.dumps(summary, indent=1).encode())
    for file in partial.iterdir():
        if file.suffix in (".json", ".documents", ".pickle", ".tmp") and file.name != "summary.json":
            file.unlink()
