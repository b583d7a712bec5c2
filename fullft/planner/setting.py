"""What a plan is of: the sizes of a model, what a recipe asks for, and the GPUs that share it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fullft import engine
from fullft.flops import Flops, UnknownArchitectureError, flops_of
from fullft.model import Facts, facts
from fullft.planner.memory import Layer, layer_of
from fullft.recipe import Recipe


@dataclass(frozen=True)
class Setting:
    """Everything that memory and time of a step depend on; `dataclasses.replace` makes another one of it."""

    recipe: Recipe  # remedies, checkpoints, export; what stands below may be another than in the recipe
    facts: Facts
    layer: Layer
    flops: Flops | None  # None: of an architecture whose operations cannot be told
    world_size: int
    gpus_per_node: int
    sequence_length: int
    micro_batch_size: int
    accumulation: int
    sequence_parallel: int
    bf16: bool
    checkpointing: str  # none, selective, full, offload
    mlp_tiles: int
    attention: str
    kernels: str
    zero: dict[str, Any]  # zero_optimization of the DeepSpeed configuration, with every `auto` filled
    node_gib: float | None = None  # memory of a node; None: not known

    @property
    def tokens(self) -> int:
        """Of a micro-batch, on one GPU."""
        return self.micro_batch_size * self.sequence_length // self.sequence_parallel


def on_gpus(setting: Setting, world_size: int) -> Setting:
    """The same on another number of GPUs; what DeepSpeed's sizes and hpZ's ranks have been by `auto` follows it. The
    batch does not."""
    before, now = (
        engine.sizes_for(setting.facts, size)
        | {"zero_hpz_partition_size": engine.ranks_of_hpz(setting.gpus_per_node, size)}
        for size in (setting.world_size, world_size)
    )
    sizes = {key: now[key] for key, value in before.items() if setting.zero.get(key) == value}
    return replace(setting, world_size=world_size, zero=setting.zero | sizes)


def setting_of(
    recipe: Recipe,
    meta: Any,
    world_size: int,
    gpus_per_node: int,
    *,
    bf16: bool = True,
    config: dict[str, Any] | None = None,
    **chosen: Any,
) -> Setting:
    """Of a recipe on `world_size` GPUs.

    Args:
        meta: the model on the meta device.
        config: the DeepSpeed configuration as of `engine.fit_to_nodes`; default: that of the recipe, on GPUs.
        chosen: fields of `Setting` in place of those of the recipe, as for its `auto`.

    Raises:
        BadInput: the DeepSpeed configuration or the batch cannot be.
    """
    sizes = facts(meta)
    if config is None:
        config = engine.fit_to_nodes(engine.read_config(recipe), recipe, world_size, gpus_per_node, on_gpu=True)
    plan = engine.geometry(recipe, world_size)
    zero = dict(config["zero_optimization"])
    zero |= {key: value for key, value in engine.sizes_for(sizes, world_size).items() if zero.get(key) == "auto"}
    try:
        flops = flops_of(meta)
    except UnknownArchitectureError:
        flops = None
    train = recipe.train
    fields = {
        "sequence_length": recipe.data.sequence_length, "micro_batch_size": plan.micro_batch_size,
        "accumulation": plan.accumulation, "sequence_parallel": train.sequence_parallel, "bf16": bf16,
        "checkpointing": train.activation_checkpointing, "mlp_tiles": train.mlp_tiles,
        "attention": recipe.model.attention, "kernels": train.kernels, "zero": zero,
    }  # fmt: skip
    return Setting(recipe, sizes, layer_of(meta.config), flops, world_size, gpus_per_node, **(fields | chosen))
