"""Packed documents through `varlen` against each document alone through transformers' eager attention."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    modeling_flash_attention_utils,
)

from fullft import attention
from fullft.attention import Heads, try_layers, varlen
from fullft.documents import Documents
from fullft.loss import IGNORE, cross_entropy, labelled_logits

SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 200, "max_position_embeddings": 128,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
NEOX = {name: size for name, size in SMALL.items() if name not in ("num_key_value_heads", "head_dim")}
VARLEN: dict[str, PretrainedConfig] = {
    "llama, grouped heads": LlamaConfig(**SMALL),
    "qwen3, norms of queries and keys": Qwen3Config(**SMALL),
    "mistral, all layers slide": MistralConfig(**SMALL, sliding_window=9),
    "gemma3, some layers slide": Gemma3TextConfig(
        **SMALL, sliding_window=9, layer_types=["sliding_attention", "full_attention"]
    ),
    "mixtral, experts": MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
    "gpt-neox": GPTNeoXConfig(**NEOX),
}
OTHERS: dict[str, PretrainedConfig] = {
    "softcap": Gemma2Config(**SMALL),
    "s_aux": GptOssConfig(**SMALL, num_local_experts=4),
    "attention dropout": GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=200),
    "mask of its own kind": Llama4TextConfig(
        **SMALL, num_local_experts=4, attention_chunk_size=16, intermediate_size_mlp=64
    ),
}
ROWS = [[7, 1, 30, 12], [28, 22]]  # lengths of the documents of two rows, of which 64 tokens are no multiple
WIDTH = 64


def build(config: PretrainedConfig, name: str = "varlen") -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=name, dtype=torch.float32)
    return model


def documents(lengths: list[int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(5, 200, (length,), generator=generator) for length in lengths]


def labels_of(ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([ids[1:], torch.tensor([IGNORE])])


def packed(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, positions, labels [rows, WIDTH]"""
    columns: tuple[list[torch.Tensor], ...] = ([], [], [])
    for lengths in rows:
        filler = WIDTH - sum(lengths)
        found = documents(lengths)
        columns[0].append(torch.cat([*found, torch.zeros(filler, dtype=torch.int64)]))
        columns[1].append(torch.cat([*map(torch.arange, lengths), torch.arange(filler)]))
        columns[2].append(torch.cat([*map(labels_of, found), torch.full((filler,), IGNORE)]))
    ids, positions, labels = (torch.stack(column) for column in columns)
    return ids, positions, labels


def nats(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits.flatten(0, 1), labels.flatten()).sum()


def gradients(model: PreTrainedModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    loss.backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def alone(config: PretrainedConfig, rows: list[list[int]]) -> tuple[float, dict[str, torch.Tensor]]:
    model = build(config, "eager")
    loss = torch.zeros(())
    for ids in itertools.chain(*map(documents, rows)):
        # What transformers itself does with one sequence: no packing, no padding, no position ids.
        logits = model(input_ids=ids[None], use_cache=False).logits
        loss = loss + nats(logits, labels_of(ids)[None])
    return loss.item(), gradients(model, loss)


def require_same(found: tuple[float, dict[str, torch.Tensor]], expected: tuple[float, dict[str, torch.Tensor]]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        # fp32: sums of about 100 terms in another order
        atol = 2e-6 * float(gradient.abs().max())
        torch.testing.assert_close(
            found[1][name], gradient, atol=atol + 1e-7, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rows", [ROWS[:1], ROWS], ids=["one row", "two rows"])
@pytest.mark.parametrize("name", VARLEN)
def test_packed_documents_have_loss_and_gradients_of_each_alone(
    name: str, rows: list[list[int]], checkpointing: bool
) -> None:
    model = build(VARLEN[name]).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids, positions, labels = packed(rows)
    told = Documents.of(positions)
    loss = nats(*labelled_logits(model, ids, positions, labels, told))
    require_same((loss.item(), gradients(model, loss)), alone(VARLEN[name], rows))


@pytest.mark.parametrize("name", VARLEN)
def test_without_documents_it_is_what_sdpa_is(name: str) -> None:
    """Evaluation tells no documents; generation has an attention mask, then a cache."""
    model, reference = build(VARLEN[name]).eval(), build(VARLEN[name], "sdpa").eval()
    ids, positions, labels = packed(ROWS)
    torch.testing.assert_close(
        labelled_logits(model, ids, positions, labels)[0], labelled_logits(reference, ids, positions, labels)[0]
    )
    mask = torch.ones(2, WIDTH, dtype=torch.int64)
    mask[0, :40] = 0  # padded on the left
    prompts = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**prompts), reference.generate(**prompts))


@pytest.mark.parametrize("lacking", OTHERS)
def test_what_it_has_not_is_refused_and_not_left_out(lacking: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=lacking):
        try_layers(lambda name: AutoModelForCausalLM.from_config(OTHERS[lacking], attn_implementation=name))
    if lacking == "mask of its own kind":
        return  # only the trial sees it
    model = build(OTHERS[lacking]).train()
    ids, positions, labels = packed(ROWS)
    with pytest.raises(ValueError, match=lacking):
        labelled_logits(model, ids, positions, labels, Documents.of(positions))


def test_a_trial_on_the_meta_device_tells_the_heads_and_windows_of_the_layers() -> None:
    def built(name: str) -> Callable[[str], PreTrainedModel]:
        return lambda to: AutoModelForCausalLM.from_config(VARLEN[name], attn_implementation=to, dtype=torch.bfloat16)

    with torch.device("meta"):
        assert try_layers(built("llama, grouped heads")) == [Heads(4, 2, 16, None)] * 2
        assert try_layers(built("mistral, all layers slide")) == [Heads(4, 2, 16, 9)] * 2
        assert [one.window for one in try_layers(built("gemma3, some layers slide"))] == [9, None]
        assert try_layers(built("mixtral, experts")) == [Heads(4, 2, 16, None)] * 2
        assert try_layers(built("gpt-neox")) == [Heads(4, 4, 8, None)] * 2


@pytest.mark.parametrize("window", [None, 9])
def test_torchs_kernel_gets_flat_tokens_and_its_own_count_of_a_window(
    monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    """It has no CPU implementation; the meta device has its shapes."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    real = attention.varlen_attn

    @functools.wraps(real)
    def record(*tensors: Any, **kwargs: Any) -> Any:
        seen.append((tensors, kwargs))
        return real(*tensors, **kwargs)

    monkeypatch.setattr(attention, "varlen_attn", record)
    told = Documents.of(packed(ROWS)[1]).to("meta")
    query, key = (torch.empty(2, heads, WIDTH, 16, device="meta", dtype=torch.bfloat16) for heads in (4, 2))
    out, _ = varlen(torch.nn.Module(), query, key, key, None, scaling=0.1, sliding_window=window, **told.arguments)
    assert out.shape == (2, WIDTH, 4, 16)
    ((tensors, kwargs),) = seen
    assert [tuple(one.shape) for one in tensors[:3]] == [(2 * WIDTH, 4, 16), (2 * WIDTH, 2, 16), (2 * WIDTH, 2, 16)]
    assert tensors[5:] == (30, 30)
    assert kwargs == {"scale": 0.1, "enable_gqa": True, "window_size": (-1, 0) if window is None else (8, 0)}


def test_torch_2_11_gets_a_key_and_value_for_each_query(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def as_in_2_11(q: Any, k: Any, v: Any, *_: Any, **options: Any) -> Any:
        assert options.keys() <= {"return_aux", "scale", "window_size"}
        seen.extend((k, v))
        return torch.empty_like(q)

    monkeypatch.setattr(attention, "varlen_attn", as_in_2_11)
    monkeypatch.setattr(attention, "_has_kernel", lambda _: True)
    told = Documents.of(packed(ROWS)[1])
    query, key = (torch.randn(2, heads, WIDTH, 16) for heads in (4, 2))
    varlen(torch.nn.Module(), query, key, key, None, **told.arguments)
    for one in seen:
        assert torch.equal(one[:, 0], one[:, 1])  # heads 0 and 1 of the queries have head 0 of the keys
        assert torch.equal(one[:, ::2], key.transpose(1, 2).flatten(0, 1))


def test_documents_cover_every_token_of_every_row() -> None:
    _, positions, _ = packed([*ROWS, [WIDTH]])
    told = Documents.of(positions)
    assert told.ends.dtype == torch.int32
    assert told.ends.diff().tolist() == [7, 1, 30, 12, 14, 28, 22, 14, WIDTH]
    assert told.longest == WIDTH
    with pytest.raises(ValueError, match="must begin at 0"):
        Documents.of(positions[:, 1:])


def test_the_gradient_needs_no_mask_of_sequence_squared() -> None:
    """4096 tokens: such a mask, of one bool an element, would be 16 MiB, and its fp32 scores 64 for each head."""
    length = 4096
    ids = torch.randint(5, 200, (1, length))
    positions = torch.arange(length)[None] % 128
    model = build(VARLEN["llama, grouped heads"])
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):  # every tensor that an operation makes
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for one in torch.utils._pytree.tree_leaves(out):
                largest = max(largest, one.numel() if isinstance(one, torch.Tensor) else 0)
            return out

    labels = torch.full_like(ids, IGNORE)
    labels[0, :10] = 7
    with Watch():
        nats(*labelled_logits(model, ids, positions, labels, Documents.of(positions))).backward()
    assert largest < length * length / 8


def test_transformers_gives_flash_attention_the_documents_of_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels need a GPU; what transformers calls them with does not, so a plain function is called instead."""
    calls = []

    def kernel(query: Any, key: Any, value: Any, cu_seqlens_q: Any, max_seqlen_q: int, **_: Any) -> torch.Tensor:
        calls.append((cu_seqlens_q.tolist(), max_seqlen_q))
        told = Documents(cu_seqlens_q, max_seqlen_q).arguments
        rows = (one[None].transpose(1, 2) for one in (query, key, value))  # [1, heads, tokens, head size]
        return varlen(torch.nn.Module(), *rows, None, **told)[0][0]

    found = ((None, kernel, None, None, None), (lambda max_seqlen_q, **_: {"max_seqlen_q": max_seqlen_q}, None))
    monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", lambda *_, **__: found)
    model = build(VARLEN["llama, grouped heads"], "sdpa").train()
    model.config._attn_implementation = "flash_attention_2"
    ids, positions, labels = packed(ROWS)
    told = Documents.of(positions)
    loss = nats(*labelled_logits(model, ids, positions, labels, told))
    require_same((loss.item(), gradients(model, loss)), alone(VARLEN["llama, grouped heads"], ROWS))
    assert calls == [(told.ends.tolist(), 30)] * 2
