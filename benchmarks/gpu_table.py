"""What benchmarks/gpu.sh has measured, as Markdown: `python -m benchmarks.gpu_table FOLDER`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def main() -> None:
    folder = Path(sys.argv[1])
    parts, cut = {}, list[str]()
    for number, line in enumerate((folder / "parts.jsonl").read_text().splitlines(), 1):
        try:
            one = json.loads(line)
        except ValueError:
            cut.append(f"- line {number} of parts.jsonl is not whole, and left out")
            continue
        # Of a part that ran again the end is the last one's; what an earlier one has measured is kept.
        before = parts.get(one["part"], {"results": []})["results"]
        parts[one["part"]] = one | {"results": sorted({*before, *one["results"]})}
    results = {}
    for name in dict.fromkeys(name for one in parts.values() for name in one["results"]):
        try:
            results[name] = json.loads((folder / name).read_text())
        except (OSError, ValueError) as error:
            cut.append(f"- {name} cannot be read, and is left out: {error}")
    lines = [*head(results.get("environment.json", {})), *of_parts(list(parts.values()), results)]
    print("\n".join([*lines, *cut, *of_results(results)]))


def head(environment: dict[str, Any]) -> list[str]:
    machine, versions = environment.get("machine", {}), environment.get("versions", {})
    names = ", ".join(f"{name} {versions[name]}" for name in ("torch", "deepspeed", "transformers", "trl", "flash-attn")
                      if name in versions)  # fmt: skip
    lines = [f"# {machine.get('gpu') or machine.get('cpu', 'unknown machine')}", "", names]
    lines += [f"- missing: {one}" for one in environment.get("missing", [])]
    lines += [f"- not in this environment: {one}" for one in environment.get("of_use", [])]
    if environment and not (environment.get("compiler") and environment.get("nvcc")):
        lines.append("- no compiler or no nvcc: DeepSpeed cannot build its own operators here")
    return [*lines, ""]


def of_parts(parts: list[dict[str, Any]], results: dict[str, Any]) -> list[str]:
    words = {0: "done", 124: "cut off by its time limit", 137: "cut off by its time limit", None: "not started"}
    rows = []
    for one in parts:
        conditions = [results[name].get("conditions", {}) for name in one["results"] if name in results]
        without = "".join(f", without {name}" for each in conditions for name in each.get("without", []))
        rows.append((one["part"], words.get(one["code"], f"failed ({one['code']})") + without, one["seconds"]))
    return [*markdown(("part", "how it ended", "s"), rows), ""]


def of_results(results: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for one in results.values():
        rows = one.get("rows", {})
        match one.get("benchmark", "").split("-")[0]:
            case "matmul":
                rates = [(shape, f"{rate / 1e12:.3g}") for shape, rate in rows["flops_per_second"].items()]
                lines += ["## Matrix product", "", *markdown(("shape", "TFLOP/s"), rates), ""]
            case "whole_run":
                checks = [(check["check"], "yes" if check["ok"] else "NO") for check in rows["checks"]]
                lines += ["## A whole run", "", *markdown(("check", "holds"), checks), ""]
            case "step":
                lines += [f"## Step, {one['conditions']['size']} × {one['conditions']['sequence_length']} tokens", ""]
                lines += [*markdown(STEP, [step_row(each, found) for each, found in rows["contenders"].items()]), ""]
                goals = [(each["name"], each["goal"], f"{each['measured']:.4g}", "yes" if each["met"] else "NO")
                         for each in one["goals"]]  # fmt: skip
                lines += [*markdown(("goal", "wanted", "measured", "met"), goals), ""]
                if memory := rows["ratios"].get("fullft/trl"):
                    lines += [f"fullft's peak is {memory['peak_bytes']:.2f} of TRL's, training state included.", ""]
                lines += [f"- without {each}: it is not installed" for each in one["conditions"].get("without", [])]
                lines += [f"- {each} was not measured: {why.strip().splitlines()[-1][:200]}"
                          for each, why in one["conditions"]["failed"].items()] + [""]  # fmt: skip
            case "kernels":
                switches = ", ".join(dict.fromkeys(each["switch"] for each in rows["switches"]))
                lines += [f"## Switches: {switches}; {one['conditions']['size']}", ""]
                lines += [*markdown(KERNELS, [kernel_row(each) for each in rows["switches"]]), ""]
            case "account":
                found = rows["account"]
                sizes = f"hidden {found['hidden']}, {found['layers']} layers, {found['sequence_length']} tokens"
                share = one["goals"][0]["measured"]
                lines += [f"## Account of a step, {sizes}", "", f"It takes {share:.2%} of its processor time.", ""]
    return lines


STEP = ("", "attention; kernels; checkpointing", "s/step", "tokens/s", "labelled tokens/s", "MFU of matmul", "peak GiB",
        "of it state")  # fmt: skip


def step_row(name: str, one: dict[str, Any]) -> tuple[str, ...]:
    peak = f"{one['peak_bytes'] / 2**30:.1f}" if "peak_bytes" in one else "?"
    state = f"{one['in_use']['state_bytes'] / 2**30:.1f}"
    return (name, used(one), f"{one['step_seconds']:.3f}", f"{one['tokens_per_second']:,.0f}",
            f"{one['labelled_tokens_per_second']:,.0f}", f"{one['mfu_of_matmul']:.1%}", peak, state)  # fmt: skip


def used(one: dict[str, Any]) -> str:
    in_use = one["in_use"]
    return f"{in_use['attention']}; {in_use['kernels']}; {in_use['activation_checkpointing']}"


KERNELS = ("switch", "value", "attention; kernels; checkpointing", "s/step", "× as it is", "peak GiB",
           "loss difference")  # fmt: skip


def kernel_row(one: dict[str, Any]) -> tuple[str, ...]:
    start = (one["switch"], one["value"])
    if "not_measured" in one:
        return (*start, one["not_measured"].replace("|", "/"), "", "", "", "")
    times = one["seconds_of_base"]["median"] if "seconds_of_base" in one else float("nan")
    peak = f"{one['peak_bytes'] / 2**30:.1f}" if "peak_bytes" in one else "?"
    return (*start, used(one), f"{one['step_seconds']:.3f}", f"{times:.3f}", peak,
            f"{one.get('loss_difference', float('nan')):.1e}")  # fmt: skip


def markdown(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    columns = list(columns)
    lines = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(str(cell) for cell in line)} |" for line in lines]


if __name__ == "__main__":
    main()
