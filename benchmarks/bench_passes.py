"""asv: time of the four passes, in every layout.

Outputs are given (``out=``), so that the kernels are timed and not the operating system's handing
out of pages. Compilation stays out: `setup` runs the pass once. Every cell takes a process of its
own, so there is one shape of each kind; with NUMBABN_ALL_SHAPES=1 in the environment it is every
shape, in every dtype, and the suite takes half an hour. bench_shapes has the mean of all shapes.
"""

from __future__ import annotations

import os

from .compiled import float32_kernels, other_kernels
from .quick import leave_out
from .shapes import LAYOUTS, REPRESENTATIVE, SHAPE_BY_NAME

_ALL = bool(os.environ.get("NUMBABN_ALL_SHAPES"))


class _Pass:
    """ms for one pass over float32, by shape and layout."""

    params: tuple[list[str], ...] = (list(SHAPE_BY_NAME if _ALL else REPRESENTATIVE), list(LAYOUTS))
    param_names: tuple[str, ...] = ("shape", "layout")
    pass_name = ""
    version = "1"
    setup_cache = staticmethod(float32_kernels)
    # One process for each cell: most of its time is setup.
    rounds = 1
    warmup_time = 0.02
    sample_time = 0.01
    repeat = (5, 30, 0.4)

    def setup(self, shape: str, layout: str, dtype: str = "float32") -> None:
        if leave_out(shape, dtype):
            raise NotImplementedError("not in a quick run")  # asv: skip
        from .suite import cell

        self.once = cell(self.pass_name, shape, layout, dtype).run

    def time_pass(self, *_: str) -> None:
        self.once(1)


class _PassOfDtype(_Pass):
    """ms for one pass over another dtype, by shape and layout."""

    params = (
        list(SHAPE_BY_NAME) if _ALL else ["32x256x14x14"],
        list(LAYOUTS),
        ["float64", "float16", "bfloat16"],
    )
    param_names = ("shape", "layout", "dtype")
    setup_cache = staticmethod(other_kernels)


class ForwardTrain(_Pass):
    """Statistics of the batch, running statistics, output."""

    pass_name = "forward_train"


class ForwardEval(_Pass):
    """Output from the running statistics."""

    pass_name = "forward_eval"


class BackwardTrain(_Pass):
    """Gradients of input, weight and bias, through the statistics."""

    pass_name = "backward_train"


class BackwardEval(_Pass):
    """Gradients of input, weight and bias, statistics being constants."""

    pass_name = "backward_eval"


class ForwardTrainDtypes(_PassOfDtype):
    """`ForwardTrain` in the other dtypes."""

    pass_name = "forward_train"


class ForwardEvalDtypes(_PassOfDtype):
    """`ForwardEval` in the other dtypes."""

    pass_name = "forward_eval"


class BackwardTrainDtypes(_PassOfDtype):
    """`BackwardTrain` in the other dtypes."""

    pass_name = "backward_train"


class BackwardEvalDtypes(_PassOfDtype):
    """`BackwardEval` in the other dtypes."""

    pass_name = "backward_eval"
