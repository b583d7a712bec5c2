"""Every launcher's environment tells a process its place, and an environment that contradicts itself is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import hosts
import pytest

from fullft import cluster
from fullft.cluster import discover
from fullft.errors import BadInput

DEEPSPEED = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node-a", "MASTER_PORT": "29500"}
# As `bash` keeps them when someone has exported them for a debugger: every process would be rank 0 of 1.
LEFT_OVER = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
BATCH_SHELL = {"SLURM_JOB_ID": "71", "SLURM_JOB_NODELIST": "n[0-1]", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}
SRUN = {
    "SLURM_JOB_ID": "71", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "n[0-1]", "SLURM_STEP_NODELIST": "n[0-1]",
}  # fmt: skip
FIRST_HOSTS = {
    "gpu[007-009,012]": "gpu007",
    "n[0-1]": "n0",
    "n[5]": "n5",
    "n[3,7-9]": "n3",
    "a1,b2": "a1",
    "login1,gpu[1-2]": "login1",
    "gpu[1-2],login1": "gpu1",
    "n[08-11]": "n08",
    "alone": "alone",
    "node-a.example.org": "node-a.example.org",
    "rack[1-2]n[3-4]": "rack1n3",
    "rack[1-2]n[03-04],other": "rack1n03",
}


def without(environment: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in names}


def problem(environment: dict[str, str]) -> str:
    with pytest.raises(BadInput) as caught:
        discover(environment)
    return str(caught.value)


def assert_names(message: str, *variables: str) -> None:
    missing = [name for name in variables if name not in message]
    assert not missing, f"{missing} not named in: {message}"


def test_deepspeed_tells_a_rank_its_place() -> None:
    me = discover(DEEPSPEED | {"CROSS_RANK": "1", "CROSS_SIZE": "2", "LOCAL_SIZE": "2"})
    assert (me.rank, me.world_size, me.local_rank) == (3, 4, 1)
    assert (me.master_addr, me.master_port) == ("node-a", 29500)
    assert me.launcher == "deepspeed"
    assert not me.is_main


def test_torchrun_tells_a_rank_its_place() -> None:
    me = discover(DEEPSPEED | {"RANK": "0", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "none"})
    assert (me.rank, me.world_size, me.local_rank) == (0, 4, 0)
    assert me.launcher == "torchrun"
    assert me.is_main


def test_torchrun_that_would_hang_when_it_starts_ranks_again_is_refused() -> None:
    restarts = DEEPSPEED | {"TORCHELASTIC_RUN_ID": "71", "TORCHELASTIC_MAX_RESTARTS": "3"}
    shared = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert_names(problem(restarts | shared), "--max-restarts", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")
    assert discover(restarts | {"TORCHELASTIC_USE_AGENT_STORE": "False"}).launcher == "torchrun"
    assert discover(restarts | shared | {"TORCHELASTIC_MAX_RESTARTS": "0"}).launcher == "torchrun"


def test_torchrun_started_by_srun_once_a_node_has_the_say() -> None:
    me = discover(SRUN | DEEPSPEED | {"TORCHELASTIC_RUN_ID": "71"})
    assert (me.rank, me.world_size, me.launcher) == (3, 4, "torchrun")


def test_srun_tells_a_rank_its_place() -> None:
    me = discover(SRUN)
    assert (me.rank, me.world_size, me.local_rank) == (1, 2, 0)
    assert me.master_addr == "n0"
    assert me.launcher == "srun"


def test_the_ranks_of_a_job_step_agree_on_the_master() -> None:
    first, second = (discover(SRUN | {"SLURM_PROCID": rank}) for rank in "01")
    assert (first.master_addr, first.master_port) == (second.master_addr, second.master_port)
    assert 1024 <= first.master_port < 32768  # below the ports that the kernel gives to outgoing connections


@pytest.mark.parametrize("other", [{"SLURM_JOB_ID": "72"}, {"SLURM_STEP_ID": "1"}])
def test_job_steps_side_by_side_use_different_ports(other: dict[str, str]) -> None:
    assert discover(SRUN).master_port != discover(SRUN | other).master_port


def test_the_user_may_choose_the_master_of_a_job_step() -> None:
    me = discover(SRUN | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "4321"})
    assert (me.master_addr, me.master_port) == ("10.0.0.7", 4321)


def test_a_step_on_some_nodes_of_the_job_meets_on_its_own_first_node() -> None:
    assert discover(SRUN | {"SLURM_JOB_NODELIST": "n[0-3]", "SLURM_STEP_NODELIST": "n[2-3]"}).master_addr == "n2"


@pytest.mark.parametrize("environment", [{}, {"SLURM_JOB_ID": "71", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}])
def test_plain_python_is_a_world_of_one(environment: dict[str, str]) -> None:
    me = discover(environment)
    assert (me.rank, me.world_size, me.local_rank, me.launcher) == (0, 1, 0, "python")
    assert me.is_main


@pytest.mark.parametrize("absent", DEEPSPEED)
def test_a_missing_variable_is_named(absent: str) -> None:
    assert_names(problem(without(DEEPSPEED, absent)), absent)


def test_a_rank_without_the_rest_is_told_what_is_missing() -> None:
    assert_names(problem({"RANK": "0"}), "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.mark.parametrize("rank", ["4", "17", "-1"])
def test_a_rank_outside_the_world_is_refused(rank: str) -> None:
    assert rank in problem(DEEPSPEED | {"RANK": rank})
    assert rank in problem(SRUN | {"SLURM_PROCID": rank})


def test_a_rank_outside_the_world_is_explained_by_its_variables() -> None:
    assert_names(problem(DEEPSPEED | {"RANK": "4"}), "RANK", "WORLD_SIZE")
    assert_names(problem(SRUN | {"SLURM_PROCID": "2"}), "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"])
@pytest.mark.parametrize("value", ["one", "", "1.5"])
def test_what_is_not_a_number_is_named_with_its_value(name: str, value: str) -> None:
    assert_names(problem(DEEPSPEED | {name: value}), name, repr(value))


@pytest.mark.parametrize(
    "name", ["SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_ID"]
)
def test_what_is_not_a_number_is_named_under_srun(name: str) -> None:
    assert_names(problem(SRUN | {name: "many"}), name, "'many'")


@pytest.mark.parametrize("name", ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_ID"])
def test_a_missing_variable_of_srun_is_named(name: str) -> None:
    assert_names(problem(without(SRUN, name)), name)


def test_a_job_step_without_a_node_list_is_told_so() -> None:
    assert_names(problem(without(SRUN, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST")), "SLURM_STEP_NODELIST")


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"MASTER_PORT": "http"}, "MASTER_PORT"),
        (SRUN | {"MASTER_PORT": "http"}, "MASTER_PORT"),
        (BATCH_SHELL | {"SLURM_NTASKS": "two"}, "SLURM_NTASKS"),
    ],
    ids=["plain python", "srun", "batch shell"],
)
def test_what_is_not_a_number_is_named_wherever_it_is_read(environment: dict[str, str], name: str) -> None:
    assert_names(problem(environment), name)


@pytest.mark.parametrize(
    ("launcher", "environment"),
    [
        ("mpirun", {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}),
        ("mpirun", {"PMI_SIZE": "2", "PMI_RANK": "1"}),
        ("srun", SRUN),
    ],
    ids=["Open MPI", "MPICH", "srun"],
)
def test_variables_left_over_in_the_shell_are_refused_under_a_launcher(
    launcher: str, environment: dict[str, str]
) -> None:
    message = problem(LEFT_OVER | environment)
    assert_names(message, launcher, "RANK", "WORLD_SIZE")
    assert "unset" in message


def test_a_batch_shell_is_told_to_use_srun() -> None:
    assert_names(problem(BATCH_SHELL), "SLURM_NTASKS=2", "srun")
    nodes_only = without(BATCH_SHELL, "SLURM_NTASKS") | {"SLURM_JOB_NUM_NODES": "2"}  # sbatch -N2
    assert_names(problem(nodes_only), "SLURM_JOB_NUM_NODES=2", "srun")


# Each of these processes was started as one of two, but cannot talk to the other (here because the other does not
# exist; on clusters because mpi4py has loaded another MPI than mpirun's). Alone it would train into the same folder.
@pytest.mark.parametrize(
    "environment",
    [
        {"OMPI_COMM_WORLD_SIZE": "2"},
        {"PMI_SIZE": "2"},
        # mpirun in a Slurm job starts its daemons on the other nodes by srun, and what they start inherits that step.
        {"OMPI_COMM_WORLD_SIZE": "2"} | SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
    ],
    ids=["Open MPI", "MPICH", "Open MPI in Slurm"],
)
def test_one_of_two_processes_of_mpirun_never_takes_itself_for_a_world_of_one(environment: dict[str, str]) -> None:
    program = (
        "from fullft import cluster, errors\n"
        "try: print('found', cluster.discover())\n"
        "except errors.BadInput as error: print('refused', error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.startswith("refused"), done.stdout + done.stderr
    assert "mpi4py" in done.stdout


@pytest.mark.parametrize("nodelist", FIRST_HOSTS)
def test_the_master_is_the_first_host_of_the_node_list(nodelist: str) -> None:
    assert discover(SRUN | {"SLURM_STEP_NODELIST": nodelist}).master_addr == FIRST_HOSTS[nodelist]


@pytest.mark.skipif(bool(hosts.missing("scontrol")), reason=str(hosts.missing("scontrol")))
@pytest.mark.parametrize("nodelist", FIRST_HOSTS)
def test_the_first_host_is_the_one_that_scontrol_prints_first(nodelist: str, tmp_path: Path) -> None:
    config = tmp_path / "slurm.conf"  # expanding names asks no daemon, but reads a configuration
    config.write_text("ClusterName=test\nSlurmctldHost=localhost\nNodeName=x\n")
    done = subprocess.run(
        ["scontrol", "show", "hostnames", nodelist],
        env=os.environ | {"SLURM_CONF": str(config)}, capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    assert cluster._first_host(nodelist) == done.stdout.split()[0]


def test_a_hostfile_with_one_other_host_is_not_waited_for() -> None:
    """DeepSpeed starts its ranks here, to meet on the other host (192.0.2.1 is nobody's: RFC 5737)."""
    alone = DEEPSPEED | {"RANK": "0", "LOCAL_RANK": "0", "LOCAL_SIZE": "4", "MASTER_ADDR": "192.0.2.1"}
    assert "--force_multi" in problem(alone)
    assert discover(alone | {"MASTER_ADDR": "127.0.0.1"}).is_main
    assert discover(alone | {"LOCAL_SIZE": "2"}).is_main  # several hosts: behind NAT the address may be nobody's own
