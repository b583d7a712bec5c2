"""A run that hangs ends by itself, and says which rank is to blame.

Every rank marks its progress. A thread of each rank looks at the mark; when it stays the same for train.hang_timeout,
or when another rank has reported so, the rank writes its last mark and the stacks of its threads to

    <run folder>/hang/<start of the run>/rank-00003.txt

After a few seconds the lowest rank that has answered compares the reports, prints who is missing or behind, and every
rank exits. That makes the launcher end those which are frozen.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from fullft.errors import EXIT_FAILED
from fullft.state import leave_failure, set_state


class Mark(NamedTuple):
    """All ranks make the same marks in the same order, so the rank with the lowest number is behind."""

    number: int
    step: int
    phase: str
    time: float  # time.monotonic()


_LAST_RESORT_SECONDS = 60
_WAITS = ("/torch/", "/deepspeed/")
_mark = Mark(0, 0, "start", time.monotonic())
_looks = 0  # how often the watching thread has looked


def mark(phase: str, step: int | None = None) -> None:
    """Progress was made: `phase` (of optimizer step `step`, default: that of the last mark) begins."""
    global _mark
    _mark = Mark(_mark.number + 1, _mark.step if step is None else step, phase, time.monotonic())


def touch() -> None:
    """Still in the phase of the last mark, and not hanging: for what ranks do unequally often."""
    global _mark
    _mark = _mark._replace(time=time.monotonic())


def start(run_folder: Path, timeout: float) -> None:
    """Watch this rank from now on; timeout in seconds. All ranks together."""
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, (socket.gethostname(), time.strftime("%Y-%m-%dT%H-%M-%S")))
    hosts, folder = [host for host, _ in told], run_folder / "hang" / told[0][1]
    arguments = (run_folder, folder, dist.get_rank(), hosts, timeout)
    threading.Thread(target=_watch, args=arguments, name="watchdog", daemon=True).start()
    threading.Thread(target=_watch_the_watch, args=(timeout,), name="watchdog of the watchdog", daemon=True).start()


def _watch(run_folder: Path, folder: Path, rank: int, hosts: list[str], timeout: float) -> None:
    global _looks
    pause = min(5.0, timeout / 10)
    seen, idle = _mark, 0.0
    while idle < timeout and not folder.exists():
        _looks += 1
        time.sleep(pause)
        # Not by the clock: a process that was stopped and goes on has not been idle.
        seen, idle = (seen, idle + pause) if _mark is seen else (_mark, 0.0)
    # The run has failed. Should this thread get no further, one in C writes the stacks to stderr and exits.
    faulthandler.dump_traceback_later(2 * pause + 60, exit=True)
    try:
        _report(run_folder, folder, rank, hosts, timeout, pause)
    except Exception as error:  # what has failed may be the disk
        os.write(2, f"fullft: no progress for {timeout:g} s on rank {rank}; no report: {error}\n".encode())
        faulthandler.dump_traceback(2, all_threads=True)
    os._exit(EXIT_FAILED)


def _watch_the_watch(timeout: float) -> None:
    """Where the file system is gone, `_watch` gets no further. This thread touches no file but stderr."""
    pause = min(5.0, timeout / 10)
    seen, idle = _looks, 0.0
    while idle < timeout + _LAST_RESORT_SECONDS:
        time.sleep(pause)  # nor does it go by the clock
        seen, idle = (seen, idle + pause) if _looks == seen else (_looks, 0.0)
    os.write(2, f"fullft: cannot look at the run folder for {idle:g} s; the stacks of this rank:\n".encode())
    faulthandler.dump_traceback(2, all_threads=True)
    os._exit(EXIT_FAILED)


def _report(run_folder: Path, folder: Path, rank: int, hosts: list[str], timeout: float, pause: float) -> None:
    _write_report(folder, rank, hosts[rank])
    time.sleep(2 * pause + 3)  # all ranks look once in `pause` seconds
    reports = _read_reports(folder)
    summary = folder / "summary.txt"
    if rank == min(reports):
        text = f"no progress for {timeout:g} s (train.hang_timeout)\n{compare(reports, hosts)}stacks: {folder}\n"
        os.write(2, f"fullft: {text}".encode())
        leave_failure(run_folder, rank, text)  # for a frozen rank that wakes by the launcher's signal
        set_state(run_folder, "failed", reason=text)
        summary.write_text(text)
    deadline = time.monotonic() + 10
    while not summary.exists() and time.monotonic() < deadline:  # the first to exit takes the others with it
        time.sleep(0.1)


def _write_report(folder: Path, rank: int, host: str) -> None:
    """First line: the mark as JSON; then the stacks."""
    folder.mkdir(parents=True, exist_ok=True)
    last, frame = _mark, sys._current_frames().get(threading.main_thread().ident or 0)
    at = f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name})" if frame else "?"
    head = {"rank": rank, "host": host, "number": last.number, "step": last.step, "phase": last.phase, "at": at}
    head["seconds"] = round(time.monotonic() - last.time, 1)
    partial = folder / f"rank-{rank:05d}.tmp"
    with partial.open("w") as file:
        file.write(json.dumps(head) + "\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
    partial.rename(partial.with_suffix(".txt"))


def _read_reports(folder: Path) -> dict[int, dict[str, Any]]:
    heads = [json.loads(file.read_text().partition("\n")[0]) for file in folder.glob("rank-*.txt")]
    return {head["rank"]: head for head in heads}


def compare(reports: dict[int, dict[str, Any]], hosts: list[str]) -> str:
    """One line for the ranks without a report, then one for each place at which ranks are, those to blame first: behind
    the others, else the fewer, else those outside of the libraries in which a rank waits for others."""
    lines = []
    if missing := [rank for rank in range(len(hosts)) if rank not in reports]:
        lines.append(f"{_named(missing, hosts)} did not answer: frozen or dead")
    groups: dict[tuple[Any, ...], list[int]] = {}
    for rank, head in sorted(reports.items()):
        groups.setdefault((head["number"], head["step"], head["phase"], head["at"]), []).append(rank)
    furthest = max(number for number, *_ in groups)
    in_order = sorted(groups, key=lambda group: (group[0], len(groups[group]), any(one in group[3] for one in _WAITS)))
    for number, step, phase, at in in_order:
        ranks = groups[number, step, phase, at]
        are = "is" if len(ranks) == 1 else "are"
        still = " still" if number < furthest else ""
        lines.append(f"{_named(ranks, hosts)} {are}{still} in {phase} of step {step}, at {at}")
    return "".join(f"  {line}\n" for line in lines)


def _named(ranks: list[int], hosts: list[str]) -> str:
    """`rank 2 (node7)`, `ranks 0, 3-7 (node1, node2)`"""
    runs = itertools.groupby(enumerate(ranks), key=lambda pair: pair[1] - pair[0])
    spans = [[rank for _, rank in run] for _, run in runs]
    numbers = ", ".join(f"{span[0]}-{span[-1]}" if len(span) > 2 else ", ".join(map(str, span)) for span in spans)
    names = sorted({hosts[rank] for rank in ranks})
    where = ", ".join(names[:4]) + (f" and {len(names) - 4} hosts more" if len(names) > 4 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {numbers} ({where})"
