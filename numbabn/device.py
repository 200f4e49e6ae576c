"""The front door for CUDA arrays: `functional` and `stages` come here when x is one.

The same steps as for NumPy arrays: check, take the canonical view, call the backend, hand out the
result; but by addresses alone. Nothing is read on the host, copied or waited for, so what NumPy
arrays may have and a copy would mend (gaps, another memory order) is an error here.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from numbabn import checks, cuda, layout
from numbabn.backward import Saved
from numbabn.cuda import interop, launch
from numbabn.cuda.arrays import NOTHING, DeviceArray, Queue
from numbabn.cuda.interop import STORAGE, CudaArray
from numbabn.layout import View

_FLOAT32, _FLOAT64 = STORAGE["float32"], STORAGE["float64"]


class _Call:
    """The arrays of one call, on one stream; `like` decides which library makes new ones.

    Without a `stream` that of `like` is taken. Work that other arrays wait for on streams of their
    own is waited for on the device when the call `begin`s.
    """

    def __init__(self, name: str, like: Any, stream: Any):
        given = None if stream is None else interop.stream_handle(stream)
        self.array = interop.take(name, like, given or 0)
        self.library = interop.library_of(like)
        self.stream = (self.array.stream or 0) if given is None else given
        self.taken = {name: self.array}
        self.queue = Queue(self.stream, self._scratch)

    def take(self, name: str, value: Any) -> CudaArray:
        """One more array."""
        array = interop.take(name, value, self.stream)
        if type(value) is type(self.array.owner):
            here, there = (getattr(a.owner, "device", None) for a in (self.array, array))
            if here != there:
                raise ValueError(f"{name}: expected an array on {here}, got one on {there}")
        self.taken[name] = array
        return array

    def begin(self) -> None:
        """Everything is right, and work begins: first wait for the other streams, on the device."""
        streams = {a.stream or 1 for a in self.taken.values() if a.stream is not None}
        for other in sorted(streams - {self.stream or 1}):
            launch.follow(self.stream, other)

    def _scratch(self, count: int, dtype: np.dtype[Any]) -> DeviceArray:
        name = interop.FLOAT_NAMES.get(dtype, dtype.name)
        array = self.library.empty(self.array.owner, (count,), None, name, self.stream)
        return self.lend(array, dtype)

    def lend(self, array: Any, dtype: np.dtype[Any]) -> DeviceArray:
        """A new array of the library, for the backend."""
        address, size = interop.memory_of(array, self.stream)
        return DeviceArray(address, size, dtype, array)

    def like(self, view: View, x: CudaArray) -> tuple[Any, DeviceArray]:
        """A new array of the shape, dtype and memory order of x."""
        array = self.library.empty(
            self.array.owner, x.shape, view.order, x.dtype_name, self.stream
        )  # fmt: skip
        return array, self.lend(array, x.storage)

    def zeros(self, count: int, dtype: np.dtype[Any]) -> Any:
        with self.library.on(self.array.owner, self.stream):
            return self.library.new(
                self.array.owner, (count,), interop.FLOAT_NAMES[dtype], zeros=True
            )

    def channels(self, name: str, value: Any, C: int, double: bool = False) -> CudaArray:
        """An array of one float per channel, float64 if it must be `double`."""
        if isinstance(value, np.ndarray):
            raise TypeError(
                f"{name}: expected a CUDA array like x, got a NumPy array; a layer takes CUDA "
                "arrays once its weight, bias and running statistics are ones"
            )
        array = self.take(name, value)
        if array.shape != (C,):
            raise ValueError(f"{name}: expected shape ({C},), one per channel, got {array.shape}")
        if C > 1 and array.strides != (array.storage.itemsize,):
            raise ValueError(f"{name}: expected no gaps, got strides {array.strides}")
        if double and array.storage != _FLOAT64:
            raise TypeError(f"{name}: expected dtype float64, got {array.dtype_name}")
        return array

    def same_kind(self, name: str, value: Any, x: CudaArray) -> CudaArray:
        """An array of the shape, dtype and memory order of x, without gaps."""
        array = self.take(name, value)
        if array.shape != x.shape:
            raise ValueError(f"{name}: expected the shape of x, {x.shape}, got {array.shape}")
        if array.storage != x.storage:
            raise TypeError(
                f"{name}: expected the dtype of x, {x.dtype_name}, got {array.dtype_name}"
            )
        if x.size and not _lie_alike(array, x):
            raise ValueError(
                f"{name}: expected the memory order of x and no gaps, strides {x.strides}, "
                f"got {array.strides}; copy it into that order first"
            )
        return array

    def target(
        self, out: Any, x: CudaArray, same: dict[str, CudaArray], apart: dict[str, CudaArray]
    ) -> CudaArray:
        """`out`, which may be one of `same`, and shares no memory with the others."""
        array = self.same_kind("out", out, x)
        _check_writable("out", array)
        for name, other in apart.items():
            _check_apart("out", array, name, other)
        for name, other in same.items():
            if array.address != other.address:
                _check_apart("out", array, f"part of {name}", other)
        return array


def _lie_alike(a: CudaArray, b: CudaArray) -> bool:
    return all(
        p == q for n, p, q in zip(a.shape, a.strides, b.strides, strict=True) if n != 1
    )  # fmt: skip


def _check_writable(name: str, array: CudaArray) -> None:
    if array.read_only:
        raise ValueError(f"{name}: expected a writable array, got a read-only one")


def _check_apart(name: str, array: CudaArray, other_name: str, other: CudaArray) -> None:
    end, other_end = array.address + array.nbytes, other.address + other.nbytes
    if array.address < other_end and other.address < end:
        raise ValueError(
            f"{name}: got an array that overlaps {other_name}, expected its own memory"
        )


def _view(x: CudaArray, channel_axis: Any) -> tuple[int, View]:
    """The channels' axis, and the view of x."""
    if len(x.shape) < 2:
        raise ValueError(
            f"x: expected at least 2 dimensions (samples and channels), got shape {x.shape}"
        )
    axis = checks.axis(channel_axis, len(x.shape))
    if x.size == 0:
        return axis, View(False, 0, x.shape[axis], 0, None)
    view = layout.describe(x.shape, x.strides, x.storage.itemsize, axis)
    if view is None:
        raise ValueError(
            f"x: expected an array without gaps, in any order of axes, got strides {x.strides} for "
            f"shape {x.shape}; CUDA arrays are not copied, so make it contiguous first"
        )
    return axis, view


def _forward(
    given: Any, running_mean: Any, running_var: Any, weight: Any, bias: Any, training: bool,
    momentum: Any, eps: Any, channel_axis: Any, activation: Any, residual: Any, out: Any,
    stream: Any, *, keep: bool,
) -> tuple[Any, Saved | None]:  # fmt: skip
    call = _Call("x", given, stream)
    x = call.array
    axis, view = _view(x, channel_axis)
    momentum, eps = checks.real("momentum", momentum), checks.not_negative("eps", eps)
    relu = checks.relu(activation)
    checks.running(running_mean, running_var, training)
    names = ("running_mean", "running_var", "weight", "bias")
    own = {
        name: call.channels(name, value, view.C)
        for name, value in zip(names, (running_mean, running_var, weight, bias), strict=True)
        if value is not None
    }
    added = None if residual is None else call.same_kind("residual", residual, x)
    if training:
        written = {name: own[name] for name in names[:2] if name in own}
        for name, array in written.items():
            _check_writable(name, array)
            for other in own.keys() - {name}:
                _check_apart(name, array, other, own[other])
        checks.several_values(view.per_channel, x.shape)
    if out is not None:
        same = {} if added is None else {"residual": added}
        if keep:
            apart = {**own, "x (which the backward pass needs)": x}
        else:
            same, apart = {**same, "x": x}, own
        target = call.target(out, x, same, apart)
    call.begin()
    y = out
    if out is None:
        y, new = call.like(view, x)
    param = _FLOAT64 if x.storage == _FLOAT64 else _FLOAT32
    if "weight" in own:
        param = own["weight"].storage
    bits: Any = None
    table: Any = NOTHING
    if x.size:
        goal = new if out is None else target.flat
        if keep and relu and added is not None:
            bits = call.queue.empty(cuda.bits_size(view, x.storage.itemsize), np.uint8)
        arrays = (x.flat, None if added is None else added.flat, bits, goal, view)
        flat = {name: own[name].flat if name in own else NOTHING for name in names}
        channels = flat["weight"], flat["bias"], flat["running_mean"], flat["running_var"]
        if training:
            table = cuda.forward_train(*arrays, *channels, momentum, eps, relu, call.queue)
        else:
            table = cuda.forward_eval(*arrays, *channels, eps, relu, call.queue)
    if not keep:
        return y, None
    kept: Any = DeviceArray(x.address, x.size, x.storage, given)
    # By its name, which no NumPy dtype is: so no NumPy gradient is taken for one that fits.
    kind: Any = x.dtype_name
    return y, Saved(
        bool(training), x.shape, axis, kind, param, view, kept, table, bits, relu,
        added is not None,
    )  # fmt: skip


def batch_norm(*arguments: Any) -> Any:
    """`numbabn.batch_norm`, all arguments by position."""
    return _forward(*arguments, keep=False)[0]


def batch_norm_forward(*arguments: Any) -> tuple[Any, Saved]:
    """`numbabn.batch_norm_forward`, all arguments by position."""
    y, saved = _forward(*arguments, keep=True)
    assert saved is not None
    return y, saved


def batch_norm_backward(
    grad_output: Any, saved: Saved, needs: tuple[bool, bool, bool], out: Any, stream: Any
) -> tuple[Any, ...]:
    """`numbabn.batch_norm_backward`."""
    call = _Call("grad_output", grad_output, stream)
    kept: Any = saved.x
    x = call.take("x", kept.owner)
    dy = call.array
    if dy.shape != saved.shape:
        raise ValueError(
            f"grad_output: expected the shape of the saved forward pass, {saved.shape}, "
            f"got {dy.shape}"
        )
    if dy.storage != x.storage:
        raise TypeError(
            f"grad_output: expected the dtype of the saved forward pass, {x.dtype_name}, "
            f"got {dy.dtype_name}"
        )
    if dy.size and not _lie_alike(dy, x):
        raise ValueError(
            f"grad_output: expected the memory layout of the saved forward pass's x, strides "
            f"{x.strides}, got {dy.strides}; copy it into that layout first"
        )
    view, relu, want_residual = saved.view, saved.relu, saved.has_residual
    table: Any = saved.table
    bits: Any = saved.bits
    want_input, want_weight, want_bias = needs
    goal = grad_input = grad_residual = dres = sums = None
    if out is not None:
        goal = call.target(out, dy, {"grad_output": dy}, {"x": x}).flat
    call.begin()
    if want_input:
        grad_input = out
        if goal is None:
            grad_input, goal = call.like(view, x)
    dx = goal if want_input else None
    if want_residual:
        grad_residual = grad_output
        if relu:
            grad_residual, dres = call.like(view, x)
    rest: tuple[Any, ...] = (dres, view, table, relu, saved.param_dtype, call.queue)
    if not x.size:
        zeros = [call.zeros(view.C, saved.param_dtype) if need else None for need in needs[1:]]
        grads = (grad_input, *zeros)
        return (*grads, grad_residual) if want_residual else grads
    if dx is not None and saved.training:
        sums = cuda.backward_train(dy.flat, x.flat, bits, dx, *rest)
    elif dx is not None and not (want_weight or want_bias or relu):
        # dx = dy * scale: x is not even read
        scale = DeviceArray(table.address + 3 * view.C * 8, view.C, _FLOAT64, table)
        plain = cuda.known_table(dy.flat, NOTHING, scale, NOTHING, NOTHING, view.C, call.queue)
        cuda.normalize(dy.flat, None, None, dx, view, plain, False, call.queue)
    elif dx is not None or dres is not None or want_weight or want_bias:
        sums = cuda.backward_eval(dy.flat, x.flat, bits, dx, *rest)
    grad_weight = grad_bias = None
    if sums is not None:
        halves: Any = sums.owner
        grad_bias = halves[: view.C] if want_bias else None
        grad_weight = halves[view.C :] if want_weight else None
    grads = (grad_input, grad_weight, grad_bias)
    return (*grads, grad_residual) if want_residual else grads


def saved_mean(saved: Saved) -> Any:
    """The mean of each channel, float64, on the device."""
    kept: Any = saved.x
    table: Any = saved.table
    call = _Call("x", kept.owner, None)
    if not kept.size:
        return call.zeros(saved.view.C, _FLOAT64)
    return cuda.mean_of(table, saved.view.C, call.queue).owner


def saved_invstd(saved: Saved) -> Any:
    """The inverse standard deviation of each channel: a part of what was saved."""
    kept: Any = saved.x
    table: Any = saved.table
    C = saved.view.C
    if not kept.size:
        return _Call("x", kept.owner, None).zeros(C, _FLOAT64)
    return table.owner[2 * C : 3 * C]


# --- the stages -------------------------------------------------------------------------------


def batch_norm_stats(given: Any, channel_axis: Any, stream: Any) -> tuple[int, Any, Any]:
    """Count, mean and m2, the latter two on the device."""
    call = _Call("x", given, stream)
    x = call.array
    _, view = _view(x, channel_axis)
    if not x.size:
        return 0, call.zeros(view.C, _FLOAT64), call.zeros(view.C, _FLOAT64)
    call.begin()
    mean, m2 = cuda.stats(x.flat, view, call.queue)
    return view.per_channel, mean.owner, m2.owner


def normalize(
    given: Any, scale: Any, shift: Any, channel_axis: Any, activation: Any, residual: Any,
    out: Any, stream: Any,
) -> Any:  # fmt: skip
    """`numbabn.normalize`."""
    call = _Call("x", given, stream)
    x = call.array
    _, view = _view(x, channel_axis)
    relu = checks.relu(activation)
    own = {
        "scale": call.channels("scale", scale, view.C),
        "shift": call.channels("shift", shift, view.C),
    }
    added = None if residual is None else call.same_kind("residual", residual, x)
    goal = None
    if out is not None:
        same = {"x": x} if added is None else {"x": x, "residual": added}
        goal = call.target(out, x, same, own).flat
    call.begin()
    y = out
    if goal is None:
        y, goal = call.like(view, x)
    if x.size:
        parameters = (own["scale"].flat, own["shift"].flat)
        table = cuda.known_table(x.flat, NOTHING, NOTHING, *parameters, view.C, call.queue)
        extra = None if added is None else added.flat
        cuda.normalize(x.flat, extra, None, goal, view, table, relu, call.queue)
    return y


def _pair(
    grad_output: Any, given: Any, channel_axis: Any, stream: Any
) -> tuple[_Call, CudaArray, View]:
    """The call, the gradient, and the view of both."""
    call = _Call("x", given, stream)
    _, view = _view(call.array, channel_axis)
    return call, call.same_kind("grad_output", grad_output, call.array), view


def batch_norm_backward_reduce(
    grad_output: Any, given: Any, mean: Any, invstd: Any, channel_axis: Any, stream: Any
) -> tuple[Any, Any]:
    """`numbabn.batch_norm_backward_reduce`."""
    call, dy, view = _pair(grad_output, given, channel_axis, stream)
    x, C = call.array, view.C
    middle = call.channels("mean", mean, C, double=True)
    call.channels("invstd", invstd, C, double=True)
    if not x.size:
        return call.zeros(C, _FLOAT64), call.zeros(C, _FLOAT64)
    call.begin()
    table = cuda.known_table(x.flat, middle.flat, NOTHING, NOTHING, NOTHING, C, call.queue)
    arrays = (dy.flat, x.flat, None, None, None, view)
    sums: Any = cuda.backward_eval(*arrays, table, False, _FLOAT64, call.queue).owner
    return sums[:C], sums[C:]


def batch_norm_backward_elemt(
    grad_output: Any, given: Any, mean: Any, invstd: Any, weight: Any, sum_dy: Any,
    sum_dy_xmu: Any, count: Any, channel_axis: Any, out: Any, stream: Any,
) -> Any:  # fmt: skip
    """`numbabn.batch_norm_backward_elemt`."""
    call, dy, view = _pair(grad_output, given, channel_axis, stream)
    x, C = call.array, view.C
    doubles = {"mean": mean, "invstd": invstd, "sum_dy": sum_dy, "sum_dy_xmu": sum_dy_xmu}
    own = {name: call.channels(name, value, C, double=True) for name, value in doubles.items()}
    if weight is not None:
        own["weight"] = call.channels("weight", weight, C)
    gamma = own["weight"].flat if weight is not None else NOTHING
    count = checks.real("count", count)
    if x.size and count <= 0:
        raise ValueError(f"count: expected the number of values per channel, got {count!r}")
    goal = None
    if out is not None:
        goal = call.target(out, x, {"grad_output": dy, "x": x}, own).flat
    call.begin()
    grad_input = out
    if goal is None:
        grad_input, goal = call.like(view, x)
    if x.size:
        middle, invstd, total, product = (own[name].flat for name in doubles)
        table = cuda.known_table(x.flat, middle, invstd, gamma, NOTHING, C, call.queue)
        slopes = cuda.slopes_from_sums(x.flat, count, total, product, table, call.queue)
        arrays = (dy.flat, x.flat, None, goal, None, view)
        cuda.backward_elements(*arrays, table, slopes, False, call.queue)
    return grad_input
