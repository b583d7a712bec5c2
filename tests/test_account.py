"""Where the time of a step goes: on real ranks, and with one of them slow."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Launch, losses, metrics
from ranks import Ranks
from transformers import AutoModelForCausalLM

from fullft.account import _PROFILER, Account
from fullft.errors import BadInput
from fullft.flops import Flops, flops_of
from fullft.preflight import preflight
from fullft.recipe import identity, parse_recipe

PARTS = [f"time/{part}_seconds" for part in ("data", "forward", "backward", "optimizer", "communication", "rest")]

# Each rank writes beside its log what it finds of its own account.
WALL = """
import time, json, os
from fullft import trainer
ended = trainer.Account.end_step
def end_step(self, *given):
    global last
    seconds = ended(self, *given)
    now = time.perf_counter()
    if "last" in globals():
        with open(f"wall-{os.environ['RANK']}", "a") as file:
            file.write(json.dumps([now - last, seconds, len(self._borders)]) + "\\n")
    last = now
    return seconds
trainer.Account.end_step = end_step
"""


@pytest.mark.ranks
def test_the_parts_of_a_step_sum_to_the_time_that_passed(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["train"] |= {"steps": 6, "global_batch_size": 8}
    with Ranks(recipe, 2, program=WALL) as ranks:
        assert ranks.codes() == [0, 0], ranks.output
    rows = [row for row in metrics(recipe) if "time/step_seconds" in row]
    assert len(rows) == 6
    for row in rows:
        assert sum(row[part] for part in PARTS) == pytest.approx(row["time/step_seconds"])
        assert all(row[part] > 0 for part in PARTS)
        assert row["perf/tflops_per_gpu"] > 0
        assert "perf/mfu" not in row  # of a CPU no peak is known
    for rank in (0, 1):
        walls = [json.loads(line) for line in (tmp_path / f"wall-{rank}").read_text().splitlines()]
        assert len(walls) == 5
        # By a clock around the whole steps: all of it is in some part.
        assert sum(seconds for _, seconds, _ in walls) == pytest.approx(sum(wall for wall, *_ in walls), abs=0.1)
        assert {borders for *_, borders in walls} == {1}  # nothing piles up
    seen = [json.loads(line)[1] for line in (tmp_path / "wall-0").read_text().splitlines()]
    assert [row["time/step_seconds"] for row in rows[1:]] == pytest.approx(seen)


@pytest.mark.ranks
def test_a_slow_rank_is_communication_of_the_other(recipe: dict[str, Any]) -> None:
    """Rank 1 sleeps in its own forward and backward pass, for which rank 0 waits in gathers and reductions."""
    program = (
        "import os, time\n"
        "from transformers.models.llama.modeling_llama import LlamaMLP\n"
        "run = LlamaMLP.forward\n"
        "def slow(self, x):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        time.sleep(0.2)\n"
        "        x.register_hook(lambda gradient: time.sleep(0.2)) if x.requires_grad else None\n"
        "    return run(self, x)\n"
        "LlamaMLP.forward = slow\n"
    )
    recipe["train"]["steps"] = 3
    with Ranks(recipe, 2, program=program) as ranks:
        assert ranks.codes() == [0, 0], ranks.output
    waited = 0.2 * 2 * 2 * 2  # layers, passes, micro-batches
    for row in metrics(recipe):
        if "time/step_seconds" in row:
            assert 0.9 * waited < row["time/communication_seconds"] < row["time/step_seconds"]
            assert row["time/forward_seconds"] + row["time/backward_seconds"] < 0.7 * waited


def test_a_reference_that_runs_beside_is_waited_for_too() -> None:
    """By the names that DeepSpeed gives an engine without optimizer; all that is listened to is in one account."""
    engine = SimpleNamespace(world_size=2, device="cpu", optimizer=None)
    account = Account(engine, None, None, checkpointing="none")
    assert "time/communication_seconds is not measured" in account.why_no_waits
    coordinator = SimpleNamespace(**{_PROFILER: None})
    reference = SimpleNamespace(optimizer=SimpleNamespace(param_coordinator=coordinator))
    assert account.listen(reference, trains=False) == ""
    account.phase("forward")
    listener = getattr(coordinator, _PROFILER)
    listener.start_event("forward_fetch_wait")
    time.sleep(0.02)
    listener.stop_event("forward_fetch_wait", 1)
    account.phase("sums over ranks")
    account.end_step(1, 0.0, 0.0)
    assert account._seconds["communication"] >= 0.02


@pytest.mark.ranks
def test_rows_that_stand_for_several_steps_are_their_means(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["train"] |= {"steps": 6}
    recipe["tracking"]["every_steps"] = 3
    with Ranks(recipe, 1, program=WALL.replace("os.environ['RANK']", "'0'")) as ranks:
        assert ranks.codes() == [0], ranks.output
    rows = [row for row in metrics(recipe) if "time/step_seconds" in row]
    seconds = [json.loads(line)[1] for line in (tmp_path / "wall-0").read_text().splitlines()]
    assert len(rows) == 2
    assert rows[1]["time/step_seconds"] == pytest.approx(sum(seconds[2:]) / 3)
    tokens = rows[1]["train/tokens"] - rows[0]["train/tokens"]
    assert rows[1]["perf/tokens_per_second"] == pytest.approx(tokens / sum(seconds[2:]))


@pytest.mark.ranks
def test_the_operations_of_a_step_are_those_of_its_documents(recipe: dict[str, Any], launch: Launch) -> None:
    """Counted again from the batches, one rank or two."""
    recipe["train"] |= {"steps": 1, "global_batch_size": 2}
    inputs = preflight(parse_recipe(recipe), 1)
    found = flops_of(AutoModelForCausalLM.from_pretrained(recipe["model"]["path"]))
    expected = 0.0
    for batch in inputs.batches.of_step(0, 0):
        labels = int((batch.labels != -100).sum())
        expected += 3 * (found.per_token * batch.tokens + found.per_label * labels)
        ids = batch.position_ids[0].tolist()
        expected += 3 * found.per_pair[None] * sum(position + 1 for position in ids[: batch.tokens])
    for ranks in (1, 2):
        recipe["run_dir"] = f"{recipe['run_dir']}-{ranks}"
        launch(recipe, ranks=ranks)
        row = metrics(recipe)[-1]
        assert row["perf/tflops_per_gpu"] * 1e12 * ranks * row["time/step_seconds"] == pytest.approx(expected)


class Event:
    """A CUDA event of a GPU whose clock goes on by 1 s from event to event."""

    made = 0
    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        Event.made += 1

    def record(self) -> None:
        Event.now += 1
        self.at = Event.now

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) * 1000


def test_on_a_gpu_the_times_are_those_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arithmetic alone, since there is no GPU: intervals, waits within phases, and that events are used again."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    engine = SimpleNamespace(world_size=2, device="cuda:0", optimizer=None)
    account = Account(engine, Flops(0, 1, {}, 0, 0), 1.0, checkpointing="none")
    account.why_no_waits = ""
    for _ in range(3):
        account.phase("data", 1)
        account.phase("forward")
        account._begin_wait()
        account._begin_wait()  # within it
        account._end_wait()
        account._end_wait()
        account._begin_wait()
        account._end_wait(False)  # there was nothing to wait for
        account.phase("evaluation")
        account.phase("backward")
        account.phase("sums over ranks")
        seconds = account.end_step(10, 4.0, 5.0)
        row, made = account.row(), Event.made
    assert [row[part] for part in PARTS] == [1, 3, 1, 0, 2, 1]  # the wait that was none took its begin
    assert seconds == row["time/step_seconds"] == 8
    assert (row["perf/tokens_per_second"], row["perf/mfu"], row["perf/hfu"]) == (10 / 8, 4 / 16, 5 / 16)
    assert made == Event.made <= 12


@pytest.mark.ranks
def test_other_names_in_deepspeed_leave_communication_unmeasured(recipe: dict[str, Any]) -> None:
    """The names that are listened to are there (or the tests above fail); without them a run goes on and says so."""
    program = "from fullft import account\naccount._PROFILER = '_moved'\n"
    with Ranks(recipe, 2, program=program) as ranks:
        assert ranks.codes() == [0, 0], ranks.output
        assert "time/communication_seconds is not measured" in ranks.logs[0].read_text()
    rows = [row for row in metrics(recipe) if "time/step_seconds" in row]
    assert all("time/communication_seconds" not in row and row["time/rest_seconds"] > 0 for row in rows)


@pytest.mark.ranks
def test_a_trace_of_some_steps(recipe: dict[str, Any], launch: Launch) -> None:
    launch(recipe)
    plain = losses(recipe)
    recipe["run_dir"] += "-traced"
    recipe["train"]["profile"] = [2, 3]
    done = launch(recipe)
    assert losses(recipe) == plain
    (file,) = (Path(recipe["run_dir"]) / "profile").iterdir()  # of rank 0 alone: both are on one node
    assert file.name == "steps-00000002-00000003.rank-00000.json.gz"
    assert f"{file}; open it at" in done.stdout
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    names = [event.get("name") for event in events if event.get("cat") == "user_annotation"]
    assert [names.count(phase) for phase in ("data", "forward", "backward", "update")] == [2, 4, 4, 2]
    assert any(event.get("name") == "aten::mm" for event in events)


def test_a_profile_must_be_steps_of_the_run(recipe: dict[str, Any]) -> None:
    for steps, complaint in (([0, 2], "counted from 1"), ([3, 2], "counted from 1"), ([1, 21], "at most 20")):
        recipe["train"]["profile"] = steps
        with pytest.raises(BadInput, match=complaint):
            parse_recipe(recipe)
    recipe["train"]["profile"] = [3, 5]
    with pytest.raises(BadInput, match="ends after the last optimizer step, 4"):
        preflight(parse_recipe(recipe), 2)
    recipe["train"]["profile"] = [3, 4]
    traced = parse_recipe(recipe)
    del recipe["train"]["profile"]
    assert identity(traced) == identity(parse_recipe(recipe))  # a run that was started without may be traced
