"""Folding and fusing, against the operations that they replace."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from numbabn import (
    BatchNorm1d,
    BatchNorm2d,
    fold_scale_shift,
    fuse_bn_conv,
    fuse_conv_bn,
    fuse_linear_bn,
    reference,
)

CLOSE = {"rtol": 1e-11, "atol": 1e-11}


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def norm(C, seed=0, *, affine=True, dtype=np.float64):
    """Layer-like object with random statistics, and weights of both signs."""
    rng = np.random.default_rng(seed)
    return SimpleNamespace(
        running_mean=rng.standard_normal(C).astype(dtype),
        running_var=rng.uniform(0.2, 3, C).astype(dtype),
        weight=rng.uniform(-2, 2, C).astype(dtype) if affine else None,
        bias=rng.standard_normal(C).astype(dtype) if affine else None,
        eps=1e-3,
    )


def apply_norm(x, bn):
    """The norm in eval mode, channels on axis 1."""
    stats = bn.running_mean, bn.running_var
    return reference.batch_norm_forward(x, *stats, bn.weight, bn.bias, eps=bn.eps)[0]


def conv(x, weight, bias, groups=1):
    """Convolution without padding, stride 1: x (N, I, ...), weight (O, I/groups, ...)."""
    kernel = weight.shape[2:]
    axes = tuple(range(2, x.ndim))
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel, axes)
    parts = [
        np.tensordot(xg, wg, axes=([1, *range(x.ndim, windows.ndim)], list(range(1, weight.ndim))))
        for xg, wg in zip(
            np.split(windows, groups, axis=1), np.split(weight, groups, axis=0), strict=True
        )
    ]
    y = np.moveaxis(np.concatenate(parts, axis=-1), -1, 1)
    return y if bias is None else y + bias.reshape(-1, *[1] * (x.ndim - 2))


@pytest.mark.parametrize("affine", [True, False])
def test_fold_is_the_norm_in_eval_mode(affine):
    bn = norm(5, affine=affine)
    x = np.random.default_rng(1).standard_normal((3, 5, 4))
    scale, shift = fold_scale_shift(bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps)
    assert scale.dtype == shift.dtype == np.float64
    np.testing.assert_allclose(x * scale[:, None] + shift[:, None], apply_norm(x, bn), **CLOSE)


def test_fold_is_computed_in_float64():
    half = [np.array([v], np.float16) for v in (3.0, 0.1, 1.5, 0.3)]
    mean, var, weight, bias = (float(a[0]) for a in half)
    scale, shift = fold_scale_shift(*half, eps=1e-5)
    assert scale[0] == weight / np.sqrt(var + 1e-5)
    assert shift[0] == bias - mean * scale[0]


def test_fold_keeps_nan_and_inf_in_their_channel():
    scale, shift = fold_scale_shift([0.0, 1.0, 1.0, 0.0], [-1.0, np.nan, 0.0, 1.0], eps=0.0)
    np.testing.assert_array_equal(scale, [np.nan, np.nan, np.inf, 1.0])
    np.testing.assert_array_equal(shift, [np.nan, np.nan, -np.inf, 0.0])


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_conv_then_norm(spatial, groups, bias, affine):
    rng = np.random.default_rng(spatial)
    bn = norm(6, affine=affine)
    x = rng.standard_normal((2, 4) + (5,) * spatial)
    weight = rng.standard_normal((6, 4 // groups, *(3, 2, 3)[:spatial]))
    b = rng.standard_normal(6) if bias else None
    before = weight.copy()
    new_weight, new_bias = fuse_conv_bn(weight, b, bn, groups=groups)
    expected = apply_norm(conv(x, weight, b, groups), bn)
    np.testing.assert_allclose(conv(x, new_weight, new_bias, groups), expected, **CLOSE)
    assert new_weight.shape == weight.shape
    assert new_bias.shape == (6,)
    assert np.array_equal(weight, before)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_transposed_conv_then_norm(torch, groups):
    rng = np.random.default_rng(groups)
    bn = norm(8)
    x, weight = rng.standard_normal((2, 4, 5, 5)), rng.standard_normal((4, 8 // groups, 3, 3))
    bias = rng.standard_normal(8)

    def transposed(w, b):
        arrays = map(torch.from_numpy, (x, w, b))
        return torch.nn.functional.conv_transpose2d(*arrays, 2, 1, groups=groups).numpy()

    new = fuse_conv_bn(weight, bias, bn, transposed=True, groups=groups)
    np.testing.assert_allclose(transposed(*new), apply_norm(transposed(weight, bias), bn), **CLOSE)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_then_norm(bias):
    rng = np.random.default_rng(0)
    bn = norm(4)
    x, weight = rng.standard_normal((7, 3)), rng.standard_normal((4, 3))
    b = rng.standard_normal(4) if bias else None
    new_weight, new_bias = fuse_linear_bn(weight, b, bn)
    expected = apply_norm(x @ weight.T + (0 if b is None else b), bn)
    np.testing.assert_allclose(x @ new_weight.T + new_bias, expected, **CLOSE)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("spatial", [0, 1, 2, 3])
def test_norm_then_conv(spatial, groups, bias, affine):
    rng = np.random.default_rng(spatial)
    bn = norm(4, affine=affine)
    x = rng.standard_normal((2, 4) + (5,) * spatial)
    weight = rng.standard_normal((6, 4 // groups, *(3, 2, 3)[:spatial]))
    b = rng.standard_normal(6) if bias else None
    new = fuse_bn_conv(bn, weight, b, padding=0, groups=groups)
    expected = conv(apply_norm(x, bn), weight, b, groups)
    np.testing.assert_allclose(conv(x, *new, groups), expected, **CLOSE)


@pytest.mark.parametrize(
    ("kernel", "padding", "mode"),
    [
        (3, 1, "reflect"),
        (3, (1, 2), "replicate"),
        (3, "same", "circular"),
        (3, "valid", "zeros"),
        (3, (0, 0), "zeros"),
        (1, "same", "zeros"),
    ],
)
def test_norm_then_padded_conv_where_it_is_exact(torch, kernel, padding, mode):
    rng = np.random.default_rng(0)
    bn = norm(3)
    x, weight = rng.standard_normal((2, 3, 6, 6)), rng.standard_normal((4, 3, kernel, kernel))
    layer = torch.nn.Conv2d(3, 4, kernel, padding=padding, padding_mode=mode, dtype=torch.float64)

    def padded(a, w, b):
        tensors = {"weight": torch.from_numpy(w), "bias": torch.from_numpy(b)}
        return torch.func.functional_call(layer, tensors, torch.from_numpy(a)).detach().numpy()

    new = fuse_bn_conv(bn, weight, None, padding=padding, padding_mode=mode)
    expected = padded(apply_norm(x, bn), weight, np.zeros(4))
    np.testing.assert_allclose(padded(x, *new), expected, **CLOSE)


@pytest.mark.parametrize("padding", [1, (0, 1), "same"])
def test_norm_then_zero_padded_conv_is_refused_unless_there_is_no_shift(padding):
    rng = np.random.default_rng(0)
    bn, weight = norm(3), rng.standard_normal((2, 3, 3, 3))
    with pytest.raises(ValueError, match=r"padding: expected none.*got"):
        fuse_bn_conv(bn, weight, None, padding=padding)
    scale, _ = fold_scale_shift(bn.running_mean, bn.running_var, bn.weight, None, bn.eps)
    bn.bias = bn.running_mean * scale  # now β - mean·scale = 0
    new_weight, new_bias = fuse_bn_conv(bn, weight, np.array([1.0, 2.0]), padding=padding)
    x = rng.standard_normal((2, 3, 4, 4))
    zeros = ((0, 0), (0, 0), (1, 1), (1, 1))
    expected = conv(np.pad(apply_norm(x, bn), zeros), weight, np.array([1.0, 2.0]))
    np.testing.assert_allclose(conv(np.pad(x, zeros), new_weight, new_bias), expected, **CLOSE)


def test_real_layers_ours_and_of_torch(torch):
    rng = np.random.default_rng(3)
    x, weight = rng.standard_normal((4, 3, 6, 6)), rng.standard_normal((5, 3, 3, 3))
    layer = BatchNorm2d(5, dtype=np.float64)
    peer = torch.nn.BatchNorm2d(5, dtype=torch.float64)
    for _ in range(3):
        y = conv(x, weight, None)
        layer(y)
        peer(torch.from_numpy(y))
    expected = layer.eval()(conv(x, weight, None))
    for bn in (layer, peer.eval()):
        np.testing.assert_allclose(
            conv(x, *fuse_conv_bn(weight, None, bn)), expected, rtol=1e-9, atol=1e-10
        )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtypes_are_kept_and_rounded_once(dtype):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    bn = norm(4)
    weight = np.random.default_rng(0).standard_normal((4, 2)).astype(dtype)
    wide = weight.astype(np.float64)
    for fuse in (
        lambda w, b: fuse_conv_bn(w, b, bn),
        lambda w, b: fuse_linear_bn(w, b, bn),
        lambda w, b: fuse_bn_conv(norm(2), w, b, padding=0),
    ):
        new_weight, new_bias = fuse(weight, None)
        exact_weight, exact_bias = fuse(wide, None)
        assert new_weight.dtype == new_bias.dtype == weight.dtype
        assert np.array_equal(new_weight, exact_weight.astype(dtype))
        assert np.array_equal(new_bias, exact_bias.astype(dtype))
        assert fuse(weight, np.zeros(4, np.float32))[1].dtype == np.float32


CONV = np.ones((4, 3, 1, 1))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: fold_scale_shift(np.ones((2, 2)), np.ones((2, 2))),
            ValueError,
            r"running_mean: expected shape \(C,\), got \(2, 2\)",
        ),
        (
            lambda: fold_scale_shift(np.ones(2), np.ones(3)),
            ValueError,
            r"running_var: expected shape \(2,\), got \(3,\)",
        ),
        (
            lambda: fold_scale_shift(np.ones(2), np.ones(2), bias=np.ones(1)),
            ValueError,
            r"bias: expected shape \(2,\), got \(1,\)",
        ),
        (
            lambda: fold_scale_shift(np.ones(2), np.ones(2), weight=np.ones(2, int)),
            TypeError,
            r"weight: expected dtype float32, .*, got int64",
        ),
        (
            lambda: fold_scale_shift(np.ones(2), np.ones(2), eps=-1.0),
            ValueError,
            r"eps: expected a number of at least 0, got -1\.0",
        ),
        (
            lambda: fold_scale_shift(np.ones(2), np.ones(2), eps="1"),
            TypeError,
            "eps: expected a finite number, got '1'",
        ),
        (
            lambda: fuse_conv_bn(CONV, None, norm(3)),
            ValueError,
            "bn: expected 4 channels, as conv_weight puts out, got 3",
        ),
        (
            lambda: fuse_conv_bn(CONV, None, norm(4), transposed=True),
            ValueError,
            "bn: expected 3 channels, as conv_weight puts out, got 4",
        ),
        (
            lambda: fuse_conv_bn(CONV, np.ones(3), norm(4)),
            ValueError,
            r"conv_bias: expected shape \(4,\), got \(3,\)",
        ),
        (
            lambda: fuse_conv_bn(CONV, None, norm(4), groups=3),
            ValueError,
            r"groups: expected a divisor of conv_weight\.shape\[0\] = 4, got 3",
        ),
        (
            lambda: fuse_conv_bn(np.ones(3), None, norm(3)),
            ValueError,
            r"conv_weight: expected 2 axes or more, got shape \(3,\)",
        ),
        (
            lambda: fuse_conv_bn(CONV.astype(int), None, norm(4)),
            TypeError,
            r"conv_weight: expected dtype float32, .*, got int64",
        ),
        (
            lambda: fuse_conv_bn(CONV, None, BatchNorm2d(4, track_running_stats=False)),
            ValueError,
            "bn: expected running statistics, got a layer that tracks none",
        ),
        (
            lambda: fuse_conv_bn(CONV, None, SimpleNamespace(running_mean=1, running_var=1)),
            TypeError,
            "bn: expected a batch norm layer, got SimpleNamespace without weight, bias, eps",
        ),
        (
            lambda: fuse_linear_bn(CONV, None, norm(4)),
            ValueError,
            r"linear_weight: expected shape \(O, I\), got \(4, 3, 1, 1\)",
        ),
        (
            lambda: fuse_linear_bn(np.ones((4, 3)), None, BatchNorm1d(3)),
            ValueError,
            "bn: expected 4 channels, as linear_weight puts out, got 3",
        ),
        (
            lambda: fuse_linear_bn(np.ones((4, 3)), np.ones((4, 1)), norm(4)),
            ValueError,
            r"linear_bias: expected shape \(4,\), got \(4, 1\)",
        ),
        (
            lambda: fuse_bn_conv(norm(4), CONV, None, padding=0),
            ValueError,
            "bn: expected 3 channels, as conv_weight takes in, got 4",
        ),
        (
            lambda: fuse_bn_conv(norm(3), CONV, None, padding="full"),
            ValueError,
            "padding: expected int, ints, 'valid' or 'same', got 'full'",
        ),
        (
            lambda: fuse_bn_conv(norm(3), CONV, None, padding=1, padding_mode="wrap"),
            ValueError,
            "padding_mode: expected 'zeros', .*, got 'wrap'",
        ),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
