"""The machine's caches, and what fits them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

# Bytes of the last cache that one core can count on, whatever the system says: on machines of many
# cores, of which a virtual one shows a few, the others fill it too.
MOST_LAST_SHARE = 16 << 20


class Caches(NamedTuple):
    """Bytes of one core's L2, and of the largest cache with the number of cores that share it."""

    l2: int
    last: int
    last_shared_by: int


def _size(text: str) -> int:
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    text = text.strip()
    return int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text)


def _count_cpus(text: str) -> int:
    """Number of CPUs in a list like ``0-3,8``."""
    total = 0
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        total += int(last or first) - int(first) + 1
    return total


@cache
def caches() -> Caches:
    """The caches of the first CPU, from Linux's sysfs; elsewhere 1 MiB and 8 MiB for 4 cores."""
    l2, last, shared, deepest = 1 << 20, 8 << 20, 4, 0
    try:
        for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
            if (index / "type").read_text().strip() == "Instruction":
                continue
            level = int((index / "level").read_text())
            size = _size((index / "size").read_text())
            if level == 2:
                l2 = size
            if level > deepest:
                deepest = level
                last = size
                shared = _count_cpus((index / "shared_cpu_list").read_text())
    except (OSError, ValueError):
        pass
    return Caches(l2, last, max(1, shared))


@cache
def _last_cache() -> int:
    found = caches()
    return min(found.last, found.last_shared_by * MOST_LAST_SHARE)


def last_share() -> int:
    """Bytes of the last cache for each core that shares it."""
    return _last_cache() // caches().last_shared_by


def in_memory(nbytes: int) -> bool:
    """Whether all arrays of a pass, so many bytes, are too much for the caches."""
    return nbytes >= _last_cache()
