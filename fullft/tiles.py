"""The MLPs run over a few tokens at a time, so that their inner activations, the widest of a layer, stay small."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fullft.errors import BadInput


def require_tileable(model: Any) -> list[torch.nn.Module]:
    """The MLPs of a transformers model; it may be on the meta device.

    Raises:
        BadInput: not every layer has one that makes each token's output of that token alone, the same when repeated.
    """
    found = [module for name, module in model.named_modules() if name.endswith(".mlp") and _is_plain(module)]
    layers = model.config.get_text_config().num_hidden_layers
    if len(found) != layers:
        raise BadInput(
            f"train.mlp_tiles: {len(found)} of {layers} layers of {type(model).__name__} have an MLP of linear layers "
            "without dropout or experts; it must be 1 here"
        )
    return found


def _is_plain(mlp: torch.nn.Module) -> bool:
    with_weights = [one for one in mlp.modules() if next(one.parameters(recurse=False), None) is not None]
    drops = any(isinstance(one, torch.nn.Dropout) and one.p > 0 for one in mlp.modules())
    return bool(with_weights) and all(isinstance(one, torch.nn.Linear) for one in with_weights) and not drops


def tile_mlps(model: Any, tiles: int) -> None:
    """Have each MLP run over so many parts of the tokens one after the other. Forward is done again in backward.

    Raises:
        BadInput: as of `require_tileable`.
    """
    for mlp in require_tileable(model) if tiles > 1 else ():
        mlp.forward = functools.partial(_tiled, mlp.forward, list(mlp.parameters()), tiles)  # type: ignore[method-assign]


def _tiled(whole: Callable[..., torch.Tensor], weights: list[Any], tiles: int, hidden: torch.Tensor) -> torch.Tensor:
    """`whole(hidden)` of hidden states [..., hidden size]."""
    if not torch.is_grad_enabled():  # nothing is kept for a backward pass
        return whole(hidden)
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

    flat = hidden.flatten(0, -2)
    # With zeros after the last token: under ZeRO-3 every tile is collective, and there must be as many on all ranks.
    filled = F.pad(flat, (0, 0, 0, -len(flat) % tiles))
    out = TiledMLP.apply(lambda _, tile: whole(tile), None, filled, tiles, weights)
    return out[: len(flat)].view(hidden.shape)  # type: ignore[no-any-return]
