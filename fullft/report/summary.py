"""What a run has come to: a table on the terminal, report.json, and the model card of the export."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fullft import __version__, lease
from fullft.errors import BadInput
from fullft.recipe import Recipe, fingerprint
from fullft.report import runlog
from fullft.report.page import page
from fullft.report.runlog import Log, evaluations, generations, read_log, rollbacks, thin
from fullft.report.wording import Evaluation, change, gain, shown, verdict
from fullft.state import read_json

_FORMAT = "fullft-report/1"
_OF_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError)  # in a file that was read
_COLUMNS = ("measures", "task", "number", "before", "after")


def summary_lines(evaluation: Evaluation) -> list[str]:
    """One line a task: its numbers, and the change to the base model."""
    lines = []
    for name, task in evaluation["tasks"].items():
        numbers = {task["metric"]: task["score"]} | task["extra"]
        text = ", ".join(f"{key} {shown(key, value)}" for key, value in numbers.items() if key != "tokens")
        lines.append(f"  {task['measures']:<9} {name}: {text}{_change(name, task) if evaluation['step'] else ''}")
    return lines


def _change(name: str, task: dict[str, Any]) -> str:
    """The change since step 0 and its verdict, in the words of the report."""
    one = change(name, task)
    if one is None:
        return ""
    if not one.gain:
        return "; as the base"
    text = f"; {one.amount} {'better' if one.gain > 0 else 'worse'} than base"
    if one.low is None or one.high is None:
        return f"{text} (too few items for an interval)"
    low, high = (one.low, one.high) if one.gain > 0 else (-one.high, -one.low)
    return f"{text} ({task['level']:.0%} CI {low:.3g} to {high:.3g}), {one.verdict}"


def score(evaluation: Evaluation) -> float | None:
    """How good the model of this step is, for which checkpoint is the best: what it has learnt less what it forgot.

        score = mean over skill tasks of gain(task)  -  mean over retention tasks of max(0, -gain(task))
        gain  = score - base                    of accuracies (higher is better), in shares of 1
                (base - score) / base           of losses and bits per byte (lower is better)

    base: the task's score at step 0, so the base model has score 0. data.validation is one skill task. A mean over no
    tasks is 0. None if nothing was measured, or a number is not finite.
    """
    gains: dict[str, list[float]] = {"skill": [], "retention": []}
    for task in evaluation["tasks"].values():
        gained = gain(task)
        if gained is None:
            return None
        gains[task["measures"]].append(gained)
    skill, losses = gains["skill"], [max(0.0, -gain) for gain in gains["retention"]]
    total = sum(skill) / max(1, len(skill)) - sum(losses) / max(1, len(losses))
    return total if (skill or losses) and all(map(math.isfinite, (*skill, *gains["retention"]))) else None


def before_after(found: list[Evaluation]) -> list[tuple[str, ...]]:
    """Rows of `_COLUMNS`, the base beside the last evaluation: skill first, then retention.

    Both are of the same items. Where the last evaluation has a part of them, the row says so, and the numbers beside
    the metric are left out, as the base's on that part are not stored.
    """
    rows = []
    for name, first in found[0]["tasks"].items() if found else ():
        if (last := found[-1]["tasks"].get(name)) is None:
            continue
        part = last["n"] != first["n"]
        numbers = [(first["metric"], last["base"], last["score"])]
        if not part:
            numbers += [
                (key, value, last["extra"].get(key))
                for key, value in first["extra"].items()
                if key not in ("tokens", "loss") and isinstance(value, int | float)
            ]
        for number, before, after in numbers:
            title = f"{number}, on part of the items" if part else number
            rows.append((first["measures"], name, title, shown(number, before), shown(number, after)))
    return sorted(rows, key=lambda row: row[0] != "skill")


def table(run_folder: Path) -> str:
    """`before_after` as text columns."""
    rows = [_COLUMNS, *before_after(evaluations(run_folder))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def write_report(run_folder: Path, **state: Any) -> dict[str, Any]:
    """Write report.json and report.html of a run into its folder; returns the former. A full disk is told, and does
    not keep the model from being exported; nor does a damaged file, of which {} is returned.

    state: that of the end which state.json is going to tell, as the run gives up its folder with that."""
    try:
        report = _collected(run_folder, state)
        content = _page([report], [run_folder])
    except BadInput as error:
        print(f"WARNING: there is no report of this run: {error}", flush=True)
        return {}
    try:
        lease.write(run_folder / "report.json", _json(report))
        lease.write(run_folder / "report.html", content)
    except OSError as error:
        print(f"WARNING: the report cannot be written ({error}); `fullft report {run_folder}` makes it", flush=True)
    return report


def _collected(run_folder: Path, state: dict[str, Any] | None = None) -> dict[str, Any]:
    """`collect`. Raises BadInput for whatever a damaged file makes of it."""
    try:
        return collect(run_folder, state)
    except _OF_DAMAGE as error:
        raise BadInput(f"{run_folder}: a file in it is damaged ({type(error).__name__}: {error})") from None


def _page(reports: list[dict[str, Any]], run_folders: Sequence[Path]) -> str:
    """`page`. Raises BadInput for whatever a damaged file makes of it."""
    try:
        return page(reports)
    except _OF_DAMAGE as error:
        folders = ", ".join(map(str, run_folders))
        raise BadInput(f"{folders}: a file there is damaged ({type(error).__name__}: {error})") from None


def write_comparison(run_folders: Sequence[Path], out: Path, blend: Path | None = None) -> list[dict[str, Any]]:
    """Write one page of one run or several, and the same as JSON beside it; returns the report of each run.

    Raises:
        BadInput: a folder is of no run or has a damaged file, the blend is none, or a file cannot be written, or is
            there and not a report of fullft.
    """
    problems = [
        f"{folder} is not a run folder of fullft (it has no recipe.yaml)"
        for folder in run_folders
        if not (folder / "recipe.yaml").exists()
    ]
    if blend is not None and read_json(blend).get("format") != "fullft-blend/1":
        problems.append(f"--blend: {blend} is not a blend.json of `fullft blend --sweep`")
    if out.suffix != ".html":
        problems.append(f"--out: {out} does not end in .html")
    problems += [
        f"--out: {file} exists and is not a report of fullft, nothing is overwritten; give another name"
        for file in (out, out.with_suffix(".json"))
        if file.exists() and not _is_report(file)
    ]
    reports = []
    for folder in run_folders:
        try:
            reports.append(_collected(folder) if (folder / "recipe.yaml").exists() else {})
        except BadInput as error:
            problems += error.problems
    if problems:
        raise BadInput(problems)
    if blend is not None:
        reports[-1]["blend"] = runlog.blend(blend)
    _name_apart(reports, run_folders)
    content = _page(reports, run_folders)
    try:
        together = {"format": _FORMAT, "runs": reports}
        lease.write(out.with_suffix(".json"), _json(reports[0] if len(reports) == 1 else together))
        lease.write(out, content)
    except OSError as error:
        raise BadInput(f"--out: {out} cannot be written: {error}") from None
    return reports


def _is_report(file: Path) -> bool:
    """Whether a file is a page or a report.json of fullft, also of a version before it had a format."""
    if file.suffix == ".html":
        with file.open(errors="replace") as text:
            return "<title>fullft" in text.read(5000)
    content = read_json(file)
    return content.get("format") == _FORMAT or {"verdict", "before_after"} <= content.keys() or "runs" in content


def _name_apart(reports: list[dict[str, Any]], run_folders: Sequence[Path]) -> None:
    """Runs of one name are told apart by their whole path."""
    names = [report["run"] for report in reports]
    for report, folder in zip(reports, run_folders, strict=True):
        if names.count(report["run"]) > 1:
            report["run"] = str(folder)


def _json(report: dict[str, Any]) -> str:
    return json.dumps(_finite(report), indent=1, allow_nan=False)


def _finite(value: Any) -> Any:
    """NaN and infinity, which JSON does not have, as null."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summary(run_folder: Path, until: int | None = None) -> dict[str, Any]:
    """What a run has come to (until a step). `metrics` in it are the numbers of the last evaluation."""
    state = _state(run_folder)
    return _summary(run_folder, evaluations(run_folder, until), read_log(run_folder, until), state, until)


def summary_or_none(run_folder: Path, until: int) -> dict[str, Any]:
    """`summary`, or {} if a file is damaged, which is told: the model can be exported without."""
    try:
        return summary(run_folder, until)
    except (BadInput, *_OF_DAMAGE) as error:
        print(f"WARNING: what the run has come to is not told in the model card: {error}", flush=True)
        return {}


def _summary(
    run_folder: Path, found: list[Evaluation], log: Log, state: dict[str, Any], until: int | None
) -> dict[str, Any]:
    last: dict[str, float] = {}
    for name, task in found[-1]["tasks"].items() if found else ():
        last[f"{task['measures']}/{name}/{task['metric']}"] = task["score"]
        last[f"{task['measures']}/{name}/drop"] = task["drop"]
    step = log.last.get("step", 0)
    total = read_json(run_folder / "plan.json").get("steps")
    if until is not None:  # a checkpoint on the way is spoken of as if the run had ended there
        state, total = {"status": "done"}, None
    gone_back = [one for one in rollbacks(run_folder) if until is None or one["to_step"] <= until]
    return {
        "steps": step,
        "tokens": log.last.get("train/tokens", 0),
        "final_loss": log.last.get("train/loss"),
        "verdict": verdict(found, state, step, total, len(gone_back)),
        "data": _shares(log),
        "metrics": last,
        "before_after": [dict(zip(_COLUMNS, row, strict=True)) for row in before_after(found)],
        "evaluations": found,
    }


def _state(run_folder: Path) -> dict[str, Any]:
    """Content of state.json; {}, as without it, if it does not say how the run stands."""
    state = read_json(run_folder / "state.json")
    return state if "status" in state else {}


def _shares(log: Log) -> dict[str, dict[str, float]]:
    """{training set: {share of the tokens of the logged steps, epochs of it that were seen}}."""
    return {
        name: {"share": count / max(sum(log.set_tokens.values()), 1), "epochs": log.last[f"data/{name}/epochs"]}
        for name, count in log.set_tokens.items()
    }


def collect(run_folder: Path, state: dict[str, Any] | None = None) -> dict[str, Any]:
    """All that the page of a run shows: `summary`, and

    run            its name
    state, planned_steps
    curves         {metric: {"step", "value", "low", "high"}} as of `thin`
    blend          content of blend.json; null if there is none
    rollbacks      see runlog.rollbacks
    generations    see runlog.generations
    warnings       [texts]
    recipe, recipe_text, environment

    state: instead of that of state.json.
    """
    state = state or _state(run_folder)
    found, log = evaluations(run_folder), read_log(run_folder)
    recipe, text = runlog.recipe(run_folder / "recipe.yaml")
    plan = read_json(run_folder / "plan.json")
    report = {"format": _FORMAT, "run": run_folder.absolute().name}
    report |= _finite(
        _summary(run_folder, found, log, state, until=None)
        | {
            "state": state,
            "planned_steps": plan.get("steps"),
            "curves": {key: thin(*curve) for key, curve in sorted(log.curves.items())},
            "blend": runlog.blend(run_folder / "blend.json"),
            "rollbacks": rollbacks(run_folder),
            "generations": generations(run_folder),
            "warnings": [*plan.get("warnings", []), *_troubles(found, log, rollbacks(run_folder))],
            "recipe": recipe,
            "recipe_text": text,
            "environment": read_json(run_folder / "env.json"),
        }
    )
    return report


def _troubles(found: list[Evaluation], log: Log, gone_back: list[dict[str, Any]]) -> list[str]:
    """What went wrong on the way, that is seen from the run folder."""
    texts = [
        f"rolled back from step {one['from_step']:,} to {one['to_step']:,}, from there on learning rate × "
        f"{one['learning_rate_factor']:g}, pull × {one['pull_factor']:g}: {'; '.join(one['reasons'])}"
        for one in gone_back
    ]
    texts += [
        f"gate at step {one['step']:,}, {gate['decision']}: {reason}"
        for one in found
        if (gate := one.get("gate") or {}).get("decision", "continue") != "continue"
        for reason in gate.get("reasons", [])
    ]
    if log.failed_checkpoints:
        texts.append(f"{log.failed_checkpoints} checkpoints could not be written")
    return texts


def model_card(recipe: Recipe, report: dict[str, Any]) -> str:
    """README.md of the exported model: what it was made from and how, and what it gained and lost.

    report: {} if there is none. Of the recipe is left out what is of the place and the people of the run, not of it.
    """
    about: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["fullft"]}
    if not Path(recipe.model.path).exists():
        about |= {"base_model": recipe.model.path, "base_model_relation": "finetune"}
    sources = dict(zip(recipe.data.names, recipe.data.training_sets, strict=True))
    if on_hub := sorted({one.path for one in sources.values() if _is_hub_name(one.path)}):
        about["datasets"] = on_hub
    base = f"`{recipe.model.path}`" + (f" (revision {recipe.model.revision})" if recipe.model.revision else "")
    loss = f", last training loss {report['final_loss']:.4g}" if report.get("final_loss") is not None else ""
    long = f": {report['steps']:,} steps, {report['tokens']:,} tokens{loss}" if report else ""
    lines = [
        "---", yaml.safe_dump(about, sort_keys=False) + "---", "", f"# {recipe.run_folder.absolute().name}", "",
        f"{base}, all parameters fine-tuned with fullft {__version__}{long}.",
    ]  # fmt: skip
    if report.get("before_after"):
        lines += ["", report["verdict"]["sentence"]]
        lines += ["", "## Before and after", "", "Skill is what it was to learn, retention what it was to keep.", ""]
        lines += _markdown(_COLUMNS, [tuple(row.values()) for row in report["before_after"]])
    if report.get("data"):
        shares = [
            (name, f"`{sources[name].path}`" if name in sources else "", f"{of['share']:.1%}", f"{of['epochs']:.2f}")
            for name, of in report["data"].items()
        ]
        lines += ["", "## Training data", "", *_markdown(("set", "from", "share of tokens", "epochs"), shares)]
    lines += [
        "",
        "## Recipe",
        "",
        f"<details><summary>Keys of the training (fingerprint {fingerprint(recipe)})</summary>",
        "",
    ]
    keys = recipe.model_dump(mode="json", exclude={"run_dir", "tracking"})
    lines += ["```yaml", yaml.safe_dump(keys, sort_keys=False) + "```", "", "</details>", ""]
    return "\n".join(lines)


def _is_hub_name(path: str) -> bool:
    """Whether a data set is on the hub: owner/name, and no file or pattern here."""
    return not Path(path).exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) is not None and not Path(path).suffix


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in cells]
