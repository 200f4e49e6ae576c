"""asv: time of the four passes, for every shape in every layout that differs for it.

float32, with outputs given (``out=``), so that the kernels are timed and not the operating
system's handing out of pages. Compilation stays out: `setup` runs each pass once.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

import numbabn
from benchmarks.shapes import LAYOUTS, SHAPE_BY_NAME

Array = NDArray[Any]


@lru_cache(maxsize=1)
def _problem(shape_name: str, layout: str) -> tuple[Array, Array, Array, int]:
    """Input, gradient and output arrays with the channel axis.

    Kept from one `setup` to the next: asv calls it before every sample.
    """
    sizes, channel_axis = SHAPE_BY_NAME[shape_name].in_layout(layout)
    rng = np.random.default_rng(0)
    x = rng.standard_normal(sizes, np.float32)
    grad_output = rng.standard_normal(sizes, np.float32)
    return x, grad_output, np.empty_like(x), channel_axis


class Passes:
    """ms for one pass, by shape and layout."""

    params = (list(SHAPE_BY_NAME), list(LAYOUTS))
    param_names = ("shape", "layout")

    def setup(self, shape_name: str, layout: str) -> None:
        """Make the arrays, and run each pass once so that its kernels are compiled."""
        if layout not in SHAPE_BY_NAME[shape_name].layouts:
            raise NotImplementedError("a dense layer has one layout")  # asv: skip
        self.x, self.grad_output, self.out, self.channel_axis = _problem(shape_name, layout)
        channels = self.x.shape[self.channel_axis]
        self.running_mean = np.zeros(channels, np.float32)
        self.running_var = np.ones(channels, np.float32)
        self.weight = np.ones(channels, np.float32)
        self.bias = np.zeros(channels, np.float32)
        self.saved = {training: self._forward(training)[1] for training in (True, False)}
        for training in (True, False):
            self._backward(training)

    def _forward(self, training: bool) -> tuple[Array, numbabn.functional.Saved]:
        return numbabn.batch_norm_forward(
            self.x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training,
            channel_axis=self.channel_axis,
            out=self.out,
        )

    def _backward(self, training: bool) -> None:
        numbabn.batch_norm_backward(self.grad_output, self.saved[training], out=self.out)

    def time_forward_train(self, shape_name: str, layout: str) -> None:
        """Statistics of the batch, running statistics, output."""
        self._forward(training=True)

    def time_forward_eval(self, shape_name: str, layout: str) -> None:
        """Output from the running statistics."""
        self._forward(training=False)

    def time_backward_train(self, shape_name: str, layout: str) -> None:
        """Gradients of input, weight and bias, through the statistics."""
        self._backward(training=True)

    def time_backward_eval(self, shape_name: str, layout: str) -> None:
        """Gradients of input, weight and bias, statistics being constants."""
        self._backward(training=False)
