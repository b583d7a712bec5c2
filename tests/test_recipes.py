"""The recipes of real models: each passes `fullft check` on the cluster it names, without hub or weights."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from chat_templates import SHAPES
from conftest import REPOSITORY, TEXTS, chat, write_jsonl
from test_masks import make_tokenizer

from fullft.cli import main
from fullft.planner import hardware
from fullft.preflight import preflight
from fullft.recipe import load_recipe

RECIPES = REPOSITORY / "launch" / "recipes"
_LLAMA3 = {
    "model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072, "tie_word_embeddings": False, "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
_QWEN3 = {
    "model_type": "qwen3", "vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6,
}  # fmt: skip
# As in config.json on the hub, and the number of parameters that the hub shows, which no slip in the former would have.
MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "llama-3.1-8b": ("llama-3.1", 8_030_261_248, _LLAMA3 | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    }),
    "llama-3.1-70b": ("llama-3.1", 70_553_706_496, _LLAMA3 | {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    }),
    "qwen3-4b": ("chatml", 4_022_468_096, _QWEN3 | {
        "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
        "tie_word_embeddings": True, "max_position_embeddings": 262144, "rope_theta": 5000000.0,
    }),
    "qwen3-32b": ("qwen3", 32_762_123_264, _QWEN3 | {
        "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64,
        "tie_word_embeddings": False, "max_position_embeddings": 40960, "rope_theta": 1000000.0,
    }),
    "mistral-7b": ("mistral", 7_248_023_552, {
        "model_type": "mistral", "vocab_size": 32768, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": None,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "tie_word_embeddings": False,
    }),
    "gemma-3-27b": ("gemma-3", 27_432_406_640, {
        "model_type": "gemma3", "image_token_index": 262144, "mm_tokens_per_image": 256,
        "text_config": {
            "model_type": "gemma3_text", "vocab_size": 262208, "hidden_size": 5376, "intermediate_size": 21504,
            "num_hidden_layers": 62, "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128,
            "query_pre_attn_scalar": 168, "sliding_window": 1024, "max_position_embeddings": 131072,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        },
        "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
            "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 896, "patch_size": 14,
            "vision_use_head": False,
        },
    }),
}  # fmt: skip
ROWS: dict[str, list[dict[str, Any]]] = {  # a few rows of each hub set, with its columns
    "meta-math/MetaMathQA": [
        {"query": f"What is {i} and {i}?", "response": f"It is {2 * i}. The answer is: {2 * i}"} for i in range(3000)
    ],
    "HuggingFaceH4/ultrachat_200k": [chat(f"Say {text} {i}", text) for i in range(50) for text in TEXTS],
    "Salesforce/wikitext": [{"text": text} for text in ["", *TEXTS]],
    "Rowan/hellaswag": [{"ctx": text, "endings": ["One.", "Two.", "A b.", "C."], "label": "2"} for text in TEXTS],
    "allenai/ai2_arc": [
        {"question": text, "choices": {"text": ["One", "Two"], "label": ["A", "B"]}, "answerKey": "B"} for text in TEXTS
    ],
    "openai/gsm8k": [{"question": f"How many are {i} pens?", "answer": f"There are {i}.\n#### {i}"} for i in range(30)],
}


def stand_ins(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Overrides with which a recipe needs no network: a few rows in place of the hub's sets.

    The model keeps its name: it is put into a cache of the hub, its config with a small tokenizer, and no weights.
    """
    shape, _, config = MODELS[name]
    recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    cached = folder / "hub" / f"models--{recipe['model']['path'].replace('/', '--')}"
    snapshot = cached / "snapshots" / ("0" * 40)
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(snapshot.name)
    make_tokenizer(SHAPES[shape]).save_pretrained(snapshot)
    (snapshot / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "hub"))
    overrides = [f"run_dir={folder / 'run'}"]
    sets = {f"data.{key}.{at}": one for key in ("train", "replay") for at, one in enumerate(recipe["data"][key])}
    sets |= {f"retention.tasks.{at}.data": one["data"] for at, one in enumerate(recipe["retention"]["tasks"])}
    for key, source in sets.items():
        file = write_jsonl(folder / f"{source['path'].replace('/', '-')}.jsonl", ROWS[source["path"]])
        overrides += [f"{key}.path={file}", f"{key}.subset=null"]
    return overrides


def cluster_of(name: str) -> tuple[int, int]:
    """Nodes and GPUs of each, as the first line of a recipe says them."""
    first = (RECIPES / f"{name}.yaml").read_text().partition("\n")[0]
    nodes, gpus = re.findall(r"For (\d) nodes? × (\d) H100-80GB", first)[0]
    return int(nodes), int(gpus)


@pytest.mark.parametrize("name", MODELS)
def test_a_recipe_passes_check_and_plan_on_the_cluster_it_names(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, overrides = str(RECIPES / f"{name}.yaml"), stand_ins(name, tmp_path, monkeypatch)
    nodes, gpus = cluster_of(name)
    # Not the disk: this is not the machine that the recipe is for.
    inputs = preflight(
        load_recipe(config, overrides), nodes * gpus, True, gpus, room=False, gpu=hardware.gpu("h100-80gb")
    )
    assert inputs.facts.parameters == MODELS[name][1]
    assert inputs.attention.name == "varlen"
    assert not [one for one in inputs.warnings if "memory" in one]
    written = re.findall(r"# (\d+) GB each", Path(config).read_text())
    assert written == [f"{12 * MODELS[name][1] / 1e9:.0f}"]

    asked = ["plan", config, "--nodes", str(nodes), "--gpus-per-node", str(gpus), "--gpu", "h100-80gb", *overrides]
    monkeypatch.setattr(sys, "argv", ["fullft", *asked])
    code, said = main(), capsys.readouterr()
    assert code == 0, said.err
    assert "DOES NOT FIT" not in said.out
