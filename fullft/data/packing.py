"""Documents → sequences of at most `capacity` tokens."""

from __future__ import annotations

import bisect
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing bin packing: each document, longest first, goes where the least room would remain.

    Uses at most 11/9 of the fewest possible bins plus 1 (Johnson 1974); same lengths give the same bins.

    Args:
        lengths: tokens of each document, all in 1..capacity.
        capacity: tokens of one sequence.

    Returns:
        Bins of document indices; each document in exactly one bin.
    """
    bins: list[list[int]] = []
    by_room: list[tuple[int, int]] = []  # (room, bin), sorted
    for document in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[document]
        place = bisect.bisect_left(by_room, (length, -1))
        if place < len(by_room):
            room, chosen = by_room.pop(place)
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(document)
        if room > length:
            bisect.insort(by_room, (room - length, chosen))
    return bins
