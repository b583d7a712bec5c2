"""The training data of a recipe: all sets opened, searched for leaks, packed and mixed."""

from __future__ import annotations

import errno
import math
from concurrent.futures import Executor

from transformers import PreTrainedTokenizerBase

from fullft.data.batches import Batches, Geometry
from fullft.data.cache import open_sets
from fullft.data.leaks import find_leaks, index
from fullft.data.mixture import labels_of_step, mix, replay_label_weight
from fullft.data.sequences import Sequences, open_sequences
from fullft.errors import BadInput
from fullft.recipe import Recipe


def open_data(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, executor: Executor | None = None
) -> tuple[list[Sequences], list[str]]:
    """The training sets, prepared and packed, and what is worth telling of them.

    Raises:
        BadInput: see `open_sets` and `open_sequences`; or rows leak and data.on_leak is error.
    """
    try:
        return _open_data(recipe, tokenizer, executor)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BadInput(
                f"data.cache_dir: no space left in {recipe.cache_folder}; free some (4 bytes a token and 52 a row), or "
                "choose another; the parts written so far are used again"
            ) from None
        raise BadInput(f"{error.filename}: {error.strerror} (data.cache_dir is {recipe.cache_folder})") from None


def _open_data(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, executor: Executor | None
) -> tuple[list[Sequences], list[str]]:
    data = recipe.data
    sets = open_sets(data, tokenizer, recipe.cache_folder, executor)
    cache = recipe.cache_folder
    evaluated = [index("validation", data.validation, cache)] if data.validation else []
    evaluated += [index(task.name, [task.data], cache) for task in recipe.retention.tasks if task.data]
    found, warnings, problems = list[Sequences](), list[str](), list[str]()
    for one in sets:
        leaks = find_leaks(one, evaluated, executor)
        lines = leaks.describe(one.name)
        if lines and data.on_leak == "error":
            problems += [*lines, *leaks.examples]
            continue
        what = {"drop": "they are left out", "warn": "data.on_leak=drop leaves them out"}.get(data.on_leak)
        warnings += [f"{line}; {what}" for line in lines]
        try:
            found.append(open_sequences(one, data, leaks.documents if data.on_leak == "drop" else None))
        except BadInput as error:
            problems += error.problems
    if problems:
        raise BadInput(problems)
    return found, warnings


def build_batches(recipe: Recipe, sets: list[Sequences], geometry: Geometry) -> tuple[Batches, int]:
    """The batches of a run, and its number of steps.

    Raises:
        BadInput: the sets may not be repeated as often as train.steps needs.
    """
    data, train = recipe.data, recipe.train
    sizes = [(len(one), one.summary["tokens"]) for one in sets]
    positions = train.steps * geometry.global_batch_size if train.steps else None
    mixture = mix(data.training_sets, data.names, sizes, train.epochs or 1.0, positions)
    steps = train.steps or math.ceil(mixture.total / geometry.global_batch_size)
    capped = [source.max_epochs is not None for source in data.training_sets]
    if positions is None and any(capped) and not all(capped):
        # The last step is filled up to a whole one, but not with a set that has had its epochs.
        whole_steps = steps * geometry.global_batch_size
        mixture = mix(data.training_sets, data.names, sizes, train.epochs or 1.0, whole_steps)
    share = data.replay_weight if data.replay_weight is not None else sum(one.fraction or 0 for one in data.replay)
    labels = [one.summary["trained_tokens"] / len(one) for one in sets]
    weight = replay_label_weight(mixture.rates, labels, len(data.train), share)
    width = data.sequence_length if data.packing else None
    of_step = labels_of_step(mixture.rates, labels, len(data.train), geometry.global_batch_size)
    batches = Batches(sets, mixture, width, geometry, len(data.replay), weight, of_step or 1.0)
    return batches, steps


def unlikely(recipe: Recipe, total_steps: int, batches: Batches) -> list[str]:
    """What is allowed, and most likely not meant."""
    found = []
    sequences = sum(map(len, batches.sets))
    seen = batches.mixture.seen(total_steps * recipe.train.global_batch_size)
    for one, epochs in zip(batches.sets, seen, strict=True):
        if epochs > 8 and len(batches.sets) > 1:
            found.append(f"data set {one.tokens.name} is seen {epochs:.1f} times; cap it with max_epochs")
        if one.summary["too_long_rows"]:
            found.append(
                f"data set {one.tokens.name}: {one.summary['too_long_rows']} rows are above data.sequence_length "
                f"({recipe.data.on_too_long}: {one.summary['tokens_cut']} tokens lost, of them "
                f"{one.summary['trained_tokens_cut']} trained)"
            )
        if bad := one.tokens.summary["bad_rows"]:
            found.append(f"data set {one.tokens.name}: {bad} rows that cannot be used are skipped")
        if lost := one.tokens.summary["rows_with_lost_reasoning"]:
            found.append(f"data set {one.tokens.name}: the chat template leaves out the reasoning of {lost} rows")
    if recipe.train.global_batch_size > sequences:
        found.append(
            f"train.global_batch_size is {recipe.train.global_batch_size}, the data make {sequences} sequences: each "
            "step sees some of them several times"
        )
    if recipe.train.warmup_steps >= total_steps > 1:
        found.append(
            f"train.warmup_steps is {recipe.train.warmup_steps:g} of {total_steps} steps: the peak is not reached"
        )
    return found
