"""From the item records of one step, and those of step 0, to the content of a retention/step-….json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fullft.retention import stats
from fullft.retention.stats import ItemRecord
from fullft.retention.tasks import Prepared

Evaluation = dict[str, Any]  # content of a retention/step-….json
Records = Mapping[str, Sequence[ItemRecord]]  # by task


def assemble(
    tasks: Sequence[Prepared], measured: Records, base: Records, step: int, confidence: float, max_drop: float
) -> Evaluation:
    """All tasks with their drops since step 0, and what they come to; the gate is to be added (`gate.decide`).

    measured: may lack items of `base`, and the whole of a task; base and drop are then over the items that are there.
    max_drop: limit of the retention tasks that have none of their own.

    Raises:
        BadInput: an item was not measured at step 0.
    """
    found = {
        task.name: _result(task, measured[task.name], base[task.name], step, confidence, max_drop)
        for task in tasks
        if task.name in measured
    }
    retained = [result for result in found.values() if result["measures"] == "retention"]
    for result, adjusted in zip(retained, stats.holm([one["p"] for one in retained]), strict=True):
        result["p_holm"] = adjusted
    for result, q in zip(found.values(), stats.benjamini_hochberg([one["p"] for one in found.values()]), strict=True):
        result["q"] = q
    whole = all(len(measured.get(task.name, ())) == len(base[task.name]) for task in tasks)
    report: Evaluation = {"format": "fullft-retention/1", "step": step, "base_step": 0, "whole": whole}
    return report | {"tasks": found, "summary": summarize(found)}


def _result(
    task: Prepared, items: Sequence[ItemRecord], base: Sequence[ItemRecord], step: int, confidence: float, limit: float
) -> dict[str, Any]:
    result: dict[str, Any] = {"kind": task.kind, "measures": task.measures}
    result |= stats.score(task.kind, task.metric, items, task.higher_is_better)
    result |= stats.compare(task.name, task.kind, task.metric, base, items, confidence, task.higher_is_better)
    if step == 0 and result["drop"] is not None:
        result |= {"drop_se": 0.0, "drop_ci": [0.0, 0.0], "p": 1.0, "visible_drop": None}
    retains = task.measures == "retention"
    base_se = stats.score(task.kind, task.metric, stats.pair(task.name, base, items))["se"]
    chance = stats.chance(task.kind, task.metric, items, task.chance)
    return result | {
        "p_holm": None,
        "q": None,
        "chance": chance,
        "retention": stats.retention_ratio(result["score"], result["base"], chance, base_se),
        "limit": (limit if task.max_drop is None else task.max_drop) if retains else None,
    }


def summarize(tasks: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Of the retention tasks: the mean of their drops, the worst of them, backward transfer (Lopez-Paz & Ranzato 2017;
    of one fine-tuning it is minus the mean drop), and the mean of their ratios. Of the skill tasks: their gains.

    Drops are means over tasks each in its own unit, and not clipped at 0, which would make them look worse than they
    are; they are against step 0, as against the best step so far noise alone looks like forgetting.
    """
    retained = {name: task for name, task in tasks.items() if task["measures"] == "retention"}
    drops = {name: task["drop"] for name, task in retained.items() if task["drop"] is not None}
    ratios = [task["retention"] for task in retained.values() if task["retention"] is not None]
    forgetting = math.fsum(drops.values()) / len(drops) if drops else None
    worst = max(drops, key=lambda name: drops[name]) if drops else None
    return {
        "average_forgetting": forgetting,
        "worst": {"task": worst, "drop": drops[worst], "drop_ci": retained[worst]["drop_ci"]} if worst else None,
        "bwt": -forgetting if forgetting else forgetting,
        "retention_mean": math.fsum(ratios) / len(ratios) if ratios else None,
        "skill": {name: _gain(task) for name, task in tasks.items() if task["measures"] == "skill"},
    }


def _gain(task: dict[str, Any]) -> dict[str, Any]:
    """A drop turned round."""
    ci = task["drop_ci"]
    return {"gain": 0.0 - task["drop"] if task["drop"] is not None else None, "ci": ci and [0.0 - ci[1], 0.0 - ci[0]]}
