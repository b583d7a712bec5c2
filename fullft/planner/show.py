"""`fullft plan`: the plan of a recipe, or of a model alone, as text, JSON and a chart."""

from __future__ import annotations

import html
import json
import math
import re
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fullft.errors import BadInput
from fullft.planner import choose, hardware, memory, speed
from fullft.planner.memory import GIB
from fullft.planner.setting import Setting, setting_of
from fullft.recipe import Recipe, load_recipe, parse_recipe

# Layers, hidden, MLP, heads, key-value heads, vocabulary: Llama 2 (7B, 13B) and Llama 3.1, from their configs.
_LLAMAS = {
    "7b": (32, 4096, 11008, 32, 32, 32000), "8b": (32, 4096, 14336, 32, 8, 128256),
    "13b": (40, 5120, 13824, 40, 40, 32000), "70b": (80, 8192, 28672, 64, 8, 128256),
    "405b": (126, 16384, 53248, 128, 8, 128256),
}  # fmt: skip


@contextmanager
def recipe_of(asked: Namespace, overrides: list[str]) -> Iterator[tuple[Recipe, str]]:
    """(the recipe, what was assumed for want of one).

    Raises:
        BadInput: not exactly one of recipe, --model and --params; or what it is of is wrong.
    """
    _require_numbers(asked)
    if sum(one is not None for one in (asked.recipe, asked.model, asked.params)) != 1:
        raise BadInput("give one of RECIPE.yaml, --model FOLDER or hub name, and --params, e.g. 70b")
    if asked.params is None and (asked.layers or asked.hidden):
        raise BadInput("--layers and --hidden belong to --params")
    if asked.recipe is not None:
        yield load_recipe(asked.recipe, overrides), ""
        return
    with tempfile.TemporaryDirectory() as folder:
        said = "" if asked.params is None else write_llama(Path(folder), asked.params, asked.layers, asked.hidden)
        raw = {"run_dir": "runs/plan", "model": {"path": asked.model or folder}, "data": {"train": ["?"]}}
        raw["train"] = {"micro_batch_size": "auto", "global_batch_size": 8 * asked.nodes * asked.gpus_per_node}
        recipe = parse_recipe(raw, overrides)
        said += f"{recipe.train.global_batch_size} sequences of {recipe.data.sequence_length} tokens a step"
        yield recipe, said


def _require_numbers(asked: Namespace) -> None:
    numbers = {
        "--nodes": asked.nodes, "--gpus-per-node": asked.gpus_per_node, "--tokens": asked.tokens,
        "--price-per-gpu-hour": asked.price_per_gpu_hour, "--network-gbps": asked.network_gbps,
    }  # fmt: skip
    wrong = [
        f"{name}: {value} must be above 0, and a number"
        for name, value in numbers.items()
        if value is not None and not 0 < value < math.inf
    ]
    if asked.efficiency is not None and not 0 < asked.efficiency <= 1:
        wrong.append(f"--efficiency: {asked.efficiency} must be above 0 and at most 1")
    if wrong:
        raise BadInput(wrong)


def write_llama(folder: Path, params: str, layers: int | None, hidden: int | None) -> str:
    """The config of a Llama with about so many parameters (`70b`, `3.5B`, `1e9`); returns what was assumed.

    The known sizes are those that are published. Else heads are 128 wide, 8 of them for keys and values, the MLP is
    3.5 wide as in Llama 3, and hidden, unless given, is what the parameters leave for a layer, in steps of 128.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)([bBmM]?)", params)
    count = float(found[1]) * {"b": 1e9, "m": 1e6, "": 1}[found[2].lower()] if found else 0
    if not 1e6 <= count <= 1e13:
        raise BadInput(f"--params: {params} is no number of parameters, such as 70b or 1.5e9, of 1e6 to 1e13")
    if layers is not None and not 1 <= layers <= 1000:
        raise BadInput(f"--layers: {layers} is no number of layers")
    if (known := _LLAMAS.get(params.lower())) and layers in (None, known[0]) and hidden in (None, known[1]):
        depth, width, mlp, heads, keys, vocabulary = known
    elif layers is None:
        raise BadInput(f"--params: {params} is none of {', '.join(_LLAMAS)}; give --layers with it")
    else:
        depth, vocabulary, keys = layers, 128256, 8
        sizes = [hidden] if hidden else [128 * one for one in range(1, 1025)]
        # q and output h² each, keys and values 2 · 1024 h, three of MLP 3.5 h²; embedding and head
        width = min(sizes, key=lambda h: abs(depth * (12.5 * h * h + 2048 * h) + 2 * vocabulary * h - count))
        if width % 128:
            raise BadInput(f"--hidden: {width} is not a multiple of 128, the width of a head")
        mlp, heads = -(-7 * width // 2 // 256) * 256, width // 128
        keys = next(size for size in (8, 4, 2, 1) if heads % size == 0)
    config = {
        "model_type": "llama", "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": depth,
        "num_attention_heads": heads, "num_key_value_heads": keys, "vocab_size": vocabulary,
        "tie_word_embeddings": False, "max_position_embeddings": 131072,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return (
        f"a Llama of {depth} layers, hidden {width}, MLP {mlp}, {heads} heads, {keys} of them for keys and values, "
        f"vocabulary {vocabulary}; "
    )


def plan(recipe: Recipe, asked: Namespace) -> dict[str, Any]:
    """What `fullft plan --json` prints; bytes and seconds. `asked`: its options.

    Raises:
        BadInput: with what is wrong in options, recipe or model.
    """
    from fullft import kernels, model
    from fullft.tokenizer import load_tokenizer

    efficiency = speed.EFFICIENCY if asked.efficiency is None else asked.efficiency
    gpu, world_size = hardware.gpu(asked.gpu, asked.hardware), asked.nodes * asked.gpus_per_node
    meta = model.on_meta(recipe.model, load_tokenizer(recipe.model) if recipe.model.grows else None)
    bf16 = recipe.train.precision != "fp32"
    fused = "liger" if recipe.train.kernels == "liger" else kernels.choose(recipe, meta.config, False)[0]
    fields: dict[str, Any] = {"bf16": bf16, "kernels": fused}
    said: dict[str, str] = {}
    setting = setting_of(recipe, meta, world_size, asked.gpus_per_node, **fields)
    steps, document = (None, None) if asked.tokens else of_data(recipe, setting)
    options = {"network_gbps": asked.network_gbps, "efficiency": efficiency, "document": document}
    if recipe.deepspeed == "auto":
        recipe, said["deepspeed"] = choose.file(recipe, meta, gpu, world_size, asked.gpus_per_node, options, **fields)
        setting = setting_of(recipe, meta, world_size, asked.gpus_per_node, **fields)
    auto = recipe.train.micro_batch_size == "auto"
    setting, why = choose.choose(setting, gpu, auto, meta.supports_gradient_checkpointing, **options)
    needed, fits = memory.gpu_memory(setting), choose.fits(setting, gpu)
    timed = asdict(speed.predict(setting, gpu, **options)) if setting.flops else None
    tokens = asked.tokens or (steps and steps * recipe.train.global_batch_size * recipe.data.sequence_length)
    found = {
        "fits": fits, "gpu": gpu.name, "gpus": world_size, "nodes": asked.nodes, "available": int(gpu.memory_gib * GIB),
        "peak": needed.peak, "model": setting.facts.architecture, "parameters": setting.facts.parameters,
        "micro_batch_size": setting.micro_batch_size, "gradient_accumulation_steps": setting.accumulation,
        "activation_checkpointing": setting.checkpointing, "deepspeed": recipe.deepspeed, "why": why | said,
        "memory": needed.parts, "outside_of_torch": needed.outside, "host": memory.host_memory(setting),
        "disk": memory.disk(setting),
        "document_tokens": document, "step": timed, "run": run_of(setting, timed, tokens, asked.price_per_gpu_hour),
        "assumed": setting.layer.assumed, "would_fit": [] if fits else choose.changes(setting, gpu, **options),
    }  # fmt: skip
    if asked.search:
        known = [gpu] if asked.gpu_given else [hardware.gpu(name, asked.hardware) for name in _SEARCHED]
        found["search"] = choose.search(recipe, meta, known, asked.gpus_per_node, options, **fields)
        for one in found["search"]:
            of_one = tokens and with_evaluation(recipe) * tokens * one["seconds_of_token"] / 3600
            of_one = of_one if setting.flops else None
            one["gpu_hours"], one["hours"] = of_one, of_one and of_one / one["gpus"]
    return found


_SEARCHED = ("a100-80gb", "h100-80gb", "h200", "b200", "mi300x", "l40s")


def of_data(recipe: Recipe, setting: Setting) -> tuple[int | None, int | None]:
    """(optimizer steps, tokens of a document in the mean) of a recipe whose data are prepared; None of what is not
    known: nothing is tokenized for a plan."""
    from fullft.data.training import build_batches, open_data
    from fullft.engine import geometry
    from fullft.tokenizer import load_tokenizer

    try:
        prepared = recipe.model_copy(
            update={"data": recipe.data.model_copy(update={"on_missing_cache": "error"})}
        ).without_evaluation()
        sets, _ = open_data(prepared, load_tokenizer(recipe.model))
        plan = geometry(recipe, setting.world_size, setting.micro_batch_size)
        steps = build_batches(recipe, sets, plan)[1]
        documents = sum(one.summary["documents"] for one in sets)
        return steps, max(1, round(sum(one.summary["tokens"] for one in sets) / documents))
    except (BadInput, OSError):
        return recipe.train.steps, None


def with_evaluation(recipe: Recipe) -> float:
    """Of a run's time, in times of its training."""
    return 1 + (recipe.retention.max_overhead or 0)


def run_of(setting: Setting, timed: dict[str, Any] | None, tokens: float | None, price: float | None) -> Any:
    """Hours, GPU-hours and cost of the whole run; None if its tokens or its speed are not known. retention.max_overhead
    is added to it; other evaluations, checkpoints, start and restarts are not."""
    if timed is None or tokens is None:
        return None
    gpu_hours = with_evaluation(setting.recipe) * tokens / timed["tokens_per_second_per_gpu"] / 3600
    cost = None if price is None else price * gpu_hours
    return {"tokens": tokens, "hours": gpu_hours / setting.world_size, "gpu_hours": gpu_hours, "cost": cost}


def table(found: dict[str, Any]) -> str:
    """What `fullft plan` prints."""
    verdict = "fits" if found["fits"] else "DOES NOT FIT"
    needed, has = found["peak"] / GIB, found["available"] / GIB
    lines = [
        f"{verdict}: {found['gpus']} × {found['gpu']} ({found['nodes']} nodes), {needed:.1f} of {has:.1f} GiB of a GPU",
        f"  model                     {found['model']}, {found['parameters']:,} parameters",
        f"  micro-batch               {found['why']['micro_batch_size'].partition(' (')[0]}, accumulated "
        f"{found['gradient_accumulation_steps']} times",
        f"  activation checkpointing  {found['why']['activation_checkpointing']}",
    ]
    if said := found["why"].get("deepspeed"):
        lines.append(f"  deepspeed                 {said}")
    if found["assumed"]:
        lines.append(f"  assumed                   {found['assumed']}")
    if not found["fits"]:
        lines += ["", "would fit (the fastest first)"]
        lines += [
            f"  {one['change']}: {one['peak'] / GIB:.1f} GiB, {one['slower']:.2f} × the GPU-time; "
            f"{one['host'] / GIB:,.0f} GiB of a node"
            for one in found["would_fit"]
        ] or ["  nothing that was tried"]
    phases = list(found["memory"])
    lines += ["", f"{'GiB of a GPU, worst moment of':30}" + "".join(f"{phase:>10}" for phase in phases)]
    names = dict.fromkeys(name for parts in found["memory"].values() for name, size in parts.items() if size)
    for name in names:
        cells = [found["memory"][phase].get(name, 0) / GIB for phase in phases]
        lines.append(
            f"  {name.replace('_', ' '):28}" + "".join(f"{cell:10.2f}" if cell else " " * 10 for cell in cells)
        )
    outside, disk = sum(found["outside_of_torch"].values()), found["disk"]
    sums = [(sum(parts.values()) + outside) / GIB for parts in found["memory"].values()]
    lines += [
        f"  {'allocator, context, NCCL':28}" + f"{outside / GIB:10.2f}" * len(phases),
        f"  {'together':28}" + "".join(f"{one:10.2f}" for one in sums),
        "",
        f"a node's memory {sum(found['host'].values()) / GIB:,.0f} GiB; on disk {disk['run_folder_bytes'] / GIB:,.0f} "
        f"GiB, a checkpoint {disk['checkpoint_bytes'] / GIB:,.0f}",
    ]  # fmt: skip
    return "\n".join([*lines, *_time_lines(found), *_search_lines(found)])


def _time_lines(found: dict[str, Any]) -> list[str]:
    if (timed := found["step"]) is None:
        return ["", "time: not known, as the operations of this architecture are not"]
    received = ", ".join(
        f"{name.replace('_', ' ')} {one['link'] / 1e9:.1f} + {one['network'] / 1e9:.1f}"
        for name, one in timed["traffic"].items()
    )
    hosted = f"; to and from host memory {timed['offloaded'] / 1e9:.1f}" if timed["offloaded"] else ""
    length = (
        f"documents of {found['document_tokens']} tokens" if found["document_tokens"] else "documents fill the rows"
    )
    lines = [
        "",
        f"a step: {timed['step']:.2f} s, predicted ({length}; efficiency and overlap are guesses)",
        f"  compute {timed['compute']:.2f} s, communication {timed['communication']:.2f} s, update "
        f"{timed['update']:.2f} s; without overlap {timed['step_without_overlap']:.2f} s, with perfect overlap "
        f"{max(timed['compute'], timed['communication']) + timed['update']:.2f} s",
        f"  a GPU receives in a micro-batch, GB over the node's link + over the network: {received}{hosted}",
        f"  {timed['tokens_per_second_per_gpu']:,.0f} tokens/s per GPU, MFU {timed['mfu']:.0%}",
    ]  # fmt: skip
    if run := found["run"]:
        cost = "" if run["cost"] is None else f", {run['cost']:,.0f} in money"
        lines.append(
            f"the run: {run['tokens']:.3g} tokens, {run['hours']:,.1f} hours, {run['gpu_hours']:,.0f} GPU-hours{cost}"
        )
    else:
        lines.append("the run: its length is not known; `fullft prepare` the data first, or give --tokens")
    return lines


def _search_lines(found: dict[str, Any]) -> list[str]:
    if "search" not in found:
        return []
    lines = ["", "smallest clusters, and those with the least GPU-time"]
    for one in found["search"]:
        of_file = "" if one["deepspeed"] == found["deepspeed"] else f", deepspeed={one['deepspeed']}"
        hours = f"; {one['gpu_hours']:,.0f} GPU-hours, {one['hours']:,.1f} hours" if one.get("gpu_hours") else ""
        lines.append(
            f"  {one['is']:9} {one['gpus']:4} × {one['gpu']:11} micro-batch {one['micro_batch_size']}, checkpointing "
            f"{one['activation_checkpointing']}{of_file}, {one['peak'] / GIB:.1f} GiB, "
            f"{one['host'] / GIB:,.0f} of a node{hours}"
        )
    return lines if found["search"] else [*lines, "  none up to 512 GPUs that the batch can be shared by"]


# The chart

_COLORS = {
    "weights": "#3b6fb6", "gradients": "#7fa8d9", "master_weights": "#2a4d7f", "adamw_moments": "#5b84c4",
    "base_weights": "#86a0c0", "averaged_weights": "#a9bad0", "reference_model": "#54708f",
    "second_copy_of_weights": "#9fb3cc", "reduce_bucket": "#c3a13b", "gathered_weights": "#e0b84c",
    "gradients_in_flight": "#f0d58a", "activations": "#4a9d6e", "layer_at_work": "#86c5a0",
    "attention_workspace": "#b5dec6", "loss_workspace": "#c0614f", "update_temporaries": "#dd9a8c",
    "allocator_slack": "#b9b9b9", "context": "#8d8d8d", "nccl": "#6a6a6a",
}  # fmt: skip


def chart(found: dict[str, Any]) -> str:
    """SVG: for each phase a bar of what is in memory together, and the GPU's memory as a line."""
    phases = {phase: parts | found["outside_of_torch"] for phase, parts in found["memory"].items()}
    most = max(found["available"], *(sum(parts.values()) for parts in phases.values()))
    left, width, top = 90, 560, 56
    names = [name for name in _COLORS if any(parts.get(name, 0) > 0 for parts in phases.values())]
    height = top + 40 * len(phases) + 44 + 18 * -(-len(names) // 3)
    title = f"{found['model']}, {found['parameters'] / 1e9:.1f} B parameters, on {found['gpus']} × {found['gpu']}"
    said = f"{found['peak'] / GIB:.1f} of {found['available'] / GIB:.1f} GiB, " + (
        "fits" if found["fits"] else "does not fit"
    )
    body = [
        f'<text x="12" y="22" font-size="15" font-weight="bold">{html.escape(title)}</text>',
        f'<text x="12" y="42" font-size="13">Memory of a GPU at the worst moment of each phase: {said}</text>',
    ]
    for row, (phase, parts) in enumerate(phases.items()):
        y, at = top + 40 * row, float(left)
        body.append(f'<text x="{left - 8}" y="{y + 19}" text-anchor="end">{phase}</text>')
        for name in names:
            if (size := parts.get(name, 0)) > 0:
                wide = width * size / most
                label = f"{name.replace('_', ' ')} {size / GIB:.2f} GiB"
                body.append(
                    f'<rect x="{at:.1f}" y="{y}" width="{wide:.1f}" height="28" fill="{_COLORS[name]}">'
                    f"<title>{label}</title></rect>"
                )
                at += wide
        body.append(f'<text x="{at + 4:.1f}" y="{y + 19}">{sum(parts.values()) / GIB:.1f}</text>')
    edge, end = left + width * found["available"] / most, top + 40 * len(phases)
    body.append(
        f'<line x1="{edge:.1f}" x2="{edge:.1f}" y1="{top - 6}" y2="{end}" stroke="#b00" stroke-dasharray="4 3"/>'
    )
    anchor = f'<text x="{edge:.1f}" y="{end + 14}" text-anchor="end" fill="#b00">'
    body.append(f"{anchor}{found['available'] / GIB:.1f} GiB of {html.escape(found['gpu'])}</text>")
    for index, name in enumerate(names):
        x, y = 12 + 230 * (index % 3), end + 40 + 18 * (index // 3)
        body.append(f'<rect x="{x}" y="{y - 10}" width="12" height="12" fill="{_COLORS[name]}"/>')
        body.append(f'<text x="{x + 18}" y="{y}">{name.replace("_", " ")}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 710 {height}" width="710" height="{height}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
        + "".join(body)
        + "</svg>"
    )  # fmt: skip


def plot(found: dict[str, Any], file: Path) -> None:
    """Raises BadInput of another kind than .svg and .png, or where the second cannot be made or written."""
    if file.suffix not in (".svg", ".png"):
        raise BadInput(f"--plot: {file} must end in .svg or .png")
    try:
        if file.suffix == ".svg":
            file.write_text(chart(found))
            return
        import cairosvg  # type: ignore[import-not-found,import-untyped]

        cairosvg.svg2png(bytestring=chart(found).encode(), write_to=str(file), scale=2)
    except ImportError as error:
        raise BadInput(f"--plot: a .png needs the package cairosvg ({error}); a .svg needs nothing") from None
    except OSError as error:
        raise BadInput(f"--plot: {file} cannot be written: {error}") from None
