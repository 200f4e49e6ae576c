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
    keep,
    narrow_like,
    positive_bits,
    splat64,
    splat_like,
    sum_lanes,
    where_finite,
    widen,
)


@function
def first_value(x, index):
    """What a channel is summed relative to: its first value, or 0 if that is not finite."""
    value = scalar(x, index)
    return value if np.isfinite(value) else 0.0


# --- planes ---------------------------------------------------------------------------------


class Reach(NamedTuple):
    """How far ahead of row n to fetch: `near` elements if n < `turn`, else `far`."""

    turn: int
    near: int
    far: int


@function
def reach_of(x, N, K, piece):
    """Elements from where one reads to what is read next.

    That is `piece` elements of each of N rows of K, one row after the other, then the next piece.
    """
    ahead = values_ahead(x)
    if 4 * ahead <= piece:
        return Reach(N, ahead, ahead)
    rows = max(2, (ahead + piece - 1) // piece)
    pieces = rows // N
    rows -= pieces * N
    near = rows * K + pieces * piece
    return Reach(N - rows, near, near + piece - N * K)


@inline
def reach_from(reach, n):
    return reach.near if n < reach.turn else reach.far


@inline
def as_summed(wide, value):
    """`value` as it is, or in float64 if `wide` is not None."""
    if wide is None:
        return value
    return widen(value)


@inline
def add_eight(a, b, c, d, e, f, g, h):
    """Eight vectors' sum and sum of squares: short trees, whose rounding errors do not pile up."""
    even = fma(g, g, fma(e, e, fma(c, c, a * a)))
    odd = fma(h, h, fma(f, f, fma(d, d, b * b)))
    return ((a + b) + (c + d)) + ((e + f) + (g + h)), even + odd


@function
def add_planes(x, C, L, c0, c1, n, l0, l1, centers, ahead, fresh, work, wide):
    """Add columns l0:l1 of row n of channels c0:c1 to the 16 lanes of their two sums in `work`.

    Begins with nothing if `fresh`. These are the sums of ``d = x - center`` and of ``d * d``.
    """
    zero = as_summed(wide, splat_like(x, 0.0))
    for c in range(c0, c1):
        fill = splat_like(x, centers[c - c0])
        center = as_summed(wide, fill)
        at = (c - c0) * 2 * LANES
        total, squares = splat64(0.0), splat64(0.0)
        if not fresh:
            total, squares = load(work, at), load(work, at + LANES)
        i = (n * C + c) * L + l0
        end = i + l1 - l0
        while i + 8 * LANES <= end:
            for part in range(8):
                prefetch(x, i + ahead + part * LANES)
            few, few_squares = add_eight(
                as_summed(wide, load(x, i)) - center,
                as_summed(wide, load(x, i + LANES)) - center,
                as_summed(wide, load(x, i + 2 * LANES)) - center,
                as_summed(wide, load(x, i + 3 * LANES)) - center,
                as_summed(wide, load(x, i + 4 * LANES)) - center,
                as_summed(wide, load(x, i + 5 * LANES)) - center,
                as_summed(wide, load(x, i + 6 * LANES)) - center,
                as_summed(wide, load(x, i + 7 * LANES)) - center,
            )
            total = total + widen(few)
            squares = squares + widen(few_squares)
            i += 8 * LANES
        few, few_squares = zero, zero
        while i + LANES <= end:
            prefetch(x, i + ahead)
            d = as_summed(wide, load(x, i)) - center
            few = few + d
            few_squares = fma(d, d, few_squares)
            i += LANES
        if i < end:
            d = as_summed(wide, load_first(x, i, end - i, fill)) - center
            few = few + d
            few_squares = fma(d, d, few_squares)
        store(work, at, total + widen(few))
        store(work, at + LANES, squares + widen(few_squares))


@function
def plane_sums(x, C, L, c0, c1, n0, n1, l0, l1, centers, reach, work, wide):
    """The two sums over rows n0:n1, columns l0:l1 of each of channels c0:c1: lanes in `work`."""
    for n in range(n0, n1):
        ahead = reach_from(reach, n)
        add_planes(x, C, L, c0, c1, n, l0, l1, centers, ahead, n == n0, work, wide)


# Squares of float32 numbers lose digits below this, as their mean.
SMALLEST_SQUARE = 1e-30
# Scratch for 16 channels: lanes of two sums each, then their centers and the two sums.
PLANE_WORK = 2 * LANES * LANES + 3 * LANES
# The most by which the mean of the squares may exceed the variance: it multiplies rounding errors.
MOST_CANCELLED = 16.0


@inline
def exact_lanes(count, total, squares):
    """A bit per lane: the squares stayed in float32's range, and m2 is what is left of their sum.

    So also where a value is NaN: it would be again.
    """
    m2 = squares - total * total * splat64(1.0 / count)
    enough = positive_bits(squares - splat64(SMALLEST_SQUARE * count))
    not_too_much = positive_bits(splat64(1e300) - squares)
    return enough & not_too_much & positive_bits(m2 * splat64(MOST_CANCELLED) - squares)


@inline
def all_lanes(bits, lanes):
    """Whether the first `lanes` of the bits are all set."""
    first = (np.int64(1) << np.int64(lanes)) - 1
    return (np.int64(bits) & first) == first


@inline
def put_chunk(count, center, total, squares, partials, k, at, lanes):
    """Store what a chunk of `lanes` channels summed to."""
    m2 = squares - total * total * splat64(1.0 / count)
    put(partial_of(partials, k, COUNT), at, lanes, splat64(count), False)
    put(partial_of(partials, k, CENTER), at, lanes, center, False)
    put(partial_of(partials, k, SUM), at, lanes, total, False)
    put(partial_of(partials, k, M2), at, lanes, clip_below(m2, splat64(0.0)), False)


@function
def plane_chunk(x, C, L, c0, c1, k, n0, n1, l0, l1, reach, work, partials, at):
    """Statistics of the k-th chunk of channels c0:c1, into `partials` from place `at` on.

    The chunk is rows n0:n1, columns l0:l1. `work` is scratch: `PLANE_WORK` numbers.
    """
    centers = offset(work, 2 * LANES * LANES)
    count = np.float64((n1 - n0) * (l1 - l0))
    for c in range(c0, c1):
        centers[c - c0] = first_value(x, c * L)
    plane_sums(x, C, L, c0, c1, n0, n1, l0, l1, centers, reach, work, None)
    if is_double(x):
        for j in range(c1 - c0):
            total = sum_lanes(load(work, j * 2 * LANES))
            if np.isfinite(total):
                centers[j] += total / count
        plane_sums(x, C, L, c0, c1, n0, n1, l0, l1, centers, reach, work, None)
    lanes, totals, squares = c1 - c0, offset(centers, LANES), offset(centers, 2 * LANES)
    for j in range(lanes):
        totals[j] = sum_lanes(load(work, j * 2 * LANES))
        squares[j] = sum_lanes(load(work, (2 * j + 1) * LANES))
    exact = exact_lanes(count, load(totals, 0), load(squares, 0))
    if not (is_double(x) or all_lanes(exact, lanes)):
        for j in range(lanes):
            if not (exact >> np.uint16(j)) & np.uint16(1):
                c, own = c0 + j, offset(centers, j)
                plane_sums(x, C, L, c, c + 1, n0, n1, l0, l1, own, reach, work, True)
                totals[j] = sum_lanes(load(work, 0))
                squares[j] = sum_lanes(load(work, LANES))
    put_chunk(count, load(centers, 0), load(totals, 0), load(squares, 0), partials, k, at, lanes)


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
def add_eight_rows(x, i, K, ahead, j, count, shifts, sums, squares, wide):
    """Add eight rows, the first at x[i], to the running sums of columns j:j+16."""
    for row in range(8):
        prefetch(x, i + ahead + row * K)
    zero = splat_like(x, 0.0)
    center = as_summed(wide, narrow_like(x, load(shifts, j)))
    total, total_squares = add_eight(
        as_summed(wide, load_upto(x, i, count, zero)) - center,
        as_summed(wide, load_upto(x, i + K, count, zero)) - center,
        as_summed(wide, load_upto(x, i + 2 * K, count, zero)) - center,
        as_summed(wide, load_upto(x, i + 3 * K, count, zero)) - center,
        as_summed(wide, load_upto(x, i + 4 * K, count, zero)) - center,
        as_summed(wide, load_upto(x, i + 5 * K, count, zero)) - center,
        as_summed(wide, load_upto(x, i + 6 * K, count, zero)) - center,
        as_summed(wide, load_upto(x, i + 7 * K, count, zero)) - center,
    )
    store(sums, j, load(sums, j) + widen(total))
    store(squares, j, load(squares, j) + widen(total_squares))


@function
def column_sums(x, K, m0, m1, k0, width, shifts, sums, squares, wide):
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
            add_eight_rows(x, i + j, K, ahead, j, LANES, shifts, sums, squares, wide)
        if whole < width:
            count = width - whole
            add_eight_rows(x, i + whole, K, ahead, whole, count, shifts, sums, squares, wide)
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


@inline
def take_centers(x, C, L, c0, c1, centers):
    """The first value of each of channels c0:c1, or 0: see `first_value`."""
    if L == 1:
        for c in range(0, c1 - c0, LANES):
            first = widen(load_upto(x, c0 + c, c1 - c0 - c, splat_like(x, 0.0)))
            store(centers, c, where_finite(first, first, splat64(0.0)))
    else:
        for c in range(c1 - c0):
            centers[c] = first_value(x, (c0 + c) * L)


@inline
def all_exact(count, sums, squares, channels):
    """Whether no channel's sums, which are folded, have lost digits."""
    exact = True
    for c in range(0, channels, LANES):
        bits = exact_lanes(count, load(sums, c), load(squares, c))
        exact &= all_lanes(bits, lanes_at(c, channels))
    return exact


@inline
def replace_inexact(count, sums, squares, exact_sums, exact_squares, channels):
    """Take the other sums of the channels that need it: the rest depends on no other channel."""
    for c in range(0, channels, LANES):
        bits = exact_lanes(count, load(sums, c), load(squares, c))
        rest = ~bits
        store(sums, c, keep(load(sums, c), bits) + keep(load(exact_sums, c), rest))
        store(squares, c, keep(load(squares, c), bits) + keep(load(exact_squares, c), rest))


@function
def column_chunk(x, C, L, k, m0, m1, c0, c1, work, space, partials, at):
    """Statistics of rows m0:m1 of channels c0:c1, into chunk k of `partials`, from place `at` on.

    `work` is scratch: six times `space` numbers.
    """
    K = C * L
    width = (c1 - c0) * L
    shifts, sums = work, offset(work, space)
    squares, centers = offset(work, 2 * space), offset(work, 3 * space)
    count = np.float64((m1 - m0) * L)
    take_centers(x, C, L, c0, c1, centers)
    spread(centers, c1 - c0, L, shifts)
    column_sums(x, K, m0, m1, c0 * L, width, shifts, sums, squares, None)
    if is_double(x):
        for c in range(c1 - c0):
            middle = centers[c] + fold(sums, c, L) / count
            centers[c] = middle if np.isfinite(middle) else centers[c]
        spread(centers, c1 - c0, L, shifts)
        column_sums(x, K, m0, m1, c0 * L, width, shifts, sums, squares, None)
    fold_all(sums, c1 - c0, L)
    fold_all(squares, c1 - c0, L)
    if not (is_double(x) or all_exact(count, sums, squares, c1 - c0)):
        exact_sums, exact_squares = offset(work, 4 * space), offset(work, 5 * space)
        column_sums(x, K, m0, m1, c0 * L, width, shifts, exact_sums, exact_squares, True)
        fold_all(exact_sums, c1 - c0, L)
        fold_all(exact_squares, c1 - c0, L)
        replace_inexact(count, sums, squares, exact_sums, exact_squares, c1 - c0)
    for c in range(0, c1 - c0, LANES):
        lanes = lanes_at(c, c1 - c0)
        put_chunk(
            count, load(centers, c), load(sums, c), load(squares, c), partials, k, at + c, lanes
        )
