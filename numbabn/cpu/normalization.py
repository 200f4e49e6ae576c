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
    elements_to_boundary,
    empty_like_computed,
    load,
    load_upto,
    pointer,
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
    """Pointers to what the forward pass reads and writes; `residual` and `bits` may be None."""

    x: Any
    residual: Any
    bits: Any
    out: Any


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
def affine_of(x, table, c):
    """Channel c's numbers, in all lanes."""
    return Affine(
        splat_like(x, table[MEAN, c]),
        splat_like(x, table[SCALE, c]),
        splat_like(x, table[SHIFT, c]),
        splat64(table[INVSTD, c] if is_double(x) else 1.0),
    )


@function
def normalize_plane(io, i, end, bit, table, c, floor, streaming):
    """Elements i:end, all of channel c."""
    affine = affine_of(io.x, table, c)
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


@function
def spread_affine(table, c0, c1, L, params):
    """MEAN, SCALE, SHIFT and INVSTD of channels c0:c1 for each column, in rows 0 to 3."""
    spread(table[MEAN, c0:c1], L, params[0])
    spread(table[SCALE, c0:c1], L, params[1])
    spread(table[SHIFT, c0:c1], L, params[2])
    spread(table[INVSTD, c0:c1], L, params[3])


@inline
def affine_pointers(params):
    return pointer(params[0]), pointer(params[1]), pointer(params[2]), pointer(params[3])


@inline
def affine_at(io, params, j):
    unit = widen(load(params[3], j)) if is_double(io.x) else splat64(1.0)
    return Affine(load(params[0], j), load(params[1], j), load(params[2], j), unit)


@function
def normalize_rows(io, K, m0, m1, k0, width, params, floor, streaming):
    """Rows m0:m1 of columns k0:k0+width."""
    row_bits = (K + LANES - 1) // LANES
    lowest = splat_like(io.x, floor)
    columns = affine_pointers(params)
    for m in range(m0, m1):
        i = m * K + k0
        bit = m * row_bits + k0 // LANES
        j = head_of(io.out, io.bits, i, i + width, streaming)
        if j > 0:
            normalize_vector(io, i, bit, j, affine_at(io, columns, 0), lowest, False)
        while j + LANES <= width:
            normalize_vector(io, i + j, bit, LANES, affine_at(io, columns, j), lowest, streaming)
            j += LANES
            bit += 1
        if j < width:
            normalize_vector(io, i + j, bit, width - j, affine_at(io, columns, j), lowest, False)


@function
def columns_buffer(x, items, block, L):
    """Room for `items` numbers per column of a block, and for vectors that start anywhere in it."""
    return empty_like_computed(x, (items, block * L + 2 * LANES))
