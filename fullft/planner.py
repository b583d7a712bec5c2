"""What a run will need, from the model's sizes alone: memory of the training state, and bytes on disk."""

from __future__ import annotations

import math
from typing import Any

from fullft.model import Facts
from fullft.recipe import Recipe

GIB = 2**30


def plan(
    recipe: Recipe,
    facts: Facts,
    world_size: int,
    bf16: bool,
    offload: bool,
    accumulation: int,
    node_partition: int = 1,
) -> dict[str, Any]:
    """Bytes of one rank's training state (ZeRO: Rajbhandari et al. 2020, mixed-precision AdamW) and of the run folder.

    bf16: 2 weights + 2 gradients + 4 master weights + 8 AdamW moments = 16 bytes a parameter, divided by the ranks;
    18 with gradient accumulation, which is done in fp32. fp32: 4 + 4 + 4 (DeepSpeed keeps a second copy) + 8 = 20.
    The base weights of train.l2_pull are 2 (4) more, the average of train.ema_decay is 4, a reference
    model of train.kl_weight 2 (4), and the second copy of hpZ 2 (4), divided by the ranks of `node_partition` alone.
    Activations and buffers come on top.
    """
    shard = math.ceil(facts.parameters / world_size)
    low = 2 if bf16 else 4
    gradients = 4 if accumulation > 1 else low
    state = {"weights": low, "gradients": gradients, "master_weights": 4, "adamw_moments": 8}
    train = recipe.train
    if train.l2_pull:
        state["base_weights"] = low  # those of a base in fp32 may be exact in 2
    if train.ema_decay:
        state["averaged_weights"] = 4
    if train.kl_weight and train.kl_reference == "model":
        state["reference_model"] = low
    state = {name: size * shard for name, size in state.items()}
    if node_partition > 1:
        state["second_copy_of_weights"] = low * math.ceil(facts.parameters / node_partition)
    on_host: tuple[str, ...] = ("master_weights", "adamw_moments", "averaged_weights") if offload else ()
    on_host += ("base_weights",) if offload or train.l2_pull_offload else ()
    on_host += ("reference_model",) if train.kl_reference_offload else ()
    checkpoint = (16 if train.ema_decay else 12) * facts.parameters
    # The best is another one than the newest only if there are evaluations between.
    retention = recipe.retention
    evaluates_between = retention.every_steps is not None or retention.max_overhead is not None
    kept = recipe.checkpoint.keep + (recipe.checkpoint.keep_best and evaluates_between)
    kept += retention.goes_back  # that of before a loss
    export_dtype = recipe.export.dtype if recipe.export.dtype != "auto" else ("bf16" if bf16 else "fp32")
    exported = {"bf16": 2, "fp16": 2, "fp32": 4}[export_dtype] * facts.parameters
    return {
        "parameters": facts.parameters,
        "world_size": world_size,
        "state_bytes_per_rank": state,
        "device_bytes_per_rank": sum(size for name, size in state.items() if name not in on_host),
        "host_bytes_per_rank": sum(size for name, size in state.items() if name in on_host),
        "largest_gathered_parameter_bytes": low * facts.largest_parameter,
        "checkpoint_bytes": checkpoint,
        "export_dtype": export_dtype,
        # One more than is kept exists while a checkpoint is written.
        "run_folder_bytes": (kept + 1) * checkpoint + exported,
    }
