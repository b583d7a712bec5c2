"""Use of the host and GPU of this process, sampled beside the training: a step only picks up the newest sample."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

import torch


class SystemMetrics:
    """Samples every `every_seconds` in a thread; `latest` is the last one. All names begin with system/."""

    def __init__(self, every_seconds: float = 10.0) -> None:
        self.latest: dict[str, float] = {}
        self._every_seconds, self._stopped = every_seconds, threading.Event()
        threading.Thread(target=self._watch, name="system metrics", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.is_set():
            with contextlib.suppress(OSError, RuntimeError, KeyError, ValueError):  # never a reason to end
                self.latest = sample()
            self._stopped.wait(self._every_seconds)


def sample() -> dict[str, float]:
    """Memory of host and GPU in GiB, load of host (runnable processes) and GPU (percent of time with a kernel)."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, available = (int(lines[name].split()[0]) / 2**20 for name in ("MemTotal", "MemAvailable"))
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30
    found = {
        "system/host_memory_gib": total - available, "system/host_memory_percent": 100 * (1 - available / total),
        "system/rank_memory_gib": resident, "system/host_load": os.getloadavg()[0],
    }  # fmt: skip
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        free, capacity = torch.cuda.mem_get_info()
        found |= {"system/gpu_memory_gib": (capacity - free) / 2**30}
        with contextlib.suppress(ModuleNotFoundError, RuntimeError):  # torch asks the package pynvml
            found |= {"system/gpu_utilization_percent": float(torch.cuda.utilization())}
    return found
