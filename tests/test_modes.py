"""What sets training and eval apart, and what does not.

With running statistics equal to the batch's, both modes give the same output and the same
gradients for weight and bias; only the gradient of the input differs. Eval treats every value on
its own and never touches the running statistics.
"""

import numpy as np
import pytest
from grid import MODES
from support import ARRANGEMENTS, DTYPES, assert_close, problem, same_bits, ulp, wide

import numbabn

LAYOUTS = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
SHAPES = [(8, 3, 17, 33), (8, 65, 7, 7), (300, 37)]


def both_modes(p):
    """The same problem in training and in eval, on running statistics equal to the batch's."""
    stats = numbabn.batch_norm_stats(p.x, channel_axis=p.channel_axis)
    kept = p.running_mean.dtype
    results = []
    for training in (True, False):
        p.running_mean, p.running_var = stats.mean.astype(kept), stats.var.astype(kept)
        p.options["training"] = training
        results.append(p.gradients())
    return results


@LAYOUTS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize(("dtype", "rtol"), [("float64", 1e-12), ("float32", 2e-5)])
def test_equal_statistics_differ_in_dx_alone(dtype, rtol, activation, shape, layout):
    # float32 running statistics are the batch's to float32's precision only, hence its tolerance.
    p = problem(shape, dtype, activation=activation, arrange=ARRANGEMENTS[layout])
    (y, grads), (y_eval, grads_eval) = both_modes(p)
    np.testing.assert_allclose(y_eval, y, rtol=rtol, atol=rtol)
    for a, b in zip(grads[1:], grads_eval[1:], strict=True):
        np.testing.assert_allclose(b, a, rtol=rtol, atol=rtol * np.abs(a).max() * 10)
    difference = np.abs(wide(grads_eval[0]) - wide(grads[0]))
    assert difference.max() > 1e-3 * np.abs(grads[0]).max()


@LAYOUTS
def test_dx_differs_by_the_means_that_training_takes_out(layout):
    p = problem((8, 3, 5, 7), "float64", arrange=ARRANGEMENTS[layout])
    (_, (dx, *_)), (_, (dx_eval, *_)) = both_modes(p)
    x = p.x
    xhat = (x - x.mean((0, 2, 3), keepdims=True)) / np.sqrt(
        x.var((0, 2, 3), keepdims=True) + p.options["eps"]
    )
    axes = {"axis": (0, 2, 3), "keepdims": True}
    # Training's dx has no part along 1 and along x̂ (up to eps); eval's dx keeps both.
    assert np.abs(dx.sum(**axes)).max() < 1e-10
    assert np.abs((dx * xhat).sum(**axes)).max() < 1e-3
    assert np.abs(dx_eval.sum(**axes)).min() > 1e-2
    along_one, along_xhat = dx_eval.mean(**axes), (dx_eval * xhat).mean(**axes)
    np.testing.assert_allclose(dx, dx_eval - along_one - xhat * along_xhat, atol=1e-12)


@LAYOUTS
@pytest.mark.parametrize("affine", ["both", "none"])
def test_eval_gives_gradients_for_weight_and_bias(affine, layout):
    p = problem((4, 3, 9, 11), training=False, affine=affine, arrange=ARRANGEMENTS[layout])
    _, (_, dweight, dbias) = p.gradients()
    xhat = p.expected().xhat
    dy = wide(p.grad_output)
    np.testing.assert_allclose(dbias, dy.sum((0, 2, 3)), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dweight, (dy * xhat).sum((0, 2, 3)), rtol=1e-5, atol=1e-5)
    assert np.abs(dweight).min() > 1e-2
    assert np.abs(dbias).min() > 1e-2


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6, 3, 17, 33), (6, 65, 7, 7), (6, 37), (6, 2, 1), (6, 5, 40)])
def test_eval_sample_does_not_depend_on_its_neighbours(shape, dtype, layout):
    options = {"training": False, "activation": "relu", "arrange": ARRANGEMENTS[layout]}
    p = problem(shape, dtype, **options)
    y = p.batch_norm()
    sample = y[2].copy()
    original = p.x
    for neighbour in (np.nan, np.inf, 0.0, 6e4):
        p.x = ARRANGEMENTS[layout](original)
        p.x[:2] = neighbour
        p.x[3:] = neighbour
        assert same_bits(p.batch_norm()[2], sample)
    # Alone, as the first of many, and as the last.
    for chosen in ([2], [2, 0, 1, 3], [0] * 20 + [2]):
        p.x = ARRANGEMENTS[layout](original[chosen])
        assert same_bits(p.batch_norm()[chosen.index(2)], sample)


@LAYOUTS
def test_training_sample_does_depend_on_its_neighbours(layout):
    p = problem((6, 3, 5, 5), arrange=ARRANGEMENTS[layout])
    sample = p.batch_norm()[2].copy()
    p.x[3] += 1
    assert np.abs(p.batch_norm()[2] - sample).min() > 1e-3


@LAYOUTS
def test_eval_dx_does_not_depend_on_neighbours(layout):
    p = problem((6, 3, 5, 5), training=False, arrange=ARRANGEMENTS[layout])
    _, saved = p.forward()
    dx = numbabn.batch_norm_backward(p.grad_output, saved)[0][2].copy()
    p.grad_output[3] = np.nan
    assert same_bits(numbabn.batch_norm_backward(p.grad_output, saved)[0][2], dx)


@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0, 7.0, -0.5])
def test_eval_never_touches_running_statistics(momentum):
    p = problem((4, 3, 9, 11), training=False, momentum=momentum, activation="relu")
    mean, var = p.running_mean.copy(), p.running_var.copy()
    # Read-only, so that even writing the same values back would be an error.
    p.running_mean.flags.writeable = p.running_var.flags.writeable = False
    p.gradients()
    assert same_bits(p.running_mean, mean)
    assert same_bits(p.running_var, var)


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("momentum", [0, 0.1, 0.999, 1, 1.0, 2.5, -0.25])
def test_training_moves_running_statistics_by_momentum(momentum, dtype, layout):
    p = problem((4, 3, 3, 2), dtype, momentum=momentum, arrange=ARRANGEMENTS[layout])
    old = wide(p.running_mean), wide(p.running_var)
    x = wide(p.x)
    p.forward()
    batch = x.mean((0, 2, 3)), x.var((0, 2, 3), ddof=1)  # unbiased: 24 values, so 4 % more
    for now, before, new in zip((p.running_mean, p.running_var), old, batch, strict=True):
        expected = (1 - momentum) * before + momentum * new
        assert_close(now, expected, scale=(1 + abs(momentum)) * (np.abs(before) + np.abs(new)))
    if momentum == 0:
        assert np.array_equal(wide(p.running_mean), old[0])


def test_training_normalizes_with_the_biased_variance():
    # Two values a channel: the unbiased variance is twice the biased one.
    p = problem((2, 3), "float64", affine="none", eps=0.0)
    y = p.batch_norm()
    np.testing.assert_allclose(np.abs(y), 1.0, rtol=1e-12)


@MODES
def test_momentum_does_not_change_the_output(training):
    outputs = [
        problem((4, 3, 5), training=training, momentum=momentum).batch_norm()
        for momentum in (0.1, 1.0, -3.0)
    ]
    assert same_bits(outputs[0], outputs[1])
    assert same_bits(outputs[0], outputs[2])


def test_running_statistics_changed_after_an_eval_forward():
    # As in PyTorch the backward pass belongs to its forward; a later training step changes nothing.
    p = problem((4, 3, 5), training=False)
    _, saved = p.forward()
    first = numbabn.batch_norm_backward(p.grad_output, saved)
    p.running_mean += 5
    p.running_var *= 3
    second = numbabn.batch_norm_backward(p.grad_output, saved)
    for a, b in zip(first, second, strict=True):
        assert same_bits(a, b)


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_dx_alone_in_eval_does_not_read_x(shape, dtype, layout):
    p = problem(shape, dtype, training=False, arrange=ARRANGEMENTS[layout])
    expected = p.expected().grads[0]
    _, saved = p.forward()
    p.x[...] = np.nan
    dx, dweight, dbias = numbabn.batch_norm_backward(
        p.grad_output, saved, needs=(True, False, False)
    )
    assert dweight is None
    assert dbias is None
    assert_close(dx, expected, channel_axis=p.channel_axis)


@LAYOUTS
@pytest.mark.parametrize("shape", SHAPES)
def test_eval_dx_is_one_product(shape, layout):
    p = problem(shape, training=False, arrange=ARRANGEMENTS[layout])
    _, (dx, *_) = p.gradients()
    column = (1, -1) + (1,) * (len(shape) - 2)
    gain = wide(p.weight) / np.sqrt(wide(p.running_var) + p.options["eps"])
    expected = gain.reshape(column) * wide(p.grad_output)
    # Value by value: a constant times dy, with one rounding each for the constant and the product.
    assert (np.abs(wide(dx) - expected) <= 1.5 * ulp(expected, np.float32)).all()
