"""Run on every rank: load the base model of a recipe, and write all that the ranks hold to a file.

torchrun ... loaded_model.py RECIPE.yaml OUT.pt
"""

import sys

import deepspeed
import torch
import torch.distributed as dist

from fullft import cluster, engine, model
from fullft.recipe import load_recipe
from fullft.tokenizer import load_tokenizer


def main() -> None:
    recipe = load_recipe(sys.argv[1])
    me = cluster.discover()
    cluster.join(me, 5)
    tokenizer = load_tokenizer(recipe.model)
    precision = model.precision(recipe)
    facts = model.facts(model.on_meta(recipe.model))
    config = engine.read_config(recipe)
    config = engine.fill_config(config, recipe, engine.geometry(recipe, me.world_size), facts, precision)
    loaded = model.load(recipe, config, tokenizer)
    whole = {}
    for name, parameter in loaded.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters([parameter]):
            whole[name] = parameter.detach().clone()
    buffers = {name: buffer.clone() for name, buffer in loaded.named_buffers()}
    largest = max(parameter.ds_tensor.numel() for parameter in loaded.parameters())
    if me.is_main:
        torch.save({"parameters": whole, "buffers": buffers, "largest_shard": largest}, sys.argv[2])
    dist.barrier()
    cluster.leave()


main()
cluster.exit_now(0)
