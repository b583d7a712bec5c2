"""Which rank this process is, under any launcher, and the process group of all ranks.

`discover` reads the environment that the launcher made: `deepspeed` and `torchrun` (RANK, WORLD_SIZE, ...), `srun`
(SLURM_PROCID, ...) or `mpirun` (through mpi4py). A plain `python` is a world of one.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import ipaddress
import os
import re
import secrets
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from fullft.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED, BadInput

_LOOKS = 10  # a node may learn of a new file only seconds later (attribute caches of network file systems)
_TORCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Cluster:
    rank: int
    world_size: int
    local_rank: int
    master_addr: str
    master_port: int
    launcher: str  # deepspeed | torchrun | srun | mpirun | python
    ranks_per_node: int | None = None  # on this node; None: the launcher does not tell, or they differ

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def __str__(self) -> str:
        return (
            f"rank {self.rank} of {self.world_size} on {socket.gethostname()} (local rank {self.local_rank}), "
            f"master {self.master_addr}:{self.master_port}, started by {self.launcher}"
        )


def discover(environment: Mapping[str, str] | None = None) -> Cluster:
    """The place of this process among all ranks.

    Raises:
        BadInput: variables missing, not numbers, or contradicting each other.
    """
    env = os.environ if environment is None else environment
    if "RANK" in env or "WORLD_SIZE" in env:
        cluster = _from_torch(env)
    elif "OMPI_COMM_WORLD_SIZE" in env:  # before srun: mpirun starts its daemons by srun, and ranks inherit that step
        cluster = _from_mpi(env)
    elif "SLURM_STEP_NUM_TASKS" in env and _number(env, "PMI_SIZE", 0) <= _number(
        env, "SLURM_STEP_NUM_TASKS"
    ):  # by srun only; SLURM_PROCID and SLURM_NTASKS are there in a batch shell too
        cluster = _from_slurm(env)
    elif "PMI_SIZE" in env:
        cluster = _from_mpi(env)
    elif alone := [
        f"{name}={env[name]}" for name in ("SLURM_NTASKS", "SLURM_JOB_NUM_NODES") if _number(env, name, 1) > 1
    ]:
        raise BadInput(
            f"the Slurm job has {' and '.join(alone)}, but this process was not started by srun: put `srun` before the "
            "command"
        )
    else:
        port = _number(env, "MASTER_PORT", _free_port())
        cluster = Cluster(0, 1, 0, "127.0.0.1", port, "python", 1)
    if not 0 <= cluster.rank < cluster.world_size:
        rank, size = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS") if cluster.launcher == "srun" else ("RANK", "WORLD_SIZE")
        raise BadInput(f"{rank}={cluster.rank} and {size}={cluster.world_size}: must be 0 <= {rank} < {size}")
    return cluster


def _from_torch(env: Mapping[str, str]) -> Cluster:
    launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in env else "deepspeed"
    if missing := [name for name in _TORCH_VARIABLES if name not in env]:
        given = ", ".join(name for name in _TORCH_VARIABLES if name in env)
        raise BadInput(
            f"environment has {given} but not {', '.join(missing)}: unset them all, or start with deepspeed, torchrun, "
            "srun or mpirun"
        )
    rank, world, local = (_number(env, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    for name, size in (("mpirun", _mpi_size(env)), ("srun", _slurm_size(env))):
        # Leftover RANK/WORLD_SIZE of a shell make every process rank 0 of 1, each training alone into the same folder.
        if size is not None and size > 1 and world == 1:
            raise BadInput(f"{name} started {size} processes, but WORLD_SIZE=1 is set: unset RANK and WORLD_SIZE first")
    ranks = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID") if launcher != "torchrun" else ()
    told = next((name for name in ranks if name in env), "")  # mpirun's is nearer than that of the step it runs in
    if told and world in (_mpi_size(env), _slurm_size(env)) and rank != _number(env, told):
        raise BadInput(
            f"RANK={rank}, but {told}={env[told]}: RANK was set once for several processes, e.g. in the batch script, "
            "which runs on one node; leave it out under srun and mpirun, or set it in the command that they start"
        )
    if env.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and _number(env, "TORCHELASTIC_MAX_RESTARTS", 0):
        # pytorch issue 135712: addresses of the ranks that have died stay in the store, and the next ones meet at them.
        raise BadInput(
            "torchrun --max-restarts would start ranks again that then hang: export "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun, and start it with --rdzv-backend c10d"
        )
    per_node = next((_number(env, name) for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in env), None)
    if launcher == "deepspeed" and rank == 0 and per_node == world and _is_elsewhere(env["MASTER_ADDR"]):
        raise BadInput(
            f"all ranks were started on {socket.gethostname()}, but are to meet on {env['MASTER_ADDR']}: deepspeed "
            "runs a hostfile with one host here, whatever its name; give `deepspeed --force_multi`"
        )
    return Cluster(rank, world, local, env["MASTER_ADDR"], _number(env, "MASTER_PORT"), launcher, per_node)


def _is_elsewhere(address: str) -> bool:
    """Whether a numeric address is none of this host's: nobody can listen at it here."""
    try:
        ipaddress.ip_address(address)
    except ValueError:  # a name, which may mean this host in ways that cannot be told here
        return False
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        try:
            probe.bind((address, 0))
        except OSError as error:
            return error.errno == errno.EADDRNOTAVAIL
    return False


def _from_slurm(env: Mapping[str, str]) -> Cluster:
    rank, world, local = (_number(env, name) for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
    if not (address := env.get("MASTER_ADDR") or _first_host(nodes or "")):
        raise BadInput(
            "started by srun, but neither SLURM_STEP_NODELIST nor SLURM_JOB_NODELIST is set: set MASTER_ADDR"
        )
    # Same port on all ranks without talking: from the job and step number, outside the usual ephemeral range.
    default_port = 15000 + (_number(env, "SLURM_JOB_ID") * 7 + _number(env, "SLURM_STEP_ID")) % 15000
    # `8`, `8(x2)`: the same on all nodes; `8,4` is not.
    tasks = re.fullmatch(r"(\d+)(\(x\d+\))?", env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    per_node = int(tasks[1]) if tasks else None
    return Cluster(rank, world, local, address, _number(env, "MASTER_PORT", default_port), "srun", per_node)


def _from_mpi(env: Mapping[str, str]) -> Cluster:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise BadInput(f"started by mpirun, but mpi4py cannot load the MPI library: {error}") from None
    world = MPI.COMM_WORLD
    rank, size = world.Get_rank(), world.Get_size()
    if size != (started := _mpi_size(env)):
        raise BadInput(
            f"mpirun started {started} processes, but mpi4py sees {size}: it has loaded another MPI library than that "
            "of mpirun (python -c 'from mpi4py import MPI; print(MPI.Get_library_version())')"
        )
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    local_rank, per_node = node.Get_rank(), node.Get_size()
    hosts = world.allgather(socket.gethostname())
    address, port = world.bcast((_address_towards(hosts), _free_port()) if rank == 0 else None, root=0)
    # MPI has told all that we need. Left open, its finalisation at exit waits for ranks that have died.
    MPI.Finalize()
    return Cluster(rank, size, local_rank, address, port, "mpirun", per_node)


def _mpi_size(env: Mapping[str, str]) -> int | None:
    name = next((name for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE") if name in env), None)
    return _number(env, name) if name else None


def _slurm_size(env: Mapping[str, str]) -> int | None:
    return _number(env, "SLURM_STEP_NUM_TASKS") if "SLURM_STEP_NUM_TASKS" in env else None


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    if default is not None and name not in env:
        return default
    try:
        return int(env[name])
    except (KeyError, ValueError):
        raise BadInput(f"environment variable {name} must be a number, it is {env.get(name)!r}") from None


def _first_host(nodelist: str) -> str:
    """First host of a Slurm node list such as `gpu[007-009],login1`; what `scontrol show hostnames` prints first."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodelist)
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first.group()) if first else ""


def _address_towards(hosts: list[str]) -> str:
    """Address of this host as the first other one reaches it; its name if that cannot be told."""
    other = next((host for host in hosts if host != socket.gethostname()), None)
    if other is None:
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((other, 1))  # sends nothing; asks the routing table only
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def join(cluster: Cluster, timeout_minutes: float) -> None:
    """Form the process group of all ranks through DeepSpeed: NCCL on GPUs, gloo on CPUs."""
    import deepspeed
    import deepspeed.ops
    import torch
    from deepspeed.accelerator import get_accelerator

    device = cluster.local_rank
    if get_accelerator().device_name() == "cpu":
        # DeepSpeed would compile this op (27 s, and a killed build leaves a lock that hangs the next run) only for
        # inference_all_reduce, which training never calls.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        visible = get_accelerator().device_count()
        if visible == 1 and cluster.launcher == "srun":
            device = 0  # --gpus-per-task=1 shows each process its own GPU only
        if device >= visible:
            raise BadInput(
                f"local rank {cluster.local_rank} on {socket.gethostname()} has no GPU: {visible} visible; start at "
                f"most {visible} processes on a node"
            )
        get_accelerator().set_device(device)
    os.environ.update(
        RANK=str(cluster.rank), WORLD_SIZE=str(cluster.world_size), LOCAL_RANK=str(device),
        MASTER_ADDR=cluster.master_addr, MASTER_PORT=str(cluster.master_port),
    )  # fmt: skip
    try:
        deepspeed.init_distributed(timeout=timedelta(minutes=timeout_minutes), auto_mpi_discovery=False)
    except torch.distributed.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise BadInput(
            f"port {cluster.master_port} of {cluster.master_addr} is in use, perhaps by another run: choose another "
            "with `deepspeed --master_port`, `torchrun --master-port`, or MASTER_PORT under srun"
        ) from None
    if torch.distributed.get_world_size() != cluster.world_size:
        joined = torch.distributed.get_world_size()
        raise RuntimeError(f"process group has {joined} ranks, expected {cluster.world_size}")


def require_same_code() -> None:
    """Every rank must run the same code of fullft and the same packages. All ranks together, right after `join`.

    Raises:
        BadInput: on all ranks, with the hosts that differ.
    """
    import torch.distributed as dist

    from fullft.doctor import findings, host

    mine = {"host": socket.gethostname(), "versions": host.versions(), "code": host.code()}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    seen = findings.Examined(list({one["host"]: one for one in everyone[::-1]}.values())[::-1])
    if found := [*findings.versions(seen), *findings.code(seen)]:
        raise BadInput([f"{', '.join(one.hosts)}: {one.what}; {one.mend}" for one in found])


def leave() -> None:
    """Close the process group, if there is one."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def exit_now(code: int) -> NoReturn:
    """End this process at once: ordinary exit would wait for threads and collectives that no other rank serves."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_on_ranks(action: Callable[[Cluster], None], if_bad_input: str) -> NoReturn:
    """Run an action that joins the process group, on this rank of those that a launcher started, and exit."""
    me, code = None, EXIT_FAILED
    try:
        me = discover()
        action(me)
        leave()
        code = EXIT_DONE
    except BadInput as error:
        exit_bad_input(error, me, if_bad_input)
    except KeyboardInterrupt:
        if me is None or me.is_main:
            print("fullft: stopped; what is finished is kept", file=sys.stderr, flush=True)
    except BaseException:
        print(f"fullft: failed on {me}", file=sys.stderr)
        traceback.print_exc()
    exit_now(code)


def exit_bad_input(error: BadInput, cluster: Cluster | None, consequence: str = "training was not started") -> NoReturn:
    """Report bad input once and end with code 2. The launcher ends the other ranks when the first one has reported."""
    if cluster is None or cluster.is_main:
        print(error.report(consequence), file=sys.stderr, end="", flush=True)
    else:
        time.sleep(5)  # rank 0 meets the same error, unless it is one of this node alone
        own = f"rank {cluster.rank} on {socket.gethostname()}: {error.problems[0]}"
        print(f"fullft: {own}", file=sys.stderr, flush=True)
    exit_now(EXIT_BAD_INPUT)


def sum_over_ranks(*values: float, device: str) -> list[float]:
    """The sums of the values over all ranks, in one collective, as float64."""
    import torch
    import torch.distributed as dist

    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return [float(value) for value in total.tolist()]


def on_all(action: Callable[[], Any]) -> Any:
    """The result of an action of rank 0, on all ranks. All ranks together, also if it fails: none is left waiting.

    Raises:
        BadInput: on all ranks, if the action does.
        Exception: any other of the action on rank 0; RuntimeError, which tells of it, on the others.
    """
    import torch.distributed as dist

    answer: list[Any] = [None, [], ""]  # result, problems, another failure
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            answer[0] = action()
        except BadInput as error:
            answer[1] = error.problems
        except Exception as error:
            failure, answer[2] = error, f"rank 0 on {socket.gethostname()} failed: {type(error).__name__}: {error}"
    dist.broadcast_object_list(answer, src=0)
    if failure is not None:
        raise failure
    if answer[2]:
        raise RuntimeError(answer[2])
    if answer[1]:
        raise BadInput(answer[1])
    return answer[0]


@functools.cache  # mounts do not change
def owners(folder: Path) -> list[int]:
    """For each rank the lowest one that has the same folder: 0 for all where it is shared. All ranks together.

    The folder is made where there is none."""
    import torch.distributed as dist

    rank, word = dist.get_rank(), [secrets.token_hex(8)]
    dist.broadcast_object_list(word, src=0)
    files = [folder / f".seen-{word[0]}-{number}" for number in range(rank + 1)]
    with contextlib.suppress(OSError):  # a folder that cannot be written is that of no other rank
        folder.mkdir(parents=True, exist_ok=True)
        files[rank].touch()
    dist.barrier()
    for look in range(_LOOKS + 1):
        owner = next(number for number in range(rank + 1) if number == rank or _sees(files[number]))
        if owner == 0 or look == _LOOKS:
            break
        time.sleep(1)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, owner)
    with contextlib.suppress(OSError):
        files[rank].unlink()
    return found


def _sees(file: Path) -> bool:
    try:
        return file.exists()
    except OSError:  # a rank that left here would let the others wait
        return False


def is_shared(folder: Path) -> bool:
    """Whether every rank sees what rank 0 writes to a folder. All ranks together."""
    return not any(owners(folder))


def available_host_memory() -> int:
    """Bytes of memory that this host, and every control group (container, Slurm step) this process is in, has left."""
    return max(0, min(left for _, left in _host_memory()))


def host_memory() -> int:
    """Bytes of memory that this host and its control groups allow: the same for all ranks of a node, at any time."""
    return min(allowed for allowed, _ in _host_memory())


def _host_memory() -> list[tuple[int, int]]:
    """(bytes that are allowed, bytes that are left) of the host and of each control group with a limit."""
    page = os.sysconf("SC_PAGE_SIZE")
    limits = [(os.sysconf("SC_PHYS_PAGES") * page, os.sysconf("SC_AVPHYS_PAGES") * page)]
    try:
        information = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        limits = [(limits[0][0], int(information["MemAvailable"].split()[0]) * 1024)]
        groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except (OSError, ValueError, KeyError):  # not Linux
        return limits
    for _, controllers, path in groups:
        if controllers == "memory":  # version 1
            root, names = Path("/sys/fs/cgroup/memory"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
        elif not controllers:  # version 2
            root, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.current")
        else:
            continue
        inner = root / path.lstrip("/")
        for group in (inner, *inner.parents[: len(inner.parts) - len(root.parts)]):
            try:
                limit, used = (int((group / name).read_text()) for name in names)
                statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # not there, or "max": no limit
                continue
            cache = int(statistics.get("total_inactive_file", statistics.get("inactive_file", 0)))  # given up at need
            limits.append((limit, limit - used + cache))
    return limits


def host_report() -> dict[str, str]:
    """Versions and hardware of this host, for env.json."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    report = {}
    for name in ("torch", "deepspeed", "transformers", "datasets", "wandb", "mpi4py"):
        try:
            report[name] = version(name)
        except PackageNotFoundError:  # wandb or mpi4py, which not every run needs
            report[name] = "not installed"
    report |= {"python": platform.python_version(), "host": socket.gethostname(), "cpu_count": str(os.cpu_count())}
    report["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
        report["git_commit"] = git.stdout.strip() or "unknown"
    except OSError:  # slim images have no git
        report["git_commit"] = "unknown"
    return report
