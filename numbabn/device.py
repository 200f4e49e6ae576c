"""The front door for CUDA arrays: `functional` and `stages` come here when x is one.

The same steps as for NumPy arrays: check, take the canonical view, call the backend, hand out the
result; but by addresses alone. Nothing is read on the host, copied or waited for, so what NumPy
arrays may have and a copy would mend (gaps, another memory order) is an error here.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from numbabn import checks, cuda
from numbabn.backward import Saved
from numbabn.cuda import interop
from numbabn.cuda.arrays import NOTHING, DeviceArray
from numbabn.cuda.call import Call, check_apart, check_writable, lie_alike, on_its_device, view_of
from numbabn.cuda.interop import STORAGE, CudaArray
from numbabn.cuda.values import Assignment as Assignment
from numbabn.cuda.values import add as add
from numbabn.cuda.values import check_total as check_total
from numbabn.cuda.values import copied as copied
from numbabn.cuda.values import fill as fill
from numbabn.cuda.values import fold_scale_shift as fold_scale_shift
from numbabn.layout import View

_FLOAT32, _FLOAT64 = STORAGE["float32"], STORAGE["float64"]


@on_its_device
def _forward(
    given: Any, running_mean: Any, running_var: Any, weight: Any, bias: Any, training: bool,
    momentum: Any, eps: Any, channel_axis: Any, activation: Any, residual: Any, out: Any,
    stream: Any, *, keep: bool,
) -> tuple[Any, Saved | None]:  # fmt: skip
    call = Call("x", given, stream)
    x = call.array
    axis, view = view_of(x, channel_axis)
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
            check_writable(name, array)
            for other in own.keys() - {name}:
                check_apart(name, array, other, own[other])
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


@on_its_device
def batch_norm_backward(
    grad_output: Any, saved: Saved, needs: tuple[bool, bool, bool], out: Any, stream: Any
) -> tuple[Any, ...]:
    """`numbabn.batch_norm_backward`."""
    call = Call("grad_output", grad_output, stream)
    kept: Any = saved.x
    x = call.take("x", kept.owner)
    dy = call.array
    checks.gradient(dy.shape, dy.dtype_name, saved.shape, x.dtype_name)
    if dy.size and not lie_alike(dy, x):
        raise checks.gradient_layout(dy.strides)
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
    with interop.on_device_of(kept.owner):
        call = Call("x", kept.owner, None)
        if not kept.size:
            return call.zeros(saved.view.C, _FLOAT64)
        return cuda.mean_of(table, saved.view.C, call.queue).owner


def saved_invstd(saved: Saved) -> Any:
    """The inverse standard deviation of each channel: a part of what was saved."""
    kept: Any = saved.x
    table: Any = saved.table
    C = saved.view.C
    if not kept.size:
        with interop.on_device_of(kept.owner):
            return Call("x", kept.owner, None).zeros(C, _FLOAT64)
    return table.owner[2 * C : 3 * C]


# --- the stages -------------------------------------------------------------------------------


@on_its_device
def batch_norm_stats(given: Any, channel_axis: Any, stream: Any) -> tuple[int, Any, Any]:
    """Count, mean and m2, the latter two on the device."""
    call = Call("x", given, stream)
    x = call.array
    _, view = view_of(x, channel_axis)
    if not x.size:
        return 0, call.zeros(view.C, _FLOAT64), call.zeros(view.C, _FLOAT64)
    call.begin()
    mean, m2 = cuda.stats(x.flat, view, call.queue)
    return view.per_channel, mean.owner, m2.owner


@on_its_device
def normalize(
    given: Any, scale: Any, shift: Any, channel_axis: Any, activation: Any, residual: Any,
    out: Any, stream: Any,
) -> Any:  # fmt: skip
    """`numbabn.normalize`."""
    call = Call("x", given, stream)
    x = call.array
    _, view = view_of(x, channel_axis)
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
) -> tuple[Call, CudaArray, View]:
    """The call, the gradient, and the view of both."""
    call = Call("x", given, stream)
    _, view = view_of(call.array, channel_axis)
    return call, call.same_kind("grad_output", grad_output, call.array), view


@on_its_device
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


@on_its_device
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
