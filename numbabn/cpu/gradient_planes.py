"""The backward pass over planes; see `gradients`, and `runs` for how elements are gone through."""

from typing import Any, NamedTuple

import numpy as np

from numbabn.cpu.boundaries import elements_past_boundary
from numbabn.cpu.channels import COUNT, GRAD_MEAN, OFFSET, SLOPE, SUM_DY, SUM_DY_XHAT, partial_of
from numbabn.cpu.gradients import (
    Slopes,
    gradient_end,
    gradient_head,
    gradient_part,
    only_read,
    put_gradient,
    put_pair,
    read_pair,
    sum_part,
    with_hints,
)
from numbabn.cpu.memory import offset, put
from numbabn.cpu.normalization import affine_of, blend_affine
from numbabn.cpu.options import function, inline
from numbabn.cpu.reduction_planes import (
    both_sums,
    fold,
    go_together,
    in_pairs,
    kept,
    reach_from,
)
from numbabn.cpu.runs import along_planes, along_rows
from numbabn.cpu.short_planes import along_short_planes, keep_sums
from numbabn.cpu.vector import LANES, blend, fma, splat64, splat_like, widen


@inline
def add_vector(io, i, K, bit, affine, relu, streaming, few, few_products):
    """Add 16 lanes, and of the next row where K is not None, to the two sums, and store them."""
    g, xmu = read_pair(io, i, bit, affine, relu)
    if K is None:
        put_pair(io, i, LANES, g, xmu, affine, None, streaming)
        return few + g, fma(g, xmu * affine.unit, few_products)
    g1, x1 = read_pair(io, i + K, bit, affine, relu)
    put_pair(io, i, LANES, g, xmu, affine, None, streaming)
    put_pair(io, i + K, LANES, g1, x1, affine, None, streaming)
    few_products = fma(g1, x1 * affine.unit, fma(g, xmu * affine.unit, few_products))
    return (few + g) + g1, few_products


@inline
def add_four(io, i, bit, affine, relu, streaming):
    """The two sums of four vectors, which are stored as well; one at a time, for few registers."""
    g, xmu = read_pair(io, i, bit, affine, relu)
    put_pair(io, i, LANES, g, xmu, affine, None, streaming)
    even, even_products = g, g * (xmu * affine.unit)
    g, xmu = read_pair(io, i + LANES, bit + 1, affine, relu)
    put_pair(io, i + LANES, LANES, g, xmu, affine, None, streaming)
    odd, odd_products = g, g * (xmu * affine.unit)
    even, even_products = add_vector(
        io, i + 2 * LANES, None, bit + 2, affine, relu, streaming, even, even_products
    )
    odd, odd_products = add_vector(
        io, i + 3 * LANES, None, bit + 3, affine, relu, streaming, odd, odd_products
    )
    return even + odd, even_products + odd_products


@inline
def add_part(io, i, K, bit, count, affine, relu):
    """The two sums of fewer than 16 lanes, which are stored as well."""
    g, xhat = sum_part(io, i, bit, count, affine, relu)
    if K is None:
        return g, g * xhat
    g1, xhat1 = sum_part(io, i + K, bit, count, affine, relu)
    return g + g1, fma(g1, xhat1, g * xhat)


class Differentiated(NamedTuple):
    """What sums of the backward pass are made of: arrays, and the table of C channels from c on."""

    io: Any
    table: Any
    C: Any
    c: Any
    relu: Any
    streaming: Any


@inline
def affine_from(data, j):
    return affine_of(data.io.x, data.table, data.C, data.c + j)


@inline
def add_first(data, i, K, lane, affine, total, products):
    """Add the vector whose first elements lie before x[i], and are not stored."""
    io, relu, reading = data.io, data.relu, only_read(data.io, None)
    sums = add_vector(reading, i - lane, K, 0, affine, relu, False, total, products)
    # Only now, as what is written may be what was read.
    gradient_part(io, i, 0, LANES - lane, affine, None, relu)
    if K is not None:
        gradient_part(io, i + K, 0, LANES - lane, affine, None, relu)
    return sums


@inline
def add_one(data, i, K, affine, total, products):
    return add_vector(data.io, i, K, 0, affine, data.relu, data.streaming, total, products)


@inline
def add_whole(data, i, K, turn, affine, total, products):
    """Add whole vectors of a plane that ends at `turn`; returns how far they go as well."""
    if K is None:
        while i + 4 * LANES <= turn:
            four, four_products = add_four(data.io, i, 0, affine, data.relu, data.streaming)
            total = total + four
            products = products + four_products
            i += 4 * LANES
    while i + LANES <= turn:
        total, products = add_one(data, i, K, affine, total, products)
        i += LANES
    return i, total, products


@inline
def add_last(data, i, K, count, affine, total, products):
    part, part_products = add_part(data.io, i, K, 0, count, affine, data.relu)
    return total + part, products + part_products


# The two sums are those of g and of ``g * (x - MEAN) * UNIT``; stores what eval mode knows.
add_short_grads = along_short_planes(
    affine_from, blend_affine, add_first, add_whole, add_one, add_last
)


@function
def add_long_grads(io, i, end, bit, table, C, c, relu, streaming, fresh, lanes):
    """Add elements i:end of channel c to its two sums, as `add_long_plane` does."""
    affine = affine_of(io.x, table, C, c)
    total, products = kept(lanes, fresh)
    while i + 4 * LANES <= end:
        four, four_products = add_four(io, i, bit, affine, relu, streaming)
        total = total + widen(four)
        products = products + widen(four_products)
        i += 4 * LANES
        bit += 4
    few, few_products = splat_like(io.x, 0.0), splat_like(io.x, 0.0)
    while i + LANES <= end:
        few, few_products = add_vector(io, i, None, bit, affine, relu, streaming, few, few_products)
        i += LANES
        bit += 1
    if i < end:
        part, part_products = add_part(io, i, None, bit, end - i, affine, relu)
        few = few + part
        few_products = few_products + part_products
    keep_sums(lanes, 0, total + widen(few), products + widen(few_products))


@function
def add_row_grads(io, C, L, c, c1, n, l0, l1, table, relu, streaming, fresh, scratch, at):
    """Sum columns l0:l1 of row n of channels c:c1, the `at`-th of the group and those after it.

    Short planes into `few`, to be folded once the whole group's are there.
    """
    row = n * C + c
    if together(io, L, l0, l1):
        few, lane = offset(scratch.few, at * 2 * LANES), (c * L) % LANES
        data = Differentiated(io, table, C, c, relu, streaming)
        add_short_grads(data, row * L, None, L, c1 - c, lane, few)
    else:
        row_bits = (L + LANES - 1) // LANES
        for j in range(c1 - c):
            i, bit = (row + j) * L, (row + j) * row_bits + l0 // LANES
            lanes = offset(scratch.work, (at + j) * 2 * LANES)
            add_long_grads(io, i + l0, i + l1, bit, table, C, c + j, relu, streaming, fresh, lanes)


@function
def add_pair_grads(io, C, L, c0, c1, n, table, relu, streaming, apart, few):
    """Rows n and n + 1 of channels c0:c1, which are stored after they were summed if `apart`."""
    K = C * L
    i, lane = (n * C + c0) * L, (c0 * L) % LANES
    if not apart:
        data = Differentiated(io, table, C, c0, relu, streaming)
        add_short_grads(data, i, K, L, c1 - c0, lane, few)
    else:
        reading = Differentiated(only_read(io, io.ahead), table, C, c0, relu, False)
        add_short_grads(reading, i, K, L, c1 - c0, lane, few)
        storing = with_hints(io, None, None)
        for row in range(2):
            first = i + row * K
            end = first + (c1 - c0) * L
            gradient_run(storing, first, end, first + L, L, 0, table, None, C, c0, relu, streaming)


@inline
def together(io, L, l0, l1):
    """`go_together`, but that bits begin anew with each plane."""
    return go_together(L, l0, l1) and without(io.bits)


@inline
def without(bits):
    """Whether there are no bits, which begin anew with each plane."""
    return bits is None


# Elements of planes that are summed before what eval mode knows of them is stored: two arrays of
# them stay in L1. A multiple of 64 and no less than `LONG_PLANE`, so that it changes no sum.
PIECE = 1024


@inline
def boundary_before(target, bits, i):
    """The last boundary up to ``target[i]`` that `stream` may store at; i itself with bits."""
    if bits is None:  # noqa: SIM102 - see `head_of`
        if target is not None:
            return i - elements_past_boundary(target, i)
    return i


@inline
def rows_aligned(io, L):
    """Whether planes of the gradients begin on boundaries that `stream` may store at."""
    return (
        boundary_before(io.grad_input, None, 0) == 0
        and boundary_before(io.grad_input, None, L) == L
        and boundary_before(io.grad_residual, None, 0) == 0
        and boundary_before(io.grad_residual, None, L) == L
    )


@inline
def slopes_of(x, slopes, C, c):
    """Channel c's numbers, in all lanes; None of None."""
    if slopes is None:
        return None
    return Slopes(
        splat_like(x, slopes[GRAD_MEAN * C + c]),
        splat_like(x, slopes[SLOPE * C + c]),
        splat_like(x, slopes[OFFSET * C + c]),
    )


@inline
def blend_slopes(count, a, b):
    """`a` in the first `count` lanes, `b` in the others."""
    if a is None:
        return None
    return Slopes(
        blend(count, a.grad_mean, b.grad_mean),
        blend(count, a.slope, b.slope),
        blend(count, a.offset, b.offset),
    )


@inline
def numbers_of(io, table, slopes, C, c):
    return affine_of(io.x, table, C, c), slopes_of(io.x, slopes, C, c)


@inline
def mix(count, a, b):
    return blend_affine(count, a[0], b[0]), blend_slopes(count, a[1], b[1])


@inline
def whole(io, i, bit, numbers, relu, streaming):
    put_gradient(io, i, bit, numbers[0], numbers[1], relu, streaming)


# Eval mode's gradients where `slopes` is None, else training's.
gradient_run = along_planes(numbers_of, mix, gradient_head, gradient_end, whole)
gradient_runs = along_rows(gradient_run)


@function
def store_eval_row(io, reading, C, L, c0, c1, n, l0, l1, table, relu, fresh, scratch):
    """Add columns l0:l1 of row n of channels c0:c1 to the sums, and store past the caches.

    A few vectors are summed from where the row begins, then stored from boundary to boundary.
    """
    row_bits = (L + LANES - 1) // LANES
    first, i = c0, (n * C + c0) * L + l0  # what is to be stored next, and its channel
    several = max(1, PIECE // L) if without(io.bits) else 1
    for c in range(c0, c1, several):
        last = min(c1, c + several) - 1
        for left in range(l0, l1, PIECE):
            right = min(l1, left + PIECE)
            new = fresh and left == l0
            add_row_grads(
                reading, C, L, c, last + 1, n, left, right, table, relu, False, new, scratch,
                c - c0,
            )  # fmt: skip
            end = (n * C + last) * L + right
            at_end = last + 1 == c1 and right == l1
            if at_end or end - i >= PIECE // 2:
                if not at_end:
                    end = min(
                        boundary_before(io.grad_input, io.bits, end),
                        boundary_before(io.grad_residual, io.bits, end),
                    )
                place = n * C + first
                bit = place * row_bits + (i - place * L) // LANES
                turn = (place + 1) * L
                gradient_run(io, i, end, turn, L, bit, table, None, C, first, relu, True)
                first, i = last, end


@function
def plane_grad_chunk(
    io, reach, C, L, c0, c1, k, n0, n1, l0, l1, table, relu, ask_targets, streaming, scratch,
    partials, at,
):  # fmt: skip
    """Sums of the k-th chunk of channels c0:c1, into `partials` from place `at` on.

    The chunk is rows n0:n1, columns l0:l1. Stores what eval mode knows; with hints if
    `ask_targets`.
    """
    apart = streaming and (io.step < 0 or not rows_aligned(io, L))
    folded = together(io, L, l0, l1)
    n = n0
    while n < n1:
        ahead = reach_from(reach, n)
        own, fresh = with_hints(io, ahead, ahead if ask_targets else 0), n == n0
        if folded and in_pairs(L) and n + 2 <= n1:
            add_pair_grads(own, C, L, c0, c1, n, table, relu, streaming, apart, scratch.few)
            n += 1
        elif apart:
            reading = only_read(io, ahead)
            store_eval_row(io, reading, C, L, c0, c1, n, l0, l1, table, relu, fresh, scratch)
        else:
            add_row_grads(own, C, L, c0, c1, n, l0, l1, table, relu, streaming, fresh, scratch, 0)
        if folded:
            fold(scratch, fresh)
        n += 1
    lanes, count = c1 - c0, splat64(np.float64((n1 - n0) * (l1 - l0)))
    total, products = both_sums(scratch.work, folded)
    put(partial_of(partials, k, COUNT), at, lanes, count, False)
    put(partial_of(partials, k, SUM_DY), at, lanes, total, False)
    put(partial_of(partials, k, SUM_DY_XHAT), at, lanes, products, False)
