"""A real Slurm cluster on one machine, for tests of job scripts."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import hosts

# Nodes claim 8 processors and 8 GPUs which the machine needn't have, so that job scripts for real nodes are accepted.
# cred_expire: a requeued job waits so long before it starts again (default 120 s; less than 5 counts as the default).
# TmpFS: where the PMIx plugin keeps its files; two nodes in one /tmp would collide.
# SlurmdTimeout: a lost node is declared down, its job ended or requeued, after about 1.5 times this (default 300 s).
# JobCompLoc: a line for each ended job, as sacct isn't available.
SLURM_CONF = """\
ClusterName=test
SlurmctldHost=ctl({controller})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
TmpFS={folder}/tmp.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobcomp.log
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0
JobRequeue=1
ReturnToService=2
SlurmdTimeout=10
KillWait=5
BatchStartTimeout=10
MessageTimeout=5
TCPTimeout=2
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
# The plugin for version 1 does nothing as long as no limits are asked for; the one for version 2 would need systemd.
CGROUP_CONF = "CgroupPlugin=cgroup/v1\n"
NODE = "NodeName={name} NodeAddr={address} CPUs=8 CoresPerSocket=8 RealMemory=16000 Gres=gpu:8 State=UNKNOWN"


def unavailable() -> str | None:
    """The reason why no Slurm cluster can be started on this machine, or None when it can."""
    return hosts.unavailable() or hosts.missing("slurmctld", "slurmd", "munged", "sinfo", "sbatch", "srun")


class Slurm:
    """A cluster with nodes n0, n1, ... and a controller `ctl`, each a host with a name of its own.

    `with Slurm(folder, nodes=2) as slurm: slurm.run("srun", "-N2", "hostname")`

    folder: for configuration, logs and state; its path must be short enough for a socket (80 characters are)
    nodes:  number of nodes; `slurm.network["n1"].crash()` takes one away
    """

    def __init__(self, folder: Path, nodes: int = 2) -> None:
        self.folder = folder
        self.config = folder / "slurm.conf"
        self.names = [f"n{number}" for number in range(nodes)]
        self.network = hosts.Network(folder / "hosts", ["ctl", *self.names])
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._configure()
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.network)
            try:
                self._start()
            except Exception as error:
                error.add_note("\n".join(f"{log}:\n{log.read_text()}" for log in sorted(self.folder.glob("*.log"))))
                raise
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._exit.close()

    def run(self, *command: str, env: Mapping[str, str] | None = None, **options: Any) -> hosts.Result:
        """Run a client command (sbatch, srun, squeue, scontrol, ...) on the controller's host; see Host.run.

        env: variables to set beside those of this process
        """
        return self.network["ctl"].run(*command, env=self._environment(env), **options)

    def popen(self, *command: str, env: Mapping[str, str] | None = None, **options: Any) -> hosts.Command:
        """Start a client command on the controller's host; see run and Host.popen."""
        return self.network["ctl"].popen(*command, env=self._environment(env), **options)

    def _environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self.config), **(extra or {})}

    def _configure(self) -> None:
        (self.folder / "state").mkdir(parents=True)
        for name in self.names:
            (self.folder / f"tmp.{name}").mkdir()
        addresses = self.network.addresses
        nodes = "\n".join(NODE.format(name=name, address=addresses[name]) for name in self.names)
        self.config.write_text(SLURM_CONF.format(folder=self.folder, controller=addresses["ctl"], nodes=nodes))
        (self.folder / "cgroup.conf").write_text(CGROUP_CONF)
        for number in range(8):  # Slurm wants a device file for each GPU, but never opens it
            (self.folder / f"gpu{number}").symlink_to("/dev/null")
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-7]\n")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)

    def _start(self) -> None:
        # One munged serves all nodes, by a socket in the shared folder. --force: pytest's folders are private to root.
        options = {"key-file": "key", "socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        munge = [f"--{option}={self.folder}/munge.{suffix}" for option, suffix in options.items()]
        self.run("munged", "--force", *munge)
        self.run("slurmctld", "-c", "-f", str(self.config))
        for name in self.names:
            self.network[name].run("slurmd", "-f", str(self.config), "-N", name, env=self._environment())
        deadline = time.monotonic() + 30
        idle = {f"{name} idle" for name in self.names}
        states = ("sinfo", "--noheader", "--Node", "--format=%N %T")
        while (found := set(self.run(*states, check=False).stdout.splitlines())) != idle:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the nodes of Slurm did not become idle: {found}")
            time.sleep(0.05)
