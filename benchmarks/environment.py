"""What is here to measure with: GPU, driver, packages; what is missing, with the command that mends it.

    python -m benchmarks.environment

Exit code 1 if something is missing without which nothing can be measured.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.common import RESULTS, machine

# Without these training goes on: trackers that are switched off here, launchers and data that are not used.
NOT_NEEDED = ("wandb", "mpi4py")
OF_USE = {"trl": "benchmarks.step measures nothing beside it", "pytest": "the GPU tests are not run",
          "flash-attn": "TRL takes a dense mask, which is not how its users run it", "liger-kernel": "no row of its "
          "kernels"}  # fmt: skip


def main() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    missing, lacking, found = [], [], {}
    for requirement in map(Requirement, project["dependencies"]):
        try:
            found[requirement.name] = installed = version(requirement.name)
            fits = requirement.specifier.contains(installed, prereleases=True)
        except PackageNotFoundError:
            fits = False
        if not fits:
            here = found.get(requirement.name, "not installed")
            line = f"{requirement.name} ({here}): pip install '{requirement}'"
            (lacking if requirement.name in NOT_NEEDED else missing).append(line)
    for name, without in OF_USE.items():
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            lacking.append(f"{name} (not installed; {without}): pip install {name}")
    facts = {"versions": found, "missing": missing, "of_use": lacking}
    if "torch" in found:
        import torch

        gpu = torch.cuda.is_available()
        facts |= {"machine": machine(), "cuda_of_torch": torch.version.cuda}
        if gpu:
            facts |= {"gpu_memory_gib": torch.cuda.get_device_properties(0).total_memory / 2**30,
                      "nccl": ".".join(map(str, torch.cuda.nccl.version()))}  # fmt: skip
        elif os.environ.get("DS_ACCELERATOR") != "cpu":
            missing.append("a GPU that torch can use; DS_ACCELERATOR=cpu proves the parts without one")
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        facts["driver_clock_power"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "environment.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts, indent=1))
    for line in missing:
        print(f"MISSING {line}", file=sys.stderr)
    for line in lacking:
        print(f"of use  {line}", file=sys.stderr)
    sys.exit(bool(missing))


if __name__ == "__main__":
    main()
