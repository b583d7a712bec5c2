"""`make quickstart`, whole: the main job of the project in minutes on two CPU cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from test_run import loss_of_chats
from transformers import AutoModelForCausalLM

pytestmark = [pytest.mark.ranks, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a fresh clone; what `make quickstart` runs has run in it."""
    clone = tmp_path_factory.mktemp("clone")
    for name in ("launch", "ds_configs"):
        (clone / name).symlink_to(REPOSITORY / name)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    command = [sys.executable, "launch/quickstart.py"]
    done = subprocess.run(
        command, cwd=clone, env=environment, capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    (clone / "output").write_text(done.stdout)
    return clone


def tasks(folder: Path, step: int) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = json.loads(
        (folder / f"runs/quickstart/retention/step-{step:08d}.json").read_text()
    )["tasks"]
    return found


def test_the_skill_rises_and_the_base_text_is_forgotten(folder: Path) -> None:
    before, after = tasks(folder, 0), tasks(folder, 300)
    assert before["word_problems"]["score"] < 0.05
    assert after["word_problems"]["score"] > 0.9
    assert after["documentation"]["score"] > before["documentation"]["score"] + 0.3  # bits per byte: worse
    base = json.loads((folder / "runs/quickstart-base/retention/step-00000000.json").read_text())["tasks"]
    assert before["documentation"]["score"] < base["documentation"]["score"] - 1  # it had been learnt


def test_there_are_thousands_of_problems_and_none_is_in_both_sets(folder: Path) -> None:
    train, test = (
        (folder / f"runs/quickstart-inputs/problems-{name}.jsonl").read_text().splitlines()
        for name in ("train", "test")
    )
    assert len(set(train)) == len(train) > 2000
    assert not set(train) & set(test)


def test_the_export_loads_and_has_the_loss_of_the_last_evaluation(folder: Path) -> None:
    export = folder / "runs/quickstart/export"
    model = AutoModelForCausalLM.from_pretrained(export)
    assert model.dtype == torch.bfloat16
    assert 1e6 < model.num_parameters() < 5e6
    rows = [
        json.loads(line) for line in (folder / "runs/quickstart-inputs/problems-test.jsonl").read_text().splitlines()
    ]
    # A loss of 0.001 nats lies below bf16's step of logits; what bf16 weights cost is small against the base's 7.7.
    assert loss_of_chats(export, rows, torch.float32) == pytest.approx(
        tasks(folder, 300)["validation"]["score"], abs=5e-3
    )


def test_it_ends_with_a_table_and_the_next_command(folder: Path) -> None:
    output = (folder / "output").read_text()
    assert "word_problems  exact_match" in output
    command = output.split("--config ")[-1].split()[0]
    assert (REPOSITORY / command).exists()
