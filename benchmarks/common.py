"""What every benchmark does: run contenders as processes of their own, and write down what was measured where."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(os.environ.get("FULLFT_BENCHMARK_RESULTS") or Path(__file__).parent / "results")
_PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "tokenizers", "numpy", "mpi4py", "trl", "triton")


@dataclass
class Measured:
    """A process that has ended. `peak_bytes`: most memory of it and its children together, shared pages counted once
    (proportional set size, sampled)."""

    seconds: float
    peak_bytes: int
    output: str


def run(command: list[str], sample_seconds: float = 0.1, **environment: str) -> Measured:
    """Run a command to its end. A sample of its memory takes some 10 ms of a core a process.

    Raises:
        RuntimeError: it fails; with the end of its output.
    """
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | environment
    )
    peak = 0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            peak = max(peak, _tree_bytes(process.pid))
            time.sleep(sample_seconds)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = process.communicate()
    watcher.join()
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{output[-3000:]}")
    return Measured(time.perf_counter() - started, peak, output)


def _tree_bytes(pid: int) -> int:
    total = 0
    try:
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            total += process.memory_full_info().pss
    except psutil.Error:
        return total
    return total


def machine() -> dict[str, Any]:
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    on_cpu = os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available()
    gpu = None if on_cpu else torch.cuda.get_device_name()
    return {
        "cpu": cpu, "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1), "gpu": gpu,
        "python": platform.python_version(), "platform": platform.platform(),
    }  # fmt: skip


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def goal(name: str, wanted: str, measured: float, met: bool) -> dict[str, Any]:
    return {"name": name, "goal": wanted, "measured": measured, "met": met}


def commit() -> str:
    """HEAD, and whether files other than results have changed since; where git cannot tell: unknown."""
    results = [f":(exclude,literal){RESULTS.resolve()}"] if RESULTS.resolve().is_relative_to(ROOT) else []
    found = []
    for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", ".", ":!benchmarks/results", *results]):
        try:
            done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):  # not installed; no repository, or another user's
            return "unknown"
        found.append(done.stdout.strip())
    return found[0] + (" with changes" if found[1] else "")


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Whole or not at all: whoever is killed while it writes leaves what was there before."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(file)


def write(name: str, rows: dict[str, Any], goals: list[dict[str, Any]], **more: Any) -> Path:
    """benchmarks/results/<name>-<gpu or cpu>.json; `name` is the module's, and behind a hyphen which of its results."""
    here = machine()
    kind = (here["gpu"] or "cpu").lower().replace(" ", "-")
    file = RESULTS / f"{name}-{kind}.json"
    content = {
        "benchmark": name, "date": time.strftime("%Y-%m-%d"), "command": "python -m " + " ".join(
            # Where files lie tells nobody.
            [f"benchmarks.{name.partition('-')[0]}", *(Path(word).name for word in sys.argv[1:])]
        ), "commit": commit(), "machine": here, "versions": _versions(),
        "goals": goals, "rows": rows,
    } | more  # fmt: skip
    write_json(file, content)
    for one in goals:
        print(f"{'met   ' if one['met'] else 'MISSED'} {one['name']}: {one['measured']:.4g} (goal {one['goal']})")
    print(file)
    return file
