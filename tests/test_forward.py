"""The forward pass against the reference: shapes, channel axes, dtypes, options.

Every comparison covers the output, its dtype and shape, and both running statistics.
"""

import numpy as np
import pytest
from grid import AXES, HALF_SHAPES, MODES, SHAPES
from support import DTYPES, assert_close, check_forward, problem, wide

import numbabn
from numbabn import reference


@MODES
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("shape", "channel_axis"), SHAPES)
def test_shapes(shape, channel_axis, dtype, training):
    check_forward(problem(shape, dtype, channel_axis=channel_axis, training=training))


@MODES
@pytest.mark.parametrize("parameters", ["float32", "same"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("shape", "channel_axis"), HALF_SHAPES)
def test_half_precision(shape, channel_axis, dtype, parameters, training):
    parameters = dtype if parameters == "same" else parameters
    check_forward(
        problem(shape, dtype, channel_axis=channel_axis, training=training, parameters=parameters)
    )


@MODES
@pytest.mark.parametrize(("shape", "channel_axis"), AXES)
def test_channel_axis(shape, channel_axis, training):
    check_forward(problem(shape, channel_axis=channel_axis, training=training))


@MODES
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("affine", ["both", "weight", "bias", "none"])
@pytest.mark.parametrize(("shape", "channel_axis"), [((3, 4, 6, 7), 1), ((3, 6, 7, 4), -1)])
def test_options(shape, channel_axis, affine, residual, activation, training):
    check_forward(
        problem(
            shape,
            channel_axis=channel_axis,
            affine=affine,
            residual=residual,
            activation=activation,
            training=training,
        )
    )


@MODES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "channel_axis"), [((3, 5, 9, 31), 1), ((3, 5, 7, 7), 1), ((40, 37), 1)]
)
def test_relu_and_residual_in_every_dtype(shape, channel_axis, dtype, training):
    check_forward(
        problem(
            shape,
            dtype,
            channel_axis=channel_axis,
            residual=True,
            activation="relu",
            training=training,
        )
    )


@MODES
@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-3, 10.0])
def test_eps(eps, training):
    check_forward(problem((4, 3, 5, 5), eps=eps, training=training))


@pytest.mark.parametrize("given", ["running_mean", "running_var", None])
def test_training_without_both_running_statistics(given):
    # What is missing is not needed in training; what is given is still updated.
    p = problem((4, 3, 5, 5))
    for name in {"running_mean", "running_var"} - {given}:
        setattr(p, name, None)
    check_forward(p)


def test_saved_says_which_mode_and_statistics():
    for training in (True, False):
        p = problem((4, 3, 5, 5), training=training, channel_axis=-3)
        expected = p.expected()
        _, saved = p.forward()
        assert saved.training is training
        assert saved.shape == (4, 3, 5, 5)
        assert saved.mean.dtype == saved.invstd.dtype == np.float64
        # A float32 batch has these in float64: what float32 sums could give is not enough.
        np.testing.assert_allclose(saved.mean, expected.mean, rtol=1e-6)
        np.testing.assert_allclose(saved.invstd, expected.invstd, rtol=1e-6)


@MODES
def test_batch_norm_is_batch_norm_forward_without_saved(training):
    a, b = (
        problem((4, 3, 9, 11), residual=True, activation="relu", training=training)
        for _ in range(2)
    )
    y, _ = a.forward()
    assert np.array_equal(b.batch_norm(), y)
    assert np.array_equal(a.running_mean, b.running_mean)
    assert np.array_equal(a.running_var, b.running_var)


@MODES
def test_inputs_are_left_alone(training):
    p = problem((4, 3, 9, 11), residual=True, activation="relu", training=training)
    inputs = {"x": p.x, "weight": p.weight, "bias": p.bias, "residual": p.options["residual"]}
    before = {name: a.copy() for name, a in inputs.items()}
    p.gradients()
    for name, a in inputs.items():
        assert np.array_equal(a, before[name]), name


def test_training_takes_options_by_position_as_torch_does():
    p, q = problem((4, 3, 5)), problem((4, 3, 5))
    expected = q.batch_norm(momentum=0.3, eps=0.5)
    y = numbabn.batch_norm(*p.arrays, True, 0.3, 0.5)
    assert np.array_equal(y, expected)
    assert np.array_equal(p.running_var, q.running_var)


def test_default_is_eval_with_pytorchs_constants():
    p = problem((4, 3, 5), affine="none")
    y = numbabn.batch_norm(p.x, p.running_mean, p.running_var)
    expected, _ = reference.batch_norm_forward(
        wide(p.x), wide(p.running_mean), wide(p.running_var), training=False, eps=1e-5
    )
    assert_close(y, expected, channel_axis=1)
