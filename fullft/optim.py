"""AdamW parameter groups and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch

from fullft.recipe import Train


def parameter_groups(model: torch.nn.Module, train: Train) -> list[dict[str, Any]]:
    """Two groups, with and without weight decay; each parameter in exactly one (tied ones once)."""
    exempt = _exempt_names(model, train.no_decay)
    decayed: list[torch.nn.Parameter] = []
    kept: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (kept if name in exempt else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": train.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _exempt_names(model: torch.nn.Module, kinds: Sequence[str]) -> set[str]:
    """Names of the parameters that are of these kinds: norm (any module called so), bias, embedding."""
    names = set()
    for module_name, module in model.named_modules():
        is_norm = "norm" in type(module).__name__.lower()
        for name, _ in module.named_parameters(prefix=module_name, recurse=False):
            kind = (
                "embedding" if isinstance(module, torch.nn.Embedding)
                else "norm" if is_norm
                else "bias" if name.endswith("bias")
                else None
            )  # fmt: skip
            if kind in kinds:
                names.add(name)
    return names


def build_optimizer(model: torch.nn.Module, train: Train, offload: bool) -> torch.optim.Optimizer:
    """AdamW with decoupled weight decay (Loshchilov & Hutter 2019); DeepSpeed's kernel on the CPU when offloaded."""
    groups = parameter_groups(model, train)
    settings: dict[str, Any] = {"lr": train.learning_rate, "betas": (train.beta1, train.beta2), "eps": train.eps}
    if offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return cast(torch.optim.Optimizer, DeepSpeedCPUAdam(groups, adamw_mode=True, **settings))
    return torch.optim.AdamW(groups, fused=torch.cuda.is_available(), **settings)


def learning_rate(step: int, total_steps: int, train: Train) -> float:
    """The rate of optimizer step `step` (from 0): linear warm-up, then the schedule towards min_learning_rate.

    A pure function of the step, so a resumed run, on any number of ranks, goes on exactly.
    """
    warmup = train.warmup_steps if train.warmup_steps >= 1 else train.warmup_steps * total_steps
    if step < warmup:
        return train.learning_rate * (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1.0, total_steps - warmup))
    low, high = train.min_learning_rate, train.learning_rate
    match train.schedule:
        case "cosine":
            return low + (high - low) * 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            return high + (low - high) * progress
        case _:
            return high
