"""Faults that tests bring into real starts of real launchers."""

from __future__ import annotations

from pathlib import Path

# Python runs it at each start, as it is in PYTHONPATH.
PROGRAM = """
import signal

def fail(*_):
    raise RuntimeError("a fault of the test")

signal.signal(signal.SIGUSR2, fail)
"""


def by_sigusr2(folder: Path) -> str:
    """A folder to have first in PYTHONPATH: whatever a rank does, it raises an error there when SIGUSR2 comes."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(PROGRAM)
    return str(folder)
