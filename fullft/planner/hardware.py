"""What GPUs, their links and their networks can do: `hardware.yaml`, and what a user adds to it."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from fullft.errors import BadInput

TABLE = Path(__file__).with_name("hardware.yaml")


@dataclass(frozen=True)
class Gpu:
    """A GPU and what it is connected by; units as in `hardware.yaml`, which says where the figures are from."""

    name: str
    device: str
    memory_gib: float
    tflops: float
    matmul_tflops: float | None
    memory_tbps: float
    link_gbps: float
    pcie_gbps: float
    network_gbps: float


def gpus(more: str | None = None) -> dict[str, Gpu]:
    """By name, with those of the file `more`.

    Raises:
        BadInput: `more` cannot be read, or a GPU in it lacks a figure, or has one that is no positive number.
    """
    found = {name: Gpu(name, **entry) for name, entry in yaml.safe_load(TABLE.read_text()).items()}
    if more is None:
        return found
    try:
        added = yaml.safe_load(Path(more).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadInput([f"--hardware {more}: cannot be read: {error}"]) from error
    if not isinstance(added, dict):
        raise BadInput([f"--hardware {more}: must be GPUs by name, as in {TABLE.name} of fullft"])
    problems = [f"--hardware {more}: {name}: {wrong}" for name, entry in added.items() if (wrong := _wrong(entry))]
    if problems:
        raise BadInput(problems)
    return found | {str(name).lower(): Gpu(str(name).lower(), **entry) for name, entry in added.items()}


def gpu(name: str, more: str | None = None) -> Gpu:
    """Raises BadInput, with the names most like it, of one that is not known."""
    known = gpus(more)
    if found := known.get(name.lower()):
        return found
    like = [one for one in known if one.startswith(name.lower())]
    like = like or difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(like)}?" if like else f"known: {', '.join(known)}"
    raise BadInput([f"--gpu {name}: no such GPU; {hint} Others are added by --hardware FILE.yaml"])


def here() -> Gpu | None:
    """The GPU of this process, with the memory that it reports; one that is not in the table has the rates of an
    H100. None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    device, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory / 2**30
    if known := _of_device(device):
        return replace(known, memory_gib=memory)
    return replace(gpus()["h100-80gb"], name=device, memory_gib=memory)


def _of_device(device: str) -> Gpu | None:
    parts = [one for one in gpus().values() if one.device in device]
    return max(parts, key=lambda one: len(one.device), default=None)


def peak_tflops(device: str) -> float | None:
    """Dense bf16 TFLOP/s by the name that torch.cuda.get_device_name() tells; None of a GPU that is not known."""
    return known.tflops if (known := _of_device(device)) else None


def network_gbps(device: str) -> float | None:
    """What the planner assumes of a GPU's network, Gb/s one way; None of a GPU that is not known."""
    return known.network_gbps if (known := _of_device(device)) else None


def _wrong(entry: Any) -> str:
    names = [one.name for one in fields(Gpu) if one.name != "name"]
    if not isinstance(entry, dict) or set(entry) != set(names):
        return f"must have exactly {', '.join(names)}"
    if not isinstance(entry["device"], str) or not entry["device"]:
        return f"device must be a text, not {entry['device']!r}"
    bad = [
        one for one in names[1:]
        if not (one == "matmul_tflops" and entry[one] is None)
        and (isinstance(entry[one], bool) or not isinstance(entry[one], int | float) or not 0 < entry[one] < math.inf)
    ]  # fmt: skip
    return f"{', '.join(bad)} must be positive numbers" if bad else ""
