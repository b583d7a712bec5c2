"""Writing checkpoints while training goes on.

Training waits only while the shards are copied to host memory. A thread of each rank writes the copies; what these
threads tell each other goes through a gloo group of their own, so it never meets a collective of the training.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from fullft import lease, watchdog
from fullft.checkpoint import MANIFEST, Tensors, all_complete, entry_of, newest, reason_of, tensors_of, to_disk
from fullft.cluster import available_host_memory, owners
from fullft.errors import LeaseLost
from fullft.recipe import Checkpoint
from fullft.report.summary import score
from fullft.retention import rollback
from fullft.retention.rollback import step_of
from fullft.shards import local_part, mesh_of_all_ranks, optimizer_shards, states_of, to_dtensor
from fullft.tracking import Tracker

_LONGEST_WRITE = timedelta(hours=6)  # a rank that waits longer for another's files takes the write for failed
_SHARE_OF_FREE_MEMORY = 0.9


class Saver:
    """Writes the checkpoints of a run. All ranks together call `copy`, then `write`, at the same steps.

    A write that fails on any rank (disk full, I/O error) is told and counted, leaves the older checkpoints as they are,
    and does not end the training. Every method raises LeaseLost on the rank that owns the folder if another job has
    taken it over.

    Where ranks have folders of their own, each has the files of its ranks, beside the same MANIFEST.json, .metadata and
    state.json: put together they are the whole checkpoint. It counts when rank 0's folder has it, whose is the last.
    """

    def __init__(
        self,
        engine: Any,
        folder: Path,
        settings: Checkpoint,
        tracker: Tracker,
        resumed_step: int,
        keep_good: bool = False,
    ) -> None:
        """`keep_good`: never remove the newest checkpoint from before a retention task has passed its limit."""
        self.keep_good = keep_good
        self._engine, self._folder, self._settings, self._tracker = engine, folder, settings, tracker
        self.resumed_step = self.saved_step = resumed_step  # the latter: the newest that is on disk
        self._group = dist.new_group(backend="gloo", timeout=_LONGEST_WRITE)
        self._copies: Tensors | None = None  # in host memory, made at the first save and used for every one
        self._asynchronous = settings.asynchronous
        self._owners = owners(folder)
        self._apart, self._owner = any(self._owners), self._owners[dist.get_rank()]
        self._owns = self._owner == dist.get_rank()
        self._thread: threading.Thread | None = None
        self._lost: LeaseLost | None = None
        self._waited_seconds = 0.0
        self._rows: deque[dict[str, float]] = deque()  # metrics not yet logged

    @torch.no_grad()
    def copy(self) -> None:
        """Copy the shards of this rank to host memory, once the write before has ended."""
        started = time.perf_counter()
        self.wait()
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
        started = time.perf_counter()
        self._tracker.sync()
        tensors = self._copies or tensors_of(list(optimizer_shards(self._engine)))
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

    def rewind(self, step: int) -> None:
        """The run goes on from an earlier checkpoint."""
        self.resumed_step = self.saved_step = step

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
            self._tracker.say(f"checkpoint {name} was cut off while it was written: {reason_of(error)}")
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
            if dist.get_rank() == 0:
                path = self._folder / name
                self._tracker.artifact("checkpoint", path, {"step": state["step"], "score": _score(path)})

    def _write_together(self, tensors: Tensors, state: dict[str, Any], final: Path) -> str:
        """Returns what failed, on any rank, empty if nothing."""
        opened, failure = self._on_each(self._owns, lambda: _new_folder(final))
        if failure:
            return failure
        partial = Path(opened[self._owner])
        try:
            # Copied ahead, tensors would wait for the training's stream; these are in host memory or waited for anyway.
            writer = FileSystemWriter(partial, sync_files=True, per_thread_copy_ahead=0)
            dcp_save(tensors, storage_writer=writer, process_group=self._group)
            mine = [entry_of(file) for file in partial.iterdir() if file.name.startswith(f"__{dist.get_rank()}_")]
            failure = ""
        except CheckpointException as error:  # on all ranks
            mine, failure = [], _why_not_written(partial) or reason_of(error)
        except OSError as error:
            mine, failure = [], f"rank {dist.get_rank()} on {socket.gethostname()}: {reason_of(error)}"
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (mine, failure, socket.gethostname()), group=self._group)
        failure = next((failure for _, failure, _ in parts if failure), "")
        if not failure:
            manifest: dict[str, Any] = {"files": [entry for part, *_ in parts for entry in part]}
            manifest |= {"hosts": [host for *_, host in parts]} if self._apart else {}
            failure = self._complete(partial, final, manifest, state)
        if failure and self._owns:
            shutil.rmtree(partial, ignore_errors=True)
        return failure

    def _complete(self, partial: Path, final: Path, manifest: dict[str, Any], state: dict[str, Any]) -> str:
        """Add what is not tensors, and give the checkpoint its name, in rank 0's folder last. Returns what failed."""
        if self._apart:
            others = self._owns and dist.get_rank() != 0
            told, failure = self._on_main(lambda: ((partial / ".metadata").read_bytes(), state))
            if not failure:  # with rank 0's state: others' has their own times and memory
                metadata, state = told
                _, failure = self._on_each(others, lambda: self._commit(partial, final, manifest, state, metadata))
            if failure:
                return failure
        kept, failure = self._on_main(lambda: self._commit(partial, final, manifest, state))
        if self._apart and not failure:
            _, left = self._on_each(others, lambda: _keep_only(self._folder, kept))
            if left:
                self._tracker.say(f"WARNING: a checkpoint that is no longer needed could not be deleted: {left}")
        return failure

    def _commit(
        self, partial: Path, final: Path, manifest: dict[str, Any], state: dict[str, Any], metadata: bytes | None = None
    ) -> list[str]:
        """Returns what checkpoints the folder then has. `metadata`: of rank 0, for a folder that is not its."""
        if metadata is not None:
            (partial / ".metadata").write_bytes(metadata)
        (partial / "state.json").write_text(json.dumps(state, indent=1))
        manifest["files"] += [entry_of(partial / name) for name in (".metadata", "state.json")]
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
        to_disk(partial)
        lease.commit(final)
        to_disk(self._folder)
        try:
            for old in _superfluous(self._folder, self._settings, self.keep_good) if metadata is None else ():
                lease.remove(old)
        except OSError as error:
            self._tracker.say(f"WARNING: a checkpoint that is no longer needed could not be deleted: {error}")
        return [path.name for path in all_complete(self._folder)]

    def _on_main(self, action: Callable[[], Any]) -> tuple[Any, str]:
        """(result, "") of an action on rank 0, or (None, what failed), on all ranks."""
        answer = [self._attempt(dist.get_rank() == 0, action)]
        dist.broadcast_object_list(answer, src=0, group=self._group)
        return answer[0]

    def _on_each(self, acts: bool, action: Callable[[], Any]) -> tuple[list[Any], str]:
        """(results by rank, what failed first) of an action on the ranks that act, on all ranks."""
        answers: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(answers, self._attempt(acts, action), group=self._group)
        return [result for result, _ in answers], next((failure for _, failure in answers if failure), "")

    def _attempt(self, acts: bool, action: Callable[[], Any]) -> tuple[Any, str]:
        try:
            return (action(), "") if acts else (None, "")
        except LeaseLost as error:
            self._lost = error
            return None, str(error)
        except Exception as error:
            return None, f"rank {dist.get_rank()} on {socket.gethostname()}: {reason_of(error)}"

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


def _allocate_copies(engine: Any, group: Any) -> tuple[Tensors | None, str]:
    """Room in host memory for the shards of this rank, pinned on GPU hosts; None and the reason if a host has not
    enough for all its ranks. The same on all ranks."""
    parameters = list(engine.module.named_parameters())
    states = states_of(engine)
    count = len(states) * sum(local_part(parameter).stop for _, parameter in parameters)
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
        problem = f"no memory for copies on {socket.gethostname()}: {reason_of(error)}"
    dist.all_gather_object(ranks, problem, group=group)
    if problem := next((problem for problem in ranks if problem), ""):
        if pinned:
            runtime.cudaHostUnregister(block.data_ptr())
        return None, problem
    mesh, at = mesh_of_all_ranks("cpu"), 0
    copies: Tensors = {state: {} for state in states}
    for name, parameter in parameters:
        for state in states:
            size = local_part(parameter).stop
            copies[state][name] = to_dtensor(block[at : at + size], parameter, mesh)
            at += size
    return copies, ""


def _superfluous(folder: Path, settings: Checkpoint, keep_good: bool) -> list[Path]:
    """What may go now that a checkpoint was written: all but the newest, the best and that of before a loss, and what
    was set aside."""
    complete = all_complete(folder)
    kept = complete[-settings.keep :]
    scored = [(value, path) for path in complete if (value := _score(path)) is not None]
    if settings.keep_best and scored:
        kept.append(max(scored)[1])
    if keep_good and complete:
        kept += filter(None, [rollback.target(folder.parent, step_of(complete[-1]))])
    return [path for path in complete if path not in kept] + list(folder.glob("step-*.damaged"))


def _score(path: Path) -> float | None:
    """How good a checkpoint is, by the evaluation of its step; None if there was none."""
    try:
        return score(json.loads((path.parent.parent / "retention" / f"{path.name}.json").read_text()))
    except (OSError, ValueError, KeyError):
        return None


def _why_not_written(folder: Path) -> str:
    """torch.save hides the errno of a write that failed: try one, to call a full disk or quota by its name."""
    file = folder / f"probe-{dist.get_rank()}"
    try:
        with file.open("wb") as probe:
            probe.write(bytes(2**20))
            os.fsync(probe.fileno())
        file.unlink()
    except OSError as error:
        return f"rank {dist.get_rank()} on {socket.gethostname()}: {reason_of(error)}"
    return ""


def _keep_only(folder: Path, kept: list[str]) -> None:
    for path in folder.glob("step-*"):
        if path.name not in kept:
            lease.remove(path)


def _size(folder: Path) -> int:
    """Bytes of what is being written."""
    size = 0
    for path in folder.glob("*.tmp/*"):
        with contextlib.suppress(OSError):
            size += path.stat().st_size
    return size


def _new_folder(final: Path) -> str:
    lease.check()
    if dist.get_rank() != 0 and final.exists():  # a part of what rank 0's folder has not, or not any more
        lease.remove(final)
    partial = lease.partial(final)
    shutil.rmtree(partial, ignore_errors=True)  # of this step, from a write that failed
    partial.mkdir(parents=True)
    return str(partial)
