"""What lies in a run folder, read for its report: evaluations, curves, generations, state."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fullft.errors import BadInput
from fullft.report.wording import Evaluation

_CURVES = re.compile(  # of metrics.jsonl, drawn over the steps
    r"train/(loss(_\w+)?|learning_rate|grad_norm|l2_distance)|perf/(tokens_per_second|mfu)|time/step_seconds"
    r"|memory/peak_gib"
)
_OF_TASK = {"measures", "metric", "higher_is_better", "score", "base", "drop", "extra"}  # at least, in an evaluation
_POINTS = 120  # of a curve; more rows are averaged
_LONGEST_TEXT = 4000  # characters of a prompt or answer that are kept
_GENERATIONS = 50  # kept of a task


def evaluations(run_folder: Path, until: int | None = None) -> list[Evaluation]:
    """All evaluations of a run (until a step), by step."""
    found = [_evaluation(path) for path in sorted((run_folder / "retention").glob("step-*.json"))]
    return [one for one in found if until is None or one["step"] <= until]


def _evaluation(file: Path) -> Evaluation:
    with whole(file):
        content: Evaluation = json.loads(file.read_text())
        int(content["step"])
        _require_numbers(content["tasks"])
    return content


def _require_numbers(tasks: dict[str, dict[str, Any]]) -> None:
    for name, task in tasks.items():
        if lacking := _OF_TASK - task.keys():
            raise ValueError(f"its task {name} has no {', '.join(sorted(lacking))}")


@contextlib.contextmanager
def whole(file: Path) -> Iterator[None]:
    """What is read of a file here is as fullft writes it. Raises BadInput, with its name, if not."""
    try:
        yield
    except KeyError as error:
        raise BadInput(f"{file} is damaged (it has no {error}); put it back, or remove it") from None
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise BadInput(f"{file} is damaged ({str(error).partition(chr(10))[0]}); put it back, or remove it") from None


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
    for row in metrics(run_folder, until):
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


def metrics(run_folder: Path, until: int | None = None) -> Iterator[dict[str, Any]]:
    """All rows of metrics.jsonl (until a step)."""
    file = run_folder / "metrics.jsonl"
    with whole(file):
        for row in _rows(file):
            if row["step"] <= (math.inf if until is None else until):
                yield row


def rollbacks(run_folder: Path) -> list[dict[str, Any]]:
    """Those that the gate made, oldest first: entries of retention/rollbacks.json, each with "evaluations", those of
    the steps that were abandoned."""
    entries = rollback_entries(run_folder)
    for number, entry in enumerate(entries, start=1):
        aside = sorted((run_folder / "retention" / f"rollback-{number}").glob("step-*.json"))
        entry["evaluations"] = [_evaluation(path) for path in aside]
    return entries


def rollback_entries(run_folder: Path) -> list[dict[str, Any]]:
    """Content of retention/rollbacks.json, oldest first; as the gate makes them, see rollback.py. Raises BadInput if
    that is damaged."""
    file = run_folder / "retention" / "rollbacks.json"
    with whole(file):
        entries: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    return entries


def blend(file: Path) -> dict[str, Any] | None:
    """Content of blend.json; None if there is none. Raises BadInput if it is another file, or damaged."""
    if not file.exists():
        return None
    with whole(file):
        content: dict[str, Any] = json.loads(file.read_text())
        if content.get("format") != "fullft-blend/1":
            raise ValueError("it is not a blend.json of `fullft blend --sweep`")
        for point in content["points"]:
            float(point["alpha"])
            _require_numbers(point["tasks"])
        if content["best"] and not {"alpha", "why"} <= content["best"].keys():
            raise ValueError("its best point is not told")
    return content


def recipe(file: Path) -> tuple[dict[str, Any], str]:
    """(content, text) of a recipe.yaml. Raises BadInput if that is damaged."""
    with whole(file):
        text = file.read_text()
        content = yaml.safe_load(text)
        if not isinstance(content, dict):
            raise ValueError("it is not a recipe")
    return content, text


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
        before = {row["prompt"]: row for row in _answers(samples / f"step-{first:08d}.{task}.jsonl")}
        for now in _answers((aside or samples) / f"step-{last:08d}.{task}.jsonl")[:_GENERATIONS]:
            if (then := before.get(now["prompt"])) and last > first:
                pairs.append({
                    "task": task, "prompt": _cut(now["prompt"]), "reference": _cut(str(now.get("reference") or "")),
                    "base": _cut(then["generation"]), "base_correct": then.get("correct"), "base_step": first,
                    "tuned": _cut(now["generation"]), "tuned_correct": now.get("correct"), "tuned_step": last,
                })  # fmt: skip
    return pairs


def _answers(file: Path) -> list[dict[str, Any]]:
    with whole(file):
        rows = list(_rows(file))
        if any(not {"prompt", "generation"} <= row.keys() for row in rows):
            raise ValueError("a row has no prompt, or no generation")
    return rows


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]} … ({len(text):,} characters)"
