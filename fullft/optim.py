"""AdamW parameter groups and learning-rate schedules."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from fullft.errors import BadInput
from fullft.recipe import Train


def parameter_groups(model: torch.nn.Module, train: Train) -> list[dict[str, Any]]:
    """Groups by weight decay and learning rate; each parameter in exactly one (tied ones once).

    The learning rate of a group is that of the step times its `lr_scale`, which is 1 without layer-wise decay.
    """
    exempt = _exempt_names(model, train.no_decay)
    depths = layer_depths(model) if train.layerwise_lr_decay < 1 else {}
    groups: dict[tuple[bool, int], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault((name in exempt, depths.get(name, 0)), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": 0.0 if is_exempt else train.weight_decay,
            "lr_scale": train.layerwise_lr_decay**depth,
        }
        for (is_exempt, depth), parameters in sorted(groups.items(), key=lambda group: group[0])
    ]


def layer_depths(model: torch.nn.Module) -> dict[str, int]:
    """Layers between each parameter and the logits (as in ELECTRA, Clark et al. 2020, and BEiT): of L layers the last
    is 1 and the first L, what embeds is L + 1, the head and the final norm are 0. A tied head is an embedding.

    Raises:
        BadInput: the layers are not found.
    """
    layers = layer_of(model)
    if not layers:
        raise BadInput(f"train.layerwise_lr_decay: {type(model).__name__} has no list of its layers; leave it out")
    count = max(layers.values()) + 1
    embeds = tuple(f"{name}." for name, one in model.named_modules() if isinstance(one, torch.nn.Embedding))
    return {
        name: count - layers[name] if name in layers else count + 1 if name.startswith(embeds) else 0
        for name, _ in model.named_parameters()
    }


def layer_of(model: torch.nn.Module) -> dict[str, int]:
    """The number (from 0) of the layer that each parameter is of, of those that are of one; empty if the model has no
    list of as many modules as its config says it has layers."""
    count = int(model.config.get_text_config().num_hidden_layers)  # type: ignore[union-attr, operator]
    lists = [(name, one) for name, one in model.named_modules() if isinstance(one, torch.nn.ModuleList)]
    prefix = next((f"{name}." for name, one in lists if len(one) == count), None)
    return {
        name: int(name.removeprefix(prefix).partition(".")[0])
        for name, _ in model.named_parameters()
        if prefix is not None and name.startswith(prefix)
    }


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

        remove_stale_lock()
        return cast(torch.optim.Optimizer, DeepSpeedCPUAdam(groups, adamw_mode=True, **settings))
    return torch.optim.AdamW(groups, fused=torch.cuda.is_available(), **settings)


def remove_stale_lock(name: str = "cpu_adam", seconds: float = 600) -> None:
    """Let DeepSpeed's kernel be built, or found, where a start was killed while it built it.

    torch leaves the lock of such a build behind, and every later start waits for it without a word. A build takes a
    minute or two, so a lock that is older than `seconds` is nobody's.
    """
    from torch.utils.cpp_extension import get_default_build_root  # it imports setuptools

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in root.glob(f"**/{name}/lock"):
        with contextlib.suppress(OSError):  # another rank was first
            if time.time() - lock.stat().st_mtime > seconds:
                lock.unlink()
                print(f"fullft: removed {lock}, left by a start that was killed while it built {name}", flush=True)


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
