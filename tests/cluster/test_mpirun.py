"""A rank that fails under plain `mpirun` ends the job at once, though the others wait for it."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import faults
import pytest
import test_launch
from conftest import REPOSITORY
from test_launch import TRAIN, Run, start_long

pytestmark = pytest.mark.ranks
mpirun, run = test_launch.mpirun, test_launch.run


def test_a_failing_rank_ends_the_job_in_seconds(
    mpirun: tuple[str, ...], recipe: dict[str, Any], run: Run, tmp_path: Path
) -> None:
    """Not after train.timeout_minutes, in MPI's finalization or in a collective of the other rank."""
    path = f"{faults.by_sigusr2(tmp_path / 'fault')}:{REPOSITORY}"
    start_long(recipe, run, *mpirun, "-n", "2", sys.executable, PYTHONPATH=path)
    (rank,) = [
        one for one in run.processes() if TRAIN in one.cmdline() and one.environ().get("OMPI_COMM_WORLD_RANK") == "1"
    ]
    rank.send_signal(signal.SIGUSR2)
    failed = time.monotonic()
    assert run.wait(30) != 0, run.output
    run.assert_nothing_left(seconds=30 - (time.monotonic() - failed))
    state = json.loads((Path(recipe["run_dir"]) / "state.json").read_text())
    assert state["status"] == "failed"
    assert "rank 1" in state["reason"]
    assert "a fault of the test" in run.output
