"""Running the tasks on all ranks of the live ZeRO-3 engine.

Every forward under ZeRO-3 is a collective, so all ranks must run equally many. Items are cut into the same batches on
every rank; rank r runs batches r, r + W, ...; a rank that has one fewer runs its last batch again and throws the
result away. Batches do not depend on the world size, so neither do the results.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import GenerationConfig, PreTrainedTokenizerBase

from fullft import lease, signals, watchdog
from fullft.errors import BadInput, Preempted
from fullft.loss import IGNORE, labelled_logits
from fullft.recipe import Recipe
from fullft.retention import baseline, rollback
from fullft.retention.baseline import file_name
from fullft.retention.evaluation import Evaluation, assemble
from fullft.retention.gate import decide
from fullft.retention.report import evaluations
from fullft.retention.stats import ItemRecord
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
        self.settings = recipe.retention
        self.tasks = prepare_tasks(recipe, tokenizer)
        self.total_steps = 0  # of the run, once the data are known (`plan`)
        self.base: dict[str, list[ItemRecord]] = {}  # rank 0: the records of step 0
        self._unwritten: dict[Path, str] = {}  # rank 0: of step 0, which a resume cannot do without

    def plan(self, total_steps: int) -> None:
        """What the gate has to know of the run."""
        self.total_steps = total_steps

    @property
    def looks_planned(self) -> int:
        """Evaluations after step 0."""
        every = self.settings.every_steps
        return 1 if every is None else math.ceil(self.total_steps / every)

    def evaluate(self, engine: Any, step: int) -> Evaluation:
        """Run every task, write retention/step-….json, its items and samples/, and return the content of the former,
        which is the same on all ranks.

        Raises:
            Preempted: a signal came to a rank; on all ranks after the same batch.
            BadInput: the items of step 0 are not there, or are others.
        """
        started = time.perf_counter()
        engine.eval()
        measured: dict[str, list[ItemRecord]] = {}
        for prepared in self.tasks:
            run = _run_text if prepared.kind == "text" else _run_generate
            measured[prepared.name] = _records(prepared, run(engine, prepared, self))
        engine.train()
        report: Evaluation = _from_main(lambda: self._report(step, measured, started))
        return report

    def _report(self, step: int, measured: dict[str, list[ItemRecord]], started: float) -> Evaluation:
        """Assemble and write an evaluation; rank 0 alone."""
        if step == 0:
            self.base = measured
        elif not self.base:
            self.base = baseline.read(self.folder, self.tasks)
        gate, confidence = self.settings.gate, self.settings.confidence
        report = assemble(self.tasks, measured, self.base, step, confidence, gate.max_drop)
        report |= {"weights": "live", "seconds": time.perf_counter() - started, "share_of_training": None}
        before = [one for one in evaluations(self.folder.parent) if one["step"] < step]
        rollbacks = len(rollback.made(self.folder.parent))
        report = decide(report, before, gate, confidence, self.looks_planned, step == self.total_steps, rollbacks)
        self._write(step, measured)
        about, file = json.dumps(baseline.describe(self), indent=1), self.folder / "suite.json"
        if not file.exists() or file.read_text() != about:
            _write(file, about)
        _write(self.folder / f"{file_name(step)}.json", json.dumps(report, indent=1, allow_nan=False))
        return report

    def _write(self, step: int, measured: dict[str, list[ItemRecord]]) -> None:
        """The items of every task, and the first answers with their prompts."""
        for prepared in self.tasks:
            items = measured[prepared.name]
            name = f"{file_name(step)}.{prepared.name}.jsonl"
            text = "".join(json.dumps(item) + "\n" for item in items)
            if not _write(self.folder / "items" / name, text) and step == 0:
                self._unwritten[self.folder / "items" / name] = text
            if prepared.kind == "generate":
                shown = [self._sample(prepared, item) for item in items[:_SAMPLES_KEPT]]
                _write(self.samples / name, "".join(json.dumps(sample) + "\n" for sample in shown))
        self._unwritten = {file: text for file, text in self._unwritten.items() if step == 0 or not _write(file, text)}

    def _sample(self, prepared: Prepared, record: ItemRecord) -> dict[str, Any]:
        item = prepared.items[record["item"]]
        sample = {"prompt": self.tokenizer.decode(item.prompt), "reference": item.reference}
        return sample | {"correct": record["correct"], "generation": record["generation"]}


def _records(prepared: Prepared, results: list[dict[str, Any]]) -> list[ItemRecord]:
    """The results of all items as records: what is stored, and all that numbers are made of."""
    records = []
    for number, (item, result) in enumerate(zip(prepared.items, results, strict=True)):
        cluster = {} if item.cluster is None else {"cluster": item.cluster}
        records.append({"item": number, "hash": item.key} | cluster | result)
    return records


def _from_main(action: Callable[[], Any]) -> Any:
    """The result of an action of rank 0, on all ranks; a BadInput of it is raised on all. All ranks together."""
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = action()
        except BadInput as error:
            answer[1] = error.problems
    dist.broadcast_object_list(answer, src=0)
    if answer[1]:
        raise BadInput(answer[1])
    return answer[0]


def _write(file: Path, text: str) -> bool:
    """Whether it could be written."""
    try:
        lease.write(file, text)
    except OSError as error:  # a full disk does not end a training
        print(f"WARNING: {file} cannot be written ({error}); training goes on", flush=True)
        return False
    return True


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
