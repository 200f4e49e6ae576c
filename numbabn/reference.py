"""The definition: batch normalization in plain float64 NumPy, both modes, forwards and backwards.

Every kernel of this package is tested against these two functions, and they are themselves checked
by finite differences. They are written to be read: any array becomes a matrix with one row per
channel, shape ``(C, m)``, so that each equation is one line. With ``m`` values per channel, the
mean ``μ`` and variance ``v`` that the mode normalizes with, ``γ = weight`` and ``β = bias``::

    r = 1/sqrt(v + eps)      x̂ = (x - μ)·r      y = relu(γ·x̂ + β + residual)

where relu and the residual are optional, and

=======  ==============================================  =========================
.        training=True                                   training=False
=======  ==============================================  =========================
μ, v     mean and biased variance of this batch          running_mean, running_var
running  (1-momentum)·running + momentum·(μ, v·m/(m-1))  left alone
dβ       Σ dy                                            Σ dy
dγ       Σ dy·x̂                                          Σ dy·x̂
dx       γ·r·(dy - mean(dy) - x̂·mean(dy·x̂))              γ·r·dy
=======  ==============================================  =========================

Only ``dx`` has another formula: in training ``μ`` and ``v`` depend on ``x``, in eval they are
constants. Sources: Ioffe and Szegedy 2015, arXiv:1502.03167, algorithms 1 and 2 and the gradients
of section 3; PyTorch's documentation of ``torch.nn.BatchNorm2d`` for the running statistics.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Saved", "batch_norm_backward", "batch_norm_forward"]

FloatArray = NDArray[np.float64]


class Saved(NamedTuple):
    """What the backward pass needs: the input, the statistics used, and the mode they came from."""

    training: bool
    mean: FloatArray  # (C,)
    invstd: FloatArray  # (C,)
    weight: FloatArray  # (C,)
    x: FloatArray
    passes: NDArray[np.bool_] | None  # where ReLU lets the gradient through; None without ReLU
    has_residual: bool
    shape: tuple[int, ...]
    channel_axis: int


def _rows(x: FloatArray, channel_axis: int) -> FloatArray:
    """``x`` as a matrix with one row per channel, shape (C, m)."""
    x = np.ascontiguousarray(np.moveaxis(x, channel_axis, 0))  # NumPy sums contiguous rows pairwise
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def _unrows(rows: FloatArray, shape: tuple[int, ...], channel_axis: int) -> FloatArray:
    """Undo `_rows`: an array of shape ``shape`` from the matrix (C, m)."""
    channels_first = np.moveaxis(np.empty(shape), channel_axis, 0).shape
    return np.moveaxis(rows.reshape(channels_first), 0, channel_axis)


@np.errstate(all="ignore")  # NaN and infinity are values here: they pass through without a warning
def batch_norm_forward(
    x: ArrayLike,
    running_mean: NDArray[Any] | None,
    running_var: NDArray[Any] | None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
    activation: str | None = None,
    residual: ArrayLike | None = None,
) -> tuple[FloatArray, Saved]:
    """Normalize each channel of ``x``; in training, update the running statistics in place.

    Parameters
    ----------
    x : array_like, shape (N, C, ...)
        Input of any real dtype; the computation is in float64.
    running_mean, running_var : ndarray of shape (C,), or None
        Read in eval. In training they are updated in place where given, unless the batch is empty.
    weight, bias : array_like of shape (C,), or None
        ``γ`` and ``β``; None means 1 and 0.
    training : bool
        Normalize with the statistics of this batch (True) or with the running statistics (False).
    momentum : float
        Share of the new batch in the running statistics.
    eps : float
        Added to the variance.
    channel_axis : int
        Which axis of ``x`` holds the channels; may be negative.
    activation : {None, "relu"}
        ``relu(z) = max(z, 0)``, applied last; NaN stays NaN.
    residual : array_like of the shape of x, or None
        Added before the activation.

    Returns
    -------
    y : ndarray of float64, shape of x
    saved : Saved
        For `batch_norm_backward`.

    Raises
    ------
    ValueError
        If ``training`` and there is one value per channel; if not ``training`` and a running
        statistic is None; if ``activation`` is unknown.

    Notes
    -----
    ``y = γ·(x - μ)/sqrt(v + eps) + β`` (Ioffe and Szegedy 2015, algorithm 1), with the biased
    variance ``v = Σ(x - μ)²/m``. The running variance takes the unbiased ``v·m/(m-1)``, as in
    PyTorch's documentation of ``torch.nn.BatchNorm2d``.

    Examples
    --------
    >>> y, saved = batch_norm_forward([[1.0, 5.0], [3.0, 5.0]], None, None, training=True, eps=0.5)
    >>> y.round(4).tolist()
    [[-0.8165, 0.0], [0.8165, 0.0]]
    >>> saved.mean.tolist()
    [2.0, 5.0]
    """
    if activation not in (None, "relu"):
        raise ValueError(f"activation: expected None or 'relu', got {activation!r}")
    x = np.asarray(x, np.float64)
    rows = _rows(x, channel_axis)
    C, m = rows.shape
    gamma = np.ones(C) if weight is None else np.array(weight, np.float64)
    beta = np.zeros(C) if bias is None else np.array(bias, np.float64)

    if training:
        if m == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, x: {x.shape}")
        mean = rows.sum(1) / max(m, 1)
        # A second sum takes away the first one's rounding error; an infinite mean stays infinite.
        rest = (rows - mean[:, None]).sum(1) / max(m, 1)
        mean = np.where(np.isfinite(mean), mean + rest, mean)
        var = ((rows - mean[:, None]) ** 2).sum(1) / max(m, 1)
        if running_mean is not None and m > 0:
            old = running_mean.astype(np.float64)
            running_mean[...] = (1 - momentum) * old + momentum * mean
        if running_var is not None and m > 0:
            old = running_var.astype(np.float64)
            running_var[...] = (1 - momentum) * old + momentum * var * (m / (m - 1))
    elif running_mean is None or running_var is None:
        raise ValueError("running_mean, running_var: expected arrays when not training, got None")
    else:
        mean, var = np.array(running_mean, np.float64), np.array(running_var, np.float64)

    invstd = 1 / np.sqrt(var + eps)
    y_rows = gamma[:, None] * ((rows - mean[:, None]) * invstd[:, None]) + beta[:, None]
    y = _unrows(y_rows, x.shape, channel_axis)
    if residual is not None:
        y = y + np.asarray(residual, np.float64)
    passes = None
    if activation == "relu":
        passes = ~(y <= 0)  # so that a NaN passes its gradient on, as in PyTorch
        y = np.maximum(y, 0)
    has_residual = residual is not None
    saved = Saved(training, mean, invstd, gamma, x, passes, has_residual, x.shape, channel_axis)
    return y, saved


@np.errstate(all="ignore")
def batch_norm_backward(grad_output: ArrayLike, saved: Saved) -> tuple[FloatArray, ...]:
    """Carry ``grad_output = dL/dy`` back through `batch_norm_forward`, in the mode it ran in.

    Parameters
    ----------
    grad_output : array_like, shape of x
        Gradient of a loss with respect to ``y``.
    saved : Saved
        What the forward pass returned.

    Returns
    -------
    grad_input : ndarray of float64, shape of x
    grad_weight, grad_bias : ndarray of float64, shape (C,)
        Given in both modes, and also when weight or bias was None.
    grad_residual : ndarray of float64, shape of x
        Only when the forward pass had a residual.

    Notes
    -----
    ReLU passes ``dy`` on where its input was positive. Then ``dβ = Σ dy`` and ``dγ = Σ dy·x̂``;
    in training ``dx = γ·r·(dy - mean(dy) - x̂·mean(dy·x̂))``, which is section 3 of Ioffe and
    Szegedy 2015 with its chain of partial derivatives multiplied out; in eval ``dx = γ·r·dy``.

    Examples
    --------
    >>> import numpy as np
    >>> x, dy = np.array([[1.0], [3.0]]), np.array([[1.0], [0.0]])
    >>> for training in (True, False):  # the running statistics equal those of the batch
    ...     _, saved = batch_norm_forward(
    ...         x, np.array([2.0]), np.array([1.0]), training=training, eps=0.5625
    ...     )
    ...     dx, dweight, dbias = batch_norm_backward(dy, saved)
    ...     print(dx.ravel().round(4).tolist(), dweight.tolist(), dbias.tolist())
    [0.144, -0.144] [-0.8] [1.0]
    [0.8, 0.0] [-0.8] [1.0]
    """
    dy = np.asarray(grad_output, np.float64)
    if saved.passes is not None:
        dy = np.where(saved.passes, dy, 0.0)
    rows = _rows(dy, saved.channel_axis)
    m = max(rows.shape[1], 1)
    r, gamma = saved.invstd[:, None], saved.weight[:, None]
    xhat = (_rows(saved.x, saved.channel_axis) - saved.mean[:, None]) * r

    grad_bias = rows.sum(1)
    grad_weight = (rows * xhat).sum(1)
    if saved.training:
        centred = rows - grad_bias[:, None] / m - xhat * grad_weight[:, None] / m
        grad_rows = gamma * r * centred
    else:
        grad_rows = gamma * r * rows
    grad_input = _unrows(grad_rows, saved.shape, saved.channel_axis)
    return (grad_input, grad_weight, grad_bias) + ((dy,) if saved.has_residual else ())
