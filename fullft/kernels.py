"""Fused kernels in the place of a model's own RMSNorm, rotary embedding and gated MLP: train.kernels.

They are Liger's, in Triton. DeepSpeed has Triton kernels too; its RMSNorm takes widths up to 2048 only, which leaves
out the norms of every model of 7 B and more. Liger's losses stay off: the loss is the head's (`head`).
"""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any

from fullft.recipe import Recipe


def choose(recipe: Recipe, model_type: str, on_gpu: bool) -> tuple[str, str]:
    """none or liger, and a line that says why. `model_type`: of the config."""
    if recipe.train.kernels == "none":
        return "none", "those of transformers, as the recipe says"
    if why := _why_not(model_type, on_gpu):
        return "none", f"those of transformers: {why}"
    return "liger", "liger's RMSNorm, rotary embedding and gated MLP"


def problems(recipe: Recipe, model_type: str, on_gpu: bool) -> list[str]:
    why = _why_not(model_type, on_gpu) if recipe.train.kernels == "liger" else ""
    return [f"train.kernels: liger, but {why}; take auto or none"] if why else []


def _why_not(model_type: str, on_gpu: bool) -> str:
    if not on_gpu:
        return "there is no GPU"
    missing = [name for name in ("triton", "liger_kernel") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing).replace('_', '-')} is not installed (pip install liger-kernel)"
    return "" if model_type in _functions() else f"liger has none for {model_type}"


def _functions() -> dict[str, Any]:
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return MODEL_TYPE_TO_APPLY_LIGER_FN  # type: ignore[no-any-return]


def apply(model: Any, kernels: str, checkpointing: str) -> None:
    """Replace the modules' functions; parameters stay as they are. Before the engine is started.

    Liger's rotary embedding writes over its input, behind autograd's back, and selective checkpointing has kept that to
    use again: it stays off there.
    """
    if kernels == "none":
        return
    function = _functions()[model.config.model_type]
    wanted = {"rope": checkpointing != "selective", "rms_norm": True, "swiglu": True, "geglu": True, "layer_norm": True}
    wanted |= {"cross_entropy": False, "fused_linear_cross_entropy": False}
    known = inspect.signature(function).parameters
    function(model=model, **{name: value for name, value in wanted.items() if name in known})
