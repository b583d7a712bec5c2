"""Memory of a GPU by component and phase, of a node, and bytes on disk: from a `Setting`, without a GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fullft.head import _BYTES_OF_LOGIT, _BYTES_WITH_DIVERGENCE, WORKSPACE_BYTES
from fullft.model import Facts
from fullft.recipe import Recipe

if TYPE_CHECKING:
    from fullft.planner.setting import Setting

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
    return {
        "parameters": facts.parameters,
        "world_size": world_size,
        "state_bytes_per_rank": state,
        "device_bytes_per_rank": sum(size for name, size in state.items() if name not in on_host),
        "host_bytes_per_rank": sum(size for name, size in state.items() if name in on_host),
        "largest_gathered_parameter_bytes": low * facts.largest_parameter,
    } | _disk(recipe, facts.parameters, bf16)


def _disk(recipe: Recipe, parameters: int, bf16: bool) -> dict[str, Any]:
    checkpoint = (16 if recipe.train.ema_decay else 12) * parameters
    # The best is another one than the newest only if there are evaluations between.
    retention = recipe.retention
    evaluates_between = retention.every_steps is not None or retention.max_overhead is not None
    kept = recipe.checkpoint.keep + (recipe.checkpoint.keep_best and evaluates_between)
    kept += retention.goes_back  # that of before a loss
    export_dtype = recipe.export.dtype if recipe.export.dtype != "auto" else ("bf16" if bf16 else "fp32")
    exported = {"bf16": 2, "fp16": 2, "fp32": 4}[export_dtype] * parameters
    # One more than is kept exists while a checkpoint is written.
    folder = (kept + 1) * checkpoint + exported
    return {"checkpoint_bytes": checkpoint, "export_dtype": export_dtype, "run_folder_bytes": folder}


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


@dataclass(frozen=True)
class Memory:
    """Of one GPU, bytes: what each component takes at its most, and what is there together in each phase of a run
    (loading, forward, backward, update), as torch's allocator counts it; CONTEXT, NCCL and SLACK are outside of it."""

    components: dict[str, int]
    phases: dict[str, int]

    @property
    def held_by_torch(self) -> int:
        """What torch.cuda.max_memory_allocated would show after two steps."""
        return max(self.phases.values())

    @property
    def peak(self) -> int:
        """What the GPU must have."""
        return self.held_by_torch + sum(self.components[one] for one in (SLACK, CONTEXT, NCCL))


SLACK, CONTEXT, NCCL = "allocator_slack", "context", "nccl"


def gpu_memory(setting: Setting, device: str = "cuda", ahead: bool = True) -> Memory:
    """Memory of rank 0's GPU.

    Together are, beside the states (weights, gradients, master weights, moments, remedies, reduce bucket):
        loading   the weights, and of the fp32 copies of a sub-group that being cut; last, the largest parameter whole
        forward   gathered weights, what layers keep, and at the end the loss, which makes the gradients of the head
        backward  gathered weights, what layers keep, and the most of: the head's gradient and its copy in the
                  reduction; the last layer computed again, its gradients and a bucket's copy; the embedding's gradient
        update    temporaries of a sub-group, once for all

    Args:
        device: cuda, or cpu as a rehearsal has it, which computes in other blocks.
        ahead: from the second step on, when weights are gathered ahead.
    """
    states = gpu_states(setting)
    live, copied = gathered(setting, ahead)
    kept, work = kept_activations(setting), layer_at_work(setting)
    loss, head = loss_workspace(setting, device), head_gradient(setting)
    large, usual = gradients_in_flight(setting)
    attention = attention_workspace(setting, device)
    update = update_temporaries(setting, device)
    settled = sum(states.values())
    tied = head if is_tied(setting) else 0  # autograd holds it till the embedding's is there
    started = settled - states["adamw_moments"] - states["averaged_weights"]
    largest = low(setting) * setting.facts.largest_parameter
    phases = {
        "loading": started + max(2 * 4 * min(sub_group(setting), shard(setting)) - states["reduce_bucket"], largest),
        "forward": settled + live + kept + max(loss, copied + forward_workspace(setting)),
        "backward": settled + live + kept + max(head + large, tied + copied + work + attention + usual, tied + large),
        "update": settled + update,
    }
    components = states | {
        "gathered_and_prefetched": live + copied, "gradients_in_flight": max(large, usual) + tied, "activations": kept,
        "layer_at_work": work, "attention_workspace": attention, "loss_workspace": loss, "update_temporaries": update,
    }  # fmt: skip
    most = max(phases.values())
    on_gpu = device == "cuda"
    components |= {
        SLACK: int(_SLACK * most) if on_gpu else 0, CONTEXT: _CONTEXT if on_gpu else 0,
        NCCL: nccl_buffers(setting) if on_gpu else 0,
    }  # fmt: skip
    return Memory(components, phases)


def low(setting: Setting) -> int:
    """Bytes of an element of weights, activations and what is communicated."""
    return 2 if setting.bf16 else 4


def shard(setting: Setting, ranks: int | None = None) -> int:
    """Elements of a rank's shards of all parameters: Σ ceil(n / W), since ZeRO-3 cuts each by itself and pads it."""
    ranks, facts = ranks or setting.world_size, setting.facts
    return sum(-(-size // ranks) for size in facts.sizes) if facts.sizes else -(-facts.parameters // ranks)


def is_tied(setting: Setting) -> bool:
    facts = setting.facts
    return facts.vocabulary_parameters < 2 * facts.vocabulary_size * facts.hidden_size


def offload(setting: Setting, what: str) -> str:
    """Where `optimizer` or `param` are kept: none (on the GPU), cpu or nvme."""
    return str((setting.zero.get(f"offload_{what}") or {}).get("device", "none"))


def offloads(setting: Setting, what: str) -> bool:
    return offload(setting, what) != "none"


def gpu_states(setting: Setting) -> dict[str, int]:
    """Bytes that stay on the GPU between steps, s elements a shard (ZeRO: Rajbhandari et al. 2020).

    weights           2 s (fp32: 4), and the parameters up to stage3_param_persistence_threshold whole
    gradients         2 s; 4 where micro-batches are added up, which is done in fp32, and in fp32
    master weights    4 s, in fp32 a second copy;   AdamW moments  8 s
    base weights      2 s (4) of train.l2_pull;     averaged weights  4 s of train.ema_decay
    reference model   2 s (4) of train.kl_reference
    second copy       2 Σ ceil(n / g) of hpZ over the g ranks of zero_hpz_partition_size
    reduce bucket     2 (4) · reduce_bucket_size, which DeepSpeed allocates at its start

    offload_optimizer has gradients, master weights, moments, average and base in host memory, offload_param weights.
    """
    size, part, train, zero = low(setting), shard(setting), setting.recipe.train, setting.zero
    limit = zero.get("stage3_param_persistence_threshold", 10**5)
    whole = size * sum(one for one in setting.facts.sizes if one <= limit)
    optimizer_here, weights_here = not offloads(setting, "optimizer"), not offloads(setting, "param")
    group = zero.get("zero_hpz_partition_size", 1)
    reference = train.kl_weight > 0 and train.kl_reference == "model" and not train.kl_reference_offload
    of_optimizer = {
        "gradients": 4 if setting.accumulation > 1 else size, "master_weights": 4, "adamw_moments": 8,
        "base_weights": size if train.l2_pull and not train.l2_pull_offload else 0,
        "averaged_weights": 4 if train.ema_decay else 0,
    }  # fmt: skip
    return {
        "weights": whole + (size * part if weights_here else 0),
        **{name: each * part if optimizer_here else 0 for name, each in of_optimizer.items()},
        "reference_model": size * part if reference else 0,
        "second_copy_of_weights": size * shard(setting, group) if group > 1 else 0,
        "reduce_bucket": size * zero.get("reduce_bucket_size", 5 * 10**8),
    }


def gathered(setting: Setting, ahead: bool = True) -> tuple[int, int]:
    """Bytes of whole weights that are there at once: (2 · live, 2 · copied), in fp32 4.

    DeepSpeed gathers ahead, at every module as many elements as stage3_prefetch_bucket_size, until
    stage3_max_live_parameters are there, and takes whole parameters, so it overshoots by one: live = max_live + the
    largest. Several gathered in one go lie in a buffer until they are copied out: copied = the bucket and one
    parameter. Both at most the model. (partitioned_param_coordinator.fetch_sub_module, DeepSpeed 0.19.8.)
    """
    zero, facts = setting.zero, setting.facts
    bucket = zero.get("stage3_prefetch_bucket_size", 5 * 10**7) if ahead else 0
    if not bucket:
        return low(setting) * facts.largest_parameter, 0
    live = min(facts.parameters, zero.get("stage3_max_live_parameters", 10**9) + facts.largest_parameter)
    copied = min(facts.parameters, bucket + facts.largest_parameter)
    return low(setting) * live, low(setting) * copied


def kept_activations(setting: Setting) -> int:
    """Bytes kept from forward to backward by all layers: `activation_bytes` without the layer at work, for each token
    of the micro-batch, of which a rank has 1 / sequence_parallel; and the hidden states around the layers, 4 h
    (embedding and last norm)."""
    layer = _tiled(setting)
    per_token = activation_bytes(layer, setting.checkpointing, setting.bf16)
    if setting.checkpointing != "none":
        per_token -= activation_bytes(replace(layer, layers=1), "none", setting.bf16)
    return setting.tokens * (per_token + 2 * low(setting) * layer.hidden)


def _tiled(setting: Setting) -> Layer:
    """The layer, of whose MLP only a part is there at a time with mlp_tiles."""
    return replace(setting.layer, mlp=-(-setting.layer.mlp // setting.mlp_tiles))


def layer_at_work(setting: Setting) -> int:
    """Bytes of the layer in backward: what it keeps while it is computed again (nothing more without checkpointing),
    and the gradients of its widest part, 2 · (3 f + 2 h) a token: of product, gate and up, of input and output."""
    layer, size = _tiled(setting), low(setting)
    whole = 0 if setting.checkpointing == "none" else activation_bytes(replace(layer, layers=1), "none", setting.bf16)
    return setting.tokens * (whole + size * (3 * layer.mlp + 2 * layer.hidden))


def attention_workspace(setting: Setting, device: str = "cuda") -> int:
    """Bytes of attention in backward beyond what it keeps.

    FlashAttention-2 (Dao 2023; mha_varlen_bwd) sums the gradient of queries in fp32, 4 Hd a token, and where heads
    share keys has those of keys and values for every head, 2 · 2 Hd; with sequence_parallel a rank has all tokens of
    1 / N of the heads, and the exchange of queries, keys, values and output has a copy of each. It comes after the
    MLP's backward, whose activations are free by then.
    """
    layer, size = setting.layer, low(setting)
    each = (4 + 2 * size * (layer.keys < layer.queries)) * layer.queries if device == "cuda" else 0
    if setting.sequence_parallel > 1:
        each += size * 2 * (layer.queries + layer.keys)
    free = size * 3 * layer.mlp + size * 4 * layer.mlp // setting.mlp_tiles
    return setting.tokens * max(0, each - free)


def loss_workspace(setting: Setting, device: str = "cuda") -> int:
    """Bytes of the loss in the head's forward (`head`): logits of some positions at a time with what their gradient
    needs, 14 bytes an element (with a divergence 32), at most WORKSPACE_BYTES; the head's gradient, summed in fp32
    over several such chunks and rounded once at the end; hidden states of the labels and their gradient, 2 · 2 h."""
    facts, size = setting.facts, low(setting)
    each = _BYTES_WITH_DIVERGENCE if setting.recipe.train.kl_weight else _BYTES_OF_LOGIT
    row = each * facts.vocabulary_size
    at_once = max(1, WORKSPACE_BYTES[device] // row)
    elements = facts.vocabulary_size * facts.hidden_size
    hidden = 2 * size * setting.tokens * facts.hidden_size
    if setting.tokens <= at_once:
        return row * setting.tokens + size * elements + hidden
    chunk = row * at_once + (4 << 26 if size == 2 and device == "cuda" else 0)  # its product by blocks
    return hidden + 4 * elements + max(chunk, size * elements if size == 2 else 0)


def head_gradient(setting: Setting) -> int:
    """Bytes of the head's gradient, which is there from the end of forward on: 2 V h."""
    return low(setting) * setting.facts.vocabulary_size * setting.facts.hidden_size


def gradients_in_flight(setting: Setting) -> tuple[int, int]:
    """Bytes of whole gradients beside the bucket: (where embedding or head is reduced, in the layers).

    A gradient above reduce_bucket_size is reduced by itself, and copied for that unless W divides it; others are copied
    from the bucket, all of it (stage3.__avg_scatter_grads, coalesced_collectives.reduce_scatter_coalesced).
    """
    facts, size, bucket = setting.facts, low(setting), setting.zero.get("reduce_bucket_size", 5 * 10**8)
    ends = facts.vocabulary_size * facts.hidden_size
    copied = min(bucket, facts.parameters)
    of_large = ends * (1 + (ends % setting.world_size > 0)) if ends > bucket else ends
    matrix = min(facts.largest_parameter, facts.largest_layer)
    return size * of_large, size * (matrix + max(copied, matrix if matrix > bucket else 0))


def forward_workspace(setting: Setting) -> int:
    """Bytes of a layer in forward: all it has, of which what is kept without checkpointing is counted there."""
    layer = _tiled(setting)
    if setting.checkpointing == "none":
        return setting.tokens * low(setting) * layer.mlp
    return setting.tokens * activation_bytes(replace(layer, layers=1), "none", setting.bf16) // 2


def sub_group(setting: Setting) -> int:
    """Elements that are updated at a time: whole parameters' shards until they are sub_group_size or more."""
    largest = -(-setting.facts.largest_parameter // setting.world_size)
    return int(min(setting.zero.get("sub_group_size", 10**9) + largest, shard(setting)))


def update_temporaries(setting: Setting, device: str = "cuda") -> int:
    """Bytes of the update of n elements, a sub-group: its gradients flattened, 2 n (4), and cast to fp32, 4 n. torch's
    fused AdamW has no more; on a CPU two fp32 temporaries, 8 n. Offloaded, all is in host memory."""
    if offloads(setting, "optimizer"):
        return 0
    flat = 4 if setting.accumulation > 1 or not setting.bf16 else 2
    return sub_group(setting) * (flat + (4 if flat == 2 else 0) + (0 if device == "cuda" else 8))


# Outside of torch's allocator, and what it cannot use: planned, not measured here (stas00/ml-engineering,
# training/performance: context 0.5-0.9 GiB, NCCL 1-1.5 GiB for the first communicator; 5-8 % of slack).
_SLACK, _CONTEXT = 0.05, 3 * GIB // 4


def nccl_buffers(setting: Setting) -> int:
    """Bytes that NCCL keeps: 1 GiB for the communicator of all ranks, half a GiB for each further group (hpZ,
    sequence_parallel); none for a single rank."""
    groups = (setting.zero.get("zero_hpz_partition_size", 1) > 1) + (setting.sequence_parallel > 1)
    return GIB + groups * GIB // 2 if setting.world_size > 1 else 0


def host_memory(setting: Setting) -> dict[str, int]:
    """Bytes of a node's memory, over the ranks that it has: what is offloaded, copies of checkpoints that are written
    while training goes on (12 bytes a parameter of theirs, 16 with an average), and processes."""
    copies = 16 if setting.recipe.train.ema_decay else 12
    each = offloaded(setting) | {
        "checkpoint_copies": copies * shard(setting) if setting.recipe.checkpoint.asynchronous else 0,
        "processes": _PROCESS,
    }
    ranks = min(setting.gpus_per_node, setting.world_size)
    return {name: ranks * size for name, size in each.items()}


def offloaded(setting: Setting) -> dict[str, int]:
    """Bytes that a rank has in host memory instead of on its GPU.

    offload_optimizer: master weights, moments, gradients as on the GPU, and beside these gradients in fp32 for the
    update, 4 s; offload_param: weights. What is on NVMe is not counted.
    """
    part, size, train = shard(setting), low(setting), setting.recipe.train
    optimizer = offload(setting, "optimizer") == "cpu"
    base = train.l2_pull and (optimizer or train.l2_pull_offload)
    reference = train.kl_weight and train.kl_reference == "model" and train.kl_reference_offload
    inputs = setting.tokens * size * setting.layer.hidden * setting.layer.layers
    found = {
        "gradients": (4 if setting.accumulation > 1 else size) * part if optimizer else 0,
        "gradients_of_update": 4 * part if optimizer else 0,
        "master_weights": 4 * part if optimizer else 0,
        "adamw_moments": 8 * part if optimizer else 0,
        "averaged_weights": 4 * part if optimizer and train.ema_decay else 0,
        "base_weights": size * part if base else 0,
        "reference_model": size * part if reference else 0,
        "weights": size * part if offload(setting, "param") == "cpu" else 0,
        "activations": inputs if setting.checkpointing == "offload" else 0,
    }
    return {name: bytes_ for name, bytes_ in found.items() if bytes_}


_PROCESS = 4 * GIB  # of a rank: torch, CUDA and libraries 3 GiB, data and W&B; a guess


def disk(setting: Setting) -> dict[str, Any]:
    """Bytes of a run folder: a checkpoint, the export, and all that is there at once, one checkpoint more than is
    kept."""
    return _disk(setting.recipe, setting.facts.parameters, setting.bf16)
