"""Complaint: while loading, N ranks hold N copies of the model in the memory of the host."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_ranks, write_recipe
from safetensors.torch import save_file
from test_architectures import SMALL, save_model
from transformers import AutoModelForCausalLM, LlamaConfig

MARGIN_MB = 60  # buffers and modules; a copy of the model would be 400


@pytest.mark.ranks
def test_no_rank_holds_more_than_its_part_of_the_model_while_loading(
    recipe: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    folder = save_model(LlamaConfig(**SMALL), tiny_model, tmp_path / "model")
    config = LlamaConfig.from_pretrained(folder)
    config.update({"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 4, "head_dim": 512})
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: one.shape for name, one in AutoModelForCausalLM.from_config(config).named_parameters()}
    size = sum(4 * shape.numel() for shape in shapes.values()) / 1e6
    assert size > 400
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    recipe["model"]["path"] = str(folder)
    script = Path(__file__).parent / "peak_memory.py"
    for ranks in (2, 4):
        done = run_ranks(script, str(write_recipe(recipe, tmp_path / "r.yaml")), ranks=ranks, cwd=tmp_path)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        grown = [float(found) for found in re.findall(r"grew by (\d+) MB", done.stdout)]
        assert len(grown) == ranks
        assert size / ranks - 20 < min(grown), grown  # it is in memory, and not in a mapped file
        assert max(grown) < size / ranks + MARGIN_MB, grown
