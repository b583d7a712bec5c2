"""Bytes and time of a ZeRO-3 step by the plan, beside those of CPU ranks whose network is really limited.

    python -m benchmarks.network [--quick]

Hosts are network namespaces (tests/hosts.py; needs root), their cables limited by `tc tbf` both ways; ranks are bare
loops over the engine, in fp32. The kernel counts the bytes that each host's eth0 receives.

gloo's algorithms are not NCCL's: what one collective sends is counted by itself first, and the plan's bytes of its kind
are scaled by it. So the count of a step tests which collectives it has and how large they are, and its time the
formula's sum; nothing is fitted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import goal, write
from benchmarks.planner import MODELS
from tests.hosts import Network, unavailable

LAYOUTS = [(2, 1), (4, 1), (2, 2)]  # hosts, ranks of a host
MBIT = [500, 200, 100, 50]  # of each cable, after unlimited
PROBE = 1 << 23  # bytes of a collective by itself
KINDS = ("gather", "reduce_scatter")
# Each module's weights are let go as it ends, as those of large models are; or what `auto` comes to for so small a one.
LIMITS = ("stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size")
SIZES: dict[str, dict[str, Any]] = {"let go": dict.fromkeys(LIMITS, 0), "auto": dict.fromkeys(LIMITS, "auto")}
SIZES["hpZ"] = SIZES["let go"] | {"zero_hpz_partition_size": "auto"}
# Sizes, checkpointing, micro-batches of a step; the first is limited. hpZ where hosts have several ranks.
WAYS = [("let go", "none", 1), ("let go", "full", 1), ("auto", "none", 1), ("hpZ", "none", 1), ("hpZ", "none", 3)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two hosts, one limit")
    quick = parser.parse_args().quick
    if reason := unavailable():
        sys.exit(f"python -m benchmarks.network: {reason}")
    rows: dict[str, Any] = {}
    for hosts, per_host in LAYOUTS[: 1 if quick else None]:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(Path(folder), hosts, per_host, [100] if quick else MBIT)
        rows[f"{hosts} hosts of {per_host}"] = found
        print(json.dumps(found, indent=1), flush=True)
    steps = [one for found in rows.values() for one in found["steps"]]
    worst = max(abs(one["bytes_error"]) for one in steps)
    times = [abs(one["error_without_overlap"]) for one in steps if one["mbit"]]
    goals = [
        goal("bytes that a host receives in a step, worst error of the plan", "≤ 0.05", worst, worst <= 0.05),
        goal("step on a limited network, without overlap, median error", "≤ 0.1", statistics.median(times),
             statistics.median(times) <= 0.1),
    ]  # fmt: skip
    conditions = {"model": MODELS["llama-4m"], "tokens_of_a_rank": 128, "load_average": os.getloadavg()}
    write("network", rows, goals, conditions=conditions)


def measure(folder: Path, hosts: int, per_host: int, limits: list[int]) -> dict[str, Any]:
    """What a collective sends, then steps of all ways at full speed, and of the first at each limit."""
    ranks, steps = hosts * per_host, []
    with Network(folder / "network", [f"n{number}" for number in range(hosts)]) as network:
        for way in WAYS:
            if way[0] == "hpZ" and per_host == 1:
                continue
            with contextlib.ExitStack() as stack:  # DeepSpeed's settings stay in a process
                do = start(stack, network, folder, per_host)
                # Over what a ring's ranks receive: (N - 1) / N of it.
                gloo = {kind: received(do("collective", kind)) / PROBE / (1 - 1 / ranks) for kind in KINDS}
                planned = do("build", *way)[0]["bytes"]
                wanted = sum(size * gloo.get(kind, gloo["gather"]) for kind, size in planned.items())
                fast = do("steps", 5)
                steps.append(row(way, None, fast, wanted, fast, None))
                for limit in limits if way == WAYS[0] else []:
                    limit_cables(network, limit)
                    alone = do("collective", "gather")
                    rate = received(alone) / seconds(alone)
                    steps.append(row(way, limit, do("steps", 3), wanted, fast, rate))
                    limit_cables(network, None)
                do("end")
    return {"received_over_a_ring's": gloo, "steps": steps}


def row(
    way: tuple[str, str, int], limit: int | None, measured: Any, wanted: float, fast: Any, rate: float | None
) -> Any:
    """Measured and planned. rate: bytes/s of a gather by itself over the limited cables."""
    from fullft.planner import speed

    found = {
        "sizes": way[0], "checkpointing": way[1], "micro_batches": way[2], "mbit": limit, "planned_bytes": wanted,
        "received_bytes": received(measured), "bytes_error": wanted / received(measured) - 1,
        "seconds": seconds(measured), "all_seconds": measured[0]["all_seconds"],
    }  # fmt: skip
    if rate is None:
        return found
    compute, wire = seconds(fast), wanted / rate
    overlapped = max(compute, wire) + speed.NOT_HIDDEN * min(compute, wire)
    return found | {
        "gather_mbit": rate * 8 / 1e6, "planned_wire_seconds": wire,
        "planned_seconds_without_overlap": compute + wire, "planned_seconds": overlapped,
        "error_without_overlap": (compute + wire) / seconds(measured) - 1,
        "error": overlapped / seconds(measured) - 1,
    }  # fmt: skip


def received(answers: list[Any]) -> float:
    """Bytes of a host, mean over hosts; the ranks of a host tell the same."""
    return statistics.mean(one["received"] for one in answers)


def seconds(answers: list[Any]) -> float:
    return float(answers[0]["seconds"])


def limit_cables(network: Network, mbit: int | None) -> None:
    """Both ways; None: no limit."""
    shape = f"replace dev {{}} root tbf rate {mbit}mbit burst 64kb latency 400ms" if mbit else "del dev {} root"
    for name, host in network.hosts.items():
        host.run("tc", "qdisc", *shape.format("eth0").split(), check=bool(mbit))
        with contextlib.suppress(*([] if mbit else [RuntimeError])):  # there was none to take away
            network.switch("tc", "qdisc", *shape.format(f"to-{name}").split())


def start(stack: contextlib.ExitStack, network: Network, folder: Path, per_host: int) -> Any:
    """Ranks on all hosts; returns how to ask them all for something, which gives their answers by rank."""
    ranks = []
    for number in range(len(network.hosts) * per_host):
        environment = os.environ | {
            "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0", "RANK": str(number),
            "WORLD_SIZE": str(len(network.hosts) * per_host), "LOCAL_RANK": str(number % per_host),
            "LOCAL_WORLD_SIZE": str(per_host), "MASTER_ADDR": network.addresses["n0"], "MASTER_PORT": "29500",
        }  # fmt: skip
        log = stack.enter_context((folder / f"{number}.log").open("w"))
        command = (sys.executable, "-m", "benchmarks.network", str(folder))
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
        ranks.append(network[f"n{number // per_host}"].popen(*command, env=environment, **pipes))
        stack.callback(ranks[-1].kill)

    def do(*words: Any) -> list[Any]:
        for rank in ranks:
            rank.stdin.write(json.dumps(words) + "\n")
            rank.stdin.flush()
        answers = [rank.stdout.readline() for rank in ranks]
        if not all(answers):
            number = answers.index("")
            raise RuntimeError(f"rank {number} died:\n{(folder / f'{number}.log').read_text()[-3000:]}")
        return [json.loads(answer) for answer in answers]

    return do


# What follows is done by the ranks.


def rank(folder: Path) -> None:
    import torch

    from fullft import cluster

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    torch.set_num_threads(1)
    me = cluster.discover()
    cluster.join(me, 5)
    step: Any = None
    for line in sys.stdin:
        what, *words = json.loads(line)
        answer: dict[str, Any] = {}
        if what == "collective":
            answer = repeated(collective(words[0], me.world_size), 3)
        elif what == "build":
            step, answer["bytes"] = build(folder / f"rank{me.rank}", *words, me.world_size, me.ranks_per_node)
            step()  # of the first one DeepSpeed records the order
        elif what == "steps":
            answer = repeated(step, words[0])
        print(json.dumps(answer), file=out, flush=True)
        if what == "end":
            break
    os._exit(0)


def repeated(act: Any, times: int) -> dict[str, Any]:
    """Bytes that this host received, mean, and seconds, median, of `act`."""
    import torch.distributed as dist

    act()
    dist.barrier()
    before, spans = eth0(), list[float]()
    for _ in range(times):
        started = time.perf_counter()
        act()
        spans.append(time.perf_counter() - started)
    dist.barrier()  # all has come; itself some hundred bytes
    return {"received": (eth0() - before) / times, "seconds": statistics.median(spans), "all_seconds": spans}


def eth0() -> int:
    """Bytes received, headers included, by this host."""
    line = next(one for one in Path("/proc/net/dev").read_text().splitlines() if one.strip().startswith("eth0:"))
    return int(line.split(":")[1].split()[0])


def collective(kind: str, ranks: int) -> Any:
    import torch
    import torch.distributed as dist

    whole, part = torch.zeros(PROBE // 4), torch.zeros(PROBE // 4 // ranks)
    if kind == "gather":
        return lambda: dist.all_gather_into_tensor(whole, part)
    return lambda: dist.reduce_scatter_tensor(part, whole)


def build(
    folder: Path, sizes: str, mode: str, micro_batches: int, ranks: int, per_host: int
) -> tuple[Any, dict[str, float]]:
    """A step, and the bytes by kind that a host receives in it by the plan."""
    from fullft import rehearsal
    from fullft.head import Head
    from fullft.loss import LabelWeights
    from fullft.planner import speed
    from fullft.recipe import parse_recipe

    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(MODELS["llama-4m"]))
    zero = {
        "stage": 3, "overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": 500_000,
        "sub_group_size": "auto", "stage3_param_persistence_threshold": "auto",
    }  # fmt: skip
    (folder / "zero3.json").write_text(json.dumps({"zero_optimization": zero | SIZES[sizes]}))
    recipe = parse_recipe({
        "run_dir": str(folder / "run"), "model": {"path": str(folder)}, "deepspeed": str(folder / "zero3.json"),
        "data": {"train": [str(folder / "none.jsonl")], "sequence_length": 128},
        "train": {
            "steps": 1, "global_batch_size": micro_batches * ranks, "activation_checkpointing": mode,
            "precision": "fp32",
        },
    })  # fmt: skip
    setting = rehearsal.setting_to_rehearse(recipe, ranks, "cpu", per_host)
    engine, _ = rehearsal.build(recipe, setting, per_host)
    head, batch = Head(engine), rehearsal.packed_batch(setting)
    weights = LabelWeights.of_step(micro_batches * setting.tokens * ranks, 0, 1.0, 0.0)

    def step() -> None:
        for _ in range(micro_batches):
            loss, *_ = head.loss(batch, weights)
            engine.backward(loss * ranks, scale_wrt_gas=False)
        engine.step()

    moved = speed.traffic(setting)
    return step, {kind: micro_batches * one.network * per_host for kind, one in moved.items()}


if __name__ == "__main__":
    rank(Path(sys.argv[1])) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else main()
