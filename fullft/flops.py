"""The floating-point operations of a training step, and how many a GPU can do: what MFU and HFU are made of.

A multiply-add is 2 operations. Forward, of one micro-batch:

    matrices    2 · elements of each matrix, for each token; of the head for each position with a label (it runs on no
                other), of E experts the k that a token is sent to; embeddings are looked up, which is 0
    attention   2 · H · (d_qk + d_v) for each pair of a query and a key that it sees: a document of length l has
                l · (l + 1) / 2 of them, with a sliding window w the sum of min(t, w) over t = 1 … l

Backward is twice that (Kaplan et al. 2020, 2.1; Narayanan et al. 2021, appendix). So 6 · N a token, without embeddings,
plus attention as the packed documents have it: causal and document by document. (torchtitan and llm-foundry count it in
full, 12 · L · h · s a token, which makes the MFU of an 8B model at 8k tokens 12 % larger.)

MFU (Chowdhery et al. 2022, appendix B) counts that for the tokens of documents. HFU counts what is run: padding too,
and what backward runs again (`Flops.recomputed`). DeepSpeed's linear layer, which every ZeRO-3 run has, keeps its input
after its product, so that checkpointing, which stops at the last tensor wanted, runs the last one of a layer too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from fullft.planner import hardware


class UnknownArchitectureError(ValueError):
    """The operations of this model cannot be told; the text says why."""


@dataclass(frozen=True)
class Flops:
    """Operations of a model's forward pass."""

    per_token: int  # matrices of the layers
    per_label: int  # head
    per_pair: dict[int | None, int]  # attention, all layers with this sliding window (None: without) together
    per_token_selective: int  # of per_token, what selective checkpointing runs again
    per_token_mlp: int  # of per_token, the MLPs that train.mlp_tiles can cut

    def forward(self, tokens: int, labels: int) -> float:
        """Operations of all but attention, of `tokens` of which `labels` have a label."""
        return float(self.per_token * tokens + self.per_label * labels)

    def recomputed(self, tokens: int, checkpointing: str = "full", tiled: bool = False) -> float:
        """Operations, of all but attention, that backward runs again: those of checkpointing, and of tiled MLPs."""
        of_mode = {"none": 0, "selective": self.per_token_selective}.get(checkpointing, self.per_token)
        return float((of_mode + tiled * self.per_token_mlp) * tokens)

    def attention(self, lengths: NDArray[numpy.int64]) -> float:
        """Operations of attention in documents of these lengths, [n]."""
        return float(sum(flops * pairs(lengths, window) for window, flops in self.per_pair.items()))


def pairs(lengths: NDArray[numpy.int64], window: int | None) -> int:
    """Pairs of a query and a key in causal attention over documents of these lengths."""
    seen = lengths if window is None else numpy.minimum(lengths, window)
    return int((seen * (seen + 1) // 2 + (lengths - seen) * seen).sum())


def document_lengths(
    ends: torch.Tensor, row_tokens: Sequence[int]
) -> tuple[NDArray[numpy.int64], NDArray[numpy.int64]]:
    """Lengths of the documents of a batch, row after row: with padding, which is a document of its own, and without.

    ends: as of `Documents`, on the CPU. row_tokens: of each row, before its padding.
    """
    at = ends.numpy().astype(numpy.int64)
    lengths = numpy.diff(at)
    rows, columns = numpy.divmod(at[:-1], at[-1] // len(row_tokens))
    return lengths, lengths[columns < numpy.asarray(row_tokens)[rows]]


def flops_of(model: Any) -> Flops:
    """From the shapes of a transformers causal language model, which may be on the meta device.

    Raises:
        UnknownArchitectureError: it has matrices or attention of another kind than those counted here.
    """
    config = model.config.get_text_config()
    of_layers, of_head = _matrices(model, config)
    per_pair: dict[int | None, int] = {}
    for window, flops in _attention_layers(model, config):
        per_pair[window] = per_pair.get(window, 0) + flops
    mlps = sum(_matrices(one, config)[0] for name, one in model.named_modules() if name.endswith(".mlp"))
    return Flops(of_layers, of_head, per_pair, _selective(model, config), mlps)


def flops_and_peak(model: Any, bf16: bool) -> tuple[Flops | None, float | None, str]:
    """(operations of the model, FLOP/s of a GPU for it, a line on what of these is not known: empty if nothing)"""
    try:
        flops, peak = flops_of(model), peak_flops() if bf16 else None
    except UnknownArchitectureError as error:
        return None, None, f"no FLOP/s and MFU: it is not known of {type(model).__name__} {error}"
    if peak is None and torch.cuda.is_available():
        of = f"no peak is known of {torch.cuda.get_device_name()}" if bf16 else "the peaks known are those of bf16"
        return flops, None, f"no MFU: {of}; perf/tflops_per_gpu is in every row"
    return flops, peak, ""


def _matrices(model: Any, config: Any) -> tuple[int, int]:
    """(operations of the layers' matrices for a token, of the head for a position)"""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    found = list(_each_matrix(model, config))
    of_head = sum(size for module, _, size in found if module is head)
    return sum(size for _, _, size in found) - of_head, of_head


def _each_matrix(model: Any, config: Any) -> Iterator[tuple[Any, torch.nn.Parameter, int]]:
    """(module, matrix, operations for a token) in their order."""
    experts, active = _experts(config)
    for module_name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding):
            continue
        for name, matrix in module.named_parameters(recurse=False):
            size = 2 * matrix.numel()
            is_router = experts and name == "weight" and matrix.shape[0] == experts
            if matrix.ndim < 2 or (experts and matrix.ndim == 2 and "bias" in name):
                continue
            if matrix.ndim == 2 and (isinstance(module, torch.nn.Linear | Conv1D) or is_router):
                one_of_many = experts and ".experts." in f".{module_name}."
                yield module, matrix, size * active // experts if one_of_many else size
            elif matrix.ndim == 3 and experts and matrix.shape[0] == experts:
                yield module, matrix, size * active // experts
            else:
                raise UnknownArchitectureError(f"how often {module_name}.{name} {list(matrix.shape)} is used")


def _experts(config: Any) -> tuple[int, int]:
    """(experts of a layer, experts that a token is sent to); (0, 0) if there are none."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((int(found) for name in names if (found := getattr(config, name, None))), 0)
    return (experts, int(config.num_experts_per_tok)) if experts > 1 else (0, 0)


def _attention_layers(model: Any, config: Any) -> list[tuple[int | None, int]]:
    """(sliding window, operations for a pair of query and key) of each layer."""
    modules = [one for one in model.modules() if hasattr(one, "layer_idx") and _head_widths(one)]
    heads = config.num_attention_heads
    if len(modules) != config.num_hidden_layers or not isinstance(heads, int):
        raise UnknownArchitectureError(f"what attention its {config.num_hidden_layers} layers have")
    kinds = getattr(config, "layer_types", None) or [None] * len(modules)
    found = []
    for module in modules:
        width, value_width = _head_widths(module) or (0, 0)
        out = getattr(module, "o_proj", None)
        if isinstance(out, torch.nn.Linear) and out.in_features != heads * value_width:
            raise UnknownArchitectureError(f"why attention has {out.in_features} outputs of {heads} heads")
        found.append((_window(config, kinds[module.layer_idx]), 2 * heads * (width + value_width)))
    return found


def _head_widths(module: Any) -> tuple[int, int] | None:
    """(width of a query's and key's head, of a value's) of an attention module; None of other modules."""
    width = getattr(module, "qk_head_dim", None) or getattr(module, "head_dim", None) or getattr(module, "head_size", 0)
    return (int(width), int(getattr(module, "v_head_dim", width))) if width else None


def _window(config: Any, kind: str | None) -> int | None:
    sliding = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if kind == "full_attention":
        return None
    if kind == "sliding_attention" or (kind is None and not getattr(config, "attention_chunk_size", None)):
        return sliding
    raise UnknownArchitectureError(f"what layers of the kind {kind} do")


def _selective(model: Any, config: Any) -> int:
    """Operations for a token that selective checkpointing runs again (`activations`): the first, third, … product of a
    layer, all to which DeepSpeed's linear layer adds a bias, and those of experts, which are grouped products."""
    again = 0
    for layer in (one for one in model.modules() if isinstance(one, GradientCheckpointingLayer)):
        products = 0
        for module, matrix, size in _each_matrix(layer, config):
            grouped = matrix.ndim == 3
            products += not grouped
            biased = isinstance(module, torch.nn.Linear) and module.bias is not None
            again += size if grouped or biased or products % 2 else 0
    return again


def peak_flops() -> float | None:
    """Dense bf16 FLOP/s of this process's GPU by its data sheet; None of a CPU or an unknown GPU."""
    if not torch.cuda.is_available():
        return None
    peak = hardware.peak_tflops(torch.cuda.get_device_name())
    return None if peak is None else 1e12 * peak
