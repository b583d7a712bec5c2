"""A link that breaks in the middle of a step: every rank ends, and says which host is not reached."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import hosts
import pytest
from conftest import CPU_RANKS, REPOSITORY, TRAIN, metrics, write_recipe
from ranks import wait_for

pytestmark = pytest.mark.cluster


def test_ranks_whose_link_is_cut_in_mid_step_end_and_name_the_peer(recipe: dict[str, Any], tmp_path: Path) -> None:
    """The run folder is still shared, as by a network of its own."""
    if reason := hosts.unavailable():
        pytest.skip(reason)
    recipe["train"] |= {"steps": 100_000, "hang_timeout": 20, "timeout_minutes": 5}
    recipe["checkpoint"]["every_steps"] = 100_000
    config = write_recipe(recipe, tmp_path / "recipe.yaml")
    shared = CPU_RANKS | {"PYTHONPATH": str(REPOSITORY), "GLOO_SOCKET_IFNAME": "eth0"}
    shared |= {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "n0", "MASTER_PORT": "29500"}
    with hosts.Network(tmp_path / "hosts", ["n0", "n1"]) as network, contextlib.ExitStack() as stack:
        logs = [tmp_path / f"rank-{rank}.log" for rank in (0, 1)]
        ranks = []
        for rank, log in enumerate(logs):
            file = stack.enter_context(log.open("w"))
            train = (sys.executable, str(TRAIN), "--config", str(config))
            env = os.environ | shared | {"RANK": str(rank)}
            ranks.append(network[f"n{rank}"].popen(*train, env=env, stdout=file, stderr=file, cwd=tmp_path))
        file = Path(recipe["run_dir"]) / "metrics.jsonl"
        wait_for(lambda: file.exists() and len(metrics(recipe)) > 3, "steps")
        network["n1"].cut()
        cut = time.monotonic()
        assert [rank.wait(120) for rank in ranks] == [1, 1]
        assert time.monotonic() - cut < 60
    state = json.loads((Path(recipe["run_dir"]) / "state.json").read_text())
    assert state["status"] == "failed"
    named = "host n1 is not reached over the network by n0"
    assert named in state["reason"]
    assert named in logs[0].read_text()
    reports = {file.name: file.read_text() for file in (Path(recipe["run_dir"]) / "hang").glob("*/rank-*.txt")}
    assert json.loads(reports["rank-00001.txt"].partition("\n")[0])["unreached"] == ["n0"]
