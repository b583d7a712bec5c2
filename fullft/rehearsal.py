"""Rank 0 of N for real, on one device: what it takes, measured before N GPUs are rented.

Its collectives are those of torch's fake process group, which sends nothing: a gathered weight is the rank's own shard
N times. So all sizes, buffers and kernels are those of the run, time is that of computing alone, and loss and gradient
norm mean nothing. No weights are read, and no parameter is made whole but as training does it.

It is a process of its own: a fake group must not leak into anything, and it may be killed for memory.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fullft.cluster import exit_now, host_memory
from fullft.errors import EXIT_BAD_INPUT, BadInput, Problems
from fullft.recipe import Recipe, parse_recipe

if TYPE_CHECKING:
    from fullft.data.batches import Batch
    from fullft.planner.setting import Setting

PHASES = ("loading", "forward", "backward", "update")
# On a CPU: freed memory goes back at once, so that what is resident is what is in use, and it comes in huge pages, else
# half of the time is page faults.
_ON_CPU = {
    "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "1048576",
    "MALLOC_TRIM_THRESHOLD_": "1048576", "THP_MEM_ALLOC_ENABLE": "1",
}  # fmt: skip
_LARGEST_IN_BF16_ON_CPU = 20_000_000  # parameters: most CPUs do 1 to 10 GFLOP/s in bf16
_ON_GPU = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


def rehearse(
    recipe: Recipe,
    world_size: int,
    device: str = "cpu",
    micro_batches: int | None = None,
    steps: int = 3,
    gpus_per_node: int = 8,
    count: bool = False,
) -> dict[str, Any]:
    """Rehearse in a process of its own.

    Args:
        device: cpu or cuda.
        micro_batches: of a step; default: 2 if the run has several, else 1. More take time, and no more memory.
        steps: DeepSpeed gathers ahead in forward from the first micro-batch on, and in backward from the third on.
        gpus_per_node: for hpZ.
        count: on a CPU, measure what is allocated and not what is resident; slower.

    Returns:
        what was rehearsed; `measured` and `planned`: bytes of the states and by phase, seconds

    Raises:
        BadInput: recipe, device or number of ranks; nothing was run.
        RuntimeError: it died, of memory or otherwise; the text says in which phase.
    """
    if micro_batches is not None and micro_batches < 1:
        raise BadInput(f"--micro-batches: {micro_batches} is too few")
    if steps < 1:
        raise BadInput(f"--steps: {steps} is too few")
    setting = setting_to_rehearse(recipe, world_size, device, gpus_per_node)
    request = {
        "recipe": setting.recipe.model_dump(mode="json"), "world_size": world_size, "device": device, "steps": steps,
        "micro_batches": micro_batches or min(2, setting.accumulation), "gpus_per_node": gpus_per_node,
        "count": count,
    }  # fmt: skip
    measured = _in_process(request)
    return {
        "architecture": setting.facts.architecture, "parameters": setting.facts.parameters, "world_size": world_size,
        "sequence_length": setting.sequence_length, "tokens": setting.tokens, "device": device,
        "deepspeed": setting.recipe.deepspeed,
        "precision": "bf16" if setting.bf16 else "fp32", "activation_checkpointing": setting.checkpointing,
        "kernels": setting.kernels, "steps": steps, "micro_batches": request["micro_batches"], "measured": measured,
        "planned": planned(setting, device),
    }  # fmt: skip


def setting_to_rehearse(recipe: Recipe, world_size: int, device: str, gpus_per_node: int = 8) -> Setting:
    """What a run of the recipe on `world_size` ranks comes to, where they have a device like this one.

    Raises:
        BadInput: with every problem found.
    """
    import torch

    from fullft import activations, kernels, model
    from fullft.planner import choose, hardware
    from fullft.planner.setting import setting_of
    from fullft.preflight import length_problems, parallel_problems
    from fullft.tiles import require_tileable
    from fullft.tokenizer import load_tokenizer

    problems, train = Problems(), recipe.train
    gpu = device == "cuda"
    if world_size < 1:
        problems.append(f"--world-size: {world_size} is not a number of ranks")
    if device not in ("cpu", "cuda"):
        problems.append(f"--device: {device} is neither cpu nor cuda")
    if gpu and not torch.cuda.is_available():
        problems.append("--device: torch finds no GPU here; --device cpu rehearses the same shapes in fp32")
    if train.kl_weight and train.kl_reference == "model":
        problems.append("train.kl_reference: a model is not rehearsed; take train.kl_weight=0, and add the plan's part")
    if problems:
        raise BadInput(problems)
    meta = model.on_meta(recipe.model, load_tokenizer(recipe.model) if recipe.model.grows else None)
    bf16, here = model.precision(recipe, gpu) == torch.bfloat16, hardware.here() if gpu else None
    fused = kernels.choose(recipe, meta.config, gpu)[0]
    if recipe.deepspeed == "auto":
        node = host_memory() / 2**30 if here else None
        recipe, _ = choose.file(recipe, meta, here, world_size, gpus_per_node, node_gib=node, bf16=bf16, kernels=fused)
    setting = setting_of(recipe, meta, world_size, min(gpus_per_node, world_size), bf16=bf16, kernels=fused)
    if str((setting.zero.get("offload_param") or {}).get("device")) == "nvme":
        problems.append(f"deepspeed: {recipe.deepspeed} has offload_param on nvme, which is not rehearsed")
    if bf16 and not gpu and setting.facts.parameters > _LARGEST_IN_BF16_ON_CPU:
        problems.append("train.precision: bf16 takes a CPU hours; rehearse there with train.precision=fp32")
    problems += activations.problems(recipe, meta) + kernels.problems(recipe, meta.config)
    problems += kernels.lacks(recipe, meta.config, gpu)
    problems += length_problems(recipe, meta) + parallel_problems(recipe, model.attention_of(recipe.model))
    if train.mlp_tiles > 1:
        problems.attempt(require_tileable, meta)
    if problems:
        raise BadInput(problems)
    auto = recipe.train.micro_batch_size == "auto"
    return choose.choose(setting, here, auto, meta.supports_gradient_checkpointing)[0]


def planned(setting: Setting, device: str) -> dict[str, Any]:
    """Bytes of the states and of the phases by the plan, of what a device of this kind holds: a CPU also what is
    offloaded."""
    from fullft.planner import memory as planner

    memory = planner.gpu_memory(setting, device)
    states, phases = planner.gpu_states(setting), memory.phases
    if device == "cpu":
        here = planner.offloaded(setting)
        phases = {name: size + sum(here.values()) for name, size in phases.items()}
        states = {name: size + here.get(name, 0) for name, size in states.items()}
    return {"states": states, "phases": phases, "peak": max(phases.values()), "components": memory.components}


def _in_process(request: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        file, answer = Path(name) / "request.json", Path(name) / "answer.json"
        file.write_text(json.dumps(request))
        environment = os.environ | (_ON_CPU if request["device"] == "cpu" else _ON_GPU)
        command = [sys.executable, "-m", "fullft.rehearsal", str(file), str(answer)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, env=environment, text=True, **pipes)
        said, last = deque[str](maxlen=60), "its start"
        assert process.stderr
        try:
            for line in process.stderr:
                if line.startswith(_MARK):
                    last = line.removeprefix(_MARK).strip()
                    print(f"rehearsing {last}", file=sys.stderr, flush=True)
                else:
                    said.append(line)
            code = process.wait()
        finally:
            process.kill()
            process.wait()
        if code == 0:
            return json.loads(answer.read_text())  # type: ignore[no-any-return]
        text = "".join(said)
        if code == EXIT_BAD_INPUT and answer.exists():
            raise BadInput(json.loads(answer.read_text())["problems"])
        if code == -signal.SIGKILL or "OutOfMemoryError" in text or "can't allocate memory" in text:
            device = "this machine" if request["device"] == "cpu" else "the GPU"
            raise RuntimeError(f"it does not fit {device}: out of memory in {last}")
        raise RuntimeError(f"it failed in {last}:\n{text}")


# What follows is done in that process.

_MARK = "fullft-rehearsal: "


def main() -> int:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    request, answer = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    try:
        found = perform(**request)
    except BadInput as error:
        answer.write_text(json.dumps({"problems": error.problems}))
        return EXIT_BAD_INPUT
    answer.write_text(json.dumps(found))
    return 0


def _end_with_parent() -> None:
    os.read(0, 1)  # ends when the other end is closed, however that process ended
    os._exit(1)


def perform(
    recipe: dict[str, Any],
    world_size: int,
    device: str,
    micro_batches: int,
    steps: int,
    gpus_per_node: int = 8,
    count: bool = False,
) -> dict[str, Any]:
    """Build, train and measure in this process, which is good for nothing else afterwards. count: as of `Meter`."""
    parsed = parse_recipe(recipe)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    join_fake(world_size)
    setting = setting_to_rehearse(parsed, world_size, device, gpus_per_node)
    meter = Meter(device, count)
    say("loading")
    with meter.phase("loading"):
        engine, pull = build(parsed, setting, gpus_per_node)
    from fullft.head import Head
    from fullft.loss import LabelWeights

    head, seconds, labels = Head(engine), list[dict[str, float]](), setting.tokens * world_size
    weights = LabelWeights.of_step(labels, 0, 1.0, 0.0)
    batch = packed_batch(setting).to(engine.device)
    for step in range(1, steps + 1):
        seconds.append(dict.fromkeys(PHASES[1:], 0.0))
        for number in range(1, micro_batches + 1):
            of_many = f", micro-batch {number} of {micro_batches}" * (micro_batches > 1)
            say(f"forward of step {step} of {steps}{of_many}")
            with meter.phase("forward", seconds[-1]):
                loss, *_ = head.loss(batch, weights)
            say(f"backward of step {step} of {steps}{of_many}")
            with meter.phase("backward", seconds[-1]):
                engine.backward(loss * world_size, scale_wrt_gas=False)
                del loss
        second = sizes(_second_copies(engine))  # dropped in the update, and made again in forward
        say(f"update of step {step} of {steps}")
        with meter.phase("update", seconds[-1]):
            for group in engine.optimizer.param_groups:
                group["lr"] = 1e-6
            engine.step()
    last = seconds[-1]
    return meter.found | {
        "states": states_of(engine, pull) | {"second_copy_of_weights": second}, "why_logits_whole": head.why_not,
        "seconds": {
            "loading": meter.seconds["loading"], "forward": last["forward"] / micro_batches,
            "backward": last["backward"] / micro_batches, "update": last["update"],
            "micro_batch": (last["forward"] + last["backward"]) / micro_batches,
        },
    }  # fmt: skip


def say(what: str) -> None:
    print(f"{_MARK}{what}", file=sys.stderr, flush=True)


def join_fake(world_size: int) -> None:
    """This process as rank 0 of a group of which there is no other. Before DeepSpeed forms a real one."""
    import torch
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from fullft.cluster import Cluster, join

    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size)}
    os.environ.update(place, MASTER_ADDR="127.0.0.1", MASTER_PORT="1")  # DeepSpeed wants them; nobody connects
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    join(Cluster(0, world_size, 0, "127.0.0.1", 1, "rehearsal"), timeout_minutes=30)


def build(recipe: Recipe, setting: Setting, gpus_per_node: int) -> tuple[Any, Any]:
    """The engine as `trainer.set_up` makes it, and the pull to the base weights."""
    import torch

    from fullft import activations, kernels, model
    from fullft import engine as engines
    from fullft.attention import form_groups
    from fullft.optim import build_optimizer
    from fullft.retention.pull import attach
    from fullft.tiles import tile_mlps
    from fullft.tokenizer import load_tokenizer

    world_size = setting.world_size
    config = engines.fit_to_nodes(
        engines.read_config(recipe), recipe, world_size, min(gpus_per_node, world_size), torch.cuda.is_available()
    )
    plan = engines.geometry(recipe, world_size, setting.micro_batch_size)
    config = engines.fill_config(config, recipe, plan, setting.facts, model.precision(recipe))
    form_groups(recipe.train.sequence_parallel, recipe.train.timeout_minutes)
    tokenizer = load_tokenizer(recipe.model) if recipe.model.grows else None
    loaded = model.without_weights(recipe, config, tokenizer, model.attention_of(recipe.model))
    kernels.apply(loaded, setting.kernels, setting.checkpointing)
    tile_mlps(loaded, recipe.train.mlp_tiles)
    activations.enable(loaded, setting.checkpointing)
    optimizer = build_optimizer(loaded, recipe.train, engines.offloads_optimizer(config))
    engine = engines.start(loaded, optimizer, config)
    return engine, attach(engine, recipe.train, {})


def packed_batch(setting: Setting) -> Batch:
    """A micro-batch whose rows are filled with documents of ragged lengths (log-normal, a median of 400 tokens as of
    chats, at most the row), a label at each position: what can be the most."""
    import torch

    from fullft.data.batches import Batch

    generator, length = torch.Generator().manual_seed(0), setting.sequence_length
    shape = (setting.micro_batch_size, length)
    ids = torch.randint(1, setting.facts.vocabulary_size, shape, generator=generator)
    positions = torch.empty(shape, dtype=torch.int64)
    for row in positions:
        at = 0
        while at < length:
            size = int(torch.empty(()).log_normal_(6.0, 1.0, generator=generator).clamp(8, length - at))
            row[at : at + size] = torch.arange(size)
            at += size
    rows = setting.micro_batch_size
    batch = Batch.of(ids, positions, ids.roll(-1, 1), [length] * rows, [False] * rows, [(0, 0)] * rows)
    return batch.part(0, setting.sequence_parallel) if setting.sequence_parallel > 1 else batch


def states_of(engine: Any, pull: Any) -> dict[str, int]:
    """Bytes of the tensors that stay between steps, by the names of the plan."""
    from fullft.shards import AVERAGE

    zero = engine.optimizer
    states = [zero.optimizer.state[flat] for flat in zero.fp32_partitioned_groups_flat]
    parameters = list(engine.module.parameters())
    whole = [one for one in parameters if one.ds_persist]
    return {
        "weights": sizes([*(one.ds_tensor for one in parameters), *whole]),
        "gradients": sizes([zero.grad_partitions_flat_buffer]),
        "master_weights": sizes(zero.fp32_partitioned_groups_flat),
        "adamw_moments": sizes(one[name] for one in states for name in ("exp_avg", "exp_avg_sq") if name in one),
        "base_weights": sizes(pull._base.values()) if pull is not None else 0,
        "averaged_weights": sizes(one[AVERAGE] for one in states if AVERAGE in one),
        "reduce_bucket": sizes(one.buffer for one in zero.ipg_buckets.values() if one.buffer is not None),
    }


def _second_copies(engine: Any) -> list[Any]:
    found = [getattr(one, "ds_secondary_tensor", None) for one in engine.module.parameters()]
    return [one for one in found if one is not None]


def sizes(tensors: Any) -> int:
    """Bytes of tensors, of which several may be views of one storage."""
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return sum(storages.values())


class Meter:
    """Peak memory and seconds of phases. On a GPU what torch's allocator holds; on a CPU growth of resident memory, or
    what is allocated, counted by torch's profiler: that is slower, and to the byte what the same would be on a GPU."""

    def __init__(self, device: str, count: bool = False) -> None:
        import torch

        self._cuda = torch.cuda if device == "cuda" else None
        self._base, self._count, self._allocated = _resident(), count and self._cuda is None, 0
        self.peaks, self.seconds = dict.fromkeys(PHASES, 0), dict.fromkeys(PHASES, 0.0)
        self._resident = self._reserved = self._outside = 0

    @contextmanager
    def phase(self, name: str, seconds: dict[str, float] | None = None) -> Iterator[None]:
        cuda = self._cuda
        if cuda is not None:
            cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        with _sampled() as peak, _counted() if self._count else nullcontext([0, 0]) as counted:
            yield
            if cuda is not None:
                cuda.synchronize()
        took = time.perf_counter() - started
        self.seconds[name] += took
        if seconds is not None:
            seconds[name] += took
        self._resident = max(self._resident, peak[0] - self._base)
        size = peak[0] - self._base
        if self._count:
            size = self._allocated + counted[0]
            self._allocated += counted[1]
        elif cuda is not None:
            size = cuda.max_memory_allocated()
            free, total = cuda.mem_get_info()
            self._reserved = max(self._reserved, cuda.max_memory_reserved())
            self._outside = max(self._outside, total - free - cuda.memory_reserved())
        self.peaks[name] = max(self.peaks[name], size)

    @property
    def found(self) -> dict[str, Any]:
        found = {"phases": self.peaks, "peak": max(self.peaks.values()), "process": self._base}
        found |= {"resident": self._resident, "of": "allocated" if self._count or self._cuda else "resident"}
        return found | ({"reserved": self._reserved, "outside_of_torch": self._outside} if self._cuda else {})


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def _counted() -> Iterator[list[int]]:
    """Bytes of host memory that tensors have at the most meanwhile more than at the beginning, and at the end."""
    from torch.profiler import ProfilerActivity, profile

    found = [0, 0]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield found
    events = [one for one in profiler.profiler.kineto_results.events() if one.name() == "[memory]"]
    for event in sorted(events, key=lambda one: one.start_ns()):
        found[1] += event.nbytes()
        found[0] = max(found)


@contextmanager
def _sampled() -> Iterator[list[int]]:
    """The most resident memory meanwhile, looked at every millisecond."""
    peak, ended = [_resident()], threading.Event()

    def sample() -> None:
        while not ended.wait(0.001):
            peak[0] = max(peak[0], _resident())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()
        peak[0] = max(peak[0], _resident())


def table(found: dict[str, Any]) -> str:
    """What was measured beside the plan, in GiB, and seconds."""
    gib, measured, plan = 2**30, found["measured"], found["planned"]
    lines = [f"{'GiB':24}{'measured':>10}{'planned':>10}{'difference':>12}"]

    def row(name: str, real: int, thought: int) -> None:
        off = f"{100 * (thought / real - 1):+.1f} %" if real else ""
        lines.append(f"{name:24}{real / gib:10.3f}{thought / gib:10.3f}{off:>12}")

    for name, real in measured["states"].items():
        if real or plan["states"].get(name):
            row(name, real, plan["states"].get(name, 0))
    for name in PHASES:
        row(f"peak in {name}", measured["phases"][name], plan["phases"][name])
    row("peak", measured["peak"], plan["peak"])
    if "reserved" in measured:
        lines.append(f"{'held by the allocator':24}{measured['reserved'] / gib:10.3f}")
        lines.append(f"{'outside of torch':24}{measured['outside_of_torch'] / gib:10.3f}")
    seconds = measured["seconds"]
    lines.append(
        f"seconds: micro-batch {seconds['micro_batch']:.3g} (forward {seconds['forward']:.3g}, backward "
        f"{seconds['backward']:.3g}), update {seconds['update']:.3g}, loading {seconds['loading']:.3g}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    exit_now(main())
