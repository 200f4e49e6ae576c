"""Folding batch normalization away for inference.

With running statistics the layer is one scale and one shift per channel (`fold_scale_shift`), and a
convolution or a matrix product next to it can take these two over: `fuse_conv_bn` and
`fuse_linear_bn` where the norm comes second, `fuse_bn_conv` where it comes first.

All of this holds for eval mode only. In training the statistics are those of each batch, so there
is nothing constant to fold; these functions read the running statistics whatever mode the layer is
in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from numbabn import checks
from numbabn.state import host_array

__all__ = ["fold_scale_shift", "fuse_bn_conv", "fuse_conv_bn", "fuse_linear_bn"]

FloatArray = NDArray[np.float64]


def fold_scale_shift(
    running_mean: ArrayLike,
    running_var: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
) -> tuple[FloatArray, FloatArray]:
    """One scale and one shift per channel that do what the layer does in eval mode.

    Parameters
    ----------
    running_mean, running_var : array_like, shape (C,)
        Running statistics, of any floating dtype.
    weight, bias : array_like of shape (C,), or None
        ``γ`` and ``β``; None means 1 and 0.
    eps : float
        Added to the variance.

    Returns
    -------
    scale, shift : ndarray of float64, shape (C,)
        ``y = x·scale + shift`` is the output in eval mode.

    Raises
    ------
    TypeError
        If an array does not hold floating-point numbers, or ``eps`` is not a real number.
    ValueError
        If the shapes differ or are not (C,), or ``eps`` is negative or not finite.

    Notes
    -----
    ``scale = γ/sqrt(running_var + eps)`` and ``shift = β - running_mean·scale`` (Ioffe and Szegedy
    2015, arXiv:1502.03167, algorithm 2, step 11). Where a channel's mean is far larger than its
    standard deviation, ``x·scale`` and ``shift`` nearly cancel, and the result is as coarse as the
    precision it is computed in; `numbabn.batch_norm` subtracts the mean first and keeps its digits.

    Examples
    --------
    >>> scale, shift = fold_scale_shift([3.0], [0.25], weight=[2.0], bias=[1.0], eps=0.0)
    >>> scale.tolist(), shift.tolist()
    ([4.0], [-11.0])
    """
    eps = checks.not_negative("eps", eps)
    mean = _floats("running_mean", running_mean).astype(np.float64)
    if mean.ndim != 1:
        raise ValueError(f"running_mean: expected shape (C,), got {mean.shape}")
    var = _channels("running_var", running_var, mean.size)
    gamma = np.ones(mean.size) if weight is None else _channels("weight", weight, mean.size)
    beta = np.zeros(mean.size) if bias is None else _channels("bias", bias, mean.size)
    with np.errstate(all="ignore"):  # NaN and infinity are values, and stay in their channel
        scale = gamma / np.sqrt(var + eps)
        return scale, beta - mean * scale


def fuse_conv_bn(
    conv_weight: ArrayLike,
    conv_bias: ArrayLike | None,
    bn: Any,
    *,
    transposed: bool = False,
    groups: int = 1,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Weight and bias of one convolution that does a convolution and then a norm in eval mode.

    Parameters
    ----------
    conv_weight : array_like
        Shape (O, I/groups, ...) as for ``torch.nn.Conv*d``, or (I, O/groups, ...) with
        ``transposed``, as for ``torch.nn.ConvTranspose*d``; any number of kernel axes.
    conv_bias : array_like of shape (O,), or None
        Bias of the convolution.
    bn : BatchNorm1d, BatchNorm2d, BatchNorm3d or alike
        Anything with ``running_mean``, ``running_var``, ``weight``, ``bias`` (either may be None)
        and ``eps``, over O channels. A PyTorch layer is taken too.
    transposed : bool
        Whether the convolution is a transposed one.
    groups : int
        Groups of the convolution; they only matter with ``transposed``.

    Returns
    -------
    weight : ndarray, shape and dtype of conv_weight
    bias : ndarray, shape (O,), dtype of conv_bias, or of conv_weight when there was none
        Both are new arrays, computed in float64 and rounded once.

    Raises
    ------
    TypeError
        If an array does not hold floating-point numbers, or ``bn`` lacks an attribute.
    ValueError
        If shapes do not fit together, or ``bn`` has no running statistics.

    Notes
    -----
    ``scale·(W∗x + b) + shift = (scale·W)∗x + (scale·b + shift)``, whatever the padding and stride;
    see `fold_scale_shift` for both factors. For eval mode only.

    Examples
    --------
    >>> import numpy as np
    >>> import numbabn
    >>> bn = numbabn.BatchNorm2d(2, eps=0.0).eval()
    >>> bn.running_var[...] = [4.0, 0.25]
    >>> weight, bias = fuse_conv_bn(np.ones((2, 1, 1, 1), np.float32), None, bn)
    >>> weight.ravel().tolist(), bias.tolist()
    ([0.5, 2.0], [0.0, 0.0])
    """
    weight = _conv_weight(conv_weight, groups)
    scale, shift = _scale_shift(bn)
    O = weight.shape[1] * groups if transposed else weight.shape[0]  # noqa: E741
    if scale.size != O:
        raise ValueError(f"bn: expected {O} channels, as conv_weight puts out, got {scale.size}")
    if transposed:
        # Input channel i belongs to group i // (I/groups), which puts out O/groups channels.
        per_input = np.repeat(scale.reshape(groups, O // groups), weight.shape[0] // groups, axis=0)
        factor = per_input.reshape(weight.shape[:2] + (1,) * (weight.ndim - 2))
    else:
        factor = scale.reshape((O,) + (1,) * (weight.ndim - 1))
    return _fused(weight, factor, conv_bias, "conv_bias", scale, shift)


def fuse_linear_bn(
    linear_weight: ArrayLike, linear_bias: ArrayLike | None, bn: Any
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Weight and bias of one dense layer that does a dense layer and then a norm in eval mode.

    Parameters
    ----------
    linear_weight : array_like, shape (O, I)
        Weight of ``y = x @ linear_weight.T + linear_bias``, as for ``torch.nn.Linear``.
    linear_bias : array_like of shape (O,), or None
        Bias of the dense layer.
    bn : BatchNorm1d or alike
        As for `fuse_conv_bn`, over O channels.

    Returns
    -------
    weight : ndarray, shape (O, I), dtype of linear_weight
    bias : ndarray, shape (O,), dtype of linear_bias, or of linear_weight when there was none
        Both are new arrays, computed in float64 and rounded once.

    Raises
    ------
    TypeError
        If an array does not hold floating-point numbers, or ``bn`` lacks an attribute.
    ValueError
        If shapes do not fit together, or ``bn`` has no running statistics.

    Notes
    -----
    ``scale·(W·x + b) + shift = (scale·W)·x + (scale·b + shift)``; see `fold_scale_shift` for both
    factors. For eval mode only.

    Examples
    --------
    >>> import numpy as np
    >>> import numbabn
    >>> bn = numbabn.BatchNorm1d(2, eps=0.0).eval()
    >>> bn.running_mean[...] = [1.0, 2.0]
    >>> weight, bias = fuse_linear_bn(np.eye(2), np.array([0.5, 0.5]), bn)
    >>> weight.tolist(), bias.tolist()
    ([[1.0, 0.0], [0.0, 1.0]], [-0.5, -1.5])
    """
    weight = _floats("linear_weight", linear_weight)
    if weight.ndim != 2:
        raise ValueError(f"linear_weight: expected shape (O, I), got {weight.shape}")
    scale, shift = _scale_shift(bn)
    if scale.size != weight.shape[0]:
        raise ValueError(
            f"bn: expected {weight.shape[0]} channels, as linear_weight puts out, got {scale.size}"
        )
    return _fused(weight, scale[:, None], linear_bias, "linear_bias", scale, shift)


def fuse_bn_conv(
    bn: Any,
    conv_weight: ArrayLike,
    conv_bias: ArrayLike | None,
    *,
    padding: int | Sequence[int] | str,
    padding_mode: str = "zeros",
    groups: int = 1,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Weight and bias of one convolution that does a norm in eval mode and then a convolution.

    Parameters
    ----------
    bn : BatchNorm1d, BatchNorm2d, BatchNorm3d or alike
        As for `fuse_conv_bn`, over the I input channels of the convolution.
    conv_weight : array_like, shape (O, I/groups, ...)
        Weight of the convolution, as for ``torch.nn.Conv*d``. A dense layer's (O, I) weight, which
        has no padding (``padding=0``), is taken too.
    conv_bias : array_like of shape (O,), or None
        Bias of the convolution.
    padding : int, sequence of int, "valid" or "same"
        Padding of the convolution. It must be stated, because zero padding is what makes the fusion
        wrong: a zero that is padded in after the norm is not one that went through it.
    padding_mode : {"zeros", "reflect", "replicate", "circular"}
        What is padded with. All but "zeros" repeat values of the input, which may as well happen
        after the norm as before it.
    groups : int
        Groups of the convolution.

    Returns
    -------
    weight : ndarray, shape and dtype of conv_weight
    bias : ndarray, shape (O,), dtype of conv_bias, or of conv_weight when there was none
        Both are new arrays, computed in float64 and rounded once.

    Raises
    ------
    TypeError
        If an array does not hold floating-point numbers, or ``bn`` lacks an attribute.
    ValueError
        If the convolution pads with zeros and the norm has a shift, for then no convolution does
        the same; if shapes do not fit together, or ``bn`` has no running statistics.

    Notes
    -----
    ``W∗(scale·x + shift) + b = (W·scale)∗x + (b + Σ W·shift)``, the sum over input channels and
    kernel positions; see `fold_scale_shift` for both factors. For eval mode only.

    Examples
    --------
    >>> import numpy as np
    >>> import numbabn
    >>> bn = numbabn.BatchNorm2d(1, eps=0.0).eval()
    >>> bn.running_mean[...] = 2.0
    >>> weight, bias = fuse_bn_conv(bn, np.ones((1, 1, 3, 3), np.float32), None, padding=0)
    >>> bias.tolist()
    [-18.0]
    >>> fuse_bn_conv(bn, np.ones((1, 1, 3, 3), np.float32), None, padding=1)
    Traceback (most recent call last):
        ...
    ValueError: padding: expected none, for the norm shifts all values but the padded zeros, got 1
    """
    weight = _conv_weight(conv_weight, groups)
    scale, shift = _scale_shift(bn)
    in_channels = weight.shape[1] * groups
    if scale.size != in_channels:
        raise ValueError(
            f"bn: expected {in_channels} channels, as conv_weight takes in, got {scale.size}"
        )
    if _pads_zeros(padding, padding_mode, weight.shape[2:]) and np.any(shift != 0):
        raise ValueError(
            "padding: expected none, for the norm shifts all values but the padded zeros, "
            f"got {padding!r}"
        )
    # Output channel o belongs to group o // (O/groups), which takes in I/groups channels.
    per_output = weight.shape[0] // groups
    column = weight.shape[:2] + (1,) * (weight.ndim - 2)
    factor = np.repeat(scale.reshape(groups, -1), per_output, axis=0).reshape(column)
    added = np.repeat(shift.reshape(groups, -1), per_output, axis=0).reshape(column)
    with np.errstate(all="ignore"):
        # Where the shift is 0 nothing is added, not even 0·inf.
        terms = np.where(added != 0, weight.astype(np.float64) * added, 0.0)
        shifts = terms.sum(axis=tuple(range(1, weight.ndim)))
    return _fused(weight, factor, conv_bias, "conv_bias", np.ones(weight.shape[0]), shifts)


def _floats(name: str, value: Any) -> NDArray[Any]:
    """``value`` as an array of floating-point numbers, or an error that names it."""
    return checks.floating(name, host_array(value))


def _conv_weight(value: Any, groups: int) -> NDArray[Any]:
    """The weight of a convolution, checked by itself."""
    weight = _floats("conv_weight", value)
    if weight.ndim < 2:
        raise ValueError(f"conv_weight: expected 2 axes or more, got shape {weight.shape}")
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(
            f"groups: expected a divisor of conv_weight.shape[0] = {weight.shape[0]}, got {groups}"
        )
    return weight


def _channels(name: str, value: Any, C: int) -> FloatArray:
    """``value`` as a float64 vector of ``C`` numbers, or an error that names it."""
    array = _floats(name, value)
    if array.shape != (C,):
        raise ValueError(f"{name}: expected shape ({C},), got {array.shape}")
    return array.astype(np.float64)


def _scale_shift(bn: Any) -> tuple[FloatArray, FloatArray]:
    """Scale and shift of a layer."""
    names = ("running_mean", "running_var", "weight", "bias", "eps")
    missing = [name for name in names if not hasattr(bn, name)]
    if missing:
        kind = type(bn).__name__
        raise TypeError(f"bn: expected a batch norm layer, got {kind} without {', '.join(missing)}")
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError("bn: expected running statistics, got a layer that tracks none")
    return fold_scale_shift(bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps)


def _fused(
    weight: NDArray[Any],
    factor: FloatArray,
    old_bias: ArrayLike | None,
    bias_name: str,
    bias_factor: FloatArray,
    bias_shift: FloatArray,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """``weight·factor`` and ``old_bias·bias_factor + bias_shift``, each in its own dtype."""
    bias_dtype = weight.dtype if old_bias is None else _floats(bias_name, old_bias).dtype
    old = np.zeros(bias_shift.size)
    if old_bias is not None:
        old = _channels(bias_name, old_bias, bias_shift.size)
    with np.errstate(all="ignore"):
        new_weight = (weight.astype(np.float64) * factor).astype(weight.dtype)
        return new_weight, (old * bias_factor + bias_shift).astype(bias_dtype)


def _pads_zeros(padding: int | Sequence[int] | str, mode: str, kernel: tuple[int, ...]) -> bool:
    """Whether a convolution puts zeros beside its input."""
    if mode not in ("zeros", "reflect", "replicate", "circular"):
        raise ValueError(
            f"padding_mode: expected 'zeros', 'reflect', 'replicate' or 'circular', got {mode!r}"
        )
    if isinstance(padding, str):
        if padding not in ("valid", "same"):
            raise ValueError(f"padding: expected int, ints, 'valid' or 'same', got {padding!r}")
        pads = padding == "same" and any(size > 1 for size in kernel)
    else:
        pads = bool(np.any(np.asarray(padding) != 0))
    return pads and mode == "zeros"
