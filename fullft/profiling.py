"""`train.profile`: a trace of some optimizer steps by torch's profiler, with the phases of a step as ranges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fullft import lease
from fullft.cluster import Cluster
from fullft.recipe import Recipe


class Profile:
    """Traces rank 0 of each node; on other ranks, and without train.profile, every method does nothing."""

    def __init__(self, recipe: Recipe, cluster: Cluster, say: Callable[[str], None]) -> None:
        """`say` shows a line of rank 0."""
        self._steps = recipe.train.profile if cluster.local_rank == 0 else None
        self._folder, self._rank, self._say = recipe.run_folder / "profile", cluster.rank, say
        self._profiler: Any = None
        self._range: Any = None
        self._first = 0

    def before(self, step: int) -> None:
        """Optimizer step `step` (from 1) begins: start with the first, end after the last, of a resumed run too."""
        if self._steps is None:
            return
        first, last = self._steps
        if self._profiler is None and first <= step <= last:
            activities = [torch.profiler.ProfilerActivity.CPU]
            activities += [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profiler, self._first = torch.profiler.profile(activities=activities), step
            self._profiler.start()
        elif self._profiler is not None and not self._first <= step <= last:
            self.end(step - 1)

    def phase(self, name: str) -> None:
        """A phase of the step begins."""
        self._close_range()
        if self._profiler is not None:
            self._range = torch.profiler.record_function(name)
            self._range.__enter__()

    def end(self, last: int) -> None:
        """Write the trace of the steps up to `last`, if there is one. A full disk is told and does not end the run."""
        if self._profiler is None:
            return
        self._close_range()
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        file = self._folder / f"steps-{self._first:08d}-{last:08d}.rank-{self._rank:05d}.json.gz"
        try:
            lease.check()
            self._folder.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(file))
        except OSError as error:
            self._say(f"WARNING: the trace of train.profile cannot be written ({error}); training goes on")
            return
        self._say(f"trace of steps {self._first} to {last}: {file}; open it at https://ui.perfetto.dev")

    def _close_range(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None
