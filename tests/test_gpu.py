"""Real runs on the GPU of this machine: `FULLFT_TEST_GPU=1 pytest -m gpu`. What the GPU must not change is compared
with the same run on the CPU."""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import warm
from conftest import ON_CPU, TRAIN, losses, read, wait_for_ranks, write_recipe

from fullft.preflight import preflight
from fullft.recipe import parse_recipe

pytestmark = pytest.mark.gpu


def train(recipe: dict[str, Any], name: str, *overrides: str, **environment: str) -> list[float]:
    """Losses of a run on one rank, in this environment beside that of the tests."""
    recipe = recipe | {"run_dir": f"{recipe['run_dir']}-{name}"}
    config = write_recipe(recipe, Path(f"{recipe['run_dir']}.yaml"))
    with tempfile.TemporaryFile("w+") as output:
        process = warm.start(
            TRAIN, "--config", str(config), *overrides, stdout=output, stderr=output, cwd=config.parent, forked=False,
            **environment,
        )  # fmt: skip
        code = wait_for_ranks([process], 240)
        assert code == 0, read(output)[-6000:]
    assert json.loads((Path(recipe["run_dir"]) / "state.json").read_text())["status"] == "done"
    return losses(recipe)


@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [("fp32", 1e-4), ("bf16", 2e-2)],  # fp32: other kernels add in another order; bf16: weights have 8 bits
)
def test_a_run_on_the_gpu_has_the_losses_of_one_on_the_cpu(
    recipe: dict[str, Any], precision: str, tolerance: float
) -> None:
    on_gpu = train(recipe, "gpu", f"train.precision={precision}")
    on_cpu = train(recipe, "cpu", "train.precision=fp32", **ON_CPU)
    assert on_gpu == pytest.approx(on_cpu, rel=tolerance)


def test_the_gpu_is_used(recipe: dict[str, Any]) -> None:
    train(recipe, "gpu")
    row = json.loads((Path(f"{recipe['run_dir']}-gpu") / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["memory/peak_gib"] > 0


def test_activation_checkpointing_changes_no_loss(recipe: dict[str, Any]) -> None:
    without = train(recipe, "without", "train.activation_checkpointing=false", "train.precision=fp32")
    recomputed = train(recipe, "with", "train.activation_checkpointing=true", "train.precision=fp32")
    assert recomputed == pytest.approx(without, rel=1e-5)


def test_attention_is_the_kernel_for_packed_documents_unless_told_otherwise(recipe: dict[str, Any]) -> None:
    """A run on a dense mask, or with a call per document, would be slow without a word."""
    recipe["train"] |= {"precision": "bf16", "profile": [3, 3]}
    assert preflight(parse_recipe(recipe), 1, on_gpu=True).attention.name == "varlen"
    train(recipe, "gpu")
    (trace,) = Path(f"{recipe['run_dir']}-gpu").glob("profile/*.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = {event["name"] for event in events if event.get("cat") == "cpu_op"}
    assert "torch_attn::_varlen_attn" in names
    assert not [name for name in names if "scaled_dot_product" in name]
