"""What real runs survive: kills at any moment, damaged files, a full disk, a second job, a frozen job that wakes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import REPOSITORY, Launch, losses, metrics, torchrun, write_recipe

from fullft.retention.report import score

pytestmark = pytest.mark.ranks

TRAIN = str(REPOSITORY / "launch" / "train.py")


def start(recipe: dict[str, Any], config: Path, ranks: int = 2) -> subprocess.Popen[str]:
    """Training in the background; its output goes beside the config file."""
    output = config.with_suffix(".out").open("w")
    command = [*torchrun(ranks), TRAIN, "--config", str(write_recipe(recipe, config))]
    return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, text=True, cwd=config.parent)


def alone(recipe: dict[str, Any], config: Path, program: str = "") -> subprocess.CompletedProcess[str]:
    """One rank without a launcher, so the exit code is the program's own. `program`: Python before the training."""
    code = f"import runpy, sys; sys.argv = sys.argv[1:]\n{program}\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, TRAIN, "--config", str(write_recipe(recipe, config))]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=config.parent)


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children()
    return [child for child in children if TRAIN in child.cmdline()]


def kill_all(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for one in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()


def last_step(recipe: dict[str, Any]) -> int:
    file = Path(recipe["run_dir"]) / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    return int(json.loads(whole[-1])["step"]) if whole else 0


def wait_for_step(recipe: dict[str, Any], step: int, process: subprocess.Popen[str], config: Path) -> None:
    deadline = time.monotonic() + 240
    while last_step(recipe) < step:
        assert process.poll() is None, config.with_suffix(".out").read_text()[-5000:]
        assert time.monotonic() < deadline, config.with_suffix(".out").read_text()[-5000:]
        time.sleep(0.005)


def saved(recipe: dict[str, Any]) -> list[str]:
    folder = Path(recipe["run_dir"]) / "checkpoints"
    return sorted(path.name for path in folder.glob("step-*") if not path.suffix)


def test_saving_in_the_background_changes_nothing(recipe: dict[str, Any], launch: Launch) -> None:
    recipe["train"] |= {"steps": 40, "global_batch_size": 6}
    recipe["checkpoint"] = {"every_steps": 1}
    waiting = recipe | {"run_dir": recipe["run_dir"] + "-waiting"}
    waiting["checkpoint"] = {"every_steps": 1, "asynchronous": False}
    launch(recipe, ranks=3)
    launch(waiting, ranks=3)
    assert losses(recipe) == losses(waiting)  # bit for bit
    for run in (recipe, waiting):
        assert saved(run) == ["step-00000039", "step-00000040"]
        rows = metrics(run)[1:]
        assert all(row["time/checkpoint_seconds"] >= 0 and row["checkpoint/failed"] == 0 for row in rows)
        assert all(row["time/checkpoint_stall_seconds"] >= 0 for row in rows)
    same = [
        {path.name: path.read_bytes() for path in (Path(run["run_dir"]) / "checkpoints/step-00000040").iterdir()}
        for run in (recipe, waiting)
    ]
    assert same[0].keys() == same[1].keys()
    assert all(same[0][name] == same[1][name] for name in same[0] if name.endswith(".distcp"))


def test_without_memory_for_copies_training_waits_for_the_disk(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["checkpoint"] = {"every_steps": 1}
    none_is_enough = "import fullft.saver\nfullft.saver._SHARE_OF_FREE_MEMORY = 0"
    done = alone(recipe, tmp_path / "recipe.yaml", none_is_enough)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("checkpoints are written while training waits: ") == 1
    assert saved(recipe) == ["step-00000003", "step-00000004"]


def test_the_best_checkpoint_is_kept(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["data"]["validation"] = recipe["data"]["train"]
    recipe["train"] |= {"steps": 6, "learning_rate": 0.5, "schedule": "constant"}  # so high that it does not converge
    recipe["checkpoint"] = {"every_steps": 1, "keep": 1}
    recipe["retention"] = {"every_steps": 1}
    done = alone(recipe, tmp_path / "recipe.yaml")
    assert done.returncode == 0, done.stderr
    run = Path(recipe["run_dir"])
    scores = {
        step: score(json.loads((run / f"retention/step-{step:08d}.json").read_text())) or 0 for step in range(1, 7)
    }
    best = max(scores, key=lambda step: scores[step])
    assert best != 6
    assert saved(recipe) == [f"step-{best:08d}", "step-00000006"]


def test_the_score_is_what_was_learnt_less_what_was_forgotten() -> None:
    def task(measures: str, base: float, now: float, higher: bool) -> dict[str, Any]:
        return {"measures": measures, "base": base, "score": now, "higher_is_better": higher}

    tasks = {
        "validation": task("skill", 2.0, 1.0, False),  # half of the loss: 0.5
        "sums": task("skill", 0.1, 0.4, True),  # 30 points: 0.3
        "wiki": task("retention", 1.0, 1.2, False),  # a fifth worse: 0.2
        "facts": task("retention", 0.5, 0.6, True),  # better, which does not make up for another loss: 0
    }
    assert score({"tasks": tasks}) == pytest.approx((0.5 + 0.3) / 2 - (0.2 + 0) / 2)
    assert score({"tasks": {"wiki": tasks["wiki"]}}) == pytest.approx(-0.2)
    assert score({"tasks": {}}) is None
    assert score({"tasks": tasks | {"validation": task("skill", 2.0, float("nan"), False)}}) is None


def test_every_kind_of_damage_is_named(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["train"]["steps"] = 6
    recipe["checkpoint"] = {"every_steps": 1, "keep": 6}
    assert alone(recipe, tmp_path / "recipe.yaml").returncode == 0
    before = losses(recipe)
    run = Path(recipe["run_dir"])
    (run / "state.json").unlink()
    folder = run / "checkpoints"
    with (folder / "step-00000006/__0_0.distcp").open("r+b") as file:
        file.truncate(100)
    content = bytearray((folder / "step-00000005/__0_0.distcp").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "step-00000005/__0_0.distcp").write_bytes(content)
    (folder / "step-00000004/.metadata").unlink()
    (folder / "step-00000003/MANIFEST.json").write_text('{"files": [')
    (folder / "step-00000002/MANIFEST.json").unlink()
    done = alone(recipe, tmp_path / "recipe.yaml")
    assert done.returncode == 0, done.stderr
    for step, damage in {
        6: "__0_0.distcp has 100 bytes instead of",
        5: "__0_0.distcp does not match its checksum",
        4: ".metadata is missing",
        3: "MANIFEST.json cannot be read",
        2: "MANIFEST.json is missing",
    }.items():
        assert f"skipped checkpoint {folder}/step-0000000{step}: {damage}" in done.stdout
    assert f"resumed from {folder}/step-00000001 at step 1" in done.stdout
    assert losses(recipe) == before
    assert sorted(path.name for path in folder.iterdir()) == [f"step-0000000{step}" for step in range(1, 7)]

    (run / "state.json").unlink()
    for path in folder.glob("step-*/__0_0.distcp"):
        path.unlink()
    refused = alone(recipe, tmp_path / "recipe.yaml")
    assert refused.returncode == 2
    assert "run_dir: no checkpoint is whole" in refused.stderr


def test_a_checkpoint_of_another_model_or_recipe_is_refused(recipe: dict[str, Any], tmp_path: Path) -> None:
    import quickstart
    from conftest import TEXTS

    other_model = tmp_path / "other"
    quickstart.write_random_model(other_model, TEXTS * 20, vocabulary_size=300, hidden_size=16, layers=2, heads=2)
    other = recipe | {"run_dir": str(tmp_path / "other-run"), "model": {"path": str(other_model)}}
    faster = recipe | {"run_dir": str(tmp_path / "faster"), "train": recipe["train"] | {"learning_rate": 2e-3}}
    for run in (recipe, other, faster):
        assert alone(run, tmp_path / "recipe.yaml").returncode == 0
    for run, said in (
        (other, "is a checkpoint of another model: model.embed_tokens.weight has"),
        (faster, "is of another recipe (train.learning_rate was 0.002, is 0.001)"),
    ):
        folder = Path(recipe["run_dir"])
        (folder / "state.json").unlink(missing_ok=True)
        shutil.rmtree(folder / "checkpoints")
        shutil.copytree(Path(run["run_dir"]) / "checkpoints", folder / "checkpoints")
        refused = alone(recipe, tmp_path / "recipe.yaml")
        assert refused.returncode == 2, refused.stderr
        assert said in refused.stderr


def test_a_run_folder_that_cannot_be_written_is_told(recipe: dict[str, Any], tmp_path: Path) -> None:
    run = Path(recipe["run_dir"])
    run.mkdir()
    immutable = subprocess.run(["chattr", "+i", str(run)], capture_output=True, text=True, check=False)
    if immutable.returncode:
        pytest.skip(f"chattr +i: {immutable.stderr.strip()}")
    try:
        refused = alone(recipe, tmp_path / "recipe.yaml")
    finally:
        subprocess.run(["chattr", "-i", str(run)], check=True)
    assert refused.returncode == 2, refused.stderr
    assert f"run_dir: {run} cannot be written" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.fixture
def small_disk(recipe: dict[str, Any]) -> Iterator[Path]:
    """A file system of 1.2 MB for the checkpoints: room for one of them, not for two."""
    folder = Path(recipe["run_dir"]) / "checkpoints"
    folder.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"mount: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_does_not_end_the_run(recipe: dict[str, Any], launch: Launch, small_disk: Path) -> None:
    run = Path(recipe["run_dir"])
    (run / "recipe.yaml").write_text("")  # it is a run folder, which may be there before the run
    recipe["train"]["steps"] = 6
    recipe["checkpoint"] = {"every_steps": 2}
    done = launch(recipe)
    assert "checkpoint step-00000002 on disk" in done.stdout
    for step in (4, 6):
        assert f"WARNING: checkpoint step-0000000{step} could not be written: rank " in done.stdout
    assert "No space left on device" in done.stdout
    assert "Newest checkpoint on disk: step-00000002" in done.stdout
    assert [path.name for path in small_disk.iterdir()] == ["step-00000002"]
    assert [row["checkpoint/failed"] for row in metrics(recipe) if "checkpoint/failed" in row] in ([0, 1], [0])
    assert (run / "export/model.safetensors").exists()
    (run / "state.json").unlink()
    again = launch(recipe)  # from the older one, which is valid
    assert f"resumed from {small_disk}/step-00000002 at step 2" in again.stdout


def test_a_second_job_is_refused_and_the_first_goes_on(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["train"]["steps"] = 100_000
    recipe["checkpoint"] = {"every_steps": 5}
    first = start(recipe, tmp_path / "first.yaml")
    try:
        wait_for_step(recipe, 5, first, tmp_path / "first.yaml")
        refused = alone(recipe, tmp_path / "second.yaml")
        assert refused.returncode == 2
        assert f"another process is training into {recipe['run_dir']} (host " in refused.stderr
        assert f"pid {min(rank.pid for rank in ranks_of(first))}" in refused.stderr
        reached = last_step(recipe)
        wait_for_step(recipe, reached + 20, first, tmp_path / "first.yaml")
        assert [row["step"] for row in metrics(recipe)][: reached + 10] == list(range(1, reached + 11))
    finally:
        kill_all(first)


def test_a_frozen_job_that_wakes_changes_nothing(recipe: dict[str, Any], launch: Launch, tmp_path: Path) -> None:
    recipe["train"]["steps"] = 80
    recipe["checkpoint"] = {"every_steps": 3, "lease_seconds": 10}
    whole = recipe | {"run_dir": str(tmp_path / "whole")}
    launch(whole)
    older = start(recipe, tmp_path / "older.yaml")
    newer = None
    try:
        wait_for_step(recipe, 10, older, tmp_path / "older.yaml")
        frozen = ranks_of(older)
        assert len(frozen) == 2
        for rank in frozen:
            rank.send_signal(signal.SIGSTOP)
        reached = last_step(recipe)
        newer = start(recipe, tmp_path / "newer.yaml")
        wait_for_step(recipe, reached + 4, newer, tmp_path / "newer.yaml")
        for rank in frozen:
            rank.send_signal(signal.SIGCONT)
        assert older.wait(120) != 0
        assert newer.wait(240) == 0, (tmp_path / "newer.out").read_text()[-5000:]
    finally:
        kill_all(older)
        if newer:
            kill_all(newer)
    assert f"another job has taken over {recipe['run_dir']}" in (tmp_path / "older.out").read_text()
    assert "has not renewed its lease for 10 s" in (tmp_path / "newer.out").read_text()
    assert losses(recipe) == losses(whole)
    assert [row["step"] for row in metrics(recipe)] == list(range(1, 81))
    assert saved(recipe) == ["step-00000078", "step-00000080"]
    assert not list(Path(recipe["run_dir"]).rglob("*.tmp"))
    assert json.loads((Path(recipe["run_dir"]) / "state.json").read_text())["status"] == "done"


@pytest.mark.slow
def test_thirty_kills_at_random_moments(recipe: dict[str, Any], launch: Launch, tmp_path: Path) -> None:
    """Also while it starts and while it saves; of one rank, which makes the launcher end the other, or of all."""
    seed = int(os.environ.get("FULLFT_TEST_SEED", "0"))
    choose = random.Random(seed)
    recipe["train"] |= {"steps": 260, "schedule": "cosine", "warmup_steps": 4}
    recipe["checkpoint"] = {"every_steps": 2}
    whole = recipe | {"run_dir": str(tmp_path / "whole"), "checkpoint": {"every_steps": 1000}}
    launch(whole, timeout=600)
    config, while_saving = tmp_path / "killed.yaml", 0
    for kill in range(30):
        before = saved(recipe)
        process = start(recipe, config)
        if choose.random() < 0.1:  # while it starts
            time.sleep(choose.uniform(0, 6))
        else:
            reached = int(before[-1].removeprefix("step-")) if before else 0
            wait_for_new_row(process, config)
            wait_for_step(recipe, reached + choose.randint(1, 12), process, config)
            time.sleep(choose.uniform(0, 0.1))
            output = config.with_suffix(".out").read_text()
            assert ("resumed from" in output) == bool(before), f"kill {kill}, seed {seed}: {output}"
            assert "skipped checkpoint" not in output
        ranks = ranks_of(process)
        if choose.random() < 0.5 and ranks:
            choose.choice(ranks).kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
        kill_all(process)
        while_saving += bool(list(Path(recipe["run_dir"]).glob("checkpoints/*.tmp")))
    done = launch(recipe, timeout=600)
    assert "resumed from" in done.stdout
    assert losses(recipe) == losses(whole), f"seed {seed}"
    assert [row["step"] for row in metrics(recipe)] == list(range(1, 261))
    assert while_saving > 3
    assert len(saved(recipe)) == 2
    assert not list(Path(recipe["run_dir"]).rglob("*.tmp"))


def wait_for_new_row(process: subprocess.Popen[str], config: Path) -> None:
    """Until this very job has logged a step: metrics.jsonl has the rows of the one before until it is replaced."""
    deadline = time.monotonic() + 240
    while "  loss " not in config.with_suffix(".out").read_text():
        assert process.poll() is None, config.with_suffix(".out").read_text()[-5000:]
        assert time.monotonic() < deadline
        time.sleep(0.005)
