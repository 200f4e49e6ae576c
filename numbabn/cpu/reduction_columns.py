"""Sums over the batch, of columns: x[m * K + k], K = C * L, column k being channel k // L's."""

from typing import NamedTuple

import numpy as np

from numbabn.cpu.channels import lanes_at
from numbabn.cpu.memory import (
    load,
    load_first,
    load_upto,
    offset,
    scalar,
    store,
    values_in,
)
from numbabn.cpu.options import function, inline
from numbabn.cpu.reductions import (
    FIRST_VALUES,
    add_eight,
    all_lanes,
    as_summed,
    ask_eight,
    exact_lanes,
    put_chunk,
)
from numbabn.cpu.vector import (
    LANES,
    blend,
    fma,
    is_double,
    keep,
    narrow_like,
    splat64,
    splat_like,
    sum_lanes,
    where_finite,
    widen,
)


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


class Ahead(NamedTuple):
    """How many elements of rows to fetch ahead, 0 of what is near; never from row `stop` on.

    There other arrays may begin, which another thread is writing.
    """

    elements: int
    stop: int


@inline
def rows_ahead(ahead, width, together):
    """How many rows of `width` columns that makes, where so many are read `together`."""
    bunch = together * width
    return together * ((ahead.elements + bunch - 1) // bunch)


@inline
def ahead_of(ahead, elements, K, row):
    """So many `elements` if there are as many, in rows of K, from `row` on; else 0."""
    return elements if row * K + elements <= ahead.stop * K else 0


@inline
def at_first(numbers, j, fresh):
    """The running sums of columns j:j+16; zero if `fresh`."""
    if fresh:
        return splat64(0.0)
    return load(numbers, j)


@inline
def add_strip(x, i, K, rows, ahead, j, count, shifts, fresh, sums, squares, wide):
    """Add `count` lanes of rows, the first at x[i], to the running sums of columns j:j+16."""
    shift, zero = load(shifts, j), splat_like(x, 0.0)
    center = as_summed(wide, narrow_like(x, shift))
    before, before_squares = at_first(sums, j, fresh), at_first(squares, j, fresh)
    total, total_squares = before, before_squares
    while rows >= 8:
        ask_eight(x, i, K, ahead)
        eight, eight_squares = add_eight(x, i, K, count, center, wide)
        total, total_squares = total + widen(eight), total_squares + widen(eight_squares)
        i += 8 * K
        rows -= 8
    while rows > 0:
        d = widen(load_upto(x, i, count, zero)) - shift
        total, total_squares = total + d, fma(d, d, total_squares)
        i += K
        rows -= 1
    if count < LANES:
        total = blend(count, total, before)
        total_squares = blend(count, total_squares, before_squares)
    store(sums, j, total)
    store(squares, j, total_squares)


# Rows of columns that are gone through for one vector of columns before the next. Those that are
# near: of twice as many, hardware prefetchers take rows beyond the last, which belong to other
# arrays, and take these from the thread that writes them (measured: 196 rows of 512 columns, 28 to
# 71 us instead of 14). Half as many where they are far, and hints run a strip ahead (12.8 MB:
# 0.8 of the time that strips of 8 take). Only 8 where a strip would be too long for that, and of
# near ones where lines of all rows fall into one set of the fastest cache, which are so many bytes
# apart there (10 cycles a vector instead of 7; elsewhere 4.5 to 6.2 instead of 5.5 to 6.6).
STRIP = 32
SET = 4096


@inline
def strip_of(x, K, width, ahead):
    """How many rows make a strip: a multiple of eight, which are summed at a time."""
    if ahead.elements == 0:
        return STRIP if K % values_in(x, SET) != 0 else 8
    return STRIP // 2 if STRIP // 2 * width <= 2 * ahead.elements else 8


@function
def column_sums(x, K, m0, m1, k0, lead, width, ahead, shifts, sums, squares, wide):
    """Per column of k0:k0+width, sums over rows m0:m1 of ``d = x - shift`` and of ``d * d``.

    A strip of rows at a time, so that the running sums, which are in L1, are touched seldom. `lead`
    of the columns come before the first boundary of 64 bytes.
    """
    lead = min(lead, width)
    whole = width - (width - lead) % LANES
    tall = strip_of(x, K, width, ahead)
    reach = rows_ahead(ahead, width, tall) * K
    m = m0
    while m < m1:
        rows = min(tall, m1 - m)
        i, fresh = m * K + k0, m == m0
        hint = ahead_of(ahead, reach, K, m + rows)
        if lead > 0:
            add_strip(x, i, K, rows, hint, 0, lead, shifts, fresh, sums, squares, wide)
        for j in range(lead, whole, LANES):
            add_strip(x, i + j, K, rows, hint, j, LANES, shifts, fresh, sums, squares, wide)
        if whole < width:
            count = width - whole
            add_strip(x, i + whole, K, rows, hint, whole, count, shifts, fresh, sums, squares, wide)
        m += rows


@inline
def fold_all(sums, channels, L):
    """``sums[c]`` = the sum over the L columns of channel c; channel by channel, in place."""
    if L > 1:
        for c in range(channels):
            sums[c] = fold(sums, c, L)


@inline
def centers_from(x, M):
    """How many rows the centers are the mean of: a power of two, so that equal values have theirs.

    One where values are float64, whose sums do not depend on it much.
    """
    rows = 1
    while not is_double(x) and rows < FIRST_VALUES and 2 * rows <= M:
        rows *= 2
    return rows


@inline
def mean_of_eight(x, i, K, count):
    """The mean of eight rows' `count` lanes from x[i] on: so added that equal values have theirs.

    As they are scaled first, no sum is infinite that need not be.
    """
    part, zero = splat_like(x, 1.0 / FIRST_VALUES), splat_like(x, 0.0)
    a = load_upto(x, i, count, zero) * part
    b = load_upto(x, i + 2 * K, count, zero) * part
    c = load_upto(x, i + 4 * K, count, zero) * part
    d = load_upto(x, i + 6 * K, count, zero) * part
    a = fma(load_upto(x, i + K, count, zero), part, a)
    b = fma(load_upto(x, i + 3 * K, count, zero), part, b)
    c = fma(load_upto(x, i + 5 * K, count, zero), part, c)
    d = fma(load_upto(x, i + 7 * K, count, zero), part, d)
    return (a + b) + (c + d)


@inline
def take_centers(x, C, L, c0, c1, rows, centers):
    """The mean of the first value in each of the first rows, of channels c0:c1; 0 if not finite.

    It is rounded to the type that `x` is computed with.
    """
    K = C * L
    part, zero = splat64(1.0 / rows), splat64(0.0)
    for c in range(0, c1 - c0, LANES):
        lanes = lanes_at(c, c1 - c0)
        if L == 1 and rows == FIRST_VALUES:
            total = widen(mean_of_eight(x, c0 + c, K, lanes))
        else:
            total = zero
            for row in range(rows):
                for j in range(lanes):
                    centers[c + j] = scalar(x, row * K + (c0 + c + j) * L)
                total = total + load(centers, c)
            total = widen(narrow_like(x, total * part))
        store(centers, c, where_finite(total, total, zero))


@inline
def replace_inexact(count, sums, squares, exact_sums, exact_squares, channels):
    """Take the other sums of the channels that need it: the rest depends on no other channel."""
    for c in range(0, channels, LANES):
        bits = exact_lanes(count, load(sums, c), load(squares, c))
        rest = ~bits
        store(sums, c, keep(load(sums, c), bits) + keep(load(exact_sums, c), rest))
        store(squares, c, keep(load(squares, c), bits) + keep(load(exact_squares, c), rest))


@inline
def put_columns(count, centers, sums, squares, channels, partials, k, at):
    """Store what a chunk summed to; returns whether no channel's sums have lost digits."""
    exact = True
    for c in range(0, channels, LANES):
        lanes = lanes_at(c, channels)
        total, total_squares = load(sums, c), load(squares, c)
        exact &= all_lanes(exact_lanes(count, total, total_squares), lanes)
        put_chunk(count, load(centers, c), total, total_squares, partials, k, at + c, lanes)
    return exact


@function
def column_chunk(
    x, C, L, k, m0, m1, c0, c1, first, centered, lead, ahead, work, space, partials, at
):
    """Statistics of rows m0:m1 of channels c0:c1, into chunk k of `partials`, from place `at` on.

    The mean of the `first` rows is what they are summed relative to. `work` is scratch: six times
    `space` numbers; `centered` if it was used for the same channels last.
    """
    K, channels = C * L, c1 - c0
    width = channels * L
    centers, sums = work, offset(work, space)
    squares, shifts = offset(work, 2 * space), offset(work, 3 * space)
    count = np.float64((m1 - m0) * L)
    if L == 1:
        shifts = centers
    if is_double(x) or not centered:
        take_centers(x, C, L, c0, c1, first, centers)
        if L > 1:
            spread(centers, channels, L, shifts)
    column_sums(x, K, m0, m1, c0 * L, lead, width, ahead, shifts, sums, squares, None)
    if is_double(x):
        for c in range(channels):
            middle = centers[c] + fold(sums, c, L) / count
            centers[c] = middle if np.isfinite(middle) else centers[c]
        if L > 1:
            spread(centers, channels, L, shifts)
        column_sums(x, K, m0, m1, c0 * L, lead, width, ahead, shifts, sums, squares, None)
    fold_all(sums, channels, L)
    fold_all(squares, channels, L)
    exact = put_columns(count, centers, sums, squares, channels, partials, k, at)
    if not (is_double(x) or exact):
        exact_sums, exact_squares = offset(work, 4 * space), offset(work, 5 * space)
        column_sums(
            x, K, m0, m1, c0 * L, lead, width, ahead, shifts, exact_sums, exact_squares, True
        )
        fold_all(exact_sums, channels, L)
        fold_all(exact_squares, channels, L)
        replace_inexact(count, sums, squares, exact_sums, exact_squares, channels)
        put_columns(count, centers, sums, squares, channels, partials, k, at)
