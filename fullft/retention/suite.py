"""The suite of a run: its tasks, and one evaluation of all of them."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from fullft import lease
from fullft.recipe import Recipe
from fullft.retention.budget import Budget
from fullft.retention.run import Batching, run_task, whole_weights
from fullft.retention.tasks import VALIDATION, Prepared, prepare_tasks

_SAMPLES_KEPT = 20


class Suite:
    """All tasks of a run, prepared once."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises BadInput when a task cannot be measured."""
        self.folder = recipe.run_folder / "retention"
        self.samples = recipe.run_folder / "samples"
        self.tokenizer = tokenizer
        sequences = recipe.train.micro_batch_size
        self.batching = Batching(
            sequences, sequences * recipe.data.sequence_length, recipe.retention.generation_batch_size
        )
        self.tasks = prepare_tasks(recipe, tokenizer)
        self.budget = Budget(recipe)
        self.base: dict[str, float] = {}  # scores of step 0

    def evaluate(self, engine: Any, step: int) -> dict[str, Any]:
        """Run every task, write retention/step-….json, its items and samples/, and return the content of the former.

        Raises:
            Preempted: a signal came to a rank; on all ranks after the same batch.
        """
        started = time.perf_counter()
        engine.eval()
        results = {}
        tasks = self.budget.tasks(self.tasks, step)
        with whole_weights(engine):
            for prepared in tasks:
                items = run_task(engine, self.tokenizer, prepared, self.batching)
                results[prepared.name] = _score(prepared, items)
                if dist.get_rank() == 0:
                    self._write_items(prepared, step, items)
        engine.train()
        self.budget.took(step, time.perf_counter() - started)
        self._know_base(step, results)
        for name, result in results.items():
            result["base"] = self.base[name]
            worse = result["base"] - result["score"] if result["higher_is_better"] else result["score"] - result["base"]
            result["drop"] = worse
        report = {"format": "fullft-retention/1", "step": step, "base_step": 0, "tasks": results}
        report["whole"] = all(len(part.items) == len(task.items) for part, task in zip(tasks, self.tasks, strict=True))
        if dist.get_rank() == 0:
            _write(self.folder / f"{_file_name(step)}.json", json.dumps(report, indent=1))
        return report

    def _know_base(self, step: int, results: dict[str, Any]) -> None:
        """The scores of step 0: these, those known, or after a resume those that rank 0 reads. All ranks together."""
        if step == 0:
            self.base = {name: result["score"] for name, result in results.items()}
        elif not self.base:
            found: list[Any] = [None]
            if dist.get_rank() == 0:
                found = [json.loads((self.folder / f"{_file_name(0)}.json").read_text())["tasks"]]
            dist.broadcast_object_list(found, src=0)
            self.base = {name: task["score"] for name, task in found[0].items()}

    def _write_items(self, prepared: Prepared, step: int, items: list[dict[str, Any]]) -> None:
        lines = [
            json.dumps(
                {"item": item.number, "hash": item.key} | ({"cluster": item.cluster} if item.cluster else {}) | result
            )
            for item, result in zip(prepared.items, items, strict=True)
        ]
        name = f"{_file_name(step)}.{prepared.name}.jsonl"
        _write(self.folder / "items" / name, "\n".join(lines) + "\n")
        if "generation" in items[0]:
            shown = [
                json.dumps({"prompt": self.tokenizer.decode(item.prompt), "reference": item.reference} | result)
                for item, result in zip(prepared.items[:_SAMPLES_KEPT], items, strict=False)
            ]
            _write(self.samples / name, "\n".join(shown) + "\n")


def _write(file: Path, text: str) -> None:
    try:
        lease.write(file, text)
    except OSError as error:  # a full disk does not end a training
        print(f"WARNING: {file} cannot be written ({error}); training goes on", flush=True)


def _score(prepared: Prepared, items: list[dict[str, Any]]) -> dict[str, Any]:
    """The task's numbers from its items: `score` in `metric`, and more in `extra`."""
    common: dict[str, Any] = {"kind": prepared.kind, "measures": prepared.measures, "n": len(items)}
    if prepared.kind != "text":
        key = "value" if prepared.kind == "value" else "correct"
        share = sum(item[key] for item in items) / len(items)
        common |= {"metric": prepared.metric, "higher_is_better": prepared.higher_is_better}
        return common | {"score": share, "se": math.sqrt(share * (1 - share) / len(items)), "extra": {}}
    nats = -sum(item["logprob"] for item in items)
    tokens = sum(item["n_tokens"] for item in items)
    loss = nats / tokens
    extra = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": tokens}
    extra["token_accuracy"] = sum(item["n_correct"] for item in items) / tokens
    if all(item["n_bytes"] for item in items):
        bits = nats / math.log(2) / sum(item["n_bytes"] for item in items)
        return common | {"metric": "bits_per_byte", "higher_is_better": False, "score": bits, "extra": extra}
    return common | {"metric": "loss", "higher_is_better": False, "score": loss, "extra": extra}


def flat_metrics(report: dict[str, Any]) -> dict[str, float]:
    """The report as metric names: retention/<task>/…, skill/<task>/…, and eval/… for data.validation."""
    metrics: dict[str, float] = {}
    for name, task in report["tasks"].items():
        prefix = "eval" if name == VALIDATION else f"{task['measures']}/{name}"
        metrics |= {f"{prefix}/{task['metric']}": task["score"], f"{prefix}/drop": task["drop"]}
        metrics |= {f"{prefix}/{key}": value for key, value in task["extra"].items() if key != "tokens"}
    return metrics


def _file_name(step: int) -> str:
    return f"step-{step:08d}"
