"""numbabn as a contestant: NCHW and channels-last arrays, outputs given and fresh."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from .peers_native import Missing, optional
from .peers_problem import EPS, MOMENTUM, Array, Contestant, Problem, Result, repeated

__all__ = ["contestants", "set_threads", "version"]


def version() -> str:
    numbabn = optional("numbabn")
    if not hasattr(numbabn, "batch_norm_forward"):  # a bare folder of that name imports too
        raise Missing("numbabn is found but has no batch_norm_forward")
    return str(getattr(numbabn, "__version__", "of this folder"))


def set_threads(threads: int) -> None:
    optional("numbabn").set_num_threads(threads)


def contestants(
    problem: Problem, pass_name: str, threads: int, layouts: tuple[str, ...] | None = None
) -> Iterator[Contestant]:
    set_threads(threads)
    for layout in layouts or problem.layouts:
        yield from _of_layout(problem, pass_name, layout)


def _of_layout(problem: Problem, pass_name: str, layout: str) -> Iterator[Contestant]:
    numbabn = optional("numbabn")
    train = pass_name.endswith("train")
    x, out = problem.x(layout), problem.out(layout)
    # Training updates the running statistics in place, so it gets its own.
    parameters = (
        problem.running_mean.copy(),
        problem.running_var.copy(),
        problem.weight,
        problem.bias,
        train,
        MOMENTUM,
        EPS,
    )
    channel_axis = 3 if layout == "nhwc" else 1

    if pass_name.startswith("forward"):

        def forward(out: Array | None) -> Any:
            # In training what the backward pass needs is returned too, as PyTorch's operator does.
            if train:
                return numbabn.batch_norm_forward(
                    x, *parameters, channel_axis=channel_axis, out=out
                )
            return numbabn.batch_norm(x, *parameters, channel_axis=channel_axis, out=out)

        def forward_result(outputs: Any) -> Result:
            if not train:
                return Result(layout, {"y": outputs})
            y, saved = outputs
            return Result(layout, {"y": y}, {"mean": saved.mean, "invstd": saved.invstd})

        yield from _both(layout, forward, out, forward_result)
        return

    dy = problem.dy(layout)
    saved = numbabn.batch_norm_forward(x, *parameters, channel_axis=channel_axis, out=out)[1]

    def backward(out: Array | None) -> Any:
        return numbabn.batch_norm_backward(dy, saved, out=out)

    def backward_result(outputs: Any) -> Result:
        dx, dweight, dbias = outputs
        return Result(layout, {"dx": dx}, {"dweight": dweight, "dbias": dbias})

    yield from _both(layout, backward, out, backward_result)


def _both(
    layout: str,
    call: Callable[[Array | None], Any],
    out: Array,
    result: Callable[[Any], Result],
) -> Iterator[Contestant]:
    """The same call with its output given, then fresh."""
    for kind, target in (("out", out), ("fresh", None)):
        once = partial(call, target)
        yield Contestant(
            *("numbabn", layout, kind, repeated(once)),
            lambda once=once: _as_float32(result(once())),  # type: ignore[misc]
        )


def _as_float32(found: Result) -> Result:
    tensors = {name: array.astype(np.float32, copy=False) for name, array in found.tensors.items()}
    return Result(found.layout, tensors, found.vectors)
