"""What benchmarks/gpu.sh has measured, as Markdown: `python -m benchmarks.gpu_table FOLDER`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def main() -> None:
    folder = Path(sys.argv[1])
    parts = [json.loads(line) for line in (folder / "parts.jsonl").read_text().splitlines()]
    results = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    begin = min((folder / "parts.jsonl").stat().st_mtime - sum(one["seconds"] for one in parts) - 60, 2**40)
    fresh = {name: one for name, one in results.items() if (folder / f"{name}.json").stat().st_mtime >= begin}
    print("\n".join([*head(fresh.get("environment", {})), *of_parts(parts), *of_results(fresh)]))


def head(environment: dict[str, Any]) -> list[str]:
    machine, versions = environment.get("machine", {}), environment.get("versions", {})
    names = ", ".join(f"{name} {versions[name]}" for name in ("torch", "deepspeed", "transformers", "trl", "flash-attn")
                      if name in versions)  # fmt: skip
    lines = [f"# {machine.get('gpu') or machine.get('cpu', 'unknown machine')}", "", names]
    return lines + [f"- missing: {one}" for one in environment.get("missing", [])] + [""]


def of_parts(parts: list[dict[str, Any]]) -> list[str]:
    words = {0: "done", 124: "cut off by its time limit", 137: "cut off by its time limit", None: "not started"}
    rows = [(one["part"], words.get(one["code"], f"failed ({one['code']})"), one["seconds"]) for one in parts]
    return [*markdown(("part", "how it ended", "s"), rows), ""]


def of_results(results: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for name, one in results.items():
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
                lines += [f"- {each} was not measured: {why.strip().splitlines()[-1][:200]}"
                          for each, why in one["conditions"]["failed"].items()] + [""]  # fmt: skip
            case "kernels":
                lines += [f"## Switches, {one['conditions']['size']}", ""]
                lines += [*markdown(KERNELS, [kernel_row(each) for each in rows["switches"]]), ""]
            case _:
                print(f"no table for {name}.json", file=sys.stderr)
    return lines


STEP = ("", "s/step", "tokens/s", "labelled tokens/s", "MFU of matmul", "peak GiB")


def step_row(name: str, one: dict[str, Any]) -> tuple[str, ...]:
    peak = f"{one['peak_bytes'] / 2**30:.1f}" if "peak_bytes" in one else "?"
    return (name, f"{one['step_seconds']:.3f}", f"{one['tokens_per_second']:,.0f}",
            f"{one['labelled_tokens_per_second']:,.0f}", f"{one['mfu_of_matmul']:.1%}", peak)  # fmt: skip


KERNELS = ("switch", "value", "s/step", "× as it is", "peak GiB", "loss difference")


def kernel_row(one: dict[str, Any]) -> tuple[str, ...]:
    start = (one["switch"], one["value"])
    if "not_measured" in one:
        return (*start, one["not_measured"].replace("|", "/"), "", "", "")
    times = one["seconds_of_base"]["median"] if "seconds_of_base" in one else float("nan")
    peak = f"{one['peak_bytes'] / 2**30:.1f}" if "peak_bytes" in one else "?"
    return (*start, f"{one['step_seconds']:.3f}", f"{times:.3f}", peak,
            f"{one.get('loss_difference', float('nan')):.1e}")  # fmt: skip


def markdown(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    columns = list(columns)
    lines = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(str(cell) for cell in line)} |" for line in lines]


if __name__ == "__main__":
    main()
