"""asv: what ``import numbabn`` costs, beside ``import numba``, which is most of it."""

from __future__ import annotations


def timeraw_import_numbabn() -> str:
    """Return the statement that asv times in fresh processes."""
    return "import numbabn"


def timeraw_import_numba() -> str:
    """Return the statement that asv times in fresh processes."""
    return "import numba"
