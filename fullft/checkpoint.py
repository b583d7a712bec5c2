"""Checkpoints on disk: trusted only when whole, resumed at any world size. `saver.py` writes them.

    checkpoints/step-00000200/   __<rank>_0.distcp, .metadata   torch.distributed.checkpoint files
                                 state.json                     step, tokens, recipe, ...
                                 MANIFEST.json                  sizes and sha256 of all of these; "hosts": of each rank,
                                                                where these have not the same folder

A checkpoint is written as step-00000200.g3.tmp (3: the generation of the run folder's lease) and renamed when every
file is on disk. It holds the fp32 master weights and both AdamW moments as 1-D DTensors, 12 bytes a parameter, and
with train.ema_decay the average of the weights, 4 more. There is no random state in it: all randomness of a run is a
function of (seed, step, rank).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from fullft import lease
from fullft.cluster import is_shared
from fullft.errors import BadInput
from fullft.shards import (
    AVERAGE,
    allocate_optimizer_states,
    mesh_of_all_ranks,
    optimizer_shards,
    refresh_model_from_optimizer,
    set_optimizer_shards,
    set_optimizer_step,
    to_dtensor,
)

MANIFEST = "MANIFEST.json"
_THREADS = 8
_PUT_TOGETHER = "The parts of a checkpoint that several hosts have, copied into one folder, are the whole checkpoint"

Tensors = dict[str, dict[str, torch.Tensor]]  # {state: {parameter name: DTensor [numel] fp32}}


def load_newest(engine: Any, folder: Path) -> dict[str, Any] | None:
    """Resume from the newest checkpoint that is whole; None if there is none. All ranks together.

    Newer ones that are damaged are set aside as step-….damaged, and deleted after the next checkpoint.

    Returns:
        its state.json, with "skipped": what was passed over, and why.

    Raises:
        BadInput: none is whole, or it is of another model.
    """
    apart = not is_shared(folder)
    candidates: list[Any] = [[str(path) for path in reversed(_named(folder))]]
    dist.broadcast_object_list(candidates, src=0)
    skipped: dict[str, str] = {}
    for name in candidates[0]:
        if damage := _damage(Path(name), apart):
            skipped[name] = damage
            continue
        state: dict[str, Any] = json.loads((Path(name) / "state.json").read_text())
        _load(engine, Path(name), state["step"])
        if dist.get_rank() == 0:
            for damaged in skipped:
                _set_aside(Path(damaged))
        return state | {"path": name, "skipped": [f"{name}: {damage}" for name, damage in skipped.items()]}
    if skipped:
        listed = "; ".join(f"{name}: {damage}" for name, damage in skipped.items())
        raise BadInput(
            f"run_dir: no checkpoint is whole ({listed}). To start again from the base model, delete {folder}"
            + (f". To go on, start on the hosts that wrote them, with as many ranks. {_PUT_TOGETHER}" if apart else "")
        )
    return None


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint, contents not verified."""
    complete = all_complete(folder)
    return complete[-1] if complete else None


def require_one_run(run_folder: Path) -> None:
    """Where nodes have run folders of their own, none has checkpoints that rank 0's folder has nothing of. All ranks
    together.

    Raises:
        BadInput: another node has; they would be lost.
    """
    folder = run_folder / "checkpoints"
    if is_shared(folder):
        return
    # One that was killed while it gave the first checkpoint its name has it as .tmp on rank 0's node.
    mine = (socket.gethostname(), any(folder.glob("step-*")), bool(_named(folder)))
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, mine)
    first, has_some, _ = told[0]
    if not has_some and (others := sorted({host for host, _, has in told if has})):
        raise BadInput(
            f"run_dir: {run_folder} has checkpoints on {', '.join(others)}, and none on {first}, where rank 0 is. To "
            f"go on with them, start on the hosts that wrote them, in the same order. {_PUT_TOGETHER}. Else delete "
            "them, or use another run_dir"
        )


def find(folder: Path, step: int | None = None) -> tuple[Path, list[str]]:
    """The newest checkpoint that is whole, or that of a step, and what was passed over. By a process alone.

    Raises:
        BadInput: there is none, or that of the step is damaged.
    """
    there = all_complete(folder)
    listed = f"those of {folder} are {', '.join(path.name for path in there)}" if there else f"{folder} has none"
    chosen = [path for path in reversed(there) if step is None or path.name == f"step-{step:08d}"]
    if not chosen:
        raise BadInput(f"there is no checkpoint{'' if step is None else f' of step {step}'}: {listed}")
    skipped: list[str] = []
    for path in chosen:
        with ThreadPoolExecutor(_THREADS) as pool:  # hashing leaves the other threads free
            try:
                damages = [*pool.map(lambda share, path=path: _damage_of_share(path, share, _THREADS), range(_THREADS))]
            except OSError as error:
                raise BadInput(f"{path} cannot be read: {error}") from None
        if damage := next(filter(None, damages), ""):
            skipped.append(f"{path}: {damage}")
        else:
            return path, skipped
    advice = f". {_PUT_TOGETHER}" if "wrote it)" in "".join(skipped) else ""
    raise BadInput(f"no checkpoint is whole: {'; '.join(skipped)} ({listed}){advice}")


class SavedWeights:
    """The fp32 weights of a checkpoint, or their average if it has one, read shard by shard by a process alone.

    `sizes`: elements of each parameter."""

    def __init__(self, path: Path) -> None:
        self._reader = FileSystemReader(path)
        self._metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        saved_tensors = self._metadata.state_dict_metadata
        averaged = any(key.startswith(f"{AVERAGE}.") for key in saved_tensors)
        self._prefix = f"{AVERAGE}." if averaged else "weight."
        self._saved = {
            key.removeprefix(self._prefix): saved
            for key, saved in saved_tensors.items()
            if key.startswith(self._prefix) and isinstance(saved, TensorStorageMetadata)
        }
        self.sizes = {name: saved.size.numel() for name, saved in self._saved.items()}

    def shards(self) -> Iterator[tuple[str, int, torch.Tensor]]:
        """(name, first element, values [n] fp32) of each shard that was saved; of each parameter one for each rank.

        The values are good until the next are taken: all have the same memory.
        """
        sizes = [chunk.sizes.numel() for saved in self._saved.values() for chunk in saved.chunks]
        memory = torch.empty(max(sizes, default=0))
        start = torch.Size([0])
        for name, saved in self._saved.items():
            for chunk in (chunk for chunk in saved.chunks if chunk.sizes.numel()):
                values, at = memory[: chunk.sizes.numel()], MetadataIndex(f"{self._prefix}{name}", chunk.offsets)
                item = ReadItem(LoadItemType.TENSOR, at, start, at, start, chunk.sizes)
                self._reader.read_data(LoadPlan([item]), _Into(values)).wait()
                yield name, chunk.offsets[0], values


class _Into(DefaultLoadPlanner):
    """Has what is read copied into one tensor."""

    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self._values = values

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:  # noqa: ARG002
        return self._values


def _load(engine: Any, path: Path, step: int) -> None:
    allocate_optimizer_states(engine)
    shards = list(optimizer_shards(engine))
    tensors, reader = tensors_of(shards), FileSystemReader(path)
    if difference := _difference(tensors, reader):
        raise BadInput(f"run_dir: {path} is a checkpoint of another model: {difference}; use another run_dir")
    starts_average = AVERAGE in tensors and not any(
        key.startswith(f"{AVERAGE}.") for key in reader.read_metadata().state_dict_metadata
    )
    if starts_average:
        tensors.pop(AVERAGE)
    dcp_load(tensors, storage_reader=reader)
    for _, parameter, states in shards:
        if starts_average:  # the checkpoint has none: it begins with the weights
            states[AVERAGE] = states["weight"]
        set_optimizer_shards(parameter, states)
    set_optimizer_step(engine, step)
    refresh_model_from_optimizer(engine)


def _difference(tensors: Tensors, reader: FileSystemReader) -> str:
    """The first parameter that model and checkpoint do not have alike, empty if there is none."""
    saved: dict[str, Any] = reader.read_metadata().state_dict_metadata
    ours = {f"weight.{name}": tensor.numel() for name, tensor in tensors["weight"].items()}
    theirs = {key: value.size.numel() for key, value in saved.items() if key.startswith("weight.")}
    for key in [*ours, *theirs]:
        if ours.get(key) != theirs.get(key):
            name = key.removeprefix("weight.")
            return f"{name} has {ours.get(key, 'no')} elements in the model, {theirs.get(key, 'no')} in the checkpoint"
    return ""


def tensors_of(shards: list[tuple[str, Any, dict[str, torch.Tensor]]]) -> Tensors:
    """The shards as DTensors that share their memory, so that loading fills them."""
    mesh = mesh_of_all_ranks(shards[0][2]["weight"].device.type)
    tensors: Tensors = {state: {} for state in shards[0][2]}
    for name, parameter, states in shards:
        for state, shard in states.items():
            tensors[state][name] = to_dtensor(shard, parameter, mesh)
    return tensors


def _named(folder: Path) -> list[Path]:
    """Everything called a checkpoint, oldest first, whole or not."""
    return sorted(path for path in folder.glob("step-*") if not path.suffix and path.is_dir())


def all_complete(folder: Path) -> list[Path]:
    """Checkpoints with a manifest, oldest first; contents not verified."""
    return [path for path in _named(folder) if (path / MANIFEST).exists()]


def _set_aside(path: Path) -> None:
    lease.check()
    damaged = path.with_suffix(".damaged")
    shutil.rmtree(damaged, ignore_errors=True)
    path.rename(damaged)


def _damage(path: Path, apart: bool) -> str:
    """What is wrong with a checkpoint, empty if nothing. The ranks share the files to check and all get the answer.
    `apart`: not all see the same files."""
    mine, unreadable, manifest = "", "", ""
    try:
        mine = _damage_of_share(path, dist.get_rank(), dist.get_world_size(), apart)
        mine += f", on {socket.gethostname()}" if mine and apart else ""
        manifest = "" if mine else _sha256(path / MANIFEST)
    except OSError as error:
        unreadable = f"rank {dist.get_rank()} on {socket.gethostname()}: {reason_of(error)}"
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (mine, unreadable, manifest))
    if unreadable := next((unreadable for _, unreadable, _ in found if unreadable), ""):
        raise RuntimeError(f"checkpoint {path} cannot be read ({unreadable}); it is left as it is. Start again")
    if damage := next((damage for damage, *_ in found if damage), ""):
        return damage
    return f"{MANIFEST} is not the same on all hosts" if len({manifest for *_, manifest in found}) > 1 else ""


def _damage_of_share(path: Path, number: int, shares: int, apart: bool = False) -> str:
    """What is wrong with every `shares`-th file of a checkpoint, from that of `number` on; empty if nothing. `apart`:
    with all that the rank `number` of `shares` will read.

    Raises:
        OSError: a file is there and cannot be read, as when a file server is away: that says nothing about it.
    """
    damage = ""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        hosts = manifest.get("hosts", [])
        files = manifest["files"] if apart else manifest["files"][number::shares]
        if apart and len(hosts) == shares:
            files = [entry for entry in files if _writer(entry["name"]) in (None, number)]
        for entry in files:
            file = path / entry["name"]
            if not file.exists():
                damage = f"{entry['name']} is missing"
                if hosts and (rank := _writer(entry["name"])) is not None:
                    damage += f" ({hosts[rank]} wrote it)"
            elif file.stat().st_size != entry["bytes"]:
                damage = f"{entry['name']} has {file.stat().st_size} bytes instead of {entry['bytes']}"
            elif _sha256(file) != entry["sha256"]:
                damage = f"{entry['name']} does not match its checksum"
    except FileNotFoundError:
        damage = f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError) as error:
        damage = f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"
    return damage


def _writer(name: str) -> int | None:
    """The rank that wrote a file of a checkpoint: 3 of __3_0.distcp; None: rank 0's folder and all others have it."""
    return int(name.split("_")[2]) if name.startswith("__") else None


def entry_of(file: Path) -> dict[str, Any]:
    return {"name": file.name, "bytes": file.stat().st_size, "sha256": _sha256(file)}


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def reason_of(error: BaseException) -> str:
    """One line of an error, those of DCP without their tracebacks."""
    if isinstance(error, CheckpointException):
        return "; ".join(f"rank {rank}: {reason_of(cause)}" for rank, (cause, _) in sorted(error.failures.items()))
    first = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return f"{type(error).__name__}: {first}"


def to_disk(folder: Path) -> None:
    """fsync a folder and the files in it, so that a rename is not on disk before what it names."""
    for path in [*(path for path in folder.iterdir() if path.is_file()), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
