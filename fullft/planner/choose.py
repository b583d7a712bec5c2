"""`fullft plan`: whether a recipe fits the GPUs it is to have, how fast it is there, and what would make it fit."""

from __future__ import annotations

import itertools
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from fullft.errors import BadInput
from fullft.planner import memory, speed
from fullft.planner.hardware import Gpu, gpu
from fullft.planner.setting import Setting, setting_of
from fullft.recipe import Recipe

MODES = ("none", "selective", "full")
GIB = 2**30


def plan(recipe: Recipe, asked: Namespace) -> dict[str, Any]:
    """What `fullft plan --json` prints; bytes, seconds, and operations as in `speed.py`. `asked`: its options.

    Raises:
        BadInput: with what is wrong in options, recipe or model.
    """
    from fullft import kernels, model
    from fullft.tokenizer import load_tokenizer

    numbers = {
        "--nodes": asked.nodes, "--gpus-per-node": asked.gpus_per_node, "--tokens": asked.tokens,
        "--price-per-gpu-hour": asked.price_per_gpu_hour,
    }  # fmt: skip
    if wrong := [
        f"{name}: {value} must be above 0" for name, value in numbers.items() if value is not None and not value > 0
    ]:
        raise BadInput(wrong)
    device, world_size = gpu(asked.gpu, asked.hardware), asked.nodes * asked.gpus_per_node
    meta = model.on_meta(recipe.model, load_tokenizer(recipe.model) if recipe.model.grows else None)
    bf16 = recipe.train.precision != "fp32"
    chosen = kernels.choose(recipe, meta.config, False)[0]  # what is fused takes less
    setting = setting_of(recipe, meta, world_size, asked.gpus_per_node, bf16=bf16, kernels=chosen)
    options = {"network_gbps": asked.network_gbps, "efficiency": asked.efficiency or speed.EFFICIENCY}
    if asked.efficiency == 0:
        options["efficiency"] = 0.0  # is refused
    setting = choose_checkpointing(setting, device)
    predicted, needed = speed.predict(setting, device, **options), memory.gpu_memory(setting)
    fits_now = fits(setting, device)
    money = None if asked.tokens is None else speed.cost(asked.tokens, predicted, world_size, asked.price_per_gpu_hour)
    return {
        "fits": fits_now, "gpu": device.name, "gpus": world_size, "activation_checkpointing": setting.checkpointing,
        "micro_batch_size": setting.micro_batch_size, "available": int(device.memory_gib * GIB), "peak": needed.peak,
        "components": needed.components, "phases": needed.phases, "host": memory.host_memory(setting),
        "speed": asdict(predicted), "run": money, "assumed": setting.layer.assumed,
        "would_fit": [] if fits_now else cheapest_changes(setting, device, options),
    }  # fmt: skip


def fits(setting: Setting, device: Gpu) -> bool:
    """In the memory of the GPU; that of the host is told, not judged."""
    return memory.gpu_memory(setting).peak <= device.memory_gib * GIB


def choose_checkpointing(setting: Setting, device: Gpu) -> Setting:
    """With `auto`, the mode that repeats least of those that fit; `full` if none does."""
    if setting.checkpointing != "auto":
        return setting
    modes = [replace(setting, checkpointing=mode) for mode in MODES]
    return next((one for one in modes if fits(one, device)), modes[-1])


def cheapest_changes(setting: Setting, device: Gpu, options: dict[str, Any]) -> list[dict[str, Any]]:
    """The three sets of changes, of those that fit, with the most tokens/s per GPU; none that has another in it."""
    found = list[dict[str, Any]]()
    fitting = [(names, one) for names, one in _changed(setting) if names and fits(one, device)]
    least = [(names, one) for names, one in fitting if not any(set(other) < set(names) for other, _ in fitting)]
    for names, one in least:
        rate = speed.predict(one, device, **options).tokens_per_second_per_gpu
        found.append({"change": " and ".join(names), "tokens_per_second_per_gpu": rate})
    return sorted(found, key=lambda one: -one["tokens_per_second_per_gpu"])[:3]


def _changed(setting: Setting) -> Iterator[tuple[list[str], Setting]]:
    modes: list[str | None] = [None, *(mode for mode in MODES if mode != setting.checkpointing)]
    offloads = [False] if memory.offloads(setting, "optimizer") else [False, True]
    smaller = [False, True] if setting.micro_batch_size > 1 else [False]
    times = [n for n in (1, 2, 4, 8) if setting.accumulation % n == 0]  # the batch of a step stays
    for mode, offloaded, halved, more in itertools.product(modes, offloads, smaller, times):
        names, one = list[str](), setting
        if mode:
            names.append(f"train.activation_checkpointing={mode}")
            one = replace(one, checkpointing=mode)
        if offloaded:
            names.append("offload_optimizer to cpu in the DeepSpeed configuration")
            one = replace(one, zero=one.zero | {"offload_optimizer": {"device": "cpu"}})
        if halved:
            names.append("train.micro_batch_size=1")
            one = replace(one, micro_batch_size=1, accumulation=one.accumulation * one.micro_batch_size)
        if more > 1:
            names.append(f"{more * setting.world_size} GPUs")
            one = replace(one, world_size=more * one.world_size, accumulation=one.accumulation // more)
        yield names, one


def table(found: dict[str, Any]) -> str:
    """What `fullft plan` prints."""
    timed, verdict = found["speed"], "fits" if found["fits"] else "does not fit"
    lines = [
        f"{verdict}: {found['peak'] / GIB:.1f} of {found['available'] / GIB:.1f} GiB on each of {found['gpus']} × "
        f"{found['gpu']}, activation checkpointing {found['activation_checkpointing']}", "", "memory of a GPU, GiB",
        *(f"  {name:<28}{size / GIB:8.2f}" for name, size in found["components"].items() if size),
        "received by a GPU in a micro-batch, GB" + " " * 3 + "link  network",
        *(
            f"  {name:<28}{one['link'] / 1e9:10.2f}{one['network'] / 1e9:9.2f}"
            for name, one in timed["traffic"].items()
        ), "a step, s",
        *(f"  {name.replace('_', ' '):<28}{timed[name]:8.2f}" for name in (
            "compute", "communication", "update", "step", "step_without_overlap")),
        f"{timed['tokens_per_second_per_gpu']:.0f} tokens/s per GPU, MFU {100 * timed['mfu']:.0f} % (predicted; "
        "efficiency and overlap are guesses)",
    ]  # fmt: skip
    if run := found["run"]:
        price = "" if run["cost"] is None else f", cost {run['cost']:,.2f}"
        lines.append(f"the run: {run['hours']:.1f} hours, {run['gpu_hours']:.1f} GPU-hours{price}")
    if found["assumed"]:
        lines.append(f"assumed: {found['assumed']}")
    if not found["fits"]:
        changes = [f"  {one['change']}: {one['tokens_per_second_per_gpu']:.0f} tokens/s" for one in found["would_fit"]]
        lines += ["would fit with", *changes] if changes else ["none of the changes tried makes it fit"]
    return "\n".join(lines)
