"""Forgetting: plain full fine-tuning beside each remedy; skill gained, retention lost, cost in time and memory.

    python -m benchmarks.forgetting [--quick] [--bases quickstart larger] [--seeds 3]
    python -m benchmarks.forgetting --model FOLDER --name NAME --task-rows TRAIN TEST --general-rows FILE
                                    [--unseen-rows FILE ...] [--seeds 1] [--steps 40] [--learning-rate 1e-4]

The first form trains its base models here: that of `make quickstart`, and one with ten times the weights. The second
takes a real model and real data: the task is learnt from TRAIN, four fifths of the general text are there to be
replayed; its last fifth, the unseen files (of which nothing is replayed) and benchmarks/abilities.py are measured.

Every run is `launch/train.py` on 2 ZeRO-3 ranks. What was measured is kept in --folder, run by run: started again, the
benchmark goes on. A round is one seed; in it the variants follow each other, and times are compared within it. How much
a remedy adds to a step is measured better by `python -m benchmarks.remedies`, which takes the steps in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks import abilities
from benchmarks.common import goal, run, write

sys.path.insert(0, str(Path(__file__).parent.parent / "launch"))
import quickstart

PLAIN, DEFAULT = "plain", "replay 5 % + KL"
ALPHAS = (0.5, 0.7, 0.9)
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
WARM_UP_STEPS = 10  # not timed
QUIET = (
    "tracking.wandb=disabled", "tracking.every_steps=1", "checkpoint.every_steps=1000000", "checkpoint.keep=1",
    "checkpoint.keep_best=false", "data.validation=[]", "data.on_too_long=split", "retention.every_steps=null",
    "retention.gate.action=none",
)  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A base model and what it is to learn. `variants`: overrides of the recipe, by name; the first one is plain."""

    name: str
    recipe: Path
    base: Path
    skill: str  # the task that measures it
    overrides: list[str]
    variants: dict[str, list[str]]
    blend: bool = False  # sweep the plain model against its base


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under five minutes on two cores: small base, one seed")
    parser.add_argument("--bases", nargs="+", choices=["quickstart", "larger"], default=["quickstart", "larger"])
    parser.add_argument("--variants", nargs="+", help="names as in the table (plain is always run); default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--note", default="", help="stands in the results, e.g. what else the machine did")
    parser.add_argument("--folder", type=Path, default=Path("runs/forgetting"), help="runs, and what was measured")
    parser.add_argument("--model", type=Path, help="Hugging Face folder of a chat model")
    parser.add_argument("--name", help="of --model, in the results; default: of its folder")
    parser.add_argument("--task-rows", type=Path, nargs=2, metavar=("TRAIN", "TEST"))
    parser.add_argument("--general-rows", type=Path, help="general text: .txt, or rows")
    parser.add_argument("--unseen-rows", type=Path, nargs="*", default=[], help="measured, never replayed")
    parser.add_argument("--steps", type=int, default=40, help="of --model")
    parser.add_argument("--learning-rate", default="1e-4", help="of --model")
    arguments = parser.parse_args()
    os.environ |= ENVIRONMENT
    bench = Bench(arguments.folder / ("quick" if arguments.quick else "full"), arguments.note)
    if arguments.model:
        if not (arguments.task_rows and arguments.general_rows):
            parser.error("--model needs --task-rows and --general-rows")
        bench.measure(real_subject(arguments, bench.folder), arguments.seeds, arguments.variants)
        return
    for name in arguments.bases[:1] if arguments.quick else arguments.bases:
        seeds = 1 if arguments.quick else arguments.seeds
        bench.measure(trained_here(name, arguments.quick), seeds, arguments.variants)


# What is compared


def remedies(rate: float, general: str) -> dict[str, list[str]]:
    """Overrides of each remedy. `rate`: learning rate of plain fine-tuning; `general`: rows for replay."""
    replay = [f"data.replay=[{{path: {json.dumps(general)}, fraction: 0.05, name: general}}]"]
    kl = [*replay, "train.kl_weight=1.0"]
    pull, layers, ema = ["train.l2_pull=10"], ["train.layerwise_lr_decay=0.7"], ["train.ema_decay=0.98"]
    return {
        PLAIN: [],
        DEFAULT: kl,
        "replay 5 %": replay,
        "learning rate × 0.3": [f"train.learning_rate={rate * 0.3:.0e}"],
        "L2 pull 10": pull,
        "layer-wise LR decay 0.7": layers,
        "EMA 0.98": ema,
        "all but the learning rate": [*kl, *pull, *layers, *ema],
    }


def trained_here(name: str, quick: bool) -> Subject:
    """The base of quickstart (1 M parameters), or one of 11 M, trained from random weights on Python's documentation
    if its export is not there; the task is quickstart's word problems."""
    quickstart.write_inputs()
    base, overrides = quickstart.ROOT, list[str]()
    if name == "larger":
        start, base = quickstart.INPUTS / "larger-random-model", Path("runs/larger-base")
        if not (start / "config.json").exists():
            quickstart.write_random_model(start, quickstart.split_documentation()[0], hidden_size=384, layers=6)
        overrides = [f"model.path={start}", f"run_dir={base}", "train.learning_rate=1e-3"]
    if not (base / "export" / "config.json").exists():
        print(f"== {name}: training the base model", flush=True)
        run(quickstart.train_command("launch/recipes/quickstart-base.yaml", *overrides), sample_seconds=1)
    every = remedies(1e-3, str(quickstart.INPUTS / "documentation.jsonl"))
    if quick or name == "larger":
        every = {key: every[key] for key in (PLAIN, DEFAULT)}
    common = [*QUIET, f"model.path={base / 'export'}", "export.dtype=auto", "retention.kl_tokens=4096"]
    if quick:
        common += ["train.steps=150", "retention.kl_tokens=2048"]
    return Subject(
        name, Path("launch/recipes/quickstart.yaml"), base / "export", "word_problems", common, every, not quick
    )


def real_subject(arguments: argparse.Namespace, folder: Path) -> Subject:
    """A recipe for a model and data given. What it must keep: bits per byte of text, facts by choice, and instructions
    followed; what it is to learn: nats a token of the task's answers."""
    model, (train, test) = arguments.model.resolve(), arguments.task_rows
    name = arguments.name or model.name
    inputs = folder / f"{name}-inputs"
    texts = general_texts(arguments.general_rows)
    cut = len(texts) * 4 // 5
    quickstart.write_rows(inputs / "general.jsonl", [{"text": text} for text in texts[:cut]])
    quickstart.write_rows(inputs / "general-heldout.jsonl", [{"text": text} for text in texts[cut:][:16]])
    tasks = [{"name": "general", "kind": "text", "data": str(inputs / "general-heldout.jsonl")}]
    for file in arguments.unseen_rows:
        source: Any = {"path": str(file), "limit": 24}
        if file.suffix == ".txt":
            quickstart.write_rows(inputs / f"{file.stem}.jsonl", [{"text": one} for one in general_texts(file)[:16]])
            source = str(inputs / f"{file.stem}.jsonl")
        tasks.append({"name": file.stem, "kind": "text", "data": source})
    abilities.write(inputs)
    tasks += [
        {"name": "facts", "kind": "multiple_choice", "data": str(inputs / "facts.jsonl")},
        {"name": "instructions", "kind": "generate", "data": str(inputs / "instructions.jsonl"),
         "answer_pattern": abilities.ANSWER, "max_new_tokens": 12},
    ]  # fmt: skip
    rows: dict[str, Any] = {}
    if "question" in test.read_text().split("\n", 1)[0]:  # as GSM8K writes them
        rows = {"format": "alpaca", "fields": {"instruction": "question", "output": "answer"}}
    tasks.append({"name": "task", "kind": "text", "measures": "skill", "data": {"path": str(test), "limit": 48} | rows})
    recipe = {
        "run_dir": "given by the benchmark", "model": {"path": str(model)},
        "data": {"train": {"path": str(train)} | rows, "sequence_length": 256, "on_bad_row": "skip"},
        "train": {"steps": arguments.steps, "global_batch_size": 4, "micro_batch_size": 2, "warmup_steps": 4,
                  "learning_rate": float(arguments.learning_rate)},
        "retention": {"tasks": tasks, "kl_tokens": 2048},
    }  # fmt: skip
    file = inputs / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    every = remedies(float(arguments.learning_rate), str(inputs / "general.jsonl"))
    chosen = {key: every[key] for key in (PLAIN, DEFAULT)}
    return Subject(name, file, model, "task", list(QUIET), chosen)


def general_texts(file: Path) -> list[str]:
    """Rows of a data file, or about 1,500 characters of a .txt file each, in its order."""
    if file.suffix != ".txt":
        return [json.loads(line)["text"] for line in file.read_text().splitlines()]
    texts, part = [], ""
    for line in file.read_text().splitlines(keepends=True):
        part += line
        if len(part) >= 1500:
            texts.append(part)
            part = ""
    return texts


# Measuring


class Bench:
    """Runs the variants, keeps each row in measured.jsonl, and writes the results after every round."""

    def __init__(self, folder: Path, note: str) -> None:
        self.folder, self.file, self.note = folder, folder / "measured.jsonl", note
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        self.commit = head.stdout.strip()

    def measure(self, subject: Subject, seeds: int, chosen: list[str] | None) -> None:
        """All rounds of a subject that are not measured yet; of the chosen variants, if any are."""
        names = [name for name in subject.variants if not chosen or name in (PLAIN, *chosen)]
        for seed in range(1, seeds + 1):
            for name in names:
                self._run(subject, name, seed)
            if subject.blend:
                self._blend(subject, seed)
            self._write()

    def _run(self, subject: Subject, name: str, seed: int) -> None:
        overrides = [*subject.overrides, *subject.variants[name], f"train.seed={seed}"]
        key = {"base": subject.name, "variant": name, "seed": seed, "overrides": overrides}
        if any(row.items() >= key.items() for row in self.rows):
            return
        out = self._folder(subject, name, seed)
        shutil.rmtree(out, ignore_errors=True)
        overrides = [*overrides, f"run_dir={out}", f"data.cache_dir={self.folder / 'cache'}"]
        started = time.strftime("%H:%M:%S")
        measured = run(quickstart.train_command(str(subject.recipe), *overrides), sample_seconds=1)
        row = key | read_run(out, subject.skill) | {
            "commit": self.commit, "started": started, "seconds": round(measured.seconds, 1),
            "peak_mib": measured.peak_bytes >> 20, "load": os.getloadavg()[1],
        }  # fmt: skip
        shutil.rmtree(out / "checkpoints")
        if not (subject.blend and name == PLAIN):
            shutil.rmtree(out / "export")
        self._keep(row)

    def _folder(self, subject: Subject, name: str, seed: int) -> Path:
        return self.folder / f"{subject.name}-{''.join(c if c.isalnum() else '_' for c in name)}-{seed}"

    def _blend(self, subject: Subject, seed: int) -> None:
        """Blends of the round's plain model with the base: a sweep measures them all."""
        key = {"base": subject.name, "seed": seed, "blend": True}
        tuned = self._folder(subject, PLAIN, seed)
        if any(row.items() >= key.items() for row in self.rows):
            return
        if not (tuned / "export").exists():
            print(f"no blends of seed {seed}: {tuned} is not here any more", flush=True)
            return
        out = self._folder(subject, "blend", seed)
        shutil.rmtree(out, ignore_errors=True)
        started, alphas = time.strftime("%H:%M:%S"), ",".join(map(str, ALPHAS))
        models = [str(subject.base), str(tuned)]
        command = [sys.executable, "-m", "fullft.cli", "blend", *models, "--sweep", alphas, "--out", str(out)]
        measured = run(command, sample_seconds=1)
        points = json.loads((out / "blend.json").read_text())["points"]
        for point in (point for point in points if point["alpha"] in ALPHAS):
            self._keep(key | scores(point["tasks"], subject.skill) | {
                "variant": f"plain, blended with α = {point['alpha']}", "overrides": [], "commit": self.commit,
                "started": started, "seconds": round(measured.seconds, 1),
            })  # fmt: skip

    def _keep(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        lost = ", ".join(f"{task} {one['drop']:+.4f}" for task, one in row["retention"].items())
        time_of_step = f"; {row['step_seconds'] * 1000:.0f} ms a step" if "step_seconds" in row else ""
        print(
            f"{row['started']} {row['base']}, seed {row['seed']}, {row['variant']}: gained {row['gain']:.4f}, "
            f"lost {lost}{time_of_step}; {row['seconds']:.0f} s",
            flush=True,
        )

    def _write(self) -> None:
        subjects = list(dict.fromkeys(row["base"] for row in self.rows))
        tables = {name: summary([row for row in self.rows if row["base"] == name]) for name in subjects}
        for name, table in tables.items():
            print(f"\n{name}\n" + "\n".join(markdown(table)), flush=True)
        goals = [one for name, table in tables.items() for one in goals_of(name, table)]
        write("forgetting", {"summary": tables, "runs": self.rows}, goals, note=self.note)


def read_run(folder: Path, skill: str) -> dict[str, Any]:
    """What a run folder says: skill gained, retention lost, seconds of a step."""
    last = json.loads(max((folder / "retention").glob("step-*.json")).read_text())
    tasks = last["tasks"]
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seconds = [row["time/step_seconds"] for row in log if "time/step_seconds" in row][WARM_UP_STEPS:]
    usual = sorted(seconds)[: max(1, len(seconds) * 95 // 100)]  # the slowest are the machine's
    return scores(tasks, skill) | {
        "step_seconds": statistics.fmean(usual), "median_step_seconds": statistics.median(seconds),
        "timed_steps": len(seconds), "divergence": last.get("divergence"),
    }  # fmt: skip


def scores(tasks: dict[str, Any], skill: str) -> dict[str, Any]:
    """Gain of the skill task, and the retention tasks, of an evaluation. A positive gain is better, a drop worse."""
    sign = 1 if tasks[skill]["higher_is_better"] else -1
    return {
        "skill": {key: tasks[skill][key] for key in ("metric", "n", "base", "score")},
        "gain": sign * (tasks[skill]["score"] - tasks[skill]["base"]),
        "retention": {
            name: {key: task.get(key) for key in ("metric", "n", "base", "score", "drop", "drop_ci")}
            for name, task in tasks.items()
            if task["measures"] == "retention"
        },
    }


# What it comes to


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per variant [mean, standard deviation over seeds] of each number. Costs are those beside the plain run of the
    same round; `kept` and `spared` (shares of plain's gain and of its loss) are of the means over all seeds."""
    plain = {row["seed"]: row for row in rows if row["variant"] == PLAIN}
    table: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == name and row["seed"] in plain]
        if not mine:
            continue
        pairs = [(row, plain[row["seed"]]) for row in mine]
        table[name] = entry = {"seeds": len(mine), "gain": spread(row["gain"] for row in mine)}
        gains = [(row["gain"], one["gain"]) for row, one in pairs]
        entry["kept"] = share(gains)
        for task in mine[0]["retention"]:
            drops = [(row["retention"][task]["drop"], one["retention"][task]["drop"]) for row, one in pairs]
            entry[f"lost {task}"] = spread(drop for drop, _ in drops)
            lost = share(drops)
            entry[f"spared {task}"] = None if lost is None else 1 - lost
        if "step_seconds" in mine[0]:
            entry["step"] = spread(row["step_seconds"] / one["step_seconds"] - 1 for row, one in pairs)
            entry["step_ms"] = spread(row["step_seconds"] * 1000 for row in mine)
            entry["memory_mib"] = spread(row["peak_mib"] - one["peak_mib"] for row, one in pairs)
    return table


def spread(values: Iterator[float] | list[float]) -> list[float]:
    """[mean, standard deviation (0 of a single value)]"""
    every = list(values)
    return [statistics.fmean(every), statistics.stdev(every) if len(every) > 1 else 0.0]


def share(pairs: list[tuple[float, float]]) -> float | None:
    """The sum of the first numbers over that of the second, plain's; None if plain has gained (or lost) nothing."""
    plain = sum(second for _, second in pairs)
    return sum(first for first, _ in pairs) / plain if plain > 0 else None


def goals_of(base: str, table: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for key, value in table.get(DEFAULT, {}).items():
        task = key.removeprefix("lost ")
        if key.startswith("lost ") and table[DEFAULT][f"spared {task}"] is None:
            name = f"{base}: what the default remedy loses on {task}, where plain fine-tuning loses nothing"
            found.append(goal(name, "<= 0", value[0], value[0] <= 0))
        if key == "kept" and value is not None:
            name = f"{base}: share of the skill gain that the default remedy keeps"
            found.append(goal(name, ">= 0.95", value, value >= 0.95))
        elif key.startswith("spared ") and value is not None:
            name = f"{base}: share of the loss on {key.removeprefix('spared ')} that it spares"
            found.append(goal(name, ">= 0.6", value, value >= 0.6))
    return found


def markdown(table: dict[str, dict[str, Any]]) -> list[str]:
    """The table as it stands in docs/forgetting.md."""
    tasks = [key.removeprefix("lost ") for key in next(iter(table.values()), {}) if key.startswith("lost ")]
    head = ["variant", "seeds", "gained", "kept"]
    head += [cell for task in tasks for cell in (f"lost: {task}", "spared")] + ["step time", "memory, MiB"]
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
    for name, entry in table.items():
        cells = [name, str(entry["seeds"]), _pm(entry["gain"], ".3f"), _percent(entry["kept"])]
        for task in tasks:
            spared = entry.get(f"spared {task}") if name != PLAIN else None
            cells += [_pm(entry[f"lost {task}"], ".3f"), _percent(spared)]
        if "step" not in entry:
            cells += ["", ""]
        elif name == PLAIN:
            cells += [f"{entry['step_ms'][0]:.0f} ms", ""]
        else:
            cells += [f"{entry['step'][0]:+.0%} ± {entry['step'][1]:.0%}", _pm(entry["memory_mib"], "+.0f", ".0f")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _pm(values: list[float], form: str, second: str | None = None) -> str:
    return f"{values[0]:{form}} ± {values[1]:{second or form}}"


if __name__ == "__main__":
    main()
