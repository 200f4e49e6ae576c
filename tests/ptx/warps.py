"""Instructions of a whole warp: shuffles, votes, and the checks that its lanes take part."""

from __future__ import annotations

import numpy as np

from ptx.parse import Instruction, Pair
from ptx.registers import Modifiers, Slots
from ptx.report import InactiveLane

U32 = np.dtype("u4")


def ballot(group, predicate):
    """For each lane, the bits of the lanes of its warp where the predicate holds."""
    bits = np.where(predicate, group.lane_bit, np.uint32(0))
    return np.add.reduceat(bits, group.warp_starts, dtype=np.uint32)[group.warp_of]


def check_members(group, members, mask, instruction):
    """All lanes that `members` names, unless they have ended, must be at this instruction."""
    everyone = members.size == 1 and members[0] == 0xFFFFFFFF
    if mask is None and everyone:
        return
    active = np.ones(group.size, bool) if mask is None else mask
    at_work = ballot(group, active)
    missing = members & ballot(group, group.live) & ~at_work
    outside = members & group.lane_bit == 0
    bad = active & ((missing != 0) | outside)
    if bad.any():
        lane = int(np.flatnonzero(bad)[0])
        named = int(np.broadcast_to(members, active.shape)[lane])
        raise group.fault(
            InactiveLane, instruction, lane,
            f"names lanes {named:#010x} of its warp, but {int(at_work[lane]):#010x} are here",
        )  # fmt: skip


def _shuffle(instruction: Instruction, slots: Slots, m: Modifiers):
    m.need("sync")
    mode = m.need("up", "down", "bfly", "idx")
    m.need("b32")
    m.done()
    target, *operands = instruction.operands
    value, b, c, members = (slots.reader(o, U32) for o in operands)
    names = target if isinstance(target, Pair) else (target, "_")
    slot, convert = slots.result(names[0], U32)
    told = None if names[1] == "_" else slots.number[names[1]]

    def source(group, by, clamp):
        """Where in the group each lane reads, and whether the warp has that lane."""
        lane = group.lane.astype(np.int64)
        by, clamp = by.astype(np.int64) & 31, clamp.astype(np.int64)
        segment = clamp >> 8 & 31
        last = (lane & segment) | (clamp & 31 & ~segment)
        j = {"up": lane - by, "down": lane + by, "bfly": lane ^ by,
             "idx": (lane & segment) | (by & ~segment)}[mode]  # fmt: skip
        inside = j >= last if mode == "up" else j <= last
        j = np.where(inside, j, lane)
        exists = j < group.warp_size
        return np.arange(group.size) - lane + np.where(exists, j, lane), inside, exists

    def execute(group, mask):
        R = group.R
        named = members(R)
        check_members(group, named, mask, instruction)
        by, clamp = b(R), c(R)
        if by.size == clamp.size == 1:
            key = mode, int(by[0]), int(clamp[0])
            if key not in group.shuffles:
                group.shuffles[key] = source(group, by, clamp)
            position, inside, exists = group.shuffles[key]
        else:
            position, inside, exists = source(group, by, clamp)
        active = group.live if mask is None else mask
        bad = active & ~(exists & active[position])
        if not (named.size == 1 and named[0] == 0xFFFFFFFF):
            lanes = group.lane_bit[position]
            bad |= active & (named & lanes == 0)
        if bad.any():
            lane = int(np.flatnonzero(bad)[0])
            raise group.fault(InactiveLane, instruction, lane, "reads a lane that is not here")
        got = group.full(value(R))[position]
        group.put(slot, convert(got) if convert else got, mask)
        if told is not None:
            group.put(told, inside, mask)
        group.launch.report.shuffles += group.count_warps(mask)

    return execute


def _vote(instruction: Instruction, slots: Slots, m: Modifiers):
    m.need("sync")
    mode = m.need("all", "any", "uni", "ballot")
    m.need("b32" if mode == "ballot" else "pred")
    m.done()
    target, predicate, members = instruction.operands
    predicate, members = slots.reader(predicate, np.dtype(bool)), slots.reader(members, U32)
    slot = slots.number[target]

    def execute(group, mask):
        named = members(group.R)
        check_members(group, named, mask, instruction)
        active = np.ones(group.size, bool) if mask is None else mask
        votes = ballot(group, group.full(predicate(group.R)) & active) & named
        everyone = ballot(group, active) & named
        result = {"ballot": votes, "all": votes == everyone, "any": votes != 0,
                  "uni": (votes == everyone) | (votes == 0)}[mode]  # fmt: skip
        group.put(slot, result, mask)

    return execute


def _active_mask(instruction: Instruction, slots: Slots, m: Modifiers):
    m.need("b32")
    m.done()
    slot = slots.number[instruction.operands[0]]

    def execute(group, mask):
        active = np.ones(group.size, bool) if mask is None else mask
        group.put(slot, ballot(group, active), mask)

    return execute


def _match(instruction: Instruction, slots: Slots, m: Modifiers):
    m.need("any")
    m.need("sync")
    dtype = np.dtype({"b32": "u4", "b64": "u8"}[m.need("b32", "b64")])
    m.done()
    target, value, members = instruction.operands
    value, members = slots.reader(value, dtype), slots.reader(members, U32)
    slot = slots.number[target]

    def execute(group, mask):
        named = members(group.R)
        check_members(group, named, mask, instruction)
        active = np.ones(group.size, bool) if mask is None else mask
        values, result = group.full(value(group.R)), np.zeros(group.size, np.uint32)
        for lane in range(32):  # what lane `lane` of each warp has, compared by the others
            exists = lane < group.warp_size
            position = np.arange(group.size) - group.lane + np.where(exists, lane, 0)
            same = exists & active[position] & (values[position] == values)
            result |= np.where(same, np.uint32(1 << lane), np.uint32(0))
        group.put(slot, result & named, mask)

    return execute


def _warp_barrier(instruction: Instruction, slots: Slots, m: Modifiers):
    m.need("warp")
    m.need("sync")
    m.done()
    members = slots.reader(instruction.operands[0], U32)

    def execute(group, mask):
        check_members(group, members(group.R), mask, instruction)
        time = group.launch.time
        group.warp_since = np.full(group.size, time) if mask is None else np.where(
            mask, time, group.warp_since)  # fmt: skip
        group.launch.tick(instruction)

    return execute


WARP_INSTRUCTIONS = {
    "shfl": _shuffle, "vote": _vote, "activemask": _active_mask, "match": _match,
    "bar": _warp_barrier,
}  # fmt: skip
