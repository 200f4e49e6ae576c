"""The stages of batch normalization, for people who embed or distribute them.

Several workers that hold parts of one batch do `batch_norm_stats` each, merge (`Stats.merge`),
and `normalize` each; backwards, `batch_norm_backward_reduce` each, add the sums up, and
`batch_norm_backward_elemt` each.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from numbabn import checks, layout
from numbabn.backends import cpu, device
from numbabn.calls import check_target, dense, laid_out
from numbabn.stats import Stats

Array = NDArray[Any]

__all__ = [
    "batch_norm_backward_elemt",
    "batch_norm_backward_reduce",
    "batch_norm_stats",
    "normalize",
]


def _float64(name: str, value: Any, C: int) -> Array:
    return np.array(checks.per_channel(name, value, C), np.float64)


def batch_norm_stats(x: Any, *, channel_axis: int = 1, stream: Any = None) -> Stats:
    """Count, mean and sum of squared deviations of each channel.

    Parameters
    ----------
    x : array, shape (N, C, ...)
        float32, float64, float16 or bfloat16, in any memory order; with gaps it is copied once.
    channel_axis : int
        Axis of the channels; may be negative.
    stream
        For CUDA arrays only; see `numbabn.batch_norm`.

    Returns
    -------
    Stats
        ``count``, and float64 ``mean`` and ``m2`` of shape (C,). Of an empty batch, count 0.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit; the message names it.

    Notes
    -----
    ``mean = Σx/m`` and ``m2 = Σ(x - mean)²``, by the pooled formula over chunks of the batch (Chan,
    Golub and LeVeque 1979), in float64.

    Examples
    --------
    >>> import numpy as np
    >>> stats = batch_norm_stats(np.array([[1.0, 5.0], [3.0, 5.0]]))
    >>> stats.count, stats.mean, stats.var
    (2, array([2., 5.]), array([1., 0.]))
    """
    if checks.is_cuda(x):
        return Stats(*device().batch_norm_stats(x, channel_axis, stream))
    x = checks.input_array("x", x)
    axis = checks.axis(channel_axis, x.ndim)
    checks.no_stream(stream)
    C = x.shape[axis]
    if x.size == 0:
        return Stats(0, np.zeros(C), np.zeros(C))
    x, view = dense(x, axis)
    return Stats(
        view.per_channel, *cpu().stats(layout.flatten_input(x), cpu().ways_of(view, x.itemsize))
    )


def normalize(
    x: Any,
    scale: ArrayLike,
    shift: ArrayLike,
    *,
    channel_axis: int = 1,
    activation: str | None = None,
    residual: Any = None,
    out: Any = None,
    stream: Any = None,
) -> Any:
    """``y = x·scale + shift``, channel by channel: folded batch normalization.

    Parameters
    ----------
    x : array, shape (N, C, ...)
        float32, float64, float16 or bfloat16, in any memory order; with gaps it is copied once.
    scale, shift : array of shape (C,)
        For example from `numbabn.fold_scale_shift` or ``layer.fold()``.
    channel_axis, activation, residual, out, stream
        See `numbabn.batch_norm`.

    Returns
    -------
    y : ndarray of the shape, dtype and memory order of x

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit; the message names it, and nothing has been written.

    Notes
    -----
    Where ``|mean|`` is far larger than the standard deviation, `scale` and `shift` nearly cancel
    and the result is less exact than that of `numbabn.batch_norm`, which subtracts the mean first.

    Examples
    --------
    >>> import numpy as np
    >>> normalize(np.array([[1.0, 5.0], [3.0, 5.0]]), np.array([2.0, 1.0]), np.array([0.0, -4.0]))
    array([[2., 1.],
           [6., 1.]])
    """
    if checks.is_cuda(x):
        return device().normalize(
            x, scale, shift, channel_axis, activation, residual, out, stream
        )  # fmt: skip
    x = checks.input_array("x", x)
    axis = checks.axis(channel_axis, x.ndim)
    checks.no_stream(stream)
    relu = checks.relu(activation)
    C = x.shape[axis]
    factor, term = _float64("scale", scale, C), _float64("shift", shift, C)
    if residual is not None:
        residual = checks.same_kind("residual", residual, x)
    if x.size == 0:
        if out is not None:
            checks.target("out", out, x, laid_out=True)
        return out if out is not None else np.empty_like(x)
    x, view = dense(x, axis)
    if out is not None:
        check_target(out, x, view)
        checks.no_overlap("out", out, {"scale": scale, "shift": shift})
        checks.same_or_no_overlap("out", out, {"x": x, "residual": residual})
    flat = layout.flatten_input(x)
    added = None
    if residual is not None:
        added = layout.flatten_input(laid_out(residual, view))
    y = out if out is not None else layout.empty(view, x.shape, x.dtype)
    table = cpu().known_table(flat, np.zeros(C), np.ones(C), factor, term)
    cpu().normalize(
        flat, added, None, layout.flatten(y), cpu().ways_of(view, x.itemsize), table, relu
    )
    return y


def _check_pair(grad_output: Any, x: Any, channel_axis: Any) -> tuple[Array, Array, int]:
    x = checks.input_array("x", x)
    grad_output = checks.same_kind("grad_output", grad_output, x)
    return grad_output, x, checks.axis(channel_axis, x.ndim)


def batch_norm_backward_reduce(
    grad_output: Any, x: Any, mean: ArrayLike, invstd: ArrayLike, *, channel_axis: int = 1,
    stream: Any = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:  # fmt: skip
    """The two sums per channel that the backward pass needs of the whole batch.

    Parameters
    ----------
    grad_output : array of the shape and dtype of x
        Gradient of the loss with respect to the output.
    x : array, shape (N, C, ...)
        Input of the forward pass.
    mean, invstd : array of shape (C,)
        What x was normalized with, best in float64; `invstd` is ``1 / sqrt(var + eps)``.
    channel_axis : int
        Axis of the channels; may be negative.
    stream
        For CUDA arrays only; see `numbabn.batch_norm`.

    Returns
    -------
    sum_dy, sum_dy_xmu : ndarray of float64, shape (C,)
        ``Σ dy``, which is dβ, and ``Σ dy·(x - mean)``; times `invstd` the latter is dγ.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit; the message names it.

    Examples
    --------
    >>> import numpy as np
    >>> x, dy = np.array([[1.0], [3.0]]), np.array([[1.0], [2.0]])
    >>> batch_norm_backward_reduce(dy, x, np.array([2.0]), np.array([1.0]))
    (array([3.]), array([1.]))
    """
    if checks.is_cuda(x):
        sums: tuple[Any, Any] = device().batch_norm_backward_reduce(
            grad_output, x, mean, invstd, channel_axis, stream
        )
        return sums
    grad_output, x, axis = _check_pair(grad_output, x, channel_axis)
    checks.no_stream(stream)
    C = x.shape[axis]
    mean, _ = _float64("mean", mean, C), _float64("invstd", invstd, C)
    if x.size == 0:
        return np.zeros(C), np.zeros(C)
    x, view = dense(x, axis)
    flat = layout.flatten_input(x)
    dy = layout.flatten_input(laid_out(grad_output, view))
    table = cpu().known_table(flat, mean, np.ones(C), np.empty(0), np.empty(0))
    ways, checked = cpu().ways_of(view, x.itemsize), cpu().CHECKED
    sums = cpu().backward_eval(dy, flat, None, None, None, checked, ways, table, relu=False)
    return sums[0], sums[1]


def batch_norm_backward_elemt(
    grad_output: Any,
    x: Any,
    mean: ArrayLike,
    invstd: ArrayLike,
    weight: ArrayLike | None,
    sum_dy: ArrayLike,
    sum_dy_xmu: ArrayLike,
    count: float,
    *,
    channel_axis: int = 1,
    out: Any = None,
    stream: Any = None,
) -> Any:
    """Training's input gradient, given the sums over the whole batch.

    Parameters
    ----------
    grad_output : array of the shape and dtype of x
        Gradient of the loss with respect to the output.
    x : array, shape (N, C, ...)
        Input of the forward pass.
    mean, invstd : array of shape (C,)
        What x was normalized with, best in float64.
    weight : array of shape (C,), or None
        γ; None means 1.
    sum_dy, sum_dy_xmu : array of shape (C,)
        The sums of `batch_norm_backward_reduce` over all workers.
    count : float
        Values per channel over all workers.
    channel_axis : int
        Axis of the channels; may be negative.
    out : array of the shape, dtype and memory order of x, or None
        Where to write the result; may be `grad_output` or `x` itself.
    stream
        For CUDA arrays only; see `numbabn.batch_norm`.

    Returns
    -------
    grad_input : ndarray of the shape, dtype and memory order of x

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit; the message names it, and nothing has been written.

    Notes
    -----
    ``dx = γ·r·(dy - Σdy/m - (x - mean)·r²·Σdy(x - mean)/m)``, which is
    ``γ·r·(dy - mean(dy) - x̂·mean(dy·x̂))`` (Ioffe and Szegedy 2015, section 3).

    Examples
    --------
    >>> import numpy as np
    >>> x, dy = np.array([[1.0], [3.0]]), np.array([[1.0], [0.0]])
    >>> mean, invstd = np.array([2.0]), np.array([0.5])
    >>> sums = batch_norm_backward_reduce(dy, x, mean, invstd)
    >>> batch_norm_backward_elemt(dy, x, mean, invstd, None, *sums, 2)
    array([[ 0.1875],
           [-0.1875]])
    """
    if checks.is_cuda(x):
        return device().batch_norm_backward_elemt(
            grad_output, x, mean, invstd, weight, sum_dy, sum_dy_xmu, count, channel_axis, out,
            stream,
        )  # fmt: skip
    grad_output, x, axis = _check_pair(grad_output, x, channel_axis)
    checks.no_stream(stream)
    C = x.shape[axis]
    mean, invstd = _float64("mean", mean, C), _float64("invstd", invstd, C)
    gamma = np.empty(0) if weight is None else _float64("weight", weight, C)
    total, product = _float64("sum_dy", sum_dy, C), _float64("sum_dy_xmu", sum_dy_xmu, C)
    count = checks.real("count", count)
    if x.size and count <= 0:
        raise ValueError(f"count: expected the number of values per channel, got {count!r}")
    if x.size == 0:
        if out is not None:
            checks.target("out", out, x, laid_out=True)
        return out if out is not None else np.empty_like(x)
    x, view = dense(x, axis)
    grad_output = laid_out(grad_output, view)
    if out is not None:
        check_target(out, x, view)
        checks.same_or_no_overlap("out", out, {"grad_output": grad_output, "x": x})
    flat, dy = layout.flatten_input(x), layout.flatten_input(grad_output)
    table = cpu().known_table(flat, mean, invstd, gamma, np.empty(0))
    slopes = cpu().slopes_from_sums(flat, count, total, product, table)
    grad_input = out if out is not None else layout.empty(view, x.shape, x.dtype)
    dx = layout.flatten(grad_input)
    cpu().backward_elements(
        dy, flat, None, dx, None, cpu().ways_of(view, x.itemsize), table, slopes, relu=False
    )
    return grad_input
