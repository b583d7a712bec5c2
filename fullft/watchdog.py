"""A run that hangs ends by itself, and says which rank is to blame.

Every rank marks its progress. A thread of each rank looks at the mark; when it stays the same for train.hang_timeout,
or when another rank has reported so, the rank writes its last mark and the stacks of its threads to

    <run folder>/hang/<start of the run>/rank-00003.txt

After a few seconds the lowest rank that has answered compares the reports, prints who is missing or behind, and every
rank exits. That makes the launcher end those which are frozen.

A rank that waits for others cannot tell a slow one from a cut cable, so ranks listen on a port, and one of each host
tries those of the other hosts when it reports. (Nobody accepts: the kernel answers, also for a process that is frozen.)
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from fullft.cluster import owners
from fullft.errors import EXIT_FAILED
from fullft.state import leave_failure, set_state


class Mark(NamedTuple):
    """All ranks make the same marks in the same order, so the rank with the lowest number is behind."""

    number: int
    step: int
    phase: str
    time: float  # time.monotonic()


Doors = dict[str, tuple[str, int]]  # of each host: address and port
_LAST_RESORT_SECONDS = 60
_CONNECT_SECONDS = 3
_WAITS = ("/torch/", "/deepspeed/")
_mark = Mark(0, 0, "start", time.monotonic())
_looks = 0  # how often the watching thread has looked
_door: socket.socket | None = None


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
    me, told = dist.get_rank(), list[Any]([None] * dist.get_world_size())
    dist.all_gather_object(told, (socket.gethostname(), time.strftime("%Y-%m-%dT%H-%M-%S"), _open_door(me)))
    hosts, folder = [host for host, _, _ in told], run_folder / "hang" / told[0][1]
    doors = {host: door for host, _, door in reversed(told) if door}  # that of the first rank of a host
    is_first = hosts.index(hosts[me]) == me
    others = {host: _looked_up(*door) for host, door in doors.items() if is_first and host != hosts[me]}
    owner_of = owners(run_folder / "lease")  # ranks whose run folder is another one leave their reports there
    ranks = [rank for rank, owner in enumerate(owner_of) if owner == owner_of[me]]
    arguments = (run_folder, folder, me, ranks, hosts, others, timeout)
    threading.Thread(target=_watch, args=arguments, name="watchdog", daemon=True).start()
    threading.Thread(target=_watch_the_watch, args=(timeout,), name="watchdog of the watchdog", daemon=True).start()


def _open_door(rank: int) -> tuple[str, int] | None:
    """Address and port of this host at which the others can try to reach it; None if no launcher has named a master.
    The port stays open as long as the process."""
    global _door
    if not (master := os.environ.get("MASTER_ADDR")):
        return None
    family, *_, address = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing: this host's address on the way to rank 0 is asked for
        own = probe.getsockname()[0]
    _door = socket.create_server(("", 0), family=family, backlog=4096)
    # On its own host the master's name may mean 127.0.1.1.
    return (master if rank == 0 else own), _door.getsockname()[1]


def _looked_up(name: str, port: int) -> tuple[str, int]:
    """Now, as a name server too may be behind the link that breaks."""
    address = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)[0][4]
    return str(address[0]), int(address[1])


def _unreached(others: Doors) -> list[str]:
    """The hosts to which no connection can be made within seconds."""

    def fails(door: tuple[str, int]) -> bool:
        try:
            socket.create_connection(door, _CONNECT_SECONDS).close()
        except ConnectionRefusedError:  # the process has ended, its host is there
            return False
        except OSError:
            return True
        return False

    with ThreadPoolExecutor(max(1, len(others))) as pool:
        return [host for host, failed in zip(others, pool.map(fails, others.values()), strict=True) if failed]


def _watch(
    run_folder: Path, folder: Path, rank: int, ranks: list[int], hosts: list[str], others: Doors, timeout: float
) -> None:
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
        folder.mkdir(parents=True, exist_ok=True)  # tells the other ranks
        _write_report(folder, rank, hosts[rank], _unreached(others))
        time.sleep(2 * pause + _CONNECT_SECONDS + 3)  # all ranks look once in `pause` seconds
        _summarize(run_folder, folder, rank, ranks, hosts, timeout)
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


def _summarize(run_folder: Path, folder: Path, rank: int, ranks: list[int], hosts: list[str], timeout: float) -> None:
    reports = _read_reports(folder)
    summary = folder / "summary.txt"
    if rank == min(reports):
        text = f"no progress for {timeout:g} s (train.hang_timeout)\n{compare(reports, hosts, ranks)}stacks: {folder}\n"
        os.write(2, f"fullft: {text}".encode())
        leave_failure(run_folder, rank, text)  # for a frozen rank that wakes by the launcher's signal
        set_state(run_folder, "failed", reason=text)
        summary.write_text(text)
    deadline = time.monotonic() + 10
    while not summary.exists() and time.monotonic() < deadline:  # the first to exit takes the others with it
        time.sleep(0.1)


def _write_report(folder: Path, rank: int, host: str, unreached: list[str]) -> None:
    """First line: the mark as JSON, and the hosts that this one does not reach; then the stacks."""
    last, frame = _mark, sys._current_frames().get(threading.main_thread().ident or 0)
    at = f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name})" if frame else "?"
    head = {"rank": rank, "host": host, "number": last.number, "step": last.step, "phase": last.phase, "at": at}
    head |= {"seconds": round(time.monotonic() - last.time, 1), "unreached": unreached}
    partial = folder / f"rank-{rank:05d}.tmp"
    with partial.open("w") as file:
        file.write(json.dumps(head) + "\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
    partial.rename(partial.with_suffix(".txt"))


def _read_reports(folder: Path) -> dict[int, dict[str, Any]]:
    heads = [json.loads(file.read_text().partition("\n")[0]) for file in folder.glob("rank-*.txt")]
    return {head["rank"]: head for head in heads}


def compare(reports: dict[int, dict[str, Any]], hosts: list[str], ranks: list[int] | None = None) -> str:
    """A line for each host that others do not reach, one for the ranks without a report, then one for each place at
    which ranks are, those to blame first: behind the others, else the fewer, else those outside of the libraries in
    which a rank waits for others. `ranks`: that report into this run folder; default: all."""
    lines = _broken_links(reports, hosts)
    ranks = list(range(len(hosts))) if ranks is None else ranks
    if missing := [rank for rank in ranks if rank not in reports]:
        lines.append(f"{_named(missing, hosts)} did not answer: frozen or dead")
    if elsewhere := [rank for rank in range(len(hosts)) if rank not in ranks]:
        lines.append(f"{_named(elsewhere, hosts)} report into run folders of their own")
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


def _broken_links(reports: dict[int, dict[str, Any]], hosts: list[str]) -> list[str]:
    """A host that is cut off reaches no other: the one to blame is that which most others do not reach."""
    links = {(head["host"], peer) for head in reports.values() for peer in head["unreached"]}
    lines = []
    while links:
        missed = [peer for _, peer in links]
        worst = max(missed, key=lambda peer: (missed.count(peer), hosts.index(peer)))
        by = sorted(host for host, peer in links if peer == worst)
        lines.append(f"host {worst} is not reached over the network by {_few(by)}: a link, or the host, is down")
        links = {link for link in links if worst not in link}
    return lines


def _named(ranks: list[int], hosts: list[str]) -> str:
    """`rank 2 (node7)`, `ranks 0, 3-7 (node1, node2)`"""
    runs = itertools.groupby(enumerate(ranks), key=lambda pair: pair[1] - pair[0])
    spans = [[rank for _, rank in run] for _, run in runs]
    numbers = ", ".join(f"{span[0]}-{span[-1]}" if len(span) > 2 else ", ".join(map(str, span)) for span in spans)
    return f"rank{'s' if len(ranks) > 1 else ''} {numbers} ({_few(sorted({hosts[rank] for rank in ranks}))})"


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} hosts more" if len(names) > 4 else "")
