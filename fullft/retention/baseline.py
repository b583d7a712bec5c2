"""What a run compares with: the items of step 0, and what the suite of its tasks was. Read and checked at a resume."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fullft.errors import BadInput
from fullft.loss import IGNORE
from fullft.report.wording import amount
from fullft.retention import stats
from fullft.retention.gate import can_breach
from fullft.retention.stats import ItemRecord
from fullft.retention.tasks import Prepared

if TYPE_CHECKING:
    from fullft.retention.suite import Suite

FORMAT = "fullft-suite/1"


def file_name(step: int) -> str:
    return f"step-{step:08d}"


def describe(suite: Suite) -> dict[str, Any]:
    """Content of retention/suite.json. `tasks` is what must be the same at a resume; the rest may change."""
    settings = suite.settings
    return {
        "format": FORMAT,
        "tasks": suite.described,
        "looks_planned": suite.looks_planned,
        "confidence": settings.confidence,
        "limits": {task.name: _limit(suite, task) for task in suite.tasks if task.measures == "retention"},
        "versions": {name: version(name) for name in ("torch", "transformers", "scipy")},
    }


def describe_task(task: Prepared) -> dict[str, Any]:
    """What decides a task's numbers, but for the model."""
    hashes = "".join(item.key for item in task.items)
    return {
        "kind": task.kind, "measures": task.measures, "metric": task.metric, "higher_is_better": task.higher_is_better,
        "n": len(task.items), "chance": task.chance, "items_sha256": hashlib.sha256(hashes.encode()).hexdigest(),
        "tokens_sha256": _tokens_sha256(task), "max_new_tokens": task.max_new_tokens,
        "answer_pattern": task.answer_pattern,
    }  # fmt: skip


def _tokens_sha256(task: Prepared) -> str:
    """Of all ids that are run, with their labels and stops: data.sequence_length, chat template and tokenizer count."""
    digest = hashlib.sha256()
    for item in task.items:
        if task.harness is not None:
            runs = task.harness[item.number].runs
        else:
            runs = [item.windows, item.pairs, item.prompt, item.stop_ids, item.stop_strings]
        digest.update(json.dumps(runs, default=vars).encode())
    return digest.hexdigest()


def smallest_drops(suite: Suite) -> list[str]:
    """One line a task: what it is able to show, before anything is measured."""
    lines = []
    for task in suite.tasks:
        sizes: list[float] = [1] * len(task.items)
        if task.kind == "text" and task.metric == "bits_per_byte":
            sizes = [item.text_bytes or 1 for item in task.items]
        elif task.kind == "text":
            sizes = [sum(label != IGNORE for _, labels in item.windows for label in labels) for item in task.items]
        clusters = clusters_of(task)
        if clusters < 2:
            lines.append(f"{task.measures} {task.name}: {_too_few(task)} can show no drop, as its error is not known")
            continue
        drop, assumed = stats.smallest_drop(task.metric, sizes, clusters, suite.settings.confidence)
        together = f" in {clusters:,} clusters" if clusters < len(sizes) else ""
        lines.append(
            f"{task.measures} {task.name}: {len(sizes):,} items{together} show a drop of "
            f"{amount(task.metric, drop)} with {stats.POWER:.0%} power, {assumed}"
        )
    return lines


def clusters_of(task: Prepared) -> int:
    return len({("item", item.number) if item.cluster is None else item.cluster for item in task.items})


def never_breached(suite: Suite) -> tuple[list[str], list[str]]:
    """(problems, warnings): retention tasks of which the gate can never tell a loss, whatever happens. A problem if a
    run is to be stopped or rolled back by them, and there are no others."""
    action, confidence = suite.settings.gate.action, suite.settings.confidence
    retained = [task for task in suite.tasks if task.measures == "retention"]
    found = [
        f"task {task.name}: {_too_few(task)} can never show a loss of more than "
        f"{amount(task.metric, _limit(suite, task))} (max_drop), so retention.gate never acts on it; give it more"
        for task in retained
        if not can_breach(task.kind, len(task.items), clusters_of(task), _limit(suite, task), confidence)
    ]
    if action == "none":
        return [], []
    return (found, []) if action != "alert" and len(found) == len(retained) else ([], found)


def _limit(suite: Suite, task: Prepared) -> float:
    return suite.settings.gate.max_drop if task.max_drop is None else task.max_drop


def _too_few(task: Prepared) -> str:
    items = f"{len(task.items):,} item" + ("s" if len(task.items) > 1 else "")
    return f"{items} in one cluster" if clusters_of(task) < 2 and len(task.items) > 1 else items


def problems(suite: Suite) -> list[str]:
    """Why a run folder that has checkpoints cannot go on measuring: its tasks were others, or step 0 is lost."""
    if not (suite.folder / "suite.json").exists():
        return [
            f"run_dir: {suite.folder.parent} has checkpoints and no retention/suite.json: it was measured by an older "
            "version of fullft, or what it measured was lost; use another run_dir"
        ]
    try:
        require_same(suite, suite.folder)
        read(suite.folder, suite.tasks)
    except BadInput as error:
        return error.problems
    return []


def require_same(suite: Suite, folder: Path) -> None:
    """That the evaluations in a folder are of the suite's tasks, measured alike. Keys that only one of the two has, of
    another version of fullft, do not count, nor does a folder without suite.json.

    Raises:
        BadInput: they are not, or suite.json is damaged.
    """
    file = folder / "suite.json"
    if not file.exists():
        return
    try:
        stored = json.loads(file.read_text())["tasks"]
        wrong = {name: _difference(task, stored.get(name)) for name, task in suite.described.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{file} cannot be read ({error}); put it back, or use another run_dir") from None
    if any(wrong.values()):
        raise BadInput([
            f"task {name}: {text} not those that {file} says were measured before; put them back, or use another "
            "run_dir" for name, text in wrong.items() if text
        ])  # fmt: skip


def _difference(task: dict[str, Any], stored: dict[str, Any] | None) -> str:
    """What of a task is not as it was, with its verb; empty if nothing."""
    changed = [key for key in task if stored is not None and key in stored and stored[key] != task[key]]
    if stored is None or {"items_sha256", "n"} & set(changed):
        return "its items are"
    if changed == ["tokens_sha256"]:
        return "the tokens of its items (data.sequence_length, chat template, tokenizer) are"
    return f"its {', '.join(key for key in changed if key != 'tokens_sha256')} are" if changed else ""


def read(folder: Path, tasks: Sequence[Prepared]) -> dict[str, list[ItemRecord]]:
    """The records of step 0 of every task.

    Raises:
        BadInput: a file of them is missing, damaged, or of other items.
    """
    found: dict[str, list[ItemRecord]] = {}
    wrong: list[str] = []
    for task in tasks:
        file = folder / "items" / f"{file_name(0)}.{task.name}.jsonl"
        try:
            records = [json.loads(line) for line in file.read_text().splitlines()]
            if [record["hash"] for record in records] != [item.key for item in task.items]:
                raise ValueError(f"it has {len(records)} items, the task {len(task.items)}, or other ones")
        except (OSError, ValueError, KeyError, TypeError) as error:
            wrong.append(
                f"task {task.name}: {file}, what the base model could do, cannot be used ({error}); nothing can be "
                "compared without it. Put it back, or train into another run_dir"
            )
        else:
            found[task.name] = records
    if wrong:
        raise BadInput(wrong)
    return found
