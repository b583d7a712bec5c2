"""The DeepSpeed engine: its configuration filled from the recipe, and its start."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from fullft.data.batches import Geometry
from fullft.errors import BadInput
from fullft.recipe import Recipe

_PACKAGE = Path(__file__).parent  # its ds_configs is that of the repository: a link here, files in a wheel


def geometry(recipe: Recipe, world_size: int) -> Geometry:
    """Gradient accumulation from the global batch and the world size.

    Raises:
        BadInput: the ranks make no groups of train.sequence_parallel, or the global batch cannot be shared evenly.
    """
    size, micro, parts = recipe.train.global_batch_size, recipe.train.micro_batch_size, recipe.train.sequence_parallel
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


def read_config(recipe: Recipe) -> dict[str, Any]:
    """The DeepSpeed configuration file, as it stands.

    Raises:
        BadInput: missing, not JSON, or not ZeRO stage 3.
    """
    path = Path(recipe.deepspeed)
    if not path.exists() and not path.is_absolute():
        path = _PACKAGE / path
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise BadInput(
            f"deepspeed: {recipe.deepspeed} does not exist (looked in {Path.cwd()} and {_PACKAGE})"
        ) from None
    except (OSError, json.JSONDecodeError) as error:
        raise BadInput(f"deepspeed: {recipe.deepspeed} is not valid JSON: {error}") from None
    zero = config.get("zero_optimization", {}) if isinstance(config, dict) else None
    if not isinstance(zero, dict):
        raise BadInput(f"deepspeed: {recipe.deepspeed} is not a DeepSpeed configuration (an object of sections)")
    stage = zero.get("stage")
    if stage != 3:
        raise BadInput(f"deepspeed: {recipe.deepspeed} has zero_optimization.stage {stage}; fullft shards with stage 3")
    for ours, theirs in (("train.*", "optimizer"), ("train.schedule", "scheduler")):
        if theirs in config:
            raise BadInput(
                f"deepspeed: {recipe.deepspeed} has a section '{theirs}'; remove it, the recipe's {ours} decides"
            )
    return config


def fill_config(
    config: dict[str, Any], recipe: Recipe, plan: Geometry, hidden_size: int, precision: torch.dtype
) -> dict[str, Any]:
    """The configuration with every `auto` value filled, and with the keys whose defaults would change the numbers."""
    zero = dict(config["zero_optimization"])
    automatic = {
        "reduce_bucket_size": hidden_size * hidden_size,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }  # the rules of transformers' Trainer
    zero |= {key: value for key, value in automatic.items() if zero.get(key) == "auto"}
    bf16 = precision == torch.bfloat16
    if bf16 and plan.accumulation > 1:
        # Unset, micro-batches are summed in bf16, whose 8 bits lose small gradients.
        config = {"data_types": {"grad_accum_dtype": "fp32"}} | config
    return config | {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.accumulation,
        # For DeepSpeed the ranks that share a micro-batch have one each: the gradients of all ranks are averaged, so
        # that the loop's loss × ranks gives their sum, whether they are of other rows or of other parts of a row.
        "train_batch_size": plan.micro_batch_size * plan.accumulation * plan.world_size,
        # Unset, DeepSpeed clips to 1.0.
        "gradient_clipping": recipe.train.max_grad_norm,
        "bf16": {"enabled": bf16},
        # One engine.step() an optimizer step: the loop shows where the update is.
        "managed_gradient_accumulation": False,
        "steps_per_print": 2**31,
    }


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
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


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
