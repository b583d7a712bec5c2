"""Complaint: training of a mixture of experts hangs when no token of a rank takes one of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import expert_list
import pytest
from conftest import before_training, losses, run_ranks, write_recipe
from test_architectures import SMALL, save_model
from transformers import PretrainedConfig, Qwen3MoeConfig

CONFIGS: dict[str, PretrainedConfig] = {
    "a list of modules": expert_list.ExpertListConfig(**SMALL),
    "one tensor": Qwen3MoeConfig(**SMALL, num_experts=16, num_experts_per_tok=1, moe_intermediate_size=32),
}
USED = """
import os
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen
route = qwen.Qwen3MoeTopKRouter.forward
def told(self, hidden):
    routed = route(self, hidden)
    if self.training:
        used = sorted(set(routed[2].flatten().tolist()))
        print(f"rank {os.environ.get('RANK', 0)} used experts {used}", flush=True)
    return routed
qwen.Qwen3MoeTopKRouter.forward = told
"""


@pytest.mark.ranks
@pytest.mark.parametrize("name", CONFIGS)
def test_an_expert_that_no_token_of_a_rank_takes_neither_hangs_nor_changes_the_loss(
    recipe: dict[str, Any], tiny_model: Path, tmp_path: Path, name: str
) -> None:
    recipe["model"]["path"] = str(save_model(CONFIGS[name], tiny_model, tmp_path / "model"))
    recipe["data"]["packing"] = False  # short rows, so that some experts are left out
    # eps as in test_numerics. Threshold 0: every expert is partitioned.
    recipe["train"] |= {"steps": 3, "global_batch_size": 2, "eps": 1e-5, "timeout_minutes": 1}
    (tmp_path / "zero3.json").write_text(
        json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}})
    )
    recipe["deepspeed"] = str(tmp_path / "zero3.json")
    program = f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nimport expert_list\n" + USED
    script, runs = before_training(program, tmp_path / "train.py"), []
    for ranks in (1, 2):
        runs.append(recipe | {"run_dir": f"{recipe['run_dir']}-{ranks}"})
        config = write_recipe(runs[-1], tmp_path / f"{ranks}.yaml")
        done = run_ranks(script, "--config", str(config), ranks=ranks, cwd=tmp_path, timeout=120)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    used = [re.findall(rf"rank {rank} used experts (\[.*\])", done.stdout) for rank in (0, 1)]
    assert sum(one != other for one, other in zip(*used, strict=True)) > 1  # of 6: the case is the one complained of
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), abs=1e-5)
    assert losses(runs[0])[-1] < losses(runs[0])[0]
