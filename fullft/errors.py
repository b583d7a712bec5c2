"""The ways a run ends early on purpose; launch/train.py makes exit codes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_GATE = 75
EXIT_REQUEUE = 85


class BadInput(Exception):
    """What the user gave is wrong, found before training starts (exit code 2). Holds every problem found."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type[BadInput], tuple[list[str]]]:
        """From a worker process too it comes with its list."""
        return type(self), (self.problems,)

    def report(self, consequence: str = "training was not started") -> str:
        """All problems, one a line, under a count."""
        count = len(self.problems)
        return f"fullft: {count} problem{'s' if count > 1 else ''}, {consequence}:\n" + "".join(
            f"  - {problem}\n" for problem in self.problems
        )


class Problems(list[str]):
    """What is wrong, collected so that it is told all at once."""

    def attempt(self, action: Callable[..., T], *arguments: Any) -> T | None:
        """What the action returns, or None and its problems are here."""
        try:
            return action(*arguments)
        except BadInput as error:
            self.extend(error.problems)
            return None


class TrainingStopped(Exception):
    """Training cannot go on (exit code 1), e.g. the loss is not finite. Raised on all ranks at the same step."""


class RetentionStopped(Exception):
    """The gate of retention has stopped training (exit code 75). Raised on all ranks together; all of it is saved."""


class Preempted(Exception):
    """A signal asked for the end (exit code 85). Raised on all ranks together; what was to be saved is saved."""


class LeaseLost(TrainingStopped):
    """Another job has taken over the run folder. Raised on the rank that meets it: the launcher ends the others."""
