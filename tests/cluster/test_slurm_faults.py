"""Jobs of `fullft submit` on a real Slurm that lose a node, fail, or run out of time."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faults
import psutil
import pytest
import slurm
import test_submit
from conftest import TRAIN, Launch, losses, metrics
from test_launch import skip_if
from test_submit import Submit, job_of, restarts, status, wait_for

pytestmark = pytest.mark.cluster
submit = test_submit.submit


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[slurm.Slurm]:
    skip_if(slurm.unavailable())
    with slurm.Slurm(tmp_path / "slurm", nodes=2) as nodes:
        yield nodes


def training(recipe: dict[str, Any]) -> list[psutil.Process]:
    """The ranks of a run that makes steps; empty as long as none do."""
    folder = Path(recipe["run_dir"])
    rank = [sys.executable, str(TRAIN), "--config", str(folder.parent / "recipe.yaml")]
    ranks = [one for one in psutil.process_iter(["cmdline", "create_time"]) if one.info["cmdline"] == rank]
    file = folder / "metrics.jsonl"
    started = max((one.info["create_time"] for one in ranks), default=float("inf"))
    return ranks if file.exists() and file.stat().st_mtime > started and len(metrics(recipe)) > 2 else []


def test_a_job_whose_node_dies_goes_on_with_the_nodes_that_are_left(
    nodes: slurm.Slurm, submit: Submit, recipe: dict[str, Any], launch: Launch, tmp_path: Path
) -> None:
    recipe["train"]["steps"] = 60
    recipe["checkpoint"] |= {"every_steps": 10, "lease_seconds": 10}
    whole, folder = recipe | {"run_dir": str(tmp_path / "whole")}, Path(recipe["run_dir"])
    launch(whole)
    job = job_of(submit("--nodes", "1-2"))
    wait_for(lambda: bool(list(folder.glob("checkpoints/*/MANIFEST.json"))), nodes, folder)
    assert json.loads((folder / "env.json").read_text())["world_size"] == "2"
    nodes.network["n1"].cut()  # a power loss: nobody is told
    nodes.network["n1"].crash()
    wait_for(lambda: status(folder) == "done", nodes, folder, seconds=300)
    assert restarts(nodes, job) == 1
    assert json.loads((folder / "env.json").read_text())["world_size"] == "1"
    assert [row["step"] for row in metrics(recipe)] == list(range(1, 61))
    # The sums of two ranks and of one are rounded in different orders.
    assert losses(recipe) == pytest.approx(losses(whole), rel=1e-4)
    (log,) = (folder / "slurm").glob("*.log")
    assert "resumed from" in log.read_text()


def test_a_job_that_fails_is_started_again_as_often_as_is_asked_for(
    nodes: slurm.Slurm, submit: Submit, recipe: dict[str, Any], tmp_path: Path
) -> None:
    """By an error, then by a kill that leaves no word, then by an error once more."""
    recipe["train"]["steps"] = 100_000
    recipe["checkpoint"] |= {"every_steps": 100_000, "lease_seconds": 10}
    folder = Path(recipe["run_dir"])
    setup = f"export PYTHONPATH={faults.by_sigusr2(tmp_path / 'fault')}:$PYTHONPATH"
    job = job_of(submit("--nodes", "1", "--restarts", "2", "--setup", setup))
    for number, signum in enumerate((signal.SIGUSR2, signal.SIGKILL, signal.SIGUSR2)):
        wait_for(lambda: bool(training(recipe)), nodes, folder)
        assert restarts(nodes, job) == number
        (rank,) = training(recipe)
        rank.send_signal(signum)
        rank.wait(60)
        assert status(folder) == ("running" if signum == signal.SIGKILL else "failed")
    wait_for(lambda: not nodes.run("squeue", "--noheader").stdout.strip(), nodes, folder, seconds=30)
    assert restarts(nodes, job) == 2
    assert "JobState=FAILED" in nodes.run("scontrol", "show", "job", job).stdout
    assert "a fault of the test" in json.loads((folder / "state.json").read_text())["reason"]


@pytest.mark.slow
def test_a_job_whose_time_is_nearly_up_saves_and_the_next_of_the_chain_goes_on(
    nodes: slurm.Slurm, submit: Submit, recipe: dict[str, Any]
) -> None:
    """Slurm signals 300 s before the end, or up to a minute earlier: of 7 minutes between the first and the second."""
    recipe["train"]["steps"] = 60
    said, folder = submit("--nodes", "1", "--chain", "3", "--time", "7"), Path(recipe["run_dir"])
    first, second, third = said.partition("submitted  ")[2].partition(" by")[0].split(", ")
    wait_for(lambda: bool(training(recipe)), nodes, folder)
    (rank,) = training(recipe)
    rank.suspend()  # rather than train for a minute
    wait_for(lambda: has_pending(rank.pid, signal.SIGUSR1), nodes, folder)
    rank.resume()
    wait_for(lambda: not nodes.run("squeue", "--noheader").stdout.strip(), nodes, folder)
    assert status(folder) == "done"
    assert [row["step"] for row in metrics(recipe)] == list(range(1, 61))
    logs = {job: (folder / "slurm" / f"{job}.log").read_text() for job in (first, second, third)}
    assert "SIGUSR1: saved up to step" in logs[first]
    assert "resumed from" in logs[second]
    assert "nothing to do" in logs[third]


def has_pending(pid: int, signum: int) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd", "ShdPnd"))]
    return any(mask >> (signum - 1) & 1 for mask in masks)
