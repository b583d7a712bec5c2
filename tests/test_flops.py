"""The formula of operations, held to what torch counts while models run."""

from __future__ import annotations

import copy
from typing import Any

import numpy
import pytest
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from fullft import activations, flops
from fullft.documents import Documents
from fullft.tiles import tile_mlps

SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "llama, wide heads, tied": LlamaConfig(**SMALL, head_dim=24, tie_word_embeddings=True),
    "qwen2, biases": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=16),
    "mistral, window": MistralConfig(**SMALL, sliding_window=5),
    "gemma2, windows": Gemma2Config(**SMALL, head_dim=16, sliding_window=5),
    "gemma3, windows": Gemma3TextConfig(**SMALL, head_dim=16, sliding_window=5),
    "gpt2": GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gpt-neox, no gate": GPTNeoXConfig(**{name: size for name, size in SMALL.items() if "key_value" not in name}),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "qwen3-moe, every second layer": Qwen3MoeConfig(
        **SMALL, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, decoder_sparse_step=2
    ),
}
TOKENS = 12


class Counter(TorchDispatchMode):
    """Adds up torch's own formulas, as FlopCounterMode does, whose hooks of modules fail within tiles."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._grouped_mm.default:  # which torch has no formula for
            self.total += 2 * args[0].numel() * args[1].shape[-1]
        elif func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def counted(model: Any) -> tuple[int, int]:
    """(forward, backward) as torch counts them; eager attention over the whole square."""
    model.train()
    with Counter() as forward:
        loss = model(input_ids=torch.arange(TOKENS)[None], use_cache=False).logits.float().sum()
    with Counter() as backward:
        loss.backward()
    return forward.total, backward.total


def build(name: str, experts: str = "eager") -> Any:
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[name])
    config._experts_implementation = experts
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def whole_square(found: flops.Flops) -> int:
    """As eager attention runs: every query with every key."""
    return sum(found.per_pair.values()) * TOKENS**2


@pytest.mark.parametrize("name", CONFIGS)
def test_the_formula_is_what_torch_counts(name: str) -> None:
    with torch.device("meta"):
        found = flops.flops_of(AutoModelForCausalLM.from_config(CONFIGS[name]))
    linear = TOKENS * (found.per_token + found.per_label)
    assert counted(build(name)) == (linear + whole_square(found), 2 * (linear + whole_square(found)))


@pytest.mark.parametrize("name", CONFIGS)
def test_what_backward_runs_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last operation, with the linear layer that ZeRO-3 puts in, and experts as transformers runs them."""
    monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)
    has_experts = name in ("mixtral", "qwen3-moe, every second layer")
    tiled = [] if has_experts or name == "gpt2" else [("none", 3), ("full", 3)]
    for mode, tiles in [("full", 1), ("selective", 1), *tiled]:
        model = build(name, experts="grouped_mm" if has_experts else "eager")
        found = flops.flops_of(model)
        tile_mlps(model, tiles)
        activations.enable(model, mode)
        forward, backward = counted(model)
        attention = 0 if mode == "none" else whole_square(found)  # eager attention is none that selective keeps
        assert backward - 2 * forward == found.recomputed(TOKENS, mode, tiles > 1) + attention, (mode, tiles)


def test_attention_is_counted_for_what_a_query_sees() -> None:
    """Against masks, written out."""
    lengths = numpy.array([1, 4, 9])
    for window in (None, 1, 3, 4, 100):
        seen = 0
        for length in lengths.tolist():
            at = torch.arange(length)
            mask = at[:, None] >= at[None, :]
            mask &= at[:, None] - at[None, :] < (window or length)
            seen += int(mask.sum())
        assert flops.pairs(lengths, window) == seen


def test_windows_are_those_that_transformers_masks() -> None:
    """One document of 12 tokens, window 5: transformers' own mask has as many pairs as are counted."""
    from transformers.masking_utils import create_sliding_window_causal_mask

    config = CONFIGS["mistral, window"]
    config._attn_implementation = "eager"
    mask = create_sliding_window_causal_mask(
        config, torch.zeros(1, TOKENS, 32), None, past_key_values=None, position_ids=torch.arange(TOKENS)[None]
    )
    assert int((mask == 0).sum()) == flops.pairs(numpy.array([TOKENS]), 5)
    found = flops.flops_of(AutoModelForCausalLM.from_config(CONFIGS["gemma2, windows"]))
    assert found.per_pair.keys() == {5, None}  # the layers alternate


def test_documents_of_a_batch() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
    both = flops.document_lengths(Documents.of(positions).ends, row_tokens=[5, 6])
    assert [lengths.tolist() for lengths in both] == [[3, 2, 1, 6], [3, 2, 6]]  # the first row has a token of padding


def test_an_unknown_architecture_has_no_count() -> None:
    model = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4)
    )
    with pytest.raises(flops.UnknownArchitectureError):
        flops.flops_of(model)
    found, _, line = flops.flops_and_peak(model, bf16=True)
    assert found is None
    assert "it is not known of MambaForCausalLM" in line


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA GB200", 2500e12), ("AMD Instinct MI300X", 1300e12),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)  # fmt: skip
def test_peaks(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None) -> None:
    assert flops.peak_flops() is None  # a CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert flops.peak_flops() == peak
    llama = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    line = flops.flops_and_peak(llama, bf16=True)[2]
    assert bool(line) == (peak is None)
    assert flops.flops_and_peak(llama, bf16=False)[1:] == (
        None, "no MFU: the peaks known are those of bf16; perf/tflops_per_gpu is in every row"
    )  # fmt: skip
