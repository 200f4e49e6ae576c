"""Sums over the batch: the statistics of each chunk of each channel.

Both views are cut into chunks by `schedule`, from the shape alone; a chunk of a channel sums to
one entry of `partials` (see `channels`), whoever computes it. float32 and 16-bit values are
widened and summed in float64 lanes, relative to the channel's first value, which makes one pass
enough: squares neither overflow nor cancel. float64 values take a second pass over the chunk,
about the chunk's own mean, while the chunk is in cache.

`x` is a pointer. Planes: x[(n * C + c) * L + l]. Columns: x[m * K + k], K = C * L, where column k
belongs to channel k // L.
"""

from typing import NamedTuple

import numpy as np

from numbabn.cpu.channels import CENTER, COUNT, M2, SUM, lanes_at, partial_of
from numbabn.cpu.memory import (
    load,
    load_first,
    load_upto,
    offset,
    prefetch,
    put,
    scalar,
    store,
    values_ahead,
)
from numbabn.cpu.options import function, inline
from numbabn.cpu.vector import (
    LANES,
    clip_below,
    fma,
    is_double,
    narrow_like,
    splat64,
    splat_like,
    sum_lanes,
    widen,
)


@function
def first_value(x, index):
    """What a channel is summed relative to: its first value, or 0 if that is not finite."""
    value = scalar(x, index)
    return value if np.isfinite(value) else 0.0


# --- planes ---------------------------------------------------------------------------------


class Reach(NamedTuple):
    """How far ahead of row n of a channel to fetch: `near` if n < `turn`, else `far`."""

    turn: int
    near: int
    far: int


@function
def reach_of(x, N, C, L):
    """Elements from where one reads to what is read next, channel after channel, row after row."""
    ahead = values_ahead(x)
    if 4 * ahead <= L:
        return Reach(N, ahead, ahead)
    rows = max(2, (ahead + L - 1) // L)
    channels = rows // N
    rows -= channels * N
    near = rows * C * L + channels * L
    return Reach(N - rows, near, near + L - N * C * L)


@inline
def reach_from(reach, n):
    return reach.near if n < reach.turn else reach.far


@function
def plane_sums(x, C, L, c, n0, n1, l0, l1, shift, reach):
    """Sums of ``d = x - shift`` and of ``d * d`` over rows n0:n1, columns l0:l1 of a channel."""
    center = splat64(shift)
    fill = splat_like(x, shift)
    total_a = splat64(0.0)
    total_b = splat64(0.0)
    squares_a = splat64(0.0)
    squares_b = splat64(0.0)
    for n in range(n0, n1):
        i = (n * C + c) * L + l0
        end = i + l1 - l0
        ahead = reach_from(reach, n)
        while i + 2 * LANES <= end:  # two chains of additions, to hide their latency
            prefetch(x, i + ahead)
            prefetch(x, i + ahead + LANES)
            a = widen(load(x, i)) - center
            b = widen(load(x, i + LANES)) - center
            total_a = total_a + a
            total_b = total_b + b
            squares_a = fma(a, a, squares_a)
            squares_b = fma(b, b, squares_b)
            i += 2 * LANES
        if i + LANES <= end:
            a = widen(load(x, i)) - center
            total_a = total_a + a
            squares_a = fma(a, a, squares_a)
            i += LANES
        if i < end:
            b = widen(load_first(x, i, end - i, fill)) - center
            total_b = total_b + b
            squares_b = fma(b, b, squares_b)
    return sum_lanes(total_a + total_b), sum_lanes(squares_a + squares_b)


@function
def plane_chunk(x, C, L, c, k, n0, n1, l0, l1, shift, reach, partials, at):
    """Statistics of a chunk of channel c, its k-th, into place `at` of `partials`.

    The chunk is rows n0:n1, columns l0:l1; values are summed relative to `shift`.
    """
    count = np.float64((n1 - n0) * (l1 - l0))
    total, squares = plane_sums(x, C, L, c, n0, n1, l0, l1, shift, reach)
    if is_double(x) and np.isfinite(total):
        shift += total / count
        total, squares = plane_sums(x, C, L, c, n0, n1, l0, l1, shift, reach)
    m2 = squares - total * total / count
    partial_of(partials, k, COUNT)[at] = count
    partial_of(partials, k, CENTER)[at] = shift
    partial_of(partials, k, SUM)[at] = total
    partial_of(partials, k, M2)[at] = 0.0 if m2 < 0.0 else m2


# --- columns --------------------------------------------------------------------------------


@function
def spread(values, count, L, out):
    """``out[j] = values[j // L]`` for `count` values; may write up to 15 numbers past the last."""
    if L == 1:
        for c in range(0, count, LANES):
            lanes = load_upto(values, c, count - c, splat64(0.0))
            store(out, c, narrow_like(out, lanes))
    else:
        for c in range(count):
            lanes = splat_like(out, values[c])
            for j in range(c * L, (c + 1) * L, LANES):
                store(out, j, lanes)


@function
def fold(sums, c, L):
    """Sum over the L columns of channel c."""
    if L == 1:
        return sums[c]
    zero = splat64(0.0)
    total = zero
    j = c * L
    end = j + L
    while j + LANES <= end:
        total = total + load(sums, j)
        j += LANES
    if j < end:
        total = total + load_first(sums, j, end - j, zero)
    return sum_lanes(total)


@inline
def rows_ahead(x, width, together):
    """How many rows of `width` columns to fetch ahead, where so many are read `together`."""
    bunch = together * width
    return together * ((values_ahead(x) + bunch - 1) // bunch)


@inline
def add_row(x, i, j, count, shifts, sums, squares):
    """Add `count` lanes of one row to the running sums of columns j:j+16."""
    d = widen(load_upto(x, i, count, splat_like(x, 0.0))) - load(shifts, j)
    store(sums, j, load(sums, j) + d)
    store(squares, j, fma(d, d, load(squares, j)))


@inline
def add_eight_rows(x, i, K, ahead, j, count, shifts, sums, squares):
    """Add eight rows, the first at x[i], to the running sums of columns j:j+16."""
    for row in range(8):
        prefetch(x, i + ahead + row * K)
    zero = splat_like(x, 0.0)
    center = load(shifts, j)
    d0 = widen(load_upto(x, i, count, zero)) - center
    d1 = widen(load_upto(x, i + K, count, zero)) - center
    d2 = widen(load_upto(x, i + 2 * K, count, zero)) - center
    d3 = widen(load_upto(x, i + 3 * K, count, zero)) - center
    d4 = widen(load_upto(x, i + 4 * K, count, zero)) - center
    d5 = widen(load_upto(x, i + 5 * K, count, zero)) - center
    d6 = widen(load_upto(x, i + 6 * K, count, zero)) - center
    d7 = widen(load_upto(x, i + 7 * K, count, zero)) - center
    total = ((d0 + d1) + (d2 + d3)) + ((d4 + d5) + (d6 + d7))
    even = fma(d6, d6, fma(d4, d4, fma(d2, d2, d0 * d0)))
    odd = fma(d7, d7, fma(d5, d5, fma(d3, d3, d1 * d1)))
    store(sums, j, load(sums, j) + total)
    store(squares, j, load(squares, j) + (even + odd))


@function
def column_sums(x, K, m0, m1, k0, width, shifts, sums, squares):
    """Per column of k0:k0+width, sums over rows m0:m1 of ``d = x - shift`` and of ``d * d``.

    Eight rows at a time, so that the running sums, which are in L1, are touched seldom. Lanes
    beyond `width` hold nothing of meaning.
    """
    for j in range(0, width, LANES):
        store(sums, j, splat64(0.0))
        store(squares, j, splat64(0.0))
    whole = width - width % LANES
    ahead = rows_ahead(x, width, 8) * K
    m = m0
    while m + 8 <= m1:
        i = m * K + k0
        for j in range(0, whole, LANES):
            add_eight_rows(x, i + j, K, ahead, j, LANES, shifts, sums, squares)
        if whole < width:
            add_eight_rows(x, i + whole, K, ahead, whole, width - whole, shifts, sums, squares)
        m += 8
    while m < m1:
        i = m * K + k0
        for j in range(0, whole, LANES):
            add_row(x, i + j, j, LANES, shifts, sums, squares)
        if whole < width:
            add_row(x, i + whole, whole, width - whole, shifts, sums, squares)
        m += 1


@inline
def fold_all(sums, channels, L):
    """``sums[c]`` = the sum over the L columns of channel c; channel by channel, in place."""
    if L > 1:
        for c in range(channels):
            sums[c] = fold(sums, c, L)


@function
def column_chunk(x, C, L, k, m0, m1, c0, c1, work, space, partials, at):
    """Statistics of rows m0:m1 of channels c0:c1, into chunk k of `partials`, from place `at` on.

    `work` is scratch: four times `space` numbers.
    """
    K = C * L
    width = (c1 - c0) * L
    shifts, sums = work, offset(work, space)
    squares, centers = offset(work, 2 * space), offset(work, 3 * space)
    count = np.float64((m1 - m0) * L)
    for c in range(c1 - c0):
        centers[c] = first_value(x, (c0 + c) * L)
    spread(centers, c1 - c0, L, shifts)
    column_sums(x, K, m0, m1, c0 * L, width, shifts, sums, squares)
    if is_double(x):
        for c in range(c1 - c0):
            middle = centers[c] + fold(sums, c, L) / count
            centers[c] = middle if np.isfinite(middle) else centers[c]
        spread(centers, c1 - c0, L, shifts)
        column_sums(x, K, m0, m1, c0 * L, width, shifts, sums, squares)
    fold_all(sums, c1 - c0, L)
    fold_all(squares, c1 - c0, L)
    for c in range(0, c1 - c0, LANES):
        lanes = lanes_at(c, c1 - c0)
        total = load(sums, c)
        m2 = load(squares, c) - total * total / splat64(count)
        put(partial_of(partials, k, COUNT), at + c, lanes, splat64(count), False)
        put(partial_of(partials, k, CENTER), at + c, lanes, load(centers, c), False)
        put(partial_of(partials, k, SUM), at + c, lanes, total, False)
        put(partial_of(partials, k, M2), at + c, lanes, clip_below(m2, splat64(0.0)), False)
