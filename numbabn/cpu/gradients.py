"""The backward pass: the two sums per channel, and the input gradient of either mode.

g is the gradient before the ReLU: `grad_output`, and zero where the forward pass cut off, which
is read from `bits` where there was a residual and recomputed from x otherwise. The sums are
``sum(g)``, which is dbias, and ``sum(g * (x - mean) * unit)``, from which dweight follows: `unit`
is the inverse standard deviation, rounded, and what rounding did is made good at the end. A few
vectors at a time are summed as they are, then in float64. Then

* eval: mean and variance are constants, so ``dx = g * scale``, in the same pass as the sums;
* training: they depend on x, so ``dx = scale * (g - mean(g) - xhat * mean(g * xhat))``, in a
  second pass over x and g (see `channels` for the coefficients).
"""

from typing import Any, NamedTuple

import numpy as np

from numbabn.cpu.channels import (
    COUNT,
    GRAD_MEAN,
    OFFSET,
    SLOPE,
    SUM_DY,
    SUM_DY_XHAT,
    lanes_at,
    partial_of,
)
from numbabn.cpu.memory import elements_past_boundary, load, load_first, offset, put, store
from numbabn.cpu.normalization import (
    MOST_IN_CACHE,
    affine_at,
    affine_of,
    ask_ahead,
    blend_affine,
    head_of,
)
from numbabn.cpu.options import function, inline
from numbabn.cpu.reductions import fold_all, reach_from, rows_ahead, spread
from numbabn.cpu.vector import (
    LANES,
    blend,
    fma,
    keep,
    positive_bits,
    splat64,
    splat_like,
    sum_lanes,
    widen,
)


class Backward(NamedTuple):
    """Pointers to what the backward pass reads and writes; the last three may be None.

    Each vector of x and grad_output is read together with a hint that those `ahead` elements on
    will be, unless that is None.
    """

    grad_output: Any
    x: Any
    bits: Any
    grad_input: Any
    grad_residual: Any
    ahead: Any


class Slopes(NamedTuple):
    """Vectors: ``(g - grad_mean) + ((x - mean) * slope + offset)``."""

    grad_mean: Any
    slope: Any
    offset: Any


@inline
def read_ahead(io, ahead):
    return Backward(io.grad_output, io.x, io.bits, io.grad_input, io.grad_residual, ahead)


@inline
def read_pair(io, i, bit, affine, relu):
    """16 lanes of g and of x - mean."""
    ask_ahead(io.x, i, io.ahead)
    ask_ahead(io.grad_output, i, io.ahead)
    xmu = load(io.x, i) - affine.mean
    return cut_off(io.bits, load(io.grad_output, i), bit, xmu, affine, relu), xmu


@inline
def read_part(io, i, bit, count, affine, relu):
    """`count` lanes of g and of x - mean, zero in the rest."""
    xmu = load_first(io.x, i, count, affine.mean) - affine.mean
    g = load_first(io.grad_output, i, count, splat_like(io.grad_output, 0.0))
    return cut_off(io.bits, g, bit, xmu, affine, relu), xmu


@inline
def cut_off(bits, g, bit, xmu, affine, relu):
    if bits is not None:
        return keep(g, bits[bit])
    if relu:
        return keep(g, positive_bits(fma(xmu, affine.scale, affine.shift)))
    return g


@inline
def gradient(g, xmu, affine, slopes):
    """16 lanes of the input gradient: eval mode's if `slopes` is None, else training's."""
    if slopes is None:
        return g * affine.scale
    return ((g - slopes.grad_mean) + fma(xmu, slopes.slope, slopes.offset)) * affine.scale


@inline
def put_pair(io, i, count, g, xmu, affine, slopes, streaming):
    """Store `count` lanes of the gradients."""
    put(io.grad_residual, i, count, g, streaming)
    put(io.grad_input, i, count, gradient(g, xmu, affine, slopes), streaming)


@inline
def put_gradient(io, i, bit, affine, slopes, relu, streaming):
    g, xmu = read_pair(io, i, bit, affine, relu)
    put_pair(io, i, LANES, g, xmu, affine, slopes, streaming)


@function
def gradient_part(io, i, bit, count, affine, slopes, relu):
    """The same for fewer than 16 lanes: the ends of rows."""
    g, xmu = read_part(io, i, bit, count, affine, relu)
    put_pair(io, i, count, g, xmu, affine, slopes, False)


@function
def sum_part(io, i, bit, count, affine, relu):
    """Fewer than 16 lanes, the end of a row: stored for eval mode, and the factors to sum."""
    g, xmu = read_part(io, i, bit, count, affine, relu)
    put_pair(io, i, count, g, xmu, affine, None, False)
    return g, xmu * affine.unit


@inline
def add_four(g0, x0, g1, x1, g2, x2, g3, x3, unit):
    """Four vectors' sums of g and of ``g * xmu * unit``."""
    even = fma(g2, x2 * unit, g0 * (x0 * unit))
    odd = fma(g3, x3 * unit, g1 * (x1 * unit))
    return (g0 + g1) + (g2 + g3), even + odd


# --- planes ---------------------------------------------------------------------------------


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
    """The last boundary of 64 bytes up to ``target[i]``; i itself with bits."""
    if bits is None:  # noqa: SIM102 - see `head_of`
        if target is not None:
            return i - elements_past_boundary(target, i)
    return i


@inline
def rows_aligned(io, L):
    """Whether planes begin on boundaries of 64 bytes where the gradients are stored."""
    return (
        boundary_before(io.grad_input, None, 0) == 0
        and boundary_before(io.grad_input, None, L) == L
        and boundary_before(io.grad_residual, None, 0) == 0
        and boundary_before(io.grad_residual, None, L) == L
    )


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


@function
def gradient_run(io, i, end, turn, L, bit, table, slopes, C, c, relu, streaming):
    """The gradients of elements i:end; eval mode's if `slopes` is None, else training's.

    Vectors go on from one plane into the next as in `normalization.normalize_run`.
    """
    affine, own = affine_of(io.x, table, C, c), slopes_of(io.x, slopes, C, c)
    head = max(
        head_of(io.grad_input, io.bits, i, min(end, turn), streaming),
        head_of(io.grad_residual, io.bits, i, min(end, turn), streaming),
    )
    if head > 0:
        gradient_part(io, i, bit, head, affine, own, relu)
        i += head
    while turn < end:
        while i + LANES <= turn:
            put_gradient(io, i, bit, affine, own, relu, streaming)
            i += LANES
            bit += 1
        c = c + 1 if c + 1 < C else 0
        next_affine, next_own = affine_of(io.x, table, C, c), slopes_of(io.x, slopes, C, c)
        if i < turn:
            if io.bits is None and i + LANES <= end:
                mixed = blend_affine(turn - i, affine, next_affine)
                mixed_own = blend_slopes(turn - i, own, next_own)
                put_gradient(io, i, bit, mixed, mixed_own, relu, streaming)
                i += LANES
            else:
                gradient_part(io, i, bit, turn - i, affine, own, relu)
                i = turn
            bit += 1
        affine, own = next_affine, next_own
        turn += L
    while i + LANES <= end:
        put_gradient(io, i, bit, affine, own, relu, streaming)
        i += LANES
        bit += 1
    if i < end:
        gradient_part(io, i, bit, end - i, affine, own, relu)


# --- columns --------------------------------------------------------------------------------


@function
def spread_slopes(slopes, C, c0, c1, L, columns):
    """Fill in the `slopes` of channels c0:c1."""
    spread(offset(slopes, GRAD_MEAN * C + c0), c1 - c0, L, columns.grad_mean)
    spread(offset(slopes, SLOPE * C + c0), c1 - c0, L, columns.slope)
    spread(offset(slopes, OFFSET * C + c0), c1 - c0, L, columns.offset)


@inline
def slopes_at(columns, j):
    """Columns j:j+16."""
    return Slopes(load(columns.grad_mean, j), load(columns.slope, j), load(columns.offset, j))


@inline
def add_to(sums, products, j, total, product):
    """Add to the running sums of columns j:j+16."""
    store(sums, j, load(sums, j) + widen(total))
    store(products, j, load(products, j) + widen(product))


@function
def add_row(io, i, bit, width, columns, relu, streaming, sums, products):
    """Add one row, which begins at x[i], to the running sums; stores what eval mode knows."""
    j = 0
    while j + LANES <= width:
        affine = affine_at(columns, j)
        g, xmu = read_pair(io, i + j, bit, affine, relu)
        put_pair(io, i + j, LANES, g, xmu, affine, None, streaming)
        add_to(sums, products, j, g, g * (xmu * affine.unit))
        j += LANES
        bit += 1
    if j < width:
        g, xhat = sum_part(io, i + j, bit, width - j, affine_at(columns, j), relu)
        add_to(sums, products, j, g, g * xhat)


@function
def add_four_rows(io, i, K, bit, row_bits, width, columns, relu, streaming, sums, products):
    """The same for four rows, so that the running sums of whole vectors are touched once for all.

    All are loaded before anything is stored: rows are often multiples of 4 KiB apart, and
    processors compare the last 12 bits of an address first.
    """
    j = 0
    while j + LANES <= width:
        affine = affine_at(columns, j)
        g0, x0 = read_pair(io, i + j, bit, affine, relu)
        g1, x1 = read_pair(io, i + j + K, bit + row_bits, affine, relu)
        g2, x2 = read_pair(io, i + j + 2 * K, bit + 2 * row_bits, affine, relu)
        g3, x3 = read_pair(io, i + j + 3 * K, bit + 3 * row_bits, affine, relu)
        put_pair(io, i + j, LANES, g0, x0, affine, None, streaming)
        put_pair(io, i + j + K, LANES, g1, x1, affine, None, streaming)
        put_pair(io, i + j + 2 * K, LANES, g2, x2, affine, None, streaming)
        put_pair(io, i + j + 3 * K, LANES, g3, x3, affine, None, streaming)
        total, product = add_four(g0, x0, g1, x1, g2, x2, g3, x3, affine.unit)
        add_to(sums, products, j, total, product)
        j += LANES
        bit += 1
    if j < width:
        affine = affine_at(columns, j)
        for row in range(4):
            at = bit + row * row_bits
            g, xhat = sum_part(io, i + j + row * K, at, width - j, affine, relu)
            add_to(sums, products, j, g, g * xhat)


@function
def column_grad_sums(io, K, m0, m1, k0, width, columns, relu, streaming, sums, products):
    """Per column of k0:k0+width, add g and ``g * (x - MEAN) * UNIT`` of rows m0:m1."""
    row_bits = (K + LANES - 1) // LANES
    io = read_ahead(io, rows_ahead(io.x, width, 4) * K)
    m = m0
    while m < m1:
        i = m * K + k0
        bit = m * row_bits + k0 // LANES
        if m + 4 <= m1:
            add_four_rows(io, i, K, bit, row_bits, width, columns, relu, streaming, sums, products)
            m += 4
        else:
            add_row(io, i, bit, width, columns, relu, streaming, sums, products)
            m += 1


@function
def gradient_runs(io, K, m0, m1, k0, width, L, table, slopes, C, c, relu, streaming):
    """Rows m0:m1 of columns k0:k0+width, which are planes of L, the first being channel c's."""
    for m in range(m0, m1):
        i = m * K + k0
        gradient_run(io, i, i + width, i + L, L, 0, table, slopes, C, c, relu, streaming)


@function
def column_grad_chunk(
    io, C, L, k, m0, m1, c0, c1, columns, relu, streaming, work, space, partials, at
):
    """Sums of rows m0:m1 of channels c0:c1, into chunk k of `partials`, from place `at` on."""
    sums, products = work, offset(work, space)
    K, k0, width = C * L, c0 * L, (c1 - c0) * L
    for j in range(0, width, LANES):
        store(sums, j, splat64(0.0))
        store(products, j, splat64(0.0))
    column_grad_sums(io, K, m0, m1, k0, width, columns, relu, streaming, sums, products)
    fold_all(sums, c1 - c0, L)
    fold_all(products, c1 - c0, L)
    count = splat64(np.float64((m1 - m0) * L))
    for c in range(0, c1 - c0, LANES):
        lanes = lanes_at(c, c1 - c0)
        put(partial_of(partials, k, COUNT), at + c, lanes, count, False)
        put(partial_of(partials, k, SUM_DY), at + c, lanes, load(sums, c), False)
        put(partial_of(partials, k, SUM_DY_XHAT), at + c, lanes, load(products, c), False)


@function
def column_elements(io, K, m0, m1, k0, width, columns, relu, streaming):
    """Training's input gradient of rows m0:m1, columns k0:k0+width; see `normalize_rows`."""
    row_bits = (K + LANES - 1) // LANES
    in_cache = not streaming and (m1 - m0) * width <= MOST_IN_CACHE
    m = m0
    while m < m1:
        i = m * K + k0
        bit = m * row_bits + k0 // LANES
        j = head_of(io.grad_input, io.bits, i, i + width, streaming)
        if j > 0:
            gradient_part(io, i, bit, j, affine_at(columns, 0), slopes_at(columns, 0), relu)
        if in_cache and m + 2 <= m1:
            while j + LANES <= width:
                affine, slopes = affine_at(columns, j), slopes_at(columns, j)
                g0, x0 = read_pair(io, i + j, bit, affine, relu)
                g1, x1 = read_pair(io, i + j + K, bit + row_bits, affine, relu)
                put_pair(io, i + j, LANES, g0, x0, affine, slopes, False)
                put_pair(io, i + j + K, LANES, g1, x1, affine, slopes, False)
                j += LANES
                bit += 1
            if j < width:
                affine, slopes = affine_at(columns, j), slopes_at(columns, j)
                gradient_part(io, i + j, bit, width - j, affine, slopes, relu)
                gradient_part(io, i + j + K, bit + row_bits, width - j, affine, slopes, relu)
            m += 2
        else:
            while j + LANES <= width:
                put_gradient(
                    io, i + j, bit, affine_at(columns, j), slopes_at(columns, j), relu, streaming
                )
                j += LANES
                bit += 1
            if j < width:
                affine, slopes = affine_at(columns, j), slopes_at(columns, j)
                gradient_part(io, i + j, bit, width - j, affine, slopes, relu)
            m += 1
