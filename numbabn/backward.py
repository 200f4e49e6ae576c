"""The way back: what a forward pass leaves for it, and `batch_norm_backward`."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from numbabn import checks, layout
from numbabn.backends import cpu, device
from numbabn.calls import check_target, known, laid_out, matches
from numbabn.layout import View

Array = NDArray[Any]

__all__ = ["Saved", "batch_norm_backward"]

_FLOAT32: np.dtype[Any] = np.dtype(np.float32)
_FLOAT64: np.dtype[Any] = np.dtype(np.float64)


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
    >>> from numbabn import batch_norm_forward
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


def _check_gradient(given: Any, saved: Saved) -> tuple[Array, Array]:
    """`given` as an array, and as a dense one in the memory order of x."""
    if not isinstance(saved, Saved):
        raise TypeError(
            f"saved: expected what batch_norm_forward returned, got {type(saved).__name__}"
        )
    grad_output = checks.floating("grad_output", given)
    checks.gradient(grad_output.shape, grad_output.dtype, saved.shape, saved.dtype)
    if grad_output.size and not layout.lies_like(grad_output, saved.view):
        if layout.is_dense(grad_output):
            raise checks.gradient_layout(grad_output.strides)
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
    >>> from numbabn import batch_norm_forward
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
        and (found := known(grad_output, saved.channel_axis)) is not None
        and found.view == saved.view
        and found.shape == saved.shape
        and found.dtype is saved.dtype
        and (out is None or matches(out, grad_output))
    ):
        return _backward_checked(grad_output, saved, wanted, out, stream)
    sharing = cpu().APART if out is not grad_output else cpu().IN_PLACE
    grads = _backward(grad_output, grad_output, saved, found.ways, wanted, out, sharing)
    if grads is None:
        return _backward_checked(grad_output, saved, wanted, out, stream)
    return grads


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
        checks.same_or_no_overlap("out", layout.flatten(out), {"x": saved.x})
        checks.same_or_no_overlap("out", out, {"grad_output": dense_grad})
    ways = cpu().ways_of(saved.view, saved.x.itemsize)
    done = _backward(given, dense_grad, saved, ways, needs, out, cpu().CHECKED)
    assert done is not None
    return done


def _backward(
    given: Array, dense_grad: Array, saved: Saved, ways: Any, needs: tuple[bool, bool, bool],
    out: Array | None, sharing: int,
) -> tuple[Any, ...] | None:  # fmt: skip
    """The gradients; None if nothing was written, as memory is shared that must not be."""
    want_input, want_weight, want_bias = needs
    view, table, bits, relu = saved.view, saved.table, saved.bits, saved.relu
    dy, x = layout.flatten_input(dense_grad), saved.x
    grad_input = grad_residual = dx = dres = sums = None
    if want_input:
        grad_input = out if out is not None else layout.empty(view, saved.shape, saved.dtype)
        dx = layout.flatten(grad_input)
    if saved.has_residual:
        grad_residual = given
        if bits is not None:
            grad_residual = layout.empty(view, saved.shape, saved.dtype)
            dres = layout.flatten(grad_residual)
    if dx is not None and saved.training:
        sums = cpu().backward_train(
            dy, x, bits, dx, dres, sharing, ways, table, relu, saved.sums_dtype
        )
        if sums is None:
            return None
    elif dx is not None and not (want_weight or want_bias or relu):
        # dx = dy * scale: x is not even read
        if sharing != cpu().CHECKED and np.may_share_memory(dx, x):
            return None
        plain = cpu().known_table(dy, np.zeros(view.C), table[3], np.empty(0), np.empty(0))
        if not cpu().normalize(dy, None, None, dx, ways, plain, False, sharing):
            return None
    elif dx is None and dres is None and not want_weight and not relu:
        if want_bias:  # the sum of dy alone: x is not even read
            mean, _ = cpu().stats(dy, ways)
            sums = np.stack([mean * view.per_channel, mean])
    elif dx is not None or dres is not None or want_weight or want_bias:
        sums = cpu().backward_eval(
            dy, x, bits, dx, dres, sharing, ways, table, relu, saved.sums_dtype
        )
        if sums is None:
            return None
    grad_weight, grad_bias = _of_sums(sums, saved, needs)
    grads = (grad_input, grad_weight, grad_bias)
    return (*grads, grad_residual) if saved.has_residual else grads


def _of_sums(
    sums: Array | None, saved: Saved, needs: tuple[bool, bool, bool]
) -> tuple[Array | None, Array | None]:
    """The gradients of weight and bias, as far as they are wanted."""
    if sums is None:
        return None, None
    if sums.dtype != saved.param_dtype:
        with np.errstate(over="ignore"):  # beyond the range of the dtype they are infinite
            sums = sums.astype(saved.param_dtype)
    return sums[1] if needs[1] else None, sums[0] if needs[2] else None


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
