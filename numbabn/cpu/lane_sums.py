"""The lanes of sixteen vectors added up at once: to one vector of sixteen sums."""

from numbabn.cpu.memory import load, offset
from numbabn.cpu.options import inline
from numbabn.cpu.vector import LANES, halve_2, halve_4, halve_8, halve_16


@inline
def sum_two(lanes, step):
    return halve_16(load(lanes, 0), load(lanes, step))


@inline
def sum_four(lanes, step):
    return halve_8(sum_two(lanes, step), sum_two(offset(lanes, 2 * step), step))


@inline
def sum_sixteen_of_pairs(lanes):
    """The other half of `sum_sixteen`: of eight vectors, in which two each are halved already."""
    return halve_2(sum_eight_of_pairs(lanes), sum_eight_of_pairs(offset(lanes, 4 * LANES)))


@inline
def sum_eight_of_pairs(lanes):
    first, second = load(lanes, 0), load(lanes, LANES)
    third, fourth = load(lanes, 2 * LANES), load(lanes, 3 * LANES)
    return halve_4(halve_8(first, second), halve_8(third, fourth))


@inline
def sum_eight(lanes, step):
    return halve_4(sum_four(lanes, step), sum_four(offset(lanes, 4 * step), step))


@inline
def sum_sixteen(lanes, step):
    """`sum_lanes` of sixteen vectors, which begin `step` numbers after each other."""
    return halve_2(sum_eight(lanes, step), sum_eight(offset(lanes, 8 * step), step))
