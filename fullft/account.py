"""Where the time of a step goes, and what it is worth: time/… and perf/… of a row of metrics.

The loop says at each border which phase begins, which is also the watchdog's mark. On a GPU a border is an event on the
stream of the computation, read after the sums over the ranks, which every step waits for anyway; so the time of a phase
is that of its kernels, not of their launch.

DeepSpeed gathers parameters and reduces gradients inside of forward and backward. What the computation waits for these
is taken from those phases and is `communication`, as are the two sums over the ranks, in which a rank waits for the
slowest. (The norm of the gradients and the gather of resident parameters, both small, are in `optimizer`.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fullft import watchdog
from fullft.data.batches import Batch
from fullft.flops import Flops, document_lengths

_PARTS = {
    "data": "data", "token count": "communication", "forward": "forward", "backward": "backward",
    "update": "optimizer", "sums over ranks": "communication",
}  # fmt: skip
_APART = ("evaluation", "checkpoint", "rollback", "trace")  # no part of a step
_NAMES = ("data", "forward", "backward", "optimizer", "communication", "rest")
# What DeepSpeed calls its own: private names, guarded by a test. Without them communication is not measured.
_PROFILER = "_PartitionedParameterCoordinator__profiler"
_REDUCTIONS = (
    "_DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads",
    "independent_gradient_partition_epilogue",
)


class Account:
    """The account of the steps since the last row; times are those of this rank."""

    def __init__(
        self,
        engine: Any,
        flops: Flops | None,
        peak: float | None,
        checkpointing: str,
        tiled: bool = False,
        trace: Callable[[str], None] | None = None,
    ) -> None:
        """
        Args:
            flops: of the model; None: unknown, and so perf/tflops_per_gpu.
            peak: FLOP/s of a GPU; None: unknown, and so perf/mfu.
            checkpointing: none, selective, full or offload; tiled: MLPs run in tiles. What backward so runs again is in
                perf/hfu.
            trace: is told each phase that begins.
        """
        self._flops, self._peak, self._trace = flops, peak, trace
        self._checkpointing, self._tiled = checkpointing, tiled
        self._world_size = int(engine.world_size)
        self._on_gpu = torch.device(engine.device).type == "cuda"
        self._borders: list[tuple[str, Any]] = []  # phase, and when it began: seconds, an event on a GPU
        self._waits: list[tuple[str, Any, Any]] = []  # phase, and when the computation began and ceased to wait in it
        self._spare_events: list[Any] = []
        self._depth, self._began = 0, None  # of waits in each other, and the begin of the outermost
        self._seconds: dict[str, float] = {}
        self.forget()
        self.why_no_waits = self.listen(engine)  # a line for the log; empty if waits are measured

    def forget(self) -> None:
        """Begin anew here: what was since the last row is in none."""
        self._borders, self._waits = [("rest", self._now())], []
        self._begin_row()

    def _begin_row(self) -> None:
        self._seconds = dict.fromkeys((*_NAMES, *_APART), 0.0)
        self._steps, self._tokens, self._needed, self._run = 0, 0, 0.0, 0.0

    def phase(self, name: str, step: int | None = None) -> None:
        """A phase begins (of optimizer step `step`), and the one before ends."""
        watchdog.mark(name, step)
        self._borders.append((name, self._now()))
        if self._trace is not None:
            self._trace(name)

    def flops_of(self, batches: Sequence[Batch]) -> tuple[float, float]:
        """(FLOPs that the documents of this rank's micro-batches need, FLOPs that are run) in forward and backward; the
        second with padding and recomputation. 0 of an unknown architecture. (A reference model that runs beside, of
        train.kl_reference, is in neither.)"""
        if self._flops is None:
            return 0.0, 0.0
        needed = run = 3 * self._flops.forward(0, sum(sum(batch.labelled.counts) for batch in batches))
        for batch in batches:
            with_padding, lengths = document_lengths(batch.documents.ends, batch.lengths)
            # Ranks that share rows have some of the heads each.
            attention, attention_run = (
                self._flops.attention(one) / batch.documents.ranks for one in (lengths, with_padding)
            )
            needed += 3 * (self._flops.forward(batch.tokens, 0) + attention)
            run += 3 * (self._flops.forward(batch.position_ids.numel(), 0) + attention_run)
            run += self._flops.recomputed(batch.position_ids.numel(), self._checkpointing, self._tiled)
            run += attention_run if self._checkpointing in ("full", "offload") else 0.0  # selective keeps it
        return needed, run

    def end_step(self, tokens: int, needed_flops: float, run_flops: float) -> float:
        """A step has ended, and the host has waited for it. Its time in seconds, with what was between it and the step
        before but for evaluation and checkpoint. The arguments are of all ranks."""
        before = sum(self._seconds[name] for name in _NAMES)
        self._settle()
        self._steps += 1
        self._tokens += tokens
        self._needed += needed_flops
        self._run += run_flops
        return sum(self._seconds[name] for name in _NAMES) - before

    def row(self) -> dict[str, float]:
        """Means over the steps since the last row, so that the parts sum to time/step_seconds, and a row that stands
        for many steps is less noisy than one that stands for one. {} if there were none."""
        if not self._steps:
            return {}
        seconds = {name: self._seconds[name] / self._steps for name in _NAMES}
        if self.why_no_waits:
            seconds["rest"] += seconds.pop("communication")
        total = sum(seconds.values())
        row = {"time/step_seconds": total} | {f"time/{name}_seconds": value for name, value in seconds.items()}
        speed, per_gpu = self._tokens / self._steps / total, 1 / self._steps / total / self._world_size
        row |= {"perf/tokens_per_second": speed, "perf/tokens_per_second_per_gpu": speed / self._world_size}
        if self._flops is not None:
            row["perf/tflops_per_gpu"] = self._needed * per_gpu / 1e12
            if self._peak is not None:
                row |= {"perf/mfu": self._needed * per_gpu / self._peak, "perf/hfu": self._run * per_gpu / self._peak}
        self._begin_row()
        return row

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = self._spare_events.pop() if self._spare_events else torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _settle(self) -> None:
        """Add up what has been until now. The stream of a GPU is empty, or nearly so."""
        self._borders.append(("rest", self._now()))
        if self._on_gpu:
            self._borders[-1][1].synchronize()
        for (name, began), (_, ended) in zip(self._borders, self._borders[1:], strict=False):
            self._seconds[name if name in _APART else _PARTS.get(name, "rest")] += self._between(began, ended)
        for name, began, ended in self._waits:
            waited = self._between(began, ended)
            self._seconds[_PARTS[name]] -= waited
            self._seconds["communication"] += waited
        if self._on_gpu:
            self._spare_events += [border for _, border in self._borders[:-1]]
            self._spare_events += [event for _, *pair in self._waits for event in pair]
        self._borders, self._waits = self._borders[-1:], []

    def _between(self, began: Any, ended: Any) -> float:
        return began.elapsed_time(ended) / 1000 if self._on_gpu else ended - began  # type: ignore[no-any-return]

    def _begin_wait(self) -> None:
        if self._depth == 0:
            self._began = self._now()
        self._depth += 1

    def _end_wait(self, is_over_something: bool = True) -> None:
        self._depth -= 1
        if self._depth == 0:
            phase = self._borders[-1][0]
            if is_over_something and phase in _PARTS:  # not in an evaluation
                self._waits.append((phase, self._began, self._now()))
            elif self._on_gpu:
                self._spare_events.append(self._began)

    def listen(self, engine: Any, trains: bool = True) -> str:
        """Have DeepSpeed tell when the computation waits for this engine, which may be one without optimizer that runs
        beside (`trains`: False). Returns why it does not."""
        optimizer = engine.optimizer
        offload = getattr(optimizer, "parameter_offload", None) if trains else optimizer
        coordinator = getattr(offload, "param_coordinator", None)
        reductions = _REDUCTIONS if trains else ()
        lacking = [name for name in reductions if not hasattr(optimizer, name)]
        lacking += [] if hasattr(coordinator, _PROFILER) else [_PROFILER]
        if lacking:
            names = " and ".join(lacking)
            return f"time/communication_seconds is not measured but in the other parts: DeepSpeed has no {names} here"
        setattr(coordinator, _PROFILER, _Listener(self._begin_wait, self._end_wait))
        for name in reductions:
            setattr(optimizer, name, self._as_wait(getattr(optimizer, name)))
        return ""

    def _as_wait(self, reduce: Callable[..., Any]) -> Callable[..., Any]:
        def reduce_and_account(*arguments: Any, **keywords: Any) -> Any:
            self._begin_wait()
            try:
                return reduce(*arguments, **keywords)
            finally:
                self._end_wait()

        return reduce_and_account


class _Listener:
    """In place of the profiler that DeepSpeed's coordinator of parameters tells what it does."""

    def __init__(self, begin: Callable[[], None], end: Callable[[bool], None]) -> None:
        self._begin, self._end = begin, end

    def start_event(self, name: str) -> None:
        if name.endswith("_fetch_wait"):
            self._begin()

    def stop_event(self, name: str, numel: int) -> None:  # 0: nothing had to be waited for, as of most modules
        if name.endswith("_fetch_wait"):
            self._end(numel > 0)

    def reset_events(self) -> None: ...

    def log_events(self) -> None: ...
