"""The CPU variant of the image, built from nothing without a registry, and runs in containers of it.

Takes minutes and 4 GB, so it is asked for: FULLFT_TEST_IMAGE=FOLDER, which keeps the layers. Debian's base
image is made by debootstrap.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import hosts
import pytest
from conftest import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

FOLDER = Path(os.environ.get("FULLFT_TEST_IMAGE") or "/nonexistent")
STORE = ["--root", str(FOLDER / "store"), "--runroot", str(FOLDER / "run")]
BASE = re.findall(r"BASE=(debian:\S+)", (REPOSITORY / "docker/Dockerfile").read_text())[0]
IMAGE = "localhost/fullft:cpu"
# No CAP_SYS_RESOURCE is needed with these limits. Never podman's default network: it would change the machine's.
LIMITS = ["--ulimit", "nofile=4096:4096", "--ulimit", "nproc=4096:4096"]


def tool(*command: str, timeout: float = 1800) -> str:
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, " ".join(command) + done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


def make_base() -> None:
    if not (FOLDER / "rootfs").exists():
        tool("debootstrap", "--variant=minbase", "bookworm", str(FOLDER / "rootfs.part"))
        (FOLDER / "rootfs.part").rename(FOLDER / "rootfs")
    if f"docker.io/library/{BASE}" not in tool("buildah", *STORE, "images", "--format", "{{.Name}}:{{.Tag}}"):
        container = tool("buildah", *STORE, "from", "scratch").strip()
        tool("buildah", *STORE, "add", "-q", container, str(FOLDER / "rootfs"), "/")
        tool("buildah", *STORE, "commit", "-q", "--rm", container, f"docker.io/library/{BASE}")


def options_of_pip() -> list[str]:
    """This machine's certificates, and wheels where it has some, are those of the build too."""
    certificates = "/etc/ssl/certs/ca-certificates.crt"
    (FOLDER / "pip.conf").write_text("[global]\ncert = /certificates.crt\n")
    options = ["--volume", f"{certificates}:/certificates.crt:ro", "--volume", f"{FOLDER}/pip.conf:/etc/pip.conf:ro"]
    wheels = os.environ.get("PIP_FIND_LINKS", "")
    if Path(wheels).is_absolute():
        options += ["--volume", f"{wheels}:{wheels}:ro", "--build-arg", f"TORCH_WHEELS={wheels}"]
    return options


@pytest.fixture(scope="module")
def image() -> str:
    if "FULLFT_TEST_IMAGE" not in os.environ:
        pytest.skip("takes minutes and 4 GB; set FULLFT_TEST_IMAGE=FOLDER")
    if reason := hosts.unavailable() or hosts.missing("buildah", "podman", "runc", "debootstrap"):
        pytest.skip(reason)
    FOLDER.mkdir(parents=True, exist_ok=True)
    make_base()
    arguments = {
        "VARIANT": "cpu",
        "OPS": "",
        "BUILD_BASE": f"docker.io/library/{BASE}",
        "BASE": f"docker.io/library/{BASE}",
    }
    words = [word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")]
    how = ["--isolation", "chroot", "--pull=never", "--format", "docker", "--layers"]  # OCI's format has no SHELL
    tool("buildah", *STORE, "bud", *how, *words, *options_of_pip(), "-f", "docker/Dockerfile", "-t", IMAGE, ".")
    return IMAGE


class Containers:
    """Containers of a test, with a folder that they share; none outlives the `with` block."""

    def __init__(self, folder: Path, image: str) -> None:
        self.folder, self.image, self.running = folder, image, dict[str, subprocess.Popen[str]]()
        for name in ("runs", "keys"):
            (folder / name).mkdir()
            os.chown(folder / name, 1001, 1001)

    def __enter__(self) -> Containers:
        return self

    def __exit__(self, *error: object) -> None:
        for name, process in self.running.items():
            subprocess.run([*self.podman, "rm", "-f", name], capture_output=True)
            process.kill()
            process.wait()

    @property
    def podman(self) -> list[str]:
        state = ["--cgroup-manager", "cgroupfs", "--tmpdir", str(FOLDER / "tmp"), "--events-backend", "none"]
        return ["podman", *STORE, *state, "--storage-driver", "overlay", "--runtime", "runc"]

    def start(self, name: str, *command: str, network: str = "none", options: tuple[str, ...] = ()) -> None:
        volumes = ["-v", f"{self.folder}/runs:/workspace/runs", "-v", f"{self.folder}/keys:/ssh"]
        variables = ["-e", "OMP_NUM_THREADS=1", "-e", "DS_ACCELERATOR=cpu", "-e", "GLOO_SOCKET_IFNAME=" + (
            "lo" if network == "none" else "eth0"
        )]  # fmt: skip
        words = ["run", "--rm", "--name", name, "--network", network, *LIMITS, *volumes, *variables, *options]
        with (self.folder / f"{name}.log").open("w") as log:
            self.running[name] = subprocess.Popen(
                [*self.podman, *words, self.image, *command], stdout=log, stderr=subprocess.STDOUT, text=True
            )

    def output(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")[-6000:]

    def wait(self, name: str, seconds: float) -> int:
        return self.running[name].wait(seconds)

    def state(self, run: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "runs" / run / "state.json").read_text())
        return found

    def wait_for_steps(self, name: str, run: str) -> None:
        deadline, file = time.monotonic() + 300, self.folder / "runs" / run / "metrics.jsonl"
        while not (file.exists() and '"train/loss"' in file.read_text()):
            assert time.monotonic() < deadline, self.output(name)
            assert self.running[name].poll() is None, self.output(name)
            time.sleep(0.2)


def test_the_quickstart_a_stop_and_two_nodes(image: str, tmp_path: Path) -> None:
    with Containers(tmp_path, image) as containers:
        containers.start("quickstart", "python", "launch/quickstart.py")
        assert containers.wait("quickstart", 1200) == 0, containers.output("quickstart")
        assert containers.state("quickstart")["status"] == "done"

        # `docker stop`: the ranks save, and the container ends with the code that asks for another start.
        command = (
            "train",
            "--config",
            "launch/recipes/quickstart.yaml",
            "run_dir=runs/stopped",
            "tracking.every_steps=1",
        )
        containers.start("stopped", *command, options=("-e", "GPUS_PER_NODE=2"))
        containers.wait_for_steps("stopped", "stopped")
        tool(*containers.podman, "kill", "--signal", "TERM", "stopped")
        assert containers.wait("stopped", 120) == 85, containers.output("stopped")
        assert containers.state("stopped")["status"] == "requeue"

        # The same run goes on over two containers, which find each other by ssh.
        with hosts.Network(tmp_path / "network", ["node1", "node2"], {}) as network:
            known = tuple(
                word for host in network.hosts.values() for word in ("--add-host", f"{host.name}:{host.address}")
            )
            for name, words in {
                "node2": ("sshd",),
                "node1": (*command[:1], "--hostfile", "docker/hostfile", *command[1:]),
            }.items():
                words = tuple(word.replace("docker/", "/opt/fullft/docker/") for word in words)
                options = (*known, "--hostname", name)
                containers.start(name, *words, network=f"ns:/proc/{network[name].pid}/ns/net", options=options)
            assert containers.wait("node1", 400) == 0, containers.output("node1") + containers.output("node2")
        assert containers.state("stopped")["status"] == "done"
        environment = json.loads((tmp_path / "runs/stopped/env.json").read_text())
        assert environment["world_size"] == "2"
