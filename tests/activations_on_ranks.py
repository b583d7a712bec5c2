"""Run on every rank: losses, weights after steps, and what is kept for backward, of each mode of checkpointing.

activations_on_ranks.py OUT.json
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from fullft import activations, cluster
from fullft.engine import start
from fullft.loss import forward

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 97, "pad_token_id": None,
}  # fmt: skip
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "qwen2, biases": Qwen2Config(**SIZES),
    "gemma": GemmaConfig(**SIZES),
    "gpt-neox, biases and dropout": GPTNeoXConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, vocab_size=97,
        hidden_dropout=0.1,
    ),
}  # fmt: skip
MODES = ("none", "selective", "full", "offload")


def run(config: PretrainedConfig, mode: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # which transformers starts at 0: nothing would differ if they were added twice
            torch.nn.init.normal_(parameter, std=0.5)
    activations.enable(model, mode)
    filled = {
        "train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }  # fmt: skip
    engine = start(model, torch.optim.SGD(model.parameters(), lr=0.1), filled)
    positions = torch.tensor([[*range(40), *range(24)]])
    losses, kept = [], 0
    for step in range(3):
        torch.manual_seed(hash((step, dist.get_rank())))
        ids = torch.randint(97, (1, 64))
        seen: dict[int, int] = {}
        own = {parameter.data_ptr() for parameter in model.parameters()}

        def note(tensor: torch.Tensor, seen: dict[int, int] = seen, own: set[int] = own) -> torch.Tensor:
            if not isinstance(tensor, torch.nn.Parameter) and tensor.data_ptr() not in own:
                seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            logits = forward(engine, ids, positions, torch.arange(64))
        loss = torch.nn.functional.cross_entropy(logits[0].float(), ids[0].roll(-1))
        kept = sum(seen.values())
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    from deepspeed.utils import safe_get_full_fp32_param

    weights = torch.cat([safe_get_full_fp32_param(one).flatten() for one in model.parameters()])
    return {"losses": losses, "weights": weights, "kept": kept}


def main() -> None:
    cluster.join(me := cluster.discover(), 5)
    found: dict[str, Any] = {}
    for name, config in CONFIGS.items():
        runs = {mode: run(config, mode) for mode in MODES}
        plain = runs["none"]
        found[name] = {
            mode: {
                "loss": max(abs(a - b) for a, b in zip(one["losses"], plain["losses"], strict=True)),
                "weights": float((one["weights"] - plain["weights"]).abs().max()),
                "moved": plain["losses"][0] - plain["losses"][-1],
                "kept": one["kept"],
            }
            for mode, one in runs.items()
        }
    if me.is_main:
        Path(sys.argv[1]).write_text(json.dumps(found))
    dist.barrier()
    cluster.leave()


main()
cluster.exit_now(0)
