"""Fused kernels: which are taken, and the same training with them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import run_ranks
from transformers import AlbertConfig, LlamaConfig

from fullft.errors import BadInput
from fullft.kernels import choose, lacks, problems
from fullft.preflight import preflight
from fullft.recipe import parse_recipe

SCRIPT = Path(__file__).parent / "kernels_on_ranks.py"
INSTALLED = all(importlib.util.find_spec(name) for name in ("triton", "liger_kernel"))


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="triton and liger-kernel are not installed")
def test_training_is_the_same_with_fused_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    done = run_ranks(SCRIPT, str(tmp_path / "out.json"), ranks=2, cwd=tmp_path, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    for name, found in json.loads((tmp_path / "out.json").read_text()).items():
        assert found["fused"] >= 4, (name, found)
        assert found["moved"] > 1e-4, (name, found)
        assert found["loss"] < 2e-6, (name, found)
        assert found["weights"] < 2e-6, (name, found)


def test_kernels_that_cannot_be_had(recipe: dict[str, Any]) -> None:
    llama = LlamaConfig()
    assert choose(parse_recipe(recipe), llama, on_gpu=False) == ("none", "those of transformers: there is no GPU")
    recipe["train"]["kernels"] = "liger"
    with pytest.raises(BadInput, match=r"train\.kernels: liger, but there is no GPU; take auto or none"):
        preflight(parse_recipe(recipe), 1)
    warnings = preflight(parse_recipe(recipe), 1, on_gpu=True).warnings  # a login node
    assert INSTALLED or warnings[0].startswith("train.kernels: liger, but this machine lacks ")
    recipe["train"]["kernels"] = "none"
    recipe["model"]["attention"] = "flash_attention_3"
    with pytest.raises(BadInput, match=r"model\.attention: flash_attention_3, but there is no GPU; take auto"):
        preflight(parse_recipe(recipe), 1)
    lacking = "model.attention: flash_attention_3, but its package, flash_attn_interface, is not installed here; take"
    assert lacking in preflight(parse_recipe(recipe), 1, on_gpu=True).warnings[0]  # it may be where it is trained
    recipe["model"]["attention"] = "auto"
    assert choose(parse_recipe(recipe), llama, on_gpu=True)[0] == "none"
    recipe["train"]["kernels"] = "auto"
    assert choose(parse_recipe(recipe), llama, on_gpu=True)[0] == ("liger" if INSTALLED else "none")
    other, gelu = AlbertConfig(), LlamaConfig(hidden_act="gelu")
    assert choose(parse_recipe(recipe), other, True) == (
        "none", "those of transformers: liger's are taken for llama, mistral, qwen2, qwen3 only, and this is albert"
    )  # fmt: skip
    assert choose(parse_recipe(recipe), gelu, True)[1].endswith("liger's MLP is gated by SiLU, not by gelu")
    recipe["train"]["kernels"] = "liger"
    assert problems(parse_recipe(recipe), gelu) == [
        "train.kernels: liger, but liger's MLP is gated by SiLU, not by gelu; take auto or none"
    ]
    assert lacks(parse_recipe(recipe), gelu, True) == []  # it is refused already
