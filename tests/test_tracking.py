"""metrics.jsonl and W&B hold every step once, whatever happens to the run or to W&B."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from wandb.proto import wandb_internal_pb2

from fullft.recipe import Recipe, parse_recipe
from fullft.tracking import Tracker

# A training process: logs steps `first` to `last`, then ends well or is killed.
LOGGER = """
import os, signal, sys
from fullft.recipe import load_recipe
from fullft.tracking import Tracker
config, resumed, last, end = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
tracker = Tracker(load_recipe(config), True, 20, resumed)
for step in range(resumed + 1, last + 1):
    tracker.log(step, {"train/global_step": step, "train/loss": 1 / step}, "")
if end == "killed":
    import time
    time.sleep(3)  # wandb-core writes once a second
    os.kill(os.getpid(), signal.SIGKILL)
tracker.finish({"final": 1.0})
"""


@pytest.fixture
def tracked(recipe: dict[str, Any]) -> Recipe:
    recipe["tracking"] = {"wandb": "offline", "project": "tests"}
    parsed = parse_recipe(recipe)
    parsed.run_folder.mkdir(parents=True)
    (parsed.run_folder / "recipe.yaml").write_text(parsed.to_yaml())
    return parsed


def log(recipe: Recipe, resumed: int, last: int, end: str) -> None:
    config = str(recipe.run_folder / "recipe.yaml")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    command = [sys.executable, "-c", LOGGER, config, str(resumed), str(last), end]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == (-signal.SIGKILL if end == "killed" else 0), done.stderr


def records(file: Path) -> Iterator[Any]:
    """The records of a .wandb file: a 7-byte header, then LevelDB log blocks of 32 KiB."""
    content = file.read_bytes()
    at, body = 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        if not kind:
            return
        body += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(body)
            yield record
            body = b""


def wandb_steps(recipe: Recipe) -> tuple[set[str], list[int]]:
    """(run ids, steps of the history) over all offline parts of a run."""
    ids, steps = set(), []
    for file in sorted(recipe.run_folder.glob("wandb/offline-run-*/*.wandb")):
        for record in records(file):
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
            if record.WhichOneof("record_type") == "history":
                values = {".".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                steps.append(int(values["_step"]))
    return ids, steps


def test_a_resumed_run_is_one_run_with_every_step_once(tracked: Recipe) -> None:
    log(tracked, 0, 6, "killed")
    log(tracked, 3, 4, "killed")  # the checkpoint was of step 3: steps 4 to 6 are done again,
    log(tracked, 3, 9, "well")  # and again
    rows = [json.loads(line) for line in (tracked.run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 10))
    ids, steps = wandb_steps(tracked)
    assert ids == {json.loads((tracked.run_folder / "wandb_run.json").read_text())["id"]}
    assert steps == list(range(1, 10))


def test_a_torn_last_line_is_cut_off(tracked: Recipe) -> None:
    file = tracked.run_folder / "metrics.jsonl"
    file.write_text('{"step": 1, "train/loss": 2.0}\n{"step": 2, "train/lo')
    Tracker(
        tracked.model_copy(update={"tracking": tracked.tracking.model_copy(update={"wandb": "disabled"})}), True, 9, 1
    )
    assert file.read_text() == '{"step": 1, "train/loss": 2.0}\n'


def test_ranks_other_than_the_first_write_nothing(tracked: Recipe) -> None:
    tracker = Tracker(tracked, False, 20, 0)
    tracker.log(1, {"train/loss": 1.0}, "")
    tracker.finish({})
    assert [path.name for path in tracked.run_folder.iterdir()] == ["recipe.yaml"]


def test_training_goes_on_when_wandb_dies(tracked: Recipe) -> None:
    program = LOGGER.replace(
        "for step in",
        "import psutil\nfor child in psutil.Process().children(recursive=True): child.kill()\nfor step in",
    )
    config = str(tracked.run_folder / "recipe.yaml")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    done = subprocess.run(
        [sys.executable, "-c", program, config, "0", "5", "well"],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "training goes on without it" in done.stdout
    assert len((tracked.run_folder / "metrics.jsonl").read_text().splitlines()) == 5
