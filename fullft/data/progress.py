"""How far a long piece of work is, for a person at a terminal and for a log."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def progress(total: int, title: str) -> Iterator[Callable[[int], None]]:
    """A bar of bytes on a terminal; else a line each minute. What it gives is told how many are done, by any thread."""
    started = said = time.monotonic()
    done = 0
    terminal = sys.stderr.isatty()
    one_at_a_time = threading.Lock()
    with tqdm(total=total, desc=title, unit="B", unit_scale=True, disable=not terminal, dynamic_ncols=True) as bar:

        def advance(count: int) -> None:
            nonlocal done, said
            with one_at_a_time:
                done += count
                bar.update(count)
                if not terminal and time.monotonic() - said > 60:
                    said = time.monotonic()
                    print(f"{title}: {done / max(total, 1):.0%} after {said - started:.0f} s", flush=True)

        yield advance
