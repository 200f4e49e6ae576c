"""Sums over the batch, of the statistics: what planes and columns have in common.

Both views are cut into chunks by `schedule`, from the shape alone; a chunk of a channel sums to
one entry of `partials` (see `channels`), whoever computes it. float32 and 16-bit values are summed
relative to the mean of the channel's first values: a few vectors in float32, their sums in float64.
That makes one pass enough, unless much cancels or squares leave float32's range, which the sums
show; then the chunk of that channel is summed again, all in float64. float64 values take a second
pass over the chunk, about the chunk's own mean, while the chunk is in cache.
"""

import numpy as np

from numbabn.cpu.channels import CENTER, COUNT, M2, SUM, partial_of
from numbabn.cpu.memory import load_upto, prefetch, put
from numbabn.cpu.options import inline
from numbabn.cpu.vector import clip_below, fma, positive_bits, splat64, splat_like, widen

# Values whose mean a channel is summed relative to.
FIRST_VALUES = 8


@inline
def as_summed(wide, value):
    """`value` as it is, or in float64 if `wide` is not None."""
    if wide is None:
        return value
    return widen(value)


@inline
def difference(x, i, count, center, wide):
    """`count` lanes of ``x - center``, from x[i] on."""
    return as_summed(wide, load_upto(x, i, count, splat_like(x, 0.0))) - center


@inline
def add_one(x, i, count, center, wide, total, squares):
    """Add such a vector and its square to two sums."""
    d = difference(x, i, count, center, wide)
    return total + d, fma(d, d, squares)


@inline
def ask_eight(x, i, step, ahead):
    """Ask for eight vectors, `ahead` elements on from x[i]; not if that is 0."""
    if ahead != 0:
        for k in range(8):
            prefetch(x, i + ahead + k * step)


@inline
def add_eight(x, i, step, count, center, wide):
    """The sums of eight vectors ``d = x - center`` and of their squares, `step` elements apart.

    Chains are of four, so that rounding errors do not pile up; and few vectors are at hand at a
    time, as AVX2 has registers for no more than eight of 16 float32 numbers.
    """
    even = difference(x, i, count, center, wide)
    odd = difference(x, i + step, count, center, wide)
    even_squares, odd_squares = even * even, odd * odd
    even, even_squares = add_one(x, i + 2 * step, count, center, wide, even, even_squares)
    odd, odd_squares = add_one(x, i + 3 * step, count, center, wide, odd, odd_squares)
    even, even_squares = add_one(x, i + 4 * step, count, center, wide, even, even_squares)
    odd, odd_squares = add_one(x, i + 5 * step, count, center, wide, odd, odd_squares)
    even, even_squares = add_one(x, i + 6 * step, count, center, wide, even, even_squares)
    odd, odd_squares = add_one(x, i + 7 * step, count, center, wide, odd, odd_squares)
    return even + odd, even_squares + odd_squares


# Squares of float32 numbers lose digits below this, as their mean.
SMALLEST_SQUARE = 1e-30
# The most by which the mean of the squares may exceed the variance: it multiplies rounding errors.
MOST_CANCELLED = 4.0


@inline
def exact_lanes(count, total, squares):
    """A bit per lane: the squares stayed in float32's range, and m2 is what is left of their sum.

    So also where a value is NaN: it would be again.
    """
    m2 = squares - total * total * splat64(1.0 / count)
    enough = positive_bits(squares - splat64(SMALLEST_SQUARE * count))
    not_too_much = positive_bits(splat64(1e300) - squares)
    return enough & not_too_much & positive_bits(m2 * splat64(MOST_CANCELLED) - squares)


@inline
def all_lanes(bits, lanes):
    """Whether the first `lanes` of the bits are all set."""
    first = (np.int64(1) << np.int64(lanes)) - 1
    return (np.int64(bits) & first) == first


@inline
def put_chunk(count, center, total, squares, partials, k, at, lanes):
    """Store what a chunk of `lanes` channels summed to."""
    m2 = squares - total * total * splat64(1.0 / count)
    put(partial_of(partials, k, COUNT), at, lanes, splat64(count), False)
    put(partial_of(partials, k, CENTER), at, lanes, center, False)
    put(partial_of(partials, k, SUM), at, lanes, total, False)
    put(partial_of(partials, k, M2), at, lanes, clip_below(m2, splat64(0.0)), False)
