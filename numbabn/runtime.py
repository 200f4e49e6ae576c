"""Threads, and compiling ahead of time."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from numbabn import layout
from numbabn.backward import batch_norm_backward
from numbabn.functional import batch_norm, batch_norm_forward
from numbabn.stages import (
    batch_norm_backward_elemt,
    batch_norm_backward_reduce,
    batch_norm_stats,
    normalize,
)

__all__ = ["get_num_threads", "set_num_threads", "warmup"]

Array = NDArray[Any]


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


def _eval_forward(x: Array, mean: Array, var: Array) -> None:
    batch_norm(x, mean, var, out=np.empty_like(x))
    for rank in range(2, 6):  # small arrays come to their kernel as they are
        if x.ndim <= rank:
            batch_norm(x.reshape(x.shape + (1,) * (rank - x.ndim)), mean, var, var, mean)


def _eval(x: Array, mean: Array, var: Array) -> None:
    y, saved = batch_norm_forward(x, mean, var)
    batch_norm_backward(y, saved)
    batch_norm_backward(y, saved, needs=(False, True, True))


def _training(x: Array, mean: Array, var: Array) -> None:
    y, saved = batch_norm_forward(x, mean, var, training=True)
    batch_norm_backward(y, saved)
    batch_norm_backward(y, saved, needs=(False, True, True))


def _stages(x: Array, mean: Array, var: Array) -> None:
    batch_norm_stats(x)
    normalize(x, mean, var)
    batch_norm_backward_reduce(x, x, mean, var)
    batch_norm_backward_elemt(x, x, mean, var, None, mean, mean, 1.0)


_PASSES = {
    "eval, forward": _eval_forward,
    "eval, forward and backward": _eval,
    "training": _training,
    "stages": _stages,
}
_DTYPES = ("float32", "float64", "float16", "bfloat16")
_LAYOUTS = ("planes", "columns")


def _shapes(kind: str, threads: int) -> tuple[tuple[int, ...], ...]:
    """One shape for each way in which `schedule` may go about planes or columns.

    Small arrays for one thread; and for several, few channels, which are summed all at once (very
    few, several rows as one), and many, each of which is finished before the next is begun.
    """
    from numbabn.cpu import launch

    large = max(launch.PARALLEL_FROM.values())
    if kind == "columns":
        return (4, 4), (large // 4, 4), (large // 64, 64), (8, large // 8)
    L = layout.SHORT_PLANE  # the least that counts as planes
    return (2, 2, L), (1, 1, large), (2, 4 * threads, max(L, large // (8 * threads)))


def _chosen(name: str, given: str | Iterable[str], known: tuple[str, ...]) -> list[str]:
    """`given` as a list of distinct names out of `known`."""
    chosen = list(dict.fromkeys([given] if isinstance(given, str) else given))
    for item in chosen:
        if item not in known:
            raise ValueError(f"{name}: expected some of {', '.join(known)}, got {item!r}")
    return chosen


def _scalar(name: str) -> np.dtype[Any]:
    if name == "bfloat16":
        import ml_dtypes

        scalar: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return scalar
    return np.dtype(name)


def kernel_counts() -> tuple[int, int]:
    """How many kernels this process has compiled, and how many it has loaded from disk.

    Examples
    --------
    >>> compiled, loaded = kernel_counts()
    """
    from numbabn.cpu import passes, serial, small

    compiled = loaded = 0
    for module in (serial, passes, small):
        for item in vars(module).values():
            stats = getattr(item, "stats", None)
            if stats is not None and stats.cache_path is not None:  # not a helper of kernels
                compiled += sum(stats.cache_misses.values())
                loaded += sum(stats.cache_hits.values())
    return compiled, loaded


def warmup(
    dtypes: str | Iterable[str] = ("float32",),
    layouts: str | Iterable[str] = _LAYOUTS,
    *,
    progress: Callable[[int, int, str], object] | None = None,
) -> None:
    """Compile the kernels of all four passes and of the stages, or load them from disk.

    Parameters
    ----------
    dtypes : str or iterable of str
        "float32", "float64", "float16", "bfloat16" (which needs ``ml_dtypes``).
    layouts : str or iterable of str
        "planes" for channels before long runs of values (NCHW), "columns" for channels last, dense
        layers and small images.
    progress : callable, optional
        Called as ``progress(done, total, what)`` before each of `total` steps, where `what` is
        ``"<dtype>, <layout>: <pass>"``, and once more with ``done == total``.

    Raises
    ------
    ValueError
        If a name is not one of these.
    ImportError
        For "bfloat16" without ``ml_dtypes``.

    Notes
    -----
    What Numba compiles goes to its cache on disk (``NUMBA_CACHE_DIR``, or beside the package), so
    that later processes on this machine only load it. Kernels are the same for any number of
    threads.

    Kernels fused with ReLU are the same ones. Those fused with a residual, and those for float32 or
    half-precision input with float64 parameters, are compiled when first used.

    Examples
    --------
    >>> warmup(dtypes=["float32"], layouts=["planes"])
    """
    names = _chosen("dtypes", dtypes, _DTYPES)
    scalars = {name: _scalar(name) for name in names}
    threads = int(numba.config.NUMBA_NUM_THREADS)
    steps = [
        (name, kind, shape, what)
        for name in names
        for kind in _chosen("layouts", layouts, _LAYOUTS)
        for shape in _shapes(kind, threads)
        for what in _PASSES
    ]
    tell = progress if progress is not None else lambda done, total, what: None
    before = numba.get_num_threads()
    numba.set_num_threads(threads)
    try:
        for done, (name, kind, shape, what) in enumerate(steps):
            tell(done, len(steps), f"{name}, {kind}: {what}")
            C = shape[1]
            x, mean, var = np.ones(shape, scalars[name]), np.zeros(C), np.ones(C)
            if name != "float64":
                mean, var = mean.astype(np.float32), var.astype(np.float32)
            for count in {threads, 1}:  # they may go different ways
                numba.set_num_threads(count)
                _PASSES[what](x, mean, var)
    finally:
        numba.set_num_threads(before)
    tell(len(steps), len(steps), "")
