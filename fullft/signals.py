"""Preemption: SIGTERM or SIGUSR1 to any rank ends the run at a whole step, saved, to be started again.

A handler cannot save, so it only notes the signal. The ranks agree on it in the collective that every step has anyway,
and all stop at the same step. What the signal meets:

    preparing   (before the process group)  there is nothing to save and nobody to agree with: the process ends at once
    loading     ends after the phase of loading that is running
    training    the step ends, its checkpoint is written; an evaluation is abandoned, and done again after the resume
    over        (the model is exported)     nothing changes

A launcher that has died counts as a signal: DeepSpeed's leaves its ranks behind, with nobody to end or see them.

In each case the exit code is EXIT_REQUEUE. If that takes longer than checkpoint.grace_seconds, the process ends before
it is killed, see `_end_unsaved`.

A launcher also sends SIGTERM to the ranks that are left when one has failed, and they may then hang in a collective
till the grace period is over. They must not ask for a start that fails in the same way, again and again. So a rank that
fails says why in the run folder before it exits (`leave_failure`), and the others end as failed. One that was killed
(SIGKILL, e.g. out of memory) says nothing; hence the rule that no two runs in a row end unsaved and ask for another
start without a new checkpoint in between.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from fullft import lease
from fullft.cluster import Cluster, sum_over_ranks
from fullft.errors import EXIT_FAILED, EXIT_REQUEUE
from fullft.recipe import Recipe
from fullft.state import REQUEUE, failure, leave_marker, marker, remove_marker, set_state, status

Phase = Literal["preparing", "loading", "training", "over"]
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@dataclass
class _Listener:
    folder: Path
    rank: int
    grace_seconds: float
    found: dict[str, Any] | None  # REQUEUE as this process found it: why it was started
    phase: Phase = "preparing"
    name: str = ""  # of the first signal; later ones change nothing
    deadline: float = float("inf")  # time.monotonic()

    def note(self, name: str) -> None:
        if not self.name:
            margin = min(10.0, self.grace_seconds / 5)
            self.deadline = time.monotonic() + self.grace_seconds - margin
            self.name = name


_listener: _Listener | None = None  # signals belong to the process, so there is one


def listen(recipe: Recipe, cluster: Cluster) -> None:
    """Take SIGTERM and SIGUSR1 from now on. Main thread only."""
    global _listener
    folder = recipe.run_folder
    _listener = listener = _Listener(folder, cluster.rank, recipe.checkpoint.grace_seconds, marker(folder))

    def handle(number: int, _: FrameType | None) -> None:
        listener.note(signal.Signals(number).name)

    # Python calls a handler only when the main thread comes back from C code, which may be a collective that waits for
    # ever. The number is written to the wake-up socket at once, and our thread reads it.
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    for each in _SIGNALS:
        signal.signal(each, handle)
    os.register_at_fork(after_in_child=_forget)
    arguments = (listener, reader, writer, _launchers(cluster.launcher))
    threading.Thread(target=_watch, args=arguments, name="signals", daemon=True).start()


def enter(phase: Phase) -> None:
    if _listener:
        _listener.phase = phase


def name() -> str:
    """The signal that has come to this rank; empty if none has."""
    return _listener.name if _listener else ""


def heed(ranks_with_signal: float) -> bool:
    """Whether to stop, given the sum of `bool(name())` over all ranks. The clock then runs on all of them."""
    if ranks_with_signal and _listener:
        _listener.note("a signal to another rank")
    return ranks_with_signal > 0


def agreed(device: str) -> bool:
    """Whether a signal has come to any rank; the same answer on all. All ranks together."""
    return heed(*sum_over_ranks(bool(name()), device=device))


def left_for_requeue() -> bool:
    """Whether a rank of this very run has left REQUEUE; then the others fail only because it has gone."""
    if _listener is None or failure(_listener.folder):
        return False
    left = marker(_listener.folder)
    # Before training there is no generation yet, so the marker must also be another than the one this run began with.
    return left is not None and left != _listener.found and left.get("generation") == lease.generation()


def _launchers(launcher: str) -> tuple[int, ...]:
    """The processes whose end leaves this rank alone; none where what has set RANK is not known.

    DeepSpeed's process of this host has one above it too: the runner, or the sshd that the runner is connected to.
    """
    if launcher != "deepspeed":
        return () if launcher == "python" else _ancestors(1)
    try:
        command = Path(f"/proc/{os.getppid()}/cmdline").read_text()
    except OSError:  # not Linux
        return ()
    return _ancestors(2) if "deepspeed.launcher.launch" in command else ()


def _ancestors(count: int) -> tuple[int, ...]:
    """Process numbers of the parent and, if two are asked for, its parent (0: gone)."""
    parent = os.getppid()
    if count == 1:
        return (parent,)
    try:
        status = Path(f"/proc/{parent}/status").read_text()
    except OSError:
        return parent, 0
    return parent, int(status.partition("PPid:")[2].split()[0])


def _watch(listener: _Listener, reader: socket.socket, _keep_open: socket.socket, launchers: tuple[int, ...]) -> None:
    reader.settimeout(1.0)
    while True:
        try:
            number = reader.recv(1)[0]
            if number in _SIGNALS:  # any signal that has a handler in Python comes here
                listener.note(signal.Signals(number).name)
        except TimeoutError:
            pass
        if launchers and not listener.name and _ancestors(len(launchers)) != launchers:
            listener.note("the end of its launcher")
        if listener.name and listener.phase == "preparing":
            with contextlib.suppress(Exception):  # the folder is full or read-only; the signal counts all the same
                _end_preparing(listener)
            os._exit(EXIT_REQUEUE)
        if time.monotonic() > listener.deadline and listener.phase != "over":
            code = EXIT_FAILED
            with contextlib.suppress(Exception):  # as above, or LeaseLost
                code = _end_unsaved(listener)
            os._exit(code)


def _end_preparing(listener: _Listener) -> None:
    folder = listener.folder
    if listener.rank != 0 or lease.is_owned(folder):  # by another job: this process would have been refused
        return
    # Not into a folder that is no run: this process may end before it would have refused it.
    if not folder.exists() or (folder / "recipe.yaml").exists() or not any(folder.iterdir()):
        leave_marker(folder, _saved_step(folder), listener.name, saved=not _found_unsaved(listener))
        _say(f"{listener.name} came before training; {folder / REQUEUE} asks to start again")


def _end_unsaved(listener: _Listener) -> int:
    """The grace period is nearly over. What is on disk must do; returns the exit code.

    REQUEUE is left, unless a rank has said that it failed, or another start would get no further than this one: there
    is no checkpoint though it trained, or the run before ended here too and nothing was saved since. Then the state is
    failed.

    Raises:
        LeaseLost: another job owns the folder; nothing was written.
    """
    folder = listener.folder
    lease.check()
    if left_for_requeue():
        return EXIT_REQUEUE
    step = _saved_step(folder)
    reason = f"checkpoint.grace_seconds ({listener.grace_seconds:g} s) ran out on rank {listener.rank} before the "
    reason += f"checkpoint after {listener.name} was whole"
    if failed := failure(folder):
        reason = f"{failed}; rank {listener.rank} hung till {listener.name}"
    elif not step and listener.phase != "loading":
        reason += ", and there is none before it: lower checkpoint.every_steps, or ask for more time"
    elif listener.found and _found_unsaved(listener) and step <= listener.found["step"]:
        reason += (
            f". The run before ended in the same way, and nothing was saved since (step {step}): is a rank killed?"
        )
    else:
        leave_marker(folder, step, listener.name, saved=False)
        set_state(folder, "requeue", step=step, signal=listener.name, reason=reason)
        _say(f"{reason}; the next start goes on from {f'step {step}' if step else 'the base model'}")
        return EXIT_REQUEUE
    _say(reason)
    remove_marker(folder)
    if status(folder) in ("running", "requeue"):  # else it says already how this run failed
        set_state(folder, "failed", reason=reason)
    return EXIT_FAILED


def _found_unsaved(listener: _Listener) -> bool:
    return listener.found is not None and not listener.found.get("saved", True)


def _saved_step(folder: Path) -> int:
    """Of the newest whole checkpoint, 0 without one. fullft.checkpoint knows too, but takes seconds to import."""
    manifests = (folder / "checkpoints").glob("step-*/MANIFEST.json")
    names = [re.fullmatch(r"step-(\d+)", manifest.parent.name) for manifest in manifests]
    return max((int(name[1]) for name in names if name), default=0)


def _say(text: str) -> None:
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"fullft: {text}\n".encode())


def _forget() -> None:
    """In a forked process, such as one that prepares data: it is to end by SIGTERM, and not to write to our socket."""
    signal.set_wakeup_fd(-1)
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_DFL)
