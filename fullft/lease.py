"""A run folder is owned by one job at a time: a lease in it, with generations, held by rank 0 of the job.

    lease/generation-00000003            host, pid, start of the process, job id: JSON; its mtime is the last renewal
    lease/generation-00000003.released   left at an orderly end

A job claims the next generation by O_CREAT|O_EXCL, which one of several wins, on NFS too. Only the newest generation
owns the folder. It renews its file every lease_seconds / 6 from a thread; who finds it not renewed for lease_seconds
takes over. Ages are differences of mtimes that the file server gave: clocks of hosts play no part.

The owner may have been frozen, or cut off from the file server, and wake after another job has taken over. So all that
it leaves is written under a name with its generation, `step-00000200.g3.tmp`, and renamed by `commit`, which asks
before whether this generation is still the newest. Between question and rename it can freeze too. That is harmless,
because a new owner first claims its generation, then removes all .tmp of older ones, and only then reads the folder:

    question before the claim  =>  the .tmp was there before its removal. A rename before the removal is a whole file
                                   that the new owner finds; a rename after it fails, as its source is gone.
    question after the claim   =>  the answer is no.

metrics.jsonl is appended to, not renamed, so each owner makes its own: it replaces the file by one of the same rows and
keeps it open; a row that an older one appends goes to the file that was replaced. Nothing but .tmp is ever removed or
replaced under a name that a newer owner could have given to something of its own, save for three things, each right
after a question: an old checkpoint beyond those kept, and at the start of a run damaged checkpoints and an export of an
end that was interrupted. A freeze of lease_seconds between two system calls there could cost a checkpoint of the newer
owner, which is then written again; it cannot make a wrong one.

A process holds one lease at most. The other ranks are told the generation (`take_together`): they renew nothing, but
what they leave (state.json, REQUEUE, why they failed) is checked in the same way. Where ranks have run folders of their
own (checkpoint.use_node_local_storage), the lowest rank of each takes its lease. Where no lease is known (before
training, `fullft report`), `check` does nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fullft.errors import BadInput, LeaseLost

_WRITTEN_TO = (
    ".",
    "base",
    "checkpoints",
    "retention",
    "retention/items",
    "samples",
    "lease",
)  # folders of a run with .tmp in them
_JOB_IDS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "TORCHELASTIC_RUN_ID")


@dataclass
class _Lease:
    run_folder: Path
    generation: int
    is_owner: bool = True  # False on ranks that were told of it
    released: threading.Event = field(default_factory=threading.Event)
    lost: str = ""  # what `check` found; then it is never asked again

    @property
    def folder(self) -> Path:
        return self.run_folder / "lease"


_held: _Lease | None = None


def take(run_folder: Path, lease_seconds: float) -> None:
    """Own this run folder until `release`, or until another takes it as this process has long not renewed its lease.

    Returns at once if nobody owns it, if the owner released it, or was a process of this host that is gone. Else waits
    for up to lease_seconds whether the owner renews.

    Raises:
        BadInput: another process owns it.
        OSError: the folder cannot be written.
    """
    global _held
    folder = run_folder / "lease"
    folder.mkdir(parents=True, exist_ok=True)
    while (generation := _claim(folder, _newest(folder), lease_seconds)) is None:
        time.sleep(0.1)
    _held = _Lease(run_folder, generation)
    threading.Thread(target=_renew, args=(_held, lease_seconds / 6), name="lease", daemon=True).start()
    for place in _WRITTEN_TO:
        _remove_partials(run_folder / place, below=generation)
    for older in (*folder.glob("generation-*"), *folder.glob("failed-*")):
        if _number(older.name) < generation:
            older.unlink(missing_ok=True)


def take_together(run_folder: Path, lease_seconds: float, node_local: bool = False) -> None:
    """Rank 0 owns the run folder, or where it is not the same for all the lowest rank of each; the others know the
    generation. All ranks together.

    Raises:
        BadInput: on all ranks. A folder is owned by another process, or cannot be written; or not all ranks have the
            same, unless that is asked for (`node_local`).
    """
    import torch.distributed as dist

    from fullft.cluster import owners

    folder = run_folder / "lease"
    _on_each(run_folder, lambda: _probe(folder, run_folder / "checkpoints"))
    owner_of = owners(folder)
    apart = owner_of if any(owner_of) else owners(run_folder / "checkpoints")  # it may be a link
    hosts: list[Any] = [None] * len(owner_of)
    dist.all_gather_object(hosts, socket.gethostname())
    if any(apart) and not node_local:
        others = sorted({host for host, owner in zip(hosts, apart, strict=True) if owner})
        raise BadInput(
            f"run_dir: {run_folder} is not the same folder on {', '.join(others)} as on {hosts[0]}. Put it on a file "
            "system that all nodes share; or, with checkpoint.use_node_local_storage=true, each node keeps its part "
            "of a checkpoint on its own disk, and the run can go on on the same nodes only"
        )
    mine = owner_of[dist.get_rank()]
    _on_each(run_folder, lambda: take(run_folder, lease_seconds) if mine == dist.get_rank() else None)
    generations: list[Any] = [None] * len(owner_of)
    dist.all_gather_object(generations, generation())
    know(run_folder, generations[mine])


def _probe(*folders: Path) -> None:
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        _server_time(folder)


def _on_each(run_folder: Path, action: Callable[[], Any]) -> None:
    """An action of every rank; BadInput on all, if it fails on any."""
    import torch.distributed as dist

    problem = ""
    try:
        action()
    except BadInput as error:
        problem = f"{error}, on {socket.gethostname()}"
    except OSError as error:
        problem = f"run_dir: {run_folder} cannot be written on {socket.gethostname()} ({error}); mend it, or choose "
        problem += "another run_dir"
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    if wrong := sorted(set(problems) - {""}):
        release()
        raise BadInput(wrong)


def know(run_folder: Path, generation: int) -> None:
    """Write only while this generation is the newest, though another process took it."""
    global _held
    if _held is not None:
        return
    folder = run_folder / "lease"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)  # an NFS client may remember that it was not there; this asks
        if _newest(folder, anew=True) == generation:  # else it is lost already
            _held = _Lease(run_folder, generation, is_owner=False)


def generation() -> int:
    """That of this run; 0 if this process knows of none."""
    return _held.generation if _held else 0


def is_held() -> bool:
    """Whether this process owns a run folder: it took it, and has neither released nor lost it."""
    return _held is not None and _held.is_owner and not _held.released.is_set()


def is_owned(run_folder: Path) -> bool:
    """Whether a job seems to own it: the newest lease is neither released, nor of a process known to be gone, nor old.
    For who has not taken the lease; OSError if it cannot tell."""
    folder = run_folder / "lease"
    if not folder.is_dir() or not (newest := _newest(folder)):
        return False
    try:
        with _file(folder, newest).open() as file:
            renewed, owner = os.fstat(file.fileno()).st_mtime, json.load(file)
    except ValueError:  # being written
        return True
    if _file(folder, newest).with_suffix(".released").exists() or _is_gone(owner):
        return False
    return bool(_server_time(folder) - renewed < owner["lease_seconds"])


def check() -> None:
    """Nothing may be committed to the run folder by an older generation.

    Raises:
        LeaseLost: another job has taken over; said on stderr. Once lost, it is lost for ever.
        OSError: the folder of leases cannot be read, so nobody can tell. Nothing is lost; ask again.
    """
    if _held is None:
        return
    if not _held.lost:
        newest = _newest(_held.folder, anew=True)
        if newest == _held.generation:
            return
        if newest < _held.generation:
            gone = _file(_held.folder, _held.generation)
            raise OSError(f"{gone} is gone: nobody can tell which job owns the run folder")
        me = f"generation {_held.generation}, pid {os.getpid()} on {socket.gethostname()}"
        _held.lost = (
            f"another job has taken over {_held.run_folder} (generation {newest}), as this one ({me}) did not renew "
            "its lease in time. This one ends and changes nothing more"
        )
        _held.released.set()
        print(f"fullft: {_held.lost}", file=sys.stderr, flush=True)
    for place in _WRITTEN_TO:
        _remove_partials(_held.run_folder / place, below=_held.generation + 1)
    raise LeaseLost(_held.lost)


def partial(path: Path) -> Path:
    """The name under which `path` is written before `commit`."""
    return path.with_name(f"{path.name}.g{_held.generation if _held else 0}.tmp")


def commit(path: Path) -> None:
    """Give what was written as `partial(path)` its name, if this process still owns the folder (LeaseLost if not)."""
    check()
    partial(path).rename(path)


def write(path: Path, text: str) -> None:
    """Write a file of the run folder, whole or not at all, if this run still owns it (LeaseLost if not). Any rank, any
    thread; the last one to write the same file wins."""
    me = f"{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"
    mine = partial(path.with_name(f"{path.name}.{me}"))
    path.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text(text)
    check()
    mine.rename(path)


def remove(path: Path) -> None:
    """Remove a folder, at once for all who look, if this process still owns the run folder (LeaseLost if not)."""
    check()
    aside = partial(path)
    path.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)  # what is left of it goes with the next owner


def release() -> None:
    """At an orderly end: the next job need not wait."""
    if _held is not None and is_held():
        _held.released.set()
        with contextlib.suppress(OSError):
            _file(_held.folder, _held.generation).with_suffix(".released").touch()


def _claim(folder: Path, newest: int, lease_seconds: float) -> int | None:
    """The generation that is this process's now, or None if another was quicker."""
    if newest:
        _wait_until_free(folder, newest, lease_seconds)
    mine = _file(folder, newest + 1)
    try:
        handle = os.open(mine, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return None
    owner = {
        "host": socket.gethostname(), "machine": _machine(), "pid": os.getpid(), "started": _start_of(os.getpid()),
        "job": next((f"{name}={os.environ[name]}" for name in _JOB_IDS if name in os.environ), ""),
        "lease_seconds": lease_seconds,
    }  # fmt: skip
    with os.fdopen(handle, "w") as file:
        json.dump(owner, file)
        file.flush()
        os.fsync(file.fileno())
    if _newest(folder, anew=True) != newest + 1:  # one that had this number has come, gone and been removed meanwhile
        mine.unlink()
        return None
    return newest + 1


def _wait_until_free(folder: Path, generation: int, lease_seconds: float) -> None:
    """Return when this generation owns no more: released, gone, or not renewed for lease_seconds.

    Raises:
        BadInput: it was renewed while this process looked.
    """
    first_seen, told = None, False
    while True:
        try:
            # Opened each time: then NFS asks the server for the attributes instead of its cache.
            with _file(folder, generation).open() as file:
                renewed, content = os.fstat(file.fileno()).st_mtime, file.read()
        except FileNotFoundError:  # another has taken over from it
            return
        try:
            owner: dict[str, Any] = json.loads(content)
        except ValueError:  # not yet written
            owner = {}
        who = f"host {owner.get('host', 'unknown')}, pid {owner.get('pid', 'unknown')}"
        who += f", {owner['job']}" if owner.get("job") else ""
        if _file(folder, generation).with_suffix(".released").exists() or _is_gone(owner):
            return
        first_seen = renewed if first_seen is None else first_seen
        if renewed != first_seen:
            raise BadInput(
                f"run_dir: another process is training into {folder.parent} ({who}); end it, or choose another run_dir"
            )
        patience = max(lease_seconds, owner.get("lease_seconds", 0))
        remaining = patience - (_server_time(folder) - renewed)
        if remaining <= 0:
            print(f"taking over {folder.parent}: {who} has not renewed its lease for {patience:g} s", flush=True)
            return
        if not told:
            print(f"{folder.parent} is leased by {who}; waiting up to {remaining:.0f} s if it is alive", flush=True)
            told = True
        time.sleep(min(1, patience / 20))


def _renew(lease: _Lease, every_seconds: float) -> None:
    while not lease.released.wait(every_seconds):
        with contextlib.suppress(OSError):  # taken over, or the file server is away: `check` tells
            os.utime(_file(lease.folder, lease.generation))


def _file(folder: Path, generation: int) -> Path:
    return folder / f"generation-{generation:08d}"


def _number(name: str) -> int:
    """generation-00000003, generation-00000003.released, failed-00000003-rank-00001: 3"""
    return int(name.split("-")[1].removesuffix(".released"))


def _newest(folder: Path, anew: bool = False) -> int:
    """The newest generation, 0 if there is none; OSError if the folder cannot be read. `anew`: an NFS client may answer
    from its cache, let it look again."""
    if anew:
        with contextlib.suppress(OSError):  # e.g. the disk is full
            _server_time(folder)  # changes the folder, so its cached listing is no longer used
    # Not by Path.glob, which takes a folder that cannot be read for an empty one.
    return max((_number(path.name) for path in folder.iterdir() if path.name.startswith("generation-")), default=0)


def _server_time(folder: Path) -> float:
    """Now, by the clock that gives files in this folder their mtime."""
    probe = folder / f"probe-{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"
    handle = os.open(probe, os.O_CREAT | os.O_WRONLY, 0o644)
    try:
        os.utime(handle)
        return os.fstat(handle).st_mtime
    finally:
        os.close(handle)
        probe.unlink(missing_ok=True)


def _machine() -> str:
    """What pids mean something in: this boot of this host, and its namespace of pids (containers have their own)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:  # not Linux
        return ""


def _start_of(pid: int) -> str:
    """When a process of this machine started, in clock ticks since boot; empty if there is none, or only a zombie."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else fields[18]


def _is_gone(owner: dict[str, Any]) -> bool:
    """Whether the owner was a process of this very machine, and is no more."""
    machine = owner.get("machine")
    return bool(machine) and machine == _machine() and _start_of(owner["pid"]) != owner["started"]


def _remove_partials(folder: Path, below: int) -> None:
    """Remove every .tmp of generations below this one; each by a rename first, so that nobody commits it meanwhile."""
    for path in folder.glob("*.g*.tmp"):
        of = re.search(r"\.g(\d+)\.tmp$", path.name)
        if of is None or int(of[1]) >= below:
            continue
        aside = partial(path)
        with contextlib.suppress(FileNotFoundError):  # committed meanwhile
            path.rename(aside)
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)
