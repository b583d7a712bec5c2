"""The recipe: its problems told all at once and by key, overrides, and what makes two runs the same experiment."""

from __future__ import annotations

import copy
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY

from fullft.errors import BadInput
from fullft.recipe import Recipe, Section, fingerprint, identity, load_recipe, parse_recipe

SMALLEST: dict[str, Any] = {
    "run_dir": "runs/a",
    "model": {"path": "models/a"},
    "data": {"train": [{"path": "a.jsonl"}, {"path": "b.jsonl", "format": "text"}]},
}


def parse(*overrides: str, **sections: Any) -> Recipe:
    """The smallest recipe with sections of it replaced."""
    return parse_recipe(copy.deepcopy(SMALLEST) | sections, overrides)


def problems(*overrides: str, **sections: Any) -> list[str]:
    with pytest.raises(BadInput) as caught:
        parse(*overrides, **sections)
    return caught.value.problems


def load(tmp_path: Path, text: str, *overrides: str) -> Recipe:
    (tmp_path / "recipe.yaml").write_text(text)
    return load_recipe(tmp_path / "recipe.yaml", overrides)


def refusal(tmp_path: Path, text: str) -> str:
    with pytest.raises(BadInput) as caught:
        load(tmp_path, text)
    return str(caught.value)


def keys_of(section: type[Section], prefix: str = "") -> list[tuple[str, Any]]:
    """Every dotted key below a section with pydantic's field information, sections themselves left out."""
    found: list[tuple[str, Any]] = []
    for name, field in section.model_fields.items():
        inner = sections_in(field.annotation)
        found += keys_of(inner[0], f"{prefix}{name}.") if inner else []
        if not inner or typing.get_origin(field.annotation):
            found.append((prefix + name, field))
    return found


def sections_in(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for argument in typing.get_args(annotation) for section in sections_in(argument)]


def test_the_smallest_recipe_is_valid_and_a_bare_path_is_a_source() -> None:
    recipe = parse(data={"train": "a.jsonl", "validation": ["b.jsonl", {"path": "c.jsonl", "limit": 3}]})
    assert [source.path for source in recipe.data.train] == ["a.jsonl"]
    assert [source.path for source in recipe.data.validation] == ["b.jsonl", "c.jsonl"]
    assert recipe.data.on_bad_row == "error"
    assert recipe.data.train_on == "assistant"


def test_every_problem_is_told_at_once_with_its_key() -> None:
    found = problems(
        model={},
        data={"train": [{"path": "a.jsonl", "format": "csv"}, {"limit": 0}], "packing": "perhaps"},
        train={"global_batch_size": 0, "learning_rate": "fast", "sequence_len": 8, "beta1": 1},
        retention={"tasks": [{"name": "a b", "kind": "text", "data": "x.jsonl"}]},
        surprise=1,
    )
    wanted = {
        "model.path": "must be given",
        "data.train.0.format": "'csv'",
        "data.train.1.path": "must be given",
        "data.train.1.limit": "0",
        "data.packing": "'perhaps'",
        "train.global_batch_size": "0",
        "train.learning_rate": "'fast'",
        "train.sequence_len": "data.sequence_length",
        "train.beta1": "1",
        "retention.tasks.0.name": "'a b'",
        "surprise": "unknown key",
    }
    told = {problem.partition(": ")[0]: problem for problem in found}
    assert told.keys() == wanted.keys()
    assert len(found) == len(wanted)
    for key, text in wanted.items():
        assert text in told[key].removeprefix(key)


def test_problems_of_overrides_and_of_the_file_are_told_together() -> None:
    found = problems("train.steps", "train.warmup_steps=-1", "data.train.7.path=c.jsonl", train={"seed": -1})
    starts = ["'train.steps' is not", "override data.train.7.path: ", "train.warmup_steps: ", "train.seed: "]
    assert len(found) == len(starts)
    assert all(any(problem.startswith(start) for problem in found) for start in starts)


def test_rules_between_keys_are_all_told_beside_each_other() -> None:
    found = "\n".join(problems(train={"steps": 3, "epochs": 1, "min_learning_rate": 1.0, "learning_rate": 0.5}))
    assert "train.steps" in found
    assert "train.epochs" in found
    assert "min_learning_rate" in found


def test_task_names_must_differ() -> None:
    task = {"kind": "text", "data": "x.jsonl"}
    names = ["twice", "twice", "validation", "once"]
    (problem,) = problems(retention={"tasks": [task | {"name": name} for name in names]})
    assert "retention" in problem
    assert "twice" in problem
    assert "validation" in problem
    assert "once" not in problem


def test_a_rollback_that_changes_nothing_is_refused() -> None:
    (problem,) = problems("retention.gate.action=rollback", "retention.gate.rollback_lr_factor=1")
    assert problem.startswith("retention.gate: with rollback_lr_factor 1")
    gate = ("retention.gate.action=rollback", "retention.gate.rollback_lr_factor=1")
    parse(*gate, "retention.gate.rollback_pull_factor=2", "train.l2_pull=1")


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("text", "limit", 3), ("text", "num_fewshot", 0), ("generate", "harness_path", "x"), ("text", "metric", "acc"),
        ("multiple_choice", "harness_task", "x"), ("harness", "cluster_field", "x"), ("generate", "metric", "acc"),
        ("harness", "answer_pattern", "x"), ("harness", "max_new_tokens", 9), ("text", "max_new_tokens", 9),
    ],
)  # fmt: skip
def test_a_key_that_the_kind_of_a_task_ignores_is_refused(kind: str, key: str, value: Any) -> None:
    task = {"name": "t", "kind": kind, key: value} | ({} if kind == "harness" else {"data": "x.jsonl"})
    (problem,) = problems(retention={"tasks": [task]})
    assert problem.startswith(f"retention.tasks.0: {key} is for kind")
    assert ("data.limit" in problem) == (key == "limit")


def test_a_skill_has_no_largest_loss_and_a_stored_recipe_keeps_its_defaults() -> None:
    task = {"name": "t", "kind": "text", "data": "x.jsonl", "measures": "skill"}
    (problem,) = problems(retention={"tasks": [task | {"max_drop": 0.1}]})
    assert "max_drop is for retention tasks" in problem
    stored = parse(retention={"tasks": [task, {"name": "h", "kind": "harness", "limit": 3, "metric": "acc_norm"}]})
    assert parse_recipe(yaml.safe_load(stored.to_yaml())) == stored  # which has every key


def test_an_answer_pattern_that_is_no_regular_expression_is_told_with_its_key() -> None:
    task = {"name": "sums", "kind": "generate", "data": "x.jsonl", "answer_pattern": "(unclosed"}
    (problem,) = problems(retention={"tasks": [task]})
    assert problem.startswith("retention.tasks.0.answer_pattern")


@pytest.mark.parametrize("value", [".inf", ".nan", "-1", "0", "1e400"])
def test_a_learning_rate_that_no_run_can_have_is_refused(value: str) -> None:
    (problem,) = problems(f"train.learning_rate={value}")
    assert problem.startswith("train.learning_rate: ")


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("train.learning_rat", "train.learning_rate"),  # misspelt in the right section
        ("train.wieght_decay", "train.weight_decay"),
        ("model.pth", "model.path"),
        ("data.on_badrow", "data.on_bad_row"),
        ("modle", "model"),
        ("checkpoint.every_step", "checkpoint.every_steps"),
        ("data.learning_rate", "train.learning_rate"),  # right name, wrong section
        ("train.sequence_length", "data.sequence_length"),
        ("learning_rate", "train.learning_rate"),
        ("data.dtype", "export.dtype"),
        ("model.precision", "train.precision"),  # ..., even where another name is near
        ("train.revision", "model.revision"),
        ("sequnce_length", "data.sequence_length"),  # both
        ("train.per_device_train_batch_size", "train.micro_batch_size"),  # what others call it
        ("per_device_train_batch_size", "train.global_batch_size"),
        ("train.gradient_accumulation_steps", "train.global_batch_size"),
        ("model.model_name_or_path", "model.path"),
        ("base_model", "model.path"),
        ("sequence_len", "data.sequence_length"),
        ("train.lr", "train.learning_rate"),
        ("train.num_train_epochs", "train.epochs"),
        ("train.bf16", "train.precision"),
        ("output_dir", "run_dir"),
        ("tracking.report_to", "tracking.wandb"),
        ("checkpoint.save_steps", "checkpoint.every_steps"),
    ],
)
def test_an_unknown_key_suggests_the_one_that_was_meant(key: str, meant: str) -> None:
    (problem,) = problems(f"{key}=1")
    assert problem.startswith(f"{key}: unknown key; ")
    words = problem.removeprefix(f"{key}: ").replace("?", " ").replace(")", " ").replace(";", " ").split()
    assert meant in words


def test_an_unknown_key_inside_a_list_is_told_with_its_place() -> None:
    (problem,) = problems("data.train.1.spit=test")
    assert problem.startswith("data.train.1.spit: unknown key")
    assert "split" in problem


def test_an_unknown_key_like_no_other_lists_the_keys_of_its_section() -> None:
    (problem,) = problems("export.qqqq=1")
    assert problem == "export.qqqq: unknown key; keys here are: dtype, max_shard_gb, push_to_hub"


def test_values_of_overrides_are_yaml() -> None:
    recipe = parse(
        "train.learning_rate=1e-5", "data.packing=no", "train.steps=7", "tracking.tags=[a, b]", "tracking.name=",
        "data.train.0.fields={output: answer}", "data.train.1.path=c=d.jsonl", "export.dtype=fp32",
    )  # fmt: skip
    assert recipe.train.learning_rate == 1e-5
    assert type(recipe.train.learning_rate) is float
    assert recipe.data.packing is False
    assert recipe.train.steps == 7
    assert recipe.tracking.tags == ["a", "b"]
    assert recipe.tracking.name is None
    assert recipe.data.train[0].fields == {"output": "answer"}
    assert recipe.data.train[1].path == "c=d.jsonl"
    assert recipe.export.dtype == "fp32"


def test_the_last_override_of_a_key_wins_over_the_file() -> None:
    assert parse("train.seed=2", "train.seed=3", train={"seed": 1}).train.seed == 3


def test_an_override_makes_sections_that_the_file_lacks_or_leaves_empty() -> None:
    assert parse("export.dtype=fp16").export.dtype == "fp16"
    assert parse("export.dtype=fp16", export=None).export.dtype == "fp16"


def test_an_override_reaches_into_a_list() -> None:
    recipe = parse("data.train.0.path=c.jsonl", "data.train.1={path: d.jsonl}")
    assert [source.path for source in recipe.data.train] == ["c.jsonl", "d.jsonl"]


@pytest.mark.parametrize("train", ["a.jsonl", ["a.jsonl"]])
def test_an_override_reaches_into_a_source_written_as_a_bare_path(train: Any) -> None:
    (source,) = parse("data.train.0.limit=5", data={"train": train}).data.train
    assert (source.path, source.limit) == ("a.jsonl", 5)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.steps", "key.path=value"),
        ("=3", "key.path=value"),
        ("train.steps=[1", "override train.steps: value is not valid YAML"),
        ("data.train.2.path=c.jsonl", "override data.train.2.path: '2' does not exist"),
        ("data.train.first.path=c.jsonl", "override data.train.first.path: 'first' does not exist"),
        ("data.train.9=c.jsonl", "override data.train.9: '9' does not exist"),
        ("run_dir.folder=x", "override run_dir.folder: 'folder' does not exist"),
        ("model=3", "model: "),
    ],
)
def test_an_override_that_cannot_be_applied_says_why(override: str, told: str) -> None:
    (problem,) = problems(override)
    assert told in problem


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("run_dir: a\nrun_dir: b\n", "key 'run_dir' is given twice, line 2"),
        ("model:\n  path: a\n  revision: x\n  path: b\n", "key 'path' is given twice, line 4"),
        ("", "empty"),
        ("# nothing\n", "empty"),
        ("- run_dir\n", "not a mapping"),
        ("model:\n\tpath: a\n", "not valid YAML"),
        ("model: {path: a\n", "not valid YAML"),
        ("a: 1\n---\nb: 1\n", "not valid YAML"),
        ("run_dir: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        ("[a, b]: 1\n", "not valid YAML"),
        ("{a: 1}: 1\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_by_name(tmp_path: Path, text: str, told: str) -> None:
    message = refusal(tmp_path, text)
    assert str(tmp_path / "recipe.yaml") in message
    assert told in message


def test_a_missing_file_a_folder_and_a_binary_file_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "weights.yaml").write_bytes(b"\xff\xfe\x00\x01")
    for path, told in (
        (tmp_path / "no.yaml", "does not exist"),
        (tmp_path, "read"),
        (tmp_path / "weights.yaml", "read"),
    ):
        with pytest.raises(BadInput) as caught:
            load_recipe(path)
        assert str(path) in str(caught.value)
        assert told in str(caught.value)


def test_yaml_anchors_and_merge_keys_work(tmp_path: Path) -> None:
    text = """
run_dir: runs/a
model: {path: m}
data:
  train: &base {path: a.jsonl, limit: 3}
  validation:
    <<: *base
    path: b.jsonl
"""
    (source,) = load(tmp_path, text).data.validation
    assert (source.path, source.limit) == ("b.jsonl", 3)


def test_a_recipe_written_as_yaml_is_the_same_recipe(tmp_path: Path) -> None:
    before = parse(
        "train.learning_rate=1e-5", "train.eps=1e-12", "data.train.0.fields={output: 'no'}", "tracking.name='123'",
        "model.revision='1e5'", "train.warmup_steps=0.03",
        retention={"tasks": [{"name": "t", "kind": "generate", "data": "x.jsonl", "answer_pattern": r"#### (\S+)\n"}]},
    )  # fmt: skip
    after = load(tmp_path, before.to_yaml())
    assert after == before
    assert fingerprint(after) == fingerprint(before)
    assert yaml.safe_load(before.to_yaml())["run_dir"] == "runs/a"  # plain YAML that others can read


def test_a_recipe_cannot_be_changed_once_read() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse().train.steps = 3  # type: ignore[misc]


# Names that papers and PyTorch give to AdamW's numbers; they have no unit.
EXPLAINS_ITSELF = {"train.beta1", "train.beta2", "train.eps", "train.seed", "train.schedule", "tracking.tags"}


def test_every_key_has_a_description_or_explains_itself() -> None:
    bare = {key for key, field in keys_of(Recipe) if not field.description}
    assert bare - EXPLAINS_ITSELF - {"retention.tasks.data"} == set()


def test_every_number_names_its_unit() -> None:
    units = (
        "token", "step", "sequence", "row", "GB", "minute", "second", "rate", "norm", "passes", "decay", "checkpoints",
        "prompts", "share", "level", "evaluations", "rollbacks", "factor", "items", "examples", "unit",
    )  # fmt: skip
    for key, field in keys_of(Recipe):
        kinds = {field.annotation, *typing.get_args(field.annotation)}
        if kinds & {int, float} and key not in EXPLAINS_ITSELF:
            assert any(unit in f"{key} {field.description}" for unit in units), f"{key}: {field.description}"


# What a key does nothing without, and is refused.
NEEDS = {
    "train.l2_pull_offload": ("train.l2_pull=0.1",), "train.kl_reference": ("train.kl_weight=0.1",),
    "train.kl_reference_offload": ("train.kl_weight=0.1", "train.kl_reference=model"),
    "retention.gate.rollback_pull_factor": ("train.l2_pull=0.1",),
}  # fmt: skip


def changed(*overrides: str, needs: tuple[str, ...] = (), **sections: Any) -> set[str]:
    """The keys by which `identity` tells the changed recipe from the smallest one (with what the change needs)."""
    before, after = identity(parse(*needs)), identity(parse(*needs, *overrides, **sections))
    return {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}


# What may differ between a run and its resumption: where and how it runs, not what is trained.
FREE = {
    "run_dir": "runs/b", "deepspeed": "ds_configs/zero3_offload.json", "tracking.every_steps": "5",
    "tracking.wandb": "offline", "tracking.project": "p", "tracking.name": "n", "tracking.tags": "[t]",
    "tracking.entity": "e", "tracking.group": "g", "tracking.notes": "n",
    "checkpoint.every_steps": "7", "checkpoint.keep": "9", "checkpoint.resume": "never", "export.dtype": "fp32",
    "checkpoint.keep_best": "false", "checkpoint.asynchronous": "false", "checkpoint.lease_seconds": "9",
    "export.max_shard_gb": "1", "data.cache_dir": "c", "train.micro_batch_size": "2",
    "train.sequence_parallel": "2", "train.mlp_tiles": "2", "model.attention": "eager",
    "export.push_to_hub": "a/b", "train.on_no_memory": "warn",
    "train.activation_checkpointing": "true", "train.kernels": "none", "train.timeout_minutes": "5",
    "retention.generation_batch_size": "3", "train.profile": "[2, 3]", "train.hang_timeout": "60",
    "checkpoint.grace_seconds": "60", "checkpoint.use_node_local_storage": "true",
    "model.trust_remote_code": "true", "data.on_missing_cache": "error", "retention.every_steps": "3",
    "retention.max_overhead": "0.1", "retention.confidence": "0.9", "retention.gate.action": "stop",
    "retention.gate.max_drop": "0.5", "retention.gate.patience": "3", "retention.gate.rollback_lr_factor": "0.2",
    "retention.gate.rollback_pull_factor": "2", "retention.gate.max_rollbacks": "1", "train.l2_pull_offload": "true",
    "train.kl_reference_offload": "true",
}  # fmt: skip
FIXED = {
    "model.path": "models/b", "model.revision": "r", "data.sequence_length": "64",
    "model.new_tokens": "[<|call|>]", "model.vocabulary_multiple": "64",
    "data.packing": "false", "data.on_leak": "drop", "data.train_on": "all", "data.on_bad_row": "skip",
    "data.on_too_long": "drop",
    "train.epochs": "2", "train.steps": "3", "train.global_batch_size": "8", "train.learning_rate": "1e-4",
    "train.min_learning_rate": "1e-6", "train.schedule": "linear", "train.warmup_steps": "2",
    "train.weight_decay": "0.1", "train.no_decay": "[]", "train.beta1": "0.8", "train.beta2": "0.99",
    "train.eps": "1e-6", "train.max_grad_norm": "2", "train.precision": "fp32",
    "train.seed": "1", "train.layerwise_lr_decay": "0.9", "train.l2_pull": "0.1", "train.ema_decay": "0.99",
    "train.kl_weight": "0.1", "train.kl_reference": "model",
    "retention.kl_tokens": "1", "retention.kl_top_k": "1",
}  # fmt: skip


def test_the_lists_of_free_and_fixed_keys_are_complete() -> None:
    lists = ("data.train", "data.replay", "data.validation", "retention.tasks")
    lists += ("data.replay_weight",)  # needs a replay set, see below
    rest = {key for key, _ in keys_of(Recipe) if not f"{key}.".startswith(tuple(f"{name}." for name in lists))}
    assert rest == FREE.keys() | FIXED.keys()


@pytest.mark.parametrize("key", FREE)
def test_a_key_that_may_change_on_resume_is_no_part_of_the_identity(key: str) -> None:
    assert changed(f"{key}={FREE[key]}", needs=NEEDS.get(key, ())) == set()


@pytest.mark.parametrize("key", FIXED)
def test_a_key_that_decides_the_numbers_is_part_of_the_identity(key: str) -> None:
    needs = NEEDS.get(key, ())
    assert changed(f"{key}={FIXED[key]}", needs=needs) == {key}
    assert fingerprint(parse(*needs, f"{key}={FIXED[key]}")) != fingerprint(parse(*needs))


@pytest.mark.parametrize("key", NEEDS)
def test_a_key_that_does_nothing_without_another_is_refused(key: str) -> None:
    (problem,) = problems(f"{key}={(FREE | FIXED)[key]}")
    assert key.rpartition(".")[2] in problem


def test_data_sets_and_tasks_are_part_of_the_identity() -> None:
    assert changed("data.train.1.path=c.jsonl") == {"data.train.1.path"}
    assert changed("data.train.0.fields={output: answer}")
    assert changed("data.train.0.weight=2") == {"data.train.0.weight"}
    replay = "data.replay={path: c.jsonl, fraction: 0.1}"
    assert changed(replay, "data.replay_weight=0.2") - changed(replay) == {"data.replay_weight"}
    assert changed(data=SMALLEST["data"] | {"replay": {"path": "r.jsonl", "fraction": 0.1}})
    assert changed(data=SMALLEST["data"] | {"validation": "v.jsonl"})
    task = {"name": "t", "kind": "text", "data": "x.jsonl"}
    assert changed(retention={"tasks": [task]})
    with_limit = parse(retention={"tasks": [task | {"max_drop": 0.5}]})  # may change, as retention.gate.max_drop may
    assert identity(with_limit) == identity(parse(retention={"tasks": [task]}))
    assert with_limit.retention.gate_settings != parse(retention={"tasks": [task]}).retention.gate_settings


@pytest.mark.parametrize("path", sorted((REPOSITORY / "launch" / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_the_recipes_that_come_with_fullft_are_valid(path: Path) -> None:
    load_recipe(path)


def test_the_recipe_of_the_readme_is_valid() -> None:
    parse_recipe(yaml.safe_load((REPOSITORY / "README.md").read_text().split("```yaml")[1].split("```")[0]))
