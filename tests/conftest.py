"""A tiny pretrained model with a tokenizer, made here because tests have no hub, and starting real ranks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
import yaml

REPOSITORY = Path(__file__).parent.parent
sys.path.insert(0, str(REPOSITORY))  # benchmarks
sys.path.insert(0, str(REPOSITORY / "launch"))  # quickstart.py has the tokenizer and the random model

GPU = os.environ.get("FULLFT_TEST_GPU") == "1"  # for `pytest -m gpu`, which leaves the other tests out
ON_CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
CPU_RANKS = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"} | ({} if GPU else ON_CPU)
os.environ |= CPU_RANKS

import warm  # noqa: E402

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "Weights, gradients and moments are sharded over the ranks.",
    "A model that learns a narrow task may forget what it knew before.",
    "Every token of the answer is a target, and nothing else is.",
]


# Files that take minutes: begun first, so that no worker is left alone with one at the end.
LONGEST = [
    "faults",
    "signals",
    "prepare",
    "quickstart",
    "load",
    "long_context",
    "export",
    "checkpoint",
    "run",
    "launch",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not GPU:
            pytest.skip("needs a GPU and FULLFT_TEST_GPU=1")
        if not torch.cuda.is_available():
            pytest.skip("torch finds no GPU")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: Llama of 2 layers, tokenizer of 300 tokens, ChatML template with generation marks."""
    import quickstart

    folder = tmp_path_factory.mktemp("model") / "tiny"
    quickstart.write_random_model(folder, TEXTS * 20, vocabulary_size=300, hidden_size=32, layers=2, heads=2)
    return folder


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def chats(count: int) -> list[dict[str, Any]]:
    """Distinct chats whose lengths differ."""
    return [
        chat(f"Say {TEXTS[i % 4][: 5 + i % 17]}", (f"{i} is the number. " + TEXTS[i % 3])[: 8 + (i * 7) % 40])
        for i in range(count)
    ]


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path) -> dict[str, Any]:
    """A recipe (as nested dicts, to be changed) of a run that takes seconds."""
    return {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(tiny_model)},
        "data": {"train": str(write_jsonl(tmp_path / "train.jsonl", chats(40))), "sequence_length": 128},
        "train": {"steps": 4, "global_batch_size": 4, "micro_batch_size": 1, "learning_rate": 1e-3, "warmup_steps": 0},
        "checkpoint": {"every_steps": 100},
        "tracking": {"wandb": "disabled"},
        "export": {"dtype": "fp32"},
    }


def write_recipe(recipe: dict[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump(recipe))
    return path


TRAIN = REPOSITORY / "launch" / "train.py"
FULLFT = REPOSITORY / "tests" / "fullft_command.py"
Launch = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """launch(recipe, *overrides, ranks=2, code=0): train, expect the exit code, return what the ranks have said."""

    def run(
        recipe: dict[str, Any], *overrides: str, ranks: int = 2, code: int = 0, timeout: float = 240
    ) -> subprocess.CompletedProcess[str]:
        config = write_recipe(recipe, tmp_path / "recipe.yaml")
        done = run_ranks(TRAIN, "--config", str(config), *overrides, ranks=ranks, cwd=tmp_path, timeout=timeout)
        assert done.returncode == code, done.stdout[-3000:] + done.stderr[-6000:]
        return done

    return run


def run_ranks(
    script: Path, *arguments: str, ranks: int, cwd: Path, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run a script on some ranks to its end."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as error:
        processes = start_ranks(script, *arguments, ranks=ranks, stdout=out, stderr=error, cwd=cwd)
        try:
            code = wait_for_ranks(processes, timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"runs after {timeout} s:\n{read(out)[-3000:]}{read(error)[-6000:]}") from None
        return subprocess.CompletedProcess([script, *arguments], code, read(out), read(error))


def wait_for_ranks(processes: list[Any], timeout: float) -> int:
    """Wait as a launcher does: the others get SIGTERM when one has failed, whose exit code counts. None is left."""
    deadline, code = time.monotonic() + timeout, 0
    try:
        while None in (codes := [process.poll() for process in processes]):
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("ranks", timeout)
            if not code and (code := next(filter(None, codes), 0)):
                for process in processes:
                    process.terminate()
            time.sleep(0.01)
    finally:
        kill(processes)
    return code or next(filter(None, codes), 0)


def kill(processes: list[Any]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()


def start_ranks(script: Path, *arguments: str, ranks: int, **options: Any) -> list[Any]:
    return [warm.start(script, *arguments, **options, **place) for place in places(ranks)]


def places(ranks: int) -> list[dict[str, str]]:
    """What a launcher tells each rank by its environment. One rank needs no launcher."""
    if ranks == 1:
        return [{}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def before_training(program: str, script: Path) -> Path:
    """A script that runs a program and then trains, in the same process."""
    train = f"import runpy, sys\nsys.argv[0] = {str(TRAIN)!r}\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    script.write_text(program + "\n" + train)
    return script


def read(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def torchrun(ranks: int) -> list[str]:
    """One rank needs no launcher, and then the exit code is the program's own."""
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    return [sys.executable, "-m", "torch.distributed.run", *rendezvous, "--nproc-per-node", str(ranks)]


def metrics(recipe: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(recipe["run_dir"]) / "metrics.jsonl").read_text().splitlines()]


def losses(recipe: dict[str, Any]) -> list[float]:
    return [row["train/loss"] for row in metrics(recipe) if "train/loss" in row]
