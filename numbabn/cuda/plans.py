"""How the work of a call is cut up: from the shape alone, so that results are too.

The numbers are made for a GPU of 132 multiprocessors, which fewer share as well.
"""

from __future__ import annotations

from functools import cache
from math import gcd
from typing import NamedTuple

from numbabn.cuda.options import (
    BACKWARD_ROWS,
    BACKWARD_SLOTS,
    FORWARD_ROWS,
    FORWARD_SLOTS,
    FUSED_THREADS,
    FUSED_WIDTH,
    PAIR,
    PLANE_CHUNK,
    THREADS,
    TILE_WIDTH,
    WIDEST_TILE,
)
from numbabn.layout import View

MULTIPROCESSORS = 132
BLOCKS = MULTIPROCESSORS * 8  # enough for each to have as many as it can hold
LEAST_BYTES = 704  # of a column of a chunk: what its sums take is 32 bytes to three times that
MOST_TURNS = 16  # tiles that a thread sums in float32
MOST_PARTS = 65535  # a grid's largest y
SHORT_PLANE = 128  # shorter ones are columns


def fused_threads(slots: int, held: int) -> int:
    """Threads of a block that holds so many slots in registers, up to `held` in each."""
    return min(max(-(-slots // (held * 32)), -(-slots // 96), 2) * 32, FUSED_THREADS)


class Planes(NamedTuple):
    """See `geometry`."""

    N: int
    C: int
    L: int
    slots: int  # of a row
    lanes: int  # numbers in a slot
    chunk: int  # slots of a block, elementwise
    part: int  # slots of a chunk of a channel

    def fused(self, backward: bool) -> tuple[int, ...]:
        """The block that does a whole channel in the forward or backward pass, or nothing.

        There must be channels enough to keep the device busy, unless they are small.
        """
        held = BACKWARD_SLOTS if backward else FORWARD_SLOTS
        slots = self.N * self.slots
        whole = self.slots * self.lanes == self.L
        if not whole or slots > held * FUSED_THREADS or (self.C < BLOCKS // 16 and slots > 2048):
            return ()
        return (fused_threads(slots, held),)

    def fused_grid(self, block: tuple[int, ...]) -> tuple[int, ...]:
        return (self.C,)

    @property
    def fused_sizes(self) -> tuple[int, ...]:
        return self.N, self.C, self.slots

    @property
    def bits(self) -> int:
        """Bytes that the ReLU's bits take."""
        return self.N * self.C * self.slots

    @property
    def chunks(self) -> int:
        """Chunks of a channel."""
        return -(-self.N * self.slots // self.part)

    @property
    def element_grid(self) -> tuple[int, ...]:
        return (-(-self.bits // self.chunk),)

    @property
    def chunk_grid(self) -> tuple[int, ...]:
        return self.C, self.chunks

    @property
    def block(self) -> tuple[int, ...]:
        return (THREADS,)

    @property
    def element_sizes(self) -> tuple[int, ...]:
        return self.N * self.C, self.C, self.L, self.slots, self.chunk

    @property
    def chunk_sizes(self) -> tuple[int, ...]:
        return self.N, self.C, self.L, self.slots, self.part


class Columns(NamedTuple):
    """See `geometry`."""

    C: int
    L: int
    K: int
    lanes: int  # numbers in a slot
    height: int
    left: int
    width: int
    tall: int
    tiles: int
    copies: int  # rows of channels in a row of K columns
    bits: int  # bytes that the ReLU's bits take
    rows: int  # of a block, elementwise
    part: int  # rows of a chunk

    def fused(self, backward: bool) -> tuple[int, ...]:
        """The block that does whole channels in the forward or backward pass, or nothing.

        As for planes. Tiles begin and end with sectors of 32 bytes.
        """
        held = (BACKWARD_ROWS if backward else FORWARD_ROWS)[self.lanes]
        slots = self.K // self.lanes
        if self.L > 1 or self.copies > 1:
            return ()
        width = FUSED_WIDTH
        while width > 1:
            tile = self.height * width
            busy = slots // width >= BLOCKS // 16 or tile <= 2048
            if slots % width == 0 and tile <= held * FUSED_THREADS and busy:
                return width, fused_threads(tile, held) // width
            width //= 2
        return ()

    def fused_grid(self, block: tuple[int, ...]) -> tuple[int, ...]:
        return (self.K // self.lanes // block[0],)

    @property
    def fused_sizes(self) -> tuple[int, ...]:
        return self.height, self.C, self.K // self.lanes

    @property
    def chunks(self) -> int:
        """Chunks of a channel."""
        return self.copies * self._parts(self.part)

    def _parts(self, rows: int) -> int:
        return -(-(self.height + (self.left > 0)) // rows)

    @property
    def element_grid(self) -> tuple[int, ...]:
        return self.tiles, self._parts(self.rows)

    @property
    def chunk_grid(self) -> tuple[int, ...]:
        return self.tiles, self._parts(self.part)

    @property
    def block(self) -> tuple[int, ...]:
        return self.width, self.tall

    @property
    def element_sizes(self) -> tuple[int, ...]:
        return self.C, self.L, self.K, self.height, self.left, self.rows

    @property
    def chunk_sizes(self) -> tuple[int, ...]:
        return self.C, self.L, self.K, self.height, self.left, self.part


@cache
def plan(view: View, itemsize: int) -> Planes | Columns:
    """The plan for arrays that lie like `view`."""
    N, C, L = view.sizes
    V = 16 // itemsize
    if L >= SHORT_PLANE and (L % V == 0 or L // gcd(L, V) > WIDEST_TILE):
        slots = L // V if L % V == 0 else (L + V - 2) // V + 1
        turn = THREADS * PAIR
        turns = min(max(N * C * slots // (turn * BLOCKS), 1), PLANE_CHUNK // turn)
        return Planes(N, C, L, slots, V, turn * turns, _turns(N * slots, 4 * THREADS, C))
    copies = V // gcd(C * L, V)
    K = C * L * copies
    height, left = divmod(N * C * L, K)
    unit = L // gcd(L, V)  # slots of the fewest channels that fill slots
    rows = height + (left > 0)
    units = K // V // unit
    # Narrow tiles: a block's sums are two for each of its channels, whatever it read for them. So
    # they are the narrower the fewer blocks there would be if each read enough.
    for tall in (32, 64, 128):
        tall = min(tall, -(-(height + 1) // PAIR))
        most = max(1, min(THREADS // tall, TILE_WIDTH) // unit)  # units in a tile
        tiles = -(-units // most)
        width = unit * -(-units // tiles)
        if unit == 1 and units > 1:
            width += width % 2  # whole sectors of 32 bytes
        tiles = -(-units * unit // width)
        tall = THREADS // width
        enough = tall * -(-LEAST_BYTES // itemsize // tall)
        if -(-rows // enough) * tiles >= MULTIPROCESSORS:
            break
    else:
        enough = tall * max(1, rows * tiles // MULTIPROCESSORS // tall)
    turn = tall * PAIR
    turns = min(max(-(-rows // turn) * tiles // BLOCKS, 1), 8)
    turns = max(turns, -(-rows // turn // MOST_PARTS))
    part = _turns(rows, enough, tiles)
    bits = -(-N * C * L // V)
    return Columns(C, L, K, V, height, left, width, tall, tiles, copies, bits, turn * turns, part)


def _turns(length: int, turn: int, beside: int) -> int:
    """How much of `length` a block should sum: a multiple of what it does in a `turn`.

    Not so much that float32 sums grow long or blocks too few, `beside` others being at work; not
    so little that there are more chunks than a grid can have.
    """
    turns = -(-length // turn)
    wanted = min(max(turns * beside // (BLOCKS // 2), 1), MOST_TURNS)
    return turn * max(wanted, -(-turns // MOST_PARTS))
