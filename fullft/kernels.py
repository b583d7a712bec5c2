"""Fused kernels in the place of a model's own RMSNorm, rotary embedding and gated MLP: train.kernels.

They are Liger's, in Triton, for the architectures whose losses and gradients are compared with transformers' own
(tests/test_kernels.py). DeepSpeed has Triton kernels too; its RMSNorm takes widths up to 2048 only, which leaves out
the norms of every model of 7 B and more. Liger's losses stay off: the loss is the head's (`head`).

Liger changes functions of transformers' modules for the whole process: what is found out by a trial of the model, such
as its attention, is found out before.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from fullft.recipe import Recipe

_COMPARED = ("llama", "mistral", "qwen2", "qwen3")


def choose(recipe: Recipe, config: Any, on_gpu: bool) -> tuple[str, str]:
    """none or liger, and a line that says why. `config`: of the model."""
    if recipe.train.kernels == "none":
        return "none", "those of transformers, as the recipe says"
    if why := (_unfit(config) if on_gpu else "") or _lacking(config, on_gpu):
        return "none", f"those of transformers: {why}"
    return "liger", "liger's RMSNorm, rotary embedding and gated MLP"


def problems(recipe: Recipe, config: Any) -> list[str]:
    """What the model has against train.kernels, wherever it is trained."""
    return _refusal(_unfit(config)) if recipe.train.kernels == "liger" else []


def lacks(recipe: Recipe, config: Any, on_gpu: bool) -> list[str]:
    """What this machine lacks for train.kernels; that where it is trained may have it."""
    return _refusal(_lacking(config, on_gpu)) if recipe.train.kernels == "liger" and not _unfit(config) else []


def _refusal(why: str) -> list[str]:
    return [f"train.kernels: liger, but {why}; take auto or none"] if why else []


def _unfit(config: Any) -> str:
    if config.model_type not in _COMPARED:
        return f"liger's are taken for {', '.join(_COMPARED)} only, and this is {config.model_type}"
    if config.hidden_act not in ("silu", "swish"):  # liger puts SiLU in its place without a word
        return f"liger's MLP is gated by SiLU, not by {config.hidden_act}"
    return ""


def _lacking(config: Any, on_gpu: bool) -> str:
    if not on_gpu:
        return "there is no GPU"
    missing = [name for name in ("triton", "liger_kernel") if importlib.util.find_spec(name) is None]
    if missing:
        return f"this machine lacks {' and '.join(missing).replace('_', '-')} (pip install liger-kernel)"
    try:
        return "" if config.model_type in _functions() else f"this machine's liger has none for {config.model_type}"
    except Exception as error:  # not made for this version of transformers, torch or Triton
        return f"liger cannot be imported here ({type(error).__name__}: {error})"


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
    function(
        model=model, rope=checkpointing != "selective", rms_norm=True, swiglu=True, cross_entropy=False,
        fused_linear_cross_entropy=False,
    )  # fmt: skip
