"""`deepspeed --hostfile` over real ssh hosts with several ranks each, and with one whose code differs."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ssh_hosts
import test_launch
from conftest import REPOSITORY, Launch, losses
from test_launch import DEEPSPEED, ON_HOSTS, TRAINING_SECONDS, Run, arguments

pytestmark = pytest.mark.cluster
ssh, run = test_launch.ssh, test_launch.run


def test_two_ranks_on_each_of_two_hosts_train_and_a_host_with_other_code_is_named(
    ssh: ssh_hosts.SshHosts, recipe: dict[str, Any], launch: Launch, run: Run, tmp_path: Path
) -> None:
    reference = recipe | {"run_dir": str(tmp_path / "reference")}
    launch(reference)
    sent = tmp_path / "deepspeed_env"
    variables = ON_HOSTS | run.mark | {"PYTHONPATH": str(REPOSITORY)}
    sent.write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
    ssh.hostfile.write_text("n0 slots=2\nn1 slots=2\n")
    start = partial(run.start, DEEPSPEED, "--hostfile", str(ssh.hostfile), popen=partial(ssh.popen_on, "n0"))
    environment = {"DS_ENV_FILE": str(sent), "PYTHONPATH": str(REPOSITORY)}
    start(*arguments(recipe), **environment)
    assert run.wait(TRAINING_SECONDS) == 0, run.output
    found = json.loads(Path(recipe["run_dir"], "env.json").read_text())
    assert found["launcher"] == "deepspeed"
    assert found["ranks_of_host"] == {"n0": 2, "n1": 2}
    # The sums of four ranks and of two are rounded in different orders.
    assert losses(recipe) == pytest.approx(losses(reference), rel=1e-4)
    run.assert_nothing_left()

    changed, errors = tmp_path / "errors.py", REPOSITORY / "fullft" / "errors.py"
    changed.write_text(errors.read_text() + "# changed\n")
    ssh.network["n1"].run("mount", "--bind", str(changed), str(errors))
    ssh.hostfile.write_text("n0 slots=1\nn1 slots=1\n")
    other = recipe | {"run_dir": str(tmp_path / "other")}
    start(*arguments(other), **environment)
    assert run.wait(TRAINING_SECONDS) == 2, run.output
    assert run.output.count("  - n1: another code of fullft") == 1, run.output
    assert "training was not started" in run.output
    assert not Path(other["run_dir"], "state.json").exists()
    run.assert_nothing_left()
