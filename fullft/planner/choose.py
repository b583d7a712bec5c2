"""What `auto` comes to on given GPUs, what would make a run fit that does not, and the clusters that are enough: the
fastest setting that fits, by the memory of `memory` and the time of `speed`."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from fullft import engine
from fullft.errors import BadInput
from fullft.planner import memory, speed
from fullft.planner.hardware import Gpu
from fullft.planner.memory import GIB
from fullft.planner.setting import Setting, on_gpus, setting_of
from fullft.recipe import Recipe

HOST_GIB = 256  # of host memory for each GPU: nodes of 8 with 2 TiB, as clouds have them
_WORTH = 1.05  # times as fast another DeepSpeed file must be than the plain one: the times are predicted
_OF_FILE = ("offload_optimizer", "zero_hpz_partition_size")
_MOST_SEQUENCES = 64  # of a micro-batch that `auto` looks at
_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # GPUs of the clusters that are searched


def fits(setting: Setting, gpu: Gpu) -> bool:
    """In the memory of the GPU; that of the host is told, not judged."""
    return memory.gpu_memory(setting).peak <= gpu.memory_gib * GIB


def host_fits(setting: Setting) -> bool:
    """Whether what is offloaded, if anything, has room in a node's memory, or in a usual one's if that is unknown."""
    offloaded = memory.offloads(setting, "optimizer") or memory.offloads(setting, "param")
    offloaded |= setting.checkpointing == "offload"
    return not offloaded or sum(memory.host_memory(setting).values()) <= _node_gib(setting) * GIB


def _node_gib(setting: Setting) -> float:
    return setting.node_gib or min(setting.gpus_per_node, setting.world_size) * HOST_GIB


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
        fitting = [one for one in fitting if host_fits(one)] or fitting  # the host's memory is told, not judged
        best = min(fitting, key=lambda one: (seconds_of_token(one, gpu, **options), one.micro_batch_size))
        said = f"the fastest that fits: {_needs(tried, gpu)}"
    else:
        best = min(tried, key=lambda one: memory.gpu_memory(one).peak)
        said = f"nothing fits: {_needs(tried, gpu)}"
    if auto_mode and not able:
        said += "; the architecture can compute no layer again"
    return best, _reasons(auto_mode, auto_micro_batch, best, said)


def file(
    recipe: Recipe, meta: Any, gpu: Gpu | None, world_size: int, gpus_per_node: int | None,
    options: dict[str, Any] | None = None, **fields: Any,
) -> tuple[Recipe, str]:  # fmt: skip
    """The recipe with what `deepspeed: auto` comes to, and why: the fastest that fits; the plain one if that is within
    5 %, nothing fits, or there are no GPUs.

    Args:
        gpus_per_node: None where it is not known: 8, without hpZ.
        options: of `speed.predict`.
        fields: of `setting_of`.

    Raises:
        BadInput: the batch cannot be.
    """
    plain, hpz, _ = engine.FILES
    if gpu is None:
        return recipe.with_deepspeed(plain), f"{plain} (auto: there are no GPUs, by whose memory it is chosen)"
    engine.geometry(recipe, world_size)
    files = [one for one in engine.FILES if one != hpz or gpus_per_node]
    tried = _tried(recipe, meta, gpu, world_size, min(gpus_per_node or 8, world_size), files, options or {}, fields)
    unknown = "" if gpus_per_node else "; without hpZ, as the GPUs of a node are not known here"
    if (best := _best(tried, plain)) is None:
        return recipe.with_deepspeed(plain), f"{plain} (auto: nothing fits{unknown})"
    chosen, _, seconds = best
    others = ", ".join(_beside(one, seconds, gpu) for one in tried if one is not best)
    said = "the fastest that fits" if chosen.recipe.deepspeed != plain else "the fastest that fits, or within 5 % of it"
    return chosen.recipe, f"{chosen.recipe.deepspeed} (auto: {said}; {others}{unknown})"


_Tried = tuple[Setting, bool, float]  # with a DeepSpeed file, whether it fits, GPU-seconds of a token


def _tried(
    recipe: Recipe, meta: Any, gpu: Gpu, world_size: int, per_node: int, files: Iterable[str],
    options: dict[str, Any], fields: dict[str, Any],
) -> list[_Tried]:  # fmt: skip
    """The best setting with each DeepSpeed file, but those that cannot be, or are of no use, here."""
    found = []
    for one in files:
        with contextlib.suppress(BadInput):
            setting = setting_of(recipe.with_deepspeed(one), meta, world_size, per_node, **fields)
            of_no_use = setting.zero.get("zero_hpz_partition_size") == 1  # on one node; that is the plain file
            grows = recipe.model.grows and setting.zero.get("zero_hpz_partition_size", 1) > 1  # transformers loads it
            if (of_no_use or grows) and one != recipe.deepspeed:
                continue
            auto = recipe.train.micro_batch_size == "auto"
            best, _ = choose(setting, gpu, auto, meta.supports_gradient_checkpointing, **options)
            found.append((best, fits(best, gpu) and host_fits(best), seconds_of_token(best, gpu, **options)))
    return found


def _best(tried: list[_Tried], plain: str) -> _Tried | None:
    """The fastest that fits; another file than `plain` only if it is 5 % faster."""
    fitting = [one for one in tried if one[1]]
    return min(fitting, key=lambda one: one[2] * (1 if one[0].recipe.deepspeed == plain else _WORTH), default=None)


def _beside(tried: _Tried, seconds: float, gpu: Gpu) -> str:
    """What another file than the chosen one comes to."""
    setting, fit, others = tried
    if fit:
        return f"{setting.recipe.deepspeed} takes {others / seconds:.2f} × the time"
    if fits(setting, gpu):
        needed, has = sum(memory.host_memory(setting).values()) / GIB, _node_gib(setting)
        return f"{setting.recipe.deepspeed} takes {needed:,.0f} of {has:,.0f} GiB of a node's memory"
    needed = memory.gpu_memory(setting).peak / GIB
    return f"{setting.recipe.deepspeed} takes {needed:.1f} of {gpu.memory_gib:.1f} GiB"


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
    if setting.mlp_tiles == 1 and not setting.layer.active_experts:
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
        and (setting.layer.key_heads % ranks == 0 or ranks % setting.layer.key_heads == 0)
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
            tiles = fields.get("mlp_tiles", setting.mlp_tiles)
            if fields.get("checkpointing", setting.checkpointing) == "selective" and tiles > 1:
                continue  # it would keep what tiles spare
            yield names, replace(one, **fields)


def search(
    recipe: Recipe, meta: Any, gpus: list[Gpu], gpus_per_node: int, options: dict[str, Any], **fields: Any
) -> list[dict[str, Any]]:
    """For each GPU the smallest cluster that the recipe fits, with its own DeepSpeed file or one of `engine.FILES`; and
    of the sizes up to four times that which needs no offloading the one with the fewest GPU-seconds a token. Smallest
    first."""
    own = engine.FILES[0] if recipe.deepspeed == "auto" else recipe.deepspeed
    recipe, found = recipe.with_deepspeed(own), []
    files = dict.fromkeys((own, *engine.FILES))
    for gpu in gpus:
        of_gpu, without = list[dict[str, Any]](), 0
        for size in _SIZES:
            if without and size > 4 * without:
                break
            tried = _tried(recipe, meta, gpu, size, min(size, gpus_per_node), files, options, fields)
            if (best := _best(tried, own)) is not None:
                of_gpu.append(one := _told(best, gpu))
                without = without or (0 if one["offload_optimizer"] else size)
        if of_gpu:
            cheapest = min(of_gpu, key=lambda one: one["seconds_of_token"])
            found += [of_gpu[0] | {"is": "smallest"}]
            found += [cheapest | {"is": "cheapest"}] if cheapest is not of_gpu[0] else []
    return sorted(found, key=lambda one: (one["is"] != "smallest", one["gpus"], one["seconds_of_token"]))


def _told(found: _Tried, gpu: Gpu) -> dict[str, Any]:
    best, _, seconds = found
    return {
        "gpu": gpu.name, "gpus": best.world_size, "micro_batch_size": best.micro_batch_size,
        "accumulation": best.accumulation, "activation_checkpointing": best.checkpointing,
        "deepspeed": best.recipe.deepspeed, "offload_optimizer": memory.offloads(best, "optimizer"),
        "peak": memory.gpu_memory(best).peak, "seconds_of_token": seconds,
        "host": sum(memory.host_memory(best).values()),
    }  # fmt: skip
