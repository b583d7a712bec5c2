"""What one host has to say: versions, code, data, GPUs, limits, folders. Nothing is judged here.

`fullft doctor --hostfile` starts this module by ssh on every host. It prints its facts, waits for a line that tells it
its place among the others, measures the network with them, and prints that. It ends when its input is closed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fullft.errors import BadInput
from fullft.recipe import Recipe, load_recipe

LINE = "fullft-doctor "  # before each JSON on standard output: login shells print lines of their own
DEEPSPEED_PORT = 29500
_PACKAGES = ("torch", "deepspeed", "transformers")
_VARIABLES = ("NCCL_", "GLOO_", "FI_", "UCX_", "HF_HUB_OFFLINE", "HF_HOME", "TORCH_EXTENSIONS_DIR")
_BLOCK = 2**20
# Of nvidia-smi --query-gpu. It refuses the whole query for a field that its version does not know.
_GPU_FIELDS = ("index", "name", "driver_version", "memory.total", "memory.used", "temperature.gpu")
_GPU_HEALTH = (
    "ecc.errors.uncorrected.volatile.total", "clocks_throttle_reasons.hw_slowdown",
    "clocks_throttle_reasons.hw_thermal_slowdown", "clocks_throttle_reasons.hw_power_brake_slowdown",
    "clocks.applications.graphics", "clocks.default_applications.graphics",
)  # fmt: skip


def look(recipe: Recipe | None, token: str, name: str) -> dict[str, Any]:
    """The facts of this host, which the others know by this name, as JSON can hold them.

    Leaves a file with `token` in the run folder's place, by which the others see that they share it; see `forget`.
    """
    return {
        "host": name, "versions": versions(), "code": code(), "data": data(recipe) if recipe else {},
        "gpus": gpus(), "xid": xid_errors(), "limits": limits(), "port_free": _is_free(DEEPSPEED_PORT),
        "environment": {name: value for name, value in os.environ.items() if name.startswith(_VARIABLES)},
        "locks": stale_locks(), "folder": folder(recipe, token, name) if recipe else None,
        "hub": hub(recipe) if recipe else "", "wandb": wandb(recipe) if recipe else "",
        "address": _first_address(), "free_port": _free_port(),
    }  # fmt: skip


def versions() -> dict[str, str]:
    """Of what must be the same on all hosts. CUDA and NCCL are those that torch brings."""
    import torch

    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    found["CUDA"] = torch.version.cuda or "none"
    if torch.cuda.is_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return found


def code() -> dict[str, str]:
    """SHA-256 of fullft's Python files as this process imports them, and where they are."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for file in [*sorted(root.rglob("*.py")), root.parent / "launch" / "train.py"]:
        if file.exists():
            digest.update(f"{file.relative_to(root.parent)}\0".encode() + file.read_bytes())
    return {"digest": digest.hexdigest()[:16], "folder": str(root)}


def data(recipe: Recipe) -> dict[str, str]:
    """Path → digest of each file of the recipe's data and model; the problem in place of it, where it can't be read."""
    from fullft.data.sources import source_files

    tasks = [task.data for task in recipe.retention.tasks if task.data]
    found: dict[str, str] = {}
    for source in [*recipe.data.training_sets, *recipe.data.validation, *tasks]:
        try:
            files = source_files(source)
        except BadInput as error:
            found[source.path] = f"missing: {error}"
            continue
        found |= {str(file): sampled(Path(file)) for file in files}
    model = Path(recipe.model.path)
    if model.is_dir():
        found |= {str(file): sampled(file) for file in sorted(model.glob("*")) if file.is_file()}
    return found


def sampled(file: Path) -> str:
    """Size and SHA-256 of first, middle and last MiB: files of hundreds of GB are told apart in milliseconds."""
    try:
        size = file.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with file.open("rb") as stream:
            for start in sorted({0, max(0, size // 2 - _BLOCK // 2), max(0, size - _BLOCK)}):
                stream.seek(start)
                digest.update(stream.read(_BLOCK))
    except OSError as error:
        return f"missing: {error}"
    return f"{size} bytes, {digest.hexdigest()[:16]}"


def gpus() -> list[dict[str, str]]:
    """One dict of the fields above for each GPU that nvidia-smi tells of; none without it."""
    if shutil.which("nvidia-smi") is None:
        return []
    found = _of_gpus(_GPU_FIELDS)
    health = [_of_gpus(_GPU_HEALTH)]
    if len(health[0]) != len(found):
        health = [_of_gpus((field,)) for field in _GPU_HEALTH]
    for told in health:
        if len(told) == len(found):
            found = [gpu | more for gpu, more in zip(found, told, strict=True)]
    return found


def _of_gpus(fields: tuple[str, ...]) -> list[dict[str, str]]:
    told = _output(["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"])
    return [dict(zip(fields, map(str.strip, line.split(",")), strict=False)) for line in told.splitlines() if line]


def xid_errors() -> list[str]:
    """The driver's errors in the kernel's log, newest last; none where it may not be read."""
    lines = [line for line in _output(["dmesg"]).splitlines() if "NVRM: Xid" in line]
    return [line.partition("NVRM: ")[2] for line in lines[-5:]]


def limits() -> dict[str, int]:
    """Bytes that may be locked (-1: no limit) and are free in /dev/shm, and number of files that may be open."""
    shm = Path("/dev/shm")
    infinite = resource.RLIM_INFINITY
    locked, files = (resource.getrlimit(one)[0] for one in (resource.RLIMIT_MEMLOCK, resource.RLIMIT_NOFILE))
    return {
        "locked": -1 if locked == infinite else locked, "files": -1 if files == infinite else files,
        "shm": shutil.disk_usage(shm).free if shm.exists() else 0,
        "rdma": len(list(Path("/sys/class/infiniband").glob("*"))),
    }  # fmt: skip


def stale_locks() -> list[str]:
    """Locks of extension builds that nobody can be at any more: torch waits for them without a word."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    found = []
    for lock in root.glob("**/lock"):
        with contextlib.suppress(OSError):
            if time.time() - lock.stat().st_mtime > 600:
                found.append(str(lock))
    return found


def folder(recipe: Recipe, token: str, name: str) -> dict[str, Any]:
    """The place of the run folder: bytes free, MB/s of a write of 32 MiB, milliseconds of a small file."""
    place = existing(recipe.run_folder)
    found: dict[str, Any] = {
        "path": str(place),
        "free": shutil.disk_usage(place).free,
        "held": _size(recipe.run_folder),
    }
    mine = place / f".fullft-doctor-{token}-{name}"
    try:
        times = []
        for _ in range(5):
            started = time.perf_counter()
            _write(mine, b"seen")
            times.append(time.perf_counter() - started)
        large = mine.with_name(mine.name + ".tmp")
        started = time.perf_counter()
        try:
            _write(large, os.urandom(_BLOCK) * 32)
        finally:
            large.unlink(missing_ok=True)
        found |= {
            "small_ms": 1000 * statistics.median(times),
            "write_mbs": 32 * _BLOCK / 1e6 / (time.perf_counter() - started),
        }
    except OSError as error:
        found["error"] = str(error)
    return found


def sees(path: str, token: str, hosts: list[str], seconds: float = 10) -> list[str]:
    """Of these hosts, those whose file (`folder`) is in the folder; caches of network file systems are waited for."""
    deadline = time.monotonic() + seconds
    while True:
        names = [host for host in hosts if Path(path, f".fullft-doctor-{token}-{host}").exists()]
        if len(names) == len(hosts) or time.monotonic() > deadline:
            return names
        time.sleep(0.5)
        with contextlib.suppress(OSError):
            list(Path(path).iterdir())  # NFS then asks the server


def forget(facts: dict[str, Any], token: str) -> None:
    if place := facts.get("folder"):
        with contextlib.suppress(OSError):
            Path(place["path"], f".fullft-doctor-{token}-{facts['host']}").unlink()


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(one for one in (path, *path.absolute().parents) if one.is_dir())


def hub(recipe: Recipe) -> str:
    """Why the model can't be had on this host; empty if it can."""
    name = recipe.model.path
    if Path(name).exists():
        return ""
    from huggingface_hub import constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return ""
    if constants.HF_HUB_OFFLINE:
        return f"{name} is not in the cache, and HF_HUB_OFFLINE is set"
    return _unreachable(constants.ENDPOINT)


def wandb(recipe: Recipe) -> str:
    """Why Weights & Biases can't be sent to from this host; empty if it can, or is not to be."""
    if recipe.tracking.wandb != "online":
        return ""
    return _unreachable(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))


def _unreachable(url: str) -> str:
    name, _, port = url.split("://")[-1].split("/")[0].partition(":")
    try:
        socket.create_connection((name, int(port or (80 if url.startswith("http://") else 443))), timeout=3).close()
    except OSError as error:
        return f"{url}: {error}"
    return ""


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _first_address() -> str:
    """The one that DeepSpeed takes for the master of a hostfile: the first word of `hostname -I`."""
    return (_output(["hostname", "-I"]).split() or [socket.gethostname()])[0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _size(path: Path) -> int:
    total = 0
    for file in path.rglob("*"):
        with contextlib.suppress(OSError):
            total += file.stat().st_size if file.is_file() else 0
    return total


def _write(file: Path, content: bytes) -> None:
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _answers(token: str, name: str, config: str, overrides: list[str]) -> Iterator[dict[str, Any]]:
    """This host's facts; then, once it is told its place, what it measures."""
    facts = look(load_recipe(config, overrides) if config else None, token, name)
    try:
        yield facts
        if line := sys.stdin.readline():
            from fullft.doctor import network

            place = network.Place(**json.loads(line))
            yield network.measure(network.open_store(place), place, facts, token)
    finally:
        forget(facts, token)


def main() -> None:
    token, name, config, *overrides = sys.argv[1:]
    try:
        for answer in _answers(token, name, config, overrides):
            print(LINE + json.dumps(answer), flush=True)
    except BadInput as error:
        print(LINE + json.dumps({"problems": error.problems}), flush=True)


if __name__ == "__main__":
    main()
