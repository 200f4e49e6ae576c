"""asv: what a call costs beyond its work: µs on arrays so small that there is hardly any."""

from __future__ import annotations

import numpy as np

import numbabn

from .compiled import float32_kernels

SHAPE = (2, 8, 2, 2)


class Overhead:
    """Functions and a layer, on 64 values."""

    version = "1"
    setup_cache = staticmethod(float32_kernels)
    # asv runs `setup` before each call, and times calls one by one.
    warmup_time = 0.02
    repeat = (100, 1000, 0.5)

    def setup(self) -> None:
        if not hasattr(numbabn, "batch_norm_forward"):
            raise NotImplementedError("no batch_norm_forward")  # asv: skip
        C = SHAPE[1]
        self.x = np.random.default_rng(0).standard_normal(SHAPE, np.float32)
        self.out = np.empty_like(self.x)
        self.mean, self.var = np.zeros(C, np.float32), np.ones(C, np.float32)
        self.parameters = self.mean, self.var, np.ones(C, np.float32), np.zeros(C, np.float32)
        self.layer = numbabn.BatchNorm2d(C)
        self.layer.eval()
        _, self.saved = numbabn.batch_norm_forward(self.x, *self.parameters, True)
        self.time_eval()
        self.time_eval_out()
        self.time_forward_train()
        self.time_backward_train()
        self.time_layer_eval()

    def time_eval(self) -> None:
        numbabn.batch_norm(self.x, *self.parameters)

    def time_eval_out(self) -> None:
        numbabn.batch_norm(self.x, *self.parameters, out=self.out)

    def time_forward_train(self) -> None:
        numbabn.batch_norm_forward(self.x, *self.parameters, True)

    def time_backward_train(self) -> None:
        numbabn.batch_norm_backward(self.x, self.saved)

    def time_layer_eval(self) -> None:
        self.layer(self.x)
