"""A model fine-tuned on the same rows for the same steps by fullft, TRL and LLaMA-Factory: losses, and who is right.

    python -m benchmarks.peers --model FOLDER --rows ROWS.jsonl [--trl-python PYTHON] [--llamafactory-python PYTHON]
                               [--template smollm2] [--steps 12]

ROWS have `question` and `answer`, as GSM8K's. 2 ZeRO-3 ranks in fp32 on a CPU, each row a sequence of its own, two
micro-batches a step of each rank, constant learning rate; rows in fullft's order.

- fullft         `deepspeed launch/train.py`
- trl            SFTTrainer, which is given the rows as prompt and completion
- trl, labels    SFTTrainer, which is given fullft's token ids and labels: what is left is how it trains
- llamafactory   `llamafactory-cli train`, which knows the chat template by name

Each is held to a reference on the token ids and labels that it made of the rows: one process without DeepSpeed, torch's
AdamW, the mean over all labels of the step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import ROOT, goal, run, write
from benchmarks.step import trl_deepspeed

sys.path.insert(0, str(ROOT / "launch"))
import quickstart

ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip
RANKS, MICRO_BATCH, ACCUMULATION = 2, 2, 2
Rows = list[dict[str, list[int]]]  # input_ids and labels (the token at the same place, or -100) of each row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder of a chat model")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--trl-python", help="interpreter of an environment that has TRL")
    parser.add_argument("--llamafactory-python", help="of one that has LLaMA-Factory and DeepSpeed")
    parser.add_argument("--template", default="smollm2", help="LLaMA-Factory's name of the model's")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--note", default="", help="stands in the results, e.g. what else the machine did")
    arguments = parser.parse_args()
    os.environ |= ENVIRONMENT
    with tempfile.TemporaryDirectory(prefix="fullft-benchmark-") as name:
        found = measure(Path(name), arguments)
    goals = []
    for name, one in found.items():
        apart = difference(one["losses"], one["reference_losses"])
        goals.append(goal(f"{name}: losses against its reference's, relative", "<= 1e-4", apart, apart <= 1e-4))
    write("peers", found, goals, note=arguments.note)


def difference(losses: list[float], wanted: list[float]) -> float:
    """Largest relative difference of a step."""
    return max(abs(a - b) / abs(b) for a, b in zip(losses, wanted, strict=True))


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    recipe, ours = write_recipe(folder, arguments)
    found: dict[str, Any] = {}
    done = run(quickstart.train_command(str(recipe)), sample_seconds=1)
    log = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    log = [row for row in log if "train/loss" in row]
    found["fullft"] = {
        "losses": [row["train/loss"] for row in log], "seconds": done.seconds, "peak_mib": done.peak_bytes >> 20,
        "step_seconds": statistics.median(row["time/step_seconds"] for row in log), **tell(ours, arguments.model),
    }  # fmt: skip
    made = {"fullft": ours}
    if arguments.trl_python:
        for name in ("trl", "trl, labels"):
            found[name], made[name] = by_trl(folder, name, arguments)
    if arguments.llamafactory_python:
        found["llamafactory"], made["llamafactory"] = by_llamafactory(folder, arguments)
    settings, known = json.loads((folder / "trl.json").read_text()), list[tuple[Rows, list[float]]]()
    for name, rows in made.items():
        losses = next((losses for others, losses in known if others == rows), None) or by_reference(settings, rows)
        known.append((rows, losses))
        found[name] |= {"reference_losses": losses}
        print(name, json.dumps(found[name]), flush=True)
    return found


def write_recipe(folder: Path, arguments: argparse.Namespace) -> tuple[Path, Rows]:
    """The recipe of the run, and what it trains on, in its order; both also as TRL reads them."""
    import torch
    from datasets import Dataset

    from fullft.loss import IGNORE
    from fullft.preflight import preflight
    from fullft.recipe import load_recipe

    batch_size = RANKS * MICRO_BATCH * ACCUMULATION
    chosen = arguments.rows.read_text().splitlines()[: arguments.steps * batch_size]
    (folder / "rows.jsonl").write_text("\n".join(chosen) + "\n")
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({
        "run_dir": str(folder / "run"), "model": {"path": str(arguments.model.resolve())},
        "data": {"train": {"path": str(folder / "rows.jsonl"), "format": "alpaca",
                           "fields": {"instruction": "question", "output": "answer"}},
                 "packing": False, "sequence_length": 1024, "cache_dir": str(folder / "cache")},
        "train": {"steps": arguments.steps, "global_batch_size": batch_size, "micro_batch_size": MICRO_BATCH,
                  "learning_rate": 2e-5, "schedule": "constant", "warmup_steps": 0, "activation_checkpointing": "none"},
        "checkpoint": {"every_steps": 10**6, "keep": 1},
        "tracking": {"wandb": "disabled", "every_steps": 1},
    }))  # fmt: skip
    recipe = load_recipe(file)
    inputs = preflight(recipe, RANKS)
    order, rows = list[int](), list[dict[str, list[int]]]()
    for step in range(arguments.steps):
        of_ranks = [list(inputs.batches.of_step(step, rank)) for rank in range(RANKS)]
        for micro_step in range(ACCUMULATION):
            for batch in (of_rank[micro_step] for of_rank in of_ranks):  # as accelerate deals them out
                lengths = [int(inputs.batches.sets[of_set].lengths[sequence]) for of_set, sequence in batch.sequences]
                for at, (used, (_, sequence)) in enumerate(zip(lengths, batch.sequences, strict=True)):
                    labels = torch.cat([torch.tensor([IGNORE]), batch.labels[at, : used - 1]])  # unshifted
                    rows.append({"input_ids": batch.input_ids[at, :used].tolist(), "labels": labels.tolist()})
                    order.append(sequence)
    Dataset.from_list(rows).to_parquet(folder / "trl, labels.parquet")
    asked = [json.loads(chosen[at]) for at in order]
    quickstart.write_rows(folder / "trl.jsonl", [
        {"prompt": [{"role": "user", "content": one["question"]}],
         "completion": [{"role": "assistant", "content": one["answer"]}]} for one in asked
    ])  # fmt: skip
    train = recipe.train
    settings = {
        "model": recipe.model.path, "steps": train.steps, "sequence_length": recipe.data.sequence_length,
        "micro_batch_size": MICRO_BATCH, "accumulation": ACCUMULATION, "learning_rate": train.learning_rate,
        "seed": train.seed, "betas": [train.beta1, train.beta2], "max_grad_norm": train.max_grad_norm,
        "deepspeed": trl_deepspeed(inputs.deepspeed_config),
    }  # fmt: skip
    (folder / "trl.json").write_text(json.dumps(settings))
    return file, rows


def by_trl(folder: Path, name: str, arguments: argparse.Namespace) -> tuple[dict[str, Any], Rows]:
    has_labels = name != "trl"
    settings = json.loads((folder / "trl.json").read_text()) | {
        "has_labels": has_labels, "rows": str(folder / f"{name}.{'parquet' if has_labels else 'jsonl'}"),
        "folder": str(folder / f"out of {name}"), "out": str(folder / f"{name} found.json"),
    }  # fmt: skip
    file = folder / f"{name} settings.json"
    file.write_text(json.dumps(settings))
    program = [str(ROOT / "benchmarks" / "trl_peer.py"), str(file)]
    start = [arguments.trl_python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    done = run([*start, *program], sample_seconds=1)
    found = json.loads(Path(settings["out"]).read_text())
    steps = [after - before for before, after in zip(found["at"], found["at"][1:], strict=False)]
    return {
        "losses": found["losses"], "seconds": done.seconds, "peak_mib": done.peak_bytes >> 20,
        "step_seconds": statistics.median(steps), "trl": found["trl"], **tell(found["rows"], arguments.model),
    }, found["rows"]  # fmt: skip


def by_llamafactory(folder: Path, arguments: argparse.Namespace) -> tuple[dict[str, Any], Rows]:
    """With a recipe as its examples have them. Its log rounds losses."""
    from datasets import load_from_disk

    settings, name = json.loads((folder / "trl.json").read_text()), "llamafactory"
    asked = [json.loads(line) for line in (folder / "trl.jsonl").read_text().splitlines()]
    pairs = [(one["prompt"][0]["content"], one["completion"][0]["content"]) for one in asked]
    rows = [{"instruction": ask, "input": "", "output": answer} for ask, answer in pairs]
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    (folder / "zero3.json").write_text(json.dumps(settings["deepspeed"]))
    recipe = folder / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump({
        "model_name_or_path": settings["model"], "stage": "sft", "do_train": True, "finetuning_type": "full",
        "deepspeed": str(folder / "zero3.json"), "dataset": "rows", "dataset_dir": str(folder),
        "template": arguments.template, "cutoff_len": settings["sequence_length"], "disable_shuffling": True,
        "tokenized_path": str(folder / "tokenized"), "output_dir": str(folder / name), "save_strategy": "no",
        "logging_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False, "disable_gradient_checkpointing": True,
        "per_device_train_batch_size": MICRO_BATCH, "gradient_accumulation_steps": ACCUMULATION,
        "max_steps": settings["steps"], "learning_rate": settings["learning_rate"], "lr_scheduler_type": "constant",
        "adam_beta1": settings["betas"][0], "adam_beta2": settings["betas"][1], "weight_decay": 0.0,
        "max_grad_norm": settings["max_grad_norm"], "seed": settings["seed"],
    }))  # fmt: skip
    programs = Path(arguments.llamafactory_python).parent
    path = f"{programs}:{os.environ['PATH']}"  # it starts `torchrun`
    environment = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": str(RANKS), "PATH": path}
    done = run([str(programs / "llamafactory-cli"), "train", str(recipe)], sample_seconds=1, **environment)
    log = json.loads((folder / name / "trainer_state.json").read_text())["log_history"]
    tokenized = load_from_disk(str(folder / "tokenized"))["train"]
    made = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in tokenized]
    return {
        "losses": [row["loss"] for row in log if "loss" in row], "seconds": done.seconds,
        "peak_mib": done.peak_bytes >> 20, **tell(made, arguments.model),
    }, made  # fmt: skip


def tell(rows: Rows, model: Path) -> dict[str, Any]:
    """What is trained on, and of the first row as text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    first = [token for token in rows[0]["labels"] if token != -100]
    labels = [sum(token != -100 for token in row["labels"]) for row in rows]
    return {
        "tokens": sum(len(row["input_ids"]) for row in rows), "trained_tokens": sum(labels),
        "first_row": tokenizer.decode(rows[0]["input_ids"]), "trained_of_first_row": tokenizer.decode(first),
    }  # fmt: skip


def by_reference(settings: dict[str, Any], rows: Rows) -> list[float]:
    """Loss of each step, nats a label."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32).train()
    rate, betas = settings["learning_rate"], tuple(settings["betas"])
    optimizer = torch.optim.AdamW(loaded.parameters(), lr=rate, betas=betas, weight_decay=0.0)
    size, losses = RANKS * MICRO_BATCH * ACCUMULATION, []
    for start in range(0, len(rows), size):
        step = rows[start : start + size]
        labels = sum(token != -100 for row in step for token in row["labels"])
        total = 0.0
        for row in step:
            logits = loaded(torch.tensor([row["input_ids"]])).logits[0, :-1]
            nats = torch.nn.functional.cross_entropy(logits, torch.tensor(row["labels"][1:]), reduction="sum")
            (nats / labels).backward()
            total += float(nats.detach()) / labels
        torch.nn.utils.clip_grad_norm_(loaded.parameters(), settings["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


if __name__ == "__main__":
    main()
