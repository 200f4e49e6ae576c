"""Against PyTorch, where it is installed: outputs, running statistics and all gradients.

PyTorch's own rounding is part of the difference, so tolerances are wider here than against the
reference. In half precision the question is who is nearer to float64: we must not be farther.
"""

import numpy as np
import peer
import pytest
from grid import MODES
from support import ARRANGEMENTS, DTYPES, largest, problem, wide

pytestmark = pytest.mark.skipif(not peer.INSTALLED, reason="PyTorch is not installed")

LAYOUTS = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
SHAPES = [(40, 37), (7, 3, 49), (4, 3, 17, 33), (3, 65, 7, 7), (2, 3, 4, 5, 6)]
TOLERANCE = {"float32": 3e-5, "float64": 1e-12, "float16": 4e-3, "bfloat16": 3e-2}


def pytorch(p):
    """PyTorch's results for `Problem` ``p``, from a copy of the running statistics."""
    names = ("training", "eps", "momentum", "residual", "activation")
    return peer.batch_norm(*p.arrays, p.grad_output, **{name: p.options[name] for name in names})


def assert_near(ours, theirs, tolerance, what):
    assert ours.dtype == theirs.dtype, what
    assert ours.shape == theirs.shape, what
    ours, theirs = wide(ours), wide(theirs)
    scale = max(1.0, np.abs(theirs).max())
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * scale, err_msg=what)


def compare(p):
    tolerance = TOLERANCE[p.x.dtype.name]
    y, grads, running = pytorch(p)
    our_y, our_grads = p.gradients()
    assert_near(our_y, y, tolerance, "y")
    for name, ours, theirs in zip(
        ("dx", "dweight", "dbias", "dresidual"), our_grads, grads, strict=False
    ):
        if theirs is not None:
            assert_near(ours, theirs, tolerance, name)
    if running[0] is not None:
        # PyTorch keeps running statistics as it keeps parameters; ours round the same values once.
        kept = TOLERANCE[p.running_mean.dtype.name]
        assert_near(p.running_mean, running[0], kept, "running_mean")
        assert_near(p.running_var, running[1], kept, "running_var")


@MODES
@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_statistics_and_gradients(shape, dtype, layout, training):
    compare(problem(shape, dtype, training=training, arrange=ARRANGEMENTS[layout]))


@MODES
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("affine", ["both", "weight", "bias", "none"])
def test_options(affine, residual, activation, training):
    options = {"affine": affine, "residual": residual, "activation": activation}
    compare(problem((4, 3, 9, 7), training=training, **options))


@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0, -0.5, 2.0])
def test_momentum(momentum):
    compare(problem((4, 3, 9, 7), momentum=momentum))


def test_training_without_running_statistics():
    p = problem((4, 3, 9, 7))
    p.running_mean = p.running_var = None
    compare(p)


@MODES
def test_empty_batch(training):
    # The gradients of weight and bias are zeros, and nothing is learned from nothing.
    p = problem((0, 3, 5, 5), training=training)
    before = p.running_mean.copy(), p.running_var.copy()
    y, (dx, dweight, dbias), running = pytorch(p)
    our_y, (our_dx, our_dweight, our_dbias) = p.gradients()
    assert our_y.shape == y.shape
    assert our_dx.shape == dx.shape
    assert np.array_equal(our_dweight, dweight)
    assert np.array_equal(our_dbias, dbias)
    for ours, theirs, old in zip((p.running_mean, p.running_var), running, before, strict=True):
        assert np.array_equal(ours, theirs)
        assert np.array_equal(ours, old)


def test_one_value_per_channel_is_the_same_error():
    p = problem((1, 3), training=True)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        pytorch(p)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        p.forward()


@MODES
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite_values_spread_no_farther(value, training):
    p = problem((4, 3, 9, 7), training=training)
    p.x[1, 1, 2, 3] = value
    y, (dx, *_), _ = pytorch(p)
    our_y, (our_dx, *_) = p.gradients()
    for ours, theirs in ((our_y, y), (our_dx, dx)):
        assert np.array_equal(np.isfinite(ours), np.isfinite(theirs))


@MODES
@LAYOUTS
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(8, 3, 17, 33), (16, 65, 7, 7), (900, 37)])
def test_half_precision_is_no_farther_from_float64(shape, dtype, layout, training):
    p = problem(shape, dtype, training=training, arrange=ARRANGEMENTS[layout])
    expected = p.expected()
    y, (dx, dweight, dbias), _ = pytorch(p)
    our_y, (our_dx, our_dweight, our_dbias) = p.gradients()
    for what, ours, theirs, exact in (
        ("y", our_y, y, expected.y),
        ("dx", our_dx, dx, expected.grads[0]),
    ):
        # Where both round correctly, the errors differ by the float32 error before the rounding.
        error, their_error = (largest(wide(a) - exact, 1) for a in (ours, theirs))
        slack = 8 * 2.0**-24 * largest(exact, 1)
        assert (error <= their_error + slack).all(), what
    for what, ours, theirs, exact, terms in (
        ("dweight", our_dweight, dweight, expected.grads[1], expected.dweight_terms),
        ("dbias", our_dbias, dbias, expected.grads[2], expected.dbias_terms),
    ):
        error, their_error = (np.abs(wide(a) - exact) for a in (ours, theirs))
        assert (error <= their_error + 8 * 2.0**-24 * terms).all(), what
