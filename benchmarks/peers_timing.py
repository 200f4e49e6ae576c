"""Interleaved timing: every contestant once per round, medians over the quiet rounds.

What else the machine does then falls on all contestants alike, and so does a clock that drifts. A
round in which other processes kept the processors busy is measured again while time allows: an
OpenMP barrier that waits for a thread without a core says nothing about the kernel.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from .peers_machine import Company
from .peers_problem import Contestant

__all__ = ["Timing", "race"]

MIN_SECONDS = 1e-3
# Every contestant runs that long before it is timed. The others have emptied the caches, and a last
# level that takes what the others drop (AMD's) fills slowly: passes over 13 MB need eight calls, of
# 0.1 to 0.6 ms, until they run at their own speed, those over 19 MB up to twenty.
SETTLE_SECONDS = 8e-3
# Times that long are not the work of one hiccup.
HICCUP = 20
# Idle threads of the libraries' pools spin for a while before they sleep; the next contestant
# starts when they have.
PAUSE_SECONDS = 2e-3
MAX_ROUNDS = 15
# Share of the processors that others may take in a quiet round; accounting is in ticks of 10 ms.
QUIET = 0.15
FEWEST_QUIET = 3
# How far the time for a race may stretch in search of quiet rounds.
PATIENCE = 3
# Whoever takes so many times as long as the fastest is timed in the first rounds only.
HOPELESS, HOPELESS_ROUNDS = 30, 5


@dataclass
class Timing:
    """Seconds per call of one contestant, one value per round, and which rounds were quiet."""

    reps: int = 1
    seconds: list[float] = field(default_factory=list)
    quiet: list[bool] = field(default_factory=list)

    @property
    def typical(self) -> float:
        """Median of the quiet rounds; where there were hardly any, the round that came nearest."""
        if self.noisy:
            return self.best
        return median(s for s, quiet in zip(self.seconds, self.quiet, strict=True) if quiet)

    @property
    def noisy(self) -> bool:
        return sum(self.quiet) < FEWEST_QUIET

    @property
    def best(self) -> float:
        return min(self.seconds)


def timed(contestant: Contestant, reps: int) -> float:
    """Seconds per call, after the calls that wake the threads and fill the caches."""
    with contestant.setting():
        settle(contestant, max(1, reps // 4))
        return clocked(contestant, reps)


def settle(contestant: Contestant, reps: int) -> None:
    start = time.perf_counter()
    while time.perf_counter() - start < SETTLE_SECONDS:
        contestant.run(reps)


def clocked(contestant: Contestant, reps: int) -> float:
    start = time.perf_counter()
    contestant.run(reps)
    return (time.perf_counter() - start) / reps


def calibrate(contestant: Contestant) -> tuple[int, float]:
    """Calls that together take at least the shortest time worth measuring, and seconds per call."""
    reps = 1
    while True:
        seconds = timed(contestant, reps) * reps
        if MIN_SECONDS <= seconds < HICCUP * MIN_SECONDS:  # a thread may have been slow to wake
            seconds = min(seconds, *(timed(contestant, reps) * reps for _ in range(2)))
        if seconds >= MIN_SECONDS:
            return reps, seconds / reps
        reps = max(reps + 1, math.ceil(1.2 * reps * MIN_SECONDS / max(seconds, 1e-7)))


def race(
    contestants: Sequence[Contestant], *, budget: float, min_rounds: int = 5
) -> dict[str, Timing]:
    """Time contestants in turns.

    Parameters
    ----------
    contestants : sequence of Contestant
        All of them have run once already.
    budget : float
        Seconds after which no further round starts, once there were `min_rounds`.
    min_rounds : int
        Fewest timings of each contestant.

    Returns
    -------
    dict
        A `Timing` by contestant's name.
    """
    calibrated = {c.name: calibrate(c) for c in contestants}
    timings = {name: Timing(reps) for name, (reps, _) in calibrated.items()}
    limit = HOPELESS * min(seconds for _, seconds in calibrated.values())
    hopeless = {name for name, (_, seconds) in calibrated.items() if seconds > limit}
    enabled = gc.isenabled()
    gc.disable()
    start = time.perf_counter()
    rounds = quiet_rounds = 0
    try:
        while quiet_rounds < MAX_ROUNDS:
            elapsed = time.perf_counter() - start
            if elapsed > budget and quiet_rounds >= min_rounds:
                break
            if elapsed > PATIENCE * budget and rounds >= min_rounds:
                break
            # Every other round runs backwards, so that nobody always follows the same neighbour.
            order = contestants if rounds % 2 == 0 else contestants[::-1]
            running = [c for c in order if rounds < HOPELESS_ROUNDS or c.name not in hopeless]
            company = Company()
            for contestant in running:
                timing = timings[contestant.name]
                time.sleep(PAUSE_SECONDS)
                timing.seconds.append(timed(contestant, timing.reps))
            quiet = company.shares().get("others", 0.0) <= QUIET
            for contestant in running:
                timings[contestant.name].quiet.append(quiet)
            rounds += 1
            quiet_rounds += quiet
    finally:
        if enabled:
            gc.enable()
    return timings
