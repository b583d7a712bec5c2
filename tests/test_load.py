"""The base model in ZeRO-3 shards is the model of its files, whoever reads them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, Launch, chats, losses, torchrun, write_jsonl, write_recipe
from safetensors.torch import load_file, save_file
from test_architectures import SMALL, save_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma4TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from fullft.errors import BadInput
from fullft.preflight import preflight
from fullft.recipe import parse_recipe

pytestmark = pytest.mark.ranks

GEMMA4 = SMALL | {"global_head_dim": 16, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "llama, tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "mistral": MistralConfig(**SMALL),
    "qwen2, biases": Qwen2Config(**{key: value for key, value in SMALL.items() if key != "head_dim"}),
    "qwen3": Qwen3Config(**SMALL),
    "gemma2, tied": Gemma2Config(**SMALL),
    "phi3, fused projections": Phi3Config(**{key: value for key, value in SMALL.items() if key != "head_dim"}),
    "gpt-neox, renamed": GPTNeoXConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=256
    ),
    "gpt2, tied": GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=256),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
}


def loaded(recipe: dict[str, Any], folder: Path, ranks: int) -> tuple[dict[str, Any], str]:
    """What the ranks hold together, and what they said."""
    recipe = recipe | {"train": recipe["train"] | {"global_batch_size": 6}}
    config, out = write_recipe(recipe, folder / "load.yaml"), folder / f"loaded-{ranks}.pt"
    command = [*torchrun(ranks), str(REPOSITORY / "tests" / "loaded_model.py"), str(config), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    content: dict[str, Any] = torch.load(out)
    return content, done.stdout


def assert_same(found: dict[str, Any], folder: Path, dtype: torch.dtype) -> None:
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    wanted = dict(expected.named_parameters(remove_duplicate=False))
    assert found["parameters"].keys() == wanted.keys()
    for name, parameter in wanted.items():
        assert found["parameters"][name].dtype == dtype
        assert torch.equal(found["parameters"][name], parameter), name
    for name, buffer in expected.named_buffers():
        assert torch.equal(found["buffers"][name], buffer), name


@pytest.mark.parametrize("name", CONFIGS)
def test_the_shards_are_the_files(recipe: dict[str, Any], tiny_model: Path, tmp_path: Path, name: str) -> None:
    recipe["model"] = {"path": str(save_model(CONFIGS[name], tiny_model, tmp_path / "model")), "attention": "eager"}
    found, said = loaded(recipe, tmp_path, ranks=3)  # 3 divides hardly any size: padded tails
    assert_same(found, tmp_path / "model", torch.float32)
    assert ("converts its tensors" if name == "mixtral" else "GB read by each rank") in said


@pytest.mark.parametrize(("stored", "precision"), [(torch.bfloat16, "fp32"), (torch.float32, "bf16")])
def test_dtypes_are_converted_and_files_sharded(
    recipe: dict[str, Any], tiny_model: Path, tmp_path: Path, stored: torch.dtype, precision: str
) -> None:
    folder = save_model(CONFIGS["llama, tied"], tiny_model, tmp_path / "model")
    (folder / "model.safetensors").rename(tmp_path / "whole.safetensors")
    shutil.copytree(folder, tmp_path / "source")
    shutil.move(tmp_path / "whole.safetensors", tmp_path / "source" / "model.safetensors")
    AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=stored).save_pretrained(
        folder, max_shard_size="40KB"
    )
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    # The same weights in a form of the model's authors: not to be read.
    save_file({"tok_embeddings.weight": torch.zeros(2, 2)}, folder / "consolidated.safetensors")
    recipe["model"]["path"], recipe["train"]["precision"] = str(folder), precision
    found, _ = loaded(recipe, tmp_path, ranks=2)
    assert_same(found, folder, {"fp32": torch.float32, "bf16": torch.bfloat16}[precision])


def test_every_byte_is_read_once_and_no_rank_holds_a_parameter(
    recipe: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    folder = save_model(LlamaConfig(**SMALL | {"intermediate_size": 8192}), tiny_model, tmp_path / "model")
    recipe["model"]["path"] = str(folder)
    found, said = loaded(recipe, tmp_path, ranks=2)
    largest = max(parameter.numel() for parameter in found["parameters"].values())
    assert found["largest_shard"] == largest / 2
    size = sum(parameter.numel() * 4 for parameter in found["parameters"].values())
    (read,) = re.findall(r"([\d.]+) GB read by each rank", said)
    assert float(read) == pytest.approx(size / 2 / 1e9, abs=0.005)


@pytest.mark.parametrize("name", ["llama", "gpt2, tied"])
def test_new_tokens_start_as_the_mean_row_at_every_world_size(
    recipe: dict[str, Any], tiny_model: Path, tmp_path: Path, name: str
) -> None:
    folder = save_model(CONFIGS[name], tiny_model, tmp_path / "model")
    recipe["model"] |= {"path": str(folder), "new_tokens": ["<|call|>", "<|think|>"], "vocabulary_multiple": 64}
    one, three = (loaded(recipe, tmp_path, ranks)[0]["parameters"] for ranks in (1, 3))
    plain = AutoModelForCausalLM.from_pretrained(folder)
    old = plain.get_input_embeddings().weight.detach()
    (embedding,) = (key for key, value in plain.named_parameters() if value is plain.get_input_embeddings().weight)
    assert one[embedding].shape[0] == -(-(len(old) + 2) // 64) * 64
    assert torch.equal(one[embedding][: len(old)], old)
    assert torch.allclose(one[embedding][len(old) :], old.double().mean(0).float().expand(64 - len(old) % 64, -1))
    for key, parameter in one.items():
        assert torch.equal(parameter, three[key]), key


def test_new_tokens_are_trained_and_exported(
    recipe: dict[str, Any], launch: Launch, tiny_model: Path, tmp_path: Path
) -> None:
    rows = chats(20)
    for row in rows:
        row["messages"][1]["content"] += "<|done|>"
    recipe["data"]["train"] = str(write_jsonl(tmp_path / "train.jsonl", rows))
    recipe["model"]["new_tokens"] = ["<|done|>"]
    launch(recipe)
    export = Path(recipe["run_dir"]) / "export"
    tokenizer, tuned = AutoTokenizer.from_pretrained(export), AutoModelForCausalLM.from_pretrained(export)
    (token,) = tokenizer.encode("<|done|>")
    rows_of_base = AutoModelForCausalLM.from_pretrained(tiny_model).get_input_embeddings().weight.shape[0]
    assert token >= rows_of_base
    assert tuned.get_input_embeddings().weight.shape[0] == tuned.config.vocab_size == token + 1


def test_a_new_token_that_is_there_is_told(recipe: dict[str, Any]) -> None:
    recipe["model"]["new_tokens"] = ["<|im_end|>"]
    with pytest.raises(BadInput, match=r"model\.new_tokens: the tokenizer of .* has <\|im_end\|> already"):
        preflight(parse_recipe(recipe), 1)


def test_converted_models_cannot_grow(recipe: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    recipe["model"] = {"path": str(save_model(CONFIGS["mixtral"], tiny_model, tmp_path / "m")), "new_tokens": ["<x>"]}
    with pytest.raises(BadInput, match=r"model\.new_tokens: transformers converts its tensors on loading"):
        preflight(parse_recipe(recipe), 1)


def test_a_vocabulary_that_transformers_would_not_grow_is_refused_before_gpus_are_asked_for(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    config = json.loads((REPOSITORY / "ds_configs" / "zero3.json").read_text())
    config["zero_optimization"]["zero_hpz_partition_size"] = 2
    (tmp_path / "hpz.json").write_text(json.dumps(config))
    recipe |= {"deepspeed": str(tmp_path / "hpz.json")}
    recipe["model"]["new_tokens"] = ["<|call|>"]
    with pytest.raises(BadInput, match=r"model\.new_tokens: zero_hpz_partition_size is set"):
        preflight(parse_recipe(recipe), 2)


def test_all_that_does_not_fit_is_one_error(recipe: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    folder = save_model(CONFIGS["llama"], tiny_model, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"], tensors["model.norm.weight"]
    tensors |= {"model.layers.1.mlp.down_proj.weight": torch.zeros(3, 5), "adapter.weight": torch.zeros(2)}
    save_file(tensors, folder / "model.safetensors")
    recipe["model"]["path"] = str(folder)
    with pytest.raises(BadInput) as raised:
        preflight(parse_recipe(recipe), 1)
    said = str(raised.value)
    assert "lack tensors: model.layers.0.mlp.up_proj.weight; model.norm.weight" in said
    assert "of other shapes: model.layers.1.mlp.down_proj.weight [3, 5], config says [32, 64]" in said
    assert "that the model has not: adapter.weight" in said


@pytest.mark.parametrize("kept", [0.5, 0.999])
def test_a_cut_off_file_is_told(recipe: dict[str, Any], tiny_model: Path, tmp_path: Path, kept: float) -> None:
    folder = save_model(CONFIGS["llama"], tiny_model, tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * kept)])
    recipe["model"]["path"] = str(folder)
    with pytest.raises(BadInput, match=r"model\.safetensors.* is it complete\?"):
        preflight(parse_recipe(recipe), 1)


def test_a_missing_file_of_the_index_is_told(recipe: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    folder = save_model(CONFIGS["llama"], tiny_model, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.x"}}))
    recipe["model"]["path"] = str(folder)
    with pytest.raises(BadInput, match=r"lacks model-00001-of-00001\.x, which its index names"):
        preflight(parse_recipe(recipe), 1)


def test_both_names_of_a_tied_weight_go_to_transformers(
    recipe: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    folder = save_model(CONFIGS["llama, tied"], tiny_model, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    recipe["model"]["path"] = str(folder)
    found, said = loaded(recipe, tmp_path, ranks=2)
    assert "which its config ties" in said
    assert_same(found, folder, torch.float32)


def test_a_hub_name_is_read_from_the_hubs_cache(
    recipe: dict[str, Any], launch: Launch, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch(recipe)
    cached = tmp_path / "hub" / "hub" / "models--owner--tiny"
    shutil.copytree(tiny_model, cached / "snapshots" / "0123abcd")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123abcd")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    by_name = recipe | {"model": {"path": "owner/tiny"}, "run_dir": str(tmp_path / "by-name")}
    done = launch(by_name)
    assert "GB read by each rank" in done.stdout
    assert losses(by_name) == losses(recipe)


@pytest.mark.parametrize("buffers", [False, True])
def test_a_resumed_run_reads_of_the_base_model_only_buffers(
    recipe: dict[str, Any], launch: Launch, tiny_model: Path, tmp_path: Path, buffers: bool
) -> None:
    if buffers:  # a checkpoint holds parameters only
        folder = save_model(Gemma4TextConfig(**GEMMA4), tiny_model, tmp_path / "model")
        tensors = load_file(folder / "model.safetensors")
        scalars = {name: torch.full_like(tensor, 0.37) for name, tensor in tensors.items() if "layer_scalar" in name}
        assert scalars
        save_file(tensors | scalars, folder / "model.safetensors", {"format": "pt"})
        recipe["model"] = {"path": str(folder), "attention": "eager"}
    whole = recipe | {"run_dir": str(tmp_path / "whole")}
    launch(whole)
    recipe["checkpoint"] = {"every_steps": 2}
    launch(recipe)
    run = Path(recipe["run_dir"])
    for path in ("state.json", "checkpoints/step-00000004"):  # as if it had ended after step 2
        shutil.rmtree(run / path) if (run / path).is_dir() else (run / path).unlink()
    done = launch(recipe)
    assert "not read yet" in done.stdout
    assert losses(recipe) == losses(whole)
