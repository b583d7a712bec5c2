"""Step → batch. The order of the data is a pure function of (seed, step): resuming needs no loader state, and any
number of ranks sees the same global batches."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy
import torch

from fullft.data.cache import Documents
from fullft.data.packing import pack
from fullft.loss import IGNORE


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank; all tensors [micro_batch, sequence] int64.

    There is no attention mask. Documents are packed from the left and padding comes last, so causal attention keeps
    padding out, and position ids that restart at 0 are how attention sees the borders between documents.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor  # the next token, already shifted; IGNORE where there is no loss
    tokens: int  # without padding

    def to(self, device: torch.device | str) -> Batch:
        ids, positions, labels = (
            tensor.to(device, non_blocking=True) for tensor in (self.input_ids, self.position_ids, self.labels)
        )
        return Batch(ids, positions, labels, self.tokens)


@dataclass(frozen=True)
class Geometry:
    """How a global batch is shared: `global_batch_size = micro_batch_size · accumulation · world_size`."""

    global_batch_size: int
    micro_batch_size: int
    accumulation: int
    world_size: int
    seed: int


class Batches:
    """The sequences of a training set and the batches of each step."""

    def __init__(self, documents: Documents, sequence_length: int, packing: bool, geometry: Geometry) -> None:
        self.documents = documents.rows
        self.sequence_length = sequence_length
        self.geometry = geometry
        lengths = list(self.documents["length"])
        self.sequences = pack(lengths, sequence_length) if packing else [[index] for index in range(len(lengths))]
        self.packing = packing

    def __len__(self) -> int:
        return len(self.sequences)

    def of_step(self, step: int, rank: int) -> Iterator[Batch]:
        """The micro-batches of this rank in optimizer step `step` (from 0)."""
        size = self.geometry.micro_batch_size
        indices = self.sequence_indices(step)
        for micro_step in range(self.geometry.accumulation):
            first = (micro_step * self.geometry.world_size + rank) * size
            yield self._collate([self.sequences[index] for index in indices[first : first + size]])

    def sequence_indices(self, step: int) -> list[int]:
        """The sequences of the global batch of a step, from an endless stream of shuffled epochs."""
        first = step * self.geometry.global_batch_size
        count = len(self.sequences)
        positions = range(first, first + self.geometry.global_batch_size)
        return [int(_permutation(count, self.geometry.seed, at // count)[at % count]) for at in positions]

    def rows_of_step(self, step: int) -> list[dict[str, int]]:
        """Source, file of it and row number of every document in the global batch of a step."""
        documents = [document for index in self.sequence_indices(step) for document in self.sequences[index]]
        table = self.documents.select_columns(["source", "file", "row"])
        return [table[index] for index in documents]

    def _collate(self, sequences: list[list[int]]) -> Batch:
        rows = [[self.documents[index] for index in sequence] for sequence in sequences]
        lengths = [sum(document["length"] for document in row) for row in rows]
        width = self.sequence_length if self.packing else max(lengths)
        columns = zip(*(_join(row, width) for row in rows), strict=True)
        ids, positions, labels = (torch.tensor(column, dtype=torch.int64) for column in columns)
        return Batch(ids, positions, labels, sum(lengths))


def _join(documents: list[dict[str, list[int]]], width: int) -> tuple[list[int], list[int], list[int]]:
    """One sequence: ids, position ids and labels of length `width`."""
    ids: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    for document in documents:
        tokens, trained = document["input_ids"], document["trained"]
        ids += tokens
        positions += range(len(tokens))
        labels += [token if loss else IGNORE for token, loss in zip(tokens[1:], trained[1:], strict=True)] + [IGNORE]
    room = width - len(ids)
    return ids + [0] * room, positions + list(range(room)), labels + [IGNORE] * room


@functools.lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> numpy.ndarray:
    return numpy.random.default_rng((seed, epoch)).permutation(count)
