"""How work is cut up follows from the machine's caches; what comes out does not."""

import numpy as np
import pytest
from support import same_bits

import numbabn
from numbabn.cpu import launch, schedule
from numbabn.cpu.caches import Caches
from numbabn.layout import View

KIB, MIB = 1 << 10, 1 << 20
# A core of a server whose L3 is shared by many, one that has much of it, and two that have hardly
# any cache, or all there is.
MACHINES = {
    "server": Caches(2 * MIB, 96 * MIB, 48),
    "few cores": Caches(1 * MIB, 32 * MIB, 2),
    "no caches": Caches(16 * KIB, 64 * KIB, 4),
    "all in cache": Caches(1 << 40, 1 << 50, 1),
}


def group_of(N, C, L, itemsize=4):
    plan = schedule.plan(View(False, N, C, L, None), itemsize, 2)
    assert plan.forward_sizes[6] == plan.backward_sizes[6]
    return plan.forward_sizes[6]


def test_short_planes_are_trained_sixteen_channels_at_a_time(on_machine):
    on_machine(MACHINES["few cores"])
    # Channels of 6 to 196 KiB; 16 are at most a quarter of a core's share of the last cache.
    for N, L in ((32, 49), (32, 196), (128, 196), (256, 196)):
        assert group_of(N, 64, L) == 16
    assert group_of(4096, 64, 196) == 1
    # Long planes stay in a quarter of L2.
    assert group_of(32, 64, 784) == 256 * KIB // (32 * 784 * 4)


def test_groups_stay_in_l2_where_many_cores_share_the_last_cache(on_machine):
    on_machine(MACHINES["server"])
    assert group_of(32, 64, 196) == 16
    assert group_of(256, 64, 196) == 1 * MIB // (256 * 196 * 4)
    assert group_of(32, 64, 784) == 512 * KIB // (32 * 784 * 4)


def test_the_next_channel_is_fetched_where_both_fit_the_last_cache(on_machine):
    on_machine(Caches(512 * KIB, 8 * MIB, 2))
    L = 12544
    for N, forward, backward in ((32, L, 0), (16, L, L), (48, 0, 0)):
        plan = schedule.plan(View(False, N, 64, L, None), 4, 2)
        assert (plan.forward_sizes[-1], plan.backward_sizes[-1]) == (forward, backward)


def test_columns_are_asked_for_ahead_where_they_outgrow_l2(on_machine):
    on_machine(MACHINES["few cores"])

    def hints(M, threads):
        plan = schedule.plan(View(True, M, 512, 1, None), 4, threads)
        return plan.stats_sizes[-1], plan.sums_sizes[-1]

    ahead = schedule.AHEAD // 4
    assert hints(512, 1) == (0, ahead)  # 1 MiB of x, and of the gradient with it
    assert hints(513, 1) == (ahead, ahead)
    assert hints(512, 2) == (0, 0)
    assert hints(1025, 2) == (ahead, ahead)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((70, 40, 7, 7), 1),
        ((13, 35, 14, 14), 1),
        ((5, 20, 31, 31), 1),
        ((120, 24, 5, 5), 1),
        ((460, 300), 1),
        ((301, 512), 1),
        ((200, 1040), 1),
    ],
    ids=["7x7", "14x14", "31x31", "5x5", "rows", "rows of 2 KiB", "long rows"],
)
@pytest.mark.parametrize("options", [{}, {"activation": "relu"}], ids=["", "relu"])
def test_caches_change_no_bit(on_machine, shape, axis, options):
    assert np.prod(shape) >= launch.PARALLEL_FROM["omp"]  # for several threads
    rng = np.random.default_rng(5)
    x, dy = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    C = shape[axis]
    weight, bias = (rng.uniform(0.5, 1.5, C).astype(np.float32) for _ in range(2))
    found = []
    for machine in MACHINES.values():
        on_machine(machine)
        results = []
        for training in (True, False):
            mean, var = np.full(C, 0.25, np.float32), np.full(C, 2, np.float32)
            y, saved = numbabn.batch_norm_forward(
                x, mean, var, weight, bias, training=training, channel_axis=axis, **options
            )
            results += [y, mean, var, *numbabn.batch_norm_backward(dy, saved)]
        found.append(results)
    for results in found[1:]:
        for a, b in zip(found[0], results, strict=True):
            assert same_bits(a, b)
