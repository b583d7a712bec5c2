"""How much time evaluations may take: told before training by an estimate, and kept to while training by the clock."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fullft import lease
from fullft.recipe import Recipe
from fullft.retention.baseline import file_name
from fullft.retention.tasks import Item, Pair, Prepared, Prompt, Window
from fullft.state import read_json

_TIMED_STEPS = 5  # before the decision; of more than one the first is left out, which is slower
_MOST_LOOKS = 20  # evaluations while training: more tell nothing more, and each is one more chance of a false alarm
_FEWEST_ITEMS = 20  # of a task, however small the budget
# In forward passes of one token: backward costs twice the forward, and a generated token, for which all weights are
# read for a few prompts, about ten times as much as one of a prompt.
_TRAINED, _RECOMPUTED, _GENERATED = 3, 4, 10
# Below about a minute of a suite there is no use in refusing it: FLOP/s of one rank, low on purpose.
_GPU_FLOPS, _CPU_FLOPS, _SHORT_SECONDS = 1e14, 1e10, 60


class Budget:
    """When to evaluate, and on which items, under retention.max_overhead.

    The evaluation at step 0, which is whole, is timed, then the first steps are; rank 0 decides for all, once:
    without retention.every_steps how often, at most 20 times; with it, which share of each task's items (those with
    the lowest hashes, so always the same). The last evaluation is whole again. The decision stands in
    retention/budget.json, where a resumed run finds it; another max_overhead or every_steps is another decision.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.max_overhead, self.asked = recipe.retention.max_overhead, recipe.retention.every_steps
        self.file = recipe.run_folder / "retention" / "budget.json"
        self.total_steps: int | None = None  # of the run; None: every evaluation is whole
        self._known: dict[str, Any] | None = None  # content of the file, on all ranks
        self._timed: list[float] = []
        self._seconds = [0.0, 0.0]  # since this start: of steps, of evaluations after step 0

    @property
    def every_steps(self) -> int | None:
        """Steps between evaluations; None: only the first and the last, or not decided yet."""
        if self.max_overhead is None:
            return self.asked
        return (self._known or {}).get("every_steps", self.asked)

    def is_due(self, step: int, seconds: float) -> bool:
        """Whether to evaluate after `step`, which took so long. All ranks together, after every step."""
        self._seconds[0] += seconds
        asked = self.asked is not None and step % self.asked == 0
        if self.max_overhead is not None and "share" not in self._load():
            self._timed.append(seconds)
            if asked or len(self._timed) >= _TIMED_STEPS:
                self._decide()
        every = self.every_steps
        return step == self.total_steps or (every is not None and step % every == 0)

    def tasks(self, tasks: Sequence[Prepared], step: int) -> list[Prepared]:
        """What is evaluated at a step: the tasks whole, or a part of their items. All ranks together."""
        if self.max_overhead is None or self.total_steps is None or step in (0, self.total_steps):
            return list(tasks)
        share = self._load().get("share", 1.0)
        return [replace(task, items=part_of(task.items, share)) for task in tasks]

    def took(self, step: int, seconds: float, fixed: float = 0.0) -> None:
        """The time of an evaluation, and what of it does not depend on the number of items (divergence and drift); that
        at step 0 is what the decision is made from."""
        if step > 0:
            self._seconds[1] += seconds
        elif self.max_overhead is not None and dist.get_rank() == 0:
            self._write({"base_seconds": seconds, "fixed_seconds": fixed})

    @property
    def share_of_training(self) -> float | None:
        """Time of the evaluations since this start, but for that at step 0, over that of the steps."""
        steps, evaluations = self._seconds
        return evaluations / steps if steps else None

    def _load(self) -> dict[str, Any]:
        """What rank 0 finds in the file, unless it was decided for another wish."""
        if self._known is None:
            found: list[Any] = [{}]
            if dist.get_rank() == 0:
                found = [read_json(self.file) or {"base_seconds": _seconds_of_base(self.file.parent)}]
                if found[0].get("asked") != self._asked():
                    found = [{name: found[0].get(name) for name in ("base_seconds", "fixed_seconds")}]
            dist.broadcast_object_list(found, src=0)
            self._known = found[0]
        return self._known

    def _asked(self) -> list[Any]:
        return [self.max_overhead, self.asked, self.total_steps]

    def _decide(self) -> None:
        decided: list[Any] = [None]
        if dist.get_rank() == 0:
            step_seconds = statistics.median(self._timed[1:] or self._timed)
            base_seconds = self._load().get("base_seconds")
            fixed = self._load().get("fixed_seconds") or 0.0
            every, share = decide(
                self.max_overhead or 1, self.asked, self.total_steps or 1, step_seconds, base_seconds, fixed
            )
            decided = [{"asked": self._asked(), "base_seconds": base_seconds, "fixed_seconds": fixed,
                        "step_seconds": step_seconds, "every_steps": every, "share": share}]  # fmt: skip
            self._write(decided[0])
            how = f"every {every} steps" if every else "only at the end"
            part = "" if share == 1 else f", on {share:.1%} of the items ({_FEWEST_ITEMS} of each task at least)"
            print(
                f"retention.max_overhead {self.max_overhead:g}: a step takes {step_seconds:.2f} s and an evaluation "
                f"{base_seconds or 0:.1f} s; evaluating {how}{part}",
                flush=True,
            )
        dist.broadcast_object_list(decided, src=0)
        self._known = decided[0]

    def _write(self, content: dict[str, Any]) -> None:
        try:
            lease.write(self.file, json.dumps(content, indent=1))
        except OSError as error:  # a full disk does not end a training
            print(f"WARNING: {self.file} cannot be written ({error}); a resumed run decides anew", flush=True)


def decide(
    max_overhead: float,
    asked: int | None,
    total: int,
    step_seconds: float,
    base_seconds: float | None,
    fixed_seconds: float = 0.0,
) -> tuple[int | None, float]:
    """(steps between evaluations or None, share of the items) that keep the evaluations between first and last in time.

    Args:
        max_overhead: their time over that of all steps; asked: retention.every_steps; total: steps of the run.
        base_seconds: of a whole evaluation; None if it is not known, and then nothing is left out of what was asked.
        fixed_seconds: what of them each evaluation takes, on however few items.
    """
    budget = max_overhead * total * step_seconds
    if asked is None:
        looks = min(_MOST_LOOKS, total - 1, int(budget / base_seconds)) if base_seconds else 0
        return (-(-total // (looks + 1)) if looks > 0 else None), 1.0
    looks = (total - 1) // asked
    if not looks or not base_seconds or base_seconds <= fixed_seconds:
        return asked, 1.0
    return asked, min(1.0, max(0.0, budget / looks - fixed_seconds) / (base_seconds - fixed_seconds))


def part_of(items: Sequence[Item], share: float) -> list[Item]:
    """The share of the items with the lowest hashes, in their order; twenty at least, or all."""
    count = max(_FEWEST_ITEMS, round(share * len(items)))
    chosen = sorted(items, key=lambda item: (item.key, item.number))[:count]
    return sorted(chosen, key=lambda item: item.number)


def _seconds_of_base(folder: Path) -> float | None:
    """What the evaluation at step 0 says that it took, where the budget was wished for later."""
    return read_json(folder / f"{file_name(0)}.json").get("seconds")


# Before training


def evaluation_tokens(tasks: Sequence[Prepared]) -> int:
    """What one whole evaluation costs, in forward passes of one token."""
    total = 0
    for task in tasks:
        inputs = set[tuple[int, ...]]()  # of pairs: those with the same one, e.g. the letters of a question, run once
        for run in _runs(task):
            if isinstance(run, Prompt):
                total += len(run.ids) + _GENERATED * run.max_new_tokens
            elif isinstance(run, tuple):
                inputs.add((*run[0], *run[1][:-1]))
            else:
                total += sum(len(ids) for ids, _ in run)
        total += sum(map(len, inputs))
    return total


def _runs(task: Prepared) -> Iterator[Pair | list[Window] | Prompt]:
    """All that a task runs."""
    for item in task.items:
        if task.harness is not None:
            yield from task.harness[item.number].runs
        elif task.kind == "generate":
            yield Prompt(item.prompt, task.max_new_tokens)
        else:
            yield item.windows
            yield from item.pairs


def too_long(
    recipe: Recipe,
    tasks: Sequence[Prepared],
    trained_tokens: float,
    total_steps: int,
    parameters: int,
    ranks: int,
    on_gpu: bool,
    compared_tokens: int = 0,
) -> tuple[list[str], list[str]]:
    """(problems, warnings) if all evaluations of a run would take longer than its training.

    A suite of less than about a minute is warned of, not refused; with retention.max_overhead neither.
    `compared_tokens`: on which an evaluation measures the divergence from the base model.
    """  # fmt: skip
    every = recipe.retention.every_steps
    looks = 2 + ((total_steps - 1) // every if every else 0)
    once = evaluation_tokens(tasks) + compared_tokens
    training = trained_tokens * (
        _RECOMPUTED if recipe.train.activation_checkpointing in ("full", "offload") else _TRAINED
    )
    if recipe.retention.max_overhead is not None or looks * once <= training:
        return [], []
    costs = {task.name: evaluation_tokens([task]) for task in tasks} | {"retention.kl_tokens": compared_tokens}
    largest = sorted(filter(costs.get, costs), key=lambda name: -costs[name])[:3]
    text = (
        f"retention: {looks} evaluations would take longer than the training: {looks} × {once:,.0f} forward passes of "
        f"a token against {training:,.0f} (a token of training counts {training / max(trained_tokens, 1):.0f}, a "
        f"generated one {_GENERATED}). Most is {', '.join(f'{name} ({costs[name] / once:.0%})' for name in largest)}: "
        "give it fewer items (data.limit, or limit of a harness task) or a lower max_new_tokens, evaluate less often "
        "(retention.every_steps), or set retention.max_overhead, which keeps to a share of the training time"
    )
    seconds = 2 * parameters * once * looks / (ranks * (_GPU_FLOPS if on_gpu else _CPU_FLOPS))
    return ([], [text]) if seconds < _SHORT_SECONDS else ([text], [])
