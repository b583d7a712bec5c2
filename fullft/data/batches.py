"""Step → batch. The order of the data is a pure function of (seed, step): resuming needs no loader state, and any
number of ranks sees the same global batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy
import torch
from numpy.typing import NDArray

from fullft.data.mixture import Mixture
from fullft.data.sequences import Sequences
from fullft.documents import Documents, moved
from fullft.loss import IGNORE, Labelled


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank; all tensors [micro_batch, sequence] int64.

    There is no attention mask. Documents are packed from the left and padding comes last, so causal attention keeps
    padding out, and `documents`, or position ids that restart at 0, are how attention sees the borders between them.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor  # the next token, already shifted; IGNORE where there is no loss
    tokens: int  # without padding
    lengths: tuple[int, ...]  # of whole rows, without padding
    replay: torch.Tensor  # [micro_batch] bool: the row is of a replay set (a row is of one set)
    sequences: tuple[tuple[int, int], ...]  # (set, sequence of it) of each row
    replay_on_a_rank: bool  # some rank has a replay row in this micro-step; the same on all
    documents: Documents  # of whole rows, also where this is a part of them
    labels_before: tuple[int, ...]  # of each row, in the parts before this one
    labelled: Labelled
    is_replay: tuple[bool, ...]  # `replay`, on the host

    @staticmethod
    def of(
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        labels: torch.Tensor,
        lengths: Sequence[int],
        is_replay: Sequence[bool],
        sequences: Sequence[tuple[int, int]],
    ) -> Batch:
        """From tensors in host memory; a replay row is thought to be on some rank if one is here."""
        return Batch(
            input_ids, position_ids, labels, sum(lengths), tuple(lengths), torch.tensor(is_replay), tuple(sequences),
            any(is_replay), Documents.of(position_ids), (0,) * len(labels), Labelled.of(labels), tuple(is_replay),
        )  # fmt: skip

    def to(self, device: torch.device | str) -> Batch:
        ids, positions, labels, replay = (
            moved(tensor, device) for tensor in (self.input_ids, self.position_ids, self.labels, self.replay)
        )
        return replace(
            self, input_ids=ids, position_ids=positions, labels=labels, replay=replay,
            documents=self.documents.to(device), labelled=self.labelled.to(device),
        )  # fmt: skip

    def part(self, number: int, parts: int) -> Batch:
        """The columns of the rank `number` of those that share the micro-batch."""
        width = self.input_ids.shape[1] // parts
        columns = slice(number * width, (number + 1) * width)
        # Of each row the tokens come first, then the padding.
        tokens = sum(min(max(length - columns.start, 0), width) for length in self.lengths)
        before = (self.labels[:, : columns.start] != IGNORE).sum(1).tolist()
        labels = self.labels[:, columns].contiguous()
        return replace(
            self, input_ids=self.input_ids[:, columns].contiguous(), labels=labels, labelled=Labelled.of(labels),
            position_ids=self.position_ids[:, columns].contiguous(), tokens=tokens, labels_before=tuple(before),
            documents=replace(self.documents, ranks=parts),
        )  # fmt: skip


@dataclass(frozen=True)
class Geometry:
    """How a global batch is shared: `global_batch_size = micro_batch_size · accumulation · groups`, where a group is
    `sequence_parallel` ranks, each of which has a part of every row, or a single one that has all."""

    global_batch_size: int
    micro_batch_size: int
    accumulation: int
    world_size: int
    seed: int
    sequence_parallel: int = 1

    @property
    def groups(self) -> int:
        return self.world_size // self.sequence_parallel


class Batches:
    """The sequences of all training sets and the batches of each step."""

    def __init__(
        self,
        sets: Sequence[Sequences],
        mixture: Mixture,
        width: int | None,
        geometry: Geometry,
        replay_sets: int = 0,
        replay_label_weight: float = 1.0,
        replay_labels_of_step: float = 1.0,
    ) -> None:
        """
        Args:
            width: tokens of every sequence, padded; None: of the longest in its micro-batch.
            replay_sets: so many of the sets, the last ones, are replay.
            replay_label_weight: what a label of theirs counts in the loss, one of the others counting 1.
            replay_labels_of_step: labels of theirs in a global batch, on average over the run.
        """
        self.sets = sets
        self.mixture = mixture
        self.width = width
        self.geometry = geometry
        self.first_replay = len(sets) - replay_sets
        self.replay_label_weight = replay_label_weight
        self.replay_labels_of_step = replay_labels_of_step
        self._orders: list[dict[int, NDArray[numpy.int64]]] = [{} for _ in sets]  # by epoch

    @property
    def fingerprint(self) -> str:
        """Of all tokens that can come, and how they are packed."""
        parts = [(one.tokens.fingerprint, one.summary) for one in self.sets]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def epochs(self, steps: int) -> float:
        """Passes over the training sets after that many steps."""
        return steps * self.geometry.global_batch_size / self.mixture.epoch

    def of_step(self, step: int, rank: int) -> Iterator[Batch]:
        """The micro-batches of this rank in optimizer step `step` (from 0)."""
        size, groups, parts = self.geometry.micro_batch_size, self.geometry.groups, self.geometry.sequence_parallel
        group, part = divmod(rank, parts)
        sequences = self.sequences_of_step(step)
        for micro_step in range(self.geometry.accumulation):
            of_ranks = sequences[micro_step * groups * size :][: groups * size]
            replays = any(of_set >= self.first_replay for of_set, _ in of_ranks)
            batch = replace(self.collate(of_ranks[group * size :][:size], parts), replay_on_a_rank=replays)
            yield batch if parts == 1 else batch.part(part, parts)

    def sequences_of_step(self, step: int) -> list[tuple[int, int]]:
        """(set, sequence of it) of the global batch of a step, from endless streams of shuffled epochs."""
        size, seed = self.geometry.global_batch_size, self.geometry.seed
        which, before = self.mixture.at(step * size, size)
        found = [
            (of_set, int(self._order(of_set, at // len(self.sets[of_set]))[at % len(self.sets[of_set])]))
            for of_set, at in zip(which.tolist(), before.tolist(), strict=True)
        ]
        if len(self.sets) > 1:  # else one rank might get all of one set, step after step
            found = [found[at] for at in numpy.random.default_rng((seed, step)).permutation(size)]
        return found

    def _order(self, of_set: int, epoch: int) -> NDArray[numpy.int64]:
        """The order of a set's sequences in an epoch of it; of each set the last two are kept."""
        orders = self._orders[of_set]
        if epoch not in orders:
            key = (self.geometry.seed, epoch, of_set) if of_set else (self.geometry.seed, epoch)
            orders[epoch] = numpy.random.default_rng(key).permutation(len(self.sets[of_set]))
            for old in sorted(orders, key=lambda one: abs(one - epoch))[2:]:
                del orders[old]
        return orders[epoch]

    def rows_of_step(self, step: int) -> list[dict[str, Any]]:
        """File and row number of every document in the global batch of a step."""
        rows = []
        for of_set, sequence in self.sequences_of_step(step):
            one = self.sets[of_set]
            for document in one.slices["document"][one.starts[sequence] : one.starts[sequence + 1]].tolist():
                file, row = one.tokens.place(document)
                rows.append({"file": file, "row": row})
        return rows

    def describe(self, total_steps: int) -> list[str]:
        """A line for each set: what it holds, and how much of the run it is."""
        lines = []
        seen = self.mixture.seen(total_steps * self.geometry.global_batch_size)
        of_run = [epochs * one.summary["tokens"] for one, epochs in zip(self.sets, seen, strict=True)]
        of_batch = [self.geometry.global_batch_size * rate / sum(self.mixture.rates) for rate in self.mixture.rates]
        for one, epochs, tokens, sequences in zip(self.sets, seen, of_run, of_batch, strict=True):
            has = one.summary
            lines.append(
                f"{one.tokens.name}: {one.tokens.summary['rows']:,} rows, {has['documents']:,} documents, "
                f"{has['tokens']:,} tokens ({has['trained_tokens']:,} trained on), {has['sequences']:,} sequences "
                f"{has['fill']:.1%} full; {tokens / max(sum(of_run), 1):.1%} of the run's tokens, {epochs:.2f} epochs, "
                f"{sequences:.3g} of the {self.geometry.global_batch_size} sequences of a step"
            )
        return lines

    def account(self, step: int) -> dict[str, float]:
        """What the global batch of a step holds of each set: tokens, and epochs of the set seen when it is done."""
        tokens = [0] * len(self.sets)
        for of_set, sequence in self.sequences_of_step(step):
            tokens[of_set] += int(self.sets[of_set].lengths[sequence])
        seen = self.mixture.seen((step + 1) * self.geometry.global_batch_size)
        found: dict[str, float] = {}
        for one, count, epochs in zip(self.sets, tokens, seen, strict=True):
            found |= {f"data/{one.tokens.name}/tokens_of_step": count, f"data/{one.tokens.name}/epochs": epochs}
        return found

    def replay_sequences(self, total_steps: int) -> list[tuple[int, int]]:
        """(set, sequence) of all that a run of so many steps sees of the replay sets, each once."""
        seen = self.mixture.seen(total_steps * self.geometry.global_batch_size)
        found: list[tuple[int, int]] = []
        for of_set in range(self.first_replay, len(self.sets)):
            count = len(self.sets[of_set])
            first = self._order(of_set, 0)[: round(seen[of_set] * count)]
            found += [(of_set, sequence) for sequence in sorted(first.tolist())]
        return found

    def replay_labels(self, total_steps: int) -> int:
        """About how many labels `replay_sequences` have."""
        seen = self.mixture.seen(total_steps * self.geometry.global_batch_size)
        sets = zip(self.sets[self.first_replay :], seen[self.first_replay :], strict=True)
        return int(sum(min(epochs, 1.0) * one.summary["trained_tokens"] for one, epochs in sets))

    def labels_of(self, of_set: int, sequence: int) -> int:
        """Positions of a sequence that have a label."""
        one = self.sets[of_set]
        slices = one.slices[one.starts[sequence] : one.starts[sequence + 1]].tolist()
        return sum(int(one.tokens.read(start, length)[1][1:].sum()) for start, _, length in slices)

    def collate(self, chosen: Sequence[tuple[int, int]], multiple: int = 1) -> Batch:
        """(set, sequence) of each row → a batch, as wide as a multiple of this."""
        rows = [(self.sets[of_set], sequence) for of_set, sequence in chosen]
        lengths = [int(one.lengths[sequence]) for one, sequence in rows]
        width = self.width or -(-max(lengths) // multiple) * multiple
        ids, positions, labels = (torch.zeros((len(rows), width), dtype=torch.int64) for _ in range(3))
        labels.fill_(IGNORE)
        for row, (one, sequence) in enumerate(rows):
            end = _fill(one, sequence, ids[row].numpy(), positions[row].numpy(), labels[row].numpy())
            positions[row, end:] = torch.arange(width - end)
        is_replay = [of_set >= self.first_replay for of_set, _ in chosen]
        return Batch.of(ids, positions, labels, lengths, is_replay, chosen)


def _fill(one: Sequences, sequence: int, ids: NDArray[Any], positions: NDArray[Any], labels: NDArray[Any]) -> int:
    """Write the documents of a sequence into rows of a batch; returns where the padding begins."""
    at = 0
    for start, _, length in one.slices[one.starts[sequence] : one.starts[sequence + 1]].tolist():
        tokens, trained = one.tokens.read(start, length)
        ids[at : at + length] = tokens
        positions[at : at + length] = numpy.arange(length)
        labels[at : at + length - 1] = numpy.where(trained[1:], tokens[1:], IGNORE)
        at += length
    return at
