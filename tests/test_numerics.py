"""ZeRO-3 against plain PyTorch: the same loss and weights, whatever the ranks, accumulation and packing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Launch, losses
from transformers import AutoModelForCausalLM, AutoTokenizer

from fullft.data.batches import Geometry
from fullft.data.cache import open_sets
from fullft.data.sequences import open_sequences
from fullft.data.training import build_batches
from fullft.loss import IGNORE, cross_entropy, labelled_logits
from fullft.recipe import parse_recipe

pytestmark = pytest.mark.ranks

STEPS = 20


def reference_run(recipe: dict[str, Any], cache: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same training in one process with torch.optim.AdamW alone: no DeepSpeed, no fullft optimizer or schedule.

    Documents are read from the token cache, one by one, without packing or padding.
    """
    parsed = parse_recipe(recipe)
    train = parsed.train
    tokenizer = AutoTokenizer.from_pretrained(parsed.model.path)
    sets = [open_sequences(one, parsed.data) for one in open_sets(parsed.data, tokenizer, cache)]
    geometry = Geometry(train.global_batch_size, 1, train.global_batch_size, 1, train.seed)
    order, _ = build_batches(parsed, sets, geometry)
    model = AutoModelForCausalLM.from_pretrained(parsed.model.path, dtype=torch.float32)
    decayed = [p for p in model.parameters() if p.ndim == 2 and p is not model.get_input_embeddings().weight]
    others = [p for p in model.parameters() if all(p is not q for q in decayed)]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": train.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=train.learning_rate, betas=(train.beta1, train.beta2), eps=train.eps,
    )  # fmt: skip
    history = []
    for step in range(train.steps or 0):
        rows = [
            sets[0].tokens.read(start, length)
            for _, sequence in order.sequences_of_step(step)
            for start, _, length in sets[0].slices[sets[0].starts[sequence] : sets[0].starts[sequence + 1]].tolist()
        ]
        count = sum(int(trained.sum()) for _, trained in rows)
        loss_sum = 0.0
        for tokens, trained in rows:
            ids = torch.from_numpy(tokens).long()[None]
            labels = torch.where(torch.from_numpy(trained), ids, IGNORE)
            loss = (
                F.cross_entropy(model(ids).logits[0, :-1], labels[0, 1:], ignore_index=IGNORE, reduction="sum") / count
            )
            loss.backward()
            loss_sum += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.max_grad_norm)
        done = step / (train.steps or 1)  # cosine to zero without warm-up
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss_sum)
    return history, {name: tensor.detach() for name, tensor in model.named_parameters()}


@pytest.mark.parametrize(
    ("ranks", "accumulation", "packing"), [(1, 4, True), (2, 1, True), (2, 4, False), (3, 1, False), (3, 4, True)]
)
def test_zero3_equals_plain_pytorch(
    recipe: dict[str, Any], launch: Launch, tmp_path: Path, ranks: int, accumulation: int, packing: bool
) -> None:
    # eps 1e-5: with 1e-8, AdamW's first steps are the sign of gradients that are round-off around zero.
    recipe["train"] |= {
        "steps": STEPS, "global_batch_size": 2 * ranks * accumulation, "micro_batch_size": 2, "eps": 1e-5,
        "weight_decay": 0.1, "max_grad_norm": 0.5,
    }  # fmt: skip
    recipe["data"]["packing"] = packing
    # Threshold 0: every parameter is really partitioned; the default keeps those of a tiny model whole.
    config = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    (tmp_path / "zero3.json").write_text(json.dumps(config))
    recipe["deepspeed"] = str(tmp_path / "zero3.json")
    launch(recipe, ranks=ranks)
    expected, weights = reference_run(recipe, tmp_path / "cache")
    assert losses(recipe) == pytest.approx(expected, abs=1e-5)
    tuned = AutoModelForCausalLM.from_pretrained(Path(recipe["run_dir"]) / "export", dtype=torch.float32)
    for name, tensor in tuned.named_parameters():
        torch.testing.assert_close(
            tensor.detach(), weights[name], atol=2e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert expected[-1] < expected[0] - 0.1  # it is learning, so the comparison means something


def loss_of(model: Any, *batch: torch.Tensor) -> torch.Tensor:
    """Summed over the labels; `batch`: ids, position ids, labels."""
    logits, labels = labelled_logits(model, *batch)
    return cross_entropy(logits.flatten(0, 1), labels.flatten()).sum()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_have_the_loss_they_have_alone(tiny_model: Path, attention: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation=attention)
    documents = [torch.randint(5, 200, (length,)) for length in (7, 1, 30, 12)]
    alone = 0.0
    for ids in documents:
        labels = torch.cat([ids[1:], torch.tensor([IGNORE])])[None]
        loss = loss_of(model, ids[None], torch.arange(len(ids))[None], labels)
        loss.backward()
        alone += loss.item()
    gradients_alone = model.model.layers[0].self_attn.k_proj.weight.grad.clone()
    model.zero_grad()

    ids = torch.cat([*documents, torch.zeros(14, dtype=torch.int64)])[None]
    positions = torch.cat([*(torch.arange(len(one)) for one in documents), torch.arange(14)])[None]
    labels = torch.cat(
        [*(torch.cat([one[1:], torch.tensor([IGNORE])]) for one in documents), torch.full((14,), IGNORE)]
    )[None]
    loss = loss_of(model, ids, positions, labels)
    loss.backward()
    assert loss.item() == pytest.approx(alone, rel=1e-6)
    torch.testing.assert_close(
        model.model.layers[0].self_attn.k_proj.weight.grad, gradients_alone, atol=1e-5, rtol=1e-5
    )


def test_a_micro_batch_without_labels_counts_nothing_and_still_runs(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    ids = torch.ones(1, 5, dtype=torch.int64)
    loss = loss_of(model, ids, torch.arange(5)[None], torch.full((1, 5), IGNORE))
    loss.backward()
    assert loss.item() == 0
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())
