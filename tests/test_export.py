"""The export is what `save_pretrained` would write, whoever writes it: all ranks, one of them, or `fullft export`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import torchrun, write_recipe
from test_architectures import CONFIGS, SMALL, save_model
from transformers import DeepseekV3Config, LlamaConfig, PretrainedConfig

from fullft.export import export_checkpoint

pytestmark = pytest.mark.ranks

MOE = {name: value for name, value in SMALL.items() if name != "head_dim"}
MODELS: dict[str, PretrainedConfig] = CONFIGS | {
    "llama, tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "deepseek v3, experts fused on loading and a buffer in fp32": DeepseekV3Config(
        **MOE, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1,
        moe_intermediate_size=16, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
    ),
}  # fmt: skip
SHARD_GB = 0.001  # 1 MB is the smallest that save_pretrained takes

# Exports models with random weights, and saves them in a checkpoint; the reference is DeepSpeed's own gathering and
# save_pretrained of the whole model.
RANK = """
import sys
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_set_local_fp32_param
from transformers import AutoModelForCausalLM
from transformers.integrations import deepspeed
from fullft import checkpoint, cluster, engine, export, model
from fullft.optim import build_optimizer
from fullft.recipe import load_recipe
from fullft.shards import allocate_optimizer_states

me = cluster.discover()
cluster.join(me, 5)
for path in sys.argv[1:]:
    recipe = load_recipe(path)
    run = recipe.run_folder
    tokenizer = model.load_tokenizer(recipe.model)
    meta = model.on_meta(recipe.model, tokenizer)
    geometry = engine.geometry(recipe, me.world_size)
    config = engine.fill_config(engine.read_config(recipe), recipe, geometry, 32, torch.float32)
    loaded = model.load(recipe, config, tokenizer)
    started = engine.start(loaded, build_optimizer(loaded, recipe.train, False), config)
    generator = torch.Generator().manual_seed(1)
    for parameter in started.module.parameters():  # weights that bf16 must round; padding too
        padded = torch.randn(parameter.ds_tensor.numel() * me.world_size, generator=generator)
        safe_set_local_fp32_param(parameter, padded.chunk(me.world_size)[me.rank])
    export.export(started, meta, tokenizer, recipe, recipe.export.dtype, "card")
    allocate_optimizer_states(started)
    checkpoint.save(started, run / "checkpoints", {"step": 4}, 2)
    weights = {
        name: safe_get_full_fp32_param(one).reshape(one.ds_shape) for name, one in started.module.named_parameters()
    }
    del started, loaded
    deepspeed.unset_hf_deepspeed_config()
    if me.is_main:
        (run / "recipe.yaml").write_text(recipe.to_yaml())
        dtype = export.DTYPES[recipe.export.dtype]
        whole = AutoModelForCausalLM.from_pretrained(recipe.model.path, dtype=dtype)
        for one in whole.parameters():  # transformers keeps some in fp32, which are trained and evaluated in bf16 here
            one.data = one.data.to(dtype)
        whole.load_state_dict({name: one.to(dtype) for name, one in weights.items()}, strict=False)
        whole.save_pretrained(run / "whole", max_shard_size=f"{int(recipe.export.max_shard_gb * 1000)}MB")
cluster.leave()
"""


def ranks(recipes: list[dict[str, Any]], folder: Path, count: int, rank: str = "") -> str:
    """Run RANK on some ranks, which start by the shell command `rank` if given; returns what they print."""
    script = folder / "rank.py"
    script.write_text(RANK)
    wrapped = ["--no-python", "sh", "-c", rank, "sh", sys.executable] if rank else []
    paths = [str(write_recipe(recipe, Path(recipe["run_dir"] + ".yaml"))) for recipe in recipes]
    command = [*torchrun(count), *wrapped, str(script), *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=folder, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


def wide(config: PretrainedConfig) -> PretrainedConfig:
    """With enough weights for several files of 1 MB, and sizes that 2 and 3 ranks cannot share evenly."""
    config = type(config).from_dict(config.to_dict())
    for name, size in {"intermediate_size": 5003, "n_inner": 5003, "moe_intermediate_size": 1101}.items():
        if hasattr(config, name):
            setattr(config, name, size)
    return config


def prepare(recipe: dict[str, Any], name: str, tiny_model: Path, folder: Path, dtype: str) -> dict[str, Any]:
    """A recipe for a model of MODELS that trains nothing; its weights take more than a file."""
    path = save_model(wide(MODELS[name]), tiny_model, folder / f"model-{name}")
    return recipe | {
        "run_dir": str(folder / f"run-{name}"),
        "model": {"path": str(path)},
        "train": recipe["train"] | {"global_batch_size": 6},
        "export": {"dtype": dtype, "max_shard_gb": SHARD_GB},
    }


def contents(folder: Path, pattern: str = "model*.safetensors*") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob(pattern)}


@pytest.mark.parametrize(
    ("count", "names", "dtype"),
    [(1, ["llama, tied"], "fp32"), (2, list(MODELS), "bf16"), (3, ["llama, tied", "mixtral"], "fp16")],
)
def test_all_ranks_and_a_checkpoint_give_what_save_pretrained_of_the_whole_model_writes(
    recipe: dict[str, Any], tiny_model: Path, tmp_path: Path, count: int, names: list[str], dtype: str
) -> None:
    known = {name: next(model for model in MODELS if model.startswith(name)) for name in names}
    recipes = [prepare(recipe, known[name], tiny_model, tmp_path, dtype) for name in names]
    printed = ranks(recipes, tmp_path, count)
    assert printed.count("written by all ranks") == len(names)
    for name, run in ((name, Path(one["run_dir"])) for name, one in zip(names, recipes, strict=True)):
        whole = contents(run / "whole")
        assert len(whole) > 1, name
        assert contents(run / "export") == whole, name  # every byte of every file, and the index
        configs = [json.loads((run / folder / "config.json").read_text()) for folder in ("export", "whole")]
        assert configs[0] == configs[1]
        assert not (run / "export.tmp").exists()
        found, skipped = export_checkpoint(run, tmp_path / "out" / name)
        assert (found.name, skipped) == ("step-00000004", [])
        for file, content in contents(run / "export", "*").items():
            assert file == "README.md" or (tmp_path / "out" / name / file).read_bytes() == content, file


@pytest.mark.skipif(shutil.which("unshare") is None or os.geteuid() != 0, reason="needs mount namespaces, and root")
def test_a_run_folder_of_each_node_gives_one_whole_export_on_that_of_rank_0(
    recipe: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    one = prepare(recipe, "llama, tied", tiny_model, tmp_path, "bf16")
    Path(one["run_dir"]).mkdir()
    own = f"""exec unshare --mount sh -c 'mount -t tmpfs none "$0" && exec "$@"' "{one["run_dir"]}" "$@" """
    rank = f'[ "$RANK" = 0 ] || {own}; exec "$@"'
    printed = ranks([one], tmp_path, 2, rank)
    run = Path(one["run_dir"])
    assert "written by rank 0, since not all ranks see its run folder" in printed
    assert str(run / "export") in printed
    assert contents(run / "export") == contents(run / "whole")
