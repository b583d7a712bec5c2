"""How far a long piece of work is, for a person at a terminal and for a log."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


@contextmanager
def progress(
    total: int, title: str, unit: str = "B", seconds: float = 60, shown: bool = True
) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal; else a line each so many seconds. What it gives is told how many are done, by any thread."""
    started = said = time.monotonic()
    done = 0
    terminal = sys.stderr.isatty()
    one_at_a_time = threading.Lock()
    look: dict[str, Any] = {"unit": unit, "unit_scale": unit == "B", "leave": unit == "B", "dynamic_ncols": True}
    with tqdm(total=total, desc=title, disable=not (terminal and shown), **look) as bar:

        def advance(count: int) -> None:
            nonlocal done, said
            with one_at_a_time:
                done += count
                bar.update(count)
                if shown and not terminal and time.monotonic() - said > seconds:
                    said = time.monotonic()
                    left = (said - started) * (total - done) / max(done, 1)
                    print(
                        f"{title}: {done / max(total, 1):.0%} after {said - started:.0f} s, about {left:.0f} s left",
                        flush=True,
                    )

        yield advance
