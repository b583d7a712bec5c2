"""What a run leaves behind, and that its numbers are those of the exported model."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY, Launch, chats, losses, metrics, write_jsonl, write_recipe
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from fullft.optim import remove_stale_lock

pytestmark = pytest.mark.ranks

TEXTS = [
    "Sharding cuts every parameter into equal parts.",
    "A tail that does not divide is padded, and nobody sees it.",
    "Nothing here is longer than it must be to span more than one window of the model, except this sentence, which is.",
]


@pytest.fixture
def measured(recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The recipe with validation, a text task and a generation task."""
    recipe["data"] |= {"validation": str(write_jsonl(tmp_path / "validation.jsonl", chats(60)[40:]))}
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    prompts = write_jsonl(tmp_path / "prompts.jsonl", chats(5))
    recipe["retention"] = {
        "every_steps": 2,
        "tasks": [
            {"name": "texts", "kind": "text", "data": str(texts)},
            {"name": "answers", "kind": "generate", "measures": "skill", "data": str(prompts), "max_new_tokens": 6},
        ],
    }
    recipe["train"]["learning_rate"] = 5e-3
    return recipe


def evaluation(recipe: dict[str, Any], step: int) -> dict[str, Any]:
    tasks: dict[str, Any] = json.loads((Path(recipe["run_dir"]) / f"retention/step-{step:08d}.json").read_text())[
        "tasks"
    ]
    return tasks


def loss_of_chats(folder: Path, rows: list[dict[str, Any]], dtype: torch.dtype) -> float:
    """Mean loss of the assistants' tokens, by transformers alone, row by row."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    nats, count = 0.0, 0
    for row in rows:
        encoded = tokenizer.apply_chat_template(
            row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids = torch.tensor([encoded["input_ids"]])
        labels = torch.where(torch.tensor([encoded["assistant_masks"]], dtype=torch.bool), ids, -100)
        with torch.no_grad():
            logits = model(ids).logits.float()
        nats += F.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum").item()
        count += int((labels[0, 1:] != -100).sum())
    return nats / count


@pytest.mark.parametrize("tied", [True, False])
def test_the_export_has_the_loss_of_the_last_evaluation(
    measured: dict[str, Any], launch: Launch, tiny_model: Path, tmp_path: Path, tied: bool
) -> None:
    if not tied:
        config = AutoConfig.from_pretrained(tiny_model)
        config.tie_word_embeddings = False
        torch.manual_seed(1)
        LlamaForCausalLM(config).save_pretrained(tmp_path / "untied")
        AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "untied")
        measured["model"]["path"] = str(tmp_path / "untied")
    measured["export"]["dtype"] = "bf16"
    launch(measured)
    export = Path(measured["run_dir"]) / "export"
    config = AutoConfig.from_pretrained(export)
    assert (config.dtype, config.tie_word_embeddings, config.use_cache) == (torch.bfloat16, tied, True)
    last = evaluation(measured, 4)["validation"]
    assert loss_of_chats(export, chats(60)[40:], torch.float32) == pytest.approx(last["score"], rel=2**-8)
    first = evaluation(measured, 0)["validation"]
    base = loss_of_chats(Path(measured["model"]["path"]), chats(60)[40:], torch.float32)
    assert first["score"] == pytest.approx(base, rel=1e-5)
    assert last["score"] < first["score"]


def test_text_scores_are_those_of_plain_transformers(
    measured: dict[str, Any], launch: Launch, tiny_model: Path
) -> None:
    measured["data"]["sequence_length"] = 64  # the last text needs two windows
    measured["train"]["steps"] = 1
    measured["data"] |= {"on_too_long": "truncate"}
    launch(measured, ranks=1)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    nats, tokens, hits = 0.0, 0, 0
    for text in TEXTS:
        ids = [tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        for at in range(1, len(ids)):  # each token alone, from the context that its window gives it
            window = (at - 1) // 64
            last = min((window + 1) * 64, len(ids) - 1)
            first = max(0, last - 64)
            with torch.no_grad():
                logits = model(torch.tensor([ids[first:at]])).logits[0, -1]
            nats -= logits.log_softmax(-1)[ids[at]].item()
            hits += int(logits.argmax() == ids[at])
            tokens += 1
    task = evaluation(measured, 0)["texts"]
    bits = nats / 0.6931471805599453 / sum(len(text.encode()) for text in TEXTS)
    assert task["score"] == pytest.approx(bits, rel=1e-5)
    assert task["extra"]["tokens"] == tokens
    assert task["extra"]["token_accuracy"] == pytest.approx(hits / tokens)


def test_bf16_keeps_fp32_master_weights(recipe: dict[str, Any], launch: Launch, tiny_model: Path) -> None:
    fp32 = recipe | {"run_dir": recipe["run_dir"] + "-fp32"}
    recipe["train"] |= {"precision": "bf16", "learning_rate": 1e-6, "global_batch_size": 8}
    launch(recipe)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tuned = AutoModelForCausalLM.from_pretrained(Path(recipe["run_dir"]) / "export", dtype=torch.float32)
    moved = lost = 0
    for one, other in zip(base.parameters(), tuned.parameters(), strict=True):
        moved += int((one.bfloat16().float() != other).sum())
        lost += int((one.bfloat16() == other.bfloat16()).sum())
    total = sum(parameter.numel() for parameter in base.parameters())
    assert moved > 0.9 * total  # AdamW moves every weight that has a gradient by about the learning rate,
    assert lost > 0.5 * total  # which bf16 weights alone would have rounded away
    fp32["train"] = recipe["train"] | {"precision": "fp32"}
    launch(fp32)
    assert losses(recipe) == pytest.approx(losses(fp32), rel=2e-2)


def test_the_run_folder_holds_what_the_readme_says(measured: dict[str, Any], launch: Launch) -> None:
    measured["tracking"]["wandb"] = "offline"
    done = launch(measured)
    run = Path(measured["run_dir"])
    listed = (REPOSITORY / "README.md").read_text().split("runs/<name>/")[1].split("```")[0].split()
    names = {name.rstrip("/") for name in listed if name.endswith((".json", ".jsonl", ".yaml", ".html", "/"))}
    assert {"recipe.yaml", "metrics.jsonl", "retention", "checkpoints", "wandb"} < names  # the README is parsed rightly
    assert not {name for name in names if not (run / name).exists()}
    assert [row["step"] for row in metrics(measured)] == [0, 1, 2, 3, 4]
    assert list(run.glob("wandb/offline-run-*"))
    assert "all trainable" in done.stdout
    items = (run / "retention/items/step-00000004.answers.jsonl").read_text().splitlines()
    assert len(items) == 5
    assert {"correct", "generation", "hash"} < json.loads(items[0]).keys()
    card = (run / "export/README.md").read_text()
    assert "| skill | answers | exact_match |" in card


def test_a_terminal_gets_a_progress_bar_and_a_pipe_gets_lines(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["train"]["steps"] = 3
    command = [sys.executable, str(REPOSITORY / "launch/train.py"), "--config"]
    main, worker = pty.openpty()
    fcntl.ioctl(worker, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))  # a terminal has a size
    config = str(write_recipe(recipe, tmp_path / "terminal.yaml"))
    process = subprocess.Popen([*command, config], stdout=worker, stderr=worker, stdin=worker, cwd=tmp_path)
    os.close(worker)
    shown = b""
    try:
        while chunk := os.read(main, 65536):
            shown += chunk
    except OSError:  # how a closed terminal reads on Linux
        pass
    assert process.wait(60) == 0
    assert b"3/3" in shown
    assert b"\r" in shown
    assert b"step 2/3" not in shown

    recipe["run_dir"] += "-lines"
    config = str(write_recipe(recipe, tmp_path / "lines.yaml"))
    piped = subprocess.run([*command, config], capture_output=True, text=True, timeout=120, cwd=tmp_path, check=True)
    assert "step 2/3  loss" in piped.stdout
    assert "\r" not in piped.stdout + piped.stderr


@pytest.mark.slow
def test_a_lock_that_a_killed_build_left_is_removed_and_one_of_a_build_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    left, held = tmp_path / "py311_cu130" / "cpu_adam" / "lock", tmp_path / "cpu_adam" / "lock"
    for lock in (left, held):
        lock.parent.mkdir(parents=True)
        lock.touch()
    os.utime(left, (time.time() - 3600, time.time() - 3600))
    remove_stale_lock()
    assert (left.exists(), held.exists()) == (False, True)


def test_offloading_the_optimizer_changes_nothing(recipe: dict[str, Any], launch: Launch) -> None:
    """Also resumes: the states lie in host memory then. The first use compiles DeepSpeed's CPU optimizer."""
    recipe["checkpoint"]["every_steps"] = 2
    recipe |= {"deepspeed": "auto"}  # on CPUs the plain file
    offloaded = recipe | {"run_dir": recipe["run_dir"] + "-offloaded", "deepspeed": "ds_configs/zero3_offload.json"}
    launch(recipe)
    launch(offloaded, timeout=900)
    assert losses(offloaded) == pytest.approx(losses(recipe), abs=1e-4)
    run = Path(offloaded["run_dir"])
    (run / "state.json").unlink()
    (run / "checkpoints/step-00000004").rename(run / "set-aside")
    launch(offloaded)
    assert losses(offloaded) == pytest.approx(losses(recipe), abs=1e-4)


def test_answers_are_greedy_whatever_the_generation_config_of_the_model(
    measured: dict[str, Any], launch: Launch, tiny_model: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.generation_config.repetition_penalty = 1.7
    model.generation_config.no_repeat_ngram_size = 1
    model.save_pretrained(tmp_path / "penalised")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "penalised")
    measured["train"]["steps"] = 1
    penalised = measured | {
        "run_dir": measured["run_dir"] + "-penalised",
        "model": {"path": str(tmp_path / "penalised")},
    }
    launch(measured, ranks=1)
    launch(penalised, ranks=1)
    answers = [
        (Path(run["run_dir"]) / "samples/step-00000000.answers.jsonl").read_text() for run in (measured, penalised)
    ]
    assert answers[0] == answers[1]
    exported = json.loads((Path(penalised["run_dir"]) / "export/generation_config.json").read_text())
    assert exported["repetition_penalty"] == 1.7
