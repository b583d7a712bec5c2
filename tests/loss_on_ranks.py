"""Run on every rank: a step of SGD by the loss in the head, on shards, against full logits in fp32 without DeepSpeed.

loss_on_ranks.py OUT.json: of each case, the largest differences.
"""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
    PretrainedConfig,
)

from fullft import cluster, head
from fullft.data.batches import Batch
from fullft.engine import for_evaluation, start
from fullft.loss import IGNORE, LabelWeights, kl_divergence
from fullft.retention.base import ReferenceDivergence, ReplayDivergence

VOCABULARY, LENGTH = 97, 24
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "vocab_size": VOCABULARY, "pad_token_id": None,
}  # fmt: skip
LLAMA = LlamaConfig(**SIZES)
TIED = LlamaConfig(**SIZES, tie_word_embeddings=True)
# name: config, dtype, bytes for the logits of a chunk, where the divergence is from
CASES: dict[str, tuple[PretrainedConfig, torch.dtype, int, str]] = {
    "one chunk": (LLAMA, torch.float32, 1 << 30, ""),
    "chunks": (LLAMA, torch.float32, 14 * VOCABULARY * 5, ""),
    "tied": (TIED, torch.float32, 14 * VOCABULARY * 5, ""),
    "cached divergence": (LLAMA, torch.float32, 14 * VOCABULARY * 5, "cache"),
    "divergence from a model": (TIED, torch.float32, 14 * VOCABULARY * 5, "model"),
    "bias": (PhiConfig(**SIZES), torch.float32, 14 * VOCABULARY * 5, ""),
    "softcap": (
        Gemma2Config(**SIZES, final_logit_softcapping=0.5, attn_implementation="eager"),
        torch.float32, 14 * VOCABULARY * 5, "model",
    ),
    "scale": (CohereConfig(**SIZES), torch.float32, 14 * VOCABULARY * 5, ""),
    "divided": (GraniteConfig(**SIZES, logits_scaling=8.0), torch.float32, 14 * VOCABULARY * 5, ""),
    "gpt2": (
        GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, vocab_size=VOCABULARY, bos_token_id=None,
                   eos_token_id=None, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
        torch.float32, 14 * VOCABULARY * 5, "",
    ),
    "changed otherwise": (LLAMA, torch.float32, 14 * VOCABULARY * 5, "model"),
    "bf16": (LLAMA, torch.bfloat16, 14 * VOCABULARY * 5, ""),
}  # fmt: skip
WEIGHTS = LabelWeights(task=1 / 31, replay=0.5 / 31, kl=0.7 / 31)


def change(_model: Any, _inputs: Any, output: Any) -> Any:
    """A model that does something to its logits that the loss in the head does not know."""
    output.logits = output.logits + 0.3 * output.logits.sin()
    return output


def batch_of(rank: int) -> Batch:
    """Two rows, one of them replayed; the last of several ranks has no label."""
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(5, VOCABULARY, (2, LENGTH), generator=generator)
    labels = ids.roll(-1, 1).where(torch.rand(2, LENGTH, generator=generator) < 0.6, IGNORE)
    if rank and rank == dist.get_world_size() - 1:
        labels[:] = IGNORE
    positions = torch.arange(LENGTH).expand(2, -1).contiguous()
    return Batch.of(ids, positions, labels, (LENGTH, LENGTH), (False, True), ((0, 0), (1, 0)))


class TopK:
    """The base's predictions at the labels of the replay row."""

    def __init__(self, base: Any, batch: Batch) -> None:
        logits = base(input_ids=batch.input_ids, position_ids=batch.position_ids).logits[1]
        best = logits[batch.labels[1] != IGNORE].log_softmax(-1).topk(8)
        self.known = best.indices, best.values, (1 - best.values.exp().sum(-1)).clamp(min=0)

    def of(self, *_: Any) -> tuple[torch.Tensor, ...]:
        return self.known


def reference(model: Any, base: Any, batch: Batch, divergence: str) -> torch.Tensor:
    total = torch.zeros(())
    logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids).logits.float()
    of_base = base(input_ids=batch.input_ids, position_ids=batch.position_ids).logits.float().detach()
    for row, replay in enumerate(batch.replay.tolist()):
        wanted = batch.labels[row] != IGNORE
        nats = F.cross_entropy(logits[row][wanted], batch.labels[row][wanted], reduction="sum")
        total = total + nats * (WEIGHTS.replay if replay else WEIGHTS.task)
        if replay and divergence == "cache":
            total = total + WEIGHTS.kl * kl_divergence(logits[row][wanted], *TopK(base, batch).known).sum()
        elif replay and divergence == "model":
            p, q = (one[row][wanted].log_softmax(-1) for one in (of_base, logits))
            total = total + WEIGHTS.kl * (p.exp() * (p - q)).sum()
    return total


def case(name: str) -> dict[str, float]:
    config, dtype, head.WORKSPACE_BYTES["cpu"], divergence = CASES[name]
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config).train()
    for parameter in plain.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    if name == "changed otherwise":
        plain.register_forward_hook(change)
    base = copy.deepcopy(plain)
    for parameter in base.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    plain, base = plain.to(dtype), base.to(dtype)

    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    filled = {
        "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.0, "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16}, "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    tuned = copy.deepcopy(plain)
    engine = start(tuned, torch.optim.SGD(tuned.parameters(), lr=1.0), filled)
    mine, batch, of_base = head.Head(engine), batch_of(rank), None
    assert bool(mine.why_not) == (name == "changed otherwise"), mine.why_not
    if divergence == "cache":
        of_base = ReplayDivergence(TopK(base, batch), {(1, 0): 0})  # type: ignore[arg-type]
    elif divergence == "model":
        other = start(copy.deepcopy(base).requires_grad_(False), None, for_evaluation(filled))
        other.eval()
        of_base = ReferenceDivergence(other)
    loss, nats, kl = mine.loss(batch, WEIGHTS, of_base)
    engine.backward(loss * world)
    engine.step()

    expected = [reference(plain, base, batch_of(one), divergence) for one in range(world)]
    sum(expected).backward()  # type: ignore[union-attr]
    by_rows = float((WEIGHTS.loss(nats, kl, batch.replay) - loss).abs())
    found = {"loss": float((loss - expected[rank]).abs()), "rows": by_rows, "gradient": 0.0, "size": 0.0}
    from deepspeed.utils import safe_get_full_fp32_param

    for one, (_, parameter) in zip(plain.parameters(), engine.module.named_parameters(), strict=True):
        moved = one.detach().float() - safe_get_full_fp32_param(parameter)
        found["gradient"] = max(found["gradient"], float((moved - one.grad.float()).norm()))
        found["size"] = max(found["size"], float(one.grad.float().norm()))
    return found


def main() -> None:
    me = cluster.discover()
    cluster.join(me, 5)
    found = {name: case(name) for name in CASES}
    everyones: list[Any] = [None] * me.world_size
    dist.all_gather_object(everyones, found)
    if me.is_main:
        Path(sys.argv[1]).write_text(json.dumps(everyones))
    dist.barrier()
    cluster.leave()


main()
cluster.exit_now(0)
