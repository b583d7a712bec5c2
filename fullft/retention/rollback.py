"""Going back to before a loss: what a run folder keeps of it, and how it is done so that a kill in its middle is safe.

    retention/rollbacks.json       [{"from_step", "to_step", "learning_rate_factor", "pull_factor", "reasons", "done"}]
    retention/rollback-1/          evaluations, items and samples of the steps that were abandoned
    metrics.rollback-1.jsonl       their rows of metrics

The entry is written first. From then on the run has gone back, whoever finishes it: all that follows may be done twice,
and a start finds `done` false and does it again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RollbackEntry = dict[str, Any]


def made(run_folder: Path) -> list[RollbackEntry]:
    """The rollbacks of a run, oldest first."""
    file = run_folder / "retention" / "rollbacks.json"
    entries: list[RollbackEntry] = json.loads(file.read_text()) if file.exists() else []
    return entries
