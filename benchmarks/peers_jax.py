"""JAX as a contestant: the formulas compiled by XLA for the CPU, NCHW and NHWC.

The kind "out" donates the previous call's output, which XLA then writes over: JAX's way of not
paying for fresh memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from .peers_native import optional
from .peers_problem import EPS, MOMENTUM, Contestant, Problem, Result, repeated

__all__ = ["contestants", "prepare", "version"]


def prepare(threads: int) -> None:
    """Set what XLA reads once, when it starts: the processor only, and so many threads."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["NPROC"] = os.environ["PJRT_NPROC"] = str(threads)


def version() -> str:
    return str(optional("jax").__version__)


def passes(layout: str) -> dict[str, Callable[..., Any]]:
    """The four passes over arrays of a layout, in float32 whatever the tensors' dtype."""
    jax, jnp = optional("jax"), optional("jax.numpy")

    axes, row = ((0, 2, 3), (1, -1, 1, 1)) if layout == "nchw" else ((0, 1, 2), (1, 1, 1, -1))

    def forward_train(x: Any, weight: Any, bias: Any, mean: Any, var: Any) -> Any:
        x32 = x.astype(jnp.float32)
        batch_mean = x32.mean(axes)
        # E[x²] - E[x]², as in Flax's BatchNorm: one pass over x, at the price of cancellation.
        batch_var = jnp.maximum(jnp.square(x32).mean(axes) - jnp.square(batch_mean), 0)
        scale = weight * jax.lax.rsqrt(batch_var + EPS)
        y = (x32 - batch_mean.reshape(row)) * scale.reshape(row) + bias.reshape(row)
        m = x.size / weight.size
        running_mean = (1 - MOMENTUM) * mean + MOMENTUM * batch_mean
        running_var = (1 - MOMENTUM) * var + MOMENTUM * batch_var * (m / (m - 1))
        return y.astype(x.dtype), batch_mean, batch_var, running_mean, running_var

    def forward_eval(x: Any, weight: Any, bias: Any, mean: Any, var: Any) -> Any:
        scale = weight * jax.lax.rsqrt(var + EPS)
        y = (x.astype(jnp.float32) - mean.reshape(row)) * scale.reshape(row) + bias.reshape(row)
        return (y.astype(x.dtype),)

    def backward(train: bool) -> Callable[..., Any]:
        def run(dy: Any, x: Any, weight: Any, mean: Any, var: Any) -> Any:
            dy32 = dy.astype(jnp.float32)
            invstd = jax.lax.rsqrt(var + EPS)
            x_hat = (x.astype(jnp.float32) - mean.reshape(row)) * invstd.reshape(row)
            dbias = dy32.sum(axes)
            dweight = (dy32 * x_hat).sum(axes)
            dx = dy32
            if train:
                m = x.size / weight.size
                dx = dy32 - (dbias / m).reshape(row) - x_hat * (dweight / m).reshape(row)
            return (dx * (weight * invstd).reshape(row)).astype(x.dtype), dweight, dbias

        return run

    return {
        "forward_train": forward_train,
        "forward_eval": forward_eval,
        "backward_train": backward(True),
        "backward_eval": backward(False),
    }


def contestants(problem: Problem, pass_name: str, threads: int) -> Iterator[Contestant]:
    for layout in ("nchw",) if problem.dense else ("nchw", "nhwc"):
        yield from _of_layout(problem, pass_name, layout)


def _of_layout(problem: Problem, pass_name: str, layout: str) -> Iterator[Contestant]:
    jax, jnp = optional("jax"), optional("jax.numpy")

    function = passes(layout)[pass_name]
    train = pass_name.endswith("train")
    mean, var = problem.running_mean, problem.running_var
    tensors = [problem.x(layout)]
    parameters = [problem.weight, problem.bias, mean, var]
    if pass_name.startswith("backward"):
        if train:
            mean, var = problem.batch_mean, problem.batch_var
        tensors = [problem.dy(layout), problem.x(layout)]
        parameters = [problem.weight, mean, var]
    arguments = [jnp.asarray(a) for a in (*tensors, *parameters)]
    fresh = jax.jit(function)

    def overwrite(old: Any, *args: Any) -> Any:
        return function(*args)

    # keep_unused: the donated array is used for its memory alone.
    donating = jax.jit(overwrite, donate_argnums=0, keep_unused=True)
    given: dict[str, Any] = {}

    def run_fresh() -> Any:
        return jax.block_until_ready(fresh(*arguments))

    def run_out() -> Any:
        if not given:
            given["out"] = jnp.zeros(tensors[0].shape, tensors[0].dtype)
        outputs = jax.block_until_ready(donating(given["out"], *arguments))
        given["out"] = outputs[0]
        return outputs

    for kind, call in (("out", run_out), ("fresh", run_fresh)):
        result = partial(_result, layout, pass_name, call)
        yield Contestant("jax", layout, kind, repeated(call), result)


def _result(layout: str, pass_name: str, call: Callable[[], Any]) -> Result:
    tensor, *vectors = (np.asarray(o).astype(np.float32) for o in call())
    if pass_name.startswith("backward"):
        return Result(layout, {"dx": tensor}, dict(zip(("dweight", "dbias"), vectors, strict=True)))
    return Result(layout, {"y": tensor}, dict(zip(("mean", "var"), vectors, strict=False)))
