"""Do the clusters that other tests run on behave like clusters?"""

import signal
import subprocess
from pathlib import Path

import hosts
import pytest
import slurm
import ssh_hosts

pytestmark = pytest.mark.cluster


def skip_if(reason: str | None) -> None:
    if reason:
        pytest.skip(reason)


def test_hosts_have_names_and_reach_each_other_until_the_cable_is_cut(tmp_path: Path) -> None:
    skip_if(hosts.unavailable() or hosts.missing("ping"))
    ping = ("ping", "-c1", "-W1", "n1")
    with hosts.Network(tmp_path, ["n0", "n1"]) as network:
        assert network["n1"].run("hostname").stdout == "n1\n"
        assert network["n0"].run(*ping).returncode == 0
        network["n1"].cut()
        assert network["n0"].run(*ping, check=False).returncode != 0
        network["n1"].heal()
        assert network["n0"].run(*ping).returncode == 0


def test_a_crash_ends_every_process_of_its_host_only(tmp_path: Path) -> None:
    skip_if(hosts.unavailable())
    with hosts.Network(tmp_path, ["n0", "n1"]) as network:
        sleepers = {name: host.popen("sleep", "600") for name, host in network.hosts.items()}
        network["n1"].crash()
        assert sleepers["n1"].wait(10) != 0
        assert sleepers["n0"].poll() is None
        with pytest.raises(RuntimeError, match="exit code"):
            network["n1"].run("true")
    assert sleepers["n0"].wait(10) != 0  # nothing is left when the network closes


def test_signals_reach_the_command_on_a_host(tmp_path: Path) -> None:
    skip_if(hosts.unavailable())
    with hosts.Network(tmp_path, ["n0"]) as network:
        script = "trap 'echo got it; exit 7' USR1; echo ready; while :; do sleep 0.01; done"
        process = network["n0"].popen("sh", "-c", script, stdout=subprocess.PIPE)
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == "got it\n"
        assert process.wait(10) == 7
        sleeper = network["n0"].popen("sleep", "600")
        sleeper.terminate()
        assert sleeper.wait(10) == -signal.SIGTERM


def test_slurm_runs_a_task_on_each_node(tmp_path: Path) -> None:
    skip_if(slurm.unavailable())
    with slurm.Slurm(tmp_path / "slurm", nodes=2) as cluster:
        assert sorted(cluster.run("srun", "-N2", "hostname").stdout.split()) == ["n0", "n1"]


def test_slurm_runs_a_script_for_nodes_with_gpus(tmp_path: Path) -> None:
    skip_if(slurm.unavailable())
    script = tmp_path / "job.sh"
    script.write_text('#!/bin/sh\n#SBATCH --nodes=2 --gpus-per-node=8\nsrun sh -c "hostname; env"\n')
    with slurm.Slurm(tmp_path / "slurm", nodes=2) as cluster:
        cluster.run("sbatch", "--wait", f"--output={tmp_path}/out", str(script))
    lines = (tmp_path / "out").read_text().splitlines()
    assert {"n0", "n1", "SLURM_PROCID=0", "SLURM_PROCID=1", "CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7"} <= set(lines)


def test_ssh_hosts_reach_each_other(tmp_path: Path) -> None:
    skip_if(ssh_hosts.unavailable())
    with ssh_hosts.SshHosts(tmp_path / "ssh", n=2) as ssh:
        assert ssh.hostfile.read_text() == "n0 slots=1\nn1 slots=1\n"
        assert ssh.run_on("n0", "ssh", "n1", "hostname").stdout == "n1\n"
        assert ssh.run_on("n1", "ssh", "n0", "hostname").stdout == "n0\n"
        ssh.network["n1"].crash()
        assert ssh.run_on("n0", "ssh", "-oConnectTimeout=1", "n1", "true", check=False).returncode == 255
