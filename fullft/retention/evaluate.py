"""Measure a model that is trained already with the tasks of a recipe: `fullft eval`.

The same suite as in training, on a ZeRO-3 engine that holds the weights alone, 2 bytes a parameter over all ranks: one
process, or as many as a launcher starts.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from fullft import cluster, lease, model
from fullft.cluster import Cluster
from fullft.engine import start
from fullft.errors import BadInput
from fullft.preflight import Measured, preflight_evaluation
from fullft.recipe import Recipe, load_recipe
from fullft.report.summary import summary_lines
from fullft.retention import baseline
from fullft.retention.baseline import file_name
from fullft.retention.blend import folder_of, pairs_of_model, set_weights
from fullft.retention.evaluation import Evaluation
from fullft.tokenizer import load_tokenizer


def evaluate(recipe: Recipe, name: str, base: str | None, out: Path, me: Cluster) -> Evaluation:
    """Measure a model; write the evaluation with its items into the folder `out`. All ranks together.

    Args:
        name: folder, run folder (its export) or hub name.
        base: what it is compared with, item by item: a folder with an evaluation (of a run, or an earlier `out`), whose
            step 0 is taken, or a model of the same architecture, which is measured first.

    Raises:
        BadInput: something does not fit, or there is something in `out` already.
    """
    require_new(out)
    of_recipe, recipe = recipe.model, for_evaluation(recipe, name, out)
    ready = preflight_evaluation(recipe, me.world_size)
    known = base is not None and Path(base, "retention", f"{file_name(0)}.json").exists()
    pairs = None
    if base is not None and not known:
        require_shards(ready)
        folders = folder_of(model_of(base), of_recipe), folder_of(recipe.model.path, recipe.model)
        pairs = pairs_of_model(*folders, ready.meta, recipe.model.trust_remote_code)
    elif base is not None:
        require_same_tasks(ready, Path(base, "retention"))
    cluster.join(me, recipe.train.timeout_minutes)
    cluster.require_same_code()
    if me.is_main:
        out.mkdir(parents=True, exist_ok=True)
        lease.write(out / "recipe.yaml", recipe.to_yaml())
        if known:
            _copy_base(Path(str(base), "retention"), out / "retention")
    engine = start_engine(recipe, ready, read=pairs is None)
    if pairs is not None:
        set_weights(engine, pairs, 0)
        tell(ready.suite.evaluate(engine, 0), f"base model {base}", me)
        set_weights(engine, pairs, 1)
    evaluation = ready.suite.evaluate(engine, 0 if base is None else 1)
    tell(evaluation, name, me)
    if me.is_main:
        print(f"written to {out}", flush=True)
    return evaluation


def tell(evaluation: Evaluation, what: str, me: Cluster) -> None:
    if me.is_main:
        print("\n".join([what, *summary_lines(evaluation)]), flush=True)


def model_of(name: str) -> str:
    """A model as it was given; of a run folder, its export. Raises BadInput if that is not there."""
    folder = Path(name)
    if not is_run(folder):
        return name
    if not (folder / "export" / "config.json").exists():
        raise BadInput(f"{folder} has no export yet; `fullft export {folder} OUT` makes one of a checkpoint")
    return str(folder / "export")


def base_and_tuned(models: list[str]) -> tuple[str, str, Recipe | None]:
    """([BASE,] TUNED) as given → base, tuned, and the recipe of the latter if it is a run folder.

    Raises:
        BadInput: no base, and the tuned model is not a run folder, whose recipe knows it.
    """
    *before, tuned = models
    recipe = load_recipe(Path(tuned) / "recipe.yaml") if is_run(Path(tuned)) else None
    if len(before) > 1:
        raise BadInput(f"{', '.join(models)}: too many models, give [BASE] TUNED")
    if not before and recipe is None:
        raise BadInput(f"{tuned} is not a run folder, so its base is not known: give BASE before it")
    return (before[0] if before else recipe.model.path if recipe else ""), tuned, recipe


def is_run(folder: Path) -> bool:
    return (folder / "recipe.yaml").exists() and not (folder / "config.json").exists()


def require_new(folder: Path) -> None:
    """Raises BadInput for a folder with anything in it, and for one that cannot be made."""
    require_possible(folder)
    if folder.exists() and any(folder.iterdir()):
        raise BadInput(f"{folder} exists, nothing is overwritten; remove it, or give another folder with --out")


def require_possible(folder: Path) -> None:
    """Raises BadInput for a folder whose place is taken by a file."""
    if file := next((one for one in (folder, *folder.parents) if one.exists() and not one.is_dir()), None):
        raise BadInput(f"--out: {folder} cannot be made: {file} is a file")


def for_evaluation(recipe: Recipe, name: str, out: Path) -> Recipe:
    """The recipe with another model and run folder, without what belongs to a training."""
    path = model_of(name)
    of_recipe = recipe.model
    same = path == of_recipe.path
    plain = {"path": path, "revision": of_recipe.revision if same else None, "new_tokens": ()}
    chosen = of_recipe.model_copy(update=plain)
    known = load_tokenizer(chosen).get_vocab()
    chosen = chosen.model_copy(update={"new_tokens": tuple(one for one in of_recipe.new_tokens if one not in known)})
    gate = recipe.retention.gate.model_copy(update={"action": "none"})
    whole = {"every_steps": None, "max_overhead": None, "gate": gate}
    return recipe.model_copy(
        update={
            "run_dir": str(out),
            "model": chosen,
            "train": recipe.train.model_copy(update={"activation_checkpointing": "none"}),
            "retention": recipe.retention.model_copy(update=whole),
        }
    )


def require_shards(ready: Measured) -> None:
    if ready.why_not_by_shards:
        raise BadInput(
            f"two models cannot be measured in one start, since {ready.why_not_by_shards}; evaluate the base by "
            "itself, and give its folder as --base"
        )


def require_same_tasks(ready: Measured, folder: Path) -> None:
    """Raises BadInput when an evaluation has not the items that the suite measures, or measured them otherwise."""
    try:
        baseline.require_same(ready.suite, folder)
        baseline.read(folder, ready.suite.tasks)
    except BadInput as error:
        advice = "(measured with another recipe, or other data? A model given as --base is measured anew)"
        raise BadInput([f"--base: {problem.partition(';')[0]} {advice}" for problem in error.problems]) from None


def _copy_base(source: Path, target: Path) -> None:
    """The evaluation of step 0 with its items."""
    for file in source.glob(f"**/{file_name(0)}.*"):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)


def start_engine(recipe: Recipe, ready: Measured, read: bool) -> Any:
    """An engine for evaluation, without optimizer; its weights zero if they are not to be read. All ranks together."""
    return start(model.load(recipe, ready.deepspeed_config, ready.tokenizer, read), None, ready.deepspeed_config)
