"""What happens once per channel: from sums to the few numbers that the big loops need.

Sixteen channels at a time, in float64 lanes; `x` is a pointer, and only its type matters. `table`
holds six numbers per channel, shape ``(6, C)``:

========== ===========================================================================
MEAN       the mean, rounded to the type that the kernels compute with
REST       what that rounding left out, in standard deviations: mean = MEAN + REST / INVSTD
INVSTD     r = 1 / sqrt(var + eps)
SCALE      a = weight * r
SHIFT      b = bias - weight * REST, so that y = (x - MEAN) * a + b
UNIT       r, rounded to that type and within its range: see `gradients`
========== ===========================================================================

`slopes` holds three more for the training mode's input gradient, shape ``(3, C)``:
``dx = SCALE * ((dy - GRAD_MEAN) + ((x - MEAN) * SLOPE + OFFSET))``.

`partials` holds what each chunk of each channel summed to, channels next to each other so that
they load as vectors. In the forward pass its shape is ``(chunks, 4, channels)``: count, center,
sum of ``x - center``, and squared deviations from the chunk's mean. In the backward pass it is
``(chunks, 3, channels)``: count, ``sum(dy)`` and ``sum(dy * (x - MEAN) * UNIT)``. `Partials`
points at it, or at part of it.

Functions take pointers, `memory.pointer`: arrays would cost atomic reference counting per channel.
"""

from typing import Any, NamedTuple

from numbabn.cpu.memory import load_upto, offset, pointer, put
from numbabn.cpu.options import function, inline
from numbabn.cpu.vector import (
    LANES,
    fma,
    is_double,
    narrow_like,
    root,
    splat64,
    where_finite,
    where_infinite,
    where_larger,
    where_nan,
    widen,
)

MEAN, REST, INVSTD, SCALE, SHIFT, UNIT = range(6)
TABLE_ROWS = 6
GRAD_MEAN, SLOPE, OFFSET = range(3)
SLOPE_ROWS = 3


COUNT, CENTER, SUM, M2 = range(4)
FORWARD_FIELDS = 4
SUM_DY, SUM_DY_XHAT = 1, 2
BACKWARD_FIELDS = 3


class Partials(NamedTuple):
    """Number ``numbers[(k * fields + field) * space + c]`` belongs to chunk k of channel c."""

    numbers: Any
    fields: int
    space: int
    chunks: int


@inline
def partial_of(partials, k, field):
    """Pointer to one number for each channel."""
    return offset(partials.numbers, (k * partials.fields + field) * partials.space)


@inline
def count_of(partials, k, c):
    """How many values of each channel chunk k has; those of channel c, as they are all the same."""
    return partial_of(partials, k, COUNT)[c]


@inline
def count_all(partials, c):
    """How many values each channel has; in a loop of its own, as it is not about vectors."""
    count = 0.0
    for k in range(partials.chunks):
        count += count_of(partials, k, c)
    return count


@inline
def partial_at(partials, k, field, c, count):
    """`count` channels' numbers, the first being c; 1 in the other lanes."""
    return load_upto(partial_of(partials, k, field), c, count, splat64(1.0))


class Channels(NamedTuple):
    """Pointers to arrays of channels, and which of them were given; `table` has so many columns."""

    columns: int
    weight: Any
    bias: Any
    running_mean: Any
    running_var: Any
    has_weight: bool
    has_bias: bool
    has_mean: bool
    has_var: bool
    momentum: float
    eps: float
    table: Any


@inline
def channels_of(weight, bias, running_mean, running_var, momentum, eps, table):
    """Arrays of size 0 stand for a weight, bias or running statistic that was not given."""
    return Channels(
        table.shape[1],
        pointer(weight),
        pointer(bias),
        pointer(running_mean),
        pointer(running_var),
        weight.size > 0,
        bias.size > 0,
        running_mean.size > 0,
        running_var.size > 0,
        momentum,
        eps,
        pointer(table),
    )


@inline
def read(numbers, c, count):
    """`count` channels' numbers as float64, the first being c; 1 in the other lanes."""
    return widen(load_upto(numbers, c, count, narrow_like(numbers, splat64(1.0))))


@inline
def write(numbers, c, count, value):
    """Store `count` lanes of a float64 vector in the type of `numbers`."""
    put(numbers, c, count, narrow_like(numbers, value), False)


@inline
def add_compensated(total, lost, value):
    """A new total, and all that was lost to rounding so far (Neumaier 1974)."""
    new = total + value
    return new, lost + where_larger(total, value, (total - new) + value, (value - new) + total)


@inline
def close_sum(total, lost):
    return where_nan(lost, total, total + lost)  # lost is NaN once total is infinite


@inline
def finite(correction):
    """A small correction, or nothing where infinity or NaN make it meaningless."""
    return where_finite(correction, correction, splat64(0.0))


@inline
def merge_chunks(x, partials, c, lanes):
    """Count, and lanes: center, sum of ``x - center`` and m2 of channels, from chunks in order."""
    if partials.chunks == 1:
        return (
            count_of(partials, 0, c),
            partial_at(partials, 0, CENTER, c, lanes),
            partial_at(partials, 0, SUM, c, lanes),
            partial_at(partials, 0, M2, c, lanes),
        )
    return merge_several(x, partials, c, lanes)


@function
def merge_several(x, partials, c, lanes):
    """The same of more than one chunk.

    The pooled form of Chan, Golub & LeVeque (1979): first the common mean, then
    ``m2 = sum(m2_k + n_k * (mean_k - mean)**2)``, whose terms are all positive.
    """
    center = partial_at(partials, 0, CENTER, c, lanes)
    zero = splat64(0.0)
    count, total, m2 = count_all(partials, c), zero, zero
    if not is_double(x):  # all have one center, and float64 has precision to spare
        for k in range(partials.chunks):
            total = total + partial_at(partials, k, SUM, c, lanes)
        minus_mean = total * splat64(-1.0 / count)
        for k in range(partials.chunks):
            n = count_of(partials, k, c)
            apart = fma(partial_at(partials, k, SUM, c, lanes), splat64(1.0 / n), minus_mean)
            m2 = m2 + fma(splat64(n) * apart, apart, partial_at(partials, k, M2, c, lanes))
        return count, center, total, m2
    lost = zero
    for k in range(partials.chunks):
        n = splat64(count_of(partials, k, c))
        apart = (partial_at(partials, k, CENTER, c, lanes) - center) * n
        total, lost = add_compensated(total, lost, apart)
        total, lost = add_compensated(total, lost, partial_at(partials, k, SUM, c, lanes))
    total = close_sum(total, lost)
    mean = total / splat64(count)
    lost = zero
    for k in range(partials.chunks):
        n = splat64(count_of(partials, k, c))
        apart = partial_at(partials, k, CENTER, c, lanes) - center
        apart = apart + partial_at(partials, k, SUM, c, lanes) / n - mean
        m2, lost = add_compensated(
            m2, lost, fma(n * apart, apart, partial_at(partials, k, M2, c, lanes))
        )
    return count, center, total, close_sum(m2, lost)


@inline
def unit_of(x, invstd):
    """`invstd` in the type that kernels compute with; its largest power of two stands for more."""
    rounded = widen(narrow_like(x, invstd))
    return where_infinite(rounded, where_infinite(invstd, invstd, splat64(2.0**127)), rounded)


@inline
def fill_columns(x, channels, c, lanes, at, mean, rest, invstd):
    """Write what is known of channels c:c+lanes into the table's columns from `at` on."""
    gamma = read(channels.weight, c, lanes) if channels.has_weight else splat64(1.0)
    beta = read(channels.bias, c, lanes) if channels.has_bias else splat64(0.0)
    C, table = channels.columns, channels.table
    write(table, MEAN * C + at, lanes, mean)
    write(table, REST * C + at, lanes, rest)
    write(table, INVSTD * C + at, lanes, invstd)
    write(table, SCALE * C + at, lanes, gamma * invstd)
    write(table, SHIFT * C + at, lanes, beta - finite(gamma * rest))
    write(table, UNIT * C + at, lanes, unit_of(x, invstd))


@inline
def round_mean(x, mean):
    """The mean in the type that kernels compute with, and what that leaves out."""
    rounded = widen(narrow_like(x, mean))
    return rounded, finite(mean - rounded)


@inline
def finish_given(x, mean, invstd, channels, c, lanes, at):
    """Fill `lanes` columns of the table, from `at` on, for channels with known mean and invstd."""
    rounded, low = round_mean(x, mean)
    fill_columns(x, channels, c, lanes, at, rounded, finite(low * invstd), invstd)


@function
def finish_running(x, channels, c, lanes, at):
    """Fill `lanes` columns of the table, from `at` on, from the running statistics."""
    invstd = inverse_root(read(channels.running_var, c, lanes) + splat64(channels.eps))
    finish_given(x, read(channels.running_mean, c, lanes), invstd, channels, c, lanes, at)


@inline
def inverse_root(value):
    return splat64(1.0) / root(value)


@inline
def update(running, c, lanes, momentum, new):
    """Move `lanes` running statistics towards the batch's."""
    old = read(running, c, lanes) * splat64(1.0 - momentum)
    write(running, c, lanes, old + splat64(momentum) * new)


@function
def finish_training(x, partials, channels, first, c, lanes):
    """Merge the chunks of up to 16 channels, c:c+lanes, whose partials begin at `first`.

    Updates their running statistics, and fills their columns of the table.
    """
    count, center, total, m2 = merge_chunks(x, partials, first, lanes)
    # Divisions and roots are most of what is done here: float64 alone gets its last bit by one.
    per_value = splat64(1.0 / count)
    mean = fma(total, per_value, center)
    if channels.has_mean:
        update(channels.running_mean, c, lanes, channels.momentum, mean)
    if channels.has_var:
        degrees = count - 1.0
        unbiased = m2 / splat64(degrees) if is_double(x) else m2 * splat64(1.0 / degrees)
        update(channels.running_var, c, lanes, channels.momentum, unbiased)
    invstd = inverse_root(fma(m2, per_value, splat64(channels.eps)))
    rounded, _ = round_mean(x, mean)
    # sum(x - rounded), so that nothing underflows even if all of x is subnormal.
    left = total - (rounded - center) * splat64(count)
    fill_columns(x, channels, c, lanes, c, rounded, finite(left * invstd * per_value), invstd)


@function
def finish_backward(x, partials, C, first, c, lanes, table, sums, slopes):
    """From the chunks of up to 16 channels, whose partials begin at `first`, to their results.

    These are ``sums[:, c] = (dbias, dweight)`` and, if not None, the columns of `slopes`. With
    x̂ = (x - mean) * r and a = weight * r, Ioffe & Szegedy (2015) have
    ``dx = a * (dy - mean(dy) - x̂ * mean(dy * x̂))``.
    """
    zero = splat64(0.0)
    sum_dy, sum_dy_xhat, lost_dy, lost_dy_xhat = zero, zero, zero, zero
    for k in range(partials.chunks):
        chunk_dy = partial_at(partials, k, SUM_DY, first, lanes)
        chunk_dy_xhat = partial_at(partials, k, SUM_DY_XHAT, first, lanes)
        if is_double(x):
            sum_dy, lost_dy = add_compensated(sum_dy, lost_dy, chunk_dy)
            sum_dy_xhat, lost_dy_xhat = add_compensated(sum_dy_xhat, lost_dy_xhat, chunk_dy_xhat)
        else:
            sum_dy = sum_dy + chunk_dy
            sum_dy_xhat = sum_dy_xhat + chunk_dy_xhat
    sum_dy, sum_dy_xhat = close_sum(sum_dy, lost_dy), close_sum(sum_dy_xhat, lost_dy_xhat)
    invstd, rest = read(table, INVSTD * C + c, lanes), read(table, REST * C + c, lanes)
    rounding = invstd / read(table, UNIT * C + c, lanes)
    sum_dy_xhat = sum_dy_xhat * where_finite(rounding, rounding, splat64(1.0))
    sum_dy_xhat = sum_dy_xhat - finite(rest * sum_dy)
    write(sums, c, lanes, sum_dy)
    write(sums, C + c, lanes, sum_dy_xhat)
    if slopes is not None:
        per_value = splat64(1.0 / count_all(partials, first))
        mean_dy, mean_dy_xhat = sum_dy * per_value, sum_dy_xhat * per_value
        fill_slopes(x, C, c, lanes, mean_dy, mean_dy_xhat, table, slopes)


@inline
def fill_slopes(x, C, c, lanes, mean_dy, mean_dy_xhat, table, slopes):
    """Write the columns of channels c:c+lanes of `slopes`."""
    rounded, low = round_mean(x, mean_dy)
    invstd, rest = read(table, INVSTD * C + c, lanes), read(table, REST * C + c, lanes)
    write(slopes, GRAD_MEAN * C + c, lanes, rounded)
    write(slopes, SLOPE * C + c, lanes, (splat64(0.0) - mean_dy_xhat) * invstd)
    write(slopes, OFFSET * C + c, lanes, finite(mean_dy_xhat * rest) - low)


@inline
def lanes_at(c, stop):
    """How many of channels c:stop make the next vector."""
    return min(LANES, stop - c)
