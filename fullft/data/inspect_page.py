"""What `fullft inspect` shows, as one page that needs nothing else."""

from __future__ import annotations

import html
import itertools
from pathlib import Path

from fullft.data.inspect import Finding, Run, SetView, View, axis, visible
from fullft.errors import BadInput

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; width: 100% }
td, th { padding: .3rem .9rem .3rem 0; text-align: left; border-bottom: 1px solid #ddd }
td:nth-child(n+4) { font-variant-numeric: tabular-nums }
figure { margin: 1.2rem 0 } figcaption { color: #555 } svg { max-width: 100%; height: auto }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: 13px }
h2 { border-top: 1px solid #ddd; padding-top: 1.2rem } h3 { font-size: .95rem; overflow-wrap: anywhere }
td { overflow-wrap: anywhere; vertical-align: top } td:first-child { white-space: nowrap }
.document { white-space: pre-wrap; overflow-wrap: anywhere } .special { opacity: .6 }
mark { background: #bbf7d0; color: inherit }
p { margin: .5rem 0 } ul { margin: 0; padding-left: 1.2rem }
svg text { fill: #444 } svg rect { fill: #2563eb } svg .over { fill: #d97706 }
@media (prefers-color-scheme: dark) {
  :root { color-scheme: dark } body { background: #16181c; color: #e4e4e4 } td, th, h2 { border-color: #3a3d44 }
  pre { background: #20232a } figcaption { color: #aaa } mark { background: #14532d }
  svg text { fill: #bbb } svg rect { fill: #60a5fa } svg .over { fill: #f59e0b }
}
"""


def write_page(view: View, path: Path) -> None:
    """Write it as one page that needs nothing else.

    Raises:
        BadInput: the file cannot be written.
    """
    try:
        path.write_text(_page(view), encoding="utf-8")
    except OSError as error:
        raise BadInput(f"--html: {path} cannot be written: {error}") from None


def _page(view: View) -> str:
    across = "".join(map(_finding_html, view.findings))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>fullft: training data</title><style>{_STYLE}</style></head><body>
<h1>fullft: training data</h1>
{across}
{"".join(map(_section, view.sets))}
</body></html>
"""


def _escaped(text: str) -> str:
    return html.escape(visible(text))


def _section(one: SetView) -> str:
    legend = "<p><b>rows</b> <mark>trained</mark>, <span class='special'>special token</span></p>"
    documents = "".join(
        f"<h3>{_escaped(title)}</h3><pre class='document' dir='auto'>{''.join(map(_run_html, runs))}</pre>"
        for title, runs in one.documents
    )
    findings = "".join(map(_finding_html, one.findings))
    about = _escaped(one.about.removeprefix(f"{one.name}: "))
    return f"<h2>{_escaped(one.name)}</h2><p>{about}</p>{_histogram(one)}{findings}{documents and legend + documents}"


def _run_html(run: Run) -> str:
    text = _escaped(run.text)
    inner = text if run.kind == "text" else f"<span class='special'>{text}</span>"
    return f"<mark>{inner}</mark>" if run.trained else inner


def _finding_html(finding: Finding) -> str:
    text = f"<p><b>{finding.name}</b> {_escaped(finding.text)}</p>"
    if not finding.columns:
        items = "".join(f"<li>{_escaped(row)}</li>" for (row,) in finding.rows)
        return f"{text}<ul>{items}</ul>" if items else text
    head = "".join(f"<th>{column}</th>" for column in finding.columns)
    body = "".join(f"<tr>{''.join(f'<td>{_escaped(cell)}</td>' for cell in row)}</tr>" for row in finding.rows)
    return f"{text}<table><tr>{head}</tr>{body}</table>" if body else text


def _histogram(one: SetView) -> str:
    """Bars from left to right as SVG, 720 wide, 22 high each; a dashed line below sequence_length."""
    most, parts = max(bar.documents for bar in one.bars), []
    for y, bar in zip(itertools.count(22, 22), one.bars, strict=False):
        width, over = bar.documents / most * 470, " class='over'" if bar.first > one.limit else ""
        parts.append(f"<text x='150' y='{y + 15}' text-anchor='end'>{bar.label}</text>")
        parts.append(f"<rect{over} x='160' y='{y + 3}' width='{width:.1f}' height='16'/>")
        parts.append(f"<text x='{166 + width:.1f}' y='{y + 15}'>{bar.documents:,}</text>")
        if bar.last == one.limit:
            parts.append(f"<text x='708' y='{y + 18}' text-anchor='end'>sequence_length</text>")
            parts.append(f"<path d='M30 {y + 22}H708' stroke='#d97706' stroke-dasharray='4 3'/>")
    size = f"width='720' height='{26 + 22 * len(one.bars)}'"
    axes = "<text x='150' y='14' text-anchor='end'>tokens</text><text x='160' y='14'>documents</text>"
    drawing = f"<svg viewBox='0 0 720 {26 + 22 * len(one.bars)}' {size} font-size='13'>{axes}{''.join(parts)}</svg>"
    return f"<figure><figcaption>{axis(one)}</figcaption>{drawing}</figure>"
