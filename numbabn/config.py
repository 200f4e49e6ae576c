"""What numbabn runs on: versions, threads, caches, GPU.

For ``python -m numbabn info``, for bug reports, and for the records of benchmarks. Everything is
imported when it is asked for, so that this module costs nothing at ``import numbabn``.
"""

from __future__ import annotations

import sys
from typing import TextIO

__all__ = ["config", "show_config"]


def config() -> dict[str, object]:
    """Return what numbabn runs on, as a flat dictionary.

    Returns
    -------
    dict
        Strings and numbers (JSON can hold them): versions of numbabn, Python, Numba, llvmlite and
        NumPy; the processor and the size of the caches that work is cut up for, in bytes; the
        number of threads in use, the largest that can be set, and Numba's threading layer; where
        compiled kernels are cached; the GPU, or why there is none.

    Notes
    -----
    Numba chooses its threading layer at the first parallel call, so this makes one, and looking
    for a GPU imports ``numba.cuda``: the first call in a process takes a second or so.

    Examples
    --------
    >>> import numbabn
    >>> numbabn.config.config()["threads"] == numbabn.get_num_threads()
    True
    """
    import os
    import platform
    from importlib.metadata import version

    import numba

    import numbabn
    from numbabn.cpu.caches import caches

    found = caches()
    return {
        "numbabn": version("numbabn"),
        "python": platform.python_version(),
        "numba": numba.__version__,
        "llvmlite": version("llvmlite"),
        "numpy": version("numpy"),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "l2_cache": found.l2,
        "last_level_cache": found.last,
        "last_level_cache_shared_by": found.last_shared_by,
        "threads": numbabn.get_num_threads(),
        "max_threads": int(numba.config.NUMBA_NUM_THREADS),
        "threading_layer": _threading_layer(),
        "kernel_cache": _kernel_cache(),
        "gpu": _gpu(),
    }


def show_config(file: TextIO | None = None) -> None:
    """Print what numbabn runs on: versions, threads, threading layer, caches and GPU.

    Parameters
    ----------
    file : text file, optional
        Where to print; ``sys.stdout`` if not given.

    See Also
    --------
    config : The same as a dictionary.

    Examples
    --------
    >>> import numbabn
    >>> numbabn.show_config()  # doctest: +ELLIPSIS
    numbabn ...
    """
    values = config()
    for name in ("l2_cache", "last_level_cache"):
        values[name] = _readable_bytes(int(str(values[name])))
    width = max(map(len, values))
    for name, value in values.items():
        print(f"{name.replace('_', ' '):{width}}  {value}", file=file or sys.stdout)


def _readable_bytes(count: int) -> str:
    """``1048576`` → ``1 MiB``; KiB where MiB would be a fraction."""
    return f"{count >> 20} MiB" if count % (1 << 20) == 0 else f"{count / 1024:g} KiB"


def _processor() -> str:
    """The processor's name as LLVM knows it: what kernels are compiled for."""
    import platform

    import llvmlite.binding

    return f"{llvmlite.binding.get_host_cpu_name()} ({platform.machine()})"


def _threading_layer() -> str:
    """Numba's threading layer, or why no parallel kernel can run."""
    from numbabn.cpu import launch

    if launch.process.serial_only:
        return "none: this process was forked from one that had run parallel kernels"
    return launch.layer()


def _kernel_cache() -> str:
    """Where compiled kernels are kept between processes."""
    import os
    from pathlib import Path

    given = os.environ.get("NUMBA_CACHE_DIR")
    if given:
        return given
    beside = Path(__file__).parent / "__pycache__"
    if os.access(beside.parent, os.W_OK):
        return str(beside)
    return "the user's cache directory (the package's own is not writable)"


def _gpu() -> str:
    """The first GPU that numba.cuda can use, or why there is none."""
    from importlib.util import find_spec

    if find_spec("numba.cuda") is None:
        return "none: numba.cuda is not installed"
    from numba import cuda

    try:
        if not cuda.is_available():
            return "none: no CUDA driver with a device"
        device = cuda.list_devices()[0]  # unlike the current device, makes no context
        name = device.name.decode() if isinstance(device.name, bytes) else str(device.name)
        major, minor = device.compute_capability
    except Exception as error:  # a broken driver can fail in any way, and is only to be reported
        return f"none: {type(error).__name__}: {error}"
    return f"{name}, compute capability {major}.{minor}"
