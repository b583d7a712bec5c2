"""The W&B run of a training: a process of its own beside rank 0.

    python -m fullft.wandb_run RUN_DIR online|offline SECONDS GENERATION PID      started by tracking.py
    python -m fullft.wandb_run RUN_DIR send SECONDS                               by `fullft wandb`, after the run

The trainer appends to metrics.jsonl and never calls W&B, so nothing that W&B does can stop it or slow it down: init
blocks while no server answers, finish does for ever if an alert is pending, a dead wandb-core raises, and a table takes
a second. This process follows metrics.jsonl, makes the tables of an evaluation from its files, and hears through a pipe
of alerts, artifacts and the end. What it says goes through another pipe to the trainer's terminal.

W&B's history only grows, by a number of its own (`_step`), and charts are by train/global_step. The number of a row
follows from its step and the rollbacks before it alone (`row_number`), so any process gives it the same. Each is sent
once, in order: rows that are logged again after a resume are not, what is trained after a rollback is. What was sent
before is asked of whoever will hold the history: in online mode of the server; else of the offline .wandb files of
earlier starts, which `wandb sync` will read. What an online start has sent since it asked may or may not have arrived:
offline it is taken for lost, as a row that comes twice is better than one that never comes.

It ends when the trainer has said so, or is gone (killed, failed), after it has sent what is in the file, and within
SECONDS. It is in no process group of the launcher and holds none of its pipes; signals to the job are the
trainer's. Once another job owns the run folder (lease.py), it sends nothing more.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import queue
import select
import signal
import struct
import sys
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from fullft import lease
from fullft.errors import LeaseLost
from fullft.report.runlog import generations, rollback_entries
from fullft.report.wording import change
from fullft.state import read_json

END_SECONDS = 40.0  # from the end of the trainer to that of this process, whatever W&B does
_INIT_SECONDS = 20.0
ROLLBACKS = "train/rollbacks"  # in a row: those before it, if there were any
_LOOK_SECONDS = 1.0
_STARTS = 3  # of W&B, should it die
_STEP = "train/global_step"


class Trainer:
    """Rank 0: what it tells through the pipe, and whether it is still there."""

    def __init__(self, pid: int, seconds: float) -> None:
        self.events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.over = threading.Event()  # all it will ever write is in the file and in `events`
        self.summary: dict[str, Any] | None = None  # of an end in order
        self.pid, self.seconds = pid, seconds
        # Away from 0 and 1, which wandb-core inherits.
        self._inbox, self._outbox = os.dup(0), os.fdopen(os.dup(1), "w", encoding="utf-8")
        with Path(os.devnull).open() as nothing:
            os.dup2(nothing.fileno(), 0)
        os.dup2(2, 1)
        threading.Thread(target=self._listen, name="trainer", daemon=True).start()

    def say(self, text: str) -> None:
        """A line on the trainer's terminal, and in wandb/tracker.log."""
        print(time.strftime("%F %T"), text, file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):  # the trainer is gone
            print(text, file=self._outbox, flush=True)

    def _listen(self) -> None:
        os.set_blocking(self._inbox, False)
        unread, open_ = b"", True
        while open_ and self.summary is None:
            alive = os.getppid() == self.pid  # asked before reading; a forked child may keep the pipe open
            select.select([self._inbox], [], [], _LOOK_SECONDS)
            try:
                chunk = os.read(self._inbox, 1 << 16)
                open_ = bool(chunk)
            except BlockingIOError:
                chunk, open_ = b"", alive
            *lines, unread = (unread + chunk).split(b"\n")
            for event in map(json.loads, lines):
                if event["event"] == "finish":
                    self.summary = event["summary"]
                else:
                    self.events.put(event)
        self.over.set()
        if not self.pid:
            return
        time.sleep(self.seconds)
        self.say("W&B does not take the last rows in time; `fullft wandb` with the run folder sends them")
        for child in _children():
            with contextlib.suppress(OSError):
                os.kill(child, signal.SIGKILL)
        os._exit(0)


def row_number(row: dict[str, Any], rollbacks: list[dict[str, Any]]) -> int:
    """Of a row in W&B's history: its optimizer step, and as many more as the rollbacks before it went back."""
    before = rollbacks[: row.get(ROLLBACKS, 0)]
    return int(row["step"] + sum(entry["from_step"] - entry["to_step"] for entry in before))


class Rows:
    """New rows of a run with their numbers, those that rollbacks have put aside before. metrics.jsonl is whichever file
    has this name now: a rollback or a new job replaces it."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / "metrics.jsonl"
        self._file, self._at = self._path.open("rb"), 0
        self._rollbacks: list[dict[str, Any]] = []
        self._aside = [self._numbered(file.open("rb")) for file in folder.glob("metrics.rollback-*.jsonl")]

    def new(self) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from heapq.merge(*self._aside, self._numbered(self._lines()), key=itemgetter(0))
        self._aside = []
        if self._path.stat().st_ino != os.fstat(self._file.fileno()).st_ino:
            self._file.close()
            self._file, self._at = self._path.open("rb"), 0
            yield from self._numbered(self._lines())

    def _lines(self) -> Iterator[bytes]:
        self._file.seek(self._at)
        for line in self._file:
            if not line.endswith(b"\n"):  # being written
                return
            self._at += len(line)
            yield line

    def _numbered(self, lines: Iterable[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
        for row in map(json.loads, lines):
            if row.get(ROLLBACKS, 0) > len(self._rollbacks):
                self._rollbacks = rollback_entries(self._folder)
            yield row_number(row, self._rollbacks), row


def main() -> int:
    """Returns 1 if W&B has not taken everything."""
    folder, mode, seconds = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    generation, pid = map(int, sys.argv[4:] or (0, 0))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1) if pid else ():
        signal.signal(number, signal.SIG_IGN)
    trainer = Trainer(pid, seconds)
    if generation:
        lease.know(folder, generation)
    lock = FileLock(folder / "wandb" / "tracker.lock")
    # One that is still sending has ended by then; not all file systems lock.
    with contextlib.suppress(Timeout, OSError, NotImplementedError):
        lock.acquire(timeout=seconds)
    if mode == "send":
        for event in _artifacts(folder):
            trainer.events.put(event)
    for start in range(1, _STARTS + 1):
        try:
            _track(folder, mode, trainer)
            return 0
        except LeaseLost:
            _teardown()
            return 1
        except Exception as error:
            again = "it is started anew" if start < _STARTS else f"`fullft wandb {folder}` sends the rest"
            trainer.say(f"W&B stopped working, {again}; metrics.jsonl has every row ({reason(error)})")
            _teardown()
    return 1


def _artifacts(folder: Path) -> list[dict[str, Any]]:
    """As the trainer tells them, of all that is there."""
    checkpoints = sorted(file.parent for file in folder.glob("checkpoints/step-????????/MANIFEST.json"))
    found = [("checkpoint", path, int(path.name.removeprefix("step-"))) for path in checkpoints]
    last = read_json(folder / "state.json").get("step", 0)
    found += [(kind, folder / name, last) for kind, name in (("model", "export"), ("report", "report.html"))]
    return [
        {"event": "artifact", "kind": kind, "path": str(path), "metadata": {"step": step}}
        for kind, path, step in found
        if path.exists()
    ]


def _track(folder: Path, mode: str, trainer: Trainer) -> None:
    """One W&B process, from its start to the end of the trainer; raises whatever W&B raises."""
    run, last = _start(folder, mode, trainer)
    rows, defined = Rows(folder), {_STEP}
    while True:
        over = trainer.over.is_set()  # asked before reading
        for at, row in rows.new():
            if at > last:
                lease.check()
                step = row.pop("step")
                for key in row.keys() - defined:
                    run.define_metric(key, step_metric=_STEP, summary=summary_of(key))
                defined |= row.keys()
                try:
                    if tables := _tables(folder, step, row):
                        run.log(tables, step=at, commit=False)
                except Exception as error:
                    trainer.say(f"W&B gets no tables of step {step} ({reason(error)})")
                run.log(row, step=at, commit=True)
                last = at
        while not trainer.events.empty():
            _pass_on(run, trainer.events.get())
        if over:
            break
        trainer.over.wait(_LOOK_SECONDS)
    for key, value in (trainer.summary or {}).items():
        run.summary[f"final/{key}"] = value
    ended_well = read_json(folder / "state.json").get("status") in ("done", "requeue", None)
    run.finish(exit_code=0 if ended_well else 1)
    _teardown()


def _start(folder: Path, mode: str, trainer: Trainer) -> tuple[Any, int]:
    """The W&B run, and the number of the last row that it holds, -1 if none."""
    import wandb

    known = read_json(folder / "wandb_run.json")
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    tracking, environment = recipe["tracking"], read_json(folder / "env.json")
    arguments: dict[str, Any] = {
        "id": known["id"], "resume": "allow", "dir": folder,
        "project": os.environ.get("WANDB_PROJECT", tracking["project"]),
        "entity": os.environ.get("WANDB_ENTITY", tracking["entity"]),
        "name": tracking["name"] or folder.name, "tags": tracking["tags"], "job_type": "train",
        "group": tracking["group"], "notes": tracking["notes"],
        "config": recipe | {
            "git_commit": environment.get("git_commit"), "environment": environment,
            "plan": read_json(folder / "plan.json"),
        },
        "settings": wandb.Settings(
            init_timeout=_INIT_SECONDS, finish_timeout=trainer.seconds * 3 / 4, console="off", silent=True,
            x_transaction_log_flush_interval=1, x_stats_pid=trainer.pid, save_code=False,
        ),
    }  # fmt: skip
    run = None
    if mode in ("online", "send"):
        try:
            run = wandb.init(mode="online", **arguments)
        except Exception as error:
            if mode == "send":
                raise
            trainer.say(f"W&B does not answer, so this run is tracked offline ({reason(error)})")
            _teardown()
    if run is not None:
        held = run.starting_step - 1
        with contextlib.suppress(OSError):  # disk full: a row may come twice
            lease.write(folder / "wandb_run.json", json.dumps(known | {"delivered": held}))
        # What offline parts hold is now sent from metrics.jsonl: synced too, it would come twice.
        for part in folder.glob("wandb/offline-run-*"):
            part.rename(part.with_name(f"superseded-{part.name}"))
    else:
        parts = folder.glob("wandb/offline-run-*/*.wandb")
        held = max((at for part in parts for at in numbers_in(part)), default=-1)
        held = max(held, known.get("delivered", -1))
        run = wandb.init(mode="offline", **arguments)
    run.define_metric(_STEP)
    where = run.url or f"`wandb sync {run.dir.removesuffix('/files')}` uploads it"
    trainer.say(f"W&B    run {run.id}: {where}")
    return run, held


def _pass_on(run: Any, event: dict[str, Any]) -> None:
    if event["event"] == "alert":
        run.alert(title=event["title"], text=event["text"], level="ERROR")
        return
    import wandb

    path, metadata = Path(event["path"]).absolute(), event["metadata"]
    artifact = wandb.Artifact(f"{event['kind']}-{run.id}", type=event["kind"], metadata=metadata)
    try:
        if path.is_dir():  # by reference: nothing is read or uploaded, and with checksums a large one takes an hour
            artifact.add_reference(path.as_uri(), checksum=False)
        else:
            artifact.add_file(str(path), policy="mutable" if run.offline else "immutable")
    except (ValueError, OSError):  # removed meanwhile, as checkpoints are
        return
    run.log_artifact(artifact, aliases=["latest", f"step-{metadata['step']}"])


def _tables(folder: Path, step: int, row: dict[str, Any]) -> dict[str, Any]:
    """tables/retention and tables/samples of the evaluation in this row, if there is one. No names below retention/,
    where W&B would make summaries of the size of a table."""
    if "time/evaluation_seconds" not in row:
        return {}
    aside = _put_aside(folder, step, row.get(ROLLBACKS, 0))
    evaluation = read_json((aside or folder / "retention") / f"step-{step:08d}.json")
    if not evaluation:
        return {}
    import wandb

    tables = {"tables/retention": wandb.Table(list(RETENTION_COLUMNS), retention_rows(evaluation))}
    if samples := sample_rows(folder, step, aside and aside / "samples"):
        tables["tables/samples"] = wandb.Table(list(SAMPLE_COLUMNS), samples)
    return tables


def _put_aside(folder: Path, step: int, before: int) -> Path | None:
    """Where a rollback has moved the evaluation of this step, of which `before` rollbacks had been made; None if none
    has."""
    for place, entry in enumerate(rollback_entries(folder)[before:], start=before + 1):
        if step > entry["to_step"]:
            aside = folder / "retention" / f"rollback-{place}"
            return aside if entry["done"] or (aside / f"step-{step:08d}.json").exists() else None
    return None


RETENTION_COLUMNS = (
    "step", "task", "measures", "metric", "base", "score", "drop", "drop_lo", "drop_hi", "p_holm", "verdict", "gate",
)  # fmt: skip
SAMPLE_COLUMNS = (
    "step", "task", "prompt", "reference", "base answer", "tuned answer", "base correct", "tuned correct",
)  # fmt: skip


def retention_rows(evaluation: dict[str, Any]) -> list[list[Any]]:
    """A row of RETENTION_COLUMNS for each task of a retention/step-….json; the verdict is that of the report."""
    rows = []
    for name, task in evaluation["tasks"].items():
        low, high = task.get("drop_ci") or (None, None)
        numbers = [task["metric"], task["base"], task["score"], task["drop"], low, high, task.get("p_holm")]
        found = change(name, task)
        words = [found.verdict if found else "", task.get("gate") or ""]
        rows.append([evaluation["step"], name, task["measures"], *numbers, *words])
    return rows


def sample_rows(folder: Path, step: int, aside: Path | None = None) -> list[list[Any]]:
    """A row of SAMPLE_COLUMNS for each stored answer of this step, beside the base model's to the same prompt."""
    keys = ("task", "prompt", "reference", "base", "tuned", "base_correct", "tuned_correct")
    return [[step, *(pair[key] for key in keys)] for pair in generations(folder, step, aside)]


def summary_of(key: str) -> str:
    """Which values of a metric W&B shows in its table of runs: the last, and its best or worst.

    Losses and what else is better when low: least. Drops and divergence: most. Scores: most of skills, least of
    retention tasks. Speed: mean.
    """
    from fullft.retention.stats import is_higher_better  # imports SciPy

    group, name = key.split("/", 1)[0], key.rsplit("/", 1)[-1]
    if group in ("perf", "time"):
        return "last,mean"
    if name.startswith(("drop", "kl", "drift", "average_forgetting", "worst", "l2_distance", "peak", "grad_norm")):
        return "last,max"
    if name.startswith("loss") or not is_higher_better(name):
        return "last,min"
    if group in ("skill", "eval", "checkpoint", "system"):
        return "last,max"
    return "last,min" if group == "retention" else "last"


def records(file: Path) -> Iterator[Any]:
    """The records (wandb's protobuf message `Record`) of a .wandb file, up to its end or the first that a kill or crash
    has damaged: there is nothing behind it for `wandb sync` either. 7 bytes, then LevelDB log blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, body = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        checksum, length, kind = struct.unpack_from("<IHB", content, at)
        end = at + 7 + length
        if not kind or zlib.crc32(content[at + 6 : end]) != checksum:
            return
        body = content[at + 7 : end] if kind in (1, 2) else body + content[at + 7 : end]  # 1 whole, 2 first
        at = end
        if kind in (1, 4):  # 4 last part
            yield Record.FromString(body)


def numbers_in(file: Path) -> Iterator[int]:
    """Those of the rows of the history in a .wandb file."""
    for record in records(file):
        for item in record.history.item:
            if (item.key or ".".join(item.nested_key)) == "_step":
                yield int(item.value_json)


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:300]


def _children() -> list[int]:
    files = Path("/proc/self/task").glob("*/children")
    return [int(child) for file in files for child in file.read_text().split()]


def _teardown() -> None:
    import wandb

    with contextlib.suppress(Exception):  # of a wandb-core that is dead
        wandb.teardown()


if __name__ == "__main__":
    os._exit(main())
