"""Run on every rank: load the base model of a recipe, and print by how much resident memory has grown at most, MB.

torchrun ... peak_memory.py RECIPE.yaml
"""

import sys
from pathlib import Path

from fullft import cluster, engine, model
from fullft.recipe import load_recipe
from fullft.tokenizer import load_tokenizer


def resident(kind: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith(f"{kind}:"))
    return int(kib) * 1024 / 1e6


def main() -> None:
    recipe = load_recipe(sys.argv[1])
    me = cluster.discover()
    cluster.join(me, 5)
    tokenizer = load_tokenizer(recipe.model)
    facts = model.facts(model.on_meta(recipe.model))
    plan = engine.geometry(recipe, me.world_size)
    config = engine.fill_config(engine.read_config(recipe), recipe, plan, facts, model.precision(recipe))
    attention = model.attention_of(recipe.model)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = resident("VmRSS")
    model.load(recipe, config, tokenizer, attention=attention)
    print(f"grew by {resident('VmHWM') - before:.0f} MB", flush=True)
    cluster.leave()


main()
cluster.exit_now(0)
