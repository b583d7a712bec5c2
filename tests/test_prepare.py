"""`fullft prepare`: in parallel, over MPI, killed, out of space; and how a launch meets a cache that is not there."""

from __future__ import annotations

import copy
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import hosts
import psutil
import pytest
import ssh_hosts
import warm
from conftest import CPU_RANKS, Launch, chats, losses, read, write_jsonl, write_recipe
from ranks import Ranks

pytestmark = pytest.mark.ranks

# `fullft …` with pieces so small that a test's file has many; a pause for each row; killed at a row if asked to.
FULLFT = """
import os, signal, sys, time
from fullft.data import pieces, prepare
pieces._SMALLEST_PIECE = 2000
pause, kill_at, *arguments = sys.argv[1:]
tokenize = prepare.tokenize
rows = 0

def slowly(*arguments):
    global rows
    rows += 1
    if rows == int(kill_at):
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(float(pause))
    return tokenize(*arguments)

prepare.tokenize = slowly
prepare.usable_cores = lambda: 2
sys.argv = ["fullft", *arguments]
from fullft.cli import main
sys.exit(main())
"""


class Fullft:
    """fullft prepare, as a process of its own."""

    def __init__(self, recipe: dict[str, Any], folder: Path) -> None:
        self.cache = folder / "cache"
        recipe["data"]["cache_dir"] = str(self.cache)
        self.config = write_recipe(recipe, folder / "recipe.yaml")
        self.program = folder / "program.py"
        self.program.write_text(FULLFT)

    def start(self, pause: float = 0, kill_at: int = -1, verb: str = "prepare", **options: Any) -> Any:
        out, err = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115
        arguments = (str(pause), str(kill_at), verb, str(self.config))
        process = warm.start(self.program, *arguments, stdout=out, stderr=err, cwd=self.program.parent, **options)
        process.communicate = lambda timeout=None: (process.wait(timeout), read(out), read(err))[1:]
        return process

    def run(self, code: int = 0, **options: Any) -> tuple[str, str]:
        process = self.start(**options)
        out, err = process.communicate(timeout=120)
        assert process.returncode == code, out + err
        return out, err

    def run_by_mpi(self, processes: int, code: int = 0) -> tuple[str, str]:
        if not shutil.which("mpirun"):
            pytest.skip("mpirun is not installed")
        mpirun = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", str(processes)]
        command = [*mpirun, sys.executable, str(self.program), "0", "-1", "prepare", str(self.config)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout, done.stderr

    def complete(self) -> dict[str, bytes]:
        """What training would open: contents of the finished cache folders by name of the file."""
        return {
            str(file.relative_to(self.cache)): file.read_bytes()
            for summary in self.cache.glob("*/summary.json")
            if not summary.parent.suffix
            for file in summary.parent.rglob("*")
            if file.is_file() and file.suffix != ".lock"
        }

    def parts(self) -> int:
        return len(list(self.cache.glob("*.partial/part-*.json")))


@pytest.fixture
def fullft(recipe: dict[str, Any], tmp_path: Path) -> Fullft:
    write_jsonl(Path(recipe["data"]["train"]), chats(200))
    return Fullft(recipe, tmp_path)


@pytest.fixture
def whole(recipe: dict[str, Any], tmp_path: Path, fullft: Fullft) -> dict[str, bytes]:
    """The cache that an undisturbed preparation makes of the same file."""
    assert fullft.config.exists()
    (tmp_path / "alone").mkdir()
    alone = Fullft(copy.deepcopy(recipe), tmp_path / "alone")
    alone.run()
    return alone.complete()


def wait_for(what: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_second_preparation_finds_the_first_in_under_a_second(fullft: Fullft) -> None:
    out, _ = fullft.run()
    assert "train: 200 rows, 200 documents" in out
    before = {file: file.stat().st_mtime_ns for file in fullft.cache.rglob("*.npy")}
    again, _ = fullft.run()
    assert float(again.split(" after ")[1].split(" s")[0]) < 1
    assert {file: file.stat().st_mtime_ns for file in fullft.cache.rglob("*.npy")} == before


def test_a_killed_preparation_is_not_trusted_and_goes_on_where_it_stopped(
    fullft: Fullft, whole: dict[str, bytes]
) -> None:
    process = fullft.start(pause=0.02)
    wait_for(lambda: fullft.parts() >= 3)
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    process.kill()
    process.communicate()
    wait_for(lambda: not any(worker.is_running() for worker in workers), 10)  # workers end with it
    assert not fullft.complete()
    done = fullft.parts()
    out, _ = fullft.run()
    assert f"train: {done} of " in out
    assert "parts were prepared before" in out
    assert fullft.complete() == whole
    assert not list(fullft.cache.glob("*.partial"))


def test_a_file_that_changes_while_it_is_prepared_is_told_and_never_taken_for_the_old_one(
    fullft: Fullft, recipe: dict[str, Any], whole: dict[str, bytes]
) -> None:
    file = Path(recipe["data"]["train"])
    old = file.read_bytes()
    process = fullft.start(pause=0.01)
    wait_for(lambda: fullft.parts() >= 2)
    file.write_bytes(old.replace(b"number", b"NUMBER"))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "its files changed while they were prepared; start again" in err
    process = fullft.start(pause=0.01)  # the same with a preparation that is killed before it can tell
    wait_for(lambda: fullft.parts() >= 2)
    file.write_bytes(old)
    process.kill()
    process.communicate()
    fullft.run()
    assert fullft.complete() == whole


def test_a_file_that_comes_or_goes_while_a_folder_is_prepared_is_told(recipe: dict[str, Any], tmp_path: Path) -> None:
    """It shifts the numbers of the others, and their rows are not to be lost or taken from one another."""
    folder = tmp_path / "folder"
    for name, rows in (("b", chats(100)), ("c", chats(80))):
        write_jsonl(folder / f"{name}.jsonl", rows)
    recipe["data"]["train"] = str(folder)
    other = Fullft(recipe, tmp_path)
    new = folder / "a.jsonl"
    for change in (lambda: write_jsonl(new, chats(30)), new.unlink, (folder / "c.jsonl").unlink):
        process = other.start(pause=0.01)
        wait_for(lambda: other.parts() >= 2)
        change()
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2, err
        assert "its files changed while they were prepared; start again" in err
        assert "Traceback" not in err
        assert not other.complete()
    assert "100 rows, 100 documents" in other.run()[0]


@pytest.mark.parametrize("content", ["\n\n", "[]"])
def test_a_file_without_rows_among_others_is_told_each_time(
    content: str, recipe: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    write_jsonl(folder / "b.jsonl", chats(10))
    file = folder / ("a.json" if content == "[]" else "c.jsonl")
    file.write_text(content)
    recipe["data"]["train"] = str(folder)
    other = Fullft(recipe, tmp_path)
    for _ in range(2):
        assert f"data file {file} has no rows" in other.run(code=2)[1]
    recipe["data"]["train"] = {"path": str(folder), "limit": 10}  # the second is behind it
    limited = Fullft(recipe, tmp_path)
    assert limited.run(code=0 if file.name > "b" else 2)


def test_a_killed_worker_is_told_and_the_next_start_goes_on(fullft: Fullft, whole: dict[str, bytes]) -> None:
    _, err = fullft.run(kill_at=60, code=2)
    assert "a worker process was killed (out of memory?); start again" in err
    assert not fullft.complete()
    fullft.run()
    assert fullft.complete() == whole


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("a file system of 64 KiB cannot be mounted")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_told_and_leaves_nothing_to_be_trusted(
    fullft: Fullft, recipe: dict[str, Any], whole: dict[str, bytes], small_disk: Path
) -> None:
    recipe["data"]["cache_dir"] = str(small_disk)
    fullft.config = write_recipe(recipe, fullft.config)
    fullft.cache = small_disk
    _, err = fullft.run(code=2)
    assert f"no space left in {small_disk}" in err
    assert not fullft.complete()
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    fullft.run()
    assert fullft.complete() == whole


@pytest.mark.parametrize("processes", [2, 3])
def test_mpi_ranks_share_the_work(fullft: Fullft, whole: dict[str, bytes], processes: int) -> None:
    out, _ = fullft.run_by_mpi(processes)
    assert out.count("train: 200 rows") == 1
    assert fullft.complete() == whole


@pytest.mark.cluster
def test_mpi_ranks_on_two_hosts_share_the_work(fullft: Fullft, whole: dict[str, bytes], tmp_path: Path) -> None:
    if reason := ssh_hosts.unavailable() or hosts.missing("mpirun"):
        pytest.skip(reason)
    network = ("--mca", "btl_tcp_if_include", "eth0", "--mca", "oob_tcp_if_include", "eth0")
    ranks = ("mpirun", "--allow-run-as-root", *network, "-n", "3", "--host", "n0:2,n1:1")
    with ssh_hosts.SshHosts(tmp_path / "ssh", n=2) as ssh:
        command = (*ranks, sys.executable, "-c", FULLFT, "0.002", "-1", "prepare", str(fullft.config))
        ssh.run_on("n0", *command, env=CPU_RANKS, timeout=120)
    assert fullft.complete() == whole


def test_bad_input_under_mpi_ends_all_ranks(fullft: Fullft, recipe: dict[str, Any]) -> None:
    write_jsonl(Path(recipe["data"]["train"]), [*chats(3), "{broken"])
    _, err = fullft.run_by_mpi(3, code=2)
    assert err.count("1 of 4 rows cannot be used") == 1


def test_a_launch_refuses_if_the_recipe_says_so(recipe: dict[str, Any], launch: Launch, fullft: Fullft) -> None:
    done = launch(recipe, "data.on_missing_cache=error", code=2)
    assert "data set train is not prepared" in done.stderr
    assert "run `fullft prepare` with this recipe first" in done.stderr
    fullft.run()
    launch(recipe, "data.on_missing_cache=error")


def test_a_preparation_that_takes_longer_than_the_time_out_of_collectives_ends_no_run(
    recipe: dict[str, Any], fullft: Fullft
) -> None:
    """Another process holds the set's lock: all ranks wait, and no collective is open meanwhile."""
    recipe["train"]["timeout_minutes"] = 0.35  # 21 s
    fullft.run()
    (prepared,) = (folder for folder in fullft.cache.iterdir() if folder.is_dir())
    aside = prepared.rename(fullft.cache / "aside")
    lock = filelock.FileLock(prepared.with_suffix(".lock"), thread_local=False)
    lock.acquire()
    with Ranks(recipe) as ranks:
        said = "waiting: data set train is prepared by another process"
        ranks.wait_until(lambda: said in ranks.output, "the lock")
        time.sleep(24)
        aside.rename(prepared)
        lock.release()
        assert ranks.codes() == [0, 0], ranks.output
    assert len(losses(recipe)) == 4


def test_a_launch_without_cache_prepares_once(recipe: dict[str, Any], launch: Launch, fullft: Fullft) -> None:
    recipe["data"]["cache_dir"] = str(fullft.cache)
    launch(recipe, ranks=2)
    (kept,) = {file.parent for file in fullft.cache.rglob("documents.npy")}
    assert not kept.suffix
    assert not list(fullft.cache.glob("*.partial"))


@pytest.mark.parametrize("whom", ["the group, as a terminal does", "the parent alone"])
def test_ctrl_c_ends_at_once_and_the_next_start_goes_on(fullft: Fullft, whole: dict[str, bytes], whom: str) -> None:
    # A pause so long that no piece that was begun, or waits, is finished in time. Not forked: it is timed.
    process = fullft.start(pause=0.5, group=True, forked=False)
    wait_for(lambda: fullft.parts() >= 1)
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    (os.kill if whom == "the parent alone" else os.killpg)(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert process.returncode == 1, out + err
    assert err == "fullft: stopped; what is finished is kept\n"
    assert not any(worker.is_running() for worker in workers)
    done = fullft.parts()
    assert not fullft.complete()
    out, _ = fullft.run()
    assert f"train: {done} of " in out
    assert fullft.complete() == whole


@pytest.mark.parametrize("verb", ["prepare", "check", "inspect"])
def test_a_cache_that_cannot_be_made_is_one_clear_error(fullft: Fullft, recipe: dict[str, Any], verb: str) -> None:
    file = Path(recipe["data"]["train"])
    recipe["data"]["cache_dir"] = str(file / "cache")
    write_recipe(recipe, fullft.config)
    _, err = fullft.run(verb=verb, code=2)
    assert err.startswith("fullft: 1 problem, training was not started:\n  - data.cache_dir: ")
    assert f"{file / 'cache'} cannot be made" in err
    assert err.count("\n") == 2


@pytest.mark.parametrize("prepared", [False, True])
def test_a_cache_that_cannot_be_written_is_one_clear_error_or_read(
    fullft: Fullft, recipe: dict[str, Any], small_disk: Path, prepared: bool
) -> None:
    """Mounted read-only, which holds for root too."""
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    recipe["data"]["cache_dir"] = str(small_disk)
    write_recipe(recipe, fullft.config)
    if prepared:
        fullft.run()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    _, err = fullft.run(code=0 if prepared else 2)
    if not prepared:
        assert f"Read-only file system (data.cache_dir is {small_disk})" in err
        assert err.count("\n") == 2
