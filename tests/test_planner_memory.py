"""The plan of memory: what layers keep, counted on real ones; what each setting changes; a node's memory, disk."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fullft import model
from fullft.planner.memory import (
    GIB,
    activation_bytes,
    disk,
    gpu_memory,
    gpu_states,
    host_memory,
    kept_activations,
    layer_at_work,
    layer_of,
)  # fmt: skip
from fullft.planner.setting import Setting, setting_of
from fullft.recipe import parse_recipe

TOKENS = 64
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "head_dim": 32},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 32},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 32, "sliding_window": 4096},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_what_a_layer_keeps(kind: str, dtype: torch.dtype) -> None:
    """Counted by autograd, all but what all layers share (positions) and the weights."""
    config = AutoConfig.for_model(
        kind, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, vocab_size=97,
        **ARCHITECTURES[kind],
    )  # fmt: skip
    counts = []
    for layers in (1, 2):
        config.num_hidden_layers, config.layer_types = layers, ["full_attention"] * layers
        counts.append(kept_by(AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")))
    expected = TOKENS * activation_bytes(replace(layer_of(config), layers=1), "none", dtype == torch.bfloat16)
    assert layer_of(config).assumed == ""
    assert counts[1] - counts[0] == pytest.approx(expected, rel=0.04)


def kept_by(whole: Any) -> int:
    """Bytes that autograd keeps of a forward pass without head, other than parameters and buffers."""
    owned = {one.untyped_storage().data_ptr(): one for one in [*whole.parameters(), *whole.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no other gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        whole.train().model(input_ids=torch.arange(TOKENS)[None], use_cache=False)
    return sum(one.untyped_storage().nbytes() for where, one in kept.items() if where not in owned)


@pytest.fixture(scope="module")
def of_8b(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Any]:
    """A recipe of Llama-3.1-8B at 8k, as nested dicts, and the model without storage."""
    folder = tmp_path_factory.mktemp("8b")
    config = {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    recipe = {
        "run_dir": "run", "model": {"path": str(folder)}, "data": {"train": "x.jsonl", "sequence_length": 8192},
        "train": {"global_batch_size": 64, "activation_checkpointing": "full", "kernels": "none"},
    }  # fmt: skip
    return recipe, model.on_meta(parse_recipe(json.loads(json.dumps(recipe))).model)


def setting(of_8b: tuple[dict[str, Any], Any], *overrides: str, world_size: int = 64, **chosen: Any) -> Setting:
    recipe, meta = of_8b
    return setting_of(parse_recipe(json.loads(json.dumps(recipe)), overrides), meta, world_size, 8, **chosen)


def test_states(of_8b: tuple[dict[str, Any], Any]) -> None:
    one = setting(of_8b)
    part = one.facts.parameters / 64
    states = gpu_states(one)
    bytes_each = {"weights": 2, "gradients": 2, "master_weights": 4, "adamw_moments": 8}
    assert {name: states[name] / part for name in bytes_each} == pytest.approx(bytes_each, rel=3e-3)
    assert states["reduce_bucket"] == 2 * max(one.facts.largest_layer // 2, 10**8)
    assert sum(states.values()) == sum(states[name] for name in (*bytes_each, "reduce_bucket"))
    # Micro-batches are added up in fp32, and all is fp32 where there is no bf16.
    assert gpu_states(setting(of_8b, world_size=32))["gradients"] == pytest.approx(4 * part * 2, rel=1e-3)
    in_fp32 = gpu_states(setting(of_8b, bf16=False))
    assert [in_fp32[name] / part for name in bytes_each] == pytest.approx([4, 4, 4, 8], rel=3e-3)
    remedied = gpu_states(
        setting(of_8b, "train.ema_decay=0.9", "train.l2_pull=1", "deepspeed=ds_configs/zero3_hpz.json")
    )
    assert remedied["averaged_weights"] / part == pytest.approx(4, rel=1e-3)
    assert remedied["base_weights"] / part == pytest.approx(2, rel=1e-3)
    assert remedied["second_copy_of_weights"] == pytest.approx(2 * one.facts.parameters / 8, rel=1e-3)


def test_what_is_offloaded_is_in_the_host(of_8b: tuple[dict[str, Any], Any]) -> None:
    here, there = setting(of_8b), setting(of_8b, "deepspeed=ds_configs/zero3_offload.json")
    part = here.facts.parameters / 64
    kept = {name for name, size in gpu_states(there).items() if size}
    assert kept == {"weights", "reduce_bucket"}
    assert gpu_memory(there).phases["update"] == sum(gpu_states(there).values())
    assert gpu_memory(there).peak < gpu_memory(here).peak
    node, before = host_memory(there), host_memory(here)
    # 8 ranks: masters 4, moments 8, gradients 2 and for the update 4
    names = ("master_weights", "adamw_moments", "gradients", "gradients_of_update")
    assert [node[name] / 8 / part for name in names] == pytest.approx([4, 8, 2, 4], rel=1e-3)
    assert before["checkpoint_copies"] / 8 / part == pytest.approx(12, rel=1e-3)
    assert before.keys() == {"checkpoint_copies", "processes"}
    assert disk(here)["checkpoint_bytes"] == 12 * here.facts.parameters


def test_what_takes_memory_and_what_spares_it(of_8b: tuple[dict[str, Any], Any]) -> None:
    modes = ("none", "selective", "full", "offload")
    peaks = [gpu_memory(setting(of_8b, checkpointing=mode)).held_by_torch for mode in modes]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] > 49 * GIB > 16 * GIB > peaks[3]
    full = gpu_memory(setting(of_8b))
    shared = gpu_memory(setting(of_8b, "train.sequence_parallel=8"))
    for part in (kept_activations, layer_at_work):
        assert part(setting(of_8b, "train.sequence_parallel=8")) == part(setting(of_8b)) // 8
    assert shared.outside["nccl"] > full.outside["nccl"]
    assert layer_at_work(setting(of_8b, "train.mlp_tiles=8")) < layer_at_work(setting(of_8b)) // 2
    liger = gpu_memory(setting(of_8b, checkpointing="none", kernels="liger"))
    assert 0.7 * peaks[0] < liger.held_by_torch < 0.85 * peaks[0]
    assert kept_activations(setting(of_8b, "data.sequence_length=16384")) == 2 * kept_activations(setting(of_8b))
    assert full.peak == full.held_by_torch + sum(full.outside.values()) == sum(full.components.values())
    assert gpu_memory(setting(of_8b, world_size=1)).outside["nccl"] == 0
