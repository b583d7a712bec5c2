"""Weights on disk: which bytes of which safetensors file hold an element of a parameter.

Under ZeRO-3 a rank owns contiguous elements of each flattened parameter, which are contiguous bytes of a file. So every
rank reads just its own bytes of the base model, and writes just its own of the tuned one, all ranks at once, and no
rank ever holds a full parameter. Where the files hold other tensors than the model has (experts fused on loading),
`Weights.reason` says why transformers has to load them.
"""

from __future__ import annotations

import ctypes
import errno
import json
import math
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from fullft.errors import BadInput

# In the order in which safetensors lays tensors out in a file: by dtype in this one, then by name.
DTYPES = {
    "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32, "BF16": torch.bfloat16,
    "F16": torch.float16, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_SHOWN = 20
_BLOCK = 16 << 20  # bytes read or written at once where they must be converted or moved from or to a GPU
_THREADS = 8  # of a rank; parallel file systems are fast only with several reads or writes under way


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file; its elements lie in row-major order from byte `offset`."""

    file: Path
    dtype: str  # as safetensors calls it: BF16, F32, ...
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Weights:
    """Where each tensor of a model is stored, by the model's own names; a tied tensor has all of its names."""

    stored: dict[str, Stored]
    reason: str = ""  # why its shards cannot be read directly; empty if they can
    problems: list[str] = field(default_factory=list)


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of a model folder, by their names in the files; empty if it has no safetensors.

    Raises:
        BadInput: a file is missing or damaged.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        files = [single]
    elif index.exists():
        try:
            files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (ValueError, KeyError, OSError) as error:
            raise BadInput(f"model.path: {index} cannot be read: {error}") from None
    else:
        files = sorted(folder.glob("*.safetensors"))
    if missing := [file.name for file in files if not file.exists()]:
        raise BadInput(f"model.path: {folder} lacks {', '.join(missing)}, which its index names; is it complete?")
    found: dict[str, Stored] = {}
    for file in files:
        found |= tensors_of(file)
    return found


def tensors_of(file: Path) -> dict[str, Stored]:
    """All tensors of a file. Its format (https://huggingface.co/docs/safetensors): length of the header in 8 bytes, the
    header as JSON, the data."""
    try:
        with file.open("rb") as content:
            length = int.from_bytes(content.read(8), "little")
            header = json.loads(content.read(length)) if 0 < length <= file.stat().st_size else {}
        header.pop("__metadata__", None)
        found = {
            name: Stored(file, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
            for name, entry in header.items()
        }
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"model.path: {file} cannot be read, is it complete? {error}") from None
    if not found or end != file.stat().st_size:
        size = file.stat().st_size
        raise BadInput(f"model.path: {file} cannot be read, is it complete? It has {size} bytes, its header says {end}")
    return found


def locate(folder: Path, meta: PreTrainedModel, grown: Iterable[str] = ()) -> Weights:
    """Find each parameter and persistent buffer of a model in the files of a folder.

    `grown` names parameters that may have more rows (dimension 0) in the model than in the files.
    """
    try:
        files = stored_tensors(folder)
    except BadInput as error:
        return Weights({}, problems=error.problems)
    if not files:
        if list(folder.glob("*.bin")):
            return Weights({}, reason="its weights are .bin files")
        return Weights({}, problems=[f"model.path: {folder} holds no weights (*.safetensors)"])
    wanted, our_name = meta.state_dict(), renamer(meta)
    found: dict[str, Stored] = {}
    for name, stored in files.items():
        ours, converted = our_name(name)
        if converted is not None:
            return Weights({}, reason=f"transformers converts its tensors on loading ({name})")
        found[ours] = stored
    floats = {name for name, dtype in DTYPES.items() if dtype.is_floating_point}
    if unknown := next((name for name in wanted if name in found and found[name].dtype not in floats), None):
        return Weights({}, reason=f"{unknown} is stored as {found[unknown].dtype}")
    for names in tied(meta):
        there = [name for name in names if name in found]
        if len(there) > 1:  # transformers compares their values, and unties them if they differ
            return Weights({}, reason=f"its files hold {' and '.join(there)}, which its config ties")
        found |= {name: found[there[0]] for name in names if there}
    return Weights(found, problems=_disagreements(folder, meta, wanted, found, set(grown)))


def renamer(meta: PreTrainedModel) -> Callable[[str], tuple[str, str | None]]:
    """Name in a file → (name in the model, what converts it, if anything), as transformers loads it."""
    wanted, steps = meta.state_dict(), get_model_conversion_mapping(meta)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    return lambda name: rename_source_key(name, renamings, converters, meta.base_model_prefix, wanted)  # type: ignore[no-any-return]


def stored_buffers(folder: Path, meta: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Persistent buffers of a model from the files of a folder, as they are there; those that the files have."""
    wanted = set(meta.state_dict()) - {name for name, _ in meta.named_parameters(remove_duplicate=False)}
    if not wanted:
        return {}
    our_name, found = renamer(meta), {}
    for name, stored in stored_tensors(folder).items():
        ours, _ = our_name(name)
        if ours in wanted and stored.dtype in DTYPES:
            found[ours] = torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
            read_parts([Part(stored, 0, found[ours].view(-1))])
    return found


def tied(meta: PreTrainedModel) -> list[list[str]]:
    """Names of one and the same parameter, for each that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in meta.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def is_ignored(name: str, meta: PreTrainedModel) -> bool:
    """Whether transformers passes over a tensor of this name in the files, without which the model is whole."""
    rules = [*(meta._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq", r"\.attn\.(masked_)?bias"]
    return any(re.search(rule, name) for rule in rules)


def _disagreements(
    folder: Path, meta: PreTrainedModel, wanted: dict[str, Any], found: dict[str, Stored], grown: set[str]
) -> list[str]:
    def fits(name: str) -> bool:
        ours, theirs = tuple(wanted[name].shape), found[name].shape
        return ours == theirs or (name in grown and ours[1:] == theirs[1:] and ours[0] > theirs[0])

    missing = [name for name in wanted if name not in found]
    misshaped = [
        f"{name} {list(found[name].shape)}, config says {list(wanted[name].shape)}"
        for name in wanted
        if name in found and not fits(name)
    ]
    surplus = [name for name in found if name not in wanted and not is_ignored(name, meta)]
    problems = []
    for what, names in (
        ("lack tensors", missing),
        ("have tensors that the model has not", surplus),
        ("have tensors of other shapes", misshaped),
    ):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            problems.append(
                f"model.path: config and weights of {folder} disagree: the files {what}: "
                f"{'; '.join(names[:_SHOWN])}{more}"
            )
    return problems


# Reading


@dataclass(frozen=True)
class Part:
    """Elements [start, start + n) of a stored tensor, and those in memory [n], of any dtype and device."""

    stored: Stored
    start: int
    values: torch.Tensor


def read_parts(parts: Iterable[Part]) -> int:
    """Fill the parts from their files, several at once; returns the bytes that were read.

    Raises:
        OSError: a file cannot be read, or ends too early.
    """
    todo = sorted(
        (part for part in parts if part.values.numel()), key=lambda part: (part.stored.file, part.stored.offset)
    )
    handles = {file: os.open(file, os.O_RDONLY) for file in {part.stored.file for part in todo}}
    try:
        for handle in handles.values():  # read ahead would read what other ranks need
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)
        with ThreadPoolExecutor(_THREADS) as pool:
            return sum(pool.map(lambda part: _read(part, handles[part.stored.file]), todo))
    finally:
        for handle in handles.values():
            os.close(handle)


def _read(part: Part, handle: int) -> int:
    dtype = DTYPES[part.stored.dtype]
    count, at = part.values.numel(), part.stored.offset + part.start * dtype.itemsize
    if part.values.dtype == dtype and part.values.device.type == "cpu":
        _fill(part.values, handle, at, part.stored.file)
        return count * dtype.itemsize
    block = torch.empty(min(count, _BLOCK // dtype.itemsize), dtype=dtype, pin_memory=part.values.device.type == "cuda")
    for done in range(0, count, len(block)):
        piece = block[: min(len(block), count - done)]
        _fill(piece, handle, at + done * dtype.itemsize, part.stored.file)
        part.values[done : done + len(piece)].copy_(piece)
    return count * dtype.itemsize


def _fill(tensor: torch.Tensor, handle: int, at: int, file: Path) -> None:
    view = memoryview(tensor.view(torch.uint8).numpy())  # type: ignore[arg-type]
    while view:
        if not (count := os.preadv(handle, [view[: 1 << 30]], at)):
            raise OSError(f"{file} ends before byte {at}: it has changed since it was checked")
        view, at = view[count:], at + count


_ROWS_AT_ONCE = 1024


def mean_row(stored: Stored, rank: int, world_size: int) -> torch.Tensor:
    """This rank's share of the mean over rows (dimension 0) of a stored tensor: [blocks, elements of a row] fp64.

    Summed over the ranks (each block is zero on all but one) and then over the blocks in their order, it is the mean,
    to the last bit the same for every world size.
    """
    rows, width = stored.shape[0], math.prod(stored.shape[1:])
    starts = range(0, rows, _ROWS_AT_ONCE)
    shares = torch.zeros(len(starts), width, dtype=torch.float64)
    for number in range(rank, len(starts), world_size):
        count = min(_ROWS_AT_ONCE, rows - starts[number])
        block = torch.empty(count * width, dtype=torch.float32)
        read_parts([Part(stored, starts[number] * width, block)])
        shares[number] = block.view(count, width).double().sum(0) / rows
    return shares


# Writing


@dataclass(frozen=True)
class NewFile:
    """A safetensors file to be written: its header, and where each of its tensors goes."""

    path: Path
    header: bytes
    stored: dict[str, Stored]
    size: int  # bytes


def new_file(path: Path, tensors: dict[str, torch.Tensor]) -> NewFile:
    """What safetensors would make of tensors (meta tensors will do), to the byte."""
    names, order = {dtype: name for name, dtype in DTYPES.items()}, list(DTYPES.values())
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name)):
        start, end = end, end + tensors[name].numel() * tensors[name].dtype.itemsize
        shape = list(tensors[name].shape)
        entries[name] = {"dtype": names[tensors[name].dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    stored = {
        name: Stored(path, entry["dtype"], tuple(entry["shape"]), len(header) + entry["data_offsets"][0])
        for name, entry in entries.items()
        if name != "__metadata__"
    }
    return NewFile(path, header, stored, len(header) + end)


def create(new: NewFile) -> None:
    """Make a file at its full size, with its header, so that a full disk is met before the weights are written.

    Raises:
        OSError: there is no room.
    """
    with new.path.open("xb") as file:
        # Not os.posix_fallocate: where the file system cannot (NFS 3), libc writes a byte into each block instead.
        libc = ctypes.CDLL(None, use_errno=True)
        libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
        if libc.fallocate(file.fileno(), 0, 0, new.size):
            code, free = ctypes.get_errno(), shutil.disk_usage(new.path.parent).free
            if code not in (errno.EOPNOTSUPP, errno.ENOSYS) or free < new.size:
                code = code if code not in (errno.EOPNOTSUPP, errno.ENOSYS) else errno.ENOSPC
                raise OSError(code, f"{os.strerror(code)}: {new.size / 1e9:.2f} GB wanted, {free / 1e9:.2f} GB free")
            file.truncate(new.size)
        file.write(new.header)
        file.flush()
        os.fsync(file.fileno())


def write_parts(parts: Iterable[Part], ahead: int = 2 * _THREADS) -> int:
    """Write parts into files that `create` has made, several at once, and to disk; returns the bytes written.

    `parts` may be a generator: no more than `ahead` wait to be written at a time. None is copied whole.
    """
    handles: dict[Path, int] = {}
    under_way: deque[Future[int]] = deque()
    count = 0
    try:
        with ThreadPoolExecutor(_THREADS) as pool:
            for part in parts:
                file = part.stored.file
                if file not in handles:
                    # Write-only: a client of a network file system that has read a page may write all of it back, also
                    # the bytes of other ranks.
                    handles[file] = os.open(file, os.O_WRONLY)
                under_way.append(pool.submit(_write, part, handles[file]))
                if len(under_way) > ahead:
                    count += under_way.popleft().result()
            count += sum(one.result() for one in under_way)
        for handle in handles.values():
            os.fsync(handle)
    finally:
        for handle in handles.values():
            os.close(handle)
    return count


def _write(part: Part, handle: int) -> int:
    dtype = DTYPES[part.stored.dtype]
    count, at = part.values.numel(), part.stored.offset + part.start * dtype.itemsize
    if part.values.dtype == dtype and part.values.device.type == "cpu" and part.values.is_contiguous():
        _put(part.values.detach(), handle, at)
        return count * dtype.itemsize
    on_gpu = part.values.device.type == "cuda"
    block = torch.empty(min(count, _BLOCK // dtype.itemsize), dtype=dtype, pin_memory=on_gpu)
    for done in range(0, count, len(block)):
        piece = block[: min(len(block), count - done)]
        piece.copy_(part.values[done : done + len(piece)].detach())
        _put(piece, handle, at + done * dtype.itemsize)
    return count * dtype.itemsize


def _put(tensor: torch.Tensor, handle: int, at: int) -> None:
    view = memoryview(tensor.view(torch.uint8).numpy())  # type: ignore[arg-type]
    while view:
        count = os.pwrite(handle, view[: 1 << 30], at)
        view, at = view[count:], at + count
