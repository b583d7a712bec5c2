"""Other architectures than Llama: loaded, trained packed, evaluated, generated from and exported without loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Launch, chats, write_jsonl
from test_run import loss_of_chats
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3Config,
)

from fullft.errors import BadInput
from fullft.preflight import preflight
from fullft.recipe import parse_recipe

pytestmark = pytest.mark.ranks

SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 256,
}  # fmt: skip
CONFIGS: dict[str, PretrainedConfig] = {
    "qwen3, norms of queries and keys": Qwen3Config(**SMALL),
    "gemma3, sliding windows": Gemma3TextConfig(**SMALL, sliding_window=16),
    "mixtral, experts fused on loading": MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
    "gpt2, learned positions and biases": GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=256),
    "gpt-neox, a head renamed on loading": GPTNeoXConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=256
    ),
}


def save_model(config: PretrainedConfig, tiny_model: Path, folder: Path) -> Path:
    """A randomly initialised model with the tokenizer of the tiny one."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    config.vocab_size, config.bos_token_id, config.eos_token_id = len(tokenizer), None, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_the_export_has_the_loss_of_the_last_evaluation(
    recipe: dict[str, Any], launch: Launch, tiny_model: Path, tmp_path: Path, name: str
) -> None:
    recipe["model"]["path"] = str(save_model(CONFIGS[name], tiny_model, tmp_path / "model"))
    rows = chats(4)
    held_out = str(write_jsonl(tmp_path / "held-out.jsonl", rows))
    recipe["data"]["validation"] = held_out
    recipe["retention"] = {"tasks": [{"name": "answers", "kind": "generate", "max_new_tokens": 3, "data": held_out}]}
    recipe["train"]["steps"] = 2
    launch(recipe, ranks=2)
    run = Path(recipe["run_dir"])
    before, after = (
        json.loads((run / f"retention/step-{step:08d}.json").read_text())["tasks"]["validation"]["score"]
        for step in (0, 2)
    )
    assert loss_of_chats(Path(recipe["model"]["path"]), rows, torch.float32) == pytest.approx(before, rel=1e-5)
    assert loss_of_chats(run / "export", rows, torch.float32) == pytest.approx(after, rel=1e-5)
    assert after < before


def test_attention_that_the_architecture_lacks_is_told_before_anything_starts(
    recipe: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    recipe["model"] |= {"path": str(save_model(Gemma2Config(**SMALL), tiny_model, tmp_path / "model"))}
    for attention, told in (("sdpa", r"model\.attention is sdpa, try eager"), ("varlen", r"varlen is not .*softcap")):
        recipe["model"]["attention"] = attention
        with pytest.raises(BadInput, match=told):
            preflight(parse_recipe(recipe), 1)
    recipe["model"]["attention"] = "auto"
    chosen = preflight(parse_recipe(recipe), 1).attention
    assert chosen.name == "eager"
    assert "softcap" in chosen.reason


@pytest.mark.parametrize("name", CONFIGS)
def test_auto_takes_the_kernel_for_packed_documents_where_the_architecture_can_use_it(
    recipe: dict[str, Any], tiny_model: Path, tmp_path: Path, name: str
) -> None:
    recipe["model"]["path"] = str(save_model(CONFIGS[name], tiny_model, tmp_path / "model"))
    chosen = preflight(parse_recipe(recipe), 1).attention
    assert chosen.name == ("sdpa" if name.startswith("gpt2") else "varlen")  # gpt2 has dropout in its attention
