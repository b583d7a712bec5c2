"""What the base model predicts: its k likeliest tokens at each position of some rows, computed before the first step.

The model that is trained is the base model then, so no second one is needed, and a run that is resumed still has them:

    base/<name>/predictions.safetensors   tokens [positions, k] int32, logprobs [positions, k] fp16 (ln p),
                                          rest [positions] fp32 (the mass of all others), offsets [rows + 1]
    base/<name>/index.json                of which rows

6·k + 4 bytes a position. Rows are computed in the same batches for any number of ranks, and written by all of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from fullft import lease, signals, watchdog
from fullft.cluster import is_shared
from fullft.data.batches import Batch, Batches
from fullft.data.progress import progress
from fullft.documents import moved
from fullft.errors import BadInput, Preempted
from fullft.head import Divergence, Head
from fullft.loss import kl_divergence
from fullft.recipe import Recipe
from fullft.retention.run import SAID_SECONDS, batched
from fullft.weights import NewFile, Part, create, new_file, stored_tensors, tensors_of, write_parts

FILE = "predictions.safetensors"


Columns = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # ids, position ids, labels as in a `Batch`


@dataclass(frozen=True)
class Rows:
    """Rows of tokens on which two models are compared, at the positions that have a label."""

    lengths: Sequence[int]
    count: Callable[[int], int]  # labels of a row
    batch: Callable[
        [Sequence[int]], tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    ]  # ids, position ids, labels as in a `Batch`
    key: str  # tells them from others


class Predictions:
    """Of the base model, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        stored = stored_tensors(folder)

        def mapped(name: str, dtype: Any) -> Any:
            one = stored[name]
            return numpy.memmap(one.file, dtype, "r", one.offset, one.shape)

        self.tokens, self.logprobs = mapped("tokens", numpy.int32), mapped("logprobs", numpy.float16)
        self.rest = mapped("rest", numpy.float32)
        self.offsets: NDArray[numpy.int64] = numpy.array(mapped("offsets", numpy.int64))
        self.top_k = self.tokens.shape[1]

    @property
    def bytes(self) -> int:
        return int(self.tokens.nbytes + self.logprobs.nbytes + self.rest.nbytes)

    def of(
        self, row: int, device: torch.device | str, part: tuple[int, int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(tokens [labels, k] int64, their ln p [labels, k] fp32, the rest [labels] fp32) at the labels of a row.

        `part`: the first of these labels and how many; default: all.
        """
        first, last = int(self.offsets[row]), int(self.offsets[row + 1])
        if part is not None:
            first, last = first + part[0], min(first + sum(part), last)
        columns = (self.tokens, self.logprobs, self.rest)
        tokens, logprobs, rest = (moved(torch.from_numpy(numpy.array(one[first:last])), device) for one in columns)
        return tokens.long(), logprobs.float(), rest


class ReferenceDivergence:
    """KL(base || model) on the rows of the replay sets, from the base model run beside, in shards of its own."""

    def __init__(self, engine: Any) -> None:
        self.engine, self._head = engine, Head(engine)

    def __call__(self, batch: Batch) -> AbstractContextManager[Divergence | None]:
        """As of `ReplayDivergence`. All ranks together; the base is run where a rank has replay rows."""
        if not batch.replay_on_a_rank:
            return contextlib.nullcontext()
        return self._opened(batch, self._head.read(batch))

    @contextlib.contextmanager
    def _opened(
        self, batch: Batch, reading: AbstractContextManager[Callable[[int, int], torch.Tensor]]
    ) -> Iterator[Divergence]:
        with reading as of_base:

            def nats(_: int, logits: torch.Tensor, first: int, last: int) -> torch.Tensor:
                log_p, log_q = of_base(first, last).log_softmax(-1), logits.float().log_softmax(-1)
                return (log_p.exp() * (log_p - log_q)).sum(-1)

            yield _on_rows(_labels_of(batch, [row for row, one in enumerate(batch.is_replay) if one]), nats)


class ReplayDivergence:
    """KL(base || model) on the rows of the replay sets, from the base model's stored predictions."""

    def __init__(self, predictions: Predictions, row_of: dict[tuple[int, int], int]) -> None:
        self._predictions = predictions
        self._row_of = row_of  # (set, sequence) -> row of the predictions

    def __call__(self, batch: Batch) -> AbstractContextManager[Divergence | None]:
        """What gives the nats of labels, 0 for those of rows of the task; None if there are no others."""
        of_row = {row: self._row_of[one] for row, one in enumerate(batch.sequences) if one in self._row_of}
        if not of_row:
            return contextlib.nullcontext()
        labels = _labels_of(batch, list(of_row))
        known = {
            row: self._predictions.of(one, batch.labels.device, (batch.labels_before[row], len(labels[row])))
            for row, one in of_row.items()
        }

        def nats(row: int, logits: torch.Tensor, first: int, last: int) -> torch.Tensor:
            part = slice(first - labels[row].start, last - labels[row].start)
            return kl_divergence(logits, *(one[part] for one in known[row]))

        return contextlib.nullcontext(_on_rows(labels, nats))


def _labels_of(batch: Batch, rows: list[int]) -> dict[int, range]:
    """The labels of these rows, as their numbers among all of the batch, row after row."""
    ends = list(itertools.accumulate(batch.labelled.counts))
    return {row: range(ends[row - 1] if row else 0, ends[row]) for row in rows}


def _on_rows(labels: dict[int, range], nats: Callable[[int, torch.Tensor, int, int], torch.Tensor]) -> Divergence:
    """The divergence at any run of labels of a batch, from what gives it for some labels of one row:
    nats(row, their logits, number of the first, last + 1)."""

    def divergence(logits: torch.Tensor, first: int) -> torch.Tensor:
        found = torch.zeros(len(logits), device=logits.device)
        for row, own in labels.items():
            start, end = max(own.start, first), min(own.stop, first + len(logits))
            if start < end:
                part = slice(start - first, end - first)
                found[part] = nats(row, logits[part], start, end)
        return found

    return divergence


def replay_divergence(
    recipe: Recipe, batches: Batches, engine: Any, step: int, total_steps: int
) -> tuple[ReplayDivergence, str]:
    """What train.kl_weight needs, and a line on it. All ranks together.

    Raises:
        BadInput: the predictions are missing and the model is no longer the base, or not all ranks see the run folder.
        Preempted: a signal came to a rank.
    """
    sequences = batches.replay_sequences(total_steps)
    rows = _rows_of(batches, sequences)
    started, folder = time.perf_counter(), recipe.run_folder / "base" / "replay"
    predictions = predict(engine, rows, recipe.retention.kl_top_k, folder, recipe.train.sequences_at_once, step)
    line = f"the base model's predictions on {len(sequences):,} replay sequences: {predictions.bytes / 1e9:.3g} GB in "
    line += f"{folder} ({time.perf_counter() - started:.1f} s)"
    return ReplayDivergence(predictions, {sequence: row for row, sequence in enumerate(sequences)}), line


def _rows_of(batches: Batches, sequences: list[tuple[int, int]]) -> Rows:
    def batch(chosen: Sequence[int]) -> Columns:
        one = batches.collate([sequences[row] for row in chosen])
        return one.input_ids, one.position_ids, one.labels

    lengths = [int(batches.sets[of_set].lengths[sequence]) for of_set, sequence in sequences]
    key = hashlib.sha256(repr((batches.fingerprint, sequences)).encode()).hexdigest()
    return Rows(lengths, lambda row: batches.labels_of(*sequences[row]), batch, key)


def predict(engine: Any, rows: Rows, top_k: int, folder: Path, batch_size: int, step: int) -> Predictions:
    """The predictions of the engine's model, computed if it is the base model (step 0), unless they are in the folder
    already. All ranks together.

    Raises:
        BadInput: they are not there, and the model is no longer the base; or not all ranks see the run folder.
        Preempted: a signal came to a rank.
    """
    top_k = min(top_k, engine.module.config.get_text_config().vocab_size)
    index = {"rows": rows.key, "top_k": top_k}
    if not is_shared(folder.parent):
        raise BadInput(
            f"run_dir: {folder} is not the same for all ranks, and each reads there what the base model predicts; put "
            "run_dir on a file system that all nodes share"
        )
    there = [dist.get_rank() == 0 and _index(folder) == index and is_whole(folder / FILE)]
    dist.broadcast_object_list(there, src=0)
    if not there[0] and step > 0:
        raise BadInput(
            f"run_dir: {folder}, what the base model predicts, is damaged or gone, and the model of the checkpoint is "
            "no longer the base; use another run_dir"
        )
    if not there[0]:
        _compute(engine, rows, top_k, folder, batch_size, index)
    return Predictions(folder)


def _index(folder: Path) -> Any:
    try:
        return json.loads((folder / "index.json").read_text())
    except (OSError, ValueError):
        return None


def is_whole(file: Path) -> bool:
    """Whether a file of tensors is there at its full size; one that a full disk or a bad copy has cut short is not."""
    try:
        tensors_of(file)
    except BadInput:
        return False
    return True


def _compute(engine: Any, rows: Rows, top_k: int, folder: Path, batch_size: int, index: dict[str, Any]) -> None:
    named = [str(lease.partial(folder))]  # rank 0 holds the lease that is in the name
    dist.broadcast_object_list(named, src=0)
    partial = Path(named[0])
    offsets = numpy.concatenate([[0], numpy.cumsum([rows.count(row) for row in range(len(rows.lengths))])])
    shape = (int(offsets[-1]), top_k)
    tensors = {"tokens": torch.int32, "logprobs": torch.float16}
    file = new_file(
        partial / FILE,
        {name: torch.empty(shape, dtype=dtype, device="meta") for name, dtype in tensors.items()}
        | {"rest": torch.empty(shape[:1], device="meta")}
        | {"offsets": torch.empty(len(offsets), dtype=torch.int64, device="meta")},
    )
    failure = [""]
    if dist.get_rank() == 0:
        lease.check()
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)  # of other rows
        try:
            partial.mkdir()
            create(file)
            write_parts([Part(file.stored["offsets"], 0, torch.from_numpy(offsets))])
            (partial / "index.json").write_text(json.dumps(index))
        except OSError as error:
            failure = [str(error)]
    dist.broadcast_object_list(failure, src=0)
    if failure[0]:
        raise BadInput(f"run_dir: no room for what the base model predicts: {failure[0]}")
    engine.eval()
    write_parts(_parts(engine, rows, top_k, file, offsets, batch_size))
    engine.train()
    dist.barrier()  # every rank's part is on disk
    if dist.get_rank() == 0:
        lease.commit(folder)
    dist.barrier()


@torch.no_grad()
def _parts(
    engine: Any, rows: Rows, top_k: int, file: NewFile, offsets: NDArray[numpy.int64], batch_size: int
) -> Iterator[Part]:
    """This rank's predictions, batch after batch. Each forward is a collective, so all ranks do equally many."""
    head, batches = Head(engine), batched(rows.lengths, batch_size)
    rank, world = dist.get_rank(), dist.get_world_size()
    title, count = f"base model's predictions ({file.path.parent.name.partition('.')[0]})", -(-len(batches) // world)
    with progress(count, title, " batches", SAID_SECONDS, shown=rank == 0) as advance:
        for number in range(rank, len(batches) + (-len(batches)) % world, world):
            if signals.agreed(engine.device):
                raise Preempted
            watchdog.mark("base model's predictions")
            chosen = batches[min(number, len(batches) - 1)]
            with head.logits(*rows.batch(chosen)) as parts:
                advance(1)
                if number >= len(batches):  # another rank's batch, only to keep step
                    continue
                for at, first, logits in parts:
                    best = logits.topk(top_k)
                    logprobs = best.values - logits.logsumexp(-1, keepdim=True)
                    rest, start = (1 - logprobs.exp().sum(-1)).clamp(min=0), int(offsets[chosen[at]]) + first
                    yield Part(file.stored["tokens"], start * top_k, best.indices.int().flatten().cpu())
                    yield Part(file.stored["logprobs"], start * top_k, logprobs.half().flatten().cpu())
                    yield Part(file.stored["rest"], start, rest.cpu())
