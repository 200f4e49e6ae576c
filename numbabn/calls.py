"""A call's arguments, checked, and in the form in which the backend takes them.

`quick_forward` recognises the ordinary call, NumPy arrays of matching types that need no
conversion, in about a microsecond, by what it remembers of the shape. Whatever it does not
recognise goes through `check_forward`, which converts, copies, or raises the error.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from numbabn import checks, layout, pool
from numbabn.backends import cpu
from numbabn.layout import View

Array = NDArray[Any]

_FLOAT32: np.dtype[Any] = np.dtype(np.float32)
_FLOAT64: np.dtype[Any] = np.dtype(np.float64)
NOTHING: dict[np.dtype[Any], Array] = {t: np.empty(0, t) for t in (_FLOAT32, _FLOAT64)}


class Channels(NamedTuple):
    """Arrays of channels in one dtype; of size 0 where not given."""

    weight: Array
    bias: Array
    running_mean: Array
    running_var: Array


def dense(x: Array, axis: int) -> tuple[Array, View]:
    """x, copied if it has gaps, and its view."""
    view = layout.describe(x.shape, x.strides, x.itemsize, axis)
    if view is None:
        x = x.copy(order="K")
        view = layout.describe(x.shape, x.strides, x.itemsize, axis)
        if view is None:  # NumPy keeps the order of broadcast axes loosely
            x = np.ascontiguousarray(x)
            view = layout.describe(x.shape, x.strides, x.itemsize, axis)
    assert view is not None
    return x, view


def laid_out(array: Array, view: View) -> Array:
    """`array`, copied into the memory order of `view` if it lies otherwise."""
    if layout.lies_like(array, view) and array.flags.aligned:
        return array
    copy = layout.empty(view, array.shape, array.dtype)
    copy[...] = array
    return copy


def check_target(out: Any, x: Array, view: View) -> None:
    """Raise unless `out` can take a result that lies in memory as `view` does."""
    fits = isinstance(out, np.ndarray) and out.shape == x.shape
    checks.target("out", out, x, fits and (x.size == 0 or layout.lies_like(out, view)))


def take_channels(x: Array, C: int, **given: Any) -> tuple[Channels, dict[str, Array]]:
    """Parameters and statistics in the dtype kernels take them in, and the user's own arrays."""
    own = {
        name: checks.per_channel(name, value, C)
        for name, value in given.items()
        if value is not None
    }
    wide = x.dtype == _FLOAT64 or any(array.dtype == _FLOAT64 for array in own.values())
    dtype = _FLOAT64 if wide else _FLOAT32
    ready = {}
    for name in Channels._fields:
        array = own.get(name)
        if array is None:
            array = NOTHING[dtype]
        elif array.dtype != dtype or not array.flags.carray:
            array = np.array(array, dtype)
        ready[name] = array
    return Channels(**ready), own


class Call(NamedTuple):
    """A checked call of the forward pass."""

    x: Array  # as given, or a dense copy
    view: View
    axis: int
    channels: Channels
    own: dict[str, Array]
    relu: bool
    residual: Array | None
    out: Array | None
    momentum: float
    eps: float


def check_forward(
    x: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any,
    bias: Any,
    training: bool,
    momentum: Any,
    eps: Any,
    channel_axis: Any,
    activation: Any,
    residual: Any,
    out: Any,
    stream: Any,
    in_place: bool,
) -> Call:
    """Raise whatever is wrong with the arguments, before anything is written."""
    given = x = checks.input_array("x", x)
    axis = checks.axis(channel_axis, x.ndim)
    checks.no_stream(stream)
    momentum, eps = checks.real("momentum", momentum), checks.not_negative("eps", eps)
    relu = checks.relu(activation)
    checks.running(running_mean, running_var, training)
    C = x.shape[axis]
    channels, own = take_channels(
        x, C, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias
    )
    if residual is not None:
        residual = checks.same_kind("residual", residual, x)
    if training:
        if running_mean is not None:
            checks.writable("running_mean", running_mean)
            checks.no_overlap("running_mean", running_mean, {"running_var": running_var})
        if running_var is not None:
            checks.writable("running_var", running_var)
        checks.several_values(x.size // C if C else 0, x.shape)
    if x.size == 0:
        view = View(False, 0, C, 0, None)
        if out is not None:
            check_target(out, x, view)
        return Call(x, view, axis, channels, own, relu, residual, out, momentum, eps)
    x, view = dense(x, axis)
    if out is not None:
        check_target(out, x, view)
        checks.no_overlap("out", out, own)
        inputs = {"residual": residual, "x": x} if in_place else {"residual": residual}
        checks.same_or_no_overlap("out", out, inputs)
        if not in_place:
            checks.no_overlap("out", out, {"x (which the backward pass needs)": x, "x": given})
    if residual is not None:
        residual = laid_out(residual, view)
    return Call(x, view, axis, channels, own, relu, residual, out, momentum, eps)


# --- the ordinary call ------------------------------------------------------------------------


class Known:
    """What is remembered of inputs of one shape, strides, dtype and channel axis."""

    __slots__ = (
        "axis", "channels_dtype", "channels_shape", "dtype", "pooled", "shape", "view", "ways"
    )  # fmt: skip

    def __init__(self, x: Array, axis: int, view: View):
        self.view = view
        self.axis = axis
        self.shape = x.shape
        self.dtype = x.dtype
        self.channels_dtype = _FLOAT64 if x.dtype == _FLOAT64 else _FLOAT32
        self.channels_shape = (view.C,)
        self.ways = cpu().ways_of(view, x.itemsize)
        self.pooled = view.order is not None or x.nbytes >= pool.SMALLEST

    def empty(self) -> Array:
        """A new array that lies in memory as the inputs do."""
        if self.pooled:
            return layout.empty(self.view, self.shape, self.dtype)
        return np.empty(self.shape, self.dtype)


_known: dict[Any, Known | None] = {}


def known(x: Any, channel_axis: Any) -> Known | None:
    """What is remembered of inputs like x; None if kernels cannot take x as it is."""
    if type(x) is not np.ndarray or type(channel_axis) is not int:
        return None
    key = (x.shape, x.strides, x.dtype, channel_axis)
    try:
        found = _known[key]
    except KeyError:
        found = None
        fits = x.ndim >= 2 and x.size and checks.is_floating(x.dtype)
        if fits and -x.ndim <= channel_axis < x.ndim:
            axis = channel_axis % x.ndim
            view = layout.describe(x.shape, x.strides, x.itemsize, axis)
            found = None if view is None else Known(x, axis, view)
        if len(_known) > 4096:
            _known.clear()
        _known[key] = found
    return found if found is not None and x.flags.behaved else None


def small_eval(
    x: Any, running_mean: Any, running_var: Any, weight: Any, bias: Any, momentum: Any, eps: Any,
    channel_axis: Any, activation: Any, out: Any,
) -> Array | None:  # fmt: skip
    """The result in eval mode, if x is small and all is as the kernel wants it; else None.

    Types are all that is looked at here: the kernel checks the rest, in a fraction of the time.
    """
    array = np.ndarray
    if not (
        type(x) is array
        and ((dtype := x.dtype) is _FLOAT32 or dtype is _FLOAT64)
        and type(running_mean) is array
        and running_mean.dtype is dtype
        and type(running_var) is array
        and running_var.dtype is dtype
        and type(weight) is array
        and weight.dtype is dtype
        and type(bias) is array
        and bias.dtype is dtype
        and type(momentum) is float
        and type(eps) is float
        and type(channel_axis) is int
        and (out is None or (type(out) is array and out.dtype is dtype))
        and x.size <= layout.SMALL_EVAL
        and x.flags.carray  # for other types the kernel would be compiled, only to refuse
    ):
        return None
    y = np.empty(x.shape, dtype) if out is None else out
    floor = -math.inf if activation is None else 0.0
    done = cpu().eval_small(
        x, y, weight, bias, running_mean, running_var, momentum, eps, floor, channel_axis
    )
    return y if done else None


def quick_forward(
    x: Any, running_mean: Any, running_var: Any, weight: Any, bias: Any, training: Any,
    momentum: Any, eps: Any, channel_axis: Any, out: Any,
) -> tuple[Known, list[Array]] | None:  # fmt: skip
    """What is known of x, and its channels, if there is nothing to convert.

    Nor anything wrong, but that arrays may share memory, which kernels look at.
    """
    found = known(x, channel_axis)
    if found is None or not (
        type(eps) is float
        and 0.0 <= eps < math.inf
        and type(momentum) is float
        and -math.inf < momentum < math.inf
    ):
        return None
    # Anew each time: a dtype, a shape and a write flag can all change in place.
    dtype, shape = found.channels_dtype, found.channels_shape
    channels = []
    for array in (weight, bias, running_mean, running_var):
        if array is None:
            channels.append(NOTHING[dtype])
        elif (
            type(array) is np.ndarray
            and array.dtype is dtype
            and array.shape == shape
            and array.flags.carray
        ):
            channels.append(array)
        else:
            return None
    if training:
        if found.view.per_channel == 1:
            return None
    elif running_mean is None or running_var is None:
        return None
    if out is not None and not matches(out, x):
        return None
    return found, channels


def matches(out: Any, x: Array) -> bool:
    """Whether `out` is writable, and laid out like x."""
    return out is x or (
        type(out) is np.ndarray
        and out.shape == x.shape
        and out.strides == x.strides
        and out.dtype is x.dtype
        and out.flags.behaved
    )
