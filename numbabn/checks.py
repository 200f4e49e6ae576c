"""Every error about bad input, in one place.

Each message names the argument, what came, and what was expected, and each check comes before
anything is written.
"""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_CUDA = (2, 13)  # DLPack's kDLCUDA and kDLCUDAManaged

FLOATS = "float32, float64, float16 or bfloat16"


def is_cuda(value: Any) -> bool:
    """Whether `value` lives on a CUDA device."""
    if isinstance(value, np.ndarray):
        return False
    try:
        if hasattr(value, "__cuda_array_interface__"):
            return True
        return hasattr(value, "__dlpack_device__") and value.__dlpack_device__()[0] in _CUDA
    except RuntimeError:  # PyTorch has one, but does not lend tensors that want gradients
        return bool(getattr(value, "is_cuda", True))


def is_floating(dtype: np.dtype[Any]) -> bool:
    """Whether kernels exist for `dtype`."""
    kind = dtype.kind == "f" and dtype.itemsize in (2, 4, 8) and dtype.isnative
    return kind or dtype.name == "bfloat16"


def floating(name: str, given: Any) -> Array:
    """`given` as a NumPy array of floats, without a copy if it is one."""
    value: Array
    if isinstance(given, np.ndarray):
        value = given
    else:
        if is_cuda(given):
            raise TypeError(
                f"{name}: got a CUDA array, expected a NumPy array like the other arguments"
            )
        if not hasattr(given, "__array__"):
            raise TypeError(f"{name}: expected an array, got {type(given).__name__}")
        value = np.asarray(given)
    if not is_floating(value.dtype):
        raise TypeError(f"{name}: expected dtype {FLOATS}, got {value.dtype}")
    return value if value.flags.aligned else value.copy(order="K")


def input_array(name: str, given: Any) -> Array:
    """`given` as an array with channels: floats, rank 2 or more."""
    value = floating(name, given)
    if value.ndim < 2:
        raise ValueError(
            f"{name}: expected at least 2 dimensions (samples and channels), "
            f"got shape {value.shape}"
        )
    return value


def axis(channel_axis: Any, ndim: int) -> int:
    """`channel_axis` counted from the front."""
    if not isinstance(channel_axis, numbers.Integral) or isinstance(channel_axis, bool):
        raise TypeError(f"channel_axis: expected an int, got {channel_axis!r}")
    if not -ndim <= int(channel_axis) < ndim:
        raise ValueError(
            f"channel_axis: expected {-ndim} to {ndim - 1} for {ndim} dimensions, "
            f"got {channel_axis}"
        )
    return int(channel_axis) % ndim


def per_channel(name: str, given: Any, C: int) -> Array:
    """`given` as an array of one float per channel."""
    value = floating(name, given)
    if value.shape != (C,):
        raise ValueError(f"{name}: expected shape ({C},), one per channel, got {value.shape}")
    return value


def same_kind(name: str, given: Any, x: Array) -> Array:
    """`given` as an array of the shape and dtype of x."""
    value = floating(name, given)
    if value.shape != x.shape:
        raise ValueError(f"{name}: expected the shape of x, {x.shape}, got {value.shape}")
    if value.dtype != x.dtype:
        raise TypeError(f"{name}: expected the dtype of x, {x.dtype}, got {value.dtype}")
    return value


def gradient(
    shape: tuple[int, ...], dtype: Any, wanted: tuple[int, ...], wanted_dtype: Any
) -> None:
    """`grad_output` has the shape and dtype of the forward pass that was saved."""
    if shape != wanted:
        raise ValueError(
            f"grad_output: expected the shape of the saved forward pass, {wanted}, got {shape}"
        )
    if dtype != wanted_dtype:
        raise TypeError(
            f"grad_output: expected the dtype of the saved forward pass, {wanted_dtype}, "
            f"got {dtype}"
        )


def gradient_layout(strides: tuple[int, ...]) -> ValueError:
    """The error for a `grad_output` without gaps in another memory order than x."""
    return ValueError(
        "grad_output: expected the memory layout of the saved forward pass's x, got "
        f"strides {strides}; copy it into that layout first"
    )


def writable(name: str, value: Any) -> None:
    """Running statistics and `out` are written in place."""
    if not isinstance(value, np.ndarray):
        raise TypeError(
            f"{name}: expected a NumPy array, which is written in place, got {type(value).__name__}"
        )
    if not value.flags.writeable:
        raise ValueError(f"{name}: expected a writable array, got a read-only one")


def integer(name: str, value: Any) -> int:
    """`value` as an int."""
    try:
        return operator.index(value)
    except TypeError:
        kind = type(value).__name__
        raise TypeError(f"{name}: expected an integer, got {kind} {value!r}") from None


def real(name: str, value: Any) -> float:
    """`value` as a finite float."""
    if not isinstance(value, numbers.Real | np.floating):
        hint = "; layers do the cumulative average" if name == "momentum" else ""
        raise TypeError(f"{name}: expected a finite number, got {value!r}{hint}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    return float(value)


def not_negative(name: str, value: Any) -> float:
    """`value` as a finite float of at least 0."""
    number = real(name, value)
    if number < 0:
        raise ValueError(f"{name}: expected a number of at least 0, got {value!r}")
    return number


def relu(activation: Any) -> bool:
    """Whether `activation` asks for a ReLU."""
    if activation is None:
        return False
    if isinstance(activation, str) and activation == "relu":
        return True
    raise ValueError(f"activation: expected None or 'relu', got {activation!r}")


def several_values(count: int, shape: tuple[int, ...]) -> None:
    """Variance needs more than one value."""
    if count == 1:
        raise ValueError(
            f"x: Expected more than 1 value per channel when training, got shape {shape}"
        )


def running(running_mean: Any, running_var: Any, training: bool) -> None:
    """Eval mode cannot do without running statistics."""
    if not training and (running_mean is None or running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        raise ValueError(
            f"{missing}: expected an array, got None; training=False normalizes with "
            "running statistics"
        )


def target(name: str, out: Any, x: Array, laid_out: bool) -> None:
    """`out` must take a result in place: shape, dtype and memory order of x."""
    if is_cuda(out):
        raise TypeError(
            f"{name}: got a CUDA array, expected a NumPy array like the other arguments"
        )
    writable(name, out)
    if out.shape != x.shape:
        raise ValueError(f"{name}: expected the shape of x, {x.shape}, got {out.shape}")
    if out.dtype != x.dtype:
        raise TypeError(f"{name}: expected the dtype of x, {x.dtype}, got {out.dtype}")
    if not (laid_out and out.flags.aligned):
        raise ValueError(
            f"{name}: expected the memory order of x and no gaps, got strides {out.strides}"
        )


def no_overlap(name: str, out: Array, others: dict[str, Any]) -> None:
    """`out` must not share memory with any of these."""
    for other, array in others.items():
        if isinstance(array, np.ndarray) and np.may_share_memory(out, array):
            raise ValueError(f"{name}: got an array that overlaps {other}, expected its own memory")


def same_or_no_overlap(name: str, out: Array, others: dict[str, Any]) -> None:
    """`out` may be one of these arrays, element for element, or share no memory with it."""
    for other, array in others.items():
        if isinstance(array, np.ndarray) and np.may_share_memory(out, array):
            here, there = out.__array_interface__["data"][0], array.__array_interface__["data"][0]
            if here != there or out.strides != array.strides:
                raise ValueError(
                    f"{name}: got an array that overlaps part of {other}, "
                    "expected the same elements or none"
                )


def needs(value: Any) -> tuple[bool, bool, bool]:
    """Which of the three gradients are wanted."""
    if value == (True, True, True):
        return True, True, True
    try:
        wanted = tuple(bool(item) for item in value)
    except TypeError:
        raise TypeError(f"needs: expected three bools, got {value!r}") from None
    if len(wanted) != 3:
        raise ValueError(f"needs: expected three bools, got {value!r}")
    return wanted


def no_stream(stream: Any) -> None:
    """Streams belong to CUDA."""
    if stream is not None:
        raise ValueError(f"stream: expected None for NumPy arrays, got {stream!r}")
