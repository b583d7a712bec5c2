"""How often each data set is seen: weights, fractions and caps of a recipe → which set comes at which position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy
from numpy.typing import NDArray

from fullft.errors import BadInput
from fullft.recipe import TrainingSource

_FINEST = 1 << 24  # denominator of shares too large to multiply with positions
_ROUNDING = 1e-6  # of a sequence, what floating point may add up to


@dataclass(frozen=True)
class Mixture:
    """The endless stream of sequences of all sets. Set s has `rates[s]` of each `sum(rates)` positions, evenly spread.

    `counts[s]`: sequences of set s; `epoch`: sequences of one epoch; `total`: of the run, before it is rounded up to
    whole steps.
    """

    rates: tuple[int, ...]
    counts: tuple[int, ...]
    epoch: float
    total: int

    def at(self, first: int, number: int) -> tuple[NDArray[numpy.int64], NDArray[numpy.int64]]:
        """(set, how many of that set came before) of the positions `first` … `first + number - 1`; O(sets) for each.

        The k-th of n positions is of a set with share r when ⌊(k+1)·r⌋ > ⌊k·r⌋ (Bresenham's line); the positions that
        are not its are shared among the other sets in the same way. Roundings add up to a few positions in the
        middle of an epoch; at its end every set has had its share exactly.
        """
        place = numpy.arange(number)
        at = numpy.arange(first, first + number, dtype=numpy.int64)
        which, before = numpy.empty(number, numpy.int64), numpy.empty(number, numpy.int64)
        rest = sum(self.rates)
        for number_of_set, rate in enumerate(self.rates):
            taken = at * rate // rest
            chosen = (at + 1) * rate // rest > taken
            which[place[chosen]], before[place[chosen]] = number_of_set, taken[chosen]
            place, at, rest = place[~chosen], (at - taken)[~chosen], rest - rate
        return which, before

    def seen(self, position: int) -> list[float]:
        """Epochs of each set after that many positions."""
        seen, at, rest = [], position, sum(self.rates)
        for rate, count in zip(self.rates, self.counts, strict=True):
            taken = at * rate // rest if rest else 0
            seen.append(taken / count)
            at, rest = at - taken, rest - rate
        return seen


def mix(
    sources: Sequence[TrainingSource],
    names: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    epochs: float,
    positions: int | None,
) -> Mixture:
    """The mixture that the sources ask for.

    Sets without fraction are seen `weight` times an epoch; sets with one make up that share of all tokens, whatever
    their size. `max_epochs` caps a set, at whole sequences; in a run of given length its share goes to the others.

    Args:
        sizes: (sequences, tokens) of each set.
        epochs: length of the run, if `positions` (sequences of the whole run) is None.

    Raises:
        BadInput: the caps leave too little for a run of that length, or nothing at all.
    """
    counts = [count for count, _ in sizes]
    of_epoch = _sequences_of_epoch(sources, sizes)
    caps = [math.floor(Fraction(str(source.max_epochs)) * count) if source.max_epochs else math.inf
            for source, count in zip(sources, counts, strict=True)]  # fmt: skip
    if positions is None:
        wanted = [min(epochs * one, cap) for one, cap in zip(of_epoch, caps, strict=True)]
    elif sum(caps) < positions:
        limits = ", ".join(f"{name} {source.max_epochs:g}" for name, source in zip(names, sources, strict=True)
                           if source.max_epochs)  # fmt: skip
        raise BadInput(
            f"train.steps: the run needs {positions:,} sequences, with max_epochs ({limits}) the data give "
            f"{math.floor(sum(caps)):,}; raise max_epochs, or make fewer steps"
        )
    else:
        wanted = _filled(of_epoch, caps, positions)
    total = math.ceil(sum(wanted) - _ROUNDING) if positions is None else positions
    if not total:
        raise BadInput(f"data.train: max_epochs leaves not one whole sequence ({', '.join(names)}); raise it")
    capped = any(one < epochs * whole * (1 - 1e-9) for one, whole in zip(wanted, of_epoch, strict=True))
    exact = positions is None and not capped and not any(source.fraction for source in sources)
    uncapped_run = positions is not None and all(math.isinf(cap) for cap in caps)
    if exact or (uncapped_run and not any(source.fraction for source in sources)):
        shares = [Fraction(str(source.weight or 1)) * count for source, count in zip(sources, counts, strict=True)]
    else:
        shares = [Fraction(one) for one in _apportioned(wanted, total)]
    return Mixture(tuple(_whole(shares)), tuple(counts), sum(of_epoch), total)


def replay_label_weight(rates: Sequence[int], labels: Sequence[float], first_replay: int, share: float) -> float:
    """What a label of a replay set counts, one of the others counting 1, for replay to have this share of the loss.

    With T labels of the others and R of replay in the run, α·R / (T + α·R) = share.

    Args:
        rates: of each set, sequences of it in the run, up to a common factor.
        labels: of each set, labels of one of its sequences, on average.
        first_replay: the sets from this one on are replay.
        share: below 1.
    """
    of_run = [rate * count for rate, count in zip(rates, labels, strict=True)]
    others, replay = sum(of_run[:first_replay]), sum(of_run[first_replay:])
    return share / (1 - share) * others / replay if replay else 1.0


def labels_of_step(rates: Sequence[int], labels: Sequence[float], first_replay: int, global_batch_size: int) -> float:
    """Labels of the replay sets in a step, on average over the run; arguments as of `replay_label_weight`."""
    replay = sum(rate * count for rate, count in zip(rates[first_replay:], labels[first_replay:], strict=True))
    return global_batch_size * replay / sum(rates)


def _apportioned(wanted: Sequence[float], total: int) -> list[int]:
    """Whole numbers that sum to `total`, by largest remainder: none is above the next whole number, or below the last.

    So a set that is wanted a whole number of times is seen just so often, and one below its cap stays below it.
    """
    counts = [math.floor(one + _ROUNDING) for one in wanted]
    by_remainder = sorted(range(len(wanted)), key=lambda at: counts[at] - wanted[at])
    for at in by_remainder[: total - sum(counts)]:
        counts[at] += 1
    return counts


def _sequences_of_epoch(sources: Sequence[TrainingSource], sizes: Sequence[tuple[int, int]]) -> list[float]:
    weighted = sum((source.weight or 1) * tokens
                   for source, (_, tokens) in zip(sources, sizes, strict=True) if not source.fraction)  # fmt: skip
    share = sum(source.fraction or 0 for source in sources)
    # With a fraction for every set, an epoch has as many tokens as the sets have.
    all_tokens = weighted / (1 - share) if weighted else sum(tokens for _, tokens in sizes)
    return [
        source.fraction * all_tokens * count / tokens if source.fraction else (source.weight or 1) * count
        for source, (count, tokens) in zip(sources, sizes, strict=True)
    ]


def _filled(of_epoch: Sequence[float], caps: Sequence[float], positions: int) -> list[float]:
    """Sequences of each set in a run of `positions`: in proportion, but where a cap binds."""
    bound: set[int] = set()
    while True:
        free = [at for at in range(len(caps)) if at not in bound]
        left = positions - sum(caps[at] for at in bound)
        scale = left / sum(of_epoch[at] for at in free) if free else 0
        over = {at for at in free if of_epoch[at] * scale > caps[at]}
        if not over:
            return [caps[at] if at in bound else of_epoch[at] * scale for at in range(len(caps))]
        bound |= over


def _whole(shares: Sequence[Fraction]) -> list[int]:
    """Whole numbers in the ratio of the shares; rounded where they would be too large to multiply with positions."""
    common = math.lcm(*(share.denominator for share in shares))
    whole = [int(share * common) for share in shares]
    divisor = math.gcd(*whole)
    whole = [one // divisor for one in whole]
    if sum(whole) < 1 << 31:
        return whole
    return [max(1, round(_FINEST * one / sum(whole))) for one in whole]
