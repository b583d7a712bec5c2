"""The training data as a person reads them and as the model sees them: on the terminal, and as a page.

`collect` looks at the data once and gives plain text and numbers; `show` prints them, `inspect_page.py` makes a page.
Only documents that are shown or sampled are read; for all others their entries in the memory-mapped tables are enough.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from fullft.data.batches import Batches
from fullft.data.cache import TokenSet
from fullft.data.sequences import Sequences

_TOKENS_SHOWN = 600  # of a longer document: half from its beginning, half from its end
_SAMPLE = 200  # documents of a set whose ends are looked at
_BARS = 12
_LISTED = 20  # documents of a packed sequence


@dataclass(frozen=True)
class Finding:
    """A sentence under a short name, and rows about it: a table where they have columns, else names of rows."""

    name: str
    text: str
    rows: Sequence[tuple[str, ...]] = ()
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bar:
    """Number of documents with `first` to `last` tokens."""

    first: int
    last: int
    documents: int

    @property
    def label(self) -> str:
        return _range(self.first, self.last)


def _range(first: int, last: int) -> str:
    return f"{first:,}–{last:,}" if first < last else f"{last:,}"


@dataclass(frozen=True)
class Run:
    """Tokens in a row, decoded. `kind`: text, special (tokens), or gap (tokens that are not shown)."""

    text: str
    trained: bool
    kind: str = "text"


@dataclass(frozen=True)
class SetView:
    """What is told of one training set. `limit`: sequence_length, tokens. `documents`: (title, text)."""

    name: str
    about: str
    limit: int
    bars: list[Bar]
    findings: list[Finding]
    documents: list[tuple[str, list[Run]]]


@dataclass(frozen=True)
class View:
    sets: list[SetView]
    findings: list[Finding] = field(default_factory=list)  # about all sets


# Collecting


def collect(
    batches: Batches, steps: int, tokenizer: PreTrainedTokenizerBase, warnings: Sequence[str], rows: int
) -> View:
    """All that is told; `rows`: documents of each set to decode."""
    decoder = _Decoder(tokenizer)
    sets = [
        _set_view(one, about, batches.width or _limit(one), decoder, rows)
        for one, about in zip(batches.sets, batches.describe(steps), strict=True)
    ]
    findings = [Finding("warning", warning) for warning in warnings]
    findings += [_common([one.tokens for one in batches.sets])] if len(batches.sets) > 1 else []
    findings += [_packed(batches, batches.width)] if batches.width else []
    return View(sets, findings)


def _limit(one: Sequences) -> int:
    """sequence_length, which batches without packing do not keep."""
    return int(one.lengths.sum() / (len(one) * one.summary["fill"]) + 0.5)


def _set_view(one: Sequences, about: str, limit: int, decoder: _Decoder, rows: int) -> SetView:
    lengths = numpy.array(one.tokens.documents["length"])
    kept = numpy.unique(one.slices["document"])
    longest = [(f"{lengths[at]:,}", _place(one.tokens, at)) for at in numpy.argsort(-lengths, kind="stable")[:10]]
    findings = [
        *_fates(one, limit), *_texts(one.tokens), _endings(one.tokens, kept, decoder), _duplicates(one.tokens),
        Finding("longest", f"the {len(longest)} longest documents", longest, ("tokens", "row")),
    ]  # fmt: skip
    documents = [_document(one, at, decoder) for at in _spread(kept, rows)]
    return SetView(one.tokens.name, about, limit, _bars(lengths, limit), findings, documents)


def _place(tokens: TokenSet, document: int) -> str:
    file, row = tokens.place(int(document))
    return f"{file} row {row}"


def _spread(documents: NDArray[Any], count: int) -> list[int]:
    """Up to `count` of the documents, evenly spread."""
    count = min(count, len(documents))
    return [int(documents[(2 * at + 1) * len(documents) // (2 * count)]) for at in range(count)]


def _share(part: int, whole: int) -> str:
    return "<0.1%" if 0 < part < whole / 1000 else f"{part / max(whole, 1):.1%}"


def _fates(one: Sequences, limit: int) -> list[Finding]:
    """What became of the rows on their way into sequences."""
    had, has, rows = one.tokens.summary, one.summary, len(one.tokens.documents)
    trained = Finding("trained", f"{_share(has['trained_tokens'], has['tokens'])} of the tokens")
    found = []
    if bad := had["bad_rows"]:
        text = f"{bad:,} of {had['rows']:,} that cannot be used and are skipped; the first:"
        found.append(Finding("bad rows", text, [(row,) for row in had["first_bad_rows"]]))
    if left_out := has["left_out"]:
        found.append(Finding("left out", f"{left_out:,} of {rows:,} rows, which stand in evaluation data"))
    if long := has["too_long_rows"]:
        without = has["documents_without_trained_tokens"]
        pieces = has["documents"] + without - (rows - long - left_out)
        fate = f"split into {pieces:,} documents"
        if pieces <= long:
            fate = "truncated, so the model does not learn how they end" if pieces else "dropped"
        loss = f"lost are {has['tokens_cut']:,} tokens and {has['trained_tokens_cut']:,} targets of the loss"
        text = f"{long:,} of {rows:,} rows, above sequence_length ({limit:,} tokens): {fate}; {loss}"
        found.append(Finding("too long", text))
        if without:
            found.append(Finding("left out", f"{without:,} of {pieces:,} pieces of them, which hold no trained token"))
    if lost := had.get("rows_with_lost_reasoning"):
        found.append(Finding("reasoning", f"left out by the chat template in {lost:,} of {rows:,} rows"))
    return [trained, *(found or [Finding("rows", "all are used, and none is cut")])]


def _texts(tokens: TokenSet) -> list[Finding]:
    """Languages, as far as scripts tell them, and signs of broken encoding."""
    scripts, troubles, rows = tokens.summary["scripts"], tokens.summary["troubles"], len(tokens.documents)
    shares = (f"{name} {_share(count, rows)}" for name, count in scripts.items())
    found = [Finding("scripts", f"of most letters of a row: {', '.join(shares)}")] if len(scripts) > 1 else []
    for trouble, count in troubles.items():
        named = [(row,) for row in tokens.summary["troubled_rows"][trouble]]
        found.append(Finding("encoding", f"{trouble}: {count:,} of {rows:,} rows; the first:", named))
    return found if troubles else [*found, Finding("encoding", "no sign of trouble")]


def _endings(tokens: TokenSet, kept: NDArray[Any], decoder: _Decoder) -> Finding:
    """Whether training on a document ends with a token that ends a turn or text; space after it does not count."""
    sample, endless = _spread(kept, _SAMPLE), []
    for document in sample:
        entry = tokens.documents[document]
        ids, trained = tokens.read(int(entry["start"]), int(entry["length"]))
        last = ids[trained][-4:]
        while len(last) > 1 and decoder.text(last[-1:]).isspace():
            last = last[:-1]
        if not decoder.is_special(last)[-1:].all():
            endless.append(document)
    if not endless:
        return Finding("endings", f"all of {len(sample):,} rows looked at end with a trained end-of-turn token")
    text = f"{len(endless):,} of {len(sample):,} rows looked at do not end with a trained end-of-turn token, so the"
    named = [(_place(tokens, at),) for at in endless[:3]]
    return Finding("endings", f"{text} model does not learn to stop; for example:", named)


def _bars(lengths: NDArray[Any], limit: int) -> list[Bar]:
    """Histogram of about 12 bars, in steps of 1, 2 or 5·10ⁿ, or doubling for a long tail. The limit ends a bar."""
    low, top = int(lengths.min()), int(lengths.max())
    shown = min(top, limit)
    sizes = (base * 10**power for power in itertools.count() for base in (1, 2, 5))
    step = next(size for size in sizes if size * _BARS >= shown - low)
    ends: Sequence[int] = range(low // step * step + step, shown, step)
    if shown > 16 * low and numpy.median(lengths) <= low + step:
        ends = [1 << power for power in range(4, 32) if 1 << power < shown]
    edges = sorted({end for end in [*ends, limit] if low <= end < top} | {top})
    counts = numpy.bincount(numpy.searchsorted(edges, lengths), minlength=len(edges)).tolist()
    return [Bar(*bar) for bar in zip([low, *(end + 1 for end in edges)], edges, counts, strict=False)]


def _duplicates(tokens: TokenSet) -> Finding:
    """Documents of one text, but for case and punctuation; examples: what is there most often."""
    all_keys = numpy.array(tokens.documents["key"])
    keys, firsts, counts = numpy.unique(all_keys, return_index=True, return_counts=True)
    if not (repeats := len(all_keys) - len(keys)):
        return Finding("duplicates", "none")
    rows = []
    for at in numpy.lexsort((firsts, -counts))[:3]:
        if counts[at] > 1:
            first, second = numpy.flatnonzero(all_keys == keys[at])[:2]
            rows.append((f"{counts[at]:,}", _place(tokens, first), _place(tokens, second)))
    share = f"{repeats:,} of {len(all_keys):,} rows ({_share(repeats, len(all_keys))})"
    text = f"of an earlier row: {share}; the most frequent:"
    return Finding("duplicates", text, rows, ("times", "row", "same text"))


def _common(sets: Sequence[TokenSet]) -> Finding:
    """Texts that stand in more than one set."""
    rows = []
    known = [numpy.unique(one.documents["key"], return_index=True) for one in sets]
    for one, other in itertools.combinations(range(len(sets)), 2):
        (keys, at), (other_keys, other_at) = known[one], known[other]
        common, here, there = numpy.intersect1d(keys, other_keys, assume_unique=True, return_indices=True)
        if len(common):
            first = numpy.argmin(at[here])
            examples = _place(sets[one], at[here[first]]), _place(sets[other], other_at[there[first]])
            rows.append((f"{len(common):,}", f"{sets[one].name}, {sets[other].name}", *examples))
    text = "texts that stand in two sets" if rows else "none across sets"
    return Finding("duplicates", text, rows, ("texts", "sets", "row", "same text"))


def _packed(batches: Batches, width: int) -> Finding:
    """The first sequence of the first step."""
    of_set, sequence = batches.sequences_of_step(0)[0]
    one = batches.sets[of_set]
    slices = one.slices[one.starts[sequence] : one.starts[sequence + 1]]
    parts = [(length, _place(one.tokens, document)) for _, document, length in slices[:_LISTED].tolist()]
    if others := slices["length"][_LISTED:].tolist():
        parts.append((sum(others), f"{len(others):,} more documents"))
    if padding := width - int(one.lengths[sequence]):
        parts.append((padding, "padding"))
    ends = itertools.accumulate(length for length, _ in parts)
    rows = [(_range(end - part[0] + 1, end), f"{part[0]:,}", part[1]) for part, end in zip(parts, ends, strict=True)]
    text = f"a sequence of step 1, from {one.tokens.name}: documents {len(slices):,}, tokens of padding {padding:,}"
    return Finding("packing", text, rows, ("position", "tokens", "row"))


# Decoding


class _Decoder:
    """Token ids → text as it stands in its document."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = sorted(added.union(tokenizer.all_special_ids))

    def is_special(self, ids: NDArray[Any]) -> NDArray[numpy.bool_]:
        return numpy.isin(ids, self._special)

    def text(self, ids: NDArray[Any], start: int = 0, end: int | None = None) -> str:
        """Of ids[start:end], decoded with the token before: some tokenizers take the space off that comes first."""
        begin = max(start - 1, 0)
        before, both, alone = (
            str(self._tokenizer.decode(part.tolist(), clean_up_tokenization_spaces=False))
            for part in (ids[begin:start], ids[begin:end], ids[start:end])
        )
        return both[len(before) :] if both.startswith(before) else alone

    def cut(self, ids: NDArray[Any], at: int) -> int:
        """The first place from `at` on that is not within a character: a character has up to 4 tokens."""
        for place in range(at, at + 4):
            start, end = max(place - 4, 0), place + 4
            if self.text(ids, start, end) == self.text(ids, start, place) + self.text(ids, place, end):
                return place
        return at

    def runs(self, ids: NDArray[Any], trained: NDArray[numpy.bool_]) -> Iterator[Run]:
        """Decoded in as long runs as are alike, and no character of several tokens cut."""
        special = self.is_special(ids)
        cut = back = len(ids)
        if len(ids) > _TOKENS_SHOWN + 100:
            cut, back = (self.cut(ids, at) for at in (_TOKENS_SHOWN // 2, len(ids) - _TOKENS_SHOWN // 2))
        changes = numpy.flatnonzero(numpy.diff(trained * 2 + special)) + 1
        changes = changes[(changes < cut) | (changes > back)]
        borders = {0, cut, back, len(ids), *(self.cut(ids, at) for at in changes.tolist())}
        for start, end in itertools.pairwise(sorted(borders)):
            if start == cut:
                lost = f"… {back - cut:,} tokens, {trained[cut:back].sum():,} of them trained …"
                yield Run(f"\n{lost}\n", False, "gap")
            if end <= cut or start >= back:
                yield Run(self.text(ids, start, end), bool(trained[start]), "special" if special[start] else "text")


def _document(one: Sequences, document: int, decoder: _Decoder) -> tuple[str, list[Run]]:
    """A document as it is trained on: its first piece where it is cut."""
    pieces = one.slices[one.slices["document"] == document]
    start, _, length = min(pieces.tolist())
    ids, trained = one.tokens.read(start, length)
    trained[0] = False  # nothing predicts it
    whole = int(one.tokens.documents["length"][document])
    size = f"{length:,} tokens" if length == whole else f"{length:,} of its {whole:,} tokens"
    title = f"{_place(one.tokens, document)}: {size}, {int(trained.sum()):,} trained"
    return title, list(decoder.runs(ids, trained))


_PICTURES: dict[int, int] = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_PICTURES |= dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)


def visible(text: str) -> str:
    """Text that cannot move the cursor, colour the terminal, or turn the direction of writing."""
    return text.encode("utf-8", "replace").decode().translate(_PICTURES)


# On the terminal


def show(view: View) -> None:
    """Print it, in colour on a terminal unless NO_COLOR is set."""
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    text = "\n".join(_lines(view, colour))
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "replace").decode(encoding), flush=True)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _lines(view: View, colour: bool) -> Iterator[str]:
    legend = _marked([Run("trained", True)], colour)
    legend += ", " + _marked([Run("special token", False, "special")], colour) if colour else ""
    for one in view.sets:
        yield from [_painted(visible(one.about), "1", colour), *_bar_lines(one)]
        yield from itertools.chain.from_iterable(map(_finding_lines, one.findings))
        for title, runs in one.documents:
            yield from ["", f"{_painted(visible(title), '1', colour)} ({legend})", _marked(runs, colour).rstrip("\n")]
        yield "\n"
    yield from itertools.chain.from_iterable(map(_finding_lines, view.findings))


def _finding_lines(finding: Finding) -> Iterator[str]:
    yield visible(f"{finding.name:<12}{finding.text}")
    rows = [finding.columns, *finding.rows] if finding.columns and finding.rows else finding.rows
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    for row in rows:
        cells = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield visible(f"{'':<12}{cells.rstrip()}")


def _bar_lines(one: SetView) -> Iterator[str]:
    yield f"{'lengths':<12}{axis(one)}"
    most, wide = max(bar.documents for bar in one.bars), max(len(bar.label) for bar in one.bars)
    for bar in one.bars:
        remark = "  above sequence_length" if bar.first > one.limit else ""
        yield f"{'':<12}{bar.label:>{wide}}  {'█' * -(-bar.documents * 40 // most)} {bar.documents:,}{remark}"


def axis(one: SetView) -> str:
    return f"documents by tokens; sequence_length is {one.limit:,}"


def _painted(text: str, codes: str, colour: bool) -> str:
    """Each line for itself, because terminals paint on to the end of a line otherwise."""
    return "\n".join(f"\x1b[{codes}m{line}\x1b[0m" if colour and codes and line else line for line in text.split("\n"))


def _marked(runs: Sequence[Run], colour: bool) -> str:
    """Trained tokens on green, or in «» without colour; special tokens dim."""
    if colour:
        codes = [";".join(["30;42"] * run.trained + ["2"] * (run.kind != "text")) for run in runs]
        return "".join(_painted(visible(run.text), code, True) for run, code in zip(runs, codes, strict=True))
    stretches = ((on, "".join(run.text for run in group)) for on, group in itertools.groupby(runs, lambda r: r.trained))
    return visible("".join(f"«{text}»" if trained else text for trained, text in stretches))
