"""What the facts of all hosts mean. Each check is a function: facts and links in, findings out."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from fullft.planner import hardware

GIB = 2**30
_SLOW, _BROKEN = 0.7, 0.25  # of what is expected of a link: below them it is told, or counts as broken


@dataclass(frozen=True)
class Finding:
    """error: the run will break, or hang. warning: it may, or will be slow."""

    severity: Literal["error", "warning"]
    hosts: tuple[str, ...]
    what: str
    mend: str

    def __str__(self) -> str:
        return f"{self.severity:8}{', '.join(self.hosts)}: {self.what}\n        {self.mend}"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Examined:
    """facts: of each host that answered (host.look). links: what each rank measured (network.measure)."""

    facts: list[dict[str, Any]]
    links: list[dict[str, Any]] = field(default_factory=list)
    needs: dict[str, int] = field(default_factory=dict)  # of the planner: run_folder_bytes, checkpoint_bytes
    network_gbps: float | None = None  # expected for each GPU; None: what the planner assumes
    node_local: bool = False  # checkpoint.use_node_local_storage

    @property
    def pairs(self) -> list[dict[str, Any]]:
        return [pair for link in self.links for pair in link["pairs"]]


def findings(examined: Examined) -> list[Finding]:
    """Errors first."""
    found = [one for check in CHECKS for one in check(examined)]
    return sorted(found, key=lambda one: one.severity != "error")


def _odd(facts: list[dict[str, Any]], value: Callable[[dict[str, Any]], Any]) -> Iterator[tuple[list[str], Any, Any]]:
    """(hosts, their value, that of most) for each value that most hosts do not have; at a tie the first host's."""
    counts = Counter(value(one) for one in facts)
    if len(counts) < 2:
        return
    usual = counts.most_common(1)[0][0]
    for other in counts:
        if other != usual:
            yield [one["host"] for one in facts if value(one) == other], other, usual


def versions(examined: Examined) -> Iterator[Finding]:
    names = sorted({name for one in examined.facts for name in one["versions"]})
    for name in names:
        for hosts, own, usual in _odd(examined.facts, lambda one, name=name: one["versions"].get(name, "none")):  # type: ignore[misc]
            mend = f"install {name} {usual} there, in the environment that starts the ranks"
            yield Finding("error", tuple(hosts), f"{name} is {own}, on the others {usual}", mend)


def code(examined: Examined) -> Iterator[Finding]:
    for hosts, own, usual in _odd(examined.facts, lambda one: one["code"]["digest"]):
        places = {one["code"]["folder"] for one in examined.facts if one["host"] in hosts}
        what = f"another code of fullft than on the others ({own}, they have {usual}), in {', '.join(sorted(places))}"
        yield Finding("error", tuple(hosts), what, "check out the same commit there, or put it on a shared file system")


def data(examined: Examined) -> Iterator[Finding]:
    files = sorted({file for one in examined.facts for file in one["data"]})
    for file in files:
        held = {one["host"]: one["data"].get(file, "missing: not there") for one in examined.facts}
        lacking = tuple(name for name, digest in held.items() if digest.startswith("missing"))
        if lacking:
            why = held[lacking[0]].removeprefix("missing: ")
            yield Finding("error", lacking, f"{file}: {why}", "copy it there, or mount the file system that has it")
        there = [{"host": name, "digest": held[name]} for name in held if name not in lacking]
        for hosts, own, usual in _odd(there, lambda one: one["digest"]):
            what = f"{file} differs: {own}, on the others {usual}"
            yield Finding("error", tuple(hosts), what, "copy it again, or use a shared file system")


def gpus(examined: Examined) -> Iterator[Finding]:
    for hosts, own, usual in _odd(examined.facts, lambda one: len(one["gpus"])):
        mend = "nvidia-smi there: is one off the bus, or the driver not loaded? If so, reboot, or leave the host out"
        yield Finding("error", tuple(hosts), f"{own} GPUs, on the others {usual}", mend)
    kinds = [one for one in examined.facts if one["gpus"]]
    for hosts, own, usual in _odd(kinds, lambda one: ", ".join(sorted({gpu["name"] for gpu in one["gpus"]}))):
        mend = "all ranks wait for the slowest, and memory is that of the smallest: use hosts of one kind"
        yield Finding("warning", tuple(hosts), f"GPUs are {own}, on the others {usual}", mend)
    for hosts, own, usual in _odd(kinds, lambda one: one["gpus"][0]["driver_version"]):
        yield Finding("warning", tuple(hosts), f"driver {own}, on the others {usual}", "install the same driver")
    for one in kinds:
        for gpu in one["gpus"]:
            for severity, what, mend in _of_gpu(gpu):
                yield Finding(severity, (one["host"],), f"GPU {gpu['index']}: {what}", mend)
    for one in examined.facts:
        if one["xid"]:
            mend = "look the number up in NVIDIA's list of Xid errors; 48, 63, 74, 79, 94, 95: leave the host out"
            yield Finding("warning", (one["host"],), f"the driver has logged {one['xid'][-1]}", mend)


def _of_gpu(gpu: dict[str, str]) -> Iterator[tuple[Literal["error", "warning"], str, str]]:
    if int(_number(gpu.get("ecc.errors.uncorrected.volatile.total"))):
        yield (
            "error",
            "uncorrected memory (ECC) errors since the last reset",
            "reset it (nvidia-smi -r); if back, replace",
        )
    throttled = [name.rpartition(".")[2] for name, value in gpu.items() if "throttle" in name and value == "Active"]
    if throttled:
        yield (
            "warning",
            f"slowed down by {', '.join(throttled)} at {gpu['temperature.gpu']} °C",
            "check cooling and power",
        )
    if (used := _number(gpu.get("memory.used"))) and used > 0.05 * _number(gpu.get("memory.total")):
        yield "error", f"{used / 1024:.1f} GiB of its memory are in use", "nvidia-smi names the process; end it"
    wanted, chosen = (_number(gpu.get(f"clocks.{name}.graphics")) for name in ("default_applications", "applications"))
    if chosen < 0.9 * wanted:
        yield "warning", f"its clock was set to {chosen:g} MHz, the default is {wanted:g}", "nvidia-smi -rac"


def _number(text: str | None) -> float:
    """0 for what the card or driver does not tell."""
    try:
        return float(text or 0)
    except ValueError:
        return 0.0


def limits(examined: Examined) -> Iterator[Finding]:
    for one in examined.facts:
        found, host = one["limits"], (one["host"],)
        if found["rdma"] and found["locked"] != -1:
            mend = "`ulimit -l unlimited`: in /etc/security/limits.conf, and LimitMEMLOCK=infinity for sshd or slurmd"
            yield Finding("error", host, f"{found['locked'] // 1024} KiB may be locked; RDMA needs all memory", mend)
        if one["gpus"] and found["shm"] < GIB:
            mend = "give containers `--shm-size=16g` or `--ipc=host`; else free /dev/shm"
            yield Finding(
                "error", host, f"{found['shm'] / 2**20:.0f} MiB free in /dev/shm; NCCL and data need 1 GiB", mend
            )
        if found["files"] != -1 and found["files"] < 4096:
            severity: Literal["error", "warning"] = "error" if found["files"] < 1024 else "warning"
            yield Finding(severity, host, f"{found['files']} files may be open; ranks need more", "`ulimit -n 65536`")


def environment(examined: Examined) -> Iterator[Finding]:
    for name in sorted({name for one in examined.facts for name in one["environment"]}):
        for hosts, own, usual in _odd(examined.facts, lambda one, name=name: one["environment"].get(name)):  # type: ignore[misc]
            what = f"{name} is {own or 'not set'}, on the others {usual or 'not set'}"
            mend = f"ssh carries no environment: put {name}={own or usual} into .deepspeed_env, here or at home"
            yield Finding("warning", tuple(hosts), what, mend)


def locks(examined: Examined) -> Iterator[Finding]:
    told = set()
    for one in examined.facts:
        for lock in one["locks"]:
            if lock not in told:  # a shared home has it on every host
                told.add(lock)
                what = f"{lock} was left by a build that was killed; the next one waits for it for ever"
                yield Finding("error", (one["host"],), what, f"rm {lock}")


def folders(examined: Examined) -> Iterator[Finding]:
    with_folder = [one for one in examined.facts if one["folder"]]
    for one in with_folder:
        found, host = one["folder"], (one["host"],)
        if "error" in found:
            yield Finding(
                "error", host, f"run_dir: {found['path']} cannot be written: {found['error']}", "mend its rights"
            )
            continue
        need = examined.needs.get("run_folder_bytes", 0) - found["held"]
        if need > found["free"]:
            what = (
                f"run_dir needs {need / GIB:.1f} GiB for checkpoints and export, {found['free'] / GIB:.1f} GiB are free"
            )
            yield Finding("error", host, f"{what} in {found['path']}", "free some, or lower checkpoint.keep")
        seconds = examined.needs.get("checkpoint_bytes", 0) / len(with_folder) / found["write_mbs"] / 1e6
        if seconds > 600:
            what = f"{found['write_mbs']:.0f} MB/s to {found['path']}: a checkpoint takes {seconds / 60:.0f} minutes"
            yield Finding("warning", host, what, "use a faster file system, or save seldom (checkpoint.every_steps)")
        if found["small_ms"] > 200:
            what = f"a small file takes {found['small_ms']:.0f} ms in {found['path']}"
            yield Finding("warning", host, what, "is its server overloaded? checkpoints write a file for each rank")
    all_hosts = {link["host"] for link in examined.links}
    blind = {link["host"]: all_hosts - set(link["sees"]) for link in examined.links if link["sees"] is not None}
    unseen = {name: lacking for name, lacking in blind.items() if lacking}
    if unseen:
        counts = Counter(name for lacking in unseen.values() for name in lacking)
        # Of two shares, the smaller one is to blame: who isn't seen by most.
        apart = tuple(sorted(name for name in counts if counts[name] >= len(all_hosts) / 2)) or tuple(sorted(unseen))
        what = (
            f"run_dir is not on a file system that all hosts share ({', '.join(sorted(unseen))} see others' files not)"
        )
        mend = "choose another run_dir, or mount it there; or see checkpoint.use_node_local_storage"
        yield Finding("warning" if examined.node_local else "error", apart, what, mend)


def services(examined: Examined) -> Iterator[Finding]:
    for one in examined.facts:
        if one["hub"]:
            mend = "download the model on a machine with network (hf download), and give its folder as model.path"
            yield Finding("error", (one["host"],), f"the model cannot be had: {one['hub']}", mend)
    if examined.facts and (why := examined.facts[0]["wandb"]):  # rank 0 sends
        mend = "tracking.wandb=offline, and `fullft wandb RUN_DIR` later; training goes on without it in any case"
        yield Finding("warning", (examined.facts[0]["host"],), f"W&B is not reached: {why}", mend)


def reach(examined: Examined) -> Iterator[Finding]:
    broken = [
        (link["host"], name, one["error"])
        for link in examined.links
        for name, one in link["reach"].items()
        if "error" in one
    ]
    counts = Counter(name for here, there, _ in broken for name in {here, there})
    for here, there, error in broken:
        blamed = max((here, there), key=lambda name: counts[name])
        others = sum(count for name, count in counts.items() if name == blamed)
        whose = f"; {others} connections of {blamed} are broken" if others > 2 else ""
        mend = (
            "cable, switch, firewall between the hosts (all ports must be open), or a name in /etc/hosts that is wrong"
        )
        yield Finding("error", (here, there), f"no connection from {here} to {there} ({error}){whose}", mend)


def clocks(examined: Examined) -> Iterator[Finding]:
    """Ahead of the first host, which all are compared with."""
    for link in examined.links[:1]:
        for name, one in link["reach"].items():
            if abs(one.get("clock", 0)) > 1 + one.get("seconds", 0):
                what = f"its clock is {one['clock']:+.1f} s from that of {link['host']}"
                yield Finding("warning", (name,), what, "logs and W&B will not agree: start chronyd or ntpd there")


def bandwidth(examined: Examined) -> Iterator[Finding]:
    for pair in examined.pairs:
        if "error" in pair:
            what = f"{' and '.join(pair['hosts'])} connect, but a collective between them fails: {pair['error']}"
            mend = "NCCL_DEBUG=INFO says more; is NCCL_SOCKET_IFNAME (GLOO_SOCKET_IFNAME) right, are all ports open?"
            yield Finding("error", tuple(pair["hosts"]), what, mend)
    rates = {tuple(pair["hosts"]): pair["all_reduce"] for pair in examined.pairs if "all_reduce" in pair}
    if not rates:
        return
    # A host is as fast as its fastest pair: a slow neighbour makes only one of the two slow.
    of_host = {name: max(rate for pair, rate in rates.items() if name in pair) for pair in rates for name in pair}
    usual = statistics.median(of_host.values())
    slow = {name for name, rate in of_host.items() if rate < _SLOW * usual}
    mend = "cable, port speed (ethtool), adapter or its firmware; nccl-tests; or leave the host out"
    for name in sorted(slow):
        what = f"its network carries {of_host[name]:.3g} Gbit/s in an all-reduce, that of the others {usual:.3g}"
        yield Finding(_how_bad(of_host[name] / usual), (name,), what, mend)
    for both, rate in rates.items():
        if rate < _SLOW * usual and not slow & set(both):
            what = f"the link between them carries {rate:.3g} Gbit/s in an all-reduce, others {usual:.3g}"
            yield Finding(_how_bad(rate / usual), both, what, "the cables and switches between the two")
    ranks = min(Counter(link["host"] for link in examined.links).values())
    names = [gpu["name"] for one in examined.facts for gpu in one["gpus"][:1]]
    assumed = hardware.network_gbps(names[0]) if names else None
    if (expected := examined.network_gbps or assumed) and usual < _SLOW * expected * ranks:
        what = (
            f"all-reduce between hosts carries {usual:.3g} Gbit/s with {ranks} of the GPUs of each; "
            + ("--network-gbps says" if examined.network_gbps else "fullft plan assumes")
            + f" {expected:g} for each"
        )
        mend = "has NCCL fallen back to TCP? NCCL_DEBUG=INFO says NET/Socket then; `fullft submit --network`"
        mend += "" if examined.network_gbps else "; if it is the network's speed, plan with --network-gbps"
        bad = _how_bad(usual / expected / ranks) if examined.network_gbps else "warning"
        yield Finding(bad, tuple(of_host), what, mend)


def _how_bad(share: float) -> Literal["error", "warning"]:
    return "error" if share < _BROKEN else "warning"


CHECKS = (versions, code, data, gpus, limits, environment, locks, folders, services, reach, clocks, bandwidth)
