"""Which slots of 16 bytes a thread works on, in either view.

**Planes.** A row of L elements, one plane, is cut into `slots` slots that lie on multiples of 16
bytes of the array; the first and the last may hold elements of other rows too. Slots are counted
through all rows: slot ``t`` is number ``t % slots`` of row ``t // slots``.

**Columns.** Rows are put together to `K` columns, a multiple of what a slot holds, so that a slot
holds the same columns in every row, and only the very last can be incomplete. A block takes a
tile of `width` slots of each row; its threads stand in rows of `width`.
"""

from numba import cuda

from numbabn.cuda.options import inline
from numbabn.cuda.vector import like, smaller


@inline
def thread_of(size):
    """The thread's number in its block, as an index."""
    return like(size, cuda.threadIdx.x)


@inline
def block_of(size):
    """The block's number, as an index."""
    return like(size, cuda.blockIdx.x)


@inline
def plane_part(t, end, slots, L, V):
    """Slot t of all rows: where it begins, and which of its V numbers are the row's.

    None are if t is not before `end`.
    """
    row = t // slots
    begin = row * L
    i = begin - begin % V + (t - row * slots) * V
    lo = like(L, 0)
    hi = like(L, 0)
    if i < begin:
        lo = begin - i
    if t < end and i < begin + L:
        hi = smaller(begin + L - i, like(L, V))
    return i, lo, hi


@inline
def column_part(m, end, K, k, size, V):
    """The slot at column k of row m: where it begins, and how many numbers it has.

    It has none if m is not before `end`.
    """
    hi = like(K, 0)
    i = hi
    if m < end:
        i = m * K + k
        if i < size:
            hi = smaller(size - i, like(K, V))
    return i, hi
