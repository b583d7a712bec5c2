"""Tasks of lm-evaluation-harness before training: what is made of them, and what is told when they cannot be used.

That they score as lm_eval itself does stands in test_suite.py, where ranks run.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import write_jsonl
from test_suite import LM_EVAL_TASKS, QUESTIONS, write_harness_tasks
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fullft.errors import BadInput
from fullft.preflight import preflight
from fullft.recipe import parse_recipe
from fullft.retention.budget import evaluation_tokens
from fullft.retention.tasks import Prepared, prepare_tasks

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_harness_tasks(tmp_path_factory.mktemp("harness"))


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


def prepared(tokenizer: PreTrainedTokenizerBase, name: str, folder: Path | None, **keys: Any) -> Prepared:
    task = {"name": name, "kind": "harness"} | ({"harness_path": str(folder)} if folder else {}) | keys
    raw = {"run_dir": "x", "model": {"path": "x"}, "data": {"train": "x"}, "retention": {"tasks": [task]}}
    return prepare_tasks(parse_recipe(raw), tokenizer)[0]


def told(tokenizer: PreTrainedTokenizerBase, name: str, folder: Path | None, **keys: Any) -> str:
    with pytest.raises(BadInput) as caught:
        prepared(tokenizer, name, folder, **keys)
    (problem,) = caught.value.problems
    return problem


def test_a_task_becomes_items_with_prompts_of_its_own(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    task = prepared(tokenizer, "local_plain", folder, metric="acc_norm", limit=3, max_drop=0.5)
    assert (len(task.items), task.kind, task.metric, task.higher_is_better) == (3, "value", "acc_norm", True)
    assert task.chance == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)
    assert task.max_drop == 0.5
    problem = told(tokenizer, "local_answer", folder, metric="acc_norm")
    assert "it has no acc_norm, its means over items are exact_match; leave it out for exact_match" in problem
    text = prepared(tokenizer, "local_text", folder)
    assert (text.kind, text.metric, text.higher_is_better, text.chance) == ("text", "bits_per_byte", False, None)
    with_examples = prepared(tokenizer, "shots", folder, harness_task="local_plain", num_fewshot=2)
    assert not {item.key for item in with_examples.items} & {item.key for item in task.items}
    again = prepared(tokenizer, "shots", folder, harness_task="local_choice", num_fewshot=0)
    plain = prepared(tokenizer, "local_plain", folder)
    pairs = [[document.runs for document in one.harness] for one in (again, plain)]
    assert pairs[0] == pairs[1]


def test_a_group_is_one_task_and_its_subtasks_are_clusters_when_there_are_ten(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = write_jsonl(tmp_path / "q.jsonl", QUESTIONS)
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}}, "test_split": "test"}
    names = [f"subject_{number}" for number in range(10)]
    for name in names:
        settings = common | LM_EVAL_TASKS["local_plain"] | {"task": name}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    for group, members in (("ten", names), ("nine", names[:9])):
        (tmp_path / f"{group}.yaml").write_text(yaml.safe_dump({"group": group, "task": members}))
    ten, nine = prepared(tokenizer, "ten", tmp_path), prepared(tokenizer, "nine", tmp_path)
    assert len(ten.items) == 70
    assert {item.cluster for item in ten.items} == set(names)
    assert {item.cluster for item in nine.items} == {None}
    assert len({item.key for item in ten.items}) == 70  # the same question in two subjects is two items


def test_unknown_tasks_are_told_with_the_nearest(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    assert "has no such task; did you mean local_" in told(tokenizer, "local_plan", folder)
    assert "is not a folder" in told(tokenizer, "local_plain", folder / "nowhere")
    assert "did you mean arc_easy" in told(tokenizer, "arc_eazy", None)


def test_data_out_of_reach_is_told(tokenizer: PreTrainedTokenizerBase) -> None:
    problem = told(tokenizer, "arc_easy", None)  # HF_HUB_OFFLINE is set
    assert problem.startswith("task arc_easy: lm-evaluation-harness cannot load arc_easy (")
    assert "Without network" in problem


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"metric_list": [{"metric": "f1"}]}, "its metrics (f1) are not means over items"),
        ({"output_type": "generate_until", "generation_kwargs": {"until": ["x"], "do_sample": True},
          "metric_list": [{"metric": "exact_match"}]}, "it draws its answers at random"),
        ({"doc_to_text": "{{nothing.at.all}}"}, "cannot load broken ("),
    ],
)  # fmt: skip
def test_tasks_that_cannot_be_compared_are_told(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, changes: dict[str, Any], reason: str
) -> None:
    rows = write_jsonl(tmp_path / "q.jsonl", QUESTIONS)
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}}, "test_split": "test"}
    settings = common | LM_EVAL_TASKS["local_plain"] | changes | {"task": "broken"}
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump(settings))
    assert reason in told(tokenizer, "broken", tmp_path)


def test_prompts_without_room_are_told_before_training(tmp_path: Path, recipe: dict[str, Any]) -> None:
    rows = write_jsonl(tmp_path / "q.jsonl", QUESTIONS)
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}}, "test_split": "test"}
    for longest in (511, 512):  # the model has 512 positions
        settings = common | LM_EVAL_TASKS["local_answer"] | {"task": f"long_{longest}"}
        settings["generation_kwargs"] = {"until": ["x"], "max_gen_toks": longest}
        (tmp_path / f"long_{longest}.yaml").write_text(yaml.safe_dump(settings))
    tasks = [{"name": f"long_{one}", "kind": "harness", "harness_path": str(tmp_path)} for one in (511, 512)]
    with pytest.raises(BadInput) as caught:
        preflight(parse_recipe(recipe | {"retention": {"tasks": tasks}}), 1)
    (problem,) = caught.value.problems
    assert problem.startswith("task long_512: item 0: an answer of 512 tokens leaves none of the model's 512 positions")


def test_choices_that_share_an_input_cost_one(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = write_jsonl(tmp_path / "q.jsonl", QUESTIONS)
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}}, "test_split": "test"}
    settings = common | LM_EVAL_TASKS["local_plain"] | {"task": "letters", "doc_to_choice": ["A", "B", "C", "D"]}
    (tmp_path / "letters.yaml").write_text(yaml.safe_dump(settings))
    task = prepared(tokenizer, "letters", tmp_path)
    pairs = [document.runs[0] for document in task.harness]
    assert evaluation_tokens([task]) == sum(len(context) + len(answer) - 1 for context, answer in pairs)
    assert len(task.harness[0].runs) == 4


def test_a_missing_package_is_told(
    folder: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)

    class Absent:
        def find_spec(self, name: str, *_: Any) -> None:
            if name.split(".")[0] == "lm_eval":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    assert "pip install 'fullft[eval]'" in told(tokenizer, "local_plain", folder)
