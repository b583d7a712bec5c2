"""`fullft eval` and `fullft blend --sweep`: the numbers are those of the training's own evaluations, on any ranks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, TEXTS, chats, torchrun, write_jsonl, write_recipe
from test_launch import deepspeed_here

from fullft import cli
from fullft.retention.blend import blend_folders

pytestmark = pytest.mark.ranks

ALONE = [sys.executable]
MODULE = ["-m", "fullft.cli"]
# Fails if an evaluation allocates what only an optimizer needs.
WITHOUT_OPTIMIZER = [
    sys.executable, "-c", """
import sys
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from fullft import cli
from fullft.retention import evaluate
start = evaluate.start
def checked(*arguments):
    engine = start(*arguments)
    assert isinstance(engine.optimizer, DeepSpeedZeRoOffload), engine.optimizer
    return engine
evaluate.start = checked
sys.exit(cli.main())
""",
]  # fmt: skip


def call(*command: str, folder: Path, code: int = 0) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout + done.stderr


def scores(folder: Path, step: int) -> dict[str, tuple[float, float]]:
    """{task: (score, drop)} of an evaluation."""
    tasks = json.loads((folder / "retention" / f"step-{step:08d}.json").read_text())["tasks"]
    return {name: (task["score"], task["drop"]) for name, task in tasks.items()}


def near(expected: dict[str, tuple[float, float]]) -> dict[str, Any]:
    return {name: pytest.approx(numbers, rel=1e-5, abs=1e-6) for name, numbers in expected.items()}


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short training by one rank, with its recipe beside it."""
    folder = tmp_path_factory.mktemp("eval")
    write_jsonl(folder / "texts.jsonl", [{"text": text * (1 + at % 3)} for at, text in enumerate(TEXTS * 3)])
    write_jsonl(folder / "held-out.jsonl", chats(6))
    write_jsonl(folder / "train.jsonl", chats(40)[6:])
    recipe = {
        "run_dir": "run",
        "model": {"path": str(tiny_model), "new_tokens": ["<|new|>"]},
        "data": {"train": "train.jsonl", "validation": "held-out.jsonl", "sequence_length": 128},
        "train": {"steps": 6, "global_batch_size": 2, "learning_rate": 5e-3, "warmup_steps": 0},
        "retention": {
            "tasks": [
                {"name": "texts", "kind": "text", "data": "texts.jsonl", "max_drop": 0.5},
                {"name": "answers", "kind": "generate", "measures": "skill", "data": "held-out.jsonl",
                 "max_new_tokens": 3},
            ]
        },
        "tracking": {"wandb": "disabled"},
        "export": {"dtype": "fp32"},
    }  # fmt: skip
    config = write_recipe(recipe, folder / "recipe.yaml")
    call(*ALONE, str(REPOSITORY / "launch" / "train.py"), "--config", str(config), folder=folder)
    return folder / "run"


@pytest.fixture(scope="module")
def swept(run: Path) -> Path:
    """The run, its blends measured by two ranks."""
    call(*torchrun(2), *MODULE, "blend", "run", "--sweep", "0.5,1", folder=run.parent)
    return run


def test_the_ends_of_a_sweep_are_the_first_and_the_last_evaluation_of_the_run(swept: Path) -> None:
    assert scores(swept / "blend", 0) == near(scores(swept, 0))
    assert scores(swept / "blend", 1000) == near(scores(swept, 6))
    found = json.loads((swept / "blend.json").read_text())
    assert found["format"] == "fullft-blend/1"
    assert [one["alpha"] for one in found["points"]] == [0, 0.5, 1]
    last = json.loads((swept / "retention" / "step-00000006.json").read_text())
    drop = found["points"][-1]["tasks"]["validation"]["drop_ci"]
    assert drop == pytest.approx(last["tasks"]["validation"]["drop_ci"], rel=1e-3)  # paired with the same items
    assert found["points"][0]["skill"] == found["points"][0]["retention"] == 0
    assert found["points"][1]["skill"] > 0
    assert found["best"]["alpha"] in (0.5, 1)


def test_a_sweep_that_was_killed_goes_on_with_what_it_has_measured(swept: Path, tmp_path: Path) -> None:
    """One that has all of them but the last α and blend.json; other models, recipe or weights are refused."""
    out = tmp_path / "out"
    shutil.copytree(swept / "blend", out / "blend")
    before = {file: file.stat().st_mtime_ns for file in (out / "blend").glob("retention/step-*.json")}
    lost = out / "blend" / "retention" / "step-00001000.json"
    lost.unlink()
    words = [*ALONE, *MODULE, "blend", "run", "--recipe", "run/recipe.yaml", "--out", str(out), "--sweep"]
    told = call(*words, "0.5,1", folder=swept.parent)
    assert "α = 1 (3 of 3)" in told
    found, first = (json.loads((folder / "blend.json").read_text()) for folder in (out, swept))
    assert found["best"]["alpha"] == first["best"]["alpha"]
    assert {file: file.stat().st_mtime_ns for file in before if file != lost} == {
        file: time for file, time in before.items() if file != lost
    }
    assert scores(out / "blend", 1000) == near(scores(swept / "blend", 1000))
    other = call(*words, "1", "data.sequence_length=64", folder=swept.parent, code=2)
    assert "is of another sweep (recipe was" in other
    assert "nothing was blended" in other
    (out / "blend" / "sweep.json").unlink()
    assert "does not say of which models" in call(*words, "1", folder=swept.parent, code=2)


def test_a_blend_measured_from_its_folder_is_the_one_that_was_measured_in_the_sweep(
    swept: Path, tmp_path: Path
) -> None:
    base = json.loads((swept / "blend.json").read_text())["base"]
    blend_folders(base, str(swept / "export"), tmp_path / "half", 0.5)
    out = str(tmp_path / "measured")
    words = ["recipe.yaml", "--model", str(tmp_path / "half"), "--base", "run", "--out", out]
    told = call(*WITHOUT_OPTIMIZER, "eval", *words, folder=swept.parent)
    assert scores(tmp_path / "measured", 1) == near(scores(swept / "blend", 500))
    assert scores(tmp_path / "measured", 0) == scores(swept, 0)
    assert "better than base (95% CI" in told
    again = call(*ALONE, *MODULE, "eval", *words, folder=swept.parent, code=2)
    assert "nothing is overwritten" in again
    assert "nothing was evaluated" in again


def test_model_and_base_are_measured_in_one_start_by_the_deepspeed_launcher(
    run: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
    words = ["eval", "recipe.yaml", "--model", "run", "--base", str(tiny_model)]
    call(*deepspeed_here(), "--module", "fullft.cli", *words, folder=run.parent)
    assert scores(run.parent / "run-eval-run", 0) == near(scores(run, 0))
    assert scores(run.parent / "run-eval-run", 1) == near(scores(run, 6))


def test_what_cannot_be_measured_is_told_before_anything_starts(
    run: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(run.parent)
    monkeypatch.setattr("fullft.cluster.exit_now", lambda code: sys.exit(code))
    out = str(tmp_path / "out")

    def told(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["fullft", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 2
        assert not Path(out).exists()
        return capsys.readouterr().err

    evaluate = ("eval", "recipe.yaml", "--out", out, "--model")
    assert "is not a folder" in told(*evaluate, "./nowhere")
    assert "nothing to measure" in told(*evaluate, "run", "data.validation=[]", "retention.tasks=[]")
    write_jsonl(tmp_path / "fewer.jsonl", [{"text": TEXTS[0]}])
    other = f"retention.tasks.0.data={tmp_path / 'fewer.jsonl'}"
    assert "--base: task texts: " in told(*evaluate, "run", "--base", "run", other)
    again = ("--base", "run", "data.sequence_length=16")
    assert "--base: task texts: the tokens of its items (data.sequence_length, " in told(*evaluate, "run", *again)
    again = ("--base", "run", "retention.tasks.1.max_new_tokens=4")
    assert "--base: task answers: its max_new_tokens are not those" in told(*evaluate, "run", *again)
    mine = ("eval", "recipe.yaml", "--model", "run", "--out")
    for taken, text in ((".", "nothing is overwritten"), ("recipe.yaml/x", "recipe.yaml is a file")):
        kept = Path("recipe.yaml").read_text()
        assert text in told(*mine, taken)
        assert Path("recipe.yaml").read_text() == kept
    assert "sequence_length: 100000 is above" in told(*evaluate, "run", "data.sequence_length=100000")
    sweep = ("blend", str(tiny_model), "run/export", "--sweep", "0,1", "--recipe", "recipe.yaml", "--out", out)
    assert "none measures retention" in told(*sweep, "retention.tasks=[]")
    assert "give --recipe and --out" in told("blend", str(tiny_model), "run/export", "--sweep", "0,1")
    assert "not both" in told("blend", "run", "--sweep", "0,1", "--alpha", "1")
    assert "--layer-scale: 7 matches no tensor" in told(*sweep, "--layer-scale", "7=0.5")
