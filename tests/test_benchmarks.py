"""The benchmarks measure what they say: turns, the count of FLOP, and that contenders train the same."""

from __future__ import annotations

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

from benchmarks import models, step
from benchmarks.turns import WARM_UP, Contender, alternate, one_by_one, ratio

# A loop whose step `number` takes so many hundredths of a second; it writes its name at each.
LOOP = """
import sys, time
from benchmarks.turns import Ended, Turns
name, hundredths, fails_at, file, _, descriptor = sys.argv[1:]
turns = Turns(int(descriptor))
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


def test_a_goal_without_a_measurement_is_not_met() -> None:
    row = {"peak_bytes": 1, "mfu_of_matmul": 0.6}
    one = {"median": 1.5, "quartile_low": 1.4, "quartile_high": 1.6, "pairs": 5}
    found = {each["name"]: each["met"] for each in step.goals(
        {"fullft": row, "trl": {}}, {"trl/fullft": {"seconds": one, "cpu_seconds": one}}, cpu=False)}  # fmt: skip
    assert found == {
        "times TRL's tokens a second, seconds": True, "losses against TRL's, relative": False,
        "peak memory, of TRL's": False, "model FLOP/s of a large matrix product's": True,
    }  # fmt: skip


def test_a_part_that_fails_does_not_stop_the_next(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text(
        f'#!/bin/sh\ncase "$2" in\nbenchmarks.environment) echo no torch; exit 3;;\nbenchmarks.matmul) sleep 30;;\n'
        f'benchmarks.gpu_table) exec {sys.executable} "$@";;\n*) echo measured;;\nesac\n'
    )
    fake.chmod(0o755)
    environment = os.environ | {
        "PYTHON": str(fake), "OUT": str(tmp_path / "out"), "SIZES": "tiny", "PARTS": "environment matmul whole_run",
        "SECONDS_OF_PART": "2",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", str(REPOSITORY / "benchmarks" / "gpu.sh")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    parts = [json.loads(line) for line in (tmp_path / "out" / "parts.jsonl").read_text().splitlines()]
    assert [(one["part"], one["code"]) for one in parts] == [("environment", 3), ("matmul", 124), ("whole_run", 0)]
    assert "| matmul | cut off by its time limit |" in (tmp_path / "out" / "gpu.md").read_text()
