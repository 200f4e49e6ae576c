"""What happens once per channel: from sums to the few numbers that the big loops need.

Everything here is scalar float64; `x` is a pointer, and only its type matters. `table` holds
five numbers per channel, shape ``(5, C)``:

========== ===========================================================================
MEAN       the mean, rounded to the type that the kernels compute with
REST       what that rounding left out, in standard deviations: mean = MEAN + REST / INVSTD
INVSTD     r = 1 / sqrt(var + eps)
SCALE      a = weight * r
SHIFT      b = bias - weight * REST, so that y = (x - MEAN) * a + b
========== ===========================================================================

`slopes` holds three more for the training mode's input gradient, shape ``(3, C)``:
``dx = SCALE * ((dy - GRAD_MEAN) + ((x - MEAN) * SLOPE + OFFSET))``.

`partials` holds what each chunk of a channel summed to. In the forward pass its shape is
``(C, chunks, 4)``: count, center, sum of ``x - center``, and squared deviations from the chunk's
mean. In the backward pass it is ``(C, chunks, 3)``: count, ``sum(dy)`` and ``sum(dy * xhat)``,
the latter not yet times INVSTD unless x is float64 (see `gradients`).

Functions take pointers, `memory.pointer`: arrays would cost atomic reference counting per channel.
"""

from typing import Any, NamedTuple

import numpy as np

from numbabn.cpu.memory import pointer
from numbabn.cpu.options import function, inline
from numbabn.cpu.vector import is_double, round_like

MEAN, REST, INVSTD, SCALE, SHIFT = range(5)
TABLE_ROWS = 5
GRAD_MEAN, SLOPE, OFFSET = range(3)
SLOPE_ROWS = 3


COUNT, CENTER, SUM, M2 = range(4)
SUM_DY, SUM_DY_XHAT = 1, 2


class Channels(NamedTuple):
    """Pointers to arrays of channels, and which of them were given."""

    C: int
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
def add_compensated(total, lost, value):
    """A new total, and all that was lost to rounding so far (Neumaier 1974)."""
    new = total + value
    if abs(total) >= abs(value):
        return new, lost + ((total - new) + value)
    return new, lost + ((value - new) + total)


@inline
def close_sum(total, lost):
    return total if np.isnan(lost) else total + lost  # lost is NaN once total is infinite


@inline
def finite(correction):
    """A small correction, or nothing where infinity or NaN make it meaningless."""
    return correction if np.isfinite(correction) else 0.0


@function
def merge_chunks(x, partials, chunks):
    """Count, center, sum of ``x - center``, and m2 of a channel, from its chunks in order.

    The pooled form of Chan, Golub & LeVeque (1979): first the common mean, then
    ``m2 = sum(m2_k + n_k * (mean_k - mean)**2)``, whose terms are all positive.
    """
    center = partials[CENTER]
    if chunks == 1:
        return partials[COUNT], center, partials[SUM], partials[M2]
    count = total = lost = 0.0
    if not is_double(x):  # all have one center, and float64 has precision to spare
        for k in range(chunks):
            count += partials[4 * k + COUNT]
            total += partials[4 * k + SUM]
        mean, m2 = total / count, 0.0
        n, per_value = 0.0, 0.0
        for k in range(chunks):
            if n != partials[4 * k + COUNT]:
                n = partials[4 * k + COUNT]
                per_value = 1.0 / n
            apart = partials[4 * k + SUM] * per_value - mean
            m2 += partials[4 * k + M2] + n * apart * apart
        return count, center, total, m2
    for k in range(chunks):
        n = partials[4 * k + COUNT]
        count += n
        apart = (partials[4 * k + CENTER] - center) * n
        total, lost = add_compensated(total, lost, apart)
        total, lost = add_compensated(total, lost, partials[4 * k + SUM])
    total = close_sum(total, lost)
    mean = total / count
    m2 = lost = 0.0
    for k in range(chunks):
        n = partials[4 * k + COUNT]
        apart = (partials[4 * k + CENTER] - center) + partials[4 * k + SUM] / n - mean
        m2, lost = add_compensated(m2, lost, partials[4 * k + M2] + n * apart * apart)
    return count, center, total, close_sum(m2, lost)


@inline
def fill_column(channels, c, mean, rest, invstd):
    """Write channel c's column of the table."""
    gamma = np.float64(channels.weight[c]) if channels.has_weight else 1.0
    beta = np.float64(channels.bias[c]) if channels.has_bias else 0.0
    C, table = channels.C, channels.table
    table[MEAN * C + c] = mean
    table[REST * C + c] = rest
    table[INVSTD * C + c] = invstd
    table[SCALE * C + c] = gamma * invstd
    table[SHIFT * C + c] = beta - finite(gamma * rest)


@inline
def round_mean(x, mean):
    """The mean in the type that kernels compute with, and what that leaves out."""
    rounded = np.float64(round_like(x, mean))
    return rounded, finite(mean - rounded)


@inline
def finish_given(x, mean, invstd, channels, c):
    """Fill channel c's column of the table from a mean and invstd that are known."""
    rounded, low = round_mean(x, mean)
    fill_column(channels, c, rounded, finite(low * invstd), invstd)


@function
def finish_training(x, partials, chunks, channels, c):
    """Merge a channel's chunks, update its running statistics, fill its column of the table."""
    count, center, total, m2 = merge_chunks(x, partials, chunks)
    mean = center + total / count
    momentum = channels.momentum
    if channels.has_mean:
        old = (1.0 - momentum) * channels.running_mean[c]
        channels.running_mean[c] = old + momentum * mean
    if channels.has_var:
        old = (1.0 - momentum) * channels.running_var[c]
        channels.running_var[c] = old + momentum * (m2 / (count - 1.0))
    invstd = 1.0 / np.sqrt(m2 / count + channels.eps)
    rounded, _ = round_mean(x, mean)
    # sum(x - rounded), so that nothing underflows even if all of x is subnormal.
    left = total - (rounded - center) * count
    fill_column(channels, c, rounded, finite(left * invstd / count), invstd)


@function
def finish_backward(x, partials, chunks, C, c, table, sums, slopes):
    """From a channel's chunks to ``sums[:, c] = (dbias, dweight)`` and its `slopes`.

    With x̂ = (x - mean) * r and a = weight * r, Ioffe & Szegedy (2015) have
    ``dx = a * (dy - mean(dy) - x̂ * mean(dy * x̂))``.
    """
    count = sum_dy = sum_dy_xhat = lost_dy = lost_dy_xhat = 0.0
    for k in range(chunks):
        count += partials[3 * k + COUNT]
        if not is_double(x):
            sum_dy += partials[3 * k + SUM_DY]
            sum_dy_xhat += partials[3 * k + SUM_DY_XHAT]
            continue
        sum_dy, lost_dy = add_compensated(sum_dy, lost_dy, partials[3 * k + SUM_DY])
        sum_dy_xhat, lost_dy_xhat = add_compensated(
            sum_dy_xhat, lost_dy_xhat, partials[3 * k + SUM_DY_XHAT]
        )
    sum_dy, sum_dy_xhat = close_sum(sum_dy, lost_dy), close_sum(sum_dy_xhat, lost_dy_xhat)
    invstd, rest = table[INVSTD * C + c], table[REST * C + c]
    if not is_double(x):
        sum_dy_xhat *= invstd
        if np.isinf(invstd) and count > 1.0:
            sum_dy_xhat = np.nan  # xhat is infinite, and of either sign
    sum_dy_xhat -= finite(rest * sum_dy)
    sums[c] = sum_dy
    sums[C + c] = sum_dy_xhat
    fill_slopes(x, C, c, sum_dy / count, sum_dy_xhat / count, table, slopes)


@inline
def fill_slopes(x, C, c, mean_dy, mean_dy_xhat, table, slopes):
    """Write channel c's column of `slopes`."""
    rounded, low = round_mean(x, mean_dy)
    slopes[GRAD_MEAN * C + c] = rounded
    slopes[SLOPE * C + c] = -mean_dy_xhat * table[INVSTD * C + c]
    slopes[OFFSET * C + c] = finite(mean_dy_xhat * table[REST * C + c]) - low
