"""How work is cut up: the one place where tile sizes and kinds of stores are chosen.

What decides the result's last bit, the chunks that sums are cut into, follows from the shape
alone. What does not, what the threads share out, whether a channel is normalized right after it was
summed, and whether stores bypass the caches, also follows from the machine.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from numpy.typing import NDArray

from numbabn.cpu.boundaries import PAGE
from numbabn.cpu.caches import caches, in_memory, last_share
from numbabn.cpu.launch import PARALLEL_FROM
from numbabn.cpu.memory import AHEAD
from numbabn.cpu.reduction_planes import LONG_PLANE
from numbabn.layout import View

Array = NDArray[Any]

# Values of a channel in a chunk. Smaller for float64, whose sums have no precision to spare: the
# fewer additions in a row, the better; 64 KiB also stays in any L2 between the two passes.
CHUNK = 1 << 15
CHUNK_FLOAT64 = 1 << 13
# Likewise the most rows of columns in a chunk, as long as chunks are not too many.
CHUNK_ROWS = 256
# Columns of other dtypes are cut into chunks of about this many values of all channels, or so many
# of a block: each chunk of each channel costs as much as some more rows, and has to be merged.
CHUNK_COLUMNS = 1 << 17
CHUNK_BLOCK = 1 << 16
# All chunks together make at most about this many entries of 32 bytes.
MOST_CHUNKS = 1 << 14
# Bytes of channels of which two arrays fit any L2 twice.
SMALL_GROUP = 1 << 17
# Largest size of a last cache that only a few cores share.
FAST_LAST = 128 << 20
# Bytes of a row of a block that are worth taking out of the row; a second look in cache does not
# make up for reading shorter ones (measured: half to twice the time at 512 bytes).
SHORTEST_PIECE = 3 << 10
SHORTEST_PIECE_IN_CACHE = 1 << 10
# Values of columns from which on a second thread pays in the forward pass where its share of a row
# is less than that, so that rows are shared out, and sums have to change hands.
SHARED_ROWS_FROM = 1 << 17
# Columns gone through at a time: what is known of them, and their running sums, fit L1. Fewer where
# rows come from a cache, which brings more of them than memory does.
COLUMNS = 1024
COLUMNS_IN_CACHE = 512
# Likewise of elementwise work, which needs less to be known, and fares better with whole rows (2048
# columns in 0.7 to 0.9 of the time that halves of them take, eval forward).
COLUMNS_WRITTEN = 4096


class Plan(NamedTuple):
    """How the kernels for one view, dtype and number of threads are called.

    `sizes` are the arguments between the arrays of elements and the arrays of channels, and
    `items` what there is to share out, for each way of going through the data: by chunk (`stats`
    and backward `sums`), by channel (a channel, or block of them, is finished before the next is
    begun: `forward`, `backward`, and `finish` for the backward sums alone; no items where that is
    not the way), and by `element` (elementwise, in the order of memory where that matters).
    """

    name: str  # "planes" or "columns": how the kernels' names end
    threads: int
    chunks: int  # of each channel
    stats_sizes: tuple[int, ...]
    sums_sizes: tuple[int, ...]
    chunk_items: int
    finish_sizes: tuple[int, ...]  # of the backward sums, all of a channel by one thread
    finish_items: int
    forward_sizes: tuple[int, ...]
    forward_items: int
    backward_sizes: tuple[int, ...]
    backward_items: int
    element_sizes: tuple[int, ...]
    element_items: int


@lru_cache(4096)
def plan(view: View, itemsize: int, threads: int) -> Plan:
    """The plan for arrays that lie like `view`; the chunks follow from view and dtype alone."""
    return (_plan_columns if view.columns else _plan_planes)(view, itemsize, threads)


def _plan_planes(view: View, itemsize: int, threads: int) -> Plan:
    N, C, L = view.sizes
    most = max(1, MOST_CHUNKS // C)
    values = max(CHUNK_FLOAT64 if itemsize == 8 else CHUNK, -(-N * L // most))
    if values >= L:
        rows, segment = min(N, values // L), L
        chunks = -(-N // rows)
    else:
        rows, segment = 1, -(-L // -(-L // values))
        segment += -segment % 64  # whole cache lines of any dtype
        chunks = N * -(-L // segment)
    group = _group(N, L, itemsize)
    few = min(16, max(1, C * chunks // (4 * threads)))  # but every thread should have items
    alone = min(16, max(1, C // (4 * threads)))
    # A channel's second look finds it in cache; but every thread should have channels to do.
    channels = C if threads == 1 or 4 * threads <= C or C % threads == 0 else 0
    nbytes = N * C * L * itemsize
    ahead, back = (AHEAD // itemsize if _may_be_far(n * nbytes) else 0 for n in (2, 3))
    channel_sizes = (N, C, L, rows, segment, chunks, group)
    return Plan(
        "planes",
        threads,
        chunks,
        (N, C, L, rows, segment, few, ahead),
        (N, C, L, rows, segment, few, back),
        -(-C // few) * chunks,
        (N, C, L, rows, segment, alone, back),
        -(-channels // alone),
        (*channel_sizes, ahead, _ahead(group * L * itemsize, N, 2 * nbytes) // itemsize),
        channels,
        (*channel_sizes, back, _ahead(group * L * itemsize, 2 * N, 3 * nbytes) // itemsize),
        channels,
        (C, L, segment),
        N * C * -(-L // segment),
    )


def _may_be_far(nbytes: int) -> bool:
    """Whether some of so many bytes, all arrays of a pass, may have to come from memory.

    So it is long before they outgrow the last cache, as others fill it too, on a virtual machine
    always (measured, 6.4 MB each on a cache of 32: training and the backward sums take 1.2 to 1.9
    times as long without hints where that is so, and 0.95 to 1.1 where it is not).
    """
    return in_memory(nbytes * 8 // 3)


def _group(N: int, L: int, itemsize: int) -> int:
    """How many channels of planes are summed, then gone over again.

    What is done once per channel is then done for up to 16 at once, and their rows lie in sequence.
    They should fit L2 together; but short planes are summed 16 channels at a time, however few
    there are, and in rows that are too short for memory. So of these it is 16, unless they would
    not be in a share of the last cache (measured with 1 MiB of L2 and planes of 14 x 14: 5, 2 and
    1 channels, as many as fit, take 1.1 to 2 times as long as 16 do).
    """
    found, channel_bytes = caches(), N * L * itemsize
    most = found.l2 // 4
    if L < LONG_PLANE:
        most = max(found.l2 // 2, last_share() // 4)
    return min(16, max(1, most // channel_bytes))


def _ahead(row: int, rows: int, nbytes: int) -> int:
    """How many bytes ahead planes are fetched while a group of channels is written: a `row`, or 0.

    There lies the next group, so memory is busy in both directions; and cache, where rows are so
    short that the hardware's prefetchers hardly get going (measured in L3, planes of 7 x 7: 0.8 to
    1 of the time; of 14 x 14, 1 to 1.05). But that must not drive this group out of cache: out of
    L2 where a cache that a whole socket shares would have to bring it back (measured, of 2 MiB: 7.1
    instead of 8.6 ms with 0.4 MB, 15.5 instead of 13.1 ms with 0.8 MB), nor out of the core's share
    of the last one (of 4 MiB: 15.1 instead of 20.8 ms with 3.2 MB). A pass is over `nbytes` in all.
    """
    found, group_bytes = caches(), row * rows
    most = found.l2 // 4 if found.last > FAST_LAST else last_share() // 2
    if group_bytes > most:
        return 0
    return row if row < PAGE or (in_memory(nbytes) and group_bytes > SMALL_GROUP) else 0


def _plan_columns(view: View, itemsize: int, threads: int) -> Plan:
    M, C, L = view.sizes
    block = min(C, max(16, COLUMNS // L // 16 * 16))  # × 16: rows of `bits` start on a number
    most = max(1, MOST_CHUNKS // C)
    if itemsize == 8:
        rows = min(CHUNK_ROWS, CHUNK_FLOAT64 // (block * L))
    else:
        rows = max(min(CHUNK_COLUMNS // (C * L), -(-M // 8)), CHUNK_BLOCK // (block * L))
    # A power of two of them, so that threads get equal shares.
    chunks = 1 << (-(-M // min(M, max(8, rows))) - 1).bit_length()
    while chunks > most:
        chunks //= 2
    rows = -(-M // chunks)
    chunks = -(-M // rows)
    tall, wide = _tile(M, C, L, threads)
    # The chunks' rows are settled; narrower blocks of columns give more threads something to do.
    # But they are fetched less well, and equal shares of the rows need none.
    nbytes = M * C * L * itemsize
    if not _may_be_far(2 * nbytes):
        block = min(block, max(16, COLUMNS_IN_CACHE // L // 16 * 16))
    short = 0 if chunks % threads == 0 else 4 * threads
    while chunks * -(-C // block) < short and block * L >= 128 and block >= 32:
        block = block // 32 * 16
    near = threads * caches().l2
    ahead, back = (AHEAD // itemsize if n * nbytes > near else 0 for n in (1, 2))
    forward = _channel_block(M, C, L, itemsize, threads, 1)
    backward = _channel_block(M, C, L, itemsize, threads, 2)
    return Plan(
        "columns",
        threads,
        chunks,
        (M, C, L, rows, block, ahead),
        (M, C, L, rows, block, back),
        chunks * -(-C // block),
        (M, C, L, rows, backward, back),
        -(-C // backward) if backward >= block else 0,  # else it pays less than whole rows do
        (M, C, L, rows, forward, chunks, ahead),
        -(-C // forward) if forward else 0,
        (M, C, L, rows, backward, chunks, back),
        -(-C // backward) if backward else 0,
        (M, C, L, tall, wide),
        -(-C // wide) * -(-M // tall),
    )


def _tile(M: int, C: int, L: int, threads: int) -> tuple[int, int]:
    """Rows and channels of an item of elementwise work.

    It reads what is known of its channels once, so it should be tall; and wide, unless threads
    would have unequal shares, or none.
    """
    for columns in (COLUMNS_WRITTEN, COLUMNS, COLUMNS_IN_CACHE):
        wide = min(C, max(16, columns // L // 16 * 16))
        blocks = -(-C // wide)
        tall = -(-M // min(max(1, -(-4 * threads // blocks)), max(1, M // 8)))
        items = blocks * -(-M // tall)
        if items % threads == 0 or items >= 4 * threads:
            break
    return tall, wide


def _channel_block(M: int, C: int, L: int, itemsize: int, threads: int, arrays: int) -> int:
    """Channels that one thread sums, then goes over again while `arrays` of them are in its cache.

    0 if there is no such number.
    """
    column = L * itemsize
    if threads > 1 and C * column < threads * PAGE:
        return 0
    columns, piece = COLUMNS_IN_CACHE, SHORTEST_PIECE_IN_CACHE
    if in_memory(M * C * column * (arrays + 1)):
        columns, piece = COLUMNS, SHORTEST_PIECE
    widest = min(columns // L, caches().l2 // 2 // (M * column * arrays))
    if threads == 1 and widest >= C:
        return C
    shares = [-(-C // (n * threads)) for n in (1, 2, 4)]  # of each thread: one, or a few
    for block in (*shares, widest - 15):
        block += -block % 16  # so that rows of `bits` start on a number
        blocks = -(-C // block) if block > 0 else 0
        even = blocks > 0 and (blocks % threads == 0 or blocks >= 4 * threads)
        if even and block <= widest and block * column >= min(piece, C * column):
            return block
    return 0


def streams(
    view: View, nbytes: int, reads: int, aligned_rows: bool, *written: Array | None
) -> bool:
    """Whether stores should bypass the caches, in a pass over arrays of `nbytes` each.

    It `reads` so many of them. Stores should when what is written would not be found in the caches
    afterwards, or drive out what is yet to be read; below that they cost up to twice as much. With
    `aligned_rows`, vectors must not be moved to a boundary of 64 bytes, so rows have to begin on
    one.
    """
    if not in_memory(nbytes * (reads + len(written))):
        return False
    targets = [array for array in written if array is not None]
    if not targets or not in_memory(nbytes * (reads + len(targets))):
        return False
    addresses = [array.__array_interface__["data"][0] % 64 for array in targets]
    if len(set(addresses)) > 1:
        return False
    row = view.L * (view.C if view.columns else 1) * targets[0].itemsize
    return not aligned_rows or (addresses[0] == 0 and row % 64 == 0)


def shared_from(view: View, itemsize: int, backward: bool) -> int:
    """How many values of arrays that lie like `view` are worth a second thread."""
    if view.columns and not backward and view.C * view.L * itemsize < 2 * PAGE:
        return SHARED_ROWS_FROM
    return PARALLEL_FROM["omp"]
