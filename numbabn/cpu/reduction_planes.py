"""Sums over the batch, of planes: x[(n * C + c) * L + l].

Planes that follow each other are gone through as one: a vector goes on from one into the next, its
lanes counting for the one or the other. Lanes are numbered from where the row of planes begins, so
that whichever channel one starts with, its values are added up in the same order.
"""

from typing import NamedTuple

import numpy as np

from numbabn.cpu.memory import load, load_first, offset, prefetch, store, values_ahead
from numbabn.cpu.options import function, inline
from numbabn.cpu.reductions import (
    add_eight,
    all_lanes,
    as_summed,
    exact_lanes,
    first_value,
    put_chunk,
)
from numbabn.cpu.vector import (
    LANES,
    blend,
    fma,
    halve_2,
    halve_4,
    halve_8,
    halve_16,
    is_double,
    splat64,
    splat_like,
    sum_lanes,
    widen,
)

# Planes shorter than this are gone through together.
LONG_PLANE = 1024
# Scratch for 16 channels: lanes of two sums each, then their centers and the two sums.
PLANE_WORK = 2 * LANES * LANES + 3 * LANES


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
def go_together(L, l0, l1):
    """Whether columns l0:l1 of planes of L are gone through as one."""
    return l1 - l0 == L and LANES <= L < LONG_PLANE


@inline
def kept(work, j, fresh):
    """The 16 lanes of both sums of channel j, from `work`; zero if `fresh`."""
    if fresh:
        return splat64(0.0), splat64(0.0)
    return load(work, j * 2 * LANES), load(work, (2 * j + 1) * LANES)


@function
def add_planes(x, i, L, channels, lane, centers, ahead, fresh, work, wide):
    """Add planes of L elements from x[i] on, one of each channel, to their two sums in `work`.

    Those are the sums of ``d = x - center`` and of ``d * d``, in 16 lanes each; they begin with
    nothing if `fresh`. The first plane begins in the middle of a vector if `lane` is not 0.
    """
    zero = as_summed(wide, splat_like(x, 0.0))
    fill = splat_like(x, centers[0])
    center = as_summed(wide, fill)
    turn = i + L
    few, few_squares = zero, zero
    if lane > 0:
        d = blend(lane, zero, as_summed(wide, load(x, i - lane)) - center)
        few, few_squares = d, d * d
        i += LANES - lane
    for j in range(channels):
        total, squares = kept(work, j, fresh)
        while i + 8 * LANES <= turn:
            for part in range(8):
                prefetch(x, i + ahead + part * LANES)
            eight, eight_squares = add_eight(
                as_summed(wide, load(x, i)) - center,
                as_summed(wide, load(x, i + LANES)) - center,
                as_summed(wide, load(x, i + 2 * LANES)) - center,
                as_summed(wide, load(x, i + 3 * LANES)) - center,
                as_summed(wide, load(x, i + 4 * LANES)) - center,
                as_summed(wide, load(x, i + 5 * LANES)) - center,
                as_summed(wide, load(x, i + 6 * LANES)) - center,
                as_summed(wide, load(x, i + 7 * LANES)) - center,
            )
            total = total + widen(eight)
            squares = squares + widen(eight_squares)
            i += 8 * LANES
        while i + LANES <= turn:
            prefetch(x, i + ahead)
            d = as_summed(wide, load(x, i)) - center
            few = few + d
            few_squares = fma(d, d, few_squares)
            i += LANES
        rest = turn - i
        next_few, next_squares = zero, zero
        if j + 1 < channels:
            fill = splat_like(x, centers[j + 1])
            next_center = as_summed(wide, fill)
            if rest > 0:
                prefetch(x, i + ahead)
                value = as_summed(wide, load(x, i))
                d = blend(rest, value - center, zero)
                few = few + d
                few_squares = fma(d, d, few_squares)
                next_few = blend(rest, zero, value - next_center)
                next_squares = next_few * next_few
                i += LANES
            center = next_center
        elif rest > 0:
            d = as_summed(wide, load_first(x, i, rest, fill)) - center
            few = few + d
            few_squares = fma(d, d, few_squares)
        store(work, j * 2 * LANES, total + widen(few))
        store(work, (2 * j + 1) * LANES, squares + widen(few_squares))
        few, few_squares = next_few, next_squares
        turn += L


@function
def plane_sums(x, C, L, c0, c1, n0, n1, l0, l1, centers, reach, work, wide):
    """The two sums over rows n0:n1, columns l0:l1 of each of channels c0:c1: lanes in `work`."""
    for n in range(n0, n1):
        ahead = reach_from(reach, n)
        if go_together(L, l0, l1):
            i, lane = (n * C + c0) * L, (c0 * L) % LANES
            add_planes(x, i, L, c1 - c0, lane, centers, ahead, n == n0, work, wide)
        else:
            for j in range(c1 - c0):
                i = (n * C + c0 + j) * L + l0
                own, lanes = offset(centers, j), offset(work, j * 2 * LANES)
                add_planes(x, i, l1 - l0, 1, 0, own, ahead, n == n0, lanes, wide)


@inline
def sum_two(lanes, step):
    return halve_16(load(lanes, 0), load(lanes, step))


@inline
def sum_four(lanes, step):
    return halve_8(sum_two(lanes, step), sum_two(offset(lanes, 2 * step), step))


@inline
def sum_eight(lanes, step):
    return halve_4(sum_four(lanes, step), sum_four(offset(lanes, 4 * step), step))


@inline
def sum_sixteen(lanes, step):
    """`sum_lanes` of sixteen vectors, which begin `step` numbers after each other."""
    return halve_2(sum_eight(lanes, step), sum_eight(offset(lanes, 8 * step), step))


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
    store(totals, 0, sum_sixteen(work, 2 * LANES))
    store(squares, 0, sum_sixteen(offset(work, LANES), 2 * LANES))
    exact = exact_lanes(count, load(totals, 0), load(squares, 0))
    if not (is_double(x) or all_lanes(exact, lanes)):
        for j in range(lanes):
            if not (exact >> np.uint16(j)) & np.uint16(1):
                c, own = c0 + j, offset(centers, j)
                plane_sums(x, C, L, c, c + 1, n0, n1, l0, l1, own, reach, work, True)
                totals[j] = sum_lanes(load(work, 0))
                squares[j] = sum_lanes(load(work, LANES))
    put_chunk(count, load(centers, 0), load(totals, 0), load(squares, 0), partials, k, at, lanes)
