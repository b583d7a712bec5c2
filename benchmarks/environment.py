"""What is here to measure with: GPU, driver, compilers, packages; what is missing, with the command that mends it.

python -m benchmarks.environment             exit code 1 if something is missing that all measurements need
python -m benchmarks.environment --carry     where fullft and TRL are installed: commands that fetch all packages
                                             for a machine that has Python 3.12, torch and no network
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, machine, write_json

# Without these training goes on: trackers that are switched off here, launchers and data that are not used.
NOT_NEEDED = ("wandb", "mpi4py")
OF_USE = {"trl": "benchmarks.step measures nothing beside it", "pytest": "the GPU tests are not run",
          "flash-attn": "TRL takes a dense mask, which is not how its users run it", "liger-kernel": "no row of its "
          "kernels"}  # fmt: skip
# Machines with GPUs have it; --carry leaves it and what it needs for CUDA out.
TORCH = "torch"
FROM_SOURCE = ("deepspeed",)  # have no wheels
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux2014_x86_64")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--carry", action="store_true", help="print the commands that fetch all packages")
    if parser.parse_args().carry:
        print("\n".join(carry()))
        return
    missing, lacking, found = packages()
    facts: dict[str, Any] = {"versions": found, "missing": missing, "of_use": lacking}
    facts |= {"compiler": shutil.which("c++"), "nvcc": nvcc(), "ninja": shutil.which("ninja")}
    if TORCH in found:
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
    print(json.dumps(facts, indent=1))
    write_json(RESULTS / "environment.json", facts)
    print(RESULTS / "environment.json")
    for line in missing:
        print(f"MISSING {line}", file=sys.stderr)
    for line in lacking:
        print(f"of use  {line}", file=sys.stderr)
    sys.exit(bool(missing))


def nvcc() -> str | None:
    """Where DeepSpeed looks for it to build its operators."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def packages() -> tuple[list[str], list[str], dict[str, str]]:
    """What is missing, what would be of use, and the versions of what is there: of fullft's requirements and theirs."""
    missing, lacking, found = [], [], {}
    for name in _project():
        for requirement, by in closure([name]):
            installed = version(requirement.name)
            if installed is not None:
                found[requirement.name] = installed
            if installed is None or not requirement.specifier.contains(installed, prereleases=True):
                line = (
                    f"{requirement.name} ({installed or 'not installed'}; {by} needs it): pip install '{requirement}'"
                )
                into = lacking if _name(name) in NOT_NEEDED else missing
                into += [line] if line not in into else []
    for name, without in OF_USE.items():
        if (installed := version(name)) is not None:
            found[name] = installed
        else:
            lacking.append(f"{name} (not installed; {without}): pip install {name}")
    return missing, lacking, found


def carry() -> list[str]:
    """Commands for a shell with network, and the one for the machine without."""
    wanted = [one for one in OF_USE if one != "flash-attn"]  # which is compiled for its machine
    named = {}
    for requirement, _ in closure([*_project(), *wanted], without=TORCH):
        installed = version(requirement.name)
        named[_name(requirement.name)] = f"{requirement.name}=={installed}" if installed else str(requirement)
    unknown = [name for name, one in named.items() if version(name) is None]
    wheels = " ".join(f"'{one}'" for name, one in sorted(named.items()) if name not in FROM_SOURCE)
    platforms = " ".join(f"--platform {one}" for one in PLATFORMS)
    lines = [f"pip download --dest wheels --no-deps --only-binary=:all: --python-version 3.12 {platforms} {wheels}"]
    lines += [f"pip wheel --wheel-dir wheels --no-deps --no-build-isolation '{named[one]}'" for one in FROM_SOURCE]
    if unknown:
        lines.append(f"# not installed here, so that it is not known what they need: {', '.join(sorted(unknown))}")
    return [*lines, "# there: pip install --no-index --no-deps wheels/*.whl"]


def closure(requirements: list[str], without: str = "") -> list[tuple[Any, str]]:
    """These requirements and those of their packages, as far as they are installed, each once, and who has it."""
    from packaging.requirements import Requirement

    left, seen, found = [(Requirement(one), "fullft") for one in requirements], set(), []
    while left:
        requirement, by = left.pop(0)
        name = _name(requirement.name)
        if name == without or (name, *requirement.extras) in seen:
            continue
        seen.add((name, *requirement.extras))
        found.append((requirement, by))
        for text in (metadata.requires(name) or []) if version(name) is not None else []:
            own = Requirement(text)
            if own.marker is None or any(own.marker.evaluate({"extra": one}) for one in ("", *requirement.extras)):
                left.append((own, name))
    return found


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _project() -> list[str]:
    file = Path(__file__).parent.parent / "pyproject.toml"
    found: list[str] = tomllib.loads(file.read_text())["project"]["dependencies"]
    return found


def _name(requirement: str) -> str:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    return canonicalize_name(Requirement(requirement).name)


if __name__ == "__main__":
    main()
