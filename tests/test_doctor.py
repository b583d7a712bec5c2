"""What the doctor makes of the facts of hosts, among them those that no machine of ours can be brought into."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks

from fullft.doctor import host
from fullft.doctor.examine import deepspeed_environment, read_hostfile
from fullft.doctor.findings import Examined, findings
from fullft.errors import BadInput

GPU = {
    "index": "0", "name": "NVIDIA Unknown", "driver_version": "550.54", "memory.total": "81559", "memory.used": "4",
    "temperature.gpu": "40", "ecc.errors.uncorrected.volatile.total": "0",
    "clocks_throttle_reasons.hw_thermal_slowdown": "Not Active", "clocks.applications.graphics": "[N/A]",
}  # fmt: skip


@pytest.fixture(scope="module")
def real() -> dict[str, Any]:
    return host.look(None, "token", "n0")


@pytest.fixture
def facts(real: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of this machine, as if there were four of it with a GPU each."""
    own = real | {
        "gpus": [GPU],
        "limits": {"locked": -1, "files": 65536, "shm": 2**34, "rdma": 1},
        "xid": [],
        "locks": [],
    }
    return [copy.deepcopy(own) | {"host": f"n{number}"} for number in range(4)]


def told(
    facts: list[dict[str, Any]], links: list[dict[str, Any]] | None = None, **more: Any
) -> list[tuple[str, str, str]]:
    found = findings(Examined(facts, links or [], **more))
    assert all(one.mend for one in found)
    return [(one.severity, " ".join(one.hosts), one.what) for one in found]


def ring(*rates: float) -> list[dict[str, Any]]:
    """Links of four hosts, n0-n1, n1-n2, ..."""
    names = [f"n{number}" for number in range(len(rates))]
    return [
        {"host": name, "reach": {}, "sees": names, "all": None,
         "pairs": [{"hosts": [name, names[(number + 1) % len(names)]], "all_reduce": rate, "all_gather": rate}]}
        for number, (name, rate) in enumerate(zip(names, rates, strict=True))
    ]  # fmt: skip


def test_hosts_that_are_alike_are_fine(facts: list[dict[str, Any]]) -> None:
    assert told(facts, ring(99, 100, 101, 100)) == []


def test_the_odd_host_is_named(facts: list[dict[str, Any]]) -> None:
    facts[2]["versions"]["deepspeed"] = "0.18.0"
    facts[1]["gpus"] = []
    facts[3]["limits"]["locked"] = 65536
    facts[0]["gpus"][0]["ecc.errors.uncorrected.volatile.total"] = "3"
    facts[3]["gpus"][0]["clocks_throttle_reasons.hw_thermal_slowdown"] = "Active"
    facts[0]["environment"]["NCCL_SOCKET_IFNAME"] = "eth0"
    found = told(facts)
    for severity, name, words in (
        ("error", "n2", "deepspeed is 0.18.0"), ("error", "n1", "0 GPUs"), ("error", "n3", "may be locked"),
        ("error", "n0", "ECC"), ("warning", "n3", "hw_thermal_slowdown"), ("warning", "n0", "NCCL_SOCKET_IFNAME"),
    ):  # fmt: skip
        assert [one[:2] for one in found if words in one[2]] == [(severity, name)], found
    assert len(found) == 6


def test_a_slow_host_is_told_from_a_slow_link(facts: list[dict[str, Any]]) -> None:
    assert [one[:2] for one in told(facts, ring(100, 50, 50, 100))] == [("warning", "n2")]
    assert [one[:2] for one in told(facts, ring(100, 9, 100, 100))] == [("error", "n1 n2")]
    (slow,) = told(facts, ring(100, 100, 100, 100), network_gbps=500)
    assert (slow[0], "--network-gbps says 500 for each" in slow[2]) == ("error", True)
    # Of eight GPUs of a host, which all measure, and of one.
    all_of_host = [link for link in ring(400, 400, 400, 400) for _ in range(8)]
    assert told(facts, all_of_host, network_gbps=100)[0][0] == "warning"
    assert told(facts, ring(400, 400, 400, 400), network_gbps=500) == []


def test_a_network_slower_than_planned_is_told(facts: list[dict[str, Any]]) -> None:
    for one in facts:
        one["gpus"] = [GPU | {"name": "NVIDIA H100 80GB HBM3"}]
    (slow,) = told(facts, ring(10, 10, 10, 10))
    assert (slow[0], "fullft plan assumes 400 for each" in slow[2]) == ("warning", True)
    assert told(facts, ring(350, 350, 350, 350)) == []


def test_broken_links_clocks_and_folders_apart_are_named(facts: list[dict[str, Any]]) -> None:
    links = ring(100, 100, 100, 100)
    links[0]["reach"] = {"n1": {"error": "timed out"}, "n2": {"seconds": 0.1, "clock": -7.0}}
    for link in links:
        link["sees"] = ["n3"] if link["host"] == "n3" else ["n0", "n1", "n2"]
    found = told(facts, links)
    assert [one[1] for one in found if "no connection" in one[2]] == ["n0 n1"]
    assert [one[1] for one in found if "clock" in one[2]] == ["n2"]
    assert [one[:2] for one in found if "share" in one[2]] == [("error", "n3")]
    assert ("warning", "n3") in [one[:2] for one in told(facts, links, node_local=True) if "share" in one[2]]


def test_a_run_without_room_is_told(facts: list[dict[str, Any]]) -> None:
    for one in facts:
        one["folder"] = {"path": "/runs", "free": 2**30, "held": 0, "small_ms": 1, "write_mbs": 1000}
    (first, *_) = told(facts, needs={"run_folder_bytes": 2**31, "checkpoint_bytes": 2**29})
    assert "needs 2.0 GiB" in first[2]


def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "hosts"
    file.write_text("# ours\nn0 slots=8\n\n n1  slots=4 # four\n")
    assert read_hostfile(file) == ["n0", "n1"]
    file.write_text("n0 slots=8\nn0 slots=8\nn1\n")
    with pytest.raises(BadInput) as caught:
        read_hostfile(file)
    assert [":2:" in caught.value.problems[0], ":3:" in caught.value.problems[1]] == [True, True]
    (tmp_path / "env").write_text("A=b c\nD=e=f\n")
    monkeypatch.setenv("DS_ENV_FILE", str(tmp_path / "env"))
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    sent = deepspeed_environment()
    assert (sent["A"], sent["D"], sent["NCCL_DEBUG"]) == ("b c", "e=f", "INFO")


OTHER_CODE = """
import os, socket
from fullft.doctor import host
if os.environ["RANK"] == "1":
    socket.gethostname = lambda: "node-b"
    host.code = lambda: {"digest": "0123", "folder": "/old/fullft"}
"""


@pytest.mark.ranks
def test_ranks_with_another_code_are_refused_once_they_meet(recipe: dict[str, Any]) -> None:
    with Ranks(recipe, 2, OTHER_CODE) as ranks:
        assert ranks.codes(100) == [2, 2], ranks.output
        assert "  - node-b: another code of fullft" in ranks.output


def test_files_of_one_size_are_told_apart(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"x" * 2**22)
    b.write_bytes(b"x" * (2**22 - 1) + b"y")
    assert host.sampled(a) != host.sampled(b)
    assert host.sampled(a) == host.sampled(a)
    assert host.sampled(tmp_path / "c").startswith("missing")
