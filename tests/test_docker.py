"""The image: its files are sound; its entry point ends with the code of the run, whatever its launcher says."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sysconfig
import tempfile
import time
import tomllib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import hosts
import psutil
import pytest
import ssh_hosts
import yaml
from conftest import REPOSITORY, metrics, write_recipe
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from test_launch import ON_HOSTS, TRAIN, TRAINING_SECONDS, Run, free_port, skip_if

DOCKER = REPOSITORY / "docker"
SCRIPTS = sysconfig.get_path("scripts")
ENTRYPOINT = str(DOCKER / "entrypoint.sh")
PATH = f"{SCRIPTS}:{os.environ['PATH']}"  # as in the image: python, deepspeed and torchrun are ours


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with Run(tmp_path) as run:
        yield run


def lint(program: str, *files: str) -> None:
    done = subprocess.run([Path(SCRIPTS) / program, *files], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dockerfile_and_the_scripts_are_linted() -> None:
    lint("hadolint", "docker/Dockerfile")
    lint("shellcheck", "docker/entrypoint.sh", "docker/cxx-avx2")


def pins(variant: str) -> dict[str, Version]:
    """Of a lock file: package → version. Each must have a hash."""
    entries = [one for one in re.split(r"\n(?=\S)", text(f"requirements-{variant}.txt")) if one[0] != "#"]
    assert all("--hash=sha256:" in entry for entry in entries)
    locked = [Requirement(entry.split("\\")[0].strip()) for entry in entries]
    return {canonicalize_name(one.name): Version(str(one.specifier).removeprefix("==")) for one in locked}


@pytest.mark.parametrize(("variant", "extras"), [("gpu", ["gpu"]), ("cpu", [])])
def test_the_lock_file_satisfies_the_project(variant: str, extras: list[str]) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(one for extra in extras for one in project["optional-dependencies"][extra])]
    locked = pins(variant)
    for requirement in map(Requirement, wanted):
        assert locked[canonicalize_name(requirement.name)] in requirement.specifier, requirement
    assert (variant == "gpu") == any(name.startswith("nvidia-") for name in locked)


def test_the_base_has_the_cuda_of_the_locked_torch() -> None:
    bases = re.findall(r"=nvidia/cuda:(\d+)\.\d+\.\d+-(devel|base)-ubuntu24\.04$", text("Dockerfile"), re.MULTILINE)
    assert [kind for _, kind in bases] == ["devel", "base"]
    assert {int(major) for major, _ in bases} == {pins("gpu")["nvidia-cuda-runtime"].major}


def text(name: str) -> str:
    return (DOCKER / name).read_text()


def test_compose_starts_two_nodes_of_the_cpu_variant_that_share_keys_and_runs() -> None:
    services = yaml.safe_load(text("compose.yaml"))["services"]
    listed = [line.split()[0] for line in text("hostfile").splitlines() if line and not line.startswith("#")]
    assert "!docker/hostfile" in (REPOSITORY / ".dockerignore").read_text().splitlines()
    first, second = (services[name] for name in listed)  # by these names they find each other
    assert second["command"] == ["sshd"]
    assert first["command"][:3] == ["train", "--hostfile", "/opt/fullft/docker/hostfile"]
    assert (first["hostname"], second["hostname"]) == tuple(listed)
    for service in services.values():
        assert {volume.partition(":")[2] for volume in service["volumes"]} >= {"/ssh", "/workspace/runs"}
        arguments = service["build"]["args"]
        assert set(arguments) == {"VARIANT", "OPS", "BUILD_BASE", "BASE"}
        assert all(f"--build-arg {name}={value}" in text("Dockerfile") for name, value in arguments.items())


def start(run: Run, recipe: dict[str, Any], *options: str, **env: str) -> None:
    config = write_recipe(recipe, Path(recipe["run_dir"]).with_suffix(".yaml"))
    place = {"PATH": PATH, "MASTER_PORT": free_port(), "GPUS_PER_NODE": "2"}
    run.start(ENTRYPOINT, "train", *options, "--config", str(config), **place | env)


def wait_until_it_trains(run: Run, recipe: dict[str, Any], after: int = 0) -> None:
    deadline = time.monotonic() + TRAINING_SECONDS
    while not ((Path(recipe["run_dir"]) / "metrics.jsonl").exists() and len(metrics(recipe)) > after + 3):
        assert time.monotonic() < deadline, run.output
        assert run.launcher
        assert run.launcher.poll() is None, run.output
        time.sleep(0.1)


def state(recipe: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(recipe["run_dir"]) / "state.json").read_text())
    return found


def environment_of(recipe: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(recipe["run_dir"]) / "env.json").read_text())
    return found


def assert_saved(recipe: dict[str, Any]) -> int:
    assert state(recipe)["status"] == "requeue"
    step: int = state(recipe)["step"]
    assert (Path(recipe["run_dir"]) / f"checkpoints/step-{step:08d}/MANIFEST.json").exists()
    return step


def launcher_of_the_node(run: Run) -> psutil.Process:
    return next(one for one in run.processes() if "deepspeed.launcher.launch" in one.cmdline())


KUBERNETES = {"MASTER_ADDR": "127.0.0.1", "NNODES": "1", "NODE_RANK": "0", "GPUS_PER_NODE": "1"}


@pytest.mark.ranks
def test_a_run_is_interrupted_twice_and_finished(recipe: dict[str, Any], run: Run) -> None:
    recipe["train"]["steps"], recipe["checkpoint"]["every_steps"] = 200, 1000  # some 10 seconds
    start(run, recipe)
    wait_until_it_trains(run, recipe)
    assert run.launcher
    run.launcher.send_signal(signal.SIGTERM)
    assert run.wait(120) == 85, run.output
    run.assert_nothing_left()
    saved = assert_saved(recipe)

    # DeepSpeed's launcher is killed: its runner ends with 0, and its ranks are left to themselves.
    start(run, recipe)
    wait_until_it_trains(run, recipe, after=saved)
    launcher_of_the_node(run).kill()
    assert run.wait(120) == 85, run.output
    assert "exit code of the launcher 0" in run.output
    run.assert_nothing_left()
    saved = assert_saved(recipe)

    # The only node of a Kubernetes job, with one rank: goes on from there.
    start(run, recipe, **KUBERNETES)
    assert run.wait(TRAINING_SECONDS) == 0, run.output
    assert state(recipe)["status"] == "done"
    assert [row["step"] for row in metrics(recipe)] == list(range(1, 201))
    environment = environment_of(recipe)
    assert (environment["launcher"], environment["world_size"]) == ("torchrun", "1")
    run.assert_nothing_left()

    # The folder is done, whatever the launcher says; but not for another recipe, when a launcher dies at once with 0.
    (run.folder / "deepspeed").symlink_to("/bin/false")
    start(run, recipe, PATH=f"{run.folder}:{PATH}")
    assert run.wait(60) == 0, run.output
    assert f"run {recipe['run_dir']}: done" in run.output
    (run.folder / "deepspeed").unlink()
    (run.folder / "deepspeed").symlink_to("/bin/true")
    other = recipe | {"train": recipe["train"] | {"learning_rate": 2e-3}}
    start(run, other, PATH=f"{run.folder}:{PATH}")
    assert run.wait(60) == 2, run.output
    assert "belongs to another recipe" in run.output


def test_a_bad_recipe_ends_it_before_anything_starts(recipe: dict[str, Any], run: Run) -> None:
    recipe["train"] |= {"learning_rate": -1}
    start(run, recipe)
    assert run.wait(60) == 2, run.output
    assert run.output.count("  - train.learning_rate: ") == 1
    assert "deepspeed" not in run.output


def test_what_ranks_end_with_is_what_a_node_of_a_kubernetes_job_ends_with(recipe: dict[str, Any], run: Run) -> None:
    """torchrun's own code would be 1, and the job started again. (The variable is one that a PyTorchJob may set.)"""
    start(run, recipe, **KUBERNETES, PET_MAX_RESTARTS="1")
    assert run.wait(60) == 2, run.output
    assert "training was not started" in run.output


def test_a_command_or_a_verb_is_run_as_it_is(run: Run) -> None:
    run.start(ENTRYPOINT, "sh", "-c", "exit 7", PATH=PATH)
    assert run.wait(60) == 7, run.output
    if not shutil.which("fullft", path=PATH):
        pytest.skip("fullft is not installed")
    run.start(ENTRYPOINT, "check", "--help", PATH=PATH)
    assert run.wait(60) == 0, run.output
    assert "usage: fullft check" in run.output


def test_a_host_that_is_not_there_is_named(recipe: dict[str, Any], run: Run) -> None:
    (run.folder / "hosts").write_text("# two nodes\nno-such-host.invalid slots=1\n")
    start(run, recipe, "--hostfile", str(run.folder / "hosts"), FULLFT_WAIT_SECONDS="0")
    assert run.wait(60) == 1, run.output
    assert "no-such-host.invalid of" in run.output


@pytest.mark.cluster
def test_over_hosts_a_signal_to_the_container_reaches_the_ranks(
    recipe: dict[str, Any], run: Run, tmp_path: Path
) -> None:
    skip_if(ssh_hosts.unavailable() or hosts.missing("pdsh"))
    recipe["train"]["steps"], recipe["checkpoint"]["every_steps"] = 100_000, 100_000
    with ssh_hosts.SshHosts(tmp_path / "ssh", n=2) as ssh:
        sent = tmp_path / "deepspeed_env"
        sent.write_text("".join(f"{name}={value}\n" for name, value in (ON_HOSTS | run.mark).items()))
        config = write_recipe(recipe, Path(recipe["run_dir"]).with_suffix(".yaml"))
        run.start(
            ENTRYPOINT, "train", "--config", str(config), popen=partial(ssh.popen_on, "n0"),
            PATH=PATH, HOSTFILE=str(ssh.hostfile), DS_ENV_FILE=str(sent),
        )  # fmt: skip
        wait_until_it_trains(run, recipe)
        assert len([one for one in run.processes() if TRAIN in one.cmdline() and "RANK" in one.environ()]) >= 2
        assert run.launcher
        run.launcher.send_signal(signal.SIGTERM)
        assert run.wait(120) == 85, run.output
        run.assert_nothing_left()
        assert_saved(recipe)


NODE = """
set -e
ip link set lo up
mount -t tmpfs tmpfs /home
mount -t tmpfs tmpfs /run
mkdir -p /home/fullft
chown 1001:1001 /home/fullft "$SSH_KEYS"
(cat /etc/passwd; echo fullft:x:1001:1001::/home/fullft:/bin/bash) > "$SSH_KEYS/../passwd"
mount --bind "$SSH_KEYS/../passwd" /etc/passwd
mount --bind docker/ssh_config /etc/ssh/ssh_config
export HOME=/home/fullft FULLFT_VARIANT=cpu NCCL_DEBUG=marked
user="setpriv --reuid 1001 --regid 1001 --clear-groups"
$user docker/entrypoint.sh sshd & node=$!
for _ in $(seq 100); do if $user ssh -n localhost true 2> /dev/null; then break; fi; sleep 0.1; done
$user ssh -n localhost 'echo "$(id -un) $NCCL_DEBUG"'
$user docker/entrypoint.sh health
kill -TERM $node
wait $node
"""


@pytest.mark.cluster
def test_a_node_lets_its_user_in_by_the_shared_key_with_the_environment_of_the_container() -> None:
    skip_if(ssh_hosts.unavailable())
    with tempfile.TemporaryDirectory() as folder:  # pytest's own may be entered by root only
        Path(folder).chmod(0o755)
        keys = Path(folder) / "keys"
        keys.mkdir()
        namespaces = ("--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private")
        done = subprocess.run(
            ["unshare", *namespaces, "bash", "-c", NODE],
            cwd=REPOSITORY, env=os.environ | {"SSH_KEYS": str(keys)}, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout == "fullft marked\n"
        assert (keys / "id_ed25519").stat().st_mode & 0o777 == 0o600
