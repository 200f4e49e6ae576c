"""Per-channel statistics that can be merged: a count, a mean and a sum of squared deviations.

A large batch is normalized as one by several workers, or in several bites, when each computes the
`Stats` of its own part and `merge_stats` joins them. The merge is nearly exact, so the parts may be
cut anywhere: the sums are carried in twice the working precision.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from numbabn import checks

__all__ = ["Stats", "merge_stats"]

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Stats:
    """Count, mean and sum of squared deviations of each channel of some data.

    Parameters
    ----------
    count : int
        Number of values per channel, the same for every channel; 0 or more.
    mean : ndarray of float64, shape (C,)
        Mean of each channel. With a count of 0 its values mean nothing.
    m2 : ndarray of float64, shape (C,)
        ``Σ (x - mean)²`` of each channel.

    Raises
    ------
    TypeError
        If ``count`` is not an integer, or ``mean`` or ``m2`` does not hold real numbers.
    ValueError
        If ``count`` is negative, or ``mean`` and ``m2`` are not two vectors of one length.

    Examples
    --------
    >>> import numpy as np
    >>> first = Stats(2, np.array([1.0]), np.array([2.0]))  # of 0, 2
    >>> second = Stats(1, np.array([4.0]), np.array([0.0]))  # of 4
    >>> both = first.merge(second)
    >>> both.count, both.mean.tolist(), both.m2.tolist(), both.unbiased_var.tolist()
    (3, [2.0], [8.0], [4.0])
    """

    count: int
    mean: FloatArray
    m2: FloatArray

    def __post_init__(self) -> None:
        """Check the fields and bring them to their types."""
        try:
            count = operator.index(self.count)
        except TypeError:
            kind = type(self.count).__name__
            raise TypeError(f"count: expected an integer, got {kind} {self.count!r}") from None
        if count < 0:
            raise ValueError(f"count: expected 0 or more, got {count}")
        mean, m2 = _vector("mean", self.mean), _vector("m2", self.m2)
        if m2.shape != mean.shape:
            raise ValueError(f"m2: expected shape {mean.shape}, that of mean, got {m2.shape}")
        object.__setattr__(self, "count", count)
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "m2", m2)

    @property
    def var(self) -> FloatArray:
        """Biased variance ``m2/count``, shape (C,): what training normalizes with.

        NaN where there is no data.
        """
        return self.m2 / self.count if self.count > 0 else np.full_like(self.m2, np.nan)

    @property
    def unbiased_var(self) -> FloatArray:
        """Unbiased variance ``m2/(count - 1)``, shape (C,): what running statistics hold.

        NaN where there are fewer than two values.
        """
        return self.m2 / (self.count - 1) if self.count > 1 else np.full_like(self.m2, np.nan)

    def merge(self, other: Stats) -> Stats:
        """Statistics of both sets of data together; see `merge_stats`.

        Parameters
        ----------
        other : Stats
            Statistics of the same channels over other data.

        Returns
        -------
        Stats

        Raises
        ------
        TypeError
            If ``other`` is not a `Stats`.
        ValueError
            If ``other`` has another number of channels.
        """
        if not isinstance(other, Stats):
            raise TypeError(f"other: expected Stats, got {type(other).__name__}")
        if other.mean.shape != self.mean.shape:
            raise ValueError(
                f"other: expected mean of shape {self.mean.shape}, got {other.mean.shape}"
            )
        return merge_stats([self, other])


def merge_stats(stats: Iterable[Stats]) -> Stats:
    """Statistics of several sets of data taken together.

    Parameters
    ----------
    stats : iterable of Stats
        At least one, all with the same number of channels. They are summed in the order given, so
        that the same list gives the same bits. Those with a count of 0 change nothing.

    Returns
    -------
    Stats
        The mean within an ulp of the exact merge of what was given, m2 within a few.

    Raises
    ------
    TypeError
        If an item is not a `Stats`.
    ValueError
        If there is no item, or if two differ in their number of channels.

    Notes
    -----
    With ``n = Σ nᵢ``, first ``mean = Σ nᵢ·meanᵢ / n``, then ``m2 = Σ (m2ᵢ + nᵢ·(meanᵢ - mean)²)``;
    for two sets this is the pairwise update of Chan, Golub and LeVeque 1983 (The American
    Statistician 37, 242-247). The mean is carried as an unevaluated sum of two float64 numbers,
    with the error-free sum of Knuth and product of Dekker 1971 (Numerische Mathematik 18, 224-242).

    Examples
    --------
    >>> import numpy as np
    >>> parts = [Stats(1, np.array([float(i)]), np.array([0.0])) for i in range(5)]
    >>> merged = merge_stats(parts)
    >>> merged.count, merged.mean.tolist(), merged.var.tolist()
    (5, [2.0], [2.0])
    """
    items = list(stats)
    if not items:
        raise ValueError("stats: expected at least one Stats, got none")
    for i, item in enumerate(items):
        if not isinstance(item, Stats):
            raise TypeError(f"stats[{i}]: expected Stats, got {type(item).__name__}")
        if item.mean.shape != items[0].mean.shape:
            raise ValueError(
                f"stats[{i}]: expected mean of shape {items[0].mean.shape}, got {item.mean.shape}"
            )
        if not isinstance(item.mean, np.ndarray):
            raise TypeError(
                f"stats[{i}]: expected NumPy arrays, got CUDA arrays; copy mean and m2 to the host"
            )
    filled = [item for item in items if item.count > 0]
    if not filled:
        nothing = np.zeros_like(items[0].mean)
        return Stats(0, nothing, nothing.copy())
    if len(filled) == 1:  # copies, so that no two Stats share their arrays
        return Stats(filled[0].count, filled[0].mean.copy(), filled[0].m2.copy())
    with np.errstate(all="ignore"):  # NaN and infinity are values, and stay in their channel
        return _merge(filled)


def _merge(parts: list[Stats]) -> Stats:
    """Merge two or more non-empty parts."""
    n = sum(part.count for part in parts)
    high, low = np.zeros_like(parts[0].mean), np.zeros_like(parts[0].mean)
    for part in parts:
        product, product_error = _two_product(part.mean, float(part.count))
        high, sum_error = _two_sum(high, product)
        low = low + (sum_error + product_error)
    mean = (high + low) / n
    product, product_error = _two_product(mean, float(n))
    rest = (((high - product) - product_error) + low) / n
    mean, rest = _two_sum(mean, rest)

    # Beyond about 1e300 the error-free product overflows; there the mean is a plain sum of shares.
    exact = np.isfinite(mean) & np.isfinite(rest)
    shares = np.sum([part.mean * (part.count / n) for part in parts], axis=0)
    mean, rest = np.where(exact, mean, shares), np.where(exact, rest, 0.0)

    m2, low = np.zeros_like(mean), np.zeros_like(mean)
    for part in parts:
        deviation = (part.mean - mean) - rest
        m2, within_error = _two_sum(m2, part.m2)
        m2, between_error = _two_sum(m2, part.count * deviation**2)
        low = low + (within_error + between_error)
    return Stats(n, mean, np.where(np.isfinite(low), m2 + low, m2))


def _two_sum(a: FloatArray, b: FloatArray) -> tuple[FloatArray, FloatArray]:
    """``a + b`` rounded, and its rounding error exactly (Knuth)."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


def _two_product(a: FloatArray, b: float) -> tuple[FloatArray, FloatArray]:
    """``a * b`` rounded, and its rounding error exactly (Dekker)."""
    product = a * b
    splitter = 2.0**27 + 1  # cuts the 53 bits of a float64 into two halves whose products are exact
    a_high = splitter * a - (splitter * a - a)
    b_high = splitter * b - (splitter * b - b)
    a_low, b_low = a - a_high, b - b_high
    error = a_low * b_low - (((product - a_high * b_high) - a_low * b_high) - a_high * b_low)
    return product, error


def _vector(name: str, value: object) -> FloatArray:
    """``value`` as a float64 vector, or an error that names it."""
    if checks.is_cuda(value):  # which `batch_norm_stats` made
        return cast(FloatArray, value)
    array = np.asarray(value)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name}: expected real numbers, got dtype {array.dtype}")
    if array.ndim != 1:
        raise ValueError(f"{name}: expected shape (C,), got {array.shape}")
    return np.asarray(array, np.float64)
