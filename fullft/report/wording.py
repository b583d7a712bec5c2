"""What a run gained and lost, in words that claim no more than its evaluations show."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fullft.retention.stats import finite, is_share

Evaluation = dict[str, Any]  # content of a retention/step-….json

_NAMED = 2  # tasks that the sentence names; the others are counted
_UNITS = {"bits_per_byte": "bits a byte", "loss": "nats a token"}


def shown(metric: str, value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.1%}" if is_share(metric) else f"{value:.4g}"


def unit(metric: str) -> str:
    return "points" if is_share(metric) else _UNITS.get(metric, metric.replace("_", " "))


def amount(metric: str, value: float) -> str:
    """A difference of two scores that has no error, such as a limit, with its unit."""
    return f"{bound(value * (100 if is_share(metric) else 1))} {unit(metric)}"


def bound(limit: float) -> str:
    """A limit, in the unit of the task."""
    return f"{limit:.1f}" if limit >= 1 else f"{limit:.3g}"


def with_error(value: float, half: float | None, sign: bool = False) -> str:
    """value ± half, both rounded to the digits that the error leaves: two where it starts with 1 to 3.54, else one.

    Source: Particle Data Group, Review of Particle Physics, introduction, section 5.3.
    """
    if half:
        decimals = _decimals(half, 2 if half / 10 ** math.floor(math.log10(half)) < 3.545 else 1)
    else:
        decimals = _decimals(value, 3) if value else 1
    value = round(value, decimals) + 0.0  # no −0.0
    text = f"{value:{'+' if sign else ''}.{decimals}f}".replace("-", "−")
    return text if half is None else f"{text} ± {half:.{decimals if half else 0}f}"


def _decimals(value: float, digits: int) -> int:
    return min(8, max(0, digits - 1 - math.floor(math.log10(abs(value)))))


@dataclass(frozen=True)
class Change:
    """What became of one task since step 0, in points, bits a byte, or the task's own unit."""

    name: str
    measures: str  # skill or retention
    unit: str
    gain: float  # positive: better
    half: float | None  # of the confidence interval of the paired difference
    low: float | None  # of that interval, as gains
    high: float | None
    real: bool | None  # whether it is significant; None: not known, as old runs have no statistics
    limit: float | None  # largest loss allowed

    @property
    def amount(self) -> str:
        """Its size without sign, with error and unit."""
        return f"{with_error(abs(self.gain), self.half)} {self.unit}"

    @property
    def signed(self) -> str:
        return with_error(self.gain, self.half, sign=True)

    @property
    def lost(self) -> bool:
        """Whether there is a loss that is not known to be chance."""
        return self.gain < 0 and self.real is not False

    @property
    def over(self) -> bool:
        """Whether it has lost more than allowed, by the estimate."""
        return self.lost and self.limit is not None and -self.gain > self.limit

    @property
    def open(self) -> bool:
        """Whether a loss above the limit is not shown, and not ruled out either."""
        return self.limit is not None and not self.over and (self.low is None or -self.low > self.limit)

    @property
    def verdict(self) -> str:
        """A few words, for a table."""
        if self.real is None:
            return f"{'better' if self.gain > 0 else 'worse' if self.gain < 0 else 'the same'}, no interval"
        if not self.real:
            return "no significant change"
        if self.gain > 0:
            return "gained" if self.measures == "skill" else "better"
        if self.limit is None:
            return "real loss"
        return f"real loss, {'above' if self.over else 'within'} limit"


def change(name: str, task: dict[str, Any]) -> Change | None:
    """None where the drop is not known."""
    drop = finite(task.get("drop"))
    if drop is None:
        return None
    scale = 100.0 if is_share(task["metric"]) else 1.0
    interval = task.get("drop_ci")
    low, high = interval if interval and None not in interval else (math.nan, math.nan)
    known, limit = math.isfinite(high - low), task.get("limit")
    return Change(
        name, task["measures"], unit(task["metric"]), 0.0 - drop * scale, (high - low) / 2 * scale if known else None,
        0.0 - high * scale if known else None, 0.0 - low * scale if known else None, _is_real(task, known),
        None if limit is None else limit * scale,
    )  # fmt: skip


def _is_real(task: dict[str, Any], interval: bool) -> bool | None:
    """Significant at the task's level: Holm's p over the retention tasks, else the q over all, else its own p, else by
    the interval."""
    alpha = 1 - (task.get("level") or 0.95)
    for key in ("p_holm", "q", "p"):
        if task.get(key) is not None:
            return bool(task[key] <= alpha)
    return bool(task["drop_ci"][0] > 0 or task["drop_ci"][1] < 0) if interval else None


def changes(evaluation: Evaluation) -> list[Change]:
    """Of all tasks that have numbers: skill first, the largest gain first; then retention, the worst first."""
    found = [one for name, task in evaluation["tasks"].items() if (one := change(name, task))]
    skill = sorted((one for one in found if one.measures == "skill"), key=lambda one: -one.gain)
    return skill + sorted((one for one in found if one.measures != "skill"), key=_severity, reverse=True)


def _severity(one: Change) -> tuple[bool, bool, float]:
    return one.over, one.lost, -one.gain / (one.limit or 1)


def verdict(
    found: list[Evaluation], state: dict[str, Any], step: int, total_steps: int | None, rollbacks: int = 0
) -> dict[str, str]:
    """The run in one sentence.

    Args:
        found: its evaluations by step.
        state: content of state.json ({} if there is none).
        step: the last one logged; total_steps: those planned, None if unknown.
        rollbacks: how many the gate has made.

    Returns:
        {"sentence", "tone"}; tone: good, mixed or bad, or unknown where nothing can be told.
    """
    opening = _opening(found, state, step, total_steps, rollbacks)
    evaluated = bool(found) and not state and not step  # a folder of `fullft eval`: no training
    if not found or not found[-1]["tasks"]:
        return {
            "sentence": _sentence(opening, ["nothing was evaluated, so gain and loss are not known"]),
            "tone": "unknown",
        }
    if len(found) == 1 and found[0]["step"] == 0:
        scores = ", ".join(f"{name} {shown(task['metric'], task['score'])}" for name, task in found[0]["tasks"].items())
        text = f"only the base model has been evaluated ({scores}), so gain and loss are not known yet"
        if evaluated:
            text = f"a model was evaluated ({scores}) and compared with no base, so gain and loss are not known"
        return {"sentence": _sentence(opening, [text]), "tone": "unknown"}
    if evaluated:
        opening = "model compared with base, no training here"
    of_all = changes(found[-1])
    skill = [one for one in of_all if one.measures == "skill"]
    kept = [one for one in of_all if one.measures != "skill"]
    missing = _missing(found, kept)
    parts = [*_of_skill(skill), *_of_retention(kept), *_of_limits(kept), *missing, *_on_a_part(found)]
    if unsure := [_task(one) for one in of_all if one.real is None]:
        of = "any task" if len(unsure) == len(of_all) else ", ".join(unsure)
        parts.append(f"no interval for {of}, so what is chance cannot be told")
    return {
        "sentence": _sentence(opening, parts),
        "tone": "bad" if _stopped_by_gate(found) else _tone(skill, kept, bool(missing), state),
    }


def _sentence(opening: str, parts: list[str]) -> str:
    text = "; ".join(parts)
    text = f"{opening}: {text}" if opening else text
    return f"{text[0].upper()}{text[1:]}."


def _opening(found: list[Evaluation], state: dict[str, Any], step: int, total: int | None, rollbacks: int) -> str:
    """How the run ended, if it did not end as planned; and which step is spoken of, if not the last."""
    of = f"{step:,} of {total:,}" if total else f"{step:,}"
    texts = []
    match state.get("status"):
        case "stopped" if _stopped_by_gate(found):
            texts.append(f"stopped by the retention gate at step {of}")
        case "stopped" | "failed" as status:
            texts.append(f"{status} at step {of}")
        case "requeue":
            texts.append(f"interrupted at step {of}, to be continued")
        case "running" if total is None or step < total:
            texts.append(f"not finished, at step {of}")
    if rollbacks:
        times = "once" if rollbacks == 1 else f"{rollbacks} times"
        texts.append(f"rolled back {times} by the retention gate")
    if found and len(found) > 1 and found[-1]["step"] != step:
        texts.append(f"evaluated at step {found[-1]['step']:,}")
    return ", ".join(texts)


def _stopped_by_gate(found: list[Evaluation]) -> bool:
    return bool(found) and (found[-1].get("gate") or {}).get("decision") == "stop"


def _of_skill(skill: list[Change]) -> list[str]:
    if not skill:
        return ["what it learnt was not measured (no skill task)"]
    parts = []
    for one in skill[:_NAMED]:
        size = with_error(abs(one.gain), one.half)
        if one.real is False:
            parts.append(f"no significant change on {_task(one)} ({one.signed} {one.unit})")
        elif one.gain > 0:
            parts.append(f"gained +{size} {one.unit} on {_task(one)}")
        elif one.gain < 0:
            parts.append(f"lost {size} {one.unit} on {_task(one)}, which it was to learn")
        else:
            parts.append(f"no change on {_task(one)}")
    if rest := skill[_NAMED:]:
        better = sum(one.gain > 0 and one.real is not False for one in rest)
        parts.append(f"better on {better} of {len(rest)} further skill tasks")
    return parts


def _task(one: Change) -> str:
    return "the validation set" if one.name == "validation" else one.name


def _of_retention(kept: list[Change]) -> list[str]:
    if not kept:
        return ["forgetting was not measured (no retention task)"]
    lost = [one for one in kept if one.lost]
    others = [one for one in kept if not one.lost]
    parts = [f"lost {one.amount} on {_task(one)}{_against_limit(one)}" for one in lost[:_NAMED]]
    if rest := lost[_NAMED:]:
        parts.append(f"lost on {len(rest)} further retention tasks")
    if others and lost:
        parts.append(f"no loss shown on {len(others)} other retention task{'s' * (len(others) > 1)}")
    elif len(others) == 1:
        (one,) = others
        word = "no loss" if one.gain >= 0 else "no significant loss"
        parts.append(f"{word} on {_task(one)} ({one.signed} {one.unit}{_open_to_limit(one)})")
    elif others:
        one = others[0]
        text = f"no significant loss on {len(others)} retention tasks"
        parts.append(f"{text} (worst: {_task(one)} {one.signed} {one.unit})")
    return parts


def _of_limits(kept: list[Change]) -> list[str]:
    """Of how many tasks, among several, a loss above the limit is not ruled out."""
    unsure = sum(one.open for one in kept)
    if not unsure or len(kept) == 1:
        return []
    return [f"a loss above its limit is not ruled out on {unsure} of {len(kept)} retention tasks"]


def _missing(found: list[Evaluation], kept: list[Change]) -> list[str]:
    """Retention tasks of which the last evaluation has no number, while it has of others."""
    known = {one.name for one in kept}
    tasks = found[0]["tasks"] | found[-1]["tasks"]
    names = [name for name, task in tasks.items() if task["measures"] != "skill" and name not in known]
    return [f"what became of {', '.join(names)} was not measured"] if kept and names else []


def _on_a_part(found: list[Evaluation]) -> list[str]:
    """Where a time budget, or its end by hand, left items out of the last evaluation."""
    base, last = found[0]["tasks"], found[-1]["tasks"]
    shares = {name: task["n"] / base[name]["n"] for name, task in last.items() if name in base and base[name]["n"]}
    least = min(shares, key=lambda name: shares[name], default="")
    return [f"measured on a part of the items ({shares[least]:.1%} of {least})"] if shares.get(least, 1) < 1 else []


def _against_limit(one: Change) -> str:
    """Whether the loss is real, and how it and its interval stand to the limit."""
    word = ": real" if one.real else ""
    if one.limit is None:
        return word
    limit, join = f"limit of {bound(one.limit)}", ", " if word else ": "
    if one.over:
        surely = one.high is None or -one.high > one.limit
        return f"{word}{join}above the {limit}" + ("" if surely else ", though the interval reaches below it")
    surely = one.low is None or -one.low <= one.limit
    return f"{word}{join}within the {limit}" + ("" if surely else ", though the interval reaches above it")


def _open_to_limit(one: Change) -> str:
    """No evidence of a loss is no evidence that there is none."""
    if one.limit is None or not one.open:
        return ""
    return f"; a loss above the limit of {bound(one.limit)} is not ruled out"


def _tone(skill: list[Change], kept: list[Change], missing: bool, state: dict[str, Any]) -> str:
    if state.get("status") in ("stopped", "failed") or any(one.over for one in kept):
        return "bad"
    if any(one.real and one.gain < 0 for one in skill):
        return "bad"
    learnt = any(one.real and one.gain > 0 for one in skill)
    kept_all = bool(kept) and not missing and not any(one.lost or one.open for one in kept)
    return "good" if learnt and kept_all else "mixed"


def gain(task: dict[str, Any]) -> float | None:
    """What a task has gained since step 0: of accuracies in shares of 1, of losses in shares of the base's; None if
    that is not known."""
    now, base = finite(task["score"]), finite(task["base"])
    if now is None or base is None:
        return None
    return now - base if task["higher_is_better"] else (base - now) / base if base else 0.0


def mean_gains(tasks: dict[str, Any]) -> dict[str, float | None]:
    """{"skill", "retention"}: the mean `gain` of those tasks; losses stay negative, so that noise has mean 0. None if
    there is none, or one is not known, as a mean over fewer tasks is not to be compared."""
    means: dict[str, float | None] = {}
    for kind in ("skill", "retention"):
        gains = [gain(task) for task in tasks.values() if task["measures"] == kind]
        known = [one for one in gains if one is not None]
        means[kind] = math.fsum(known) / len(known) if known and len(known) == len(gains) else None
    return means


def plane(tasks: dict[str, Any]) -> tuple[float, float] | None:
    """(skill, retention) of an evaluation's tasks, `mean_gains` in %; None if one of the two is not known."""
    means = mean_gains(tasks)
    if means["skill"] is None or means["retention"] is None:
        return None
    return 100 * means["skill"], 100 * means["retention"]
