"""The backward pass: the two sums per channel, and the input gradient of either mode.

g is the gradient before the ReLU: `grad_output`, and zero where the forward pass cut off, which
is read from `bits` where there was a residual and recomputed from x otherwise. The sums are
``sum(g)``, which is dbias, and ``sum(g * (x - mean))``, from which dweight follows (of float64 x
times INVSTD at once, since products of subnormal numbers would be lost). Then

* eval: mean and variance are constants, so ``dx = g * scale``, in the same pass as the sums;
* training: they depend on x, so ``dx = scale * (g - mean(g) - xhat * mean(g * xhat))``, in a
  second pass over x and g (see `channels` for the coefficients).
"""

from typing import Any, NamedTuple

import numpy as np

from numbabn.cpu.channels import COUNT, GRAD_MEAN, OFFSET, SLOPE, SUM_DY, SUM_DY_XHAT
from numbabn.cpu.memory import load, load_upto, offset, prefetch, put, store
from numbabn.cpu.normalization import affine_at, head_of
from numbabn.cpu.options import function, inline
from numbabn.cpu.reductions import fold, spread
from numbabn.cpu.vector import (
    LANES,
    fma,
    is_double,
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
    will be.
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
def gradient_before_relu(io, i, bit, count, xmu, affine, relu):
    """`count` lanes of g, zero in the rest."""
    g = load_upto(io.grad_output, i, count, splat_like(io.grad_output, 0.0))
    return cut_off(io.bits, g, bit, xmu, affine, relu)


@inline
def cut_off(bits, g, bit, xmu, affine, relu):
    if bits is not None:
        return keep(g, bits[bit])
    if relu:
        return keep(g, positive_bits(fma(xmu, affine.scale, affine.shift)))
    return g


@inline
def sum_vector(io, i, bit, count, affine, relu, streaming):
    """`count` lanes of g and of (x - mean) * unit; stores what eval mode knows already."""
    if io.ahead:
        prefetch(io.x, i + io.ahead)
        prefetch(io.grad_output, i + io.ahead)
    xmu = load_upto(io.x, i, count, affine.mean) - affine.mean
    g = gradient_before_relu(io, i, bit, count, xmu, affine, relu)
    put(io.grad_residual, i, count, g, streaming)
    put(io.grad_input, i, count, g * affine.scale, streaming)
    if is_double(io.x):
        return widen(g), widen(xmu) * affine.unit
    return widen(g), widen(xmu)


@inline
def element_vector(io, i, bit, count, affine, slopes, relu, streaming):
    """Store `count` lanes of the training mode's input gradient."""
    if io.ahead:
        prefetch(io.x, i + io.ahead)
        prefetch(io.grad_output, i + io.ahead)
    xmu = load_upto(io.x, i, count, affine.mean) - affine.mean
    g = gradient_before_relu(io, i, bit, count, xmu, affine, relu)
    put(io.grad_residual, i, count, g, streaming)
    dx = ((g - slopes.grad_mean) + fma(xmu, slopes.slope, slopes.offset)) * affine.scale
    put(io.grad_input, i, count, dx, streaming)


# --- planes ---------------------------------------------------------------------------------


@function
def plane_grad_sums(io, C, L, c, n0, n1, l0, l1, affine, relu, streaming):
    """Sums of g and of g * (x - MEAN) over rows n0:n1, columns l0:l1 of a channel."""
    total = splat64(0.0)
    products = splat64(0.0)
    row_bits = (L + LANES - 1) // LANES
    for n in range(n0, n1):
        row = n * C + c
        i = row * L + l0
        end = i + l1 - l0
        bit = row * row_bits + l0 // LANES
        while i + LANES <= end:
            g, xmu = sum_vector(io, i, bit, LANES, affine, relu, streaming)
            total = total + g
            products = fma(g, xmu, products)
            i += LANES
            bit += 1
        if i < end:
            g, xmu = sum_vector(io, i, bit, end - i, affine, relu, False)
            total = total + g
            products = fma(g, xmu, products)
    return sum_lanes(total), sum_lanes(products)


@function
def plane_grad_chunk(io, N, C, L, rows, segment, c, k, affine, relu, streaming, chunk):
    """Sums of chunk k of channel c, into `chunk`."""
    across = (L + segment - 1) // segment
    n0 = (k // across) * rows
    n1 = min(N, n0 + rows)
    l0 = (k % across) * segment
    l1 = min(L, l0 + segment)
    total, products = plane_grad_sums(io, C, L, c, n0, n1, l0, l1, affine, relu, streaming)
    chunk[COUNT] = np.float64((n1 - n0) * (l1 - l0))
    chunk[SUM_DY] = total
    chunk[SUM_DY_XHAT] = products


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
    head = head_of(io.grad_input, io.bits, i, end, streaming)
    if head > 0:
        element_vector(io, i, bit, head, affine, slopes, relu, False)
        i += head
    while i + LANES <= end:
        element_vector(io, i, bit, LANES, affine, slopes, relu, streaming)
        i += LANES
        bit += 1
    if i < end:
        element_vector(io, i, bit, end - i, affine, slopes, relu, False)


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
def add_gradients(io, i, bit, count, affine, relu, streaming, j, sums, products):
    """Add one row to the running sums of columns j:j+16."""
    g, xmu = sum_vector(io, i, bit, count, affine, relu, streaming)
    store(sums, j, load(sums, j) + g)
    store(products, j, fma(g, xmu, load(products, j)))


@inline
def add_four_gradients(io, i, K, bit, row_bits, count, affine, relu, streaming, j, sums, products):
    """Add four rows, the first at x[i], to the running sums of columns j:j+16."""
    g0, xmu0 = sum_vector(io, i, bit, count, affine, relu, streaming)
    g1, xmu1 = sum_vector(io, i + K, bit + row_bits, count, affine, relu, streaming)
    g2, xmu2 = sum_vector(io, i + 2 * K, bit + 2 * row_bits, count, affine, relu, streaming)
    g3, xmu3 = sum_vector(io, i + 3 * K, bit + 3 * row_bits, count, affine, relu, streaming)
    store(sums, j, load(sums, j) + ((g0 + g1) + (g2 + g3)))
    even = fma(g2, xmu2, g0 * xmu0)
    odd = fma(g3, xmu3, g1 * xmu1)
    store(products, j, load(products, j) + (even + odd))


@function
def column_grad_sums(io, K, m0, m1, k0, width, columns, relu, streaming, sums, products):
    """Per column of k0:k0+width, sums of g and of g * (x - MEAN) over rows m0:m1."""
    row_bits = (K + LANES - 1) // LANES
    for j in range(0, width, LANES):
        store(sums, j, splat64(0.0))
        store(products, j, splat64(0.0))
    whole = width - width % LANES
    m = m0
    while m + 4 <= m1:
        i = m * K + k0
        bit = m * row_bits + k0 // LANES
        for j in range(0, whole, LANES):
            add_four_gradients(
                io, i + j, K, bit, row_bits, LANES, affine_at(columns, j), relu, streaming,
                j, sums, products,
            )  # fmt: skip
            bit += 1
        if whole < width:
            add_four_gradients(
                io, i + whole, K, bit, row_bits, width - whole, affine_at(columns, whole), relu,
                False, whole, sums, products,
            )  # fmt: skip
        m += 4
    while m < m1:
        i = m * K + k0
        bit = m * row_bits + k0 // LANES
        for j in range(0, whole, LANES):
            add_gradients(
                io,
                i + j,
                bit,
                LANES,
                affine_at(columns, j),
                relu,
                streaming,
                j,
                sums,
                products,
            )
            bit += 1
        if whole < width:
            add_gradients(
                io, i + whole, bit, width - whole, affine_at(columns, whole), relu, False,
                whole, sums, products,
            )  # fmt: skip
        m += 1


@function
def column_grad_chunk(
    io, C, L, k, m0, m1, c0, c1, columns, relu, streaming, work, space, partials, chunks
):
    """Sums of rows m0:m1 of channels c0:c1, into chunk k of each, the first at `partials`."""
    sums, products = work, offset(work, space)
    column_grad_sums(
        io, C * L, m0, m1, c0 * L, (c1 - c0) * L, columns, relu, streaming, sums, products
    )
    for c in range(c1 - c0):
        chunk = offset(partials, (c * chunks + k) * 3)
        chunk[COUNT] = np.float64((m1 - m0) * L)
        chunk[SUM_DY] = fold(sums, c, L)
        chunk[SUM_DY_XHAT] = fold(products, c, L)


@inline
def four_elements(io, i, K, bit, row_bits, count, affine, slopes, relu, streaming):
    """Four rows, so that what is known of the columns is loaded once."""
    element_vector(io, i, bit, count, affine, slopes, relu, streaming)
    element_vector(io, i + K, bit + row_bits, count, affine, slopes, relu, streaming)
    element_vector(io, i + 2 * K, bit + 2 * row_bits, count, affine, slopes, relu, streaming)
    element_vector(io, i + 3 * K, bit + 3 * row_bits, count, affine, slopes, relu, streaming)


@function
def column_elements(io, K, m0, m1, k0, width, columns, relu, streaming):
    """Training's input gradient of rows m0:m1, columns k0:k0+width."""
    row_bits = (K + LANES - 1) // LANES
    m = m0
    while m + 4 <= m1 and (K % LANES == 0 or not streaming):
        i = m * K + k0
        bit = m * row_bits + k0 // LANES
        j = head_of(io.grad_input, io.bits, i, i + width, streaming)
        if j > 0:
            affine, slopes = affine_at(columns, 0), slopes_at(columns, 0)
            four_elements(io, i, K, bit, row_bits, j, affine, slopes, relu, False)
        while j + LANES <= width:
            affine, slopes = affine_at(columns, j), slopes_at(columns, j)
            four_elements(io, i + j, K, bit, row_bits, LANES, affine, slopes, relu, streaming)
            j += LANES
            bit += 1
        if j < width:
            affine, slopes = affine_at(columns, j), slopes_at(columns, j)
            four_elements(io, i + j, K, bit, row_bits, width - j, affine, slopes, relu, False)
        m += 4
    while m < m1:
        i = m * K + k0
        bit = m * row_bits + k0 // LANES
        j = head_of(io.grad_input, io.bits, i, i + width, streaming)
        if j > 0:
            affine, slopes = affine_at(columns, 0), slopes_at(columns, 0)
            element_vector(io, i, bit, j, affine, slopes, relu, False)
        while j + LANES <= width:
            affine, slopes = affine_at(columns, j), slopes_at(columns, j)
            element_vector(io, i + j, bit, LANES, affine, slopes, relu, streaming)
            j += LANES
            bit += 1
        if j < width:
            affine, slopes = affine_at(columns, j), slopes_at(columns, j)
            element_vector(io, i + j, bit, width - j, affine, slopes, relu, False)
        m += 1
