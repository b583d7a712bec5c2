"""What a run says at its end: a table on the terminal, report.json, report.html, and the model card of the export."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fullft import __version__, lease
from fullft.recipe import Recipe, fingerprint
from fullft.retention import stats
from fullft.retention.evaluation import Evaluation

_COLUMNS = ("measures", "task", "number", "before", "after")
_PERCENT = ("exact_match", "acc", "acc_norm", "token_accuracy")


def evaluations(run_folder: Path, until: int | None = None) -> list[Evaluation]:
    """All evaluations of a run (until a step), by step."""
    found = [json.loads(path.read_text()) for path in sorted((run_folder / "retention").glob("step-*.json"))]
    return [one for one in found if until is None or one["step"] <= until]


def metrics(run_folder: Path, until: int | None = None) -> list[dict[str, Any]]:
    """All rows of metrics.jsonl (until a step); not a last one that was cut off by a kill."""
    file = run_folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [row for row in rows if until is None or row["step"] <= until]


def _shown(number: str, value: float | None) -> str:
    if value is None:
        return "unknown"
    return f"{value:.1%}" if number in _PERCENT else f"{value:.4g}"


def summary_lines(evaluation: Evaluation) -> list[str]:
    """One line a task: its numbers, and the change to the base model."""
    lines = []
    for name, task in evaluation["tasks"].items():
        numbers = {task["metric"]: task["score"]} | task["extra"]
        shown = ", ".join(f"{key} {_shown(key, value)}" for key, value in numbers.items() if key != "tokens")
        lines.append(f"  {task['measures']:<9} {name}: {shown}{_change(task) if evaluation['step'] else ''}")
    return lines


def _change(task: dict[str, Any]) -> str:
    """The drop with its interval, and whether it is more than chance: p over the retention tasks (Holm), or q."""
    drop, metric = task["drop"], task["metric"]
    if not drop:
        return "; as the base" if drop == 0 else ""
    text = f"; {stats.amount(metric, abs(drop))} {'worse' if drop > 0 else 'better'} than base"
    if task["drop_ci"] is None:
        return f"{text} (too few items for an interval)"
    low, high = sorted(end if drop > 0 else -end for end in task["drop_ci"])
    adjusted = task["q"] if task["p_holm"] is None else task["p_holm"]
    real = "real" if adjusted < 1 - task["level"] else "may be chance"
    unit = 100 if metric in _PERCENT else 1
    return f"{text} ({task['level']:.0%} CI {low * unit:.3g} to {high * unit:.3g}), {real}"


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


def gain(task: dict[str, Any]) -> float | None:
    """What a task has gained since step 0, as `score` adds it up; None if that is not known."""
    now, base = task["score"], task["base"]
    if now is None or base is None:
        return None
    return float(now - base if task["higher_is_better"] else (base - now) / base if base else 0.0)


def before_after(found: list[Evaluation]) -> list[tuple[str, ...]]:
    """Rows of `_COLUMNS` from the first and the last evaluation: skill first, then retention."""
    rows = []
    for name, first in found[0]["tasks"].items() if found else ():
        last = found[-1]["tasks"][name]
        numbers = {first["metric"]: (first["score"], last["score"])}
        numbers |= {
            key: (value, last["extra"][key]) for key, value in first["extra"].items() if key not in ("tokens", "loss")
        }
        for number, (before, after) in numbers.items():
            rows.append((first["measures"], name, number, _shown(number, before), _shown(number, after)))
    return sorted(rows, key=lambda row: row[0] != "skill")


def table(run_folder: Path) -> str:
    """`before_after` as text columns."""
    rows = [_COLUMNS, *before_after(evaluations(run_folder))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def write_report(run_folder: Path) -> dict[str, Any]:
    """Write report.json and report.html; returns the former."""
    report = summary(run_folder)
    lease.write(run_folder / "report.json", json.dumps(report, indent=1))
    steps = [row for row in metrics(run_folder) if "train/loss" in row]
    lease.write(run_folder / "report.html", _page(run_folder, evaluations(run_folder), steps))
    return report


def summary(run_folder: Path, until: int | None = None) -> dict[str, Any]:
    """What a run has come to (until a step). `metrics` in it are the numbers of the last evaluation."""
    found = evaluations(run_folder, until)
    steps = [row for row in metrics(run_folder, until) if "train/loss" in row]
    last: dict[str, float] = {}
    for name, task in found[-1]["tasks"].items() if found else ():
        last[f"{task['measures']}/{name}/{task['metric']}"] = task["score"]
        last[f"{task['measures']}/{name}/drop"] = task["drop"]
    return {
        "steps": steps[-1]["step"] if steps else 0,
        "tokens": steps[-1]["train/tokens"] if steps else 0,
        "final_loss": steps[-1]["train/loss"] if steps else None,
        "data": _shares(steps),
        "metrics": last,
        "before_after": [dict(zip(_COLUMNS, row, strict=True)) for row in before_after(found)],
        "evaluations": [{"step": one["step"], "tasks": one["tasks"]} for one in found],
    }


def _shares(steps: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """{training set: {share of the tokens of the logged steps, epochs of it that were seen}}."""
    tokens: dict[str, int] = {}
    for row in steps:
        for key, value in row.items():
            if key.startswith("data/") and key.endswith("/tokens_of_step"):
                name = key.removeprefix("data/").removesuffix("/tokens_of_step")
                tokens[name] = tokens.get(name, 0) + value
    return {
        name: {"share": count / max(sum(tokens.values()), 1), "epochs": steps[-1][f"data/{name}/epochs"]}
        for name, count in tokens.items()
    }


def model_card(recipe: Recipe, report: dict[str, Any]) -> str:
    """README.md of the exported model: what it was made from and how, and what it gained and lost."""
    about: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["fullft"]}
    if not Path(recipe.model.path).exists():
        about |= {"base_model": recipe.model.path, "base_model_relation": "finetune"}
    sources = dict(zip(recipe.data.names, recipe.data.training_sets, strict=True))
    if on_hub := sorted({one.path for one in sources.values() if _is_hub_name(one.path)}):
        about["datasets"] = on_hub
    base = f"`{recipe.model.path}`" + (f" (revision {recipe.model.revision})" if recipe.model.revision else "")
    loss = f", last training loss {report['final_loss']:.4g}" if report["final_loss"] is not None else ""
    lines = [
        "---", yaml.safe_dump(about, sort_keys=False) + "---", "", f"# {recipe.run_folder.absolute().name}", "",
        f"{base}, all parameters fine-tuned with fullft {__version__}: {report['steps']:,} steps, "
        f"{report['tokens']:,} tokens{loss}.",
    ]  # fmt: skip
    if report["before_after"]:
        lines += ["", "## Before and after", "", "Skill is what it was to learn, retention what it was to keep.", ""]
        lines += _markdown(_COLUMNS, [tuple(row.values()) for row in report["before_after"]])
    if report["data"]:
        shares = [
            (name, f"`{sources[name].path}`" if name in sources else "", f"{of['share']:.1%}", f"{of['epochs']:.2f}")
            for name, of in report["data"].items()
        ]
        lines += ["", "## Training data", "", *_markdown(("set", "from", "share of tokens", "epochs"), shares)]
    lines += ["", "## Recipe", "", f"<details><summary>Every key (fingerprint {fingerprint(recipe)})</summary>", ""]
    lines += ["```yaml", recipe.to_yaml() + "```", "", "</details>", ""]
    return "\n".join(lines)


def _is_hub_name(path: str) -> bool:
    """Whether a data set is on the hub: owner/name, and no file or pattern here."""
    return not Path(path).exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) is not None and not Path(path).suffix


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in cells]


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; width: 100% }
td, th { padding: .3rem .9rem .3rem 0; text-align: left; border-bottom: 1px solid #ddd }
td:nth-child(n+4) { font-variant-numeric: tabular-nums }
figure { margin: 1.2rem 0 } figcaption { color: #555 } svg { max-width: 100%; height: auto }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: 13px }
"""


def _page(run_folder: Path, found: list[Evaluation], steps: list[dict[str, Any]]) -> str:
    """One self-contained page: the table, and curves of the loss and of every task."""
    figures = []
    if steps:
        figures.append(_figure("training loss, nats a token", [(row["step"], row["train/loss"]) for row in steps]))
    for name, first in found[0]["tasks"].items() if found else ():
        better = "higher" if first["higher_is_better"] else "lower"
        caption = f"{first['measures']}: {name}, {first['metric']} ({better} is better), {first['n']} items"
        figures.append(_figure(caption, [(one["step"], one["tasks"][name]["score"]) for one in found]))
    head = "".join(f"<th>{column}</th>" for column in _COLUMNS)
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in before_after(found)
    )
    name = html.escape(run_folder.name)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>fullft: {name}</title><style>{_STYLE}</style></head><body>
<h1>fullft: {name}</h1>
<h2>Before and after</h2><table><tr>{head}</tr>{body}</table>
<h2>While training</h2>{"".join(figures)}
<h2>Recipe</h2><pre>{html.escape((run_folder / "recipe.yaml").read_text())}</pre>
</body></html>
"""


def _figure(caption: str, points: list[tuple[float, float]]) -> str:
    """A line chart as SVG, 720 × 200, with three grid lines and the first and last step."""
    left, right, top, bottom = 60, 708, 10, 174
    steps, values = [step for step, _ in points], [value for _, value in points]
    first, last = min(steps), max(max(steps), min(steps) + 1)
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 0.5, high + 0.5
    places = [
        (left + (step - first) / (last - first) * (right - left), top + (high - value) / (high - low) * (bottom - top))
        for step, value in points
    ]
    parts = []
    for share in (0.0, 0.5, 1.0):
        y = top + share * (bottom - top)
        parts.append(f"<line x1='{left}' x2='{right}' y1='{y}' y2='{y}' stroke='#e5e5e5'/>")
        parts.append(f"<text x='{left - 8}' y='{y + 4}' text-anchor='end'>{high + share * (low - high):.3g}</text>")
    parts.append(f"<text x='{left}' y='194'>step {first:g}</text>")
    parts.append(f"<text x='{right}' y='194' text-anchor='end'>step {last:g}</text>")
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts.append(f"<polyline points='{line}' fill='none' stroke='#2563eb' stroke-width='1.8'/>")
    if len(places) <= 40:
        parts += [f"<circle cx='{x:.1f}' cy='{y:.1f}' r='3' fill='#2563eb'/>" for x, y in places]
    drawing = f"<svg viewBox='0 0 720 200' width='720' height='200' font-size='12' fill='#555'>{''.join(parts)}</svg>"
    return f"<figure><figcaption>{html.escape(caption)}</figcaption>{drawing}</figure>"
