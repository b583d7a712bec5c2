"""Checkpoints: written by all ranks in the background, trusted only when whole, resumed at any world size.

    checkpoints/step-00000200/   __<rank>_0.distcp, .metadata   torch.distributed.checkpoint files
                                 state.json                     step, tokens, recipe, ...
                                 MANIFEST.json                  sizes and sha256 of all of these

A checkpoint is written as step-00000200.g3.tmp (3: the generation of the run folder's lease) and renamed when every
file is on disk. It holds the fp32 master weights and both AdamW moments as 1-D DTensors, 12 bytes a parameter. There is
no random state in it: all randomness of a run is a function of (seed, step, rank).

Training waits only while the shards are copied to host memory. A thread of each rank writes the copies; what these
threads tell each other goes through a gloo group of their own, so it never meets a collective of the training.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from fullft import lease, watchdog
from fullft.cluster import available_host_memory, is_shared
from fullft.errors import BadInput, LeaseLost
from fullft.recipe import Checkpoint
from fullft.retention.report import score
from fullft.shards import (
    STATES,
    allocate_optimizer_states,
    local_part,
    mesh_of_all_ranks,
    optimizer_shards,
    refresh_model_from_optimizer,
    set_optimizer_shards,
    set_optimizer_step,
    to_dtensor,
)
from fullft.tracking import Tracker

_MANIFEST = "MANIFEST.json"
_LONGEST_WRITE = timedelta(hours=6)  # a rank that waits longer for another's files takes the write for failed
_SHARE_OF_FREE_MEMORY = 0.9

Tensors = dict[str, dict[str, torch.Tensor]]  # {state: {parameter name: DTensor [numel] fp32}}


class Saver:
    """Writes the checkpoints of a run. All ranks together call `copy`, then `write`, at the same steps.

    A write that fails on any rank (disk full, I/O error) is told and counted, leaves the older checkpoints as they are,
    and does not end the training. Every method raises LeaseLost on rank 0 if another job has taken over the run folder.
    """

    def __init__(self, engine: Any, folder: Path, settings: Checkpoint, tracker: Tracker, resumed_step: int) -> None:
        self._engine, self._folder, self._settings, self._tracker = engine, folder, settings, tracker
        self.resumed_step = self.saved_step = resumed_step  # the latter: the newest that is on disk
        self._group = dist.new_group(backend="gloo", timeout=_LONGEST_WRITE)
        self._copies: Tensors | None = None  # in host memory, made at the first save and used for every one
        self._asynchronous, self._shared = settings.asynchronous, _is_shared(folder, tracker)
        self._thread: threading.Thread | None = None
        self._lost: LeaseLost | None = None
        self._waited_seconds = 0.0
        self._rows: deque[dict[str, float]] = deque()  # metrics not yet logged

    @torch.no_grad()
    def copy(self) -> None:
        """Copy the shards of this rank to host memory, once the write before has ended."""
        started = time.perf_counter()
        self.wait()
        if not self._shared:
            return
        if self._asynchronous and self._copies is None:
            self._copies, why_not = _allocate_copies(self._engine, self._group)
            if self._copies is None:
                self._asynchronous = False
                self._tracker.say(f"checkpoints are written while training waits: {why_not}")
        if self._copies is not None:
            for name, parameter, shards in optimizer_shards(self._engine):
                for state, shard in shards.items():
                    local: torch.Tensor = self._copies[state][name].to_local()  # type: ignore[attr-defined]
                    local.copy_(shard[local_part(parameter)], non_blocking=True)
            if torch.device(self._engine.device).type == "cuda":
                torch.cuda.synchronize()
            self._waited_seconds = time.perf_counter() - started
            self._rows.append({"time/checkpoint_stall_seconds": self._waited_seconds})

    def write(self, state: dict[str, Any]) -> None:
        """Write what `copy` has copied as the checkpoint of `state["step"]`: in the background, or at once without
        copies. The row of the step's metrics should be logged before: a resumed run does not log it again."""
        if not self._shared:
            self._rows.append({"checkpoint/failed": 1.0})
            return
        started = time.perf_counter()
        self._tracker.sync()
        tensors = self._copies or _tensors(list(optimizer_shards(self._engine)))
        self._thread = threading.Thread(
            target=self._write, args=(tensors, state, started), name="checkpoint", daemon=True
        )
        self._thread.start()
        if self._copies is None:
            self.wait()
            self._rows.append({"time/checkpoint_stall_seconds": time.perf_counter() - started})  # in a later row

    def wait(self) -> None:
        """Until no write is under way. A slow disk is no hang: the watchdog is quiet while the files grow."""
        size = 0
        while self._thread is not None:
            self._thread.join(timeout=30)
            self._thread = self._thread if self._thread.is_alive() else None
            if self._thread is not None and (now := _size(self._folder)) != size:
                size = now
                watchdog.touch()
        if self._lost is not None:
            raise self._lost

    def metrics(self) -> dict[str, float]:
        """New since the last call: time/checkpoint_stall_seconds, time/checkpoint_seconds, checkpoint/failed."""
        row: dict[str, float] = {}
        while self._rows:
            row |= self._rows.popleft()
        return row

    def _write(self, tensors: Tensors, state: dict[str, Any], started: float) -> None:
        """Write a checkpoint and tell how it went, never raising: the same on all ranks."""
        name = f"step-{state['step']:08d}"
        try:
            failure = self._write_together(tensors, state, self._folder / name)
        except Exception as error:  # a rank is gone, so the run ends anyway, and not for this
            self._tracker.say(f"checkpoint {name} was cut off while it was written: {_reason(error)}")
            self._rows.append({"checkpoint/failed": 1.0})
            return
        seconds = time.perf_counter() - started
        if failure:
            self._rows.append({"checkpoint/failed": 1.0})
            self._tell_failure(name, failure)
        else:
            self.saved_step = state["step"]
            self._rows.append({"checkpoint/failed": 0.0, "time/checkpoint_seconds": seconds})
            waited = f"training waited {self._waited_seconds:.1f} s" if self._copies is not None else "training waited"
            self._tracker.say(f"checkpoint {name} on disk after {seconds:.1f} s ({waited})")

    def _write_together(self, tensors: Tensors, state: dict[str, Any], final: Path) -> str:
        """Returns what failed, on any rank, empty if nothing."""
        opened, failure = self._on_main(lambda: _new_folder(lease.partial(final)))
        if failure:
            return failure
        partial = Path(opened)
        try:
            # Copied ahead, tensors would wait for the training's stream; these are in host memory or waited for anyway.
            writer = FileSystemWriter(partial, sync_files=True, per_thread_copy_ahead=0)
            dcp_save(tensors, storage_writer=writer, process_group=self._group)
            mine = [_entry(file) for file in partial.iterdir() if file.name.startswith(f"__{dist.get_rank()}_")]
            failure = ""
        except CheckpointException as error:  # on all ranks
            mine, failure = [], _why_not_written(partial) or _reason(error)
        except OSError as error:
            mine, failure = [], f"rank {dist.get_rank()} on {socket.gethostname()}: {_reason(error)}"
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (mine, failure), group=self._group)
        failure = next((failure for _, failure in parts if failure), "")
        if not failure:
            files = [entry for part, _ in parts for entry in part]
            _, failure = self._on_main(lambda: self._commit(partial, final, files, state))
        if failure and dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        return failure

    def _on_main(self, action: Callable[[], Any]) -> tuple[Any, str]:
        """(result, "") of an action on rank 0, or (None, what failed), on all ranks."""
        answer: list[Any] = [None, ""]
        if dist.get_rank() == 0:
            try:
                answer[0] = action()
            except LeaseLost as error:
                self._lost = error
                answer[1] = str(error)
            except Exception as error:
                answer[1] = f"rank 0 on {socket.gethostname()}: {_reason(error)}"
        dist.broadcast_object_list(answer, src=0, group=self._group)
        return answer[0], answer[1]

    def _commit(self, partial: Path, final: Path, files: list[dict[str, Any]], state: dict[str, Any]) -> None:
        (partial / "state.json").write_text(json.dumps(state, indent=1))
        files += [_entry(partial / name) for name in (".metadata", "state.json")]
        (partial / _MANIFEST).write_text(json.dumps({"files": files}, indent=1))
        to_disk(partial)
        lease.commit(final)
        to_disk(self._folder)
        try:
            for old in _superfluous(self._folder, self._settings):
                lease.remove(old)
        except OSError as error:
            self._tracker.say(f"WARNING: a checkpoint that is no longer needed could not be deleted: {error}")

    def _tell_failure(self, name: str, failure: str) -> None:
        if self._lost is not None:
            return
        text = f"checkpoint {name} could not be written: {failure}. Training goes on. "
        with contextlib.suppress(OSError):
            there, free = newest(self._folder), shutil.disk_usage(self._folder).free
            text += f"Newest checkpoint on disk: {there.name if there else 'none'}; "
            text += f"{free / 2**30:.2f} GiB are free in {self._folder}"
        self._tracker.say(f"WARNING: {text}")
        self._tracker.alert("checkpoint could not be written", text)


def load_newest(engine: Any, folder: Path) -> dict[str, Any] | None:
    """Resume from the newest checkpoint that is whole; None if there is none. All ranks together.

    Newer ones that are damaged are set aside as step-….damaged, and deleted after the next checkpoint.

    Returns:
        its state.json, with "skipped": what was passed over, and why.

    Raises:
        BadInput: none is whole, or it is of another model.
    """
    candidates: list[Any] = [[str(path) for path in reversed(_named(folder))]]
    dist.broadcast_object_list(candidates, src=0)
    skipped: dict[str, str] = {}
    for name in candidates[0]:
        if damage := _damage(Path(name)):
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
        )
    return None


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint, contents not verified."""
    complete = _complete(folder)
    return complete[-1] if complete else None


_THREADS = 8


def find(folder: Path, step: int | None = None) -> tuple[Path, list[str]]:
    """The newest checkpoint that is whole, or that of a step, and what was passed over. By a process alone.

    Raises:
        BadInput: there is none, or that of the step is damaged.
    """
    there = _complete(folder)
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
    raise BadInput(f"no checkpoint is whole: {'; '.join(skipped)} ({listed})")


class Weights:
    """The fp32 weights of a checkpoint, read shard by shard by a process alone. `sizes`: elements of each parameter."""

    def __init__(self, path: Path) -> None:
        self._reader = FileSystemReader(path)
        self._metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._saved = {
            key.removeprefix("weight."): saved
            for key, saved in self._metadata.state_dict_metadata.items()
            if key.startswith("weight.") and isinstance(saved, TensorStorageMetadata)
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
                values, at = memory[: chunk.sizes.numel()], MetadataIndex(f"weight.{name}", chunk.offsets)
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
    tensors, reader = _tensors(shards), FileSystemReader(path)
    if difference := _difference(tensors, reader):
        raise BadInput(f"run_dir: {path} is a checkpoint of another model: {difference}; use another run_dir")
    dcp_load(tensors, storage_reader=reader)
    for _, parameter, states in shards:
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


def _tensors(shards: list[tuple[str, Any, dict[str, torch.Tensor]]]) -> Tensors:
    """The shards as DTensors that share their memory, so that loading fills them."""
    mesh = mesh_of_all_ranks(shards[0][2]["weight"].device.type)
    tensors: Tensors = {state: {} for state in STATES}
    for name, parameter, states in shards:
        for state, shard in states.items():
            tensors[state][name] = to_dtensor(shard, parameter, mesh)
    return tensors


def _allocate_copies(engine: Any, group: Any) -> tuple[Tensors | None, str]:
    """Room in host memory for the shards of this rank, pinned on GPU hosts; None and the reason if a host has not
    enough for all its ranks. The same on all ranks."""
    parameters = list(engine.module.named_parameters())
    count = len(STATES) * sum(local_part(parameter).stop for _, parameter in parameters)
    mine = (socket.gethostname(), 4 * count, available_host_memory())
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine, group=group)
    for host in sorted({host for host, _, _ in ranks}):
        needed = sum(size for on, size, _ in ranks if on == host)
        free = min(free for on, _, free in ranks if on == host)
        if needed > _SHARE_OF_FREE_MEMORY * free:
            return None, f"{host} has {free / 2**30:.1f} GiB of memory free, copies would take {needed / 2**30:.1f} GiB"
    problem, block, pinned = "", torch.empty(0), False
    try:
        block = torch.empty(count, dtype=torch.float32)
        if torch.device(engine.device).type == "cuda" and count:
            # One block, registered with CUDA by hand: pin_memory() would round it up to a power of two.
            runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            torch.cuda.check_error(runtime.cudaHostRegister(block.data_ptr(), block.nbytes, 0))
            pinned = True
    except RuntimeError as error:
        problem = f"no memory for copies on {socket.gethostname()}: {_reason(error)}"
    dist.all_gather_object(ranks, problem, group=group)
    if problem := next((problem for problem in ranks if problem), ""):
        if pinned:
            runtime.cudaHostUnregister(block.data_ptr())
        return None, problem
    mesh, at = mesh_of_all_ranks("cpu"), 0
    copies: Tensors = {state: {} for state in STATES}
    for name, parameter in parameters:
        for state in STATES:
            size = local_part(parameter).stop
            copies[state][name] = to_dtensor(block[at : at + size], parameter, mesh)
            at += size
    return copies, ""


def _named(folder: Path) -> list[Path]:
    """Everything called a checkpoint, oldest first, whole or not."""
    return sorted(path for path in folder.glob("step-*") if not path.suffix)


def _complete(folder: Path) -> list[Path]:
    """Checkpoints with a manifest, oldest first; contents not verified."""
    return [path for path in _named(folder) if (path / _MANIFEST).exists()]


def _superfluous(folder: Path, settings: Checkpoint) -> list[Path]:
    """What may go now that a checkpoint was written: all but the newest and the best, and what was set aside."""
    complete = _complete(folder)
    kept = complete[-settings.keep :]
    scored = [(value, path) for path in complete if (value := _score(path)) is not None]
    if settings.keep_best and scored:
        kept.append(max(scored)[1])
    return [path for path in complete if path not in kept] + list(folder.glob("step-*.damaged"))


def _score(path: Path) -> float | None:
    """How good a checkpoint is, by the evaluation of its step; None if there was none."""
    try:
        return score(json.loads((path.parent.parent / "retention" / f"{path.name}.json").read_text()))
    except (OSError, ValueError, KeyError):
        return None


def _set_aside(path: Path) -> None:
    lease.check()
    damaged = path.with_suffix(".damaged")
    shutil.rmtree(damaged, ignore_errors=True)
    path.rename(damaged)


def _damage(path: Path) -> str:
    """What is wrong with a checkpoint, empty if nothing. The ranks share the files to check and all get the answer."""
    mine, unreadable = "", ""
    try:
        mine = _damage_of_share(path, dist.get_rank(), dist.get_world_size())
    except OSError as error:
        unreadable = f"rank {dist.get_rank()} on {socket.gethostname()}: {_reason(error)}"
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (mine, unreadable))
    if unreadable := next((unreadable for _, unreadable in found if unreadable), ""):
        raise RuntimeError(f"checkpoint {path} cannot be read ({unreadable}); it is left as it is. Start again")
    return next((damage for damage, _ in found if damage), "")


def _damage_of_share(path: Path, number: int, shares: int) -> str:
    """What is wrong with every `shares`-th file of a checkpoint, from that of `number` on; empty if nothing.

    Raises:
        OSError: a file is there and cannot be read, as when a file server is away: that says nothing about it.
    """
    damage = ""
    try:
        files = json.loads((path / _MANIFEST).read_text())["files"]
        for entry in files[number::shares]:
            file = path / entry["name"]
            if not file.exists():
                damage = f"{entry['name']} is missing"
            elif file.stat().st_size != entry["bytes"]:
                damage = f"{entry['name']} has {file.stat().st_size} bytes instead of {entry['bytes']}"
            elif _sha256(file) != entry["sha256"]:
                damage = f"{entry['name']} does not match its checksum"
    except FileNotFoundError:
        damage = f"{_MANIFEST} is missing"
    except (ValueError, KeyError, TypeError) as error:
        damage = f"{_MANIFEST} cannot be read ({type(error).__name__}: {error})"
    return damage


def _entry(file: Path) -> dict[str, Any]:
    return {"name": file.name, "bytes": file.stat().st_size, "sha256": _sha256(file)}


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _reason(error: BaseException) -> str:
    """One line of an error, those of DCP without their tracebacks."""
    if isinstance(error, CheckpointException):
        return "; ".join(f"rank {rank}: {_reason(cause)}" for rank, (cause, _) in sorted(error.failures.items()))
    first = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return f"{type(error).__name__}: {first}"


def _why_not_written(folder: Path) -> str:
    """torch.save hides the errno of a write that failed: try one, to call a full disk or quota by its name."""
    file = folder / f"probe-{dist.get_rank()}"
    try:
        with file.open("wb") as probe:
            probe.write(bytes(2**20))
            os.fsync(probe.fileno())
        file.unlink()
    except OSError as error:
        return f"rank {dist.get_rank()} on {socket.gethostname()}: {_reason(error)}"
    return ""


def _is_shared(folder: Path, tracker: Tracker) -> bool:
    """Whether all ranks see one folder for checkpoints; else none can be written, which is told. All ranks together."""
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    if is_shared(folder):
        return True
    text = f"{folder} is not the same for all ranks, so no checkpoint will be written: a run that is killed starts anew"
    tracker.say(f"WARNING: {text}. Put run_dir on a file system that all nodes share")
    tracker.alert("no checkpoints", text)
    return False


def _size(folder: Path) -> int:
    """Bytes of what is being written."""
    size = 0
    for path in folder.glob("*.tmp/*"):
        with contextlib.suppress(OSError):
            size += path.stat().st_size
    return size


def _new_folder(path: Path) -> str:
    lease.check()
    shutil.rmtree(path, ignore_errors=True)  # of this step, from a write that failed
    path.mkdir(parents=True)
    return str(path)


def to_disk(folder: Path) -> None:
    """fsync a folder and the files in it, so that a rename is not on disk before what it names."""
    for path in [*(path for path in folder.iterdir() if path.is_file()), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
