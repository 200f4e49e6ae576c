"""Finite differences: every gradient is the derivative of the output that numbabn itself computes.

This is independent of the reference's formulas. In float64 a central difference with step h has
an error of about h² + 1e-16/h, a few times 1e-10 here.
"""

import numpy as np
import pytest
from grid import MODES
from support import ARRANGEMENTS, problem

import numbabn

STEP = 1e-5


def derivative(p, array, grad_output):
    """Central differences of sum(y·grad_output) with respect to each value of ``array``."""
    result = np.empty(array.shape)
    for index in np.ndindex(array.shape):
        value = array[index]
        sums = []
        for step in (STEP, -STEP):
            array[index] = value + step
            # Training would otherwise move the running statistics with every call.
            running = [p.running_mean.copy(), p.running_var.copy()]
            y = numbabn.batch_norm(p.x, *running, p.weight, p.bias, **p.options)
            sums.append(np.sum(y * grad_output))
        array[index] = value
        result[index] = (sums[0] - sums[1]) / (2 * STEP)
    return result


@MODES
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_every_input(layout, residual, activation, training):
    p = problem(
        (4, 3, 2, 3),
        "float64",
        training=training,
        activation=activation,
        residual=residual,
        arrange=ARRANGEMENTS[layout],
    )
    y, saved = numbabn.batch_norm_forward(
        p.x, p.running_mean.copy(), p.running_var.copy(), p.weight, p.bias, **p.options
    )
    assert activation is None or 0.2 < np.mean(y > 0) < 0.8  # both sides of the kink
    grads = numbabn.batch_norm_backward(p.grad_output, saved)
    inputs = [p.x, p.weight, p.bias] + ([p.options["residual"]] if residual else [])
    for grad, array in zip(grads, inputs, strict=True):
        expected = derivative(p, array, p.grad_output)
        assert np.abs(expected).max() > 1e-2  # a gradient of zeros would prove nothing
        np.testing.assert_allclose(grad, expected, rtol=1e-7, atol=1e-8)


@MODES
@pytest.mark.parametrize("shape", [(2, 2), (17, 2), (2, 3, 4, 2, 2)])
def test_other_ranks(shape, training):
    p = problem(shape, "float64", training=training, eps=0.25)
    _, saved = numbabn.batch_norm_forward(
        p.x, p.running_mean.copy(), p.running_var.copy(), p.weight, p.bias, **p.options
    )
    grads = numbabn.batch_norm_backward(p.grad_output, saved)
    for grad, array in zip(grads, [p.x, p.weight, p.bias], strict=True):
        expected = derivative(p, array, p.grad_output)
        np.testing.assert_allclose(grad, expected, rtol=1e-7, atol=1e-8)


@MODES
def test_two_layers_in_a_row(training):
    # The chain rule through two norms: what training does upstream of a layer is seen here.
    p = problem((6, 3, 4), "float64", training=training, activation="relu")
    q = problem((6, 3, 4), "float64", training=training, seed=1)

    def forward():
        first, saved_first = numbabn.batch_norm_forward(
            p.x, p.running_mean.copy(), p.running_var.copy(), p.weight, p.bias, **p.options
        )
        second, saved_second = numbabn.batch_norm_forward(
            first, q.running_mean.copy(), q.running_var.copy(), q.weight, q.bias, **q.options
        )
        return np.sum(second * q.grad_output), saved_first, saved_second

    _, saved_first, saved_second = forward()
    between = numbabn.batch_norm_backward(q.grad_output, saved_second)[0]
    dx = numbabn.batch_norm_backward(between, saved_first)[0]
    for index in [(0, 0, 0), (3, 1, 2), (5, 2, 3)]:
        value = p.x[index]
        p.x[index] = value + STEP
        up = forward()[0]
        p.x[index] = value - STEP
        down = forward()[0]
        p.x[index] = value
        np.testing.assert_allclose(dx[index], (up - down) / (2 * STEP), rtol=1e-6, atol=1e-8)
