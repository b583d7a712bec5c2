"""python -m benchmarks.scaling: predicted tokens/s per H100 from 8 to 4096 GPUs, into results/scaling.md. On paper:
no run of this size was measured."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.published import setting
from fullft.planner import choose, hardware, speed

GPUS = [2**power for power in range(3, 13)]


def main() -> None:
    device = hardware.gpu("h100-80gb")
    lines = ["| model, Gb/s for each GPU | " + " | ".join(map(str, GPUS)) + " |", "|" + "---|" * (1 + len(GPUS))]
    with tempfile.TemporaryDirectory() as folder:
        for size in ("8B", "70B", "405B"):
            of = setting(Path(folder), size, 8, 8192, 1, "full")
            for network in (400, 100, 25):
                cells = []
                for one in (replace(of, world_size=gpus) for gpus in GPUS):
                    found = speed.predict(one, device, network_gbps=network)
                    hidden = "" if found.communication <= found.compute else " *"
                    small = "" if choose.fits(one, device) else " †"
                    cells.append(f"{found.tokens_per_second_per_gpu:.0f}{hidden}{small}")
                lines.append(f"| {size}, {network} | " + " | ".join(cells) + " |")
    text = "\n".join([
        "Predicted tokens/s per H100-80GB, a row of 8192 tokens, full checkpointing (`python -m benchmarks.scaling`).",
        "\\* communication is longer than computation and hides no more; † does not fit by the plan.",
        "Optimistic at hundreds of GPUs: congestion, stragglers and the bandwidth of small messages are not in it.",
        "", *lines,
    ])  # fmt: skip
    (Path(__file__).parent / "results" / "scaling.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
