"""Remedies against forgetting: each against plain PyTorch on real ranks, and resumed bit for bit."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import TEXTS, Launch, losses, metrics, write_jsonl
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fullft.data.batches import Batches, Geometry
from fullft.data.cache import open_sets
from fullft.data.mixture import replay_label_weight
from fullft.data.sequences import open_sequences
from fullft.data.training import build_batches
from fullft.errors import BadInput
from fullft.export import export_checkpoint
from fullft.loss import IGNORE, LabelWeights
from fullft.optim import layer_depths, parameter_groups
from fullft.recipe import parse_recipe

STEPS = 6
REMEDIES = {"layerwise_lr_decay": 0.7, "l2_pull": 20.0, "ema_decay": 0.6}


@pytest.fixture
def remedied(recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A recipe with every remedy on."""
    texts = [{"text": " ".join(TEXTS[(i + j) % 4] for j in range(1 + i % 3))} for i in range(12)]
    replay = {"path": str(write_jsonl(tmp_path / "general.jsonl", texts)), "name": "general", "fraction": 0.5}
    recipe["data"] |= {"replay": [replay], "replay_weight": 0.3}
    # eps 1e-5: with 1e-8, AdamW's first steps are the sign of gradients that are round-off around zero.
    recipe["train"] |= REMEDIES | {"steps": STEPS, "global_batch_size": 12, "eps": 1e-5, "weight_decay": 0.1}
    recipe["checkpoint"] = {"every_steps": STEPS // 2}
    # Threshold 0: every parameter is really partitioned; the default keeps those of a tiny model whole.
    config = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    (tmp_path / "zero3.json").write_text(json.dumps(config))
    return recipe | {"deepspeed": str(tmp_path / "zero3.json")}


def batches_of(recipe: dict[str, Any], cache: Path) -> Batches:
    parsed = parse_recipe(copy.deepcopy(recipe))
    tokenizer = AutoTokenizer.from_pretrained(parsed.model.path)
    sets = [open_sequences(one, parsed.data) for one in open_sets(parsed.data, tokenizer, cache)]
    size = parsed.train.global_batch_size
    return build_batches(parsed, sets, Geometry(size, 1, size, 1, parsed.train.seed))[0]


def reference_run(recipe: dict[str, Any], cache: Path) -> dict[str, Any]:
    """The same training in one process: no DeepSpeed, no loss, optimizer groups or remedies of fullft."""
    train = parse_recipe(copy.deepcopy(recipe)).train
    order = batches_of(recipe, cache)
    model = AutoModelForCausalLM.from_pretrained(recipe["model"]["path"], dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(recipe["model"]["path"], dtype=torch.float32)
    average = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    layers, xi = model.config.num_hidden_layers, train.layerwise_lr_decay
    groups, scales = [], []
    for name, tensor in model.named_parameters():
        layer = re.search(r"layers\.(\d+)\.", name)
        scales.append(xi ** (layers - int(layer[1])) if layer else xi ** (layers + 1) if "embed" in name else 1.0)
        decays = tensor.ndim == 2 and "embed" not in name
        groups.append({"params": [tensor], "weight_decay": train.weight_decay if decays else 0.0})
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(train.beta1, train.beta2), eps=train.eps)
    found: dict[str, Any] = {"loss": [], "task": [], "replay": [], "distance": []}
    for step in range(STEPS):
        nats: dict[bool, list[torch.Tensor]] = {False: [], True: []}  # of each label: of task rows, of replay rows
        for of_set, sequence in order.sequences_of_step(step):
            one = order.sets[of_set]
            for start, _, length in one.slices[one.starts[sequence] : one.starts[sequence + 1]].tolist():
                tokens, trained = one.tokens.read(start, length)
                ids = torch.from_numpy(tokens).long()[None]
                labels = torch.where(torch.from_numpy(trained), ids, IGNORE)[0, 1:]
                logits = model(ids).logits[0, :-1][labels != IGNORE]
                nats[of_set == 1].append(F.cross_entropy(logits, labels[labels != IGNORE], reduction="none"))
        task, replay = (torch.cat(nats[kind]) if nats[kind] else torch.zeros(0) for kind in (False, True))
        weight = order.replay_label_weight
        loss = (task.sum() + weight * replay.sum()) / (len(task) + weight * len(replay))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.max_grad_norm)
        rate = train.learning_rate * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        for group, scale in zip(optimizer.param_groups, scales, strict=True):
            group["lr"] = rate * scale
        optimizer.step()
        optimizer.zero_grad()
        moved = size = 0.0
        with torch.no_grad():
            for (name, tensor), there, scale in zip(model.named_parameters(), base.parameters(), scales, strict=True):
                tensor += rate * scale * train.l2_pull * (there - tensor)
                average[name] += (1 - train.ema_decay) * (tensor - average[name])
                moved, size = moved + float((tensor - there).square().sum()), size + float(there.square().sum())
        found["loss"].append(loss.item())
        found["task"].append(task.mean().item())
        found["replay"].append(replay.mean().item())
        found["distance"].append(math.sqrt(moved / size))
    return found | {"weights": average}


@pytest.mark.ranks
def test_remedies_equal_plain_pytorch_and_resume_bit_for_bit(
    remedied: dict[str, Any], launch: Launch, tmp_path: Path
) -> None:
    launch(remedied)
    whole = Path(remedied["run_dir"])
    expected = reference_run(remedied, tmp_path / "cache")
    rows = metrics(remedied)
    for key, name in (("loss", "loss"), ("task", "loss_task"), ("replay", "loss_replay"), ("distance", "l2_distance")):
        assert [row[f"train/{name}"] for row in rows] == pytest.approx(expected[key], abs=1e-5), name
    tuned = load_file(whole / "export" / "model.safetensors")
    for name, tensor in expected["weights"].items():
        if name in tuned:
            torch.testing.assert_close(
                tuned[name], tensor, atol=2e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )

    # The command for a checkpoint gives what the run gave: the average.
    export_checkpoint(whole, tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[name], tuned[name]) for name in tuned)

    # From the checkpoint in the middle: at the same number of ranks bit for bit, at another as near as ranks are.
    for ranks in (2, 3):
        part = remedied | {"run_dir": str(tmp_path / f"resumed-{ranks}")}
        cut_at_middle(whole, Path(part["run_dir"]))
        assert "resumed from" in launch(part, ranks=ranks).stdout
        resumed = load_file(Path(part["run_dir"]) / "export" / "model.safetensors")
        if ranks == 2:
            assert losses(part) == losses(remedied)
            assert [row["train/l2_distance"] for row in metrics(part)] == [row["train/l2_distance"] for row in rows]
            assert all(torch.equal(resumed[name], tuned[name]) for name in tuned)
        assert losses(part) == pytest.approx(expected["loss"], abs=1e-5)
        for name in tuned:
            torch.testing.assert_close(resumed[name], tuned[name], atol=2e-6, rtol=1e-5)


def cut_at_middle(whole: Path, folder: Path) -> None:
    """Copy a run as it was when its checkpoint in the middle was written."""
    shutil.copytree(whole, folder)
    for path in (folder / "export", folder / "checkpoints" / f"step-{STEPS:08d}"):
        shutil.rmtree(path)
    (folder / "state.json").unlink()
    rows = [
        line for line in (folder / "metrics.jsonl").read_text().splitlines() if json.loads(line)["step"] <= STEPS // 2
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{row}\n" for row in rows))


def test_replay_has_its_share_of_the_loss(remedied: dict[str, Any], tmp_path: Path) -> None:
    remedied["train"]["steps"] = 40
    batches = batches_of(remedied, tmp_path / "cache")
    labels = [0, 0]
    for step in range(40):
        for batch in batches.of_step(step, 0):
            labels[int(batch.replay[0])] += int((batch.labels != IGNORE).sum())
    replay = batches.replay_label_weight * labels[1]
    assert replay / (labels[0] + replay) == pytest.approx(0.3, abs=0.01)
    del remedied["data"]["replay_weight"]  # default: the share of the tokens
    assert batches_of(remedied, tmp_path / "cache").replay_label_weight == pytest.approx(
        batches.replay_label_weight * (0.5 / 0.5) / (0.3 / 0.7)
    )


def test_weight_of_a_replay_label() -> None:
    # 3 sequences of 10 labels to 1 of 100: replay has 100 of 130 labels, and is to be 20 % of the loss.
    weight = replay_label_weight((3, 1), (10.0, 100.0), 1, 0.2)
    assert weight * 100 / (30 + weight * 100) == pytest.approx(0.2)
    assert replay_label_weight((3,), (10.0,), 1, 0.0) == 1


def test_loss_of_a_step_is_a_weighted_mean() -> None:
    nats, kl = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])
    replay = torch.tensor([False, True])
    weights = LabelWeights.of_step(task_labels=3, replay_labels=2, replay_label_weight=0.5, kl_weight=0.1)
    assert float(weights.loss(nats, kl, replay)) == pytest.approx((3 + 0.5 * 4) / (3 + 0.5 * 2) + 0.1 * 2 / 2)
    plain = LabelWeights.of_step(7, 0, 0.5, 0.1)
    assert plain.task == 1 / 7
    assert LabelWeights.of_step(0, 5, 0.0, 0.0).replay == 0  # a step of nothing but replay that does not count


def test_learning_rate_falls_from_head_to_embedding(tiny_model: Path, recipe: dict[str, Any]) -> None:
    recipe["train"] |= {"layerwise_lr_decay": 0.5, "weight_decay": 0.1}
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    depths = layer_depths(model)
    assert depths["model.embed_tokens.weight"] == 3
    assert depths["model.layers.0.mlp.up_proj.weight"] == 2
    assert depths["model.layers.1.mlp.up_proj.weight"] == 1
    assert depths["model.norm.weight"] == 0
    groups = parameter_groups(model, parse_recipe(recipe).train)
    scale_of = {id(one): group["lr_scale"] for group in groups for one in group["params"]}
    assert {name: scale_of[id(one)] for name, one in model.named_parameters()} == {
        name: 0.5**depth for name, depth in depths.items()
    }
    model.model.layers = torch.nn.Sequential(*model.model.layers)
    with pytest.raises(BadInput, match="no list of its 2 layers"):
        layer_depths(model)
