"""Sums over the batch, of planes: x[(n * C + c) * L + l].

Planes that follow each other are gone through as one: a vector goes on from one into the next, its
lanes counting for the one or the other. Lanes are numbered from where the row of planes begins, so
that whichever channel one starts with, its values are added up in the same order.
"""

from typing import NamedTuple

import numpy as np

from numbabn.cpu.memory import (
    load,
    load_first,
    load_upto,
    offset,
    prefetch,
    scalar,
    store,
)
from numbabn.cpu.options import function, inline
from numbabn.cpu.reductions import (
    add_eight,
    all_lanes,
    ask_eight,
    exact_lanes,
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
    narrow_like,
    positive_bits,
    round_like,
    splat64,
    splat_like,
    sum_lanes,
    where_finite,
    widen,
)

# Planes shorter than this are gone through together.
LONG_PLANE = 1024
# Planes shorter than this are summed two rows at a time: the running sums are touched less often.
VERY_SHORT_PLANE = 128
# Scratch for 16 channels: lanes of two sums each, then their centers and the two sums.
PLANE_WORK = 2 * LANES * LANES + 3 * LANES


class Reach(NamedTuple):
    """How far ahead of row n to fetch: `near` elements if n < `turn`, else `far`; 0 for nothing."""

    turn: int
    near: int
    far: int


@function
def reach_of(ahead, N, K, piece):
    """Elements from where one reads to what is read `ahead` elements later.

    That is `piece` elements of each of N rows of K, one row after the other, then the next piece.
    """
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
def in_pairs(L):
    """Whether they are so short that two rows are taken at once, to touch the sums less often."""
    return L < VERY_SHORT_PLANE


@inline
def kept(work, j, fresh):
    """The 16 lanes of both sums of channel j, from `work`; zero if `fresh`."""
    if fresh:
        return splat64(0.0), splat64(0.0)
    return load(work, j * 2 * LANES), load(work, (2 * j + 1) * LANES)


@inline
def keep_sums(work, j, total, squares):
    """Put them there."""
    store(work, j * 2 * LANES, total)
    store(work, (2 * j + 1) * LANES, squares)


@inline
def add_vector(x, i, K, center, few, few_squares):
    """Add 16 lanes of ``x - center``, and of the next row where K is not None, to the two sums."""
    d = load(x, i) - center
    few_squares = fma(d, d, few_squares)
    if K is not None:  # these two first: chains of roundings are shorter so
        next_d = load(x, i + K) - center
        few_squares = fma(next_d, next_d, few_squares)
        d = d + next_d
    return few + d, few_squares


@inline
def add_part(x, i, K, count, center, few, few_squares):
    """The same for fewer than 16 lanes."""
    d = load_first(x, i, count, center) - center
    few_squares = fma(d, d, few_squares)
    if K is not None:
        next_d = load_first(x, i + K, count, center) - center
        few_squares = fma(next_d, next_d, few_squares)
        d = d + next_d
    return few + d, few_squares


@inline
def ask_planes(x, i, K, ahead):
    if ahead != 0:
        prefetch(x, i + ahead)
        if K is not None:
            prefetch(x, i + K + ahead)


@function
def add_planes(x, i, K, L, channels, lane, centers, ahead, fresh, work):
    """Add planes of L elements from x[i] on, one of each channel, to their two sums in `work`.

    Those are the sums of ``d = x - center`` and of ``d * d``, in 16 lanes each; they begin with
    nothing if `fresh`. The first plane begins in the middle of a vector if `lane` is not 0. Unless
    K is None, the planes of the next row, K elements on, are added with them.
    """
    zero = splat_like(x, 0.0)
    turn = i + L
    few, few_squares = zero, zero
    if lane > 0:
        both, squares = add_vector(x, i - lane, K, splat_like(x, centers[0]), zero, zero)
        few, few_squares = blend(lane, zero, both), blend(lane, zero, squares)
        i += LANES - lane
    for j in range(channels):
        # Looked up anew, not kept from the last turn: then LLVM knows that its lanes are equal.
        center = splat_like(x, centers[j])
        nothing_yet = fresh
        if K is None:  # noqa: SIM102 - see `head_of`
            if i + 8 * LANES <= turn:
                total, squares = kept(work, j, fresh)
                while i + 8 * LANES <= turn:
                    ask_eight(x, i, LANES, ahead)
                    eight, eight_squares = add_eight(x, i, LANES, LANES, center, None)
                    total = total + widen(eight)
                    squares = squares + widen(eight_squares)
                    i += 8 * LANES
                keep_sums(work, j, total, squares)
                nothing_yet = False
        while i + LANES <= turn:
            ask_planes(x, i, K, ahead)
            few, few_squares = add_vector(x, i, K, center, few, few_squares)
            i += LANES
        rest = turn - i
        next_few, next_squares = zero, zero
        if rest > 0:
            if j + 1 < channels:
                ask_planes(x, i, K, ahead)
                # Added up apart from what there is, so that lanes can be told apart, and so at
                # the end, which is the same to the last bit.
                mixed = blend(rest, center, splat_like(x, centers[j + 1]))
                part, part_squares = add_vector(x, i, K, mixed, zero, zero)
                few = few + blend(rest, part, zero)
                few_squares = few_squares + blend(rest, part_squares, zero)
                next_few = blend(rest, zero, part)
                next_squares = blend(rest, zero, part_squares)
                i += LANES
            else:
                part, part_squares = add_part(x, i, K, rest, center, zero, zero)
                few = few + part
                few_squares = few_squares + part_squares
        total, squares = kept(work, j, nothing_yet)
        keep_sums(work, j, total + widen(few), squares + widen(few_squares))
        few, few_squares = next_few, next_squares
        turn += L


@function
def plane_sums(x, C, L, c0, c1, n0, n1, l0, l1, centers, reach, work):
    """The two sums over rows n0:n1, columns l0:l1 of each of channels c0:c1: lanes in `work`."""
    together = go_together(L, l0, l1)
    channels, lane = (c1 - c0, (c0 * L) % LANES) if together else (1, 0)
    n = n0
    while n < n1:
        ahead, fresh = reach_from(reach, n), n == n0
        if together and in_pairs(L) and n + 2 <= n1:
            i = (n * C + c0) * L
            add_planes(x, i, C * L, L, channels, lane, centers, ahead, fresh, work)
            n += 2
        else:
            for j in range(0, c1 - c0, channels):
                i = (n * C + c0 + j) * L + l0
                own, lanes = offset(centers, j), offset(work, j * 2 * LANES)
                add_planes(x, i, None, l1 - l0, channels, lane, own, ahead, fresh, lanes)
            n += 1


@function
def wide_sums(x, C, L, c, n0, n1, l0, l1, center):
    """The two sums of channel c, all in float64: for values whose float32 sums lose digits."""
    shift, total = splat64(center), splat64(0.0)
    squares, fill = total, splat_like(x, center)
    for n in range(n0, n1):
        i = (n * C + c) * L + l0
        end = i + l1 - l0
        while i < end:
            d = widen(load_upto(x, i, end - i, fill)) - shift
            total = total + d
            squares = fma(d, d, squares)
            i += LANES
    return sum_lanes(total), sum_lanes(squares)


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


@inline
def center_of(x, i):
    """The mean of the first 16 values, or the first if they are float64; 0 if not finite.

    Planes are as long as that. It is rounded to the type that `x` is computed with.
    """
    mean = scalar(x, i) if is_double(x) else np.float64(sum_lanes(load(x, i))) * (1.0 / LANES)
    if not (is_double(x) or np.isfinite(mean)):  # their sum may be too large, and they not
        mean = sum_lanes(widen(load(x, i))) * (1.0 / LANES)
    mean = np.float64(round_like(x, mean))
    return mean if np.isfinite(mean) else 0.0


@inline
def put_centers(x, i, L, centers):
    """`center_of` 16 planes that follow each other, of values that are not float64."""
    mean = widen(sum_sixteen(offset(x, i), L)) * splat64(1.0 / LANES)
    store(centers, 0, widen(narrow_like(x, mean)))
    finite = positive_bits(where_finite(mean, splat64(1.0), splat64(0.0)))
    if not all_lanes(finite, LANES):
        for j in range(LANES):
            centers[j] = center_of(x, i + j * L)


@function
def plane_chunk(x, C, L, c0, c1, k, n0, n1, l0, l1, reach, work, partials, at):
    """Statistics of the k-th chunk of channels c0:c1, into `partials` from place `at` on.

    The chunk is rows n0:n1, columns l0:l1. `work` is scratch: `PLANE_WORK` numbers.
    """
    centers = offset(work, 2 * LANES * LANES)
    count = np.float64((n1 - n0) * (l1 - l0))
    if c1 - c0 == LANES and not is_double(x):
        put_centers(x, c0 * L, L, centers)
    else:
        for c in range(c0, c1):
            centers[c - c0] = center_of(x, c * L)
    plane_sums(x, C, L, c0, c1, n0, n1, l0, l1, centers, reach, work)
    if is_double(x):
        for j in range(c1 - c0):
            total = sum_lanes(load(work, j * 2 * LANES))
            if np.isfinite(total):
                centers[j] += total / count
        plane_sums(x, C, L, c0, c1, n0, n1, l0, l1, centers, reach, work)
    lanes, totals, squares = c1 - c0, offset(centers, LANES), offset(centers, 2 * LANES)
    store(totals, 0, sum_sixteen(work, 2 * LANES))
    store(squares, 0, sum_sixteen(offset(work, LANES), 2 * LANES))
    exact = exact_lanes(count, load(totals, 0), load(squares, 0))
    if not (is_double(x) or all_lanes(exact, lanes)):
        for j in range(lanes):
            if not (exact >> np.uint16(j)) & np.uint16(1):
                totals[j], squares[j] = wide_sums(x, C, L, c0 + j, n0, n1, l0, l1, centers[j])
    put_chunk(count, load(centers, 0), load(totals, 0), load(squares, 0), partials, k, at, lanes)
