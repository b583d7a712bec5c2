"""The plan of time and cost by numbers worked out by hand, and the verb as users type it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from conftest import write_recipe

from fullft import cli, model, preflight
from fullft.engine import FILES, read_config, require_same_choice
from fullft.errors import BadInput
from fullft.planner import choose, hardware, memory, speed
from fullft.planner.memory import GIB
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
    assert moved["all_gather_forward"] == speed.Traffic(weights * 7 / 8, weights * 15 / 16 / 8)
    assert moved["reduce_scatter"] == moved["all_gather_backward"] == moved["all_gather_forward"]
    hpz = speed.traffic(replace(setting, zero=plain | {"zero_hpz_partition_size": 8}))
    assert [one.network > 0 for one in hpz.values()] == [True, False, True]
    # Four micro-batches gather once between the nodes, and eight times within them.
    assert 4 * hpz["all_gather_forward"].network == pytest.approx(moved["all_gather_forward"].network)
    assert hpz["all_gather_forward"].link == hpz["all_gather_backward"].link == moved["all_gather_forward"].link
    int8 = speed.traffic(replace(setting, zero=plain | {"zero_quantized_weights": True}))
    assert int8["all_gather_forward"].link == moved["all_gather_forward"].link / 2
    assert speed.traffic(replace(setting, world_size=1))["reduce_scatter"] == speed.Traffic(0, 0)

    without_embedding = PARAMETERS - 128256 * 4096 - 65 * 4096  # and norms
    attention = 32 * 4 * 4096 * 8192 * 8193 / 2
    forward = 2 * without_embedding * 8192 + attention
    useful, run = speed.operations(setting)
    assert useful == pytest.approx(3 * forward, rel=1e-9)
    again = 2 * 8192 * (without_embedding - 128256 * 4096) + attention
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


def test_bytes_of_shared_rows_and_of_quantized_gradients(setting: Setting) -> None:
    """By hand for Llama 3 8B: 32 layers, queries 4096 wide, keys and values 1024; 8192 tokens."""
    shared = replace(setting, sequence_parallel=4, checkpointing="none")
    own = 2 * 32 * 2 * 2048 * (4096 + 1024 + 1024 + 4096)  # bytes of a GPU's tokens in forward and backward
    assert speed.traffic(shared)["all_to_all"] == speed.Traffic(own * 3 / 4, 0)
    again = speed.traffic(replace(shared, checkpointing="full"))["all_to_all"]
    assert again.link == own * 3 / 4 * 3 / 2
    # 16 GPUs for a row: 512 tokens each, 8 heads of keys sent twice; 7 of the others are in the node, 8 are not.
    wide = speed.traffic(replace(shared, sequence_parallel=16))["all_to_all"]
    own = 2 * 32 * 2 * 512 * (4096 + 2048 + 2048 + 4096)
    assert wide == speed.Traffic(own * 7 / 16, own * 8 / 16)
    assert "all_to_all" not in speed.traffic(setting)

    int4 = PARAMETERS / 2
    plain = setting.zero | {"zero_hpz_partition_size": 1, "zero_quantized_gradients": True}
    found = speed.traffic(replace(setting, zero=plain))["reduce_scatter"]
    assert found == speed.Traffic(int4 * 7 / 8, int4 / 2 / 8)  # the node's sum is sent, half of it to the other node
    fp32 = speed.traffic(replace(setting, zero=plain, bf16=False))
    assert fp32["reduce_scatter"] == found
    assert fp32["all_gather_forward"] == speed.Traffic(4 * PARAMETERS * 7 / 8, 4 * PARAMETERS * 15 / 16 / 8)


def test_times_of_update_and_latency(setting: Setting) -> None:
    on_gpu = {key: value for key, value in setting.zero.items() if not key.startswith("offload")}
    shard = PARAMETERS / 16
    assert speed.update(replace(setting, zero=on_gpu), ONE_H100) == pytest.approx(shard * 30 / 3.35e12, rel=1e-3)
    offloaded = replace(setting, zero=on_gpu | {"offload_optimizer": {"device": "cpu"}})
    # The gradient up and, in fp32, down; then the parameter up.
    host, pcie = shard * 30 * 8 / 200e9, shard / (63e9 * 0.8)
    assert speed.update(offloaded, ONE_H100) == pytest.approx(host + (4 + 4 + 2) * pcie, rel=1e-3)
    with_weights = replace(setting, zero=offloaded.zero | {"offload_param": {"device": "cpu"}})
    assert speed.update(with_weights, ONE_H100) == pytest.approx(host + (4 + 4) * pcie, rel=1e-3)
    of_one = replace(offloaded, accumulation=1)
    assert speed.update(of_one, ONE_H100) == pytest.approx(host + (2 + 4 + 2) * pcie, rel=1e-3)

    # Gradients of a micro-batch down and up, summed in fp32 if there are several. Weights up in forward and backward.
    assert speed.to_and_from_host(replace(setting, zero=on_gpu)) == 0
    assert speed.to_and_from_host(offloaded) == pytest.approx(8 * shard, rel=1e-3)
    assert speed.to_and_from_host(with_weights) == pytest.approx(8 * shard + 4 * shard, rel=1e-3)
    assert speed.to_and_from_host(of_one) == pytest.approx(4 * shard, rel=1e-3)
    inputs = replace(setting, zero=on_gpu, checkpointing="offload")
    assert speed.to_and_from_host(inputs) == 2 * 2 * 8192 * 4096 * 32
    slower = (
        speed.predict(offloaded, ONE_H100).communication
        - speed.predict(replace(setting, zero=on_gpu), ONE_H100).communication
    )
    assert slower == pytest.approx(4 * speed.to_and_from_host(offloaded) / (63e9 * 0.8))
    assert speed.update(offloaded, ONE_H100) > 50 * speed.update(replace(setting, zero=on_gpu), ONE_H100)

    assert speed.latency(setting) == pytest.approx(3 * 34 * 20e-6 * 4)  # 32 layers and the ends; 2^4 ranks
    assert speed.latency(replace(setting, world_size=1)) == 0
    found = speed.predict(setting, ONE_H100)
    wire = sum(max(one.link / 360e9, one.network / 40e9) for one in found.traffic.values())  # 450 GB/s, 400 Gb/s; 80 %
    assert setting.accumulation == 4
    assert found.communication == pytest.approx(4 * (wire + 3 * 34 * 20e-6 * 4))


def test_a_slow_network_sets_the_time(setting: Setting) -> None:
    fast, slow = (speed.predict(setting, ONE_H100, network_gbps=one) for one in (400, 10))
    assert fast.communication < fast.compute < slow.communication
    assert slow.step > 2 * fast.step


def test_auto_is_the_fastest_that_fits(setting: Setting) -> None:
    """Of an 8B model at 8k on 16 GPUs: 8 GiB of state, and some 50, 20, 8 or 5 of activations a sequence."""

    def chosen(gib: float, size: bool = False, **fields: Any) -> tuple[str, int]:
        gpu = replace(ONE_H100, memory_gib=gib)
        found, why = choose.choose(replace(setting, **({"checkpointing": "auto"} | fields)), gpu, size)
        assert why["activation_checkpointing"].startswith(found.checkpointing)
        if "checkpointing" not in fields:
            assert choose.fits(found, gpu) == ("nothing fits" not in why["activation_checkpointing"])
        assert found.micro_batch_size * found.accumulation == setting.micro_batch_size * setting.accumulation
        return found.checkpointing, found.micro_batch_size

    needs = {
        mode: memory.gpu_memory(replace(setting, checkpointing=mode)).peak / GIB
        for mode in ("none", "selective", "full", "offload")
    }
    assert list(needs.values()) == sorted(needs.values(), reverse=True)
    for mode, gib in needs.items():
        assert chosen(gib + 0.1) == (mode, 1)
    assert chosen(needs["offload"] - 1) == ("offload", 1)  # said not to fit
    assert chosen(needs["selective"] + 0.1, mlp_tiles=4)[0] != "selective"  # it would keep what tiles spare
    assert chosen(needs["full"] + 0.1, checkpointing="none") == ("none", 1)  # as the recipe says, and said not to fit
    assert chosen(180, True)[0] == "none"
    assert chosen(1000, True)[1] > 1  # weights are gathered less often
    on_cpu, why = choose.choose(replace(setting, checkpointing="auto"), None, True)
    assert (on_cpu.checkpointing, on_cpu.micro_batch_size) == ("none", 1)
    assert "no GPUs" in why["micro_batch_size"]


def test_the_deepspeed_file_is_the_fastest_that_fits(plain: dict[str, Any]) -> None:
    recipe = parse_recipe(plain, ["deepspeed=auto", "data.sequence_length=2048"])
    meta = model.on_meta(recipe.model)

    def gpu_of(gib: float) -> hardware.Gpu:
        return replace(ONE_H100, memory_gib=gib)

    def chosen(gpus: int, gib: float = 79.6, recipe: Any = recipe, **more: Any) -> tuple[str, str]:
        found, why = choose.file(recipe, meta, gpu_of(gib), gpus, 8, **more)
        assert why.startswith(f"{found.deepspeed} (auto: ")
        return found.deepspeed, why

    plainly, hpz, offloaded = FILES
    assert chosen(16)[0] == plainly
    slow, why = chosen(16, options={"network_gbps": 10})
    assert slow == hpz
    assert re.search(r"zero3\.json takes [1-9]\.\d\d × the time", why)
    grows = parse_recipe(plain, ["deepspeed=auto", "data.sequence_length=2048", "model.vocabulary_multiple=8"])
    assert chosen(16, options={"network_gbps": 10}, recipe=grows)[0] == plainly
    small, why = chosen(8, 20)
    assert small == offloaded
    assert re.search(r"zero3\.json takes [\d.]+ of 20.0 GiB", why)
    assert "hpz" not in why  # on one node
    little, why = chosen(8, 20, node_gib=64)
    assert little == plainly
    assert "nothing fits" in why
    offloading = setting_of(recipe.with_deepspeed(offloaded), meta, 8, 8, node_gib=64)
    advice = choose.changes(replace(offloading, zero=setting_of(recipe, meta, 8, 8).zero), gpu_of(20))
    assert not any("offload.json" in one["change"] for one in advice)
    # GPUs of a node are not known, or do not fill the nodes: not with hpZ.
    unknown, why = choose.file(recipe, meta, ONE_H100, 16, None, {"network_gbps": 10})
    assert (unknown.deepspeed, "not known" in why) == (plainly, True)
    assert choose.file(parse_recipe(plain, ["deepspeed=auto", "train.global_batch_size=96"]), meta, ONE_H100, 12, 8)
    assert "there are no GPUs" in choose.file(recipe, meta, None, 16, 8)[1]
    assert read_config(recipe) == read_config(recipe.with_deepspeed(plainly))


def test_what_would_fit_fits_and_is_told_by_keys_of_the_recipe(setting: Setting) -> None:
    gpu = hardware.gpu("a100-40gb")
    too_large = replace(setting, checkpointing="none", micro_batch_size=2, accumulation=2)
    assert not choose.fits(too_large, gpu)
    found = choose.changes(too_large, gpu)
    assert 0 < len(found) <= 3
    assert [one["slower"] for one in found] == sorted(one["slower"] for one in found)
    for one in found:
        assert one["peak"] <= gpu.memory_gib * GIB
        assert all(re.fullmatch(r"\d+ GPUs|(train|deepspeed)[\w.]*=\S+", key) for key in one["change"].split(" and "))


def test_advice_of_more_gpus_is_what_the_plan_of_them_says(plain: dict[str, Any]) -> None:
    """hpZ's second copy is of a node's ranks, which one node has not."""
    recipe = parse_recipe(plain, ["deepspeed=ds_configs/zero3_hpz.json", "data.sequence_length=4096"])
    meta, small = model.on_meta(recipe.model), hardware.gpu("a100-40gb")
    setting = setting_of(recipe, meta, 2, 2)
    assert not choose.fits(setting, small)
    grown = choose.on_gpus(setting, 4)
    planned = setting_of(recipe, meta, 4, 2, accumulation=grown.accumulation)
    assert memory.gpu_memory(grown).peak == memory.gpu_memory(planned).peak
    with_tiles = replace(setting, mlp_tiles=4, checkpointing="none")
    assert not any("selective" in name for names, _ in choose._changed(with_tiles) for name in names)


def test_a_run_that_does_not_fit_is_not_started(plain: dict[str, Any]) -> None:
    recipe = parse_recipe(plain | {"train": plain["train"] | {"activation_checkpointing": "none"}})
    of_8b = setting_of(recipe, model.on_meta(recipe.model), 16, 8)
    refused, told = preflight._memory_problems(recipe, of_8b, hardware.gpu("a100-40gb"))
    assert "What would fit" in refused[0]
    assert not told
    warned = recipe.model_copy(update={"train": recipe.train.model_copy(update={"on_no_memory": "warn"})})
    refused, told = preflight._memory_problems(warned, of_8b, hardware.gpu("a100-40gb"))
    assert not refused
    assert len(told) == 1
    assert preflight._memory_problems(recipe, of_8b, hardware.gpu("b200")) == ([], [])
    assert preflight._memory_problems(recipe, of_8b, None) == ([], [])
    # Where it hangs on what the allocator cannot use, which is an estimate, it is told only.
    needed = memory.gpu_memory(of_8b)
    edge = replace(ONE_H100, memory_gib=(needed.peak - needed.outside[memory.SLACK] / 2) / GIB)
    refused, told = preflight._memory_problems(recipe, of_8b, edge)
    assert (len(refused), len(told)) == (0, 1)


def test_ranks_that_come_to_different_choices_are_named() -> None:
    plain, _, offloaded = FILES
    require_same_choice([("a", 2, "none", plain), ("a", 2, "none", plain), ("b", 2, "none", plain)])
    with pytest.raises(BadInput, match=r"2, none, .*zero3\.json on a, 1, none, .*zero3\.json on b"):
        require_same_choice([("a", 2, "none", plain), ("b", 1, "none", plain)])
    with pytest.raises(BadInput, match=r"zero3\.json on a, 2, none, .*zero3_offload\.json on b"):
        require_same_choice([("a", 2, "none", plain), ("b", 2, "none", offloaded)])
    with pytest.raises(BadInput, match=r"2, none, .* on a, 2, full, .* on b"):
        require_same_choice([("a", 2, "none", plain), ("b", 2, "full", plain)])


def test_names_of_gpus_and_files_of_more(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="did you mean h100-80gb"):
        hardware.gpu("h100-80")
    with pytest.raises(BadInput, match="did you mean a100-40gb or a100-80gb"):
        hardware.gpu("A100")
    file = tmp_path / "more.yaml"
    entry = yaml.safe_load(hardware.TABLE.read_text())["h200"]
    file.write_text(yaml.safe_dump({"Mine": entry | {"memory_gib": 100}}))
    assert hardware.gpu("mine", str(file)).memory_gib == 100
    file.write_text(
        yaml.safe_dump({"mine": entry | {"tflops": -1}, "large": entry | {"memory_gib": float("inf")}, "x": {}})
    )
    with pytest.raises(BadInput) as caught:
        hardware.gpu("mine", str(file))
    assert len(caught.value.problems) == 3


def test_the_verb(
    plain: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*words: str) -> int:
        monkeypatch.setattr("sys.argv", ["fullft", *words])
        return cli.main()

    recipe = str(write_recipe(plain, tmp_path / "recipe.yaml"))
    enough = ["plan", recipe, "--nodes", "2", "--price-per-gpu-hour", "2.5", "--plot", str(tmp_path / "memory.svg")]
    assert run(*enough, "train.activation_checkpointing=auto", "train.micro_batch_size=auto") == 0
    said = capsys.readouterr().out
    assert said.startswith("fits: 16 × h100-80gb")
    assert "the run: 2.1e+06 tokens" in said  # 4 steps of 64 sequences of 8192
    assert ElementTree.parse(tmp_path / "memory.svg").getroot().tag.endswith("svg")

    assert run("plan", recipe, "--gpus-per-node", "4", "--gpu", "a100-40gb", "--tokens", "1e9", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert 0 < len(found["would_fit"]) <= 3
    assert found["run"]["gpu_hours"] == pytest.approx(1e9 / found["step"]["tokens_per_second_per_gpu"] / 3600, rel=1e-6)

    for words, told in {
        ("--gpu", "h1000"): "no such GPU", ("--nodes", "0"): "--nodes: 0", ("--efficiency", "2"): "--efficiency",
        ("--plot", "x.gif"): "must end in", ("--params", "8b"): "give one of", ("--layers", "3"): "belong to --params",
        ("--gpus-per-node", "7"): "global_batch_size", ("train.micro_batch=2",): "unknown key",
        ("--tokens", "nan"): "--tokens", ("--price-per-gpu-hour", "inf"): "--price-per-gpu-hour",
    }.items():  # fmt: skip
        assert run("plan", recipe, *words) == 2
        assert told in capsys.readouterr().err
    assert run("plan", "--model", str(tmp_path / "nowhere")) == 2
    assert run("plan", "--params", "30b") == 2
    assert run("plan", "--params", "lots", "--layers", "3") == 2
    capsys.readouterr()
    assert run("plan", "--params", "7b", "--gpus-per-node", "0") == 2
    assert "--gpus-per-node: 0 must be above 0" in capsys.readouterr().err
    (tmp_path / "mamba").mkdir()
    (tmp_path / "mamba" / "config.json").write_text(
        '{"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2}'
    )
    assert run("plan", "--model", str(tmp_path / "mamba")) == 2
    assert "a layer of mamba has no attention heads" in capsys.readouterr().err


def test_nothing_but_the_plan_is_on_stdout_of_a_machine_without_gpu() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    command = [sys.executable, "-m", "fullft.cli", "plan", "--params", "8b", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert json.loads(done.stdout)["fits"] is (done.returncode == 0), done.stderr


def test_sizes_alone_are_enough(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The parameters of published models; and the smallest clusters of the one that nobody can hold on a node."""
    for params, exact in {"8b": PARAMETERS, "13b": 13_015_864_320}.items():
        monkeypatch.setattr("sys.argv", ["fullft", "plan", "--params", params, "--json"])
        cli.main()
        assert json.loads(capsys.readouterr().out)["parameters"] == exact
    monkeypatch.setattr("sys.argv", ["fullft", "plan", "--params", "3b", "--layers", "28", "--json"])
    cli.main()
    assert json.loads(capsys.readouterr().out)["parameters"] == pytest.approx(3e9, rel=0.05)

    words = "--params 70b --search --gpu h100-80gb --nodes 8 --tokens 1e9 data.sequence_length=8192 --json"
    monkeypatch.setattr("sys.argv", ["fullft", "plan", *words.split(), "train.global_batch_size=512"])
    assert cli.main() == 0
    search = json.loads(capsys.readouterr().out)["search"]
    smallest, cheapest = (next(one for one in search if one["is"] == which) for which in ("smallest", "cheapest"))
    assert smallest["gpus"] <= 16 < cheapest["gpus"]  # offloaded, and not
    assert smallest["offload_optimizer"] > cheapest["offload_optimizer"]
    assert cheapest["gpu_hours"] < smallest["gpu_hours"]


def test_a_search_finds_what_the_plan_of_it_says(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "--params 8b --gpu h100-80gb --tokens 1e9 --json train.precision=fp32 retention.max_overhead=0.2"

    def planned(*more: str) -> dict[str, Any]:
        monkeypatch.setattr("sys.argv", ["fullft", "plan", *words.split(), *more])
        cli.main()
        return dict(json.loads(capsys.readouterr().out))

    batch = "train.global_batch_size=64"
    for one in planned("--search", batch)["search"]:
        keys = [f"train.{key}={one[key]}" for key in ("micro_batch_size", "activation_checkpointing")]
        cluster = ["--nodes", str(-(-one["gpus"] // 8)), "--gpus-per-node", str(min(8, one["gpus"]))]
        found = planned(*cluster, batch, *keys, f"deepspeed={one['deepspeed']}")
        assert found["fits"]
        assert (found["peak"], found["run"]["gpu_hours"]) == (one["peak"], pytest.approx(one["gpu_hours"]))
