"""Has a commit become slower? Two commits in turns on one machine, and a test that says how sure.

    python -m benchmarks.guard BASE HEAD [--bench REGEX] [--threshold 10] [--list]

Both commits' packages are unpacked into folders of their own, and run by this interpreter with the
benchmarks of this working tree. Every *pair* is two fresh processes, one of each commit, that time
the chosen benchmarks alternately; its outcome is one ratio per benchmark. What looks slower after a
few pairs is measured again in as many new pairs as the verdict needs (see guard_statistics), and
those alone decide. Exit code: 0, nothing slower; 1, something is; 2, it could not be found out.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from .guard_statistics import Verdict, is_suspect, judge, pairs_needed
from .guard_worker import Worker, benchmark_names
from .peers_native import cache_folder

__all__ = ["main"]

HERE = Path(__file__).resolve().parent
# One of each pass at three sizes: beyond the caches, within L2, and so small that calls count.
DEFAULT = r" (32x64x56x56 nchw|32x256x14x14 nhwc|1x2048x7x7 nchw) float32$"
# Pairs that look for suspects, and alternations within each pair.
FIRST_PAIRS, ROUNDS = 3, 5
MOST_BENCHMARKS = 200


def git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=HERE.parent, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"git {' '.join(arguments)}: {done.stderr.strip() or 'not found'}")
    return done.stdout.strip()


def unpack(commit: str) -> Path:
    """Folder with the package of a commit; made once, so that its kernels are compiled once.

    The folder is named after the contents of the package: two commits that differ elsewhere only
    have the same one.
    """
    tree = git("rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}:numbabn")
    folder = cache_folder() / "guard" / tree
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Complete or not there at all, also when two runs do this at once.
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            archive = Path(scratch) / "package.tar"
            git("archive", "--prefix=numbabn/", f"--output={archive}", tree)
            place = Path(scratch) / "tree"
            place.mkdir()
            subprocess.run(["tar", "-xf", archive, "-C", place], check=True)
            if not folder.exists():
                os.replace(place, folder)
    return folder


class Bench:
    """Measures pairs of processes."""

    def __init__(self, base: Path, head: Path) -> None:
        self.folders = base, head
        self.pairs = 0

    def pair(self, names: Sequence[str]) -> dict[str, float]:
        """Ratio head/base of each benchmark's time, from two fresh processes."""
        # Who starts first, and who is timed first, changes from pair to pair.
        first = self.pairs % 2
        self.pairs += 1
        workers = {side: Worker(self.folders[side]) for side in (first, 1 - first)}
        try:
            ratios = {}
            for name in names:
                for worker in workers.values():  # at the same time
                    worker.send(f"prepare {name}")
                for worker in workers.values():
                    worker.receive()
                reps = int(workers[0].ask("calibrate"))
                found = []
                # Strictly in turns, so that each always follows the other: with ABBA everybody
                # would find the caches to be their own in every second round.
                for _ in range(ROUNDS):
                    seconds = {side: worker.ask(f"time {reps}") for side, worker in workers.items()}
                    found.append(seconds[1] / seconds[0])
                ratios[name] = median(found)
            return ratios
        finally:
            for worker in workers.values():
                worker.close()

    def compile(self, names: Sequence[str]) -> None:
        """Run everything once, so that no pair compiles."""
        for folder in dict.fromkeys(self.folders):
            worker = Worker(folder)
            try:
                for name in names:
                    worker.ask(f"prepare {name}")
            finally:
                worker.close()


def compare(bench: Bench, names: Sequence[str], threshold: float) -> list[Verdict]:
    """A verdict on each benchmark."""
    bench.compile(names)
    first: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(FIRST_PAIRS):
        for name, ratio in bench.pair(names).items():
            first[name].append(ratio)
    suspects = [name for name in names if is_suspect(first[name], threshold)]
    again: dict[str, list[float]] = {name: [] for name in suspects}
    for _ in range(pairs_needed(len(suspects)) if suspects else 0):
        for name, ratio in bench.pair(suspects).items():
            again[name].append(ratio)
    return judge(first, again, threshold)


def table(verdicts: Sequence[Verdict]) -> str:
    width = max(len(v.name) for v in verdicts)
    lines = [f"{'benchmark':{width}}  head/base  pairs        p"]
    for v in sorted(verdicts, key=lambda v: (not v.slower, -v.ratio)):
        p = "" if v.p is None else f"{v.p:.4f}"
        verdict = "  SLOWER" if v.slower else ""
        lines.append(f"{v.name:{width}}  {v.ratio:9.3f}  {v.pairs:5}  {p:>7}{verdict}")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.guard", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("base", metavar="BASE", help="commit to compare with")
    parser.add_argument("head", metavar="HEAD", help="commit that may have become slower")
    parser.add_argument(
        "--bench", default=DEFAULT, metavar="REGEX",
        help="which benchmarks, by '<pass> <shape> <layout> <dtype>' (see --list)",
    )  # fmt: skip
    parser.add_argument(
        "--threshold", type=float, default=10.0, metavar="PERCENT",
        help="what counts as slower (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="name the benchmarks and stop")
    options = parser.parse_args(arguments)
    if not 0 < options.threshold < 1000:
        parser.error(f"--threshold: expected a percentage above 0, got {options.threshold:g}")
    try:
        pattern = re.compile(options.bench)
    except re.error as error:
        parser.error(f"--bench: {error}")
    options.names = [name for name in benchmark_names() if pattern.search(name)]
    if not options.names:
        parser.error(f"--bench: nothing matches {options.bench!r}")
    if len(options.names) > MOST_BENCHMARKS:
        parser.error(f"--bench: {len(options.names)} match, at most {MOST_BENCHMARKS} are sensible")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.list:
        print("\n".join(options.names))
        return 0
    started = time.perf_counter()
    try:
        bench = Bench(unpack(options.base), unpack(options.head))
        verdicts = compare(bench, options.names, options.threshold / 100)
    except RuntimeError as error:
        print(f"guard: {error}", file=sys.stderr)
        return 2
    slower = [v for v in verdicts if v.slower]
    print(table(verdicts))
    print(
        f"{len(slower)} of {len(verdicts)} benchmarks are more than {options.threshold:g} % slower"
        f" in {options.head} than in {options.base} ({time.perf_counter() - started:.0f} s)"
    )
    return 1 if slower else 0


if __name__ == "__main__":
    raise SystemExit(main())
