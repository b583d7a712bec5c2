"""A run folder has one owner, and who is no longer the owner commits nothing. Real processes, killed and stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY

from fullft import lease

# Takes the lease, says so or why not, then does what it is told, a line each. With a third argument it is another rank
# of the job that has taken this generation.
JOB = """
import sys
from pathlib import Path
from fullft import lease, state
from fullft.errors import BadInput, LeaseLost
folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
try:
    lease.know(folder, int(sys.argv[3])) if sys.argv[3:] else lease.take(folder, seconds)
    print("knows" if sys.argv[3:] else "taken", flush=True)
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
    def __init__(self, folder: Path, seconds: float, *generation: str) -> None:
        command = [sys.executable, "-c", JOB, str(folder), str(seconds), *generation]
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


def start(jobs: list[Job], folder: Path, seconds: float, *generation: str) -> Job:
    jobs.append(Job(folder, seconds, *generation))
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


def test_another_rank_of_an_older_generation_cannot_write_either(tmp_path: Path, jobs: list[Job]) -> None:
    first = start(jobs, tmp_path, 600)
    assert first.line() == "taken"
    other = start(jobs, tmp_path, 600, "1")
    assert other.line() == "knows"
    assert other.do("state.set_state(folder, 'failed', reason='grace')") == "did"  # any rank of the owner may
    assert other.do("state.leave_failure(folder, 1, 'out of memory')") == "did"
    assert first.do("1 / (state.failure(folder) == 'out of memory')") == "did"
    first.process.kill()
    newer = start(jobs, tmp_path, 600)  # and is not kept from it by the other rank, which owns nothing
    assert newer.line() == "taken"
    assert newer.do("state.set_state(folder, 'running')") == "did"
    assert newer.do("state.failure(folder) and 1 / 0") == "did"
    for write in (
        "state.set_state(folder, 'requeue')", "state.leave_marker(folder, 5, 'SIGTERM', saved=False)",
        "state.leave_failure(folder, 1, 'hang')", "state.remove_marker(folder)",
    ):  # fmt: skip
        assert other.do(write) == "LeaseLost"
    assert json.loads((tmp_path / "state.json").read_text())["status"] == "running"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lease", "state.json"]
    assert sorted(path.name for path in (tmp_path / "lease").iterdir()) == ["generation-00000002"]
    shutil.rmtree(tmp_path / "lease")  # once lost, lost for ever
    assert other.do("state.set_state(folder, 'requeue')") == "LeaseLost"


def test_leases_that_cannot_be_read_are_not_lost(tmp_path: Path, jobs: list[Job]) -> None:
    owner = start(jobs, tmp_path, 600)
    assert owner.line() == "taken"
    (tmp_path / "lease").rename(tmp_path / "away")
    assert owner.do("lease.check()") == "FileNotFoundError"
    (tmp_path / "lease").mkdir()
    assert owner.do("lease.check()") == "OSError"
    (tmp_path / "lease").rmdir()
    (tmp_path / "away").rename(tmp_path / "lease")
    assert owner.do("lease.write(folder / 'state.json', 'mine')") == "did"


def test_who_comes_before_training_sees_whether_another_job_owns_the_folder(tmp_path: Path, jobs: list[Job]) -> None:
    assert not lease.is_owned(tmp_path)
    owner = start(jobs, tmp_path, 600)
    assert owner.line() == "taken"
    assert lease.is_owned(tmp_path)
    owner.process.kill()
    owner.process.wait()
    assert not lease.is_owned(tmp_path)
    released = start(jobs, tmp_path, 600)
    assert released.line() == "taken"
    assert released.do("lease.release()") == "did"
    assert not lease.is_owned(tmp_path)
