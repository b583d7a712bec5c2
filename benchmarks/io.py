"""Weights and checkpoints: fullft's shard-direct reading and writing beside the stock ways, on the same ranks.

    python -m benchmarks.io [--quick] [--ranks 2 4] [--folder FOLDER]

Makes models of random weights on disk in FOLDER (default: a temporary one) and runs every contender as ranks of its
own, file cache dropped before each where the machine allows it.

- load     `fullft.model.load` beside `from_pretrained` under ZeRO-3
- export   `fullft.export.export` beside DeepSpeed's `save_16bit_model`
- save     `fullft.saver`, synchronous and asynchronous, beside DeepSpeed's `save_checkpoint`: what training waits
- resume   at the same and at another number of ranks, beside DeepSpeed's universal checkpoints (conversion and load)
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import goal, write

MIB = 2**20
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under five minutes on two cores: small models, one round")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--folder", type=Path, help="where models and checkpoints are written; default: temporary")
    parser.add_argument("--on-rank", nargs="+", metavar="WORD", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.on_rank:
        on_rank(*arguments.on_rank)
        return
    with tempfile.TemporaryDirectory(prefix="fullft-benchmark-", dir=arguments.folder) as name:
        bench = Bench(Path(name), 1 if arguments.quick else ROUNDS)
        large = write_model(bench.folder / "large", *((512, 4) if arguments.quick else (2048, 22)))
        small = write_model(bench.folder / "small", *((256, 4) if arguments.quick else (1024, 24)))
        rows = []
        for ranks in arguments.ranks:
            rows += [bench.measure(action, ranks, large) for action in ("load-fullft", "load-stock")]
            rows += [bench.measure(action, ranks, large) for action in ("export-fullft", "export-stock")]
            saves = ("save-fullft", "save-fullft-synchronous", "save-stock")
            rows += [bench.measure(action, ranks, small) for action in saves]
            rows += bench.resumes(ranks, small, other=arguments.ranks[arguments.ranks.index(ranks) - 1])
        sizes = {model.name: (model / "model.safetensors").stat().st_size // 2 for model in (large, small)}
    write("io", {"parameters": sizes, "rows": rows}, goals(rows))


# Ranks


class Bench:
    """Runs contenders as ranks, and collects what they measured."""

    def __init__(self, folder: Path, rounds: int) -> None:
        self.folder, self.rounds = folder, rounds

    def measure(
        self, action: str, ranks: int, model: Path, *, rounds: int | None = None, keep: str = ""
    ) -> dict[str, Any]:
        """The median round of an action, by seconds; each number over all ranks as its name says."""
        done = []
        for number in range(rounds or self.rounds):
            out = self.folder / "out"
            shutil.rmtree(out, ignore_errors=True)
            work = self.folder / (keep or f"work-{number}")
            if not keep:
                shutil.rmtree(work, ignore_errors=True)
            work.mkdir(exist_ok=True)
            drop_file_cache()
            self._run(action, ranks, model, work, out)
            done.append([json.loads((out / f"{rank}.json").read_text()) for rank in range(ranks)])
            if not keep:
                shutil.rmtree(work)
        done.sort(key=lambda ranks_of_round: max(rank["seconds"] for rank in ranks_of_round))
        median = done[len(done) // 2]
        row = {"action": action, "ranks": ranks, "model": model.name, "rounds_seconds": [
            round(max(rank["seconds"] for rank in one), 3) for one in done
        ]} | {
            "seconds": max(rank["seconds"] for rank in median),
            "peak_growth_bytes": max(rank["peak_growth_bytes"] for rank in median),
            "read_bytes": sum(rank["read_bytes"] for rank in median),
        }  # fmt: skip
        row |= {key: max(rank[key] for rank in median) for key in median[0] if key not in row}
        print(json.dumps(row), flush=True)
        return row

    def _run(self, action: str, ranks: int, model: Path, work: Path, out: Path) -> None:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0",
            "--nproc-per-node", str(ranks), "-m", "benchmarks.io", "--on-rank", action, str(model), str(work), str(out),
        ]  # fmt: skip
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{action} on {ranks} ranks failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")

    def resumes(self, ranks: int, model: Path, other: int) -> list[dict[str, Any]]:
        """A checkpoint of each kind, read again at the same and at another number of ranks."""
        rows = []
        for kind in ("fullft", "stock"):
            self.measure(f"save-{kind}", ranks, model, rounds=1, keep=kind)
            rows.append(self.measure(f"resume-{kind}", ranks, model, keep=kind))
            convert = convert_to_universal(self.folder / kind) if kind == "stock" else 0.0
            row = self.measure(f"resume-{'universal' if kind == 'stock' else kind}", other, model, keep=kind)
            rows.append(row | {"written_by_ranks": ranks, "conversion_seconds": convert})
            shutil.rmtree(self.folder / kind)
        return rows


def convert_to_universal(folder: Path) -> float:
    """DeepSpeed's offline conversion, which its load at another world size needs; returns its seconds."""
    from deepspeed.checkpoint import ds_to_universal

    started = time.perf_counter()
    workers = str(len(os.sched_getaffinity(0)))
    arguments = ["--input_folder", folder / "stock", "--output_folder", folder / "universal"]
    arguments += ["--num_extract_workers", workers, "--num_merge_workers", workers]
    command = [sys.executable, ds_to_universal.__file__, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"DS_ACCELERATOR": "cpu"}
    )
    if done.returncode:
        raise RuntimeError(f"ds_to_universal failed:\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
    return time.perf_counter() - started


def drop_file_cache() -> None:
    """So that files are read from the disk; needs root, else they come from memory for all contenders alike."""
    subprocess.run(["sync"], check=True)
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("1")


def write_model(folder: Path, hidden_size: int, layers: int) -> Path:
    """A Llama of random bf16 weights with a tokenizer."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "launch"))
    import quickstart
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    quickstart.write_random_model(folder, ["Nothing but a tokenizer is wanted of this."] * 20, vocabulary_size=300)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=hidden_size, intermediate_size=hidden_size * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64, num_key_value_heads=hidden_size // 256, max_position_embeddings=4096,
        eos_token_id=AutoTokenizer.from_pretrained(folder).eos_token_id,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    return folder


# On a rank


def on_rank(action: str, model: str, work: str, out: str) -> None:
    """One contender on this rank; what it took is written to out/<rank>.json."""
    from fullft import cluster

    me = cluster.discover()
    cluster.join(me, 60)
    result = ACTIONS[action](Path(model), Path(work))
    Path(out).mkdir(exist_ok=True)
    (Path(out) / f"{me.rank}.json").write_text(json.dumps(result))
    cluster.leave()
    cluster.exit_now(0)


class Meter:
    """Wall time, growth of the peak resident memory, and bytes read from storage, of this process."""

    def __enter__(self) -> Meter:
        import torch.distributed as dist

        dist.barrier()
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        self.before, self.read = _status("VmRSS"), _io("read_bytes")
        self.started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        import torch.distributed as dist

        self.own_seconds = time.perf_counter() - self.started
        dist.barrier()
        self.seconds = time.perf_counter() - self.started
        self.growth, self.read = _status("VmHWM") - self.before, _io("read_bytes") - self.read

    def result(self, **more: float) -> dict[str, float]:
        return {"seconds": self.seconds, "peak_growth_bytes": self.growth, "read_bytes": self.read} | more


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def _io(key: str) -> int:
    line = next(line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1])


def _recipe(model: Path, work: Path) -> Any:
    import torch.distributed as dist

    from fullft.recipe import parse_recipe

    return parse_recipe({
        "run_dir": str(work / "run"), "model": {"path": str(model)}, "data": {"train": "none.jsonl"},
        "tracking": {"wandb": "disabled"},
        "train": {"global_batch_size": dist.get_world_size(), "precision": "bf16"},
    })  # fmt: skip


def _config(recipe: Any, **more: Any) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    from fullft import engine, model

    facts = model.facts(model.on_meta(recipe.model))
    plan = engine.geometry(recipe, dist.get_world_size())
    config = engine.fill_config(engine.read_config(recipe), recipe, plan, facts, torch.bfloat16) | more
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    return config


def _shard_bytes(module: Any) -> int:
    return sum(one.ds_tensor.numel() * one.ds_tensor.element_size() for one in module.parameters())


def load_fullft(model: Path, work: Path) -> dict[str, float]:
    from fullft import model as models
    from fullft.tokenizer import load_tokenizer

    recipe = _recipe(model, work)
    config, tokenizer = _config(recipe), load_tokenizer(recipe.model)
    with Meter() as meter:
        loaded = models.load(recipe, config, tokenizer)
    return meter.result(shard_bytes=_shard_bytes(loaded))


def load_stock(model: Path, work: Path) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    config = _config(_recipe(model, work))
    with Meter() as meter:
        handle = HfDeepSpeedConfig(config)
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    del handle
    return meter.result(shard_bytes=_shard_bytes(loaded))


def _engine(model: Path, work: Path, *, moments: bool, read: bool = True, **more: Any) -> tuple[Any, Any]:
    from fullft import engine, optim, shards
    from fullft import model as models
    from fullft.tokenizer import load_tokenizer

    recipe = _recipe(model, work)
    config, tokenizer = _config(recipe, **more), load_tokenizer(recipe.model)
    loaded = models.load(recipe, config, tokenizer, read=read)
    started = engine.start(loaded, optim.build_optimizer(loaded, recipe.train, offload=False), config)
    if moments:
        shards.allocate_optimizer_states(started)
        shards.set_optimizer_step(started, 1)
    return started, tokenizer


def export_fullft(model: Path, work: Path) -> dict[str, float]:
    from fullft.export import export
    from fullft.model import on_meta

    recipe = _recipe(model, work)
    meta = on_meta(recipe.model)
    engine, tokenizer = _engine(model, work, moments=False)
    with Meter() as meter:
        export(engine, meta, tokenizer, recipe, "bf16", "")
    return meter.result(shard_bytes=_shard_bytes(engine.module))


def export_stock(model: Path, work: Path) -> dict[str, float]:
    engine, _ = _engine(model, work, moments=False)
    with Meter() as meter:
        engine.save_16bit_model(str(work / "export"))
    return meter.result(shard_bytes=_shard_bytes(engine.module))


def save_fullft(model: Path, work: Path, *, asynchronous: bool = True) -> dict[str, float]:
    """Two saves; the second is measured, since the first one allocates the copies on the host."""
    import torch.distributed as dist

    from fullft.recipe import Checkpoint
    from fullft.saver import Saver
    from fullft.tracking import Tracker

    engine, _ = _engine(model, work, moments=True)
    recipe = _recipe(model, work)
    tracker = Tracker(recipe, dist.get_rank() == 0, 2, 0)
    saver = Saver(
        engine, work / "checkpoints", Checkpoint(keep=1, keep_best=False, asynchronous=asynchronous), tracker, 0
    )
    for step in (1, 2):
        state = {"step": step, "tokens_seen": 0, "recipe": {}, "data": "", "world_size": dist.get_world_size()}
        with Meter() as meter:
            saver.copy()
            saver.write(state)
            stall = time.perf_counter() - meter.started
            saver.wait()
    return meter.result(stall_seconds=stall, shard_bytes=_shard_bytes(engine.module))


def save_stock(model: Path, work: Path) -> dict[str, float]:
    engine, _ = _engine(model, work, moments=True)
    with Meter() as meter:
        engine.save_checkpoint(str(work), tag="stock")
        stall = time.perf_counter() - meter.started
    return meter.result(stall_seconds=stall, shard_bytes=_shard_bytes(engine.module))


def resume_fullft(model: Path, work: Path) -> dict[str, float]:
    """Checksums of all files included."""
    from fullft import checkpoint

    engine, _ = _engine(model, work, moments=False, read=False)
    with Meter() as meter:
        assert checkpoint.load_newest(engine, work / "checkpoints") is not None
    return meter.result()


def resume_stock(model: Path, work: Path, tag: str = "stock", **more: Any) -> dict[str, float]:
    engine, _ = _engine(model, work, moments=False, read=False, **more)
    with Meter() as meter:
        path, _ = engine.load_checkpoint(str(work), tag=tag)
    assert path is not None
    return meter.result()


ACTIONS: dict[str, Callable[[Path, Path], dict[str, float]]] = {
    "load-fullft": load_fullft, "load-stock": load_stock, "export-fullft": export_fullft, "export-stock": export_stock,
    "save-fullft": save_fullft, "save-fullft-synchronous": functools.partial(save_fullft, asynchronous=False),
    "save-stock": save_stock, "resume-fullft": resume_fullft, "resume-stock": resume_stock,
    "resume-universal": functools.partial(resume_stock, tag="universal", checkpoint={"load_universal": True}),
}  # fmt: skip


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the smallest gain over all numbers of ranks."""

    def pairs(ours: str, theirs: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        return [(one, two) for one in rows for two in rows
                if (one["action"], two["action"]) == (ours, theirs) and one["ranks"] == two["ranks"]]  # fmt: skip

    load = min(two["seconds"] / one["seconds"] for one, two in pairs("load-fullft", "load-stock"))
    export = min(two["seconds"] / one["seconds"] for one, two in pairs("export-fullft", "export-stock"))
    stall = min(two["stall_seconds"] / one["stall_seconds"] for one, two in pairs("save-fullft", "save-stock"))
    beyond = max(row["peak_growth_bytes"] - row["shard_bytes"] for row in rows if row["action"] == "load-fullft") / MIB
    copy = max(row["peak_growth_bytes"] / row["shard_bytes"] for row in rows if row["action"] == "export-fullft")
    return [
        goal("load: times faster than from_pretrained", ">= 3", load, load >= 3),
        goal("load: MiB that a rank's memory grows beyond its shard", "< 500", beyond, beyond < 500),
        goal("export: times faster than save_16bit_model", ">= 2", export, export >= 2),
        goal("export: growth of a rank's memory, of its bf16 shard", "< 1", copy, copy < 1),
        goal("save: times shorter stall than save_checkpoint", "> 1", stall, stall > 1),
    ]


if __name__ == "__main__":
    main()
