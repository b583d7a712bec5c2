"""The plan of a GPU's memory beside rehearsals of rank 0 of N: states, and peaks by phase.

    python -m benchmarks.planner [--quick] [--device cpu|cuda] [--only ROW …]

Each row is a `fullft rehearse` of its own process. On a CPU, small models in fp32 and smaller ones in bf16, and what is
allocated is counted by torch's profiler: exact, but without a GPU's attention, allocator and context. On a GPU, models
that fit it in bf16, and what torch's allocator held at the most.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import goal, write

_SMALL = {"vocab_size": 32000, "max_position_embeddings": 131072, "hidden_size": 384, "num_attention_heads": 6}
MODELS: dict[str, dict[str, Any]] = {
    "llama-4m": _SMALL | {
        "model_type": "llama", "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 8, "vocab_size": 8000,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
    },
    "gemma3-3m": _SMALL | {
        "model_type": "gemma3_text", "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 8000,
    },
    "llama-40m": _SMALL | {
        "model_type": "llama", "intermediate_size": 1024, "num_hidden_layers": 8, "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    },
    "qwen3-30m": _SMALL | {
        "model_type": "qwen3", "intermediate_size": 1152, "num_hidden_layers": 8, "num_key_value_heads": 2,
        "head_dim": 128, "tie_word_embeddings": True,
    },
    "gemma3-40m": _SMALL | {
        "model_type": "gemma3_text", "intermediate_size": 1536, "num_hidden_layers": 6, "num_key_value_heads": 2,
        "head_dim": 64, "vocab_size": 64000,
    },
    "mixtral-60m": _SMALL | {
        "model_type": "mixtral", "intermediate_size": 768, "num_hidden_layers": 5, "num_key_value_heads": 2,
        "num_local_experts": 8, "num_experts_per_tok": 2, "tie_word_embeddings": False,
    },
    "llama-1b": {  # Llama-3.2-1B
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
        "tie_word_embeddings": True, "max_position_embeddings": 131072,
    },
    "qwen3-4b": {
        "model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "tie_word_embeddings": True, "max_position_embeddings": 131072,
    },
    "gemma3-4b": {
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262144,
        "max_position_embeddings": 131072,
    },
    "llama-8b": {  # Llama-3.1-8B
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
        "max_position_embeddings": 131072,
    },
    "llama-70b": {  # Llama-3.1-70B
        "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
        "max_position_embeddings": 131072,
    },
}  # fmt: skip
OFFLOAD = "ds_configs/zero3_offload.json"
# ZeRO-3 with so small sizes that these models meet their limits as large ones meet those of zero3.json.
FEW, FEW_LIVE = "deepspeed={folder}/few.json", {
    "stage": 3, "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 100_000,
    "reduce_bucket_size": 4_000_000, "stage3_prefetch_bucket_size": "auto", "stage3_max_live_parameters": 28_000_000,
    "stage3_param_persistence_threshold": "auto", "stage3_max_reuse_distance": 4_000_000,
}  # fmt: skip
# model, ranks, tokens of a sequence, checkpointing, micro-batches a step, further keys; the first are those of --quick
Row = tuple[str, int, int, str, int, tuple[str, ...]]
CPU: list[Row] = [
    ("llama-40m", 8, 512, "none", 1, ()),
    ("qwen3-30m", 64, 512, "full", 1, ()),
    ("mixtral-60m", 64, 512, "none", 1, ()),
    ("gemma3-40m", 8, 512, "none", 1, ()),
    ("llama-40m", 512, 1024, "full", 2, ()),
    ("llama-40m", 64, 1024, "full", 1, (FEW,)),
    ("qwen3-30m", 8, 512, "none", 1, (FEW,)),
    ("llama-40m", 63, 512, "selective", 1, ()),
    ("llama-40m", 8, 512, "full", 1, (f"deepspeed={OFFLOAD}",)),
    ("llama-40m", 64, 1024, "full", 1, ("train.mlp_tiles=4",)),
    ("qwen3-30m", 8, 1024, "none", 1, ()),
    ("gemma3-40m", 512, 512, "full", 1, ()),
    ("mixtral-60m", 8, 512, "full", 1, ()),
    ("llama-40m", 8, 1024, "none", 1, ("train.sequence_parallel=2",)),
    ("llama-40m", 64, 512, "full", 1, ("deepspeed=ds_configs/zero3_hpz.json",)),
    ("llama-4m", 8, 256, "none", 1, ("train.precision=bf16",)),
    ("llama-4m", 64, 256, "full", 2, ("train.precision=bf16",)),
    ("gemma3-3m", 8, 256, "none", 1, ("train.precision=bf16",)),
]
CUDA: list[Row] = [
    ("llama-1b", 8, 8192, "full", 1, ()),
    ("llama-8b", 64, 8192, "full", 1, ()),
    ("qwen3-4b", 64, 8192, "full", 1, ()),
    ("llama-1b", 8, 8192, "none", 1, ()),
    ("llama-8b", 16, 4096, "selective", 2, ()),
    ("llama-8b", 8, 8192, "full", 1, (f"deepspeed={OFFLOAD}",)),
    ("llama-8b", 512, 32768, "offload", 1, ()),
    ("gemma3-4b", 64, 4096, "full", 1, ()),
    ("qwen3-4b", 8, 4096, "none", 1, ()),
    ("llama-70b", 512, 4096, "full", 1, ()),
]
QUICK = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"the first {QUICK} rows")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    parser.add_argument("--seconds", type=float, default=3600, help="begin no row after this time (default 3600)")
    arguments = parser.parse_args()
    device = arguments.device or ("cpu" if os.environ.get("DS_ACCELERATOR") == "cpu" else _device())
    rows, started = list[dict[str, Any]](), time.monotonic()
    grid = CPU if device == "cpu" else CUDA
    for row in grid[: QUICK if arguments.quick else None]:
        if time.monotonic() - started > arguments.seconds:
            rows.append(describe(row) | {"not_measured": "the time was over"})
            continue
        rows.append(measure(row, device))
        print(line(rows[-1]), flush=True)
        write_result(rows, device)  # what there is, should the time be over


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def describe(row: Row) -> dict[str, Any]:
    names = ("model", "world_size", "sequence_length", "activation_checkpointing", "micro_batches", "overrides")
    return dict(zip(names, row, strict=True))


def measure(row: Row, device: str) -> dict[str, Any]:
    """Plan and rehearsal of a row; with why it was not measured if it could not be."""
    from fullft.errors import BadInput
    from fullft.recipe import parse_recipe
    from fullft.rehearsal import rehearse

    model, world_size, length, mode, micro_batches, overrides = row
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.json").write_text(json.dumps(MODELS[model]))
        recipe: dict[str, Any] = {
            "run_dir": f"{name}/run", "model": {"path": name},
            "data": {"train": [f"{name}/none.jsonl"], "sequence_length": length},
            "train": {"steps": 1, "global_batch_size": world_size * micro_batches, "activation_checkpointing": mode},
        }  # fmt: skip
        (Path(name) / "few.json").write_text(json.dumps({"zero_optimization": FEW_LIVE}))
        overrides = tuple(one.format(folder=name) for one in overrides)
        try:
            steps = 3 if micro_batches == 1 else 2
            found = rehearse(parse_recipe(recipe, overrides), world_size, device, micro_batches, steps, count=True)
        except (BadInput, RuntimeError) as error:
            return describe(row) | {"not_measured": str(error).strip().splitlines()[-1]}
    return describe(row) | found | errors(found)


def errors(found: dict[str, Any]) -> dict[str, Any]:
    """Of the plan, relative to what was measured."""
    measured, planned = found["measured"], found["planned"]
    states = {name: size for name, size in measured["states"].items() if size or planned["states"].get(name)}
    return {
        "error_of_states": max(abs(planned["states"].get(name, 0) / max(size, 1) - 1) for name, size in states.items()),
        "error_of_phases": {name: planned["phases"][name] / size - 1 for name, size in measured["phases"].items()},
        "error_of_peak": planned["peak"] / measured["peak"] - 1,
    }


def line(row: dict[str, Any]) -> str:
    start = (
        f"{row['model']:12} N {row['world_size']:4} s {row['sequence_length']:6} {row['activation_checkpointing']:10}"
        f"{' '.join(row['overrides']):38} "
    )
    if "not_measured" in row:
        return f"{start}{row['not_measured']}"
    phases = " ".join(f"{name} {error:+.1%}" for name, error in row["error_of_phases"].items())
    peak = row["measured"]["peak"] / 2**30
    return f"{start}states {row['error_of_states']:.2%}, peak {peak:.3f} GiB {row['error_of_peak']:+.1%} ({phases})"


def write_result(rows: list[dict[str, Any]], device: str) -> None:
    done = [row for row in rows if "not_measured" not in row]
    if not done:
        return
    states, peaks = max(row["error_of_states"] for row in done), [abs(row["error_of_peak"]) for row in done]
    where = "on a GPU" if device == "cuda" else "as allocated on a CPU"
    median = statistics.median(peaks)
    goals = [
        goal("states of rank 0, worst error", "≤ 0.01", states, states <= 0.01),
        goal(f"peak {where}, median error", "≤ 0.05", median, median <= 0.05),
        goal(f"peak {where}, worst error", "≤ 0.1", max(peaks), max(peaks) <= 0.1),
    ]
    write("planner", {"rehearsals": rows}, goals, load_average=os.getloadavg())


if __name__ == "__main__":
    main()
