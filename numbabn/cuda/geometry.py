"""Which slots of 16 bytes a thread works on, in either view.

**Planes.** A row of L elements, one plane, is cut into `slots` slots that lie on multiples of 16
bytes of the array; the first and the last may hold elements of other rows too. A block's threads
take slots that follow each other, or nearly so: see `paired`.

**Columns.** Rows of channels are put together to rows of `K` columns, a multiple of what a slot
holds: so a slot has the same columns in every row, and only the last row may be incomplete. There
are `height` whole ones, and `left` columns of another. A block takes a tile of `width` slots of
each row; its threads stand in rows of `width`, `tall` of them. Rows that were put together repeat
the channels: what is channel ``c % C`` is counted as channel c.
"""

from numba import cuda

from numbabn.cuda.indices import index, like, smaller
from numbabn.cuda.memory import element
from numbabn.cuda.options import inline


@inline
def thread():
    """The thread's number in its block."""
    return index(cuda.threadIdx.y) * index(cuda.blockDim.x) + index(cuda.threadIdx.x)


@inline
def threads():
    """Threads in the block."""
    return index(cuda.blockDim.x) * index(cuda.blockDim.y)


@inline
def row_part(x, row, v, wanted, L, V):
    """Slot v of a row: where it begins, and which of its V numbers are the row's.

    None are if it is not wanted.
    """
    begin = element(x, row, L, 0)
    before = like(L, begin % V)  # numbers in the first slot that belong to the row before
    lo = like(L, 0)
    hi = like(L, 0)
    if wanted and v * V < before + L:
        hi = smaller(before + L - v * V, like(L, V))
        if v == 0:
            lo = before
    return begin - before + v * V, lo, hi


@inline
def plane_part(x, t, end, slots, L, V):
    """`row_part` of slot t of all rows, if it is before `end`."""
    row = t // slots
    return row_part(x, row, t - row * slots, t < end, L, V)


@inline
def next_slot(n, v, slots, by):
    """The sample n and its slot v that are `by` slots of the channel on."""
    n = n + by // slots
    v = v + by % slots
    if v >= slots:
        v = v - slots
        n = n + 1
    return n, v


@inline
def paired(n, row, v, slots):
    """The slot that is number v of sample n's row in the order in which a channel is read.

    Memory is read in sectors of two slots. Where rows have odd numbers of slots, one of a row's
    slots has no other, and the pairs begin at odd slots of every other row. It comes first in odd
    samples and last in even ones: so pairs begin at even numbers, and no warp reads half of one.
    """
    if (n + row) & slots & 1 != 0:
        if row & 1 != 0:
            v = v + 1
            if v == slots:
                v = like(v, 0)
        else:
            if v == 0:
                v = slots
            v = v - 1
    return v


@inline
def channel_part(x, n, c, v, wanted, C, L, slots, V):
    """`row_part` of slot v of channel c of sample n, `paired`."""
    row = n * C + c
    return row_part(x, row, paired(n, row, v, slots), wanted, L, V)


@inline
def tile_columns(K, V):
    """Where the block's tile begins, the thread's first column of it, and how many there are.

    The last tile may have fewer than the others, and threads with nothing to do. Tiles with an odd
    number of slots are rows to `paired`, and the block's rows of threads are samples.
    """
    slots = index(cuda.blockDim.x)
    base = index(cuda.blockIdx.x) * slots * V
    v = paired(
        index(cuda.threadIdx.y), index(cuda.blockIdx.x), index(cuda.threadIdx.x), slots
    )  # fmt: skip
    return base, v * V, smaller(slots * V, K - base)


@inline
def holder(v):
    """Which of the block's first threads has slot v of the tile: `tile_columns` turned round."""
    slots = index(cuda.blockDim.x)
    if index(cuda.blockIdx.x) & slots & 1 != 0:
        if v == 0:
            v = slots
        v = v - 1
    return v


@inline
def column_part(x, m, end, height, left, K, k, V):
    """The slot at column k of row m: where it begins, and how many numbers it has.

    It has none if m is not before `end`.
    """
    hi = like(K, 0)
    if m < end:
        if m < height:
            hi = like(K, V)
        elif k < left:
            hi = smaller(left - k, like(K, V))
    return element(x, m, K, k), hi


@inline
def chunk_of(c, C, copies, part, parts):
    """The number, among the chunks of all channels, of a part of what is counted as channel c."""
    return ((c % C) * copies + c // C) * parts + part
