"""Line charts as SVG, 400 × 230 units, to be shown at about that size so that letters stay readable on a phone.

Colours are classes (c0, c1, …) of page.css. What the pointer shows is in `data-chart`, drawn by page.js.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

WIDTH, HEIGHT = 400, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 388, 12, 196  # of the area for data


@dataclass
class Line:
    """x, y: [points], finite; low, high: [points] of a band around it."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: int
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    dots: bool = False
    hollow: Sequence[int] = ()  # indices of dots that are drawn empty
    run: int | None = None  # hidden with this run
    abandoned: bool = False  # drawn faint
    labels: Sequence[str] = ()  # of the points, for the pointer
    shown: Sequence[tuple[int, str]] = ()  # points that have a text beside them
    below: bool = False  # that text stands below the point, else above


@dataclass
class Chart:
    title: str
    lines: list[Line]
    subtitle: str = ""
    x_label: str = "step"
    unit: str = ""
    levels: list[tuple[float, str]] = field(default_factory=list)  # horizontal lines: value, label
    events: list[tuple[float, str]] = field(default_factory=list)  # vertical lines: x, label
    plane: bool = False  # x is a quantity and not an order, as in skill against retention
    note: str = ""


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from low to high, steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / about
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [(first + i) * step for i in range(int((high - low) / step + 2)) if (first + i) * step <= high + step * 1e-9]


def number(value: float, step: float = 0.0) -> str:
    """A label of an axis whose ticks are `step` apart."""
    if value == 0 or abs(value) < step * 1e-6:
        return "0"
    if abs(value) >= 1e6:
        return f"{value / 1e6:.3g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:.3g}k"
    if abs(value) < 1e-3 or 0 < step < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}".replace("-", "−")
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step else 3
    return f"{value:,.{decimals}f}".replace("-", "−")


def draw(chart: Chart) -> str:
    """A figure with caption, drawing and, for several lines of one run, a legend."""
    lines = [line for line in chart.lines if len(line.x)]
    if not lines:
        return ""
    across = [value for line in lines for value in line.x]
    x_low, x_high = _range(across if chart.plane else [0.0, *across], pad=0.12 if chart.plane else 0.0)
    values = [v for line in lines for series in (line.y, line.low, line.high) if series is not None for v in series]
    y_low, y_high = _range(values + [level for level, _ in chart.levels], pad=0.1 if chart.plane else 0.06)
    frame = _Frame(x_low, x_high, y_low, y_high)
    parts = [
        _axes(frame, chart.x_label),
        *(_event(frame, *event) for event in chart.events if x_low <= event[0] <= x_high),
    ]
    parts += [_band(frame, line) for line in lines if line.low is not None]
    parts += _levels(frame, chart.levels)
    parts += [_line(frame, line) for line in lines]
    data = {
        "x": [x_low, x_high], "y": [y_low, y_high], "box": [_LEFT, _RIGHT, _TOP, _BOTTOM], "label": chart.x_label,
        "unit": chart.unit, "plane": chart.plane, "lines": [_data(line) for line in lines],
    }  # fmt: skip
    name = html.escape(f"{chart.title}. {_description(chart, lines)}", quote=True)
    subtitle = f" <span class='sub'>{html.escape(chart.subtitle)}</span>" if chart.subtitle else ""
    note = f"<p class='note'>{html.escape(chart.note)}</p>" if chart.note else ""
    return (
        f"<figure><figcaption><b>{html.escape(chart.title)}</b>{subtitle}</figcaption>"
        f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' tabindex='0' aria-label='{name}' "
        f"data-chart='{html.escape(json.dumps(data, allow_nan=False, separators=(',', ':')), quote=True)}'>"
        f"{''.join(parts)}</svg>{_legend(lines)}{note}</figure>"
    )


@dataclass
class _Frame:
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        return _LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (_RIGHT - _LEFT)

    def y(self, value: float) -> float:
        return _BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (_BOTTOM - _TOP)


def _range(values: Sequence[float], pad: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        widen = abs(low) * 0.1 or 1.0
        return low - widen * (pad > 0), high + widen
    return low - pad * (high - low), high + pad * (high - low)


def _axes(frame: _Frame, x_label: str) -> str:
    parts = []
    down = ticks(frame.y_low, frame.y_high)
    step = down[1] - down[0] if len(down) > 1 else 0.0
    for value in down:
        y = frame.y(value)
        parts.append(f"<path class='rule' d='M{_LEFT} {y:.1f}H{_RIGHT}'/>")
        parts.append(f"<text x='{_LEFT - 6}' y='{y + 4:.1f}' text-anchor='end'>{number(value, step)}</text>")
    across = ticks(frame.x_low, frame.x_high)
    step = across[1] - across[0] if len(across) > 1 else 0.0
    for value in across:
        x = frame.x(value)
        parts.append(f"<path class='tick' d='M{x:.1f} {_BOTTOM}v4'/>")
        parts.append(f"<text x='{x:.1f}' y='{_BOTTOM + 16}' text-anchor='middle'>{number(value, step)}</text>")
    parts.append(f"<text class='axis' x='{_RIGHT}' y='{HEIGHT - 3}' text-anchor='end'>{html.escape(x_label)}</text>")
    parts.append(f"<path class='tick' d='M{_LEFT} {_BOTTOM}H{_RIGHT}'/>")
    return "".join(parts)


def _levels(frame: _Frame, levels: Sequence[tuple[float, str]]) -> list[str]:
    """Dashed lines. Their labels stand on the right, above the line, or below where two would meet."""
    parts: list[str] = []
    taken: list[float] = []
    for value, label in levels:
        y = frame.y(value)
        at = y - 4
        if any(abs(at - other) < 13 for other in taken) or at < _TOP + 6:
            at = y + 13
        taken.append(at)
        parts.append(f"<path class='level {label.split()[0]}' d='M{_LEFT} {y:.1f}H{_RIGHT}'/>")
        parts.append(f"<text class='on' x='{_RIGHT}' y='{at:.1f}' text-anchor='end'>{html.escape(label)}</text>")
    return parts


def _event(frame: _Frame, x: float, label: str) -> str:
    at = frame.x(x)
    side, dx = ("end", -4) if at > (_LEFT + _RIGHT) / 2 else ("start", 4)
    text = f"<text class='on' x='{at + dx:.1f}' y='{_TOP + 8}' text-anchor='{side}'>{html.escape(label)}</text>"
    return f"<path class='event' d='M{at:.1f} {_TOP}V{_BOTTOM}'/>{text}"


def _classes(line: Line) -> str:
    run = f" run{line.run}" if line.run is not None else ""
    return f"c{line.color % 8}{run}{' abandoned' if line.abandoned else ''}"


def _band(frame: _Frame, line: Line) -> str:
    low, high = line.low or (), line.high or ()
    there = [f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in zip(line.x, high, strict=True)]
    back = [f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in zip(line.x, low, strict=True)]
    return f"<path class='band {_classes(line)}' d='M{'L'.join(there + back[::-1])}Z'/>"


def _line(frame: _Frame, line: Line) -> str:
    places = [(frame.x(x), frame.y(y)) for x, y in zip(line.x, line.y, strict=True)]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    parts = [f"<path class='line' d='M{path}'/>"]
    if line.dots or len(places) == 1:
        dot = ("dot", "hollow")
        parts += [
            f"<circle class='{dot[at in line.hollow]}' cx='{x:.1f}' cy='{y:.1f}' r='3.2'/>"
            for at, (x, y) in enumerate(places)
        ]
    for at, label in line.shown:
        x, y = places[at][0], places[at][1] + (17 if line.below else -8)
        side = "start" if x < _LEFT + 30 or label == "base" else "end" if x > _RIGHT - 30 else "middle"
        parts.append(f"<text class='on' x='{x:.1f}' y='{y:.1f}' text-anchor='{side}'>{html.escape(label)}</text>")
    return f"<g class='{_classes(line)}'>{''.join(parts)}</g>"


def _data(line: Line) -> dict[str, Any]:
    found: dict[str, Any] = {"n": line.name, "c": line.color % 8, "x": [_short(x) for x in line.x]}
    found["y"] = [_short(y) for y in line.y]
    if line.low is not None and line.high is not None:
        found |= {"lo": [_short(y) for y in line.low], "hi": [_short(y) for y in line.high]}
    if line.run is not None:
        found["r"] = line.run
    if line.labels:
        found["l"] = list(line.labels)
    return found


def _short(value: float) -> float:
    return int(value) if float(value).is_integer() else float(f"{value:.5g}")


def _legend(lines: Sequence[Line]) -> str:
    names = list({line.name: line for line in lines if line.run is None and not line.abandoned}.values())
    if len(names) < 2:
        return ""
    items = "".join(f"<li class='{_classes(line)}'><i></i>{html.escape(line.name)}</li>" for line in names)
    return f"<ul class='legend'>{items}</ul>"


def _description(chart: Chart, lines: Sequence[Line]) -> str:
    """For those who do not see the drawing."""
    unit = f" {chart.unit}" if chart.unit else ""
    spans = [
        f"{line.name}: {number(line.y[0])} to {number(line.y[-1])}{unit}, {chart.x_label} {number(line.x[0])} to "
        f"{number(line.x[-1])}"
        for line in lines[:8]
    ]
    return "; ".join(spans) + ". Arrow keys show the numbers."
