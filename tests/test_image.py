"""Both variants of the image, built from nothing without a registry, and runs in containers of the CPU's.

Takes minutes and 4 GB, for GPUs an hour and 40 GB, so it is asked for: FULLFT_TEST_IMAGE=FOLDER, which keeps the
layers. The base images are made by debootstrap, NVIDIA's of Ubuntu and of nvcc's packages for pip.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import hosts
import pytest
from conftest import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

FOLDER = Path(os.environ.get("FULLFT_TEST_IMAGE") or "/nonexistent")
STORE = ["--root", str(FOLDER / "store"), "--runroot", str(FOLDER / "run")]
DOCKERFILE = (REPOSITORY / "docker/Dockerfile").read_text()
DEBIAN = "docker.io/library/" + re.findall(r"BASE=(debian:\S+)", DOCKERFILE)[0]
NVCC, CUDA = ("docker.io/" + one for one in re.findall(r"^ARG \w*BASE=(\S+)", DOCKERFILE, re.MULTILINE))
UBUNTU, UBUNTU_KEYRING = "http://archive.ubuntu.com/ubuntu", "ubuntu-keyring_2023.11.28.1_all.deb"
# No CAP_SYS_RESOURCE is needed with these limits. Never podman's default network: it would change the machine's.
LIMITS = ["--ulimit", "nofile=4096:4096", "--ulimit", "nproc=4096:4096"]


def tool(*command: str, timeout: float = 1800) -> str:
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, " ".join(command) + done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


def images() -> str:
    return tool("buildah", *STORE, "images", "--format", "{{.Name}}:{{.Tag}}")


def make_debian() -> None:
    if DEBIAN not in images():
        commit(root_of("bookworm"), DEBIAN)


def make_cuda() -> None:
    """The bases for GPUs. NVIDIA's have CUDA's compatibility libraries and more of its toolkit."""
    if NVCC in images():
        return
    ubuntu = root_of("noble", "--components=main,universe", f"--keyring={keyring_of_ubuntu()}", UBUNTU)
    commit(ubuntu, CUDA)
    toolkit, lock = FOLDER / "toolkit", (REPOSITORY / "docker/requirements-gpu.txt").read_text()
    shutil.rmtree(toolkit, ignore_errors=True)
    locked = [re.search(rf"^nvidia-{one}==\S+", lock, re.MULTILINE) for one in _CUDA_LIBRARIES]
    words = [f"nvidia-{one}~=13.0.0" for one in _CUDA_COMPILER] + [found[0] for found in locked if found]
    tool(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(toolkit), *words)
    cuda = toolkit / "nvidia/cu13"
    (cuda / "lib64").symlink_to("lib")
    for library in (cuda / "lib").glob("*.so.*"):
        (cuda / "lib" / f"{library.name.partition('.so.')[0]}.so").symlink_to(library.name)
    stub = cuda / "lib/stubs/libcuda.so"  # to link against; that of a driver is there when it runs
    stub.parent.mkdir()
    tool("cc", "-shared", "-Wl,-soname,libcuda.so.1", "-o", str(stub), "-xc", "/dev/null")
    path, stubs = "PATH=/usr/local/cuda/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LIBRARY_PATH=/usr/local/cuda/lib64/stubs"
    commit(ubuntu, NVCC, "--env", path, "--env", stubs, cuda=cuda)


_CUDA_COMPILER = ("cuda-nvcc", "cuda-crt", "cuda-cccl", "nvvm")
_CUDA_LIBRARIES = ("cuda-runtime", "cublas", "curand", "cusparse", "cusolver", "cufft")


def root_of(suite: str, *words: str) -> Path:
    """The folder of a distribution's smallest system."""
    root, script = FOLDER / suite, Path("/usr/share/debootstrap/scripts", suite)
    if not script.exists():
        script.symlink_to("gutsy")  # that of all Ubuntus
    if not root.exists():
        *options, mirror = words or ("http://deb.debian.org/debian",)
        tool("debootstrap", "--variant=minbase", *options, suite, f"{root}.part", mirror)
        Path(f"{root}.part").rename(root)
    return root


def keyring_of_ubuntu() -> Path:
    package = FOLDER / UBUNTU_KEYRING
    urllib.request.urlretrieve(f"{UBUNTU}/pool/main/u/ubuntu-keyring/{UBUNTU_KEYRING}", package)
    tool("dpkg-deb", "-x", str(package), str(FOLDER / "keyring"))
    return FOLDER / "keyring/usr/share/keyrings/ubuntu-archive-keyring.gpg"


def commit(root: Path, name: str, *config: str, cuda: Path | None = None) -> None:
    container = tool("buildah", *STORE, "from", "scratch").strip()
    tool("buildah", *STORE, "add", "-q", container, str(root), "/")
    if cuda:
        tool("buildah", *STORE, "add", "-q", container, str(cuda), "/usr/local/cuda")
    if config:
        tool("buildah", *STORE, "config", *config, container)
    tool("buildah", *STORE, "commit", "-q", "--rm", container, name)


def options_of_pip() -> list[str]:
    """This machine's certificates, and wheels where it has some, are those of the build too."""
    certificates = "/etc/ssl/certs/ca-certificates.crt"
    (FOLDER / "pip.conf").write_text("[global]\ncert = /certificates.crt\n")
    options = ["--volume", f"{certificates}:/certificates.crt:ro", "--volume", f"{FOLDER}/pip.conf:/etc/pip.conf:ro"]
    wheels = os.environ.get("PIP_FIND_LINKS", "")
    if Path(wheels).is_absolute():
        options += ["--volume", f"{wheels}:{wheels}:ro", "--build-arg", f"TORCH_WHEELS={wheels}"]
    return options


def build(variant: str, **arguments: str) -> str:
    """The image of a variant, by its base images and other arguments; returns its name."""
    name = f"localhost/fullft:{variant}"
    given = {"VARIANT": variant} | arguments
    words = [word for key, value in given.items() for word in ("--build-arg", f"{key}={value}")]
    how = ["--isolation", "chroot", "--pull=never", "--format", "docker", "--layers"]  # OCI's format has no SHELL
    command = ["buildah", *STORE, "bud", *how, *words, *options_of_pip(), "-f", "docker/Dockerfile", "-t", name, "."]
    tool(*command, timeout=7200)
    return name


@pytest.fixture(scope="module", autouse=True)
def folder() -> None:
    if "FULLFT_TEST_IMAGE" not in os.environ:
        pytest.skip("takes minutes and 4 GB, for GPUs an hour and 40 GB; set FULLFT_TEST_IMAGE=FOLDER")
    if reason := hosts.unavailable() or hosts.missing("buildah", "podman", "runc", "debootstrap"):
        pytest.skip(reason)
    FOLDER.mkdir(parents=True, exist_ok=True)


@pytest.fixture(scope="module")
def image() -> str:
    make_debian()
    return build("cpu", OPS="", BUILD_BASE=DEBIAN, BASE=DEBIAN)


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


def test_the_operations_for_gpus_are_compiled_and_find_their_libraries(tmp_path: Path) -> None:
    """Without a GPU: each is loaded with all its libraries, but for the driver's, which is the node's."""
    make_cuda()
    name = build("gpu", BUILD_BASE=NVCC, BASE=CUDA)
    program = """
import json, torch
from deepspeed.git_version_info import installed_ops
from deepspeed.ops.op_builder.all_ops import ALL_OPS
ops = [name for name, there in installed_ops.items() if there]
for op in ops:
    ALL_OPS[op].load()
print(json.dumps([torch.version.cuda, torch.cuda.nccl.version(), ops]))
"""
    with Containers(tmp_path, name) as containers:
        # Else DeepSpeed would compile them for the CPU.
        containers.start("ops", "python", "-c", program, options=("-e", "DS_ACCELERATOR=cuda"))
        assert containers.wait("ops", 300) == 0, containers.output("ops")
        cuda, nccl, ops = json.loads(containers.output("ops").splitlines()[-1])
    assert (cuda[:3], nccl[0]) == ("13.", 2)
    asked = re.findall(r'^ARG OPS="(.*)"', DOCKERFILE, re.MULTILINE)[0].lower().split()
    assert sorted(ops) == sorted({"aio": "async_io"}.get(one, one) for one in asked)
