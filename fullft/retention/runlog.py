"""What lies in a run folder, read for its report: evaluations, curves, generations, state."""

from __future__ import annotations

import itertools
import json
import math
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fullft.retention.wording import Evaluation

_CURVES = re.compile(  # of metrics.jsonl, drawn over the steps
    r"train/(loss(_\w+)?|learning_rate|grad_norm|l2_distance)|perf/(tokens_per_second|mfu)|time/step_seconds"
    r"|memory/peak_gib"
)
_POINTS = 120  # of a curve; more rows are averaged
_LONGEST_TEXT = 4000  # characters of a prompt or answer that are kept
_GENERATIONS = 50  # kept of a task


def evaluations(run_folder: Path, until: int | None = None) -> list[Evaluation]:
    """All evaluations of a run (until a step), by step."""
    found = [json.loads(path.read_text()) for path in sorted((run_folder / "retention").glob("step-*.json"))]
    return [one for one in found if until is None or one["step"] <= until]


def read_json(file: Path) -> dict[str, Any]:
    """Its content; {} if it does not exist or was cut off."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@dataclass
class Log:
    """What metrics.jsonl says in all. Rows are not kept: a long run has a hundred thousand."""

    step: int = 0
    last: dict[str, Any] = field(default_factory=dict)  # row of the last training step
    set_tokens: dict[str, int] = field(default_factory=dict)  # {training set: tokens of the logged steps}
    curves: dict[str, tuple[array[float], array[float]]] = field(default_factory=dict)  # {metric: (steps, values)}
    failed_checkpoints: int = 0


def read_log(run_folder: Path, until: int | None = None) -> Log:
    """Of the rows until a step."""
    log = Log()
    for row in _rows(run_folder / "metrics.jsonl"):
        if until is not None and row["step"] > until:
            continue
        log.step = row["step"]
        log.failed_checkpoints += int(row.get("checkpoint/failed", 0))
        if "train/loss" not in row:
            continue
        log.last = row
        for key, value in row.items():
            if key.startswith("data/") and key.endswith("/tokens_of_step"):
                name = key.removeprefix("data/").removesuffix("/tokens_of_step")
                log.set_tokens[name] = log.set_tokens.get(name, 0) + value
            elif _CURVES.fullmatch(key) and isinstance(value, int | float) and math.isfinite(value):
                steps, values = log.curves.setdefault(key, (array("d"), array("d")))
                steps.append(row["step"])
                values.append(value)
    return log


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    """Without a last one that was cut off by a kill."""
    if file.exists():
        with file.open() as lines:
            yield from (json.loads(line) for line in lines if line.rstrip().endswith("}"))


def metrics(run_folder: Path, until: int | None = None) -> list[dict[str, Any]]:
    """All rows of metrics.jsonl (until a step)."""
    return [row for row in _rows(run_folder / "metrics.jsonl") if until is None or row["step"] <= until]


def rollbacks(run_folder: Path) -> list[dict[str, Any]]:
    """Those that the gate made, oldest first: entries of retention/rollbacks.json, each with "evaluations", those of
    the steps that were abandoned."""
    entries = rollback_entries(run_folder)
    for number, entry in enumerate(entries, start=1):
        aside = sorted((run_folder / "retention" / f"rollback-{number}").glob("step-*.json"))
        entry["evaluations"] = [json.loads(path.read_text()) for path in aside]
    return entries


def rollback_entries(run_folder: Path) -> list[dict[str, Any]]:
    """Content of retention/rollbacks.json, oldest first; as the gate makes them, see rollback.py."""
    file = run_folder / "retention" / "rollbacks.json"
    entries: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    return entries


def thin(steps: Sequence[float], values: Sequence[float], most: int = _POINTS) -> dict[str, list[float]]:
    """A curve in at most that many points.

    Returns:
        {"step", "value"}: [points]; where rows were averaged, value is their mean, step their last, and "low" and
        "high" their range, so that a spike of one step is still seen.
    """
    if len(values) <= most:
        return {"step": list(steps), "value": list(values)}
    cuts = [len(values) * i // most for i in range(most + 1)]
    parts = [(steps[a:b], values[a:b]) for a, b in itertools.pairwise(cuts)]
    return {
        "step": [at[-1] for at, _ in parts], "value": [sum(part) / len(part) for _, part in parts],
        "low": [min(part) for _, part in parts], "high": [max(part) for _, part in parts],
    }  # fmt: skip


def generations(run_folder: Path, step: int | None = None, aside: Path | None = None) -> list[dict[str, Any]]:
    """Answers to the same prompts at the first evaluation that has some and at that of `step`, the last by default;
    `aside`: where a rollback has put those of `step`.

    Returns:
        [{"task", "prompt", "reference", "base", "base_correct", "base_step", "tuned", "tuned_correct", "tuned_step"}]
    """
    samples = run_folder / "samples"
    steps: dict[str, list[int]] = {}
    for path in samples.glob("step-*.jsonl"):
        if match := re.fullmatch(r"step-(\d+)\.(.+)\.jsonl", path.name):
            steps.setdefault(match[2], []).append(int(match[1]))
    pairs = []
    for task, evaluated in sorted(steps.items()):
        first, last = min(evaluated), max(evaluated) if step is None else step
        before = {row["prompt"]: row for row in _rows(samples / f"step-{first:08d}.{task}.jsonl")}
        for now in itertools.islice(_rows((aside or samples) / f"step-{last:08d}.{task}.jsonl"), _GENERATIONS):
            if (then := before.get(now["prompt"])) and last > first:
                pairs.append({
                    "task": task, "prompt": _cut(now["prompt"]), "reference": _cut(str(now.get("reference") or "")),
                    "base": _cut(then["generation"]), "base_correct": then.get("correct"), "base_step": first,
                    "tuned": _cut(now["generation"]), "tuned_correct": now.get("correct"), "tuned_step": last,
                })  # fmt: skip
    return pairs


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]} … ({len(text):,} characters)"
