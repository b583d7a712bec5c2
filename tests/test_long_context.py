"""Ulysses sequence parallelism: rows shared by ranks make the same training as rows of one rank."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Launch, chats, losses, metrics, write_jsonl
from ranks import Ranks
from safetensors.torch import load_file
from test_architectures import SMALL, save_model
from test_bad_input import problem
from test_checkpoint import kill_after
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MixtralConfig, PretrainedConfig

from fullft.data.batches import Batch
from fullft.loss import IGNORE
from fullft.tiles import tile_mlps

STEPS = 4
HEADS = SMALL | {"num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama, 2 key-value heads": LlamaConfig(**HEADS),
    "gemma3, a window and 1 key-value head": Gemma3TextConfig(
        **(HEADS | {"num_key_value_heads": 1}), sliding_window=16, layer_types=["sliding_attention", "full_attention"]
    ),
}
# Number of ranks, how many share a row, and what else is set.
SHARED: dict[str, list[tuple[int, int, dict[str, Any]]]] = {
    "llama, 2 key-value heads": [
        (4, 2, {"micro_batch_size": 2, "activation_checkpointing": True}), (4, 4, {"micro_batch_size": 2})
    ],
    "gemma3, a window and 1 key-value head": [(2, 2, {})],
}  # fmt: skip


@pytest.fixture
def shared(recipe: dict[str, Any], tiny_model: Path, tmp_path: Path) -> dict[str, Any]:
    """A recipe whose model has 4 heads, and whose parameters are all partitioned."""
    recipe["model"]["path"] = str(save_model(CONFIGS["llama, 2 key-value heads"], tiny_model, tmp_path / "model"))
    recipe["train"] |= {"steps": STEPS, "eps": 1e-5, "weight_decay": 0.1, "max_grad_norm": 0.5}
    config = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    (tmp_path / "zero3.json").write_text(json.dumps(config))
    recipe["deepspeed"] = str(tmp_path / "zero3.json")
    return recipe


def run(recipe: dict[str, Any], launch: Launch, name: str, ranks: int, **train: Any) -> dict[str, Any]:
    """Train into a folder of its own; the recipe of it."""
    folder = Path(recipe["run_dir"]).with_name(name)
    own = recipe | {"run_dir": str(folder), "train": recipe["train"] | train}
    launch(own, ranks=ranks)
    return own


def weights(recipe: dict[str, Any]) -> dict[str, torch.Tensor]:
    return load_file(Path(recipe["run_dir"]) / "export" / "model.safetensors")


def require_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert losses(one) == pytest.approx(losses(other), abs=1e-5)
    for a, b in zip(metrics(one), metrics(other), strict=True):
        for key in ("train/grad_norm", "train/trained_tokens_of_step", "train/tokens", "train/loss_kl", "eval/loss"):
            assert (key in a) == (key in b)
            if key in a:
                assert a[key] == pytest.approx(b[key], rel=1e-4), key
    expected = weights(other)
    for key, tensor in weights(one).items():
        torch.testing.assert_close(
            tensor, expected[key], atol=2e-6, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.ranks
@pytest.mark.parametrize("name", CONFIGS)
def test_rows_shared_by_ranks_train_as_rows_of_one(
    shared: dict[str, Any], launch: Launch, tiny_model: Path, tmp_path: Path, name: str
) -> None:
    shared["model"]["path"] = str(save_model(CONFIGS[name], tiny_model, tmp_path / "other"))
    whole = run(shared, launch, "whole", 2)
    for ranks, parts, more in SHARED[name]:
        require_same(run(shared, launch, f"shared-{ranks}-{parts}", ranks, sequence_parallel=parts, **more), whole)
    assert losses(whole)[-1] < losses(whole)[0] - 0.05  # it is learning, so the comparison means something


@pytest.mark.ranks
@pytest.mark.parametrize("reference", ["cache", "model"])
def test_evaluation_replay_and_divergence_are_those_of_whole_rows(
    shared: dict[str, Any], launch: Launch, tmp_path: Path, reference: str
) -> None:
    """Not packed as well: the rows of a batch are filled up to a multiple of the ranks."""
    texts = [{"text": f"{number} of the general texts " + "that go on " * (number % 5)} for number in range(30)]
    general, held_out = write_jsonl(tmp_path / "general.jsonl", texts), write_jsonl(tmp_path / "held.jsonl", chats(5))
    shared["data"] |= {
        "replay": [{"path": str(general), "fraction": 0.3}], "packing": reference == "model",
        "validation": str(held_out),
    }  # fmt: skip
    answers = {"name": "answers", "kind": "generate", "max_new_tokens": 3, "data": str(held_out)}
    wiki = {"name": "wiki", "kind": "text", "data": str(general)}
    shared["retention"] = {"tasks": [answers, wiki], "every_steps": 2}
    kl = {"kl_weight": 1.0, "kl_reference": reference}
    whole, parts = run(shared, launch, "whole", 2, **kl), run(shared, launch, "parts", 2, sequence_parallel=2, **kl)
    require_same(parts, whole)
    assert any(row.get("train/loss_kl", 0) > 1e-6 for row in metrics(whole))
    for step in (0, 2, 4):
        one, other = (
            json.loads((Path(r["run_dir"]) / f"retention/step-{step:08d}.json").read_text()) for r in (parts, whole)
        )
        for task in one["tasks"]:
            assert one["tasks"][task]["score"] == pytest.approx(other["tasks"][task]["score"], rel=1e-4), (step, task)
        for key in ("kl_new_task", "kl_general"):
            assert one["divergence"][key] == pytest.approx(other["divergence"][key], rel=1e-3, abs=1e-7)


@pytest.mark.ranks
def test_a_run_goes_on_with_other_ranks_and_parts(shared: dict[str, Any], launch: Launch, tmp_path: Path) -> None:
    shared["train"]["steps"] = 12
    whole = run(shared, launch, "whole", 1)
    killed = shared | {"train": shared["train"] | {"sequence_parallel": 2}, "checkpoint": {"every_steps": 4}}
    kill_after(killed, 6, tmp_path / "killed.yaml", saved="step-00000004", ranks=2)
    done = launch(killed, "train.sequence_parallel=4", ranks=4)
    assert "resumed from" in done.stdout
    require_same(killed, whole)


MIXES = """
import torch
from fullft import attention
apart = attention._one_by_one
def together(query, key, value, ends, *more):  # a row is a document
    return apart(query, key, value, torch.tensor([0, query.shape[2]]), *more)
attention._one_by_one = together
"""


@pytest.mark.ranks
def test_attention_that_mixes_documents_is_found_before_the_first_step(shared: dict[str, Any]) -> None:
    shared["train"]["sequence_parallel"] = 2
    with Ranks(shared, 2, MIXES) as ranks:
        assert ranks.codes() == [2, 2]
        assert "with varlen, LlamaForCausalLM lets packed documents see each other" in ranks.output
    assert not (Path(shared["run_dir"]) / "metrics.jsonl").exists()


@pytest.mark.ranks
def test_tiles_of_the_mlp_change_no_number(shared: dict[str, Any], launch: Launch) -> None:
    """Not packed, so that ranks have batches of another width, none of them a multiple of the tiles."""
    shared["data"]["packing"] = False
    whole = run(shared, launch, "whole", 2)
    require_same(run(shared, launch, "tiles", 2, mlp_tiles=5, micro_batch_size=2), whole)
    more = {"sequence_parallel": 2, "activation_checkpointing": True}
    require_same(run(shared, launch, "parts", 2, mlp_tiles=5, **more), whole)


def test_an_mlp_sees_a_tile_at_a_time() -> None:
    config = LlamaConfig(**HEADS, vocab_size=50)
    grads, seen = [], list[int]()
    for tiles in (1, 3):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        tile_mlps(model, tiles)
        model.model.layers[1].mlp.down_proj.register_forward_hook(lambda _, __, out: seen.append(out.shape[-2]))
        model(input_ids=torch.arange(20).view(2, 10)).logits.square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
        with torch.no_grad():
            model(input_ids=torch.arange(20).view(2, 10))
    assert seen == [10, 10, *[7] * 6, 10]  # 20 tokens and a filler in 3 tiles, forward and once more in backward
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_an_mlp_with_experts_is_not_tiled(shared: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    mixtral = MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)
    shared["model"]["path"] = str(save_model(mixtral, tiny_model, tmp_path / "mixtral"))
    assert problem(shared, "train.mlp_tiles=2").startswith("train.mlp_tiles: 0 of 2 layers of MixtralForCausalLM")


def test_parts_of_a_batch_make_up_the_whole() -> None:
    ids = torch.arange(48).view(2, 24)
    positions = torch.cat([torch.arange(10), torch.arange(9), torch.arange(5)]).expand(2, 24).contiguous()
    labels = torch.where(ids % 3 == 0, ids, IGNORE)
    batch = Batch.of(ids, positions, labels, (19, 24), (False, True), ((0, 1), (1, 1)))
    told = batch.documents
    parts = [batch.part(number, 4) for number in range(4)]
    for name in ("input_ids", "position_ids", "labels"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts], dim=1), getattr(batch, name))
    assert [part.tokens for part in parts] == [12, 12, 12, 7]
    assert [part.labels_before for part in parts] == [(0, 0), (2, 2), (4, 4), (6, 6)]
    assert all(torch.equal(part.documents.ends, told.ends) and part.documents.ranks == 4 for part in parts)
    assert parts[0].sequences == batch.sequences
    assert replace(parts[1], tokens=0).documents.longest == 10


def test_what_cannot_be_shared_is_told_before_a_gpu_is_asked_for(shared: dict[str, Any]) -> None:
    def told(*overrides: str, ranks: int = 4) -> str:
        return problem(shared, *overrides, ranks=ranks)

    assert "6 ranks make no groups of 4" in told("train.sequence_parallel=4", ranks=6)
    assert "4 attention heads with 2" in told("train.sequence_parallel=8", ranks=8)
    assert "e.g. 128" in told("train.sequence_parallel=4", "data.sequence_length=126")
    assert "needs model.attention varlen, this is sdpa" in told("train.sequence_parallel=2", "model.attention=sdpa")
    assert "2 groups of 2 ranks" in told("train.sequence_parallel=2", "train.global_batch_size=3")
