"""Where numbers go: `metrics.jsonl` in the run folder, Weights & Biases, and a progress bar or lines. Rank 0 only.

metrics.jsonl is the record. W&B is sent the same rows by a process of its own, wandb_run.py, which follows that file;
here nothing calls W&B or waits for it, but for some seconds at the end.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fullft import lease
from fullft.recipe import Recipe
from fullft.report.runlog import rollback_entries
from fullft.system import SystemMetrics
from fullft.wandb_run import END_SECONDS, ROLLBACKS

_LONGEST_EVENT = 4096  # bytes that a pipe takes as a whole or not at all (PIPE_BUF)


class Tracker:
    """Logs rows of one run. On ranks other than 0 every method does nothing."""

    def __init__(
        self, recipe: Recipe, is_main: bool, total_steps: int, resumed_step: int, logged_step: int | None = None
    ) -> None:
        """`logged_step`: the last step whose row is kept, the later ones come again; default: resumed_step."""
        self.is_main = is_main
        self._wandb: subprocess.Popen[bytes] | None = None
        if not is_main:
            return
        self._file = recipe.run_folder / "metrics.jsonl"
        self._unwritten: list[str] = []
        self._open(resumed_step if logged_step is None else logged_step)
        self._system = SystemMetrics()
        self._said = b""
        self._wandb = _start_wandb(recipe)
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
        self._relay()
        self._unwritten.append(json.dumps({"step": step} | row | self._rollbacks | self._system.latest) + "\n")
        try:
            lease.check()
            self._append("".join(self._unwritten).encode())
            self._unwritten.clear()
        except OSError as error:  # disk full: they wait for the next row
            if len(self._unwritten) == 1:
                text = f"metrics.jsonl cannot be written ({error}); training goes on, and its rows are kept in memory"
                self.say(f"WARNING: {text}")
                self.alert("metrics cannot be written", text)
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
        self._tell({"event": "alert", "title": title, "text": text})

    def artifact(self, kind: str, path: Path, metadata: dict[str, Any]) -> None:
        """Have W&B list a folder (by reference: it stays where it is) or keep a file, as an artifact of this kind.
        `metadata` has the step."""
        self._tell({"event": "artifact", "kind": kind, "path": str(path.absolute()), "metadata": metadata})

    def rewind(self, step: int) -> None:
        """The run goes on from an earlier step, after a rollback that rollbacks.json has: later rows are dropped from
        metrics.jsonl. W&B keeps those it has, and takes the new ones after them."""
        if self.is_main:
            self._rows.close()
            self._unwritten.clear()
            self._open(step)
            self._started, self._first_step = time.monotonic(), step

    def finish(self, summary: dict[str, Any]) -> None:
        """The end of the run. Waits till W&B has everything, and no longer than END_SECONDS: its process ends then."""
        if not self.is_main:
            return
        self._bar.close()
        self._system.stop()
        if (process := self._wandb) is None:
            return
        self._tell({"event": "finish", "summary": summary})
        if process.stdin:
            process.stdin.close()
        deadline = time.monotonic() + END_SECONDS + 5
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        self._relay()
        self._wandb = None

    def _open(self, step: int) -> None:
        """Go on behind the row of this step."""
        _cut_back(self._file, step)
        before = len(rollback_entries(self._file.parent))
        self._rollbacks = {ROLLBACKS: before} if before else {}
        # This very file, even if another job replaces it (see lease.py).
        self._rows = self._file.open("ab", buffering=0)

    def _tell(self, event: dict[str, Any]) -> None:
        """Send to the process of W&B, without ever waiting; any thread."""
        if self._wandb is None or self._wandb.stdin is None:
            return
        line = json.dumps(event, ensure_ascii=False).encode()
        if len(line) >= _LONGEST_EVENT and "text" in event:
            line = json.dumps(event | {"text": event["text"][:500]}, ensure_ascii=False).encode()
        with contextlib.suppress(OSError):  # full: W&B has long not read; broken: it has ended, and `_relay` tells
            os.write(self._wandb.stdin.fileno(), line + b"\n")

    def _relay(self) -> None:
        """Show what the process of W&B has to say."""
        if self._wandb is None or self._wandb.stdout is None:
            return
        with contextlib.suppress(BlockingIOError):
            self._said += os.read(self._wandb.stdout.fileno(), 1 << 16)
        *lines, self._said = self._said.split(b"\n")
        for line in lines:
            self.say(line.decode(errors="replace"))
        if (code := self._wandb.poll()) not in (None, 0):
            self._wandb = None
            self.say(f"W&B's process ended ({code}), see wandb/tracker.log; `fullft wandb` sends what is missing")

    def _remaining(self, step: int) -> str:
        if step <= self._first_step or step >= self._total_steps:
            return ""
        seconds = (time.monotonic() - self._started) / (step - self._first_step) * (self._total_steps - step)
        minutes, seconds = divmod(int(seconds), 60)
        return f"  {minutes // 60}:{minutes % 60:02d}:{seconds:02d} left"


def _cut_back(file: Path, step: int) -> None:
    """Replace the file by one without the rows after `step`, which will be logged again."""
    lines = file.read_text().splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    kept = [row for row in rows if row["step"] <= step]
    lease.write(file, "".join(json.dumps(row) + "\n" for row in kept))


def _start_wandb(recipe: Recipe) -> subprocess.Popen[bytes] | None:
    """The process that owns the W&B run; its id is in wandb_run.json, so a resumed run goes on in the same one."""
    mode = os.environ.get("WANDB_MODE", recipe.tracking.wandb)
    if mode == "disabled":
        return None
    folder = recipe.run_folder
    if not (folder / "wandb_run.json").exists():
        lease.write(folder / "wandb_run.json", json.dumps({"id": secrets.token_hex(4)}))
    code = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (code, os.environ.get("PYTHONPATH"))))}
    command = [sys.executable, "-m", "fullft.wandb_run", str(folder.absolute()), mode]
    try:
        (folder / "wandb").mkdir(exist_ok=True)
        with (folder / "wandb" / "tracker.log").open("ab") as log:
            process = subprocess.Popen(
                [*command, str(END_SECONDS), str(lease.generation()), str(os.getpid())],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment,
                start_new_session=True, bufsize=0,
            )  # fmt: skip
    except OSError as error:
        print(f"W&B does not start, metrics.jsonl has every row ({error})", flush=True)
        return None
    assert process.stdin
    assert process.stdout
    os.set_blocking(process.stdin.fileno(), False)
    os.set_blocking(process.stdout.fileno(), False)
    return process
