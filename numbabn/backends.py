"""The backends, imported when the first array comes that needs them.

Importing the kernels takes longer than all the rest of numbabn.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType


@cache
def cpu() -> ModuleType:
    """The backend for NumPy arrays."""
    from numbabn import cpu as backend

    return backend


@cache
def device() -> ModuleType:
    """The front door for CUDA arrays, which brings their backend with it."""
    try:
        from numbabn import device as door
    except ImportError as error:
        raise ImportError(
            "CUDA arrays need numba-cuda: pip install 'numbabn[cuda13]' (or 'numbabn[cuda12]', "
            f"for an older driver); importing it gave: {error}"
        ) from error
    return door
