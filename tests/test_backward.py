"""The backward pass against the reference: shapes, dtypes, options, `needs` and `out`."""

import itertools

import numpy as np
import pytest
from grid import AXES, HALF_SHAPES, MODES, SHAPES
from support import ARRANGEMENTS, DTYPES, check_backward, problem, same_bits

import numbabn


@MODES
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("shape", "channel_axis"), SHAPES)
def test_shapes(shape, channel_axis, dtype, training):
    check_backward(problem(shape, dtype, channel_axis=channel_axis, training=training))


@MODES
@pytest.mark.parametrize("parameters", ["float32", "same"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("shape", "channel_axis"), HALF_SHAPES)
def test_half_precision(shape, channel_axis, dtype, parameters, training):
    parameters = dtype if parameters == "same" else parameters
    check_backward(
        problem(shape, dtype, channel_axis=channel_axis, training=training, parameters=parameters)
    )


@MODES
@pytest.mark.parametrize(("shape", "channel_axis"), AXES)
def test_channel_axis(shape, channel_axis, training):
    check_backward(problem(shape, channel_axis=channel_axis, training=training))


@MODES
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("affine", ["both", "weight", "bias", "none"])
@pytest.mark.parametrize(("shape", "channel_axis"), [((3, 4, 6, 7), 1), ((3, 6, 7, 4), -1)])
def test_options(shape, channel_axis, affine, residual, activation, training):
    grads = check_backward(
        problem(
            shape,
            channel_axis=channel_axis,
            affine=affine,
            residual=residual,
            activation=activation,
            training=training,
        )
    )
    assert len(grads) == (4 if residual else 3)


@MODES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "channel_axis"), [((3, 5, 9, 31), 1), ((3, 5, 7, 7), 1), ((40, 37), 1)]
)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_relu_in_every_dtype(shape, channel_axis, dtype, residual, training):
    check_backward(
        problem(
            shape,
            dtype,
            channel_axis=channel_axis,
            residual=residual,
            activation="relu",
            training=training,
        )
    )


@MODES
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_relu_passes_nothing_at_zero_and_below(residual, training):
    # Constant channels: everything before ReLU is exactly the bias (plus the residual).
    p = problem((4, 3, 5, 5), residual=residual, activation="relu", training=training)
    for a, values in ((p.x, 0.0), (p.running_mean, 0.0), (p.bias, np.array([-1.0, 0.0, 1.0]))):
        a[...] = values
    if residual:
        p.options["residual"][...] = 0.0
    y, grads = p.gradients()
    assert np.array_equal(y[:, 2], np.ones((4, 5, 5)))
    assert not y[:, :2].any()
    assert not grads[0][:, :2].any()
    assert not grads[2][:2].any()
    np.testing.assert_allclose(grads[2][2], p.grad_output[:, 2].sum(dtype=np.float64), rtol=1e-5)
    if residual:
        assert not grads[3][:, :2].any()
        assert np.array_equal(grads[3][:, 2], p.grad_output[:, 2])


@MODES
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_needs(layout, activation, residual, training):
    # What is asked for does not depend on what else is asked for; the rest comes back as None.
    p = problem(
        (3, 4, 9, 7),
        activation=activation,
        residual=residual,
        training=training,
        arrange=ARRANGEMENTS[layout],
    )
    _, saved = p.forward()
    everything = numbabn.batch_norm_backward(p.grad_output, saved)
    for needs in itertools.product([True, False], repeat=3):
        some = numbabn.batch_norm_backward(p.grad_output, saved, needs=needs)
        assert len(some) == len(everything)
        for wanted, got, full in zip(needs, some, everything, strict=False):
            if wanted:
                np.testing.assert_allclose(got, full, rtol=2e-6, atol=2e-6)
            else:
                assert got is None
        if residual:
            assert np.array_equal(some[3], everything[3])


@MODES
def test_saved_serves_more_than_once(training):
    p = problem((3, 4, 9, 7), activation="relu", residual=True, training=training)
    _, saved = p.forward()
    first = numbabn.batch_norm_backward(p.grad_output, saved)
    second = numbabn.batch_norm_backward(p.grad_output, saved)
    for a, b in zip(first, second, strict=True):
        assert same_bits(a, b)


@MODES
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_out(dtype, layout, training):
    p = problem((3, 4, 9, 7), dtype, training=training, arrange=ARRANGEMENTS[layout])
    _, saved = p.forward()
    fresh = numbabn.batch_norm_backward(p.grad_output, saved)
    out = ARRANGEMENTS[layout](np.zeros_like(p.x))
    into = numbabn.batch_norm_backward(p.grad_output, saved, out=out)
    assert into[0] is out
    for a, b in zip(fresh, into, strict=True):
        assert same_bits(a, b)


@MODES
def test_each_saved_keeps_to_the_mode_of_its_forward(training):
    # Two forwards, the other mode's last: each `saved` keeps to its own.
    p = problem((6, 3, 5), training=training)
    other = problem((6, 3, 5), training=not training)
    expected = p.expected().grads[0]
    _, saved = p.forward()
    other.forward()
    dx = numbabn.batch_norm_backward(p.grad_output, saved)[0]
    np.testing.assert_allclose(dx, expected, rtol=1e-4, atol=1e-5)
