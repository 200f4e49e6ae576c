"""The forward pass over the elements: ``y = relu((x - mean) * scale + shift + residual)``.

The ReLU is a lower limit on y, `floor`: 0, or -inf for none, so it costs one instruction and no
second version of a kernel. Where the backward pass will need to know what the ReLU cut off and
cannot recompute it (there was a residual), `bits` takes one bit per element: rows of
``ceil(row / 16)`` uint16 numbers, a row being one plane, or one row of columns.

Streaming stores need 64-byte boundaries: what is stored in sequence then begins with a short piece
up to the first (with `bits`, which fix where vectors begin, rows must begin on one already).
"""

from typing import Any, NamedTuple

from numbabn.cpu.boundaries import PAGE, elements_to_boundary, elements_to_page, step_between
from numbabn.cpu.channels import MEAN, SCALE, SHIFT, UNIT
from numbabn.cpu.memory import (
    aligned,
    load,
    load_first,
    load_upto,
    offset,
    pointer,
    prefetch,
    put,
    store,
    values_in,
)
from numbabn.cpu.options import function, inline
from numbabn.cpu.reduction_columns import spread
from numbabn.cpu.runs import along_columns, along_planes, along_rows
from numbabn.cpu.vector import (
    LANES,
    blend,
    clip_below,
    fma,
    positive_bits,
    splat_like,
)


class Forward(NamedTuple):
    """Pointers to what the forward pass reads and writes; `residual` and `bits` may be None.

    Each vector of x is read together with a hint that the one `ahead` elements on will be, and each
    of out written together with one for that `target_ahead` on, unless these are None (or 0, of
    what is read). A row's whole vectors are gone through by `step`, which may be negative.
    """

    x: Any
    residual: Any
    bits: Any
    out: Any
    ahead: Any
    target_ahead: Any
    step: Any


@inline
def forward_io(x, residual, bits, out, ahead):
    """Of these arrays."""
    x, residual, bits, out = pointer(x), pointer(residual), pointer(bits), pointer(out)
    return Forward(x, residual, bits, out, ahead, None, step_between(out, x, residual))


@inline
def with_ahead(io, ahead):
    return Forward(io.x, io.residual, io.bits, io.out, ahead, io.target_ahead, io.step)


@inline
def with_target_ahead(io, target_ahead):
    return Forward(io.x, io.residual, io.bits, io.out, io.ahead, target_ahead, io.step)


class Affine(NamedTuple):
    """Vectors: ``(x - mean) * scale + shift``.

    `unit` is the inverse standard deviation: ``x - mean`` times that can be multiplied by a
    gradient and summed without fear for the range of float32, or of subnormal numbers.
    """

    mean: Any
    scale: Any
    shift: Any
    unit: Any


@inline
def ask_ahead(source, i, ahead):
    if ahead is not None:  # noqa: SIM102 - see `head_of`
        if ahead != 0:
            prefetch(source, i + ahead)


@inline
def ask_target(target, i, ahead, streaming):
    """The same for what is written, which a processor fetches first.

    Hints to read, into L2: those to write gain less (measured on a Zen 4, this loop in C, rows of
    256 columns, 19 MB in all and less left of the last cache: 10 ns a vector without, 8 with hints
    to write, 4 with these).
    """
    if target is not None:  # noqa: SIM102 - see `head_of`
        if ahead is not None:  # noqa: SIM102
            if not streaming:
                prefetch(target, i + ahead)


@inline
def normalized(io, i, affine):
    """16 lanes of the result, before the ReLU."""
    ask_ahead(io.x, i, io.ahead)
    value = fma(load(io.x, i) - affine.mean, affine.scale, affine.shift)
    return add_residual(io.residual, i, LANES, value)


@inline
def put_normalized(io, i, bit, value, floor, streaming):
    """Store 16 lanes, and number `bit` of the bits."""
    note_bits(io.bits, bit, value)
    ask_target(io.out, i, io.target_ahead, streaming)
    put(io.out, i, LANES, clip_below(value, floor), streaming)


@function
def normalize_part(io, i, bit, count, affine, floor):
    """The same for fewer than 16 lanes: the ends of rows.

    A function of its own, as LLVM would otherwise fold it into the loops over whole vectors.
    """
    value = load_first(io.x, i, count, affine.mean) - affine.mean
    value = fma(value, affine.scale, affine.shift)
    value = add_residual(io.residual, i, count, value)
    note_bits(io.bits, bit, value)
    put(io.out, i, count, clip_below(value, splat_like(io.x, floor)), False)


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
    # Three ifs, as Numba drops the branches that a type decides of those of one condition only.
    if bits is None:  # noqa: SIM102
        if target is not None:  # noqa: SIM102
            if streaming:
                return min(end - i, elements_to_boundary(target, i))
    return 0


# Rows that are long enough for what it costs to begin them in the middle of a vector.
LONG_ROW = 512


@inline
def lead_of(target, bits, K, k0, streaming):
    """How many columns of each row, from column k0 on, lie before a boundary of 64 bytes.

    0 where that differs, or is not worth while: an access across a boundary costs up to two.
    """
    if bits is None:  # noqa: SIM102 - see `head_of`
        if streaming or K >= LONG_ROW:
            lead = elements_to_boundary(target, k0)
            return lead if lead == elements_to_boundary(target, k0 + K) else 0
    return 0


@inline
def shift_of(target, bits, C, L):
    """How many channels on from the first the first block begins, for no two to share a line.

    Or a page, where rows are whole pages: hardware prefetchers read up to its end. Threads that
    write to what others write or prefetch are in each other's way: 196 rows of 256 columns, on two
    threads, took 34 instead of 13 us, and 49 rows of 2048 columns 32 instead of 21.
    """
    if bits is None:  # noqa: SIM102 - see `head_of`
        if L == 1 and C % LANES == 0:
            if C % values_in(target, PAGE) == 0:
                return elements_to_page(target, 0)
            return elements_to_boundary(target, 0)
    return 0


@inline
def piece_of(step, block, C, shift):
    """The channels of a step: those of a block come in two, as after the last comes the first."""
    item = step // 2
    first, last = min(C, item * block) + shift, min(C, (item + 1) * block) + shift
    if step % 2 == 0:
        return min(C, first), min(C, last)
    return max(C, first) - C, max(C, last) - C


# --- planes ---------------------------------------------------------------------------------


@inline
def affine_of(x, table, C, c):
    """Channel c's numbers, in all lanes."""
    return Affine(
        splat_like(x, table[MEAN * C + c]),
        splat_like(x, table[SCALE * C + c]),
        splat_like(x, table[SHIFT * C + c]),
        splat_like(x, table[UNIT * C + c]),
    )


@inline
def blend_affine(count, a, b):
    """`a` in the first `count` lanes, `b` in the others."""
    return Affine(
        blend(count, a.mean, b.mean),
        blend(count, a.scale, b.scale),
        blend(count, a.shift, b.shift),
        blend(count, a.unit, b.unit),
    )


@inline
def numbers_of(io, table, slopes, C, c):
    return affine_of(io.x, table, C, c)


@inline
def forward_head(io, i, end, streaming):
    return head_of(io.out, io.bits, i, end, streaming)


@inline
def normalize_whole(io, i, bit, affine, floor, streaming):
    lowest = splat_like(io.x, floor)
    put_normalized(io, i, bit, normalized(io, i, affine), lowest, streaming)


normalize_run = along_planes(
    numbers_of, blend_affine, forward_head, normalize_part, normalize_whole
)
normalize_runs = along_rows(normalize_run)


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
def aligned_after(buffer, lead):
    """Where to begin in scratch memory, so that number `lead` is on a boundary of 64 bytes."""
    return offset(aligned(buffer), (LANES - lead) % LANES)


@inline
def columns_of(buffer, space, lead):
    """`buffer` has room for `COLUMN_ROWS` times `space` numbers, a multiple of 16, and 32 more."""
    buffer = aligned_after(buffer, lead)
    return Columns(
        buffer,
        offset(buffer, space),
        offset(buffer, 2 * space),
        offset(buffer, 3 * space),
        offset(buffer, 4 * space),
        offset(buffer, 5 * space),
        offset(buffer, 6 * space),
    )


@inline
def spread_round(values, count, L, out):
    """`spread`, and the first 16 columns again after the last."""
    spread(values, count, L, out)
    store(out, count * L, load(out, 0))


@function
def spread_affine(table, C, c, count, L, columns):
    """Fill in what a table of C channels says of channels c:c+count."""
    spread_round(offset(table, MEAN * C + c), count, L, columns.mean)
    spread_round(offset(table, SCALE * C + c), count, L, columns.scale)
    spread_round(offset(table, SHIFT * C + c), count, L, columns.shift)
    spread_round(offset(table, UNIT * C + c), count, L, columns.unit)


@inline
def affine_at(columns, j):
    """Columns j:j+16."""
    return Affine(
        load(columns.mean, j), load(columns.scale, j), load(columns.shift, j), load(columns.unit, j)
    )


@inline
def runs_on(bits, L):
    """Whether columns are long enough planes to be gone through as such; bits follow columns."""
    if bits is None:
        return L >= LANES
    return False


@inline
def normalized_at(io, i, bit, affine, floor):
    return normalized(io, i, affine)


@inline
def write_normalized(io, i, bit, value, affine, floor, streaming):
    put_normalized(io, i, bit, value, splat_like(io.x, floor), streaming)


normalize_rows = along_columns(
    affine_at, forward_head, normalize_part, normalized_at, write_normalized
)
