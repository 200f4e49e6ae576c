"""Empty batches, NaN and infinities, constant channels, eps = 0, and every half-precision number.

What is not finite comes out exactly where it does in the reference, and only in its own channel.
"""

import numpy as np
import pytest
from grid import MODES
from support import ARRANGEMENTS, DTYPES, as_dtype, check_backward, problem, same_bits, wide

import numbabn

LAYOUTS = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
EMPTY = [((0, 3), 1), ((0, 3, 4), 1), ((2, 3, 0), 1), ((2, 0, 5, 3), -1), ((0, 0, 3), 2)]


@MODES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), EMPTY)
def test_empty_batch(shape, axis, dtype, training):
    p = problem(shape, dtype, channel_axis=axis, training=training, residual=True)
    before = p.running_mean.copy(), p.running_var.copy()
    y, (dx, dweight, dbias, dresidual) = p.gradients()
    for result in (y, dx, dresidual):
        assert result.shape == shape
        assert result.dtype == p.x.dtype
    for result in (dweight, dbias):
        assert result.dtype == p.weight.dtype
        assert np.array_equal(wide(result), np.zeros(3))
    assert same_bits(p.running_mean, before[0])
    assert same_bits(p.running_var, before[1])
    out = np.empty(shape, p.x.dtype)
    assert p.batch_norm(out=out) is out


@pytest.mark.parametrize(("shape", "axis"), EMPTY)
def test_stages_of_an_empty_batch(shape, axis):
    x = np.empty(shape, np.float32)
    stats = numbabn.batch_norm_stats(x, channel_axis=axis)
    assert stats.count == 0
    assert stats.mean.shape == stats.m2.shape == (3,)
    full = numbabn.batch_norm_stats(np.arange(12, dtype=np.float32).reshape(4, 3))
    merged = stats.merge(full)
    assert merged.count == 4
    assert np.array_equal(merged.mean, full.mean)
    assert np.array_equal(merged.m2, full.m2)
    for total in numbabn.batch_norm_backward_reduce(
        x, x, np.zeros(3), np.ones(3), channel_axis=axis
    ):
        assert np.array_equal(total, np.zeros(3))


@MODES
def test_no_channels(training):
    p = problem((4, 0, 5), training=training)
    y, (dx, dweight, dbias) = p.gradients()
    assert y.shape == dx.shape == (4, 0, 5)
    assert dweight.shape == dbias.shape == (0,)


def same_kinds(actual, expected):
    """NaN, +inf and -inf in the same places."""
    actual = wide(actual)
    return (
        np.array_equal(np.isnan(actual), np.isnan(expected))
        and np.array_equal(actual == np.inf, expected == np.inf)
        and np.array_equal(actual == -np.inf, expected == -np.inf)
    )


def check_special(p, channel):
    """Compare where ``p`` gives NaN and ±inf; all other channels are as without the special value.

    ``channel`` is the one that holds it.
    """
    expected = p.expected()
    y, grads = p.gradients()
    assert same_kinds(y, expected.y), "y"
    for what, ours, theirs in zip(
        ("dx", "dweight", "dbias", "dresidual"), grads, expected.grads, strict=False
    ):
        assert same_kinds(ours, theirs), what
    if p.options["training"]:
        assert same_kinds(p.running_mean, expected.running_mean), "running_mean"
        assert same_kinds(p.running_var, expected.running_var), "running_var"
    others = [c for c in range(p.x.shape[1]) if c != channel]
    return [a.take(others, 1) if a.ndim > 1 else a[others] for a in (y, *grads, *p.arrays[1:3])]


# First and last values start and end loops; the ones between are in vector bodies and tails.
PLACES = {"first": 0, "early": 5, "middle": 777, "late": -9, "last": -1}
SPECIAL_SHAPES = [(3, 4, 17, 33), (40, 4, 7, 7), (2000, 4), (500, 70)]


@MODES
@LAYOUTS
@pytest.mark.parametrize("values", [[np.nan], [np.inf], [-np.inf], [np.inf, -np.inf]], ids=str)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shape", SPECIAL_SHAPES)
def test_special_values_in_x(shape, place, values, layout, training):
    results = []
    for poisoned in (False, True):
        p = problem(shape, training=training, arrange=ARRANGEMENTS[layout])
        rows = np.moveaxis(p.x, 1, 0)
        for i, value in enumerate(values):
            if poisoned:
                index = np.unravel_index((PLACES[place] - i) % rows[1].size, rows[1].shape)
                rows[1][index] = value
        results.append(check_special(p, 1))
    for clean, poisoned in zip(*results, strict=True):
        assert same_bits(clean, poisoned)


@MODES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "argument", ["x", "grad_output", "weight", "bias", "running_mean", "running_var", "residual"]
)
def test_special_values_in_any_argument(argument, value, dtype, training):
    for activation in (None, "relu"):
        results = []
        for poisoned in (False, True):
            p = problem(
                (3, 4, 9, 11), dtype, training=training, residual=True, activation=activation
            )
            array = p.options["residual"] if argument == "residual" else getattr(p, argument)
            if poisoned:
                array[(1, 2, 3, 4) if array.ndim > 1 else 2] = value
            results.append(check_special(p, 2))
        for clean, poisoned in zip(*results, strict=True):
            assert same_bits(clean, poisoned)


@pytest.mark.parametrize("shape", SPECIAL_SHAPES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_eval_keeps_special_values_to_their_own_place(shape, value):
    p = problem(shape, training=False)
    index = (1, 2, *[3] * (len(shape) - 2))
    clean, _ = p.gradients()
    p.x[index] = p.grad_output[index] = value
    y, (dx, *_) = p.gradients()
    for result in (y, dx):
        assert not np.isfinite(result[index])
        assert np.isfinite(result).sum() == result.size - 1
    y[index] = clean[index]
    assert same_bits(y, clean)


@pytest.mark.parametrize("value", [0.0, -0.0])
def test_zero_weight_times_infinity(value):
    p = problem((3, 4, 9, 11), training=False)
    p.weight[1] = value
    p.x[0, 1, 2, 3] = np.inf
    check_special(p, 1)


@MODES
def test_negative_running_variance(training):
    # Not an error: the square root of a negative number is NaN, in that channel alone.
    p = problem((3, 4, 9, 11), training=training)
    p.running_var[1] = -2.0
    check_special(p, 1)
    assert np.isfinite(p.batch_norm()[:, [0, 2, 3]]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_beyond_the_largest_number_become_infinite(dtype):
    # 316·x for a variance of 0 and eps of 1e-5.
    top = {"float32": 3e38, "float64": 1e308, "float16": 6e4, "bfloat16": 3e38}[dtype]
    p = problem((3, 4, 5), dtype, training=False, affine="none")
    p.running_mean[...] = p.running_var[...] = 0
    p.x[0, :, 0], p.x[1, :, 0] = top, -top
    y = wide(p.batch_norm())
    assert (y[0, :, 0] == np.inf).all()
    assert (y[1, :, 0] == -np.inf).all()
    assert np.isfinite(y[2]).all()


@pytest.mark.parametrize("shape", [(64, 2, 7, 7), (5000, 2), (2, 2, 50, 50)])
@pytest.mark.parametrize("scale", [1e18, 1e19])
def test_squares_that_overflow_float32(shape, scale):
    # The variance is finite in float64, so y is that of the same data at a scale of 1, and so on.
    p, unit = problem(shape, affine="none", eps=0.0), problem(shape, affine="none", eps=0.0)
    p.x *= np.float32(scale)
    p.running_mean = p.running_var = None
    np.testing.assert_allclose(p.batch_norm(), unit.batch_norm(), rtol=0, atol=1e-5)
    _, (dx, dweight, dbias) = p.gradients()
    _, (dx_unit, dweight_unit, dbias_unit) = unit.gradients()
    np.testing.assert_allclose(dx * np.float32(scale), dx_unit, rtol=0, atol=1e-5)
    np.testing.assert_allclose(dweight, dweight_unit, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dbias, dbias_unit, rtol=1e-6)


@MODES
@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 0.1, -3e4])
@pytest.mark.parametrize("shape", [(3, 4, 17, 33), (40, 4, 7, 7), (999, 4)])
def test_constant_channel(shape, value, dtype, layout, training):
    # Nothing is left after the mean is taken away, so y is the bias to the bit.
    p = problem(shape, dtype, training=training, arrange=ARRANGEMENTS[layout])
    p.x[:, 1] = value
    p.running_mean[1] = wide(p.x[:, 1]).flat[0]
    y, (_, dweight, _) = p.gradients()
    assert (y[:, 1] == p.bias[1].astype(p.x.dtype)).all()
    assert dweight[1] == 0
    if training:
        assert wide(p.running_var[1]) < 0.9001 * wide(problem(shape, dtype).running_var[1])


@MODES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 1), (3, 1, 7), (2, 1, 17, 33), (2, 1, 1, 1)])
def test_one_channel(shape, dtype, training):
    check_backward(problem(shape, dtype, training=training, eps=0.01))


@MODES
def test_eps_of_zero_on_a_constant_channel(training):
    # 0·inf: NaN everywhere in that channel, as the reference has it.
    p = problem((3, 4, 9, 11), training=training, eps=0.0)
    p.x[:, 1] = 7.0
    p.running_mean[1], p.running_var[1] = 7.0, 0.0
    assert np.isnan(p.expected().y[:, 1]).all()
    check_special(p, 1)


def test_eps_of_zero_and_running_variance_of_zero():
    # (x - mean)·inf is ±inf, and NaN where x is the mean.
    p = problem((3, 4, 9, 11), training=False, eps=0.0)
    p.running_var[1] = 0.0
    p.x[0, 1, 0, 0] = p.running_mean[1]
    assert np.isinf(p.expected().y[:, 1]).sum() == 3 * 9 * 11 - 1
    check_special(p, 1)


def every_number(dtype):
    """All values of a 16-bit type, of shape (512, 128)."""
    bits = np.arange(2**16, dtype=np.uint16)
    return bits.view(as_dtype(dtype)).reshape(512, 128)


@pytest.mark.parametrize("layout", ["planes", "columns", "short planes"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_half_precision_number_comes_back(dtype, layout):
    # Eval with mean 0 and variance 1 does nothing, so this is both conversions, NaNs included.
    shape = {"planes": (64, 4, 256), "columns": (512, 128), "short planes": (1024, 16, 2, 2)}
    x = every_number(dtype).reshape(shape[layout])
    C = x.shape[1]
    y = numbabn.batch_norm(x, np.zeros(C, np.float32), np.ones(C, np.float32), eps=0.0)
    np.testing.assert_array_equal(wide(y), wide(x))
    _, saved = numbabn.batch_norm_forward(
        x, np.zeros(C, np.float32), np.ones(C, np.float32), eps=0.0
    )
    dx, _, _ = numbabn.batch_norm_backward(x, saved)
    np.testing.assert_array_equal(wide(dx), wide(x))


@pytest.mark.parametrize("scale", [1.0009765625, 1 / 3, 0.0001220703125, 700.0])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_half_precision_number_is_rounded_to_nearest_even(dtype, scale):
    # The float32 product, rounded once to the half type: overflow, subnormal numbers and ties too.
    x = every_number(dtype)
    scale = np.full(128, scale, np.float32)
    with np.errstate(all="ignore"):
        expected = (x.astype(np.float32) * scale).astype(x.dtype)
    y = numbabn.normalize(x, scale, np.zeros(128, np.float32))
    np.testing.assert_array_equal(wide(y), wide(expected))
