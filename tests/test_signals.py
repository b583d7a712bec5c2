"""A run that is told to end ends soon, whole, with exit code 85, and goes on as if it had never been told."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import chats, losses, metrics, write_jsonl
from ranks import Ranks, wait_for
from test_lease import Job

pytestmark = pytest.mark.ranks

FAILED, REQUEUE = 1, 85
STEPS, EVALUATED, SAVED = 12, [0, 6, 12], 5


@pytest.fixture(scope="module")
def measured(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe of a run whose time goes mostly into evaluations, of three tasks each; run_dir is not interrupted."""
    folder = tmp_path_factory.mktemp("measured")
    prompts = write_jsonl(folder / "prompts.jsonl", chats(8))
    task = {"kind": "generate", "measures": "skill", "data": str(prompts), "max_new_tokens": 8}
    recipe = {
        "run_dir": str(folder / "whole"),
        "model": {"path": str(tiny_model)},
        "data": {
            "train": str(write_jsonl(folder / "train.jsonl", chats(40))), "sequence_length": 128,
            "validation": str(write_jsonl(folder / "validation.jsonl", chats(60)[40:])),
            "cache_dir": str(folder / "cache"),
        },
        "train": {"steps": STEPS, "global_batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 0},
        "retention": {
            "every_steps": 6, "generation_batch_size": 1,
            "tasks": [task | {"name": "one"}, task | {"name": "two"}],
        },
        "checkpoint": {"every_steps": SAVED, "keep": 3},
        "tracking": {"wandb": "offline"},
        "export": {"dtype": "fp32"},
    }  # fmt: skip
    with Ranks(recipe) as ranks:
        assert ranks.codes() == [0, 0], ranks.output
    return recipe


@pytest.fixture
def preempted(measured: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The same recipe in a folder of its own."""
    return measured | {"run_dir": str(tmp_path / "run")}


def read(recipe: dict[str, Any], name: str) -> Any:
    return json.loads((Path(recipe["run_dir"]) / name).read_text())


def assert_left_for_requeue(ranks: Ranks, step: int | None = None) -> None:
    assert ranks.codes() == [REQUEUE] * len(ranks.processes), ranks.output
    marker, state = (json.loads((ranks.folder / name).read_text()) for name in ("REQUEUE", "state.json"))
    assert marker["signal"] in ("SIGTERM", "SIGUSR1", "a signal to another rank")
    assert (state["status"], state["step"]) == ("requeue", marker["step"])
    assert (ranks.folder / f"checkpoints/step-{marker['step']:08d}/MANIFEST.json").exists() == (marker["step"] > 0)
    if step is not None:
        assert marker["step"] == step


def assert_ends_as(recipe: dict[str, Any], whole: dict[str, Any]) -> None:
    """Started again, the run ends, and nothing of it differs from the uninterrupted one."""
    with Ranks(recipe) as ranks:
        assert ranks.codes() == [0, 0], ranks.output
    assert not (Path(recipe["run_dir"]) / "REQUEUE").exists()
    assert read(recipe, "state.json")["status"] == "done"
    assert losses(recipe) == losses(whole)  # bit for bit
    assert [row["step"] for row in metrics(recipe)] == list(range(STEPS + 1))  # every row once
    for step in EVALUATED:
        found, expected = (read(run, f"retention/step-{step:08d}.json") for run in (recipe, whole))
        assert found == expected | {key: found[key] for key in ("seconds", "share_of_training")}
    evaluated = [row["step"] for row in metrics(recipe) if any(key.startswith("eval/") for key in row)]
    assert evaluated == EVALUATED


@pytest.mark.parametrize(("signum", "to"), [(signal.SIGTERM, (1,)), (signal.SIGUSR1, (0, 1))])
def test_a_signal_in_training(
    measured: dict[str, Any], preempted: dict[str, Any], signum: int, to: tuple[int, ...]
) -> None:
    file = Path(preempted["run_dir"]) / "metrics.jsonl"
    with Ranks(preempted) as ranks:
        ranks.wait_until(lambda: file.exists() and len(metrics(preempted)) > 2, "steps")
        for _ in range(3):  # the second and third change nothing
            ranks.send(signum, *to)
        assert_left_for_requeue(ranks)
    assert_ends_as(preempted, measured)


@pytest.mark.parametrize("step", EVALUATED)
def test_an_evaluation_is_abandoned_and_done_after_the_resume(
    measured: dict[str, Any], preempted: dict[str, Any], step: int
) -> None:
    """The one before training, one in it, and the last one."""
    folder = Path(preempted["run_dir"]) / "retention"
    with Ranks(preempted) as ranks:
        ranks.wait_until((folder / f"items/step-{step:08d}.validation.jsonl").exists, "first task")
        ranks.send(signal.SIGTERM, 1)
        assert_left_for_requeue(ranks, step)
    assert not (folder / f"step-{step:08d}.json").exists()  # it was abandoned, not finished
    if step == 6:  # and abandoned once more, by a signal while it is done again
        (folder / f"items/step-{step:08d}.validation.jsonl").unlink()
        with Ranks(preempted) as ranks:
            ranks.wait_until((folder / f"items/step-{step:08d}.validation.jsonl").exists, "first task again")
            ranks.send(signal.SIGUSR1)
            assert_left_for_requeue(ranks, step)
    assert_ends_as(preempted, measured)


def test_a_signal_while_saving(measured: dict[str, Any], preempted: dict[str, Any]) -> None:
    checkpoints = Path(preempted["run_dir"]) / "checkpoints"
    with Ranks(preempted) as ranks:
        ranks.wait_until(lambda: any(checkpoints.glob("step-*.tmp")), "a checkpoint")
        ranks.send(signal.SIGTERM, 0)
        assert_left_for_requeue(ranks)
    # It is written in the background, so a step may be running, which is then saved too.
    assert read(preempted, "REQUEUE")["step"] in (SAVED, SAVED + 1)
    assert_ends_as(preempted, measured)


def test_a_signal_while_exporting_changes_nothing(measured: dict[str, Any], preempted: dict[str, Any]) -> None:
    folder = Path(preempted["run_dir"])
    with Ranks(preempted) as ranks:
        ranks.wait_until(lambda: (folder / "checkpoints" / f"step-{STEPS:08d}").exists(), "the last checkpoint")
        ranks.wait_until(lambda: (folder / "report.html").exists(), "the end")
        ranks.send(signal.SIGTERM)
        assert ranks.codes() == [0, 0], ranks.output
    assert not (folder / "REQUEUE").exists()
    assert read(preempted, "state.json")["status"] == "done"
    assert losses(preempted) == losses(measured)


def test_a_signal_before_and_while_loading(measured: dict[str, Any], preempted: dict[str, Any]) -> None:
    with Ranks(preempted, forked=False) as ranks:  # before the process group; the folder does not exist yet
        ranks.wait_until_they_listen()
        ranks.send(signal.SIGUSR1)
        assert ranks.codes(20) == [REQUEUE, REQUEUE], ranks.output
    marker = read(preempted, "REQUEUE")
    assert (marker["step"], marker["signal"], marker["saved"]) == (0, "SIGUSR1", True)
    with Ranks(preempted) as ranks:
        ranks.wait_until(lambda: "loading " in ranks.logs[0].read_text(), "loading")
        ranks.send(signal.SIGTERM, 1)
        assert_left_for_requeue(ranks, 0)
        assert "step 1/" not in ranks.output
    assert_ends_as(preempted, measured)


@pytest.mark.slow
def test_signals_at_random_moments(measured: dict[str, Any], preempted: dict[str, Any]) -> None:
    """FULLFT_TEST_SEED=7: other moments."""
    chance = random.Random(int(os.environ.get("FULLFT_TEST_SEED", "0")))
    whole = Path(measured["run_dir"])
    seconds = (whole / "state.json").stat().st_mtime - whole.with_suffix(".yaml").stat().st_mtime
    for _ in range(5):
        if (Path(preempted["run_dir"]) / "state.json").exists() and read(preempted, "state.json")["status"] == "done":
            break
        with Ranks(preempted) as ranks:
            ranks.wait_until_they_listen()
            signum, to = chance.choice([(signal.SIGTERM, (0,)), (signal.SIGTERM, (1,)), (signal.SIGUSR1, (0, 1))])
            moment = chance.uniform(0, seconds)
            print(f"{signal.Signals(signum).name} to {to} after {moment:.1f} s")
            with contextlib.suppress(AssertionError):
                ranks.codes(moment)
            ranks.send(signum, *to)
            # Before there is a process group, a rank cannot tell the others; then the launcher does.
            wait_for(lambda: {process.poll() for process in ranks.processes} != {None}, "the first to end")
            ranks.send(signal.SIGTERM)
            codes = ranks.codes()
            if codes != [0, 0]:
                assert codes == [REQUEUE, REQUEUE], ranks.output
                assert (ranks.folder / "REQUEUE").exists()
    assert_ends_as(preempted, measured)


def stuck(recipe: dict[str, Any], ready: Callable[[], bool]) -> tuple[Ranks, list[int]]:
    """Rank 1 freezes, so that rank 0 waits in a collective for ever; then it gets the signal."""
    with Ranks(recipe) as ranks:
        ranks.wait_until(ready, "training")
        ranks.send(signal.SIGSTOP, 1)
        ranks.send(signal.SIGTERM, 0)
        code = ranks.processes[0].wait(60)
        ranks.send(signal.SIGCONT, 1)
        # As a launcher does when the first rank has gone. Without it, gloo sometimes waits for the one that has gone.
        ranks.send(signal.SIGTERM, 1)
        return ranks, [code, ranks.processes[1].wait(60)]


def test_a_grace_period_too_short_leaves_the_checkpoint_before(
    measured: dict[str, Any], preempted: dict[str, Any]
) -> None:
    preempted["checkpoint"] = measured["checkpoint"] | {"grace_seconds": 5}
    saved = Path(preempted["run_dir"]) / "checkpoints" / f"step-{SAVED:08d}"
    ranks, codes = stuck(preempted, saved.exists)
    assert codes == [REQUEUE, REQUEUE], ranks.output
    assert not read(preempted, "REQUEUE")["saved"]
    assert "checkpoint.grace_seconds (5 s) ran out on rank 0" in ranks.output
    assert read(preempted, "REQUEUE")["step"] == read(preempted, "state.json")["step"] == SAVED
    assert read(preempted, "state.json")["status"] == "requeue"
    assert_ends_as(preempted, measured)


def test_a_grace_period_too_short_for_the_first_checkpoint(preempted: dict[str, Any]) -> None:
    preempted["checkpoint"] = {"every_steps": 100, "grace_seconds": 5}
    preempted["train"] = preempted["train"] | {"steps": 1000}
    file = Path(preempted["run_dir"]) / "metrics.jsonl"
    ranks, codes = stuck(preempted, lambda: file.exists() and len(metrics(preempted)) > 2)
    assert codes[0] == FAILED, ranks.output
    assert not (Path(preempted["run_dir"]) / "REQUEUE").exists()  # started again, it would be as far at the next signal
    state = read(preempted, "state.json")
    assert state["status"] == "failed"
    assert "there is none before it" in state["reason"]


# SIGUSR2 makes rank 1 fail, and rank 0 hang in Python, where it does not see that rank 1 has gone, as in a collective
# of NCCL.
HANG_OR_FAIL = """
import os, signal, time

def handle(*_):
    while os.environ["RANK"] == "0":
        time.sleep(0.1)
    open(FAILING, "w").close()
    time.sleep(3)
    raise MemoryError("CUDA out of memory")

signal.signal(signal.SIGUSR2, handle)
"""


@pytest.fixture
def hanging(preempted: dict[str, Any]) -> str:
    """The program of ranks that hang or fail by SIGUSR2."""
    preempted["checkpoint"] = preempted["checkpoint"] | {"grace_seconds": 5}
    preempted["train"] = preempted["train"] | {"steps": 1000}
    return HANG_OR_FAIL.replace("FAILING", repr(str(failing(preempted))))


def failing(recipe: dict[str, Any]) -> Path:
    """The file that a rank writes before it fails."""
    return Path(recipe["run_dir"]).with_suffix(".failing")


def test_a_rank_that_failed_is_not_started_again(preempted: dict[str, Any], hanging: str) -> None:
    """Though the launcher's SIGTERM to the others looks like a preemption, and there is a checkpoint."""
    saved = Path(preempted["run_dir"]) / "checkpoints" / f"step-{SAVED:08d}"
    with Ranks(preempted, 2, hanging) as ranks:
        ranks.wait_until(saved.exists, "a checkpoint")
        ranks.send(signal.SIGUSR2, 1)
        ranks.wait_until(failing(preempted).exists, "rank 1 about to fail")  # not in a collective, where none can
        ranks.send(signal.SIGUSR2, 0)
        assert ranks.processes[1].wait(60) == FAILED, ranks.output
        ranks.send(signal.SIGTERM, 0)
        assert ranks.processes[0].wait(60) == FAILED, ranks.output
        assert not (ranks.folder / "REQUEUE").exists()
    state = read(preempted, "state.json")
    assert state["status"] == "failed"
    assert "rank 1 on " in state["reason"]
    assert "MemoryError: CUDA out of memory" in state["reason"]


def test_a_rank_that_is_killed_again_and_again_is_started_again_once(preempted: dict[str, Any], hanging: str) -> None:
    """It could say nothing, so the first time it may have been a preemption."""
    folder = Path(preempted["run_dir"])
    for code in (REQUEUE, FAILED):
        (folder / "env.json").unlink(missing_ok=True)
        with Ranks(preempted, 2, hanging) as ranks:
            ranks.wait_until((folder / "env.json").exists, "loading")
            ranks.send(signal.SIGUSR2, 0)
            ranks.send(signal.SIGKILL, 1)
            ranks.send(signal.SIGTERM, 0)
            assert ranks.processes[0].wait(60) == code, ranks.output
        assert (folder / "REQUEUE").exists() == (code == REQUEUE)
    assert "The run before ended in the same way" in read(preempted, "state.json")["reason"]


def test_a_signal_before_training_into_a_folder_of_another_job_or_that_cannot_be_written(
    preempted: dict[str, Any],
) -> None:
    folder = Path(preempted["run_dir"])
    folder.mkdir()
    (folder / "recipe.yaml").write_text("")
    owner = Job(folder, 600)
    try:
        assert owner.line() == "taken"
        with Ranks(preempted, forked=False) as ranks:
            ranks.wait_until_they_listen()
            ranks.send(signal.SIGTERM)
            assert ranks.codes(30) == [REQUEUE, REQUEUE], ranks.output
        assert not (folder / "REQUEUE").exists()
    finally:
        owner.process.kill()
        owner.process.wait()
    (folder / "REQUEUE").mkdir()  # so that writing it fails
    with Ranks(preempted, forked=False) as ranks:
        ranks.wait_until_they_listen()
        ranks.send(signal.SIGTERM)
        assert ranks.codes(30) == [REQUEUE, REQUEUE], ranks.output
    (folder / "REQUEUE").rmdir()
    (folder / "checkpoints" / "step-00000007").mkdir(parents=True)
    (folder / "checkpoints" / "step-00000007" / "MANIFEST.json").write_text("{}")
    with Ranks(preempted, forked=False) as ranks:
        ranks.wait_until_they_listen()
        ranks.send(signal.SIGTERM)
        assert ranks.codes(30) == [REQUEUE, REQUEUE], ranks.output
    assert read(preempted, "REQUEUE")["step"] == 7
