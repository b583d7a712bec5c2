"""Time and cost of a step on paper: operations, communication by kind, the update, and how they overlap.

Formulas of ZeRO-3's traffic: Wang et al. 2023 (ZeRO++), 3 · M a micro-batch: M gathered in forward, M in backward, M
reduced. Efficiencies and the overlap are guesses until a pair of runs is measured; they are arguments of `predict`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy

from fullft.errors import BadInput
from fullft.planner import memory
from fullft.planner.hardware import Gpu
from fullft.planner.setting import Setting

EFFICIENCY = 0.62  # of the best matmul found; on an H100 half of the data sheet, as good runs have it (a guess)
BANDWIDTH = 0.8  # of the line rate; 8 × H200: 361 of 450 GB/s (ml-engineering, network README)
NOT_HIDDEN = 0.3  # of the shorter of computation and communication (a guess)
LATENCY = 20e-6  # s, of a collective for each doubling of the ranks (a guess)
HOST_BANDWIDTH = 200e9  # bytes/s of a node's memory, for the update of what is offloaded (a guess)
MATMUL = 0.8  # of the data sheet, where no best matmul is published: that of an H100


@dataclass(frozen=True)
class Traffic:
    """Bytes that one GPU receives for a micro-batch, of one kind: over the node's link and over its network."""

    link: float
    network: float


@dataclass(frozen=True)
class Speed:
    """Seconds of a step and of its parts (the parts of all micro-batches of it), and what comes of them."""

    traffic: dict[str, Traffic]
    offloaded: float  # bytes between GPU and host memory for a micro-batch
    compute: float
    communication: float
    update: float
    step: float
    step_without_overlap: float
    tokens_per_second_per_gpu: float
    mfu: float


def predict(
    setting: Setting, gpu: Gpu, *, network_gbps: float | None = None, efficiency: float = EFFICIENCY,
    not_hidden: float = NOT_HIDDEN, document: int | None = None,
) -> Speed:  # fmt: skip
    """Of a step: accumulation · (max(c, m) + x · min(c, m)) + update, with computation c and communication m of a
    micro-batch, and the share x of the shorter that is not hidden.

    Args:
        network_gbps: Gb/s for each GPU, in place of the table's.
        efficiency: share of the best matmul.
        document: tokens of each document of a row; None: a document fills the row.

    Raises:
        BadInput: the operations of the architecture are not known, or a figure cannot be.
    """
    problems = [
        f"{name}: {value} must be above 0{' and at most 1' if top else ''}"
        for name, value, top in (("--network-gbps", network_gbps, False), ("--efficiency", efficiency, True))
        if value is not None and not (0 < value < math.inf and (value <= 1 or not top))
    ]
    if setting.flops is None:
        problems.append(f"model: the operations of {setting.facts.architecture} are not known, so neither is its time")
    if problems:
        raise BadInput(problems)
    useful, run = operations(setting, document)
    rate = (gpu.matmul_tflops or MATMUL * gpu.tflops) * 1e12 * efficiency
    network = (network_gbps or gpu.network_gbps) / 8 * 1e9 * BANDWIDTH
    link, moved = gpu.link_gbps * 1e9 * BANDWIDTH, traffic(setting)
    wire = sum(max(one.link / link, one.network / network) for one in moved.values())
    wire += (hosted := to_and_from_host(setting)) / (gpu.pcie_gbps * 1e9 * BANDWIDTH)
    compute, communication = run / rate, wire + latency(setting)
    longer, shorter = max(compute, communication), min(compute, communication)
    many, last = setting.accumulation, update(setting, gpu)
    step = many * (longer + not_hidden * shorter) + last
    return Speed(
        moved, hosted, many * compute, many * communication, last, step, many * (compute + communication) + last,
        many * setting.tokens / step, many * useful / step / (gpu.tflops * 1e12),
    )  # fmt: skip


def operations(setting: Setting, document: int | None = None) -> tuple[float, float]:
    """(operations that count for MFU, operations run) of one GPU for a micro-batch: 3 forwards, and what checkpointing
    and tiled MLPs do again (`Flops.recomputed`; full and offload attention as well). Every token has a label."""
    assert setting.flops
    length = min(document or setting.sequence_length, setting.sequence_length)
    whole, rest = divmod(setting.sequence_length, length)
    lengths = numpy.array([length] * whole + [rest] * (rest > 0), dtype=numpy.int64)
    attention = setting.flops.attention(lengths) * setting.micro_batch_size / setting.sequence_parallel
    useful = 3 * (setting.flops.forward(setting.tokens, setting.tokens) + attention)
    again = setting.flops.recomputed(setting.tokens, setting.checkpointing, setting.mlp_tiles > 1)
    again += attention if setting.checkpointing in ("full", "offload") else 0.0
    return useful, useful + again


def traffic(setting: Setting) -> dict[str, Traffic]:
    """Bytes that a GPU receives for a micro-batch. With N GPUs on n nodes of g, and M bytes of parameters:

    gather, reduce   link M · (g - 1) / g; network M · (N - 1) / N for a node, shared by the cards of its g GPUs: rings,
                     of which each edge carries (N - 1) / N, that between nodes as well (not counted here)
    hpZ              only the first gather of a step leaves the node, of whose A in forward that is 1 / A: its copy is
                     let go by the update (stage3.invalidate_secondary_tensor, DeepSpeed 0.19.8)
    quantized weights    1/2 of bf16's
    quantized gradients  1/4 of bf16's, over the network M · (n - 1) / n of them: summed in the node first (ZeRO++)
    all-to-all       Ulysses: 4 in forward (q, k, v, result), as many in backward and in recomputation, of each
                     (s - 1) / s of low-precision [tokens, heads · width] (Jacobs et al. 2023); at least s heads of k, v
    """
    zero, size = setting.zero, memory.low(setting)
    in_node = min(setting.gpus_per_node, setting.world_size)
    nodes = -(-setting.world_size // in_node)
    moved = float(size * setting.facts.parameters)

    def collective(share: float, across: int, crossing: float = 1.0) -> Traffic:
        """across: the parts of which a node lacks one; crossing: of the times that it is done."""
        network = crossing * moved * share * (across - 1) / across / in_node
        return Traffic(moved * share * (in_node - 1) / in_node, network)

    ring = setting.world_size if nodes > 1 else 1
    weights = 1 / size if zero.get("zero_quantized_weights") else 1.0
    quantized = bool(zero.get("zero_quantized_gradients"))
    hpz = zero.get("zero_hpz_partition_size", 1) > 1
    found = {
        "all_gather_forward": collective(weights, ring, 1 / setting.accumulation if hpz else 1.0),
        "all_gather_backward": collective(weights, ring, 0.0 if hpz else 1.0),
        "reduce_scatter": collective(0.5 / size, nodes) if quantized else collective(1.0, ring),
    }
    if (shared := setting.sequence_parallel) > 1:
        layer, passes = setting.layer, 3 if setting.checkpointing in ("full", "offload") else 2
        keys = max(layer.keys, shared * layer.queries // layer.heads)
        sent = setting.facts.layers * passes * size * setting.tokens * (2 * layer.queries + 2 * keys) / shared
        near = min(shared, in_node)
        found["all_to_all"] = Traffic(sent * (near - 1), sent * (shared - near))
    return found


def to_and_from_host(setting: Setting) -> float:
    """Bytes over PCIe of a GPU for a micro-batch, s elements a shard:

    offload_param           weights come up for each gather, 2 · 2 s
    offload_optimizer       gradients, 4 s (one micro-batch a step: 2 s), down and up: the first ones are written and
                            read again, to later ones the sum comes up and goes down (stage3.partition_grads,
                            DeepSpeed 0.19.8)
    checkpointing: offload  the input of each layer, 2 h a token, down and up
    """
    part, size = memory.shard(setting), memory.low(setting)
    weights = 2 * size * part if memory.offloads(setting, "param") else 0
    gradients = 2 * _gradient(setting) * part if memory.offloads(setting, "optimizer") else 0
    inputs = 2 * size * setting.tokens * setting.layer.hidden * setting.facts.layers
    return weights + gradients + (inputs if setting.checkpointing == "offload" else 0)


def _gradient(setting: Setting) -> int:
    """Bytes an element of what micro-batches are summed in."""
    return 4 if setting.accumulation > 1 else memory.low(setting)


def latency(setting: Setting) -> float:
    """Seconds of a micro-batch: two gathers and a reduction for each layer, embedding and head, each of
    `LATENCY` · log2(ranks)."""
    return 3 * (setting.facts.layers + 2) * LATENCY * math.log2(max(setting.world_size, 1))


def update(setting: Setting, gpu: Gpu) -> float:
    """Seconds of AdamW on a shard: it reads a gradient, master and two moments in fp32 and writes the three and the
    parameter, 28 + low bytes an element, from the GPU's memory, or if offloaded from the node's, which its GPUs share.
    Before that the gradient goes up and, in fp32, down (stage3._finalize_offload_gradient_accumulation, DeepSpeed
    0.19.8), and after it the parameter up, unless it is offloaded too, over PCIe."""
    elements, size = memory.shard(setting), memory.low(setting)
    if not memory.offloads(setting, "optimizer"):
        return elements * (28 + size) / (gpu.memory_tbps * 1e12)
    sharing = min(setting.gpus_per_node, setting.world_size)
    over_pcie = _gradient(setting) + 4 + (0 if memory.offloads(setting, "param") else size)
    return elements * ((28 + size) * sharing / HOST_BANDWIDTH + over_pcie / (gpu.pcie_gbps * 1e9 * BANDWIDTH))


def cost(tokens: float, speed: Speed, world_size: int, price: float | None = None) -> dict[str, float | None]:
    """Hours, GPU-hours and, at a price for a GPU-hour, the cost of training on so many tokens; without evaluation,
    checkpoints and start."""
    hours = tokens / speed.tokens_per_second_per_gpu / 3600
    return {"hours": hours / world_size, "gpu_hours": hours, "cost": None if price is None else price * hours}
