"""Every kind of task, evaluated by 1, 2 and 3 ranks: equal to each other, and to lm-evaluation-harness."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from conftest import FULLFT, REPOSITORY, TEXTS, Launch, chats, run_ranks, torchrun, write_jsonl, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from fullft.data.formats import BadRow, Text, parse_choices, parse_row
from fullft.data.progress import progress
from fullft.errors import BadInput
from fullft.preflight import preflight
from fullft.recipe import Recipe, Source, parse_recipe
from fullft.retention import baseline
from fullft.retention.budget import Budget, decide, evaluation_tokens, part_of, too_long
from fullft.retention.suite import Suite
from fullft.retention.tasks import Item, encode_pair, end_of_turn, prepare_tasks

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
    # Some beyond the 512 positions of the tiny model.
    "local_long_choice": {
        "output_type": "multiple_choice", "doc_to_text": "{{question * 40}}\nAnswer:",
        "doc_to_choice": "{{choices}}", "doc_to_target": "answer", "metric_list": [{"metric": "acc"}],
    },
    "local_long_answer": {
        "output_type": "generate_until", "doc_to_text": "{{question * 40}}", "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n\n"], "do_sample": False, "max_gen_toks": 9},
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
    """The run folder of one training step on each number of ranks; 3 ranks gather the weights layer by layer."""
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
        program = "tests/layer_by_layer.py" if ranks == 3 else "launch/train.py"
        command = [*torchrun(ranks), str(REPOSITORY / program), "--config", str(config)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=480, cwd=folder, check=False)
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
    manager = TaskManager(include_path=str(runs[1].parent / "harness"), include_defaults=False)
    found: dict[str, Any] = {"results": {}, "samples": {}}
    for longest, chosen in ((64, ["local_text"]), (None, [name for name in LM_EVAL_TASKS if name != "local_text"])):
        hflm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=longest)
        one = lm_eval.simple_evaluate(hflm, tasks=chosen, task_manager=manager, bootstrap_iters=0, log_samples=True)
        found = {key: found[key] | one[key] for key in found}
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
    for name in ("local_answer", "local_long_answer"):
        theirs = sorted(samples[name], key=lambda sample: sample["doc_id"])
        assert [row["generation"] for row in items(runs[3], 0, name)] == [one["resps"][0][0] for one in theirs]
    assert ours["local_long_choice"]["score"] == pytest.approx(results["local_long_choice"]["acc,none"])
    for name in ("local_long_choice", "local_long_answer"):  # theirs are cut at the same place, or the answers differed
        cut = [row.get("truncated") for row in items(runs[3], 0, name)]
        assert (cut[0], cut[-1], set(cut)) == (None, True, {None, True})
    assert ours["local_answer"]["score"] == pytest.approx(results["local_answer"]["exact_match,none"])
    assert len((runs[3] / "samples/step-00000000.local_answer.jsonl").read_text().splitlines()) == 7


# Rows of multiple choice


def choices(row: dict[str, Any], **settings: Any) -> tuple[Any, list[str], int]:
    found = parse_choices(row, Source.model_validate({"path": "x", "format": "multiple_choice"} | settings))
    return found.context, found.choices, found.gold


THREE = ["red", "green", "blue"]
ROWS: dict[str, tuple[dict[str, Any], tuple[Any, list[str], int]]] = {
    "number": ({"question": "Q?", "choices": THREE, "answer": 2}, ("Question: Q?\nAnswer:", THREE, 2)),
    "letter": ({"context": "It is", "choices": THREE, "answer": "b"}, ("It is", THREE, 1)),
    "text": ({"context": "It is", "choices": THREE, "answer": "blue"}, ("It is", THREE, 2)),
    "text that is a number": ({"context": "1+1=", "choices": ["1", "2", "3"], "answer": "2"},
                              ("1+1=", ["1", "2", "3"], 1)),
    "ARC": ({"id": "x", "question": "Q?", "choices": {"text": THREE, "label": ["1", "2", "3"]}, "answerKey": "1"},
            ("Question: Q?\nAnswer:", THREE, 0)),
    "HellaSwag": ({"ctx": "A man", "ctx_a": "A", "endings": THREE, "label": "1"}, ("A man", THREE, 1)),
    "passage": ({"context": "P.", "question": "Q?", "choices": ["no", "yes"], "answer": True},
                ("P.\nQuestion: Q?\nAnswer:", ["no", "yes"], 1)),
    "chat": ({"messages": [{"role": "user", "content": "Q?"}], "choices": THREE, "answer": 0},
             ([{"role": "user", "content": "Q?"}], THREE, 0)),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_choices_come_in_many_shapes(name: str) -> None:
    row, expected = ROWS[name]
    assert choices(row) == expected


def test_columns_of_choices_can_be_named_and_rows_can_be_compared_with_training_data() -> None:
    row = {"stem": "Q?", "options": THREE, "key": "C"}
    fields = {"question": "stem", "choices": "options", "answer": "key"}
    assert choices(row, fields=fields)[1:] == (THREE, 2)
    source = Source.model_validate({"path": "x", "format": "multiple_choice", "fields": fields})
    assert parse_row(row, source) == Text(" blue", "Question: Q?\nAnswer:")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "Q?", "choices": THREE}, "has no answer"),
        ({"choices": THREE, "label": ""}, "has no question or context .*, no answer"),
        ({"question": "Q?", "choices": ["red"], "answer": 0}, "'choices' is not a list of two texts"),
        ({"question": "Q?", "choices": ["red", ""], "answer": 0}, "'choices' is not a list of two texts"),
        ({"question": "Q?", "choices": THREE, "answer": 3}, "its answer 3 is none of its 3 choices"),
        ({"question": "Q?", "choices": THREE, "answer": "-1"}, "its answer '-1' is none"),
        ({"question": "Q?", "choices": THREE, "answer": "purple"}, "its answer 'purple' is none"),
        ({"messages": [{"role": "assistant", "content": "x"}], "choices": THREE, "answer": 1}, "end with an answer"),
    ],
)
def test_a_row_without_choices_is_told(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        choices(row)


@pytest.fixture
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    """Fresh for each test, so that a test may change its template."""
    return AutoTokenizer.from_pretrained(tiny_model)


def test_a_context_and_a_choice_are_cut_where_the_context_ends(tokenizer: PreTrainedTokenizerBase) -> None:
    context, choice = encode_pair(tokenizer, "The quick brown  ", "fox jumps")
    assert (tokenizer.decode(context), tokenizer.decode(choice)) == ("The quick brown", "  fox jumps")
    assert encode_pair(tokenizer, "", "fox")[0] == [tokenizer.eos_token_id]


def recipe_with(recipe: dict[str, Any], *tasks: dict[str, Any], **retention: Any) -> Recipe:
    return parse_recipe(recipe | {"retention": {"tasks": list(tasks)} | retention})


def test_a_chat_is_asked_by_the_template_and_its_choices_are_the_turn(
    recipe: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [{"messages": [{"role": "user", "content": "Which?"}], "choices": THREE, "answer": 0, "from": "a"}]
    task = {"name": "chat", "kind": "multiple_choice", "data": str(write_jsonl(tmp_path / "c.jsonl", rows))}
    (prepared,) = prepare_tasks(recipe_with(recipe, task | {"cluster_field": "from"}), tokenizer)
    context, choice = prepared.items[0].pairs[1]
    assert tokenizer.decode(context) == "<|im_start|>user\nWhich?<|im_end|>\n<|im_start|>assistant"
    assert tokenizer.decode(choice) == "\ngreen"  # lm-eval moves the space at the end of a context there
    assert (prepared.chance, prepared.metric, prepared.max_drop) == (pytest.approx(1 / 3), "acc", 0.02)
    assert prepared.items[0].cluster == "a"
    with pytest.raises(BadInput, match="has no 'topic', which cluster_field names"):
        prepare_tasks(recipe_with(recipe, task | {"cluster_field": "topic"}), tokenizer)


# Chat templates


TEMPLATES = {
    "llama 2": ("{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %}"
                " {{ m['content'] }} <|im_end|>{% endif %}{% endfor %}"),
    "no prompt": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}",
    "deaf": "{% for m in messages %}{{ m['role'] }}<|im_end|>{% endfor %}{{ '>' if add_generation_prompt }}",
    "fails": "{{ raise_exception('only two turns') if add_generation_prompt }}{{ messages[0]['content'] }}",
    "text": ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n###\n{% endfor %}"
             "{{ 'assistant: ' if add_generation_prompt }}"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("llama 2", None),
        ("text", None),
        ("no prompt", r"begins no answer: it ignores add_generation_prompt, and writes '<\|im_start\|>assistant'"),
        ("deaf", "leaves its last message .* out of the prompt"),
        ("fails", "the chat template fails on it: TemplateError: only two turns"),
    ],
)
def test_a_template_that_cannot_ask_is_told_with_task_and_row(
    recipe: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerBase, name: str, told: str | None
) -> None:
    tokenizer.chat_template = TEMPLATES[name]
    file = write_jsonl(tmp_path / "chats.jsonl", chats(2))
    task = {"name": "answers", "kind": "generate", "data": str(file)}
    if told is None:
        assert len(prepare_tasks(recipe_with(recipe, task), tokenizer)[0].items) == 2
    else:
        with pytest.raises(BadInput, match=rf"task answers: {file} row 1: .*{told}"):
            prepare_tasks(recipe_with(recipe, task), tokenizer)


def test_answers_end_where_the_template_ends_a_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_of_turn(tokenizer) == ((end,), ())
    end_of_turn.cache_clear()  # the tokenizer has changed, which it does not in a run
    tokenizer.chat_template = TEMPLATES["text"]
    assert end_of_turn(tokenizer) == ((), ("###",))
    end_of_turn.cache_clear()


# The time budget


@pytest.mark.parametrize(
    ("overhead", "asked", "base_seconds", "expected"),
    [
        (0.1, None, 25.0, (20, 1.0)),  # 10 s of 100 for evaluations of 2.5 s: four between first and last
        (0.1, None, 1000.0, (None, 1.0)),  # not even one
        (1.0, None, 0.001, (5, 1.0)),  # at most 20
        (0.1, 10, 25.0, (10, 10 / (9 * 2.5))),
        (1.0, 10, 1.0, (10, 1.0)),
        (0.1, 10, None, (10, 1.0)),
    ],
)
def test_the_budget_picks_how_often_or_how_many(
    overhead: float, asked: int | None, base_seconds: float | None, expected: tuple[int | None, float]
) -> None:
    base = base_seconds / 10 if base_seconds else None
    every, share = decide(overhead, asked, total=100, step_seconds=1.0, base_seconds=base)
    assert (every, share) == (expected[0], pytest.approx(expected[1]))
    looks = (100 - 1) // every if every else 0
    assert looks <= 20
    assert base is None or looks * share * base <= overhead * 100 + 1e-9


def test_the_part_of_the_items_makes_up_for_what_does_not_depend_on_them() -> None:
    _, share = decide(0.1, 10, total=100, step_seconds=1.0, base_seconds=4.0, fixed_seconds=1.0)
    assert 9 * (1 + share * 3) == pytest.approx(10)
    assert decide(0.1, 10, total=100, step_seconds=1.0, base_seconds=4.0, fixed_seconds=2.0) == (10, 0.0)


def test_a_part_of_the_items_is_the_same_each_time_and_twenty_at_least() -> None:
    items = [Item(f"{(number * 7919) % 1000:04d}", number) for number in range(200)]
    part = part_of(items, 0.25)
    assert part == part_of(items, 0.25)
    assert [item.number for item in part] == sorted(item.number for item in part)
    assert len(part) == 50
    assert {item.key for item in part_of(items, 0.3)} > {item.key for item in part}
    assert len(part_of(items, 0.001)) == 20
    assert part_of(items[:7], 0.001) == items[:7]


def test_a_suite_that_takes_longer_than_the_training_is_refused(recipe: dict[str, Any], tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "p.jsonl", chats(20))
    task = {"name": "answers", "kind": "generate", "data": str(file), "max_new_tokens": 100}
    parsed = recipe_with(recipe, task, every_steps=1)
    inputs = preflight(parsed, 1)  # a tiny model: only a warning
    assert any("5 evaluations would take longer than the training" in warning for warning in inputs.warnings)
    once = evaluation_tokens(inputs.suite.tasks)
    assert once == sum(len(item.prompt) + 1000 for item in inputs.suite.tasks[0].items)
    (problem,), _ = too_long(parsed, inputs.suite.tasks, once / 3, 4, 10**12, 1, True)
    for told in (f"5 × {once:,}", f"against {once:,}", "answers (100%)", "retention.every_steps", "max_overhead"):
        assert told in problem
    assert too_long(parsed, inputs.suite.tasks, once * 5 / 3, 4, 10**12, 1, True) == ([], [])
    (problem,), _ = too_long(parsed, inputs.suite.tasks, once / 3, 4, 10**12, 1, True, 3 * once)
    assert f"5 × {4 * once:,}" in problem
    assert "retention.kl_tokens (75%), answers (25%)" in problem
    assert inputs.divergence.tokens > 0
    budgeted = recipe_with(recipe, task, every_steps=1, max_overhead=0.1)
    assert too_long(budgeted, inputs.suite.tasks, once / 3, 4, 10**12, 1, True) == ([], [])


def test_choices_that_share_an_input_cost_one(
    recipe: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [{"context": f"{text} Answer:", "choices": ["A", "B", "C", "D"], "answer": 0} for text in TEXTS]
    task = {"name": "letters", "kind": "multiple_choice", "data": str(write_jsonl(tmp_path / "q.jsonl", rows))}
    (prepared,) = prepare_tasks(recipe_with(recipe, task), tokenizer)
    assert [len(choice) for _, choice in prepared.items[0].pairs] == [2, 2, 2, 2]  # a space, and a letter
    assert evaluation_tokens([prepared]) == sum(len(item.pairs[0][0]) + 1 for item in prepared.items)


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_tasks_measured_otherwise_are_not_compared_with(recipe: dict[str, Any]) -> None:
    def suite(width: int) -> Suite:
        chosen = parse_recipe(recipe, [f"data.sequence_length={width}", f"data.validation={recipe['data']['train']}"])
        return Suite(chosen, AutoTokenizer.from_pretrained(recipe["model"]["path"]))

    before, now = suite(32), suite(16)
    file = now.folder / "suite.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(baseline.describe(before)))
    baseline.require_same(before, before.folder)
    with pytest.raises(BadInput, match=r"task validation: the tokens of its items \(data.sequence_length, "):
        baseline.require_same(now, now.folder)
    of_old_version = baseline.describe(before)
    for key in ("tokens_sha256", "max_new_tokens", "answer_pattern"):
        del of_old_version["tasks"]["validation"][key]
    file.write_text(json.dumps(of_old_version))
    baseline.require_same(now, now.folder)
    file.write_text("{")
    with pytest.raises(BadInput, match="cannot be read"):
        baseline.require_same(now, now.folder)


@pytest.mark.usefixtures("one_rank")
def test_the_budget_is_decided_once_and_known_after_a_resume(recipe: dict[str, Any]) -> None:
    def start(overhead: float) -> Budget:
        budget = Budget(parse_recipe(recipe | {"retention": {"max_overhead": overhead}}))
        budget.total_steps = 100
        return budget

    budget = start(0.1)
    budget.took(0, 2.0)  # five evaluations in the 10 s that they may take
    assert not any(budget.is_due(step, 1.0 if step > 1 else 60.0) for step in range(1, 17))
    assert budget.is_due(17, 1.0)
    assert budget.every_steps == 17
    budget.took(17, 1.7)
    assert budget.share_of_training == pytest.approx(1.7 / 76)
    resumed = start(0.1)
    assert resumed.is_due(34, 99.0)
    assert not resumed.is_due(35, 99.0)
    other = start(1.0)  # another wish is another decision, from the same evaluation
    assert not any(other.is_due(step, 1.0) for step in range(35, 40))
    assert other.every_steps == 5
    assert other.is_due(100, 1.0)


def test_progress_is_told_with_the_time_that_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    for shown in (True, False):
        with progress(4, "wiki", " batches", seconds=0, shown=shown) as advance:
            advance(1)
    assert re.fullmatch(r"wiki: 25% after \d+ s, about \d+ s left\n", capsys.readouterr().out)


@pytest.mark.ranks
def test_evaluations_keep_to_their_budget(recipe: dict[str, Any], tmp_path: Path, launch: Launch) -> None:
    texts = [{"text": f"{text} {number}"} for number in range(8) for text in TEXTS]
    recipe["retention"] = {
        "tasks": [{"name": "texts", "kind": "text", "data": str(write_jsonl(tmp_path / "t.jsonl", texts))}],
        "every_steps": 2, "max_overhead": 1e-6,
    }  # fmt: skip
    done = launch(recipe)
    run = Path(recipe["run_dir"])
    budget = json.loads((run / "retention/budget.json").read_text())
    assert (budget["every_steps"], budget["share"] < 0.1) == (2, True)
    assert "evaluating every 2 steps, on " in done.stdout
    whole = items(run, 0, "texts")
    part = items(run, 2, "texts")
    assert (len(whole), len(part), len(items(run, 4, "texts"))) == (32, 20, 32)
    assert [row["hash"] for row in part] == [whole[row["item"]]["hash"] for row in part]
    reports = [json.loads((run / f"retention/step-{step:08d}.json").read_text()) for step in (0, 2, 4)]
    assert [report["whole"] for report in reports] == [True, False, True]


@pytest.mark.ranks
def test_answers_of_uneven_length_do_not_hang_an_evaluation_that_begins_with_them(
    tmp_path: Path, tiny_model: Path, recipe: dict[str, Any]
) -> None:
    """The first forwards after DeepSpeed's start are collectives even where the weights are whole."""
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_model), AutoModelForCausalLM.from_pretrained(tiny_model)
    answers = {}
    for row in chats(30):
        asked = tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True, return_tensors="pt")
        answer = model.generate(**asked, max_new_tokens=8, do_sample=False)[0, asked["input_ids"].shape[1] :]
        answers[asked["input_ids"].shape[1]] = row, answer.tolist()
    _, (first, begun) = max(answers.items())  # the longest prompt is rank 0's, and its first token shall end an answer
    second = next(row for row, answer in answers.values() if begun[0] not in answer)
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": [begun[0]]}))
    data = str(write_jsonl(tmp_path / "p.jsonl", [first, second]))
    task = {"name": "answers", "kind": "generate", "data": data, "max_new_tokens": 8}
    recipe |= {"retention": {"tasks": [task], "generation_batch_size": 1}}
    config, out = write_recipe(recipe, tmp_path / "recipe.yaml"), tmp_path / "out"
    words = ["eval", str(config), "--model", str(tmp_path / "model"), "--out", str(out)]
    done = run_ranks(FULLFT, *words, ranks=2, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lengths = [len(tokenizer.encode(row["generation"])) for row in items(out, 0, "answers")]
    assert lengths[0] <= 1 < lengths[1]
