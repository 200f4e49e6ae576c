"""Memory: regions of bytes at addresses, and how lanes get at them.

A `Region` is an array in global memory, or a variable in shared or local memory; an access must lie
within one. Regions of global memory lie where the host has them. A `Space` holds regions, and finds
those that a set of addresses lies in.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import numpy as np

from ptx.parse import Variable
from ptx.races import Shadow

# What NumPy moves as a whole, for each size of an access.
_UNITS = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16"}


class Buffer:
    """Bytes; the first is at address `origin`."""

    def __init__(self, data: np.ndarray, origin: int):
        self.data, self.origin = data, origin
        self.shadow: Shadow | None = None
        self._units: dict[int, tuple[np.ndarray, int]] = {}

    def units(self, width: int) -> tuple[np.ndarray, int]:
        """The bytes as units at multiples of `width`, and how far from `origin` they begin."""
        if width not in self._units:
            skip = -self.origin % width
            count = max(0, (self.data.size - skip) // width)
            view = self.data[skip : skip + count * width].view(_UNITS[width])
            self._units[width] = view, skip
        return self._units[width]


@dataclass
class Region:
    """`size` bytes at `base`, in a buffer that may hold more."""

    name: str
    base: int
    size: int
    buffer: Buffer
    writable: bool = True
    touched: dict[str, np.ndarray] = field(default_factory=dict)  # sectors, by load and store

    def touch(self, kind: str, sectors: np.ndarray) -> None:
        """Note that these sectors (addresses by 32) were loaded or stored."""
        first = self.base >> 5
        if kind not in self.touched:
            self.touched[kind] = np.zeros(((self.base + self.size - 1) >> 5) - first + 1, bool)
        self.touched[kind][sectors - first] = True


class Space:
    """Regions that lie apart."""

    def __init__(self, name: str):
        self.name = name
        self.regions: list[Region] = []

    def add(self, region: Region) -> None:
        for other in self.regions:
            if region.base < other.base + other.size and other.base < region.base + region.size:
                raise ValueError(f"{region.name} overlaps {other.name}")
        self.regions.append(region)
        self.regions.sort(key=lambda r: r.base)

    def locate(self, addresses: np.ndarray, width: int):
        """(region, which of the addresses are in it) until all are found; None for all of them.

        The region is None for those that are in none.
        """
        first, last = int(addresses.min()), int(addresses.max()) + width
        for region in self.regions:
            if region.base <= first and last <= region.base + region.size:
                return [(region, None)]
        found = []
        nowhere = np.ones(addresses.size, bool)
        for region in self.regions:
            if region.size < width or region.base >= last or region.base + region.size <= first:
                continue
            low, high = np.uint64(region.base), np.uint64(region.base + region.size - width)
            inside = (addresses >= low) & (addresses <= high)
            if inside.any():
                found.append((region, np.flatnonzero(inside)))
                nowhere &= ~inside
        if nowhere.any():
            found.insert(0, (None, np.flatnonzero(nowhere)))
        return found

    def nearest(self, address: int) -> str:
        """Where an address that is in no region lies."""
        near = [r for r in self.regions if r.size]
        if not near:
            return f"there is nothing in {self.name} memory"
        region = min(near, key=lambda r: max(r.base - address, address - r.base - r.size + 1))
        if address < region.base:
            return f"{region.base - address} bytes before {region.name}"
        return f"byte {address - region.base} of {region.name}, which has {region.size}"


def _extent(array: np.ndarray) -> tuple[int, int]:
    """Address and size in bytes of an array without gaps."""
    axes = sorted(zip(array.strides, array.shape, strict=True))
    dense = array.itemsize
    for stride, length in axes:
        if length > 1 and stride != dense:
            raise ValueError("an array with gaps, or turned round, cannot be registered")
        dense *= length
    return array.ctypes.data, array.nbytes


class Memory:
    """Global memory: the arrays that kernels may use. Their addresses are those in the host."""

    def __init__(self) -> None:
        self.space = Space("global")
        self._owners: list[object] = []
        self._variables: dict[tuple[int, str], int] = {}

    def register(self, array: np.ndarray, name: str, writable: bool = True) -> int:
        """Let kernels read `array`, and write it if `writable`; returns its address."""
        base, size = _extent(array)
        if size:
            kind = ctypes.c_uint8 * size
            data = np.ctypeslib.as_array(kind.from_address(base))
            self.space.add(Region(name, base, size, Buffer(data, base), writable))
            self._owners.append(array)
        return base

    def variable(self, module: object, v: Variable) -> int:
        """The address of a module's variable, which lives as long as the memory."""
        key = id(module), v.name
        if key not in self._variables:
            store = np.zeros(v.size + 256, np.uint8)
            skip = -store.ctypes.data % 256
            store[skip : skip + len(v.initial)] = np.frombuffer(v.initial, np.uint8)
            self._owners += [store, module]
            data = store[skip : skip + v.size]
            self._variables[key] = self.register(data, v.name, v.space == "global")
        return self._variables[key]
