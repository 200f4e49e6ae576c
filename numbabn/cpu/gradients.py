"""The backward pass: the two sums per channel, and the input gradient of either mode.

g is the gradient before the ReLU: `grad_output`, and zero where the forward pass cut off, which
is read from `bits` where there was a residual and recomputed from x otherwise. The sums are
``sum(g)``, which is dbias, and ``sum(g * (x - mean) * unit)``, from which dweight follows: `unit` is
the inverse standard deviation, rounded, and what rounding it did is made good at the end. A few
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
from numbabn.cpu.memory import load, load_first, offset, put, store
from numbabn.cpu.normalization import affine_at, ask_ahead, end_with_whole, head_of
from numbabn.cpu.options import function, inline
from numbabn.cpu.reductions import fold_all, reach_from, rows_ahead, spread
from numbabn.cpu.vector import (
    LANES,
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
def put_eval(io, i, count, g, affine, streaming):
    """Store `count` lanes of what eval mode knows already."""
    put(io.grad_residual, i, count, g, streaming)
    put(io.grad_input, i, count, g * affine.scale, streaming)


@function
def sum_part(io, i, bit, count, affine, relu):
    """Fewer than 16 lanes, the end of a row: stored for eval mode, and the factors to sum."""
    g, xmu = read_part(io, i, bit, count, affine, relu)
    put_eval(io, i, count, g, affine, False)
    return g, xmu * affine.unit


@inline
def add_four(g0, x0, g1, x1, g2, x2, g3, x3, unit):
    """Four vectors' sums of g and of ``g * xmu * unit``."""
    even = fma(g2, x2 * unit, g0 * (x0 * unit))
    odd = fma(g3, x3 * unit, g1 * (x1 * unit))
    return (g0 + g1) + (g2 + g3), even + odd


@inline
def train_gradient(g, xmu, affine, slopes):
    """16 lanes of training's input gradient."""
    return ((g - slopes.grad_mean) + fma(xmu, slopes.slope, slopes.offset)) * affine.scale


@inline
def put_train(io, i, count, g, xmu, affine, slopes, streaming):
    put(io.grad_residual, i, count, g, streaming)
    put(io.grad_input, i, count, train_gradient(g, xmu, affine, slopes), streaming)


@function
def element_part(io, i, bit, count, affine, slopes, relu):
    """Fewer than 16 lanes of training's gradients."""
    g, xmu = read_part(io, i, bit, count, affine, relu)
    put_train(io, i, count, g, xmu, affine, slopes, False)


# --- planes ---------------------------------------------------------------------------------


@function
def plane_grad_sums(io, reach, C, L, c, n0, n1, l0, l1, affine, relu, streaming):
    """Sums of g and of ``g * (x - MEAN) * UNIT`` over rows n0:n1, columns l0:l1 of a channel."""
    zero = splat_like(io.x, 0.0)
    total = splat64(0.0)
    products = splat64(0.0)
    row_bits = (L + LANES - 1) // LANES
    for n in range(n0, n1):
        row = n * C + c
        i = row * L + l0
        end = i + l1 - l0
        bit = row * row_bits + l0 // LANES
        reading = read_ahead(io, reach_from(reach, n))
        while i + 4 * LANES <= end:
            g0, x0 = read_pair(reading, i, bit, affine, relu)
            g1, x1 = read_pair(reading, i + LANES, bit + 1, affine, relu)
            g2, x2 = read_pair(reading, i + 2 * LANES, bit + 2, affine, relu)
            g3, x3 = read_pair(reading, i + 3 * LANES, bit + 3, affine, relu)
            put_eval(io, i, LANES, g0, affine, streaming)
            put_eval(io, i + LANES, LANES, g1, affine, streaming)
            put_eval(io, i + 2 * LANES, LANES, g2, affine, streaming)
            put_eval(io, i + 3 * LANES, LANES, g3, affine, streaming)
            few, few_products = add_four(g0, x0, g1, x1, g2, x2, g3, x3, affine.unit)
            total = total + widen(few)
            products = products + widen(few_products)
            i += 4 * LANES
            bit += 4
        few, few_products = zero, zero
        while i + LANES <= end:
            g, xmu = read_pair(reading, i, bit, affine, relu)
            put_eval(io, i, LANES, g, affine, streaming)
            few = few + g
            few_products = fma(g, xmu * affine.unit, few_products)
            i += LANES
            bit += 1
        if i < end:
            g, xhat = sum_part(io, i, bit, end - i, affine, relu)
            few = few + g
            few_products = fma(g, xhat, few_products)
        total = total + widen(few)
        products = products + widen(few_products)
    return sum_lanes(total), sum_lanes(products)


@inline
def plane_grad_chunk(io, reach, C, L, c, k, n0, n1, l0, l1, affine, relu, streaming, partials, at):
    """Sums of a chunk of channel c, its k-th, into place `at` of `partials`."""
    total, products = plane_grad_sums(io, reach, C, L, c, n0, n1, l0, l1, affine, relu, streaming)
    partial_of(partials, k, COUNT)[at] = np.float64((n1 - n0) * (l1 - l0))
    partial_of(partials, k, SUM_DY)[at] = total
    partial_of(partials, k, SUM_DY_XHAT)[at] = products


@inline
def slopes_of(x, slopes, C, c):
    """Channel c's numbers, in all lanes."""
    return Slopes(
        splat_like(x, slopes[GRAD_MEAN * C + c]),
        splat_like(x, slopes[SLOPE * C + c]),
        splat_like(x, slopes[OFFSET * C + c]),
    )


@function
def plane_elements(io, i, end, bit, affine, slopes, relu, streaming):
    """Training's input gradient of elements i:end, all of one channel."""
    overlap = end_with_whole(io.bits, end - i, streaming)
    g_last, xmu_last = affine.mean, affine.mean
    if overlap:
        g_last, xmu_last = read_pair(io, end - LANES, bit, affine, relu)
    head = head_of(io.grad_input, io.bits, i, end, streaming)
    if head > 0:
        element_part(io, i, bit, head, affine, slopes, relu)
        i += head
    while i + LANES <= end:
        g, xmu = read_pair(io, i, bit, affine, relu)
        put_train(io, i, LANES, g, xmu, affine, slopes, streaming)
        i += LANES
        bit += 1
    if i < end:
        if overlap:
            put_train(io, end - LANES, LANES, g_last, xmu_last, affine, slopes, False)
        else:
            element_part(io, i, bit, end - i, affine, slopes, relu)


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
        put_eval(io, i + j, LANES, g, affine, streaming)
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
        put_eval(io, i + j, LANES, g0, affine, streaming)
        put_eval(io, i + j + K, LANES, g1, affine, streaming)
        put_eval(io, i + j + 2 * K, LANES, g2, affine, streaming)
        put_eval(io, i + j + 3 * K, LANES, g3, affine, streaming)
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
    """Per column of k0:k0+width, sums of g and of ``g * (x - MEAN) * UNIT`` over rows m0:m1."""
    row_bits = (K + LANES - 1) // LANES
    io = read_ahead(io, rows_ahead(io.x, width, 4) * K)
    for j in range(0, width, LANES):
        store(sums, j, splat64(0.0))
        store(products, j, splat64(0.0))
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
def column_grad_chunk(
    io, C, L, k, m0, m1, c0, c1, columns, relu, streaming, work, space, partials, at
):
    """Sums of rows m0:m1 of channels c0:c1, into chunk k of `partials`, from place `at` on."""
    sums, products = work, offset(work, space)
    column_grad_sums(
        io, C * L, m0, m1, c0 * L, (c1 - c0) * L, columns, relu, streaming, sums, products
    )
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
    """Training's input gradient of rows m0:m1, columns k0:k0+width, one row after the other."""
    row_bits = (K + LANES - 1) // LANES
    for m in range(m0, m1):
        i = m * K + k0
        bit = m * row_bits + k0 // LANES
        j = head_of(io.grad_input, io.bits, i, i + width, streaming)
        if j > 0:
            element_part(io, i, bit, j, affine_at(columns, 0), slopes_at(columns, 0), relu)
        while j + LANES <= width:
            affine, slopes = affine_at(columns, j), slopes_at(columns, j)
            g, xmu = read_pair(io, i + j, bit, affine, relu)
            put_train(io, i + j, LANES, g, xmu, affine, slopes, streaming)
            j += LANES
            bit += 1
        if j < width:
            affine, slopes = affine_at(columns, j), slopes_at(columns, j)
            element_part(io, i + j, bit, width - j, affine, slopes, relu)
