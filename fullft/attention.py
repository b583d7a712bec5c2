"""Attention over packed documents without masks, as the implementation `varlen` of transformers.

A batch that tells where its documents end (`documents.Documents`) goes through torch's kernel for ragged batches, or
where that cannot run (CPU, fp32, old GPUs) through one call per document: what two documents would have with each
other is never computed. A batch that does not tell (evaluation, generation) has transformers' sdpa and its masks.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn import attention as torch_attention
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fullft.documents import VARLEN, Documents

_TRIAL = "varlen-trial"
# What the models' own code hands over besides, and that changes nothing here.
_WITHOUT_EFFECT = {
    "position_ids", "use_cache", "output_attentions", "output_hidden_states", "return_dict", "output_router_logits",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "sliding_window", "is_causal",
    "sequence_parallel",
}  # fmt: skip


@dataclass(frozen=True)
class Heads:
    """Of an attention layer."""

    query: int
    key_value: int
    size: int
    window: int | None  # tokens that a token sees, itself included; None: all before it


def varlen(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers.

    Args:
        query: [batch, heads, sequence, head size]; key, value: [batch, key-value heads, sequence, head size].
        attention_mask: not looked at if the documents are told, which say all of it.
        kwargs: `Documents.arguments`, and what the model's layer wants.

    Returns:
        [batch, sequence, heads, head size]

    Raises:
        ValueError: the layer wants something that would be left out.
    """
    if kwargs.get("cu_seq_lens_q") is None:
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if lacking := why_not(module, query, value, dropout, kwargs):
        raise ValueError(f"{VARLEN} attention has no {lacking}")
    if kwargs.get("sequence_parallel", 1) > 1:
        return _over_ranks(module, query, key, value, scaling, kwargs), None
    return _of_documents(query, key, value, scaling, kwargs), None


def why_not(
    module: torch.nn.Module, query: torch.Tensor, value: torch.Tensor, dropout: float, wanted: dict[str, Any]
) -> str:
    """What a layer wants of its attention that only other implementations have; empty if there is nothing."""
    causal = wanted.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        return "attention to later tokens"
    if dropout:
        return f"attention dropout ({dropout:g})"
    if query.shape[-1] != value.shape[-1]:
        return "heads whose values have another size than their keys"
    return ", ".join(name for name, one in wanted.items() if one is not None and name not in _WITHOUT_EFFECT)


def _of_documents(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, kwargs: dict[str, Any]
) -> torch.Tensor:
    """Causal attention within each document; shapes as of `varlen`."""
    window, ends = kwargs.get("sliding_window"), kwargs["cu_seq_lens_q"]
    if not _has_kernel(query):
        return _one_by_one(query, key, value, ends, window, scaling)
    longest = kwargs["max_length_q"]
    q, k, v = (one.transpose(1, 2).flatten(0, 1) for one in (query, key, value))  # [tokens, heads, head size]
    grouped: dict[str, Any] = {}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            grouped["enable_gqa"] = True
        else:  # torch 2.11
            k, v = (one.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for one in (k, v))
    out = varlen_attn(
        q, k, v, ends, ends, longest, longest, scale=scaling, **grouped,
        # transformers counts the token itself, the kernel those before it
        window_size=(-1, 0) if window is None else (window - 1, 0),
    )  # fmt: skip
    assert isinstance(out, torch.Tensor)
    return out.view(query.shape[0], query.shape[2], *out.shape[1:])


def _has_kernel(query: torch.Tensor) -> bool:
    """Whether torch's flash attention runs here; on the meta device it is asked for shapes."""
    if query.device.type == "meta":
        return True
    fits = query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] <= 256 and query.shape[-1] % 8 == 0
    return fits and query.is_cuda and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _one_by_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: torch.Tensor, window: int | None,
    scaling: float | None,
) -> torch.Tensor:  # fmt: skip
    """The same by a call of torch's scaled_dot_product_attention for each document, on any device and dtype."""
    sequence, parts = query.shape[2], []
    for start, end in itertools.pairwise(ends.tolist()):
        row, at = divmod(start, sequence)  # no document is in two rows
        q, k, v = (one[row : row + 1, :, at : at + end - start] for one in (query, key, value))
        slides = window is not None and end - start > window
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=_window(end - start, window or 0, query.device) if slides else None,
            is_causal=not slides, scale=scaling, enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
        parts.append(out.transpose(1, 2))
    return torch.cat(parts, dim=1).view(query.shape[0], sequence, query.shape[1], query.shape[3])


def _window(length: int, window: int, device: torch.device) -> torch.Tensor:
    """Who sees whom in a document, [length, length] bool: `window` tokens, oneself included."""
    before = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (before >= 0) & (before < window)


AttentionInterface.register(VARLEN, varlen)
AttentionMaskInterface.register(VARLEN, sdpa_mask)


@torch.no_grad()
def try_layers(build: Callable[[str], PreTrainedModel]) -> list[Heads]:
    """Run a model on the meta device, and see what its layers ask of their attention.

    Args:
        build: the model there, with the implementation that it is told.

    Returns:
        the heads of each layer

    Raises:
        ValueError: a layer asks for what `varlen` does not have, or does not ask at all; other errors are the model's.
    """
    found = list[Heads]()

    def mask(local_size: int | None = None, use_vmap: bool = False, **_: Any) -> torch.Tensor:
        # Its shape tells the layer that gets it which window it stands for.
        return torch.empty(1, 1, 1 + use_vmap, 1 + (local_size or 0), device="meta")

    def attend(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, dropout: float = 0.0, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        window = kwargs.get("sliding_window")
        if lacking := why_not(module, query, value, dropout, {k: v for k, v in kwargs.items() if k != "scaling"}):
            raise ValueError(f"a layer wants {lacking}")
        if kwargs.get("cu_seq_lens_q") is None:
            raise ValueError("a layer is not told the documents")
        if attention_mask is not None and attention_mask.shape[2:] != (1, 1 + (window or 0)):
            raise ValueError("a layer has a mask of its own kind")
        found.append(Heads(query.shape[1], key.shape[1], query.shape[3], window))
        return varlen(module, query, key, value, None, dropout, **kwargs)

    AttentionInterface.register(_TRIAL, attend)
    AttentionMaskInterface.register(_TRIAL, mask)
    ones = torch.ones(1, 8, dtype=torch.int64, device="meta")
    told = Documents(torch.zeros(3, dtype=torch.int32, device="meta"), 4)
    model = build(_TRIAL).train()
    # With an attention mask of two dimensions, so that the layers' masks are asked for.
    model(input_ids=ones, position_ids=ones, attention_mask=ones, use_cache=False, **told.arguments)
    layers = model.config.get_text_config().num_hidden_layers
    if len(found) != layers:
        raise ValueError(f"{len(found)} of {layers} layers have attention that can be exchanged")
    return found


@functools.cache
def use_best_kernel(layers: tuple[Heads, ...], dtype: torch.dtype) -> str:
    """Have torch's `varlen_attn` run by FlashAttention 3 or 4 if their package is there and the GPU is of theirs.

    Tried, forward and backward, with the heads of the model's layers, before it is relied on.

    Returns:
        a line that says what runs; empty where nothing but torch's own would.
    """
    if not torch.cuda.is_available() or dtype not in (torch.bfloat16, torch.float16):
        return ""
    offered: list[str] = getattr(torch_attention, "list_flash_attention_impls", list)()
    wanted = {9: ("FA3", "flash_attn_interface"), 10: ("FA4", "flash_attn.cute")}
    name, package = wanted.get(torch.cuda.get_device_capability()[0], ("", ""))
    if name not in offered or not package or importlib.util.find_spec(package.partition(".")[0]) is None:
        return ""
    try:
        expected = [_sample(heads, dtype) for heads in layers]
        torch_attention.activate_flash_attention_impl(name)
        for heads, values in zip(layers, expected, strict=True):
            for one, other in zip(values, _sample(heads, dtype), strict=True):
                torch.testing.assert_close(other, one, atol=5e-2, rtol=5e-2)
    except Exception as error:  # whatever it is: the kernel that torch has does it
        torch_attention.restore_flash_attention_impl()
        return f"{name} is installed and not used: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return f"{name} runs torch's varlen_attn"


def _sample(heads: Heads, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Output and gradients of a layer's attention over a few random documents on this GPU."""
    generator = torch.Generator("cuda").manual_seed(0)
    counts = (heads.query, heads.key_value, heads.key_value)
    q, k, v = inputs = [
        torch.randn(1, count, 384, heads.size, generator=generator, device="cuda", dtype=dtype).requires_grad_()
        for count in counts
    ]
    ends = torch.tensor([0, 1, 129, 384], dtype=torch.int32, device="cuda")
    told = Documents(ends, 255).arguments | {"sliding_window": heads.window}
    out = _of_documents(q, k, v, heads.size**-0.5, told)
    # Evaluation's dense calls run by the same kernel.
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads.query != heads.key_value)
    return out.detach(), dense.detach(), *torch.autograd.grad(out.float().square().sum(), inputs)


# Sequence parallelism (Ulysses)


def _over_ranks(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None,
    kwargs: dict[str, Any],
) -> torch.Tensor:  # fmt: skip
    """Attention over rows of which each of the ranks has a part: exchanged for all of the rows of some of the heads,
    attended to, and back (Jacobs et al. 2023, DeepSpeed Ulysses; its code). All ranks of the group together."""
    batch, heads, _, size = query.shape
    exchange = _ulysses(batch, heads, key.shape[1], size)
    groups = getattr(module, "num_key_value_groups", None)
    # The exchange gathers the position ids of the ranks, of which nothing is asked here: a single one is little.
    kwargs = kwargs | {"position_ids": torch.zeros(1, 1, dtype=torch.int64, device=query.device)}
    out, _ = exchange(module, query, key, value, None, scaling=scaling, **kwargs)
    if groups is not None:
        module.num_key_value_groups = groups  # it sets that of a rank's heads, and evaluation has all of them
    return out.unflatten(-1, (heads, size))  # type: ignore[no-any-return]


@functools.cache
def _ulysses(batch: int, heads: int, key_value_heads: int, size: int) -> Any:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    def attend(_: Any, query: Any, key: Any, value: Any, __: Any, scaling: float | None, **kwargs: Any) -> Any:
        return _of_documents(query, key, value, scaling, kwargs), None

    return UlyssesSPAttentionHF(
        attend, batch, heads, size, key_value_heads, 1, _group, seq_length_is_variable=True
    )  # fmt: skip


_group: Any = None  # of the ranks that share a micro-batch with this one


def form_groups(ranks: int, timeout_minutes: float) -> None:
    """Groups of ranks that share a micro-batch: 0 to ranks - 1, and so on. All ranks together, once a process.

    `timeout_minutes`: that of the collectives among all ranks; torch's own default is another.
    """
    global _group
    for first in range(0, dist.get_world_size() if ranks > 1 else 0, ranks):
        members = range(first, first + ranks)
        group = dist.new_group(list(members), timeout=timedelta(minutes=timeout_minutes))
        _group = group if dist.get_rank() in members else _group
