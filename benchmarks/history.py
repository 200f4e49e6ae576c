"""Results of commits of the past, for the repository: asv with what one has to remember each time.

    python -m benchmarks.history [COMMIT ...] [--machine NAME] [--bench REGEX] [--all]

describes the machine (processor, caches, memory), then runs `asv run` on the commits, each built
into asv's environment with the versions that asv.conf.json pins. Without commits they are the last
ones that changed kernels. Results land in benchmarks/results, which is tracked.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .peers_machine import caches
from .peers_native import cpu_model

__all__ = ["kernel_commits", "machine_fields"]

ROOT = Path(__file__).resolve().parents[1]
# What decides how fast a call is.
KERNELS = (
    "numbabn/cpu",
    "numbabn/functional.py",
    "numbabn/backward.py",
    "numbabn/calls.py",
    "numbabn/layout.py",
)
# Ratios, whose one race has every pass, calls, and two shapes' times: a minute and a half a commit.
SUBSET = (
    r"^bench_(calls|ratios)\.|^bench_startup\.FirstCall|^bench_memory\..*_step"
    r"|^bench_passes\.(Forward|Backward)(Train|Eval)\.time_pass\('32x(64x112x112|256x14x14)'"
)


def kernel_commits(count: int) -> list[str]:
    """Hashes of the last commits that changed kernels, newest first."""
    command = ["git", "log", f"--max-count={count}", "--format=%H", "--", *KERNELS]
    return subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()


def full_hash(commit: str) -> str:
    command = ["git", "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"history: no such commit: {commit}")
    return done.stdout.strip()


def machine_fields() -> dict[str, str]:
    """What asv records of a machine, with its caches, and its memory in GiB."""
    levels = ", ".join(f"{level} {size}" for level, size in caches().items())
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "os": f"{platform.system()} {platform.release()}",
        "arch": platform.machine(),
        "cpu": f"{cpu_model()}; caches: {levels or 'unknown'}",
        "num_cpu": str(os.cpu_count()),
        "ram": f"{pages / 2**30:.1f} GiB",
    }


def asv(*arguments: str) -> int:
    return subprocess.run(
        [sys.executable, "-m", "asv", *arguments], cwd=ROOT, check=False
    ).returncode


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.history", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("commits", nargs="*", metavar="COMMIT")
    parser.add_argument(
        "--last", type=int, default=6, metavar="N",
        help="without COMMIT: so many that changed kernels (default: %(default)s)",
    )  # fmt: skip
    default = re.sub(r"[^a-z0-9]+", "-", f"{cpu_model()}-{os.cpu_count()}-cpus".lower()).strip("-")
    parser.add_argument("--machine", default=default, help="its name (default: %(default)s)")
    parser.add_argument("--bench", default=SUBSET, metavar="REGEX", help="which benchmarks")
    parser.add_argument("--all", action="store_true", help="the whole suite")
    parser.add_argument("--quick", action="store_true", help="run each benchmark once")
    options = parser.parse_args(arguments)
    if options.last < 1:
        parser.error(f"--last: expected 1 or more, got {options.last}")
    commits = [full_hash(c) for c in options.commits] or kernel_commits(options.last)

    fields = machine_fields()
    described = [word for name, value in fields.items() for word in (f"--{name}", value)]
    failed = asv("machine", "--yes", "--machine", options.machine, *described)
    if failed:
        return failed
    with tempfile.TemporaryDirectory() as folder:
        hashes = Path(folder) / "commits"
        hashes.write_text("".join(f"{commit}\n" for commit in commits))
        command = ["run", f"HASHFILE:{hashes}", "--machine", options.machine]
        command += ["--skip-existing-successful", "--show-stderr"]
        if not options.all:
            command += ["--bench", options.bench]
        if options.quick:
            command += ["--quick"]
        return asv(*command)


if __name__ == "__main__":
    raise SystemExit(main())
