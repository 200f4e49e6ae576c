"""Sums over the batch, of columns: x[m * K + k], K = C * L, column k being channel k // L's."""

import numpy as np

from numbabn.cpu.channels import lanes_at
from numbabn.cpu.memory import (
    load,
    load_first,
    load_upto,
    offset,
    scalar,
    store,
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


@inline
def rows_ahead(ahead, width, together):
    """How many rows of `width` columns make `ahead` elements, where so many are read `together`."""
    bunch = together * width
    return together * ((ahead + bunch - 1) // bunch)


@inline
def add_row(x, i, j, count, shifts, sums, squares):
    """Add `count` lanes of one row to the running sums of columns j:j+16."""
    d = widen(load_upto(x, i, count, splat_like(x, 0.0))) - load(shifts, j)
    if count < LANES:
        d = blend(count, d, splat64(0.0))
    store(sums, j, load(sums, j) + d)
    store(squares, j, fma(d, d, load(squares, j)))


@inline
def add_eight_rows(x, i, K, ahead, j, count, shifts, sums, squares, wide):
    """Add eight rows, the first at x[i], to the running sums of columns j:j+16."""
    ask_eight(x, i, K, ahead)
    center = as_summed(wide, narrow_like(x, load(shifts, j)))
    total, total_squares = add_eight(x, i, K, count, center, wide)
    if count < LANES:
        zero = as_summed(wide, splat_like(x, 0.0))
        total, total_squares = blend(count, total, zero), blend(count, total_squares, zero)
    store(sums, j, load(sums, j) + widen(total))
    store(squares, j, load(squares, j) + widen(total_squares))


@function
def column_sums(x, K, m0, m1, k0, lead, width, ahead, shifts, sums, squares, wide):
    """Per column of k0:k0+width, sums over rows m0:m1 of ``d = x - shift`` and of ``d * d``.

    Eight rows at a time, so that the running sums, which are in L1, are touched seldom. `lead` of
    the columns come before the first boundary of 64 bytes.
    """
    for j in range(0, width, LANES):
        store(sums, j, splat64(0.0))
        store(squares, j, splat64(0.0))
    lead = min(lead, width)
    whole = width - (width - lead) % LANES
    ahead = rows_ahead(ahead, width, 8) * K
    m = m0
    while m + 8 <= m1:
        i = m * K + k0
        if lead > 0:
            add_eight_rows(x, i, K, ahead, 0, lead, shifts, sums, squares, wide)
        for j in range(lead, whole, LANES):
            add_eight_rows(x, i + j, K, ahead, j, LANES, shifts, sums, squares, wide)
        if whole < width:
            count = width - whole
            add_eight_rows(x, i + whole, K, ahead, whole, count, shifts, sums, squares, wide)
        m += 8
    while m < m1:
        i = m * K + k0
        if lead > 0:
            add_row(x, i, 0, lead, shifts, sums, squares)
        for j in range(lead, whole, LANES):
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
def centers_from(x, M):
    """How many rows the centers are the mean of: a power of two, so that equal values have theirs.

    One where values are float64, whose sums do not depend on it much.
    """
    rows = 1
    while not is_double(x) and rows < FIRST_VALUES and 2 * rows <= M:
        rows *= 2
    return rows


@inline
def take_centers(x, C, L, c0, c1, rows, centers):
    """The mean of the first value in each of the first rows, of channels c0:c1; 0 if not finite.

    It is rounded to the type that `x` is computed with.
    """
    K = C * L
    part, zero = splat64(1.0 / rows), splat64(0.0)
    for c in range(0, c1 - c0, LANES):
        lanes = lanes_at(c, c1 - c0)
        total = zero
        for row in range(rows):
            i = row * K + (c0 + c) * L
            if L == 1:
                total = total + widen(load_upto(x, i, lanes, splat_like(x, 0.0)))
            else:
                for j in range(lanes):
                    centers[c + j] = scalar(x, i + j * L)
                total = total + load(centers, c)
        total = widen(narrow_like(x, total * part))
        store(centers, c, where_finite(total, total, zero))


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
def column_chunk(x, C, L, k, m0, m1, c0, c1, first, lead, ahead, work, space, partials, at):
    """Statistics of rows m0:m1 of channels c0:c1, into chunk k of `partials`, from place `at` on.

    The mean of the `first` rows is what they are summed relative to. `work` is scratch: six times
    `space` numbers.
    """
    K = C * L
    width = (c1 - c0) * L
    shifts, sums = work, offset(work, space)
    squares, centers = offset(work, 2 * space), offset(work, 3 * space)
    count = np.float64((m1 - m0) * L)
    take_centers(x, C, L, c0, c1, first, centers)
    spread(centers, c1 - c0, L, shifts)
    column_sums(x, K, m0, m1, c0 * L, lead, width, ahead, shifts, sums, squares, None)
    if is_double(x):
        for c in range(c1 - c0):
            middle = centers[c] + fold(sums, c, L) / count
            centers[c] = middle if np.isfinite(middle) else centers[c]
        spread(centers, c1 - c0, L, shifts)
        column_sums(x, K, m0, m1, c0 * L, lead, width, ahead, shifts, sums, squares, None)
    fold_all(sums, c1 - c0, L)
    fold_all(squares, c1 - c0, L)
    if not (is_double(x) or all_exact(count, sums, squares, c1 - c0)):
        exact_sums, exact_squares = offset(work, 4 * space), offset(work, 5 * space)
        column_sums(
            x, K, m0, m1, c0 * L, lead, width, ahead, shifts, exact_sums, exact_squares, True
        )
        fold_all(exact_sums, c1 - c0, L)
        fold_all(exact_squares, c1 - c0, L)
        replace_inexact(count, sums, squares, exact_sums, exact_squares, c1 - c0)
    for c in range(0, c1 - c0, LANES):
        lanes = lanes_at(c, c1 - c0)
        put_chunk(
            count, load(centers, c), load(sums, c), load(squares, c), partials, k, at + c, lanes
        )
