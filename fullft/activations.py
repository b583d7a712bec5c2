"""What of a decoder layer's activations is kept for backward, and what computed again: train.activation_checkpointing.

none       all is kept
selective  attention and every second matrix product are kept; the rest, mostly cheap, is computed again
full       the layer's input is kept
offload    the layer's input is kept in host memory
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.graph import save_on_cpu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fullft.recipe import Recipe

_PRODUCTS = ("aten::mm", "aten::addmm")
_ATTENTION = (
    "aten::_scaled_dot_product_", "aten::_flash_attention_forward", "aten::_efficient_attention_forward",
    "torch_attn::_varlen_attn", "flash_attn::_flash_attn_", "flash_attn_3::",
)  # fmt: skip


def problems(recipe: Recipe, model: Any) -> list[str]:
    asked = recipe.train.activation_checkpointing
    if asked == "selective" and recipe.train.mlp_tiles > 1:
        return ["train.activation_checkpointing: selective keeps what train.mlp_tiles is to spare; take full"]
    if asked in ("none", "auto") or model.supports_gradient_checkpointing:
        return []
    return [f"train.activation_checkpointing: {asked}, and {type(model).__name__} can keep all only; take none"]


def enable(model: Any, mode: str) -> None:
    """Let the decoder layers of a transformers model compute again what they do not keep, in training only."""
    if mode == "none":
        return
    how = {"selective": _selective, "full": _full, "offload": _offloaded}[mode]
    model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=how)


def _full(layer: Callable[..., Any], *inputs: Any) -> Any:
    return checkpoint(layer, *inputs, use_reentrant=False)


def _offloaded(layer: Callable[..., Any], *inputs: Any) -> Any:
    # What a non-reentrant checkpoint keeps of its inputs passes these hooks; what the layer saves, such as its weights,
    # passes the checkpoint's own, which are inside.
    with save_on_cpu(pin_memory=torch.cuda.is_available()):
        return _full(layer, *inputs)


def _selective(layer: Callable[..., Any], *inputs: Any) -> Any:
    def contexts() -> tuple[TorchDispatchMode, TorchDispatchMode]:
        kept: list[Any] = []
        return _Keep(kept), _Reuse(kept)

    return checkpoint(layer, *inputs, use_reentrant=False, context_fn=contexts)


class _Keep(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps what some operations give, in their order.

    torch's create_selective_checkpoint_contexts wants all operations to be the same in backward; those with which
    ZeRO-3 gathers weights inside the layer are not.
    """

    def __init__(self, kept: list[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept, self._products = kept, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if _is_product(func):
            self._products += 1
        if _is_attention(func) or (_is_product(func) and self._products % 2 == 0):
            self._kept.append(_Kept(found))
        elif self._kept and func is torch.ops.aten.add_.Tensor:
            # DeepSpeed's linear layer adds its bias in place: the product is gone, and is made again in backward.
            self._kept[-1].drop_if_of(args[0])
        return found


class _Reuse(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """In backward, gives what was kept instead of computing it."""

    def __init__(self, kept: list[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept, self._products, self._next = kept, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_product(func):
            self._products += 1
        if _is_attention(func) or (_is_product(func) and self._products % 2 == 0):
            found, self._kept[self._next] = self._kept[self._next], None
            self._next += 1
            found.drop_if_changed()
            if found.tensors is not None:
                return found.tensors
        return func(*args, **(kwargs or {}))


class _Kept:
    def __init__(self, tensors: Any) -> None:
        self.tensors = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, tensors)
        self._versions = self._now()

    def _now(self) -> list[int]:
        leaves = torch.utils._pytree.tree_leaves(self.tensors)
        return [one._version for one in leaves if isinstance(one, torch.Tensor)]

    def drop_if_of(self, changed: torch.Tensor) -> None:
        """By its memory: what is added to is a view without the product's count of versions."""
        if any(_memory(one) == _memory(changed) for one in torch.utils._pytree.tree_leaves(self.tensors)):
            self.tensors = None

    def drop_if_changed(self) -> None:
        if self._now() != self._versions:
            self.tensors = None


def _memory(leaf: Any) -> int | None:
    return leaf.untyped_storage().data_ptr() if isinstance(leaf, torch.Tensor) else None


def _is_product(func: Any) -> bool:
    return func._schema.name in _PRODUCTS


def _is_attention(func: Any) -> bool:
    return bool(func._schema.name.startswith(_ATTENTION)) and "backward" not in func._schema.name
