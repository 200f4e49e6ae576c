"""Loads, stores and atomics: from addresses in registers to memory, checked and counted."""

from __future__ import annotations

import numpy as np

from ptx.memory import Buffer, Region
from ptx.parse import Address, Instruction, Vector
from ptx.registers import LOCAL_WINDOW, SHARED_WINDOW, Modifiers, Slots, dtype_of, signless
from ptx.report import SECTOR_BITS, Misaligned, OutOfBounds, RaceFault, ReadOnly, Uninitialised

_HINTS = ("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "volatile", "weak", "relaxed", "acquire",
          "release", "acq_rel", "cta", "gpu", "sys")  # fmt: skip
_SPACES = ("global", "shared", "local", "param", "const")


class Access:
    """What the loads and stores have in common: an address, and numbers that lie there."""

    def __init__(self, instruction: Instruction, slots: Slots, m: Modifiers, address: Address):
        self.instruction = instruction
        kind = m.type()
        self.dtype = signless(dtype_of(kind)) if kind[0] != "s" else dtype_of(kind)
        if self.dtype == np.float16:
            self.dtype = np.dtype("u2")
        self.count = int(m.take("v2", "v4")[1:] or 1)
        self.width = self.dtype.itemsize * self.count
        if self.width > 16:
            m.fail("wider than 16 bytes")
        self.space = m.take(*_SPACES)
        m.take("cta")  # of shared::cta
        while m.take(*_HINTS):
            pass
        m.left = [hint for hint in m.left if not hint.startswith(("L1::", "L2::"))]
        read = slots.reader(address.base, slots.dtype(address.base))
        self.read_address = lambda R: read(R).astype(np.uint64, copy=False)
        self.offset = np.uint64(address.offset % (1 << 64))

    def addresses(self, group, mask):
        """Of the lanes that take part, and their positions; None for all."""
        addresses = self.read_address(group.R)
        if self.offset:
            addresses = addresses + self.offset
        if mask is None:
            return group.full(addresses), None
        lanes = np.flatnonzero(mask)
        if addresses.size == 1:
            return np.repeat(addresses, lanes.size), lanes
        return addresses[lanes], lanes

    def places(self, group, addresses, lanes, kind: str):
        """Check an access; gives (buffer, byte offsets in it, which of the lanes; None for all)."""
        width = self.width
        if int(np.bitwise_or.reduce(addresses)) & (width - 1):
            n = int(np.flatnonzero(addresses & np.uint64(width - 1))[0])
            self._fail(Misaligned, group, lanes, n, addresses, f"is no multiple of {width}")
        if self.space:
            return self._in_space(group, self.space, addresses, lanes, None, kind)
        windows = addresses >> np.uint64(56)
        found = []
        for window in np.unique(windows):
            pick = np.flatnonzero(windows == window)
            space = {1: "shared", 2: "local"}.get(int(window), "global")
            base = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW}.get(space, 0)
            inside = addresses[pick] - np.uint64(base)
            inside_lanes = pick if lanes is None else lanes[pick]
            found += self._in_space(group, space, inside, inside_lanes, pick, kind)
        return found

    def _in_space(self, group, space, addresses, lanes, base_pick, kind):
        launch, found = group.launch, []
        for region, pick in group.spaces[space].locate(addresses, self.width):
            inside = addresses if pick is None else addresses[pick]
            who = lanes if pick is None else (pick if lanes is None else lanes[pick])
            if region is None:
                near = group.spaces[space].nearest(int(inside[0]))
                self._fail(OutOfBounds, group, who, 0, inside, f"is outside all arrays: {near}")
            if kind != "load" and not region.writable:
                why = f"is in {region.name}, which may only be read"
                self._fail(ReadOnly, group, who, 0, inside, why)
            offsets = (inside - np.uint64(region.buffer.origin)).view(np.int64)
            stride = group.strides.get(space)
            if stride is not None:
                offsets = offsets + (stride if who is None else stride[who])
            if space == "global":
                self._count(group, region, inside, who, kind)
            if space in ("shared", "global") and region.writable:
                self._check_order(group, space, region, inside, offsets, who, kind)
            elif space in ("local", "param") and kind == "store":
                launch.shadow(region.buffer).mark_written(offsets, self.width, launch.time)
            elif space in ("local", "param"):
                self._check_written(group, region, inside, offsets, who)
            if base_pick is not None:
                pick = base_pick if pick is None else base_pick[pick]
            found.append((region.buffer, offsets, pick))
        launch.tick(self.instruction)
        return found

    def _fail(self, kind, group, lanes, n, addresses, why):
        lane = n if lanes is None else int(lanes[n])
        message = f"address {int(addresses[n]):#x} {why}"
        raise group.fault(kind, self.instruction, lane, message)

    def _count(self, group, region: Region, addresses, lanes, kind):
        keys = addresses.view(np.int64)
        keys = keys + (group.warp_key if lanes is None else group.warp_key[lanes])
        if (keys[1:] < keys[:-1]).any():
            keys = np.sort(keys)
        different = 1 + int(np.count_nonzero(keys[1:] != keys[:-1]))
        sectors = keys >> SECTOR_BITS
        touched = 1 + int(np.count_nonzero(sectors[1:] != sectors[:-1]))
        warps = group.warps if lanes is None else np.unique(group.warp_of[lanes]).size
        report = group.launch.report
        for one in ("load", "store") if kind == "atomic" else (kind,):
            report.requests[one, self.width] += warps
            report.sectors[one, self.width] += touched
            report.bytes[one, self.width] += different * self.width
            region.touch(one, addresses.view(np.int64) >> SECTOR_BITS)

    def _check_order(self, group, space, region, addresses, offsets, lanes, kind):
        launch, shadow = group.launch, group.launch.shadow(region.buffer)
        time = launch.time
        if space == "shared" and kind != "store":
            self._check_written(group, region, addresses, offsets, lanes)
        if not launch.check_races:
            if kind != "load" and space == "shared":
                shadow.mark_written(offsets, self.width, time)
            return
        ids, block_since, warp_since = group.ids, group.block_since, group.warp_since
        if lanes is not None:
            ids, block_since, warp_since = ids[lanes], block_since[lanes], warp_since[lanes]
        race = shadow.access(
            offsets, self.width, ids, time, block_since, warp_since, kind != "load",
            kind == "atomic",
        )  # fmt: skip
        if race is not None:
            other = launch.thread_name(race.other)
            earlier = launch.history[race.time] if race.time < time else self.instruction
            what = "written" if race.wrote else "read"
            self._fail(
                RaceFault, group, lanes, race.position, addresses,
                f"in {region.name} was {what} by {other} with no barrier in between, "
                f"at line {earlier.line}: {earlier.text}",
            )  # fmt: skip

    def _check_written(self, group, region, addresses, offsets, lanes):
        written = group.launch.shadow(region.buffer).written(offsets, self.width)
        if not written.all():
            n = int(np.flatnonzero(~written)[0])
            why = f"in {region.name} was not written yet"
            self._fail(Uninitialised, group, lanes, n, addresses, why)

    def units(self, buffer: Buffer, offsets):
        """The buffer as an array of what the access moves, and indices of it."""
        view, skip = buffer.units(self.width)
        return view, (offsets - skip if skip else offsets) >> (self.width.bit_length() - 1)


def _load(instruction: Instruction, slots: Slots, m: Modifiers):
    target, address = instruction.operands
    access = Access(instruction, slots, m, address)
    m.done()
    names = target if isinstance(target, Vector) else (target,)
    results = [slots.result(name, access.dtype) if name != "_" else None for name in names]
    # Registers of the same size take the numbers as they are.
    have = {slots.dtypes[result[0]] for result in results if result}
    dtype = access.dtype
    if len(have) == 1 and next(iter(have)).itemsize == dtype.itemsize:
        dtype = next(iter(have))
        results = [slots.result(name, dtype) if name != "_" else None for name in names]

    def execute(group, mask):
        addresses, lanes = access.addresses(group, mask)
        places = access.places(group, addresses, lanes, "load")
        values = None
        for buffer, offsets, pick in places:
            units, index = access.units(buffer, offsets)
            if pick is None:
                values = units.take(index)
            else:
                if values is None:
                    values = np.empty(addresses.size, units.dtype)
                values[pick] = units.take(index)
        values = values.view(dtype).reshape(-1, access.count)
        for n, result in enumerate(results):
            if result:
                slot, convert = result
                one = np.ascontiguousarray(values[:, n])
                group.put_lanes(slot, convert(one) if convert else one, lanes)

    return execute


def _store(instruction: Instruction, slots: Slots, m: Modifiers):
    address, source = instruction.operands
    access = Access(instruction, slots, m, address)
    m.done()
    names = source if isinstance(source, Vector) else (source,)
    readers = [slots.reader(name, access.dtype, narrow=True) for name in names]

    def execute(group, mask):
        addresses, lanes = access.addresses(group, mask)
        places = access.places(group, addresses, lanes, "store")
        values = np.empty((addresses.size, access.count), access.dtype)
        for n, read in enumerate(readers):
            column = read(group.R)
            values[:, n] = column if lanes is None or column.size == 1 else column[lanes]
        for buffer, offsets, pick in places:
            units, index = access.units(buffer, offsets)
            moved = values.view(units.dtype).ravel()
            units[index] = moved if pick is None else moved[pick]

    return execute


_ATOMIC = {
    "add": lambda old, b, c: old + b, "exch": lambda old, b, c: b,
    "min": lambda old, b, c: min(old, b), "max": lambda old, b, c: max(old, b),
    "and": lambda old, b, c: old & b, "or": lambda old, b, c: old | b,
    "xor": lambda old, b, c: old ^ b, "cas": lambda old, b, c: c if old == b else old,
    "inc": lambda old, b, c: 0 if old >= b else old + 1,
    "dec": lambda old, b, c: b if old == 0 or old > b else old - 1,
}  # fmt: skip


def _atomic(instruction: Instruction, slots: Slots, m: Modifiers):
    target, address, *sources = instruction.operands
    if instruction.opcode == "red":
        target, address, *sources = "_", *instruction.operands
    operation = _ATOMIC[m.need(*_ATOMIC)]
    access = Access(instruction, slots, m, address)
    m.done()
    readers = [slots.reader(name, access.dtype) for name in sources]
    result = slots.result(target, access.dtype) if target != "_" else None

    def execute(group, mask):
        addresses, lanes = access.addresses(group, mask)
        places = access.places(group, addresses, lanes, "atomic")
        operands = [group.full(read(group.R)) for read in readers]
        if lanes is not None:
            operands = [values[lanes] for values in operands]
        b, c = operands[0], operands[-1]
        old = np.empty(addresses.size, access.dtype)
        for buffer, offsets, pick in places:
            units, index = access.units(buffer, offsets)
            view = units.view(access.dtype)
            which = np.arange(addresses.size) if pick is None else pick
            for n in group.launch.order(which.size):  # one thread after the other
                k, at = which[n], index[n]
                old[k] = view[at]
                view[at] = operation(old[k], b[k], c[k])
        if result:
            slot, convert = result
            group.put_lanes(slot, convert(old) if convert else old, lanes)

    return execute


MEMORY_INSTRUCTIONS = {"ld": _load, "st": _store, "atom": _atomic, "red": _atomic}
