"""asv: what more threads gain, from one to all: time with one over time with several, in turns."""

from __future__ import annotations

from .shapes import PASSES

# The same on every machine, so that results of different ones lie on one axis.
THREADS = (1, 2, 4, 8, 16, 32, 64)
SHAPE = "32x64x56x56"


def _seconds(pass_name: str) -> dict[int, float]:
    """Typical time of a pass by number of threads, as many as there are processors."""
    from contextlib import contextmanager
    from dataclasses import replace
    from functools import partial

    from .peers_machine import available_cpus
    from .peers_numbabn import set_threads
    from .peers_timing import race
    from .suite import cell

    @contextmanager
    def threads(count: int):  # type: ignore[no-untyped-def]
        set_threads(count)
        yield

    contestant = cell(pass_name, SHAPE, "nchw")
    entered = {
        count: replace(contestant, kind=str(count), setting=partial(threads, count))
        for count in THREADS
        if count <= available_cpus()
    }
    for each in entered.values():
        with each.setting():
            each.run(1)  # the kernels for one thread are not those for several
    timings = race(list(entered.values()), budget=0.5)
    return {count: timings[each.name].typical for count, each in entered.items()}


class Threads:
    """Gain of threads, by pass and number of threads."""

    params = (list(PASSES), list(THREADS))
    param_names = ("pass", "threads")
    version = "1"
    timeout = 300
    unit = "× the speed of 1 thread"

    def setup_cache(self) -> dict[str, dict[int, float]]:
        """Race once for all benchmarks of the class."""
        try:
            return {pass_name: _seconds(pass_name) for pass_name in PASSES}
        except NotImplementedError:  # a commit before there was such a function
            return {}

    def setup(self, found: dict[str, dict[int, float]], pass_name: str, threads: int) -> None:
        if threads not in found.get(pass_name, ()):
            raise NotImplementedError("more threads than processors")  # asv: skip

    def track_speedup(
        self, found: dict[str, dict[int, float]], pass_name: str, threads: int
    ) -> float:
        return found[pass_name][1] / found[pass_name][threads]
