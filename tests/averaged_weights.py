"""Run on every rank: two steps with a moving average of the weights, which is put in the model and out again; and a
pull to the base weights that leaves rows of new tokens alone.

torchrun ... averaged_weights.py RECIPE.yaml
"""

import sys
from typing import Any

import torch

from fullft import cluster, engine, model
from fullft.errors import Preempted
from fullft.optim import build_optimizer
from fullft.recipe import load_recipe
from fullft.retention.pull import Pull, attach, averaged
from fullft.shards import optimizer_shards, own_part
from fullft.tokenizer import load_tokenizer

EMBEDDING = "model.embed_tokens.weight"
IDS = torch.arange(4, 36)[None]


def main() -> None:
    recipe = load_recipe(sys.argv[1])
    me = cluster.discover()
    cluster.join(me, 5)
    tokenizer = load_tokenizer(recipe.model)
    meta = model.on_meta(recipe.model, tokenizer)
    facts = model.facts(meta)
    plan, precision = engine.geometry(recipe, me.world_size), model.precision(recipe)
    config = engine.fill_config(engine.read_config(recipe), recipe, plan, facts, precision)
    loaded = model.load(recipe, config, tokenizer)
    running = engine.start(loaded, build_optimizer(loaded, recipe.train, offload=False), config)
    new_rows = model.new_rows(recipe, meta, config, tokenizer)
    pull = attach(running, recipe.train, new_rows)
    assert pull is not None
    base = {name: parameter.ds_tensor.clone() for name, parameter in running.module.named_parameters()}
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
    assert pulled_back(running, pull, base, new_rows) == sum(end - start for start, end in new_rows[EMBEDDING])
    print(f"rank {me.rank}: new rows are left alone")
    cluster.leave()


@torch.no_grad()
def pulled_back(
    running: Any, pull: Pull, base: dict[str, torch.Tensor], new_rows: dict[str, list[tuple[int, int]]]
) -> float:
    """Move all weights far away, pull them back to the base at once, and count those that stay: all of new rows."""
    assert pull.distance() > 0
    for flat in running.optimizer.fp32_partitioned_groups_flat:
        flat.fill_(5.0)
        pull.apply(flat, 1 / pull.strength)
    left = 0
    for name, parameter, states in optimizer_shards(running):
        first, shard = own_part(parameter)
        place = first + torch.arange(len(shard))
        new = torch.zeros(len(shard), dtype=torch.bool)
        for start, end in new_rows.get(name, ()):
            new |= (start <= place) & (place < end)
        values = states["weight"][: len(shard)]
        assert (values[new] == 5).all()
        assert torch.equal(values[~new], base[name][: len(shard)][~new])
        left += int(new.sum())
    assert pull.distance() == 0
    return cluster.sum_over_ranks(left, device=running.device)[0]


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
