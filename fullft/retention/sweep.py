"""Every blend of base and tuned model measured, and the best of them: `fullft blend --sweep`.

One engine without optimizer, whose shards become one blend after the other (`blend.set_weights`): the memory of one
model, over all ranks. All blends answer the same items, so each is paired with the base, α = 0.

    blend.json   {"format": "fullft-blend/1", "base", "tuned", "scales", "recipe": fingerprint, "weights": fingerprint,
                  "confidence", "limits", "points": [{"alpha", "skill", "retention", "tasks": as in an evaluation}],
                  "best": {"alpha", "why"}}
    blend/       recipe.yaml, and retention/step-00000700.json with its items for α = 0.7
                 sweep.json: of which models and recipe these are, as in blend.json. A sweep that was killed goes on
                 with them, and one of other α adds to them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fullft import cluster, lease
from fullft.cluster import Cluster
from fullft.errors import BadInput
from fullft.preflight import preflight_evaluation
from fullft.recipe import Recipe, differences, fingerprint
from fullft.report.runlog import evaluations
from fullft.report.wording import mean_gains
from fullft.retention import baseline
from fullft.retention.baseline import file_name
from fullft.retention.blend import folder_of, pairs_of_model, set_weights, with_scales
from fullft.retention.evaluate import for_evaluation, model_of, require_possible, require_shards, start_engine, tell
from fullft.retention.evaluation import Evaluation
from fullft.retention.suite import Suite
from fullft.state import read_json

Point = dict[str, Any]


def sweep(
    recipe: Recipe, base: str, tuned: str, alphas: Sequence[float], scales: Sequence[str], out: Path, me: Cluster
) -> dict[str, Any]:
    """Measure the blends, write blend.json into the folder `out`, and return its content. All ranks together.

    Raises:
        BadInput: something does not fit, the recipe does not measure both skill and retention, or `out` has blends of
            other models or another recipe.
    """
    require_possible(out / "blend")
    of_recipe, recipe = recipe.model, for_evaluation(recipe, tuned, out / "blend")
    ready = preflight_evaluation(recipe, me.world_size)
    require_shards(ready)
    measured = {task.measures for task in ready.suite.tasks}
    if missing := sorted({"skill", "retention"} - measured):
        raise BadInput(f"retention.tasks: none measures {missing[0]}, so no blend can be told to be the best")
    folders = folder_of(model_of(base), of_recipe), folder_of(recipe.model.path, recipe.model)
    pairs = with_scales(pairs_of_model(*folders, ready.meta, recipe.model.trust_remote_code), scales)
    about = {
        "format": "fullft-blend/1", "base": base, "tuned": tuned, "scales": list(scales), "recipe": fingerprint(recipe),
        "weights": _weights(folders), "confidence": recipe.retention.confidence,
        "limits": baseline.describe(ready.suite)["limits"],
    }  # fmt: skip
    _require_own(out, about, ready.suite)
    cluster.join(me, recipe.train.timeout_minutes)
    cluster.require_same_code()
    done = cluster.on_all(lambda: _measured(ready.suite))
    if me.is_main:
        lease.write(out / "blend" / "recipe.yaml", recipe.to_yaml())
        lease.write(out / "blend" / "sweep.json", json.dumps(about, indent=1))
    engine = start_engine(recipe, ready, read=False)
    points = []
    for number, alpha in enumerate(alphas, 1):
        if (evaluation := done.get(_step(alpha))) is None:
            set_weights(engine, pairs, alpha)
            evaluation = ready.suite.evaluate(engine, _step(alpha))
        tell(evaluation, f"α = {alpha:g} ({number} of {len(alphas)})", me)
        points.append(point(alpha, evaluation["tasks"]))
    found: dict[str, Any] = about | {"points": points, "best": best(points)}
    if me.is_main:
        lease.write(out / "blend.json", json.dumps(found, indent=1, allow_nan=False))
        print(f"\n{table(points)}\n\nbest: α = {found['best']['alpha']:g}, {found['best']['why']}", flush=True)
    return found


def _step(alpha: float) -> int:
    """That in the names of the files of a blend's evaluation."""
    return round(alpha * 1000)


def _weights(folders: Sequence[Path]) -> str:
    """Changes when a file of weights is written anew."""
    files = [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]


def _require_own(out: Path, about: dict[str, Any], suite: Suite) -> None:
    """Raises BadInput when there are blends in a folder that this sweep cannot go on with."""
    folder, file = out / "blend", out / "blend.json"
    advice = f"nothing is overwritten; remove {folder} and {file}, or give another folder with --out"
    if folder.exists() and any(folder.iterdir()) and not (folder / "sweep.json").exists():
        raise BadInput(f"{folder} exists, and does not say of which models; {advice}")
    for one in (folder / "sweep.json", file):
        before = read_json(one)
        if one.exists() and (changed := differences({key: before.get(key) for key in about}, about)):
            raise BadInput(f"{one} is of another sweep ({changed}); {advice}")
    if (suite.folder / f"{file_name(0)}.json").exists() and (problems := baseline.problems(suite)):
        raise BadInput([f"{problem.partition(';')[0]}; {advice}" for problem in problems])


def _measured(suite: Suite) -> dict[int, Evaluation]:
    """{step: evaluation} of what an earlier sweep has left; nothing without that of the base."""
    found = {one["step"]: one for one in evaluations(suite.folder.parent)}
    return found if 0 in found else {}


def parse_alphas(text: str) -> list[float]:
    """`0,0.5,1` as numbers in rising order; always with 0, the base, which the others are compared with.

    Raises:
        BadInput: not numbers, not between 0 and 1, finer than 0.001, or none but 0.
    """
    try:
        alphas = sorted({0.0, *(round(float(word), 9) for word in text.split(","))})
    except ValueError:
        raise BadInput(f"--sweep: {text!r} is not a list of numbers, such as 0,0.25,0.5,0.75,1") from None
    if not all(0 <= alpha <= 1 and alpha == round(alpha, 3) for alpha in alphas) or len(alphas) < 2:
        raise BadInput(f"--sweep: {text!r}: must be numbers between 0 (base) and 1 (tuned), in steps of 0.001 or more")
    return alphas


def point(alpha: float, tasks: dict[str, Any]) -> Point:
    """A blend as a point of the frontier: skill and retention are the mean gains of those tasks; at α = 0 both are 0.

    Gains are those of `wording.gain`: shares of 1 for accuracies, shares of the base's loss for losses. Positive is
    better; null if one is not known.
    """
    return {"alpha": alpha, **mean_gains(tasks), "tasks": tasks}


def best(points: Sequence[Point]) -> dict[str, Any]:
    """{alpha, why}: the most skill of the blends of which no retention task has lost more than its limit (max_drop).

    If none of these has gained skill, the knee: the greatest distance from the line between the first and the last
    point of skill against retention, each scaled to the span between its least and its greatest value.
    """
    known = [one for one in points if one["skill"] is not None and one["retention"] is not None]
    if not known:
        return {"alpha": 0.0, "why": "since no blend has numbers that can be compared"}
    kept = [one for one in known if not _beyond(one)]
    chosen = max(kept, key=lambda one: (one["skill"], -one["alpha"]), default=known[0])
    if chosen["skill"] > 0:
        rest = [f"{one['alpha']:g}" for one in known if _beyond(one)]
        limits = f"; beyond a limit: {', '.join(rest)}" if rest else ", as all are"
        why = f"the most skill with every retention task within its limit{limits}"
    elif all(one["skill"] <= 0 for one in known):
        chosen, why = known[0], "the base: no blend has gained skill"
    else:
        skill, retention = (_scaled([one[key] for one in known]) for key in ("skill", "retention"))
        at = max(range(len(known)), key=lambda number: (skill[number] + retention[number], -number))
        chosen = known[at]
        lost = ", ".join(_beyond(chosen))
        why = "the knee of skill against retention: no blend that has gained skill keeps every task within its limit"
        why += f", and this one too loses more on {lost}" if lost else ""
    return {
        "alpha": chosen["alpha"],
        "why": f"{why} ({_place(chosen)}; at α = {known[-1]['alpha']:g}: {_place(known[-1])})",
    }


def _place(one: Point) -> str:
    return f"skill {_signed(one['skill'])}, retention {_signed(one['retention'])}"


def _beyond(one: Point) -> list[str]:
    """Retention tasks that have lost more than their limit."""
    return [
        name
        for name, task in one["tasks"].items()
        if task["measures"] == "retention" and (task["drop"] is None or task["drop"] > task["limit"])
    ]


def _scaled(values: Sequence[float]) -> list[float]:
    low, span = min(values), max(values) - min(values)
    return [(value - low) / span if span else 0.0 for value in values]


def _signed(value: float | None) -> str:
    return "unknown" if value is None else f"{value * 100:+.1f} %"


def table(points: Sequence[Point]) -> str:
    """A row a blend: skill and retention, and each task's score with its change from α = 0 and its interval."""
    names = list(points[0]["tasks"])
    heads = [f"{name} ({points[0]['tasks'][name]['metric']})" for name in names]
    rows = [["α", "skill", "retention", *heads]]
    for one in points:
        cells = [_cell(one["tasks"][name], one["alpha"] > 0) for name in names]
        rows.append([f"{one['alpha']:g}", _signed(one["skill"]), _signed(one["retention"]), *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _cell(task: dict[str, Any], blended: bool) -> str:
    if task["score"] is None:
        return "unknown"
    if not blended or task["drop_ci"] is None:
        return f"{task['score']:.4g}"
    sign = -1 if task["higher_is_better"] else 1
    change, *interval = (sign * value + 0.0 for value in (task["drop"], *task["drop_ci"]))
    low, high = sorted(interval)
    return f"{task['score']:.4g} ({change:+.3g}, {low:+.3g} to {high:+.3g})"
