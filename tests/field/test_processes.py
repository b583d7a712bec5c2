"""Complaints: workers that take themselves for the master, ranks expanded on the batch host."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import warm
from conftest import TRAIN, kill, places, wait_for_ranks, write_recipe
from test_cluster import DEEPSPEED, SRUN, problem

from fullft.cluster import discover

MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"}


@pytest.mark.parametrize(
    ("named", "launcher"),
    [
        ("OMPI_COMM_WORLD_RANK=2", MPI),
        ("OMPI_COMM_WORLD_RANK=2", MPI | SRUN),  # its daemons were started by srun
        ("PMI_RANK=1", {"PMI_SIZE": "4", "PMI_RANK": "1"}),
        ("SLURM_PROCID=1", SRUN | {"SLURM_STEP_NUM_TASKS": "4"}),
    ],
)
def test_a_rank_expanded_once_on_the_batch_host_is_refused(named: str, launcher: dict[str, str]) -> None:
    expanded = DEEPSPEED | {"RANK": "0"}
    said = problem(expanded | launcher)
    assert "RANK=0" in said
    assert named in said
    right = expanded | {"RANK": named.split("=")[1]}
    assert discover(right | launcher).rank == int(right["RANK"])  # set by each process, it is taken


@pytest.mark.ranks
def test_two_processes_that_both_take_themselves_for_the_master_end_with_a_reason(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    """No launcher tells either that it is wrong: the port that the ranks meet at is taken by the first."""
    config, started = write_recipe(recipe, tmp_path / "recipe.yaml"), time.monotonic()
    first, _ = places(2)
    logs = [tmp_path / f"{number}.log" for number in (0, 1)]
    processes = []
    for log in logs:
        with log.open("w") as out:
            processes.append(warm.start(TRAIN, "--config", str(config), stdout=out, stderr=out, cwd=tmp_path, **first))
    try:
        code = wait_for_ranks(processes, 60)
    finally:
        kill(processes)
    assert code == 2
    assert time.monotonic() - started < 60
    assert any("is in use, perhaps by another run" in log.read_text() for log in logs)
    assert not (Path(recipe["run_dir"]) / "metrics.jsonl").exists()
