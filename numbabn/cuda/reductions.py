"""Sums over the batch: the statistics of each chunk of each channel.

A thread sums in the type that is computed with, float32 for all but float64, in tiles of four
slots: first a tile's mean, then the squared deviations from it, in registers; tiles are merged by
the formula of Chan, Golub & LeVeque (1979). Everything is relative to one of the thread's own
values. Where squares may have overflowed or underflowed, the thread does it again in float64,
which is also how infinity and NaN come out right. What threads found is merged in float64: first
the common mean, then ``m2 = sum(m2_i + n_i * (mean_i - mean)**2)``.
"""

from __future__ import annotations

import math

from numba import cuda

from numbabn.cuda.channels import CENTER, COUNT, M2, SUM
from numbabn.cuda.geometry import (
    channel_part,
    chunk_of,
    holder,
    next_slot,
    paired,
    thread,
    threads,
    tile_columns,
)
from numbabn.cuda.indices import as_float, as_float64, index, like, smaller
from numbabn.cuda.memory import (
    decode,
    element,
    is_double,
    load,
    load_part,
    no_slot,
    opaque,
    pointer,
)
from numbabn.cuda.options import THREADS, TILE_WIDTH, Address, Size, inline
from numbabn.cuda.scalars import scalar, store_float64
from numbabn.cuda.shared import (
    get,
    get_columns,
    get_slot,
    put,
    put_slot,
    put_vector,
    shared_float64,
    shared_slots,
)
from numbabn.cuda.sums import SUM_SPACE, add_up, block_sums, tile_sums
from numbabn.cuda.vector import (
    LANES,
    close_sum,
    doubtful,
    fma,
    keep,
    lane,
    part_bits,
    pick,
    splat,
    sum_lanes,
    widen,
)


@inline
def first_of_row(x, row, v, L, V):
    """The first number of a row's slot v, or the row's last if the slot lies past its end.

    Of a whole slot, which costs no more: the others in it are needed soon.
    """
    i = element(x, row, L, smaller(v * V, L - 1))
    if L % V == 0:
        value = lane(decode(x, opaque(load(x, i))), 0)
    else:
        value = scalar(x, i)
    return value


@inline
def common_center(shift, scratch):
    """The first thread's `shift` in float64, for all of the block; 0 if it is not finite."""
    if thread() == 0:
        value = widen(shift)
        put(scratch, like(thread(), 0), value if math.isfinite(value) else 0.0)
    cuda.syncthreads()
    return get(scratch, like(thread(), 0))


@inline
def store_chunk(partials, at, count, center, total, m2):
    """Chunk number `at` of all channels' chunks."""
    store_float64(partials, at * 4 + COUNT, count)
    store_float64(partials, at * 4 + CENTER, center)
    store_float64(partials, at * 4 + SUM, total)
    store_float64(partials, at * 4 + M2, m2)


# --- planes ---------------------------------------------------------------------------------


@inline
def merge_tile(x, a, b, c, d, bits_a, bits_b, bits_c, bits_d, whole, count, shift, n, mean, m2):
    """n, mean and m2 of the thread's values less `shift`, after a tile of `count` more; its mean.

    If it is not `whole`, only the slots' numbers whose bits are set belong to it.
    """
    a, b = decode(x, a) - shift, decode(x, b) - shift
    c, d = decode(x, c) - shift, decode(x, d) - shift
    if whole:
        middle = sum_lanes((a + b) + (c + d)) / count
        a, b, c, d = a - middle, b - middle, c - middle, d - middle
    else:
        a, b, c, d = keep(a, bits_a), keep(b, bits_b), keep(c, bits_c), keep(d, bits_d)
        middle = sum_lanes((a + b) + (c + d)) / count
        a, b = keep(a - middle, bits_a), keep(b - middle, bits_b)
        c, d = keep(c - middle, bits_c), keep(d - middle, bits_d)
    squares = sum_lanes(fma(b, b, a * a) + fma(d, d, c * c))
    total = n + count
    apart = middle - mean
    share = count / total
    m2 = (m2 + squares) + (apart * apart) * (share * n)
    return total, fma(apart, share, mean), m2, middle


@inline
def slot_again(x, slot, bits, center):
    """Sums of a slot's numbers less `center` and of their squares, in float64."""
    apart = keep(widen(decode(x, slot)) - center, bits)
    return sum_lanes(apart), sum_lanes(apart * apart)


@inline
def merge_threads(count, near, total, mean, m2, center, scratch):
    """A block's count, center, sum and m2, from each thread's count, sum, mean and m2.

    The thread's sum and mean are relative to `near`, and the mean need not be as exact as the sum.

    The sum is relative to a new center, which is next to the mean: `center`, the channel's first
    value, may be an outlier.
    """
    here = count > 0.0
    number, all_ = block_sums(count, ((near - center) + mean) * count if here else 0.0, scratch)
    moved = center + all_ / number
    if not math.isfinite(moved):
        moved = center
    apart = (near - moved) + mean
    m2 = m2 + count * (apart * apart) if here else 0.0
    rest = fma(near - moved, count, total) if here else 0.0
    m2, rest = block_sums(m2, rest, scratch)
    return number, moved, rest, m2 - rest * (rest / number)


def stats_planes(storage, aligned, wide):
    V = LANES[storage]

    def stats_planes(
        x: Address, N: Size, C: Size, L: Size, slots: Size, chunk: Size, partials: Address
    ) -> None:  # fmt: skip
        C, L, slots = index(C), index(L), index(slots)
        source = pointer(storage, aligned, wide, x)
        c, k = index(cuda.blockIdx.x), index(cuda.blockIdx.y)
        begin = k * index(chunk)
        end = smaller(begin + index(chunk), index(N) * slots)
        u = begin + thread()
        n, v = u // slots, u % slots
        step = like(L, THREADS)
        count = as_float(source, like(L, 0))
        mean, m2, shift, exact, lost = count, count, count, count, count
        if u < end:
            row = n * C + c
            shift = first_of_row(source, row, paired(n, row, v, slots), L, V)
        while u < end:
            i, lo, hi = channel_part(source, n, c, v, True, C, L, slots, V)
            a, bits_a, total = load_part(source, i, lo, hi), part_bits(lo, hi), hi - lo
            n, v = next_slot(n, v, slots, step)
            i, lo, hi = channel_part(source, n, c, v, u + THREADS < end, C, L, slots, V)
            b, bits_b, total = load_part(source, i, lo, hi), part_bits(lo, hi), total + hi - lo
            n, v = next_slot(n, v, slots, step)
            i, lo, hi = channel_part(source, n, c, v, u + 2 * THREADS < end, C, L, slots, V)
            d, bits_d, total = load_part(source, i, lo, hi), part_bits(lo, hi), total + hi - lo
            n, v = next_slot(n, v, slots, step)
            i, lo, hi = channel_part(source, n, c, v, u + 3 * THREADS < end, C, L, slots, V)
            e, bits_e, total = load_part(source, i, lo, hi), part_bits(lo, hi), total + hi - lo
            n, v = next_slot(n, v, slots, step)
            if total > 0:
                count, mean, m2, middle = merge_tile(
                    source, a, b, d, e, bits_a, bits_b, bits_d, bits_e, total == 4 * V,
                    as_float(source, total), shift, count, mean, m2,
                )  # fmt: skip
                if is_double(source):
                    exact, lost = add_up(source, exact, lost, middle * as_float(source, total))
            u = u + 4 * THREADS
        scratch = shared_float64(SUM_SPACE)
        center = common_center(shift, scratch)
        number, near, offset, squares = widen(count), widen(shift), widen(mean), widen(m2)
        sum_ = widen(close_sum(exact, lost)) if is_double(source) else offset * number
        if number > 0.0 and doubtful(m2, shift):
            near, offset, squares = center, 0.0, 0.0
            u = begin + thread()
            while u < end:
                n = u // slots
                i, lo, hi = channel_part(source, n, c, u - n * slots, True, C, L, slots, V)
                slot = load_part(source, i, lo, hi)
                total, square = slot_again(source, slot, part_bits(lo, hi), center)
                offset, squares = offset + total, squares + square
                u = u + THREADS
            sum_, offset = offset, offset / number
            squares = squares - sum_ * offset
        number, center, total, squares = merge_threads(
            number, near, sum_, offset, squares, center, scratch
        )
        if thread() == 0:
            at = c * index(cuda.gridDim.y) + k
            store_chunk(partials, at, number, center, total, squares)

    return stats_planes


# --- columns --------------------------------------------------------------------------------


@inline
def column_moments(x, i, step, rows, firsts):
    """Per column, mean, m2 and, for float64, the sum of `rows` rows' values less the first row's.

    The rows' slots are at i, i + step, and so on; two rows are a tile. The first row's waits in
    shared memory: registers are dearer.
    """
    one = as_float(x, like(rows, 1))
    half = one / as_float(x, like(rows, 2))
    mean = splat(x, one - one)
    m2, total, lost = mean, mean, mean
    n = like(rows, 0)
    while n + 2 <= rows:
        a, b = load(x, i), load(x, i + step)
        share = as_float(x, like(n, 2)) / as_float(x, n + 2)
        shift = decode(x, get_slot(firsts, opaque(thread())))
        a, b = decode(x, a) - shift, decode(x, b) - shift
        if is_double(x):  # merging means rounds too much beside an outlier
            total, lost = add_up(x, total, lost, a)
            total, lost = add_up(x, total, lost, b)
        middle = (a + b) * half
        a, b = a - middle, b - middle
        apart = middle - mean
        mean = fma(apart, share, mean)
        m2 = fma(apart * apart, share * as_float(x, n), fma(b, b, fma(a, a, m2)))
        n = n + 2
        i = i + step * 2
    if n < rows:
        apart = decode(x, load(x, i)) - decode(x, get_slot(firsts, opaque(thread())))
        if is_double(x):
            total, lost = add_up(x, total, lost, apart)
        apart = apart - mean
        share = one / as_float(x, rows)
        mean = fma(apart, share, mean)
        m2 = fma(apart * apart, share * as_float(x, n), m2)
    return mean, m2, close_sum(total, lost)


@inline
def column_again(x, i, step, rows, center, squared):
    """Sum of one column's values less `center`, or of their squares, in float64."""
    total = 0.0
    n = like(rows, 0)
    while n < rows:
        apart = widen(scalar(x, i)) - center
        total = total + (apart * apart if squared else apart)
        i = i + step
        n = opaque(n + 1)
    return total


@inline
def put_centers(x, firsts, channels, L, V, centers):
    """What the sums of a tile's channels are relative to: the first values in `firsts`, or 0."""
    cuda.syncthreads()
    q = thread()
    while q < channels:
        k = q * L
        value = widen(pick(decode(x, get_slot(firsts, holder(k // V))), k % V))
        put(centers, q, value if math.isfinite(value) else 0.0)
        q = opaque(q + threads())
    cuda.syncthreads()


@inline
def put_sums(x, work, at, firsts, number, mean, m2, total, centers, column, L, squared):
    """For each column of a slot, what its `number` values less their center sum to, in `work`.

    Or, if `squared`, their squares. mean, m2 and total are relative to the thread's first slot.
    """
    near = widen(decode(x, get_slot(firsts, opaque(thread())))) - get_columns(x, centers, column, L)
    apart = near
    if is_double(x):
        apart = near + widen(opaque(total)) * (1.0 / number if number > 0.0 else 0.0)
    else:
        apart = near + widen(opaque(mean))
    if squared:
        put_vector(work, at, fma(apart * apart, number, widen(opaque(m2))))
    elif is_double(x):
        put_vector(work, at, fma(near, number, widen(opaque(total))))
    else:
        put_vector(work, at, apart * number)


def stats_columns(storage, aligned, wide):
    V = LANES[storage]
    WORK = THREADS * LANES[storage]
    SPACE = TILE_WIDTH * LANES[storage]  # channels that a tile can have

    def stats_columns(
        x: Address, C: Size, L: Size, K: Size, height: Size, left: Size, rows: Size,
        partials: Address,
    ) -> None:  # fmt: skip
        C, L, K, height = index(C), index(L), index(K), index(height)
        source = pointer(storage, aligned, wide, x)
        part, parts = index(cuda.blockIdx.y), index(cuda.gridDim.y)
        down, tall = index(cuda.threadIdx.y), index(cuda.blockDim.y)
        base, column, columns = tile_columns(K, V)
        first, channels = base // L, columns // L
        centers, work = shared_float64(SPACE), shared_float64(WORK)
        firsts = shared_slots(THREADS)

        # Whole rows of the block; what is left of the last is one value more for some columns.
        begin = smaller(part * index(rows), height)
        whole = smaller(begin + index(rows), height) - begin
        left = index(left) if part == parts - 1 else like(K, 0)
        mine = like(K, 0)
        if column < columns and down < whole:
            mine = (whole - down + tall - 1) // tall
        i, step = element(source, begin + down, K, base + column), element(source, tall, K, 0)
        mean = splat(source, as_float(source, like(K, 0)))
        m2, total = mean, mean
        again = False
        put_slot(firsts, thread(), no_slot())
        if mine > 0:
            put_slot(firsts, thread(), load(source, i))
            mean, m2, total = column_moments(source, i, step, mine, firsts)
            again = doubtful(m2, decode(source, get_slot(firsts, opaque(thread()))))
        put_centers(source, firsts, channels, L, V, centers)
        more = down == 0 and base + column < left

        # Three times over: sums relative to the first values; then, as these may be outliers, all
        # relative to the means that follow, first the squares, then what rounding left of the mean.
        turn = like(K, 0)
        while turn < 3:
            squared = turn == 1
            at = down * columns + column
            if column < columns:
                put_sums(
                    source, work, at, firsts, as_float64(mine), mean, m2, total, centers, column, L,
                    squared,
                )  # fmt: skip
                j = like(K, 0)
                while (again or more) and j < V:
                    value, center = get(work, at + j), get(centers, (column + j) // L)
                    if again:
                        # Where they are is found anew: it is rare, and would take registers.
                        i = element(source, opaque(begin) + down, K, base + column + j)
                        step = element(source, tall, K, 0)
                        value = column_again(source, i, step, mine, center, squared)
                    if more and base + column + j < left:
                        own = scalar(source, element(source, height, K, base + column + j))
                        apart = widen(own) - center
                        value = value + (apart * apart if squared else apart)
                    put(work, at + j, value)
                    j = opaque(j + 1)
            tile_sums(source, work, columns, tall, L)
            q = thread()
            while q < channels:
                c = first + q
                count = as_float64((whole + 1 if c * L < left else whole) * L)
                found = get(work, q * L)
                copies = K // (C * L)
                chunk = chunk_of(c, C, copies, part, parts) * 4
                if turn == 0:
                    moved = get(centers, q) + (found / count if count > 0.0 else 0.0)
                    put(centers, q, moved if math.isfinite(moved) else get(centers, q))
                elif squared:
                    store_float64(partials, chunk + COUNT, count)
                    store_float64(partials, chunk + CENTER, get(centers, q))
                    store_float64(partials, chunk + M2, found)
                else:
                    store_float64(partials, chunk + SUM, found)
                q = opaque(q + threads())
            cuda.syncthreads()
            turn = opaque(turn + 1)

    return stats_columns
