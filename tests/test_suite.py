"""Every kind of task, evaluated by 1, 2 and 3 ranks: equal to each other, and to lm-evaluation-harness."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import REPOSITORY, TEXTS, chats, torchrun, write_jsonl, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

WORDS = ["fox", "lazy dog", "sharded ranks", "a model", "forget", "token", "answer"]
# Uneven in everything: 7 questions (fewer than 3 ranks × batches), 2 to 4 choices, some of one token.
QUESTIONS = [
    {
        "question": f"{TEXTS[at % 4][: 9 + 5 * at]}",
        "choices": [WORDS[(at + step) % 7] for step in range(2 + at % 3)],
        "answer": at % 2,
        "topic": f"topic {at % 2}",
    }
    for at in range(7)
]
LM_EVAL_TASKS: dict[str, dict[str, Any]] = {
    "local_choice": {
        "output_type": "multiple_choice", "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}", "doc_to_target": "answer", "num_fewshot": 1, "fewshot_split": "test",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "local_plain": {
        "output_type": "multiple_choice", "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}", "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "local_text": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "local_answer": {
        "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["e", "\n"], "do_sample": False, "max_gen_toks": 9},
        "metric_list": [{"metric": "exact_match"}],
    },
}  # fmt: skip


def write_harness_tasks(folder: Path) -> Path:
    """Task files of lm-evaluation-harness on QUESTIONS, and a group of two of them."""
    rows = write_jsonl(folder / "questions.jsonl", QUESTIONS)
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}}, "test_split": "test"}
    for name, settings in LM_EVAL_TASKS.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | common | settings))
    (folder / "group.yaml").write_text(
        yaml.safe_dump({"group": "local_group", "task": ["local_choice", "local_plain"]})
    )
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[int, Path]:
    """The run folder of one training step on each number of ranks."""
    folder = tmp_path_factory.mktemp("suite")
    harness = str(write_harness_tasks(folder / "harness"))
    own = [
        {"name": "texts", "kind": "text", "data": str(write_jsonl(folder / "t.jsonl", [{"text": t} for t in TEXTS]))},
        {"name": "answers", "kind": "generate", "measures": "skill", "max_new_tokens": 6,
         "data": str(write_jsonl(folder / "p.jsonl", chats(5)))},
        {"name": "choice", "kind": "multiple_choice", "metric": "acc_norm", "cluster_field": "topic",
         "data": str(write_jsonl(folder / "q.jsonl", QUESTIONS))},
    ]  # fmt: skip
    named = [{"name": name, "kind": "harness", "harness_path": harness} for name in (*LM_EVAL_TASKS, "local_group")]
    recipe: dict[str, Any] = {
        "model": {"path": str(tiny_model)},
        "data": {
            "train": str(write_jsonl(folder / "train.jsonl", chats(40))), "sequence_length": 64,
            "validation": {"path": str(write_jsonl(folder / "v.jsonl", chats(60)[40:])), "limit": 1},
            "on_too_long": "truncate",
        },
        "train": {"steps": 1, "global_batch_size": 6, "learning_rate": 1e-3, "warmup_steps": 0},
        "retention": {"tasks": own + named, "generation_batch_size": 2},
        "tracking": {"wandb": "disabled"},
    }  # fmt: skip
    found = {}
    for ranks in (1, 2, 3):
        found[ranks] = folder / f"ranks-{ranks}"
        config = write_recipe(recipe | {"run_dir": str(found[ranks])}, folder / f"ranks-{ranks}.yaml")
        command = [*torchrun(ranks), str(REPOSITORY / "launch" / "train.py"), "--config", str(config)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=folder, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return found


def items(run: Path, step: int, task: str) -> list[dict[str, Any]]:
    file = run / f"retention/items/step-{step:08d}.{task}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def evaluation(run: Path, step: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / f"retention/step-{step:08d}.json").read_text())["tasks"]
    return found


@pytest.fixture(scope="module")
def harness_results(runs: dict[int, Path], tiny_model: Path) -> dict[str, Any]:
    """What lm_eval itself, with HFLM on one process, says of the base model."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    hflm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=64)
    manager = TaskManager(include_path=str(runs[1].parent / "harness"), include_defaults=False)
    found: dict[str, Any] = lm_eval.simple_evaluate(
        hflm, tasks=list(LM_EVAL_TASKS), task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    return found


@pytest.mark.ranks
def test_evaluations_do_not_depend_on_the_number_of_ranks(runs: dict[int, Path]) -> None:
    for step in (0, 1):
        tasks = evaluation(runs[1], step)
        assert set(tasks) == {"validation", "texts", "answers", "choice", *LM_EVAL_TASKS, "local_group"}
        for name in tasks:
            one = items(runs[1], step, name)
            for ranks in (2, 3):
                other = items(runs[ranks], step, name)
                assert [row["hash"] for row in other] == [row["hash"] for row in one]
                if step == 0:  # the weights are the same, and so are the batches
                    assert other == one
                score = evaluation(runs[ranks], step)[name]["score"]
                assert score == pytest.approx(tasks[name]["score"], rel=1e-4)


@pytest.mark.ranks
def test_choices_have_the_log_likelihoods_of_lm_evaluation_harness(
    runs: dict[int, Path], harness_results: dict[str, Any]
) -> None:
    theirs = sorted(harness_results["samples"]["local_plain"], key=lambda sample: sample["doc_id"])
    ours = items(runs[2], 0, "choice")
    for own, other in zip(ours, theirs, strict=True):
        assert own["choice_logprobs"] == pytest.approx([float(one[0]) for one in other["filtered_resps"]], abs=1e-5)
        assert own["correct"] == bool(other["acc_norm"])
    results = harness_results["results"]["local_plain"]
    assert evaluation(runs[2], 0)["choice"]["score"] == pytest.approx(results["acc_norm,none"])
    assert sum(one["choice_logprobs"].index(max(one["choice_logprobs"])) == one["gold"] for one in ours) / len(
        ours
    ) == pytest.approx(results["acc,none"])
    assert [one["cluster"] for one in ours] == [row["topic"] for row in QUESTIONS]


@pytest.mark.ranks
def test_harness_tasks_score_as_in_lm_evaluation_harness(
    runs: dict[int, Path], harness_results: dict[str, Any]
) -> None:
    results, samples = harness_results["results"], harness_results["samples"]
    ours = evaluation(runs[3], 0)
    for name in ("local_choice", "local_plain"):
        assert ours[name]["score"] == pytest.approx(results[name]["acc,none"])
    group = (results["local_choice"]["acc,none"] + results["local_plain"]["acc,none"]) / 2
    assert (ours["local_group"]["score"], ours["local_group"]["n"]) == (pytest.approx(group), 14)
    assert ours["local_text"]["metric"] == "bits_per_byte"
    assert ours["local_text"]["score"] == pytest.approx(results["local_text"]["bits_per_byte,none"], rel=1e-6)
    theirs = sorted(samples["local_answer"], key=lambda sample: sample["doc_id"])
    assert [row["generation"] for row in items(runs[3], 0, "local_answer")] == [one["resps"][0][0] for one in theirs]
    assert ours["local_answer"]["score"] == pytest.approx(results["local_answer"]["exact_match,none"])
    assert len((runs[3] / "samples/step-00000000.local_answer.jsonl").read_text().splitlines()) == 7
