"""The gate of retention: how often it cries wolf, and what a run does when it finds a loss."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import chats, metrics, run_ranks, write_jsonl, write_recipe
from ranks import Ranks
from scipy.stats import norm

from fullft.cli import check
from fullft.ends import limits_of_breaches, stop_decided
from fullft.errors import BadInput
from fullft.preflight import preflight
from fullft.recipe import Gate, Recipe, identity, parse_recipe
from fullft.retention import baseline
from fullft.retention.divergence import metrics as divergence_metrics
from fullft.retention.gate import can_breach, decide, error_of_look, last_ok
from fullft.retention.suite import _finite
from fullft.trainer import require_same

GATE = Gate(action="stop", max_drop=0.02, patience=1)


def texts_task(drop: float, se: float = 0.01, measures: str = "retention") -> dict[str, Any]:
    return {
        "measures": measures, "metric": "loss", "test": "ratio_t", "drop": drop, "drop_se": se, "n": 200,
        "clusters": 200, "limit": 0.02, "discordant": None,
    }  # fmt: skip


def run_of(drops: list[list[float]], gate: Gate = GATE, planned: int | None = None) -> list[dict[str, Any]]:
    """The evaluations of a run whose tasks have these drops at looks 1, 2, …"""
    found: list[dict[str, Any]] = []
    planned = planned or len(drops)
    for step, values in enumerate([[0.0] * len(drops[0]), *drops]):
        tasks = {f"task {at}": texts_task(value) for at, value in enumerate(values)}
        one = {"step": step, "tasks": tasks}
        found.append(decide(one, found, gate, 0.95, planned, step == planned))
    return found


def test_the_quantiles_are_those_of_the_split() -> None:
    looks = run_of([[0.0]] * 20)
    assert [one["look"] for one in looks] == list(range(21))
    quantiles = [one["tasks"]["task 0"]["z_gate"] for one in looks[1:]]
    assert quantiles == pytest.approx([norm.isf(0.025 / 19)] * 19 + [norm.isf(0.025)])
    assert (round(quantiles[0], 2), round(quantiles[-1], 2)) == (3.01, 1.96)
    assert error_of_look(40, 20, False, 0.05) == 0.025 / 40  # the recipe was changed to more looks
    two = run_of([[0.2, 0.0]] * 20)[1]["tasks"]  # Holm: the other task is tried against what is left
    assert [task["z_gate"] for task in two.values()] == pytest.approx([norm.isf(0.025 / 38), norm.isf(0.025 / 19)])


def test_ok_watch_and_breach() -> None:
    one = run_of([[0.01, 0.04, 0.2]] * 5)[1]
    assert [task["gate"] for task in one["tasks"].values()] == ["ok", "watch", "breach"]
    assert one["gate"]["decision"] == "stop"
    assert one["gate"]["breaches_in_row"] == {"task 0": 0, "task 1": 0, "task 2": 1}
    assert "task task 2 has lost 0.200 nats a token" in one["gate"]["reasons"][0]
    lost = texts_task(0.0) | {"drop": None, "base": 1.5}  # a score that is not finite
    one = decide({"step": 1, "tasks": {"nan": lost, "kept": texts_task(0.0)}}, [], GATE, 0.95, 5, False)
    assert [task["gate"] for task in one["tasks"].values()] == ["breach", "ok"]
    assert one["gate"]["decision"] == "stop"
    assert one["gate"]["reasons"] == ["task nan: its loss, 1.5 at step 0, is no finite number any more"]
    for step, base in ((0, 1.5), (1, None)):
        one = decide({"step": step, "tasks": {"nan": lost | {"base": base}}}, [], GATE, 0.95, 5, False)
        assert (one["tasks"]["nan"]["gate"], last_ok([one | {"step": 1}])) == ("watch", 0)
    skill = decide({"step": 1, "tasks": {"new": texts_task(9.0, measures="skill")}}, [], GATE, 0.95, 5, False)
    assert (skill["tasks"]["new"]["gate"], skill["gate"]["decision"]) == (None, "continue")
    unknown = decide({"step": 1, "tasks": {"one item": texts_task(9.0) | {"drop_se": None}}}, [], GATE, 0.95, 5, False)
    assert (unknown["tasks"]["one item"]["gate"], unknown["gate"]["decision"]) == ("watch", "continue")


def test_patience_counts_breaches_in_a_row_and_the_last_look_at_once() -> None:
    patient = GATE.model_copy(update={"patience": 2})
    decisions = [one["gate"]["decision"] for one in run_of([[0.2], [0.0], [0.2], [0.2], [0.0], [0.2]], patient)]
    assert decisions == ["continue", "continue", "continue", "continue", "stop", "continue", "stop"]
    assert last_ok(run_of([[0.0], [0.04], [0.2]], patient)) == 1
    for action, decision in (("none", "continue"), ("alert", "alert"), ("rollback", "rollback")):
        gate = patient.model_copy(update={"action": action})
        assert run_of([[0.2], [0.2]], gate)[-1]["gate"]["decision"] == decision
    spent = decide({"step": 1, "tasks": {"t": texts_task(0.2)}}, [], GATE.model_copy(update={"action": "rollback"}),
                   0.95, 5, False, rollbacks=2)  # fmt: skip
    assert (spent["gate"]["decision"], "2 times" in spent["gate"]["reasons"][-1]) == ("stop", True)


def test_few_questions_that_flip_are_no_proof() -> None:
    task = {"measures": "retention", "metric": "acc", "test": "mcnemar_midp", "drop": 1.0, "drop_se": 0.0, "n": 2,
            "clusters": 2, "limit": 0.02, "discordant": [2, 0]}  # fmt: skip
    one = decide({"step": 1, "tasks": {"t": task}}, [], GATE, 0.95, 1, True)
    assert one["tasks"]["t"]["gate"] == "watch"


def test_a_task_of_too_few_items_can_never_breach() -> None:
    assert not can_breach("text", 1, 1, 0.02, 0.95)
    assert not can_breach("multiple_choice", 100, 1, 0.02, 0.95)
    assert can_breach("text", 2, 2, 0.02, 0.95)
    # Of questions without clusters, as `decide` judges them when all that were right are wrong.
    for items in range(2, 12):
        task = {"measures": "retention", "metric": "acc", "test": "mcnemar_midp", "drop": 1.0, "drop_se": 0.0,
                "n": items, "clusters": items, "limit": 0.02, "discordant": [items, 0]}  # fmt: skip
        one = decide({"step": 1, "tasks": {"t": task}}, [], GATE, 0.95, 1, True)
        assert can_breach("generate", items, items, 0.02, 0.95) == (one["tasks"]["t"]["gate"] == "breach")
    assert not can_breach("generate", 2, 2, 0.02, 0.95)
    assert can_breach("generate", 11, 11, 0.02, 0.95)


def test_numbers_of_the_divergence_that_are_not_finite_are_not_written() -> None:
    found = {"kl_new_task": float("nan"), "kl_general": 0.5, "tokens": {"general": 9}, "drift": {"all": float("inf")}}
    assert _finite(found) == {"kl_new_task": None, "kl_general": 0.5, "tokens": {"general": 9}, "drift": {"all": None}}
    assert divergence_metrics(found) == {"divergence/kl_general": 0.5}


@pytest.mark.ranks
def test_a_failure_of_rank_0_is_raised_on_all_ranks(tmp_path: Path) -> None:
    script = tmp_path / "fail.py"
    script.write_text("""
from fullft import cluster
from fullft.errors import BadInput

def fail(error):
    raise error

me = cluster.discover()
cluster.join(me, 1)
assert cluster.on_all(lambda: me.rank + 7) == 7
said = []
for error in (KeyError("gate"), BadInput(["one", "two"])):
    try:
        cluster.on_all(lambda: fail(error))
    except Exception as caught:
        said.append(" ".join([type(caught).__name__, *str(caught).split()]))
print(f"rank {me.rank}: {'; '.join(said)}.", flush=True)
cluster.leave()
""")
    done = run_ranks(script, ranks=2, cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "rank 0: KeyError 'gate'; BadInput one two." in done.stdout
    assert re.search(r"rank 1: RuntimeError rank 0 on .* failed: KeyError: 'gate'; BadInput one two\.", done.stdout)


@pytest.mark.parametrize("correlation", [0.0, 0.9])
@pytest.mark.parametrize("tasks", [1, 3])
def test_false_alarms_of_healthy_runs_are_at_most_five_percent(correlation: float, tasks: int) -> None:
    """Drops that are in truth exactly the limit, at 20 looks whose errors are correlated: an alarm is false."""
    rng, looks, runs = np.random.default_rng(5), 20, 1500
    noise = rng.normal(size=(runs, looks, tasks))
    for look in range(1, looks):
        noise[:, look] = correlation * noise[:, look - 1] + np.sqrt(1 - correlation**2) * noise[:, look]
    # As `decide` does, one quantile after the other (Holm), for all runs at once.
    alarms = np.zeros(runs, bool)
    for look in range(looks):
        share = error_of_look(look + 1, looks, look == looks - 1, 0.05)
        alarms |= noise[:, look].max(-1) > norm.isf(share / tasks)
    assert alarms.mean() <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / runs)
    some = noise[:40]
    decided = [any(one["gate"]["decision"] == "stop" for one in run_of((0.02 + 0.01 * run).tolist())) for run in some]
    assert decided == alarms[:40].tolist()


@pytest.fixture(scope="module")
def forgetful(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe whose rate destroys what the base could do within a few steps."""
    folder = tmp_path_factory.mktemp("gate")
    rng = random.Random(1)  # of characters that the training data lack, and so will be thought unlikely
    lines = [{"text": "".join(rng.choices("ZQXJK%$#@&*{}", k=40))} for _ in range(16)]
    return {
        "run_dir": str(folder / "run"), "model": {"path": str(tiny_model)},
        "data": {"train": str(write_jsonl(folder / "train.jsonl", chats(40))), "sequence_length": 128},
        "train": {"steps": 6, "global_batch_size": 4, "micro_batch_size": 1, "learning_rate": 3e-2,
                  "warmup_steps": 4, "schedule": "constant"},
        "checkpoint": {"every_steps": 100, "keep": 1, "keep_best": False},  # else where all is well
        "retention": {
            "every_steps": 1,
            "tasks": [{"name": "texts", "kind": "text", "data": str(write_jsonl(folder / "texts.jsonl", lines))}],
            "gate": {"max_drop": 0.15, "patience": 2},
        },
        "tracking": {"wandb": "disabled"}, "export": {"dtype": "fp32"},
    }  # fmt: skip


def gated(recipe: dict[str, Any], name: str, **gate: Any) -> dict[str, Any]:
    retention = recipe["retention"]
    return recipe | {
        "run_dir": str(Path(recipe["run_dir"]).with_name(name)),
        "retention": retention | {"gate": retention["gate"] | gate},
    }


def read(recipe: dict[str, Any], name: str) -> Any:
    return json.loads((Path(recipe["run_dir"]) / name).read_text())


def evaluation(recipe: dict[str, Any], step: int) -> dict[str, Any]:
    found: dict[str, Any] = read(recipe, f"retention/step-{step:08d}.json")
    return found


def checkpoints(recipe: dict[str, Any]) -> list[int]:
    return sorted(int(path.name[5:]) for path in (Path(recipe["run_dir"]) / "checkpoints").glob("step-????????"))


def test_a_decision_counts_until_a_limit_is_changed(forgetful: dict[str, Any]) -> None:
    def task(name: str, **settings: Any) -> dict[str, Any]:
        return forgetful["retention"]["tasks"][0] | {"name": name} | settings

    def recipe_of(**settings: Any) -> Recipe:
        raw = gated(forgetful, "decided", action="stop")
        raw["retention"]["tasks"] = [task("texts"), task("other", **settings), task("skill", measures="skill")]
        return parse_recipe(raw)

    recipe = recipe_of(max_drop=0.1)
    folder = recipe.run_folder / "retention"
    folder.mkdir(parents=True)
    gate = {"decision": "stop", "settings": recipe.retention.gate_settings, "breaches_in_row": {"texts": 0, "other": 2}}
    (folder / "step-00000002.json").write_text(json.dumps({"step": 2, "tasks": {}, "gate": gate}))
    (folder / "step-00000003.json").write_text(json.dumps({"step": 3, "tasks": {}}))  # of before there was a gate
    assert stop_decided(recipe, 2) == gate
    assert stop_decided(recipe_of(max_drop=0.5), 2) is None
    assert stop_decided(recipe, 3) is None
    assert limits_of_breaches(recipe, gate) == "retention.tasks.1.max_drop"
    both = gate | {"breaches_in_row": {"texts": 1, "other": 2}}
    assert limits_of_breaches(recipe, both) == "retention.gate.max_drop and retention.tasks.1.max_drop"
    assert limits_of_breaches(recipe_of(), both) == "retention.gate.max_drop"


def test_a_checkpoint_of_another_weight_of_replay_or_measured_by_an_older_version_is_refused(
    forgetful: dict[str, Any], tmp_path: Path
) -> None:
    recipe = parse_recipe(gated(forgetful, "weights"))
    batches: Any = SimpleNamespace(fingerprint="f", replay_label_weight=0.5)
    state = {"path": "step-00000004", "data": "f", "recipe": identity(recipe)}
    require_same(state | {"replay_label_weight": 0.5}, recipe, batches)
    for before in ({"replay_label_weight": 0.25}, {}):  # checkpoints of before say nothing: it was 1
        with pytest.raises(BadInput, match=r"data\.replay_weight: up to step-00000004 a label of replay counted"):
            require_same(state | before, recipe, batches)
    batches.replay_label_weight = 1.0
    require_same(state, recipe, batches)
    suite: Any = SimpleNamespace(folder=tmp_path / "retention")
    assert "measured by an older version of fullft" in baseline.problems(suite)[0]


@pytest.mark.ranks
def test_stop_saves_and_exits_with_75_again_and_again_until_the_gate_is_changed(forgetful: dict[str, Any]) -> None:
    recipe = gated(forgetful, "stop", action="stop")
    with Ranks(recipe) as ranks:
        assert ranks.codes() == [75, 75], ranks.output
        said = ranks.output
    assert "RETENTION STOP" in said
    state = read(recipe, "state.json")
    assert (state["status"], "task texts has lost" in state["reason"]) == ("stopped", True)
    stopped = state["step"]
    gates = [evaluation(recipe, step)["tasks"]["texts"]["gate"] for step in range(stopped + 1)]
    assert gates[-2:] == ["breach", "breach"]
    fine = max(step for step, gate in enumerate(gates) if gate == "ok")
    assert checkpoints(recipe) == sorted({stopped} | ({fine} if fine else set()))  # keep is 1
    run = Path(recipe["run_dir"])
    assert (run / "report.html").exists()
    assert read(recipe, "report.json")["state"]["reason"] == state["reason"]
    assert not (run / "REQUEUE").exists()
    assert not (run / "export").exists()
    before = (run / "metrics.jsonl").read_bytes()
    with Ranks(recipe) as ranks:
        assert ranks.codes() == [75, 75], ranks.output
        assert "this run was stopped by retention.gate" in ranks.output
    # Killed after the decision and before it was told: the decision is in the evaluation.
    (run / "state.json").write_text(json.dumps({"status": "running"}))
    with Ranks(recipe) as ranks:
        assert ranks.codes() == [75, 75], ranks.output
    assert (run / "metrics.jsonl").read_bytes() == before
    with Ranks(gated(forgetful, "stop", action="alert")) as ranks:
        assert ranks.codes() == [0, 0], ranks.output
        assert f"resumed from {run}/checkpoints/step-{stopped:08d}" in ranks.output
        assert "RETENTION ALERT" in ranks.output
    assert (read(recipe, "state.json")["status"], evaluation(recipe, 6)["gate"]["decision"]) == ("done", "alert")


@pytest.fixture(scope="module")
def rolled_back(forgetful: dict[str, Any]) -> tuple[dict[str, Any], Path]:
    """A run that is rolled back once and ends well, and what its folder was when rollback.json had been written."""
    recipe = gated(forgetful, "rollback", action="rollback", patience=1, rollback_lr_factor=1e-4)
    with Ranks(recipe) as ranks:
        assert ranks.codes() == [0, 0], ranks.output
    return recipe, Path(recipe["run_dir"])


@pytest.mark.ranks
def test_a_rollback_goes_back_trains_gentler_and_ends_well(rolled_back: tuple[dict[str, Any], Path]) -> None:
    recipe, run = rolled_back
    (entry,) = read(recipe, "retention/rollbacks.json")
    assert (entry["done"], entry["learning_rate_factor"], entry["to_step"] < entry["from_step"]) == (True, 1e-4, True)
    assert read(recipe, "state.json")["status"] == read(recipe, "report.json")["state"]["status"] == "done"
    rows = [row for row in metrics(recipe) if "train/loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 7))  # each once
    rates = [row["train/learning_rate"] for row in rows]
    factors = [1.0] * entry["to_step"] + [1e-4] * (6 - entry["to_step"])
    assert rates == pytest.approx([3e-2 * min(1, (at + 1) / 5) * factor for at, factor in enumerate(factors)])
    aside = [json.loads(line) for line in (run / "metrics.rollback-1.jsonl").read_text().splitlines()]
    assert [row["step"] for row in aside] == list(range(entry["to_step"] + 1, entry["from_step"] + 1))
    abandoned = sorted(path.name for path in (run / "retention/rollback-1").glob("step-*.json"))
    assert abandoned == [f"step-{step:08d}.json" for step in range(entry["to_step"] + 1, entry["from_step"] + 1)]
    assert len(list((run / "retention/rollback-1/items").iterdir())) == len(abandoned)
    assert [evaluation(recipe, step)["tasks"]["texts"]["gate"] for step in range(7)] == ["ok"] * 7
    # The first step again, from the weights of before: the same loss.
    first = entry["to_step"]
    assert rows[first]["train/loss"] == pytest.approx(aside[0]["train/loss"], rel=1e-6)


@pytest.mark.ranks
def test_a_resume_needs_the_items_of_step_0(rolled_back: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    recipe = rolled_back[0] | {"run_dir": str(shutil.copytree(rolled_back[1], tmp_path / "run"))}
    preflight(parse_recipe(recipe), 2)
    items = tmp_path / "run/retention/items/step-00000000.texts.jsonl"
    whole = items.read_text()
    for damaged in (whole[:-20], "".join(whole.splitlines(keepends=True)[:-1])):
        items.write_text(damaged)
        with pytest.raises(BadInput, match=rf"task texts: {items}.*Put it back, or train into another run_dir"):
            preflight(parse_recipe(recipe), 2)
    items.unlink()
    with pytest.raises(BadInput, match=str(items)):
        preflight(parse_recipe(recipe), 2)
    items.write_text(whole)
    suite = tmp_path / "run/retention/suite.json"
    suite.rename(suite.with_suffix(".old"))
    with pytest.raises(BadInput, match="measured by an older version of fullft"):
        preflight(parse_recipe(recipe), 2)
    suite.with_suffix(".old").rename(suite)
    suite.write_text(suite.read_text().replace('"items_sha256": "', '"items_sha256": "0'))
    with pytest.raises(BadInput, match="task texts: its items are not those that"):
        preflight(parse_recipe(recipe), 2)


def test_check_tells_the_smallest_drop_that_a_task_shows(
    forgetful: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = [
        {"question": f"{at} or {at + 1}?", "choices": [f"{at}", f"{at + 1}"], "answer": at % 2, "page": at // 5}
        for at in range(100)
    ]
    task = {"name": "facts", "kind": "multiple_choice", "data": str(write_jsonl(tmp_path / "q.jsonl", questions))}
    recipe = gated(forgetful, "check")
    one = {"name": "one", "kind": "text", "data": str(write_jsonl(tmp_path / "one.jsonl", [{"text": "ZQX"}]))}
    page = {"name": "page", "cluster_field": "page", "data": {"path": task["data"], "limit": 5}}
    few = [one, task | page]
    hopeless = gated(recipe, "check", action="stop")
    hopeless["retention"]["tasks"] = few
    with pytest.raises(BadInput, match=r"task one: 1 item can never show(.|\n)*task page: 5 items in one cluster can"):
        preflight(parse_recipe(hopeless), 2)
    recipe["retention"]["tasks"] = [
        *recipe["retention"]["tasks"],
        task,
        task | {"name": "p", "cluster_field": "page"},
        *few,
    ]
    recipe["retention"]["gate"] = {"action": "stop"}  # to which these are a warning beside the others
    check(str(write_recipe(recipe, tmp_path / "recipe.yaml")), [], 2, False)
    said = capsys.readouterr().out
    assert "retention facts: 100 items show a drop of 8.5 points with 80% power, if 10% of the items flip" in said
    assert "retention p: 100 items in 20 clusters show a drop of 9.3 points" in said
    assert "retention texts: 16 items show a drop of 0.035 bits a byte" in said
    assert "retention one: 1 item can show no drop, as its error is not known" in said
    assert "warning  task one: 1 item can never show a loss of more than 0.02 bits a byte (max_drop)" in said
    assert "warning  task page: 5 items in one cluster can never show a loss of more than 2.0 points" in said


@pytest.mark.ranks
def test_a_rollback_that_is_killed_in_its_middle_is_finished_by_the_next_start(
    forgetful: dict[str, Any], rolled_back: tuple[dict[str, Any], Path]
) -> None:
    recipe = gated(forgetful, "killed", action="rollback", patience=1, rollback_lr_factor=1e-4)
    run, entries = Path(recipe["run_dir"]), Path(recipe["run_dir"]) / "retention/rollbacks.json"
    with Ranks(recipe) as ranks:
        ranks.wait_until(entries.exists, "a rollback")
        ranks.send(signal.SIGKILL)
        ranks.codes()
    (entry,) = json.loads(entries.read_text())
    # As if the kill had come right after the entry: what was already put aside is put back.
    entries.write_text(json.dumps([entry | {"done": False}]))
    for file in (run / "retention/rollback-1").glob("step-*.json"):
        shutil.copy(file, run / "retention" / file.name)
    with Ranks(recipe) as ranks:
        assert ranks.codes() == [0, 0], ranks.output
    assert json.loads(entries.read_text()) == [entry | {"done": True}]
    whole, _ = rolled_back
    keys = ("step", "train/loss", "train/learning_rate", "retention/texts/bits_per_byte")

    def rows(recipe: dict[str, Any]) -> list[list[Any]]:
        return [[row.get(key) for key in keys] for row in metrics(recipe)]

    assert rows(recipe) == rows(whole)


@pytest.mark.ranks
def test_a_resumed_run_can_go_back_to_step_0(forgetful: dict[str, Any]) -> None:
    """A signal comes in the evaluation of step 1, which is done after the resume and finds the loss."""
    recipe = gated(forgetful, "to-0", action="rollback", patience=1, rollback_lr_factor=1e-4, max_drop=0.01)
    recipe["train"] = forgetful["train"] | {"warmup_steps": 0, "steps": 2}
    program = """
import os, signal
from fullft import watchdog

def mark(phase, step=None, plain=watchdog.mark):
    if (phase, step) == ("evaluation", 1):
        os.kill(os.getpid(), signal.SIGTERM)
    plain(phase, step)

watchdog.mark = mark
"""
    with Ranks(recipe, program=program) as ranks:
        assert ranks.codes() == [85, 85], ranks.output
    assert checkpoints(recipe) == [0, 1]
    with Ranks(recipe) as ranks:
        assert ranks.codes() == [0, 0], ranks.output
        assert "evaluation at step 1" in ranks.output
        assert "rolled back to step 0" in ranks.output
        assert "could not be written" not in ranks.output
    assert [(entry["from_step"], entry["to_step"]) for entry in read(recipe, "retention/rollbacks.json")] == [(1, 0)]
