"""Complaints of the second half of a run: the schedule after a resume, hours of skipping batches, and saving."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Launch, chats, metrics, write_jsonl
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


@pytest.mark.ranks
def test_the_learning_rate_follows_optimizer_steps_on_any_number_of_ranks_and_across_a_resume(
    recipe: dict[str, Any], launch: Launch, tmp_path: Path
) -> None:
    """In the same run: as many checkpoints as told stay, whatever the intervals of saving and evaluating, and a run of
    another length is refused where it would have been continued."""
    recipe["train"] |= {"steps": 9, "global_batch_size": 6, "warmup_steps": 4, "min_learning_rate": 1e-5}
    recipe["data"]["validation"] = str(write_jsonl(tmp_path / "held-out.jsonl", chats(3)))
    recipe["checkpoint"] = {"every_steps": 2, "keep": 2, "keep_best": False}
    recipe["retention"] = {"every_steps": 3, "kl_tokens": 0}
    launch(recipe, ranks=3)
    run = Path(recipe["run_dir"])
    kept = [path.name for path in sorted((run / "checkpoints").iterdir())]
    assert kept == ["step-00000008", "step-00000009"]
    for path in ("state.json", "checkpoints/step-00000009"):  # as if it had ended after step 8
        shutil.rmtree(run / path) if (run / path).is_dir() else (run / path).unlink()
    for change in ("train.steps=20", "train.warmup_steps=8", "train.global_batch_size=12"):
        assert f"{change.split('=')[0]} was" in problem(recipe, change)
    done = launch(recipe, ranks=2)
    assert "at step 8" in done.stdout
    rows = metrics(recipe)
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 10))
    train = parse_recipe(recipe).train
    for row in rows:
        if "train/loss" in row:
            assert row["train/learning_rate"] == learning_rate(row["step"] - 1, 9, train)
    rates = [row["train/learning_rate"] for row in rows if "train/loss" in row]
    assert rates[:5] == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3])  # 4 steps of warm-up, and not 4 × 3 ranks
    assert rates[5:] == sorted(rates[5:], reverse=True)


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


@pytest.mark.ranks
def test_a_tied_model_with_new_tokens_is_whole_on_disk_after_a_resume_on_other_ranks(
    recipe: dict[str, Any], launch: Launch, tiny_model: Path, tmp_path: Path
) -> None:
    folder = save_model(LlamaConfig(**SMALL, tie_word_embeddings=True), tiny_model, tmp_path / "model")
    rows = [
        row | {"messages": [row["messages"][0], {"role": "assistant", "content": "a<|new|>b"}]} for row in chats(20)
    ]
    recipe["data"]["train"] = str(write_jsonl(tmp_path / "new.jsonl", rows))
    recipe["model"] = {"path": str(folder), "new_tokens": ["<|new|>"]}
    recipe["train"] |= {"global_batch_size": 6}
    recipe["checkpoint"] = {"every_steps": 2, "keep": 3}
    launch(recipe, ranks=3)
    run = Path(recipe["run_dir"])
    first = AutoModelForCausalLM.from_pretrained(run / "export", dtype=torch.float32)
    for path in ("state.json", "checkpoints/step-00000004", "export"):
        shutil.rmtree(run / path) if (run / path).is_dir() else (run / path).unlink()
    launch(recipe, ranks=2)
    with safe_open(run / "export/model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    assert all(all(shape) for shape in shapes.values())
    assert "lm_head.weight" not in shapes
    tuned = AutoModelForCausalLM.from_pretrained(run / "export", dtype=torch.float32)
    assert tuned.lm_head.weight is tuned.model.embed_tokens.weight
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows_before, rows_after = len(base.model.embed_tokens.weight), len(tuned.model.embed_tokens.weight)
    assert (rows_before + 1, rows_after) == (rows_after, tuned.config.vocab_size)
    mean = base.model.embed_tokens.weight.detach().mean(0)
    assert (tuned.model.embed_tokens.weight[-1] - mean).abs().max() > 1e-4  # it was trained
    for (name, one), other in zip(first.named_parameters(), tuned.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4, msg=name)
