"""The front door: check the arguments, take the canonical view, call the backend, wrap the result.

`batch_norm` is inference (or training without a backward pass); `batch_norm_forward` and
`numbabn.backward` are a training step. `numbabn.stages` has the stages these are made of.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from numbabn import checks, layout
from numbabn.backends import cpu, device
from numbabn.backward import Saved
from numbabn.calls import Call, check_forward, quick_forward, small_eval

Array = NDArray[Any]

__all__ = ["batch_norm", "batch_norm_forward"]


def _write_back(call: Call) -> None:
    """Copy updated running statistics into the user's arrays, where kernels had a copy."""
    for name in ("running_mean", "running_var"):
        own, used = call.own.get(name), getattr(call.channels, name)
        if own is not None and own is not used:
            own[...] = used


def _result(call: Call) -> Array:
    """The array that is to take the result."""
    if call.out is not None:
        return call.out
    if call.x.size == 0:
        return np.empty_like(call.x)
    return layout.empty(call.view, call.x.shape, call.x.dtype)


def _forward(
    x: Array, y: Array, sharing: int, ways: Any, channels: Iterable[Array], training: bool,
    momentum: float, eps: float, relu: bool, residual: Array | None, keep: bool,
) -> tuple[Array, Array, Array | None] | None:  # fmt: skip
    """Run the forward pass from x to y; (x's memory, table, bits), the latter two if to `keep`.

    None if nothing was written, as memory is shared that must not be.
    """
    flat, target = layout.flatten_input(x), layout.flatten(y)
    added = bits = None
    if residual is not None:
        added = layout.flatten_input(residual)
        if keep and relu:
            view = ways.view
            row = view.C * view.L if view.columns else view.L
            bits = np.empty(x.size // row * -(-row // 16), np.uint16)
    if training:
        table = cpu().forward_train(
            flat, added, bits, target, sharing, ways, *channels, momentum, eps, relu
        )
    else:
        table = cpu().forward_eval(
            flat, added, bits, target, sharing, ways, *channels, eps, relu, keep
        )
    return None if table is None else (flat, table, bits)


def _forward_checked(
    call: Call, y: Array, training: bool, keep: bool
) -> tuple[Array, Array, Array | None]:
    """`_forward`, of a call in which nothing is wrong."""
    ways = cpu().ways_of(call.view, call.x.itemsize)
    done = _forward(
        call.x, y, cpu().CHECKED, ways, call.channels, training, call.momentum, call.eps, call.relu,
        call.residual, keep,
    )  # fmt: skip
    assert done is not None
    return done


def batch_norm(
    x: Any,
    running_mean: Any,
    running_var: Any,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
    activation: str | None = None,
    residual: Any = None,
    out: Any = None,
    stream: Any = None,
) -> Any:
    """Normalize each channel of `x`.

    Parameters
    ----------
    x : array, shape (N, C, ...)
        float32, float64, float16 or bfloat16 (of ``ml_dtypes``), rank 2 or more, in any memory
        order; with gaps it is copied once.
    running_mean, running_var : array of shape (C,), or None
        With ``training=False`` they are what `x` is normalized with. With ``training=True`` they
        are updated in place where given.
    weight, bias : array of shape (C,), or None
        γ and β; None means 1 and 0.
    training : bool
        Normalize with the mean and variance of this batch, or with the running ones.
    momentum : float
        Share of this batch in the running statistics.
    eps : float
        Added to the variance; at least 0.
    channel_axis : int
        Axis of the channels; may be negative.
    activation : {None, "relu"}
        Applied last, in the same pass over memory.
    residual : array of the shape and dtype of x, or None
        Added before the activation.
    out : array of the shape, dtype and memory order of x, or None
        Where to write the result; may be `x` itself.
    stream : int, stream object of CuPy, PyTorch or Numba, or None
        Where a call on CUDA arrays puts its work; None means the stream that x is on.

    Returns
    -------
    y : ndarray of the shape, dtype and memory order of x

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit; the message names it, and nothing has been written.

    Notes
    -----
    ``y = γ·(x - μ)/sqrt(v + eps) + β``. In training μ and v are the mean and the biased variance
    of the batch, and ``running ← (1 - momentum)·running + momentum·batch``, where the variance is
    the unbiased one (Ioffe and Szegedy 2015, arXiv:1502.03167; ``torch.nn.functional.batch_norm``).
    An empty batch gives an empty result and leaves the running statistics alone.

    On a GPU, arrays are those of CuPy, PyTorch or Numba, or any with ``__cuda_array_interface__``
    or DLPack, all of one kind of memory; the result is made by the library that x is from. The host
    neither waits nor copies: gaps, or a `residual` in another memory order, are errors there.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> mean, var = np.zeros(2), np.ones(2)
    >>> batch_norm(x, mean, var, training=True, momentum=0.5, eps=0.0)
    array([[-1., -1.],
           [ 1.,  1.]])
    >>> mean, var
    (array([ 1., 10.]), array([  1.5, 100.5]))
    """
    if residual is None and stream is None and (activation is None or activation == "relu"):
        if not training:
            y = small_eval(
                x, running_mean, running_var, weight, bias, momentum, eps, channel_axis, activation,
                out,
            )  # fmt: skip
            if y is not None:
                return y
        quick = quick_forward(
            x, running_mean, running_var, weight, bias, training, momentum, eps, channel_axis, out
        )
        if quick is not None:
            known, channels = quick
            y = known.empty() if out is None else out
            done = _forward(
                x, y, cpu().IN_PLACE if y is x else cpu().APART, known.ways, channels, training,
                momentum, eps, activation is not None, None, False,
            )  # fmt: skip
            if done is not None:
                return y
    if checks.is_cuda(x):
        return device().batch_norm(
            x, running_mean, running_var, weight, bias, training, momentum, eps, channel_axis,
            activation, residual, out, stream,
        )  # fmt: skip
    call = check_forward(
        x, running_mean, running_var, weight, bias, training, momentum, eps, channel_axis,
        activation, residual, out, stream, in_place=True,
    )  # fmt: skip
    y = _result(call)
    if call.x.size == 0:
        return y
    _forward_checked(call, y, training, False)
    if training:
        _write_back(call)
    return y


def batch_norm_forward(
    x: Any,
    running_mean: Any,
    running_var: Any,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
    activation: str | None = None,
    residual: Any = None,
    out: Any = None,
    stream: Any = None,
) -> tuple[Any, Saved]:
    """Do what `batch_norm` does, and keep what `batch_norm_backward` needs.

    Parameters
    ----------
    x, running_mean, running_var, weight, bias, training, momentum, eps
        See `batch_norm`.
    channel_axis, activation, residual, stream
        See `batch_norm`.
    out : array of the shape, dtype and memory order of x, or None
        Where to write the result. It must not share memory with `x`, which the backward pass reads.

    Returns
    -------
    y : ndarray of the shape, dtype and memory order of x
    saved : Saved
        For `batch_norm_backward`. It refers to `x`, which must not change until then.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit; the message names it, and nothing has been written.

    Notes
    -----
    Memory kept: a reference to `x` and 40 bytes per channel. Which elements the ReLU cut off is
    recomputed from `x`; with a residual as well, one bit per element is kept.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1.0], [3.0]])
    >>> y, saved = batch_norm_forward(x, None, None, training=True, eps=0.0)
    >>> saved.training, saved.mean, saved.invstd
    (True, array([2.]), array([1.]))
    """
    if residual is None and stream is None and (activation is None or activation == "relu"):
        quick = quick_forward(
            x, running_mean, running_var, weight, bias, training, momentum, eps, channel_axis, out
        )
        if quick is not None:
            (known, channels), relu = quick, activation is not None
            y = known.empty() if out is None else out
            done = _forward(
                x, y, cpu().APART, known.ways, channels, training, momentum, eps, relu, None, True
            )
            if done is not None:
                flat, table, _ = done
                return y, Saved(
                    bool(training), known.shape, known.axis, known.dtype, known.channels_dtype,
                    known.view, flat, table, None, relu, False,
                )  # fmt: skip
    if checks.is_cuda(x):
        there: tuple[Any, Saved] = device().batch_norm_forward(
            x, running_mean, running_var, weight, bias, training, momentum, eps, channel_axis,
            activation, residual, out, stream,
        )  # fmt: skip
        return there
    call = check_forward(
        x, running_mean, running_var, weight, bias, training, momentum, eps, channel_axis,
        activation, residual, out, stream, in_place=False,
    )  # fmt: skip
    x, has_residual = call.x, call.residual is not None
    given = call.own.get("weight")
    param_dtype = given.dtype if given is not None else call.channels.weight.dtype
    y = _result(call)
    if x.size == 0:
        table, bits = np.zeros((cpu().TABLE_ROWS, call.view.C)), None
        flat = np.empty(0, x.dtype)
    else:
        flat, table, bits = _forward_checked(call, y, training, True)
        if training:
            _write_back(call)
    saved = Saved(
        bool(training), x.shape, call.axis, x.dtype, param_dtype, call.view, flat, table, bits,
        call.relu, has_residual,
    )  # fmt: skip
    return y, saved
