"""Accuracy on data that breaks careless formulas; PyTorch's error is printed beside ours.

Each call has one channel of every distribution, so a channel that needs care stands beside ones
that do not. Bounds: ``y`` and ``dx`` within 8 ulp of the channel's largest expected |value|,
``dweight`` and ``dbias`` within 8 ulp of the sum of their terms' |values|.
"""

from fractions import Fraction

import numpy as np
import peer
import pytest
from exact import DISTRIBUTIONS, both_passes, error_in_ulp, samples
from grid import MODES
from support import ARRANGEMENTS, as_dtype, assert_close, wide

import numbabn

BOUND = 8
NAMES = list(DISTRIBUTIONS)

# (layout, N, L, repeats): planes; planes of 7×7 that are run as columns; planes larger than a
# tile; channels-last memory; rows of as many columns as there are distributions, and of many more.
FLOAT32_SHAPES = {
    "planes": ("contiguous", 8, (33, 17), 1),
    "short planes": ("contiguous", 64, (7, 7), 1),
    "large planes": ("contiguous", 2, (200, 301), 1),
    "channels-last": ("channels_last", 8, (33, 17), 1),
    "columns": ("contiguous", 6000, (), 1),
    "wide columns": ("contiguous", 700, (), 40),
}
FLOAT64_SHAPES = {
    "planes": ("contiguous", 3, (17, 33), 1),
    "short planes": ("contiguous", 32, (7, 7), 1),
    "channels-last": ("channels_last", 3, (17, 33), 1),
    "columns": ("contiguous", 1500, (), 1),
}
STATISTICS = pytest.mark.parametrize(
    "mode", ["train", "eval with the batch's statistics", "eval with others"]
)


def rows(a):
    """Shape (C, m), from channels on axis 1."""
    return np.moveaxis(a, 1, 0).reshape(a.shape[1], -1)


class Case:
    """One call: data, parameters and, from both passes, results and expected results."""

    def __init__(self, dtype, layout, N, spatial, repeats, mode, affine, names=NAMES, center=0.0):
        self.names = names * repeats
        dtype = as_dtype(dtype)
        kept = np.dtype(np.float32) if dtype.itemsize == 2 else dtype
        rng = np.random.default_rng(7)
        L, C = int(np.prod(spatial)), len(self.names)
        x = samples(self.names, N, L, dtype)
        dy = (center + rng.standard_normal(x.shape)).astype(dtype)
        shape = (N, C, *spatial)
        weight = bias = None
        if affine:
            weight = (rng.uniform(0.5, 2, C) * rng.choice([-1, 1], C)).astype(kept)
            bias = rng.standard_normal(C).astype(kept)
        mean, var = np.full(C, 0.3, kept), np.full(C, 2.0, kept)
        self.training = mode == "train"
        if mode == "eval with the batch's statistics":
            mean, var = rows(wide(x)).mean(1).astype(kept), rows(wide(x)).var(1).astype(kept)
        arrange = ARRANGEMENTS[layout]
        self.x, self.dy = arrange(x.reshape(shape)), arrange(dy.reshape(shape))
        self.parameters = mean, var, weight, bias
        options = {"training": self.training, "eps": 1e-5}
        self.expected = both_passes(rows(self.x), rows(self.dy), *self.parameters, **options)
        mean, var = mean.copy(), var.copy()
        y, saved = numbabn.batch_norm_forward(
            self.x, mean, var, weight, bias, momentum=1.0, **options
        )
        dx, dweight, dbias = numbabn.batch_norm_backward(self.dy, saved)
        self.ours = {"y": y, "dx": dx, "dweight": dweight, "dbias": dbias}
        self.running = mean, var
        self.theirs = None
        if peer.INSTALLED:
            y, (dx, *others), _ = peer.batch_norm(
                self.x, *self.parameters, self.dy, momentum=1.0, **options
            )
            self.theirs = {"y": y, "dx": dx}
            if affine:
                self.theirs |= {"dweight": others[0], "dbias": others[1]}

    def errors(self, results, quantity):
        """Largest error of each channel, in ulp; NaN where a result is not finite.

        None where there is no such result: PyTorch has no gradient for weights that are None.
        """
        if results is None or quantity not in results:
            return [None] * len(self.names)
        actual, expected = results[quantity], getattr(self.expected, quantity)
        if quantity in ("y", "dx"):
            return error_in_ulp(rows(actual), expected)
        return error_in_ulp(actual, expected, getattr(self.expected, f"{quantity}_terms"))

    def check(self, record, table):
        """Every result is within the bound; the table gets a row for every distribution."""
        failures = []
        for quantity in self.ours:
            ours, theirs = (self.errors(r, quantity) for r in (self.ours, self.theirs))
            for name, a, b in zip(self.names, ours, theirs, strict=True):
                record(table, name, quantity, a, b)
                if not a <= BOUND:
                    failures.append(f"{quantity} of {name!r}: {a:.3g} ulp")
        assert not failures, "\n".join(failures)


@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
@STATISTICS
@pytest.mark.parametrize("where", FLOAT32_SHAPES)
def test_float32(where, mode, affine, accuracy_row):
    case = Case("float32", *FLOAT32_SHAPES[where], mode, affine)
    case.check(accuracy_row, f"float32 {mode[:5]}")


@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
@STATISTICS
@pytest.mark.parametrize("where", FLOAT64_SHAPES)
def test_float64(where, mode, affine, accuracy_row):
    case = Case("float64", *FLOAT64_SHAPES[where], mode, affine)
    case.check(accuracy_row, f"float64 {mode[:5]}")


def assert_bound(names, errors, bound, what):
    failures = [f"{n!r}: {e:.3g} ulp" for n, e in zip(names, errors, strict=True) if not e <= bound]
    assert not failures, f"{what}: " + ", ".join(failures)


@pytest.mark.parametrize(
    ("dtype", "shapes"), [("float32", FLOAT32_SHAPES), ("float64", FLOAT64_SHAPES)]
)
@pytest.mark.parametrize("where", FLOAT64_SHAPES)
def test_running_statistics(where, dtype, shapes):
    case = Case(dtype, *shapes[where], "train", False)
    mean, var = case.running
    expected = case.expected
    # The mean of values on both sides of zero can be small; its error counts beside the spread.
    scale = np.abs(expected.running_mean) + np.sqrt(expected.running_var)
    errors = error_in_ulp(mean, expected.running_mean, scale)
    assert_bound(case.names, errors, BOUND, "running_mean")
    assert_bound(case.names, error_in_ulp(var, expected.running_var), BOUND, "running_var")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@MODES
def test_gradients_with_a_mean(training, dtype):
    # A loss often sends a gradient with a mean: what training takes out must not cost digits.
    # Errors count beside the terms, γ·r·dy, since what is left of them can be small.
    shapes = FLOAT32_SHAPES if dtype == "float32" else FLOAT64_SHAPES
    mode = "train" if training else "eval with the batch's statistics"
    for where in ("planes", "columns"):
        case = Case(dtype, *shapes[where], mode, True, center=100.0)
        scale = case.expected.dx_terms.max(1)
        errors = error_in_ulp(rows(case.ours["dx"]), case.expected.dx, scale)
        assert_bound(case.names, errors, BOUND, where)


@STATISTICS
@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
@pytest.mark.parametrize("where", ["planes", "short planes", "channels-last", "columns"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half(dtype, where, affine, mode):
    # A result must be the rounding of some value within float32's bound of the exact one. Wherever
    # half an ulp of the half type is more than that bound this means: the correctly rounded
    # value, or, where the exact value lies that close to the middle between two numbers, the
    # other of the two. Nothing stricter holds for a result that is computed in float32.
    dtype = as_dtype(dtype)
    layout, N, spatial, _ = FLOAT32_SHAPES[where]
    values = samples(NAMES, N, int(np.prod(spatial)), dtype)
    # float16 ends at 65504, and eval with other statistics may pass it only on the way out.
    top = np.abs(wide(values)).max((0, 2))
    names = [name for name, v in zip(NAMES, top, strict=True) if v < 3e4 or dtype.name != "float16"]
    assert len(names) >= 7
    case = Case(dtype.name, layout, N, spatial, 1, mode, affine, names)
    expected = case.expected
    for quantity in ("y", "dx"):
        got = rows(case.ours[quantity])
        assert_close(got, getattr(expected, quantity), channel_axis=0, ulps=BOUND, what=quantity)
    for quantity in ("dweight", "dbias"):
        terms = getattr(expected, f"{quantity}_terms")
        assert case.ours[quantity].dtype == np.float32
        assert (error_in_ulp(case.ours[quantity], getattr(expected, quantity), terms) <= 8).all()


def test_the_bound_can_be_missed():
    # The textbook formula in float32, E[x²] - E[x]², is what this suite is there to catch.
    x = samples(["mean 1e4, std 1"], 8, 561, np.dtype(np.float32))
    r = rows(x)
    mean = r.mean(1, dtype=np.float32)
    var = (r * r).mean(1, dtype=np.float32) - mean * mean
    y = (r - mean[:, None]) / np.sqrt(np.maximum(var, 0) + np.float32(1e-5))[:, None]
    expected = both_passes(r, r, None, None, None, None, training=True, eps=1e-5)
    assert error_in_ulp(y, expected.y) > 100


def test_exact_values_agree_with_rational_arithmetic():
    # The suite's own yardstick, on numbers small enough for fractions.
    x = np.array([[1e6 + 0.25, 1e6 - 0.5, 1e6 + 1.75]])
    values = [Fraction(v) for v in x[0]]
    mean = sum(values) / 3
    var = sum((v - mean) ** 2 for v in values) / 3
    expected = both_passes(x, x, None, None, None, None, training=True, eps=0.0)
    assert float(expected.running_mean[0]) == float(mean)
    assert float(expected.running_var[0]) == float(var * 3 / 2)
    wide32 = both_passes(x.astype(np.float32), x, None, None, None, None, training=True, eps=0.0)
    np.testing.assert_allclose(wide32.y, expected.y.astype(np.float64), rtol=1e-14)
