"""What every test runs under: four possible threads, two in use, and few hypothesis examples.

``NUMBA_NUM_THREADS`` is the most threads that Numba will ever start, and it is read when Numba is
imported; so it is set here, before any test module imports anything. It is larger than most test
machines' core count, because results are compared bitwise between 1, 2, 3 and 4 threads.
"""

import os

os.environ.setdefault("NUMBA_NUM_THREADS", "4")

import numba
import pytest
from hypothesis import HealthCheck, settings

import numbabn
from numbabn.cpu import caches, schedule, ways

numbabn.set_num_threads(min(2, numba.config.NUMBA_NUM_THREADS))

# No deadline: the first example of a kind compiles its kernels, which takes seconds.
_common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "database": None}
settings.register_profile("default", max_examples=40, **_common)
settings.register_profile("ci", max_examples=40, derandomize=True, **_common)
settings.register_profile("thorough", max_examples=2000, **_common)
settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "default")
)


@pytest.fixture
def set_threads():
    """A function that sets the number of threads; the number from before comes back at the end."""
    before = numbabn.get_num_threads()
    yield numbabn.set_num_threads
    numbabn.set_num_threads(before)


@pytest.fixture
def on_machine(monkeypatch):
    """Have plans made for other caches than this machine's."""

    def use(found):
        monkeypatch.setattr(schedule, "caches", lambda: found)
        monkeypatch.setattr(caches, "caches", lambda: found)
        caches._last_cache.cache_clear()
        ways.forget_plans()

    yield use
    monkeypatch.undo()
    caches._last_cache.cache_clear()
    ways.forget_plans()


@pytest.fixture
def accuracy_row(record_property):
    """A function that records one cell of the accuracy table: our error and PyTorch's, in ulp."""

    def record(table, distribution, quantity, ours, theirs):
        theirs = None if theirs is None else float(theirs)
        record_property("accuracy", [table, distribution, quantity, float(ours), theirs])

    return record


def pytest_terminal_summary(terminalreporter):
    """Print the errors of the accuracy suite beside PyTorch's on the same data."""
    # Reports carry the cells (not a global list), so that they arrive from xdist's workers too.
    cells = {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, value in getattr(report, "user_properties", []):
                if name == "accuracy" and report.when == "call":
                    *key, ours, theirs = value
                    mine, peers = cells.setdefault(tuple(key), ([], []))
                    mine.append(ours)
                    if theirs is not None:
                        peers.append(theirs)
    if not cells:
        return

    def worst(errors):
        # A NaN is the worst error of all, and max() could lose it.
        return f"{max(errors, key=lambda e: (e != e, e)):.3g}" if errors else "-"

    write = terminalreporter.write_line
    terminalreporter.section("largest error, in ulp of the channel's largest value")
    tables, distributions, quantities = (sorted({key[i] for key in cells}) for i in range(3))
    for table in tables:
        write(f"{table:26}" + "".join(f"{q + ': ours':>14}{'PyTorch':>10}" for q in quantities))
        for distribution in distributions:
            line = f"  {distribution:24}"
            for quantity in quantities:
                mine, peers = cells.get((table, distribution, quantity), ([], []))
                line += f"{worst(mine):>14}{worst(peers):>10}"
            write(line)
