"""Preemption: SIGTERM or SIGUSR1 to any rank ends the run at a whole step, saved, to be started again.

A handler cannot save, so it only notes the signal. The ranks agree on it in the collective that every step has anyway,
and all stop at the same step. What the signal meets:

    preparing   (before the process group)  there is nothing to save and nobody to agree with: the process ends at once
    loading     ends after the phase of loading that is running
    training    the step ends, its checkpoint is written; an evaluation is abandoned, and done again after the resume
    over        (the model is exported)     nothing changes

If that takes longer than checkpoint.grace_seconds, the process ends before it is killed, and the next start goes on
from the checkpoint before. In each case the exit code is EXIT_REQUEUE.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

from fullft.cluster import Cluster, sum_over_ranks
from fullft.errors import EXIT_REQUEUE, LeaseLost
from fullft.recipe import Recipe
from fullft.state import REQUEUE, leave_marker, marker_since, set_state

Phase = Literal["preparing", "loading", "training", "over"]
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@dataclass
class _Listener:
    folder: Path
    rank: int
    grace_seconds: float
    started: float  # time.time()
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
    _listener = listener = _Listener(recipe.run_folder, cluster.rank, recipe.checkpoint.grace_seconds, time.time())

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
    threading.Thread(target=_watch, args=(listener, reader, writer), name="signals", daemon=True).start()


def enter(phase: Phase) -> None:
    if _listener:
        _listener.phase = phase


def name() -> str:
    """The signal that has come to this rank; `` if none has."""
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
    return _listener is not None and marker_since(_listener.folder, _listener.started)


def _watch(listener: _Listener, reader: socket.socket, _keep_open: socket.socket) -> None:
    reader.settimeout(1.0)
    while True:
        try:
            number = reader.recv(1)[0]
            if number in _SIGNALS:  # any signal that has a handler in Python comes here
                listener.note(signal.Signals(number).name)
        except TimeoutError:
            pass
        if listener.name and listener.phase == "preparing":
            _end_preparing(listener)
        if time.monotonic() > listener.deadline and listener.phase != "over":
            with contextlib.suppress(LeaseLost, OSError):
                _end_unsaved(listener)
            os._exit(EXIT_REQUEUE)


def _end_preparing(listener: _Listener) -> None:
    folder = listener.folder
    # Not into a folder that is no run: this process may end before it would have refused it.
    if listener.rank == 0 and (not folder.exists() or (folder / "recipe.yaml").exists() or not any(folder.iterdir())):
        leave_marker(folder, 0, listener.name)
        _say(f"{listener.name} came before training; {folder / REQUEUE} asks to start again")
    os._exit(EXIT_REQUEUE)


def _end_unsaved(listener: _Listener) -> None:
    """The grace period is nearly over. What is on disk must do."""
    from fullft.checkpoint import newest

    folder = listener.folder
    if not left_for_requeue():
        saved = newest(folder / "checkpoints")
        what = f"checkpoint.grace_seconds ({listener.grace_seconds:g} s) ran out on rank {listener.rank} before the "
        what += f"checkpoint after {listener.name} was whole"
        if saved or listener.phase == "loading":
            step = int(saved.name.removeprefix("step-")) if saved else 0
            leave_marker(folder, step, listener.name)
            set_state(folder, "requeue", step=step, signal=listener.name, reason=what)
            _say(f"{what}; the next start goes on from {saved or 'the base model'}")
        else:
            set_state(folder, "failed", reason=f"{what}, and there is none before it")
            _say(f"{what}, and there is none before it: lower checkpoint.every_steps, or ask for more time")


def _say(text: str) -> None:
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"fullft: {text}\n".encode())


def _forget() -> None:
    """In a forked process, such as one that prepares data: it is to end by SIGTERM, and not to write to our socket."""
    signal.set_wakeup_fd(-1)
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_DFL)
