"""What `auto` comes to on given GPUs, what would make a run fit that does not, and the clusters that are enough: the
fastest setting that fits, by the memory of `memory` and the time of `speed`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from fullft.errors import BadInput
from fullft.planner import memory, speed
from fullft.planner.hardware import Gpu
from fullft.planner.memory import GIB
from fullft.planner.setting import Setting, on_gpus, setting_of
from fullft.recipe import Recipe

HOST_GIB = 256  # of host memory for each GPU: nodes of 8 with 2 TiB, as clouds have them
_OF_FILE = ("offload_optimizer", "zero_hpz_partition_size")
_MOST_SEQUENCES = 64  # of a micro-batch that `auto` looks at
_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # GPUs of the clusters that are searched


def fits(setting: Setting, gpu: Gpu) -> bool:
    """In the memory of the GPU; that of the host is told, not judged."""
    return memory.gpu_memory(setting).peak <= gpu.memory_gib * GIB


def host_fits(setting: Setting) -> bool:
    """Whether what is offloaded, if anything, has room in a usual node: a guess, as nobody has told the node's."""
    ranks = min(setting.gpus_per_node, setting.world_size)
    offloaded = memory.offloads(setting, "optimizer") or memory.offloads(setting, "param")
    return not offloaded or sum(memory.host_memory(setting).values()) <= ranks * HOST_GIB * GIB


def seconds_of_token(setting: Setting, gpu: Gpu, **options: Any) -> float:
    """GPU-seconds of a token; of an architecture whose operations are not known, in proportion to what checkpointing
    repeats and how often weights are gathered."""
    if setting.flops is not None:
        return 1 / speed.predict(setting, gpu, **options).tokens_per_second_per_gpu
    repeated = {"none": 3.0, "selective": 3.5, "full": 4.0, "offload": 4.1}[setting.checkpointing]
    return repeated + 1e-3 * setting.accumulation


def choose(
    setting: Setting, gpu: Gpu | None, auto_micro_batch: bool, able: bool = True, **options: Any
) -> tuple[Setting, dict[str, str]]:
    """The fastest setting that fits, of those that the recipe leaves open by `auto`; the least if none fits.

    Args:
        gpu: None on CPUs, where one sequence is a micro-batch and all activations are kept.
        auto_micro_batch: whether train.micro_batch_size is auto; `setting` has any that the batch allows.
        able: whether the architecture can compute layers again.
        options: of `speed.predict`.

    Returns:
        the setting, and for each key that was `auto` why
    """
    modes = [setting.checkpointing]
    if (auto_mode := setting.checkpointing == "auto") and gpu and able:
        modes = ["none", "full", "offload"] if setting.mlp_tiles > 1 else ["none", "selective", "full", "offload"]
    elif auto_mode:
        modes = ["none"]
    sequences = setting.micro_batch_size * setting.accumulation
    sizes = [setting.micro_batch_size]
    if auto_micro_batch:
        most = min(sequences, _MOST_SEQUENCES) if gpu else 1
        sizes = [size for size in range(1, most + 1) if sequences % size == 0]
    tried = [
        replace(setting, checkpointing=mode, micro_batch_size=size, accumulation=sequences // size)
        for size, mode in itertools.product(sizes, modes)
    ]
    if gpu is None:
        said = "there are no GPUs, by whose memory it is chosen"
        return tried[0], _reasons(auto_mode, auto_micro_batch, tried[0], said)
    if fitting := [one for one in tried if fits(one, gpu)]:
        best = min(fitting, key=lambda one: (seconds_of_token(one, gpu, **options), one.micro_batch_size))
        said = f"the fastest that fits: {_needs(tried, gpu)}"
    else:
        best = min(tried, key=lambda one: memory.gpu_memory(one).peak)
        said = f"nothing fits: {_needs(tried, gpu)}"
    if auto_mode and not able:
        said += "; the architecture can compute no layer again"
    return best, _reasons(auto_mode, auto_micro_batch, best, said)


def _reasons(mode: bool, micro_batch: bool, best: Setting, said: str) -> dict[str, str]:
    why = {True: f" (auto: {said})", False: ", as the recipe says"}
    return {
        "activation_checkpointing": f"{best.checkpointing}{why[mode]}",
        "micro_batch_size": f"{best.micro_batch_size}{why[micro_batch]}",
    }


def _needs(tried: list[Setting], gpu: Gpu) -> str:
    """GiB of each mode with the smallest micro-batch, which is what decides."""
    least = min(one.micro_batch_size for one in tried)
    of_least = [one for one in tried if one.micro_batch_size == least]
    of = ", ".join(f"{one.checkpointing} {memory.gpu_memory(one).peak / GIB:.1f}" for one in of_least)
    return f"{gpu.name} has {gpu.memory_gib:.1f} GiB, and {least} sequence{'s' * (least > 1)} at a time takes {of}"


def changes(setting: Setting, gpu: Gpu, **options: Any) -> list[dict[str, Any]]:
    """The three cheapest sets of changes that make a setting fit, by GPU-seconds of a token: `change` as keys of the
    recipe, `slower` as a factor of the fastest. None that has another one in it."""
    least = list[tuple[frozenset[str], Setting]]()
    enough = set[frozenset[str]]()  # more of the same kind, GPUs or ranks, is not told
    for names, one in _changed(setting):
        kinds = frozenset(re.sub(r"\d+", "", name) if re.search(r"GPUs|parallel", name) else name for name in names)
        if any(fewer <= kinds for fewer in enough) or not (fits(one, gpu) and host_fits(one)):
            continue
        enough.add(kinds)
        least.append((names, one))
    timed = sorted((seconds_of_token(one, gpu, **options), len(names), sorted(names), one) for names, one in least)[:3]
    return [
        {
            "change": " and ".join(names), "peak": memory.gpu_memory(one).peak, "gpus": one.world_size,
            "host": sum(memory.host_memory(one).values()), "slower": seconds / timed[0][0],
        }
        for seconds, _, names, one in timed
    ]  # fmt: skip


def _changed(setting: Setting) -> Iterator[tuple[frozenset[str], Setting]]:
    """Combinations of changes, the small ones first."""
    train, sequences = setting.recipe.train, setting.micro_batch_size * setting.accumulation
    axes: list[list[tuple[str, dict[str, Any]]]] = [[("", {})] for _ in range(5)]
    axes[0] += [
        (f"train.activation_checkpointing={mode}", {"checkpointing": mode})
        for mode in ("selective", "full", "offload")
        if mode != setting.checkpointing
    ]
    if setting.micro_batch_size > 1:
        axes[1].append(("train.micro_batch_size=1", {"micro_batch_size": 1, "accumulation": sequences}))
    if setting.mlp_tiles == 1:
        axes[2].append(("train.mlp_tiles=8", {"mlp_tiles": 8}))
    if not memory.offloads(setting, "optimizer"):
        offloaded = setting.zero | {"offload_optimizer": {"device": "cpu"}, "zero_hpz_partition_size": 1}
        axes[3].append(("deepspeed=ds_configs/zero3_offload.json", {"zero": offloaded}))
    if setting.zero.get("zero_hpz_partition_size", 1) > 1:
        axes[3].append(("deepspeed=ds_configs/zero3.json", {"zero": setting.zero | {"zero_hpz_partition_size": 1}}))
    axes[4] += [
        (f"{times * setting.world_size} GPUs", {"world_size": times * setting.world_size, "_of": times})
        for times in (2, 4, 8)
        if sequences % times == 0
    ]
    axes[4] += [
        (f"train.sequence_parallel={ranks}", {"sequence_parallel": ranks, "_of": 1 / ranks})
        for ranks in (2, 4, 8)
        if setting.sequence_parallel == 1 and setting.world_size % ranks == 0 and setting.layer.heads % ranks == 0
        and setting.sequence_length % ranks == 0 and train.kl_reference != "model"
    ]  # fmt: skip
    for chosen in sorted(itertools.product(*axes), key=lambda one: sum(bool(name) for name, _ in one)):
        fields = dict[str, Any]()
        for _, change in chosen:
            fields |= change
        if times := fields.pop("_of", None):  # the sequences of a step stay
            now = int(sequences / times)
            micro = fields.get("micro_batch_size", setting.micro_batch_size)
            micro = next(size for size in range(min(micro, now), 0, -1) if now % size == 0)
            fields |= {"micro_batch_size": micro, "accumulation": now // micro}
        one = on_gpus(setting, fields.pop("world_size", setting.world_size))
        if "zero" in fields:
            fields["zero"] = one.zero | {key: fields["zero"][key] for key in _OF_FILE if key in fields["zero"]}
        if names := frozenset(name for name, _ in chosen if name):
            if fields.get("checkpointing", setting.checkpointing) == "selective" and "mlp_tiles" in fields:
                continue
            yield names, replace(one, **fields)


def search(recipe: Recipe, meta: Any, gpus: list[Gpu], gpus_per_node: int, **options: Any) -> list[dict[str, Any]]:
    """For each GPU the smallest cluster that the recipe fits, with its own DeepSpeed file, and with the optimizer
    offloaded where that is smaller; and of the sizes up to four times as large the one with the fewest GPU-seconds a
    token. Smallest first."""
    found = []
    for gpu in gpus:
        of_gpu = list[dict[str, Any]]()
        for offload in (False, True):
            smallest = 0
            for size in _SIZES:
                if smallest and (offload or size > 4 * smallest):
                    break
                if of_gpu and offload and size >= of_gpu[0]["gpus"]:
                    break
                if one := _on(recipe, meta, gpu, size, gpus_per_node, offload, options):
                    smallest = smallest or size
                    of_gpu.append(one)
        if of_gpu:
            least = min(of_gpu, key=lambda one: one["gpus"])
            cheapest = min(of_gpu, key=lambda one: one["seconds_of_token"])
            found += [least | {"is": "smallest"}]
            found += [cheapest | {"is": "cheapest"}] if cheapest is not least else []
    return sorted(found, key=lambda one: (one["is"] != "smallest", one["gpus"], one["seconds_of_token"]))


def _on(
    recipe: Recipe, meta: Any, gpu: Gpu, size: int, gpus_per_node: int, offload: bool, options: dict[str, Any]
) -> dict[str, Any] | None:
    """The best setting on so many GPUs; None if the batch cannot be shared by them, or it does not fit."""
    changed = {"deepspeed": "ds_configs/zero3_offload.json"} if offload else {}
    try:
        setting = setting_of(recipe.model_copy(update=changed), meta, size, min(size, gpus_per_node))
    except BadInput:
        return None
    auto = recipe.train.micro_batch_size == "auto"
    best, _ = choose(setting, gpu, auto, meta.supports_gradient_checkpointing, **options)
    if not fits(best, gpu) or not host_fits(best):
        return None
    return {
        "gpu": gpu.name, "gpus": size, "micro_batch_size": best.micro_batch_size, "accumulation": best.accumulation,
        "activation_checkpointing": best.checkpointing, "offload_optimizer": memory.offloads(best, "optimizer"),
        "peak": memory.gpu_memory(best).peak, "seconds_of_token": seconds_of_token(best, gpu, **options),
        "host": sum(memory.host_memory(best).values()),
    }  # fmt: skip
