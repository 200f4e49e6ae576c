"""The kernels, each over a range of its items, in one thread; `parallel` shares the range out.

Arguments in order: the arrays of elements (flat; float16 and bfloat16 as int16 and uint16), the
view's shape, how it is cut up (see `schedule`), the arrays of channels (see `channels`), then
``relu`` or ``floor``, ``streaming``, and the range ``start, stop``. None stands for an array of
elements that there is no need of.

Those of the backward pass are in `serial_backward`, the others in `serial_forward`.
Planes are N, C, L; columns are M rows of C channels times L columns each.
"""

from numbabn.cpu.serial_backward import (
    backward_columns,
    backward_elements_columns,
    backward_elements_planes,
    backward_planes,
    backward_sums_columns,
    backward_sums_planes,
    finish_slopes,
    finish_sums,
    merge_repeated_sums,
)
from numbabn.cpu.serial_forward import (
    finish_eval,
    finish_known,
    finish_stats,
    forward_columns,
    forward_planes,
    merge_repeated_stats,
    merge_stats,
    normalize_columns,
    normalize_planes,
    stats_columns,
    stats_planes,
)

__all__ = [
    "backward_columns",
    "backward_elements_columns",
    "backward_elements_planes",
    "backward_planes",
    "backward_sums_columns",
    "backward_sums_planes",
    "finish_eval",
    "finish_known",
    "finish_slopes",
    "finish_stats",
    "finish_sums",
    "forward_columns",
    "forward_planes",
    "merge_repeated_stats",
    "merge_repeated_sums",
    "merge_stats",
    "normalize_columns",
    "normalize_planes",
    "stats_columns",
    "stats_planes",
]
