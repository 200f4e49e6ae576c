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

Arrays of size 0 stand for a weight, bias or running statistic that was not given.
"""

import numpy as np

from numbabn.cpu.options import function, inline
from numbabn.cpu.vector import is_double, round_like

MEAN, REST, INVSTD, SCALE, SHIFT = range(5)
GRAD_MEAN, SLOPE, OFFSET = range(3)


COUNT, CENTER, SUM, M2 = range(4)
SUM_DY, SUM_DY_XHAT = 1, 2


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


@function
def sum_chunks(partials, row, item):
    """Sum of one item over a channel's chunks, in order."""
    total = lost = 0.0
    for k in range(partials.shape[1]):
        total, lost = add_compensated(total, lost, partials[row, k, item])
    return close_sum(total, lost)


@function
def merge_chunks(partials, row):
    """Count, center, sum of ``x - center``, and m2 of a channel, from its chunks in order.

    The pooled form of Chan, Golub & LeVeque (1979): first the common mean, then
    ``m2 = sum(m2_k + n_k * (mean_k - mean)**2)``, whose terms are all positive.
    """
    count = sum_chunks(partials, row, COUNT)
    center = partials[row, 0, CENTER]
    if partials.shape[1] == 1:
        return count, center, partials[row, 0, SUM], partials[row, 0, M2]
    total = lost = 0.0
    for k in range(partials.shape[1]):
        apart = (partials[row, k, CENTER] - center) * partials[row, k, COUNT]
        total, lost = add_compensated(total, lost, apart)
        total, lost = add_compensated(total, lost, partials[row, k, SUM])
    total = close_sum(total, lost)
    m2 = lost = 0.0
    for k in range(partials.shape[1]):
        n = partials[row, k, COUNT]
        apart = (partials[row, k, CENTER] - center) + partials[row, k, SUM] / n - total / count
        m2, lost = add_compensated(m2, lost, partials[row, k, M2] + n * apart * apart)
    return count, center, total, close_sum(m2, lost)


@function
def fill_column(table, c, mean, rest, invstd, weight, bias):
    """Write channel c's column of the table; `weight` and `bias` are arrays, maybe empty."""
    gamma = np.float64(weight[c]) if weight.size else 1.0
    beta = np.float64(bias[c]) if bias.size else 0.0
    table[MEAN, c] = mean
    table[REST, c] = rest
    table[INVSTD, c] = invstd
    table[SCALE, c] = gamma * invstd
    table[SHIFT, c] = beta - finite(gamma * rest)


@inline
def finite(correction):
    """A small correction, or nothing where infinity or NaN make it meaningless."""
    return correction if np.isfinite(correction) else 0.0


@function
def round_mean(x, mean):
    """The mean in the type that kernels compute with, and what that leaves out."""
    rounded = np.float64(round_like(x, mean))
    return rounded, finite(mean - rounded)


@function
def finish_training(
    x, partials, row, c, weight, bias, running_mean, running_var, momentum, eps, table
):
    """Merge a channel's chunks, update its running statistics, fill its column of the table."""
    count, center, total, m2 = merge_chunks(partials, row)
    mean = center + total / count
    if running_mean.size:
        running_mean[c] = (1.0 - momentum) * running_mean[c] + momentum * mean
    if running_var.size:
        running_var[c] = (1.0 - momentum) * running_var[c] + momentum * (m2 / (count - 1.0))
    invstd = 1.0 / np.sqrt(m2 / count + eps)
    rounded, _ = round_mean(x, mean)
    # sum(x - rounded), so that nothing underflows even if all of x is subnormal.
    left = total - (rounded - center) * count
    fill_column(table, c, rounded, finite(left * invstd / count), invstd, weight, bias)


@function
def finish_backward(x, partials, row, c, table, sums, slopes):
    """From a channel's chunks to ``sums[:, c] = (dbias, dweight)`` and its `slopes`.

    With x̂ = (x - mean) * r and a = weight * r, Ioffe & Szegedy (2015) have
    ``dx = a * (dy - mean(dy) - x̂ * mean(dy * x̂))``.
    """
    count = sum_chunks(partials, row, COUNT)
    sum_dy = sum_chunks(partials, row, SUM_DY)
    sum_dy_xhat = sum_chunks(partials, row, SUM_DY_XHAT)
    if not is_double(x):
        sum_dy_xhat *= table[INVSTD, c]
        if np.isinf(table[INVSTD, c]) and count > 1.0:
            sum_dy_xhat = np.nan  # xhat is infinite, and of either sign
    sum_dy_xhat -= finite(table[REST, c] * sum_dy)
    sums[0, c] = sum_dy
    sums[1, c] = sum_dy_xhat
    fill_slopes(x, c, sum_dy / count, sum_dy_xhat / count, table, slopes)


@function
def fill_slopes(x, c, mean_dy, mean_dy_xhat, table, slopes):
    """Write channel c's column of `slopes`."""
    rounded, low = round_mean(x, mean_dy)
    slopes[GRAD_MEAN, c] = rounded
    slopes[SLOPE, c] = -mean_dy_xhat * table[INVSTD, c]
    slopes[OFFSET, c] = finite(mean_dy_xhat * table[REST, c]) - low
