"""asv: a process's largest memory, with a 103 MB input and outputs that numbabn allocates.

`peakmem_input` is the process before any call: what a pass adds is the difference.
"""

from __future__ import annotations

import numpy as np

import numbabn

from .compiled import float32_kernels

SHAPE = (32, 64, 112, 112)


class Memory:
    """Peak memory of a training step's parts."""

    version = "1"
    setup_cache = staticmethod(float32_kernels)

    def setup(self) -> None:
        if not hasattr(numbabn, "batch_norm_forward"):
            raise NotImplementedError("no batch_norm_forward")  # asv: skip
        # Not random: that would need more memory than the passes do.
        self.x = np.ones(SHAPE, np.float32)
        self.mean, self.var = np.zeros(SHAPE[1], np.float32), np.ones(SHAPE[1], np.float32)

    def peakmem_input(self) -> None:
        pass

    def peakmem_forward_eval(self) -> None:
        numbabn.batch_norm(self.x, self.mean, self.var)

    def peakmem_forward_train(self) -> None:
        numbabn.batch_norm_forward(self.x, self.mean, self.var, training=True)

    def peakmem_step(self) -> None:
        """Forward and backward in training, with the output as the gradient."""
        y, saved = numbabn.batch_norm_forward(self.x, self.mean, self.var, training=True)
        numbabn.batch_norm_backward(y, saved)
