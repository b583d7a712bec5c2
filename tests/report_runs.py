"""Run folders as training leaves them, made without training: numbers that hang together."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

SHARES = ("exact_match", "acc", "acc_norm")
TASKS: dict[str, dict[str, Any]] = {
    # change: of the score from step 0 to the last, better is positive; flips: share of items that change
    "gsm8k": {"metric": "exact_match", "measures": "skill", "base": 0.123, "change": 0.412, "n": 1319, "flips": 0.45},
    "validation": {"metric": "loss", "measures": "skill", "base": 1.912, "change": 0.611, "n": 400, "flips": 0.3},
    "hellaswag": {"metric": "acc_norm", "measures": "retention", "base": 0.5, "change": -0.04, "n": 2000, "flips": 0.1},
    "arc_easy": {"metric": "acc", "measures": "retention", "base": 0.655, "change": -0.004, "n": 1000, "flips": 0.08},
    "wiki": {"metric": "bits_per_byte", "measures": "retention", "base": 0.8, "change": -0.03, "n": 300, "flips": 0.2},
}  # fmt: skip
STEPS = (0, 50, 100, 150, 200, 250, 300)


def task(
    metric: str, measures: str, base: float, gain: float, n: int, half: float | None, limit: float | None = None,
    p: float | None = None, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """An entry of `tasks` of an evaluation, where the score has got better by `gain`; half: of the 95 % interval of the
    paired drop, None for a run without statistics."""
    higher = metric in SHARES
    found: dict[str, Any] = {
        "kind": "generate" if metric == "exact_match" else "text", "measures": measures,
        "metric": metric, "higher_is_better": higher, "n": n, "score": base + gain if higher else base - gain,
        "base": base, "drop": -gain, "extra": {} if higher else {"perplexity": 12.3, "tokens": 50_000},
    }  # fmt: skip
    if half is None:
        return found | more
    p = p if p is not None else math.erfc(abs(gain) / (half / 1.96) / math.sqrt(2)) if half else 1.0
    chance = {"acc": 0.25, "acc_norm": 0.25, "bits_per_byte": 8.0}.get(metric, 0.0 if higher else None)
    return found | {
        "se": half / 1.96, "clusters": n, "drop_se": half / 1.96, "drop_ci": [-gain - half, -gain + half],
        "level": 0.95, "p": p, "p_holm": min(1.0, 3 * p) if measures == "retention" else None, "q": min(1.0, 2 * p),
        "test": "mcnemar_midp" if higher else "ratio_t", "discordant": None, "chance": chance, "visible_drop": None,
        "retention": (found["score"] - chance) / (base - chance) if chance is not None else None,
        "limit": limit if measures == "retention" else None, "gate": None, "lower_bound_gate": None, "z_gate": None,
    } | more  # fmt: skip


def evaluation(step: int, tasks: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"format": "fullft-retention/1", "step": step, "base_step": 0, "whole": True, "tasks": tasks} | more


def write_run(
    folder: Path, seed: int = 0, forgetting: float = 1.0, rows: int = 300, statistics: bool = True, every: int = 1,
    state: dict[str, Any] | None = None, blend: bool = False, rollback: bool = False, **train: Any,
) -> Path:  # fmt: skip
    """A run of 300 steps with five tasks; forgetting: over that of TASKS."""
    chance = random.Random(seed)
    _write(folder / "recipe.yaml", yaml.safe_dump(_recipe(folder, seed, train), sort_keys=False))
    environment = {"torch": "2.13.0", "device": "NVIDIA H100", "world_size": "8", "git_commit": "<b>c60a6d9</b>"}
    _write(folder / "env.json", json.dumps(environment))
    _write(folder / "plan.json", json.dumps({"steps": rows, "warnings": ["data.train: 3 rows & more are long"]}))
    _write(folder / "state.json", json.dumps(state or {"status": "done", "step": rows}))
    steps = [round(step * rows / STEPS[-1]) for step in STEPS]
    for at, step in enumerate(steps):
        content = _evaluation(step, at / (len(STEPS) - 1), forgetting, chance, statistics)
        _write(folder / "retention" / f"step-{step:08d}.json", json.dumps(content))
        _write_samples(folder, step, at / (len(STEPS) - 1))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, rows + 1, every):
            file.write(json.dumps(_row(step, rows, chance)) + "\n")
    if rollback:
        _write_rollback(folder, chance)
    if blend:
        _write(folder / "blend.json", json.dumps(_blend(forgetting, chance)))
    return folder


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def _recipe(folder: Path, seed: int, train: dict[str, Any]) -> dict[str, Any]:
    return {
        "run_dir": str(folder), "model": {"path": "SmolLM2-135M"}, "data": {"train": [{"path": "a.jsonl"}]},
        "train": {"learning_rate": 1e-5, "seed": seed, "steps": 300} | train,
        "retention": {"every_steps": 50, "tasks": [{"name": name} for name in TASKS]},
    }  # fmt: skip


def _evaluation(step: int, share: float, forgetting: float, chance: random.Random, statistics: bool) -> dict[str, Any]:
    tasks = {}
    for name, of in TASKS.items():
        keeps = of["measures"] == "retention"
        way = 1 - math.exp(-4 * share) if not keeps else share**0.8 * forgetting
        half = 1.96 * math.sqrt(of["flips"] / of["n"]) * (1.0 if of["metric"] in SHARES else 0.25)
        gain = (of["change"] * way + chance.gauss(0, half / 4)) if step else 0.0
        limit = (0.02 if of["metric"] in SHARES else 0.05) if keeps else None
        tasks[name] = task(
            of["metric"],
            of["measures"],
            of["base"],
            gain,
            of["n"],
            (half if step else 0.0) if statistics else None,
            limit,
        )
    if not statistics:
        return evaluation(step, tasks)
    layers = {str(layer): share * forgetting * (0.02 + 0.0015 * layer + 0.002 * chance.random()) for layer in range(30)}
    drops = {name: one["drop"] for name, one in tasks.items() if one["measures"] == "retention"}
    worst = max(drops, key=lambda name: drops[name])
    over = step > 0 and tasks["hellaswag"]["drop_ci"][0] > 0.02
    return evaluation(
        step, tasks, weights="live", look=round(share * 6), seconds=12.3,
        whole=share in (0, 1) or share < 0.6,
        summary={"average_forgetting": sum(drops.values()) / 3, "worst": {"task": worst, "drop": drops[worst]}},
        divergence={
            "kl_new_task": 3.1 * share * forgetting, "kl_general": 0.4 * share * forgetting, "kl_tail_mass": 0.04,
            "drift": {"all": 0.05 * share * forgetting, "embed": 0.01 * share, "layers": layers},
        },
        gate={
            "action": "alert", "decision": "alert" if over else "continue",
            "reasons": ["task hellaswag has lost 4.1 points since step 0; 2 are allowed (max_drop)"] if over else [],
            "breaches_in_row": {},
        },
    )  # fmt: skip


def _write_rollback(folder: Path, chance: random.Random) -> None:
    """Steps 150 and 200 were run once before, and lost too much."""
    entry = {"from_step": 200, "to_step": 100, "learning_rate_factor": 0.5, "pull_factor": 1.0, "done": True}
    entry["reasons"] = ["task hellaswag has lost 6.1 points since step 0; 2 are allowed (max_drop)"]
    _write(folder / "retention" / "rollbacks.json", json.dumps([entry]))
    for step in (150, 200):
        content = _evaluation(step, step / 300, 2.5, chance, True)
        _write(folder / "retention" / "rollback-1" / f"step-{step:08d}.json", json.dumps(content))


def _row(step: int, rows: int, chance: random.Random) -> dict[str, Any]:
    loss = 0.8 + 1.4 * math.exp(-6 * step / rows) + chance.gauss(0, 0.06)
    return {
        "step": step, "train/global_step": step, "train/loss": loss, "train/loss_task": loss * 0.9,
        "train/loss_replay": 2.1 + chance.gauss(0, 0.1), "train/loss_kl": abs(chance.gauss(0.05, 0.01)),
        "train/learning_rate": 1e-5 * min(step / rows * 20, 0.5 + 0.5 * math.cos(math.pi * step / rows)),
        "train/grad_norm": abs(chance.gauss(1.2, 0.3)) + (8 if step == rows // 2 else 0), "train/tokens": step * 65536,
        "perf/tokens_per_second": chance.gauss(51_000, 900), "time/step_seconds": 1.3, "memory/peak_gib": 61.2,
        "data/a/tokens_of_step": 60000, "data/a/epochs": step / 150, "data/replay/tokens_of_step": 5536,
        "data/replay/epochs": step / 900,
    }  # fmt: skip


def _write_samples(folder: Path, step: int, share: float) -> None:
    rows = []
    for at in range(20):
        right = at % 5 == 4 if share == 0 else at % 5 != 4 and at / 20 < share
        told = (
            f"{at} + 4 = {at + 4 if right else at + 7}"
            if share or at % 2
            else "I do not know <script>alert(1)</script>"
        )
        prompt = (
            f"<|im_start|>user\nAnn has {at} apples and gets 4 more. How many now?<|im_end|>\n<|im_start|>assistant\n"
        )
        rows.append({"prompt": prompt, "reference": f"{at} + 4 = {at + 4}", "correct": right, "generation": told})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    _write(folder / "samples" / f"step-{step:08d}.gsm8k.jsonl", text)


def _blend(forgetting: float, chance: random.Random) -> dict[str, Any]:
    points = []
    for alpha in (0.0, 0.25, 0.5, 0.75, 1.0):
        tasks = {}
        for name, of in TASKS.items():
            way = alpha**0.5 if of["measures"] == "skill" else alpha**1.5 * forgetting
            tasks[name] = task(of["metric"], of["measures"], of["base"], of["change"] * way, of["n"], 0.01)
        points.append({"alpha": alpha, "tasks": tasks, "skill": alpha, "retention": chance.random()})
    best = {"alpha": 0.5, "why": "most skill within the limits"}
    return {"format": "fullft-blend/1", "base": "a", "tuned": "b", "points": points, "best": best}
