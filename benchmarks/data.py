"""Data: preparing beside `datasets.map` + TRL's packing, memory against input size, packing, and a cache of 1 B tokens.

    python -m benchmarks.data [--quick] [--rows FILE.jsonl --model FOLDER] [--trl-python PYTHON]

Without --rows and --model the chats are made of Python's documentation, with a tokenizer trained on it. TRL runs in
the interpreter given (its own virtual environment), else in this one if it is installed there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import yaml

from benchmarks.common import Measured, goal, run, write

LENGTH = 4096
MEGABYTE = 1_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under five minutes on two cores: smaller inputs")
    parser.add_argument("--rows", type=Path, help="chats, .jsonl; repeated to the sizes measured")
    parser.add_argument("--model", type=Path, help="folder with tokenizer and config")
    parser.add_argument("--trl-python", default=sys.executable, help="interpreter that has TRL")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fullft-benchmark-") as name:
        folder = Path(name)
        rows, model = inputs(folder, arguments.rows, arguments.model)
        beside = beside_trl(folder, rows, model, 20 if arguments.quick else 100, arguments.trl_python)
        memory = memory_by_size(folder, rows, model, [10, 40] if arguments.quick else [100, 2000])
        packing = packing_side_by_side(lengths_of(folder, rows, model), 200_000 if arguments.quick else 1_000_000)
        cache = large_cache(folder, 50_000_000 if arguments.quick else 1_000_000_000)
    speed = beside["fullft"]["tokens_per_second"] / beside["trl"]["tokens_per_second"] if "trl" in beside else 0.0
    default = beside["fullft"]["tokens_per_second"] / beside["trl_default"]["tokens_per_second"] if speed else 0.0
    growth = memory[-1]["peak_bytes"] / memory[0]["peak_bytes"]
    goals = [
        goal("tokens/s against datasets.map + TRL packing, both on all cores", ">= 2", *_at_least(speed, 2)),
        goal("tokens/s against it with TRL's default of one process", ">= 2", *_at_least(default, 2)),
        goal("peak memory against it", "<= 1", (ratio := _memory_ratio(beside)), 0 < ratio <= 1),
        goal("peak memory, largest against smallest input", "<= 1.1", *_at_most(growth, 1.1)),
        goal("least fill of sequences at 4k and 8k", ">= 0.995", *_at_least(min(
            row["fullft"]["fill"] for row in packing), 0.995)),
        goal("seconds to the first batch of every rank", "< 5", *_at_most(cache["first_batch_seconds"], 5)),
        goal("milliseconds to the next batch of 8 sequences (a step takes seconds)", "< 10",
             *_at_most(cache["next_batch_milliseconds"], 10)),
    ]  # fmt: skip
    write("data", {"beside_trl": beside, "memory": memory, "packing": packing, "cache": cache}, goals)


def _at_most(measured: float, limit: float) -> tuple[float, bool]:
    return measured, measured <= limit


def _at_least(measured: float, limit: float) -> tuple[float, bool]:
    return measured, measured >= limit


def _memory_ratio(beside: dict[str, Any]) -> float:
    return beside["fullft"]["peak_bytes"] / beside["trl"]["peak_bytes"] if "trl" in beside else 0.0


# Inputs


def inputs(folder: Path, rows: Path | None, model: Path | None) -> tuple[list[str], Path]:
    """Lines of JSON chats, and a folder with a tokenizer whose template has {% generation %} marks (TRL needs them)."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "launch"))
    import quickstart

    texts, _ = quickstart.split_documentation()
    if model is None:
        quickstart.write_random_model(folder / "own", texts, vocabulary_size=8000)
    _small_model_with_tokenizer_of(model or folder / "own", folder / "model", quickstart.CHAT_TEMPLATE)
    if rows is not None:
        return rows.read_text().splitlines(), folder / "model"
    paragraphs = [part for text in texts for part in text.split("\n\n") if len(part) > 40]
    draw = random.Random(0)
    chats = []
    for at in range(5000):
        messages = []
        for _ in range(draw.choice([1, 1, 1, 2, 3])):
            answer = "\n\n".join(draw.sample(paragraphs, draw.randint(1, 5)))
            messages += [{"role": "user", "content": f"{at}: {draw.choice(paragraphs)[:200]}"},
                         {"role": "assistant", "content": answer}]  # fmt: skip
        chats.append(json.dumps({"messages": messages}))
    return chats, folder / "model"


def _small_model_with_tokenizer_of(source: Path, folder: Path, template: str) -> None:
    """TRL prepares data only with a model at hand; it need not be large."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=1,
                    num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=65536)
    ).save_pretrained(folder)  # fmt: skip


def write_input(rows: Sequence[str], megabytes: int, file: Path) -> int:
    """The rows again and again, each made different, up to a size; returns how many."""
    written = count = 0
    with file.open("w") as out:
        while written < megabytes * MEGABYTE:
            row = json.loads(rows[count % len(rows)])
            row["messages"][0]["content"] = f"{count}. {row['messages'][0]['content']}"
            line = json.dumps(row) + "\n"
            out.write(line)
            written += len(line)
            count += 1
    return count


# Preparing


def prepare(folder: Path, file: Path, model: Path) -> tuple[Measured, Path]:
    """`fullft prepare` from nothing; returns what it took, and the folder of the set."""
    cache = folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    recipe = {
        "run_dir": str(folder / "run"), "model": {"path": str(model)},
        "data": {"train": str(file), "sequence_length": LENGTH, "cache_dir": str(cache), "on_too_long": "truncate"},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    measured = run([sys.executable, "-m", "fullft.cli", "prepare", str(folder / "recipe.yaml")])
    (summary,) = cache.glob("*/summary.json")
    return measured, summary.parent


TRL = """
import json, sys, time
started = time.perf_counter()
from datasets import load_dataset
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer
file, model, folder, length, processes = sys.argv[1:]
arguments = SFTConfig(
    output_dir=folder, packing=True, max_length=int(length), assistant_only_loss=True,
    dataset_num_proc=int(processes) if int(processes) > 1 else None,
    use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False,
)
imported = time.perf_counter()
rows = load_dataset("json", data_files=file, split="train", cache_dir=folder + "/hub")
trainer = SFTTrainer(model, args=arguments, train_dataset=rows)
batch = next(iter(trainer.get_train_dataloader()))
seconds = time.perf_counter() - imported
import pyarrow.compute
lengths = pyarrow.compute.list_value_length(trainer.train_dataset.data.column("input_ids"))
print("RESULT", json.dumps({"rows": len(rows), "tokens": pyarrow.compute.sum(lengths).as_py(),
    "sequences": len(lengths), "seconds_without_imports": seconds}))
"""


def beside_trl(folder: Path, rows: list[str], model: Path, megabytes: int, python: str) -> dict[str, Any]:
    """Rows/s, tokens/s, peak memory and fill of both on the same file, processes on all cores, imports included."""
    file = folder / "beside.jsonl"
    count = write_input(rows, megabytes, file)
    found: dict[str, Any] = {"megabytes": megabytes, "rows": count}
    rounds = []
    for _ in range(3):
        measured, prepared = prepare(folder, file, model)
        rounds.append(measured)
    (packed,) = prepared.glob("sequences-*/summary.json")
    summary = json.loads(packed.read_text())
    found["fullft"] = _rates(rounds, count, summary["tokens"]) | {"fill": summary["fill"]}
    (folder / "contender.py").write_text(TRL)
    for name, processes in (("trl", len(os.sched_getaffinity(0))), ("trl_default", 1)):
        rounds, result = [], {}
        for number in range(3):
            out = folder / f"{name}-{number}"
            command = [python, str(folder / "contender.py"), *map(str, (file, model, out, LENGTH, processes))]
            try:
                measured = run(command, HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
            except RuntimeError as error:
                print(f"TRL cannot be measured with {python}: {str(error)[-600:]}")
                return found
            line = next(line for line in measured.output.splitlines() if line.startswith("RESULT "))
            result = json.loads(line.removeprefix("RESULT "))
            rounds.append(measured)
            shutil.rmtree(out, ignore_errors=True)
        fill = result["tokens"] / (result["sequences"] * LENGTH)
        found[name] = _rates(rounds, count, result["tokens"]) | {"fill": fill, "last": result}
    for name in ("fullft", "trl", "trl_default"):
        print(name, {key: value for key, value in found[name].items() if key != "rounds"}, flush=True)
    return found


def _rates(rounds: Sequence[Measured], rows: int, tokens: int) -> dict[str, Any]:
    seconds = statistics.median(one.seconds for one in rounds)
    return {
        "seconds": seconds, "rounds": [one.seconds for one in rounds], "rows_per_second": rows / seconds,
        "tokens": tokens, "tokens_per_second": tokens / seconds, "peak_bytes": max(one.peak_bytes for one in rounds),
    }  # fmt: skip


def memory_by_size(folder: Path, rows: list[str], model: Path, sizes: Sequence[int]) -> list[dict[str, Any]]:
    found = []
    for megabytes in sizes:
        file = folder / f"{megabytes}.jsonl"
        count = write_input(rows, megabytes, file)
        measured, prepared = prepare(folder, file, model)
        tokens = json.loads((prepared / "summary.json").read_text())["tokens"]
        found.append({"megabytes": megabytes, "rows": count, "tokens": tokens, "seconds": measured.seconds,
                      "peak_bytes": measured.peak_bytes})  # fmt: skip
        print("memory", found[-1], flush=True)
        file.unlink()
    return found


# Packing


def lengths_of(folder: Path, rows: list[str], model: Path) -> numpy.ndarray:
    """Tokens of real documents, as the tokenizer makes them."""
    file = folder / "lengths.jsonl"
    file.write_text("\n".join(rows) + "\n")
    _, prepared = prepare(folder, file, model)
    return numpy.array(numpy.load(prepared / "documents.npy")["length"])


def packing_side_by_side(real: numpy.ndarray, count: int) -> list[dict[str, Any]]:
    """Fill and time of best-fit, first-fit and concatenate-and-chop on the same lengths, drawn from the real ones."""
    from fullft.data.packing import pack

    found = []
    for capacity in (4096, 8192):
        lengths = numpy.random.default_rng(0).choice(real[real <= capacity], count).astype(numpy.int32)
        row: dict[str, Any] = {"capacity": capacity, "documents": count, "mean_length": float(lengths.mean())}
        ways = {
            "fullft": lambda lengths, capacity: len(pack(lengths, capacity)[1]) - 1,
            "first_fit": lambda lengths, capacity: _first_fit(lengths.tolist(), capacity),
            "concatenate_and_chop": lambda lengths, capacity: -(-int(lengths.sum()) // capacity),
        }
        for name, way in ways.items():
            started = time.perf_counter()
            sequences = way(lengths, capacity)
            seconds = time.perf_counter() - started
            row[name] = {
                "sequences": sequences,
                "fill": int(lengths.sum()) / (sequences * capacity),
                "seconds": seconds,
            }
        # Chopping fills every sequence and cuts a document at nearly each border.
        row["concatenate_and_chop"]["documents_cut"] = row["concatenate_and_chop"]["sequences"] - 1
        print("packing", row, flush=True)
        found.append(row)
    return found


def _first_fit(lengths: Sequence[int], capacity: int) -> int:
    """Sequences that first-fit needs, in order of the documents; a tree finds the first that has room."""
    size = 1 << (len(lengths) - 1).bit_length()
    room = [capacity] * (2 * size)
    used = 0
    for length in lengths:
        at = 1
        while at < size:
            at = 2 * at if room[2 * at] >= length else 2 * at + 1
        used = max(used, at - size + 1)
        room[at] -= length
        while at > 1:
            at //= 2
            room[at] = max(room[2 * at], room[2 * at + 1])
    return used


# A cache of many tokens

FIRST_BATCH = """
import sys, time
started = time.perf_counter()
from pathlib import Path
from benchmarks.data import batches_of
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
batches = batches_of(folder)
next(batches.of_step(1000, rank))
first = time.perf_counter() - started
times = []
for step in range(200):
    started = time.perf_counter()
    for batch in batches.of_step(step, rank):
        pass
    times.append((time.perf_counter() - started) * 1000)
print("RESULT", first, sorted(times)[len(times) // 2], max(times))
"""


def large_cache(folder: Path, tokens: int) -> dict[str, Any]:
    """Time from the start of the interpreter's imports to the first batch on 2 ranks at once, and to each next one."""
    made = folder / "large" / "set"
    made.mkdir(parents=True)
    documents = _write_large_cache(made, tokens)
    started = time.perf_counter()
    batches = batches_of(made)
    packed = time.perf_counter() - started
    commands = [[sys.executable, "-c", FIRST_BATCH, str(rank), str(made)] for rank in range(2)]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    results = [rank.communicate()[0].split()[1:] for rank in ranks]
    found = {
        "tokens": tokens, "documents": documents, "sequences": sum(map(len, batches.sets)), "packing_seconds": packed,
        "first_batch_seconds": max(float(first) for first, _, _ in results),
        "next_batch_milliseconds": max(float(median) for _, median, _ in results),
        "slowest_batch_milliseconds": max(float(most) for _, _, most in results),
    }  # fmt: skip
    print("cache", found, flush=True)
    return found


def _write_large_cache(folder: Path, tokens: int) -> int:
    """Random ids in the layout of a prepared set."""
    from fullft.data.cache import DOCUMENT

    draw = numpy.random.default_rng(0)
    part = 16 * MEGABYTE
    starts = list(range(0, tokens, part))
    for number, start in enumerate(starts):
        ids = draw.integers(0, 100_000, min(part, tokens - start), dtype=numpy.int32)
        numpy.where(ids % 2 == 0, ids, ~ids).tofile(folder / f"part-{number:05}.tokens")
    lengths = numpy.clip(numpy.exp(draw.normal(5.5, 1, tokens // 250)), 8, LENGTH).astype(numpy.int64)
    ends = numpy.cumsum(lengths)
    fits = (ends <= tokens) & ((ends - lengths) // part == (ends - 1) // part)  # a document is in one part
    found = numpy.zeros(int(fits.sum()), DOCUMENT)
    found["start"], found["length"], found["trained"] = (ends - lengths)[fits], lengths[fits], lengths[fits] // 2
    numpy.save(folder / "documents.npy", found)
    summary = {"rows": len(found), "documents": len(found), "bad_rows": 0, "part_starts": starts, "first_bad_rows": []}
    (folder / "summary.json").write_text(json.dumps(summary))
    return len(found)


def batches_of(folder: Path) -> Any:
    """`Batches` of 2 ranks × 4 accumulation over a prepared set, as training opens it."""
    from fullft.data.batches import Batches, Geometry
    from fullft.data.cache import TokenSet
    from fullft.data.mixture import mix
    from fullft.data.sequences import open_sequences
    from fullft.recipe import Data, TrainingSource

    source = TrainingSource(path="large.jsonl")
    data = Data(train=[source], sequence_length=LENGTH)
    summary = json.loads((folder / "summary.json").read_text())
    documents = numpy.load(folder / "documents.npy", mmap_mode="r")
    sequences = open_sequences(TokenSet("large", source, folder, summary, documents, ["large.jsonl"]), data)
    mixture = mix([source], ["large"], [(len(sequences), sequences.summary["tokens"])], 1.0, None)
    return Batches([sequences], mixture, LENGTH, Geometry(16, 2, 4, 2, 0))


if __name__ == "__main__":
    main()
