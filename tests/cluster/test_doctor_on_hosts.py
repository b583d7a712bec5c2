"""`fullft doctor` over real ssh hosts and in an allocation: which host or link is wrong, and how it is mended."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hosts
import pytest
import slurm
import ssh_hosts
from conftest import CPU_RANKS, REPOSITORY, write_recipe
from test_launch import ON_HOSTS

pytestmark = pytest.mark.cluster


@pytest.fixture
def ssh(tmp_path: Path) -> Iterator[ssh_hosts.SshHosts]:
    if reason := ssh_hosts.unavailable() or hosts.missing("pdsh", "tc"):
        pytest.skip(reason)
    with ssh_hosts.SshHosts(tmp_path / "ssh", n=4) as ssh:
        yield ssh


def doctor(ssh: ssh_hosts.SshHosts, folder: Path, names: str, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON of a doctor on n0 over these hosts."""
    hostfile, sent = folder / "hosts.txt", folder / "env"
    hostfile.write_text("".join(f"{name} slots=1\n" for name in names.split()))
    # Not the machine's own folder of compiled operations, where killed builds may have left their locks.
    variables = CPU_RANKS | {"GLOO_SOCKET_IFNAME": "eth0", "TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
    sent.write_text("".join(f"{key}={value}\n" for key, value in variables.items()))
    command = [sys.executable, "-m", "fullft.cli", "doctor", *arguments, "--hostfile", str(hostfile), "--json"]
    environment = {"DS_ENV_FILE": str(sent), "PYTHONPATH": str(REPOSITORY)}
    environment["TORCH_EXTENSIONS_DIR"] = variables["TORCH_EXTENSIONS_DIR"]
    done = ssh.run_on("n0", *command, env=environment, cwd=folder, check=False)
    assert done.stdout.startswith("{"), done.stdout + done.stderr
    return done.returncode, json.loads(done.stdout)


def told(found: dict[str, Any], words: str) -> dict[str, Any]:
    """The one finding with these words."""
    matching = [one for one in found["findings"] if words in one["what"]]
    assert len(matching) == 1, found["findings"]
    return dict(matching[0])


def test_hosts_that_are_fine_are_and_those_that_are_not_are_named(
    ssh: ssh_hosts.SshHosts, recipe: dict[str, Any], tmp_path: Path
) -> None:
    config = str(write_recipe(recipe, tmp_path / "recipe.yaml"))
    network = ssh.network
    code, found = doctor(ssh, tmp_path, "n0 n1 n2", config, "data.sequence_length=64")
    assert (code, [one for one in found["findings"] if one["severity"] == "error"]) == (0, [])
    assert [one["host"] for one in found["hosts"]] == ["n0", "n1", "n2"]
    assert {name for link in found["links"] for pair in link["pairs"] for name in pair["hosts"]} == {"n0", "n1", "n2"}
    assert all(set(link["sees"]) == {"n0", "n1", "n2"} for link in found["links"])
    assert found["needs"]["run_folder_bytes"] > 0
    assert not list(tmp_path.glob(".fullft-doctor*"))

    # n1 has another code and other data, n2 a slow network, n3 is down, and there is no n9.
    other = {REPOSITORY / "fullft" / "errors.py": "# changed\n", Path(recipe["data"]["train"]): "\n"}
    for number, (file, more) in enumerate(other.items()):
        changed = tmp_path / f"changed-{number}"
        changed.write_text(file.read_text() + more)
        network["n1"].run("mount", "--bind", str(changed), str(file))
    slow = ("tc", "qdisc", "replace", "dev", "eth0", "root", "tbf", "rate", "40mbit", "burst", "64kb", "latency", "1s")
    network["n2"].run(*slow)
    network["n3"].cut()
    started = time.monotonic()
    code, found = doctor(ssh, tmp_path, "n0 n1 n2 n3 n9", config)
    assert code == 1
    for words, host in (
        ("another code of fullft", "n1"), ("train.jsonl differs", "n1"), ("its network carries", "n2"),
    ):  # fmt: skip
        assert told(found, words)["hosts"] == [host], found["findings"]
    unreached = [one for one in found["findings"] if "ssh does not reach it" in one["what"]]
    assert [one["hosts"] for one in unreached] == [["n3"], ["n9"]]
    assert time.monotonic() - started < 120


def test_the_ranks_of_an_allocation_examine_its_nodes(recipe: dict[str, Any], tmp_path: Path) -> None:
    if reason := slurm.unavailable():
        pytest.skip(reason)
    config = str(write_recipe(recipe, tmp_path / "recipe.yaml"))
    changed = tmp_path / "changed.py"
    changed.write_text((REPOSITORY / "fullft" / "errors.py").read_text() + "# changed\n")
    with slurm.Slurm(tmp_path / "slurm", nodes=2) as nodes:
        nodes.network["n1"].run("mount", "--bind", str(changed), str(REPOSITORY / "fullft" / "errors.py"))
        command = ["srun", "-N2", "--ntasks-per-node=2", sys.executable, "-m", "fullft.cli", "doctor", config, "--json"]
        done = nodes.run(*command, env=ON_HOSTS | {"PYTHONPATH": str(REPOSITORY)}, cwd=tmp_path, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert [one["host"] for one in found["hosts"]] == ["n0", "n1"]
    assert any(pair["hosts"] == ["n0", "n1"] for link in found["links"] for pair in link["pairs"])
    assert told(found, "another code of fullft")["hosts"] == ["n1"]
