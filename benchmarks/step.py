"""A training step: fullft beside a bare DeepSpeed loop, and beside TRL's SFTTrainer.

    python -m benchmarks.step [--quick] [--size small] [--data FILE …] [--trl-python PYTHON] [key=value …]

- bare   a loop over the same engine, kernels, loss, batches and DeepSpeed configuration that does nothing else: what
         fullft's loop costs
- again  the same bare loop as one more contender: what two equal programs differ by here, so what can be told at all
- trl    SFTTrainer with the same DeepSpeed configuration, model, precision and packed sequences in the same order, its
         own attention and loss; flash attention is used if its environment has it

On CPU: 2 ranks of one thread in fp32, which take turns step by step. On GPU: one rank in bf16, taking turns where all
fit into the memory together, else one after the other in rounds. Ratios are medians over pairs of turns. The words
behind the options are overrides of fullft's recipe, for fullft and bare.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks import matmul
from benchmarks.common import goal, write
from benchmarks.models import SHAPES, model_flops, parameters, prepare
from benchmarks.turns import WARM_UP, Contender, alternate, end_in_time, one_by_one, ratio

FULLFT = [sys.executable, "-m", "benchmarks.contenders"]
TRL = Path(__file__).parent / "trl_contender.py"


def main() -> None:
    arguments = parse()
    end_in_time()
    cpu = on_cpu()
    without = [] if arguments.contenders or has_trl(arguments.trl_python) else ["TRL"]
    arguments.contenders = arguments.contenders or ["fullft", "bare", *(["again"] if cpu else []), "trl"][
        : -1 if without else None]  # fmt: skip
    total = WARM_UP + arguments.turns * arguments.steps + 1
    with tempfile.TemporaryDirectory(prefix="fullft-benchmark-", dir=arguments.folder) as name:
        setting = Setting(Path(name), arguments.size, arguments.length, 2 if cpu else 1, cpu)
        setting.recipe["data"]["train"], _ = prepare(
            setting.folder, arguments.size, arguments.data, arguments.tokenizer
        )
        setting.recipe["train"] |= {"steps": total, "global_batch_size": setting.ranks * arguments.accumulation}
        if not cpu:
            setting.recipe["train"]["activation_checkpointing"] = "full"  # TRL's default
        counts, inputs = write_sequences(setting, arguments.overrides)
        contenders = {one.name: one for one in entrants(setting, arguments)}
        fit = all_fit(len(contenders), setting, inputs)
        together = arguments.together == "yes" or (arguments.together == "auto" and fit)
        rate = matmul.best(setting.ranks, cpu)
        print(f"a matrix product: {rate / 1e12:.3f} TFLOP/s a rank", flush=True)
        load = os.getloadavg()[0]
        failed = run(list(contenders.values()), setting, arguments, together)
        failed = {one: why.replace(f"{setting.folder}/", "") for one, why in failed.items()}
    load = max(load, os.getloadavg()[0])
    rows = {one.name: row(one, counts, setting, rate) for one in contenders.values() if one.turns}
    for one in rows.values():
        print(json.dumps({key: value for key, value in one.items() if key not in ("turns", "losses")}), flush=True)
    ratios = compare(contenders) | of_memory(rows, cpu)
    conditions = {
        "size": arguments.size, "parameters": parameters(arguments.size), "sequence_length": arguments.length,
        "ranks": setting.ranks, "turns": arguments.turns, "steps_of_a_turn": arguments.steps, "together": together,
        "data": "given" if arguments.data else "made of Python's documentation", "overrides": arguments.overrides,
        "counts": counts, "matmul_flops_per_second": rate, "load_average": load, "failed": failed, "without": without,
    }  # fmt: skip
    write("step" if cpu else f"step-{arguments.size}", {"contenders": rows, "ratios": ratios}, goals(rows, ratios, cpu),
          conditions=conditions)  # fmt: skip
    for one, why in failed.items():
        print(f"{one} was not measured: {why}", file=sys.stderr)
    sys.exit(bool(failed))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under five minutes on two cores: few turns")
    parser.add_argument("--size", choices=list(SHAPES), help="default: small on CPU, 1b on GPU")
    parser.add_argument("--length", type=int, help="tokens of a sequence; default: 1024 on CPU, 8192 on GPU")
    parser.add_argument("--accumulation", type=int, default=1, help="sequences of a step, of each rank")
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="chats; default: Python's documentation")
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer; default: trained on that documentation")
    parser.add_argument("--turns", type=int, help="turns of each contender; default: 16 (quick: 5)")
    parser.add_argument("--steps", type=int, help="steps of a turn; default: 2 on CPU, 5 on GPU")
    parser.add_argument("--together", choices=["auto", "yes", "no"], default="auto", help="all in memory at once")
    parser.add_argument("--contenders", nargs="+", help="default: fullft bare again trl, on GPU without "
                        "again, and without trl where it is not installed")  # fmt: skip
    parser.add_argument("--trl-python", default=sys.executable, help="interpreter of an environment that has TRL")
    parser.add_argument("--folder", type=Path, help="where model and runs are written; default: temporary")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    found = parser.parse_intermixed_args()
    cpu = on_cpu()
    found.size = found.size or ("small" if cpu else "1b")
    found.length = found.length or (1024 if cpu else 8192)
    found.turns = found.turns or (5 if found.quick or not cpu else 16)
    found.steps = found.steps or (2 if cpu else 5)
    return found


def on_cpu() -> bool:
    import torch

    return os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available()


@dataclass
class Setting:
    """What all contenders share."""

    folder: Path
    size: str
    length: int
    ranks: int
    cpu: bool

    def __post_init__(self) -> None:
        self.recipe: dict[str, Any] = {
            "run_dir": "", "model": {"path": str(self.folder / "model")},
            "data": {"sequence_length": self.length, "on_too_long": "truncate", "on_bad_row": "skip",
                     "cache_dir": str(self.folder / "cache")},
            "train": {"micro_batch_size": 1, "learning_rate": 1e-4, "schedule": "constant", "warmup_steps": 0},
            "checkpoint": {"every_steps": 10**6}, "tracking": {"wandb": "disabled"},
        }  # fmt: skip

    def write_recipe(self, name: str) -> Path:
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(self.recipe | {"run_dir": str(self.folder / "runs" / name)}))
        return path


def has_trl(python: str) -> bool:
    program = "import importlib.util; raise SystemExit(importlib.util.find_spec('trl') is None)"
    return subprocess.run([python, "-c", program], check=False).returncode == 0


def write_sequences(setting: Setting, overrides: list[str]) -> tuple[dict[str, float], Any]:
    """The packed sequences that fullft trains on, in its order, as TRL reads them, with TRL's settings.

    Returns:
        what a step has of them on average, and the `Inputs` of such a run
    """
    import torch
    from datasets import Dataset

    from fullft.loss import IGNORE
    from fullft.preflight import preflight
    from fullft.recipe import load_recipe

    recipe = load_recipe(setting.write_recipe("prepare"), overrides)
    inputs = preflight(recipe, setting.ranks, on_gpu=not setting.cpu, room=False)
    geometry = inputs.batches.geometry
    rows, tokens, labelled, flops = [], 0, 0, 0.0
    for step in range(inputs.total_steps):
        of_ranks = [list(inputs.batches.of_step(step, rank)) for rank in range(setting.ranks)]
        for micro_step in range(geometry.accumulation):
            for batch in (of_rank[micro_step] for of_rank in of_ranks):  # as accelerate deals them out
                for ids, positions, labels, (of_set, sequence) in zip(
                    batch.input_ids, batch.position_ids, batch.labels, batch.sequences, strict=True
                ):
                    used = int(inputs.batches.sets[of_set].lengths[sequence])
                    starts = (positions[:used] == 0).nonzero().flatten().tolist()
                    lengths = [b - a for a, b in zip(starts, [*starts[1:], used], strict=True)]
                    unshifted = torch.cat([torch.tensor([IGNORE]), labels[: used - 1]])
                    rows.append({"input_ids": ids[:used].tolist(), "labels": unshifted.tolist(),
                                 "seq_lengths": lengths})  # fmt: skip
                    count = int((labels != IGNORE).sum())
                    tokens, labelled = tokens + used, labelled + count
                    flops += model_flops(setting.size, lengths, used, count)
    file = setting.folder / "sequences.parquet"
    Dataset.from_list(rows).to_parquet(file)
    train, state = recipe.train, inputs.plan["state_bytes_per_rank"]
    settings = {
        "model": recipe.model.path, "sequences": str(file), "folder": str(setting.folder / "trl"),
        "steps": inputs.total_steps, "sequence_length": setting.length, "micro_batch_size": geometry.micro_batch_size,
        "accumulation": geometry.accumulation, "learning_rate": train.learning_rate, "seed": train.seed,
        "betas": [train.beta1, train.beta2], "max_grad_norm": train.max_grad_norm,
        "checkpointing": inputs.plan["activation_checkpointing"] != "none",
        "deepspeed": trl_deepspeed(inputs.deepspeed_config),
        # There gradients are accumulated in the dtype of the weights.
        "state_bytes": inputs.plan["device_bytes_per_rank"] - state["gradients"] + state["weights"],
    }  # fmt: skip
    (setting.folder / "trl.json").write_text(json.dumps(settings, indent=1))
    steps = inputs.total_steps
    return {
        "tokens_of_step": tokens / steps, "labelled_of_step": labelled / steps, "flops_of_step": flops / steps,
        "fill": tokens / (len(rows) * setting.length), "documents_of_step": sum(
            len(row["seq_lengths"]) for row in rows) / steps,
    }, inputs  # fmt: skip


def trl_deepspeed(config: dict[str, Any]) -> dict[str, Any]:
    """The same configuration, without the keys that fullft sets for its own loop; TRL fills in the batch."""
    ours = ("managed_gradient_accumulation", "train_batch_size", "steps_per_print", "data_types")
    return {key: value for key, value in config.items() if key not in ours} | {
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
    }  # fmt: skip


def entrants(setting: Setting, arguments: argparse.Namespace) -> list[Contender]:
    found = []
    for name in arguments.contenders:
        if name == "trl":
            command = [arguments.trl_python, str(TRL), str(setting.folder / "trl.json")]
        else:
            kind = "fullft" if name == "fullft" else "bare"
            command = [*FULLFT, kind, str(setting.write_recipe(name)), *arguments.overrides]
        found.append(Contender(name, command, setting.ranks))
    return found


def all_fit(count: int, setting: Setting, inputs: Any) -> bool:
    """Whether so many runs of this kind fit into the memory at once: training state, activations as they are kept,
    loss and gradient of the head, and a guess of what libraries, kernels and allocators keep."""
    from fullft.planner.memory import activation_bytes, layer_of

    plan = inputs.plan
    needed = plan["device_bytes_per_rank"] + 4 * plan["largest_gathered_parameter_bytes"]
    tokens = plan["micro_batch_size"] * setting.length
    bf16 = inputs.deepspeed_config.get("bf16", {}).get("enabled", False)
    needed += tokens * activation_bytes(layer_of(inputs.meta.config), plan["activation_checkpointing"], bf16)
    if setting.cpu:
        import psutil

        return count * setting.ranks * (needed + 1e9) < psutil.virtual_memory().available
    return count * (needed + 6e9) < free_gpu_bytes()


def free_gpu_bytes() -> int:
    """Asked by another process: a CUDA context takes half a GiB for as long as its process lives."""
    program = "import torch; print(torch.cuda.mem_get_info()[0])"
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[-1])


def run(contenders: list[Contender], setting: Setting, arguments: argparse.Namespace, together: bool) -> dict[str, str]:
    """All turns; returns why contenders failed, by name: the others are measured."""
    options = {"steps": arguments.steps, "cpu": setting.cpu}
    if not together:
        return one_by_one(contenders, setting.folder, rounds=2 if arguments.turns > 1 else 1, **options)
    return alternate(contenders, setting.folder, turns=arguments.turns, **options)


def row(one: Contender, counts: dict[str, float], setting: Setting, rate: float) -> dict[str, Any]:
    """What a contender did, medians over its turns."""
    seconds = statistics.median(turn["seconds"] / turn["steps"] for turn in one.turns)
    cpu = statistics.median(turn["cpu_seconds"] / turn["steps"] for turn in one.turns)
    found = {
        "step_seconds": seconds, "step_cpu_seconds_all_ranks": cpu,
        "tokens_per_second": counts["tokens_of_step"] / seconds,
        "labelled_tokens_per_second": counts["labelled_of_step"] / seconds,
        "tokens_per_cpu_second": counts["tokens_of_step"] / cpu,
        "mfu_of_matmul": counts["flops_of_step"] / (cpu if setting.cpu else seconds * setting.ranks) / rate,
        "in_use": one.in_use, "turns": one.turns,
    }  # fmt: skip
    if not one.results:  # cut off before it could tell
        return found
    found["losses"] = one.results[0]["losses"]
    for key in one.results[0]["memory"]:
        found[key] = max(result["memory"][key] for result in one.results)
    return found | {key: one.results[0][key] for key in ("trl",) if key in one.results[0]}


def of_memory(rows: dict[str, Any], cpu: bool) -> dict[str, Any]:
    """fullft's peak over TRL's, and that of what both need beyond weights, gradients and optimizer state, which no
    program can do without. Only of GPUs: on CPU libraries are in the peak."""
    pair = [rows.get(name, {}) for name in ("fullft", "trl")]
    if cpu or not all("peak_bytes" in one for one in pair):
        return {}
    peaks = [one["peak_bytes"] for one in pair]
    beyond = [one["peak_bytes"] - one["in_use"]["state_bytes"] for one in pair]
    found = {"peak_bytes": peaks[0] / peaks[1], "beyond_state_bytes": beyond}
    return {"fullft/trl": found | ({"beyond_state": beyond[0] / beyond[1]} if min(beyond) > 0 else {})}


def told(one: dict[str, Any]) -> str:
    """What a row's contender ran with."""
    used = one["in_use"]
    tiles = f"; {used['mlp_tiles']} MLP tiles" if used["mlp_tiles"] > 1 else ""
    return (
        f"attention {used['attention']}; kernels {used['kernels']}; checkpointing {used['activation_checkpointing']}"
        f"{tiles}"
    )


def compare(contenders: dict[str, Contender]) -> dict[str, Any]:
    """Times of each pair over one another, by wall clock and by CPU time of the ranks."""
    found: dict[str, Any] = {}
    for one, other in (("fullft", "bare"), ("again", "bare"), ("trl", "fullft")):
        if not (one in contenders and other in contenders and contenders[one].turns and contenders[other].turns):
            continue
        found[f"{one}/{other}"] = {key: ratio(contenders[one], contenders[other], key)
                                   for key in ("seconds", "cpu_seconds")}  # fmt: skip
        print(f"{one}/{other}", json.dumps(found[f"{one}/{other}"]), flush=True)
    return found


def loss_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Largest difference between the losses of the same step, relative; -1 if they are not known."""
    pairs = list(zip(one.get("losses", []), other.get("losses", []), strict=False))
    return max(abs(a - b) / abs(b) for a, b in pairs) if pairs else -1.0


def goals(rows: dict[str, Any], ratios: dict[str, Any], cpu: bool) -> list[dict[str, Any]]:
    """By CPU time of the ranks on a CPU, where other load moves the wall clock, and by wall clock on a GPU."""
    key = "cpu_seconds" if cpu else "seconds"
    found = []
    if "fullft/bare" in ratios:
        overhead = ratios["fullft/bare"][key]["median"] - 1
        found.append(goal(f"overhead over a bare loop, {key}", "<= 0.02", overhead, overhead <= 0.02))
        limit = 1e-5 if cpu else 1e-2
        loss = loss_difference(rows["fullft"], rows["bare"])
        found.append(goal("losses against the bare loop's, relative", f"<= {limit}", loss, 0 <= loss <= limit))
    if "trl/fullft" in ratios:
        times, least = ratios["trl/fullft"][key]["median"], 1.5 if cpu else 1.3
        found.append(goal(f"times TRL's tokens a second, {key}", f">= {least}", times, times >= least))
        limit = 1e-4 if cpu else 1e-2
        loss = loss_difference(rows["fullft"], rows["trl"])
        found.append(goal("losses against TRL's, relative", f"<= {limit}", loss, 0 <= loss <= limit))
        if not cpu:
            memory = ratios.get("fullft/trl", {}).get("beyond_state", -1.0)
            name = "peak memory beyond weights, gradients and optimizer state (16 or 18 bytes a parameter), of TRL's"
            found.append(goal(name, "<= 0.7", memory, 0 <= memory <= 0.7))
    if not cpu and "fullft" in rows:
        mfu = rows["fullft"]["mfu_of_matmul"]
        found.append(goal("model FLOP/s of a large matrix product's", ">= 0.55", mfu, mfu >= 0.55))
    return found


if __name__ == "__main__":
    main()
