"""The report of one run or several as one page that needs nothing else: no network, no script for what is to be read.

Scripts only add: numbers under the pointer, runs that are hidden, sorted tables, filtered answers.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import Any

from fullft.report.curves import divergence, frontier, training, trajectories
from fullft.report.tables import Report, comparison, escaped, heat_maps, last_tasks, table_box, task_table

_MARKS = {"good": "✓", "mixed": "!", "bad": "✕", "unknown": "?"}
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def page(reports: Sequence[Report]) -> str:
    """The page as HTML; reports: of the runs, in their order."""
    trained = any(report["steps"] for report in reports)  # else all are folders of `fullft eval`
    title = "fullft: " + " · ".join(report["run"] for report in reports)
    sections = [
        ("Tasks", comparison(reports) if len(reports) > 1 else task_table(reports[0])),
        ("Trajectories", trajectories(reports) if trained else ""),
        ("Skill against retention", frontier(reports)),
        ("Forgetting by task and step", heat_maps(reports) if trained else ""),
        ("Divergence from the base model", divergence(reports) if trained else ""),
        ("Training", training(reports)),
        ("Answers before and after", _answers(reports)),
        ("Recipe and environment", _recipes(reports)),
    ]
    present = [(name, name.lower().replace(" ", "-"), body) for name, body in sections if body]
    links = "".join(f"<a href='#{anchor}'>{name}</a>" for name, anchor, _ in present)
    bodies = "".join(
        f"<section id='{anchor}' aria-labelledby='{anchor}-title'><h2 id='{anchor}-title'>{name}</h2>{body}</section>"
        for name, anchor, body in present
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,"><title>{escaped(title)}</title><style>{_asset("page.css")}</style></head><body>
<header>{_header(reports)}<nav aria-label="Sections">{links}</nav></header>
<main>{bodies}</main>
<div id="tip" role="status" aria-live="polite" hidden></div>
<script>{_asset("page.js")}</script>
</body></html>
"""


def _asset(name: str) -> str:
    return files("fullft.report").joinpath(name).read_text(encoding="utf-8")


def _header(reports: Sequence[Report]) -> str:
    if len(reports) == 1:
        (report,) = reports
        verdict = report["verdict"]
        level = next((task["level"] for task in last_tasks(report).values() if task.get("level")), None)
        about = (
            f"± is half the {level:.0%} confidence interval of the difference to the base model on the same items."
            if level
            else ""
        )
        about += " Skill is what it was to learn, retention what it was to keep."
        mark = f"<span aria-hidden='true'>{_MARKS[verdict['tone']]}</span>"
        return (
            f"<p class='kind'>fullft report</p><h1>{escaped(report['run'])}</h1>"
            f"<p class='verdict {verdict['tone']}'>{mark}<span>{_unbroken(verdict['sentence'])}</span></p>"
            f"<p class='note'>{about.strip()}</p>{_facts(report)}{_warnings(report)}"
        )
    items = "".join(
        f"<li class='c{at % 8}'><label><input type='checkbox' checked data-run='{at}'><i></i>"
        f"<b>{escaped(report['run'])}</b></label> "
        f"<span class='sentence'>{_unbroken(report['verdict']['sentence'])}</span></li>"
        for at, report in enumerate(reports)
    )
    warnings = "".join(_warnings(report, report["run"]) for report in reports)
    return (
        f"<p class='kind'>fullft report</p><h1>{len(reports)} runs</h1><fieldset class='runs'>"
        f"<legend>Runs shown</legend><ul>{items}</ul></fieldset>{warnings}"
    )


def _unbroken(sentence: str) -> str:
    """Number, error and unit stay on one line."""
    return escaped(re.sub(r" ± (\S+) ", "\u00a0±\u00a0\\1\u00a0", sentence))


def _facts(report: Report) -> str:
    model, environment = report["recipe"].get("model", {}), report["environment"]
    facts = [
        ("model", model.get("path")), ("steps", report["steps"] and f"{report['steps']:,}"),
        ("tokens", report["tokens"] and f"{report['tokens']:,}"),
        ("last loss", report["final_loss"] and f"{report['final_loss']:.4g}"),
        ("ranks", environment.get("world_size")), ("device", environment.get("device")),
        ("evaluations", len(report["evaluations"])), ("weights measured", _weights(report)),
        ("status", report["state"].get("status")),
    ]  # fmt: skip
    items = "".join(
        f"<div><dt>{name}</dt><dd>{escaped(value)}</dd></div>" for name, value in facts if value not in (None, "", 0)
    )
    return f"<dl class='facts'>{items}</dl>"


def _weights(report: Report) -> str | None:
    used = {one.get("weights") for one in report["evaluations"]} - {None, "live"}
    return ", ".join(sorted(used)) or None


def _warnings(report: Report, run: str = "") -> str:
    texts = list(report["warnings"])
    if reason := report["state"].get("reason"):
        texts.insert(0, f"{report['state']['status']}: {reason}")
    if not texts:
        return ""
    of = f" of {escaped(run)}" if run else ""
    items = "".join(f"<li>{escaped(text)}</li>" for text in texts)
    summary = f"{len(texts)} warning{'s' * (len(texts) > 1)}{of}"
    shown = "open" if len(texts) < 4 and not run else ""
    return f"<details class='warnings' {shown}><summary>{summary}</summary><ul>{items}</ul></details>"


# Answers


def _answers(reports: Sequence[Report]) -> str:
    """Cards, each a prompt with the answers of the base and of the runs."""
    cards: dict[tuple[str, str], list[tuple[int, dict[str, Any]]]] = {}
    for at, report in enumerate(reports):
        for one in report["generations"]:
            cards.setdefault((one["task"], one["prompt"]), []).append((at, one))
    if not cards:
        return ""
    drawn = [_card(reports, found) for found in cards.values()]
    counts = {kind: sum(kind in flags for flags, _ in drawn) for kind in ("changed", "right", "wrong")}
    names = {"all": "all", "changed": "changed", "right": "became right", "wrong": "became wrong"}
    counts["all"] = len(drawn)
    radios = "".join(
        f"<label><input type='radio' name='answers' value='{kind}'{' checked' * (kind == 'all')}>"
        f"{name} ({counts[kind]})</label>"
        for kind, name in names.items()
    )
    fieldset = f"<fieldset class='filter'><legend>Answers shown</legend>{radios}</fieldset>"
    bodies = "".join(body for _, body in drawn)
    return f"{fieldset}<div id='answers'>{bodies}</div><button type='button' id='more' hidden>Show all</button>"


def _card(reports: Sequence[Report], found: Sequence[tuple[int, dict[str, Any]]]) -> tuple[set[str], str]:
    first = found[0][1]
    answers = [("base model", first["base"], first["base_correct"], "")]
    flags = {"all"}
    for at, one in found:
        name = "tuned model" if len(reports) == 1 else reports[at]["run"]
        answers.append(
            (
                f"{name}, step {one['tuned_step']:,}" if reports[at]["steps"] else name,
                one["tuned"],
                one["tuned_correct"],
                "" if len(reports) == 1 else f"run{at}",
            )
        )
        flags |= {"changed"} if one["tuned"] != one["base"] else set()
        if (
            one["base_correct"] is not None
            and one["tuned_correct"] is not None
            and one["base_correct"] != one["tuned_correct"]
        ):
            flags.add("right" if one["tuned_correct"] else "wrong")
    columns = "".join(
        f"<div class='{run}'><h4>{escaped(name)} {_correctness(correct)}</h4>"
        f"<pre dir='auto'>{escaped(text) or '<i>empty</i>'}</pre></div>"
        for name, text, correct, run in answers
    )
    prompt = f"<h4>{escaped(first['task'])}: prompt</h4><pre dir='auto'>{escaped(first['prompt'])}</pre>"
    reference = f"<h4>reference</h4><pre dir='auto'>{escaped(first['reference'])}</pre>" if first["reference"] else ""
    asked = f"<div class='asked'><div>{prompt}</div><div>{reference}</div></div>"
    body = f"<article data-kinds='{' '.join(sorted(flags))}'>{asked}<div class='said'>{columns}</div></article>"
    return flags, body


def _correctness(correct: bool | None) -> str:
    if correct is None:
        return ""
    return "<span class='badge good'>right</span>" if correct else "<span class='badge bad'>wrong</span>"


# Recipe and environment


def _recipes(reports: Sequence[Report]) -> str:
    parts = [_differences(reports)] if len(reports) > 1 else []
    for report in reports:
        of = f" of {escaped(report['run'])}" if len(reports) > 1 else ""
        environment = "".join(
            f"<tr><th scope='row'>{escaped(key)}</th><td>{escaped(value)}</td></tr>"
            for key, value in report["environment"].items()
        )
        if environment:
            box = table_box(
                "<th scope='col'>what</th><th scope='col'>value</th>", environment, f"Environment {report['run']}"
            )
            parts.append(f"<details><summary>Environment{of}</summary>{box}</details>")
        data = "".join(
            f"<tr><th scope='row'>{escaped(name)}</th><td class='number'>{one['share']:.1%}</td>"
            f"<td class='number'>{one['epochs']:.2f}</td></tr>"
            for name, one in report["data"].items()
        )
        if data:
            head = "<th scope='col'>training set</th><th scope='col'>share of tokens</th><th scope='col'>epochs</th>"
            parts.append(table_box(head, data, f"Training data {report['run']}"))
        parts.append(
            f"<details><summary>Recipe{of}</summary><pre tabindex='0'>{escaped(report['recipe_text'])}</pre></details>"
        )
    return "".join(parts)


def _differences(reports: Sequence[Report]) -> str:
    flat = [dict(_flatten(report["recipe"])) for report in reports]
    keys = [key for key in dict.fromkeys(itertools.chain(*flat)) if key != "run_dir"]
    differing = [key for key in keys if len({json.dumps(one.get(key)) for one in flat}) > 1]
    if not differing:
        return "<p>The recipes are the same.</p>"
    head = "<th scope='col'>key</th>" + "".join(
        f"<th scope='col' class='run{at} c{at % 8}'><i></i>{escaped(report['run'])}</th>"
        for at, report in enumerate(reports)
    )
    body = "".join(
        f"<tr><th scope='row'>{escaped(key)}</th>"
        + "".join(f"<td class='run{at}'>{escaped(one.get(key, '–'))}</td>" for at, one in enumerate(flat))
        + "</tr>"
        for key in differing
    )
    return "<h3>Where the recipes differ</h3>" + table_box(head, body, "Where the recipes differ")


def _flatten(section: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(section, dict) and section:
        for key, value in section.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(section, list) and any(isinstance(one, dict) for one in section):
        for at, value in enumerate(section):
            yield from _flatten(
                value, f"{prefix}.{value.get('name') or at}" if isinstance(value, dict) else f"{prefix}.{at}"
            )
    else:
        yield prefix, section
