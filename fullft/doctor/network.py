"""The links between hosts: who reaches whom, how fast, and how far their clocks are apart.

First every host connects to every other by plain TCP, which names a broken link in seconds. Only if all do, pairs of
neighbours in a ring reduce and gather, all pairs that share no host at once: three rounds for any number of hosts. A
slow host is slow in both its pairs, a slow link in one.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from fullft.doctor import host

_REACH_SECONDS = 5.0
_GROUP_SECONDS = 60.0
_ENOUGH_SECONDS = 0.2  # of one collective, to be worth the name of a measurement


@dataclass(frozen=True)
class Place:
    """Of this process among those that measure. hosts: of each rank, in the order of ranks."""

    rank: int
    hosts: list[str]
    address: str  # of rank 0
    port: int
    device: int | None = None  # GPU of this rank

    @property
    def leads(self) -> bool:
        """The first rank of its host speaks for it."""
        return self.hosts.index(self.hosts[self.rank]) == self.rank


def open_store(place: Place, seconds: float = 60) -> Store:
    """Where the ranks leave messages, kept by rank 0; torchrun keeps one already.

    Raises:
        RuntimeError, OSError: rank 0 isn't reached, or its port is in use.
    """
    keeps = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = TCPStore(
        place.address, place.port, is_master=keeps, wait_for_workers=False, timeout=timedelta(seconds=seconds)
    )
    return PrefixStore("fullft-doctor", store)


def measure(store: Store, place: Place, facts: dict[str, Any], token: str) -> dict[str, Any]:
    """All ranks together. What this rank has measured:

    reach: host → {"seconds": of a connection, "clock": seconds it is ahead of ours} or {"error"}
    sees:  the hosts whose file in the run folder this host sees
    pairs: {"hosts": [a, b], "all_reduce", "all_gather"} in Gbit/s, or {"hosts", "error"}, of pairs that begin with us
    all:   the same over all ranks
    """
    found: dict[str, Any] = {"host": place.hosts[place.rank], "reach": {}, "pairs": [], "all": None, "sees": None}
    leaders = {name: place.hosts.index(name) for name in place.hosts}
    if place.leads:
        with _Door(place) as door:
            store.set(f"door-{place.rank}", json.dumps(door.address))
            others = {name: rank for name, rank in leaders.items() if rank != place.rank}
            doors = {name: json.loads(store.get(f"door-{rank}")) for name, rank in others.items()}
            with ThreadPoolExecutor(max(1, min(64, len(doors)))) as pool:
                found["reach"] = dict(zip(doors, pool.map(_knock, doors.values()), strict=True))
            if facts.get("folder"):
                found["sees"] = host.sees(facts["folder"]["path"], token, list(leaders))
            store.set(f"reach-{place.rank}", json.dumps(found["reach"]))
            reached = [json.loads(store.get(f"reach-{rank}")) for rank in leaders.values()]
    else:
        reached = [json.loads(store.get(f"reach-{rank}")) for rank in leaders.values()]
    if len(leaders) > 1 and not any("error" in one for reach in reached for one in reach.values()):
        _collectives(store, place, list(leaders), found)
    # Rank 0 keeps the store, so it goes last.
    store.set(f"measured-{place.rank}", "")
    if place.rank == 0:
        for rank in range(len(place.hosts)):
            store.get(f"measured-{rank}")
    return found


class _Door:
    """A port of this host that tells the time to whoever connects."""

    def __init__(self, place: Place) -> None:
        self._socket = socket.create_server(("", 0), backlog=1024)
        self.address = (_own_address(place), self._socket.getsockname()[1])

    def __enter__(self) -> _Door:
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                guest, _ = self._socket.accept()
            except OSError:  # closed
                return
            with guest:
                guest.sendall(repr(time.time()).encode())


def _own_address(place: Place) -> str:
    """The address by which this host reaches rank 0, and is reached."""
    if place.rank == 0:
        return place.address
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((place.address, 1))  # sends nothing; asks the routing table only
        return str(probe.getsockname()[0])


def _knock(door: tuple[str, int]) -> dict[str, Any]:
    try:
        with socket.create_connection((door[0], door[1]), timeout=_REACH_SECONDS) as guest:
            asked = time.time()
            there = float(guest.recv(100))
            now = time.time()
    except (OSError, ValueError) as error:
        return {"error": f"{door[0]}: {error}"}
    return {"seconds": now - asked, "clock": there - (asked + now) / 2}


def _collectives(store: Store, place: Place, hosts: list[str], found: dict[str, Any]) -> None:
    timeout = timedelta(seconds=_GROUP_SECONDS)
    # A link that takes connections but no data ends a collective by an error, not by the end of the process.
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", place.device or 0)
        torch.cuda.set_device(device)
    pairs = list(pairwise(hosts)) + ([(hosts[-1], hosts[0])] if len(hosts) > 2 else [])
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", store=PrefixStore("group", store), rank=place.rank,
            world_size=len(place.hosts), timeout=timeout,
        )  # fmt: skip
        members = {pair: [rank for rank, name in enumerate(place.hosts) if name in pair] for pair in pairs}
        groups = {pair: dist.new_group(members[pair], timeout=timeout) for pair in pairs}
    except Exception as error:
        mine = [pair for pair in pairs if place.leads and pair[0] == found["host"]]
        found["pairs"] = [{"hosts": pair, "error": _first_line(error)} for pair in mine]
        return
    last = pairs[-1:] if len(pairs) % 2 and len(pairs) > 1 else []
    whole = len(pairs) - len(last)
    for round_, chosen in enumerate((pairs[:whole:2], pairs[1:whole:2], last)):
        for pair in chosen:
            if place.rank in members[pair]:
                numbers = _rates(groups[pair], len(members[pair]), device)
                if place.rank == members[pair][0]:
                    found["pairs"].append({"hosts": pair, **numbers})
        store.set(f"round-{round_}-{place.rank}", "")  # pairs of the next round must not share a link with these
        for rank in range(len(place.hosts)):
            store.get(f"round-{round_}-{rank}")
    if len(pairs) > 1:
        found["all"] = _rates(None, len(place.hosts), device)


def _rates(group: Any, ranks: int, device: torch.device) -> dict[str, Any]:
    """Bus bandwidth in Gbit/s of all-reduce and all-gather: what each rank's link carries, whatever their number.

    2 (n-1)/n bytes an element's byte for all-reduce, (n-1)/n for all-gather (NVIDIA nccl-tests, PERFORMANCE.md).
    """
    share = (ranks - 1) / ranks
    try:
        reduced = _bytes_per_second(lambda whole: dist.all_reduce(whole, group=group), ranks, group, device)
        gathered = _bytes_per_second(
            lambda whole: dist.all_gather_into_tensor(whole, whole[: whole.numel() // ranks].clone(), group=group),
            ranks, group, device,
        )  # fmt: skip
    except Exception as error:  # of the link; the other pairs go on
        return {"error": _first_line(error)}
    return {"all_reduce": 8e-9 * 2 * share * reduced, "all_gather": 8e-9 * share * gathered}


def _bytes_per_second(collective: Callable[[torch.Tensor], Any], ranks: int, group: Any, device: torch.device) -> float:
    """Of a collective over a tensor that grows until it takes long enough."""
    largest = 2**28 if device.type == "cuda" else 2**25
    size = 2**18
    seconds = torch.zeros(1, device=device)
    while True:
        whole = torch.zeros(size // 4 // ranks * ranks, device=device)
        collective(whole)
        _finish(device)
        started = time.perf_counter()
        collective(whole)
        _finish(device)
        seconds[0] = time.perf_counter() - started
        dist.all_reduce(seconds, dist.ReduceOp.MAX, group=group)  # all come to the same end
        if seconds.item() > _ENOUGH_SECONDS or size >= largest:
            return whole.numel() * 4 / seconds.item()
        size *= 4


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
