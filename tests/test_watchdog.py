"""A run that hangs ends by itself, names the rank to blame, and leaves no process behind."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import metrics, torchrun
from ranks import Ranks, wait_for
from test_launch import Run, arguments

from fullft.watchdog import compare

HOSTS = ["node-a", "node-a", "node-b", "node-b"]


def report(
    number: int, step: int, phase: str, at: str = "comm.py:1 (wait)", host: str = "n0", unreached: tuple[str, ...] = ()
) -> dict[str, Any]:
    return {"number": number, "step": step, "phase": phase, "at": at, "host": host, "unreached": list(unreached)}


def test_a_rank_without_a_report_is_missing_and_one_with_an_earlier_mark_behind() -> None:
    waits = report(31, 7, "token count")
    text = compare({0: waits, 1: report(30, 7, "data", "batches.py:9 (of_step)"), 3: waits}, HOSTS)
    assert text == (
        "  rank 2 (node-b) did not answer: frozen or dead\n"
        "  rank 1 (node-a) is still in data of step 7, at batches.py:9 (of_step)\n"
        "  ranks 0, 3 (node-a, node-b) are in token count of step 7, at comm.py:1 (wait)\n"
    )


def test_of_ranks_in_the_same_phase_the_odd_one_comes_first() -> None:
    text = compare(
        {rank: report(9, 2, "update", "a.py:1 (f)" if rank == 2 else "b.py:1 (g)") for rank in range(4)}, HOSTS
    )
    assert text.splitlines() == [
        "  rank 2 (node-b) is in update of step 2, at a.py:1 (f)",
        "  ranks 0, 1, 3 (node-a, node-b) are in update of step 2, at b.py:1 (g)",
    ]


def test_of_two_ranks_in_the_same_phase_the_one_in_a_collective_comes_last() -> None:
    at = {0: "/lib/site-packages/deepspeed/utils/nvtx.py:33 (wrapped_fn)", 1: "/home/me/rows.py:6 (endless)"}
    text = compare({rank: report(9, 2, "update", at[rank]) for rank in (0, 1)}, HOSTS[:2])
    assert [line.split()[1] for line in text.splitlines()] == ["1", "0"]


def test_a_host_that_is_cut_off_is_named_and_not_those_which_it_does_not_reach() -> None:
    hosts = [f"n{number}" for number in range(7)]
    waits = {
        rank: report(9, 2, "update", host=host, unreached=tuple(hosts[1:] if rank == 0 else hosts[:1]))
        for rank, host in enumerate(hosts)
    }
    first, second = compare(waits, hosts).splitlines()
    by = "n1, n2, n3, n4 and 2 hosts more"
    assert first == f"  host n0 is not reached over the network by {by}: a link, or the host, is down"
    assert second.startswith("  ranks 0-6 ")
    one_link = {0: report(9, 2, "update", host="n0", unreached=("n1",)), 1: report(9, 2, "update", host="n1")}
    assert "host n1 is not reached over the network by n0:" in compare(one_link, hosts[:2])


@pytest.fixture
def long_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    recipe["train"] |= {"steps": 100_000, "hang_timeout": 20}  # loading may take 10 on a busy machine
    recipe["checkpoint"]["every_steps"] = 100_000
    return recipe


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with Run(tmp_path) as run:
        yield run


def has_steps(recipe: dict[str, Any]) -> bool:
    file = Path(recipe["run_dir"]) / "metrics.jsonl"
    return file.exists() and len(metrics(recipe)) > 3


def failure(recipe: dict[str, Any]) -> str:
    """Why the run failed, by state.json."""
    state = json.loads((Path(recipe["run_dir"]) / "state.json").read_text())
    assert state["status"] == "failed"
    return str(state["reason"])


@pytest.mark.ranks
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_rank_is_named_and_the_launcher_ends_it(long_recipe: dict[str, Any], run: Run, frozen: int) -> None:
    """The other one hangs in a collective; torchrun kills what does not end by SIGTERM."""
    run.start(*torchrun(ranks=2), "--shutdown-timeout", "5", *arguments(long_recipe))
    wait_for(lambda: has_steps(long_recipe), "steps")
    run.rank(frozen).suspend()
    assert run.wait(200) != 0
    run.assert_nothing_left()
    awake = 1 - frozen
    assert f"rank {frozen} ({socket.gethostname()}) did not answer: frozen or dead" in run.output
    assert f"rank {frozen} ({socket.gethostname()}) did not answer" in failure(long_recipe)
    (stacks,) = (Path(long_recipe["run_dir"]) / "hang").glob("*/rank-*.txt")
    assert stacks.name == f"rank-{awake:05d}.txt"
    assert "trainer.py" in stacks.read_text()  # the main thread's stack


# Python code that never ends, in the main thread of rank 1, wherever it is when the signal comes.
ENDLESS = """
import os, signal, time

def endless(*_):
    while True:
        time.sleep(0.1)

if os.environ.get("RANK") == "1":
    signal.signal(signal.SIGUSR2, endless)
"""


@pytest.mark.ranks
def test_a_rank_that_hangs_in_python_is_told_from_those_which_wait_for_it(
    long_recipe: dict[str, Any],
) -> None:
    with Ranks(long_recipe, 2, ENDLESS) as ranks:
        ranks.wait_until(lambda: has_steps(long_recipe), "steps")
        ranks.send(signal.SIGUSR2, 1)
        assert ranks.codes(150) == [1, 1], ranks.output
        text = ranks.output
    assert "no progress for 20 s (train.hang_timeout)" in text
    lines = [line for line in failure(long_recipe).splitlines() if line.startswith("  ")]
    assert lines[0].startswith(f"  rank 1 ({socket.gethostname()}) is "), lines  # behind, or the odd one, comes first
    assert "run.py" in lines[0]  # which has ENDLESS
    assert lines[1].startswith(f"  rank 0 ({socket.gethostname()}) is "), lines
    stacks = {file.name: file.read_text() for file in (ranks.folder / "hang").glob("*/rank-*.txt")}
    assert "endless" in stacks["rank-00001.txt"]
    assert "endless" not in stacks["rank-00000.txt"]


# One rank that trains, with an impatient watchdog. A line of input makes looking at the run folder take for ever.
WATCHED = """
import sys, threading, time
from pathlib import Path
import torch.distributed as dist
from fullft import watchdog
folder, ask = Path(sys.argv[1]), Path.exists
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
watchdog._LAST_RESORT_SECONDS = 1
watchdog.start(folder, 2)
gone = threading.Event()
Path.exists = lambda path: time.sleep(1000) if gone.is_set() else ask(path)
threading.Thread(target=lambda: (sys.stdin.readline(), gone.set()), daemon=True).start()
print("trains", flush=True)
while True:
    watchdog.mark("data", 1)
    time.sleep(0.05)
"""


@pytest.mark.ranks
def test_a_suspended_run_goes_on_and_one_without_a_file_system_ends(tmp_path: Path) -> None:
    """Slurm suspends jobs for hours, by SIGSTOP."""
    process = subprocess.Popen(
        [sys.executable, "-c", WATCHED, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout
        assert process.stdout.readline() == "trains\n"
        time.sleep(1)
        process.send_signal(signal.SIGSTOP)
        time.sleep(6)  # twice as long as it takes to be given up
        process.send_signal(signal.SIGCONT)
        time.sleep(4)
        assert process.poll() is None
        _, stderr = process.communicate("gone\n", timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "cannot look at the run folder" in stderr
    assert "watchdog.py" in stderr  # the stacks
