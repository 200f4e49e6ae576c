"""What a launch did: faults, and counts of instructions and memory traffic."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

SECTOR_BITS = 5
SECTOR = 1 << SECTOR_BITS  # bytes that memory is read and written in


class Fault(Exception):
    """A kernel did what it must not; names kernel, instruction, thread, and address and array."""


class OutOfBounds(Fault):
    """An access to what is in no array."""


class Misaligned(Fault):
    """An address that is not a multiple of the access's size."""


class ReadOnly(Fault):
    """A write to an array that may only be read."""


class Uninitialised(Fault):
    """A read of shared memory, local memory or a register that was not written."""


class RaceFault(Fault):
    """Two accesses, one of them a write, that no barrier puts in order."""


class DivergentBarrier(Fault):
    """A barrier that not all threads of the warp or the block reach."""


class InactiveLane(Fault):
    """A warp instruction without all lanes that it names."""


@dataclass
class Report:
    """Counts of one launch.

    A request is a memory instruction of one warp; its sectors are the different ones, of 32 bytes,
    that its threads touch; `bytes` that several of its threads ask for count once. `requests`,
    `sectors` and `bytes` count accesses to global memory by what they are, "load" or "store"
    (atomics are both), and bytes per thread.
    """

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)
    sectors: Counter[tuple[str, int]] = field(default_factory=Counter)
    bytes: Counter[tuple[str, int]] = field(default_factory=Counter)
    first_touch: Counter[str] = field(default_factory=Counter)  # different sectors of the launch
    by_array: Counter[tuple[str, str]] = field(default_factory=Counter)  # the same by (kind, name)
    instructions: int = 0  # of threads
    barriers: int = 0  # of blocks
    shuffles: int = 0  # of warps

    def efficiency(self, kind: str) -> float:
        """Bytes asked for, by bytes of the sectors that the requests touch: at most 1."""
        sectors = sum(n for (k, _), n in self.sectors.items() if k == kind)
        wanted = sum(n for (k, _), n in self.bytes.items() if k == kind)
        return wanted / (SECTOR * sectors) if sectors else 1.0

    def wide_share(self, kind: str, width: int = 16) -> float:
        """Share of the bytes asked for that accesses of `width` bytes ask for."""
        wanted = sum(n for (k, _), n in self.bytes.items() if k == kind)
        return self.bytes[kind, width] / wanted if wanted else 1.0

    @property
    def dram_bytes(self) -> int:
        """Bytes of memory read and written if everything is kept in cache once it was touched."""
        return SECTOR * sum(self.first_touch.values())

    @property
    def uncached_bytes(self) -> int:
        """Bytes of memory read and written if nothing is kept from one request to the next."""
        return SECTOR * sum(self.sectors.values())
