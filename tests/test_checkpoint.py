"""A run that is killed and started again is the run that was never interrupted."""

from __future__ import annotations

import json
import shutil
import time
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
    write_recipe,
)
from safetensors.torch import load_file

pytestmark = pytest.mark.ranks


@pytest.fixture
def long_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    recipe["train"] |= {"steps": 24, "schedule": "cosine", "warmup_steps": 4, "weight_decay": 0.1}
    recipe["checkpoint"] = {"every_steps": 5, "keep": 2}
    return recipe


def kill_after(recipe: dict[str, Any], step: int, config: Path, saved: str = "", ranks: int = 2) -> None:
    """Start training and `kill -9` every process of it once metrics.jsonl has reached the step, and this checkpoint is
    on disk."""
    output, file = config.with_suffix(".out"), Path(recipe["run_dir"]) / "metrics.jsonl"
    with output.open("w") as out:
        processes = start_ranks(
            TRAIN, "--config", str(write_recipe(recipe, config)), ranks=ranks, stdout=out, stderr=out, cwd=config.parent
        )
    deadline = time.monotonic() + 120
    checkpoint = Path(recipe["run_dir"]) / "checkpoints" / saved
    try:
        while not (file.exists() and any(row["step"] >= step for row in metrics(recipe)) and checkpoint.exists()):
            assert [process.poll() for process in processes] == [None] * ranks, output.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        kill(processes)


def test_killed_and_started_again_equals_uninterrupted(
    long_recipe: dict[str, Any], launch: Launch, tmp_path: Path
) -> None:
    whole = long_recipe | {"run_dir": str(tmp_path / "whole")}
    launch(whole)
    kill_after(long_recipe, 12, tmp_path / "killed.yaml", saved="step-00000010")
    checkpoints = Path(long_recipe["run_dir"]) / "checkpoints"
    done = launch(long_recipe)
    assert "resumed from" in done.stdout
    assert losses(long_recipe) == losses(whole)  # bit for bit
    assert [row["step"] for row in metrics(long_recipe)] == list(range(1, 25))  # every step once
    one, other = (load_file(Path(run["run_dir"]) / "export" / "model.safetensors") for run in (whole, long_recipe))
    assert all((one[name] == other[name]).all() for name in one)
    assert len(list(checkpoints.iterdir())) == 2


@pytest.mark.parametrize("ranks", [1, 3])
def test_resume_at_another_world_size(long_recipe: dict[str, Any], launch: Launch, tmp_path: Path, ranks: int) -> None:
    long_recipe["train"] |= {"global_batch_size": 6, "steps": 16}
    long_recipe["checkpoint"]["use_node_local_storage"] = True  # changes nothing where the folder is shared
    whole = long_recipe | {"run_dir": str(tmp_path / "whole")}
    launch(whole)
    kill_after(long_recipe, 8, tmp_path / "killed.yaml", saved="step-00000005")
    launch(long_recipe, ranks=ranks)
    assert losses(long_recipe) == pytest.approx(losses(whole), abs=2e-5)


def test_a_damaged_checkpoint_is_skipped_and_named(long_recipe: dict[str, Any], launch: Launch, tmp_path: Path) -> None:
    kill_after(long_recipe, 12, tmp_path / "killed.yaml", saved="step-00000010")
    checkpoints = Path(long_recipe["run_dir"]) / "checkpoints"
    newest = sorted(path for path in checkpoints.glob("step-*") if not path.suffix)[-1]
    file = newest / "__1_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    shutil.copytree(newest, checkpoints / "step-00000020.g1.tmp")  # as if killed while writing
    done = launch(long_recipe)
    assert f"skipped checkpoint {newest}: __1_0.distcp does not match its checksum" in done.stdout
    assert len(losses(long_recipe)) == 24
    assert not list(checkpoints.glob("*.tmp"))


def test_a_finished_run_is_not_run_again(recipe: dict[str, Any], launch: Launch) -> None:
    launch(recipe)
    before = {path: path.stat().st_mtime_ns for path in Path(recipe["run_dir"]).rglob("*")}
    done = launch(recipe)
    assert "is done already" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in Path(recipe["run_dir"]).rglob("*")} == before


def test_a_run_that_is_done_before_another_job_gets_its_folder_is_not_exported_again(
    recipe: dict[str, Any], launch: Launch, tmp_path: Path
) -> None:
    launch(recipe)
    run = Path(recipe["run_dir"])
    written = {path: path.stat().st_mtime_ns for path in (run / "export").iterdir()}
    (run / "state.json").rename(run / "state.later")  # for the next job it is done only after its first look
    (run / "state.json").write_text('{"status": "running"}')
    late = f"""
from pathlib import Path
from fullft import cluster
join, later = cluster.join, Path({str(run)!r}, "state.later")
def join_once_done(*arguments):
    join(*arguments)
    if arguments[0].is_main:
        later.rename(later.with_suffix(".json"))
cluster.join = join_once_done
"""
    script = before_training(late, tmp_path / "late.py")
    done = run_ranks(script, "--config", str(tmp_path / "recipe.yaml"), ranks=2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is done already") == 1
    assert "loading" not in done.stdout
    assert {path: path.stat().st_mtime_ns for path in (run / "export").iterdir()} == written
    assert json.loads((run / "state.json").read_text())["status"] == "done"
    assert list((run / "lease").glob("generation-00000002.released"))


def test_state_says_how_the_run_stands(recipe: dict[str, Any], launch: Launch) -> None:
    launch(recipe)
    assert json.loads((Path(recipe["run_dir"]) / "state.json").read_text())["status"] == "done"


def test_a_damaged_newer_checkpoint_does_not_push_out_the_good_ones(
    long_recipe: dict[str, Any], launch: Launch, tmp_path: Path
) -> None:
    kill_after(long_recipe, 11, tmp_path / "killed.yaml", saved="step-00000010")
    checkpoints = Path(long_recipe["run_dir"]) / "checkpoints"
    with (checkpoints / "step-00000010" / "__0_0.distcp").open("r+b") as file:
        file.truncate(100)
    (Path(long_recipe["run_dir"]) / "metrics.jsonl").unlink()  # kill_after waits for its rows
    # Resumed from step 5; the first checkpoint after that is of a step before the damaged one.
    seldom = long_recipe | {"checkpoint": {"every_steps": 7, "keep": 1}}
    kill_after(seldom, 8, tmp_path / "killed.yaml", saved="step-00000007")
    assert not (checkpoints / "step-00000010").exists()
    done = launch(long_recipe)
    assert "skipped" not in done.stdout
    assert metrics(long_recipe)[-1]["step"] == 24
