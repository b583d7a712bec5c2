"""The tables of a report as HTML: tasks of a run, runs side by side, forgetting by task and step."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fullft.report.wording import Change, bound, change, changes, shown, unit, with_error
from fullft.retention.stats import is_share

Report = dict[str, Any]  # as of report.collect

SKILL, RETENTION = 0, 1  # colours of a run that is alone
_HEATED = 12  # columns of the heat map


def escaped(value: object) -> str:
    return html.escape(str(value), quote=True)


def table_box(head: str, body: str, name: str, kind: str = "") -> str:
    """In a box that scrolls by itself, with the keyboard too, so that the page never does sideways."""
    label = escaped(name)
    inner = f"<table class='{kind}'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div class='scroll' role='region' tabindex='0' aria-label='{label}'>{inner}</div>"


def last_tasks(report: Report) -> dict[str, Any]:
    return report["evaluations"][-1]["tasks"] if report["evaluations"] else {}


def task_names(reports: Iterable[Report]) -> list[str]:
    """Of all runs, skill first."""
    kinds = {
        name: task["measures"]
        for report in reports
        for one in report["evaluations"]
        for name, task in one["tasks"].items()
    }
    return sorted(kinds, key=lambda name: kinds[name] != "skill")


_COLUMNS = (
    "task", "change", "", "verdict", "base", "score", "limit", "p (Holm)", "q (BH)", "items", "kept", "metric",
)  # fmt: skip
_NUMBERS = ("change", "base", "score", "p (Holm)", "q (BH)", "items", "kept", "limit")


def task_table(report: Report) -> str:
    if not report["evaluations"]:
        return "<p>No evaluation yet.</p>"
    tasks = last_tasks(report)
    found = {one.name: one for one in changes(report["evaluations"][-1])}
    order = [*found, *(name for name in tasks if name not in found)]
    widest: dict[tuple[str, str], float] = {}  # {(unit, measures): the largest change that an interval reaches}
    for one in found.values():
        reach = max(abs(one.gain), abs(one.low or 0), abs(one.high or 0))
        widest[one.unit, one.measures] = max(widest.get((one.unit, one.measures), 0), reach)
    columns = [name for name in _COLUMNS if name not in _empty_columns(tasks)]
    number = " class='number'"
    head = "".join(
        f"<th scope='col'{number if name in _NUMBERS else ''}><button type='button'>{name}</button></th>"
        if name
        else "<th scope='col'><span class='hidden'>change drawn</span></th>"
        for name in columns
    )
    rows = "".join(_task_row(name, tasks[name], found.get(name), widest, columns) for name in order)
    notes = {
        "change": "change: positive is better; drawn with its interval, the line is no change, the tick the limit.",
        "p (Holm)": "p (Holm): of so large a change by chance, corrected for the number of retention tasks.",
        "q (BH)": "q (BH): share of false finds among tasks with a q as small.",
        "kept": "kept: score over base, both above chance.",
    }
    note = " ".join(notes[column] for column in columns if column in notes)
    return table_box(head, rows, "Tasks of the last evaluation", "sortable") + f"<p class='note'>{note}</p>"


def _empty_columns(tasks: dict[str, Any]) -> set[str]:
    """Those of statistics that no task has, as in old runs."""
    keys = {"p (Holm)": "p_holm", "q (BH)": "q", "kept": "retention", "limit": "limit"}
    return {column for column, key in keys.items() if all(task.get(key) is None for task in tasks.values())}


def _task_row(
    name: str, task: dict[str, Any], one: Change | None, widest: dict[tuple[str, str], float], columns: Sequence[str]
) -> str:
    metric, scale = task["metric"], 100 if is_share(task["metric"]) else 1
    clusters = task.get("clusters")
    items = f"{task['n']:,}" + (f" in {clusters:,}" if clusters and clusters != task["n"] else "")
    limit, kept = task.get("limit"), task.get("retention") if task["measures"] == "retention" else None
    cells: dict[str, tuple[str, Any]] = {
        "task": (f"{escaped(name)} <small>{task['measures']}</small>", name),
        "metric": (escaped(metric.replace("_", " ")), metric),
        "base": (shown(metric, task["base"]), task["base"]), "score": (shown(metric, task["score"]), task["score"]),
        "change": (f"{one.signed} <small>{escaped(one.unit)}</small>" if one else "–", one.gain if one else None),
        "": (_interval(one, widest[one.unit, one.measures]) if one else "", None),
        "p (Holm)": (_probability(task.get("p_holm")), task.get("p_holm")),
        "q (BH)": (_probability(task.get("q")), task.get("q")), "items": (items, task["n"]),
        "kept": (f"{kept:.1%}" if kept is not None else "–", kept),
        "limit": (bound(limit * scale) if limit is not None else "–", limit),
        "verdict": (_badge(one), one.verdict if one else ""),
    }  # fmt: skip
    texts = []
    for column in columns:
        text, value = cells[column]
        data = "" if value is None else f" data-value='{escaped(value)}'"
        number = " class='number'" if isinstance(value, int | float) or text == "–" else ""
        texts.append(f"<th scope='row'{data}>{text}</th>" if column == "task" else f"<td{number}{data}>{text}</td>")
    return f"<tr>{''.join(texts)}</tr>"


def _probability(p: float | None) -> str:
    if p is None:
        return "–"
    return "&lt; 0.0001" if p < 1e-4 else f"{p:.2g}" if p < 0.1 else f"{p:.2f}"


def _badge(one: Change | None) -> str:
    if one is None:
        return "not measured"
    bad = one.over or (one.real is True and one.gain < 0 and one.limit is None)
    kind = "bad" if bad else "mixed" if one.lost else "good" if one.real and one.gain > 0 else "unknown"
    return f"<span class='badge {kind}'>{one.verdict}</span>"


def _interval(one: Change, widest: float) -> str:
    """The change and its interval on a line with zero and limit, 120 × 18; the widest of its unit fills it."""
    reach = max(widest, one.limit or 0) or 1.0

    def x(value: float) -> float:
        return 60 + value / reach * 54

    parts = ["<path class='tick' d='M60 1V17'/>"]
    if one.limit is not None:
        parts.append(f"<path class='level limit' d='M{x(-one.limit):.1f} 2V16'/>")
    if one.low is not None and one.high is not None:
        parts.append(f"<path class='line' d='M{x(one.low):.1f} 9H{x(one.high):.1f}'/>")
    parts.append(f"<circle class='dot' cx='{x(one.gain):.1f}' cy='9' r='3.2'/>")
    name = f"{one.signed} {one.unit}" + (f", limit −{bound(one.limit)}" if one.limit is not None else "")
    color = SKILL if one.measures == "skill" else RETENTION
    size = "viewBox='0 0 120 18' width='120' height='18'"
    return f"<svg class='spark c{color}' {size} role='img' aria-label='{escaped(name)}'>{''.join(parts)}</svg>"


def comparison(reports: Sequence[Report]) -> str:
    """Rows are numbers, columns runs; the best of each row is marked."""
    head = "<th scope='col'>number</th>" + "".join(
        f"<th scope='col' class='run{at} c{at % 8}'><i></i>{escaped(report['run'])}</th>"
        for at, report in enumerate(reports)
    )
    rows = [_compared_task(name, reports) for name in task_names(reports)]
    unlike = [name for name in task_names(reports) if not _same_items(name, reports)]
    rank_means = _same_kept(reports) and not any(name in _kept(report) for report in reports for name in unlike)
    for key, title in (("average_forgetting", "average forgetting"), ("retention_mean", "kept, mean of the tasks")):
        values = [((report["evaluations"] or [{}])[-1].get("summary") or {}).get(key) for report in reports]
        low = key == "average_forgetting" if rank_means else None
        rows.append(_compared(title, values, lambda v: f"{v:.4g}", lower=low))
    divergences = [(report["evaluations"] or [{}])[-1].get("divergence") or {} for report in reports]
    rows.append(_compared("KL on the new task", [one.get("kl_new_task") for one in divergences], lambda v: f"{v:.3g}"))
    rows.append(
        _compared("KL on general text", [one.get("kl_general") for one in divergences], lambda v: f"{v:.3g}", True)
    )
    rows.append(
        _compared(
            "drift of the weights", [(one.get("drift") or {}).get("all") for one in divergences], lambda v: f"{v:.3g}"
        )
    )
    rows.append(_compared("last training loss", [report["final_loss"] for report in reports], lambda v: f"{v:.4g}"))
    rows.append(_compared("steps", [report["steps"] for report in reports], lambda v: f"{v:,}"))
    rows.append(_compared("tokens", [report["tokens"] for report in reports], lambda v: f"{v:,}"))
    speeds = [_mean(report["curves"].get("perf/tokens_per_second", {}).get("value", [])) for report in reports]
    rows.append(_compared("tokens a second, mean", speeds, lambda v: f"{v:,.0f}", False))
    note = (
        "★ best of the row, by chance perhaps: see the ±, half the confidence interval of the change to the base "
        "model. Scores are of the last evaluation."
    )
    if unlike:
        note += (
            f" No ★ for {escaped(', '.join(unlike))}: measured on part of the items in"
            " some of the runs, on other items, or from another base model; compare the changes."
        )
    if not rank_means:
        note += " No ★ for the means, which are not of the same tasks and items."
    return table_box(head, "".join(rows), "The runs side by side") + f"<p class='note'>{note}</p>"


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _compared_task(name: str, reports: Sequence[Report]) -> str:
    tasks = [last_tasks(report).get(name) for report in reports]
    known = next(task for task in tasks if task) if any(tasks) else None
    if known is None:
        return ""
    texts = []
    for task in tasks:
        one = change(name, task) if task else None
        texts.append(f"{shown(task['metric'], task['score'])} <small>({one.signed})</small>" if task and one else "–")
    values = [task["score"] if task else None for task in tasks]
    about = f"{known['measures']}, {known['metric'].replace('_', ' ')}, {unit(known['metric'])}"
    title = f"{escaped(name)} <small>{escaped(about)}</small>"
    lower = not known["higher_is_better"] if _same_items(name, reports) else None
    return _compared(title, values, None, lower, texts)


def _kept(report: Report) -> set[str]:
    return {name for name, task in last_tasks(report).items() if task["measures"] == "retention"}


def _same_kept(reports: Sequence[Report]) -> bool:
    """Whether the last evaluations have the same retention tasks."""
    return len({frozenset(_kept(report)) for report in reports if report["evaluations"]}) <= 1


def _same_items(name: str, reports: Sequence[Report]) -> bool:
    """Whether the scores of a task can be compared: from as many items, on which the base scored as well in all runs
    (half a percent apart at most, as the same model does on other machines)."""
    tasks = [task for report in reports if (task := last_tasks(report).get(name))]
    bases = [task["base"] for task in tasks if task["base"] is not None]
    alike = all(math.isclose(base, bases[0], rel_tol=0.005) for base in bases)
    return alike and len({(task["metric"], task["n"]) for task in tasks}) <= 1


def _compared(
    title: str, values: Sequence[float | None], show: Callable[[Any], str] | None, lower: bool | None = None,
    texts: Sequence[str] | None = None,
) -> str:  # fmt: skip
    """A row; lower: whether the lowest is the best, None where none is."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    texts = texts or ["–" if value is None or show is None else show(value) for value in values]
    best = None if lower is None or len(set(known)) < 2 else (min if lower else max)(known)
    cells = "".join(
        f"<td class='number run{at}{' best' if best is not None and value == best else ''}'>"
        f"{'<b>★ ' + text + '</b>' if best is not None and value == best else text}</td>"
        for at, (value, text) in enumerate(zip(values, texts, strict=True))
    )
    return f"<tr><th scope='row'>{title}</th>{cells}</tr>"


def heat_maps(reports: Sequence[Report]) -> str:
    maps = [
        (
            f"<h3 class='run{at} c{at % 8}'><i></i>{escaped(report['run'])}</h3>" if len(reports) > 1 else "",
            _heat_map(report, at),
        )
        for at, report in enumerate(reports)
    ]
    text = "".join(title + body for title, body in maps if body)
    note = (
        "<p class='note'>Loss since step 0 in the task's unit (accuracies: points); positive is worse. Deeper "
        "orange: a larger share of the limit, full at twice the limit; blue: better than the base. "
        "<b>Bold</b>: significant.</p>"
    )
    return text + note if text else ""


def _heat_map(report: Report, run: int) -> str:
    found = [one for one in report["evaluations"] if one["step"] > 0]
    names = [
        name
        for name in task_names([report])
        if any(one["tasks"].get(name, {}).get("measures") == "retention" for one in found)
    ]
    if not names:
        return ""
    if len(found) > _HEATED:
        found = [found[round(at * (len(found) - 1) / (_HEATED - 1))] for at in range(_HEATED)]
    head = "<th scope='col'>task</th>" + "".join(
        f"<th scope='col' class='number'>{one['step']:,}</th>" for one in found
    )
    rows = ""
    for name in names:
        row = [change(name, one["tasks"][name]) if name in one["tasks"] else None for one in found]
        scale = (
            2 * max((one.limit or 0 for one in row if one), default=0)
            or max((abs(one.gain) for one in row if one), default=1)
            or 1
        )
        rows += f"<tr><th scope='row'>{escaped(name)}</th>{''.join(_heat_cell(one, scale) for one in row)}</tr>"
    return table_box(head, rows, f"Forgetting of {report['run']} by task and step", f"heat run{run}")


def _heat_cell(one: Change | None, scale: float) -> str:
    if one is None:
        return "<td>–</td>"
    side, share = ("better" if one.gain > 0 else "worse"), min(1.0, abs(one.gain) / scale)
    title = f"{with_error(-one.gain, one.half, sign=True)} {one.unit} lost, {one.verdict}"
    digits = with_error(-one.gain, one.half).split(" ±")[0]
    text = f"<b>{digits}</b>" if one.real else digits
    return f"<td class='{side}' style='--share:{share * 100:.0f}%' title='{escaped(title)}'>{text}</td>"
