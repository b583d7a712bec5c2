"""Run on every rank: two steps with a moving average of the weights, which is put in the model and out again.

torchrun ... averaged_weights.py RECIPE.yaml
"""

import sys

import torch

from fullft import cluster, engine, model
from fullft.errors import Preempted
from fullft.optim import build_optimizer
from fullft.recipe import load_recipe
from fullft.retention.pull import attach, averaged
from fullft.tokenizer import load_tokenizer

IDS = torch.arange(4, 36)[None]


def main() -> None:
    recipe = load_recipe(sys.argv[1])
    me = cluster.discover()
    cluster.join(me, 5)
    hidden = model.facts(model.on_meta(recipe.model)).hidden_size
    plan, precision = engine.geometry(recipe, me.world_size), model.precision(recipe)
    config = engine.fill_config(engine.read_config(recipe), recipe, plan, hidden, precision)
    loaded = model.load(recipe, config, load_tokenizer(recipe.model))
    running = engine.start(loaded, build_optimizer(loaded, recipe.train, offload=False), config)
    attach(running, recipe.train, {})
    for _ in range(2):
        running.backward(running(input_ids=IDS, labels=IDS, use_cache=False).loss, scale_wrt_gas=False)
        running.step()
    before = state(running)
    with averaged(running) as weights:
        assert weights == "ema"
        assert not same(state(running), before)
    assert same(state(running), before)
    try:
        with averaged(running):
            raise Preempted  # a signal in an evaluation
    except Preempted:
        pass
    assert same(state(running), before)
    print(f"rank {me.rank}: bit for bit")
    cluster.leave()


@torch.no_grad()
def state(running: torch.nn.Module) -> list[torch.Tensor]:
    """The shards that forward uses, and what it gives."""
    running.eval()
    logits = running(input_ids=IDS, use_cache=False).logits.clone()
    running.train()
    return [logits, *(parameter.ds_tensor.clone() for parameter in running.module.parameters())]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, one, other))


main()
cluster.exit_now(0)
