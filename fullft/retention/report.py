"""What a run says at its end: a table on the terminal, report.json, report.html, and the model card of the export."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from fullft.recipe import Recipe, fingerprint
from fullft.retention.suite import VALIDATION

Evaluation = dict[str, Any]


def evaluations(run_folder: Path) -> list[Evaluation]:
    """All retention/step-….json of a run, by step."""
    return [json.loads(path.read_text()) for path in sorted((run_folder / "retention").glob("step-*.json"))]


def metrics(run_folder: Path) -> list[dict[str, Any]]:
    """All rows of metrics.jsonl."""
    file = run_folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def summary_lines(evaluation: Evaluation) -> list[str]:
    """One line a task: score, and the change to the base model."""
    lines = []
    for name, task in evaluation["tasks"].items():
        extra = task["extra"]
        more = (
            f"  perplexity {extra['perplexity']:.2f}, token accuracy {extra['token_accuracy']:.1%}"
            if "perplexity" in extra
            else ""
        )
        change = (
            ""
            if evaluation["step"] == 0
            else f"  ({_signed(-task['drop'], task['metric'])} better than base)"
            if task["drop"] < 0
            else f"  ({_signed(task['drop'], task['metric'])} worse than base)"
        )
        lines.append(
            f"  {task['measures']:<9} {name:<16} {task['metric']} {_shown(task['score'], task['metric'])}{more}{change}"
        )
    return lines


def _signed(value: float, metric: str) -> str:
    return f"{abs(value) * 100:.1f} points" if metric == "exact_match" else f"{abs(value):.3f}"


def _shown(value: float, metric: str) -> str:
    return f"{value:.1%}" if metric == "exact_match" else f"{value:.4f}"


def before_after(run_folder: Path) -> list[tuple[str, str, str, str, str]]:
    """Rows (measures, task, number, before, after) of the first and the last evaluation."""
    found = evaluations(run_folder)
    if not found:
        return []
    rows = []
    for name, first in found[0]["tasks"].items():
        last = found[-1]["tasks"][name]
        rows.append(
            (
                first["measures"],
                name,
                first["metric"],
                *(_shown(task["score"], task["metric"]) for task in (first, last)),
            )
        )
        for key in ("perplexity", "token_accuracy"):
            if key in first["extra"] and name != VALIDATION:
                form = "{:.1%}" if key == "token_accuracy" else "{:.2f}"
                rows.append(
                    (first["measures"], name, key, *(form.format(task["extra"][key]) for task in (first, last)))
                )
    return sorted(rows, key=lambda row: row[0] != "skill")


def table(run_folder: Path) -> str:
    """`before_after` as text columns."""
    rows = [("measures", "task", "number", "before", "after"), *before_after(run_folder)]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def write_report(run_folder: Path) -> dict[str, Any]:
    """Write report.json and report.html; returns the former. `metrics` in it are the numbers of the last evaluation."""
    found, rows = evaluations(run_folder), metrics(run_folder)
    steps = [row for row in rows if "train/loss" in row]
    last: dict[str, float] = {}
    for name, task in (found[-1]["tasks"] if found else {}).items():
        last |= {
            f"{task['measures']}/{name}/{task['metric']}": task["score"],
            f"{task['measures']}/{name}/drop": task["drop"],
        }
    report = {
        "steps": steps[-1]["train/global_step"] if steps else 0,
        "final_loss": steps[-1]["train/loss"] if steps else None,
        "metrics": last,
        "before_after": [dict(zip(("measures", "task", "number", "before", "after"), row, strict=True)) for row in before_after(run_folder)],
        "evaluations": [{"step": one["step"], "tasks": one["tasks"]} for one in found],
    }  # fmt: skip
    (run_folder / "report.json").write_text(json.dumps(report, indent=1))
    (run_folder / "report.html").write_text(_page(run_folder, found, steps))
    return report


def model_card(recipe: Recipe, report: dict[str, Any]) -> str:
    """README.md of the exported model: what it was made from and how, and what it gained and lost."""
    rows = "\n".join("| " + " | ".join(row.values()) + " |" for row in report["before_after"])
    base = f"base_model: {recipe.model.path}\n" if not Path(recipe.model.path).exists() else ""
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n{base}tags: [fullft]\n---\n\n"
        f"# {recipe.run_folder.name}\n\nFull fine-tuning of `{recipe.model.path}` with fullft ({report['steps']} steps, recipe "
        f"{fingerprint(recipe)}).\n\n## Before and after\n\n| measures | task | number | before | after |\n|---|---|---|---|---|\n{rows}\n\n"
        f"## Recipe\n\n```yaml\n{recipe.to_yaml()}```\n"
    )


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a;background:#fff}"
    "h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}table{border-collapse:collapse}"
    "td,th{padding:.25rem .9rem .25rem 0;text-align:left;border-bottom:1px solid #ddd}"
    "td:nth-child(n+4){font-variant-numeric:tabular-nums}figure{margin:1rem 0}figcaption{color:#555}svg{max-width:100%}"
)


def _page(run_folder: Path, found: list[Evaluation], steps: list[dict[str, Any]]) -> str:
    """One self-contained page: the table, and curves of the loss and of every task."""
    cells = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in before_after(run_folder)
    )
    figures = []
    if steps:
        figures.append(
            _figure("training loss, nats a token", [(row["train/global_step"], row["train/loss"]) for row in steps])
        )
    for name in found[0]["tasks"] if found else ():
        first = found[0]["tasks"][name]
        better = "higher is better" if first["higher_is_better"] else "lower is better"
        points = [(one["step"], one["tasks"][name]["score"]) for one in found]
        figures.append(_figure(f"{first['measures']}: {name}, {first['metric']} ({better}), n = {first['n']}", points))
    title = html.escape(run_folder.name)
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
        f"<title>{title}</title><style>{_STYLE}</style><h1>fullft: {title}</h1><h2>Before and after</h2>"
        f"<table><tr><th>measures<th>task<th>number<th>before<th>after</tr>{cells}</table><h2>While training</h2>{''.join(figures)}"
        f"<h2>Recipe</h2><pre>{html.escape((run_folder / 'recipe.yaml').read_text())}</pre></html>\n"
    )


def _figure(caption: str, points: list[tuple[float, float]], width: int = 720, height: int = 200) -> str:
    """A line chart as SVG."""
    left, right, top, bottom = 60, 12, 10, 26
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x0, x1, y0, y1 = min(xs), max(max(xs), min(xs) + 1), min(ys), max(ys)
    if y0 == y1:
        y0, y1 = y0 - 0.5, y1 + 0.5

    def place(x: float, y: float) -> str:
        across = left + (x - x0) / (x1 - x0) * (width - left - right)
        return f"{across:.1f},{top + (y1 - y) / (y1 - y0) * (height - top - bottom):.1f}"

    dots = (
        "".join(
            f"<circle cx='{at.split(',')[0]}' cy='{at.split(',')[1]}' r='3' fill='#2563eb'/>"
            for at in (place(x, y) for x, y in points)
        )
        if len(points) <= 40
        else ""
    )
    labels = "".join(
        f"<text x='{left - 8}' y='{top + 5 + share * (height - top - bottom):.0f}' text-anchor='end'>{y1 + share * (y0 - y1):.3g}</text>"
        f"<line x1='{left}' x2='{width - right}' y1='{top + share * (height - top - bottom):.0f}' y2='{top + share * (height - top - bottom):.0f}' stroke='#e5e5e5'/>"
        for share in (0, 0.5, 1)
    )
    ends = f"<text x='{left}' y='{height - 6}'>step {x0:g}</text><text x='{width - right}' y='{height - 6}' text-anchor='end'>step {x1:g}</text>"
    line = f"<polyline points='{' '.join(place(x, y) for x, y in points)}' fill='none' stroke='#2563eb' stroke-width='1.8'/>"
    return (
        f"<figure><figcaption>{html.escape(caption)}</figcaption><svg viewBox='0 0 {width} {height}' width='{width}' height='{height}' "
        f"font-size='12' fill='#555' role='img'>{labels}{ends}{line}{dots}</svg></figure>"
    )
