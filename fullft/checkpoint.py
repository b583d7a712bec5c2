"""Checkpoints: written by all ranks, trusted only when whole, resumed at any world size.

    checkpoints/step-00000200/   __<rank>_0.distcp, .metadata   torch.distributed.checkpoint files
                                 state.json                     step, tokens, recipe, ...
                                 MANIFEST.json                  sizes and sha256 of all of these

A checkpoint is written as step-00000200.tmp and renamed when every file is on disk. It holds the fp32 master weights
and both AdamW moments as 1-D DTensors, 12 bytes a parameter. There is no random state in it: all randomness of a run
is a function of (seed, step, rank).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from fullft.shards import (
    STATES,
    allocate_optimizer_states,
    mesh_of_all_ranks,
    optimizer_shards,
    refresh_model_from_optimizer,
    set_optimizer_shards,
    set_optimizer_step,
    to_dtensor,
)

_MANIFEST = "MANIFEST.json"


def save(engine: Any, folder: Path, state: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of `state["step"]` and delete all but the newest `keep`. All ranks together."""
    final = folder / f"step-{state['step']:08d}"
    partial = final.with_suffix(".tmp")
    if dist.get_rank() == 0:
        for abandoned in folder.glob("step-*.tmp"):  # of a run that was killed while saving
            shutil.rmtree(abandoned)
        partial.mkdir(parents=True)
    dist.barrier()
    dcp_save(_tensors(list(optimizer_shards(engine))), storage_writer=FileSystemWriter(partial, sync_files=True))
    mine = [file for file in partial.iterdir() if file.name.startswith(f"__{dist.get_rank()}_")]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, [_entry(file) for file in mine])
    if dist.get_rank() == 0:
        (partial / "state.json").write_text(json.dumps(state, indent=1))
        files = [entry for part in parts for entry in part]
        files += [_entry(partial / name) for name in (".metadata", "state.json")]
        (partial / _MANIFEST).write_text(json.dumps({"files": files}, indent=1))
        _to_disk(partial)
        # What is there of this step or a later one is damaged: the run would have resumed from it. It must not count
        # among the kept.
        for damaged in (path for path in folder.glob("step-*") if path.name >= final.name and path != partial):
            shutil.rmtree(damaged)
        partial.rename(final)
        _to_disk(folder)
        for old in _complete(folder)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def load_newest(engine: Any, folder: Path) -> dict[str, Any] | None:
    """Resume from the newest checkpoint that is whole; None if there is none. All ranks together.

    Returns:
        its state.json, with "skipped": what was passed over, and why.
    """
    candidates: list[Any] = [[str(path) for path in reversed(_complete(folder))]]
    dist.broadcast_object_list(candidates, src=0)
    skipped: list[str] = []
    for name in candidates[0]:
        if damage := _damage(Path(name)):
            skipped.append(f"{name}: {damage}")
            continue
        state: dict[str, Any] = json.loads((Path(name) / "state.json").read_text())
        _load(engine, Path(name), state["step"])
        return state | {"path": name, "skipped": skipped}
    if skipped:
        raise RuntimeError(
            f"no checkpoint in {folder} is whole: {'; '.join(skipped)}. To start again from the base model, delete it"
        )
    return None


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint, contents not verified."""
    complete = _complete(folder)
    return complete[-1] if complete else None


def _load(engine: Any, path: Path, step: int) -> None:
    allocate_optimizer_states(engine)
    shards = list(optimizer_shards(engine))
    dcp_load(_tensors(shards), storage_reader=FileSystemReader(path))
    for _, parameter, states in shards:
        set_optimizer_shards(parameter, states)
    set_optimizer_step(engine, step)
    refresh_model_from_optimizer(engine)


def _tensors(shards: list[tuple[str, Any, dict[str, torch.Tensor]]]) -> dict[str, Any]:
    """{state: {parameter name: DTensor}} over the memory of the shards, so that loading fills them."""
    mesh = mesh_of_all_ranks(shards[0][2]["weight"].device.type)
    tensors: dict[str, dict[str, torch.Tensor]] = {state: {} for state in STATES}
    for name, parameter, states in shards:
        for state, shard in states.items():
            tensors[state][name] = to_dtensor(shard, parameter, mesh)
    return tensors


def _complete(folder: Path) -> list[Path]:
    """Checkpoints with a manifest, oldest first; contents not verified."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.glob("step-*") if path.suffix != ".tmp" and (path / _MANIFEST).exists())


def _damage(path: Path) -> str:
    """What is wrong with a checkpoint, empty if nothing. The ranks share the files to check and all get the answer."""
    try:
        files = json.loads((path / _MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        files, mine = [], f"{_MANIFEST} cannot be read ({error})"
    else:
        mine = ""
    for entry in files[dist.get_rank() :: dist.get_world_size()]:
        file = path / entry["name"]
        if not file.exists():
            mine = f"{entry['name']} is missing"
        elif file.stat().st_size != entry["bytes"]:
            mine = f"{entry['name']} has {file.stat().st_size} bytes instead of {entry['bytes']}"
        elif _sha256(file) != entry["sha256"]:
            mine = f"{entry['name']} does not match its checksum"
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return next((damage for damage in found if damage), "")


def _entry(file: Path) -> dict[str, Any]:
    return {"name": file.name, "bytes": file.stat().st_size, "sha256": _sha256(file)}


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _to_disk(folder: Path) -> None:
    """fsync a folder and the files in it, so that a rename is not on disk before what it names."""
    for path in [*(path for path in folder.iterdir() if path.is_file()), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
