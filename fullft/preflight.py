"""All that can be checked before a process group exists: every problem of a run at once, on a machine without a GPU."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fullft import activations, engine, kernels, model
from fullft.checkpoint import newest
from fullft.cluster import host_memory
from fullft.data.batches import Batches, Geometry
from fullft.data.sources import source_files
from fullft.data.training import build_batches, open_data, unlikely
from fullft.documents import VARLEN
from fullft.errors import BadInput, Problems
from fullft.export import rehearse, require_hub
from fullft.optim import layer_depths
from fullft.planner import choose, hardware
from fullft.planner import memory as planner
from fullft.planner.hardware import Gpu
from fullft.planner.setting import Setting, setting_of
from fullft.recipe import Recipe, Source, differences, identity, load_recipe
from fullft.retention import baseline
from fullft.retention.budget import too_long
from fullft.retention.divergence import Divergence
from fullft.retention.run import max_positions
from fullft.retention.suite import Suite
from fullft.state import REQUEUE, read_json, status
from fullft.tiles import require_tileable
from fullft.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Inputs:
    """What a run trains on, ready: everything here is the same on every rank."""

    tokenizer: PreTrainedTokenizerBase
    facts: model.Facts
    batches: Batches
    suite: Suite
    total_steps: int
    deepspeed_config: dict[str, Any]
    plan: dict[str, Any]
    warnings: list[str]
    meta: PreTrainedModel  # without storage; the export is laid out from it
    divergence: Divergence
    attention: model.Attention


def preflight(
    recipe: Recipe,
    world_size: int,
    on_gpu: bool | None = None,
    ranks_per_node: int | None = None,
    room: bool = True,
    gpu: Gpu | None = None,
) -> Inputs:
    """Check recipe, files, model, data and run folder against each other, and tokenize the data if the cache lacks it.

    room: whether the disk must have room for checkpoints and export; False where none will be written.
    gpu: what the ranks will have; default: what this process has.

    Raises:
        BadInput: with every problem found.
    """
    gpus = torch.cuda.is_available() if on_gpu is None else on_gpu
    here = hardware.here() if gpus and gpu is None else None
    node_gib = host_memory() / planner.GIB if here else None
    gpu = gpu or here
    config, meta, tokenizer, attention, file = _parts(recipe, world_size, ranks_per_node, gpus, gpu, node_gib)
    problems = Problems()
    attempt = problems.attempt
    facts = model.facts(meta)
    precision = model.precision(recipe, on_gpu)
    setting, why = _choose(recipe, meta, config, world_size, ranks_per_node, precision, gpus, gpu, node_gib)
    recipe = recipe.with_micro_batch(setting.micro_batch_size)
    geometry = engine.geometry(recipe, world_size)
    planned = planner.plan(setting) | why | file
    no_memory, little_memory = _memory_problems(recipe, setting, gpu)
    problems += (_disk_problems(recipe, planned) if room else []) + no_memory
    problems += activations.problems(recipe, meta) + kernels.problems(recipe, meta.config)
    lacking = _lacks_of_attention(recipe, gpus) + kernels.lacks(recipe, meta.config, gpus)
    elsewhere = gpus and not torch.cuda.is_available()  # a login node: other packages may be where it is trained
    problems += [] if elsewhere else lacking
    suite = attempt(Suite, recipe, tokenizer)
    if suite is not None:
        problems += _prompt_problems(suite, meta)
        # Another node's own run folder has parts of checkpoints, and no metrics.
        other = recipe.checkpoint.use_node_local_storage and not (recipe.run_folder / "metrics.jsonl").exists()
        if suite.tasks and newest(recipe.run_folder / "checkpoints") is not None and not other:
            problems += baseline.problems(suite)
        never, seldom = baseline.never_breached(suite)
        problems += never
    # What is wrong with evaluation data has been told by the suite.
    told_once = recipe if suite is not None else recipe.without_evaluation()
    opened = attempt(open_data, told_once, tokenizer)
    if problems or suite is None or opened is None:
        raise BadInput(problems)

    sets, told = opened
    batches, total = build_batches(recipe, sets, geometry)
    if recipe.train.kl_weight and recipe.train.kl_reference == "cache":
        planned["base_predictions_bytes"] = (6 * recipe.retention.kl_top_k + 4) * batches.replay_labels(total)
        planned["run_folder_bytes"] += planned["base_predictions_bytes"]
        if room and (no_room := _disk_problems(recipe, planned)):
            raise BadInput(no_room)
    if recipe.train.profile and recipe.train.profile[1] > total:
        raise BadInput(f"train.profile: {list(recipe.train.profile)} ends after the last optimizer step, {total}")
    suite.plan(total)
    filled = engine.fill_config(config, recipe, geometry, facts, precision)
    planned |= {
        "steps": total, "sequences": sum(map(len, sets)), "gradient_accumulation_steps": geometry.accumulation,
        "micro_batch_size": geometry.micro_batch_size,
    }  # fmt: skip
    seen = batches.mixture.seen(total * recipe.train.global_batch_size)
    trained = sum(epochs * one.summary["tokens"] for one, epochs in zip(sets, seen, strict=True))
    divergence = Divergence(recipe, batches, total, suite.tasks, meta, filled, tokenizer)
    sizes = total, facts.parameters, world_size, gpus, divergence.tokens
    refused, slow = too_long(recipe, suite.tasks, trained, *sizes)
    if refused:
        raise BadInput(refused)
    warnings = told + little_memory + (lacking if elsewhere else []) + unlikely(recipe, total, batches) + slow + seldom
    if recipe.retention.gate.action in ("stop", "rollback") and all(one.measures == "skill" for one in suite.tasks):
        warnings.append(f"retention.gate.action is {recipe.retention.gate.action}, and no task measures retention")
    return Inputs(tokenizer, facts, batches, suite, total, filled, planned, warnings, meta, divergence, attention)


def _parts(
    recipe: Recipe, world_size: int, ranks_per_node: int | None, gpus: bool, gpu: Gpu | None, node_gib: float | None
) -> tuple[dict[str, Any], PreTrainedModel, PreTrainedTokenizerBase, model.Attention, dict[str, str]]:
    """DeepSpeed's configuration, model on the meta device, tokenizer, attention; and which `deepspeed` it is, and why.

    Raises:
        BadInput: with every problem of recipe, files and model.
    """
    problems = Problems()
    attempt = problems.attempt
    geometry = attempt(engine.geometry, recipe, world_size)
    attempt(check_run_folder, recipe)
    if recipe.export.push_to_hub:
        attempt(require_hub, recipe.export.push_to_hub)
    for source in _sources(recipe):
        attempt(source_files, source)
    meta = attempt(model.on_meta, recipe.model)
    # A missing folder has been reported once; the tokenizer would report it again.
    tokenizer = attempt(load_tokenizer, recipe.model) if meta is not None else None
    if tokenizer is not None and recipe.model.grows:
        meta = attempt(model.on_meta, recipe.model, tokenizer)
    why = ""
    if recipe.deepspeed == "auto" and geometry is not None and meta is not None:
        recipe, why = choose.file(
            recipe, meta, gpu, world_size, ranks_per_node, node_gib=node_gib,
            bf16=model.precision(recipe, gpus) == torch.bfloat16, kernels=kernels.choose(recipe, meta.config, gpus)[0],
        )  # fmt: skip
    config = attempt(engine.read_config, recipe)
    config = config and attempt(engine.fit_to_nodes, config, recipe, world_size, ranks_per_node, gpus)
    if meta is not None:
        problems += model.weights_of(recipe, meta, config or {"zero_optimization": {}}).problems
    if meta is not None and tokenizer is not None:
        problems += _vocabulary_problems(meta, tokenizer) + length_problems(recipe, meta)
        attempt(rehearse, meta, tokenizer)
    attention = attempt(model.attention_of, recipe.model) if meta is not None else None
    if attention is not None:
        problems += parallel_problems(recipe, attention)
    if meta is not None and recipe.train.mlp_tiles > 1:
        attempt(require_tileable, meta)
        tokens = recipe.train.sequences_at_once * recipe.data.sequence_length // recipe.train.sequence_parallel
        if recipe.train.mlp_tiles > tokens:
            problems.append(f"train.mlp_tiles: {recipe.train.mlp_tiles} parts of the {tokens} tokens of a micro-batch")
    if meta is not None and recipe.train.layerwise_lr_decay < 1:
        attempt(layer_depths, meta)
    problems += _remedy_problems(recipe, config or {})
    if problems or config is None or geometry is None or meta is None or tokenizer is None or attention is None:
        raise BadInput(problems)
    return config, meta, tokenizer, attention, {"deepspeed": recipe.deepspeed, "deepspeed_why": why}


def _choose(
    recipe: Recipe, meta: PreTrainedModel, config: dict[str, Any], world_size: int, ranks_per_node: int | None,
    precision: torch.dtype, gpus: bool, gpu: Gpu | None, node_gib: float | None,
) -> tuple[Setting, dict[str, Any]]:  # fmt: skip
    """What `auto` comes to in train.micro_batch_size, activation_checkpointing and kernels; and that, with reasons, for
    the plan."""
    of_node = min(ranks_per_node or 8, world_size)
    fused, fused_why = kernels.choose(recipe, meta.config, gpus)
    bf16 = precision == torch.bfloat16
    setting = setting_of(recipe, meta, world_size, of_node, bf16=bf16, config=config, kernels=fused, node_gib=node_gib)
    auto = recipe.train.micro_batch_size == "auto"
    setting, why = choose.choose(setting, gpu, auto, meta.supports_gradient_checkpointing)
    return setting, {
        "kernels": fused, "kernels_why": fused_why, "activation_checkpointing": setting.checkpointing,
        "activation_checkpointing_why": why["activation_checkpointing"], "micro_batch_why": why["micro_batch_size"],
        "gpu": gpu and gpu.name, "gpu_bytes": gpu and planner.gpu_memory(setting).peak,
    }  # fmt: skip


def check_run_folder(recipe: Recipe) -> None:
    """A run folder is new, or of the same experiment.

    Raises:
        BadInput: it belongs to another recipe, is no run folder, or may not be resumed.
    """
    folder = recipe.run_folder
    if file := next((parent for parent in folder.parents if parent.exists() and not parent.is_dir()), None):
        raise BadInput(f"run_dir: {folder} cannot be made: {file} is a file")
    if not folder.exists():
        return
    before_training = ("lease", "slurm", REQUEUE, *(("checkpoints",) if newest(folder / "checkpoints") is None else ()))
    if folder.is_dir() and all(path.name in before_training or path.suffix == ".tmp" for path in folder.iterdir()):
        return  # empty, submitted, or a run that was killed before it had written anything
    if not (folder / "recipe.yaml").exists():
        raise BadInput(
            f"run_dir: {folder} exists and is not a run of fullft; choose another run_dir, nothing is overwritten"
        )
    if not (folder / "metrics.jsonl").exists() and newest(folder / "checkpoints") is None:
        return  # it ended before its first step: nothing of it is lost
    if recipe.checkpoint.resume == "never":
        raise BadInput(
            f"run_dir: {folder} holds a run and checkpoint.resume is never; choose another run_dir, or resume=auto"
        )
    try:
        before, now = identity(load_recipe(folder / "recipe.yaml")), identity(recipe)
    except BadInput as error:
        raise BadInput(
            f"run_dir: {folder} holds a recipe that cannot be read ({error}); choose another run_dir, nothing is "
            "overwritten"
        ) from None
    if changed := differences(before, now):
        raise BadInput(
            f"run_dir: {folder} belongs to another recipe ({changed}); choose another run_dir, nothing is overwritten"
        )


def finished(recipe: Recipe) -> bool:
    """Whether this run has ended well before; not if the folder is of another recipe, which `preflight` tells."""
    try:
        check_run_folder(recipe)
    except BadInput:
        return False
    return status(recipe.run_folder) == "done"


def stopped_by_gate(recipe: Recipe) -> str:
    """Why retention.gate has stopped this run, if it has and the gate is still the same; else empty."""
    try:
        check_run_folder(recipe)
    except BadInput:
        return ""
    state = read_json(recipe.run_folder / "state.json")
    return str(state["reason"]) if state.get("gate") == recipe.retention.gate_settings else ""


def _sources(recipe: Recipe) -> list[Source]:
    return [
        *recipe.data.training_sets,
        *recipe.data.validation,
        *(task.data for task in recipe.retention.tasks if task.data),
    ]


def _vocabulary_problems(meta: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    rows = meta.get_input_embeddings().weight.shape[0]
    highest = max(tokenizer.get_vocab().values())
    if highest < rows:
        return []
    return [
        f"model.path: the tokenizer has token ids up to {highest}, the model's embedding only {rows} rows; if these "
        "belong together, model.vocabulary_multiple=1 grows it"
    ]


def _prompt_problems(suite: Suite, meta: PreTrainedModel) -> list[str]:
    longest = max_positions(meta)
    problems = []
    for task in suite.tasks:
        if task.harness is not None:
            from fullft.retention.harness import without_room

            problems += [] if longest is None else without_room(task, longest)
            continue
        if task.kind == "generate":
            what, tokens = "prompt and max_new_tokens", max(len(item.prompt) for item in task.items)
            tokens += task.max_new_tokens
        elif task.kind == "multiple_choice":
            what, tokens = (
                "question with a choice",
                max(len(a) + len(b) - 1 for item in task.items for a, b in item.pairs),
            )
        else:
            continue  # texts are cut into windows
        if longest is not None and tokens > longest:
            problems.append(
                f"task {task.name}: its longest {what} make {tokens} tokens, above the model's "
                f"max_position_embeddings, {longest}"
            )
    return problems


def length_problems(recipe: Recipe, meta: PreTrainedModel) -> list[str]:
    longest = max_positions(meta)
    if longest is None or recipe.data.sequence_length <= longest:
        return []
    return [
        f"data.sequence_length: {recipe.data.sequence_length} is above the model's max_position_embeddings, "
        f"{longest}; lower it, or extend the model's context in its config first"
    ]


def _lacks_of_attention(recipe: Recipe, gpus: bool) -> list[str]:
    asked = recipe.model.attention
    package = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}.get(asked)
    if package is None or (gpus and importlib.util.find_spec(package) is not None):
        return []
    why = f"its package, {package}, is not installed here" if gpus else "there is no GPU"
    return [f"model.attention: {asked}, but {why}; take auto"]


def parallel_problems(recipe: Recipe, attention: model.Attention) -> list[str]:
    ranks, problems, key = recipe.train.sequence_parallel, [], "train.sequence_parallel"
    if ranks == 1:
        return []
    if attention.name != VARLEN:
        problems.append(f"{key}: needs model.attention varlen, this is {attention.name}, {attention.reason}")
    for heads in attention.layers:
        if heads.query % ranks or (heads.key_value % ranks and ranks % heads.key_value):
            problems.append(
                f"{key}: {heads.query} attention heads with {heads.key_value} key-value heads cannot be shared by "
                f"{ranks} ranks; it must divide the heads, and divide or be a multiple of the key-value heads"
            )
    if recipe.data.packing and recipe.data.sequence_length % ranks:
        near = -(-recipe.data.sequence_length // ranks) * ranks
        problems.append(
            f"{key}: data.sequence_length {recipe.data.sequence_length} cannot be cut into {ranks} equal parts; make "
            f"it a multiple, e.g. {near}"
        )
    return problems


def _remedy_problems(recipe: Recipe, config: dict[str, Any]) -> list[str]:
    train, problems = recipe.train, []
    if train.kl_weight and not recipe.data.replay:
        problems.append(
            "train.kl_weight: the divergence is taken on replay rows; give data.replay a set, or leave it out"
        )
    if train.kl_weight and train.kl_reference == "cache" and recipe.checkpoint.use_node_local_storage:
        problems.append(
            "train.kl_weight: all ranks read what the base model predicts from run_dir, which with "
            "checkpoint.use_node_local_storage may not be the same for all; set train.kl_reference: model"
        )
    offload = config.get("zero_optimization", {}).get("offload_optimizer") or {}
    elsewhere = "device nvme" if offload.get("device") == "nvme" else "a ratio" if offload.get("ratio", 1) < 1 else ""
    if (train.l2_pull or train.ema_decay) and elsewhere:
        problems.append(
            f"deepspeed: {recipe.deepspeed} has offload_optimizer with {elsewhere}, with which train.l2_pull and "
            "train.ema_decay do not work; offload to cpu, all of it"
        )
    return problems


def _disk_problems(recipe: Recipe, planned: dict[str, Any]) -> list[str]:
    existing = next(path for path in (recipe.run_folder, *recipe.run_folder.absolute().parents) if Path(path).exists())
    free = shutil.disk_usage(existing).free
    held = 0
    for file in recipe.run_folder.rglob("*"):
        with contextlib.suppress(OSError):  # renamed meanwhile by another job, which is told later
            held += file.stat().st_size if file.is_file() else 0
    if (need := planned["run_folder_bytes"] - held) <= free:
        return []
    return [
        f"run_dir: {recipe.run_dir} needs {need / planner.GIB:.1f} GiB for checkpoints and export, "
        f"{free / planner.GIB:.1f} GiB are free; free some, or lower checkpoint.keep"
    ]


def _memory_problems(recipe: Recipe, setting: Setting, gpu: Gpu | None) -> tuple[list[str], list[str]]:
    """(why the run does not fit the GPU by the plan, the same where that is only told: train.on_no_memory, or it hangs
    on what the allocator cannot use, which is an estimate)"""
    if gpu is None or (needed := planner.gpu_memory(setting)).peak <= gpu.memory_gib * planner.GIB:
        return [], []
    found = choose.changes(setting, gpu)
    advice = "; ".join(one["change"] for one in found) or "more GPUs or a smaller model; nothing tried is enough"
    said = (
        f"train: by the plan it takes {needed.peak / planner.GIB:.1f} GiB of a GPU, most of it in {needed.worst}; "
        f"{gpu.name} has {gpu.memory_gib:.1f}. What would fit, the fastest first: {advice}"
    )
    sure = needed.peak - needed.outside[planner.SLACK] > gpu.memory_gib * planner.GIB
    if sure and recipe.train.on_no_memory == "error":
        return [f"{said}. (train.on_no_memory=warn starts it all the same)"], []
    return [], [said]


@dataclass(frozen=True)
class Measured:
    """What an evaluation outside of a training needs, the same on every rank."""

    tokenizer: PreTrainedTokenizerBase
    suite: Suite
    deepspeed_config: dict[str, Any]
    meta: PreTrainedModel
    why_not_by_shards: str  # why transformers has to load the weights; empty if it has not


def preflight_evaluation(recipe: Recipe, world_size: int) -> Measured:
    """Check a recipe's model and tasks for an evaluation without training.

    Raises:
        BadInput: with every problem found.
    """
    problems = Problems()
    attempt = problems.attempt
    config = attempt(engine.read_config, recipe)
    tokenizer = attempt(load_tokenizer, recipe.model)
    meta = attempt(model.on_meta, recipe.model, tokenizer) if tokenizer is not None else None
    if meta is not None and tokenizer is not None:
        problems += _vocabulary_problems(meta, tokenizer) + length_problems(recipe, meta)
    if problems or config is None or meta is None or tokenizer is None:
        raise BadInput(problems)
    config = engine.for_evaluation(config)
    weights = model.weights_of(recipe, meta, config)
    problems += weights.problems
    attempt(model.attention_of, recipe.model)
    suite = attempt(Suite, recipe, tokenizer)
    if suite is not None:
        problems += _prompt_problems(suite, meta)
        if not suite.tasks:
            problems.append("retention.tasks: is empty, and there is no data.validation: nothing to measure")
    if problems or suite is None:
        raise BadInput(problems)
    geometry = Geometry(world_size, 1, 1, world_size, recipe.train.seed)
    filled = engine.fill_config(config, recipe, geometry, model.facts(meta), model.precision(recipe))
    return Measured(tokenizer, suite, filled, meta, weights.reason)
