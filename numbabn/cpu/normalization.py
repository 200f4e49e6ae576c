"""The forward pass over the elements: ``y = relu((x - mean) * scale + shift + residual)``.

The ReLU is a lower limit on y, `floor`: 0, or -inf for none, so it costs one instruction and no
second version of a kernel. Where the backward pass will need to know what the ReLU cut off and
cannot recompute it (there was a residual), `bits` takes one bit per element: rows of
``ceil(row / 16)`` uint16 numbers, a row being one plane, or one row of columns.

Streaming stores need 64-byte boundaries: a row then begins with a short piece up to the first
(with `bits`, which fix where vectors begin, rows must be on such boundaries already).
"""

from typing import Any, NamedTuple

from numbabn.cpu.channels import INVSTD, MEAN, SCALE, SHIFT
from numbabn.cpu.memory import (
    aligned,
    elements_to_boundary,
    load,
    load_upto,
    offset,
    prefetch,
    put,
)
from numbabn.cpu.options import function, inline
from numbabn.cpu.reductions import spread
from numbabn.cpu.vector import (
    LANES,
    clip_below,
    fma,
    is_double,
    positive_bits,
    splat64,
    splat_like,
    widen,
)


class Forward(NamedTuple):
    """Pointers to what the forward pass reads and writes; `residual` and `bits` may be None.

    Each vector of x is read together with a hint that the one `ahead` elements on will be.
    """

    x: Any
    residual: Any
    bits: Any
    out: Any
    ahead: Any


class Affine(NamedTuple):
    """Vectors: ``(x - mean) * scale + shift``.

    `unit` is 1, or for float64 x the inverse standard deviation: times that, ``x - mean`` can be
    multiplied by a gradient even if both are subnormal.
    """

    mean: Any
    scale: Any
    shift: Any
    unit: Any


@inline
def normalize_vector(io, i, bit, count, affine, floor, streaming):
    """`count` lanes at x[i] and out[i]; number `bit` of the bits."""
    if io.ahead:
        prefetch(io.x, i + io.ahead)
    value = load_upto(io.x, i, count, affine.mean) - affine.mean
    value = fma(value, affine.scale, affine.shift)
    value = add_residual(io.residual, i, count, value)
    note_bits(io.bits, bit, value)
    put(io.out, i, count, clip_below(value, floor), streaming)


@inline
def add_residual(residual, i, count, value):
    if residual is not None:
        return value + load_upto(residual, i, count, value)
    return value


@inline
def note_bits(bits, bit, value):
    if bits is not None:
        bits[bit] = positive_bits(value)


@inline
def head_of(target, bits, i, end, streaming):
    """How many elements of ``target[i:end]`` lie before the boundary that streaming needs."""
    if bits is None:  # noqa: SIM102 - two ifs: Numba drops the branch of the one that is decided by a type
        if streaming:
            return min(end - i, elements_to_boundary(target, i))
    return 0


# --- planes ---------------------------------------------------------------------------------


@inline
def affine_of(x, table, C, c):
    """Channel c's numbers, in all lanes."""
    return Affine(
        splat_like(x, table[MEAN * C + c]),
        splat_like(x, table[SCALE * C + c]),
        splat_like(x, table[SHIFT * C + c]),
        splat64(table[INVSTD * C + c] if is_double(x) else 1.0),
    )


@function
def normalize_plane(io, i, end, bit, affine, floor, streaming):
    """Elements i:end, all of the channel of `affine`."""
    lowest = splat_like(io.x, floor)
    head = head_of(io.out, io.bits, i, end, streaming)
    if head > 0:
        normalize_vector(io, i, bit, head, affine, lowest, False)
        i += head
    while i + LANES <= end:
        normalize_vector(io, i, bit, LANES, affine, lowest, streaming)
        i += LANES
        bit += 1
    if i < end:
        normalize_vector(io, i, bit, end - i, affine, lowest, False)


# --- columns --------------------------------------------------------------------------------


COLUMN_ROWS = 7


class Columns(NamedTuple):
    """Pointers to one number for each column of a block, in the order of `Affine` and `Slopes`."""

    mean: Any
    scale: Any
    shift: Any
    unit: Any
    grad_mean: Any
    slope: Any
    offset: Any


@inline
def columns_of(buffer, space):
    """`buffer` has room for `COLUMN_ROWS` times `space` numbers, a multiple of 16."""
    buffer = aligned(buffer)
    return Columns(
        buffer,
        offset(buffer, space),
        offset(buffer, 2 * space),
        offset(buffer, 3 * space),
        offset(buffer, 4 * space),
        offset(buffer, 5 * space),
        offset(buffer, 6 * space),
    )


@function
def spread_affine(table, C, c0, c1, L, columns):
    """Fill in what the table says of channels c0:c1."""
    spread(offset(table, MEAN * C + c0), c1 - c0, L, columns.mean)
    spread(offset(table, SCALE * C + c0), c1 - c0, L, columns.scale)
    spread(offset(table, SHIFT * C + c0), c1 - c0, L, columns.shift)
    if is_double(columns.unit):
        spread(offset(table, INVSTD * C + c0), c1 - c0, L, columns.unit)


@inline
def affine_at(columns, j):
    """Columns j:j+16."""
    unit = widen(load(columns.unit, j)) if is_double(columns.unit) else splat64(1.0)
    return Affine(load(columns.mean, j), load(columns.scale, j), load(columns.shift, j), unit)


@inline
def normalize_four(io, i, K, bit, row_bits, count, affine, floor, streaming):
    """Four rows, so that what is known of the columns is loaded once."""
    normalize_vector(io, i, bit, count, affine, floor, streaming)
    normalize_vector(io, i + K, bit + row_bits, count, affine, floor, streaming)
    normalize_vector(io, i + 2 * K, bit + 2 * row_bits, count, affine, floor, streaming)
    normalize_vector(io, i + 3 * K, bit + 3 * row_bits, count, affine, floor, streaming)


@function
def normalize_rows(io, K, m0, m1, k0, width, columns, floor, streaming):
    """Rows m0:m1 of columns k0:k0+width."""
    row_bits = (K + LANES - 1) // LANES
    lowest = splat_like(io.x, floor)
    m = m0
    # Rows that begin alike, relative to a boundary, can be worked on together.
    while m + 4 <= m1 and (K % LANES == 0 or not streaming):
        i = m * K + k0
        bit = m * row_bits + k0 // LANES
        j = head_of(io.out, io.bits, i, i + width, streaming)
        if j > 0:
            normalize_four(io, i, K, bit, row_bits, j, affine_at(columns, 0), lowest, False)
        while j + LANES <= width:
            affine = affine_at(columns, j)
            normalize_four(io, i + j, K, bit, row_bits, LANES, affine, lowest, streaming)
            j += LANES
            bit += 1
        if j < width:
            affine = affine_at(columns, j)
            normalize_four(io, i + j, K, bit, row_bits, width - j, affine, lowest, False)
        m += 4
    while m < m1:
        i = m * K + k0
        bit = m * row_bits + k0 // LANES
        j = head_of(io.out, io.bits, i, i + width, streaming)
        if j > 0:
            normalize_vector(io, i, bit, j, affine_at(columns, 0), lowest, False)
        while j + LANES <= width:
            normalize_vector(io, i + j, bit, LANES, affine_at(columns, j), lowest, streaming)
            j += LANES
            bit += 1
        if j < width:
            normalize_vector(io, i + j, bit, width - j, affine_at(columns, j), lowest, False)
        m += 1
