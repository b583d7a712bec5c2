"""The benchmarks measure what they say: turns, the count of FLOP, and that contenders train the same."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, write_recipe
from ranks import wait_for
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import common, environment, gpu_table, kernels, models, step
from benchmarks.turns import OUT_OF_TIME, WARM_UP, Contender, alternate, one_by_one, ratio

# A loop whose step `number` takes so many hundredths of a second; it writes its name at each.
LOOP = """
import sys, time
from benchmarks.turns import Ended, Turns
name, hundredths, fails_at, file, _, descriptor = sys.argv[1:]
turns = Turns(int(descriptor))
turns.in_use = {"attention": name}
try:
    for number in range(1000):
        turns.step_begins()
        if number == int(fails_at):
            raise SystemExit("this contender fails")
        with open(file, "a") as out:
            out.write(name)
        time.sleep(int(hundredths) / 100)
except Ended:
    turns.end(losses=[number])
"""


@pytest.fixture
def loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """loop(name, hundredths, fails_at=-1): a contender; the order of all steps is in `order` of tmp_path."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    (tmp_path / "loop.py").write_text(LOOP)

    def contender(name: str, hundredths: int, fails_at: int = -1) -> Contender:
        command = [sys.executable, str(tmp_path / "loop.py"), name, str(hundredths), str(fails_at)]
        return Contender(name, [*command, str(tmp_path / "order")])

    return contender


def test_contenders_take_turns(loop: Any, tmp_path: Path) -> None:
    slow, fast = loop("s", 4), loop("f", 2)
    assert alternate([slow, fast], tmp_path, turns=4, steps=2, cpu=True) == {}
    order = (tmp_path / "order").read_text()
    assert sorted(order[: 2 * WARM_UP]) == ["f"] * WARM_UP + ["s"] * WARM_UP
    rounds = [order[at : at + 4] for at in range(2 * WARM_UP, len(order), 4)]
    assert len(rounds) == 4
    assert set(rounds) <= {"ssff", "ffss"}  # never both at once
    assert [turn["steps"] for turn in slow.turns] == [2] * 4
    assert slow.results[0]["losses"] == [WARM_UP + 8]
    assert slow.results[0]["memory"]["peak_bytes"] > 1e6
    assert slow.in_use == {"attention": "s"}
    assert ratio(slow, fast, "seconds")["median"] == pytest.approx(2, rel=0.5)


def test_a_contender_that_fails_does_not_end_the_others(loop: Any, tmp_path: Path) -> None:
    good, bad = loop("g", 0), loop("b", 0, fails_at=WARM_UP + 1)
    failed = alternate([good, bad], tmp_path, turns=3, steps=2, cpu=True)
    assert list(failed) == ["b"]
    assert "this contender fails" in failed["b"]
    assert (len(good.turns), bad.turns) == (3, [])


def test_those_that_do_not_fit_together_run_one_by_one(loop: Any, tmp_path: Path) -> None:
    first, bad, last = loop("a", 0), loop("b", 0, fails_at=0), loop("c", 0)
    failed = one_by_one([first, bad, last], tmp_path, rounds=2, steps=3, cpu=True)
    assert list(failed) == ["b"]
    assert (tmp_path / "order").read_text() == ("a" * (WARM_UP + 3) + "c" * (WARM_UP + 3)) * 2
    assert len(first.turns) == len(last.turns) == 2


@pytest.mark.usefixtures("loop")
def test_what_was_measured_before_a_time_limit_is_kept(tmp_path: Path) -> None:
    program = tmp_path / "limited.py"
    program.write_text(f"""
import json, os, sys
from pathlib import Path
from benchmarks.turns import Contender, alternate, end_in_time
end_in_time()
folder = Path({str(tmp_path)!r})
loop, order = str(folder / "loop.py"), str(folder / "order")
contenders = [Contender(name, [sys.executable, loop, name, "1", "-1", order]) for name in "ab"]
failed = alternate(contenders, folder, turns=10**6, steps=1, cpu=True)
print(json.dumps([failed, [len(one.turns) for one in contenders], [one.results for one in contenders]]))
""")
    process = subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True)
    wait_for(lambda: (tmp_path / "order").exists() and len((tmp_path / "order").read_text()) > 20, "turns")
    process.terminate()
    output, _ = process.communicate(timeout=60)
    failed, turns, results = json.loads(output)
    assert list(failed) == ["in time"]
    assert min(turns) > 3
    assert any(results)  # of the one that was waiting


@pytest.mark.parametrize("size", ["tiny", "1b"])
def test_the_count_of_flop_is_that_of_the_model(size: str) -> None:
    """But for attention, of which torch counts the whole square of a document and we the lower triangle."""
    shape = {key: value for key, value in models.SHAPES[size].items() if key != "model_type"}
    config = LlamaConfig(**shape, attn_implementation="eager")
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    length = 48
    with FlopCounterMode(display=False) as counter:
        ids = torch.zeros(1, length, dtype=torch.int64, device="meta")
        model(input_ids=ids, attention_mask=torch.zeros(1, 1, length, length, device="meta"), use_cache=False)
    triangle = models.model_flops(size, [length], length, length) / 3
    upper = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * (length**2 - length)
    assert counter.get_total_flops() == triangle + upper
    assert models.parameters(size) == pytest.approx(sum(one.numel() for one in model.parameters()), rel=1e-3)


@pytest.mark.ranks
def test_the_bare_loop_trains_as_fullft_does(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the difference of their times would say nothing."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    recipe["train"] |= {"steps": 9, "schedule": "constant"}
    contenders = []
    for name in ("fullft", "bare"):
        config = write_recipe(recipe | {"run_dir": str(tmp_path / name)}, tmp_path / f"{name}.yaml")
        contenders.append(Contender(name, [sys.executable, "-m", "benchmarks.contenders", name, str(config)], 2))
    assert alternate(contenders, tmp_path, turns=2, steps=2, cpu=True) == {}
    ours, bare = (one.results[0] for one in contenders)
    assert len(ours["losses"]) == WARM_UP + 4
    assert step.loss_difference(ours, bare) < 1e-6
    told = contenders[0].in_use
    assert told == contenders[1].in_use
    assert told["state_bytes"] > 0
    assert step.told({"in_use": told}) == "attention varlen, a call per document; kernels none; checkpointing none"


def test_a_goal_without_a_measurement_is_not_met() -> None:
    row = {"peak_bytes": 1, "mfu_of_matmul": 0.6}
    one = {"median": 1.5, "quartile_low": 1.4, "quartile_high": 1.6, "pairs": 5}
    found = {each["name"]: each["met"] for each in step.goals(
        {"fullft": row, "trl": {}}, {"trl/fullft": {"seconds": one, "cpu_seconds": one}}, cpu=False)}  # fmt: skip
    assert found == {
        "times TRL's tokens a second, seconds": True, "losses against TRL's, relative": False,
        MEMORY_GOAL: False, "model FLOP/s of a large matrix product's": True,
    }  # fmt: skip


MEMORY_GOAL = "peak memory beyond weights, gradients and optimizer state (16 or 18 bytes a parameter), of TRL's"


@pytest.mark.parametrize(("ours", "met"), [(126, True), (128, False), (119, False)])
def test_memory_is_judged_beyond_the_training_state(ours: int, met: bool) -> None:
    """120 of both are weights, gradients and moments: 0.7 of TRL's whole peak no program could reach."""
    rows = {name: {"peak_bytes": peak, "mfu_of_matmul": 0.6, "in_use": {"state_bytes": 120}}
            for name, peak in (("fullft", ours), ("trl", 130))}  # fmt: skip
    memory = step.of_memory(rows, cpu=False)
    assert memory["fullft/trl"]["peak_bytes"] == ours / 130
    one = {"seconds": {"median": 1.5}}
    found = {each["name"]: each["met"] for each in step.goals(rows, memory | {"trl/fullft": one}, cpu=False)}
    assert found[MEMORY_GOAL] is met
    assert step.of_memory(rows, cpu=True) == {}  # there libraries are in the peak


@pytest.fixture
def switches(loop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: dict[str, Any]) -> Any:
    """switches(cut=""): rows of two switches whose contenders are loops of which two do not fit into the memory."""
    monkeypatch.setattr(kernels, "all_fit", lambda *_: False)
    monkeypatch.setattr(kernels, "contender_of", lambda _, __, name, value, ___: _named(loop(name[0], 1), value))
    setting = step.Setting(tmp_path, "tiny", 128, 1, cpu=True)
    setting.recipe = recipe
    arguments = argparse.Namespace(overrides=[], steps=1, turns=3)
    counts = dict.fromkeys(("tokens_of_step", "labelled_of_step", "flops_of_step"), 1.0)

    def measured(*names: str) -> list[dict[str, Any]]:
        base, rows = kernels.contender_of(setting, arguments, "base", kernels.BASE, []), []
        for name in names:
            found = kernels.measure(name, base, setting, arguments, None)
            rows += kernels.rows_of(name, base, *found, counts, setting, 1.0)
        return rows

    return measured


def _named(contender: Contender, name: str) -> Contender:
    contender.name = name
    return contender


def test_the_recipe_as_it_is_is_measured_once_for_all_switches(switches: Any, tmp_path: Path) -> None:
    rows = switches("kernels", "mlp_tiles")
    assert (tmp_path / "order").read_text() == "".join(name * (WARM_UP + 1) for name in "bkkmm")
    found = {(one["switch"], one["value"]): one.get("not_measured", one.get("in_use")) for one in rows}
    assert found == {
        ("kernels", "as it is"): {"attention": "b"}, ("kernels", "none"): {"attention": "k"},
        ("kernels", "liger"): {"attention": "k"}, ("kernels", "auto"): "is the recipe as it is",
        ("mlp_tiles", "2"): {"attention": "m"}, ("mlp_tiles", "8"): {"attention": "m"},
    }  # fmt: skip
    assert all(one["seconds_of_base"]["pairs"] == 1 for one in rows if "in_use" in one)


def test_a_switch_that_a_time_limit_cuts_says_so(switches: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(contenders: list[Contender], *_: Any, **__: Any) -> dict[str, str]:
        contenders[0].turns.append({"steps": 1, "seconds": 1.0, "cpu_seconds": 1.0})
        return {OUT_OF_TIME: "some were cut off by a time limit: fewer turns than wanted"}

    monkeypatch.setattr(kernels, "one_by_one", cut)
    rows = switches("mlp_tiles")
    assert [one.get("not_measured") for one in rows] == [None, kernels.NOT_IN_TIME, kernels.NOT_IN_TIME]


def test_a_result_knows_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What benchmarks write is no change of the program; and a machine without git measures as well."""

    def git(*words: str) -> str:
        names = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", *names, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    (tmp_path / "program.py").write_text("")
    git("add", ".")
    git("commit", "-qm", "first")
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setattr(common, "RESULTS", tmp_path / "out")
    head = git("rev-parse", "HEAD").strip()
    for folder in ("out", "benchmarks/results"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "result.json").write_text("{}")
    assert common.commit() == head
    (tmp_path / "other.py").write_text("")
    assert common.commit() == f"{head} with changes"
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert common.commit() == "unknown"


def test_packages_are_followed_to_those_that_they_need() -> None:
    missing, _, found = environment.packages()
    assert not [line for line in missing if "not installed" in line]
    assert {"hjson", "py-cpuinfo", "pyarrow", "pydantic-core"} <= {name.lower().replace("_", "-") for name in found}
    download, deepspeed, *_ = environment.carry()
    assert f"'pydantic-core=={found['pydantic-core']}'" in download
    assert "'torch=" not in download
    assert "deepspeed" in deepspeed


GPU = str(REPOSITORY / "benchmarks" / "gpu.sh")
FAKE = f"""#!/bin/sh
case "$2" in
benchmarks.environment) echo no torch; exit 3;;
benchmarks.matmul) sleep 30;;
benchmarks.step)
    echo '{{"benchmark": "step", "rows": {{"contenders": {{}}, "ratios": {{}}}}, "goals": [], "conditions":' \
        '{{"size": "1b", "sequence_length": 8, "failed": {{}}, "without": ["TRL"]}}}}' > $OUT/step-1b-gpu.json
    echo $OUT/step-1b-gpu.json;;
benchmarks.kernels) echo '{{"benchmark": "ker' > $OUT/kernels-gpu.json; echo $OUT/kernels-gpu.json;;
benchmarks.gpu_table) exec {sys.executable} "$@";;
*) echo measured;;
esac
"""


@pytest.fixture
def gpu(tmp_path: Path) -> Any:
    """gpu(part, …): gpu.sh with an interpreter that runs no part; returns what parts.jsonl and gpu.md say."""
    fake, out = tmp_path / "python", tmp_path / "out"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    environment = os.environ | {"PYTHON": str(fake), "OUT": str(out), "SECONDS_OF_PART": "2"}

    def run(*parts: str, code: int = 0) -> tuple[list[tuple[str, int]], str]:
        done = subprocess.run(["bash", GPU, *parts], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        if code:
            return [], done.stderr
        lines = [json.loads(line) for line in (out / "parts.jsonl").read_text().splitlines()]
        return [(one["part"], one["code"]) for one in lines], (out / "gpu.md").read_text()

    return run


def test_a_part_that_fails_does_not_stop_the_next(gpu: Any) -> None:
    ended, table = gpu("environment", "matmul", "whole_run")
    assert ended == [("environment", 3), ("matmul", 124), ("whole_run", 0)]
    assert "| matmul | cut off by its time limit |" in table


def test_parts_in_several_calls_make_one_table(gpu: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "step-8b-other-gpu.json").write_text('{"benchmark": "step"}')  # of another machine
    gpu("step-1b")
    ended, table = gpu("environment", "kernels")
    switches = [(f"kernels-{one}", 0) for one in kernels.SWITCHES]
    assert ended == [("step-1b", 0), ("environment", 3), *switches]
    assert "| step-1b | done, without TRL |" in table
    assert "## Step, 1b × 8 tokens" in table
    assert "kernels-gpu.json cannot be read, and is left out" in table
    assert "8b" not in table
    _, message = gpu("kernel", code=2)
    assert "no part is named kernel" in message


def test_the_table_tells_what_a_row_ran_with() -> None:
    used = {"attention": "sdpa", "kernels": "none", "activation_checkpointing": "full", "state_bytes": 2**30}
    times = {"step_seconds": 1.0, "tokens_per_second": 1.0, "labelled_tokens_per_second": 1.0, "mfu_of_matmul": 0.1}
    one = times | {"in_use": used, "switch": "attention", "value": "auto"}
    for columns, cells in (
        (gpu_table.STEP, gpu_table.step_row("trl", one)),
        (gpu_table.KERNELS, gpu_table.kernel_row(one)),
    ):
        assert dict(zip(columns, cells, strict=True))["attention; kernels; checkpointing"] == "sdpa; none; full"
