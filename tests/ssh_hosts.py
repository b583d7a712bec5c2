"""Hosts with a real ssh server on one machine, for tests of launchers that start remote processes by ssh."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import hosts

# StrictModes no: the key lies in a temporary folder.
SSHD_CONFIG = """\
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
UsePAM no
UseDNS no
PasswordAuthentication no
PermitRootLogin prohibit-password
PidFile none
"""
SSH_CONFIG = """\
Host *
  IdentityFile {folder}/key
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
  BatchMode yes
  ConnectTimeout 5
  ServerAliveInterval 2
  ServerAliveCountMax 3
"""


def unavailable() -> str | None:
    """The reason why no ssh hosts can be started on this machine, or None when they can."""
    return hosts.unavailable() or hosts.missing("sshd", "ssh", "ssh-keygen")


class SshHosts:
    """Hosts n0, n1, ... which reach each other by ssh without a password.

    `with SshHosts(folder, n=2) as ssh: ssh.run_on("n0", "ssh", "n1", "hostname")`

    folder: for keys, configuration and logs; also the home folder of commands run by run_on
    """

    def __init__(self, folder: Path, n: int = 2) -> None:
        self.folder = folder
        self.names = [f"n{number}" for number in range(n)]
        self.hostfile = folder / "hostfile"  # for `deepspeed --hostfile`
        # DeepSpeed gives ssh no options, so the hosts' ssh gets them by its system-wide configuration.
        self.network = hosts.Network(folder / "hosts", self.names, {"/etc/ssh/ssh_config": folder / "ssh_config"})
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._configure()
        sshd = shutil.which("sshd")
        assert sshd  # by its full path, as it starts itself again for each connection
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.network)
            for name, host in self.network.hosts.items():
                host.run("mkdir", "/run/sshd")
                # It is back when it listens, so no one needs to wait for it.
                host.run(sshd, "-f", f"{self.folder}/sshd_config", "-E", f"{self.folder}/sshd.{name}.log")
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._exit.close()

    def run_on(self, host: str, *command: str, env: Mapping[str, str] | None = None, **options: Any) -> hosts.Result:
        """Run a command on a host (directly, not by ssh); see Host.run.

        env: variables to set beside those of this process; HOME is the hosts' folder, so that no file of the real one
             (such as .deepspeed_env) has a say
        """
        return self.network[host].run(*command, env=self._environment(env), **options)

    def popen_on(self, host: str, *command: str, env: Mapping[str, str] | None = None, **options: Any) -> hosts.Command:
        """Start a command on a host; see run_on and Host.popen."""
        return self.network[host].popen(*command, env=self._environment(env), **options)

    def _environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        return {**os.environ, "HOME": str(self.folder), **(extra or {})}

    def _configure(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for key in ("key", "host_key"):
            keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{self.folder}/{key}"]
            hosts.succeed(subprocess.run(keygen, stdin=subprocess.DEVNULL, capture_output=True, text=True))
        (self.folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=self.folder))
        (self.folder / "ssh_config").write_text(SSH_CONFIG.format(folder=self.folder))
        self.hostfile.write_text("".join(f"{name} slots=1\n" for name in self.names))
