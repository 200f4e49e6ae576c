"""``python -m numbabn bench``: how fast the four passes are here, and how near memory's speed.

`problem` has the arrays of one batch norm and the ways to compute it, `roofline` moves memory as
fast as Numba's code can, `timing` times them all in turns, and `report` shows what came out. This
module is imported when the command runs, rich and matplotlib when they are needed.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numbabn
from numbabn.bench import problem, report, roofline
from numbabn.bench.problem import PASSES, Contestant, Problem
from numbabn.bench.timing import race
from numbabn.config import config

__all__ = ["run"]

# Arrays of the input's size that are alive at once: x, grad_output and out, and what
# PyTorch's and NumPy's passes make.
ARRAYS = 6
# NumPy 1's largest number of dimensions.
MOST_SIZES = 32


def run(arguments: argparse.Namespace) -> None:
    """Measure and show what the command line asks for.

    Parameters
    ----------
    arguments : argparse.Namespace
        Of ``numbabn bench``; what cannot be done is reported by ``arguments.parser.error``.
    """
    most = _most_threads()
    threads: list[int] = arguments.threads or sorted({1, most})
    _check(arguments, threads, most)
    before = numbabn.get_num_threads()
    try:
        given = Problem(arguments.shape, arguments.dtype, arguments.layout)
        rows = _measure(given, threads, arguments.against, arguments.seconds)
    except (ImportError, MemoryError) as error:
        arguments.parser.error(str(error) or "not enough memory for this shape")
    finally:
        numbabn.set_num_threads(before)

    title = f"batch norm of {given.label}, {given.layout}, {given.dtype_name}"
    if arguments.json is not None:
        found = report.as_json(given, rows, config())
        if arguments.json == "-":
            print(found)
        else:
            Path(arguments.json).write_text(found + "\n", encoding="utf-8")
    if arguments.json != "-":
        report.show(title, rows)
    if arguments.plot is not None:
        report.draw(title, rows, arguments.plot)
        print(f"wrote {arguments.plot}", file=sys.stderr)


def _most_threads() -> int:
    """Largest number that `numbabn.set_num_threads` takes."""
    import numba

    return int(numba.config.NUMBA_NUM_THREADS)


def _check(arguments: argparse.Namespace, threads: list[int], most: int) -> None:
    """Stop with one line, before anything is measured, if something cannot be done."""
    error: Callable[[str], None] = arguments.parser.error
    if max(threads) > most:
        error(f"argument --threads: at most {most} here (NUMBA_NUM_THREADS), got {max(threads)}")
    N, C, *rest = arguments.shape
    if len(arguments.shape) > MOST_SIZES:
        error(f"argument --shape: at most {MOST_SIZES} sizes, got {len(arguments.shape)}")
    if N * math.prod(rest) < 2:
        error("argument --shape: training needs more than 1 value per channel")
    needed = ARRAYS * N * C * math.prod(rest) * 8
    memory = problem.memory_bytes()
    if memory and needed > memory:
        size = f"{needed / 2**30:.0f} GiB, of {memory / 2**30:.0f} GiB"
        error(f"argument --shape: too large: takes up to {size}")
    for name in arguments.against:
        if not problem.is_installed(name):
            error(f"argument --against: {name} is not installed")
    for option in ("json", "plot"):
        path = getattr(arguments, option)
        if path is None or path == "-":
            continue
        if not _is_writable(Path(path)):
            error(f"argument --{option}: cannot write {path}")
    if arguments.plot is not None and Path(arguments.plot).suffix.lower() != ".png":
        error(f"argument --plot: expected a name ending in .png, got {arguments.plot}")
    if arguments.plot is not None and not problem.is_installed("matplotlib"):
        error("argument --plot: matplotlib is not installed (pip install 'numbabn[cli]')")


def _is_writable(path: Path) -> bool:
    """Whether a file can be written; there is none afterwards if there was none before."""
    try:
        existed = path.exists()
        with path.open("ab"):
            pass
        if not existed:
            path.unlink()
    except OSError:
        return False
    return True


def _measure(
    given: Problem, threads: list[int], against: list[str], seconds: float
) -> list[report.Row]:
    """Time everybody, one pass after the other."""
    rows = []
    with _progress() as step:
        for pass_name in PASSES:
            entered: list[Contestant] = []
            for count in threads:
                entered.append(problem.of_numbabn(given, pass_name, count))
                if "torch" in against:
                    entered.append(problem.of_torch(given, pass_name, count))
                entered += roofline.probes(given, pass_name, count)
            if "numpy" in against:
                entered.append(problem.of_numpy(given, pass_name))
            timings = race(entered, seconds, partial(step, pass_name))
            rows += report.rows(given, pass_name, timings)
    return rows


@contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """Give a function (what, share of a pass that was just done) that moves a bar on stderr."""
    if not (sys.stderr.isatty() and problem.is_installed("rich")):
        yield lambda what, share: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description:14}"), BarColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as bar:
        task = bar.add_task("", total=len(PASSES))

        def step(what: str, share: float) -> None:
            # No refresh by a thread of its own while something is timed: only here, in between.
            bar.update(task, description=what.replace("_", " "), advance=share, refresh=True)

        yield step
