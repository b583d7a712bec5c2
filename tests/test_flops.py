"""The formula of operations, held to what torch counts while models run."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
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

from fullft import flops
from fullft.documents import Documents

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


def counted(model: Any, checkpointing: bool = False) -> tuple[int, int]:
    """(forward, backward) as torch counts them; eager attention over the whole square."""
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    with FlopCounterMode(display=False) as forward:
        loss = model(input_ids=torch.arange(TOKENS)[None], use_cache=False).logits.float().sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


def build(name: str) -> Any:
    torch.manual_seed(0)
    config = CONFIGS[name]
    config._experts_implementation = "eager"
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


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2, windows", "gpt-neox, no gate", "mixtral"])
def test_what_checkpointing_recomputes(name: str) -> None:
    """To the last operation for layers that end in a plain down-projection; else at most that matrix too much."""
    model = build(name)
    found = flops.flops_of(model)
    forward, backward = counted(model, checkpointing=True)
    ours = found.recomputed(TOKENS) + whole_square(found)
    really = backward - 2 * forward
    if name in ("llama", "qwen3", "gpt-neox, no gate"):
        assert ours == really
    assert really <= ours <= 1.25 * really


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
