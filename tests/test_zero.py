"""ZeRO-3's sizes, from those of the model and the cluster, and what is for slow networks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Launch, losses
from transformers import AutoModelForCausalLM, LlamaConfig

from fullft import cluster, engine, model
from fullft.errors import BadInput
from fullft.preflight import preflight
from fullft.recipe import parse_recipe


def facts_of(**sizes: Any) -> model.Facts:
    with torch.device("meta"):
        return model.facts(AutoModelForCausalLM.from_config(LlamaConfig(**sizes)))


LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
}  # fmt: skip


def test_sizes_follow_the_layers() -> None:
    """By hand: a layer of the 8B model has 218,112,000 parameters, of the 70B model 855,654,400."""
    small, large = facts_of(**LLAMA_8B), facts_of(**LLAMA_70B)
    assert (small.largest_layer, large.largest_layer) == (218_112_000, 855_654_400)
    of_small, of_large = engine.sizes_for(small, 8), engine.sizes_for(large, 8)
    assert of_small["stage3_prefetch_bucket_size"] == 218_112_000
    assert of_large["stage3_prefetch_bucket_size"] == 855_654_400
    assert of_small["stage3_max_live_parameters"] == 2 * 218_112_000 + 2 * 128256 * 4096
    assert of_large["stage3_max_live_parameters"] == 2 * 855_654_400 + 2 * 128256 * 8192
    assert of_large["stage3_max_reuse_distance"] == 2 * 855_654_400
    assert (of_small["reduce_bucket_size"], of_large["reduce_bucket_size"]) == (109_056_000, 427_827_200)
    for sizes, hidden in ((of_small, 4096), (of_large, 8192)):  # norms stay whole, matrices do not
        assert sizes["stage3_param_persistence_threshold"] == hidden


def test_a_bucket_grows_with_the_ranks_up_to_a_limit() -> None:
    facts = facts_of(**LLAMA_8B)
    buckets = [engine.sizes_for(facts, ranks)["reduce_bucket_size"] for ranks in (8, 512, 4096)]
    assert buckets == [109_056_000, 256_000_000, 500_000_000]


def test_a_tiny_model_is_still_partitioned(recipe: dict[str, Any]) -> None:
    inputs = preflight(parse_recipe(recipe), 2)
    zero = inputs.deepspeed_config["zero_optimization"]
    assert "auto" not in zero.values()
    matrices = [one.numel() for one in inputs.meta.parameters() if one.ndim > 1]
    assert zero["stage3_param_persistence_threshold"] < min(matrices)
    assert zero["reduce_bucket_size"] == inputs.facts.parameters  # more would be allocated for nothing
    assert zero["stage3_prefetch_bucket_size"] == inputs.facts.largest_layer < inputs.facts.parameters


def zero_file(path: Path, **keys: Any) -> str:
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "overlap_comm": True} | keys}))
    return str(path)


def test_numbers_of_a_file_are_kept(recipe: dict[str, Any], tmp_path: Path) -> None:
    given = {"reduce_bucket_size": 700, "stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 5}
    recipe["deepspeed"] = zero_file(tmp_path / "zero.json", **given)
    zero = preflight(parse_recipe(recipe), 2).deepspeed_config["zero_optimization"]
    assert {key: zero[key] for key in given} == given
    assert "stage3_max_live_parameters" not in zero


@pytest.mark.ranks
def test_sizes_do_not_change_the_numbers(recipe: dict[str, Any], tmp_path: Path, launch: Launch) -> None:
    """What is filled in, against many small buckets without prefetching: the same losses."""
    launch(recipe)
    filled = losses(recipe)
    recipe["run_dir"] += "-small"
    recipe["deepspeed"] = zero_file(
        tmp_path / "zero.json", reduce_bucket_size=700, stage3_prefetch_bucket_size=0,
        stage3_param_persistence_threshold=0, stage3_max_live_parameters=0, stage3_max_reuse_distance=0,
    )  # fmt: skip
    launch(recipe)
    assert losses(recipe) == pytest.approx(filled, rel=1e-5)


@pytest.mark.ranks
def test_a_second_copy_of_the_weights_in_each_node(recipe: dict[str, Any], tmp_path: Path, launch: Launch) -> None:
    """hpZ on two nodes of two ranks: the same losses as without, and after a resume."""
    recipe["train"] |= {"steps": 6, "global_batch_size": 8}
    recipe["checkpoint"]["every_steps"] = 3
    launch(recipe, ranks=4)
    plain = losses(recipe)
    recipe["deepspeed"] = zero_file(
        tmp_path / "zero.json", zero_hpz_partition_size=2, stage3_param_persistence_threshold=40
    )
    recipe["run_dir"] += "-hpz"
    said = launch(recipe, ranks=4).stdout
    assert "by transformers, since zero_hpz_partition_size is set" in said
    assert losses(recipe) == pytest.approx(plain, rel=1e-5)
    folder = Path(recipe["run_dir"])
    for name in ("step-00000006", "export"):
        (folder / "checkpoints" / name if name.startswith("step") else folder / name).rename(tmp_path / name)
    (folder / "state.json").unlink()
    said = launch(recipe, ranks=4).stdout
    assert "resumed from" in said
    assert losses(recipe) == pytest.approx(plain, rel=1e-5)


def test_hpz_is_the_ranks_of_a_node(recipe: dict[str, Any]) -> None:
    parsed = parse_recipe(recipe | {"deepspeed": "ds_configs/zero3_hpz.json"})

    def size(world_size: int, per_node: int | None) -> Any:
        filled = engine.fit_to_nodes(engine.read_config(parsed), parsed, world_size, per_node, on_gpu=True)
        return filled["zero_optimization"]["zero_hpz_partition_size"]

    assert [size(16, 8), size(8, 8), size(4, 1), size(16, None)] == [8, 1, 1, 1]
    with pytest.raises(
        BadInput, match="zero_hpz_partition_size 8, which must be a number of ranks that divides the 12"
    ):
        size(12, 8)


def test_groups_of_hpz_are_the_same_on_every_node(recipe: dict[str, Any]) -> None:
    own = parse_recipe(recipe)
    engine.require_same_groups([("a", 2), ("a", 2), ("b", 2), ("b", 2)], own)
    engine.require_same_groups([("a", 1), ("a", 1), ("b", 1)], own)
    for told in ([("a", 4)] * 4 + [("b", 2)] * 2, [("a", 2)] * 3 + [("b", 2)]):
        with pytest.raises(BadInput, match="every node must have the same number"):
            engine.require_same_groups(told, own)


def test_a_second_copy_is_in_the_plan(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["deepspeed"] = zero_file(tmp_path / "zero.json", zero_hpz_partition_size=2)
    inputs = preflight(parse_recipe(recipe), 4)
    state = inputs.plan["state_bytes_per_rank"]
    assert state["second_copy_of_weights"] == 4 * inputs.facts.parameters / 2
    assert inputs.plan["device_bytes_per_rank"] == sum(state.values())


def test_quantized_weights_need_gpus(recipe: dict[str, Any]) -> None:
    recipe["deepspeed"] = "ds_configs/zero3_quantized.json"
    with pytest.raises(BadInput, match="zero_quantized_weights, whose kernels are for GPUs only"):
        preflight(parse_recipe(recipe), 2)


def test_launchers_tell_how_many_ranks_a_node_has() -> None:
    torch_like = {
        "RANK": "3", "WORLD_SIZE": "16", "LOCAL_RANK": "3", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500",
    }  # fmt: skip
    slurm = {
        "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "3", "SLURM_STEP_NODELIST": "n[1-2]",
        "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0",
    }  # fmt: skip
    told = [
        torch_like, torch_like | {"LOCAL_WORLD_SIZE": "8"}, torch_like | {"LOCAL_SIZE": "8"},
        slurm | {"SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, slurm | {"SLURM_STEP_TASKS_PER_NODE": "12,4"},
    ]  # fmt: skip
    assert [cluster.discover(one).ranks_per_node for one in told] == [None, 8, 8, 8, None]
