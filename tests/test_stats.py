"""Merging statistics, against exact rational arithmetic."""

from __future__ import annotations

import copy
import pickle
from fractions import Fraction

import numpy as np
import pytest

from numbabn.stats import Stats, merge_stats


def exact_merge(parts):
    """Mean and m2 of the merged parts as Fractions, one pair per channel."""
    n = sum(part.count for part in parts)
    result = []
    for c in range(parts[0].mean.size):
        means = [Fraction(float(part.mean[c])) for part in parts]
        mean = sum((part.count * m for part, m in zip(parts, means, strict=True)), Fraction()) / n
        m2 = sum(
            Fraction(float(part.m2[c])) + part.count * (m - mean) ** 2
            for part, m in zip(parts, means, strict=True)
        )
        result.append((mean, m2))
    return result


def ulps(value, exact):
    """Distance from a float to a Fraction in units of the exact value's last place."""
    unit = Fraction(float(np.spacing(abs(float(exact))))) if exact else Fraction(1, 2**1074)
    return float(abs(Fraction(float(value)) - exact) / unit)


def stats_of(x):
    """Statistics of rows of values, shape (m, C), in float64."""
    mean = x.mean(0)
    return Stats(len(x), mean, ((x - mean) ** 2).sum(0))


@pytest.mark.parametrize(
    ("offset", "scale"),
    [(0.0, 1.0), (1e6, 1e-2), (-3e4, 1e-6), (1e15, 1.0), (0.1, 0.0), (0, 1e150)],
)
@pytest.mark.parametrize("k", [2, 3, 17])
def test_merge_is_exact_to_a_few_ulp(offset, scale, k):
    rng = np.random.default_rng(k)
    parts = [
        Stats(
            int(rng.integers(1, 10**6)),
            offset + scale * rng.standard_normal(5),
            scale**2 * rng.random(5),
        )
        for _ in range(k)
    ]
    merged = merge_stats(parts)
    assert merged.count == sum(part.count for part in parts)
    for c, (mean, m2) in enumerate(exact_merge(parts)):
        assert ulps(merged.mean[c], mean) <= 1
        assert ulps(merged.m2[c], m2) <= 4


def test_means_that_cancel_keep_their_digits():
    # The plain weighted sum loses everything here: the exact mean is 2/3.
    parts = [Stats(1, np.array([m]), np.array([0.0])) for m in (1e17, 2.0, -1e17)]
    merged = merge_stats(parts)
    assert merged.mean[0] == 2 / 3
    (_, m2) = exact_merge(parts)[0]
    assert ulps(merged.m2[0], m2) <= 4


def test_neighbouring_means_of_a_constant_channel():
    # Deviations of a rounded mean would be wrong by as much as the deviations are large.
    parts = [Stats(3, np.array([0.1]), np.zeros(1)), Stats(5, np.nextafter([0.1], 1), np.zeros(1))]
    ((mean, m2),) = exact_merge(parts)
    merged = merge_stats(parts)
    assert ulps(merged.mean[0], mean) <= 1
    assert float(merged.m2[0]) == pytest.approx(float(m2), rel=1e-12)
    same = merge_stats([Stats(3, np.array([0.1]), np.zeros(1))] * 7)
    assert (same.mean[0], same.m2[0]) == (0.1, 0.0)


def test_parts_of_real_data_give_the_whole():
    rng = np.random.default_rng(0)
    x = 1e4 + rng.standard_normal((1000, 3))
    whole = stats_of(x)
    merged = merge_stats(stats_of(part) for part in np.array_split(x, [1, 2, 70, 500, 501]))
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-15)
    np.testing.assert_allclose(merged.m2, whole.m2, rtol=1e-10)
    np.testing.assert_allclose(merged.var, x.var(0), rtol=1e-10)
    np.testing.assert_allclose(merged.unbiased_var, x.var(0, ddof=1), rtol=1e-10)


def test_merge_is_associative_to_rounding():
    rng = np.random.default_rng(1)
    a, b, c = (Stats(n, 1e3 + rng.standard_normal(64), rng.random(64)) for n in (7, 1000, 3))
    left, right, flat = a.merge(b).merge(c), a.merge(b.merge(c)), merge_stats([a, b, c])
    for other in (right, flat):
        assert other.count == left.count
        np.testing.assert_allclose(other.mean, left.mean, rtol=5e-16)
        np.testing.assert_allclose(other.m2, left.m2, rtol=1e-12)
    again = merge_stats([a, b, c])
    assert np.array_equal(again.mean, flat.mean)
    assert np.array_equal(again.m2, flat.m2)


def test_empty_parts_change_nothing():
    some = Stats(4, np.array([1.5, -2.0]), np.array([0.3, 0.7]))
    empty = Stats(0, np.full(2, np.nan), np.full(2, np.inf))
    for parts in ([some, empty], [empty, some], [empty, some, empty], [some]):
        merged = merge_stats(parts)
        assert merged.count == 4
        assert np.array_equal(merged.mean, some.mean)
        assert np.array_equal(merged.m2, some.m2)
        assert not np.shares_memory(merged.mean, some.mean)
        assert not np.shares_memory(merged.m2, some.m2)
    nothing = empty.merge(empty)
    assert (nothing.count, nothing.mean.tolist(), nothing.m2.tolist()) == (0, [0, 0], [0, 0])
    assert np.isnan(nothing.var).all()
    assert np.isnan(nothing.unbiased_var).all()


def test_variances_of_one_value():
    one = Stats(1, np.array([3.0]), np.array([0.0]))
    assert one.var.tolist() == [0.0]
    assert np.isnan(one.unbiased_var).all()


def test_nan_and_inf_stay_in_their_channel():
    a = Stats(2, np.array([np.nan, np.inf, 1.0, 1.0]), np.array([1.0, 1.0, np.inf, 1.0]))
    b = Stats(2, np.array([1.0, 1.0, 1.0, 3.0]), np.ones(4))
    for merged in (a.merge(b), b.merge(a)):
        np.testing.assert_array_equal(merged.mean, [np.nan, np.inf, 1.0, 2.0])
        np.testing.assert_array_equal(merged.m2, [np.nan, np.nan, np.inf, 6.0])


def test_huge_means_do_not_overflow():
    a = Stats(1000, np.array([1e307]), np.array([0.0]))
    merged = a.merge(Stats(3000, np.array([1e307]), np.array([0.0])))
    assert merged.mean[0] == pytest.approx(1e307, rel=1e-15)
    assert merged.m2[0] >= 0


def test_fields_are_converted_and_frozen():
    stats = Stats(np.int32(3), np.ones(2, np.float32), [1, 2])
    assert type(stats.count) is int
    assert stats.mean.dtype == stats.m2.dtype == np.float64
    with pytest.raises(AttributeError):
        stats.count = 4


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_stats_can_be_sent(clone):
    stats = Stats(3, np.array([1.0, 2.0]), np.array([0.5, 0.25]))
    again = clone(stats)
    assert again.count == 3
    assert np.array_equal(again.mean, stats.mean)
    assert np.array_equal(again.m2, stats.m2)


ONE = np.ones(1)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Stats(2.5, ONE, ONE), TypeError, "count: expected an integer, got float 2.5"),
        (lambda: Stats(-1, ONE, ONE), ValueError, "count: expected 0 or more, got -1"),
        (lambda: Stats(1, ONE * 1j, ONE), TypeError, "mean: expected real numbers"),
        (lambda: Stats(1, ONE, ["a"]), TypeError, "m2: expected real numbers"),
        (lambda: Stats(1, np.ones((1, 1)), ONE), ValueError, r"mean: expected shape \(C,\)"),
        (lambda: Stats(1, ONE, np.ones(2)), ValueError, r"m2: expected shape \(1,\).*\(2,\)"),
        (lambda: merge_stats([]), ValueError, "stats: expected at least one"),
        (lambda: merge_stats([Stats(1, ONE, ONE), 3]), TypeError, r"stats\[1\]: .* got int"),
        (
            lambda: merge_stats([Stats(1, ONE, ONE), Stats(1, np.ones(2), np.ones(2))]),
            ValueError,
            r"stats\[1\]: .*\(1,\), got \(2,\)",
        ),
        (lambda: Stats(1, ONE, ONE).merge(None), TypeError, "other: expected Stats"),
        (
            lambda: Stats(1, ONE, ONE).merge(Stats(1, np.ones(2), np.ones(2))),
            ValueError,
            r"other: .*\(1,\), got \(2,\)",
        ),
    ],
)
def test_errors_name_the_argument(make, error, message):
    with pytest.raises(error, match=message):
        make()
