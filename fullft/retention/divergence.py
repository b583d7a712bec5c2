"""How far the model has gone from the base, measured at every evaluation: in what it predicts, and in its weights."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fullft import model, signals, watchdog
from fullft.data.batches import Batches
from fullft.errors import BadInput, Preempted
from fullft.head import Head
from fullft.loss import IGNORE, kl_divergence
from fullft.optim import layer_of
from fullft.recipe import Recipe
from fullft.retention.base import Columns, Predictions, Rows, predict
from fullft.retention.pull import parts_without, squared_norm
from fullft.retention.run import batched, share
from fullft.retention.tasks import Prepared
from fullft.shards import master_shards
from fullft.weights import DTYPES, Part, Stored, Weights, read_parts

Row = tuple[list[int], list[int], list[int]]  # ids, position ids, labels
_BLOCK = 1 << 22  # elements at a time, so that the fp32 copies of a large parameter stay small
_LOOK_EVERY = 8  # parameters between two looks for a signal, each of which is a collective


class Divergence:
    """The KL divergence from the base model on the training data and on general text, and the drift of the weights.

    Forward KL(base || model) in nats a token, from what the base model predicted at step 0 (`base.predict`).
    """

    def __init__(
        self,
        recipe: Recipe,
        batches: Batches,
        total_steps: int,
        tasks: Sequence[Prepared],
        meta: PreTrainedModel,
        config: dict[str, Any],
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        """`config`: of DeepSpeed."""
        self._recipe, self._meta, self._config, self._tokenizer = recipe, meta, config, tokenizer
        tokens = recipe.retention.kl_tokens if tasks else 0  # nothing is evaluated without tasks
        new_task = _training_rows(batches, total_steps, replay=False)
        # Rows that are replayed, under train.kl_weight for their divergence itself, would tell of no others.
        general = _first(_task_rows(tasks), tokens)
        if not general and recipe.data.replay:
            general = _first(_training_rows(batches, total_steps, replay=True), tokens)
        chosen = {"new_task": _first(new_task, tokens), "general": general}
        self._rows = {name: rows for name, rows in chosen.items() if rows}
        self._known: dict[str, Predictions] | None = None
        self._weights: Weights | None = None

    @property
    def tokens(self) -> int:
        """Tokens on which each evaluation compares the two models."""
        return sum(len(ids) for rows in self._rows.values() for ids, *_ in rows)

    def know_base(self, engine: Any, step: int, say: Callable[[str], None]) -> None:
        """Before the first `measure`; else there is nothing to do. All ranks together; at step 0 the engine has the
        base model.

        `say`: is told what will not be measured, and why.

        Raises:
            Preempted: a signal came to a rank.
        """
        if self._known is not None:
            return
        known = {}
        for name, rows in self._rows.items():
            folder = self._recipe.run_folder / "base" / name
            size, top_k = self._recipe.train.sequences_at_once, self._recipe.retention.kl_top_k
            try:
                known[name] = predict(engine, _as_rows(rows), top_k, folder, size, step)
            except BadInput as error:  # a measurement is not worth a training
                say(f"WARNING: no divergence from the base model on {name}: {error}")
        self._known = known

    def measure(self, engine: Any, say: Callable[[str], None]) -> dict[str, Any]:
        """The `divergence` of an evaluation. All ranks together.

        `say`: is told once what is not measured, and why.

        Raises:
            Preempted: a signal came to a rank; on all ranks at the same place.
        """
        assert self._known is not None
        found: dict[str, Any] = {"kl_new_task": None, "kl_general": None, "kl_tail_mass": None}
        sums = {name: self._kl(engine, name, known) for name, known in self._known.items()}
        found |= {f"kl_{name}": nats / tokens for name, (nats, _, tokens) in sums.items()}
        if sums:
            tokens = sum(tokens for *_, tokens in sums.values())
            found["kl_tail_mass"] = sum(mass for _, mass, _ in sums.values()) / tokens
            found["top_k"] = next(iter(self._known.values())).top_k
            found["tokens"] = {name: tokens for name, (*_, tokens) in sums.items()}
        if self._weights is None:
            self._weights = model.weights_of(self._recipe, self._meta, self._config)
            if self._weights.reason:
                say(f"WARNING: no drift of the weights: the base cannot be read by shards, {self._weights.reason}")
        if self._weights.reason:
            return found | {"drift": None, "changed_bf16": None}
        return found | self._drift(engine, self._weights)

    def _kl(self, engine: Any, name: str, known: Predictions) -> tuple[float, float, int]:
        """Sums over all positions of the rows: KL in nats, the base's mass outside of its likeliest tokens, 1."""
        rows = _as_rows(self._rows[name])
        head, batches = Head(engine), batched(rows.lengths, self._recipe.train.sequences_at_once)

        @torch.no_grad()
        def run(batch: int) -> tuple[float, float, int]:
            nats, mass, count = 0.0, 0.0, 0
            chosen = batches[batch]
            with head.logits(*rows.batch(chosen)) as parts:
                for at, first, logits in parts:
                    tokens, logprobs, rest = known.of(chosen[at], engine.device, (first, len(logits)))
                    nats += float(kl_divergence(logits, tokens, logprobs, rest).double().sum())
                    mass, count = mass + float(rest.double().sum()), count + len(logits)
            return nats, mass, count

        engine.eval()
        sums = share(len(batches), run, engine.device, "divergence from the base model")
        engine.train()
        nats, mass, tokens = (math.fsum(column) for column in zip(*sums, strict=True))
        return nats, mass, int(tokens)

    @torch.no_grad()
    def _drift(self, engine: Any, weights: Weights) -> dict[str, Any]:
        """||w - base|| / ||base||, and the share of weights that are others in bf16: from each rank's shards and the
        same elements of the base model's files. Rows of new tokens, which are no base model's, are left out."""
        dtype = model.precision(self._recipe)
        new_rows = model.new_rows(self._recipe, self._meta, self._config, self._tokenizer)
        names, sums = [], []
        for number, (name, first, shard) in enumerate(master_shards(engine)):
            if number % _LOOK_EVERY == 0 and signals.agreed(engine.device):
                raise Preempted
            watchdog.mark("drift of the weights")
            base = _read(weights.stored[name], first, len(shard))
            new = [(max(start - first, 0), max(end - first, 0)) for start, end in new_rows.get(name, ())]
            names.append(name)
            sums.append(_distance(shard, base, dtype, new).to(engine.device))
        table = torch.stack(sums)
        dist.all_reduce(table)
        rows = dict(zip(names, table.tolist(), strict=True))
        layers = layer_of(engine.module)
        embeds = {id(one) for one in engine.module.get_input_embeddings().parameters()}
        embedding = [name for name, parameter in engine.module.named_parameters() if id(parameter) in embeds]
        of_layer = {
            str(number): _ratio(rows[name] for name in names if layers.get(name) == number)
            for number in sorted(set(layers.values()))
        }
        drift = {"all": _ratio(rows.values()), "embed": _ratio(rows[name] for name in embedding), "layers": of_layer}
        count = sum(parameter.ds_numel for parameter in engine.module.parameters())
        return {"drift": drift, "changed_bf16": sum(changed for *_, changed in rows.values()) / count}


def metrics(divergence: dict[str, Any]) -> dict[str, float]:
    """As metric names: divergence/…"""
    found = {f"divergence/{name}": divergence.get(name) for name in ("kl_new_task", "kl_general", "changed_bf16")}
    found["divergence/drift"] = (divergence.get("drift") or {}).get("all")
    return {name: value for name, value in found.items() if value is not None and math.isfinite(value)}


def _ratio(sums: Iterable[Sequence[float]]) -> float | None:
    moved, size, _ = (math.fsum(column) for column in zip(*sums, strict=True))
    return math.sqrt(moved / size) if size else None


def _distance(
    shard: torch.Tensor, base: torch.Tensor, dtype: torch.dtype, left_out: Sequence[tuple[int, int]]
) -> torch.Tensor:
    """(||shard - base||², ||base||², elements that are others in bf16), [3] fp64, over the elements that the base has
    but for those runs.

    `base`: as stored, perhaps shorter; `dtype`: what training has rounded it to.
    """
    found = shard.new_zeros(3, dtype=torch.float64)
    for part in parts_without(
        len(base), [(min(low, len(base)), min(high, len(base))) for low, high in left_out], _BLOCK
    ):
        values, there = shard[part], base[part].to(shard.device).to(dtype).float()
        changed = (values.bfloat16() != there.bfloat16()).sum()
        found += torch.stack([squared_norm(values - there), squared_norm(there), changed.double()])
    return found


def _read(stored: Stored, first: int, count: int) -> torch.Tensor:
    """Elements of a stored tensor from `first` on, `count` or as many as there are."""
    values = torch.empty(max(0, min(count, stored.numel - first)), dtype=DTYPES[stored.dtype])
    # In blocks, of which several are read at once.
    read_parts(Part(stored, first + at, values[at : at + _BLOCK]) for at in range(0, len(values), _BLOCK))
    return values


def _training_rows(batches: Batches, total_steps: int, replay: bool) -> Iterator[Row]:
    """What a run sees of its task sets (or replay sets), in that order and each once, prompts as well as targets."""
    seen: set[tuple[int, int]] = set()
    sets = batches.sets[batches.first_replay :] if replay else batches.sets[: batches.first_replay]
    for step in range(total_steps):
        if len(seen) == sum(map(len, sets)):
            return
        for chosen in batches.sequences_of_step(step):
            if (chosen[0] >= batches.first_replay) != replay or chosen in seen:
                continue
            seen.add(chosen)
            batch = batches.collate([chosen])
            ids, positions = batch.input_ids[0, : batch.tokens].tolist(), batch.position_ids[0, : batch.tokens].tolist()
            # Every token that follows another one of its document.
            following = zip(ids[1:], positions[1:], positions, strict=False)
            labels = [token if at == before + 1 else IGNORE for token, at, before in following]
            yield ids, positions, [*labels, IGNORE]


def _task_rows(tasks: Sequence[Prepared]) -> Iterator[Row]:
    for task in tasks:
        for item in task.items if task.measures == "retention" and task.kind == "text" else ():
            for ids, labels in item.windows:
                yield ids, list(range(len(ids))), labels


def _first(rows: Iterator[Row], tokens: int) -> list[Row]:
    """So many of the rows that they have `tokens` labels, or all."""
    chosen: list[Row] = []
    while tokens > 0 and (row := next(rows, None)) is not None:
        chosen.append(row)
        tokens -= _labels(row)
    return chosen


def _labels(row: Row) -> int:
    return sum(label != IGNORE for label in row[2])


def _as_rows(rows: list[Row]) -> Rows:
    def batch(chosen: Sequence[int]) -> Columns:
        width = max(len(rows[row][0]) for row in chosen)
        columns: tuple[list[list[int]], ...] = ([], [], [])
        for row in chosen:
            ids, positions, labels = rows[row]
            padding = width - len(ids)
            columns[0].append(ids + [0] * padding)
            columns[1].append(positions + list(range(padding)))
            columns[2].append(labels + [IGNORE] * padding)
        ids_of, positions_of, labels_of = (torch.tensor(column) for column in columns)
        return ids_of, positions_of, labels_of

    key = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    return Rows([len(ids) for ids, *_ in rows], lambda row: _labels(rows[row]), batch, key)
