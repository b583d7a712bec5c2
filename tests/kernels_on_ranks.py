"""Run on every rank: steps with liger's kernels and without. On CPU they are interpreted (TRITON_INTERPRET=1).

kernels_on_ranks.py OUT.json
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from fullft import activations, cluster, kernels
from fullft.engine import start
from fullft.loss import forward

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 97, "pad_token_id": None,
}  # fmt: skip
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES), "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES), "qwen3": Qwen3Config(**SIZES),
}  # fmt: skip
# selective first: liger's rotary embedding, which it leaves out, is there for good once it is taken. Few, since an
# interpreted step takes seconds.
CASES = (("llama", "selective"), *((name, "none") for name in CONFIGS))


def mend_interpreter() -> None:
    """Triton's interpreter passes floats as Python's, and has none of libdevice."""
    import liger_kernel.ops.rms_norm
    import numpy
    import triton.language as tl
    from triton.runtime import interpreter

    real = interpreter._implicit_cvt

    def convert(argument: Any) -> Any:
        if type(argument) is not float:
            return real(argument)
        handle = interpreter.TensorHandle(numpy.array([argument], dtype=numpy.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    interpreter._implicit_cvt = convert
    liger_kernel.ops.rms_norm.rsqrt = lambda x: tl.math.rsqrt(x)  # which is another one while a kernel runs


def run(config: PretrainedConfig, chosen: str, checkpointing: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    kernels.apply(model, chosen, checkpointing)
    activations.enable(model, checkpointing)
    filled = {
        "train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }  # fmt: skip
    engine = start(model, torch.optim.SGD(model.parameters(), lr=0.5), filled)
    losses = []
    for step in range(2):
        torch.manual_seed(step * 100 + dist.get_rank())
        ids = torch.randint(97, (1, 12), device=engine.device)
        positions = torch.tensor([[*range(7), *range(5)]], device=engine.device)
        logits = forward(engine, ids, positions, torch.arange(12, device=engine.device))
        loss = torch.nn.functional.cross_entropy(logits[0].float(), ids[0].roll(-1))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    from deepspeed.utils import safe_get_full_fp32_param

    weights = torch.cat([safe_get_full_fp32_param(one).flatten() for one in model.parameters()])
    return {"losses": losses, "weights": weights, "fused": sum("Liger" in str(one) for one in model.modules())}


def main() -> None:
    cluster.join(me := cluster.discover(), 5)
    if not torch.cuda.is_available():
        mend_interpreter()
    found: dict[str, Any] = {}
    plain = {name: run(config, "none", "none") for name, config in CONFIGS.items()}  # liger changes classes for good
    for name, mode in CASES:
        one = run(CONFIGS[name], "liger", mode)
        found[f"{name}, {mode}"] = {
            "loss": max(abs(a - b) for a, b in zip(one["losses"], plain[name]["losses"], strict=True)),
            "weights": float((one["weights"] - plain[name]["weights"]).abs().max()),
            "fused": one["fused"] - plain[name]["fused"],
            "moved": abs(one["losses"][0] - one["losses"][1]),
        }
    if me.is_main:
        Path(sys.argv[1]).write_text(json.dumps(found))
    dist.barrier()
    cluster.leave()


main()
cluster.exit_now(0)
