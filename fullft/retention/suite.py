"""The suite of a run: its tasks, and one evaluation of all of them."""

from __future__ import annotations

import functools
import json
import math
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from fullft import lease
from fullft.cluster import on_all
from fullft.recipe import Recipe
from fullft.report.runlog import evaluations
from fullft.retention import baseline, rollback
from fullft.retention.baseline import file_name
from fullft.retention.budget import Budget
from fullft.retention.evaluation import Evaluation, assemble
from fullft.retention.gate import decide
from fullft.retention.run import Batching, run_task, whole_weights
from fullft.retention.stats import ItemRecord, finite
from fullft.retention.tasks import VALIDATION, Prepared, prepare_tasks

_SAMPLES_KEPT = 20


class Suite:
    """All tasks of a run, prepared once."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises BadInput when a task cannot be measured."""
        self.folder = recipe.run_folder / "retention"
        self.samples = recipe.run_folder / "samples"
        self.tokenizer = tokenizer
        sequences = recipe.train.sequences_at_once
        self.batching = Batching(
            sequences, sequences * recipe.data.sequence_length, recipe.retention.generation_batch_size
        )
        self.settings = recipe.retention
        self.tasks = prepare_tasks(recipe, tokenizer)
        self.budget = Budget(recipe)
        self.total_steps = 0  # of the run, once the data are known (`plan`)
        self.base: dict[str, list[ItemRecord]] = {}  # rank 0: the records of step 0
        self._unwritten: dict[Path, str] = {}  # rank 0: of step 0, which a resume cannot do without

    @functools.cached_property
    def described(self) -> dict[str, dict[str, Any]]:
        """{task: what decides its numbers}."""
        return {task.name: baseline.describe_task(task) for task in self.tasks}

    def plan(self, total_steps: int) -> None:
        """What the gate and the budget have to know of the run."""
        self.total_steps = self.budget.total_steps = total_steps

    @property
    def looks_planned(self) -> int:
        """Evaluations after step 0."""
        every = self.budget.every_steps
        return 1 if every is None else math.ceil(self.total_steps / every)

    def evaluate(
        self,
        engine: Any,
        step: int,
        weights: str = "live",
        divergence: dict[str, Any] | None = None,
        started: float | None = None,
    ) -> Evaluation:
        """Run every task, write retention/step-….json, its items and samples/, and return the content of the former,
        which is the same on all ranks.

        `weights`: what the engine has meanwhile, "live" or "ema". `divergence`: what was measured of it. `started`:
        time.perf_counter() when the evaluation began, if that was before this call; the budget counts from then on.

        Raises:
            Preempted: a signal came to a rank; on all ranks after the same batch.
            BadInput: the items of step 0 are not there, or are others.
        """
        called = time.perf_counter()
        started = called if started is None else started
        engine.eval()
        tasks = self.budget.tasks(self.tasks, step)
        measured: dict[str, list[ItemRecord]] = {}
        with whole_weights(engine):
            for prepared in tasks:
                items = _records(prepared, run_task(engine, self.tokenizer, prepared, self.batching))
                measured[prepared.name] = items
                if dist.get_rank() == 0:
                    self._write_items(prepared, step, items)
        engine.train()
        self.budget.took(step, time.perf_counter() - started, called - started)
        report: Evaluation = on_all(lambda: self._report(step, measured, weights, started, divergence))
        return report

    def _report(
        self,
        step: int,
        measured: dict[str, list[ItemRecord]],
        weights: str,
        started: float,
        divergence: dict[str, Any] | None,
    ) -> Evaluation:
        """Assemble and write an evaluation; rank 0 alone."""
        if step == 0:
            self.base = measured
        elif not self.base:
            self.base = baseline.read(self.folder, self.tasks)
        gate, confidence = self.settings.gate, self.settings.confidence
        report = assemble(self.tasks, measured, self.base, step, confidence, gate.max_drop)
        report |= {"weights": weights, "seconds": time.perf_counter() - started}
        report["share_of_training"] = self.budget.share_of_training
        report |= {} if divergence is None else {"divergence": _finite(divergence)}
        before = [one for one in evaluations(self.folder.parent) if one["step"] < step]
        rollbacks = len(rollback.made(self.folder.parent))
        report = decide(report, before, gate, confidence, self.looks_planned, step == self.total_steps, rollbacks)
        report["gate"]["settings"] = self.settings.gate_settings
        if step > 0:  # the disk was full then
            self._unwritten = {file: text for file, text in self._unwritten.items() if not _write(file, text)}
        about, file = json.dumps(baseline.describe(self), indent=1), self.folder / "suite.json"
        if not file.exists() or file.read_text() != about:
            _write(file, about)
        _write(self.folder / f"{file_name(step)}.json", json.dumps(report, indent=1, allow_nan=False))
        return report

    def _write_items(self, prepared: Prepared, step: int, items: list[ItemRecord]) -> None:
        """The items of a task, and its first answers with their prompts."""
        name = f"{file_name(step)}.{prepared.name}.jsonl"
        text = "".join(json.dumps(item) + "\n" for item in items)
        if not _write(self.folder / "items" / name, text) and step == 0:
            self._unwritten[self.folder / "items" / name] = text
        if "generation" in items[0]:
            shown = [self._sample(prepared, item) for item in items[:_SAMPLES_KEPT]]
            _write(self.samples / name, "".join(json.dumps(sample) + "\n" for sample in shown))

    def _sample(self, prepared: Prepared, record: ItemRecord) -> dict[str, Any]:
        item = next(item for item in prepared.items if item.number == record["item"])
        sample = {"prompt": self.tokenizer.decode(item.prompt), "reference": item.reference}
        return sample | {key: value for key, value in record.items() if key not in ("item", "hash", "cluster")}


def _records(prepared: Prepared, results: list[dict[str, Any]]) -> list[ItemRecord]:
    """The results of the items as records: what is stored, and all that numbers are made of."""
    return [
        {"item": item.number, "hash": item.key} | ({} if item.cluster is None else {"cluster": item.cluster}) | result
        for item, result in zip(prepared.items, results, strict=True)
    ]


def _finite(value: Any) -> Any:
    """What can be written as JSON: a number that is not finite is None."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return finite(value) if isinstance(value, float) else value


def _write(file: Path, text: str) -> bool:
    """Whether it could be written."""
    try:
        lease.write(file, text)
    except OSError as error:  # a full disk does not end a training
        print(f"WARNING: {file} cannot be written ({error}); training goes on", flush=True)
        return False
    return True


def flat_metrics(report: Evaluation) -> dict[str, float]:
    """The report as metric names: retention/<task>/…, skill/<task>/…, eval/… for data.validation, and what they come
    to. What is not known is left out."""
    metrics: dict[str, float | None] = {}
    for name, task in report["tasks"].items():
        prefix = "eval" if name == VALIDATION else f"{task['measures']}/{name}"
        low, high = task["drop_ci"] or (None, None)
        metrics |= {f"{prefix}/{task['metric']}": task["score"], f"{prefix}/drop": task["drop"]}
        metrics |= {f"{prefix}/drop_lo": low, f"{prefix}/drop_hi": high, f"{prefix}/ratio": task["retention"]}
        metrics |= {f"{prefix}/{key}": value for key, value in task["extra"].items() if key != "tokens"}
    summary = report["summary"]
    metrics["retention/average_forgetting"] = summary["average_forgetting"]
    metrics["retention/worst"] = summary["worst"] and summary["worst"]["drop"]
    return {name: value for name, value in metrics.items() if value is not None}
