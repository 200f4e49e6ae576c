"""NumPy as a contestant: batch norm as one writes it there, on one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from .peers_problem import EPS, MOMENTUM, Array, Contestant, Problem, Result, repeated

__all__ = ["contestants", "version"]


def version() -> str:
    return str(np.__version__)


def contestants(problem: Problem, pass_name: str, threads: int) -> Iterator[Contestant]:
    for layout in problem.layouts:
        call = (_forward if pass_name.startswith("forward") else _backward)(
            problem, layout, pass_name.endswith("train")
        )
        result = partial(_result, layout, call)
        yield Contestant("numpy", layout, "fresh", repeated(call), result)


def _result(layout: str, call: Callable[[], dict[str, Array]]) -> Result:
    found = call()
    tensors: dict[str, Array] = {
        name: found.pop(name).astype(np.float32) for name in ("y", "dx") if name in found
    }
    return Result(layout, tensors, found)


def _axes(problem: Problem, layout: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """All axes but the channels', and the shape in which parameters broadcast."""
    rank = len(problem.layout_shape(layout))
    channel_axis = rank - 1 if layout == "nhwc" else 1
    axes = tuple(a for a in range(rank) if a != channel_axis)
    return axes, tuple(problem.C if a == channel_axis else 1 for a in range(rank))


def _forward(problem: Problem, layout: str, train: bool) -> Callable[[], dict[str, Array]]:
    axes, sizes = _axes(problem, layout)
    given = problem.x(layout)
    weight, bias = problem.weight.reshape(sizes), problem.bias.reshape(sizes)
    running_mean = problem.running_mean.copy().reshape(sizes)
    running_var = problem.running_var.copy().reshape(sizes)
    m = given.size // problem.C

    def call() -> dict[str, Array]:
        x = given.astype(np.float32, copy=False)
        if not train:
            return {"y": (x - running_mean) * (weight / np.sqrt(running_var + EPS)) + bias}
        mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
        for running, batch in ((running_mean, mean), (running_var, var * (m / (m - 1)))):
            running += MOMENTUM * (batch - running)
        invstd = 1 / np.sqrt(var + EPS)
        y = (x - mean) * (weight * invstd) + bias
        return {"y": y, "mean": mean.reshape(-1), "invstd": invstd.reshape(-1)}

    return call


def _backward(problem: Problem, layout: str, train: bool) -> Callable[[], dict[str, Array]]:
    axes, sizes = _axes(problem, layout)
    given, grad_output = problem.x(layout), problem.dy(layout)
    weight = problem.weight.reshape(sizes)
    mean = (problem.batch_mean if train else problem.running_mean).reshape(sizes)
    var = (problem.batch_var if train else problem.running_var).reshape(sizes)
    invstd = 1 / np.sqrt(var + np.float32(EPS))
    m = given.size // problem.C

    def call() -> dict[str, Array]:
        x, dy = given.astype(np.float32, copy=False), grad_output.astype(np.float32, copy=False)
        x_hat = (x - mean) * invstd
        dbias = dy.sum(axes, keepdims=True)
        dweight = (dy * x_hat).sum(axes, keepdims=True)
        dx = dy - dbias / m - x_hat * (dweight / m) if train else dy
        dx = weight * invstd * dx
        return {"dx": dx, "dweight": dweight.reshape(-1), "dbias": dbias.reshape(-1)}

    return call
