"""Several hosts on one machine, for tests of multi-node launches.

A host is a set of Linux namespaces, joined to the others by a virtual switch. All hosts share the file system, as the
nodes of a cluster do (except /run and /dev/shm). Nothing is made outside the namespaces: no network device, no file in
/etc or /run, and no process outlives the network, not even if the tests are killed. Needs root.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

SUBNET = "10.77.0"  # may repeat in networks that exist side by side: each has a switch of its own
Result = subprocess.CompletedProcess[str]
NAMESPACES = ("--net", "--uts", "--mount", "--ipc", "--pid")
# The kernel kills the program when the thread that started it ends: nothing is left over even if tests are SIGKILLed.
DIE_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL")
# The first process of a host: says that it runs, then reaps orphans (else dead processes would still seem to be there).
INIT = """
import os, time
print(flush=True)
while True:
    try:
        os.wait()
    except ChildProcessError:
        time.sleep(0.1)
"""


def missing(*programs: str) -> str | None:
    """The reason why a test can't run which needs these programs, or None when all are there."""
    absent = [program for program in programs if shutil.which(program) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


@functools.cache
def unavailable() -> str | None:
    """The reason why no hosts can be made on this machine, or None when they can."""
    if sys.platform != "linux":
        return "hosts need Linux namespaces"
    if os.geteuid() != 0:
        return "hosts need root"
    if reason := missing("unshare", "nsenter", "setpriv", "ip", "mount", "hostname"):
        return reason
    attempt = "mount -t tmpfs tmpfs /run && ip link add br0 type bridge && ip link add eth0 type veth peer name eth1"
    command = ("unshare", *NAMESPACES, "--fork", "--mount-proc", "--propagation", "private", "sh", "-c", attempt)
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    return f"namespaces are not permitted: {done.stderr.strip()}" if done.returncode else None


def succeed(done: Result) -> Result:
    """Raise an error that tells what the command printed, if it failed."""
    if done.returncode:
        command = " ".join(done.args)
        raise RuntimeError(f"exit code {done.returncode}: {command}\n{done.stdout or ''}{done.stderr or ''}")
    return done


def children(pid: int) -> list[int]:
    """The processes that a single-threaded process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def start(*command: str) -> subprocess.Popen[str]:
    """Start a program that lives until the network closes, and wait for its first line.

    It gets a session of its own, so that Ctrl-C at the tests doesn't kill it before they clean up.
    """
    process = subprocess.Popen(
        [*DIE_WITH_PARENT, *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout
    assert process.stderr
    if not process.stdout.readline():
        raise RuntimeError(f"could not start {' '.join(command)}\n{process.communicate()[1]}")
    process.stdout.close()
    process.stderr.close()
    return process


class Command(subprocess.Popen[str]):
    """A command on a host. Signals, also those of terminate() and kill(), reach the command itself."""

    def send_signal(self, sig: int) -> None:
        # The process started here is nsenter. It passes no signals on, but ends as the command inside ends.
        if self.poll() is None:
            for pid in children(self.pid) or [self.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, sig)


class Host:
    """One host of a Network, with namespaces of its own:

    net:   its own address, ports and network device `eth0`, whose cable can be cut
    uts:   its own host name, by which Slurm, MPI and DeepSpeed tell hosts apart
    mount: its own /etc/hosts, /run and other files, without a change to the machine's
    ipc:   its own shared memory (with the private /dev/shm), so that ranks can't mistake each other for neighbours
    pid:   its own processes: killing the first one crashes the host, and DeepSpeed's launcher, which cleans up by
           `pkill -f` on each host, can't hit processes elsewhere on the machine
    """

    def __init__(self, network: Network, name: str, address: str) -> None:
        self.network, self.name, self.address = network, name, address
        self._port = f"to-{name}"  # the switch's end of the cable
        options = ("--fork", "--kill-child", "--mount-proc", "--propagation", "private")
        self._unshare = start("unshare", *NAMESPACES, *options, sys.executable, "-I", "-S", "-c", INIT)
        (self.pid,) = children(self._unshare.pid)  # the host's first process, as seen from outside

    def setup(self) -> None:
        """Connect the host to the switch and give it its name and files."""
        cable = ("type", "veth", "peer", "name", "eth0", "netns", str(self.pid))
        self.network.switch("ip", "link", "add", self._port, *cable)
        self.network.switch("ip", "link", "set", self._port, "master", "br0", "up")
        # No name server can be reached from here. An empty resolv.conf, or none as on systems that keep it in /run,
        # makes look-ups of unknown names fail at once.
        self.run(
            *("sh", "-ec"),
            f"""
            hostname {self.name}
            ip link set lo up
            ip addr add {self.address}/24 dev eth0
            ip link set eth0 up
            mount -t tmpfs tmpfs /run
            mount -t tmpfs tmpfs /dev/shm
            [ ! -e /etc/resolv.conf ] || mount --bind /dev/null /etc/resolv.conf
            """,
        )
        for target, source in self.network.binds.items():
            self.run("mount", "--bind", str(source), target)

    def popen(self, *command: str, cwd: str | Path | None = None, **options: Any) -> Command:
        """Start a command on this host, with the options of subprocess.Popen; without input, unless stdin is given."""
        # nsenter --mount would start the command in "/": --wdns keeps the folder.
        nsenter = ("nsenter", "--target", str(self.pid), *NAMESPACES, f"--wdns={Path(cwd or '.').absolute()}")
        return Command([*nsenter, *command], text=True, **{"stdin": subprocess.DEVNULL, **options})

    def run(self, *command: str, check: bool = True, timeout: float = 300, **options: Any) -> Result:
        """Run a command on this host, with the options of popen, and return what it prints.

        check: raise an error if it fails
        """
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        with self.popen(*command, **options) as process:
            try:
                output, errors = process.communicate(timeout=timeout)
            except BaseException:
                process.kill()
                raise
        done = subprocess.CompletedProcess(command, process.returncode, output, errors)
        return succeed(done) if check else done

    def cut(self) -> None:
        """Pull the network cable: nothing arrives any more, and no one is told."""
        self.network.switch("ip", "link", "set", self._port, "down")

    def heal(self) -> None:
        """Plug the network cable in again."""
        self.network.switch("ip", "link", "set", self._port, "up")

    def crash(self) -> None:
        """Kill every process of this host, for good.

        The kernel still closes their connections, so peers see it at once. For a power loss, which is silent, cut()
        first.
        """
        if self._unshare.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self._unshare.wait(10)  # ends when the last process of the host is gone


class Network:
    """Hosts with the given names, joined by a switch. `with Network(folder, ["n0", "n1"]) as network: network["n0"]`

    folder: for the file that becomes /etc/hosts on each host
    binds:  files to put over others on each host: {"/etc/ssh/ssh_config": file}
    """

    def __init__(self, folder: Path, names: Sequence[str], binds: Mapping[str, Path] | None = None) -> None:
        self.folder = folder
        self.addresses = {name: f"{SUBNET}.{10 + number}" for number, name in enumerate(names)}
        self.binds = {"/etc/hosts": folder / "hosts", **(binds or {})}
        self.hosts: dict[str, Host] = {}
        self._exit = contextlib.ExitStack()

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in self.addresses.items())]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        with contextlib.ExitStack() as stack:
            # forward_delay 0: a bridge otherwise forwards nothing for its first 15 seconds
            bridge = "ip link add br0 type bridge forward_delay 0 && ip link set br0 up && echo && exec sleep infinity"
            self._switch = stack.enter_context(start("unshare", "--net", "sh", "-c", bridge))
            stack.callback(self._switch.kill)
            for name, address in self.addresses.items():
                self.hosts[name] = Host(self, name, address)
                stack.callback(self.hosts[name].crash)
                self.hosts[name].setup()
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._exit.close()

    def switch(self, *command: str) -> None:
        """Run a command in the switch's network namespace, which keeps its devices off the machine's."""
        nsenter = ("nsenter", "--target", str(self._switch.pid), "--net")
        succeed(subprocess.run([*nsenter, *command], stdin=subprocess.DEVNULL, capture_output=True, text=True))
