"""How the work of a call is cut up: from the shape alone, so that results are too.

The numbers are made for a GPU of 132 multiprocessors, which fewer share as well.
"""

from __future__ import annotations

from functools import cache
from math import gcd
from typing import NamedTuple

from numbabn.cuda.options import PAIR, PLANE_CHUNK, THREADS
from numbabn.layout import View

BLOCKS = 132 * 8  # enough for every multiprocessor to have as many as it can hold
SHORT_PLANE = 128  # shorter ones are columns


class Planes(NamedTuple):
    """See `geometry`."""

    rows: int
    C: int
    L: int
    slots: int  # of a row
    chunk: int  # slots of a block, elementwise

    @property
    def bits(self) -> int:
        """Bytes that the ReLU's bits take."""
        return self.rows * self.slots

    @property
    def element_sizes(self) -> tuple[int, ...]:
        return self.rows, self.C, self.L, self.slots, self.chunk

    @property
    def element_blocks(self) -> int:
        return -(-self.rows * self.slots // self.chunk)


class Columns(NamedTuple):
    """See `geometry`."""

    size: int
    C: int
    L: int
    K: int
    lanes: int
    width: int  # slots of a tile
    tiles: int
    height: int  # rows of K columns, the last perhaps incomplete
    rows: int  # of a block, elementwise

    @property
    def bits(self) -> int:
        """Bytes that the ReLU's bits take."""
        return -(-self.size // self.lanes)

    @property
    def element_sizes(self) -> tuple[int, ...]:
        return self.size, self.C, self.L, self.K, self.width, self.tiles, self.rows

    @property
    def element_blocks(self) -> int:
        return self.tiles * -(-self.height // self.rows)


@cache
def plan(view: View, itemsize: int) -> Planes | Columns:
    """The plan for arrays that lie like `view`."""
    N, C, L = view.sizes
    V = 16 // itemsize
    if L >= SHORT_PLANE and (L % V == 0 or L // gcd(L, V) > THREADS):
        slots = L // V if L % V == 0 else (L + V - 2) // V + 1
        turn = THREADS * PAIR
        turns = min(max(N * C * slots // (turn * BLOCKS), 1), PLANE_CHUNK // turn)
        return Planes(N * C, C, L, slots, turn * turns)
    K = C * L * (V // gcd(C * L, V))
    height = -(-N * C * L // K)
    unit = L // gcd(L, V)  # slots of the fewest channels that fill slots
    tall = min(8, -(-height // PAIR))
    most = max(1, THREADS // tall // unit)  # units in a tile
    units = K // V // unit
    tiles = -(-units // most)
    width = unit * -(-units // tiles)
    turn = THREADS // width * PAIR
    turns = min(max(-(-height // turn) * tiles // BLOCKS, 1), 8)
    return Columns(N * C * L, C, L, K, V, width, tiles, height, turn * turns)
