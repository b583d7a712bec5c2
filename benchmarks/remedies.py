"""What each remedy against forgetting costs in the time of a step: `python -m benchmarks.remedies [--quick]`

One process group trains the same model with each remedy in turn, step by step in a shuffled order, so that what else
the machine does falls on all alike; a remedy's cost is the median over the rounds of its step's time over that of the
step without remedies in the same round. Processor time is given too, which other processes disturb less.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import goal, write

HIDDEN, LAYERS, VOCABULARY = 512, 8, 8000  # 30 M parameters
REMEDIES: dict[str, dict[str, Any]] = {
    "none": {},
    "l2_pull": {"l2_pull": 1.0},
    "layerwise_lr_decay": {"layerwise_lr_decay": 0.8},
    "ema_decay": {"ema_decay": 0.99},
    "kl_weight": {"kl_weight": 1.0},
}  # all with replay, which is what KL is taken on
REPLAY = 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, to see that it runs")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--on-rank", nargs=2, metavar="WORD", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.on_rank:
        on_rank(Path(arguments.on_rank[0]), int(arguments.on_rank[1]))
        return
    with tempfile.TemporaryDirectory(prefix="fullft-benchmark-") as name:
        folder = Path(name)
        write_inputs(
            folder, arguments.sequence_length, *((64, 2, 300) if arguments.quick else (HIDDEN, LAYERS, VOCABULARY))
        )
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            "127.0.0.1:0",
        ]
        command += ["--nproc-per-node", str(arguments.ranks), "-m", "benchmarks.remedies"]
        subprocess.run([*command, "--on-rank", name, str(2 if arguments.quick else arguments.rounds)], check=True)
        measured = json.loads((folder / "measured.json").read_text())
    rows = {name: summary(measured[name], measured["none"]) for name in REMEDIES}
    goals = [
        goal(
            f"step time with {name} over that without", f"<= {limit}", rows[name]["ratio"], rows[name]["ratio"] <= limit
        )
        for name, limit in {name: 1.4 if name == "kl_weight" else 1.15 for name in REMEDIES if name != "none"}.items()
    ]
    write("remedies", {"remedies": rows, "replay": REPLAY, "sequence_length": arguments.sequence_length}, goals)


def summary(seconds: list[list[float]], without: list[list[float]]) -> dict[str, float]:
    """Of (wall, processor) seconds of each round."""
    ratios = [[one[kind] / other[kind] for one, other in zip(seconds, without, strict=True)] for kind in (0, 1)]
    wall, processor = (statistics.median(one) for one in ratios)
    return {
        "seconds": statistics.median(wall for wall, _ in seconds), "ratio": wall, "processor_ratio": processor,
        "ratio_quartiles": statistics.quantiles(ratios[0], n=4)[::2], "rounds": len(seconds),
    }  # fmt: skip


def write_inputs(folder: Path, length: int, hidden: int, layers: int, vocabulary: int) -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent / "launch"))
    import quickstart

    words, generator = [f"w{number}" for number in range(2 * vocabulary)], random.Random(0)
    texts = [" ".join(generator.choices(words, k=2 * length)) for _ in range(400)]
    quickstart.write_random_model(folder / "model", texts, vocabulary, hidden, layers, heads=max(2, hidden // 64))
    for name in ("task", "general"):
        rows = [json.dumps({"text": text}) for text in texts[name == "general" :: 2]]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    recipe = {
        "model": {"path": str(folder / "model")},
        "data": {
            "train": str(folder / "task.jsonl"), "sequence_length": length, "on_too_long": "truncate",
            "replay": [{"path": str(folder / "general.jsonl"), "fraction": REPLAY}],
        },
        "train": {"steps": 100, "global_batch_size": 8, "learning_rate": 1e-5},
    }  # fmt: skip
    (folder / "recipe.json").write_text(json.dumps(recipe))


def on_rank(folder: Path, rounds: int) -> None:
    import torch.distributed as dist

    from fullft import cluster

    me = cluster.discover()
    cluster.join(me, 60)
    recipe = json.loads((folder / "recipe.json").read_text())
    steps = {name: prepared(recipe, name, remedy, folder, me) for name, remedy in REMEDIES.items()}
    measured: dict[str, list[list[float]]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        order = sorted(steps)
        random.Random(number).shuffle(order)
        for name in order:
            dist.barrier()
            started = time.perf_counter(), time.process_time()
            steps[name](number)
            dist.barrier()
            if number:  # the first step of an engine allocates
                measured[name].append([time.perf_counter() - started[0], time.process_time() - started[1]])
    if me.is_main:
        (folder / "measured.json").write_text(json.dumps(measured))
    cluster.leave()
    cluster.exit_now(0)


def prepared(recipe: dict[str, Any], name: str, remedy: dict[str, Any], folder: Path, me: Any) -> Any:
    """A function that makes the step of a number, as `trainer.train` does."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from fullft import lease, model
    from fullft.engine import offloads_optimizer, start
    from fullft.head import Head
    from fullft.loss import LabelWeights
    from fullft.optim import build_optimizer
    from fullft.preflight import preflight
    from fullft.recipe import parse_recipe
    from fullft.retention.base import replay_divergence
    from fullft.retention.pull import attach
    from fullft.trainer import count_tokens

    own = parse_recipe(recipe | {"run_dir": str(folder / name), "train": recipe["train"] | remedy})
    inputs = preflight(own, me.world_size)
    loaded = model.load(own, inputs.deepspeed_config, inputs.tokenizer)
    unset_hf_deepspeed_config()  # else the next model on the meta device would be cut into shards
    optimizer = build_optimizer(loaded, own.train, offloads_optimizer(inputs.deepspeed_config))
    engine = start(loaded, optimizer, inputs.deepspeed_config)
    pull = attach(engine, own.train, {})
    head, divergence = Head(engine), None
    if own.train.kl_weight:
        lease.take_together(own.run_folder, 60)
        divergence, _ = replay_divergence(own, inputs.batches, engine, 0, inputs.total_steps)

    def step(number: int) -> None:
        batches = list(inputs.batches.of_step(number, me.rank))
        task, replay, _ = count_tokens(batches, engine.device)
        of_kl = own.train.kl_weight / inputs.batches.replay_labels_of_step
        weights = LabelWeights.of_step(task, replay, inputs.batches.replay_label_weight, of_kl)
        for batch in (batch.to(engine.device) for batch in batches):
            loss, _, _ = head.loss(batch, weights, divergence)
            engine.backward(loss * me.world_size, scale_wrt_gas=False)
        for group in engine.optimizer.param_groups:
            group["lr"] = own.train.learning_rate * group["lr_scale"]
        engine.step()
        if pull is not None:
            pull.distance()  # of every row that is logged, by default each step's

    return step


if __name__ == "__main__":
    main()
