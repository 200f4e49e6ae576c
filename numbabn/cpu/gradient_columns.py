"""The backward pass over columns; see `gradients`."""

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
from numbabn.cpu.gradients import (
    Slopes,
    gradient_part,
    put_gradient,
    put_pair,
    read_ahead,
    read_pair,
    sum_part,
)
from numbabn.cpu.memory import load, offset, put, store
from numbabn.cpu.normalization import MOST_IN_CACHE, affine_at, head_of
from numbabn.cpu.options import function, inline
from numbabn.cpu.reduction_columns import fold_all, rows_ahead, spread
from numbabn.cpu.vector import LANES, fma, splat64, widen


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


@inline
def add_four(g0, x0, g1, x1, g2, x2, g3, x3, unit):
    """Four vectors' sums of g and of ``g * xmu * unit``."""
    even = fma(g2, x2 * unit, g0 * (x0 * unit))
    odd = fma(g3, x3 * unit, g1 * (x1 * unit))
    return (g0 + g1) + (g2 + g3), even + odd


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
