"""What starting costs: the import, and the first call with a warm and with a cold kernel cache.

    python -m benchmarks.startup [--rounds 11] [--check]

Every measurement is a fresh process that times itself, so that the interpreter's own start is not
counted. The two imports alternate (A B A B …) and their medians are compared, because both move
with the machine's load and the state of the file cache.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile

IMPORT = """
import time
start = time.perf_counter()
import {module}
print(time.perf_counter() - start)
"""

FIRST_FORWARD = """
import time
import numpy as np
import numbabn
x = np.random.default_rng(0).standard_normal((32, 64, 28, 28), np.float32)
mean, var = np.zeros(64, np.float32), np.ones(64, np.float32)
start = time.perf_counter()
numbabn.batch_norm(x, mean, var, training=True)
print(time.perf_counter() - start)
"""

IMPORT_RATIO_GOAL = 1.15
WARM_GOAL = 0.6  # seconds
COLD_GOAL = 6.0


def seconds(code: str, cache_dir: str) -> float:
    """Run `code` in a fresh process with its own kernel cache; it prints the seconds it took."""
    env = {**os.environ, "NUMBA_CACHE_DIR": cache_dir}
    # As installed by pip: Numba comes with its bytecode, so numbabn's must be kept as well.
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=env,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return float(done.stdout)


def measure_imports(rounds: int, cache_dir: str) -> tuple[float, float]:
    """Median seconds of ``import numba`` and of ``import numbabn``, interleaved."""
    times: dict[str, list[float]] = {"numba": [], "numbabn": []}
    for module in times:  # once unmeasured: bytecode is written, files are read
        seconds(IMPORT.format(module=module), cache_dir)
    for _ in range(rounds):
        for module, values in times.items():
            values.append(seconds(IMPORT.format(module=module), cache_dir))
    return statistics.median(times["numba"]), statistics.median(times["numbabn"])


def measure_first_forward(rounds: int) -> tuple[float, float]:
    """Median seconds of the first forward pass, with a cold and with a warm cache."""
    cold, warm = [], []
    for _ in range(max(1, rounds // 4)):
        with tempfile.TemporaryDirectory() as cache_dir:
            cold.append(seconds(FIRST_FORWARD, cache_dir))
            warm += [seconds(FIRST_FORWARD, cache_dir) for _ in range(4)]
    return statistics.median(cold), statistics.median(warm)


def main() -> None:
    """Measure and print; with ``--check``, exit with 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description="Import time and first calls, against the goals.")
    parser.add_argument("--rounds", type=int, default=11, help="imports timed of each (default 11)")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a goal is missed")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds: expected 1 or more")

    cold, warm = measure_first_forward(arguments.rounds)
    with tempfile.TemporaryDirectory() as cache_dir:
        numba, numbabn = measure_imports(arguments.rounds, cache_dir)

    print(f"import numba                    {numba:7.3f} s")
    print(f"import numbabn                  {numbabn:7.3f} s")
    rows = (
        ("import numbabn / import numba", numbabn / numba, IMPORT_RATIO_GOAL, "×"),
        ("first forward, warm cache", warm, WARM_GOAL, "s"),
        ("first forward, cold cache", cold, COLD_GOAL, "s"),
    )
    for name, value, goal, unit in rows:
        verdict = "within" if value <= goal else "OVER"
        print(f"{name:30}  {value:7.3f} {unit}   {verdict} the goal of {goal:g} {unit}")
    if arguments.check and any(value > goal for _, value, goal, _ in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
