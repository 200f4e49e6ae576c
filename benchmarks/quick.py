"""What ``asv run --quick`` leaves out: it asks whether benchmarks run, not how fast anything is.

asv starts a process for every value, so leaving a value out is cheap only where nothing has been
imported yet: this module imports nothing of numbabn.
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["DTYPES", "is_quick", "leave_out"]

# A convolution's shape within L2, and a dense layer.
SHAPES = ("32x256x14x14", "65536x64")
DTYPES = ("float32", "float16")


def is_quick() -> bool:
    """Whether asv started this process in a quick run.

    asv does not tell its processes, so its own command line is read; where the system has no
    ``/proc`` to read it from, every run counts as a full one.
    """
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
    except OSError:
        return False
    # An executable named asv, or `python -m asv`.
    is_asv = any(Path(word).name == "asv" for word in words)
    return is_asv and not {"--quick", "-q"}.isdisjoint(words)


def leave_out(shape: str, dtype: str = "float32") -> bool:
    """Whether this run measures nothing of a shape and dtype."""
    return is_quick() and (shape not in SHAPES or dtype not in DTYPES)
