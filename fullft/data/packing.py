"""Documents → sequences of at most `capacity` tokens."""

from __future__ import annotations

import bisect
from typing import Any

import numpy
from numpy.typing import NDArray

_GOOD = 0.998  # fill that is not worth more work


def pack(lengths: NDArray[Any], capacity: int) -> tuple[NDArray[numpy.int64], NDArray[numpy.int64]]:
    """Bin packing; same lengths give the same bins.

    Best-fit decreasing uses at most 11/9 of the fewest possible bins plus 1 (Johnson 1974), and hardly more than the
    fewest where some documents are short. Where none is, its bins are finished exactly instead, if that is better.

    Args:
        lengths: [documents] tokens of each document, all in 1..capacity.
        capacity: tokens of one sequence.

    Returns:
        (order, starts): bin b holds the documents `order[starts[b]:starts[b + 1]]`.
    """
    bin_of = _best_fit_decreasing(lengths, capacity)
    total, mean = int(lengths.sum()), int(lengths.mean())
    bins = int(bin_of.max()) + 1
    if bins > -(-total // capacity) and total < _GOOD * bins * capacity and capacity > 6 * mean:
        other = _exactly_finished(lengths, capacity, mean)
        if other.max() + 1 < bins:
            bin_of, bins = other, int(other.max()) + 1
    order = numpy.argsort(bin_of, kind="stable")
    starts = numpy.concatenate([[0], numpy.cumsum(numpy.bincount(bin_of, minlength=bins))])
    return order, starts.astype(numpy.int64)


def _best_fit_decreasing(lengths: NDArray[Any], capacity: int) -> NDArray[numpy.int32]:
    """The bin of each document: longest first, each goes where the least room would remain.

    All documents of one length are placed together, into all bins of one room together, so the time hardly grows with
    their number (as in Krell et al. 2021, arXiv:2107.02027, who pack histograms of lengths).
    """
    by_length = numpy.argsort(-lengths.astype(numpy.int32), kind="stable")
    bin_of = numpy.empty(len(lengths), numpy.int32)
    rooms: dict[int, list[NDArray[numpy.int32]]] = {}  # room: bins that have it, in groups
    sorted_rooms: list[int] = []
    bins = placed = 0

    def leave(room: int, group: NDArray[numpy.int32]) -> None:
        if not room or not len(group):
            return
        if room not in rooms:
            rooms[room] = []
            bisect.insort(sorted_rooms, room)
        rooms[room].append(group)

    count_of = numpy.bincount(lengths, minlength=1)
    for length in numpy.flatnonzero(count_of)[::-1].tolist():
        waiting = int(count_of[length])  # documents of this length without a place
        while waiting:
            at = bisect.bisect_left(sorted_rooms, length)
            if at < len(sorted_rooms):
                room = sorted_rooms.pop(at)
                group = numpy.concatenate(rooms.pop(room))
            else:
                room, group = capacity, numpy.arange(bins, bins - (-waiting // (capacity // length)), dtype=numpy.int32)
                bins += len(group)
            # The bin just filled has the least room still, so it is filled up before the next one is begun.
            each = room // length
            full = min(len(group), waiting // each)
            rest = min(waiting - full * each, each) if full < len(group) else 0
            used = numpy.concatenate([numpy.repeat(group[:full], each), numpy.repeat(group[full : full + 1], rest)])
            bin_of[by_length[placed : placed + len(used)]] = used
            placed, waiting = placed + len(used), waiting - len(used)
            leave(room - each * length, group[:full])
            if rest:
                leave(room - rest * length, group[full : full + 1])
            leave(room, group[full + (rest > 0) :])
    return bin_of


def _exactly_finished(lengths: NDArray[Any], capacity: int, mean: int) -> NDArray[numpy.int32]:
    """The bin of each document, for sets without short documents, whose bins best fit leaves with room that none fits.

    Some documents of every length are kept back; the others are packed into bins of less capacity, and then each bin is
    finished with those kept back whose lengths make up its room exactly.
    """
    room_kept = 3 * mean
    by_length = numpy.argsort(lengths, kind="stable")
    kept = numpy.zeros(len(lengths), numpy.bool_)
    kept[by_length[:: max(2, capacity // (4 * mean))]] = True
    kept &= lengths <= capacity - room_kept
    long, rest = lengths > capacity - room_kept, ~kept & (lengths <= capacity - room_kept)
    bin_of = numpy.empty(len(lengths), numpy.int32)
    bin_of[long] = numpy.arange(int(long.sum()))
    bin_of[rest] = _best_fit_decreasing(lengths[rest], capacity - room_kept) + long.sum()
    count = int(bin_of[~kept].max(initial=-1)) + 1
    rooms = capacity - numpy.bincount(bin_of[~kept], weights=lengths[~kept], minlength=count).astype(numpy.int64)

    stacks: dict[int, list[int]] = {}  # length: documents kept back
    for document in numpy.flatnonzero(kept).tolist():
        stacks.setdefault(int(lengths[document]), []).append(document)
    left = numpy.zeros(capacity + 1, numpy.int64)
    for length, stack in stacks.items():
        left[length] = len(stack)
    for number, room in enumerate(rooms.tolist()):
        while (chosen := _next_length(left, room, mean)) > 0:
            bin_of[stacks[chosen].pop()] = number
            left[chosen] -= 1
            room -= chosen
    over = numpy.array([document for stack in stacks.values() for document in stack], numpy.int64)
    if len(over):
        bin_of[over] = _best_fit_decreasing(lengths[over], capacity) + count
    return bin_of


def _next_length(left: NDArray[numpy.int64], room: int, mean: int) -> int:
    """The length to put into `room`, so that one or two documents fill it; 0 if none fits. `left[l]`: how many left."""
    if room > 3 * mean:
        return int(left[: room - 2 * mean + 1].argmax())  # the most frequent, while two more will fit
    for target in range(room, max(room - 32, 0), -1):
        if left[target]:
            return target
        pairs = left[: target // 2 + 1] * left[target - target // 2 : target + 1][::-1]
        if target % 2 == 0 and left[target // 2] < 2:
            pairs[-1] = 0
        if pairs.any():
            return target - int(pairs.argmax())
    fitting = numpy.flatnonzero(left[: room + 1])
    return int(fitting[-1]) if len(fitting) else 0
