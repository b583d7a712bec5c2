"""Contenders that take turns: A B A B …, so that whatever else the machine does meets all of them alike.

Each contender is the ranks of one training run, which calls `Turns.step_begins` at every step and waits there while it
is not its turn. A turn is some steps in a row; the first turn of each contender warms up and is not counted.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CPU_RANK = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
RANK = {
    "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled",
    "PYTORCH_ALLOC_CONF": "expandable_segments:True", "TRANSFORMERS_VERBOSITY": "error",
}  # fmt: skip
OUT_OF_TIME = "in time"
WARM_UP = 3  # steps: ZeRO-3 records the order of modules, AdamW allocates its moments, allocators grow


# On a rank


class Ended(BaseException):
    """The last turn is over. Not an Exception: no loop is to take it for a failure of a step."""


class Turns:
    def __init__(self, descriptor: int) -> None:
        """descriptor: of the socket to the process that gives turns."""
        self._socket = socket.socket(fileno=descriptor)
        self._lines = self._socket.makefile("r")
        self._marks: list[tuple[float, float]] = []
        self._left = 0
        # What the contender runs with; each turn tells it, since a time limit may come before its end.
        self.in_use: dict[str, Any] = {}
        # A time limit ends the process that gives turns, which ends this one.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def step_begins(self) -> None:
        """Between two steps: here the time of the last one ends and, when it is our turn, that of the next begins.

        Raises:
            Ended: no more turns.
        """
        if self._left == 0:
            if self._marks:
                self._mark()
                self._send({"marks": self._marks, "in_use": self.in_use})
            elif _cpu():
                os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[_rank() % len(os.sched_getaffinity(0))]})
            self._left = json.loads(self._lines.readline() or "0")
            if self._left == 0:
                raise Ended
            if self._left < 0:  # the first that counts: memory of loading and of other warm-up is not of a step
                self._left = -self._left
                _forget_peak()
            self._marks = []
        self._mark()
        self._left -= 1

    def _mark(self) -> None:
        if self._left == 0 or not self._marks:  # between them the loops may run ahead of the GPU, as they do in a run
            _wait_for_gpu()
        self._marks.append((time.perf_counter(), time.process_time()))

    def end(self, **results: Any) -> None:
        """Report what the contender found out, and its peak memory, and end this process at once."""
        self._send({"result": results | {"memory": _peak()}})
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

    def _send(self, message: dict[str, Any]) -> None:
        self._socket.sendall(json.dumps(message).encode() + b"\n")


def _rank() -> int:
    return int(os.environ["RANK"])


def _cpu() -> bool:
    return os.environ.get("DS_ACCELERATOR") == "cpu"


def _wait_for_gpu() -> None:
    if not _cpu():
        import torch

        torch.cuda.synchronize()


def _forget_peak() -> None:
    if _cpu():
        Path("/proc/self/clear_refs").write_text("5")
    else:
        import torch

        torch.cuda.reset_peak_memory_stats()


def _peak() -> dict[str, int]:
    """Bytes: on CPU the most resident memory of the process, on GPU what tensors took at most and what of the device
    the allocator had reserved."""
    if _cpu():
        status = Path("/proc/self/status").read_text().splitlines()
        return {"peak_bytes": next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))}
    import torch

    return {
        "peak_bytes": torch.cuda.max_memory_allocated(), "peak_reserved_bytes": torch.cuda.max_memory_reserved()
    }  # fmt: skip


# The process that gives turns


class OutOfTime(BaseException):
    """SIGTERM came: what has been measured until now is to be written."""


def end_in_time() -> None:
    """Have SIGTERM end the turns, not the process, once."""

    def handle(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise OutOfTime

    signal.signal(signal.SIGTERM, handle)


class Failed(Exception):
    """A contender ended before its turns; with the end of what it said."""


@dataclass
class Contender:
    """`command`: of each rank; the words `--turns FD` come behind it."""

    name: str
    command: Sequence[str]
    ranks: int = 1
    turns: list[dict[str, float]] = field(default_factory=list)  # of the counted turns: seconds, CPU seconds, steps
    results: list[dict[str, Any]] = field(default_factory=list)  # of each rank of the last life
    in_use: dict[str, Any] = field(default_factory=dict)  # attention, kernels …, as its first rank has told


class _Life:
    """The running ranks of a contender."""

    def __init__(self, contender: Contender, log: Path, cpu: bool, seconds: float) -> None:
        self.contender, self._log, self.deadline = contender, log, time.monotonic() + seconds
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        self._processes, self._sockets = [], []
        for rank in range(contender.ranks):
            here, there = socket.socketpair()
            place = {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": contender.ranks, "LOCAL_WORLD_SIZE": contender.ranks,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            }  # fmt: skip
            environment = os.environ | RANK | {key: str(value) for key, value in place.items()}
            environment |= CPU_RANK if cpu else {}
            command = [*contender.command, "--turns", str(there.fileno())]
            with log.open("ab") as output:
                process = subprocess.Popen(
                    command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                    pass_fds=[there.fileno()],
                )  # fmt: skip
            self._processes.append(process)
            there.close()
            self._sockets.append(here)
        self._lines = [one.makefile("r") for one in self._sockets]

    def turn(self, steps: int, kind: str) -> None:
        """Let it take so many steps; `kind`: warm-up, first (that counts) or counted."""
        try:
            for one in self._sockets:
                one.sendall(f"{-steps if kind == 'first' else steps}\n".encode())
        except BrokenPipeError:
            raise self._failure() from None
        told = [json.loads(self._read(rank)) for rank in range(self.contender.ranks)]
        marks, self.contender.in_use = [one["marks"] for one in told], told[0]["in_use"]
        if kind == "warm-up":
            return
        wall = max(one[-1][0] - one[0][0] for one in marks)
        cpu = sum(one[-1][1] - one[0][1] for one in marks)
        self.contender.turns.append({"steps": steps, "seconds": wall, "cpu_seconds": cpu})

    def end(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # told by what is read
            for one in self._sockets:
                one.sendall(b"0\n")
        self.contender.results = [json.loads(self._read(rank))["result"] for rank in range(self.contender.ranks)]
        for process in self._processes:
            process.wait(60)

    def _read(self, rank: int) -> str:
        self._sockets[rank].settimeout(max(1.0, self.deadline - time.monotonic()))
        try:
            line = self._lines[rank].readline()
        except TimeoutError:
            raise Failed(f"{self.contender.name} took too long; its log ends with:\n{self._tail()}") from None
        except ConnectionResetError:
            line = ""
        if not line:
            raise self._failure()
        return line

    def _failure(self) -> Failed:
        return Failed(f"{self.contender.name} failed:\n{self._tail()}")

    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-3000:]

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        for one in self._sockets:
            one.close()


@contextlib.contextmanager
def _noting_the_end(failed: dict[str, str]) -> Iterator[None]:
    try:
        yield
    except OutOfTime:
        failed[OUT_OF_TIME] = "some were cut off by a time limit: fewer turns than wanted"


@contextlib.contextmanager
def _alive(contenders: Sequence[Contender], folder: Path, cpu: bool, seconds: float) -> Iterator[list[_Life]]:
    lives: list[_Life] = []
    started: list[_Life] = []
    try:
        for number, contender in enumerate(contenders):
            lives.append(_Life(contender, folder / f"{number}.log", cpu, seconds))
            started.append(lives[-1])
        yield lives
    finally:
        for life in started:
            life.kill()


def alternate(
    contenders: Sequence[Contender], folder: Path, *, turns: int, steps: int, cpu: bool, seconds: float = 3000
) -> dict[str, str]:
    """All at once in memory, a turn of each after the other, in another order each round. Returns why some failed, by
    name; of these no turn is kept, and the others go on."""
    order, failed = random.Random(0), dict[str, str]()
    busy: _Life | None = None
    with _noting_the_end(failed), _alive(contenders, folder, cpu, seconds) as lives:
        try:
            for number in range(-1, turns + 1):
                for busy in order.sample(lives, len(lives)):
                    try:
                        if number == turns:
                            busy.end()
                        elif number < 0:
                            busy.turn(WARM_UP, "warm-up")
                        else:
                            busy.turn(steps, "counted" if number else "first")
                    except Failed as error:
                        failed[busy.contender.name] = str(error)
                        busy.contender.turns.clear()
                        busy.kill()
                        lives.remove(busy)
        except OutOfTime:  # those that wait for a turn can still tell losses and memory, if they have begun
            until = time.monotonic() + 10  # then whoever gave the limit may kill us
            for life in lives:
                if life is not busy and life.contender.turns:
                    life.deadline = until
                    with contextlib.suppress(Failed):
                        life.end()
            raise
    return failed


def one_by_one(
    contenders: Sequence[Contender], folder: Path, *, rounds: int, steps: int, cpu: bool, seconds: float = 3000
) -> dict[str, str]:
    """Each alone in memory, started anew every round: where two do not fit. Returns why some failed, by name; a
    contender that has failed is not started again."""
    failed: dict[str, str] = {}
    with _noting_the_end(failed):
        for contender in [*contenders] * rounds:
            if contender.name in failed:
                continue
            try:
                with _alive([contender], folder, cpu, seconds) as (life,):
                    life.turn(WARM_UP, "warm-up")
                    life.turn(steps, "first")
                    life.end()
            except Failed as error:
                failed[contender.name] = str(error)
                contender.turns.clear()
    return failed


def ratio(one: Contender, other: Contender, key: str) -> dict[str, float]:
    """Median of one's over other's time (`seconds` or `cpu_seconds`) in each round, its quartiles, and how many."""
    pairs = list(zip(one.turns, other.turns, strict=False))
    ratios = sorted((a[key] / a["steps"]) / (b[key] / b["steps"]) for a, b in pairs)
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"median": middle, "quartile_low": low, "quartile_high": high, "pairs": len(ratios)}
