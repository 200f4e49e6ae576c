"""asv: what starting costs: the import, beside Numba's own, and the first call.

The first call compiles its kernels, or loads them from Numba's cache on disk. `startup` has the
code that is timed, in fresh processes that time themselves.
"""

from __future__ import annotations

import statistics
import subprocess
import tempfile

from .quick import is_quick
from .startup import FIRST_FORWARD, seconds


def timeraw_import_numbabn() -> str:
    """Return the statement that asv times in fresh processes."""
    return "import numbabn"


def timeraw_import_numba() -> str:
    """Return the statement that asv times in fresh processes."""
    return "import numba"


class FirstCall:
    """Seconds that the first forward pass takes, when its kernels are compiled and when not."""

    version = "1"
    timeout = 300
    unit = "s"

    def setup_cache(self) -> dict[str, float]:
        """Measure once cold, then warm, which is what the cold one leaves behind."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                cold = seconds(FIRST_FORWARD, folder)
            except subprocess.CalledProcessError:  # a commit that had no such function yet
                return {}
            return {
                "cold": cold,
                "warm": statistics.median(
                    seconds(FIRST_FORWARD, folder) for _ in range(1 if is_quick() else 5)
                ),
            }

    def setup(self, found: dict[str, float]) -> None:
        if not found:
            raise NotImplementedError("no batch_norm")  # asv: skip

    def track_cold_cache(self, found: dict[str, float]) -> float:
        return found["cold"]

    def track_warm_cache(self, found: dict[str, float]) -> float:
        return found["warm"]
