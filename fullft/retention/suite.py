"""Running the tasks on all ranks of the live ZeRO-3 engine.

Every forward under ZeRO-3 is a collective, so all ranks must run equally many. Items are cut into the same batches on
every rank; rank r runs batches r, r + W, ...; a rank that has one fewer runs its last batch again and throws the
result away. Batches do not depend on the world size, so neither do the results.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import GenerationConfig, PreTrainedTokenizerBase

from fullft import lease, signals, watchdog
from fullft.errors import Preempted
from fullft.loss import IGNORE, labelled_logits
from fullft.recipe import Recipe
from fullft.retention.tasks import VALIDATION, Prepared, answer, prepare_tasks

_SAMPLES_KEPT = 20


class Suite:
    """All tasks of a run, prepared once."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises BadInput when a task cannot be measured."""
        self.folder = recipe.run_folder / "retention"
        self.samples = recipe.run_folder / "samples"
        self.tokenizer = tokenizer
        self.text_batch_size = recipe.train.micro_batch_size
        self.generation_batch_size = recipe.retention.generation_batch_size
        self.tasks = prepare_tasks(recipe, tokenizer)
        self.base: dict[str, float] = {}  # scores of step 0

    def evaluate(self, engine: Any, step: int, weights: str = "live") -> dict[str, Any]:
        """Run every task, write retention/step-….json, its items and samples/, and return the content of the former.

        `weights`: what the engine has meanwhile, "live" or "ema".

        Raises:
            Preempted: a signal came to a rank; on all ranks after the same batch.
        """
        engine.eval()
        results = {}
        for prepared in self.tasks:
            run = _run_text if prepared.kind == "text" else _run_generate
            items = run(engine, prepared, self)
            results[prepared.name] = _score(prepared, items)
            if dist.get_rank() == 0:
                self._write_items(prepared, step, items)
        engine.train()
        self._know_base(step, results)
        for name, result in results.items():
            result["base"] = self.base[name]
            worse = result["base"] - result["score"] if result["higher_is_better"] else result["score"] - result["base"]
            result["drop"] = worse
        report = {"format": "fullft-retention/1", "step": step, "base_step": 0, "weights": weights, "tasks": results}
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
            json.dumps({"item": number, "hash": item.key} | result)
            for number, (item, result) in enumerate(zip(prepared.items, items, strict=True))
        ]
        name = f"{_file_name(step)}.{prepared.name}.jsonl"
        _write(self.folder / "items" / name, "\n".join(lines) + "\n")
        if prepared.kind == "generate":
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


def _share(count: int, run: Callable[[int], Any], device: str) -> list[Any]:
    """[run(0), ..., run(count - 1)] on every rank, the calls dealt out to the ranks, equally many on each."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = {}
    for batch in range(rank, count + (-count) % world, world):
        if signals.agreed(device):
            raise Preempted
        watchdog.mark("evaluation")
        result = run(min(batch, count - 1))
        if batch < count:
            mine[batch] = result
    parts: list[Any] = [None] * world
    dist.all_gather_object(parts, mine)
    merged = {batch: result for part in parts for batch, result in part.items()}
    return [merged[batch] for batch in range(count)]


def _batched(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices by falling length in batches of `size`: little padding, and the largest batch comes first."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[start : start + size] for start in range(0, len(order), size)]


def _run_text(engine: Any, prepared: Prepared, suite: Suite) -> list[dict[str, Any]]:
    """Per item: sum of ln p of its labels (nats), number of labels, how many were the likeliest token."""
    windows = [(number, window) for number, item in enumerate(prepared.items) for window in item.windows]
    batches = _batched([len(ids) for _, (ids, _) in windows], suite.text_batch_size)

    @torch.no_grad()
    def run(batch: int) -> list[tuple[int, float, int, int]]:
        chosen = [windows[index] for index in batches[batch]]
        width = max(len(ids) for _, (ids, _) in chosen)
        padded = [
            (ids + [0] * (width - len(ids)), labels + [IGNORE] * (width - len(labels))) for _, (ids, labels) in chosen
        ]
        ids, labels = (torch.tensor(column, device=engine.device) for column in zip(*padded, strict=True))
        positions = torch.arange(width, device=engine.device).expand_as(ids)
        logits, labels = labelled_logits(engine, ids, positions, labels)
        # Flat, so that the vocabulary is the last dimension: over another one, torch's CPU softmax adds up tens of
        # thousands of terms one by one, which is wrong by 1e-4 nats a token.
        flat = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="none")
        losses = flat.view(labels.shape)
        hits = (logits.argmax(-1) == labels) & (labels != IGNORE)
        sums = zip(
            losses.double().sum(1).tolist(), (labels != IGNORE).sum(1).tolist(), hits.sum(1).tolist(), strict=True
        )
        return [(number, -nats, tokens, right) for (number, _), (nats, tokens, right) in zip(chosen, sums, strict=True)]

    totals = [{"logprob": 0.0, "n_tokens": 0, "n_correct": 0, "n_bytes": item.text_bytes} for item in prepared.items]
    results = _share(len(batches), run, engine.device)
    for number, logprob, tokens, right in sorted(part for result in results for part in result):
        totals[number]["logprob"] += logprob
        totals[number]["n_tokens"] += tokens
        totals[number]["n_correct"] += right
    return totals


def _run_generate(engine: Any, prepared: Prepared, suite: Suite) -> list[dict[str, Any]]:
    """Per item: the greedy answer, and whether it equals the reference."""
    tokenizer = suite.tokenizer
    stop = engine.module.generation_config.eos_token_id
    stops = {
        token for token in (stop if isinstance(stop, list) else [stop]) + [tokenizer.eos_token_id] if token is not None
    }
    padding = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=prepared.max_new_tokens,
        eos_token_id=sorted(stops) or None,
        pad_token_id=padding,
    )
    batches = _batched([len(item.prompt) for item in prepared.items], suite.generation_batch_size)

    @torch.no_grad()
    def run(batch: int) -> list[tuple[int, str]]:
        prompts = [prepared.items[index].prompt for index in batches[batch]]
        width = max(map(len, prompts))
        ids = torch.tensor([[padding] * (width - len(prompt)) + prompt for prompt in prompts], device=engine.device)
        mask = torch.tensor(
            [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=engine.device
        )
        # synced_gpus: ranks whose answers end early go on running the forwards that the others need.
        answers = engine.module.generate(input_ids=ids, attention_mask=mask, synced_gpus=dist.get_world_size() > 1)
        texts = tokenizer.batch_decode(answers[:, width:], skip_special_tokens=True)
        return list(zip(batches[batch], texts, strict=True))

    # generate() fills what is unset from the model's own config, where a repetition penalty would make it not greedy.
    own, engine.module.generation_config = engine.module.generation_config, greedy
    try:
        texts = dict(pair for result in _share(len(batches), run, engine.device) for pair in result)
    finally:
        engine.module.generation_config = own
    results = []
    for number, item in enumerate(prepared.items):
        found = answer(texts[number], prepared.answer_pattern)
        right = found is not None and found == answer(item.reference, prepared.answer_pattern)
        results.append({"correct": right, "generation": texts[number]})
    return results


def _score(prepared: Prepared, items: list[dict[str, Any]]) -> dict[str, Any]:
    """The task's numbers from its items: `score` in `metric`, and more in `extra`."""
    common = {"kind": prepared.kind, "measures": prepared.measures, "n": len(items)}
    if prepared.kind == "generate":
        share = sum(item["correct"] for item in items) / len(items)
        se = math.sqrt(share * (1 - share) / len(items))
        return common | {"metric": "exact_match", "higher_is_better": True, "score": share, "se": se, "extra": {}}
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
