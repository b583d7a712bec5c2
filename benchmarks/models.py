"""Models of random weights in the shapes that people train, chats of ragged lengths, and the FLOP of a step.

python -m benchmarks.models SIZE FOLDER            writes a Hugging Face folder
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Shapes of config.json; `tiny` is for seconds, `small` for a step of a second on a core.
_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 500000.0}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _LLAMA | {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 8000, "tie_word_embeddings": False,
    },
    "small": _LLAMA | {
        "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": 8000, "tie_word_embeddings": False,
    },
    "0.5b": {  # Qwen2.5-0.5B
        "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
        "rope_theta": 1000000.0,
    },
    "1b": _LLAMA | {  # Llama-3.2-1B
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "3b": _LLAMA | {  # Llama-3.2-3B
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "8b": _LLAMA | {  # Llama-3.1-8B
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    },
}  # fmt: skip


def parameters(size: str) -> int:
    """Parameters of a shape (biases and norms left out: below a thousandth)."""
    shape = SHAPES[size]
    layer, head = _matrices(shape)
    return shape["num_hidden_layers"] * layer + head * (1 if shape["tie_word_embeddings"] else 2)


def _matrices(shape: dict[str, Any]) -> tuple[int, int]:
    """Elements of the matrices of one layer, and of the head."""
    h, heads, kv = shape["hidden_size"], shape["num_attention_heads"], shape["num_key_value_heads"]
    d = shape.get("head_dim", h // heads)
    return h * heads * d * 2 + h * kv * d * 2 + 3 * h * shape["intermediate_size"], h * shape["vocab_size"]


def model_flops(size: str, documents: Iterable[int], positions: int, head_positions: int) -> float:
    """FLOP that forward and backward of packed documents need, without recomputation; a multiply-add is 2.

    Chowdhery et al. 2022 (PaLM), appendix B, for grouped queries and gated MLPs, and attention as causal masks need it:
    2·H·d·len·(len + 1) a layer and document forward, where PaLM counts twice that. Backward is twice the forward.

    Args:
        documents: their lengths, tokens.
        positions: of all sequences, padding included if the model computes it.
        head_positions: positions whose logits are needed.
    """
    shape = SHAPES[size]
    layer, head = _matrices(shape)
    heads = shape["num_attention_heads"]
    d = shape.get("head_dim", shape["hidden_size"] // heads)
    linear = 2 * positions * shape["num_hidden_layers"] * layer + 2 * head_positions * head
    attention = 2 * shape["num_hidden_layers"] * heads * d * sum(one * (one + 1) for one in documents)
    return 3.0 * (linear + attention)


def prepare(folder: Path, size: str, data: list[Path], tokenizer: Path | None) -> tuple[list[str], Path]:
    """The training files of a recipe (chats out of Python's documentation if none are given), and the model's folder,
    with that tokenizer (default: one trained on the same documentation)."""
    from benchmarks.data import inputs

    chats, made = inputs(folder / "inputs", None, tokenizer)
    model = folder / "model"
    subprocess.run([sys.executable, "-m", "benchmarks.models", size, str(model)], check=True)
    for file in made.iterdir():
        if file.name not in ("config.json", "generation_config.json") and "safetensors" not in file.name:
            shutil.copy(file, model)
    if not data:
        data = [folder / "chats.jsonl"]
        data[0].write_text("\n".join(chats) + "\n")
    return [str(path.absolute()) for path in data], model


def write(size: str, folder: Path) -> None:
    """Random weights, bf16 from 100 M parameters on, made on the GPU if there is one."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = SHAPES[size] | {"max_position_embeddings": 131072, "use_cache": False, "initializer_range": 0.02}
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.json").write_text(json.dumps(config))
        loaded = AutoConfig.from_pretrained(name)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if parameters(size) > 1e8 else torch.float32
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(loaded, dtype=dtype)
    model.save_pretrained(folder, max_shard_size="4GB")


def fitting() -> list[str]:
    """16 bytes a parameter, and 10 GB for activations, buffers and kernels."""
    import torch

    memory = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    return [size for size in reversed(SHAPES) if size[0].isdigit() and parameters(size) * 16 + 10e9 < memory] or [
        "tiny"
    ]


if __name__ == "__main__":
    if sys.argv[1:] == ["--fitting"]:
        print("\n".join(fitting()))
    else:
        write(sys.argv[1], Path(sys.argv[2]))
