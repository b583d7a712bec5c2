"""Whether the model has lost more than is allowed, beyond doubt: a pure function of the stored evaluations.

A retention task breaches its limit when the lower confidence bound of its drop passes it. One bound at 95 % that may be
passed at any of 20 looks would alarm in up to 40 % of healthy runs; so half of the error that is allowed goes to the
last look, half is split over the looks before it (Bonferroni), and each look's share over the retention tasks (Holm):

    alpha = 1 - confidence          looks 1 … K-1:  alpha / 2 / (K - 1)          the last look:  alpha / 2

K is the number of looks that the recipe plans. With K = 20 and one task that is z = 3.01, and 1.96 at the last look.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scipy import stats as distributions

from fullft.recipe import Gate
from fullft.report.wording import amount, change
from fullft.retention import stats
from fullft.retention.evaluation import Evaluation

OK, WATCH, BREACH = "ok", "watch", "breach"


def decide(
    evaluation: Evaluation,
    before: Sequence[Evaluation],
    gate: Gate,
    confidence: float,
    looks_planned: int,
    last: bool,
    rollbacks: int = 0,
) -> Evaluation:
    """The evaluation with what the gate says of each retention task, `look`, and `gate`: what is to be done.

    A task is "ok" while its drop is within its limit, "watch" above it, "breach" beyond doubt above it, or if its score
    is no finite number any more. A breach counts once it was seen in `gate.patience` evaluations in a row; in the last
    of the run at once.

    before: the evaluations of earlier steps, oldest first. last: there will be no other look.
    """  # fmt: skip
    look = sum(one["step"] > 0 for one in before) + (evaluation["step"] > 0)
    share = error_of_look(look, looks_planned, last, 1 - confidence)
    judged = _judge(evaluation["tasks"], share if look else None)
    in_row_before = before[-1].get("gate", {}).get("breaches_in_row", {}) if before else {}
    in_row = {
        name: in_row_before.get(name, 0) + 1 if task["gate"] == BREACH else 0
        for name, task in judged.items()
        if task["gate"] is not None
    }
    counting = [name for name, times in in_row.items() if times and (last or times >= gate.patience)]
    decision = gate.action if counting and gate.action != "none" else "continue"
    reasons = [_reason(name, judged[name]) for name in counting]
    if decision == "rollback" and rollbacks >= gate.max_rollbacks:
        decision = "stop"
        reasons.append(f"it has been rolled back {rollbacks} times, as often as retention.gate.max_rollbacks allows")
    said = {"action": gate.action, "decision": decision, "reasons": reasons, "breaches_in_row": in_row}
    return evaluation | {"look": look, "looks_planned": looks_planned, "tasks": judged, "gate": said}


def error_of_look(look: int, planned: int, last: bool, alpha: float) -> float:
    """The probability of a false alarm that one look may have, over all tasks. More looks than planned (the recipe was
    changed in between) get what as many planned ones would have had."""
    return alpha / 2 if last else alpha / 2 / max(planned - 1, look, 1)


def last_ok(evaluations: Sequence[Evaluation]) -> int:
    """The step of the newest evaluation in which every retention task was within its limit; 0, the base, is always."""
    return max((one["step"] for one in evaluations if is_fine(one)), default=0)


def is_fine(evaluation: Evaluation) -> bool:
    """Whether every retention task was within its limit."""
    return all(task.get("gate") in (OK, None) for task in evaluation["tasks"].values())


def can_breach(kind: str, items: int, clusters: int, limit: float, confidence: float) -> bool:
    """Whether a task could ever breach: if every item that was right were wrong at the last look."""
    if clusters < 2:
        return False  # its error is not known
    if kind not in ("multiple_choice", "generate") or clusters < items:
        return True
    centre, se = stats.adjusted_wald(items, 0, items)
    return centre - _upper_quantile((1 - confidence) / 2, None) * se > limit


def _judge(tasks: dict[str, dict[str, Any]], error: float | None) -> dict[str, dict[str, Any]]:
    """The tasks with gate, lower_bound_gate and z_gate; error: None at step 0, where nothing can be lost."""
    judged = {name: task | {"gate": None, "lower_bound_gate": None, "z_gate": None} for name, task in tasks.items()}
    estimates = {name: _estimate(task) for name, task in tasks.items() if task["measures"] == "retention"}
    known = {name: estimate for name, estimate in estimates.items() if estimate is not None}
    for name in estimates:
        drop, limit = tasks[name]["drop"], tasks[name]["limit"]
        judged[name]["gate"] = OK if drop is not None and drop <= limit else WATCH
        if error is not None and drop is None and tasks[name]["base"] is not None:
            judged[name]["gate"] = BREACH  # a score that is not finite: no doubt about it
    if error is None:
        return judged
    # Holm: the surest breach is tried against error / m, the next against error / (m - 1), ..., until one fails.
    order = sorted(known, key=lambda name: _probability(known[name], tasks[name]["limit"]))
    left = len(order)
    for name in order:
        centre, se, degrees = known[name]
        z = _upper_quantile(error / left, degrees)
        bound = centre - z * se
        judged[name] |= {"lower_bound_gate": bound, "z_gate": z}
        if bound > tasks[name]["limit"]:
            judged[name]["gate"] = BREACH
            left -= 1
    return judged


def _estimate(task: dict[str, Any]) -> tuple[float, float, int | None] | None:
    """(centre, SE, degrees of freedom or None for a normal one) of a drop; None if its error is not known.

    Right-or-wrong items have the adjusted Wald interval, which is right in the far tail too when few of them flip.
    """
    if task["drop"] is None or task["drop_se"] is None:
        return None
    if task["test"] == "mcnemar_midp":
        worse, better = task["discordant"]
        return (*stats.adjusted_wald(worse, better, task["n"]), None)
    few = stats.FEWEST_CLUSTERS if task["clusters"] < task["n"] else stats.FEWEST_DOCUMENTS
    return task["drop"], task["drop_se"], task["clusters"] - 1 if task["clusters"] < few else None


def _probability(estimate: tuple[float, float, int | None], limit: float) -> float:
    """One-sided p of a drop that is no more than its limit."""
    centre, se, degrees = estimate
    if se == 0:
        return 0.0 if centre > limit else 1.0
    z = (centre - limit) / se
    return float(distributions.norm.sf(z) if degrees is None else distributions.t.sf(z, degrees))


def _upper_quantile(error: float, degrees: int | None) -> float:
    return float(distributions.norm.isf(error) if degrees is None else distributions.t.isf(error, degrees))


def _reason(name: str, task: dict[str, Any]) -> str:
    if task["drop"] is None:
        return f"task {name}: its {task['metric']}, {task['base']:.3g} at step 0, is no finite number any more"
    lost, metric = change(name, task), task["metric"]
    assert lost is not None  # or there would be no bound
    bound, limit = amount(metric, task["lower_bound_gate"]), amount(metric, task["limit"])
    return f"task {name} has lost {lost.amount} since step 0, beyond doubt over {bound}; {limit} are allowed (max_drop)"
