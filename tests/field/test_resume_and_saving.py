"""Complaints of the second half of a run: the schedule after a resume, hours of skipping batches, and saving."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TRAIN, chat, chats, metrics, run_ranks, write_jsonl, write_recipe
from safetensors import safe_open
from test_architectures import SMALL, save_model
from test_bad_input import problem
from test_data import Prepare, batches, documents, prepare, tokenizer  # noqa: F401
from transformers import AutoModelForCausalLM, LlamaConfig

from fullft.errors import BadInput
from fullft.export import rehearse
from fullft.optim import learning_rate
from fullft.preflight import preflight
from fullft.recipe import parse_recipe

STEPS = 9


@pytest.fixture(scope="module")
def resumed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Resumed:
    """A tied model that gets a new token, trained on 3 ranks, and again from its step 8 on 2 ranks."""
    folder = tmp_path_factory.mktemp("resumed")
    config = LlamaConfig(**SMALL, tie_word_embeddings=True)
    rows = [chat(f"Say {number}", "a<|new|>b") for number in range(20)]
    recipe = {
        "run_dir": str(folder / "run"),
        "model": {"path": str(save_model(config, tiny_model, folder / "model")), "new_tokens": ["<|new|>"]},
        "data": {
            "train": str(write_jsonl(folder / "train.jsonl", rows)), "sequence_length": 128,
            "validation": str(write_jsonl(folder / "held-out.jsonl", chats(3))),
        },
        "train": {
            "steps": STEPS, "global_batch_size": 6, "learning_rate": 1e-3, "min_learning_rate": 1e-5, "warmup_steps": 4,
        },
        "checkpoint": {"every_steps": 2, "keep": 2, "keep_best": False},
        "retention": {"every_steps": 3, "kl_tokens": 0},
        "tracking": {"wandb": "disabled"},
        "export": {"dtype": "fp32"},
    }  # fmt: skip
    run, config_file, said = folder / "run", write_recipe(recipe, folder / "recipe.yaml"), ""
    for ranks in (3, 2):
        done = run_ranks(TRAIN, "--config", str(config_file), ranks=ranks, cwd=folder)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        if ranks == 3:
            kept = sorted(path.name for path in (run / "checkpoints").iterdir())
            (run / "export").rename(folder / "first")
            shutil.rmtree(run / "checkpoints/step-00000009")  # as if it had ended after step 8
            (run / "state.json").unlink()
        said = done.stdout
    assert "at step 8" in said
    return Resumed(recipe, kept, folder / "first")


@dataclass(frozen=True)
class Resumed:
    """`kept`: checkpoints after the first run. `first`: its export."""

    recipe: dict[str, Any]
    kept: list[str]
    first: Path


@pytest.mark.ranks
def test_the_learning_rate_follows_optimizer_steps_on_any_number_of_ranks_and_across_a_resume(resumed: Resumed) -> None:
    rows = [row for row in metrics(resumed.recipe) if "train/loss" in row]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    train, rates = parse_recipe(resumed.recipe).train, [row["train/learning_rate"] for row in rows]
    assert rates == [learning_rate(step, STEPS, train) for step in range(STEPS)]
    assert rates[:5] == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3])  # 4 steps of warm-up, and not 4 × 3 ranks
    assert rates[5:] == sorted(rates[5:], reverse=True)
    for key, value in (("steps", 20), ("warmup_steps", 8), ("global_batch_size", 12)):
        assert f"train.{key} was" in problem(resumed.recipe, f"train.{key}={value}")


@pytest.mark.ranks
def test_no_more_checkpoints_stay_than_told_whatever_the_intervals_of_saving_and_evaluating(resumed: Resumed) -> None:
    assert resumed.kept == ["step-00000008", "step-00000009"]  # saved every 2 steps and at the end, evaluated every 3


@pytest.mark.ranks
def test_a_tied_model_with_new_tokens_is_whole_on_disk_after_a_resume_on_other_ranks(resumed: Resumed) -> None:
    export = Path(resumed.recipe["run_dir"]) / "export"
    with safe_open(export / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    assert all(all(shape) for shape in shapes.values())
    assert "lm_head.weight" not in shapes
    first, tuned, base = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (resumed.first, export, resumed.recipe["model"]["path"])
    )
    assert tuned.lm_head.weight is tuned.model.embed_tokens.weight
    rows, known = tuned.model.embed_tokens.weight.detach(), base.model.embed_tokens.weight.detach()
    assert len(known) + 1 == len(rows) == tuned.config.vocab_size
    assert (rows[-1] - known.mean(0)).abs().max() > 1e-4  # it was trained
    for (name, one), other in zip(first.named_parameters(), tuned.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4, msg=name)


def test_a_batch_of_step_three_million_is_there_as_soon_as_the_first(prepare: Prepare, tmp_path: Path) -> None:  # noqa: F811
    found = batches(prepare(str(write_jsonl(tmp_path / "train.jsonl", chats(300)))), packing=False)

    def seconds(step: int) -> float:
        started = time.perf_counter()
        assert sum(len(batch.input_ids) for batch in found.of_step(step, 0)) == 4
        return time.perf_counter() - started

    seconds(0)
    assert min(seconds(3_000_000 + again) for again in range(5)) < 0.1


def test_a_generation_config_that_cannot_be_saved_is_told_before_training(
    recipe: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    published = {"do_sample": False, "temperature": 0.6, "top_p": 0.9}  # transformers refused to save that for long,
    (folder / "generation_config.json").write_text(json.dumps(published))
    inputs = preflight(parse_recipe(recipe, [f"model.path={folder}"]), 1)  # and takes it today if nobody has changed it
    inputs.meta.save_pretrained(tmp_path / "saved", state_dict={})
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert published.items() <= saved.items()
    inputs.meta.generation_config.temperature = 0.7
    with pytest.raises(BadInput, match=r"(?s)could not be exported.*temperature"):
        rehearse(inputs.meta, inputs.tokenizer)
    (folder / "generation_config.json").write_text(json.dumps({"early_stopping": "sometimes"}))
    assert "early_stopping" in problem(recipe, f"model.path={folder}")
