"""The front door: check the arguments, take the canonical view, call the backend, wrap the result.

`batch_norm` is inference (or training without a backward pass), `batch_norm_forward` and
`batch_norm_backward` are a training step. `numbabn.stages` has the stages these are made of.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from numbabn import checks, layout
from numbabn.backends import cpu, device
from numbabn.calls import (
    Call,
    check_forward,
    check_target,
    known,
    laid_out,
    lies_apart,
    quick_forward,
    small_eval,
)
from numbabn.layout import View

Array = NDArray[Any]

__all__ = ["Saved", "batch_norm", "batch_norm_backward", "batch_norm_forward"]

_FLOAT32: np.dtype[Any] = np.dtype(np.float32)
_FLOAT64: np.dtype[Any] = np.dtype(np.float64)

_NOTHING: dict[np.dtype[Any], Array] = {
    np.dtype(t): np.empty(0, t) for t in (np.float32, np.float64)
}


class Saved(NamedTuple):
    """What the backward pass needs of a forward pass, and the mode it was made in.

    Attributes
    ----------
    training : bool
        Whether the statistics were those of the batch.
    shape : tuple of int
        Shape of x.
    channel_axis : int
        Axis of the channels, counted from the front.
    mean, invstd : ndarray of float64, shape (C,)
        The mean and ``1 / sqrt(var + eps)`` that x was normalized with.

    Notes
    -----
    It refers to x, not to a copy: x must not change before the backward pass.

    Examples
    --------
    >>> import numpy as np
    >>> y, saved = batch_norm_forward(np.array([[1.0], [3.0]]), None, None, training=True)
    >>> saved.training, saved.shape, saved.mean
    (True, (2, 1), array([2.]))
    """

    training: bool
    shape: tuple[int, ...]
    channel_axis: int
    dtype: np.dtype[Any]
    param_dtype: np.dtype[Any]
    view: View
    x: Array
    table: Array
    bits: Array | None
    relu: bool
    has_residual: bool

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean of each channel, shape (C,)."""
        if not isinstance(self.table, np.ndarray):
            there: Array = device().saved_mean(self)
            return there
        mean, rest, invstd = self.table[:3]
        apart = np.zeros_like(mean)
        np.divide(rest, invstd, out=apart, where=rest != 0)
        total: Array = mean + apart
        return total

    @property
    def sums_dtype(self) -> np.dtype[Any]:
        """What kernels sum grad_weight and grad_bias to: float32 unless weight is float64."""
        return _FLOAT64 if self.param_dtype == _FLOAT64 else _FLOAT32

    @property
    def invstd(self) -> NDArray[np.float64]:
        """``1 / sqrt(var + eps)`` of each channel, shape (C,)."""
        if not isinstance(self.table, np.ndarray):
            there: Array = device().saved_invstd(self)
            return there
        invstd: Array = self.table[2].copy()
        return invstd


def _write_back(call: Call) -> None:
    """Copy updated running statistics into the user's arrays, where kernels had a copy."""
    for name in ("running_mean", "running_var"):
        own, used = call.own.get(name), getattr(call.channels, name)
        if own is not None and own is not used:
            own[...] = used


def _forward(
    x: Array, view: View, channels: tuple[Any, ...], training: bool, momentum: float, eps: float,
    relu: bool, residual: Array | None, out: Array | None, keep: bool,
) -> tuple[Array, Array, Array | None, Array | None]:  # fmt: skip
    """Run the forward pass: (y, x's memory, table, bits); the latter two if to `keep`."""
    y = out if out is not None else layout.empty(view, x.shape, x.dtype)
    flat, target = layout.flatten_input(x, view), layout.flatten(y, view)
    added = None if residual is None else layout.flatten_input(residual, view)
    bits = None
    if keep and relu and residual is not None:
        row = view.C * view.L if view.columns else view.L
        bits = np.empty(x.size // row * -(-row // 16), np.uint16)
    if training:
        table = cpu().forward_train(flat, added, bits, target, view, *channels, momentum, eps, relu)
    else:
        table = cpu().eval_table(flat, *channels, eps) if keep else None
        cpu().forward_eval(flat, added, bits, target, view, *channels, eps, relu)
    return y, flat, table, bits


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
        found = quick_forward(
            x, running_mean, running_var, weight, bias, training, momentum, eps, channel_axis, out,
            True,
        )  # fmt: skip
        if found is not None:
            channels = found.channels(running_mean, running_var, weight, bias)
            relu = activation is not None
            return _forward(
                x, found.view, channels, training, momentum, eps, relu, None, out, False
            )[0]  # fmt: skip
    if checks.is_cuda(x):
        return device().batch_norm(
            x, running_mean, running_var, weight, bias, training, momentum, eps, channel_axis,
            activation, residual, out, stream,
        )  # fmt: skip
    call = check_forward(
        x, running_mean, running_var, weight, bias, training, momentum, eps, channel_axis,
        activation, residual, out, stream, in_place=True,
    )  # fmt: skip
    if call.x.size == 0:
        return call.out if call.out is not None else np.empty_like(call.x)
    y = _forward(
        call.x, call.view, call.channels, training, call.momentum, call.eps, call.relu,
        call.residual, call.out, False,
    )[0]  # fmt: skip
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
        found = quick_forward(
            x, running_mean, running_var, weight, bias, training, momentum, eps, channel_axis, out,
            False,
        )  # fmt: skip
        if found is not None:
            channels = found.channels(running_mean, running_var, weight, bias)
            relu = activation is not None
            y, flat, table, _ = _forward(
                x, found.view, channels, training, momentum, eps, relu, None, out, True
            )
            assert table is not None
            return y, Saved(
                bool(training), x.shape, found.axis, x.dtype, found.nothing.dtype, found.view,
                flat, table, None, relu, False,
            )  # fmt: skip
    if checks.is_cuda(x):
        done: tuple[Any, Saved] = device().batch_norm_forward(
            x, running_mean, running_var, weight, bias, training, momentum, eps, channel_axis,
            activation, residual, out, stream,
        )  # fmt: skip
        return done
    call = check_forward(
        x, running_mean, running_var, weight, bias, training, momentum, eps, channel_axis,
        activation, residual, out, stream, in_place=False,
    )  # fmt: skip
    x, has_residual = call.x, call.residual is not None
    given = call.own.get("weight")
    param_dtype = given.dtype if given is not None else call.channels.weight.dtype
    if x.size == 0:
        y = call.out if call.out is not None else np.empty_like(x)
        table, bits = np.zeros((cpu().TABLE_ROWS, call.view.C)), None
        flat = np.empty(0, x.dtype)
    else:
        y, flat, table, bits = _forward(
            x, call.view, call.channels, training, call.momentum, call.eps, call.relu,
            call.residual, call.out, True,
        )  # fmt: skip
        if training:
            _write_back(call)
    assert table is not None
    saved = Saved(
        bool(training), x.shape, call.axis, x.dtype, param_dtype, call.view, flat, table, bits,
        call.relu, has_residual,
    )  # fmt: skip
    return y, saved


def _check_gradient(given: Any, saved: Saved) -> tuple[Array, Array]:
    """`given` as an array, and as a dense one in the memory order of x."""
    if not isinstance(saved, Saved):
        raise TypeError(
            f"saved: expected what batch_norm_forward returned, got {type(saved).__name__}"
        )
    grad_output = checks.floating("grad_output", given)
    if grad_output.shape != saved.shape:
        raise ValueError(
            f"grad_output: expected the shape of the saved forward pass, {saved.shape}, "
            f"got {grad_output.shape}"
        )
    if grad_output.dtype != saved.dtype:
        raise TypeError(
            f"grad_output: expected the dtype of the saved forward pass, {saved.dtype}, "
            f"got {grad_output.dtype}"
        )
    if grad_output.size and not layout.lies_like(grad_output, saved.view):
        if layout.is_dense(grad_output):
            raise ValueError(
                "grad_output: expected the memory layout of the saved forward pass's x, got "
                f"strides {grad_output.strides}; copy it into that layout first"
            )
        return grad_output, laid_out(grad_output, saved.view)
    return grad_output, grad_output


def batch_norm_backward(
    grad_output: Any,
    saved: Saved,
    *,
    needs: tuple[bool, bool, bool] = (True, True, True),
    out: Any = None,
    stream: Any = None,
) -> tuple[Any, ...]:
    """Carry ``grad_output = dL/dy`` back through `batch_norm_forward`, in the mode it ran in.

    Parameters
    ----------
    grad_output : array of the shape, dtype and memory order of x
        If it has gaps it is copied once.
    saved : Saved
        What `batch_norm_forward` returned.
    needs : tuple of three bools
        Which of the three gradients are wanted; the others are None, and cost nothing.
    out : array of the shape, dtype and memory order of x, or None
        Where to write ``grad_input``; may be `grad_output` itself.
    stream
        For CUDA arrays only; see `batch_norm`.

    Returns
    -------
    grad_input : ndarray of the shape, dtype and memory order of x, or None
    grad_weight, grad_bias : ndarray of shape (C,), or None
        In the dtype of weight if one was given, else float32 (float64 for float64 input).
    grad_residual : ndarray of the shape, dtype and memory order of x
        A fourth item, only when the forward pass had a residual. Without an activation it is
        `grad_output` itself.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit; the message names it, and nothing has been written.

    Notes
    -----
    With ``x̂ = (x - μ)·r`` and ``r = 1/sqrt(v + eps)``, both modes have ``dβ = Σ dy`` and
    ``dγ = Σ dy·x̂``. In eval μ and v are constants, so ``dx = γ·r·dy``. In training they depend on
    x, so ``dx = γ·r·(dy - mean(dy) - x̂·mean(dy·x̂))`` (Ioffe and Szegedy 2015, section 3).

    Examples
    --------
    >>> import numpy as np
    >>> x, dy = np.array([[1.0], [3.0]]), np.array([[1.0], [0.0]])
    >>> for training in (True, False):  # statistics of the batch, or equal running ones
    ...     mean, var = np.array([2.0]), np.array([1.0])
    ...     y, saved = batch_norm_forward(x, mean, var, training=training, eps=1.0)
    ...     dx, dweight, dbias = batch_norm_backward(dy, saved)
    ...     print(dx.ravel().round(3), dweight.round(3), dbias)
    [ 0.177 -0.177] [-0.707] [1.]
    [0.707 0.   ] [-0.707] [1.]
    """
    wanted = checks.needs(needs)
    if not (
        stream is None
        and isinstance(saved, Saved)
        and type(grad_output) is np.ndarray
        and grad_output.shape == saved.shape
        and grad_output.dtype is saved.dtype
        and (found := known(grad_output, saved.channel_axis)) is not None
        and found.view == saved.view
        and (out is None or lies_apart(out, grad_output, (saved.x,), out is grad_output))
    ):
        return _backward_checked(grad_output, saved, wanted, out, stream)
    return _backward(grad_output, grad_output, saved, wanted, out)


def _backward_checked(
    grad_output: Any, saved: Saved, needs: tuple[bool, bool, bool], out: Any, stream: Any
) -> tuple[Any, ...]:
    """The backward pass for arguments that may need conversion, or be wrong."""
    if isinstance(saved, Saved) and not isinstance(saved.table, np.ndarray):
        grads: tuple[Any, ...] = device().batch_norm_backward(
            grad_output, saved, needs, out, stream
        )
        return grads
    given, dense_grad = _check_gradient(grad_output, saved)
    checks.no_stream(stream)
    if out is not None:
        check_target(out, given, saved.view)
    if given.size == 0:
        return _no_gradients(given, saved, needs, out)
    if out is not None:
        checks.same_or_no_overlap("out", layout.flatten(out, saved.view), {"x": saved.x})
        checks.same_or_no_overlap("out", out, {"grad_output": dense_grad})
    return _backward(given, dense_grad, saved, needs, out)


def _backward(
    given: Array, dense_grad: Array, saved: Saved, needs: tuple[bool, bool, bool],
    out: Array | None,
) -> tuple[Any, ...]:  # fmt: skip
    want_input, want_weight, want_bias = needs
    view, table, bits, relu = saved.view, saved.table, saved.bits, saved.relu
    dy, x = layout.flatten_input(dense_grad, view), saved.x
    grad_input = grad_residual = dx = dres = sums = None
    if want_input:
        grad_input = out if out is not None else layout.empty(view, saved.shape, saved.dtype)
        dx = layout.flatten(grad_input, view)
    if saved.has_residual:
        grad_residual = given
        if bits is not None:
            grad_residual = layout.empty(view, saved.shape, saved.dtype)
            dres = layout.flatten(grad_residual, view)
    if dx is not None and saved.training:
        sums = cpu().backward_train(dy, x, bits, dx, dres, view, table, relu, saved.sums_dtype)
    elif dx is not None and not (want_weight or want_bias or relu):
        # dx = dy * scale: x is not even read
        plain = cpu().known_table(dy, np.zeros(view.C), table[3], np.empty(0), np.empty(0))
        cpu().normalize(dy, None, None, dx, view, plain, relu=False)
    elif dx is None and dres is None and not want_weight and not relu:
        if want_bias:  # the sum of dy alone: x is not even read
            mean, _ = cpu().stats(dy, view)
            sums = np.stack([mean * view.per_channel, mean])
    elif dx is not None or dres is not None or want_weight or want_bias:
        sums = cpu().backward_eval(dy, x, bits, dx, dres, view, table, relu, saved.sums_dtype)

    grad_weight = grad_bias = None
    if sums is not None:
        if sums.dtype != saved.param_dtype:
            with np.errstate(over="ignore"):  # beyond the range of the dtype they are infinite
                sums = sums.astype(saved.param_dtype)
        grad_bias = sums[0] if want_bias else None
        grad_weight = sums[1] if want_weight else None
    grads = (grad_input, grad_weight, grad_bias)
    return (*grads, grad_residual) if saved.has_residual else grads


def _no_gradients(
    grad_output: Array, saved: Saved, needs: tuple[bool, bool, bool], out: Array | None
) -> tuple[Any, ...]:
    """The gradients of an empty batch: an empty one for x, zeros for weight and bias."""
    grad_input = None
    if needs[0]:
        grad_input = out if out is not None else np.empty_like(grad_output)
    zeros = [np.zeros(saved.view.C, saved.param_dtype) if need else None for need in needs[1:]]
    grads = (grad_input, *zeros)
    return (*grads, np.empty_like(grad_output)) if saved.has_residual else grads
