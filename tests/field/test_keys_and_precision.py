"""Complaints: a misspelt key is ignored for a whole run; updates that bf16 cannot hold are lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY

from fullft import engine
from fullft.deepspeed_keys import key_problems
from fullft.errors import BadInput
from fullft.preflight import preflight
from fullft.recipe import parse_recipe


def problems(recipe: dict[str, Any], folder: Path, **sections: Any) -> list[str]:
    """What is said about a DeepSpeed configuration with these sections."""
    file = folder / "mine.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}} | sections))
    try:
        engine.read_config(parse_recipe(recipe | {"deepspeed": str(file)}))
    except BadInput as error:
        return [text.split(f"deepspeed: {file} ")[1] for text in error.problems]
    return []


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"wall_clock_breakdwn": True}, "did you mean wall_clock_breakdown?"),
        ({"overlap_comm": True}, "it belongs into zero_optimization"),
        ({"bfloat16": {"enabled": True}}, "did you mean bf16?"),  # DeepSpeed's old name, unread beside bf16
        ({"mixture": {"a": 1}}, "mixture: DeepSpeed knows no such key"),
        ({"zero_optimization": {"stage": 3, "overlap_com": True}}, "did you mean zero_optimization.overlap_comm?"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "pin_memry": True}}},
            "did you mean zero_optimization.offload_optimizer.pin_memory?",
        ),
        ({"activation_checkpointing": {"cpu_checkpointin": True}}, "did you mean activation_checkpointing.cpu_check"),
        ({"aio": {"queue_depht": 8}}, "did you mean aio.queue_depth?"),
        ({"tensorboard": {"enabled": False, "outpt_path": "x"}}, "did you mean tensorboard.output_path?"),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": "large"}}, "reduce_bucket_size: Input should be"),
        ({"nebula": {"enabled": True}}, "has been removed"),
    ],
)
def test_a_key_that_deepspeed_would_ignore_is_told_with_the_nearest(
    recipe: dict[str, Any], tmp_path: Path, sections: dict[str, Any], told: str
) -> None:
    (said,) = problems(recipe, tmp_path, **sections)
    assert told in said


def test_unknown_keys_of_all_sections_are_told_at_once_and_before_anything_starts(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "mine.json"
    wrong = {"stage": 3, "overlap_com": True}, {"loss_scal": 0}, {"verbos": True}
    names = "zero_optimization", "fp16", "comms_logger"
    file.write_text(json.dumps(dict(zip(names, wrong, strict=True)) | {"steps_per_prnt": 5}))
    with pytest.raises(BadInput) as caught:
        preflight(parse_recipe(recipe, [f"deepspeed={file}", "train.global_batch_size=3"]), 2)
    said = "\n".join(caught.value.problems)
    for key in ("zero_optimization.overlap_com", "fp16.loss_scal", "comms_logger.verbos", "steps_per_prnt"):
        assert f"{key}: DeepSpeed knows no such key; did you mean" in said
    assert "train.global_batch_size" in said


def test_what_deepspeed_takes_is_taken(recipe: dict[str, Any], tmp_path: Path) -> None:
    for file in (REPOSITORY / "ds_configs").glob("*.json"):
        assert key_problems(json.loads(file.read_text())) == []
    for_trainer = {  # as the documentation of transformers gives it
        "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1},
        "bf16": {"enabled": "auto"}, "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
        "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "steps_per_print": 2000,
        "wall_clock_breakdown": False, "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True}, "sub_group_size": 1e9,
            "offload_param": {"device": "cpu", "pin_memory": True, "buffer_count": 5}, "overlap_comm": True,
            "stage3_gather_16bit_weights_on_model_save": "auto", "reduce_bucket_size": "auto",
        },
    }  # fmt: skip
    more = {
        "activation_checkpointing": {"partition_activations": False, "number_checkpoints": None},
        "aio": {"block_size": 1048576, "queue_depth": 8, "single_submit": False, "overlap_events": True},
        "comms_logger": {"enabled": False, "verbose": False, "prof_all": True, "debug": False},
        "checkpoint": {"tag_validation": "Warn", "parallel_write": {"pipeline_stage": False}},
        "csv_monitor": {"enabled": False, "output_path": "x"}, "data_types": {"grad_accum_dtype": "fp32"},
        "data_efficiency": {"enabled": False, "data_sampling": {"num_epochs": 1, "curriculum_learning": {"a": 1}}},
        "flops_profiler": {"enabled": False, "profile_step": 1, "output_file": None}, "communication_data_type": "fp32",
        "autotuning": {"enabled": False, "arg_mappings": {"lr": "--lr"}}, "compile": {"deepcompile": False},
        "wandb": {"enabled": False}, "timers": {"throughput": {"enabled": True}}, "dump_state": False,
    }  # fmt: skip
    assert problems(recipe, tmp_path, **for_trainer, **more) == []


@pytest.mark.parametrize(
    ("key", "value", "ours"),
    [
        ("gradient_clipping", 0.5, "train.max_grad_norm"), ("optimizer", {"type": "Adam"}, "train.*"),
        ("gradient_accumulation_steps", 4, "train.global_batch_size"),
        ("train_micro_batch_size_per_gpu", 2, "train.micro_batch_size"),
        ("sequence_parallel_size", 2, "train.sequence_parallel"), ("fp16", {"enabled": True}, "train.precision"),
    ],
)  # fmt: skip
def test_a_key_that_the_recipe_overrides_is_not_left_out_in_silence(
    recipe: dict[str, Any], tmp_path: Path, key: str, value: Any, ours: str
) -> None:
    (said,) = problems(recipe, tmp_path, **{key: value})
    assert f"'{key}'; remove it, the recipe's {ours} decides" in said


def test_a_key_given_twice_is_told(recipe: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text('{"zero_optimization": {"stage": 2}, "zero_optimization": {"stage": 3}}')
    with pytest.raises(BadInput, match="'zero_optimization' is given twice"):
        engine.read_config(parse_recipe(recipe, [f"deepspeed={file}"]))


@pytest.mark.parametrize(
    "keys", [["bf16_master_weights_and_grads"], ["bf16_master_weights_and_grads", "bf16_optimizer_states"]]
)
def test_giving_up_fp32_master_weights_is_told_before_anything_starts(
    recipe: dict[str, Any], tmp_path: Path, keys: list[str]
) -> None:
    assert problems(recipe, tmp_path, bf16=dict.fromkeys(keys, "true")) != []  # DeepSpeed takes that too
    (said,) = problems(recipe, tmp_path, bf16=dict.fromkeys(keys, True))
    assert "without fp32 master weights" in said
    assert all(key in said for key in keys)
    assert problems(recipe, tmp_path, bf16=dict.fromkeys(keys, False)) == []


def test_gradients_of_micro_batches_are_summed_in_fp32_beside_other_data_types(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "mine.json"
    file.write_text('{"zero_optimization": {"stage": 3}, "data_types": {"buffer_dtype": "fp32"}}')
    recipe["train"] |= {"precision": "bf16", "global_batch_size": 4}
    filled = preflight(parse_recipe(recipe, [f"deepspeed={file}"]), 2).deepspeed_config
    assert filled["data_types"] == {"grad_accum_dtype": "fp32", "buffer_dtype": "fp32"}
