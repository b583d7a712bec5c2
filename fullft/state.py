"""How a run stands, in its folder, because launchers do not carry exit codes faithfully.

state.json   {"status": "running" | "done" | "stopped" | "failed" | "requeue", ...}
REQUEUE      there while the run was ended by a signal and wants to be started again; {"step", "signal", ...}
lease/failed-00000003-rank-00001   why this rank of the run of this generation failed: {"reason"}

Any rank may write them. All raise LeaseLost if another job has taken over, and OSError if the folder cannot be written.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from fullft import lease

REQUEUE = "REQUEUE"


def set_state(folder: Path, status: str, **more: Any) -> None:
    """Write state.json, whole or not at all. Any end releases the lease."""
    _write(folder / "state.json", {"status": status, "time": time.time()} | more)
    if status != "running":
        lease.release()


def status(folder: Path) -> str:
    """That of state.json; empty if there is none."""
    return str(read_json(folder / "state.json").get("status", ""))


def leave_marker(folder: Path, step: int, signal: str, saved: bool) -> None:
    """REQUEUE: `step` is that of the checkpoint which the next start goes on from, 0 if it starts anew; `saved` whether
    the run ended in order, with all of it saved."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"step": step, "signal": signal, "saved": saved, "generation": lease.generation(), "time": time.time()}
    _write(folder / REQUEUE, content)


def marker(folder: Path) -> dict[str, Any] | None:
    """What REQUEUE says; None if there is none."""
    return read_json(folder / REQUEUE) or None


def remove_marker(folder: Path) -> None:
    lease.check()
    (folder / REQUEUE).unlink(missing_ok=True)


def leave_failure(folder: Path, rank: int, reason: str) -> None:
    """Before a rank that fails exits: the others may hang without it, and are not to ask for another start then.
    Nothing before training, as there is no generation yet."""
    if lease.generation():
        _write(folder / "lease" / f"failed-{lease.generation():08d}-rank-{rank:05d}", {"reason": reason})


def failure(folder: Path) -> str:
    """Why this very run failed, as the first rank that did has left it; empty if none has."""
    left = (folder / "lease").glob(f"failed-{lease.generation():08d}-rank-?????")
    try:
        first = min(left, key=lambda file: file.stat().st_mtime, default=None)  # by the file server's clock
    except OSError:  # a newer job has removed them
        return ""
    return str(read_json(first).get("reason", "")) if first else ""


def read_json(file: Path) -> dict[str, Any]:
    """Its content; {} if it does not exist, was cut off, or is no object."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(path: Path, content: dict[str, Any]) -> None:
    lease.write(path, json.dumps(content))
