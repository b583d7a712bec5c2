"""Every launcher trains the same model, tells what is wrong with a recipe, and leaves no process behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Self

import hosts
import psutil
import pytest
import slurm
import ssh_hosts
from conftest import CPU_RANKS, REPOSITORY, losses, metrics, torchrun, write_recipe

TRAIN = str(REPOSITORY / "launch" / "train.py")
DEEPSPEED = f"{sysconfig.get_path('scripts')}/deepspeed"
MARK = "FULLFT_TEST_RUN"  # set in the environment of a run, by which its processes are found, on whatever host they are
TRAINING_SECONDS = 240  # start to end takes 10 where nothing else runs
ON_HOSTS = CPU_RANKS | {"GLOO_SOCKET_IFNAME": "eth0"}


def skip_if(reason: str | None) -> None:
    if reason:
        pytest.skip(reason)


class Run:
    """A launcher and all processes that came of it. None of them outlives the `with` block."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = {MARK: uuid.uuid4().hex}
        self.log = folder / f"{self.mark[MARK]}.log"
        self.launcher: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        while alive := self.processes():
            for process in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            if self.launcher:
                self.launcher.poll()  # reaps it
            time.sleep(0.05)
        if self.launcher:
            self.launcher.kill()
            self.launcher.wait(10)

    def start(self, *command: str, popen: Callable[..., subprocess.Popen[str]] | None = None, **env: str) -> None:
        """Start a launcher, here or by the popen of a host. Its output and that of the ranks goes into the log."""
        with self.log.open("w") as log:
            streams = {"stdout": log, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL, "cwd": self.folder}
            if popen:
                self.launcher = popen(*command, env=env | self.mark, **streams)
            else:  # in a session of its own, so that Ctrl-C at the tests reaches only the tests, which clean up
                self.launcher = subprocess.Popen(
                    command, env=os.environ | env | self.mark, text=True, start_new_session=True, **streams
                )

    def wait(self, seconds: float) -> int:
        """The exit code of the launcher, which must come within this time."""
        assert self.launcher
        try:
            return self.launcher.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the launcher still runs after {seconds} s:\n{self.output[-6000:]}")

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def processes(self) -> list[psutil.Process]:
        """Those alive now, oldest first."""
        found = psutil.process_iter(["environ", "create_time"])
        mine = [process for process in found if (process.info["environ"] or {}).get(MARK) == self.mark[MARK]]
        return sorted(mine, key=lambda process: process.info["create_time"])

    def rank(self, number: int) -> psutil.Process:
        """The process of a rank, under a launcher which sets RANK."""
        for process in self.processes():
            if process.info["environ"].get("RANK") == str(number) and TRAIN in process.cmdline():
                return process
        raise AssertionError(f"rank {number} does not run:\n{self.output[-6000:]}")

    def assert_nothing_left(self, seconds: float = 5) -> None:
        deadline = time.monotonic() + seconds
        while left := self.processes():
            assert time.monotonic() < deadline, f"still running: {[process.cmdline() for process in left]}"
            time.sleep(0.1)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with Run(tmp_path) as run:
        yield run


# Fixtures that may skip stand before `expected` in a test, so that nothing is trained in vain.
@pytest.fixture
def mpirun() -> tuple[str, ...]:
    """The launcher with the options that it needs here."""
    skip_if(hosts.missing("mpirun"))
    return ("mpirun", "--allow-run-as-root", "--oversubscribe")  # tests may be root, and have fewer cores than ranks


@pytest.fixture
def ssh(tmp_path: Path) -> Iterator[ssh_hosts.SshHosts]:
    skip_if(ssh_hosts.unavailable() or hosts.missing("pdsh"))
    with ssh_hosts.SshHosts(tmp_path / "ssh", n=2) as ssh:
        yield ssh


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[slurm.Slurm]:
    skip_if(slurm.unavailable())
    with slurm.Slurm(tmp_path / "slurm", nodes=2) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def known() -> dict[str, list[float]]:
    """What the tests of this file find out once for all of them."""
    return {}


@pytest.fixture
def expected(known: dict[str, list[float]], recipe: dict[str, Any], tmp_path: Path) -> list[float]:
    """The losses of the recipe under torchrun; trained when the first test asks."""
    if "losses" not in known:
        reference = recipe | {"run_dir": str(tmp_path / "torchrun")}
        with Run(tmp_path) as run:
            run.start(*torchrun(ranks=2), *arguments(reference))
            assert run.wait(TRAINING_SECONDS) == 0, run.output
            run.assert_nothing_left()
        assert_trained_by("torchrun", reference)
        known["losses"] = losses(reference)
    return known["losses"]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def arguments(recipe: dict[str, Any]) -> tuple[str, ...]:
    """What comes after the launcher's own options, where that starts a Python script."""
    config = write_recipe(recipe, Path(recipe["run_dir"]).with_suffix(".yaml"))
    return (TRAIN, "--config", str(config))


def deepspeed_here() -> tuple[str, ...]:
    return (DEEPSPEED, "--num_gpus", "2", "--master_port", free_port())


def assert_trained_by(launcher: str, recipe: dict[str, Any]) -> None:
    """Launchers do not carry exit codes faithfully, so the run folder is asked."""
    folder = Path(recipe["run_dir"])
    assert json.loads((folder / "state.json").read_text())["status"] == "done"
    environment = json.loads((folder / "env.json").read_text())
    assert (environment["launcher"], environment["world_size"]) == (launcher, "2")
    assert len(losses(recipe)) == recipe["train"]["steps"]


@pytest.mark.ranks
def test_deepspeed_trains_as_torchrun_does(recipe: dict[str, Any], expected: list[float], run: Run) -> None:
    run.start(*deepspeed_here(), *arguments(recipe))
    assert run.wait(TRAINING_SECONDS) == 0, run.output
    assert_trained_by("deepspeed", recipe)
    assert losses(recipe) == expected  # bit for bit
    run.assert_nothing_left()


@pytest.mark.ranks
def test_mpirun_trains_as_torchrun_does(
    mpirun: tuple[str, ...], recipe: dict[str, Any], expected: list[float], run: Run
) -> None:
    run.start(*mpirun, "-n", "2", sys.executable, *arguments(recipe))
    assert run.wait(TRAINING_SECONDS) == 0, run.output
    assert_trained_by("mpirun", recipe)
    assert losses(recipe) == expected
    run.assert_nothing_left()


@pytest.mark.cluster
def test_srun_on_two_nodes_trains_as_torchrun_does_on_one(
    nodes: slurm.Slurm, recipe: dict[str, Any], expected: list[float], run: Run, tmp_path: Path
) -> None:
    # In the batch shell of a real job: the variables that it has beside those of the step must not confuse the ranks.
    script, log, code = (tmp_path / f"job.{suffix}" for suffix in ("sh", "log", "code"))
    job = " ".join(["srun", sys.executable, *arguments(recipe)])
    script.write_text(f"#!/bin/sh\n#SBATCH --nodes=2 --ntasks-per-node=1\n{job}\necho $? >{code}\n")
    run.start("sbatch", f"--output={log}", str(script), popen=nodes.popen, **ON_HOSTS)
    assert run.wait(60) == 0, run.output
    deadline = time.monotonic() + TRAINING_SECONDS
    # `sbatch --wait` would look after 2, 10 and 42 seconds only.
    while not (code.exists() and code.read_text().endswith("\n")):
        assert time.monotonic() < deadline, log.read_text() if log.exists() else run.output
        time.sleep(0.1)
    assert code.read_text() == "0\n", log.read_text()
    assert_trained_by("srun", recipe)
    assert losses(recipe) == expected
    run.assert_nothing_left()


# Where every rank ends by itself with code 2, these launchers end with it too. (torchrun makes it 1; `srun -K` 143, as
# the task which it terminates weighs more.)
@pytest.mark.ranks
@pytest.mark.parametrize("launcher", ["deepspeed", "mpirun"])
def test_a_bad_recipe_is_told_once_and_ends_the_launcher_with_code_2(
    launcher: str, recipe: dict[str, Any], run: Run, request: pytest.FixtureRequest
) -> None:
    recipe["train"] |= {"learning_rate": -1, "lr_scheduler": "cosine"}
    recipe["data"]["sequence_length"] = 0
    if launcher == "mpirun":
        command = (*request.getfixturevalue("mpirun"), "-n", "2", sys.executable)
    else:
        command = deepspeed_here()
    run.start(*command, *arguments(recipe))
    assert run.wait(45) == 2, run.output
    for key in ("train.learning_rate", "train.lr_scheduler", "data.sequence_length"):
        assert run.output.count(f"  - {key}: ") == 1, run.output
    assert run.output.count("training was not started") == 1
    assert "Traceback" not in run.output
    assert not Path(recipe["run_dir"]).exists()
    run.assert_nothing_left()


@pytest.mark.ranks
def test_what_only_the_inputs_show_is_told_once_too(recipe: dict[str, Any], run: Run) -> None:
    """Unlike a bad recipe, bad data and models are found after long imports, which ranks end at different times."""
    recipe["model"]["path"] = str(run.folder / "no-model")
    recipe["data"]["train"] = str(run.folder / "no-data.jsonl")
    run.start(*deepspeed_here(), *arguments(recipe))
    assert run.wait(60) == 2, run.output
    for found in ("no-model", "no-data.jsonl"):
        assert sum(found in line for line in run.output.splitlines() if line.startswith("  - ")) == 1, run.output
    run.assert_nothing_left()


def start_long(recipe: dict[str, Any], run: Run, *command: str, **options: Any) -> None:
    """Start a run that would go on for hours, and see it train."""
    recipe["train"]["steps"] = 100_000
    recipe["checkpoint"]["every_steps"] = 100_000
    run.start(*command, *arguments(recipe), **options)
    deadline = time.monotonic() + TRAINING_SECONDS
    while not ((Path(recipe["run_dir"]) / "metrics.jsonl").exists() and len(metrics(recipe)) > 3):
        assert time.monotonic() < deadline, run.output
        assert run.launcher
        assert run.launcher.poll() is None, run.output
        time.sleep(0.1)


@pytest.mark.ranks
def test_a_killed_rank_ends_the_whole_run_under_deepspeed(recipe: dict[str, Any], run: Run) -> None:
    start_long(recipe, run, *deepspeed_here())
    assert len(run.processes()) >= 4  # the launcher, its process for this node, and the ranks: they can be found
    run.rank(1).kill()
    killed = time.monotonic()
    assert run.wait(60) != 0, run.output
    run.assert_nothing_left(seconds=60 - (time.monotonic() - killed))
    assert json.loads((Path(recipe["run_dir"]) / "state.json").read_text())["status"] != "done"


PLACE = """
import dataclasses, json, os, pathlib, socket
from fullft import cluster
place = json.dumps(dataclasses.asdict(cluster.discover()))
pathlib.Path(f"{socket.gethostname()}-{os.getpid()}.place").write_text(place)
"""


def places(run: Run) -> list[dict[str, Any]]:
    """The PLACE of each process of a run, by rank; from files, as mpirun may mix up the lines of ranks."""
    found = [json.loads(file.read_text()) for file in run.folder.glob("*.place")]
    return sorted(found, key=lambda place: place["rank"])


@pytest.mark.ranks
def test_mpirun_inside_a_job_step_has_the_say(mpirun: tuple[str, ...], run: Run) -> None:
    """As in a batch job: mpirun starts its daemons on the other nodes by srun, and their ranks inherit that step."""
    step = {
        "SLURM_JOB_ID": "71", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "n1",
    }  # fmt: skip
    inherited = [word for name, value in step.items() for word in ("-x", f"{name}={value}")]
    run.start(*mpirun, *inherited, "-n", "2", sys.executable, "-c", PLACE)
    assert run.wait(60) == 0, run.output
    assert [(place["rank"], place["world_size"], place["launcher"]) for place in places(run)] == [
        (0, 2, "mpirun"),
        (1, 2, "mpirun"),
    ]


@pytest.mark.cluster
def test_mpirun_over_two_hosts_names_a_master_that_both_reach(
    ssh: ssh_hosts.SshHosts, mpirun: tuple[str, ...], run: Run
) -> None:
    network = ("--mca", "btl_tcp_if_include", "eth0", "--mca", "oob_tcp_if_include", "eth0")
    command = (*mpirun, *network, "-x", MARK, "-n", "2", "--host", "n0:1,n1:1", sys.executable, "-c", PLACE)
    run.start(*command, popen=partial(ssh.popen_on, "n0"))
    assert run.wait(60) == 0, run.output
    assert [place["rank"] for place in places(run)] == [0, 1]
    (master,) = {place["master_addr"] for place in places(run)}
    assert master in ("n0", ssh.network.addresses["n0"])


def assert_left_for_requeue(recipe: dict[str, Any], run: Run) -> None:
    folder = Path(recipe["run_dir"])
    state, marker = (json.loads((folder / name).read_text()) for name in ("state.json", "REQUEUE"))
    assert (state["status"], state["step"]) == ("requeue", marker["step"]), run.output
    assert (folder / f"checkpoints/step-{marker['step']:08d}/MANIFEST.json").exists()
    run.assert_nothing_left(seconds=35)


@pytest.mark.ranks
def test_torchrun_passes_sigterm_on_and_waits_as_long_as_it_is_told(recipe: dict[str, Any], run: Run) -> None:
    start_long(recipe, run, *torchrun(2), "--shutdown-timeout", "300")
    assert run.launcher
    run.launcher.terminate()
    assert run.wait(120) != 0, run.output
    assert_left_for_requeue(recipe, run)


@pytest.mark.ranks
def test_a_signal_to_one_rank_ends_a_run_under_deepspeed_with_code_85(recipe: dict[str, Any], run: Run) -> None:
    start_long(recipe, run, *deepspeed_here())
    run.rank(1).terminate()
    assert run.wait(120) == 85, run.output
    assert_left_for_requeue(recipe, run)


@pytest.mark.ranks
def test_sigterm_to_the_process_group_ends_a_run_under_deepspeed(recipe: dict[str, Any], run: Run) -> None:
    start_long(recipe, run, *deepspeed_here())  # in a session, hence a process group, of its own
    assert run.launcher
    os.killpg(run.launcher.pid, signal.SIGTERM)
    assert run.wait(120) != 0, run.output
    run.assert_nothing_left(seconds=90)  # the runner ends at once, its ranks after it
    assert_left_for_requeue(recipe, run)


@pytest.mark.ranks
def test_ranks_whose_deepspeed_was_killed_save_and_end(recipe: dict[str, Any], run: Run) -> None:
    start_long(recipe, run, *deepspeed_here())
    assert run.launcher
    run.launcher.kill()  # not even its process for this host is told
    run.launcher.wait(10)
    run.assert_nothing_left(seconds=90)
    assert_left_for_requeue(recipe, run)


@pytest.mark.ranks
def test_mpirun_passes_sigusr1_on(mpirun: tuple[str, ...], recipe: dict[str, Any], run: Run) -> None:
    start_long(recipe, run, *mpirun, "-n", "2", sys.executable)
    assert run.launcher
    run.launcher.send_signal(signal.SIGUSR1)
    assert run.wait(120) == 85, run.output
    assert_left_for_requeue(recipe, run)


@pytest.mark.cluster
def test_slurm_signals_all_ranks(nodes: slurm.Slurm, recipe: dict[str, Any], run: Run) -> None:
    """As `sbatch --signal=USR1@300` does before the time limit."""
    start_long(recipe, run, "srun", "--job-name=told", "-N2", sys.executable, popen=nodes.popen, **ON_HOSTS)
    nodes.run("scancel", "--signal=USR1", "--name=told")
    assert run.wait(120) != 0, run.output
    assert_left_for_requeue(recipe, run)
