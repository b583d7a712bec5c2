"""Going back to before a loss: what a run folder keeps of it, and how it is done so that a kill in its middle is safe.

    retention/rollbacks.json       [{"from_step", "to_step", "learning_rate_factor", "pull_factor", "reasons", "done"}]
    retention/rollback-1/          evaluations, items and samples of the steps that were abandoned
    metrics.rollback-1.jsonl       their rows of metrics

The entry is written first. From then on the run has gone back, whoever finishes it: all that follows may be done twice,
and a start that finds `done` false does it again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fullft import lease
from fullft.checkpoint import all_complete
from fullft.recipe import Gate
from fullft.report.runlog import evaluations, metrics, rollback_entries
from fullft.retention.gate import last_ok


@dataclass(frozen=True)
class Gentler:
    """How a run trains since its rollbacks, as factors of what the recipe says."""

    rollbacks: int = 0
    learning_rate: float = 1.0
    pull: float = 1.0  # of l2_pull and kl_weight


def gentler(run_folder: Path) -> Gentler:
    """As all rollbacks up to now have made it."""
    if not (entries := made(run_folder)):
        return Gentler()
    return Gentler(len(entries), entries[-1]["learning_rate_factor"], entries[-1]["pull_factor"])


def made(run_folder: Path) -> list[dict[str, Any]]:
    """The rollbacks of a run, oldest first."""
    return rollback_entries(run_folder)


def target(run_folder: Path, step: int) -> Path | None:
    """The newest checkpoint that is not newer than the last evaluation, up to `step`, in which every retention task was
    within its limit; None if there is none."""
    fine = last_ok(evaluations(run_folder, step))
    there = [path for path in all_complete(run_folder / "checkpoints") if step_of(path) <= fine]
    return there[-1] if there else None


def begin(run_folder: Path, step: int, gate: Gate, reasons: list[str]) -> bool:
    """Decide to go back from `step`; False if there is nothing to go back to."""
    if (checkpoint := target(run_folder, step)) is None:
        return False
    before = gentler(run_folder)
    entry = {
        "from_step": step, "to_step": step_of(checkpoint), "reasons": reasons, "done": False,
        "learning_rate_factor": before.learning_rate * gate.rollback_lr_factor,
        "pull_factor": before.pull * gate.rollback_pull_factor,
    }  # fmt: skip
    lease.write(_file(run_folder), json.dumps([*made(run_folder), entry], indent=1))
    return True


def finish(run_folder: Path) -> None:
    """Put aside what the last rollback abandons and remove its checkpoints, if that is still to be done. The rows stay
    in metrics.jsonl too, until the tracker cuts them off."""
    entries = made(run_folder)
    if not entries or entries[-1]["done"]:
        return
    number, step = len(entries), entries[-1]["to_step"]
    aside = run_folder / "retention" / f"rollback-{number}"
    for folder, kept in (("retention", "."), ("retention/items", "items"), ("samples", "samples")):
        for file in (run_folder / folder).glob("step-*.json*"):
            if step_of(file) > step:
                lease.check()
                (aside / kept).mkdir(parents=True, exist_ok=True)
                file.rename(aside / kept / file.name)
    if rows := [row for row in metrics(run_folder) if row["step"] > step]:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        lease.write(run_folder / f"metrics.rollback-{number}.jsonl", lines)
    for path in all_complete(run_folder / "checkpoints"):
        if step_of(path) > step:
            lease.remove(path)
    entries[-1]["done"] = True
    lease.write(_file(run_folder), json.dumps(entries, indent=1))


def _file(run_folder: Path) -> Path:
    return run_folder / "retention" / "rollbacks.json"


def step_of(path: Path) -> int:
    """step-00000200, step-00000200.json, step-00000200.texts.jsonl: 200"""
    return int(path.name.removeprefix("step-").partition(".")[0])
