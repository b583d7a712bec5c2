"""Complaints: sequence parallelism was asked for, and the run silently trained without; a rank without a trained token
hangs the run, or counts as much as the others."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import TEXTS, before_training, chat, losses, run_ranks, write_jsonl, write_recipe
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
def test_ranks_that_share_rows_have_a_part_of_each_and_one_without_trained_tokens_does_not_count(
    recipe: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    recipe["model"]["path"] = str(save_model(LlamaConfig(**SMALL), tiny_model, tmp_path / "model"))
    # The answer is at the end of a long row: of two ranks that share it, the first has no label.
    rows = [chat(TEXTS[at % 2][:40] * 2, "yes" if at % 3 else "nay") for at in range(20)]
    recipe["data"] |= {"train": str(write_jsonl(tmp_path / "rows.jsonl", rows)), "packing": False}
    recipe["train"] |= {"steps": 2, "global_batch_size": 2, "eps": 1e-5, "activation_checkpointing": "none"}
    script, found, widths = before_training(SEEN, tmp_path / "train.py"), {}, {}
    for parts in (1, 2):
        one = recipe | {
            "run_dir": f"{recipe['run_dir']}-{parts}", "train": recipe["train"] | {"sequence_parallel": parts}
        }  # fmt: skip
        config = write_recipe(one, tmp_path / f"{parts}.yaml")
        done = run_ranks(script, "--config", str(config), ranks=parts, cwd=tmp_path)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        widths[parts] = [int(width) for width in re.findall(r"embedded \[1, (\d+)\]", done.stdout)]
        found[parts] = losses(one)
    # 2 steps of 2 rows: one rank has them whole, each of two a half of all.
    assert (len(widths[1]), len(widths[2])) == (4, 8)
    assert min(widths[1]) > 40
    assert sum(widths[1]) <= sum(widths[2]) <= sum(widths[1]) + 4
    assert max(widths[2]) <= max(widths[1]) // 2 + 1
    assert found[2] == pytest.approx(found[1], abs=1e-5)
