"""The walk that sums short planes which follow each other in memory, of either pass.

A vector goes on from one plane into the next, its lanes counting for the one or the other.
"""

from typing import Any

from numbabn.cpu.memory import store
from numbabn.cpu.options import function, inline
from numbabn.cpu.vector import LANES, blend, splat_like


@inline
def keep_sums(lanes, j, total, squares):
    """Put those of channel j there, or into `few`."""
    store(lanes, j * 2 * LANES, total)
    store(lanes, (2 * j + 1) * LANES, squares)


def along_short_planes(
    numbers_of: Any, mix: Any, add_first: Any, add_whole: Any, add_one: Any, add_last: Any
) -> Any:
    """The walk, of a pass that is given by six functions, over `data` that is the pass's own.

    ``numbers_of(data, j)`` is what channel j's elements are summed with, and ``mix(count, a, b)``
    that of a vector whose first `count` lanes are another channel's than the rest. The others
    return the vectors of two sums, added to those that are their last arguments.
    ``add_one(data, i, K, numbers, total, products)`` adds 16 elements; ``add_whole(data, i, K,
    turn, numbers, …)`` as many times 16 as there are up to `turn`, and returns where it stopped
    first; ``add_first(data, i, K, lane, numbers, …)`` those from i on, in the lanes from `lane` on,
    and whatever in the others; ``add_last(data, i, K, count, numbers, …)`` the last `count`.
    """

    @function
    def run(data, i, K, L, channels, lane, few):
        """Sum planes of L elements from i on, one of each channel, into `few`, 16 lanes a sum.

        The first plane begins in the middle of a vector if `lane` is not 0. Unless K is None, the
        planes of the next row, K elements on, are added with them.
        """
        zero = splat_like(few, 0.0)
        turn = i + L
        total, products = zero, zero
        if lane > 0:
            part, part_products = add_first(data, i, K, lane, numbers_of(data, 0), zero, zero)
            total, products = blend(lane, zero, part), blend(lane, zero, part_products)
            i += LANES - lane
        for j in range(channels):
            numbers = numbers_of(data, j)
            i, total, products = add_whole(data, i, K, turn, numbers, total, products)
            rest = turn - i
            next_total, next_products = zero, zero
            if rest > 0:
                if j + 1 < channels:
                    # Added up apart from what there is, so that lanes can be told apart, and so at
                    # the end, which is the same to the last bit.
                    mixed = mix(rest, numbers, numbers_of(data, j + 1))
                    part, part_products = add_one(data, i, K, mixed, zero, zero)
                    total = total + blend(rest, part, zero)
                    products = products + blend(rest, part_products, zero)
                    next_total = blend(rest, zero, part)
                    next_products = blend(rest, zero, part_products)
                    i += LANES
                else:
                    part, part_products = add_last(data, i, K, rest, numbers, zero, zero)
                    total, products = total + part, products + part_products
            keep_sums(few, j, total, products)
            total, products = next_total, next_products
            turn += L

    return run
