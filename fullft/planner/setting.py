"""What a plan is of: the sizes of a model, what a recipe asks for, and the GPUs that share it."""

from __future__ import annotations

from dataclasses import dataclass
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

    @property
    def tokens(self) -> int:
        """Of a micro-batch, on one GPU."""
        return self.micro_batch_size * self.sequence_length // self.sequence_parallel


def setting_of(
    recipe: Recipe, meta: Any, world_size: int, gpus_per_node: int, *, bf16: bool = True, **chosen: Any
) -> Setting:
    """Of a recipe on `world_size` GPUs.

    Args:
        meta: the model on the meta device.
        chosen: fields of `Setting` in place of those of the recipe, as for its `auto`.

    Raises:
        BadInput: the DeepSpeed configuration or the batch cannot be.
    """
    sizes = facts(meta)
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
