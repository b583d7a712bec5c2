"""What the account of a step (times, FLOP/s, MFU) costs: `python -m benchmarks.account [--quick]`

One run of `launch/train.py`'s loop on 2 ranks, whose steps take turns in a shuffled order: with the account; without
it, DeepSpeed's own methods put back; and with every call of the account timed. What it costs is the median over the
rounds of a step with it over one without. Other work on the machine moves that by percents, so the sum of the timed
calls, with the clocks' own cost in it, is the figure that can be held to half a percent, in processor time: a call that
is interrupted by other processes has taken long by the clock on the wall.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import goal, machine, write
from benchmarks.remedies import write_inputs

LIMIT = 0.005
KINDS = ("with", "without", "timed")
WARM_UP = 6  # steps: trace of the modules, moments, allocator
UNITS = ("seconds", "processor_seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, to see that it runs")
    parser.add_argument("--ranks", type=int, help="default: 2, on a GPU 1")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--on-rank", nargs=2, metavar="WORD", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.on_rank:
        on_rank(Path(arguments.on_rank[0]), int(arguments.on_rank[1]))
        return
    arguments.ranks = arguments.ranks or (2 if machine()["gpu"] is None else 1)
    rounds = 4 if arguments.quick else arguments.rounds
    with tempfile.TemporaryDirectory(prefix="fullft-benchmark-") as name:
        folder = Path(name)
        hidden, layers, vocabulary = (64, 2, 300) if arguments.quick else (512, 8, 8000)
        write_inputs(folder, arguments.sequence_length, hidden, layers, vocabulary)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(arguments.ranks), "-m", "benchmarks.account", "--on-rank", name]
        subprocess.run([*command, str(rounds)], check=True)
        steps = json.loads((folder / "measured.json").read_text())
    row = summary(steps) | {"ranks": arguments.ranks, "load": os.getloadavg()[0]}
    share = row["share_of_processor_seconds"]
    goals = [goal("share of a step's processor time that the account takes", f"<= {LIMIT}", share, share <= LIMIT)]
    sizes = {"hidden": hidden, "layers": layers, "sequence_length": arguments.sequence_length}
    write("account", {"account": row | sizes}, goals)


def summary(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the steps of rank 0, the kinds in turns: seconds and processor seconds, and those of the timed calls."""
    of = {kind: [one for one in steps if one["kind"] == kind] for kind in KINDS}
    found: dict[str, Any] = {"rounds": len(of["with"])}
    for unit in UNITS:
        ratios = [one[unit] / other[unit] for one, other in zip(of["with"], of["without"], strict=True)]
        found |= {
            unit: statistics.median(one[unit] for one in of["without"]),
            f"{unit}_ratio": statistics.median(ratios),
        }
        found[f"{unit}_ratio_quartiles"] = statistics.quantiles(ratios, n=4)[::2]
        found[f"share_of_{unit}"] = statistics.median(one[f"calls_{unit}"] / one[unit] for one in of["timed"])
    return found | {"calls_of_a_step": statistics.median(one["calls"] for one in of["timed"])}


def on_rank(folder: Path, rounds: int) -> None:
    from fullft import cluster, trainer
    from fullft.preflight import preflight
    from fullft.recipe import parse_recipe

    me = cluster.discover()
    cluster.join(me, 60)
    recipe = json.loads((folder / "recipe.json").read_text())
    recipe["data"].pop("replay")
    recipe |= {"run_dir": str(folder / "run"), "tracking": {"wandb": "disabled"}}
    recipe["train"] |= {"steps": WARM_UP + 3 * rounds + 1, "global_batch_size": 2 * me.world_size}
    parsed = parse_recipe(recipe)
    inputs = preflight(parsed, me.world_size)
    steps: list[dict[str, Any]] = []
    trainer.Account = in_turns(steps, rounds)  # type: ignore[misc]
    trainer.train(parsed, me, inputs)
    if me.is_main:
        (folder / "measured.json").write_text(json.dumps(steps))
    cluster.leave()
    cluster.exit_now(0)


def in_turns(steps: list[dict[str, Any]], rounds: int) -> Any:
    """The account, of another kind in each step; every step is appended to `steps`."""
    from fullft import account, watchdog

    generator = random.Random(0)
    kinds = [kind for _ in range(rounds) for kind in generator.sample(KINDS, len(KINDS))]

    class Turns(account.Account):
        kind = "with"
        started: tuple[float, float] | None = None
        calls, calls_seconds, calls_processor_seconds = 0, 0.0, 0.0

        def __init__(self, engine: Any, *given: Any) -> None:
            self.engine = engine
            self.coordinator = engine.optimizer.parameter_offload.param_coordinator
            self.before = getattr(self.coordinator, account._PROFILER)
            super().__init__(engine, *given)
            self.heard = {name: getattr(engine.optimizer, name) for name in account._REDUCTIONS}
            self.listener = getattr(self.coordinator, account._PROFILER)

        def phase(self, name: str, step: int | None = None) -> None:
            if name == "data":
                self.turn(step or 0)
            if self.kind == "without":
                watchdog.mark(name, step)
            else:
                self.timed("phase", name, step)

        def turn(self, step: int) -> None:
            now = time.perf_counter(), time.process_time()
            if self.started and WARM_UP < step - 1 <= WARM_UP + len(kinds):
                seconds, processor = (one - other for one, other in zip(now, self.started, strict=True))
                steps.append({"kind": self.kind, "seconds": seconds, "processor_seconds": processor,
                              "calls": self.calls, "calls_seconds": self.calls_seconds,
                              "calls_processor_seconds": self.calls_processor_seconds})  # fmt: skip
            at = step - 1 - WARM_UP
            self.kind = kinds[at] if 0 <= at < len(kinds) else "with"
            self.calls, self.calls_seconds, self.calls_processor_seconds, self.inside = 0, 0.0, 0.0, False
            self.listen(self.kind != "without")
            self.started = time.perf_counter(), time.process_time()

        def listen(self, on: bool) -> None:
            setattr(self.coordinator, account._PROFILER, self.listener if on else self.before)
            for name, heard in self.heard.items():
                if on:
                    setattr(self.engine.optimizer, name, heard)
                else:
                    self.engine.optimizer.__dict__.pop(name, None)

        def timed(self, name: str, *given: Any) -> Any:
            call = getattr(account.Account, name)
            if self.kind != "timed" or self.inside:  # one that another one makes is in its time
                return call(self, *given)
            self.inside, began, processor = True, time.perf_counter(), time.thread_time()
            try:
                return call(self, *given)
            finally:
                self.calls += 1
                self.calls_processor_seconds += time.thread_time() - processor
                self.calls_seconds += time.perf_counter() - began
                self.inside = False

    def counted(name: str) -> Any:
        idle = {"flops_of": (0.0, 0.0), "end_step": 1.0, "row": {}}

        def call(self: Turns, *given: Any) -> Any:
            return idle[name] if self.kind == "without" else self.timed(name, *given)

        return call

    Turns.inside = False  # type: ignore[attr-defined]
    for name in ("flops_of", "end_step", "row"):
        setattr(Turns, name, counted(name))
    for name in ("_begin_wait", "_end_wait"):
        setattr(Turns, name, lambda self, *given, name=name: self.timed(name, *given))
    return Turns


if __name__ == "__main__":
    main()
