"""What the asv modules share: the arrays of a cell, and numbabn's ways to compute it.

A benchmark that a commit cannot run, or this machine, raises NotImplementedError in its setup,
which asv records as skipped: that is how the suite of today measures the commits of long ago.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from . import peers_numbabn
from .peers_machine import available_cpus
from .peers_native import Missing
from .peers_problem import Array, Contestant, Problem
from .shapes import SHAPE_BY_NAME

__all__ = ["cell", "problem"]


class Arrays(Problem):
    """A problem whose arrays are filled in place: asv makes them anew for each cell.

    Layouts do not hold the same values, which only those who compare results would need.
    """

    def _input(self, name: str, layout: str, mean: float, std: float) -> Array:
        if (name, layout) not in self._arrays:
            array = self.empty(layout)
            rng = np.random.default_rng(len(name))
            block = rng.standard_normal(100_003, np.float32).astype(self.dtype)
            flat = array.reshape(-1)
            for start in range(0, flat.size, block.size):
                part = flat[start : start + block.size]
                part[...] = block[: part.size]
            self._arrays[name, layout] = array
        return self._arrays[name, layout]


@lru_cache(maxsize=1)
def problem(shape_name: str, dtype: str) -> Arrays:
    """The arrays of a shape; kept from one `setup` to the next, which asv calls for each sample."""
    try:
        return Arrays(SHAPE_BY_NAME[shape_name].sizes, dtype)
    except Missing as reason:
        raise NotImplementedError(str(reason)) from reason


def cell(
    pass_name: str, shape_name: str, layout: str, dtype: str = "float32", *, kind: str = "out"
) -> Contestant:
    """numbabn doing a pass, after its first call, which compiles or loads the kernels.

    Parameters
    ----------
    pass_name, shape_name, layout, dtype : str
        Which pass over which arrays.
    kind : str
        With outputs given, "out", so that kernels are timed and not the operating system's handing
        out of pages, or "fresh".
    """
    if layout not in SHAPE_BY_NAME[shape_name].layouts:
        raise NotImplementedError("a dense layer has one layout")
    given = problem(shape_name, dtype)
    memory = "nc" if given.dense else layout
    try:
        peers_numbabn.version()
        found = peers_numbabn.contestants(given, pass_name, available_cpus(), (memory,))
        contestant = next(c for c in found if c.kind == kind)
    except (AttributeError, Missing) as reason:  # of a commit before there was such a function
        raise NotImplementedError(str(reason)) from reason
    contestant.run(1)
    return contestant
