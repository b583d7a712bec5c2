"""python -m benchmarks.scaling: predicted tokens/s per H100 from 8 to 4096 GPUs, into results/scaling.md and
scaling.svg. On paper: no run of this size was measured."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.published import setting
from fullft.planner import choose, hardware, speed
from fullft.planner.hardware import Gpu
from fullft.planner.setting import Setting, on_gpus

RESULTS = Path(__file__).parent / "results"
GPUS = [2**power for power in range(3, 13)]
COLORS = {"8B": "#0068a8", "70B": "#c24e00", "405B": "#00805f"}
DASHES = {400: "none", 100: "7 3", 25: "2 3"}  # Gb/s for each GPU


@dataclass
class Curve:
    """Tokens/s per GPU at each of `GPUS`, whether communication is the longer there, and whether it fits."""

    model: str
    network: int
    rates: list[float]
    shows: list[bool]
    fits: list[bool]


def main() -> None:
    device = hardware.gpu("h100-80gb")
    lines = ["| model, Gb/s for each GPU | " + " | ".join(map(str, GPUS)) + " |", "|" + "---|" * (1 + len(GPUS))]
    needs, curves = list[str](), list[Curve]()
    with tempfile.TemporaryDirectory() as folder:
        for size in COLORS:
            on = [on_gpus(setting(Path(folder), size, 8, 8192, 1, "full"), gpus) for gpus in GPUS]
            curves += [curve(size, on, device, network) for network in DASHES]
            least = [f"{hides_from(one, device):.0f} Gb/s on {one.world_size}" for one in (on[1], on[-1])]
            needs.append(f"{size} {', '.join(least)}")
    for one in curves:
        cells = [
            f"{rate:.0f}{' *' * shows}{' †' * (not fits)}"
            for rate, shows, fits in zip(one.rates, one.shows, one.fits, strict=True)
        ]
        lines.append(f"| {one.model}, {one.network} | " + " | ".join(cells) + " |")
    text = "\n".join([
        "Predicted tokens/s per H100-80GB, a row of 8192 tokens, full checkpointing (`python -m benchmarks.scaling`).",
        "\\* communication is longer than computation and hides no more; † does not fit by the plan.",
        "Optimistic at hundreds of GPUs: congestion, stragglers and the bandwidth of small messages are not in it.",
        "", "It hides from so many Gb/s for each GPU on, with a row on each: " + "; ".join(needs) + ".",
        "Rows of half the length need almost twice as many. Beyond the first node the number of GPUs changes little:",
        "a ring's edges carry (N - 1) / N of the weights whatever N is.",
        "", *lines,
    ])  # fmt: skip
    (RESULTS / "scaling.md").write_text(text + "\n")
    (RESULTS / "scaling.svg").write_text(draw(curves))
    print(text)


def curve(size: str, on: list[Setting], device: Gpu, network: float) -> Curve:
    found = [speed.predict(one, device, network_gbps=network) for one in on]
    return Curve(
        size, int(network), [one.tokens_per_second_per_gpu for one in found],
        [one.communication > one.compute for one in found], [choose.fits(one, device) for one in on],
    )  # fmt: skip


def hides_from(on: Setting, device: Gpu) -> float:
    """Least Gb/s for each GPU at which communication is no longer than computation, by bisection."""
    low, high = 1.0, 10_000.0
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        found = speed.predict(on, device, network_gbps=middle)
        low, high = (low, middle) if found.communication <= found.compute else (middle, high)
    return high


def draw(curves: list[Curve]) -> str:
    """Both axes logarithmic. A dot is empty where communication is the longer, and faint where it does not fit."""
    left, right, top, bottom = 60, 620, 40, 400

    def x(gpus: float) -> float:
        return left + (right - left) * math.log2(gpus / GPUS[0]) / math.log2(GPUS[-1] / GPUS[0])

    def y(rate: float) -> float:
        return bottom - (bottom - top) * math.log10(rate / 30) / math.log10(10_000 / 30)

    parts = [f'<text x="{left}" y="20">Predicted tokens/s per H100-80GB, a row of 8192 tokens on each</text>']
    for rate in (30, 100, 300, 1000, 3000, 10_000):
        parts.append(f'<path d="M{left} {y(rate):.1f}H{right}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y(rate) + 4:.1f}" text-anchor="end">{rate:,}</text>')
    parts += [f'<text x="{x(gpus):.1f}" y="{bottom + 18}" text-anchor="middle">{gpus}</text>' for gpus in GPUS]
    parts.append(f'<text x="{right}" y="{bottom + 36}" text-anchor="end">GPUs</text>')
    for one in curves:
        places = [(x(gpus), y(rate)) for gpus, rate in zip(GPUS, one.rates, strict=True)]
        path, color = "L".join(f"{a:.1f} {b:.1f}" for a, b in places), COLORS[one.model]
        parts.append(f'<path d="M{path}" stroke="{color}" stroke-dasharray="{DASHES[one.network]}" fill="none"/>')
        for (a, b), shows, fits in zip(places, one.shows, one.fits, strict=True):
            fill, faint = "white" if shows else color, "" if fits else ' opacity=".4"'
            parts.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5" stroke="{color}" fill="{fill}"{faint}/>')
        end, at = f"{one.model}, {one.network} Gb/s", places[-1][1] + {400: -3, 100: 10}.get(one.network, 4)
        parts.append(f'<text x="{right + 10}" y="{at:.1f}" fill="{color}">{end}</text>')
    note = "Empty: communication is longer than computation. Faint: does not fit by the plan."
    parts.append(f'<text x="{left}" y="{bottom + 36}">{note}</text>')
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 730 450" width="730" height="450" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
        + "".join(parts) + "</svg>\n"
    )  # fmt: skip


if __name__ == "__main__":
    main()
