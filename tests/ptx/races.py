"""Who read and wrote what when, and whether anything put the two in order.

A `Shadow` keeps, for each piece of a memory, its last write, and the lowest and the highest thread
among those that read it since. Threads are numbered so that ``id >> 10`` is the block and
``id >> 5`` the warp; times count memory instructions. Two accesses to a piece, at least one of them
a write, are in order if both threads are of one block and passed a barrier in between, or of one
warp and passed a `bar.warp.sync`. All others race, also where both write the same value.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

WARP_BITS, BLOCK_BITS = 5, 10
GRANULE = 16  # bytes of a piece, as long as no access is smaller


class Race(NamedTuple):
    """An access (by its position in the call) that is not in order with an earlier one."""

    position: int
    other: int  # thread
    time: int
    wrote: bool  # what the other did


class Shadow:
    """The accesses to `size` bytes."""

    def __init__(self, size: int):
        self.granule = GRANULE
        pieces = -(-size // GRANULE)
        self.writer = np.full(pieces, -1)
        self.write_time = np.full(pieces, -1)
        self.atomic = np.zeros(pieces, bool)
        self.low, self.high = np.full(pieces, -1), np.full(pieces, -1)
        self.read_time = np.full(pieces, -1)

    def pieces(self, offsets: np.ndarray, width: int) -> tuple[np.ndarray, int]:
        """Indices of the pieces of accesses, and how many an access has."""
        if width < self.granule:
            times = self.granule // width
            for name, values in list(vars(self).items()):
                if name != "granule":
                    setattr(self, name, np.repeat(values, times))
            self.granule = width
        count = width // self.granule
        first = offsets // self.granule
        if count == 1:
            return first, 1
        return (first[:, None] + np.arange(count)).ravel(), count

    def written(self, offsets: np.ndarray, width: int) -> np.ndarray:
        """Which accesses read nothing that was never written."""
        at, count = self.pieces(offsets, width)
        return (self.write_time[at] >= 0).reshape(-1, count).all(axis=1)

    def mark_written(self, offsets: np.ndarray, width: int, time: int) -> None:
        at, _ = self.pieces(offsets, width)
        self.write_time[at] = time

    def access(
        self, offsets: np.ndarray, width: int, ids: np.ndarray, time: int,
        block_since: np.ndarray, warp_since: np.ndarray, write: bool, atomic: bool = False,
    ) -> Race | None:  # fmt: skip
        """Note accesses of `ids` at `time`; gives one that races, if any does.

        `block_since` and `warp_since` are when these threads last passed a barrier.
        """
        at, count = self.pieces(offsets, width)
        if count > 1:
            ids, block_since, warp_since = (
                np.repeat(a, count) for a in (ids, block_since, warp_since)
            )

        def not_over(other, when):
            return _not_before(other, when, ids, block_since, warp_since)

        def race(others, times, wrote, excused=None):
            """The first of `others` that was here unordered; their times are read if need be."""
            found = (others >= 0) & (others != ids)
            if excused is not None:
                found &= ~excused[at]
            if found.any():
                found &= not_over(others, times[at])
                if found.any():
                    n = int(np.flatnonzero(found)[0])
                    return Race(n // count, int(others[n]), int(times[at[n]]), wrote)
            return None

        written = race(self.writer[at], self.write_time, True, self.atomic if atomic else None)
        if written:
            return written
        low, high = self.low[at], self.high[at]
        if write:
            return (
                race(low, self.read_time, False)
                or race(high, self.read_time, False)
                or self._write(at, count, ids, time, atomic)
            )
        # Readers of before a barrier no longer matter, if all were of this block.
        old = low >= 0
        if old.any():
            when = self.read_time[at]
            old &= not_over(low, when) | not_over(high, when)
            low = np.where(old, np.minimum(low, ids), ids)
            high = np.where(old, np.maximum(high, ids), ids)
        else:
            low = high = ids
        # Of several assignments to one place the last one stays; ids ascend.
        self.low[at[::-1]] = low[::-1]
        self.high[at] = high
        self.read_time[at] = time
        return None

    def _write(self, at, count, ids, time, atomic) -> Race | None:
        """Note writes; gives one of two to the same place."""
        self.writer[at] = ids
        self.write_time[at] = time
        self.atomic[at] = atomic
        if atomic:
            return None
        winner = self.writer[at]
        lost = winner != ids
        if not lost.any():
            return None
        n = int(np.flatnonzero(lost)[0])
        return Race(n // count, int(winner[n]), time, True)


def _not_before(other, when, ids, block_since, warp_since):
    """Whether what `other` did at `when` is not known to be over for `ids`."""
    same_warp = other >> WARP_BITS == ids >> WARP_BITS
    since = np.where(same_warp, warp_since, block_since)
    return (other >> BLOCK_BITS != ids >> BLOCK_BITS) | (when > since)
