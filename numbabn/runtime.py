"""Threads, and compiling ahead of time."""

from __future__ import annotations

import numbers
from collections.abc import Iterable

import numba
import numpy as np

__all__ = ["get_num_threads", "set_num_threads", "warmup"]


def set_num_threads(n: int) -> None:
    """Set how many threads kernels may use; results do not depend on it.

    Parameters
    ----------
    n : int
        1 to ``NUMBA_NUM_THREADS``, which is the number of cores unless the environment says else.

    Raises
    ------
    TypeError, ValueError
        If `n` is not an integer of that range.

    Notes
    -----
    This is Numba's own setting, for the calling thread, so it covers other Numba code as well.

    Examples
    --------
    >>> before = get_num_threads()
    >>> set_num_threads(1)
    >>> get_num_threads()
    1
    >>> set_num_threads(before)
    """
    if not isinstance(n, numbers.Integral) or isinstance(n, bool):
        raise TypeError(f"n: expected an int, got {n!r}")
    most = int(numba.config.NUMBA_NUM_THREADS)
    if not 1 <= n <= most:
        raise ValueError(f"n: expected 1 to {most} threads (NUMBA_NUM_THREADS), got {n}")
    numba.set_num_threads(int(n))


def get_num_threads() -> int:
    """How many threads kernels may use.

    Returns
    -------
    int

    Examples
    --------
    >>> get_num_threads() >= 1
    True
    """
    return int(numba.get_num_threads())


def warmup(
    dtypes: Iterable[str] = ("float32",), layouts: Iterable[str] = ("planes", "columns")
) -> None:
    """Compile the kernels of all four passes, or load them from Numba's cache on disk.

    Parameters
    ----------
    dtypes : iterable of str
        "float32", "float64", "float16", "bfloat16" (which needs ``ml_dtypes``).
    layouts : iterable of str
        "planes" for channels before long runs of values (NCHW), "columns" for channels last, dense
        layers and small images.

    Raises
    ------
    ValueError
        If a name is not one of these.

    Notes
    -----
    Kernels fused with ReLU come along; those fused with a residual are compiled when first used.

    Examples
    --------
    >>> warmup(dtypes=["float32"], layouts=["planes"])
    """
    from numbabn.functional import batch_norm, batch_norm_backward, batch_norm_forward

    shapes = {
        # Few channels are summed all at once, many one after the other: different kernels.
        "planes": ((2, 2, 128, 128), (4, 64, 16, 16), (2, 2, 8, 8)),
        "columns": ((16384, 4), (4, 16384), (4, 4)),
    }
    for dtype in dtypes:
        if dtype not in ("float32", "float64", "float16", "bfloat16"):
            raise ValueError(
                f"dtypes: expected float32, float64, float16 or bfloat16, got {dtype!r}"
            )
        if dtype == "bfloat16":
            import ml_dtypes

            scalar = np.dtype(ml_dtypes.bfloat16)
        else:
            scalar = np.dtype(dtype)
        for layout in layouts:
            if layout not in shapes:
                raise ValueError(f"layouts: expected 'planes' or 'columns', got {layout!r}")
            for shape in shapes[layout]:
                x = np.ones(shape, scalar)
                mean, var = np.zeros(shape[1], np.float32), np.ones(shape[1], np.float32)
                batch_norm(x, mean, var)
                for training in (True, False):
                    y, saved = batch_norm_forward(x, mean, var, training=training)
                    batch_norm_backward(y, saved)
                    batch_norm_backward(y, saved, needs=(False, True, True))
