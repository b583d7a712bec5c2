"""The DeepSpeed engine: its configuration filled from the recipe, and its start."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from fullft.data.batches import Geometry
from fullft.deepspeed_keys import key_problems
from fullft.errors import BadInput
from fullft.model import Facts
from fullft.recipe import Recipe

_PACKAGE = Path(__file__).parent  # its ds_configs is that of the repository: a link here, files in a wheel


def geometry(recipe: Recipe, world_size: int, micro_batch_size: int | None = None) -> Geometry:
    """Gradient accumulation from the global batch and the world size.

    micro_batch_size: in place of the recipe's, where that is `auto`; until it is chosen, 1.

    Raises:
        BadInput: the ranks make no groups of train.sequence_parallel, or the global batch cannot be shared evenly.
    """
    size, parts = recipe.train.global_batch_size, recipe.train.sequence_parallel
    micro = micro_batch_size or recipe.train.sequences_at_once
    if world_size % parts:
        raise BadInput(
            f"train.sequence_parallel: {world_size} ranks make no groups of {parts}; it must divide their number"
        )
    ranks, groups = f"{world_size} ranks", world_size // parts
    if parts > 1:
        ranks = f"{groups} groups of {parts} ranks (train.sequence_parallel)"
    accumulation, rest = divmod(size, micro * groups)
    if rest or not accumulation:
        below, above = accumulation * micro * groups, (accumulation + 1) * micro * groups
        choices = " or ".join(str(choice) for choice in (below, above) if choice)
        raise BadInput(
            f"train.global_batch_size: {size} sequences cannot be shared by {ranks} × "
            f"train.micro_batch_size {micro}: must be a multiple of {micro * groups}, e.g. {choices}"
        )
    return Geometry(size, micro, accumulation, world_size, recipe.train.seed, parts)


_DECIDED_BY_RECIPE = {
    "optimizer": "train.*", "scheduler": "train.schedule", "sequence_parallel_size": "train.sequence_parallel",
    "train_batch_size": "train.global_batch_size", "gradient_accumulation_steps": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size", "gradient_clipping": "train.max_grad_norm",
}  # fmt: skip
_WITHOUT_MASTER_WEIGHTS = ("bf16_master_weights_and_grads", "bf16_optimizer_states")


# What `deepspeed: auto` is chosen from, by the planner: they differ in speed and memory, not in the numbers.
FILES = ("ds_configs/zero3.json", "ds_configs/zero3_hpz.json", "ds_configs/zero3_offload.json")


def read_config(recipe: Recipe) -> dict[str, Any]:
    """The DeepSpeed configuration file, as it stands; of `auto` that has not been chosen yet, the first.

    Raises:
        BadInput: missing, not JSON, not ZeRO stage 3, with keys that DeepSpeed does not know or the recipe decides, or
            without fp32 master weights.
    """
    path = Path(FILES[0] if recipe.deepspeed == "auto" else recipe.deepspeed)
    if not path.exists() and not path.is_absolute():
        path = _PACKAGE / path
    try:
        config: dict[str, Any] = json.loads(path.read_text(), object_pairs_hook=_each_key_once)
    except FileNotFoundError:
        raise BadInput(
            f"deepspeed: {recipe.deepspeed} does not exist (looked in {Path.cwd()} and {_PACKAGE})"
        ) from None
    except (OSError, ValueError) as error:
        raise BadInput(f"deepspeed: {recipe.deepspeed} is not valid JSON: {error}") from None
    zero = config.get("zero_optimization", {}) if isinstance(config, dict) else None
    if not isinstance(zero, dict):
        raise BadInput(f"deepspeed: {recipe.deepspeed} is not a DeepSpeed configuration (an object of sections)")
    stage = zero.get("stage")
    if stage != 3:
        raise BadInput(f"deepspeed: {recipe.deepspeed} has zero_optimization.stage {stage}; fullft shards with stage 3")
    problems = [
        f"has '{theirs}'; remove it, the recipe's {ours} decides"
        for theirs, ours in _DECIDED_BY_RECIPE.items()
        if config.get(theirs, "auto") != "auto"
    ]
    problems += [
        f"turns on '{section}'; remove it, the recipe's train.precision decides"
        for section in ("fp16", "torch_autocast")
        if _is_on(config, section, "enabled")
    ]
    if lossy := [key for key in _WITHOUT_MASTER_WEIGHTS if _is_on(config, "bf16", key)]:
        problems.append(
            f"has {' and '.join(f'bf16.{key}' for key in lossy)}: without fp32 master weights, updates below 1/512 "
            "of a weight are rounded away, and with the learning rates of fine-tuning these are most; remove it, and "
            "offload with ds_configs/zero3_offload.json if memory is short"
        )
    if not problems:
        problems = key_problems(config)
    if problems:
        raise BadInput([f"deepspeed: {recipe.deepspeed} {problem}" for problem in problems])
    return config


def _is_on(config: dict[str, Any], section: str, key: str) -> bool:
    """As DeepSpeed reads it: 1 and "true" are true."""
    value = config[section].get(key) if isinstance(config.get(section), dict) else None
    return str(value).lower() not in ("none", "auto", "false", "0", "off", "no", "n", "f")


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON keeps the last of two equal keys without a word."""
    if twice := [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]:
        raise ValueError(f"key '{twice[0]}' is given twice")
    return dict(pairs)


def fill_config(
    config: dict[str, Any], recipe: Recipe, plan: Geometry, facts: Facts, precision: torch.dtype
) -> dict[str, Any]:
    """The configuration with every `auto` value filled, and with the keys whose defaults would change the numbers."""
    zero = dict(config["zero_optimization"])
    automatic = sizes_for(facts, plan.world_size)
    zero |= {key: value for key, value in automatic.items() if zero.get(key) == "auto"}
    bf16 = precision == torch.bfloat16
    if bf16 and plan.accumulation > 1:
        # Unset, micro-batches are summed in bf16, whose 8 bits lose small gradients.
        config = config | {"data_types": {"grad_accum_dtype": "fp32"} | (config.get("data_types") or {})}
    return config | {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.accumulation,
        # For DeepSpeed the ranks that share a micro-batch have one each: the gradients of all ranks are averaged, so
        # that the loop's loss × ranks gives their sum, whether they are of other rows or of other parts of a row.
        "train_batch_size": plan.micro_batch_size * plan.accumulation * plan.world_size,
        # Unset, DeepSpeed clips to 1.0.
        "gradient_clipping": recipe.train.max_grad_norm,
        "bf16": (config.get("bf16") or {}) | {"enabled": bf16},
        # One engine.step() an optimizer step: the loop shows where the update is.
        "managed_gradient_accumulation": False,
        "steps_per_print": 2**31,
    }


# Elements. In bf16 a budget is 2 GB, a bucket at least 0.2 GB and at most 1 GB, and a rank's part of it 1 MB.
_LIVE_BUDGET, _LEAST_BUCKET, _LARGEST_BUCKET, _BUCKET_OF_RANK = 10**9, 10**8, 5 * 10**8, 5 * 10**5


def sizes_for(facts: Facts, world_size: int) -> dict[str, int]:
    """ZeRO-3's sizes, in elements, from those of the model. ds_configs/README.md has the arithmetic.

    - prefetch: one decoder layer, so that the next is gathered while this one computes, 2 bytes · layer in bf16 and as
      much again while it is copied out of the buffer; at most the budget.
    - max_live, which limits prefetching and nothing else: two layers, the one that computes and the next, and
      embedding and head, which are gathered at the ends of forward; at least the budget.
    - reuse distance: two layers, so that what checkpointing recomputes stays gathered for its own backward; at least
      the budget, by which a model below half of it is gathered once a micro-batch instead of twice.
    - persistence: norms and biases stay whole on every rank, matrices never do.
    - reduce bucket: half a layer, at least 1e8, so that two reductions overlap the layer's backward; and such that each
      of W ranks receives 1 MB of it, below which latency decides and not bandwidth. At most 5e8, and at most the
      model: DeepSpeed allocates it at once.
    - sub-group: of a rank's parameters that the optimizer updates at a time, 6 bytes of temporaries for each.
    """
    layer = facts.largest_layer
    bucket = max(layer // 2, _LEAST_BUCKET, world_size * _BUCKET_OF_RANK)
    return {
        "stage3_prefetch_bucket_size": min(layer, _LIVE_BUDGET),
        "stage3_max_live_parameters": max(2 * layer + facts.vocabulary_parameters, _LIVE_BUDGET),
        "stage3_max_reuse_distance": max(2 * layer, _LIVE_BUDGET),
        "stage3_param_persistence_threshold": min(facts.largest_vector, facts.smallest_matrix - 1),
        "reduce_bucket_size": min(bucket, _LARGEST_BUCKET, facts.parameters),
        "sub_group_size": 10**8,
    }


def fit_to_nodes(
    config: dict[str, Any], recipe: Recipe, world_size: int, ranks_per_node: int | None, on_gpu: bool
) -> dict[str, Any]:
    """The configuration with hpZ's `auto` filled: the ranks of a node, over which a second copy of the weights is kept
    for backward. 1, which is without, where that is no use: on one node, or with one rank a node; and where the ranks
    of a node are not known, as where a run is only checked.

    Raises:
        BadInput: something of ZeRO++ in it cannot be run.
    """
    zero, problems = dict(config["zero_optimization"]), []
    if zero.get("zero_hpz_partition_size") == "auto":
        zero["zero_hpz_partition_size"] = ranks_of_hpz(ranks_per_node or 1, world_size)
    size = zero.get("zero_hpz_partition_size", 1)
    if type(size) is not int or size < 1 or world_size % size:
        problems.append(
            f"deepspeed: {recipe.deepspeed} has zero_hpz_partition_size {size!r}, which must be a number of ranks that "
            f"divides the {world_size} of this run: those of a node (auto), and the same on every node"
        )
    quantized = [key for key in ("zero_quantized_weights", "zero_quantized_gradients") if zero.get(key)]
    if quantized and not on_gpu:
        problems.append(
            f"deepspeed: {recipe.deepspeed} has {' and '.join(quantized)}, whose kernels are for GPUs only; use "
            "ds_configs/zero3.json here"
        )
    if problems:
        raise BadInput(problems)
    return config | {"zero_optimization": zero}


def ranks_of_hpz(ranks_per_node: int, world_size: int) -> int:
    """What hpZ's `auto` comes to; 1, which is without, on one node."""
    return ranks_per_node if ranks_per_node < world_size else 1


def require_same_groups(told: list[tuple[str, int]], recipe: Recipe) -> None:
    """Raises BadInput if hpZ's groups are not the same on all nodes: (host, ranks of a group) of each rank."""
    sizes, ranks = {size for _, size in told}, Counter(host for host, _ in told)
    if sizes == {1} or (len(sizes) == 1 and not any(count % max(sizes) for count in ranks.values())):
        return
    of = ", ".join(f"{count} on {host}" for host, count in sorted(ranks.items())[:8])
    raise BadInput(
        f"deepspeed: {recipe.deepspeed} has zero_hpz_partition_size {' and '.join(map(str, sorted(sizes)))}, and the "
        f"ranks are {of}: every node must have the same number, a multiple of it"
    )


def require_same_choice(told: list[tuple[str, int, str, str]]) -> None:
    """Raises BadInput if `auto` has come to different ones: (host, train.micro_batch_size, activation_checkpointing,
    deepspeed) of each rank."""
    if len({choice[1:] for choice in told}) == 1:
        return
    of = ", ".join(f"{', '.join(map(str, choice))} on {host}" for host, *choice in sorted(set(told))[:8])
    raise BadInput(
        f"train.micro_batch_size, train.activation_checkpointing and deepspeed: auto comes to {of}, as their nodes "
        "differ; give the recipe what the one with the least memory comes to"
    )


def for_evaluation(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration file's content without what is of use in training only, or keeps shards from being read."""
    training = ("offload_optimizer", "zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_gradients")
    zero = {key: value for key, value in config["zero_optimization"].items() if key not in training}
    return config | {"zero_optimization": zero}


def with_parameters_on_host(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with the parameters' shards in host memory, from where each layer comes when it is run."""
    offload = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return config | {"zero_optimization": config["zero_optimization"] | {"offload_param": offload}}


def start(model: Any, optimizer: torch.optim.Optimizer | None, config: dict[str, Any]) -> Any:
    """The engine around the model; afterwards parameters, gradients and optimizer state are sharded over the ranks.

    Without an optimizer it is for evaluation (`for_evaluation`): it holds the parameters alone.
    """
    import deepspeed

    _import_muon()
    for module in _expert_blocks(model):
        deepspeed.utils.set_z3_leaf_module(module, True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def _expert_blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules that send each token to some of a list of experts: told by a child with a row for each of them.

    Experts in one tensor are gathered together anyway. Modules of a list would be gathered one by one, as tokens ask
    for them, and differently on each rank, whose collectives then do not match: the run aborts, or hangs.
    """
    return [
        module
        for module in model.modules()
        for experts in module.children()
        if isinstance(experts, torch.nn.ModuleList) and len(experts) > 1
        for router in module.children()
        for weight in router.parameters(recurse=False)
        if len(shape := getattr(weight, "ds_shape", weight.shape)) == 2 and shape[0] == len(experts)
    ]


def _import_muon() -> None:
    """DeepSpeed's engine imports its optimizer Muon, which nobody can ask for here, and that asks torch for a compiler
    when imported: 600 modules, 2 s of each rank's start. Without one it is imported at once."""
    asked = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        with contextlib.suppress(ImportError):  # it has moved
            import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        if asked is None:
            del os.environ["TORCHDYNAMO_DISABLE"]
        else:
            os.environ["TORCHDYNAMO_DISABLE"] = asked


def offloads_optimizer(config: dict[str, Any]) -> bool:
    section = config["zero_optimization"].get("offload_optimizer") or {}
    return str(section.get("device", "none")) != "none"
