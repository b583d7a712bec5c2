"""The contenders of benchmarks.step and benchmarks.kernels, each a program for one rank:

python -m benchmarks.contenders fullft|bare RECIPE.yaml [key=value …] --turns FD
python benchmarks/trl_contender.py …                                              (TRL, in its own environment)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.turns import Ended, Turns


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=["fullft", "bare"])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--turns", type=int, required=True)
    arguments = parser.parse_intermixed_args()
    turns = Turns(arguments.turns)

    from fullft import cluster
    from fullft.preflight import preflight
    from fullft.recipe import load_recipe

    me, recipe = cluster.discover(), load_recipe(arguments.recipe, arguments.overrides)
    inputs = preflight(recipe, me.world_size, room=False)  # runs here are left before they write anything large
    cluster.join(me, recipe.train.timeout_minutes)
    turns.in_use = in_use(recipe, inputs)
    if arguments.kind == "fullft":
        turns.end(**fullft(recipe, me, inputs, turns))
    turns.end(**bare(recipe, me, inputs, turns))


def in_use(recipe: Any, inputs: Any) -> dict[str, Any]:
    """What this rank runs with, whatever `auto` came to, and bytes of its training state."""
    import torch

    from fullft import attention, model

    name, gpu = inputs.attention.name, torch.cuda.is_available()
    place = {"dtype": model.precision(recipe), "device": "cuda" if gpu else "cpu"}
    if name == "varlen" and not attention._has_kernel(torch.empty(1, 1, 1, inputs.attention.layers[0].size, **place)):
        name = "varlen, a call per document"
    return {
        "attention": name, "kernels": inputs.plan["kernels"], "mlp_tiles": recipe.train.mlp_tiles,
        "activation_checkpointing": inputs.plan["activation_checkpointing"],
        "state_bytes": inputs.plan["device_bytes_per_rank"],
    }  # fmt: skip


class Watched:
    """`Batches` that tells when the loop asks for those of a step, which is where a step of the loop begins."""

    def __init__(self, batches: Any, turns: Turns) -> None:
        self._batches, self._turns = batches, turns

    def of_step(self, step: int, rank: int) -> Any:
        self._turns.step_begins()
        return self._batches.of_step(step, rank)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)


def fullft(recipe: Any, me: Any, inputs: Any, turns: Turns) -> dict[str, Any]:
    """The whole of `fullft.trainer.train`, as launch/train.py calls it; it is left where its last turn ends."""
    import dataclasses

    from fullft import lease, signals
    from fullft.trainer import train

    signals.listen(recipe, me)
    signals.enter("loading")
    lease.take_together(recipe.run_folder, recipe.checkpoint.lease_seconds)
    try:
        train(recipe, me, dataclasses.replace(inputs, batches=Watched(inputs.batches, turns)))
    except Ended:
        rows = [json.loads(line) for line in (Path(recipe.run_dir) / "metrics.jsonl").read_text().splitlines()]
        return {"losses": [row["train/loss"] for row in rows if "train/loss" in row]}
    raise RuntimeError("the run ended before its last turn: train.steps is too small")


def bare(recipe: Any, me: Any, inputs: Any, turns: Turns) -> dict[str, Any]:
    """The least that trains the same model on the same batches: no metrics, no signals, no checkpoints, no checks.
    Batches, and their numbers of labels, are there before the first step."""
    import torch
    import torch.distributed as dist

    from fullft import activations, kernels, model
    from fullft.engine import offloads_optimizer, start
    from fullft.head import Head
    from fullft.loss import IGNORE, LabelWeights
    from fullft.optim import build_optimizer
    from fullft.tiles import tile_mlps

    torch.manual_seed(recipe.train.seed)
    loaded = model.load(recipe, inputs.deepspeed_config, inputs.tokenizer)
    kernels.apply(loaded, inputs.plan["kernels"], inputs.plan["activation_checkpointing"])
    tile_mlps(loaded, recipe.train.mlp_tiles)
    activations.enable(loaded, inputs.plan["activation_checkpointing"])
    optimizer = build_optimizer(loaded, recipe.train, offloads_optimizer(inputs.deepspeed_config))
    engine = start(loaded, optimizer, inputs.deepspeed_config)
    head = Head(engine)
    steps = [list(inputs.batches.of_step(step, me.rank)) for step in range(inputs.total_steps)]
    counts = torch.tensor([float(sum((one.labels != IGNORE).sum() for one in step)) for step in steps])
    counts = counts.to(engine.device)
    dist.all_reduce(counts)
    labels, sums = counts.tolist(), list[Any]()
    try:
        for step, batches in enumerate(steps):
            turns.step_begins()
            sums.append(torch.zeros((), dtype=torch.float64, device=engine.device))
            for batch in (batch.to(engine.device) for batch in batches):
                loss, nats, _ = head.loss(batch, LabelWeights(1 / labels[step], 0.0, 0.0))
                sums[-1] += nats.sum()
                engine.backward(loss * me.world_size, scale_wrt_gas=False)
            engine.step()
    except Ended:
        losses = torch.stack(sums)
        dist.all_reduce(losses)
        return {"losses": (losses / counts[: len(sums)]).tolist()}
    raise RuntimeError("the run ended before its last turn: train.steps is too small")


if __name__ == "__main__":
    main()
