"""What the tests share: problems (the inputs of one call), expected values, and the comparison.

Expected values are those of `numbabn.reference`, in float64. A float32 result is held to 8 ulp of
the largest value of its channel; a half-precision one must be the rounding of a result within
those same 8 float32 ulp.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import numbabn
from numbabn import reference

ROOT = Path(__file__).resolve().parents[1]
DTYPES = ("float32", "float64", "float16", "bfloat16")

# Bits of the fraction, exponent of the smallest normal number.
_FORMATS = {"float16": (10, -14), "bfloat16": (7, -126), "float32": (23, -126)}
_FORMATS["float64"] = (52, -1022)


def as_dtype(name):
    """The NumPy dtype of that name; skips the test if it is bfloat16 and ml_dtypes is missing."""
    if name == "bfloat16":
        return np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    return np.dtype(name)


def wide(a):
    """``a`` in float64; None stays None."""
    with np.errstate(invalid="ignore"):  # ml_dtypes warns of signalling NaNs
        return None if a is None else np.asarray(a).astype(np.float64)


def ulp(value, dtype):
    """Spacing of ``dtype``'s numbers at ``value`` (float64), also in its subnormal range."""
    bits, smallest = _FORMATS[np.dtype(dtype).name]
    value = np.abs(np.asarray(value, np.float64))
    exponent = np.where(value > 0, np.frexp(value)[1] - 1, smallest)
    return np.ldexp(1.0, np.maximum(exponent, smallest) - bits)


def largest(a, channel_axis):
    """Largest |value| of each channel, shaped to broadcast against ``a``."""
    others = tuple(i for i in range(a.ndim) if i != channel_axis % a.ndim)
    return np.max(np.abs(a), axis=others, keepdims=True, initial=0.0)


def tolerance(expected, dtype, scale, ulps):
    """Error allowed per value: ``ulps`` of the working precision at ``scale``, then one rounding.

    Half precision is stored, not computed in: a right result is the rounding (half an ulp of the
    value) of a float32 result within ``ulps`` float32 ulp.
    """
    dtype = np.dtype(dtype)
    if dtype.itemsize > 2:
        return ulps * ulp(scale, dtype)
    float32_error = ulps * ulp(scale, np.float32)
    return float32_error + 0.5 * ulp(np.abs(expected) + float32_error, dtype)


def assert_close(actual, expected, *, scale=0.0, channel_axis=None, ulps=None, what="result"):
    """``actual`` is within ``ulps`` of ``expected``, in ulp of the largest value of the channel.

    ``scale`` is what the values were summed from, where that is larger than the values. Without
    ``channel_axis`` every value is its own channel, which suits arrays of shape (C,).
    """
    expected = np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}"
    if ulps is None:
        # The float64 reference is itself rounded; test_accuracy.py has exact values for float64.
        ulps = 4096 if actual.dtype == np.float64 else 8
    top = np.abs(expected) if channel_axis is None else largest(expected, channel_axis)
    allowed = tolerance(expected, actual.dtype, np.maximum(top, scale), ulps)
    error = np.abs(wide(actual) - expected)
    bad = ~(error <= allowed)
    if bad.any():
        at = np.unravel_index(np.argmax(np.where(bad, error / allowed, -1)), error.shape)
        at = tuple(int(i) for i in at)
        raise AssertionError(
            f"{what}: {bad.sum()} of {bad.size} values are off; at {at} got {actual[at]!r}, "
            f"expected {expected[at]!r} ± {np.broadcast_to(allowed, error.shape)[at]:.3g}"
        )


def same_bits(a, b):
    """Both are None, or of one dtype, shape and value to the last bit."""
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# How an array of given values may lie in memory: name → function from values to such an array.


def channels_last(a):
    """(N, C, ...) shape over memory in which the channels are contiguous."""
    return np.moveaxis(np.moveaxis(a, 1, -1).copy(order="C"), -1, 1)


def _strided(a, step):
    index = (slice(None, None, step),) * a.ndim
    out = np.zeros([n * abs(step) for n in a.shape], a.dtype)[index]
    out[...] = a
    return out


def _readonly(a):
    a = a.copy(order="C")
    a.flags.writeable = False
    return a


def _shifted(a, nbytes):
    """C-contiguous, but starting ``nbytes`` past the allocation's own alignment."""
    memory = np.empty(a.nbytes + nbytes, np.uint8)
    out = np.ndarray(a.shape, a.dtype, buffer=memory.data, offset=nbytes)
    out[...] = a
    return out


ARRANGEMENTS = {
    "contiguous": lambda a: a.copy(order="C"),
    "channels_last": channels_last,
    "fortran": lambda a: a.copy(order="F"),
    "channels_first": lambda a: a.swapaxes(0, 1).copy(order="C").swapaxes(0, 1),
    "rotated": lambda a: np.moveaxis(np.moveaxis(a, -1, 0).copy(order="C"), 0, -1),
    "every_second": lambda a: _strided(a, 2),
    "reversed": lambda a: _strided(a, -1),
    "cropped": lambda a: np.pad(a, [(0, 0)] * (a.ndim - 1) + [(1, 2)])[..., 1:-2],
    "cropped_channels": lambda a: np.pad(a, [(0, 0), (1, 1)] + [(0, 0)] * (a.ndim - 2))[:, 1:-1],
    "read_only": _readonly,
    "off_by_one_value": lambda a: _shifted(a, a.itemsize),
    "misaligned": lambda a: _shifted(a, 1),
}


@dataclass
class Problem:
    """The arguments of one forward call and the gradient for its backward call."""

    x: np.ndarray
    running_mean: np.ndarray | None
    running_var: np.ndarray | None
    weight: np.ndarray | None
    bias: np.ndarray | None
    grad_output: np.ndarray
    options: dict = field(default_factory=dict)

    @property
    def channel_axis(self):
        return self.options["channel_axis"]

    @property
    def arrays(self):
        return self.x, self.running_mean, self.running_var, self.weight, self.bias

    def forward(self, **changes):
        """`numbabn.batch_norm_forward` on these arguments."""
        return numbabn.batch_norm_forward(*self.arrays, **{**self.options, **changes})

    def batch_norm(self, **changes):
        """`numbabn.batch_norm` on these arguments."""
        return numbabn.batch_norm(*self.arrays, **{**self.options, **changes})

    def gradients(self, **changes):
        """Forward and backward of numbabn: ``(y, gradients)``."""
        y, saved = self.forward()
        return y, numbabn.batch_norm_backward(self.grad_output, saved, **changes)

    def expected(self):
        """What the reference makes of it, with the scales that errors are measured against."""
        axis = self.channel_axis
        x, mean, var, weight, bias = map(wide, self.arrays)
        options = {**self.options, "residual": wide(self.options["residual"])}
        plain = {**options, "residual": None, "activation": None}
        old = [None if a is None else a.copy() for a in (mean, var)]
        xhat, _ = reference.batch_norm_forward(x, *old, **plain)
        bn, _ = reference.batch_norm_forward(x, *old, weight, bias, **plain)
        # The reference updates what it is given, so the copies above took the other calls' updates.
        y, saved = reference.batch_norm_forward(x, mean, var, weight, bias, **options)
        dy = wide(self.grad_output)
        grads = reference.batch_norm_backward(dy, saved)
        others = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
        column = [-1 if i == axis % x.ndim else 1 for i in range(x.ndim)]
        gain = (saved.invstd if weight is None else weight * saved.invstd).reshape(column)
        y_scale = largest(bn, axis)
        if options["residual"] is not None:
            y_scale = y_scale + largest(options["residual"], axis)
        return SimpleNamespace(
            y=y,
            y_scale=y_scale,
            running_mean=mean,
            running_var=var,
            mean=saved.mean,
            invstd=saved.invstd,
            grads=grads,
            dx_scale=np.abs(gain) * largest(dy, axis),
            dweight_terms=np.abs(dy * xhat).sum(others),
            dbias_terms=np.abs(dy).sum(others),
            xhat=xhat,
        )


def problem(
    shape,
    dtype="float32",
    *,
    channel_axis=1,
    training=True,
    affine="both",
    residual=False,
    activation=None,
    momentum=0.1,
    eps=1e-5,
    arrange=None,
    parameters=None,
    seed=0,
):
    """A `Problem` with random values; each channel has its own mean, spread, weight and bias.

    ``parameters``: dtype of weight, bias and running statistics; by default that of ``x``, or
    float32 for the half types. With ReLU, ``x`` is moved until no value comes near the kink, where
    a rounding error may rightly change the gradient. ``arrange`` puts the big arrays in memory.
    """
    arrange = ARRANGEMENTS["contiguous"] if arrange is None else arrange
    dtype = as_dtype(dtype)
    if parameters is None:
        parameters = np.float32 if dtype.itemsize == 2 else dtype
    else:
        parameters = as_dtype(parameters)
    rng = np.random.default_rng(zlib.crc32(repr((shape, channel_axis, seed)).encode()))
    C = shape[channel_axis]
    column = [-1 if i == channel_axis % len(shape) else 1 for i in range(len(shape))]
    center, spread = rng.uniform(-2, 2, C), rng.uniform(0.5, 2, C)
    x = rng.standard_normal(shape) * spread.reshape(column) + center.reshape(column)
    # Running statistics near the batch's: eval outputs are then of the size of training outputs.
    arrays = [
        center + rng.uniform(-0.5, 0.5, C),
        spread**2 * rng.uniform(0.5, 2, C),
        rng.uniform(0.5, 2, C) * rng.choice([-1, 1], C) if affine in ("both", "weight") else None,
        rng.uniform(-1, 1, C) if affine in ("both", "bias") else None,
    ]
    arrays = [None if a is None else a.astype(parameters) for a in arrays]
    res = rng.standard_normal(shape).astype(dtype) if residual else None
    options = {
        "training": training,
        "momentum": momentum,
        "eps": eps,
        "channel_axis": channel_axis,
        "activation": activation,
        "residual": res,
    }
    x = x.astype(dtype)
    if activation is not None:
        x = _away_from_kink(x, [wide(a) for a in arrays], {**options, "residual": wide(res)})
    dy = rng.standard_normal(shape).astype(dtype)
    if residual:
        options["residual"] = arrange(res)
    return Problem(arrange(x), *arrays, arrange(dy), options)


def _away_from_kink(x, arrays, options, margin=1e-4):
    options = {**options, "activation": None}
    for _ in range(100):
        copies = [None if a is None else a.copy() for a in arrays]
        before, _ = reference.batch_norm_forward(wide(x), *copies, **options)
        near = np.abs(before) < margin
        if not near.any():
            return x
        # Steps that differ from value to value, so that equal values do not stay equal.
        step = np.linspace(0.125, 0.5, x.size).reshape(x.shape)
        x = np.where(near, wide(x) + step, wide(x)).astype(x.dtype)
    raise AssertionError("no values away from the kink were found")


def check_forward(p):
    """Run the forward pass of `Problem` ``p`` and compare everything it writes; gives ``saved``."""
    expected = p.expected()
    old = [wide(a) for a in (p.running_mean, p.running_var)]
    y, saved = p.forward()
    assert y.dtype == p.x.dtype
    assert_close(y, expected.y, scale=expected.y_scale, channel_axis=p.channel_axis, what="y")
    for name, before in zip(("running_mean", "running_var"), old, strict=True):
        now = getattr(p, name)
        if now is not None and p.options["training"]:
            after = getattr(expected, name)
            assert_close(now, after, scale=np.abs(before) + np.abs(after - before), what=name)
        elif now is not None:
            assert np.array_equal(wide(now), before), f"{name} changed in eval"
    return y, saved, expected


def check_backward(p):
    """Run both passes of `Problem` ``p`` and compare every gradient with the reference."""
    _, saved, expected = check_forward(p)
    actual = numbabn.batch_norm_backward(p.grad_output, saved)
    assert len(actual) == len(expected.grads)
    kept = np.float64 if p.x.dtype == np.float64 else np.float32
    kept = kept if p.weight is None else p.weight.dtype
    dx, dweight, dbias = actual[:3]
    assert dx.dtype == p.x.dtype
    assert dweight.dtype == dbias.dtype == kept
    axis = p.channel_axis
    assert_close(dx, expected.grads[0], scale=expected.dx_scale, channel_axis=axis, what="dx")
    assert_close(dweight, expected.grads[1], scale=expected.dweight_terms, what="dweight")
    assert_close(dbias, expected.grads[2], scale=expected.dbias_terms, what="dbias")
    if len(actual) == 4:
        assert actual[3].dtype == p.x.dtype
        assert np.array_equal(wide(actual[3]), expected.grads[3]), "grad_residual"
    return actual


def run_script(script, *, timeout=300, **environment):
    """Run Python source in a fresh process that imports this numbabn; gives what it printed."""
    where = str(Path(numbabn.__file__).resolve().parents[1])
    path = os.pathsep.join([where, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
