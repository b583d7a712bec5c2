"""Where numbers go: `metrics.jsonl` in the run folder, Weights & Biases, and a progress bar or lines. Rank 0 only.

metrics.jsonl is the record; W&B is sent the same rows. Nothing that W&B does can end a run.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fullft import lease
from fullft.recipe import Recipe


class Tracker:
    """Logs rows of one run. On ranks other than 0 every method does nothing."""

    def __init__(
        self, recipe: Recipe, is_main: bool, total_steps: int, resumed_step: int, logged_step: int | None = None
    ) -> None:
        """`logged_step`: the last step whose row is kept, the later ones come again; default: resumed_step."""
        self.is_main = is_main
        self._run: Any = None
        if not is_main:
            return
        self._file = recipe.run_folder / "metrics.jsonl"
        last_logged = _cut_back(self._file, resumed_step if logged_step is None else logged_step)
        self._unwritten: list[str] = []
        # This very file, even if another job replaces it (see lease.py).
        self._rows = self._file.open("ab", buffering=0)
        self._run, self._last_step_sent = None, -1
        try:
            self._run, self._last_step_sent = _start_wandb(recipe, last_logged)
        except Exception as error:  # nothing that W&B does may end a run
            print(f"W&B does not start, metrics.jsonl has every row ({error})", flush=True)
        self._total_steps = total_steps
        self._bar = tqdm(
            total=total_steps, initial=resumed_step, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty()
        )
        self._started, self._first_step = time.monotonic(), resumed_step

    def log(self, step: int, row: dict[str, Any], show: str) -> None:
        """Record a row of metrics of optimizer step `step`, and show a short text on the terminal.

        Raises:
            LeaseLost: another job has taken over the run folder; the row is neither recorded nor sent.
        """
        if not self.is_main:
            return
        self._unwritten.append(json.dumps({"step": step} | row) + "\n")
        try:
            lease.check()
            self._append("".join(self._unwritten).encode())
            self._unwritten.clear()
        except OSError as error:  # disk full: they wait for the next row
            if len(self._unwritten) == 1:
                text = f"metrics.jsonl cannot be written ({error}); training goes on, and its rows are kept in memory"
                self.say(f"WARNING: {text}")
                self.alert("metrics cannot be written", text)
        # W&B's history only grows: rows of steps that were already sent before a crash would be shifted to new ones.
        if self._run is not None and step > self._last_step_sent:
            self._guarded(lambda run: run.log(row, step=step, commit=True))  # else the row waits for the next step
        if self._bar.disable:
            print(f"step {step}/{self._total_steps}  {show}{self._remaining(step)}", flush=True)
        else:
            self._bar.set_postfix_str(show, refresh=False)
            self._bar.update(step - self._bar.n)
            self._bar.refresh()

    def _append(self, rows: bytes) -> None:
        """All of it or nothing."""
        size = os.fstat(self._rows.fileno()).st_size
        try:
            if self._rows.write(rows) < len(rows):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.ftruncate(self._rows.fileno(), size)
            raise

    def sync(self) -> None:
        """Have the rows on disk, and not only given to the system, when this returns; if the disk takes them."""
        if self.is_main:
            with contextlib.suppress(OSError):
                os.fsync(self._rows.fileno())

    def say(self, text: str) -> None:
        """A line for the reader, above the progress bar."""
        if self.is_main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def alert(self, title: str, text: str) -> None:
        """Have W&B tell the user, by mail or as they have set there."""
        if self._run is not None:
            self._guarded(lambda run: run.alert(title=title, text=text, level="ERROR"))

    def rewind(self, step: int) -> None:
        """The run goes on from an earlier step: later rows are dropped from metrics.jsonl. W&B keeps those it has, and
        takes new ones from the step after them."""
        if self.is_main:
            self._rows.close()
            self._unwritten.clear()
            self._last_step_sent = max(self._last_step_sent, _cut_back(self._file, step))
            self._rows = self._file.open("ab", buffering=0)
            self._started, self._first_step = time.monotonic(), step

    def finish(self, summary: dict[str, Any]) -> None:
        if self.is_main:
            self._bar.close()
        if self._run is not None:
            self._guarded(lambda run: run.summary.update(summary))
            self._guarded(lambda run: run.finish())

    def _guarded(self, action: Callable[[Any], Any]) -> None:
        try:
            action(self._run)
        except Exception as error:  # a dead wandb-core raises into the caller
            self._run = None
            self.say(f"W&B stopped working, training goes on without it; metrics.jsonl has every row ({error})")

    def _remaining(self, step: int) -> str:
        if step <= self._first_step or step >= self._total_steps:
            return ""
        seconds = (time.monotonic() - self._started) / (step - self._first_step) * (self._total_steps - step)
        minutes, seconds = divmod(int(seconds), 60)
        return f"  {minutes // 60}:{minutes % 60:02d}:{seconds:02d} left"


def _cut_back(file: Path, step: int) -> int:
    """Replace the file by one without the rows after `step`, which will be logged again; returns its last step."""
    lines = file.read_text().splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    kept = [row for row in rows if row["step"] <= step]
    lease.write(file, "".join(json.dumps(row) + "\n" for row in kept))
    return max((row["step"] for row in rows), default=-1)


def _start_wandb(recipe: Recipe, last_logged: int) -> tuple[Any, int]:
    """The W&B run, and the last step it was ever sent.

    Both are kept in wandb_run.json of the run folder, so a resumed run goes on in the same W&B run, and no step is
    sent twice however often it is killed.
    """
    mode: Any = os.environ.get("WANDB_MODE", recipe.tracking.wandb)
    if mode == "disabled":
        return None, -1
    import wandb

    if mode == "online" and not wandb.api.api_key:
        print("W&B: no API key (run `wandb login`), so this run is tracked offline", flush=True)
        mode = "offline"
    file = recipe.run_folder / "wandb_run.json"
    known: dict[str, Any] = (
        json.loads(file.read_text()) if file.exists() else {"id": secrets.token_hex(4), "last_step": -1}
    )
    known["last_step"] = max(known["last_step"], last_logged)
    lease.write(file, json.dumps(known))
    os.environ.setdefault("WANDB_SILENT", "true")
    arguments: dict[str, Any] = {
        "project": os.environ.get("WANDB_PROJECT", recipe.tracking.project),
        "name": recipe.tracking.name or recipe.run_folder.name, "id": known["id"], "resume": "allow",
        "dir": recipe.run_folder, "config": recipe.model_dump(mode="json"), "tags": recipe.tracking.tags,
    }  # fmt: skip
    settings = wandb.Settings(
        init_timeout=20, finish_timeout=60, x_transaction_log_flush_interval=1, console="off", silent=True
    )
    try:
        run = wandb.init(mode=mode, settings=settings, **arguments)
    except Exception as error:
        print(f"W&B cannot be reached, so this run is tracked offline ({error})", flush=True)
        wandb.teardown()
        run = wandb.init(mode="offline", settings=settings, **arguments)
    run.define_metric("train/global_step")
    for group in ("train/*", "perf/*", "checkpoint/*", "data/*", "eval/*", "retention/*", "skill/*"):
        run.define_metric(group, step_metric="train/global_step")
    return run, known["last_step"]
