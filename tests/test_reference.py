"""The definition itself, against finite differences, exact arithmetic and PyTorch."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from numbabn.reference import batch_norm_backward, batch_norm_forward

MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
SHAPES = [((5, 3), 1), ((4, 3, 2), 1), ((2, 3, 3, 4), 1), ((2, 3, 4, 3), -1), ((3, 2, 2, 1, 2), 0)]


def make(shape, channel_axis=1, *, affine=True, residual=False, seed=0):
    """Random arguments: x, running_mean, running_var, weight, bias, residual and grad_output."""
    rng = np.random.default_rng(seed)
    C = shape[channel_axis]
    return {
        "x": rng.standard_normal(shape) * 1.5 + 0.5,
        "running_mean": rng.standard_normal(C),
        "running_var": rng.uniform(0.5, 2, C),
        "weight": rng.uniform(-2, 2, C) if affine else None,
        "bias": rng.standard_normal(C) if affine else None,
        "residual": rng.standard_normal(shape) if residual else None,
    }, rng.standard_normal(shape)


def run(args, **options):
    """Forward pass that leaves ``args`` alone."""
    copies = {k: None if v is None else v.copy() for k, v in args.items()}
    return batch_norm_forward(**copies, **options)


@MODES
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(("shape", "channel_axis"), SHAPES)
def test_gradients_are_finite_differences(
    shape, channel_axis, affine, residual, activation, training
):
    args, grad_output = make(shape, channel_axis, affine=affine, residual=residual)
    options = {"training": training, "channel_axis": channel_axis, "activation": activation}
    # A difference across the kink of ReLU is no derivative; no output may come near it.
    plain, _ = run(args, **{**options, "activation": None})
    assert np.abs(plain).min() > 1e-4

    y, saved = run(args, **options)
    assert y.shape == shape
    grads = batch_norm_backward(grad_output, saved)
    assert len(grads) == (4 if residual else 3)
    step = 1e-5
    for name, grad in zip(("x", "weight", "bias", "residual"), grads, strict=False):
        if args[name] is None:
            continue
        numeric = np.empty_like(args[name])
        for index in np.ndindex(args[name].shape):
            ends = []
            for sign in (1, -1):
                moved = {**args, name: args[name].copy()}
                moved[name][index] += sign * step
                ends.append((run(moved, **options)[0] * grad_output).sum())
            numeric[index] = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(grad, numeric, rtol=1e-6, atol=1e-7, err_msg=name)


@MODES
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("shape", [shape for shape, axis in SHAPES if axis == 1])
def test_same_as_torch(shape, affine, residual, activation, training):
    torch = pytest.importorskip("torch")
    args, grad_output = make(shape, affine=affine, residual=residual)
    tensors = {k: None if v is None else torch.from_numpy(v.copy()) for k, v in args.items()}
    for name in ("x", "weight", "bias", "residual"):
        if tensors[name] is not None:
            tensors[name].requires_grad_()
    stats_and_affine = [tensors[k] for k in ("running_mean", "running_var", "weight", "bias")]
    expected = torch.nn.functional.batch_norm(
        tensors["x"], *stats_and_affine, training=training, momentum=0.3, eps=1e-3
    )
    if residual:
        expected = expected + tensors["residual"]
    if activation:
        expected = torch.relu(expected)
    expected.backward(torch.from_numpy(grad_output))

    y, saved = batch_norm_forward(
        **args, training=training, momentum=0.3, eps=1e-3, activation=activation
    )
    np.testing.assert_allclose(y, expected.detach().numpy(), rtol=1e-10, atol=1e-12)
    for name in ("running_mean", "running_var"):  # updated in place, here and there
        np.testing.assert_allclose(args[name], tensors[name].numpy(), rtol=1e-12)
    grads = batch_norm_backward(grad_output, saved)
    for name, grad in zip(("x", "weight", "bias", "residual"), grads, strict=False):
        if tensors[name] is not None:
            np.testing.assert_allclose(
                grad, tensors[name].grad.numpy(), rtol=1e-9, atol=1e-12, err_msg=name
            )


def test_the_modes_differ_in_dx_only():
    args, grad_output = make((6, 3, 2))
    args["running_mean"] = args["x"].mean((0, 2))
    args["running_var"] = args["x"].var((0, 2))
    y_train, saved_train = run(args, training=True)
    y_eval, saved_eval = run(args, training=False)
    np.testing.assert_allclose(y_train, y_eval, rtol=1e-12, atol=1e-14)
    train = batch_norm_backward(grad_output, saved_train)
    in_eval = batch_norm_backward(grad_output, saved_eval)
    for a, b in zip(train[1:], in_eval[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)
        assert np.abs(b).min() > 0
    assert np.abs(train[0] - in_eval[0]).max() > 0.1
    # What training takes out of the gradient: its mean, and its part along the output.
    xhat = (args["x"] - args["running_mean"][:, None]) * saved_train.invstd[:, None]
    assert np.abs(train[0].sum((0, 2))).max() < 1e-12
    assert np.abs((train[0] * xhat).sum((0, 2))).max() < 1e-4  # eps keeps it from being 0
    assert np.abs(in_eval[0].sum((0, 2))).max() > 0.1


def test_running_statistics_by_hand():
    x = np.array([[1.0], [2.0], [6.0]])  # mean 3, unbiased variance 7
    mean, var = np.array([10.0]), np.array([1.0])
    batch_norm_forward(x, mean, var, training=True, momentum=0.25)
    assert (mean[0], var[0]) == (8.25, 2.5)
    batch_norm_forward(x, mean, var, training=False)
    assert (mean[0], var[0]) == (8.25, 2.5)
    half = np.array([10.0], np.float16)
    batch_norm_forward(x, half, None, training=True, momentum=0.25)
    assert half.dtype == np.float16
    assert half[0] == 8.25


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int16"])
def test_any_dtype_is_computed_in_float64(dtype):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    x = (np.random.default_rng(0).standard_normal((7, 3)) * 4).astype(dtype)
    y, saved = batch_norm_forward(x, None, None, training=True)
    expected, _ = batch_norm_forward(x.astype(np.float64), None, None, training=True)
    assert y.dtype == np.float64
    assert np.array_equal(y, expected)
    assert all(g.dtype == np.float64 for g in batch_norm_backward(np.ones_like(x), saved))


def test_channel_axis_is_only_a_name():
    args, grad_output = make((2, 3, 4, 5), residual=True)
    y, saved = run(args, training=True, activation="relu")
    grads = batch_norm_backward(grad_output, saved)
    for axis in (0, 2, 3, -1, -4):
        moved = dict(args)
        for name in ("x", "residual"):
            moved[name] = np.moveaxis(args[name], 1, axis)
        y2, saved2 = run(moved, training=True, activation="relu", channel_axis=axis)
        assert np.array_equal(np.moveaxis(y2, axis, 1), y)
        grads2 = batch_norm_backward(np.moveaxis(grad_output, 1, axis), saved2)
        for i in (0, 3):
            assert np.array_equal(np.moveaxis(grads2[i], axis, 1), grads[i])
        for i in (1, 2):
            assert np.array_equal(grads2[i], grads[i])


@pytest.mark.parametrize(("mean", "std"), [(0, 1), (1e4, 1), (1e6, 1e-2), (100, 0.01), (0.1, 0)])
def test_statistics_are_exact_to_rounding(mean, std):
    x = mean + std * np.random.default_rng(0).standard_normal((500, 1))
    _, saved = batch_norm_forward(x, None, None, training=True, eps=1e-5)
    values = [Fraction(v) for v in x.ravel().tolist()]
    exact_mean = sum(values) / len(values)
    exact_var = float(sum((v - exact_mean) ** 2 for v in values) / len(values))
    assert abs(saved.mean[0] - float(exact_mean)) <= np.spacing(abs(mean) + std)
    assert saved.invstd[0] == pytest.approx(1 / math.sqrt(exact_var + 1e-5), rel=1e-13)


def test_constant_channel_gives_the_bias():
    x = np.full((7, 2, 3), 0.1)
    y, saved = batch_norm_forward(x, None, None, bias=np.array([0.5, -1.0]), training=True)
    assert np.array_equal(y[:, 0], np.full((7, 3), 0.5))
    assert np.array_equal(y[:, 1], np.full((7, 3), -1.0))
    dx, dweight, _ = batch_norm_backward(np.ones_like(x), saved)
    assert not dx.any()
    assert not dweight.any()


@MODES
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0)])
def test_empty_batches(shape, training):
    args, grad_output = make(shape, residual=True)
    mean, var = args["running_mean"].copy(), args["running_var"].copy()
    y, saved = batch_norm_forward(**args, training=training, activation="relu")
    assert y.shape == shape
    assert np.array_equal(args["running_mean"], mean)
    assert np.array_equal(args["running_var"], var)
    dx, dweight, dbias, dresidual = batch_norm_backward(grad_output, saved)
    assert dx.shape == dresidual.shape == shape
    assert dweight.tolist() == dbias.tolist() == [0, 0, 0]


@MODES
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_stay_in_their_channel(bad, training):
    args, grad_output = make((4, 3, 2))
    y0, saved0 = run(args, training=training, activation="relu")
    grads0 = batch_norm_backward(grad_output, saved0)
    args["x"][2, 1, 0] = bad
    y, saved = batch_norm_forward(**args, training=training, activation="relu")
    grads = batch_norm_backward(grad_output, saved)
    for c in (0, 2):
        assert np.array_equal(y[:, c], y0[:, c])
        assert np.array_equal(grads[0][:, c], grads0[0][:, c])
        assert all(np.array_equal(a[c], b[c]) for a, b in zip(grads[1:], grads0[1:], strict=True))
    if training:
        assert np.isnan(y[:, 1]).all()
        assert np.isnan(grads[0][:, 1]).all()
        np.testing.assert_array_equal(args["running_mean"][1], bad)
        assert np.isnan(args["running_var"][1])
    else:
        others = np.ones((4, 2), bool)
        others[2, 0] = False
        assert np.array_equal(y[:, 1][others], y0[:, 1][others])
        assert np.array_equal(grads[0][:, 1][others], grads0[0][:, 1][others])


def test_relu_keeps_nan_and_passes_its_gradient_as_torch_does():
    torch = pytest.importorskip("torch")
    x = np.array([[np.nan, 1.0], [-2.0, 0.0]])
    y, saved = batch_norm_forward(x, np.zeros(2), np.ones(2), eps=0.0, activation="relu")
    grad = batch_norm_backward(np.array([[3.0, 4.0], [np.nan, np.inf]]), saved)[0]
    tensor = torch.from_numpy(x.copy()).requires_grad_()
    expected = torch.relu(tensor)
    expected.backward(torch.tensor([[3.0, 4.0], [np.nan, np.inf]], dtype=torch.float64))
    np.testing.assert_array_equal(y, expected.detach().numpy())
    np.testing.assert_array_equal(grad, tensor.grad.numpy())


def test_errors():
    x = np.ones((1, 3))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        batch_norm_forward(x, None, None, training=True)
    assert batch_norm_forward(x, np.zeros(3), np.ones(3))[0].shape == (1, 3)
    for stats in ((None, np.ones(3)), (np.zeros(3), None), (None, None)):
        with pytest.raises(ValueError, match="running_mean, running_var"):
            batch_norm_forward(x, *stats)
    with pytest.raises(ValueError, match="activation: expected None or 'relu', got 'gelu'"):
        batch_norm_forward(x, np.zeros(3), np.ones(3), activation="gelu")
