"""What a run will need, from the model's sizes alone: memory of the training state, and bytes on disk."""

from __future__ import annotations

import math
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Layer:
    """Widths of a decoder layer, elements: hidden h, MLP f, queries H·d, keys K·d; and the number H of heads."""

    layers: int
    hidden: int
    mlp: int
    queries: int
    keys: int
    heads: int


def layer_of(config: Any) -> Layer:
    """From a transformers config; what it does not name is guessed as in Llama, an MLP of 4 · hidden."""
    text = config.get_text_config()
    hidden, heads = int(text.hidden_size), int(text.num_attention_heads)
    head = int(getattr(text, "head_dim", None) or hidden // heads)
    keys = int(getattr(text, "num_key_value_heads", None) or heads)
    mlp = int(getattr(text, "intermediate_size", None) or 4 * hidden)
    if experts := getattr(text, "num_experts_per_tok", None):
        mlp = int(experts) * int(getattr(text, "moe_intermediate_size", None) or mlp)
    return Layer(int(text.num_hidden_layers), hidden, mlp, heads * head, keys * head, heads)


def activation_bytes(layer: Layer, mode: str, bf16: bool) -> int:
    """Bytes of activations a token, between forward and backward and in the layer at work, by what is kept
    (`activations`).

    A layer of Llama with attention of flash kind keeps, in bf16, 16h + 8f + 4Hd + 4Kd + 4H + 8 bytes a token, in fp32
    24h + 16f + 8Hd + 8Kd + 4H + 8: counted by saved_tensors_hooks on transformers 5.24 (tests/test_activations.py), not
    the 34h of Korthikanti et al. 2022 ("Reducing Activation Recomputation"), which is GPT's with dropout. Checkpointed,
    it keeps its input, and its whole is there while it is computed again. selective adds the attention's output and
    every second matrix product, those of keys, of attention's output and of the upper half of the gated MLP.
    """
    h, f, q, k = layer.hidden, layer.mlp, layer.queries, layer.keys
    whole = 16 * h + 8 * f + 4 * q + 4 * k if bf16 else 24 * h + 16 * f + 8 * q + 8 * k
    whole += 4 * layer.heads + 8
    size = 2 if bf16 else 4
    match mode:
        case "none":
            return layer.layers * whole
        case "selective":
            return layer.layers * (size * (h + q + k + h + f) + 4 * layer.heads) + whole
        case "full":
            return layer.layers * size * h + whole
        case _:  # offload: the inputs of two layers are under way
            return 2 * size * h + whole


# What else a GPU holds: CUDA and its kernels, NCCL's buffers, DeepSpeed's reduce bucket, gathered and prefetched
# weights; and the share of its memory that an allocator cannot use.
_OTHER_BYTES, _USABLE = 6 * GIB, 0.92


def choose_checkpointing(
    recipe: Recipe, planned: dict[str, Any], layer: Layer, bf16: bool, memory: int | None, able: bool = True
) -> tuple[str, str]:
    """What train.activation_checkpointing comes to, and a line that says why.

    Args:
        planned: of `plan`.
        memory: bytes of the smallest GPU; None where there is none.
        able: whether the architecture can compute layers again.
    """
    tokens = recipe.train.micro_batch_size * recipe.data.sequence_length // recipe.train.sequence_parallel
    if (chosen := recipe.train.activation_checkpointing) != "auto":
        return chosen, f"{chosen}, as the recipe says"
    if memory is None:
        return "none", "none (auto: by the memory of GPUs, of which there are none here)"
    if not able:
        return "none", "none (auto; the architecture has no other)"
    # Logits: as much as head.WORKSPACE_BYTES, and the gradient of the head in fp32.
    taken = planned["device_bytes_per_rank"] + 4 * planned["largest_gathered_parameter_bytes"] + (2 << 30)
    room = _USABLE * memory - taken - _OTHER_BYTES
    modes = ["none", "full", "offload"] if recipe.train.mlp_tiles > 1 else ["none", "selective", "full", "offload"]
    needs = {mode: tokens * activation_bytes(layer, mode, bf16) for mode in modes}
    mode = next((mode for mode, need in needs.items() if need <= room), "offload")
    said = ", ".join(f"{name} {need / GIB:.1f}" for name, need in needs.items())
    short = "; it may run out of memory" if needs[mode] > room else ""
    return mode, f"{mode} (auto: of {max(room, 0) / GIB:.1f} GiB left for activations would take {said}{short})"
