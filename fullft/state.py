"""How a run stands, in its folder, because launchers do not carry exit codes faithfully.

state.json   {"status": "running" | "done" | "stopped" | "failed" | "requeue", ...}
REQUEUE      there while the run was ended by a signal and wants to be started again; {"step", "signal", "time"}
"""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from fullft import lease

REQUEUE = "REQUEUE"


def set_state(folder: Path, status: str, **more: Any) -> None:
    """Write state.json, whole or not at all. Any end releases the lease. Raises LeaseLost if another job has it."""
    _write(folder / "state.json", {"status": status, "time": time.time()} | more)
    if status != "running":
        lease.release()


def leave_marker(folder: Path, step: int, signal: str) -> None:
    """REQUEUE: `step` is that of the checkpoint which the next start goes on from, 0 if it starts anew."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / REQUEUE, {"step": step, "signal": signal, "time": time.time()})


def remove_marker(folder: Path) -> None:
    (folder / REQUEUE).unlink(missing_ok=True)


def marker_since(folder: Path, moment: float) -> bool:
    """Whether REQUEUE was left after this moment (as time.time() gives it)."""
    try:
        return bool(json.loads((folder / REQUEUE).read_text())["time"] >= moment)
    except OSError:
        return False


def _write(path: Path, content: dict[str, Any]) -> None:
    if lease.is_held():
        lease.write(path, json.dumps(content))
        return
    partial = path.with_name(f".{path.name}-{socket.gethostname()}-{os.getpid()}.tmp")  # any rank may write
    partial.write_text(json.dumps(content))
    partial.rename(path)
