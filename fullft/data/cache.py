"""The tokenized rows of the data sets on disk: made once, then memory-mapped by every rank.

A cache folder is named by a fingerprint of everything that its tokens depend on. It is written under another name and
renamed when complete. One process prepares while the others wait on a file lock: no collective is open meanwhile, so
no time-out of one can end the run.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import filelock
from datasets.arrow_writer import ArrowWriter
from transformers import PreTrainedTokenizerBase

from fullft.data.formats import BadRow, Conversation, Row, hub_dataset, parse_row, read_rows, source_files
from fullft.data.tokens import Tokens, tokenize
from fullft.errors import BadInput
from fullft.recipe import Data, Source

_FORMAT = 2  # raise when the same input gives other tokens
_SHOWN = 10  # bad rows shown by name

_FEATURES = datasets.Features(
    input_ids=datasets.List(datasets.Value("int32")),
    trained=datasets.List(datasets.Value("bool")),
    length=datasets.Value("int32"),
    source=datasets.Value("int16"),
    file=datasets.Value("int32"),  # which of the source's files, in order of their names
    row=datasets.Value("int64"),
)


@dataclass(frozen=True)
class Documents:
    """Tokenized rows; `rows[i]` has `_FEATURES`, `summary` counts what became of the data."""

    rows: datasets.Dataset
    summary: dict[str, Any]
    fingerprint: str


def open_or_prepare(
    sources: Sequence[Source], data: Data, tokenizer: PreTrainedTokenizerBase, cache_folder: Path
) -> Documents:
    """The tokenized rows of the sources, from the cache if it has them.

    Raises:
        BadInput: rows or files that cannot be used, all of them counted.
    """
    started = time.time()
    folder = cache_folder / fingerprint(sources, data, tokenizer)
    if not (folder / "summary.json").exists():
        try:
            cache_folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"data.cache_dir: {cache_folder} cannot be made: {error}") from None
        failure = folder.with_suffix(".failed")
        with filelock.FileLock(folder.with_suffix(".lock")):
            if failure.exists() and failure.stat().st_mtime >= started - 1:
                raise BadInput(json.loads(failure.read_text()))  # another rank has just tried, on the same data
            if not (folder / "summary.json").exists():
                try:
                    _prepare(sources, data, tokenizer, folder)
                except BadInput as error:
                    failure.write_text(json.dumps(error.problems))
                    raise
                failure.unlink(missing_ok=True)
    rows = datasets.Dataset.from_file(str(folder / "rows.arrow"))
    return Documents(rows, json.loads((folder / "summary.json").read_text()), folder.name)


def fingerprint(sources: Sequence[Source], data: Data, tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of all that the tokens depend on: contents of files, tokenizer, template, settings. No path decides."""
    settings = {name: getattr(data, name) for name in ("sequence_length", "train_on", "on_bad_row", "on_too_long")}
    parts: list[Any] = [_FORMAT, settings, tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template]
    parts.append([tokenizer.bos_token, tokenizer.eos_token])
    for source in sources:
        files = source_files(source)
        parts.append(source.model_dump(exclude={"path"}))
        parts.append([_file_hash(file) for file in files] if files else hub_dataset(source)._fingerprint)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def _file_hash(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _prepare(sources: Sequence[Source], data: Data, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    partial = folder.with_suffix(".partial")  # the lock keeps others off it; what is there was left by a killed process
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        counts = _Counts()
        with ArrowWriter(features=_FEATURES, path=str(partial / "rows.arrow")) as writer:
            for number, source in enumerate(sources):
                files = {str(file): at for at, file in enumerate(source_files(source))}
                for row in read_rows(source):
                    for tokens in _documents_of(row, source, data, tokenizer, counts):
                        counts.keep(tokens)
                        writer.write(
                            {
                                "input_ids": tokens.ids, "trained": tokens.trained, "length": len(tokens),
                                "source": number, "file": files.get(row.file, 0), "row": row.number,
                            }
                        )  # fmt: skip
            counts.raise_problems(data)
            writer.finalize()
        (partial / "summary.json").write_text(json.dumps(counts.summary(), indent=1))
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class _Counts:
    """What became of the rows, and the first bad ones by name."""

    def __init__(self) -> None:
        self.totals: Counter[str] = Counter()
        self.bad: list[str] = []
        self.longest = 0  # tokens
        self.longest_row = ""

    def keep(self, tokens: Tokens) -> None:
        self.totals.update(documents=1, tokens=len(tokens), trained_tokens=sum(tokens.trained))

    def reject(self, row: Row, reason: str) -> None:
        self.totals["bad_rows"] += 1
        if len(self.bad) < _SHOWN:
            self.bad.append(f"{row.where}: {reason}")

    def raise_problems(self, data: Data) -> None:
        totals = self.totals
        problems = []
        if totals["bad_rows"] and (data.on_bad_row == "error" or not totals["documents"]):
            more = f" (the first {_SHOWN} are shown)" if totals["bad_rows"] > _SHOWN else ""
            advice = (
                "mend them, or leave them out with data.on_bad_row=skip" if totals["documents"] else "no row is left"
            )
            problems.append(f"{totals['bad_rows']} of {totals['rows']} rows cannot be used{more}; {advice}")
            problems += self.bad
        if totals["too_long_rows"] and data.on_too_long == "error":
            problems.append(
                f"data.sequence_length: {totals['too_long_rows']} of {totals['rows']} rows have more than "
                f"{data.sequence_length} tokens, the longest {self.longest} ({self.longest_row}); raise it, or choose "
                "data.on_too_long=drop, truncate or split"
            )
        if not problems and not totals["trained_tokens"]:
            dropped = (
                f" ({totals['too_long_rows']} rows were above data.sequence_length)" if totals["too_long_rows"] else ""
            )
            problems.append(f"nothing left to train on: no row has a trained token{dropped}")
        if problems:
            raise BadInput(problems)

    def summary(self) -> dict[str, Any]:
        return dict(sorted(self.totals.items())) | {"first_bad_rows": self.bad}


def _documents_of(
    row: Row, source: Source, data: Data, tokenizer: PreTrainedTokenizerBase, counts: _Counts
) -> Iterator[Tokens]:
    """The documents that one row becomes: one, none (and counted why), or several when split."""
    counts.totals["rows"] += 1
    try:
        tokens = row_tokens(row, source, tokenizer, data.train_on)
    except BadRow as error:
        counts.reject(row, str(error))
        return
    pieces = [tokens]
    if len(tokens) > data.sequence_length:
        if len(tokens) > counts.longest:
            counts.longest, counts.longest_row = len(tokens), row.where
        counts.totals["too_long_rows"] += 1
        pieces = _fit(tokens, data.sequence_length, data.on_too_long)
        counts.totals["tokens_cut"] += len(tokens) - sum(map(len, pieces))
    for piece in pieces:
        if any(piece.trained):
            yield piece
        else:
            counts.totals["documents_without_trained_tokens"] += 1


def row_tokens(row: Row, source: Source, tokenizer: PreTrainedTokenizerBase, train_on: str) -> Tokens:
    """Token ids and mask of a row.

    Raises:
        BadRow: with the reason, also when no token of it would be trained.
    """
    if row.value is None:
        raise BadRow(row.problem)
    try:
        json.dumps(row.value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise BadRow("holds half of a surrogate pair, which is not Unicode text") from None
    example = parse_row(row.value, source)
    if isinstance(example, Conversation):
        require_chat_template(tokenizer, row)
    try:
        tokens = tokenize(example, tokenizer, train_on)
    except BadRow:
        raise
    except Exception as error:  # a template is a program, and fails in all ways that a program can
        raise BadRow(f"the chat template or the tokenizer fails on it: {type(error).__name__}: {error}") from None
    if not any(tokens.trained):
        raise BadRow("no token of it is trained (empty answer, or the chat template drops the assistant's text)")
    return tokens


def require_chat_template(tokenizer: PreTrainedTokenizerBase, row: Row) -> None:
    """Raises BadInput when a row is a chat and the tokenizer cannot write chats."""
    if not tokenizer.chat_template:
        raise BadInput(
            f"{row.where} is a chat, but the tokenizer has no chat template: add chat_template.jinja to the model "
            "folder, or use a model that has one"
        )


def _fit(tokens: Tokens, limit: int, on_too_long: str) -> list[Tokens]:
    match on_too_long:
        case "truncate":
            return [Tokens(tokens.ids[:limit], tokens.trained[:limit])]
        case "split":
            starts = range(0, len(tokens), limit)
            return [
                Tokens(tokens.ids[start : start + limit], [False, *tokens.trained[start + 1 : start + limit]])
                for start in starts
            ]
        case _:
            return []
