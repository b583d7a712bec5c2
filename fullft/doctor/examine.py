"""Where `fullft doctor` looks: on this host, over a hostfile by ssh, or on every rank that a launcher has started."""

from __future__ import annotations

import json
import os
import re
import secrets
import select
import shlex
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

from fullft import cluster
from fullft.doctor import host
from fullft.doctor.findings import Examined, Finding, findings
from fullft.errors import EXIT_DONE, EXIT_FAILED, BadInput
from fullft.recipe import Recipe, load_recipe

_ANSWER_SECONDS = 120.0  # torch is imported from a file system that may be slow
_MEASURE_SECONDS = 300.0
# What DeepSpeed hands on to other hosts (deepspeed/launcher/runner.py: EXPORT_ENVS, and NCCL by the accelerator).
_SENT = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")


def doctor(
    me: cluster.Cluster,
    config: str | None,
    overrides: list[str],
    hostfile: Path | None,
    network_gbps: float | None,
    as_json: bool,
) -> int:
    """Examine, print, and return the exit code: 1 if something found will break the run.

    Raises:
        BadInput: the recipe or the hostfile can't be read.
    """
    recipe = load_recipe(config, overrides) if config else None
    if me.world_size > 1 and hostfile is None:
        return _on_ranks(me, recipe, network_gbps, as_json)
    needs = _needs(recipe) if recipe else {}
    if hostfile is not None:
        facts, links, found = _over_ssh(read_hostfile(hostfile), config, overrides)
    else:
        token = secrets.token_hex(8)
        facts, links, found = [host.look(recipe, token, socket.gethostname())], [], []
        host.forget(facts[0], token)
    return _tell(Examined(facts, links, needs, network_gbps, _node_local(recipe)), found, as_json)


def _needs(recipe: Recipe) -> dict[str, int]:
    """Bytes that the run will write, by the planner."""
    import torch

    from fullft import model
    from fullft.planner.memory import disk
    from fullft.planner.setting import setting_of

    bf16, ranks = model.precision(recipe) == torch.bfloat16, recipe.train.sequence_parallel
    # Of any world size that the recipe can have: disk is the same on all.
    planned = disk(setting_of(recipe, model.on_meta(recipe.model), ranks, ranks, bf16=bf16))
    return {name: planned[name] for name in ("run_folder_bytes", "checkpoint_bytes")}


def _node_local(recipe: Recipe | None) -> bool:
    return recipe is not None and recipe.checkpoint.use_node_local_storage


def _tell(examined: Examined, found: list[Finding], as_json: bool) -> int:
    found = found + findings(examined)
    errors = sum(one.severity == "error" for one in found)
    if as_json:
        told = {"findings": [one.as_json() for one in found], "hosts": examined.facts, "links": examined.links}
        print(json.dumps(told | {"needs": examined.needs}, indent=1), flush=True)
    else:
        for one in examined.facts:
            print(_line_of(one))
        for pair in examined.pairs:
            if "all_reduce" in pair:
                print(f"{'-'.join(pair['hosts']):16}{_rates(pair)}")
        if examined.links and (rates := examined.links[0]["all"]) and "all_reduce" in rates:
            print(f"{'all hosts':16}{_rates(rates)}")
        for finding in found:
            print(finding)
        count = f"{errors} error{'s' * (errors != 1)}, {len(found) - errors} warnings"
        print(
            f"{count}: the run would break" if errors else f"{count}: nothing found that would break a run", flush=True
        )
    return EXIT_FAILED if errors else EXIT_DONE


def _line_of(facts: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {value}" for name, value in facts["versions"].items() if value != "none")
    kinds = {gpu["name"] for gpu in facts["gpus"]}
    gpus = f"{len(facts['gpus'])} x {', '.join(sorted(kinds))}" if kinds else "no GPU"
    place = facts["folder"] or {}
    disk = (
        f"; {place['path']} {place['write_mbs']:.0f} MB/s, {place['free'] / 2**30:.0f} GiB free"
        if "free" in place and "write_mbs" in place
        else ""
    )
    return f"{facts['host']:16}{gpus}; {packages}; code {facts['code']['digest']}{disk}"


def _rates(pair: dict[str, Any]) -> str:
    return f"all-reduce {pair['all_reduce']:.3g} Gbit/s, all-gather {pair['all_gather']:.3g} Gbit/s"


# Over a hostfile


def read_hostfile(file: Path) -> list[str]:
    """The hosts, as DeepSpeed reads them: `name slots=N` a line, # begins a comment.

    Raises:
        BadInput: it can't be read, a line is something else, or a host stands there twice.
    """
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--hostfile: {file} cannot be read: {error}") from None
    hosts, problems = list[str](), list[str]()
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        match = re.match(r"(\S+)\s+slots=(\d+)", line)
        if not match or int(match[2]) < 1:
            problems.append(f"--hostfile: {file}:{number}: {line!r} is not `NAME slots=GPUS`")
        elif match[1] in hosts:
            problems.append(f"--hostfile: {file}:{number}: {match[1]} stands there twice; give it all its slots once")
        else:
            hosts.append(match[1])
    if not hosts and not problems:
        problems.append(f"--hostfile: {file} names no host; a line is `NAME slots=GPUS`")
    if problems:
        raise BadInput(problems)
    return hosts


def deepspeed_environment() -> dict[str, str]:
    """The variables that DeepSpeed sets on the other hosts: some of ours, and those of .deepspeed_env."""
    sent = {name: value for name, value in os.environ.items() if name.startswith(_SENT)}
    sent["PYTHONPATH"] = ":".join(filter(None, (str(Path.cwd()), os.environ.get("PYTHONPATH"))))
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    for file in (Path.home() / name, Path(name)):
        if file.is_file():
            for line in filter(None, map(str.strip, file.read_text().splitlines())):
                key, equals, value = line.partition("=")
                if not equals:
                    raise BadInput(f"{file}: {line!r} is not NAME=VALUE; DeepSpeed can't read it")
                sent[key] = value
    return sent


@dataclass
class _Remote:
    """A host with its process there, or why there is none."""

    name: str
    process: subprocess.Popen[bytes]
    facts: dict[str, Any] | None = None
    problem: Finding | None = None


def _over_ssh(
    names: list[str], config: str | None, overrides: list[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[Finding]]:
    found = list(_of_launcher(names))
    token = secrets.token_hex(8)
    settings = [f"{name}={value}" for name, value in deepspeed_environment().items()]
    words = ["env", *settings, sys.executable, "-m", "fullft.doctor.host", token]

    def command(name: str) -> str:
        return f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join([*words, name, config or '', *overrides])}"

    with ThreadPoolExecutor(len(names)) as pool:
        remotes = list(pool.map(lambda name: _ask(name, command(name)), names))
        try:
            reached = [one for one in remotes if one.facts is not None]
            found += [one.problem for one in remotes if one.problem]
            facts = [one.facts for one in reached if one.facts is not None]
            links: list[dict[str, Any]] = []
            if len(reached) > 1:
                master, hosts = facts[0], [one.name for one in reached]
                places = [
                    {"rank": rank, "hosts": hosts, "address": master["address"], "port": master["free_port"]}
                    for rank in range(len(hosts))
                ]
                answers = list(pool.map(_measure, reached, places))
                links = [one for one in answers if not isinstance(one, Finding)]
                found += [one for one in answers if isinstance(one, Finding)]
        finally:
            for one in remotes:
                one.process.kill()
                one.process.wait()
    for one in reached[:1]:
        if not facts[0]["port_free"]:
            mend = "is another run there? `deepspeed --master_port` takes another"
            found.append(Finding("error", (one.name,), f"port {host.DEEPSPEED_PORT}, DeepSpeed's own, is in use", mend))
    return facts, links, found


def _of_launcher(names: list[str]) -> list[Finding]:
    found, here = [], socket.gethostname()
    if shutil.which("pdsh") is None:
        found.append(Finding("error", (here,), "there is no pdsh, by which deepspeed starts hosts", "install pdsh"))
    if len(names) == 1 and names[0] not in (here, "localhost"):
        what = f"the hostfile has one host, {names[0]}: deepspeed would start the ranks here, and not there"
        found.append(Finding("error", (here,), what, "give `deepspeed --force_multi`"))
    return found


def _ask(name: str, command: str) -> _Remote:
    """Start our process on a host and wait for its facts."""
    ssh = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", name, command]
    process = subprocess.Popen(ssh, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
    remote = _Remote(name, process)
    answer, said = _answer(process, _ANSWER_SECONDS)
    if answer is None and process.poll() == 255:
        mend = f"`ssh -o BatchMode=yes {name} true` must work from here: is it up, is its key known, may you log in?"
        remote.problem = Finding("error", (name,), f"ssh does not reach it: {said}", mend)
    elif answer is None:
        mend = f"the same Python ({sys.executable}), code and working folder must be there, shared or copied"
        remote.problem = Finding("error", (name,), f"fullft does not start there: {said}", mend)
    elif "problems" in answer:
        mend = "the recipe and its data must be readable on every host"
        remote.problem = Finding("error", (name,), "; ".join(answer["problems"]), mend)
    else:
        remote.facts = answer
    return remote


def _measure(remote: _Remote, place: dict[str, Any]) -> dict[str, Any] | Finding:
    assert remote.process.stdin
    try:
        remote.process.stdin.write(json.dumps(place).encode() + b"\n")
        remote.process.stdin.flush()
    except BrokenPipeError:
        pass  # it has ended, and says why
    answer, said = _answer(remote.process, _MEASURE_SECONDS)
    if answer is None:
        mend = "is the first host reached from there, by the address that `hostname -I` gives first there?"
        return Finding("error", (remote.name,), f"its network could not be measured: {said}", mend)
    return answer


def _answer(process: subprocess.Popen[bytes], seconds: float) -> tuple[dict[str, Any] | None, str]:
    """The next JSON that the process prints, or None and what it said last."""
    assert process.stdout
    assert process.stderr
    deadline = time.monotonic() + seconds
    line = _line(process.stdout, deadline)
    while line and not line.startswith(host.LINE):
        line = _line(process.stdout, deadline)
    if line:
        return json.loads(line.removeprefix(host.LINE)), ""
    if line is None:
        return None, f"no answer within {seconds:g} s"
    process.wait(30)
    said = process.stderr.read().decode(errors="replace").strip()
    return None, said.splitlines()[-1] if said else f"exit code {process.returncode}"


def _line(stream: IO[bytes], deadline: float) -> str | None:
    """The next line; empty at the end, None at the deadline. The process writes whole lines."""
    if not select.select([stream], [], [], max(0.0, deadline - time.monotonic()))[0]:
        return None
    return stream.readline().decode(errors="replace")


# On ranks


def _on_ranks(me: cluster.Cluster, recipe: Recipe | None, network_gbps: float | None, as_json: bool) -> int:
    """The same on every rank that a launcher has started; rank 0 prints, and all return its exit code."""
    from fullft.doctor import network

    name = socket.gethostname()
    place = network.Place(me.rank, [name], me.master_addr, me.master_port, me.local_rank)
    try:
        store = network.open_store(place)
    except (RuntimeError, OSError) as error:
        raise BadInput(f"{name} does not reach the first rank at {me.master_addr}:{me.master_port}: {error}") from None
    ranks = range(me.world_size)
    if me.is_main:
        store.set("token", secrets.token_hex(8))
    store.set(f"host-{me.rank}", name)
    hosts = [_name_of(store, rank) for rank in ranks]
    if missing := [str(rank) for rank in ranks if hosts[rank] is None]:
        came = ", ".join(sorted({one for one in hosts if one}))
        raise BadInput(f"ranks {', '.join(missing)} have not come within {_ANSWER_SECONDS:g} s; those of {came} have")
    place = replace(place, hosts=[one for one in hosts if one])
    token, facts = store.get("token").decode(), {}
    try:
        if place.leads:  # before anyone measures, so that a disk or network test isn't disturbed by the other
            facts = host.look(recipe, token, name)
        store.set(f"facts-{me.rank}", json.dumps(facts))
        everyone = [json.loads(store.get(f"facts-{rank}")) for rank in ranks]
        links = network.measure(store, place, facts, token)
    finally:
        if facts:
            host.forget(facts, token)
    store.set(f"links-{me.rank}", json.dumps(links))
    if me.is_main:
        measured = [json.loads(store.get(f"links-{rank}")) for rank in ranks]
        needs = _needs(recipe) if recipe else {}
        examined = Examined([one for one in everyone if one], measured, needs, network_gbps, _node_local(recipe))
        code = _tell(examined, [], as_json)
        store.set("code", str(code))
        for rank in ranks[1:]:
            store.get(f"heard-{rank}")
        return code
    code = int(store.get("code"))
    store.set(f"heard-{me.rank}", "")
    return code


def _name_of(store: Any, rank: int) -> str | None:
    """The host of a rank; None if it has not come after a while."""
    key = f"host-{rank}"
    try:
        store.wait([key], timedelta(seconds=_ANSWER_SECONDS))
    except RuntimeError:
        return None
    return str(store.get(key).decode())
