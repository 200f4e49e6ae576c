"""Sums over the batch, of planes: x[(n * C + c) * L + l].

Planes that follow each other are gone through as one: a vector goes on from one into the next, its
lanes counting for the one or the other. Lanes are numbered from where the row of planes begins, so
that whichever channel one starts with, its values are added up in the same order.
"""

from typing import Any, NamedTuple

import numpy as np

from numbabn.cpu.lane_sums import sum_sixteen, sum_sixteen_of_pairs, sum_two
from numbabn.cpu.memory import (
    aligned,
    load,
    load_first,
    load_upto,
    offset,
    pointer,
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
from numbabn.cpu.short_planes import along_short_planes, keep_sums
from numbabn.cpu.vector import (
    LANES,
    blend,
    fma,
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
LONG_PLANE = 256
# Planes shorter than this are summed two rows at a time: less is to be done per plane.
VERY_SHORT_PLANE = 128
# Scratch for 16 channels: lanes of two sums each, then their centers and the two sums.
PLANE_WORK = 2 * LANES * LANES + 3 * LANES
PLANE_FEW = 2 * LANES * LANES


class PlaneScratch(NamedTuple):
    """Pointers to scratch memory on boundaries, for the two sums of up to 16 channels.

    `few` has room for 16 lanes of either for each channel, in the type that is computed with: what
    a row of short planes adds up to, or two. `work`, in float64, holds what all rows do: of long
    planes the same, of short ones 8 lanes, two channels to a vector (see `fold`).
    """

    few: Any
    work: Any


@inline
def plane_scratch(few, work):
    """In buffers for `PLANE_FEW` and `PLANE_WORK` numbers and 16 more."""
    return PlaneScratch(aligned(pointer(few)), aligned(pointer(work)))


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
    """Whether they are so short that two rows are taken at once, for less to be done per plane."""
    return L < VERY_SHORT_PLANE


@inline
def kept(lanes, fresh):
    """The 16 lanes of both sums of a channel of long planes; zero if `fresh`."""
    if fresh:
        return splat64(0.0), splat64(0.0)
    return load(lanes, 0), load(lanes, LANES)


@inline
def fold(scratch, fresh):
    """Add what `few` holds of 16 channels to `work`; that begins with nothing if `fresh`.

    Halving the lanes first, of two channels at once, halves what there is to widen and add.
    """
    half = LANES // 2
    if fresh:
        for pair in range(half):
            total, squares = folded_pair(scratch.few, pair)
            store(scratch.work, pair * LANES, total)
            store(scratch.work, (half + pair) * LANES, squares)
    else:
        for pair in range(half):
            total, squares = folded_pair(scratch.few, pair)
            store(scratch.work, pair * LANES, load(scratch.work, pair * LANES) + total)
            at = (half + pair) * LANES
            store(scratch.work, at, load(scratch.work, at) + squares)


@inline
def folded_pair(few, pair):
    """Both sums of two channels, 8 lanes of either."""
    first = offset(few, pair * 4 * LANES)
    return widen(sum_two(first, 2 * LANES)), widen(sum_two(offset(first, LANES), 2 * LANES))


@inline
def both_sums(work, folded):
    """The two sums of each of 16 channels, from their lanes; these were `folded` or not."""
    if folded:
        return sum_sixteen_of_pairs(work), sum_sixteen_of_pairs(offset(work, LANES // 2 * LANES))
    return sum_sixteen(work, 2 * LANES), sum_sixteen(offset(work, LANES), 2 * LANES)


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


@inline
def singles_before(i, turn, K):
    """Up to where vectors are added one by one: eight are left of a plane that has so many."""
    if K is None:  # noqa: SIM102 - see `head_of`
        if i + 8 * LANES <= turn:
            return turn - 8 * LANES
    return turn


class Centered(NamedTuple):
    """Pointers to x and to the channels' centers; elements `ahead` are asked for, unless 0."""

    x: Any
    centers: Any
    ahead: Any


@inline
def center_at(data, j):
    """Channel j's center, in all lanes.

    Looked up anew for each plane, not kept from the last: then LLVM knows that lanes are equal.
    """
    return splat_like(data.x, data.centers[j])


@inline
def add_first(data, i, K, lane, center, total, squares):
    """Add the vector whose first elements lie before x[i]."""
    return add_vector(data.x, i - lane, K, center, total, squares)


@inline
def add_one(data, i, K, center, total, squares):
    ask_planes(data.x, i, K, data.ahead)
    return add_vector(data.x, i, K, center, total, squares)


@inline
def add_whole(data, i, K, turn, center, total, squares):
    """Add whole vectors of a plane that ends at `turn`; returns how far they go as well."""
    singles = singles_before(i, turn, K)
    while i + LANES <= singles:
        total, squares = add_one(data, i, K, center, total, squares)
        i += LANES
    if K is None:  # noqa: SIM102 - see `head_of`
        if singles < turn:  # one chain of roundings less than if these came first
            ask_eight(data.x, i, LANES, data.ahead)
            eight, eight_squares = add_eight(data.x, i, LANES, LANES, center, None)
            total = total + eight
            squares = squares + eight_squares
            i += 8 * LANES
    return i, total, squares


@inline
def add_last(data, i, K, count, center, total, squares):
    return add_part(data.x, i, K, count, center, total, squares)


# The two sums are those of ``d = x - center`` and of ``d * d``.
add_short_planes = along_short_planes(center_at, blend, add_first, add_whole, add_one, add_last)


@function
def add_long_plane(x, i, end, center, ahead, fresh, lanes):
    """Add elements i:end of one channel to its two sums, 16 lanes of either; nothing if `fresh`."""
    center = splat_like(x, center)
    total, squares = kept(lanes, fresh)
    while i + 8 * LANES <= end:
        ask_eight(x, i, LANES, ahead)
        eight, eight_squares = add_eight(x, i, LANES, LANES, center, None)
        total = total + widen(eight)
        squares = squares + widen(eight_squares)
        i += 8 * LANES
    few, few_squares = splat_like(x, 0.0), splat_like(x, 0.0)
    while i + LANES <= end:
        ask_planes(x, i, None, ahead)
        few, few_squares = add_vector(x, i, None, center, few, few_squares)
        i += LANES
    if i < end:
        few, few_squares = add_part(x, i, None, end - i, center, few, few_squares)
    keep_sums(lanes, 0, total + widen(few), squares + widen(few_squares))


@inline
def plane_sums(x, C, L, c0, c1, n0, n1, l0, l1, centers, reach, scratch):
    """The two sums over rows n0:n1, columns l0:l1 of each of channels c0:c1: vectors of them."""
    together = go_together(L, l0, l1)
    n = n0
    while n < n1:
        i, ahead, fresh = (n * C + c0) * L, reach_from(reach, n), n == n0
        if together:
            lane, data = (c0 * L) % LANES, Centered(x, centers, ahead)
            if in_pairs(L) and n + 2 <= n1:
                add_short_planes(data, i, C * L, L, c1 - c0, lane, scratch.few)
                n += 1
            else:
                add_short_planes(data, i, None, L, c1 - c0, lane, scratch.few)
            fold(scratch, fresh)
        else:
            for j in range(c1 - c0):
                first, lanes = i + j * L, offset(scratch.work, j * 2 * LANES)
                add_long_plane(x, first + l0, first + l1, centers[j], ahead, fresh, lanes)
        n += 1
    return both_sums(scratch.work, together)


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
def plane_chunk(x, C, L, c0, c1, k, n0, n1, l0, l1, reach, scratch, partials, at):
    """Statistics of the k-th chunk of channels c0:c1, into `partials` from place `at` on.

    The chunk is rows n0:n1, columns l0:l1.
    """
    centers = offset(scratch.work, 2 * LANES * LANES)
    totals, squares = offset(centers, LANES), offset(centers, 2 * LANES)
    count = np.float64((n1 - n0) * (l1 - l0))
    if c1 - c0 == LANES and not is_double(x):
        put_centers(x, c0 * L, L, centers)
    else:
        for c in range(c0, c1):
            centers[c - c0] = center_of(x, c * L)
    total, square = plane_sums(x, C, L, c0, c1, n0, n1, l0, l1, centers, reach, scratch)
    if is_double(x):
        mean = total * splat64(1.0 / count)
        store(centers, 0, load(centers, 0) + where_finite(total, mean, splat64(0.0)))
        total, square = plane_sums(x, C, L, c0, c1, n0, n1, l0, l1, centers, reach, scratch)
    lanes = c1 - c0
    exact = exact_lanes(count, total, square)
    if not (is_double(x) or all_lanes(exact, lanes)):
        store(totals, 0, total)
        store(squares, 0, square)
        for j in range(lanes):
            if not (exact >> np.uint16(j)) & np.uint16(1):
                totals[j], squares[j] = wide_sums(x, C, L, c0 + j, n0, n1, l0, l1, centers[j])
        total, square = load(totals, 0), load(squares, 0)
    put_chunk(count, load(centers, 0), total, square, partials, k, at, lanes)
