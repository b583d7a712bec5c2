"""A run folder has one owner, and who is no longer the owner commits nothing. Real processes, killed and stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY

# Takes the lease, says so or why not, then does what it is told, a line each.
JOB = """
import sys
from pathlib import Path
from fullft import lease
from fullft.errors import BadInput, LeaseLost
folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
try:
    lease.take(folder, seconds)
    print("taken", flush=True)
except BadInput as error:
    print(error, flush=True)
    sys.exit(2)
for line in sys.stdin:
    try:
        eval(line)
        print("did", flush=True)
    except (LeaseLost, OSError) as error:
        print(type(error).__name__, flush=True)
"""


class Job:
    def __init__(self, folder: Path, seconds: float) -> None:
        command = [sys.executable, "-c", JOB, str(folder), str(seconds)]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def do(self, statement: str) -> str:
        assert self.process.stdin
        self.process.stdin.write(statement + "\n")
        self.process.stdin.flush()
        return self.line()


@pytest.fixture
def jobs() -> Iterator[list[Job]]:
    started: list[Job] = []
    yield started
    for job in started:
        job.process.kill()
        job.process.wait()


def start(jobs: list[Job], folder: Path, seconds: float) -> Job:
    jobs.append(Job(folder, seconds))
    return jobs[-1]


def test_of_many_at_once_one_gets_it(tmp_path: Path, jobs: list[Job]) -> None:
    said = [job.line() for job in [start(jobs, tmp_path, 6) for _ in range(6)]]
    while "waiting up to" in "".join(said):
        said = [jobs[at].line() if "waiting up to" in line else line for at, line in enumerate(said)]
    owner = said.index("taken")
    assert said.count("taken") == 1
    refused = [line for at, line in enumerate(said) if at != owner]
    assert all(f"another process is training into {tmp_path} (host " in line for line in refused)
    assert all(f"pid {jobs[owner].process.pid}" in line for line in refused)
    assert jobs[owner].do("lease.write(folder / 'state.json', 'mine')") == "did"


def test_after_a_kill_or_a_release_the_next_need_not_wait(tmp_path: Path, jobs: list[Job]) -> None:
    first = start(jobs, tmp_path, 600)
    assert first.line() == "taken"
    first.process.kill()  # not waited for: a zombie is gone too
    second = start(jobs, tmp_path, 600)
    assert second.line() == "taken"
    assert second.do("lease.release()") == "did"
    assert start(jobs, tmp_path, 600).line() == "taken"  # though the second one lives
    assert [path.name for path in (tmp_path / "lease").iterdir()] == ["generation-00000003"]


def test_a_frozen_owner_is_replaced_and_commits_nothing_when_it_wakes(tmp_path: Path, jobs: list[Job]) -> None:
    older = start(jobs, tmp_path, 3)
    assert older.line() == "taken"
    assert older.do("lease.write(folder / 'state.json', 'older')") == "did"
    # Asked whether it is the owner, and frozen before the rename.
    assert older.do("(lease.partial(folder / 'export').mkdir(), lease.check())") == "did"
    older.process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    newer = start(jobs, tmp_path, 3)
    assert "waiting up to" in newer.line()
    assert "has not renewed its lease for 3 s" in newer.line()
    assert newer.line() == "taken"
    assert time.monotonic() - began > 2
    assert newer.do("lease.write(folder / 'state.json', 'newer')") == "did"
    older.process.send_signal(signal.SIGCONT)
    assert older.do("lease.partial(folder / 'export').rename(folder / 'export')") == "FileNotFoundError"
    assert older.do("lease.write(folder / 'state.json', 'older')") == "LeaseLost"
    assert older.do("lease.check()") == "LeaseLost"
    assert (tmp_path / "state.json").read_text() == "newer"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lease", "state.json"]


def test_the_owners_own_lease_seconds_count(tmp_path: Path, jobs: list[Job]) -> None:
    assert start(jobs, tmp_path, 24).line() == "taken"  # renews every 4 s
    impatient = start(jobs, tmp_path, 1)
    assert "waiting up to" in impatient.line()
    assert "another process is training" in impatient.line()
