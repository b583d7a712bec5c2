"""What happens to the fp32 weights after AdamW's update of them: the pull to the base weights, and the moving average.

Both are done element by element, so each rank does them on its own shards. They hang on the optimizer's step, which
DeepSpeed calls for one flat group of shards after the other, and not at all where a gradient is not finite, before it
copies the group to the weights that forward uses: nothing is copied twice, and a step that is skipped moves nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fullft.cluster import sum_over_ranks
from fullft.errors import Preempted
from fullft.recipe import Train
from fullft.shards import (
    AVERAGE,
    has_average,
    own_part,
    place_in_flat,
    refresh_model_from_optimizer,
    start_optimizer,
)

_BLOCK = 1 << 22  # elements at a time, so that fp32 copies of the base stay small
_ROW = 1 << 12


class Pull:
    """The base weights of this rank's shards, and the pull to them: w += learning rate × strength × (base - w).

    L2-SP (Li et al. 2018, "Explicit inductive bias for transfer learning"), decoupled from the gradient as AdamW's
    weight decay is. Needs 2 bytes a parameter over all ranks where bf16 holds the base exactly, else 4. Rows of new
    tokens, which are no base model's, are left alone.
    """

    def __init__(
        self, engine: Any, strength: float, offload: bool, new_rows: Mapping[str, Sequence[tuple[int, int]]]
    ) -> None:
        """`engine`: its weights are those of the base. `offload`: keep them in host memory. `new_rows`: as
        `model.new_rows` gives them."""
        self.strength = strength
        self._engine = engine
        self._size: float | None = None  # ||base||², of this rank
        self._base = {flat: _compact(flat, offload) for flat in engine.optimizer.fp32_partitioned_groups_flat}
        new = _places(engine, new_rows)
        self._parts = {flat: parts_without(len(flat), new.get(flat, []), _BLOCK) for flat in self._base}

    def apply(self, flat: torch.Tensor, rate: float) -> None:
        for weights, base in self._blocks(flat):
            weights.lerp_(base, min(1.0, rate * self.strength))

    @torch.no_grad()
    def distance(self) -> float:
        """||w - base|| / ||base|| over all parameters. All ranks together."""
        moved = self._norm_squared(lambda weights, base: weights - base)
        if self._size is None:
            self._size = self._norm_squared(lambda _, base: base)
        moved, size = sum_over_ranks(moved, self._size, device=self._engine.device)
        return math.sqrt(moved / size)

    def _norm_squared(self, of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> float:
        """Of this rank's shards; their padding is zero in weights and base."""
        sums = [squared_norm(of(*blocks)) for flat in self._base for blocks in self._blocks(flat)]
        return float(torch.stack(sums).sum()) if sums else 0.0

    def _blocks(self, flat: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        base = self._base[flat]
        for part in self._parts[flat]:
            yield flat[part], base[part].to(flat.device, torch.float32, non_blocking=True)


def _places(
    engine: Any, new_rows: Mapping[str, Sequence[tuple[int, int]]]
) -> dict[torch.Tensor, list[tuple[int, int]]]:
    """Where this rank's flat groups have elements of these runs of parameters."""
    found: dict[torch.Tensor, list[tuple[int, int]]] = {}
    for name, parameter in engine.module.named_parameters():
        for start, end in new_rows.get(name, ()):
            first, shard = own_part(parameter)
            low, high = max(start - first, 0), min(end - first, len(shard))
            if low < high:
                flat, at = place_in_flat(engine, parameter)
                found.setdefault(flat, []).append((at + low, at + high))
    return found


def squared_norm(values: torch.Tensor) -> torch.Tensor:
    """||values||² of fp32 values [n], a scalar in fp64: norms of short rows in fp32, their squares added in fp64. In
    fp64 throughout it takes 30 times as long; one fp32 norm of millions of alike values is wrong by half a percent."""
    whole = len(values) // _ROW * _ROW
    rows = torch.linalg.vector_norm(values[:whole].view(-1, _ROW), dim=1)
    rest = torch.linalg.vector_norm(values[whole:])
    total: torch.Tensor = rows.double().square().sum() + rest.double().square()
    return total


def parts_without(length: int, left_out: Sequence[tuple[int, int]], block: int) -> list[slice]:
    """Slices of at most `block` elements that are [0, length) but for some runs of it, (first, last + 1) each."""
    parts, at = [], 0
    for start, end in [*sorted(left_out), (length, length)]:
        parts += [slice(low, min(low + block, start)) for low in range(at, start, block)]
        at = end
    return parts


def _compact(flat: torch.Tensor, offload: bool) -> torch.Tensor:
    """A copy of fp32 values, in bf16 if that is exact."""
    low = flat.detach().to(torch.bfloat16)
    base = low if torch.equal(low.float(), flat) else flat.detach().clone()
    return base.cpu().pin_memory() if offload and base.device.type == "cuda" else base


def attach(engine: Any, train: Train, new_rows: Mapping[str, Sequence[tuple[int, int]]]) -> Pull | None:
    """Have the engine's updates followed by what the recipe asks for; returns the pull. Its weights are the base's,
    but for the `new_rows` (of `model.new_rows`)."""
    pull = Pull(engine, train.l2_pull, train.l2_pull_offload, new_rows) if train.l2_pull else None
    if train.ema_decay:
        _start_average(engine)

    @torch.no_grad()
    def after_update(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for flat in group["params"]:
                if pull is not None:
                    pull.apply(flat, group["lr"])
                if train.ema_decay:
                    step = int(optimizer.state[flat]["step"])
                    optimizer.state[flat][AVERAGE].lerp_(flat, 1 - decay_at(step, train.ema_decay))

    if pull is not None or train.ema_decay:
        engine.optimizer.optimizer.register_step_post_hook(after_update)
    return pull


def decay_at(step: int, decay: float) -> float:
    """Decay of the average after optimizer step `step` (from 1), which is AdamW's own count, so it survives a resume.

    min(decay, (1 + t) / (10 + t)), as TensorFlow's ExponentialMovingAverage (num_updates) and diffusers' EMAModel have
    it: the average looks back a ninth of the steps made, till `decay` bounds it. Without, it would be nearly the base
    in a run that is not long for its decay: 0.999 ** 500 is 0.6.
    """
    return min(decay, (1 + step) / (10 + step))


def _start_average(engine: Any) -> None:
    """The average, in the optimizer's state beside the moments, so that checkpoints treat it as they treat those."""
    start_optimizer(engine)
    for flat in engine.optimizer.fp32_partitioned_groups_flat:
        engine.optimizer.optimizer.state[flat][AVERAGE] = flat.detach().clone()


@contextmanager
def averaged(engine: Any) -> Iterator[str]:
    """The model has the averaged weights meanwhile, if there are any; afterwards, bit for bit, those of before. All
    ranks together. Gives "ema" or "live".

    Only the weights that forward uses change hands: they are copies of the optimizer's.
    """
    if not has_average(engine):
        yield "live"
        return
    refresh_model_from_optimizer(engine, AVERAGE)
    try:
        yield "ema"
    except Preempted:  # on all ranks; any other error may be of one rank alone, and ends the run
        refresh_model_from_optimizer(engine)
        raise
    refresh_model_from_optimizer(engine)
