"""Sums over the threads of a warp, a block, or the rows and columns of a block's tile.

Each has a fixed order, so that results are the same to the last bit, run after run. All threads
of the block must take part.
"""

from numba import cuda

from numbabn.cuda.geometry import thread, threads
from numbabn.cuda.indices import like
from numbabn.cuda.memory import is_double
from numbabn.cuda.options import inline
from numbabn.cuda.shared import get, put
from numbabn.cuda.vector import close_sum

ALL = 0xFFFFFFFF
SUM_SPACE = 66  # float64 numbers in shared memory that `block_sums` needs


@inline
def add_up(x, total, lost, value):
    """A new total, and, for float64, all that was lost to rounding so far (Knuth's two-sum)."""
    new = total + value
    if is_double(x):
        back = new - total
        lost = lost + ((total - (new - back)) + (value - back))
    return new, lost


@inline
def warp_sum(value):
    """Sum over the warp, in all of its lanes."""
    value = value + cuda.shfl_xor_sync(ALL, value, 16)
    value = value + cuda.shfl_xor_sync(ALL, value, 8)
    value = value + cuda.shfl_xor_sync(ALL, value, 4)
    value = value + cuda.shfl_xor_sync(ALL, value, 2)
    return value + cuda.shfl_xor_sync(ALL, value, 1)


@inline
def block_sums(a, b, scratch):
    """Two sums over the block, in all of its threads."""
    lane, warp = thread() & 31, thread() >> 5
    a, b = warp_sum(a), warp_sum(b)
    cuda.syncthreads()  # `scratch` may still be read from an earlier call
    if lane == 0:
        put(scratch, warp, a)
        put(scratch, warp + 32, b)
    cuda.syncthreads()
    if warp == 0:
        a, b = 0.0, 0.0
        if lane * 32 < threads():
            a, b = get(scratch, lane), get(scratch, lane + 32)
        a, b = warp_sum(a), warp_sum(b)
        if lane == 0:
            put(scratch, like(lane, 64), a)
            put(scratch, like(lane, 65), b)
    cuda.syncthreads()
    return get(scratch, like(lane, 64)), get(scratch, like(lane, 65))


@inline
def tile_sums(x, work, columns, tall, L):
    """From ``work[d * columns + j]`` to the sum over all d and the L columns of a channel.

    That of the tile's channel q is left at ``work[q * L]``.
    """
    cuda.syncthreads()
    j = thread()
    while j < columns:
        total, lost = get(work, j), 0.0
        at = j + columns
        while at < tall * columns:
            total, lost = add_up(x, total, lost, get(work, at))
            at = at + columns
        put(work, j, close_sum(total, lost))
        j = j + threads()
    cuda.syncthreads()
    if L > 1:
        lane, warps = thread() & 31, threads() >> 5
        q = thread() >> 5
        if q == warps:  # not a whole warp, so it cannot shuffle
            q = columns
        while q * L < columns:
            total = 0.0
            j = lane
            while j < L:
                total = total + get(work, q * L + j)
                j = j + 32
            total = warp_sum(total)
            if lane == 0:
                put(work, q * L, total)
            q = q + warps
        cuda.syncthreads()
