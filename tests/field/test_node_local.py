"""Run folders on disks that nodes do not share: told before training, or checkpoints in parts that are whole."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import chats, metrics, write_jsonl
from ranks import Ranks
from test_architectures import SMALL, save_model
from transformers import LlamaConfig

from fullft.errors import BadInput
from fullft.export import export_checkpoint

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(shutil.which("mount") is None or os.geteuid() != 0, reason="needs mount namespaces, and root"),
]
NODES = ("node1", "node2", "node2")  # of each rank

# Gives a rank the hostname of its node, and a run folder of its own, as a local disk at the same path would.
PROGRAM = """
import ctypes, os, socket, subprocess
from fullft import cluster
cluster._LOOKS = 1
node, disk = {nodes!r}[int(os.environ["RANK"])], {folder!r}
assert ctypes.CDLL(None, use_errno=True).unshare(0x00020000 | 0x04000000) == 0, ctypes.get_errno()
socket.sethostname(node)
subprocess.run(["mount", "--make-rprivate", "/"], check=True)
subprocess.run(["mount", "--bind", os.path.join(disk, node), os.path.join(disk, "run")], check=True)
"""

# SIGTERM comes to rank 0 as its second step ends.
SIGNAL = """
import signal
from fullft import account
ended, steps = account.Account.end_step, []
def end_step(self, *of_step):
    steps.append(ended(self, *of_step))
    if len(steps) == 2 and os.environ["RANK"] == "0":
        os.kill(os.getpid(), signal.SIGTERM)
    return steps[-1]
account.Account.end_step = end_step
"""


def train(recipe: dict[str, Any], code: int = 0, nodes: tuple[str, ...] = NODES, more: str = "") -> str:
    """Run a rank on each node to the end; returns what they have said."""
    folder = Path(recipe["run_dir"]).parent
    for node in {"run", *nodes}:
        (folder / node).mkdir(exist_ok=True)
    with Ranks(recipe, len(nodes), PROGRAM.format(nodes=nodes, folder=str(folder)) + more) as ranks:
        codes = ranks.codes()
        said = "\n".join(log.read_text() for log in ranks.logs)
    assert set(codes) == {code}, said
    return said


@dataclass(frozen=True)
class Trained:
    recipe: dict[str, Any]
    folder: Path  # of node1/ and node2/, which are the run folder there
    refused: str  # what was said without the key


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("node-local")
    config = LlamaConfig(**SMALL, tie_word_embeddings=True)
    recipe = {
        "run_dir": str(folder / "run"),
        "model": {"path": str(save_model(config, tiny_model, folder / "model"))},
        "data": {
            "train": str(write_jsonl(folder / "train.jsonl", chats(20))), "sequence_length": 128,
            "validation": str(write_jsonl(folder / "held-out.jsonl", chats(3))),
        },
        "train": {"steps": 6, "global_batch_size": 6, "learning_rate": 1e-3},
        "checkpoint": {"every_steps": 2, "keep": 2, "keep_best": False},
        "retention": {"kl_tokens": 0},
        "tracking": {"wandb": "disabled"},
        "export": {"dtype": "fp32"},
    }  # fmt: skip
    refused = train(recipe, code=2)
    recipe["checkpoint"] |= {"use_node_local_storage": True}
    train(recipe)
    return Trained(recipe, folder, refused)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_run_folder_that_nodes_do_not_share_is_refused_before_the_model_is_loaded(trained: Trained) -> None:
    assert f"run_dir: {trained.recipe['run_dir']} is not the same folder on node2 as on node1" in trained.refused
    assert "checkpoint.use_node_local_storage=true" in trained.refused
    assert "loading" not in trained.refused
    assert "Traceback" not in trained.refused


def test_each_node_has_its_part_of_the_same_checkpoints_and_the_first_the_whole_export(
    trained: Trained, tmp_path: Path
) -> None:
    first, second = (trained.folder / node / "checkpoints" for node in ("node1", "node2"))
    assert files(first) == files(second) == {"step-00000004", "step-00000006"}
    beside = {".metadata", "state.json", "MANIFEST.json"}
    for step in files(first):
        assert files(first / step) == beside | {"__0_0.distcp"}
        assert files(second / step) == beside | {"__1_0.distcp", "__2_0.distcp"}
    assert not (trained.folder / "node2/export").exists()
    with pytest.raises(
        BadInput, match=r"__1_0.distcp is missing \(node2 wrote it\).* copied into one folder, are the whole"
    ):
        export_checkpoint(trained.folder / "node1", tmp_path / "out")
    # Put together they are a checkpoint like any other.
    whole = tmp_path / "run"
    for node in ("node1", "node2"):
        shutil.copytree(trained.folder / node, whole, dirs_exist_ok=True)
    export_checkpoint(whole, tmp_path / "out")
    weights = (trained.folder / "node1/export/model.safetensors").read_bytes()
    assert (tmp_path / "out/model.safetensors").read_bytes() == weights


def test_the_same_nodes_go_on_to_the_same_model_and_others_are_told_what_they_lack(trained: Trained) -> None:
    first, recipe = trained.folder / "node1", trained.recipe
    rows, weights = metrics({"run_dir": str(first)}), (first / "export/model.safetensors").read_bytes()
    # As if killed when node2 had given its part of the last checkpoint the name, and node1 had not.
    shutil.rmtree(first / "checkpoints/step-00000006")
    (first / "state.json").unlink()
    said = train(recipe, code=2, nodes=("node1", "node3", "node3"))
    assert "step-00000004: MANIFEST.json is missing, on node3" in said
    assert "start on the hosts that wrote them" in said
    said = train(recipe, code=2, nodes=("node3", "node2", "node2"))
    assert "has checkpoints on node2, and none on node3, where rank 0 is" in said
    said = train(recipe, code=85, more=SIGNAL)  # before the evaluation of the last step, whose row is saved
    assert f"resumed from {recipe['run_dir']}/checkpoints/step-00000004 at step 4" in said
    said = train(recipe)
    assert f"resumed from {recipe['run_dir']}/checkpoints/step-00000006 at step 6" in said
    again = metrics({"run_dir": str(first)})
    assert [row["train/loss"] for row in again if "train/loss" in row] == [
        row["train/loss"] for row in rows if "train/loss" in row
    ]
    assert (first / "export/model.safetensors").read_bytes() == weights
    assert files(first / "checkpoints") == files(trained.folder / "node2/checkpoints")
    assert "is done already" in train(recipe)  # though node2 has no state.json
