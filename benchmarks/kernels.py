"""Each switch of a recipe on and off: time of a step, peak memory, and the losses of the first steps.

    python -m benchmarks.kernels [--quick] [--size small] [--only SWITCH …] [key=value …]

A row is fullft with one key changed, beside the recipe as it is, on the same batches. On CPU, and where they fit into
the GPU's memory, all of a switch take turns with the recipe as it is; else it is measured once, before all others, and
they follow one after the other. What comes to the same recipe is not measured again; what this version of the recipe
does not know, or what cannot run here, is a row that says so.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import matmul
from benchmarks.common import write
from benchmarks.models import SHAPES, parameters, prepare
from benchmarks.step import (
    FULLFT,
    Setting,
    all_fit,
    loss_difference,
    on_cpu,
    row,
    told,
    write_sequences,
)
from benchmarks.turns import OUT_OF_TIME, WARM_UP, Contender, alternate, end_in_time, one_by_one, ratio

ROOT = Path(__file__).parent.parent
BASE = "as it is"
NOT_IN_TIME = f"not {OUT_OF_TIME}"

# Of each switch: name of a row → overrides of the recipe. What matters most is first, since time may end before all is
# measured: `auto` has found the best of the first three.
SWITCHES: dict[str, dict[str, list[str]]] = {
    "attention": {name: [f"model.attention={name}"] for name in
                  ("auto", "varlen", "sdpa", "flash_attention_2", "flash_attention_3", "eager")},
    "checkpointing": {name: [f"train.activation_checkpointing={name}"] for name in
                      ("none", "selective", "full", "offload", "auto")},
    "kernels": {name: [f"train.kernels={name}"] for name in ("none", "liger", "auto")},
    "precision": {name: [f"train.precision={name}"] for name in ("bf16", "fp32")},
    "mlp_tiles": {str(tiles): [f"train.mlp_tiles={tiles}"] for tiles in (2, 8)},
    "deepspeed": {name: [f"deepspeed=ds_configs/{name}.json"] for name in
                  sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json"))},
}  # fmt: skip


def main() -> None:
    arguments = parse()
    end_in_time()
    cpu = on_cpu()
    total = WARM_UP + arguments.turns * arguments.steps + 1
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="fullft-benchmark-", dir=arguments.folder) as name:
        setting = Setting(Path(name), arguments.size, arguments.length, arguments.ranks, cpu)
        setting.recipe["data"]["train"], _ = prepare(
            setting.folder, arguments.size, arguments.data, arguments.tokenizer
        )
        setting.recipe["train"] |= {"steps": total, "global_batch_size": setting.ranks * arguments.accumulation}
        # The most that a row may need: nothing computed again.
        counts, inputs = write_sequences(setting, [*arguments.overrides, "train.activation_checkpointing=none"])
        rate = matmul.best(setting.ranks, cpu)
        conditions = {
            "size": arguments.size, "parameters": parameters(arguments.size), "sequence_length": arguments.length,
            "ranks": setting.ranks, "turns": arguments.turns, "steps_of_a_turn": arguments.steps, "counts": counts,
            "overrides": arguments.overrides, "matmul_flops_per_second": rate,
        }  # fmt: skip
        base = contender_of(setting, arguments, "base", BASE, [])
        left = list(arguments.only or SWITCHES)
        while left:
            switch = left.pop(0)
            ran, why, together = measure(switch, base, setting, arguments, inputs)
            rows += rows_of(switch, base, ran, why, together, counts, setting, rate)
            print(table([one for one in rows if one["switch"] == switch]), flush=True)
            if OUT_OF_TIME in why:
                rows += [{"switch": one, "value": "all", "not_measured": NOT_IN_TIME} for one in left]
                left = []
            # After each: what is measured is kept when the rest takes too long.
            write(name_of(arguments, cpu), {"switches": rows}, [], conditions=conditions)
    failed = [one for one in rows if "not_measured" in one]
    print(f"{len(rows) - len(failed)} rows measured, {len(failed)} not")
    sys.exit(not any("step_seconds" in one for one in rows))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under five minutes on two cores: few turns")
    parser.add_argument("--only", nargs="+", choices=list(SWITCHES), metavar="SWITCH", help=", ".join(SWITCHES))
    parser.add_argument("--size", choices=list(SHAPES), help="default: small on CPU, 1b on GPU")
    parser.add_argument("--length", type=int, help="tokens of a sequence; default: 1024 on CPU, 8192 on GPU")
    parser.add_argument("--accumulation", type=int, default=1, help="sequences of a step, of each rank")
    parser.add_argument("--ranks", type=int, help="default: 2 on CPU, 1 on GPU")
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="chats; default: Python's documentation")
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer; default: trained on that documentation")
    parser.add_argument("--turns", type=int, help="turns of each row; default: 8 (quick: 3)")
    parser.add_argument("--steps", type=int, help="steps of a turn; default: 1 on CPU, 5 on GPU")
    parser.add_argument("--folder", type=Path, help="where model and runs are written; default: temporary")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of all rows")
    found = parser.parse_intermixed_args()
    cpu = on_cpu()
    found.size = found.size or ("small" if cpu else "1b")
    found.length = found.length or (1024 if cpu else 8192)
    found.ranks = found.ranks or (2 if cpu else 1)
    found.turns = found.turns or (3 if found.quick else 8)
    found.steps = found.steps or (1 if cpu else 5)
    return found


def name_of(arguments: argparse.Namespace, cpu: bool) -> str:
    """Of the result; that of some switches does not replace that of all."""
    return "-".join(["kernels", *([] if cpu else [arguments.size]), *(arguments.only or [])])


def contender_of(
    setting: Setting, arguments: argparse.Namespace, name: str, value: str, changed: list[str]
) -> Contender:
    command = [*FULLFT, "fullft", str(setting.write_recipe(name)), *arguments.overrides, *changed]
    return Contender(value, command, setting.ranks)


def measure(
    switch: str, base: Contender, setting: Setting, arguments: argparse.Namespace, inputs: Any
) -> tuple[list[Contender], dict[str, str], bool]:
    """Run the values of a switch, and before them, or with them in turns, the recipe as it is: `base`, unless it has
    been measured and has to go before those that need its memory.

    Returns:
        those that ran; why others did not, by value, and under OUT_OF_TIME that time was over; whether they took turns
    """
    probe, why, ran = setting.write_recipe("probe"), dict[str, str](), list[Contender]()
    for value, changed in SWITCHES[switch].items():
        if problem := not_to_run(probe, arguments.overrides, changed):
            why[value] = problem
        else:
            ran.append(contender_of(setting, arguments, f"{switch}-{value}", value, changed))
    options = {"steps": arguments.steps, "cpu": setting.cpu}
    if together := all_fit(1 + len(ran), setting, inputs):
        base.turns.clear()
        ran = [base, *ran]
        failed = alternate(ran, setting.folder, turns=arguments.turns, **options)
    else:
        ran = ran if base.turns else [base, *ran]
        failed = one_by_one(ran, setting.folder, rounds=1, **options)
    why |= {name: last_line(text).replace(f"{setting.folder}/", "") for name, text in failed.items()}
    why |= {one.name: NOT_IN_TIME for one in ran if not one.turns and one.name not in why}
    return ran, why, together


def rows_of(
    switch: str, base: Contender, ran: list[Contender], why: dict[str, str], together: bool,
    counts: dict[str, float], setting: Setting, rate: float,
) -> list[dict[str, Any]]:  # fmt: skip
    contenders, found = {one.name: one for one in ran}, []
    for value, changed in {BASE: [], **SWITCHES[switch]}.items():
        one: dict[str, Any] = {"switch": switch, "value": value, "overrides": changed}
        if value in why:
            found.append(one | {"not_measured": why[value]})
            continue
        if value not in contenders:  # the recipe as it is has been measured before
            continue
        one |= {"together": together} | row(contenders[value], counts, setting, rate)
        if base.turns:
            one["seconds_of_base"] = ratio(contenders[value], base, "seconds")
            one["cpu_seconds_of_base"] = ratio(contenders[value], base, "cpu_seconds")
        if base.results and contenders[value].results:
            one["peak_of_base"] = one["peak_bytes"] / max(each["memory"]["peak_bytes"] for each in base.results)
            one["loss_difference"] = loss_difference(one, base.results[0])
        found.append(one)
    return found


def last_line(text: str) -> str:
    """Of what a contender said: its error."""
    return text.strip().splitlines()[-1].removeprefix("[rank0]: ")[:300]


def not_to_run(recipe: Path, overrides: list[str], changed: list[str]) -> str:
    """Why a row of the recipe with these words is not measured; empty if it is to be."""
    from fullft.errors import BadInput
    from fullft.recipe import load_recipe

    try:
        same = load_recipe(recipe, [*overrides, *changed]) == load_recipe(recipe, overrides)
    except BadInput as error:
        return f"not in this version: {'; '.join(error.problems)}"
    return f"is the recipe {BASE}" if same else ""


def table(rows: list[dict[str, Any]]) -> str:
    columns = f"{'s/step':>8} {'× base':>7} {'CPU × base':>10} {'tokens/s':>9} {'peak GiB':>9} {'loss diff':>9}  in use"
    lines = [f"{'switch':14} {'value':18} {columns}"]
    for one in rows:
        start = f"{one['switch']:14} {one['value']:18} "
        if "not_measured" in one:
            lines.append(f"{start}{one['not_measured']}")
            continue
        times = [one.get(key, {}).get("median", float("nan")) for key in ("seconds_of_base", "cpu_seconds_of_base")]
        lines.append(
            f"{start}{one['step_seconds']:8.3f} {times[0]:7.3f} {times[1]:10.3f} {one['tokens_per_second']:9.0f} "
            f"{one.get('peak_bytes', 0) / 2**30:9.2f} {one.get('loss_difference', float('nan')):9.1e}  {told(one)}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
