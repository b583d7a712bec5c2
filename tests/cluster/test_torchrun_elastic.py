"""`torchrun --nnodes 1:2`: when a host dies, the other goes on without it from the newest checkpoint."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import hosts
import pytest
from conftest import REPOSITORY, TRAIN, Launch, losses, metrics, write_recipe
from ranks import wait_for
from test_docker import environment_of, state
from test_launch import ON_HOSTS, skip_if

pytestmark = pytest.mark.cluster
ELASTIC = (
    *("--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-id", "run"),
    *("--rdzv-backend", "c10d", "--rdzv-endpoint", "n0:29400", "--rdzv-conf", "last_call_timeout=3"),
)


def test_a_host_that_dies_is_gone_on_without_to_the_same_losses(
    recipe: dict[str, Any], launch: Launch, tmp_path: Path
) -> None:
    skip_if(hosts.unavailable())
    recipe["train"]["steps"], recipe["checkpoint"]["every_steps"] = 24, 5
    whole = recipe | {"run_dir": str(tmp_path / "whole")}
    launch(whole, ranks=1)
    config = write_recipe(recipe, tmp_path / "elastic.yaml")
    env = os.environ | ON_HOSTS | {"PYTHONPATH": str(REPOSITORY), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    command = (sys.executable, "-m", "torch.distributed.run", *ELASTIC, str(TRAIN), "--config", str(config))
    with hosts.Network(tmp_path / "hosts", ["n0", "n1"]) as network, contextlib.ExitStack() as stack:
        log = stack.enter_context((tmp_path / "agents.log").open("w"))
        agents = [network[name].popen(*command, env=env, stdout=log, stderr=log, cwd=tmp_path) for name in ("n0", "n1")]
        folder = Path(recipe["run_dir"])
        wait_for(lambda: list(folder.glob("checkpoints/*/MANIFEST.json")), "a checkpoint")
        assert environment_of(recipe)["ranks_of_host"] == {"n0": 1, "n1": 1}
        network["n1"].crash()
        assert agents[0].wait(120) == 0, Path(log.name).read_text()[-6000:]
    assert state(recipe)["status"] == "done"
    assert environment_of(recipe)["ranks_of_host"] == {"n0": 1}
    assert [row["step"] for row in metrics(recipe)] == list(range(1, 25))
    # The sums of two ranks and of one are rounded in different orders.
    assert losses(recipe) == pytest.approx(losses(whole), rel=1e-4)
