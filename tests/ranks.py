"""Ranks without a launcher, so that their own exit codes and signals are seen."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import warm
from conftest import TRAIN, before_training, places, write_recipe

SECONDS = 240  # start to end takes 10 where nothing else runs


def wait_for(condition: Callable[[], Any], what: str, seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.005)


class Ranks:
    """`with Ranks(recipe, 2) as ranks:` processes of one run, of which none outlives the block."""

    def __init__(self, recipe: dict[str, Any], count: int = 2, program: str = "", forked: bool = True) -> None:
        """program: Python that each runs before training. forked: see warm.py; else they import all, as users' do."""
        self.folder = Path(recipe["run_dir"])
        config = write_recipe(recipe, self.folder.with_suffix(".yaml"))
        self.logs = [self.folder.parent / f"{self.folder.name}.rank-{rank}.log" for rank in range(count)]
        script = before_training(program, self.folder.with_suffix(".py")) if program else TRAIN
        with contextlib.ExitStack() as stack:
            outputs = [stack.enter_context(log.open("w")) for log in self.logs]
            self.processes = [
                warm.start(
                    script, "--config", str(config), stdout=output, stderr=output, cwd=self.folder.parent,
                    forked=forked, **place,
                )
                for place, output in zip(places(count), outputs, strict=True)
            ]  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait(10)

    @property
    def output(self) -> str:
        return "\n".join(log.read_text(errors="replace")[-4000:] for log in self.logs)

    def send(self, signum: int, *ranks: int) -> None:
        for rank in ranks or range(len(self.processes)):
            self.processes[rank].send_signal(signum)

    def wait_until(self, condition: Callable[[], Any], what: str) -> None:
        def holds() -> Any:
            found = condition()
            assert found or None in [process.poll() for process in self.processes], f"ended: {what}\n{self.output}"
            return found

        wait_for(holds, what)

    def wait_until_they_listen(self) -> None:
        """Until every rank has a handler of SIGUSR1."""
        self.wait_until(lambda: all(_catches(process.pid, signal.SIGUSR1) for process in self.processes), "handlers")

    def codes(self, seconds: float = SECONDS) -> list[int]:
        """Exit codes of all ranks, which must come within this time."""
        deadline = time.monotonic() + seconds
        try:
            return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.output}") from None


def _catches(pid: int, signum: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")), "0")
    return bool(int(caught, 16) >> (signum - 1) & 1)
