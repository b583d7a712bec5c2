"""Real runs on the GPU of this machine: `FULLFT_TEST_GPU=1 pytest -m gpu`. What the GPU must not change is compared
with the same run on the CPU."""

from __future__ import annotations

import gzip
import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from conftest import ON_CPU, TEXTS, TRAIN, losses, metrics, places, read, wait_for_ranks, write_jsonl, write_recipe

from fullft.preflight import preflight
from fullft.recipe import parse_recipe

pytestmark = pytest.mark.gpu


def train(recipe: dict[str, Any], name: str, *overrides: str, ranks: int = 1, **environment: str) -> list[float]:
    """Losses of a run, in this environment beside that of the tests."""
    recipe = recipe | {"run_dir": f"{recipe['run_dir']}-{name}"}
    config = write_recipe(recipe, Path(f"{recipe['run_dir']}.yaml"))
    with tempfile.TemporaryFile("w+") as output:
        processes = [
            warm.start(
                TRAIN, "--config", str(config), *overrides, stdout=output, stderr=output, cwd=config.parent,
                forked=False, **environment, **place,
            )
            for place in places(ranks)
        ]  # fmt: skip
        code = wait_for_ranks(processes, 240)
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


def test_ligers_kernels_change_no_loss(recipe: dict[str, Any]) -> None:
    if importlib.util.find_spec("liger_kernel") is None:
        pytest.skip("liger-kernel is not installed")
    plain = train(recipe, "plain", "train.kernels=none", "train.precision=fp32")
    fused = train(recipe, "fused", "train.kernels=liger", "train.precision=fp32")
    assert json.loads((Path(f"{recipe['run_dir']}-fused") / "plan.json").read_text())["kernels"] == "liger"
    assert fused == pytest.approx(plain, rel=1e-4)


def test_divergence_from_a_reference_that_runs_beside_is_that_of_the_cpu(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    texts = write_jsonl(tmp_path / "general.jsonl", [{"text": " ".join(TEXTS[i % 4 :])} for i in range(12)])
    recipe["data"]["replay"] = [{"path": str(texts), "fraction": 0.5}]
    # eps 1e-5: with 1e-8, AdamW's first steps are the sign of gradients that are round-off around zero.
    recipe["train"] |= {"kl_weight": 0.5, "kl_reference": "model", "precision": "fp32", "eps": 1e-5}
    on_gpu, on_cpu = train(recipe, "gpu"), train(recipe, "cpu", **ON_CPU)
    assert on_gpu == pytest.approx(on_cpu, rel=1e-4)
    divergences = [
        [row["train/loss_kl"] for row in metrics({"run_dir": f"{recipe['run_dir']}-{name}"}) if "train/loss_kl" in row]
        for name in ("gpu", "cpu")
    ]
    assert divergences[0] == pytest.approx(divergences[1], rel=1e-2, abs=1e-6)
    assert divergences[0][-1] > 1e-4


def test_rows_shared_by_two_gpus_have_the_losses_of_one(recipe: dict[str, Any]) -> None:
    if (found := torch.cuda.device_count()) < 2:
        pytest.skip(f"needs 2 GPUs, and there is {found}")
    recipe["train"] |= {"precision": "bf16", "eps": 1e-5}  # bf16: varlen's kernels have no other on GPUs
    whole = train(recipe, "whole")
    shared = train(recipe, "shared", "train.sequence_parallel=2", ranks=2)
    assert shared == pytest.approx(whole, rel=2e-2)
