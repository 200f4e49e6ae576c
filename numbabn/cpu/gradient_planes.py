"""The backward pass over planes; see `gradients`, and `runs` for how elements are gone through."""

import numpy as np

from numbabn.cpu.channels import COUNT, GRAD_MEAN, OFFSET, SLOPE, SUM_DY, SUM_DY_XHAT, partial_of
from numbabn.cpu.gradients import (
    Backward,
    Slopes,
    add_four,
    gradient_part,
    put_gradient,
    put_pair,
    read_ahead,
    read_pair,
    sum_part,
)
from numbabn.cpu.memory import elements_past_boundary, load, offset, store
from numbabn.cpu.normalization import affine_of, blend_affine, head_of
from numbabn.cpu.options import function, inline
from numbabn.cpu.reductions import reach_from
from numbabn.cpu.runs import along_planes, along_rows
from numbabn.cpu.vector import LANES, blend, fma, splat64, splat_like, sum_lanes, widen


@function
def add_plane_grads(io, C, L, c, n, l0, l1, table, relu, streaming, fresh, work):
    """Add columns l0:l1 of row n of channel c to the 16 lanes of its two sums in `work`.

    Begins with nothing if `fresh`. These are the sums of g and of ``g * (x - MEAN) * UNIT``.
    Stores what eval mode knows.
    """
    affine = affine_of(io.x, table, C, c)
    total, products = splat64(0.0), splat64(0.0)
    if not fresh:
        total, products = load(work, 0), load(work, LANES)
    row = n * C + c
    i = row * L + l0
    end = i + l1 - l0
    bit = row * ((L + LANES - 1) // LANES) + l0 // LANES
    while i + 4 * LANES <= end:
        g0, x0 = read_pair(io, i, bit, affine, relu)
        g1, x1 = read_pair(io, i + LANES, bit + 1, affine, relu)
        g2, x2 = read_pair(io, i + 2 * LANES, bit + 2, affine, relu)
        g3, x3 = read_pair(io, i + 3 * LANES, bit + 3, affine, relu)
        put_pair(io, i, LANES, g0, x0, affine, None, streaming)
        put_pair(io, i + LANES, LANES, g1, x1, affine, None, streaming)
        put_pair(io, i + 2 * LANES, LANES, g2, x2, affine, None, streaming)
        put_pair(io, i + 3 * LANES, LANES, g3, x3, affine, None, streaming)
        few, few_products = add_four(g0, x0, g1, x1, g2, x2, g3, x3, affine.unit)
        total = total + widen(few)
        products = products + widen(few_products)
        i += 4 * LANES
        bit += 4
    few = splat_like(io.x, 0.0)
    few_products = few
    while i + LANES <= end:
        g, xmu = read_pair(io, i, bit, affine, relu)
        put_pair(io, i, LANES, g, xmu, affine, None, streaming)
        few = few + g
        few_products = fma(g, xmu * affine.unit, few_products)
        i += LANES
        bit += 1
    if i < end:
        g, xhat = sum_part(io, i, bit, end - i, affine, relu)
        few = few + g
        few_products = fma(g, xhat, few_products)
    store(work, 0, total + widen(few))
    store(work, LANES, products + widen(few_products))


# Elements of planes that are summed before what eval mode knows of them is stored: two arrays of
# them stay in L1. A multiple of 64, so that it changes no sum.
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
def gradient_head(io, i, end, streaming):
    """`head_of`, for whichever of the gradients are stored: all lie alike."""
    return max(
        head_of(io.grad_input, io.bits, i, end, streaming),
        head_of(io.grad_residual, io.bits, i, end, streaming),
    )


@inline
def part(io, i, bit, count, numbers, relu):
    gradient_part(io, i, bit, count, numbers[0], numbers[1], relu)


@inline
def whole(io, i, bit, numbers, relu, streaming):
    put_gradient(io, i, bit, numbers[0], numbers[1], relu, streaming)


# Eval mode's gradients where `slopes` is None, else training's.
gradient_run = along_planes(numbers_of, mix, gradient_head, part, whole)
gradient_runs = along_rows(gradient_run)


@function
def store_eval_row(io, reading, C, L, c0, c1, n, l0, l1, table, relu, fresh, work):
    """Add columns l0:l1 of row n of channels c0:c1 to the sums, and store past the caches.

    A few vectors are summed from where the row begins, then stored from boundary to boundary.
    """
    row_bits = (L + LANES - 1) // LANES
    first, i = c0, (n * C + c0) * L + l0  # what is to be stored next, and its channel
    for c in range(c0, c1):
        row = (n * C + c) * L
        for left in range(l0, l1, PIECE):
            right = min(l1, left + PIECE)
            lanes = offset(work, (c - c0) * 2 * LANES)
            new = fresh and left == l0
            add_plane_grads(reading, C, L, c, n, left, right, table, relu, False, new, lanes)
            end = row + right
            at_end = c + 1 == c1 and right == l1
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
                first, i = c, end


@function
def plane_grad_chunk(
    io, reach, C, L, c0, c1, k, n0, n1, l0, l1, table, relu, streaming, work, partials, at
):
    """Sums of the k-th chunk of channels c0:c1, into `partials` from place `at` on.

    The chunk is rows n0:n1, columns l0:l1. Stores what eval mode knows.
    """
    apart = streaming and not rows_aligned(io, L)
    for n in range(n0, n1):
        ahead = reach_from(reach, n)
        if apart:
            reading = Backward(io.grad_output, io.x, io.bits, None, None, ahead)
            store_eval_row(io, reading, C, L, c0, c1, n, l0, l1, table, relu, n == n0, work)
        else:
            own = read_ahead(io, ahead)
            for c in range(c0, c1):
                lanes = offset(work, (c - c0) * 2 * LANES)
                add_plane_grads(own, C, L, c, n, l0, l1, table, relu, streaming, n == n0, lanes)
    for j in range(c1 - c0):
        partial_of(partials, k, COUNT)[at + j] = np.float64((n1 - n0) * (l1 - l0))
        partial_of(partials, k, SUM_DY)[at + j] = sum_lanes(load(work, j * 2 * LANES))
        partial_of(partials, k, SUM_DY_XHAT)[at + j] = sum_lanes(load(work, (2 * j + 1) * LANES))
