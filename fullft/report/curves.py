"""The charts of a report: trajectories of the tasks, skill against retention, divergence from the base, training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fullft.report.charts import Chart, Line, draw
from fullft.report.tables import RETENTION, SKILL, Report, escaped, task_names
from fullft.report.wording import change, plane, unit
from fullft.retention.stats import is_share

_TITLES = {  # of metrics.jsonl: title and unit
    "train/loss": ("training loss", "nats a token"),
    "train/loss_task": ("loss of the new task", "nats a token"),
    "train/loss_replay": ("loss of replay", "nats a token"),
    "train/loss_kl": ("KL to the base on replay", "nats a token"),
    "train/l2_distance": ("distance to the base weights", ""),
    "train/learning_rate": ("learning rate", ""),
    "train/grad_norm": ("gradient norm", ""),
    "perf/tokens_per_second": ("throughput", "tokens a second"),
    "perf/mfu": ("share of the peak FLOP/s (MFU)", ""),
    "memory/peak_gib": ("peak memory of rank 0", "GiB"),
}
_TOGETHER = ("train/loss", "train/loss_task", "train/loss_replay")  # one chart, where one run is shown


def _grid(charts: Iterable[str]) -> str:
    drawn = "".join(charts)
    return f"<div class='grid'>{drawn}</div>" if drawn else ""


def trajectories(reports: Sequence[Report]) -> str:
    charts = _grid(draw(_trajectory(name, reports)) for name in task_names(reports))
    if not charts:
        return ""
    partial = any(one.get("whole") is False for report in reports for one in report["evaluations"])
    note = (
        "The band is the confidence interval of the change since step 0, drawn around the score; base is the score at "
        "step 0, limit the largest loss allowed."
    )
    if partial:
        note += " Empty dots: measured on a part of the items, and set against the base on the same ones."
    if any(report["rollbacks"] for report in reports):
        note += " Dashed and empty: steps that the gate has taken back."
    return f"{charts}<p class='note'>{note}</p>"


def _trajectory(name: str, reports: Sequence[Report]) -> Chart:
    lines: list[Line] = []
    levels: list[tuple[float, str]] = []
    events: list[tuple[float, str]] = []
    task: dict[str, Any] | None = None
    for at, report in enumerate(reports):
        found = [(one, one["tasks"][name]) for one in report["evaluations"] if name in one["tasks"]]
        found = [(one, task) for one, task in found if change(name, task)]
        if not found:
            continue
        task = found[0][1]
        scale, base = (100.0 if is_share(task["metric"]) else 1.0), found[0][1]["base"]
        sign = scale if task["higher_is_better"] else -scale
        line = _score_line(found, base * scale, sign)
        line.name, line.color, line.run = report["run"], at, at
        if len(reports) == 1:
            line.name, line.color, line.run = name, RETENTION if task["measures"] == "retention" else SKILL, None
        lines += [*_abandoned(report, name, line, base * scale, sign), line]
        levels = levels or [(base * scale, "base")]
        if len(levels) == 1 and (limit := found[-1][1].get("limit")) is not None:
            levels.append((base * scale - limit * sign, "limit"))
        events = _events(report) if len(reports) == 1 else []
    assert task is not None or not lines
    metric = task["metric"] if task else ""
    better = "higher" if task and task["higher_is_better"] else "lower"
    about = (
        f"{task['measures']} · {metric.replace('_', ' ')}{', %' if is_share(metric) else ''} · {better} is better"
        if task
        else ""
    )
    return Chart(name, lines, about, unit="%" if is_share(metric) else unit(metric), levels=levels, events=events)


def _score_line(found: Sequence[tuple[dict[str, Any], dict[str, Any]]], base: float, sign: float) -> Line:
    """The scores: base at step 0 and paired change, which is of the same items also where some were left out."""
    has_bands = all(task.get("drop_ci") for _, task in found)
    return Line(
        "", [one["step"] for one, _ in found], [base - task["drop"] * sign for _, task in found], 0,
        low=[min(base - bound * sign for bound in task["drop_ci"]) for _, task in found] if has_bands else None,
        high=[max(base - bound * sign for bound in task["drop_ci"]) for _, task in found] if has_bands else None,
        dots=len(found) <= 40, hollow=[at for at, (one, _) in enumerate(found) if one.get("whole") is False],
    )  # fmt: skip


def _abandoned(report: Report, name: str, line: Line, base: float, sign: float) -> list[Line]:
    """The ways of a trajectory that the gate has taken back, each from where the run went on."""
    lines = []
    for one in report["rollbacks"]:
        found = [(there, there["tasks"][name]) for there in one["evaluations"] if name in there["tasks"]]
        found = [(there, task) for there, task in found if change(name, task)]
        if not found:
            continue
        way = _score_line(found, base, sign)
        before = [at for at, step in enumerate(line.x) if step <= one["to_step"]]
        if before:
            way.x, way.y = [line.x[before[-1]], *way.x], [line.y[before[-1]], *way.y]
        way.low = way.high = None
        way.name, way.color, way.run, way.abandoned = f"{line.name}, taken back", line.color, line.run, True
        way.hollow = range(len(way.x))
        lines.append(way)
    return lines


def _events(report: Report) -> list[tuple[float, str]]:
    """Where the gate has stopped the run, and where it went on after a rollback."""
    stops = [one["step"] for one in report["evaluations"] if (one.get("gate") or {}).get("decision") == "stop"]
    return [(step, "stop") for step in stops] + [(one["to_step"], "rolled back") for one in report["rollbacks"]]


def frontier(reports: Sequence[Report]) -> str:
    """The way of each run from the base, and the blends of base and tuned weights."""
    lines, alone = [], len(reports) == 1
    note = (
        "Right and up is better. Retention and skill: mean change of their tasks since step 0, in points for "
        "accuracies and in % of the base for losses."
    )
    for at, report in enumerate(reports):
        run = None if alone else at
        path = [(one["step"], point) for one in report["evaluations"] if (point := plane(one["tasks"]))]
        if len(path) > 1:
            line = _plane_line("the run" if alone else report["run"], path, "step", at, run)
            end = f"step {path[-1][0]:,}" if report["steps"] else "model"
            line.shown = [(0, "base"), (len(path) - 1, end)] if alone else ()
            lines.append(line)
        blend = report["blend"] or {}
        mixed = sorted((one["alpha"], point) for one in blend.get("points", []) if (point := plane(one["tasks"])))
        if mixed:
            name = "blends of base and tuned" if alone else f"blends of {report['run']}"
            line = _plane_line(name, mixed, "α", 3 if alone else at, run)
            best = (blend.get("best") or {}).get("alpha")
            line.hollow, line.below = range(len(mixed)), True
            line.shown = [(i, f"best, α {alpha:g}") for i, (alpha, _) in enumerate(mixed) if alpha == best]
            lines.append(line)
            if best is not None:
                note += f" Best blend of {report['run']}: α = {best:g} ({blend['best']['why']})."
    if not lines:
        return ""
    about = "up: skill, %; a dot is an evaluation, an empty one a blend" if any(line.hollow for line in lines) else ""
    about = about or "up: skill, %; a dot is an evaluation"
    drawn = draw(Chart("skill against retention", lines, about, "right: retention, %", "%", plane=True))
    return f"<div class='wide'>{drawn}</div><p class='note'>{escaped(note)}</p>"


def _plane_line(
    name: str, points: Sequence[tuple[float, tuple[float, float]]], label: str, color: int, run: int | None
) -> Line:
    """Through (retention, skill) of points, each told by a number: its step, or its α."""
    labels = [f"{label} {key:,}" for key, _ in points]
    retention, skill = [at[1] for _, at in points], [at[0] for _, at in points]
    return Line(name, retention, skill, color, dots=True, run=run, labels=labels)


def divergence(reports: Sequence[Report]) -> str:
    charts = []
    for key, title in (("kl_new_task", "KL on the new task"), ("kl_general", "KL on general text")):
        lines = [
            _over_steps(report, at, len(reports) == 1, lambda one, key=key: one.get(key))
            for at, report in enumerate(reports)
        ]
        charts.append(draw(Chart(title, lines, "base to now, nats a token", unit="nats a token")))
    lines = [
        _over_steps(report, at, len(reports) == 1, lambda one: (one.get("drift") or {}).get("all"))
        for at, report in enumerate(reports)
    ]
    charts.append(draw(Chart("drift of all weights", lines, "‖w − w₀‖ / ‖w₀‖")))
    charts.append(_drift_by_layer(reports))
    return _grid(charts)


def _over_steps(report: Report, at: int, alone: bool, value: Callable[..., float | None]) -> Line:
    points = [
        (one["step"], found)
        for one in report["evaluations"]
        if (found := value(one.get("divergence") or {})) is not None
    ]
    run = None if alone else at
    return Line(
        report["run"], [step for step, _ in points], [v for _, v in points], at, dots=len(points) <= 40, run=run
    )


def _drift_by_layer(reports: Sequence[Report]) -> str:
    lines, notes = [], []
    for at, report in enumerate(reports):
        found = [
            one for one in report["evaluations"] if ((one.get("divergence") or {}).get("drift") or {}).get("layers")
        ]
        found = [one for one in found if any(one["divergence"]["drift"]["layers"].values())]
        alone = len(reports) == 1
        chosen = (
            [found[i] for i in sorted({0, (len(found) - 1) // 2, len(found) - 1})] if alone and found else found[-1:]
        )
        for color, one in enumerate(chosen):
            layers = sorted(
                (int(layer), value)
                for layer, value in one["divergence"]["drift"]["layers"].items()
                if value is not None
            )
            name = f"step {one['step']:,}" if alone else report["run"]
            x, y = [layer for layer, _ in layers], [value for _, value in layers]
            lines.append(Line(name, x, y, color if alone else at, dots=len(x) <= 40, run=None if alone else at))
        if found and (embed := found[-1]["divergence"]["drift"].get("embed")) is not None:
            notes.append(f"embeddings {embed:.3g}" + ("" if alone else f" ({report['run']})"))
    return draw(Chart("drift by layer", lines, "‖w − w₀‖ / ‖w₀‖", "layer", note=", ".join(notes)))


def training(reports: Sequence[Report]) -> str:
    alone = len(reports) == 1
    together = [key for key in _TOGETHER if alone and key in reports[0]["curves"]]
    charts = []
    if len(together) > 1:
        names = {"train/loss": "all tokens", "train/loss_task": "new task", "train/loss_replay": "replay"}
        lines = [_curve(names[key], reports[0]["curves"][key], at) for at, key in enumerate(together)]
        charts.append(
            draw(Chart("training loss", lines, "nats a token", unit="nats a token", events=_events(reports[0])))
        )
    for key, (title, of) in _TITLES.items():
        if len(together) > 1 and key in together:
            continue
        lines = [
            _curve(report["run"], report["curves"][key], at, None if alone else at)
            for at, report in enumerate(reports)
            if key in report["curves"]
        ]
        charts.append(draw(Chart(title, lines, of, unit=of, events=_events(reports[0]) if alone else [])))
    text = _grid(charts)
    thinned = any("low" in curve for report in reports for curve in report["curves"].values())
    return text + (
        "<p class='note'>Long curves: mean of neighbouring steps, with their range as a band.</p>"
        if thinned and text
        else ""
    )


def _curve(name: str, curve: dict[str, Any], color: int, run: int | None = None) -> Line:
    return Line(name, curve["step"], curve["value"], color, curve.get("low"), curve.get("high"), run=run)
