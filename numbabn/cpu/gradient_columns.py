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
    gradient_end,
    gradient_head,
    only_read,
    put_pair,
    read_pair,
    sum_part,
    with_hints,
)
from numbabn.cpu.memory import follows_sequences, load, offset, put, store, values_in
from numbabn.cpu.normalization import LONG_ROW, Columns, affine_at, lead_of, spread_round
from numbabn.cpu.options import function, inline
from numbabn.cpu.reduction_columns import ahead_of, fold_all, rows_ahead
from numbabn.cpu.runs import along_columns, asks_for_targets
from numbabn.cpu.vector import LANES, blend, fma, splat64, widen


@function
def spread_slopes(slopes, C, c0, c1, L, columns):
    """Fill in the `slopes` of channels c0:c1."""
    spread_round(offset(slopes, GRAD_MEAN * C + c0), c1 - c0, L, columns.grad_mean)
    spread_round(offset(slopes, SLOPE * C + c0), c1 - c0, L, columns.slope)
    spread_round(offset(slopes, OFFSET * C + c0), c1 - c0, L, columns.offset)


@inline
def given(pointer, other):
    """`pointer`, or `other` in place of None."""
    if pointer is None:
        return other
    return pointer


@inline
def written(io):
    """What is written or, if nothing is, x."""
    return given(io.grad_input, given(io.grad_residual, io.x))


@inline
def writes(io):
    """Whether anything is written."""
    if io.grad_input is None:  # noqa: SIM102 - see `head_of`
        if io.grad_residual is None:
            return False
    return True


@inline
def grad_lead(io, K, k0, streaming):
    """`lead_of`, for what is `written`."""
    return lead_of(written(io), io.bits, K, k0, streaming)


@inline
def slopes_at(columns, slope, j):
    """Columns j:j+16; None where there are none."""
    if slope is None:
        return None
    return Slopes(load(columns.grad_mean, j), load(slope, j), load(columns.offset, j))


@inline
def numbers_at(columns, j):
    return affine_at(columns, j), slopes_at(columns, columns.slope, j)


@inline
def without_slopes(columns):
    return Columns(columns.mean, columns.scale, columns.shift, columns.unit, None, None, None)


@inline
def read(io, i, bit, numbers, relu):
    return read_pair(io, i, bit, numbers[0], relu)


@inline
def write(io, i, bit, pair, numbers, relu, streaming):
    put_pair(io, i, LANES, pair[0], pair[1], numbers[0], numbers[1], streaming)


# Eval mode's gradients of columns `without_slopes`, else training's.
gradient_rows = along_columns(numbers_at, gradient_head, gradient_end, read, write)


@inline
def add_four(g0, h0, g1, h1, g2, h2, g3, h3):
    """Four vectors' sums of g and of ``g * h``."""
    even, odd = fma(g2, h2, g0 * h0), fma(g3, h3, g1 * h1)
    return (g0 + g2) + (g1 + g3), even + odd


@inline
def sum_four(io, i, K, bit, row_bits, count, affine, relu, streaming):
    """`add_four` of `count` lanes of four rows, from i on; stores what eval mode knows.

    All are loaded before anything is stored: rows are often multiples of 4 KiB apart, and
    processors compare the last 12 bits of an address first.
    """
    if count < LANES:
        g0, h0 = sum_part(io, i, bit, count, affine, relu)
        g1, h1 = sum_part(io, i + K, bit + row_bits, count, affine, relu)
        g2, h2 = sum_part(io, i + 2 * K, bit + 2 * row_bits, count, affine, relu)
        g3, h3 = sum_part(io, i + 3 * K, bit + 3 * row_bits, count, affine, relu)
        return add_four(g0, h0, g1, h1, g2, h2, g3, h3)
    g0, x0 = read_pair(io, i, bit, affine, relu)
    g1, x1 = read_pair(io, i + K, bit + row_bits, affine, relu)
    g2, x2 = read_pair(io, i + 2 * K, bit + 2 * row_bits, affine, relu)
    g3, x3 = read_pair(io, i + 3 * K, bit + 3 * row_bits, affine, relu)
    put_pair(io, i, LANES, g0, x0, affine, None, streaming)
    put_pair(io, i + K, LANES, g1, x1, affine, None, streaming)
    put_pair(io, i + 2 * K, LANES, g2, x2, affine, None, streaming)
    put_pair(io, i + 3 * K, LANES, g3, x3, affine, None, streaming)
    unit = affine.unit
    return add_four(g0, x0 * unit, g1, x1 * unit, g2, x2 * unit, g3, x3 * unit)


@inline
def sum_one(io, i, bit, count, affine, relu, streaming):
    """The same of one row."""
    if count < LANES:
        g, xhat = sum_part(io, i, bit, count, affine, relu)
        return g, g * xhat
    g, xmu = read_pair(io, i, bit, affine, relu)
    put_pair(io, i, LANES, g, xmu, affine, None, streaming)
    return g, g * (xmu * affine.unit)


@inline
def add_strip(io, i, K, bit, row_bits, rows, j, count, columns, relu, streaming, sums, products):
    """Add `count` lanes of rows, from i on, to the running sums of columns j:j+16.

    In the same order whatever the count: which columns are in whole vectors depends on addresses.
    """
    affine = affine_at(columns, j)
    before, before_products = load(sums, j), load(products, j)
    total, total_products = before, before_products
    while rows >= 4:
        four, four_products = sum_four(io, i, K, bit, row_bits, count, affine, relu, streaming)
        total, total_products = total + widen(four), total_products + widen(four_products)
        i += 4 * K
        bit += 4 * row_bits
        rows -= 4
    while rows > 0:
        one, product = sum_one(io, i, bit, count, affine, relu, streaming)
        total, total_products = total + widen(one), total_products + widen(product)
        i += K
        bit += row_bits
        rows -= 1
    if count < LANES:
        total = blend(count, total, before)
        total_products = blend(count, total_products, before_products)
    store(sums, j, total)
    store(products, j, total_products)


@function
def add_strips(
    io, i, K, bit, row_bits, rows, lead, width, columns, relu, streaming, sums, products
):
    """Add rows, the first from i on, to the running sums of `width` columns."""
    if lead > 0:
        add_strip(io, i, K, bit, row_bits, rows, 0, lead, columns, relu, streaming, sums, products)
    j = lead
    while j + LANES <= width:
        add_strip(
            io, i + j, K, bit, row_bits, rows, j, LANES, columns, relu, streaming, sums, products
        )
        j += LANES
        bit += 1
    if j < width:
        add_strip(
            io, i + j, K, bit, row_bits, rows, j, width - j, columns, relu, streaming, sums,
            products,
        )  # fmt: skip


@inline
def take_vector(io, i, j, bit, columns, relu, streaming):
    """The 16 lanes of g and of xhat at columns j:j+16 of a row; stores what eval mode knows."""
    affine = affine_at(columns, j)
    g, xmu = read_pair(io, i + j, bit, affine, relu)
    put_pair(io, i + j, LANES, g, xmu, affine, None, streaming)
    return g, xmu * affine.unit


@function
def add_rows_in_turn(
    io, i, K, bit, row_bits, lead, width, columns, relu, streaming, sums, products, few
):
    """`add_strips` of four rows, one after the other, in the order of memory, to the same bits.

    What the even and the odd rows come to is in L1 meanwhile, in `few`: four numbers per column.
    """
    if lead > 0:
        add_strip(io, i, K, bit, row_bits, 4, 0, lead, columns, relu, streaming, sums, products)
    whole = width - (width - lead) % LANES
    step = (width + LANES - 1) // LANES * LANES
    odd, even_products, odd_products = (
        offset(few, step),
        offset(few, 2 * step),
        offset(few, 3 * step),
    )
    for row in range(2):
        total, product = offset(few, row * step), offset(few, (2 + row) * step)
        b = bit + row * row_bits
        for j in range(lead, whole, LANES):
            g, h = take_vector(io, i + row * K, j, b, columns, relu, streaming)
            store(total, j, g)
            store(product, j, g * h)
            b += 1
    b = bit + 2 * row_bits
    for j in range(lead, whole, LANES):
        g, h = take_vector(io, i + 2 * K, j, b, columns, relu, streaming)
        store(few, j, load(few, j) + g)
        store(even_products, j, fma(g, h, load(even_products, j)))
        b += 1
    b = bit + 3 * row_bits
    for j in range(lead, whole, LANES):
        g, h = take_vector(io, i + 3 * K, j, b, columns, relu, streaming)
        total = load(few, j) + (load(odd, j) + g)
        product = load(even_products, j) + fma(g, h, load(odd_products, j))
        store(sums, j, load(sums, j) + widen(total))
        store(products, j, load(products, j) + widen(product))
        b += 1
    if whole < width:
        b = bit + (whole - lead) // LANES
        add_strip(
            io, i + whole, K, b, row_bits, 4, whole, width - whole, columns, relu, streaming, sums,
            products,
        )  # fmt: skip


@function
def sum_rows(
    io, K, m0, m1, k0, lead, width, in_turn, tall, columns, relu, streaming, sums, products, few
):
    """Per column of k0:k0+width, add g and ``g * (x - MEAN) * UNIT`` of rows m0:m1.

    Stores what eval mode knows. `lead` of the columns come before the first boundary of 64 bytes,
    and `tall` rows make a strip, unless four at a time go `in_turn`.
    """
    row_bits = (K + LANES - 1) // LANES
    m = m0
    while m < m1:
        i = m * K + k0
        bit = m * row_bits + k0 // LANES
        if in_turn and m + 4 <= m1:
            add_rows_in_turn(
                io, i, K, bit, row_bits, lead, width, columns, relu, streaming, sums, products, few
            )
            m += 4
        else:
            rows = min(tall, m1 - m)
            add_strips(
                io, i, K, bit, row_bits, rows, lead, width, columns, relu, streaming, sums, products
            )
            m += rows


# Elements of rows that are summed before they are written: x and g of them stay in a core's cache.
# Else there are more in a piece, and hints end with the last.
PIECE = 4096
# Columns of whole rows from memory that are gone through one row after the other. Bytes of rows
# that are not, where nothing is written; and for which hints are of no use, where the processor
# follows sequences.
MOST_IN_TURN = 512
SHORT_ROW = 256
# Bytes between lines that are in each other's way before they are full, or multiples of these.
RIVALS = 2048
# Rows in a strip of columns, and half as many where they are rivals; fewer where they would be
# longer than hints reach.
TALLEST, LOWEST = 16, 4


@inline
def grad_strip(width, rivals, ahead):
    """How many rows make a strip."""
    tall = TALLEST // 2 if rivals else TALLEST
    while tall > LOWEST and tall * width > ahead.elements > 0:
        tall //= 2
    return tall


@function
def column_grad_sums(
    io, K, m0, m1, k0, lead, width, ahead, columns, relu, streaming, sums, products, few
):
    """The same, past the caches if `streaming`; `ahead` says whether x and g are far from here.

    Memory and large caches like to be read and written in one sequence, and rows whose lines are
    rivals have to be. So what is written comes row after row when a few were summed (measured, rows
    of 2 to 8 KiB: 0.65 to 1 of the time); or, of rows of up to `MOST_IN_TURN` columns from memory,
    sums come in turn as well, unless they are short and begin in the middle of a vector (`apart`).
    Only the rest is written as it is summed.
    """
    lead = min(lead, width)
    short = values_in(io.x, SHORT_ROW) >= K
    rivals = K % values_in(io.x, RIVALS) == 0
    apart = K < LONG_ROW and gradient_head(io, k0, k0 + K, streaming) > 0
    in_turn = streaming and not apart and width == K <= MOST_IN_TURN and (writes(io) or not short)
    ask_targets = asks_for_targets(io.x, ahead.stop * K, streaming)
    at_once = in_turn or not writes(io) or not (ask_targets or rivals or apart)
    tall, reach = grad_strip(width, rivals, ahead), ahead.elements
    if not in_turn:
        reach = rows_ahead(ahead, width, tall) * K
    elif follows_sequences() and short:
        reach = 0
    known = without_slopes(columns)
    rows = tall * max(1, (8 * PIECE if at_once else PIECE) // (tall * width))
    for m in range(m0, m1, rows):
        end = min(m1, m + rows)
        hint = ahead_of(ahead, reach, K, end)
        if at_once:
            sum_rows(
                with_hints(io, hint, None), K, m, end, k0, lead, width, in_turn, tall, columns,
                relu, streaming, sums, products, few,
            )  # fmt: skip
        else:
            sum_rows(
                only_read(io, hint), K, m, end, k0, lead, width, False, tall, columns, relu, False,
                sums, products, few,
            )  # fmt: skip
            target_hint = hint if ask_targets else 0
            gradient_rows(
                with_hints(io, None, target_hint), K, m, end, k0, lead, width, known, relu, False,
                streaming,
            )  # fmt: skip


@function
def column_grad_chunk(
    io, C, L, k, m0, m1, c0, c1, lead, ahead, columns, relu, streaming, work, few, space, partials,
    at,
):  # fmt: skip
    """Sums of rows m0:m1 of channels c0:c1, into chunk k of `partials`, from place `at` on.

    `work` and `few` are scratch: two and four times `space` numbers.
    """
    sums, products = work, offset(work, space)
    K, k0, width = C * L, c0 * L, (c1 - c0) * L
    for j in range(0, width, LANES):
        store(sums, j, splat64(0.0))
        store(products, j, splat64(0.0))
    column_grad_sums(
        io, K, m0, m1, k0, lead, width, ahead, columns, relu, streaming, sums, products, few
    )
    fold_all(sums, c1 - c0, L)
    fold_all(products, c1 - c0, L)
    count = splat64(np.float64((m1 - m0) * L))
    for c in range(0, c1 - c0, LANES):
        lanes = lanes_at(c, c1 - c0)
        put(partial_of(partials, k, COUNT), at + c, lanes, count, False)
        put(partial_of(partials, k, SUM_DY), at + c, lanes, load(sums, c), False)
        put(partial_of(partials, k, SUM_DY_XHAT), at + c, lanes, load(products, c), False)
