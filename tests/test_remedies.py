"""Remedies against forgetting: each against plain PyTorch on real ranks, and resumed bit for bit."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import TEXTS, Launch, losses, metrics, run_ranks, write_jsonl, write_recipe
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fullft.data.batches import Batches, Geometry
from fullft.data.cache import open_sets
from fullft.data.mixture import labels_of_step, replay_label_weight
from fullft.data.sequences import open_sequences
from fullft.data.training import build_batches
from fullft.engine import with_parameters_on_host
from fullft.errors import BadInput
from fullft.export import export_checkpoint
from fullft.loss import IGNORE, LabelWeights, kl_divergence
from fullft.model import Facts, on_meta
from fullft.optim import layer_depths, parameter_groups
from fullft.planner.memory import plan
from fullft.planner.setting import setting_of
from fullft.preflight import preflight
from fullft.recipe import parse_recipe
from fullft.retention.base import is_whole
from fullft.retention.divergence import _distance
from fullft.retention.pull import decay_at, parts_without, squared_norm

STEPS = 6
REMEDIES = {"layerwise_lr_decay": 0.7, "l2_pull": 20.0, "ema_decay": 0.35, "kl_weight": 0.5}  # 0.35: from step 4
TOP_K = 20


@pytest.fixture
def remedied(recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A recipe with every remedy on."""
    texts = [{"text": " ".join(TEXTS[(i + j) % 4] for j in range(1 + i % 3))} for i in range(12)]
    replay = {"path": str(write_jsonl(tmp_path / "general.jsonl", texts)), "name": "general", "fraction": 0.5}
    recipe["data"] |= {"replay": [replay], "replay_weight": 0.3}
    # eps 1e-5: with 1e-8, AdamW's first steps are the sign of gradients that are round-off around zero.
    recipe["train"] |= REMEDIES | {"steps": STEPS, "global_batch_size": 12, "eps": 1e-5, "weight_decay": 0.1}
    task = {"name": "prose", "kind": "text", "data": str(write_jsonl(tmp_path / "prose.jsonl", [{"text": TEXTS[0]}]))}
    recipe["retention"] = {"kl_top_k": TOP_K, "every_steps": STEPS // 2, "tasks": [task]}
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
    found: dict[str, Any] = {"loss": [], "task": [], "replay": [], "distance": [], "kl": []}
    for step in range(STEPS):
        kl: list[torch.Tensor] = []
        nats: dict[bool, list[torch.Tensor]] = {False: [], True: []}  # of each label: of task rows, of replay rows
        for of_set, sequence in order.sequences_of_step(step):
            one = order.sets[of_set]
            for start, _, length in one.slices[one.starts[sequence] : one.starts[sequence + 1]].tolist():
                tokens, trained = one.tokens.read(start, length)
                ids = torch.from_numpy(tokens).long()[None]
                labels = torch.where(torch.from_numpy(trained), ids, IGNORE)[0, 1:]
                logits = model(ids).logits[0, :-1][labels != IGNORE]
                if of_set == 1:
                    of_base = base(ids).logits[0, :-1][labels != IGNORE].detach()
                    exact = train.kl_reference == "model"
                    kl.append(whole_divergence(of_base, logits) if exact else top_k_divergence(of_base, logits))
                nats[of_set == 1].append(F.cross_entropy(logits, labels[labels != IGNORE], reduction="none"))
        task, replay = (torch.cat(nats[kind]) if nats[kind] else torch.zeros(0) for kind in (False, True))
        weight = order.replay_label_weight
        loss = (task.sum() + weight * replay.sum()) / (len(task) + weight * len(replay))
        (loss + train.kl_weight * torch.cat(kl).sum() / order.replay_labels_of_step).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.max_grad_norm)
        rate = train.learning_rate * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        for group, scale in zip(optimizer.param_groups, scales, strict=True):
            group["lr"] = rate * scale
        optimizer.step()
        optimizer.zero_grad()
        moved, size, decay = 0.0, 0.0, min(train.ema_decay, (2 + step) / (11 + step))
        with torch.no_grad():
            for (name, tensor), there, scale in zip(model.named_parameters(), base.parameters(), scales, strict=True):
                tensor += rate * scale * train.l2_pull * (there - tensor)
                average[name] += (1 - decay) * (tensor - average[name])
                moved, size = moved + float((tensor - there).square().sum()), size + float(there.square().sum())
        found["loss"].append(loss.item())
        found["task"].append(task.mean().item())
        found["replay"].append(replay.mean().item())
        found["kl"].append(torch.cat(kl).mean().item())
        found["distance"].append(math.sqrt(moved / size))
    return found | {"weights": average}


def whole_divergence(base: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return F.kl_div(logits.log_softmax(-1), base.log_softmax(-1), reduction="none", log_target=True).sum(-1)


def top_k_divergence(base: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(base || model) at each position, the tokens outside of the base's likeliest taken as one."""
    best = base.log_softmax(-1).topk(TOP_K)
    rest = 1 - best.values.exp().sum(-1, keepdim=True)
    p = best.values.half().float().exp()  # as they are stored
    p = p * (1 - rest) / p.sum(-1, keepdim=True)
    q = logits.softmax(-1).gather(-1, best.indices)
    p, q = (torch.cat([one, 1 - one.sum(-1, keepdim=True)], -1) for one in (p, q))
    return (p * (p / q).log()).sum(-1)


@torch.no_grad()
def reference_divergence(recipe: dict[str, Any], cache: Path, tuned: dict[str, torch.Tensor]) -> dict[str, Any]:
    """From whole models, document by document: of all the task's sequences that the run has seen, and of the text task,
    not of the replay rows."""
    order = batches_of(recipe, cache)
    base = AutoModelForCausalLM.from_pretrained(recipe["model"]["path"], dtype=torch.float32)
    model = copy.deepcopy(base)
    for name, parameter in model.named_parameters():
        parameter.copy_(tuned[name])
    kl: tuple[list[torch.Tensor], ...] = ([], [])
    tokenizer = AutoTokenizer.from_pretrained(recipe["model"]["path"])
    general = torch.tensor([[tokenizer.eos_token_id, *tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]]])
    kl[1].append(top_k_divergence(base(general).logits[0, :-1], model(general).logits[0, :-1]))
    seen = {one for step in range(STEPS) for one in order.sequences_of_step(step)}
    for of_set, sequence in {one for one in seen if one[0] == 0}:
        one = order.sets[of_set]
        for start, _, length in one.slices[one.starts[sequence] : one.starts[sequence + 1]].tolist():
            ids = torch.from_numpy(one.tokens.read(start, length)[0]).long()[None]
            kl[of_set].append(top_k_divergence(base(ids).logits[0, :-1], model(ids).logits[0, :-1]))
    pairs = {name: (there, tuned[name]) for name, there in base.named_parameters()}

    def drift(names: list[str]) -> float:
        moved, size = (sum(float(one.double().square().sum()) for one in column) for column in zip(
            *((pairs[name][1] - pairs[name][0], pairs[name][0]) for name in names), strict=True
        ))  # fmt: skip
        return math.sqrt(moved / size)

    changed = sum(int((one.bfloat16() != other.bfloat16()).sum()) for one, other in pairs.values())
    return {
        "kl_new_task": float(torch.cat(kl[0]).mean()), "kl_general": float(torch.cat(kl[1]).mean()),
        "tokens": {"new_task": len(torch.cat(kl[0])), "general": len(torch.cat(kl[1]))}, "top_k": TOP_K,
        "drift": {
            "all": drift(list(pairs)), "embed": drift(["model.embed_tokens.weight"]),
            "layers": {str(at): drift([name for name in pairs if f"layers.{at}." in name]) for at in range(2)},
        },
        "changed_bf16": changed / sum(there.numel() for there, _ in pairs.values()),
    }  # fmt: skip


def trained(recipe: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in metrics(recipe) if "train/loss" in row]


def evaluation(folder: Path, step: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "retention" / f"step-{step:08d}.json").read_text())
    return found


def flat(value: Any, name: str = "") -> dict[str, float]:
    if not isinstance(value, dict):
        return {name: value}
    return {key: leaf for part, inner in value.items() for key, leaf in flat(inner, f"{name}.{part}").items()}


@pytest.mark.ranks
def test_remedies_equal_plain_pytorch_and_resume_bit_for_bit(
    remedied: dict[str, Any], launch: Launch, tmp_path: Path
) -> None:
    launch(remedied)
    whole = Path(remedied["run_dir"])
    expected = reference_run(remedied, tmp_path / "cache")
    rows = trained(remedied)
    for key, name in (
        ("loss", "loss"), ("task", "loss_task"), ("replay", "loss_replay"), ("kl", "loss_kl"),
        ("distance", "l2_distance"),
    ):  # fmt: skip
        assert [row[f"train/{name}"] for row in rows] == pytest.approx(expected[key], abs=1e-5), name
    tuned = load_file(whole / "export" / "model.safetensors")
    for name, tensor in expected["weights"].items():
        if name in tuned:
            torch.testing.assert_close(
                tuned[name], tensor, atol=2e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )

    assert rows[0]["train/loss_kl"] < 1e-6 < 1e-3 < rows[-1]["train/loss_kl"]  # it begins as the base model

    # What is evaluated is the average, and how far it has gone is what whole models say.
    start, end = (evaluation(whole, step) for step in (0, STEPS))
    assert end["weights"] == "ema"
    assert start["divergence"]["drift"]["all"] == start["divergence"]["changed_bf16"] == 0
    assert max(start["divergence"][name] for name in ("kl_new_task", "kl_general")) < 1e-6
    measured = flat(end["divergence"])
    mass = measured.pop(".kl_tail_mass")
    assert 0 < mass < 1
    state = {
        name: tuned.get(name, tuned["model.embed_tokens.weight"]) for name in [*expected["weights"], "lm_head.weight"]
    }
    assert measured == pytest.approx(
        flat(reference_divergence(remedied, tmp_path / "cache", state)), rel=1e-3, abs=1e-6
    )
    last = metrics(remedied)[-1]
    assert last["divergence/kl_general"] == measured[".kl_general"]
    assert last["divergence/drift"] == measured[".drift.all"]

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
            assert [row["train/l2_distance"] for row in trained(part)] == [row["train/l2_distance"] for row in rows]
            assert all(torch.equal(resumed[name], tuned[name]) for name in tuned)
        resumed_divergence = flat(evaluation(Path(part["run_dir"]), STEPS)["divergence"])
        assert resumed_divergence == pytest.approx(flat(end["divergence"]), rel=1e-3, abs=1e-6)
        assert losses(part) == pytest.approx(expected["loss"], abs=1e-5)
        for name in tuned:
            torch.testing.assert_close(resumed[name], tuned[name], atol=2e-6, rtol=1e-5)

    # Killed before it was exported: with no step left, what the base predicts is not needed.
    shutil.rmtree(Path(part["run_dir"]) / "base" / "replay")
    (Path(part["run_dir"]) / "state.json").write_text(json.dumps({"status": "running"}))
    assert f"resumed from {part['run_dir']}/checkpoints/step-{STEPS:08d}" in launch(part).stdout


@pytest.mark.ranks
def test_reference_model_gives_the_whole_divergence(remedied: dict[str, Any], launch: Launch, tmp_path: Path) -> None:
    remedied["train"] |= {"kl_reference": "model", "kl_reference_offload": True, "micro_batch_size": 2}
    del remedied["retention"]["tasks"]
    launch(remedied)
    expected = reference_run(remedied, tmp_path / "cache")
    for key, name in (("loss", "loss"), ("kl", "loss_kl")):
        assert [row[f"train/{name}"] for row in trained(remedied)] == pytest.approx(expected[key], abs=1e-5), name
    assert not (Path(remedied["run_dir"]) / "base").exists()


@pytest.mark.ranks
def test_the_average_is_put_in_and_out_again_bit_for_bit(recipe: dict[str, Any], tmp_path: Path) -> None:
    """With parameters that ZeRO keeps whole, as it does small ones; also when a signal ends the evaluation."""
    recipe["train"] |= {"ema_decay": 0.5, "l2_pull": 1.0}
    recipe["model"] |= {"new_tokens": ["<|call|>"], "vocabulary_multiple": 64}
    config = str(write_recipe(recipe, tmp_path / "recipe.yaml"))
    done = run_ranks(Path(__file__).parent / "averaged_weights.py", config, ranks=2, cwd=tmp_path)
    assert done.stdout.count("new rows are left alone") == 2, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("bit for bit") == 2, done.stdout[-2000:] + done.stderr[-4000:]


def test_what_the_remedies_need(remedied: dict[str, Any]) -> None:
    planned = preflight(parse_recipe(copy.deepcopy(remedied)), 2).plan
    assert planned["checkpoint_bytes"] == 16 * planned["parameters"]  # with the average
    assert planned["base_predictions_bytes"] % (6 * TOP_K + 4) == 0
    without = copy.deepcopy(remedied)
    del without["data"]["replay"], without["data"]["replay_weight"]
    with pytest.raises(BadInput, match="kl_weight: the divergence is taken on replay rows"):
        preflight(parse_recipe(without), 2)
    with pytest.raises(BadInput, match=r"use_node_local_storage .* set train.kl_reference: model"):
        preflight(parse_recipe(copy.deepcopy(remedied), ["checkpoint.use_node_local_storage=true"]), 2)
    without["data"]["replay_weight"] = 0.1
    with pytest.raises(BadInput, match="replay_weight: there is no replay"):
        parse_recipe(without)
    remedied["train"]["l2_pull"] = 2000.0
    with pytest.raises(BadInput, match="l2_pull is 2"):
        parse_recipe(remedied)


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
    assert batches.replay_labels_of_step == pytest.approx(labels[1] / 40, rel=0.02)
    del remedied["data"]["replay_weight"]  # default: the share of the tokens
    assert batches_of(remedied, tmp_path / "cache").replay_label_weight == pytest.approx(
        batches.replay_label_weight * (0.5 / 0.5) / (0.3 / 0.7)
    )


def test_memory_of_the_second_copies(remedied: dict[str, Any]) -> None:
    remedied["train"] |= {"kl_reference": "model", "precision": "bf16"}

    def planned(offload: bool, **keys: bool) -> tuple[int, int, int]:
        recipe = copy.deepcopy(remedied)
        recipe["train"] |= keys
        parsed = parse_recipe(recipe)
        setting = setting_of(parsed, on_meta(parsed.model), 2, 2)
        zero = {"offload_optimizer": {"device": "cpu" if offload else "none"}}
        found = plan(replace(setting, facts=Facts("m", 1000, 10, 8, 16, 2, 300, 128, 8, 10), zero=zero, accumulation=1))
        assert sum(found["state_bytes_per_rank"].values()) == 500 * (16 + 2 + 4 + 2)
        return found["device_bytes_per_rank"] // 500, found["host_bytes_per_rank"] // 500

    assert planned(offload=False) == (24, 0)
    assert planned(offload=False, kl_reference_offload=True) == (22, 2)
    assert planned(offload=False, l2_pull_offload=True, kl_reference_offload=True) == (20, 4)
    assert planned(offload=True) == (4, 20)  # weights, the second copy
    config = with_parameters_on_host({"zero_optimization": {"stage": 3}})
    assert config["zero_optimization"]["offload_param"]["device"] == "cpu"


def test_the_average_looks_back_no_further_than_the_run() -> None:
    decays = [decay_at(step, 0.999) for step in range(1, 101)]
    assert decays[0] == 2 / 11
    assert decays == sorted(decays)
    assert math.prod(decays) < 1e-9 < 0.9 < 0.999**100  # share of the base in the average after 100 steps
    assert decay_at(10**5, 0.999) == 0.999


def test_new_rows_are_left_out_of_parts() -> None:
    parts = parts_without(20, [(12, 14), (3, 5), (0, 0)], 4)
    assert [list(range(20))[part] for part in parts] == [
        [0, 1, 2], [5, 6, 7, 8], [9, 10, 11], [14, 15, 16, 17], [18, 19]
    ]  # fmt: skip
    assert parts_without(3, [(0, 3)], 4) == []


def test_norms_of_many_small_and_alike_values_are_right() -> None:
    """As those of w - base: in one fp32 sum they would be lost beside their sum."""
    torch.manual_seed(0)
    base = torch.randn(1_000_003).bfloat16()
    shard = base.float() + 1e-4
    assert float(squared_norm(shard - base.float())) == pytest.approx(
        float((shard - base).double().square().sum()), 1e-5
    )
    moved, size, changed = _distance(shard, base, torch.float32, [(5, 9), (10**6, 10**9)]).tolist()
    kept = [*range(5), *range(9, 10**6)]
    assert moved == pytest.approx(float((shard - base)[kept].double().square().sum()), rel=1e-5)
    assert size == pytest.approx(float(base[kept].double().square().sum()), rel=1e-5)
    assert changed == int((shard.bfloat16() != base)[kept].sum())


def test_predictions_that_are_cut_short_are_told_from_whole_ones(tmp_path: Path) -> None:
    file = tmp_path / "predictions.safetensors"
    assert not is_whole(file)
    save_file({"tokens": torch.zeros(100)}, file)
    assert is_whole(file)
    file.write_bytes(file.read_bytes()[:-40])
    assert not is_whole(file)


def test_weight_of_a_replay_label() -> None:
    # 3 sequences of 10 labels to 1 of 100: replay has 100 of 130 labels, and is to be 20 % of the loss.
    weight = replay_label_weight((3, 1), (10.0, 100.0), 1, 0.2)
    assert weight * 100 / (30 + weight * 100) == pytest.approx(0.2)
    assert replay_label_weight((3,), (10.0,), 1, 0.0) == 1
    assert labels_of_step((3, 1), (10.0, 100.0), 1, 8) == 200  # 2 of 8 sequences


def test_weight_of_the_divergence_does_not_depend_on_the_batch() -> None:
    """The same rows in steps of 4 or of 1: the same sum over the run; and a short row weighs by its labels."""
    labels, nats = torch.tensor([1.0, 50, 2, 47]), torch.tensor([9.0, 100, 4, 80])
    replay = torch.ones(4, dtype=torch.bool)
    kl_weight, zero = 0.5, torch.zeros(4)
    whole = LabelWeights.of_step(0, float(labels.sum()), 0.0, kl_weight / labels_of_step((1,), (25.0,), 0, 4))
    single = [
        LabelWeights.of_step(0, float(count), 0.0, kl_weight / labels_of_step((1,), (25.0,), 0, 1)) for count in labels
    ]
    parts = [float(one.loss(zero[:1], nats[at : at + 1], replay[:1])) for at, one in enumerate(single)]
    assert sum(parts) / 4 == pytest.approx(float(whole.loss(zero, nats, replay)))
    assert sum(parts) / 4 == pytest.approx(kl_weight * float(nats.sum() / labels.sum()))
    assert parts[0] / parts[1] == pytest.approx(9 / 100)


def test_loss_of_a_step_is_a_weighted_mean() -> None:
    nats, kl = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])
    replay = torch.tensor([False, True])
    weights = LabelWeights.of_step(task_labels=3, replay_labels=2, replay_label_weight=0.5, kl=0.1 / 4)
    assert float(weights.loss(nats, kl, replay)) == pytest.approx((3 + 0.5 * 4) / (3 + 0.5 * 2) + 0.1 * 2 / 4)
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
    with pytest.raises(BadInput, match="no list of its layers"):
        layer_depths(model)


def test_divergence_of_known_tokens_is_a_bound_and_exact_when_all_are_known() -> None:
    torch.manual_seed(0)
    p, q = torch.randn(50, 40) * 2, torch.randn(50, 40) * 2
    whole = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    before = torch.zeros(50)
    for k in (1, 8, 39):  # 39: of one token that is left over all is known
        best = p.log_softmax(-1).topk(k)
        found = kl_divergence(q, best.indices, best.values, 1 - best.values.exp().sum(-1))
        assert (found >= before - 1e-5).all()
        assert (found <= whole + 1e-5).all()
        before = found
    torch.testing.assert_close(before, whole, atol=1e-4, rtol=1e-4)
    for k in (20, 40):  # of itself there is none, though it was rounded
        best = p.log_softmax(-1).topk(k)
        rest = (1 - best.values.exp().sum(-1)).clamp(min=0)
        assert kl_divergence(p, best.indices, best.values.half().float(), rest).abs().max() < 1e-5
