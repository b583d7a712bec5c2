"""What a user can give wrong: told before start with file, row, key and advice, exit code 2, no rank left hanging."""

from __future__ import annotations

import argparse
import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from conftest import REPOSITORY, chat, chats, torchrun, write_jsonl, write_recipe
from report_runs import write_run
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fullft import cli
from fullft.errors import BadInput
from fullft.preflight import preflight
from fullft.recipe import parse_recipe
from fullft.report.summary import model_card, write_report

TRAIN = str(REPOSITORY / "launch" / "train.py")


def problems(recipe: dict[str, Any], *overrides: str, ranks: int = 2) -> list[str]:
    """What preflight says about a recipe that it must refuse."""
    with pytest.raises(BadInput) as caught:
        preflight(parse_recipe(copy.deepcopy(recipe), overrides), ranks)
    assert not torch.distributed.is_initialized()
    return caught.value.problems


def problem(recipe: dict[str, Any], *overrides: str, ranks: int = 2) -> str:
    """The only thing that is said."""
    (only,) = problems(recipe, *overrides, ranks=ranks)
    return only


def with_rows(recipe: dict[str, Any], rows: list[Any], **settings: Any) -> tuple[dict[str, Any], Path]:
    """The recipe with these training rows, and the file they are in."""
    file = write_jsonl(Path(recipe["run_dir"]).parent / "rows.jsonl", rows)
    return recipe | {"data": recipe["data"] | {"train": str(file)} | settings}, file


@pytest.fixture
def own_model(recipe: dict[str, Any], tmp_path: Path) -> Path:
    """A copy of the model to be broken, in the recipe already."""
    folder = tmp_path / "model"
    shutil.copytree(recipe["model"]["path"], folder)
    recipe["model"] = {"path": str(folder)}
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# Files


def test_a_good_recipe_passes(recipe: dict[str, Any]) -> None:
    inputs = preflight(parse_recipe(recipe), 2)
    assert inputs.total_steps == 4
    assert inputs.batches.sets[0].summary["documents"] == 40


def test_a_full_disk_is_told_unless_nothing_is_to_be_written(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: argparse.Namespace(free=1))
    with pytest.raises(BadInput, match=r"run_dir: .* GiB for checkpoints and export, 0\.0 GiB are free"):
        preflight(parse_recipe(recipe), 2)
    preflight(parse_recipe(recipe), 2, room=False)


USES: dict[str, Callable[[str], dict[str, Any]]] = {
    "data.train": lambda path: {"data": {"train": path}},
    "data.validation": lambda path: {"data": {"validation": path}},
    "retention.tasks": lambda path: {"retention": {"tasks": [{"name": "t", "kind": "text", "data": path}]}},
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", ["missing.jsonl", "missing-*.jsonl", "missing/rows.parquet"])
def test_a_missing_file_is_named(recipe: dict[str, Any], tmp_path: Path, use: str, name: str) -> None:
    for section, keys in USES[use](str(tmp_path / name)).items():
        recipe[section] = recipe.get(section, {}) | keys
    said = problem(recipe)
    assert str(tmp_path / name) in said
    assert "does not exist" in said


EMPTY = {
    "no byte.jsonl": b"", "no byte.json": b"", "no byte.parquet": b"", "blank lines.jsonl": b"\n \n",
    "no row.json": b"[]",
}  # fmt: skip


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", [*EMPTY, "no row.parquet"])
def test_a_file_without_rows_is_named(recipe: dict[str, Any], tmp_path: Path, use: str, name: str) -> None:
    file = tmp_path / name
    if name in EMPTY:
        file.write_bytes(EMPTY[name])
    else:
        datasets.Dataset.from_list(chats(2)).select([]).to_parquet(file)
    for section, keys in USES[use](str(file)).items():
        recipe[section] = recipe.get(section, {}) | keys
    said = problem(recipe)
    assert str(file) in said
    assert "empty" in said or "no row" in said


def test_a_file_without_rows_beside_one_that_has_some_is_named(recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "none.json").write_text("[]")
    recipe["data"]["train"] = [recipe["data"]["train"], str(tmp_path / "none.json")]
    assert str(tmp_path / "none.json") in problem(recipe)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.txt", b"text", "unknown kind"),
        ("a.jsonl.gz", b"\x1f\x8b", "unknown kind"),
        ("a.json", b'{"text": "a"}\n{"text": "b"}\n', "one object a line is a .jsonl file"),
        ("a.json", b'{"rows": []}', "list of rows"),
        ("a.json", b"[{]", "not valid JSON"),
        ("a.parquet", b"PAR1 not really", "not a Parquet file"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_named(
    recipe: dict[str, Any], tmp_path: Path, name: str, content: bytes, told: str
) -> None:
    (tmp_path / name).write_bytes(content)
    said = problem(recipe, f"data.train={tmp_path / name}")
    assert str(tmp_path / name) in said
    assert told in said


def test_a_parquet_file_damaged_in_the_middle_is_named(recipe: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    datasets.Dataset.from_list([chat(f"{i}?", f"It is {i * i}.") for i in range(500)]).to_parquet(file)
    content = bytearray(file.read_bytes())
    content[100:1000] = bytes(900)
    file.write_bytes(content)
    assert str(file) in problem(recipe, f"data.train={file}")


def test_a_folder_without_data_is_named(recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    assert str(tmp_path / "nothing") in problem(recipe, f"data.train={tmp_path / 'nothing'}")


def test_a_data_set_of_the_hub_that_cannot_be_reached_is_named(recipe: dict[str, Any]) -> None:
    said = problem(recipe, "data.train=owner/name")
    assert "owner/name" in said
    assert "cannot be loaded" in said


# Rows


def messages(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "text"} for role in roles]}


def message(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "text"}, {"role": "assistant"} | fields]}


BAD_ROWS: list[tuple[Any, str]] = [
    ("{broken", "not valid JSON"),
    ('{"messages": [', "not valid JSON"),
    ("nonsense", "not valid JSON"),
    ("[" * 20_000, "not valid JSON"),
    ([1, 2], "is a list, not an object"),
    ("null", "not an object"),
    ({}, "has fields none; expected messages, conversations, prompt + completion, instruction + output, "),
    ({"question": "1?", "answer": "one"}, "has fields 'question', 'answer'; expected messages, "),
    ({"messages": None}, "has fields 'messages'; expected"),
    ({"prompt": "1?"}, "expected messages, conversations, prompt + completion"),
    ({"instruction": "1?", "output": 3}, "'output' must be text"),
    ({"text": ""}, "'text' is not a text or is empty"),
    ({"text": 3}, "'text' is not a text"),
    ({"text": "half of a pair: \ud800"}, "Unicode"),
    ({"prompt": "1?", "completion": ""}, "'completion' is empty"),
    ({"prompt": "1?", "completion": [{"role": "assistant", "content": "one"}]}, "two texts or two lists"),
    ({"messages": "user: hi"}, "not a list of messages"),
    ({"messages": []}, "not a list of messages, or is empty"),
    ({"messages": ["hi"]}, "message 1 has no 'role'"),
    ({"messages": [{"from": "human", "value": "hi"}]}, "message 1 has no 'role'"),
    (messages("narrator", "gpt"), "message 1 has role 'narrator'; roles are system, developer, user, assistant, tool"),
    (message(), "message 2 (assistant) has no 'content'"),
    (message(content=3), "message 2"),
    (message(content={"text": "one"}), "message 2"),
    (message(content=[{"type": "image_url"}]), "message 2: a part of its content is 'image_url'; only text"),
    (message(content="one") | {"tools": "not json"}, "tools"),
    (messages("user"), "no assistant message to train on"),
    (messages("assistant"), "wrong role order: message 1 is 'assistant' after the start"),
    (messages("system", "assistant"), "wrong role order: message 2 is 'assistant' after system"),
    (messages("user", "user", "assistant"), "wrong role order: message 2 is 'user' after user"),
    (messages("user", "assistant", "assistant"), "wrong role order: message 3 is 'assistant' after assistant"),
    (messages("user", "assistant", "system"), "wrong role order: message 3 is 'system' after assistant"),
    (messages("user", "tool", "assistant"), "wrong role order: message 2 is 'tool' after user"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS, ids=[f"{n} {text[:40]}" for n, (_, text) in enumerate(BAD_ROWS)])
def test_a_row_that_cannot_be_used_is_told_with_file_row_reason_and_advice(
    recipe: dict[str, Any], row: Any, reason: str
) -> None:
    changed, file = with_rows(recipe, [*chats(2), row, *chats(1)])
    count, named = problems(changed)
    assert count == "1 of 4 rows cannot be used; mend them, or leave them out with data.on_bad_row=skip"
    assert named.startswith(f"{file} row 3: ")
    assert reason in named
    inputs = preflight(parse_recipe(changed, ["data.on_bad_row=skip"]), 2)
    kept = inputs.batches.sets[0].tokens
    assert kept.summary["bad_rows"] == 1
    assert list(kept.documents["row"]) == [1, 2, 4]
    assert any("1 rows that cannot be used are skipped" in warning for warning in inputs.warnings)


def test_a_line_that_is_not_utf8_is_told_with_its_row(recipe: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "latin1.jsonl"
    file.write_bytes(b'{"text": "gut"}\n' + '{"text": "müde"}\n'.encode("latin-1"))
    count, named = problems(recipe, f"data.train={file}")
    assert count.startswith("1 of 2 rows cannot be used")
    assert named.startswith(f"{file} row 2: ")


def test_all_bad_rows_are_counted_and_the_first_are_named(recipe: dict[str, Any]) -> None:
    rows = [{"question": i} if i % 2 else chat(f"{i}?", "even") for i in range(100)]
    changed, file = with_rows(recipe, rows)
    count, *named = problems(changed)
    assert count.startswith("50 of 100 rows cannot be used")
    assert f"the first {len(named)} are shown" in count
    assert [text.partition(": ")[0] for text in named] == [f"{file} row {2 * i + 2}" for i in range(len(named))]


def test_row_numbers_are_line_numbers_and_count_blank_lines(recipe: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "gaps.jsonl"
    file.write_text('\n{"text": "a"}\n\n\n{"tex": "b"}\n')
    assert problems(recipe, f"data.train={file}")[1].startswith(f"{file} row 5: ")


@pytest.mark.parametrize("kind", ["json", "parquet", "arrow folder", "glob"])
def test_rows_of_every_kind_of_file_are_told_with_file_and_row(
    recipe: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    rows = [{"text": "good", "more": 1}, {"text": "", "more": 2}]
    table = datasets.Dataset.from_list(rows)
    path = file = tmp_path / "rows.parquet"
    match kind:
        case "json":
            path = file = tmp_path / "rows.json"
            file.write_text(json.dumps(rows))
        case "parquet":
            table.to_parquet(file)
        case "arrow folder":
            path = file = tmp_path / "rows"
            table.save_to_disk(file)
        case "glob":
            path, file = tmp_path / "rows-*.jsonl", tmp_path / "rows-2.jsonl"
            write_jsonl(tmp_path / "rows-1.jsonl", [{"text": "good"}] * 5)
            write_jsonl(file, rows)
    count, named = problems(recipe, f"data.train={path}")
    assert count.startswith("1 of 7 rows" if kind == "glob" else "1 of 2 rows")
    assert named.startswith(f"{file} row 2: field 'text'")


def test_a_column_that_fields_names_wrongly_is_named(recipe: dict[str, Any]) -> None:
    changed, file = with_rows(recipe, [{"question": "1?", "answer": "one"}])
    source = {"path": str(file), "format": "alpaca", "fields": {"instruction": "question", "output": "anwser"}}
    _, named = problems(changed | {"data": changed["data"] | {"train": [source]}})
    assert named.startswith(f"{file} row 1: has no ")
    assert "'anwser'" in named  # what was asked for
    assert "'answer'" in named  # what there is


def test_a_field_of_ours_that_does_not_exist_is_told_with_its_key(recipe: dict[str, Any]) -> None:
    changed, file = with_rows(recipe, [{"question": "1?", "answer": "one"}])
    source = {"path": str(file), "fields": {"instrution": "question", "output": "answer"}}
    said = "\n".join(problems(changed | {"data": changed["data"] | {"train": [source]}}))
    assert "data.train.0.fields" in said
    assert "instruction" in said


@pytest.mark.parametrize("use", ["data.validation", "retention.tasks"])
def test_bad_rows_of_tasks_are_told_with_task_file_row_and_skipped_on_request(
    recipe: dict[str, Any], tmp_path: Path, use: str
) -> None:
    file = write_jsonl(tmp_path / "held-out.jsonl", [*chats(2), "{broken", messages("assistant")])
    for section, keys in USES[use](str(file)).items():
        recipe[section] = recipe.get(section, {}) | keys
    task = "validation" if use == "data.validation" else "t"
    count, *named = problems(recipe)
    assert f"task {task}: 2 of 4 rows cannot be used" in count
    assert all(f"task {task}: {file} row {row}: " in text for row, text in zip((3, 4), named, strict=True))
    inputs = preflight(parse_recipe(recipe, ["data.on_bad_row=skip"]), 2)
    assert [len(prepared.items) for prepared in inputs.suite.tasks] == [2]


# Nothing to train on, and too long


def test_nothing_left_to_train_on_when_all_rows_are_bad(recipe: dict[str, Any]) -> None:
    changed, file = with_rows(recipe, ["{broken", {"other": 1}], on_bad_row="skip")
    count, *named = problems(changed)
    assert count.startswith("2 of 2 rows cannot be used")
    assert "no row is left" in count
    assert [text.partition(": ")[0] for text in named] == [f"{file} row 1", f"{file} row 2"]


def test_nothing_left_to_train_on_when_the_template_drops_the_answers(recipe: dict[str, Any], own_model: Path) -> None:
    (own_model / "chat_template.jinja").write_text(
        "{%- for message in messages if message['role'] == 'user' %}{{- message['content'] }}{%- endfor %}"
        "{%- if messages[0]['role'] == 'assistant' %}{% generation %}{% endgeneration %}{%- endif %}"
    )
    changed, file = with_rows(recipe, chats(3))
    count, *named = problems(changed)
    assert count.startswith("3 of 3 rows cannot be used")
    assert named[0].startswith(f"{file} row 1: no token of it is trained")


@pytest.mark.parametrize("how", ["drop", "truncate", "split"])
def test_nothing_left_to_train_on_when_all_answers_are_cut_off(recipe: dict[str, Any], how: str) -> None:
    changed, _ = with_rows(recipe, [chat("words " * 100, "!")] * 3, sequence_length=32, on_too_long=how)
    if how == "split":  # the last piece holds the answer
        assert preflight(parse_recipe(changed), 2).batches.sets[0].summary["documents"] == 3
        return
    said = problem(changed)
    assert "nothing left to train on" in said
    assert "3 rows" in said
    assert "data.sequence_length" in said


def test_rows_above_the_limit_are_counted_with_the_longest_and_the_choices(recipe: dict[str, Any]) -> None:
    changed, _ = with_rows(recipe, [chat("1?", "one"), chat("2?", "two " * 90), chat("3?", "three " * 90)])
    inputs = preflight(parse_recipe(changed, ["data.sequence_length=512"]), 2)
    lengths = list(inputs.batches.sets[0].tokens.documents["length"])
    said = problem(changed, "data.sequence_length=100")
    assert said.startswith("data.sequence_length: 2 of 3 rows have more than 100 tokens")
    assert f"the longest {max(lengths)}" in said
    assert "data.on_too_long=drop, truncate or split" in said


def test_training_and_evaluation_data_are_told_together(recipe: dict[str, Any]) -> None:
    changed, file = with_rows(recipe, [chat("1?", "one"), "{broken"], validation="nowhere/v.jsonl")
    said = problems(changed)
    assert any("nowhere/v.jsonl does not exist" in text for text in said)
    changed["data"]["validation"] = str(write_jsonl(file.with_name("v.jsonl"), ["{broken too"]))
    said = problems(changed)
    assert any(text.startswith("task validation: 1 of 1 rows") for text in said)
    assert any(text.startswith("1 of 2 rows cannot be used") for text in said)


def test_bad_and_too_long_rows_are_told_together(recipe: dict[str, Any]) -> None:
    changed, _ = with_rows(recipe, [chat("1?", "one"), chat("2?", "two " * 90), "{broken"], sequence_length=100)
    said = problems(changed)
    assert len(said) == 3
    assert any(text.startswith("1 of 3 rows cannot be used") for text in said)
    assert any(text.startswith("data.sequence_length: 1 of 3") for text in said)


def test_chats_without_a_chat_template_are_refused_and_texts_are_not(recipe: dict[str, Any], own_model: Path) -> None:
    (own_model / "chat_template.jinja").unlink()
    said = problem(recipe)
    assert f"{recipe['data']['train']} row 1" in said
    assert "no chat template" in said
    assert "chat_template.jinja" in said
    changed, _ = with_rows(recipe, [{"text": "plain"}, {"prompt": "1?", "completion": " one"}])
    assert preflight(parse_recipe(changed), 2).batches.sets[0].summary["documents"] == 2


def test_a_row_that_the_chat_template_refuses_is_told_with_its_words(recipe: dict[str, Any], own_model: Path) -> None:
    template = own_model / "chat_template.jinja"
    refuse = "{%- if messages[0]['role'] == 'system' %}{{- raise_exception('no system turn, please') }}{%- endif %}"
    template.write_text(refuse + template.read_text())
    changed, file = with_rows(recipe, [messages("user", "assistant"), messages("system", "user", "assistant")])
    _, named = problems(changed)
    assert named.startswith(f"{file} row 2: ")
    assert "no system turn, please" in named


def test_a_row_on_which_the_chat_template_fails_is_told(recipe: dict[str, Any], own_model: Path) -> None:
    template = own_model / "chat_template.jinja"
    template.write_text("{%- set first = messages[0]['content'] + 1 %}" + template.read_text())
    changed, file = with_rows(recipe, [messages("user", "assistant")])
    assert problems(changed)[1].startswith(f"{file} row 1: ")


# The model


def test_a_missing_model_folder_is_told_once(recipe: dict[str, Any], tmp_path: Path) -> None:
    said = problem(recipe, f"model.path={tmp_path / 'nowhere'}")
    assert said.startswith(f"model.path: {tmp_path / 'nowhere'} is not a folder")


def test_a_model_of_the_hub_that_cannot_be_reached_is_named(recipe: dict[str, Any]) -> None:
    said = problem(recipe, "model.path=owner/name")
    assert said.startswith("model.path: owner/name")


def lose_layers(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=1)


def ask_for_layers(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=3)


def ask_for_width(folder: Path) -> None:
    edit_config(folder, intermediate_size=99)


def lose_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def point_to_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama",')


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lose_layers, "model.layers.1."),
        (ask_for_layers, "model.layers.2."),
        (ask_for_width, "config says [99, 32]"),
        (lose_a_tensor, "model.norm.weight"),
        (cut_weights, "model.safetensors cannot be read"),
        (point_to_weights, "model.safetensors cannot be read"),
        (break_config, "config"),
        (lambda folder: edit_config(folder, model_type="nosuch", architectures=["NoSuch"]), "nosuch"),
        (lambda folder: edit_config(folder, num_attention_heads=7), "config"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer"),
    ],
    ids=[
        "more layers than the config", "fewer layers", "other shapes", "a tensor missing", "weights cut off",
        "git-lfs pointer", "config not JSON", "unknown kind of model", "impossible config", "no config", "no weights",
        "no tokenizer", "broken tokenizer",
    ],
)  # fmt: skip
def test_a_model_folder_that_does_not_fit_together_is_told(
    recipe: dict[str, Any], own_model: Path, damage: Callable[[Path], Any], told: str
) -> None:
    damage(own_model)
    said = problem(recipe)
    assert said.startswith("model.path: ")
    assert str(own_model) in said
    assert told in said


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_told(recipe: dict[str, Any], own_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(own_model)
    tokenizer.add_tokens(["one", "two"])
    tokenizer.save_pretrained(own_model)
    said = problem(recipe)
    assert said.startswith("model.path: ")
    assert "301" in said  # highest id
    assert "300" in said  # rows


# Settings against each other


@pytest.mark.parametrize(
    ("size", "micro", "ranks", "choices"), [(10, 2, 2, "8 or 12"), (2, 1, 4, "4"), (4, 3, 2, "6"), (7, 1, 3, "6 or 9")]
)
def test_a_global_batch_that_the_ranks_cannot_share_is_told_with_those_they_can(
    recipe: dict[str, Any], size: int, micro: int, ranks: int, choices: str
) -> None:
    overrides = (f"train.global_batch_size={size}", f"train.micro_batch_size={micro}")
    said = problem(recipe, *overrides, ranks=ranks)
    assert said.startswith(f"train.global_batch_size: {size} ")
    assert f"{ranks} ranks" in said
    assert f"train.micro_batch_size {micro}" in said
    assert said.endswith(f"e.g. {choices}")


@pytest.fixture
def used_folder(recipe: dict[str, Any]) -> Path:
    """The recipe's run folder as a run of it leaves it."""
    folder = Path(recipe["run_dir"])
    folder.mkdir()
    (folder / "recipe.yaml").write_text(parse_recipe(copy.deepcopy(recipe)).to_yaml())
    (folder / "metrics.jsonl").write_text("{}\n")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_run_folder_of_another_recipe_is_refused_with_what_differs(recipe: dict[str, Any], used_folder: Path) -> None:
    before = contents(used_folder)
    said = problem(recipe, "train.learning_rate=0.5", "data.packing=false")
    assert said.startswith(f"run_dir: {used_folder} belongs to another recipe")
    assert "train.learning_rate was 0.001, is 0.5" in said
    assert "data.packing was True, is False" in said
    assert "seed" not in said
    assert "choose another run_dir" in said
    assert contents(used_folder) == before


def test_a_run_folder_of_the_same_recipe_is_gone_on_with(recipe: dict[str, Any], used_folder: Path) -> None:
    assert used_folder.exists()
    preflight(parse_recipe(recipe, ["train.micro_batch_size=2", "checkpoint.keep=5"]), 1)


def test_a_used_run_folder_is_refused_when_it_may_not_be_resumed(recipe: dict[str, Any], used_folder: Path) -> None:
    said = problem(recipe, "checkpoint.resume=never")
    assert said.startswith(f"run_dir: {used_folder} ")
    assert "checkpoint.resume" in said


def test_a_run_that_failed_before_its_first_step_leaves_its_folder_to_a_mended_recipe(
    recipe: dict[str, Any], used_folder: Path
) -> None:
    (used_folder / "metrics.jsonl").unlink()
    preflight(parse_recipe(recipe, ["train.learning_rate=0.5"]), 1)


def test_a_check_on_a_login_node_plans_for_gpus(recipe: dict[str, Any]) -> None:
    for on_gpu, bytes_a_parameter in ((True, 16), (False, 20)):
        inputs = preflight(parse_recipe(copy.deepcopy(recipe)), 4, on_gpu=on_gpu)
        shard = -(-inputs.facts.parameters // 4)
        # norms stay whole
        assert inputs.plan["device_bytes_per_rank"] == pytest.approx(bytes_a_parameter * shard, rel=0.01)
        assert inputs.deepspeed_config["bf16"]["enabled"] is on_gpu
    accumulating = preflight(parse_recipe(copy.deepcopy(recipe)), 2, on_gpu=True)
    shard = -(-accumulating.facts.parameters // 2)
    assert accumulating.plan["device_bytes_per_rank"] == pytest.approx(18 * shard, rel=0.01)


def test_room_is_planned_for_the_newest_the_best_and_the_one_being_written(recipe: dict[str, Any]) -> None:
    plain = preflight(parse_recipe(copy.deepcopy(recipe), ["checkpoint.keep=2"]), 1).plan
    exported = plain["run_folder_bytes"] - 3 * plain["checkpoint_bytes"]
    assert exported == 4 * plain["parameters"]
    local = parse_recipe(copy.deepcopy(recipe), ["checkpoint.use_node_local_storage=true"])
    of_node = preflight(local, 4, ranks_per_node=1).plan  # of 4, each with its part
    assert of_node["run_folder_bytes"] == pytest.approx(3 * plain["checkpoint_bytes"] / 4 + exported, abs=3)
    recipe["data"]["validation"] = recipe["data"]["train"]
    best = preflight(parse_recipe(recipe, ["retention.every_steps=1"]), 1).plan
    assert best["run_folder_bytes"] == plain["run_folder_bytes"] + plain["checkpoint_bytes"]
    seldom = preflight(parse_recipe(recipe, ["retention.max_overhead=0.1"]), 1).plan  # how often is decided later
    assert seldom["run_folder_bytes"] == best["run_folder_bytes"]
    recipe["retention"] = {"every_steps": 1, "gate": {"action": "stop"}, "tasks": [
        {"name": "general", "kind": "text", "data": recipe["data"]["train"]}
    ]}  # fmt: skip
    good = preflight(parse_recipe(recipe), 1).plan  # that of before a loss
    assert good["run_folder_bytes"] == best["run_folder_bytes"] + plain["checkpoint_bytes"]


def test_what_is_allowed_and_hardly_meant_is_a_warning(recipe: dict[str, Any]) -> None:
    assert preflight(parse_recipe(copy.deepcopy(recipe)), 2).warnings == []
    overrides = ["train.global_batch_size=64", "train.warmup_steps=4"]
    batch, warmup = preflight(parse_recipe(recipe, overrides), 2).warnings
    assert batch.startswith("train.global_batch_size is 64")
    assert warmup.startswith("train.warmup_steps is 4 of 4 steps")


@pytest.mark.parametrize("content", ["run_dir: a\nkey_of_another_version: 1\n", "{cut off", ""])
def test_a_run_folder_whose_recipe_cannot_be_compared_is_refused_by_name(
    recipe: dict[str, Any], used_folder: Path, content: str
) -> None:
    (used_folder / "recipe.yaml").write_text(content)
    for said in problems(recipe):
        assert said.startswith(f"run_dir: {used_folder} ")


@pytest.mark.parametrize("key", ["run_dir", "data.cache_dir"])
def test_a_folder_that_cannot_be_made_is_told_with_its_key(recipe: dict[str, Any], key: str) -> None:
    file = recipe["data"]["train"]
    said = problem(recipe, f"{key}={file}/below-a-file")
    assert said.startswith(f"{key}: ")
    assert file in said


def test_a_folder_or_file_that_is_no_run_is_not_touched(recipe: dict[str, Any], tmp_path: Path) -> None:
    thesis = tmp_path / "documents" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("three years of work")
    for path in (thesis.parent, thesis):
        said = problem(recipe, f"run_dir={path}")
        assert said.startswith(f"run_dir: {path} exists")
    assert contents(tmp_path / "documents") == {str(thesis): b"three years of work"}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "does not exist"),
        ("{", "not valid JSON"),
        ("[]", "deepspeed: "),
        ('{"zero_optimization": 3}', "deepspeed: "),
        ('{"zero_optimization": {"stage": 2}}', "stage 2"),
        ('{"zero_optimization": {"stage": 3}, "optimizer": {"type": "Adam"}}', "'optimizer'"),
    ],
)
def test_a_deepspeed_configuration_that_cannot_serve_is_named(
    recipe: dict[str, Any], tmp_path: Path, content: str | None, told: str
) -> None:
    file = tmp_path / "deepspeed.json"
    if content is not None:
        file.write_text(content)
    said = problem(recipe, f"deepspeed={file}")
    assert said.startswith("deepspeed: ")
    assert str(file) in said
    assert told in said


def test_a_pattern_that_is_not_in_the_reference_answers_is_told(recipe: dict[str, Any], tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "sums.jsonl", [chat("1 + 1?", "#### 2"), chat("1 + 2?", "3")])
    task = {"name": "sums", "kind": "generate", "data": str(file), "answer_pattern": r"#### (\d+)"}
    recipe["retention"] = {"tasks": [task]}
    said = problems(recipe)
    assert any(f"task sums: {file} row 2: answer_pattern" in text for text in said)


def wrong_everywhere(recipe: dict[str, Any], folder: Path) -> tuple[dict[str, Any], list[str]]:
    """A recipe with a mistake of each kind, and how each is told."""
    (folder / "used").mkdir()
    (folder / "used" / "notes.txt").write_text("")
    (folder / "empty.jsonl").write_text("")
    recipe = recipe | {
        "run_dir": str(folder / "used"),
        "model": {"path": str(folder / "no-model")},
        "data": {"train": [str(folder / "no.jsonl"), str(folder / "empty.jsonl")], "validation": str(folder / "v.txt")},
        "train": recipe["train"] | {"global_batch_size": 5, "micro_batch_size": 2},
        "deepspeed": "no-deepspeed.json",
    }
    return recipe, [
        f"run_dir: {folder / 'used'}", f"model.path: {folder / 'no-model'}", f"{folder / 'no.jsonl'} does not exist",
        f"{folder / 'empty.jsonl'} is empty", f"{folder / 'v.txt'}", "train.global_batch_size: 5",
        "deepspeed: no-deepspeed.json",
    ]  # fmt: skip


def test_problems_of_every_kind_are_told_at_once(recipe: dict[str, Any], tmp_path: Path) -> None:
    wrong, told = wrong_everywhere(recipe, tmp_path)
    said = problems(wrong, ranks=1)
    assert len(said) == len(told)
    for text in told:
        assert sum(text in line for line in said) == 1


# The program


def test_problems_from_a_worker_process_are_still_several() -> None:
    assert pickle.loads(pickle.dumps(BadInput(["one", "two"]))).problems == ["one", "two"]


def test_bad_input_ends_a_plain_process_with_code_2_and_every_problem_once(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    wrong, told = wrong_everywhere(recipe, tmp_path)
    config = write_recipe(wrong, tmp_path / "recipe.yaml")
    command = [sys.executable, TRAIN, "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False)
    assert done.returncode == 2, done.stderr
    assert f"{len(told)} problems, training was not started" in done.stderr
    for text in told:
        assert sum(text in line for line in done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in (tmp_path / "used").iterdir()) == ["notes.txt"]


def test_a_recipe_with_unknown_keys_ends_with_code_2_before_anything_heavy_is_imported(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    config = write_recipe(recipe, tmp_path / "recipe.yaml")
    command = [sys.executable, "-X", "importtime", TRAIN, "--config", str(config), "train.lr=1", "data.pakcing=no"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False)
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2
    assert said == [
        "fullft: 2 problems, training was not started:",
        "  - data.pakcing: unknown key; did you mean data.packing?",
        "  - train.lr: unknown key; it is called train.learning_rate here",
    ]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert not imported & {"torch", "deepspeed", "transformers", "datasets"}


@dataclass(frozen=True)
class Ended:
    """A run of several ranks that has ended, and what it left."""

    code: int
    stdout: str
    stderr: str
    left: list[str]  # processes still there


def run_ranks(recipe: dict[str, Any], folder: Path, ranks: int = 2) -> Ended:
    config = write_recipe(recipe, folder / "recipe.yaml")
    command = [*torchrun(ranks), TRAIN, "--config", str(config)]
    out, err = folder / "stdout", folder / "stderr"
    with out.open("w") as stdout, err.open("w") as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, start_new_session=True, cwd=folder)
        code = process.wait(240)
    left = subprocess.run(["pgrep", "-a", "-s", str(process.pid)], capture_output=True, text=True, check=False).stdout
    return Ended(code, out.read_text(), err.read_text(), left.splitlines())


@pytest.mark.ranks
def test_bad_input_ends_all_ranks_and_is_told_once(recipe: dict[str, Any], tmp_path: Path) -> None:
    changed, file = with_rows(recipe, [*chats(3), "{broken"])
    ended = run_ranks(changed, tmp_path)
    assert ended.code != 0
    assert ended.stderr.count("training was not started") == 1
    assert ended.stderr.count(f"{file} row 4: not valid JSON") == 1
    assert "exitcode  : 2" in ended.stderr  # what torchrun says of the rank
    assert ended.left == []
    assert not Path(recipe["run_dir"]).exists()


POISON = "~"  # a letter of which the model's embedding is infinite


@dataclass(frozen=True)
class Stopped:
    """A run of 2 ranks that met a row on which the loss is not finite."""

    ended: Ended
    run: Path
    file: Path  # the second of two files of a glob
    row: int  # in that file


@pytest.fixture(scope="module")
def stopped(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    folder = tmp_path_factory.mktemp("not-finite")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    embedding = model.get_input_embeddings().weight.detach().clone()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(embedding.clone())
    (token,) = tokenizer(POISON, add_special_tokens=False)["input_ids"]
    embedding[token] = torch.inf
    model.model.embed_tokens.weight = torch.nn.Parameter(embedding)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")

    rows = chats(40)
    recipe: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "model": {"path": str(folder / "model")},
        "data": {"train": str(folder / "part-*.jsonl"), "sequence_length": 128, "packing": False},
        "train": {"steps": 8, "global_batch_size": 4, "learning_rate": 1e-4, "warmup_steps": 0},
        "checkpoint": {"every_steps": 2},
        "tracking": {"wandb": "disabled"},
    }
    write_jsonl(folder / "part-1.jsonl", rows[:20])
    write_jsonl(folder / "part-2.jsonl", rows[20:])
    batches = preflight(parse_recipe(copy.deepcopy(recipe)), 2).batches
    chosen = next(index for _, index in batches.sequences_of_step(3) if index >= 20)  # in step 4, from the second file
    rows[chosen] = chat("Say it.", f"It {POISON} is.")
    file = write_jsonl(folder / "part-2.jsonl", rows[20:])
    return Stopped(run_ranks(recipe, folder), folder / "run", file, chosen - 20 + 1)


@pytest.mark.ranks
def test_a_loss_that_is_not_finite_stops_all_ranks_and_names_step_and_last_good_checkpoint(stopped: Stopped) -> None:
    ended = stopped.ended
    assert ended.code != 0
    assert ended.left == []
    (line,) = (line for line in ended.stderr.splitlines() if "training stopped at" in line)
    assert "step 4: " in line
    assert "not finite" in line
    assert f"Last good checkpoint: {stopped.run / 'checkpoints' / 'step-00000002'}" in line
    assert str(stopped.run / "failure" / "step-00000004") in line
    assert "fullft: failed on" not in ended.stderr  # it is an end foreseen, without traces of our calls
    assert "exitcode  : 1" in ended.stderr


@pytest.mark.ranks
def test_after_a_loss_that_is_not_finite_nothing_more_is_written(stopped: Stopped) -> None:
    assert [path.name for path in (stopped.run / "checkpoints").iterdir()] == ["step-00000002"]
    steps = [json.loads(line) for line in (stopped.run / "metrics.jsonl").read_text().splitlines()]
    assert [row["train/global_step"] for row in steps if "train/loss" in row] == [1, 2, 3]
    assert not (stopped.run / "export").exists()
    assert json.loads((stopped.run / "state.json").read_text())["status"] != "done"


@pytest.mark.ranks
def test_the_batch_of_a_loss_that_is_not_finite_is_saved_with_file_and_row(stopped: Stopped) -> None:
    folder = stopped.run / "failure" / "step-00000004"
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    assert {"file": str(stopped.file), "row": stopped.row} in rows
    saved = [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]
    ids = [batch["input_ids"] for rank in saved for batch in rank]
    assert sum(map(len, ids)) == 4
    (token,) = AutoTokenizer.from_pretrained(stopped.run.parent / "model")(POISON)["input_ids"]
    assert sum((batch == token).any().item() for batch in ids) == 1


# The command


@pytest.mark.parametrize(
    ("words", "overrides"),
    [
        ("check r.yaml train.steps=5 --resolved data.train=a.jsonl --world-size 2", "train.steps=5 data.train=a.jsonl"),
        ("blend run --sweep retention.tasks=[] --layer-scale x=0.5", "retention.tasks=[]"),
        ("--local_rank=0 eval r.yaml --model lr=1 --out x=1 --base=b=2 deepspeed=z.json", "deepspeed=z.json"),
        ("check r.yaml trian.steps=5", "trian.steps=5"),  # told as an unknown key
        ("eval runs=old --model m train.steps=5", "train.steps=5"),  # a folder
        ("submit r.yaml --dry-run train.steps=5", "train.steps=5"),
        ("plan r.yaml --json train.steps=5 --search data.train=a.jsonl", "train.steps=5 data.train=a.jsonl"),
        ("report lr=1e-5 --out x=1.html", ""),
        ("export train.steps=5 out", ""),
    ],
)
def test_which_words_are_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, overrides: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs=old").mkdir()
    rest, found = cli.split_overrides(words.split())
    assert found == overrides.split()
    assert sorted(rest + found) == sorted(words.split())


def test_ctrl_c_on_ranks_says_that_it_was_stopped() -> None:
    script = "from fullft import cluster\ndef stop(me): raise KeyboardInterrupt\ncluster.run_on_ranks(stop, 'x')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr.strip()) == (1, "fullft: stopped; what is finished is kept")


# Run folders


def _cut(file: Path) -> None:
    file.write_text(file.read_text()[:-20])


def _without(key: str) -> Callable[[Path], None]:
    def remove(file: Path) -> None:
        content = json.loads(file.read_text())
        for one in content.get("points", [content]):
            one.pop(key)
        file.write_text(json.dumps(content))

    return remove


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("retention/step-00000150.json", _cut),
        ("retention/step-00000150.json", _without("tasks")),
        ("retention/step-00000150.json", lambda file: file.write_text("[1]")),
        ("recipe.yaml", lambda file: file.write_text("")),
        ("recipe.yaml", lambda file: file.write_text("a: [")),
        ("blend.json", _without("tasks")),
        ("blend.json", _without("alpha")),
        ("metrics.jsonl", lambda file: file.write_text('{"train/loss": 1.0}\n')),
        ("samples/step-00000300.gsm8k.jsonl", lambda file: file.write_text('{"correct": true}\n')),
    ],
)
def test_a_damaged_file_of_a_run_is_named_by_the_report_and_does_not_end_a_training(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    damage: Callable[[Path], Any],
) -> None:
    run, other = write_run(tmp_path / "run", blend=True), write_run(tmp_path / "other")
    (other / "recipe.yaml").write_text("")
    damage(run / name)
    monkeypatch.setattr(sys, "argv", ["fullft", "report", str(run), str(other), "--out", str(tmp_path / "a.html")])
    assert cli.main() == 2
    said = capsys.readouterr().err
    assert f"{run / name} is damaged" in said
    assert f"{other / 'recipe.yaml'} is damaged" in said
    assert write_report(run) == {}
    assert str(run / name) in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.html"))


def test_a_state_that_says_nothing_is_as_none(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "state.json").write_text('{"reason": "x"}')
    assert write_report(run)["state"] == {}


def test_a_report_overwrites_reports_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run")
    page = tmp_path / "page.html"

    def report(*runs: Path) -> int:
        monkeypatch.setattr(sys, "argv", ["fullft", "report", *map(str, runs), "--out", str(page)])
        return cli.main()

    for suffix, content in ((".json", '{"mine": 1}'), (".html", "<title>mine</title>")):
        mine = page.with_suffix(suffix)
        mine.write_text(content)
        assert report(run) == 2
        assert f"{mine} exists and is not a report of fullft" in capsys.readouterr().err
        assert mine.read_text() == content
        mine.unlink()
    assert report(run) == report(run) == report(run, run) == report(run, run) == 0
    content = json.loads(page.with_suffix(".json").read_text())
    assert content.keys() == {"format", "runs"}
    old = {key: value for key, value in content["runs"][0].items() if key != "format"}
    page.with_suffix(".json").write_text(json.dumps(old))
    assert report(run) == 0


def test_the_model_card_has_nothing_of_the_place_and_the_people(recipe: dict[str, Any]) -> None:
    recipe["tracking"] = {"notes": "a secret", "entity": "my-team", "group": "my-group"}
    for report in ({}, None):
        card = model_card(
            parse_recipe(recipe),
            {"steps": 3, "tokens": 9, "final_loss": 1.0, "before_after": [], "data": {}} if report is None else report,
        )
        assert "learning_rate" in card
        assert not [word for word in ("secret", "my-team", "my-group", recipe["run_dir"]) if word in card]
        assert ("3 steps, 9 tokens" in card) == (report is None)


@pytest.mark.slow
def test_an_installed_wheel_has_the_deepspeed_configurations(tmp_path: Path) -> None:
    words = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(tmp_path / "site")]
    source = tmp_path / "source"
    shutil.copytree(
        REPOSITORY, source, symlinks=True, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "*.egg-info", "build")
    )
    subprocess.run([sys.executable, "-m", "pip", *words, str(source)], check=True, timeout=240)
    script = (
        "from fullft import engine; from fullft.recipe import parse_recipe as p; print(engine.__file__); "
        "[engine.read_config(p({'run_dir': 'x', 'model': {'path': 'm'}, 'data': {'train': 'a'}, 'deepspeed': d})) "
        "for d in ('ds_configs/zero3.json', 'ds_configs/zero3_offload.json')]"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert found.stdout.startswith(str(tmp_path / "site"))
