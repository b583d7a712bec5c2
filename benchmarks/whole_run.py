"""A whole run here, short: trained, ended by a signal, resumed, evaluated, exported, and exported from a checkpoint.

    python -m benchmarks.whole_run [--size tiny] [--length 512] [--folder FOLDER] [key=value …]

On one GPU (or CPU rank) in bf16, by the commands that users have. Beside it the same run without an interruption. What
has to be equal is compared; `checks` of the result says what was and was not.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import write
from benchmarks.models import SHAPES, parameters, prepare
from benchmarks.turns import RANK

ROOT = Path(__file__).parent.parent
STEPS = 8
DONE, REQUEUE = 0, 85


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SHAPES), default="tiny")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--folder", type=Path, help="where model and runs are written; default: temporary")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory(prefix="fullft-benchmark-", dir=arguments.folder) as name:
        run = Run(Path(name), arguments.size, arguments.length, arguments.overrides)
        problem = ""
        try:
            run.all()
        except RuntimeError as error:  # what was done until then is written
            problem = str(error)
            run.check("every command succeeds", False, problem[-300:])
    conditions = {"size": arguments.size, "parameters": parameters(arguments.size), "steps": STEPS}
    write("whole_run", {"seconds": run.seconds, "checks": run.checks, "metrics": run.metrics}, [],
          conditions=conditions)  # fmt: skip
    for one in run.checks:
        print(f"{'ok    ' if one['ok'] else 'FAILED'} {one['check']}: {one['detail']}")
    if problem:
        print(problem, file=sys.stderr)
    sys.exit(not all(one["ok"] for one in run.checks))


class Run:
    """The commands, one after the other, and what became of them."""

    def __init__(self, folder: Path, size: str, length: int, overrides: list[str]) -> None:
        self.folder, self.overrides = folder, overrides
        self.seconds: dict[str, float] = {}
        self.checks: list[dict[str, Any]] = []
        self.metrics: list[dict[str, Any]] = []
        (chats,), model = prepare(folder, size, [], None)
        rows = Path(chats).read_text().splitlines()
        random.Random(0).shuffle(rows)
        for name, part in {"train": rows[64:], "validation": rows[:32], "questions": rows[32:40]}.items():
            (folder / f"{name}.jsonl").write_text("\n".join(part) + "\n")
        texts = [json.loads(row)["messages"][-1]["content"] for row in rows[40:64]]
        (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        self.recipe = {
            "model": {"path": str(model)},
            "data": {"train": str(folder / "train.jsonl"), "validation": str(folder / "validation.jsonl"),
                     "sequence_length": length, "on_too_long": "truncate", "cache_dir": str(folder / "cache")},
            "train": {"steps": STEPS, "global_batch_size": 2, "learning_rate": 1e-4, "precision": "bf16",
                      "warmup_steps": 0},
            "checkpoint": {"every_steps": 3},
            "retention": {"every_steps": 4, "tasks": [
                {"name": "texts", "kind": "text", "data": str(folder / "texts.jsonl")},
                {"name": "answers", "kind": "generate", "measures": "skill", "max_new_tokens": 16,
                 "data": str(folder / "questions.jsonl")}]},
            "tracking": {"wandb": "disabled"},
        }  # fmt: skip

    def all(self) -> None:
        plain, cut = self.write_recipe("plain"), self.write_recipe("interrupted")
        self.command("train", self.train(plain), DONE)
        self.interrupt(cut)
        self.command("resume", self.train(cut), DONE)
        self.compare_runs()
        export = self.folder / "runs" / "interrupted" / "export"
        again = self.folder / "exported-again"
        run_dir = str(self.folder / "runs" / "interrupted")
        self.command("export", [*self.fullft(), "export", run_dir, str(again)], DONE)
        same = {
            file.name: file.read_bytes() == (again / file.name).read_bytes() for file in export.glob("*.safetensors")
        }
        self.check("the export of the last checkpoint is that of the run", bool(same) and all(same.values()), same)
        out = self.folder / "evaluation"
        self.command("eval", [*self.fullft(), "eval", str(cut), "--model", str(export), "--out", str(out)], DONE)
        self.compare_evaluations(out)

    def write_recipe(self, name: str) -> Path:
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(self.recipe | {"run_dir": str(self.folder / "runs" / name)}))
        return path

    def train(self, recipe: Path) -> list[str]:
        return [sys.executable, str(ROOT / "launch" / "train.py"), "--config", str(recipe), *self.overrides]

    def fullft(self) -> list[str]:
        return [sys.executable, "-m", "fullft.cli"]

    def start(self, command: list[str]) -> subprocess.Popen[str]:
        environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")} | RANK
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)

    def command(self, name: str, command: list[str], code: int) -> None:
        started = time.perf_counter()
        process = self.start(command)
        output, _ = process.communicate()
        self.seconds[name] = time.perf_counter() - started
        print(f"{name}: {self.seconds[name]:.1f} s, exit code {process.returncode}", flush=True)
        if process.returncode != code:
            raise RuntimeError(f"{name} ended with {process.returncode}, not {code}:\n{output[-4000:]}")

    def interrupt(self, recipe: Path) -> None:
        """Train until the row of step 4 is there, send SIGTERM, and see that the run saves itself and asks to go on."""
        process = self.start(self.train(recipe))
        started = time.perf_counter()
        while process.poll() is None and not any(row["step"] >= 4 for row in rows_of(self.folder / "runs/interrupted")):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        sent = time.perf_counter()
        output, _ = process.communicate()
        self.seconds["until the signal"] = sent - started
        self.seconds["from the signal to the end"] = time.perf_counter() - sent
        print(f"interrupted: exit code {process.returncode}", flush=True)
        if process.returncode != REQUEUE:
            raise RuntimeError(f"SIGTERM: exit code {process.returncode}, not {REQUEUE}:\n{output[-4000:]}")

    def compare_runs(self) -> None:
        plain, cut = (rows_of(self.folder / "runs" / name) for name in ("plain", "interrupted"))
        losses = [{row["step"]: row["train/loss"] for row in rows if "train/loss" in row} for rows in (plain, cut)]
        self.metrics = plain
        self.check("each step is there once", [row["step"] for row in cut if "train/loss" in row] == [
            *range(1, STEPS + 1)], sorted(losses[1]))  # fmt: skip
        finite = all(math.isfinite(loss) for loss in losses[0].values())
        falls = sum(losses[0][step] for step in range(1, 4)) > sum(losses[0][STEPS - at] for at in range(3))
        self.check("losses are finite and fall", finite and falls, losses[0])
        apart = max(abs(losses[0][step] - losses[1][step]) / losses[0][step] for step in losses[0])
        # GPU kernels add in no fixed order, in bf16 of 8 bits.
        self.check("interrupted and not, the losses are the same", apart < 1e-2, f"relative difference {apart:.1e}")

    def compare_evaluations(self, out: Path) -> None:
        of_run = tasks_of(self.folder / "runs/interrupted" / "retention" / f"step-{STEPS:08d}.json")
        files = sorted(out.rglob("step-*.json"))
        if not files:
            self.check("fullft eval measures the export as the run did", False, f"no results in {out}")
            return
        of_export = tasks_of(files[-1])
        apart = {
            f"{task}/{name}": [value, of_export[task][name]] for task in of_run for name, value in of_run[task].items()
            if task not in of_export or abs(value - of_export[task][name]) > 1e-2 * abs(value) + 1e-6
        }  # fmt: skip
        self.check("fullft eval measures the export as the run did", not apart, apart or of_run)

    def check(self, name: str, ok: bool, detail: Any) -> None:
        self.checks.append({"check": name, "ok": bool(ok), "detail": detail})


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def tasks_of(file: Path) -> dict[str, dict[str, float]]:
    """Numbers of each task of an evaluation."""
    tasks = json.loads(file.read_text())["tasks"]
    return {task: {one["metric"]: one["score"]} | one["extra"] for task, one in tasks.items()}


if __name__ == "__main__":
    main()
