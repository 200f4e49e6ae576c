"""Elementwise work along planes that follow each other in memory, of either pass.

A vector goes on from one plane into the next, with the numbers of both channels mixed, so that all
are whole and on the boundaries that streaming stores need but for those at the ends. With bits,
which begin anew with each plane, so do vectors.
"""

from typing import Any

from numbabn.cpu.memory import values_in
from numbabn.cpu.options import function, inline
from numbabn.cpu.vector import LANES


def along_planes(numbers_of: Any, mix: Any, head_of: Any, put_part: Any, put_whole: Any) -> Any:
    """The walk along planes, of a pass that is given by five functions.

    ``numbers_of(io, table, slopes, C, c)`` is what channel c's elements are computed with, and
    ``mix(count, a, b)`` that of a vector whose first `count` lanes are another channel's than the
    rest. ``head_of(io, i, end, streaming)`` counts the elements before the first boundary, which
    ``put_part(io, i, bit, count, numbers, how)`` writes, as it does what is left at the end, and
    ``put_whole(io, i, bit, numbers, how, streaming)`` writes 16 of them. `how` is the pass's own:
    the lower limit of the ReLU, or whether there was one.
    """

    @inline
    def put_wholes(io, i, bit, count, numbers, how, streaming):
        """`count` times 16 elements, the first at i, in either direction."""
        if io.step < 0:
            i += (count - 1) * LANES
            bit += count - 1
        for _ in range(count):
            put_whole(io, i, bit, numbers, how, streaming)
            i += io.step
            bit += io.step // LANES

    @function
    def run(io, i, end, turn, L, bit, table, slopes, C, c, how, streaming):
        """Elements i:end, the first being channel c's up to `turn`.

        `table` and `slopes` have C columns; after the last comes the first. Planes are of L
        elements, 16 or more.
        """
        numbers = numbers_of(io, table, slopes, C, c)
        head = head_of(io, i, min(end, turn), streaming)
        if head > 0:
            put_part(io, i, bit, head, numbers, how)
            i += head
        if i == turn and turn < end:  # the rest of a plane ended before the boundary
            c = c + 1 if c + 1 < C else 0
            numbers = numbers_of(io, table, slopes, C, c)
            turn += L
            head = head_of(io, i, min(end, turn), streaming)
            if head > 0:
                put_part(io, i, bit, head, numbers, how)
                i += head
        while turn < end:
            count = max(0, turn - i) // LANES
            put_wholes(io, i, bit, count, numbers, how, streaming)
            i += count * LANES
            bit += count
            c = c + 1 if c + 1 < C else 0
            following = numbers_of(io, table, slopes, C, c)
            if i < turn:
                if io.bits is None and i + LANES <= end:
                    put_whole(io, i, bit, mix(turn - i, numbers, following), how, streaming)
                    i += LANES
                else:
                    put_part(io, i, bit, turn - i, numbers, how)
                    i = turn
                bit += 1
            numbers = following
            turn += L
        count = max(0, end - i) // LANES
        put_wholes(io, i, bit, count, numbers, how, streaming)
        i += count * LANES
        bit += count
        if i < end:
            put_part(io, i, bit, end - i, numbers, how)

    return run


def along_rows(run: Any) -> Any:
    """What `along_planes` made, over rows of columns that are planes."""

    @function
    def runs(io, K, m0, m1, k0, width, L, table, slopes, C, c, how, streaming):
        """Rows m0:m1 of columns k0:k0+width, which begin with channel c."""
        for left in range(m1 - m0, 0, -1):
            i = (m1 - left if io.step > 0 else m0 + left - 1) * K + k0
            run(io, i, i + width, i + L, L, 0, table, slopes, C, c, how, streaming)

    return runs


# Bytes of an array that is found in cache together with another of its size, or two.
MOST_IN_CACHE = 4 << 20


@inline
def fits_cache(source, size):
    """Whether so many values are surely found there."""
    return size <= values_in(source, MOST_IN_CACHE)


@inline
def asks_for_targets(source, size, streaming):
    """Whether hints go before what is written to arrays of so many values, see `ask_target`."""
    return not streaming and not fits_cache(source, size)


def along_columns(numbers_at: Any, head_of: Any, put_part: Any, read: Any, write: Any) -> Any:
    """The walk along rows of columns, of a pass that is given by five functions.

    ``numbers_at(columns, j)`` is what columns j:j+16 are computed with, where after the last come
    the first again; ``read(io, i, bit, numbers, how)`` loads 16 elements, and ``write(io, i, bit,
    value, numbers, how, streaming)`` stores what becomes of them. For the rest see `along_planes`.
    """

    @inline
    def write_vectors(io, i, j, bit, count, columns, how, streaming):
        """`count` times 16 elements of a row, by steps from column j on, which is at i."""
        for _ in range(count):
            numbers = numbers_at(columns, j)
            write(io, i, bit, read(io, i, bit, numbers, how), numbers, how, streaming)
            i += io.step
            j += io.step
            bit += io.step // LANES

    @function
    def whole_rows(io, K, i, end, columns, how):
        """Elements i:end, from the first column on, past the caches.

        Vectors go on from one row into the next, so K has to be a multiple of 16. Pieces of rows
        that are written to the caches would have to be fetched first, and send away the rest of
        their lines where vectors are half of one (measured, rows of 64 16-bit values that begin 16
        bytes past a boundary, eval forward: three times as long).
        """
        j = head_of(io, i, end, True)
        if j > 0:
            put_part(io, i, 0, j, numbers_at(columns, 0), how)
            i += j
        count = (end - i) // LANES
        rest = i + count * LANES
        if rest < end:
            put_part(io, rest, 0, end - rest, numbers_at(columns, (j + rest - i) % K), how)
        if io.step < 0 and count > 0:
            j = (j + rest - i - LANES) % K
            i = rest - LANES
        while count > 0:
            left = K - j + LANES - 1 if io.step > 0 else j + LANES
            few = min(count, left // LANES)
            write_vectors(io, i, j, 0, few, columns, how, True)
            count -= few
            i += few * io.step
            j += few * io.step
            if j >= K:
                j -= K
            elif j < 0:
                j += K

    @inline
    def may_go_on(io, K, width):
        """Whether vectors may go on from one row into the next."""
        if io.bits is None:
            return width == K and K % LANES == 0
        return False

    @function
    def rows(io, K, m0, m1, k0, lead, width, columns, how, in_cache, streaming):
        """Rows m0:m1 of columns k0:k0+width, `lead` of them before the first boundary.

        In cache two at a time, so that what is known of the columns is loaded once for both.
        Otherwise one row after the other: memory likes to be read and written in one sequence
        (measured, 12.8 MB each that others had driven out: 8 to 13 ns a vector instead of 5).
        """
        row_bits = (K + LANES - 1) // LANES
        left = m1 - m0
        if streaming and may_go_on(io, K, width):
            whole_rows(io, K, m0 * K, m1 * K, columns, how)
            left = 0
        while left > 0:
            together = 2 if in_cache and not streaming and left >= 2 else 1
            m = m1 - left if io.step > 0 else m0 + left - together
            left -= together
            i = m * K + k0
            bit = m * row_bits + k0 // LANES
            j = max(min(lead, width), head_of(io, i, i + width, streaming))
            if j > 0:
                put_part(io, i, bit, j, numbers_at(columns, 0), how)
            if together == 2:
                if j > 0:
                    put_part(io, i + K, bit + row_bits, j, numbers_at(columns, 0), how)
                while j + LANES <= width:
                    numbers = numbers_at(columns, j)
                    first = read(io, i + j, bit, numbers, how)
                    second = read(io, i + j + K, bit + row_bits, numbers, how)
                    write(io, i + j, bit, first, numbers, how, False)
                    write(io, i + j + K, bit + row_bits, second, numbers, how, False)
                    j += LANES
                    bit += 1
                if j < width:
                    numbers = numbers_at(columns, j)
                    put_part(io, i + j, bit, width - j, numbers, how)
                    put_part(io, i + j + K, bit + row_bits, width - j, numbers, how)
            else:
                count = (width - j) // LANES
                rest = j + count * LANES
                if rest < width:
                    part = bit + count
                    put_part(io, i + rest, part, width - rest, numbers_at(columns, rest), how)
                if io.step < 0:
                    j, bit = rest - LANES, bit + count - 1
                write_vectors(io, i + j, j, bit, count, columns, how, streaming)

    return rows
