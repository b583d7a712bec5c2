"""Complaint: sequence parallelism was asked for, and the run silently trained without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import before_training, losses, run_ranks, write_recipe
from test_architectures import SMALL, save_model
from transformers import LlamaConfig

SEEN = """
import torch
from torch import nn
embed = nn.Embedding.forward
def told(self, ids):
    if torch.is_grad_enabled():
        print(f"embedded {list(ids.shape)}", flush=True)
    return embed(self, ids)
nn.Embedding.forward = told
"""


@pytest.mark.ranks
def test_ranks_that_share_rows_have_a_part_of_each_and_the_loss_of_the_whole(
    recipe: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    recipe["model"]["path"] = str(save_model(LlamaConfig(**SMALL), tiny_model, tmp_path / "model"))
    recipe["train"] |= {"steps": 2, "global_batch_size": 2, "eps": 1e-5, "activation_checkpointing": "none"}
    script, found = before_training(SEEN, tmp_path / "train.py"), {}
    for parts in (1, 2):
        one = recipe | {
            "run_dir": f"{recipe['run_dir']}-{parts}", "train": recipe["train"] | {"sequence_parallel": parts}
        }  # fmt: skip
        config = write_recipe(one, tmp_path / f"{parts}.yaml")
        done = run_ranks(script, "--config", str(config), ranks=2, cwd=tmp_path)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        shapes = [line for line in done.stdout.splitlines() if line.startswith("embedded")]
        # 2 ranks and 2 steps of 2 rows: each rank has one row whole, or a half of both.
        assert shapes == [f"embedded [1, {128 // parts}]"] * 4 * parts
        found[parts] = losses(one)
    assert found[2] == pytest.approx(found[1], abs=1e-5)
