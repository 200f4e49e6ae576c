"""Timing in turns: everybody once per round, so that what disturbs one disturbs all."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from statistics import median

from numbabn.bench.problem import Contestant

__all__ = ["race"]

# Shortest time that one timing takes, by repeating the call.
MIN_SECONDS = 1e-3
# Idle threads of OpenMP spin for a while before they sleep; the next contestant starts after that.
PAUSE_SECONDS = 2e-3
FEWEST_ROUNDS, MOST_ROUNDS = 3, 50
# Whoever takes so many times as long as the fastest is timed in the first rounds only.
HOPELESS = 20


def _timed(contestant: Contestant, reps: int) -> float:
    """Seconds per call, after a call that wakes the threads."""
    contestant.prepare()
    contestant.run()
    start = time.perf_counter()
    for _ in range(reps):
        contestant.run()
    return (time.perf_counter() - start) / reps


def race(
    contestants: Sequence[Contestant],
    seconds: float,
    progress: Callable[[float], object] = lambda share: None,
) -> list[tuple[Contestant, float]]:
    """Time contestants in turns, after a first call of each, which may compile.

    Parameters
    ----------
    contestants : sequence of Contestant
        Whom to time.
    seconds : float
        How long rounds go on, though there are at least a few.
    progress : callable
        Called between timings with the share of all the work that was just done.

    Returns
    -------
    list of (Contestant, float)
        With the median of seconds per call.
    """
    reps, estimates = [], []
    for contestant in contestants:
        contestant.prepare()
        contestant.run()
        once = min(_timed(contestant, 1) for _ in range(2))
        reps.append(max(1, math.ceil(MIN_SECONDS / max(once, 1e-7))))
        estimates.append(once)
    limit = HOPELESS * min(estimates)
    samples: list[list[float]] = [[] for _ in contestants]
    done = 0.0
    start = time.perf_counter()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(MOST_ROUNDS):
            elapsed = time.perf_counter() - start
            if elapsed > seconds and turn >= FEWEST_ROUNDS:
                break
            share = max(done, min(1.0, elapsed / seconds))
            progress(share - done)
            done = share
            order = range(len(contestants))
            # Every other round runs backwards, so that nobody always follows the same neighbour.
            for i in order if turn % 2 == 0 else reversed(order):
                if estimates[i] <= limit or turn < FEWEST_ROUNDS:
                    time.sleep(PAUSE_SECONDS)
                    samples[i].append(_timed(contestants[i], reps[i]))
    finally:
        if collecting:
            gc.enable()
    progress(1 - done)
    return [(c, median(s)) for c, s in zip(contestants, samples, strict=True)]
