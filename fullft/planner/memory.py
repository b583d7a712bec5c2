"""Memory of a GPU by component and phase, of a node, and bytes on disk: from a `Setting`, without a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fullft.errors import BadInput
from fullft.head import _BYTES_OF_LOGIT, _BYTES_WITH_DIVERGENCE, WORKSPACE_BYTES

if TYPE_CHECKING:
    from fullft.planner.setting import Setting

GIB = 2**30


def plan(setting: Setting) -> dict[str, Any]:
    """Bytes of one rank's training state, wherever it is, and of the run folder; what stands in plan.json."""
    here = {name: size for name, size in gpu_states(setting).items() if name != "reduce_bucket"}
    there = {name: size for name, size in offloaded(setting).items() if name in here}
    states = {name: size + there.get(name, 0) for name, size in here.items() if size or name in there}
    return {
        "parameters": setting.facts.parameters, "world_size": setting.world_size, "state_bytes_per_rank": states,
        "device_bytes_per_rank": sum(here.values()), "host_bytes_per_rank": sum(there.values()),
    } | disk(setting)  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """Widths of a decoder layer, elements: hidden h, MLP f (of all experts that a token is sent to), queries H·d, keys
    K·d; the number H of heads; and what it has beside Llama's: norms of queries and keys, norms behind attention and
    MLP, Gemma's norms, which are fp32 throughout, experts."""

    layers: int
    hidden: int
    mlp: int
    queries: int
    keys: int
    heads: int
    norms_of_heads: bool = False
    norms_behind: bool = False
    norms_in_fp32: bool = False
    active_experts: int = 0
    assumed: str = ""  # what is not known of the architecture

    @property
    def key_heads(self) -> int:
        return self.keys * self.heads // self.queries


_KNOWN = {"llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gemma2", "gemma3_text", "gemma3"}


def layer_of(config: Any) -> Layer:
    """From a transformers config; what it does not name is guessed as in Llama, an MLP of 4 · hidden."""
    text = config.get_text_config()
    if not all(getattr(text, name, None) for name in ("hidden_size", "num_attention_heads", "num_hidden_layers")):
        raise BadInput(f"model: a layer of {text.model_type} has no attention heads, so what it keeps is not known")
    hidden, heads = int(text.hidden_size), int(text.num_attention_heads)
    head = int(getattr(text, "head_dim", None) or hidden // heads)
    keys = int(getattr(text, "num_key_value_heads", None) or heads)
    mlp = int(getattr(text, "intermediate_size", None) or 4 * hidden)
    if experts := int(getattr(text, "num_experts_per_tok", None) or 0):
        mlp = experts * int(getattr(text, "moe_intermediate_size", None) or mlp)
    kind = text.model_type
    return Layer(
        int(text.num_hidden_layers), hidden, mlp, heads * head, keys * head, heads,
        norms_of_heads=kind.startswith(("qwen3", "gemma3")), norms_behind=kind.startswith(("gemma2", "gemma3")),
        norms_in_fp32=kind.startswith("gemma"), active_experts=experts,
        assumed="" if kind in _KNOWN else f"a layer of {kind} keeps what one of Llama does",
    )  # fmt: skip


def activation_bytes(layer: Layer, mode: str, bf16: bool, fused: bool = False) -> int:
    """Bytes of activations a token, between forward and backward and in the layer at work, by what is kept
    (`activations`).

    A layer of Llama with attention of flash kind keeps, in bf16, 16h + 8f + 4Hd + 4Kd + 4H + 8 bytes a token, in fp32
    24h + 16f + 8Hd + 8Kd + 4H + 8: counted by saved_tensors_hooks on transformers 5.24 (tests/test_activations.py), not
    the 34h of Korthikanti et al. 2022 ("Reducing Activation Recomputation"), which is GPT's with dropout. A norm's part
    is the input in fp32, the normalized and the output, 4 + 2 + 2 (4 + 4 + 4); what nothing multiplies, as behind the
    norms of queries and keys and of what is added to the residual, is not kept. Experts have their inputs and outputs
    once more, 2 · 2h each. Liger's norms (`fused`) keep input and output, its MLP three of its four f.

    Checkpointed, a layer keeps its input, and its whole is there while it is computed again. selective adds the
    attention's output and every second matrix product, those of keys, of attention's output and of the upper half of
    the gated MLP.
    """
    h, f, q, k = layer.hidden, layer.mlp, layer.queries, layer.keys
    size = 2 if bf16 else 4
    norm = 4 + (4 if layer.norms_in_fp32 else size)  # of the input, without the output
    if fused:
        norm = size
    whole = 2 * (norm + size) * h + (3 if fused else 4) * size * f + 2 * size * (q + k) + 4 * layer.heads + 8
    whole += norm * (q + k) if layer.norms_of_heads else 0
    whole += 2 * norm * h if layer.norms_behind else 0
    whole += 2 * size * layer.active_experts * h
    match mode:
        case "none":
            return layer.layers * whole
        case "selective":
            return layer.layers * (size * (h + q + k + h + f) + 4 * layer.heads) + whole
        case "full":
            return layer.layers * size * h + whole
        case _:  # offload: the inputs of two layers are under way
            return 2 * size * h + whole


@dataclass(frozen=True)
class Memory:
    """Of one GPU, bytes, by component: `parts` are what is there together at the worst moment of each phase (loading,
    forward, backward, update), as torch's allocator counts it; `outside` of it are SLACK, CONTEXT and NCCL."""

    parts: dict[str, dict[str, int]]
    outside: dict[str, int]

    @property
    def phases(self) -> dict[str, int]:
        return {phase: sum(parts.values()) for phase, parts in self.parts.items()}

    @property
    def worst(self) -> str:
        """The phase that needs the most."""
        return max(self.phases, key=self.phases.__getitem__)

    @property
    def components(self) -> dict[str, int]:
        """At the worst moment of the run."""
        return {name: size for name, size in (self.parts[self.worst] | self.outside).items() if size}

    @property
    def held_by_torch(self) -> int:
        """What torch.cuda.max_memory_allocated would show after two steps."""
        return self.phases[self.worst]

    @property
    def peak(self) -> int:
        """What the GPU must have."""
        return self.held_by_torch + sum(self.outside.values())


SLACK, CONTEXT, NCCL = "allocator_slack", "context", "nccl"


def gpu_memory(setting: Setting, device: str = "cuda") -> Memory:
    """Memory of rank 0's GPU, at the worst moment of each phase; each has the states, and beside them

        loading   of a sub-group the fp32 weights twice and a gradient, before there is a bucket; then the largest
                  parameter whole, when hooks are placed; neither with moments
        forward   layers: gathered weights and the copy of those under way, what layers have kept, and one at work
                  loss: embedding and head or what is gathered ahead, all that layers keep, the loss
        backward  head: as the loss, with the head's gradient and its copy in the reduction
                  layers: gathered weights and copy, all that layers keep, the last one at work, a matrix' gradient, a
                  bucket's copy
                  embedding: itself, its gradient and the bucket's copy
        update    temporaries of a sub-group

    A tied head's gradient stays from forward on until the embedding's is there. `device`: cuda, or cpu as a rehearsal
    has it, which computes in other blocks.
    """
    states, facts, size = gpu_states(setting), setting.facts, low(setting)
    ends = size * facts.vocabulary_size * facts.hidden_size
    live, at_head, copied = gathered(setting)
    kept, around = kept_activations(setting, device), setting.tokens * (12 if size == 2 else 16) * facts.hidden_size
    work, attention = layer_at_work(setting, device), attention_workspace(setting, device)
    loss, update = loss_workspace(setting, device), update_temporaries(setting, device)
    of_head, of_matrix, flush = gradients_in_flight(setting)
    # Attention's backward comes after the MLP's, when product, gate, up and their gradients are free.
    busy = max(work, work - setting.tokens * size * 7 * _tiled(setting).mlp + attention)
    tied = ends if is_tied(setting) else 0  # autograd adds the embedding's
    early = live > at_head and live == size * facts.parameters  # all is gathered in the first layers
    in_layers = tied + at_head + (0 if early else copied)
    flush_in_layers = 0 if setting.zero.get("reduce_bucket_size", 5 * 10**8) >= facts.parameters else flush
    cut = 4 * (2 + (not setting.bf16 and device == "cpu")) * sub_group(setting)
    activations = {"activations": kept + around}
    moments: dict[str, list[dict[str, int]]] = {  # beside the states
        "loading": [
            {"update_temporaries": cut - states["reduce_bucket"] - states["gradients"]},
            {"gathered_weights": size * facts.largest_parameter},
        ],
        "forward": [
            {
                "gathered_weights": live + copied, "activations": 0 if early else kept,
                "layer_at_work": forward_workspace(setting),
            },
            activations | {"gathered_weights": at_head, "loss_workspace": loss},
        ],
        "backward": [
            activations | {"gathered_weights": at_head, "gradients_in_flight": of_head},
            {
                "gathered_weights": in_layers - tied, "activations": kept, "layer_at_work": work,
                "attention_workspace": busy - work, "gradients_in_flight": tied + of_matrix + flush_in_layers,
            },
            {"gathered_weights": ends, "gradients_in_flight": max(tied + of_head, flush)},
        ],
        "update": [{"update_temporaries": update}],
    }  # fmt: skip
    lasting = {phase: states if phase != "loading" else states | {"adamw_moments": 0} for phase in moments}
    worst = {phase: lasting[phase] | max(parts, key=lambda one: sum(one.values())) for phase, parts in moments.items()}
    held = max(sum(parts.values()) for parts in worst.values())
    outside = dict.fromkeys((SLACK, CONTEXT, NCCL), 0)
    if device == "cuda":
        outside = {SLACK: int(_SLACK * held), CONTEXT: _CONTEXT, NCCL: nccl_buffers(setting)}
    return Memory(worst, outside)


def low(setting: Setting) -> int:
    """Bytes of an element of weights, activations and what is communicated."""
    return 2 if setting.bf16 else 4


def shard(setting: Setting, ranks: int | None = None) -> int:
    """Elements of a rank's shards of all parameters: Σ ceil(n / W), since ZeRO-3 cuts each by itself and pads it."""
    ranks, facts = ranks or setting.world_size, setting.facts
    return sum(-(-size // ranks) for size in facts.sizes) if facts.sizes else -(-facts.parameters // ranks)


def largest_matrix(setting: Setting) -> int:
    """Elements of the largest parameter that is neither embedding nor head."""
    facts = setting.facts
    ends = facts.vocabulary_size * facts.hidden_size
    return max((one for one in facts.sizes if one != ends), default=min(facts.largest_parameter, facts.largest_layer))


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

    weights           2 s (fp32: 4), and the parameters up to stage3_param_persistence_threshold whole,
                      N · ceil(n / N) elements, unless there is one rank, whose shards are whole
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
    ranks = setting.world_size
    whole = size * ranks * sum(-(-one // ranks) for one in setting.facts.sizes if one <= limit) if ranks > 1 else 0
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


def gathered(setting: Setting) -> tuple[int, int, int]:
    """Bytes of whole weights that are there at once, 2 (4) an element: at the most; where the head is; copies of those
    under way.

    At every module DeepSpeed gathers ahead, in the order that it has recorded, parameters of
    stage3_prefetch_bucket_size elements and at most the one that goes beyond, until there are
    stage3_max_live_parameters (partitioned_param_coordinator.fetch_sub_module, 0.19.8). So a model above that has that
    many; of one below, all is gathered in its first layers. What is there when its turn in backward is looked at is
    passed over, so at the head are head and embedding, and what there was no room for. Parameters gathered together lie
    in a buffer until they are copied out of it.
    """
    zero, facts, size = setting.zero, setting.facts, low(setting)
    bucket = zero.get("stage3_prefetch_bucket_size", 5 * 10**7)
    limit = zero.get("stage3_max_live_parameters", 10**9)
    if setting.world_size == 1:
        return 0, 0, 0
    if not bucket:
        return size * facts.largest_parameter, size * facts.largest_parameter, 0
    copied = size * min(facts.parameters, bucket + largest_matrix(setting))
    layer, at_head = setting.layer, facts.vocabulary_parameters + max(0, facts.parameters - limit)
    if setting.mlp_tiles > 1:  # what is used several times in a row is kept for backward
        at_head = facts.parameters - layer.layers * 2 * layer.hidden * (layer.queries + layer.keys)
    return size * min(facts.parameters, limit), size * min(at_head, limit), copied


def kept_activations(setting: Setting, device: str = "cuda") -> int:
    """Bytes kept from forward to backward by all layers: `activation_bytes` without the layer at work, for each token
    of the micro-batch, of which a rank has 1 / sequence_parallel. Without checkpointing, weights of experts too: their
    product keeps them for backward, gathered as they are, where DeepSpeed's linear layer gathers them again."""
    layer = _tiled(setting)
    per_token = _per_token(setting, layer, setting.checkpointing)
    if setting.checkpointing != "none":
        return setting.tokens * (per_token - _per_token(setting, replace(layer, layers=1), "none"))
    experts = setting.facts.largest_layer - 2 * layer.hidden * (layer.queries + layer.keys)
    of_layer = low(setting) * experts if layer.active_experts else 0
    return setting.tokens * (per_token + _twice(setting, device) * layer.layers) + of_layer * layer.layers


def _per_token(setting: Setting, layer: Layer, mode: str) -> int:
    return activation_bytes(layer, mode, setting.bf16, setting.kernels == "liger")


def _twice(setting: Setting, device: str) -> int:
    """Bytes a token of attention's output, which is kept a second time where documents are attended to one by one."""
    return low(setting) * setting.layer.queries if device == "cpu" else 0


def _tiled(setting: Setting) -> Layer:
    """The layer, of whose MLP only a part is there at a time with mlp_tiles."""
    return replace(setting.layer, mlp=-(-setting.layer.mlp // setting.mlp_tiles))


def layer_at_work(setting: Setting, device: str = "cuda") -> int:
    """Bytes of the layer in backward: what it keeps while it is computed again (nothing more without checkpointing),
    and the gradients of its widest part, 2 · (3 f + 2 h) a token: of product, gate and up, of input and output."""
    layer, size = _tiled(setting), low(setting)
    whole = _per_token(setting, replace(layer, layers=1), "none") + _twice(setting, device)
    again = 0 if setting.checkpointing == "none" else whole
    return setting.tokens * (again + size * (3 * layer.mlp + 2 * layer.hidden))


def attention_workspace(setting: Setting, device: str = "cuda") -> int:
    """Bytes of attention in backward beyond what it keeps.

    FlashAttention-2 (Dao 2023; mha_varlen_bwd) sums the gradient of queries in fp32, 4 Hd a token, and where heads
    share keys has those of keys and values for every head, 2 · 2 Hd; with sequence_parallel a rank has all tokens of
    1 / N of the heads, and the exchange of queries, keys, values and output has a copy of each.
    """
    layer, size = setting.layer, low(setting)
    each = (4 + 2 * size * (layer.keys < layer.queries)) * layer.queries if device == "cuda" else 0
    if setting.sequence_parallel > 1:
        each += size * 2 * (layer.queries + layer.keys)
    return setting.tokens * each


def loss_workspace(setting: Setting, device: str = "cuda") -> int:
    """Bytes of the loss in the head's forward (`head`), when each position has a label: logits of as many positions as
    WORKSPACE_BYTES holds at 14 bytes an element (32 with a divergence), of which really `_OF_LOGIT` are there; the
    head's gradient, which is there from then on, summed in fp32 over several chunks and rounded once at the end;
    hidden states of the labels and their gradient, 2 · 2 h."""
    facts, size = setting.facts, low(setting)
    each = _BYTES_WITH_DIVERGENCE if setting.recipe.train.kl_weight else _BYTES_OF_LOGIT
    at_once = max(1, WORKSPACE_BYTES[device] // (each * facts.vocabulary_size))
    elements = facts.vocabulary_size * facts.hidden_size
    hidden = 2 * size * setting.tokens * facts.hidden_size
    one, several = _OF_LOGIT[size]
    more = each - _BYTES_OF_LOGIT
    if setting.tokens <= at_once:
        return (one + more) * facts.vocabulary_size * setting.tokens + size * elements + hidden
    chunk = (several + more) * facts.vocabulary_size * at_once
    return hidden + 4 * elements + max(chunk, size * elements if size == 2 else 0)


# Bytes of each logit at the most, by the size of an element, with one chunk or with several, when the gradient of the
# chunk before is there too; counted by torch's profiler.
_OF_LOGIT = {2: (14, 16), 4: (16, 20)}


def gradients_in_flight(setting: Setting) -> tuple[int, int, int]:
    """Bytes of whole gradients beside the bucket: of head or embedding, of a layer's matrix, of a bucket that is
    reduced.

    Smaller ones are copied into the bucket, which is copied as a whole when it is full, or backward at its end. One
    above reduce_bucket_size is reduced by itself, and copied for that unless W divides it (stage3.__avg_scatter_grads,
    coalesced_collectives.reduce_scatter_coalesced, DeepSpeed 0.19.8).
    """
    facts, size, bucket = setting.facts, low(setting), setting.zero.get("reduce_bucket_size", 5 * 10**8)

    def alone(elements: int) -> int:
        return size * elements * (1 + (elements > bucket and elements % setting.world_size > 0))

    ends = alone(facts.vocabulary_size * facts.hidden_size)
    return ends, alone(largest_matrix(setting)), size * min(bucket, facts.parameters)


def forward_workspace(setting: Setting) -> int:
    """Bytes of a layer in forward: all it has, of which what is kept without checkpointing is counted there."""
    layer = _tiled(setting)
    if setting.checkpointing == "none":
        return setting.tokens * low(setting) * layer.mlp
    return setting.tokens * _per_token(setting, replace(layer, layers=1), "none") // 2


def sub_group(setting: Setting) -> int:
    """Elements that are updated at a time: whole parameters' shards until they are sub_group_size or more."""
    largest = -(-setting.facts.largest_parameter // setting.world_size)
    return int(min(setting.zero.get("sub_group_size", 10**9) + largest, shard(setting)))


def update_temporaries(setting: Setting, device: str = "cuda") -> int:
    """Bytes of the update of n elements, a sub-group: its gradients flattened, 2 n (4), and cast to fp32, 4 n. torch's
    fused AdamW has no more; on a CPU one of fp32, 4 n. Offloaded, all is in host memory."""
    if offloads(setting, "optimizer"):
        return 0
    flat = 4 if setting.accumulation > 1 or not setting.bf16 else 2
    return sub_group(setting) * (flat + (4 if flat == 2 else 0) + (0 if device == "cuda" else 4))


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
    """Bytes of a run folder: a checkpoint (fp32 weights and two moments, 12 a parameter; 16 with an average), the
    export, and all that is there at once, one checkpoint more than is kept."""
    recipe, parameters = setting.recipe, setting.facts.parameters
    checkpoint = (16 if recipe.train.ema_decay else 12) * parameters
    # The best is another one than the newest only if there are evaluations between.
    retention = recipe.retention
    evaluates_between = retention.every_steps is not None or retention.max_overhead is not None
    kept = recipe.checkpoint.keep + (recipe.checkpoint.keep_best and evaluates_between)
    kept += retention.goes_back  # that of before a loss
    export_dtype = recipe.export.dtype if recipe.export.dtype != "auto" else ("bf16" if setting.bf16 else "fp32")
    exported = {"bf16": 2, "fp16": 2, "fp32": 4}[export_dtype] * parameters
    on_node = checkpoint * min(1, setting.gpus_per_node / setting.world_size)  # without a file system that all share
    of_folder = round(on_node) if recipe.checkpoint.use_node_local_storage else checkpoint
    folder = (kept + 1) * of_folder + exported
    return {"checkpoint_bytes": checkpoint, "export_dtype": export_dtype, "run_folder_bytes": folder}
