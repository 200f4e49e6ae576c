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
