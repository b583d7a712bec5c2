"""The plan of time and cost by numbers worked out by hand, and the verb as users type it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import write_recipe

from fullft import cli, model
from fullft.errors import BadInput
from fullft.planner import hardware, speed
from fullft.planner.setting import Setting, setting_of
from fullft.recipe import parse_recipe

LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    "max_position_embeddings": 8192,
}  # fmt: skip
PARAMETERS = 8_030_261_248  # of Llama 3 8B, as published
ONE_H100 = hardware.gpu("h100-80gb")


@pytest.fixture
def plain(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA_8B))
    return {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(tmp_path / "model")},
        "data": {"train": str(tmp_path / "none.jsonl"), "sequence_length": 8192},
        "train": {"steps": 4, "global_batch_size": 64, "activation_checkpointing": "full"},
    }


@pytest.fixture
def setting(plain: dict[str, Any]) -> Setting:
    recipe = parse_recipe(plain)
    return setting_of(recipe, model.on_meta(recipe.model), 16, 8)


def test_bytes_operations_and_time_are_those_of_the_formulas(setting: Setting) -> None:
    weights = 2 * PARAMETERS
    plain = {**setting.zero, "zero_hpz_partition_size": 1}
    moved = speed.traffic(replace(setting, zero=plain))
    assert moved["all_gather_forward"] == speed.Traffic(weights * 7 / 8, weights / 2 / 8)
    assert moved["reduce_scatter"] == moved["all_gather_backward"] == moved["all_gather_forward"]
    hpz = speed.traffic(replace(setting, zero=plain | {"zero_hpz_partition_size": 8}))
    assert [one.network > 0 for one in hpz.values()] == [True, False, True]
    int8 = speed.traffic(replace(setting, zero=plain | {"zero_quantized_weights": True}))
    assert int8["all_gather_forward"].link == moved["all_gather_forward"].link / 2
    assert speed.traffic(replace(setting, world_size=1))["reduce_scatter"] == speed.Traffic(0, 0)

    without_embedding = PARAMETERS - 128256 * 4096 - 65 * 4096  # and norms
    attention = 32 * 4 * 4096 * 8192 * 8193 / 2
    forward = 2 * without_embedding * 8192 + attention
    useful, run = speed.operations(setting)
    assert useful == pytest.approx(3 * forward, rel=1e-9)
    again = 2 * 8192 * (without_embedding - 128256 * 4096 - 32 * 4096 * 14336) + attention
    assert run - useful == pytest.approx(again, rel=1e-9)
    assert speed.operations(replace(setting, checkpointing="none"))[1] == useful
    assert speed.operations(setting, document=1024)[0] < useful

    found = speed.predict(setting, ONE_H100)
    assert found.compute == pytest.approx(setting.accumulation * run / (794e12 * 0.62))
    parts = sorted((found.compute, found.communication))
    assert found.step == pytest.approx(parts[1] + 0.3 * parts[0] + found.update)
    assert found.step_without_overlap > found.step
    assert 0.2 < found.mfu < 0.6
    cost = speed.cost(1e9, found, 16, 2.5)
    assert cost["cost"] == pytest.approx(2.5 * 1e9 / found.tokens_per_second_per_gpu / 3600)


def test_a_slow_network_sets_the_time(setting: Setting) -> None:
    fast, slow = (speed.predict(setting, ONE_H100, network_gbps=one) for one in (400, 10))
    assert fast.communication < fast.compute < slow.communication
    assert slow.step > 2 * fast.step


def test_names_of_gpus_and_files_of_more(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="did you mean h100-80gb"):
        hardware.gpu("h100-80")
    file = tmp_path / "more.yaml"
    entry = yaml.safe_load(hardware.TABLE.read_text())["h200"]
    file.write_text(yaml.safe_dump({"Mine": entry | {"memory_gib": 100}}))
    assert hardware.gpu("mine", str(file)).memory_gib == 100
    file.write_text(yaml.safe_dump({"mine": entry | {"tflops": -1}, "other": {"tflops": 3}}))
    with pytest.raises(BadInput) as caught:
        hardware.gpu("mine", str(file))
    assert len(caught.value.problems) == 2


def test_the_verb(
    plain: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*words: str) -> int:
        monkeypatch.setattr("sys.argv", ["fullft", *words])
        return cli.main()

    recipe = str(write_recipe(plain, tmp_path / "recipe.yaml"))
    enough = ["plan", recipe, "--nodes", "2", "--tokens", "1e9", "--price-per-gpu-hour", "2.5"]
    assert run(*enough, "train.activation_checkpointing=auto") == 0
    said = capsys.readouterr().out
    assert said.startswith("fits: ")
    assert "GPU-hours, cost" in said
    assert run("plan", recipe, "--gpus-per-node", "4", "--gpu", "a100-40gb", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    rates = [one["tokens_per_second_per_gpu"] for one in found["would_fit"]]
    assert 0 < len(rates) <= 3
    assert rates == sorted(rates, reverse=True)
    assert run("plan", recipe, "--gpu", "h1000") == 2
    assert run("plan", recipe, "--nodes", "0") == 2
    assert run("plan", recipe, "--efficiency", "2") == 2
    assert "no such GPU" in capsys.readouterr().err
