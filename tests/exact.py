"""The accuracy suite's data and its expected values, free of the rounding that is being measured.

float32 results are held against float64 arithmetic, float64 results against decimal arithmetic of
50 digits; the formulas are the same, on arrays of either. They are in centred form, for float64
too loses most of its digits when ``x`` is large beside its spread.
"""

from __future__ import annotations

from decimal import Context, Decimal, localcontext
from types import SimpleNamespace

import numpy as np
from support import ulp, wide

# Enough digits that 1e6 ± 1e-2 squared and summed keeps far more than float64's 16.
DIGITS = Context(prec=50, Emax=10**6, Emin=-(10**6))

# Name → values of one channel, from a generator and the shape (N, L): batch and position.
DISTRIBUTIONS = {
    "standard normal": lambda rng, N, L: rng.standard_normal((N, L)),
    "mean 1e4, std 1": lambda rng, N, L: 1e4 + rng.standard_normal((N, L)),
    "mean 1e6, std 1e-2": lambda rng, N, L: 1e6 + 1e-2 * rng.standard_normal((N, L)),
    "mean 100, std 0.01": lambda rng, N, L: 100 + 0.01 * rng.standard_normal((N, L)),
    "constant 0.1": lambda rng, N, L: np.full((N, L), 0.1),
    "constant -12345.678": lambda rng, N, L: np.full((N, L), -12345.678),
    "scale 1e-20": lambda rng, N, L: 1e-20 * rng.standard_normal((N, L)),
    "scale 1e18": lambda rng, N, L: 1e18 * rng.standard_normal((N, L)),
    "outlier 1e6 first": lambda rng, N, L: _outlier(rng, N, L, 0),
    "outlier 1e6 in the middle": lambda rng, N, L: _outlier(rng, N, L, N * L // 2),
    "lognormal, sigma 3": lambda rng, N, L: rng.lognormal(0, 3, (N, L)),
    "drift along the batch": lambda rng, N, L: (
        np.linspace(-1e3, 1e3, N)[:, None] + rng.standard_normal((N, L))
    ),
    "denormals": None,  # of a scale that depends on the dtype
}
# Standard deviations below the smallest normal number. float64 stays just below it: there is no
# wider type for its statistics, and far down a mean has fewer than float64's bits.
DENORMALS = {"float32": 1e-40, "float64": 1e-308, "float16": 1e-6, "bfloat16": 1e-40}


def _outlier(rng, N, L, at):
    values = rng.standard_normal((N, L))
    values.flat[at] = 1e6
    return values


def samples(names, N, L, dtype, seed=0):
    """One channel of each distribution: shape (N, C, L), dtype ``dtype``."""
    rng = np.random.default_rng(seed)
    denormal = DENORMALS[dtype.name]
    channels = []
    for name in names:
        draw = DISTRIBUTIONS[name]
        values = draw(rng, N, L) if draw else denormal * rng.standard_normal((N, L))
        with np.errstate(over="ignore", under="ignore"):
            channels.append(values.astype(dtype))
    return np.stack(channels, axis=1)


def lift(a, exactly):
    """``a`` as Decimals, or in float64."""
    if not exactly:
        return np.asarray(a).astype(np.float64)
    values = [Decimal(float(v)) for v in np.ravel(a)]
    return np.array(values, object).reshape(np.shape(a))


def both_passes(rows, grads, mean, var, weight, bias, *, training, eps):
    """Expected results of both passes on ``rows`` and ``grads``, each of shape (C, m).

    They are Decimals for float64 input, else float64; ``running_mean`` and ``running_var`` are the
    batch's (that is, with momentum 1), ``dweight_terms`` and ``dbias_terms`` are sums of |terms|.
    """
    exactly = rows.dtype == np.float64
    C, m = rows.shape
    with localcontext(DIGITS):
        x, dy = lift(rows, exactly), lift(grads, exactly)
        gamma = lift(np.ones(C) if weight is None else weight, exactly)[:, None]
        beta = lift(np.zeros(C) if bias is None else bias, exactly)[:, None]
        # Differences from one of the values are exact (or nearly so), however large the values.
        first = x[:, :1]
        centred = x - first
        shift = centred.sum(1, keepdims=True) / m
        centred = centred - shift
        rest = centred.sum(1, keepdims=True) / m
        centred = centred - rest
        batch_mean = first + (shift + rest)
        batch_var = (centred * centred).sum(1, keepdims=True) / m
        if training:
            used = batch_var
        else:
            centred, used = x - lift(mean, exactly)[:, None], lift(var, exactly)[:, None]
        r = 1 / np.sqrt(used + (Decimal(eps) if exactly else eps))
        xhat = centred * r
        terms = dy * xhat
        dbias, dweight = dy.sum(1), terms.sum(1)
        dx = dy
        if training:
            # Σ(dy - mean)·x̂ = Σdy·x̂, but sums fewer digits away when dy has a large mean.
            middle = dy - dy.sum(1, keepdims=True) / m
            dx = middle - xhat * ((middle * xhat).sum(1, keepdims=True) / m)
        return SimpleNamespace(
            y=gamma * xhat + beta,
            dx=gamma * r * dx,
            dweight=dweight,
            dbias=dbias,
            dweight_terms=np.abs(terms).sum(1),
            dbias_terms=np.abs(dy).sum(1),
            dx_terms=np.abs(gamma * r * dy),
            running_mean=batch_mean[:, 0],
            running_var=batch_var[:, 0] * m / (m - 1),
        )


def error_in_ulp(actual, expected, scale=None):
    """Largest error of each row, in ulp of the row's largest expected |value|, or of ``scale``."""
    C = actual.shape[0]
    actual, expected = actual.reshape(C, -1), expected.reshape(C, -1)
    scale = np.abs(expected).max(1) if scale is None else scale
    values = wide(actual)
    finite = np.isfinite(values).all(1)
    values[~finite] = 0.0  # Decimal's own infinities would raise
    with localcontext(DIGITS):
        error = np.abs(lift(values, expected.dtype == object) - expected).max(1).astype(np.float64)
    with np.errstate(over="ignore"):  # an error against an expected value of zero may be that large
        error = error / ulp(scale.astype(np.float64), actual.dtype)
    return np.where(finite, error, np.nan)
