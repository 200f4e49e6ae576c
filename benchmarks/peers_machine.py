"""What a measurement was made on: processor, caches, memory, versions."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from .peers_native import Missing, cpu_model, optional

__all__ = ["Company", "available_cpus", "cache_bytes", "describe", "summary"]


def read(path: str | Path) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def available_cpus() -> int:
    """Processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def caches() -> dict[str, str]:
    """Size of each cache of the first processor and how many processors share it (Linux)."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind = {"Data": "d", "Instruction": "i"}.get(read(index / "type"), "")
        shared = read(index / "shared_cpu_list")
        found[f"L{read(index / 'level')}{kind}"] = f"{read(index / 'size')} (cpus {shared})"
    return found


def cache_bytes(level: int) -> int:
    """Size of the largest cache of a level, or 0 where the system does not say."""
    sizes = [0]
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        size = read(index / "size")
        if read(index / "level") == str(level) and size.endswith("K"):
            sizes.append(int(size[:-1]) * 1024)
    return max(sizes)


def describe(threads: int, versions: dict[str, str]) -> dict[str, Any]:
    """Everything about the machine that a reader of the numbers needs."""
    libraries = dict(versions)
    for module in ("numpy", "numba", "llvmlite"):
        try:
            libraries[module] = str(optional(module).__version__)
        except Missing:
            continue
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu_model(),
        "cpus": os.cpu_count(),
        "threads": threads,
        "caches": caches(),
        "memory_gib": round(pages / 2**30, 1),
        "system": platform.platform(),
        "transparent_hugepage": read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "python": platform.python_version(),
        "versions": libraries,
    }


class Company:
    """How busy other processes, and a virtual machine's host, kept the processors meanwhile."""

    def __init__(self) -> None:
        self.start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float, float] | None:
        fields = read("/proc/stat").splitlines()[:1]
        if not fields:
            return None
        user, nice, system, idle, iowait, irq, softirq, steal = map(int, fields[0].split()[1:9])
        tick = os.sysconf("SC_CLK_TCK")
        busy = (user + nice + system + irq + softirq) / tick
        own = os.times()
        mine = own.user + own.system + own.children_user + own.children_system
        return busy, (idle + iowait) / tick, steal / tick, mine

    def shares(self) -> dict[str, float]:
        """Fractions of all processor time since the start: other processes, and stolen."""
        end = self._now()
        if self.start is None or end is None:
            return {}
        busy, idle, steal, mine = (b - a for a, b in zip(self.start, end, strict=True))
        total = max(busy + idle + steal, 1e-9)
        return {"others": max(0.0, busy - mine) / total, "stolen": steal / total}


def summary(machine: dict[str, Any]) -> str:
    """The description in three lines."""
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
    levels = ", ".join(f"{k} {v}" for k, v in machine["caches"].items())
    return "\n".join(
        (
            f"{machine['cpu']}, {machine['cpus']} cpus, {machine['threads']} threads, "
            f"{machine['memory_gib']} GiB",
            f"caches: {levels or 'unknown'}",
            f"python {machine['python']}, {versions}",
        )
    )
