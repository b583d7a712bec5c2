"""python -m benchmarks.published: tokens/s per GPU and fit by the plan beside published runs.

Sources: torchtitan, docs/performance.md at 0413364 (FSDP2, 64 A100-80GB); llm-foundry, scripts/train/benchmarking/
README.md at 061f2c7 (FSDP, MPT; planned as a Llama 2 of that size). Both shard as ZeRO-3 does. Networks are not named
for all of them: the table's are taken. Every published run fitted where it ran.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from fullft import model
from fullft.planner import choose, hardware, speed
from fullft.planner.setting import Setting, setting_of
from fullft.recipe import parse_recipe

SIZES: dict[str, dict[str, Any]] = {  # hidden, MLP, layers, heads, keys, vocabulary: as published by Meta
    "7B": dict(zip(("h", "f", "L", "H", "K", "V"), (4096, 11008, 32, 32, 32, 32000), strict=True)),
    "13B": dict(zip(("h", "f", "L", "H", "K", "V"), (5120, 13824, 40, 40, 40, 32000), strict=True)),
    "8B": dict(zip(("h", "f", "L", "H", "K", "V"), (4096, 14336, 32, 32, 8, 128256), strict=True)),
    "70B": dict(zip(("h", "f", "L", "H", "K", "V"), (8192, 28672, 80, 64, 8, 128256), strict=True)),
    "70B (Llama 2)": dict(zip(("h", "f", "L", "H", "K", "V"), (8192, 28672, 80, 64, 8, 32000), strict=True)),
    "405B": dict(zip(("h", "f", "L", "H", "K", "V"), (16384, 53248, 126, 128, 8, 128256), strict=True)),
}
RUNS = [  # source, size, GPU, GPUs, length, micro-batch, checkpointing, tokens/s per GPU
    ("torchtitan", "8B", "a100-80gb", 64, 8192, 1, "selective", 2973),
    ("torchtitan", "70B", "a100-80gb", 64, 8192, 1, "full", 331),
    ("torchtitan", "13B", "a100-80gb", 64, 4096, 2, "none", 2162),
    ("torchtitan", "13B", "a100-80gb", 64, 4096, 2, "selective", 1904),
    ("torchtitan", "70B (Llama 2)", "a100-80gb", 64, 4096, 2, "full", 353),
    ("llm-foundry", "7B", "h100-80gb", 8, 2048, 6, "none", 10643),
    ("llm-foundry", "7B", "h100-80gb", 8, 8192, 8, "full", 6935),
    ("llm-foundry", "13B", "h100-80gb", 8, 2048, 2, "none", 4792),
    ("llm-foundry", "13B", "h100-80gb", 8, 4096, 10, "full", 4717),
    ("llm-foundry", "13B", "h100-80gb", 64, 2048, 2, "none", 4800),
]


def setting(folder: Path, size: str, gpus: int, length: int, micro_batch: int, mode: str) -> Setting:
    """Of a Llama of that size; its config goes into `folder`."""
    of = SIZES[size]
    LlamaConfig(
        hidden_size=of["h"], intermediate_size=of["f"], num_hidden_layers=of["L"], num_attention_heads=of["H"],
        num_key_value_heads=of["K"], vocab_size=of["V"], tie_word_embeddings=False, max_position_embeddings=131072,
    ).save_pretrained(folder / size)  # fmt: skip
    recipe = parse_recipe({
        "run_dir": str(folder / "run"), "model": {"path": str(folder / size)},
        "data": {"train": str(folder / "none.jsonl"), "sequence_length": length},
        "train": {"steps": 1, "global_batch_size": gpus * micro_batch, "micro_batch_size": micro_batch},
    })  # fmt: skip
    found = setting_of(recipe, model.on_meta(recipe.model), gpus, 8)
    return replace(found, checkpointing=mode, kernels="torch")


def main() -> None:
    import tempfile

    errors, lines = (
        list[float](),
        ["| source | run | published | predicted | error | planned to fit |", "|" + "---|" * 6],
    )
    with tempfile.TemporaryDirectory() as folder:
        for source, size, name, gpus, length, micro_batch, mode, published in RUNS:
            planned = setting(Path(folder), size, gpus, length, micro_batch, mode)
            device = hardware.gpu(name)
            rate = speed.predict(planned, device).tokens_per_second_per_gpu
            errors.append(rate / published - 1)
            fits = "yes" if choose.fits(planned, device) else "no"
            run = f"{size}, {gpus} × {name}, {micro_batch} × {length}, {mode}"
            lines.append(f"| {source} | {run} | {published} | {rate:.0f} | {100 * errors[-1]:+.0f} % | {fits} |")
    sizes = [abs(error) for error in errors]
    end = f"Error: median {100 * statistics.median(sizes):.0f} %, worst {100 * max(sizes):.0f} %."
    text = "\n".join(
        ["Tokens/s per GPU by `python -m benchmarks.published`; nothing is fitted to these.", "", *lines, "", end]
    )
    (Path(__file__).parent / "results" / "published.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
