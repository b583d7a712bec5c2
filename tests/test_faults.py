"""What real runs survive: kills at any moment, damaged files, a full disk, a second job, a frozen job that wakes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    TRAIN,
    Launch,
    before_training,
    kill,
    losses,
    metrics,
    run_ranks,
    start_ranks,
    wait_for_ranks,
    write_recipe,
)

from fullft.report.summary import score

pytestmark = pytest.mark.ranks

KILLS = int(os.environ.get("FULLFT_TEST_KILLS", "8"))


class Job:
    """Training in the background; its output goes beside the config file."""

    def __init__(self, recipe: dict[str, Any], config: Path, ranks: int = 2) -> None:
        self.output = config.with_suffix(".out")
        arguments = ("--config", str(write_recipe(recipe, config)))
        with self.output.open("w") as out:
            self.ranks = start_ranks(TRAIN, *arguments, ranks=ranks, stdout=out, stderr=out, cwd=config.parent)

    @property
    def said(self) -> str:
        return self.output.read_text()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 240
        while not condition():
            assert None in [rank.poll() for rank in self.ranks], self.said[-5000:]
            assert time.monotonic() < deadline, self.said[-5000:]
            time.sleep(0.005)


def alone(recipe: dict[str, Any], config: Path, program: str = "") -> subprocess.CompletedProcess[str]:
    """One rank. `program`: Python before the training."""
    script = before_training(program, config.with_suffix(".py")) if program else TRAIN
    arguments = ("--config", str(write_recipe(recipe, config)))
    return run_ranks(script, *arguments, ranks=1, cwd=config.parent)


def last_step(recipe: dict[str, Any]) -> int:
    file = Path(recipe["run_dir"]) / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    return int(json.loads(whole[-1])["step"]) if whole else 0


def saved(recipe: dict[str, Any]) -> list[str]:
    folder = Path(recipe["run_dir"]) / "checkpoints"
    return sorted(path.name for path in folder.glob("step-*") if not path.suffix)


def test_saving_in_the_background_changes_nothing(recipe: dict[str, Any], launch: Launch) -> None:
    recipe["train"] |= {"steps": 16, "global_batch_size": 6}
    recipe["checkpoint"] = {"every_steps": 1}
    waiting = recipe | {"run_dir": recipe["run_dir"] + "-waiting"}
    waiting["checkpoint"] = {"every_steps": 1, "asynchronous": False}
    launch(recipe, ranks=3)
    launch(waiting, ranks=3)
    assert losses(recipe) == losses(waiting)  # bit for bit
    for run in (recipe, waiting):
        assert saved(run) == ["step-00000015", "step-00000016"]
        rows = metrics(run)[1:]
        assert all(row["time/checkpoint_seconds"] >= 0 and row["checkpoint/failed"] == 0 for row in rows)
        assert all(row["time/checkpoint_stall_seconds"] >= 0 for row in rows)
    same = [
        {path.name: path.read_bytes() for path in (Path(run["run_dir"]) / "checkpoints/step-00000016").iterdir()}
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
    first = Job(recipe, tmp_path / "first.yaml")
    try:
        first.wait_for(lambda: last_step(recipe) >= 5)
        refused = alone(recipe, tmp_path / "second.yaml")
        assert refused.returncode == 2
        assert f"another process is training into {recipe['run_dir']} (host " in refused.stderr
        assert f"pid {first.ranks[0].pid}" in refused.stderr
        reached = last_step(recipe)
        first.wait_for(lambda: last_step(recipe) >= reached + 20)
        assert [row["step"] for row in metrics(recipe)][: reached + 10] == list(range(1, reached + 11))
    finally:
        kill(first.ranks)


def test_a_frozen_job_that_wakes_changes_nothing(recipe: dict[str, Any], launch: Launch, tmp_path: Path) -> None:
    recipe["train"]["steps"] = 80
    recipe["checkpoint"] = {"every_steps": 3, "lease_seconds": 10}
    whole = recipe | {"run_dir": str(tmp_path / "whole")}
    launch(whole)
    older = Job(recipe, tmp_path / "older.yaml")
    newer = None
    try:
        older.wait_for(lambda: last_step(recipe) >= 10)
        for rank in older.ranks:
            rank.send_signal(signal.SIGSTOP)
        reached = last_step(recipe)
        newer = Job(recipe, tmp_path / "newer.yaml")
        newer.wait_for(lambda: last_step(recipe) >= reached + 4)
        for rank in older.ranks:
            rank.send_signal(signal.SIGCONT)
        assert wait_for_ranks(older.ranks, 120) != 0
        assert wait_for_ranks(newer.ranks, 240) == 0, newer.said[-5000:]
    finally:
        kill(older.ranks)
        if newer:
            kill(newer.ranks)
    assert f"another job has taken over {recipe['run_dir']}" in older.said
    assert "has not renewed its lease for 10 s" in newer.said
    assert losses(recipe) == losses(whole)
    assert [row["step"] for row in metrics(recipe)] == list(range(1, 81))
    assert saved(recipe) == ["step-00000078", "step-00000080"]
    assert not list(Path(recipe["run_dir"]).rglob("*.tmp"))
    assert json.loads((Path(recipe["run_dir"]) / "state.json").read_text())["status"] == "done"


@pytest.mark.slow
def test_kills_at_random_moments(recipe: dict[str, Any], launch: Launch, tmp_path: Path) -> None:
    """Also while it starts, and each third while it saves; of one rank, upon which the other gets SIGTERM, or of all.

    FULLFT_TEST_KILLS=100 FULLFT_TEST_SEED=7: more kills, other moments.
    """
    seed, steps = int(os.environ.get("FULLFT_TEST_SEED", "0")), KILLS * 14
    choose = random.Random(seed)
    recipe["train"] |= {"steps": steps, "schedule": "cosine", "warmup_steps": 4}
    recipe["checkpoint"] = {"every_steps": 2}
    whole = recipe | {"run_dir": str(tmp_path / "whole"), "checkpoint": {"every_steps": 1000}}
    launch(whole, timeout=600)
    while_saving = 0

    def partial() -> set[Path]:
        return set(Path(recipe["run_dir"]).glob("checkpoints/*.tmp"))

    for kills in range(KILLS):
        before = saved(recipe)
        job = Job(recipe, tmp_path / "killed.yaml")
        try:
            if choose.random() < 0.1:  # while it starts
                time.sleep(choose.uniform(0, 2))
            else:
                reached = int(before[-1].removeprefix("step-")) if before else 0
                further = reached + choose.randint(1, 12)
                # Until this very job has logged a step: metrics.jsonl has the rows of the one before until then.
                job.wait_for(lambda job=job, further=further: "  loss " in job.said and last_step(recipe) >= further)
                if kills % 3 == 2:
                    older = partial()
                    job.wait_for(lambda older=older: bool(partial() - older))
                else:
                    time.sleep(choose.uniform(0, 0.1))
                assert ("resumed from" in job.said) == bool(before), f"kill {kills}, seed {seed}: {job.said}"
                assert "skipped checkpoint" not in job.said
            if choose.random() < 0.5:
                choose.choice(job.ranks).kill()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    wait_for_ranks(job.ranks, 60)
        finally:
            kill(job.ranks)
        while_saving += bool(partial())
    print(f"{while_saving} of {KILLS} kills while it saved")
    done = launch(recipe, timeout=600)
    assert "resumed from" in done.stdout
    assert losses(recipe) == losses(whole), f"seed {seed}"
    assert [row["step"] for row in metrics(recipe)] == list(range(1, steps + 1))
    assert while_saving
    assert len(saved(recipe)) == 2
    assert not list(Path(recipe["run_dir"]).rglob("*.tmp"))
