"""Training of columns that fit a block: everything is read once, and kept in registers.

As in `fused`, for rows of channels: a block has a tile of two to eight slots of every row, so each
of its threads has the same few channels in all of its rows, up to `held` of them. What threads
found is added up by shuffles between those of a warp that share channels, and then over the warps
by a thread for each channel, which finishes it.
"""

from __future__ import annotations

import math

from numba import cuda

from numbabn.cuda.channels import MEAN, SCALE, SHIFT
from numbabn.cuda.fused import finish_found, finish_sums_found, finish_whole
from numbabn.cuda.geometry import thread
from numbabn.cuda.gradient_sums import spread_unit
from numbabn.cuda.gradients import bits_of, cut_off, input_gradient, spread
from numbabn.cuda.indices import as_float, as_float64, index, like
from numbabn.cuda.memory import (
    decode,
    element,
    hidden,
    load_wanted,
    no_slot,
    number,
    opaque,
    pointer,
    store,
)
from numbabn.cuda.options import (
    BACKWARD_ROWS,
    FORWARD_ROWS,
    FUSED_THREADS,
    FUSED_WIDTH,
    Address,
    Double,
    Flag,
    Number,
    Size,
    inline,
)
from numbabn.cuda.reductions import column_again
from numbabn.cuda.shared import get, get_vector, put, shared_float64, shared_like
from numbabn.cuda.sums import ALL
from numbabn.cuda.vector import LANES, doubtful, fma, pick, splat, widen

WARPS = FUSED_THREADS // 32  # of a block, at most


@inline
def put_warp_sum(value, V, j, work):
    """Leave in `work` the sum of `value` over the warp's threads that have the same slot.

    It is of lane j of the slot.
    """
    by = 16
    while by >= cuda.blockDim.x:
        value = value + cuda.shfl_xor_sync(ALL, value, by)
        by = by >> 1
    lane, width = thread() & 31, index(cuda.blockDim.x)
    if lane < width:
        put(work, ((thread() >> 5) * width + lane) * V + j, value)


@inline
def sum_warps(work, t, columns):
    """The sum of what all warps left for column t."""
    total = 0.0
    end = (index(cuda.blockDim.y) * index(cuda.blockDim.x) >> 5) * columns
    while t < end:
        total = total + get(work, t)
        t = t + columns
    return total


@inline
def column_of_rows(x, s0, s1, s2, s3, four, mine, j):
    """Of number j of a thread's slots: the first, and less that, the sum, mean and m2 of all.

    And what m2 is `doubtful` beside: it is right, whatever the first, where all are equal.
    """
    first = number(x, s0, j)
    zero = as_float(x, like(j, 0))
    a, b, c, d = first - first, zero, zero, zero
    if mine > 1:
        b = number(x, s1, j) - first
    if four and mine > 2:
        c = number(x, s2, j) - first
    if four and mine > 3:
        d = number(x, s3, j) - first
    total = (a + b) + (c + d)
    mean = total
    if mine > 1:
        mean = total / as_float(x, mine)
    m2 = (a - mean) * (a - mean)
    if mine > 1:
        m2 = fma(b - mean, b - mean, m2)
    if four and mine > 2:
        m2 = fma(c - mean, c - mean, m2)
    if four and mine > 3:
        m2 = fma(d - mean, d - mean, m2)
    beside = first
    if b == zero and c == zero and d == zero:
        beside = as_float(x, like(j, 1))
    return first, total, mean, m2, beside


def forward_columns(storage, aligned, wide):
    V = LANES[storage]
    SPACE = FUSED_WIDTH * LANES[storage]  # channels that a tile can have
    TRIPLE, FOURFOLD = 3 * SPACE, 4 * SPACE
    FOUR = FORWARD_ROWS[LANES[storage]] == 4
    WORK = WARPS * FUSED_WIDTH * LANES[storage]

    def forward_columns(
        x: Address, residual: Address, bits: Address, out: Address, rows: Size, C: Size,
        slots: Size, weight: Address, bias: Address, running_mean: Address, running_var: Address,
        kinds: Flag, momentum: Double, eps: Double, table: Address, floor: Number,
    ) -> None:  # fmt: skip
        C, slots, rows = index(C), index(slots), index(rows)
        source = pointer(storage, aligned, wide, x)
        target = pointer(storage, aligned, wide, out)
        other = pointer(storage, aligned, wide, residual)
        width, tall = index(cuda.blockDim.x), index(cuda.blockDim.y)
        column, columns = index(cuda.threadIdx.x) * V, width * V
        s = index(cuda.blockIdx.x) * width + index(cuda.threadIdx.x)
        m = index(cuda.threadIdx.y)
        first, by = element(source, m, slots, s), element(source, tall, slots, 0)
        s0 = load_wanted(source, first * V, m < rows)
        s1 = load_wanted(source, (first + by) * V, m + tall < rows)
        s2, s3 = no_slot(), no_slot()
        if FOUR:
            s2 = load_wanted(source, (first + by * 2) * V, m + tall * 2 < rows)
            s3 = load_wanted(source, (first + by * 3) * V, m + tall * 3 < rows)
        mine = like(m, 0)
        if m < rows:
            mine = opaque((rows - m + tall - 1) // tall)

        count = as_float64(mine)

        centers, work, found = (
            shared_float64(SPACE),
            shared_float64(WORK),
            shared_float64(FOURFOLD),
        )
        affine = shared_like(source, TRIPLE)
        if m == 0:  # relative to the first row to begin with
            j = like(C, 0)
            while j < V:
                value = widen(number(source, s0, j))
                put(centers, column + j, value if math.isfinite(value) else 0.0)
                j = opaque(j + 1)
        cuda.syncthreads()
        # Three times over, as in `reductions`: sums relative to the first row; then, relative to
        # the means that follow, the squares, and what rounding left of the means.
        turn = like(C, 0)
        while turn < 3:
            squared = turn == 1
            j = like(C, 0)
            while j < V:
                center = get(centers, column + j)
                shift, total, mean, m2, beside = column_of_rows(
                    source, s0, s1, s2, s3, FOUR, mine, j
                )
                near = widen(shift) - center
                if mine > 0 and doubtful(m2, beside):
                    i = element(source, opaque(m), slots, s) * V + like(first, j)
                    step = element(source, tall, slots, 0) * V
                    value = column_again(source, i, step, mine, center, squared)
                elif squared:
                    value = fma((near + widen(mean)) * (near + widen(mean)), count, widen(m2))
                else:
                    value = fma(near, count, widen(total))
                put_warp_sum(value if mine > 0 else 0.0, V, j, work)
                j = opaque(j + 1)
            cuda.syncthreads()
            t = thread()
            if t < columns:
                value, center = sum_warps(work, t, columns), get(centers, t)
                if turn == 0:
                    moved = center + value / as_float64(rows)
                    put(centers, t, moved if math.isfinite(moved) else center)
                elif squared:
                    put(found, t * 4 + 3, value)
                else:
                    put(found, t * 4, as_float64(rows))
                    put(found, t * 4 + 1, center)
                    put(found, t * 4 + 2, value)
                    m2_ = get(found, t * 4 + 3) - value * (value / as_float64(rows))
                    put(found, t * 4 + 3, m2_)
            cuda.syncthreads()
            turn = opaque(turn + 1)
        t = opaque(thread())
        if t < columns:
            finish_found(
                source, found, t * 4, weight, bias, running_mean, running_var, kinds, momentum,
                eps, table, C, index(cuda.blockIdx.x) * columns + t, affine, t, SPACE,
            )  # fmt: skip
        cuda.syncthreads()
        here = opaque(column)
        means = get_vector(source, affine, here)
        scales = get_vector(source, affine, here + SPACE)
        shifts = get_vector(source, affine, here + 2 * SPACE)
        m = opaque(m)
        at, by = element(source, m, slots, s), element(source, tall, slots, 0)
        io = (source, residual, other, bits, target)
        at = finish_row(io, s0, at, by, V, mine > 0, means, scales, shifts, floor)
        at = finish_row(io, s1, at, by, V, mine > 1, means, scales, shifts, floor)
        at = finish_row(io, s2, at, by, V, FOUR and mine > 2, means, scales, shifts, floor)
        at = finish_row(io, s3, at, by, V, FOUR and mine > 3, means, scales, shifts, floor)

    return forward_columns


@inline
def finish_row(io, slot, at, by, V, wanted, mean, scale, shift, floor):
    """Normalize and store slot number `at`, if it is wanted; and the number of the next."""
    source, residual, other, bits, target = io
    if wanted:
        finish_whole(source, residual, other, bits, target, at, V, slot, mean, scale, shift, floor)
    return at + by


@inline
def add_row(x, slot, grad, bits, at, V, given, column, relu, wanted, total, products):
    """Sums of g and of ``g * xhat`` of each column, after a row more, if it is wanted."""
    means, units, scales, shifts = given
    if wanted:
        here = opaque(column)
        kept = bits_of(bits, at, like(at, 0), like(at, V))
        xmu = decode(x, opaque(slot)) - get_vector(x, means, here)
        scale, shift = get_vector(x, scales, here), get_vector(x, shifts, here)
        g = cut_off(x, opaque(grad), bits, kept, xmu, scale, shift, relu)
        total = total + g
        products = fma(g, xmu * get_vector(x, units, opaque(here)), products)
    return total, products


@inline
def store_row(io, slot, grad, at, V, given, coefficients, column, SPACE, relu, wanted):
    """Store slot number `at` of the input gradient, if it is wanted."""
    x, bits, target, passed, grad_residual = io
    means, _, scales, shifts = given
    if wanted:
        here = opaque(column)
        kept = bits_of(bits, at, like(at, 0), like(at, V))
        xmu = decode(x, hidden(slot)) - get_vector(x, means, here)
        scale, shift = get_vector(x, scales, here), get_vector(x, shifts, here)
        g = cut_off(x, hidden(grad), bits, kept, xmu, scale, shift, relu)
        if grad_residual != 0:
            store(passed, at * V, g)
        here = opaque(here)
        dx = input_gradient(
            g, xmu, get_vector(x, coefficients, here), get_vector(x, coefficients, here + SPACE),
            get_vector(x, coefficients, here + 2 * SPACE), get_vector(x, scales, opaque(here)),
        )  # fmt: skip
        store(target, at * V, dx)


def backward_columns(storage, aligned, wide):
    V = LANES[storage]
    SPACE = FUSED_WIDTH * LANES[storage]
    TWOFOLD, TRIPLE = 2 * SPACE, 3 * SPACE
    TWO = BACKWARD_ROWS[LANES[storage]] == 2
    WORK = WARPS * FUSED_WIDTH * LANES[storage]

    def backward_columns(
        grad_output: Address, x: Address, bits: Address, grad_input: Address,
        grad_residual: Address, rows: Size, C: Size, slots: Size, table: Address, sums: Address,
        kinds: Flag, relu: Flag,
    ) -> None:  # fmt: skip
        C, slots, rows = index(C), index(slots), index(rows)
        source = pointer(storage, aligned, wide, x)
        gradient = pointer(storage, aligned, wide, grad_output)
        target = pointer(storage, aligned, wide, grad_input)
        passed = pointer(storage, aligned, wide, grad_residual)
        width, tall = index(cuda.blockDim.x), index(cuda.blockDim.y)
        column, columns = index(cuda.threadIdx.x) * V, width * V
        base, s = index(cuda.blockIdx.x) * columns, index(cuda.blockIdx.x) * width
        s, m = s + index(cuda.threadIdx.x), index(cuda.threadIdx.y)
        a, b = element(source, m, slots, s), element(source, m + tall, slots, s)
        some, two = m < rows, TWO and m + tall < rows
        s0, g0 = load_wanted(source, a * V, some), load_wanted(gradient, a * V, some)
        s1, g1 = load_wanted(source, b * V, two), load_wanted(gradient, b * V, two)
        means, units = shared_like(source, SPACE), shared_like(source, SPACE)
        scales, shifts = shared_like(source, SPACE), shared_like(source, SPACE)
        one = like(C, 1)
        spread(source, table, C, MEAN, base, columns, one, C, means)
        spread_unit(source, table, C, base, columns, one, C, units)
        spread(source, table, C, SCALE, base, columns, one, C, scales)
        spread(source, table, C, SHIFT, base, columns, one, C, shifts)
        cuda.syncthreads()

        given = (means, units, scales, shifts)
        total = splat(source, as_float(source, like(C, 0)))
        products = total
        total, products = add_row(
            source, s0, g0, bits, a, V, given, column, relu, some, total, products
        )
        total, products = add_row(
            source, s1, g1, bits, b, V, given, column, relu, two, total, products
        )
        work, coefficients = shared_float64(WORK), shared_like(source, TRIPLE)
        sums_found = shared_float64(TWOFOLD)
        turn = like(C, 0)
        while turn < 2:
            j = like(C, 0)
            while j < V:
                value = widen(pick(total, j)) if turn == 0 else widen(pick(products, j))
                put_warp_sum(value, V, j, work)
                j = opaque(j + 1)
            cuda.syncthreads()
            t = thread()
            if t < columns:
                put(sums_found, turn * SPACE + t, sum_warps(work, t, columns))
            cuda.syncthreads()
            turn = opaque(turn + 1)
        t = thread()
        if t < columns:
            finish_sums_found(
                source, as_float64(rows), get(sums_found, t), get(sums_found, t + SPACE), table,
                sums, kinds, C, base + t, coefficients, t, SPACE,
            )  # fmt: skip
        cuda.syncthreads()
        io = (source, bits, target, passed, grad_residual)
        m = opaque(m)
        a, b = element(source, m, slots, s), element(source, m + tall, slots, s)
        store_row(io, s0, g0, a, V, given, coefficients, column, SPACE, relu, m < rows)
        store_row(
            io, s1, g1, b, V, given, coefficients, column, SPACE, relu, TWO and m + tall < rows
        )

    return backward_columns
