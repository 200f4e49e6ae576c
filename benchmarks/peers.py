"""numbabn against other libraries and against memory itself, interleaved in one run.

    python -m benchmarks.peers [--quick] [--json F] [--plot F.png] [--filter SUBSTR] ...

Every contestant computes the same pass on the same arrays, is checked once against float64 NumPy,
and is then timed in turns with the others; the machine's bandwidth is measured among them.
Libraries that are not installed are named and left out. The parts: peers_problem (arrays, referee),
peers_timing (turns), peers_<library> (contestants), bandwidth (roofline), peers_report (tables),
peers_plot, peers_more (tiny calls, half precision, thread scaling).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from . import bandwidth, peers_jax, peers_numbabn, peers_onednn, peers_onnxruntime, peers_torch
from .peers_machine import Company, available_cpus, describe, summary
from .peers_native import Missing
from .peers_problem import PASSES, Contestant, Problem
from .peers_report import Race, as_json, report
from .peers_timing import race
from .shapes import LAYOUTS, REPRESENTATIVE, SHAPES

PEERS: dict[str, ModuleType] = {
    "numbabn": peers_numbabn,
    "torch": peers_torch,
    "onednn": peers_onednn,
    "jax": peers_jax,
    "onnxruntime": peers_onnxruntime,
}

Item = TypeVar("Item")


def words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="six shapes, fewer rounds")
    parser.add_argument("--json", type=Path, help="write all timings to this file")
    parser.add_argument("--plot", type=Path, help="draw the cells into this PNG")
    parser.add_argument("--filter", default="", help="only shapes whose name contains this")
    parser.add_argument("--passes", default=",".join(PASSES), help="default: %(default)s")
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help="of numbabn's arrays")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--threads", type=int, default=available_cpus())
    others = ",".join(name for name in PEERS if name != "numbabn")
    parser.add_argument("--against", default=others, help="default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="calls of microseconds, and threads")
    parser.add_argument("--half", action="store_true", help="float16 and bfloat16 over float32")
    options = parser.parse_args(arguments)
    options.passes, options.layouts = words(options.passes), words(options.layouts)
    options.against = words(options.against)
    for given, known in (
        (options.passes, PASSES),
        (options.layouts, LAYOUTS),
        (options.against, PEERS),
    ):
        unknown = sorted(set(given) - set(known))
        if unknown:
            parser.error(f"unknown: {', '.join(unknown)}; choose from {', '.join(known)}")
    if not 1 <= options.threads <= available_cpus():
        parser.error(f"--threads: expected 1 to {available_cpus()}, got {options.threads}")
    return options


def progress(items: Sequence[Item], describe_item: Any) -> Iterator[Item]:
    """Yield the items with a progress bar on stderr, where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield from items
        return
    with tqdm(items, file=sys.stderr, disable=None) as bar:
        for item in bar:
            bar.set_description(describe_item(item))
            yield item


def enter(
    modules: Iterable[tuple[str, ModuleType]],
    problem: Problem,
    pass_name: str,
    options: argparse.Namespace,
    complaints: dict[str, None],
) -> list[Contestant]:
    """Everybody who computes this pass, and computes it right."""
    entered = []
    where = f"{pass_name} {problem.label} {problem.dtype_name}"
    for name, module in modules:
        try:
            for contestant in module.contestants(problem, pass_name, options.threads):
                assert contestant.result is not None
                if name == "numbabn" and contestant.layout not in (*options.layouts, "nc"):
                    continue
                wrong = problem.check(pass_name, contestant.result())
                if wrong:
                    complaints[f"{contestant.name}, {where}: WRONG, not timed: {wrong}"] = None
                else:
                    entered.append(contestant)
        except Missing as reason:
            complaints[f"{name}, {pass_name}, {problem.dtype_name}: {reason}"] = None
        except Exception as error:  # one library's failure must not end everybody's run
            complaints[f"{name}, {where}: {type(error).__name__}: {error}"] = None
    return entered


def measure(
    modules: dict[str, ModuleType], options: argparse.Namespace, complaints: dict[str, None]
) -> list[Race]:
    shapes = [s for s in SHAPES if options.filter in s.name]
    if options.quick:
        shapes = [s for s in shapes if s.name in REPRESENTATIVE]
    budget, min_rounds = (1.5, 5) if options.quick else (5.0, 7)
    races: list[Race] = []
    try:
        for shape in progress(shapes, lambda s: s.name):
            problem = Problem(shape.sizes, options.dtype)
            layout = problem.layouts[0]
            for pass_name in options.passes:
                entered = enter(modules.items(), problem, pass_name, options, complaints)
                try:
                    arrays = problem.x(layout), problem.dy(layout), problem.out(layout)
                    entered += bandwidth.probes(*arrays, options.threads)
                except Missing as reason:
                    complaints[f"no roofline: {reason}"] = None
                if not entered:
                    continue
                layouts = tuple(x for x in problem.layouts if x in (*options.layouts, "nc"))
                try:
                    timings = race(entered, budget=budget, min_rounds=min_rounds)
                except Exception as error:
                    failed = f"{pass_name} {problem.label}: {type(error).__name__}: {error}"
                    complaints[failed] = None
                    continue
                notes = {c.name: c.note for c in entered if c.note}
                races.append(
                    Race(pass_name, problem.label, problem.nbytes, layouts, timings, notes)
                )
    except KeyboardInterrupt:
        print("interrupted: reporting what there is", file=sys.stderr)
    return races


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    started = time.perf_counter()
    peers_jax.prepare(options.threads)
    modules: dict[str, ModuleType] = {}
    versions: dict[str, str] = {}
    complaints: dict[str, None] = {}
    for name in ("numbabn", *options.against):
        try:
            versions[name] = PEERS[name].version()
            modules[name] = PEERS[name]
            if hasattr(PEERS[name], "set_threads"):
                PEERS[name].set_threads(options.threads)
        except Missing as reason:
            print(f"left out: {name}: {reason}")
    machine = describe(options.threads, versions)
    print(summary(machine), end="\n\n")
    found: dict[str, Any] = {"machine": machine, "dtype": options.dtype}
    company = Company()
    if options.tiny or options.half:
        from . import peers_more

        if options.tiny:
            found["tiny"] = peers_more.tiny(options.threads)
            found["threads"] = peers_more.thread_scaling(options.threads)
        if options.half:
            found["half"] = peers_more.half(options.threads)
    else:
        races = measure(modules, options, complaints)
        print(report(races))
        found |= as_json(races)
        noisy = sum(r.noisy for r in races)
        if noisy:
            complaints[f"{noisy} of {len(races)} races had hardly a quiet round: best taken"] = None
        if options.plot:
            from .peers_plot import draw

            draw(races, options.plot, title=f"{machine['cpu']}, {options.threads} threads")
            print(f"wrote {options.plot}")
    found["company"] = company.shares()
    if any(share > 0.02 for share in found["company"].values()):
        shares = ", ".join(f"{name} {share:.0%}" for name, share in found["company"].items())
        complaints[f"the processors were shared: {shares}"] = None
    for complaint in complaints:
        print(f"note: {complaint}")
    found["notes"] = list(complaints)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
        print(f"wrote {options.json}")
    print(f"{time.perf_counter() - started:.0f} s")
    return 1 if any("numbabn" in c for c in complaints) else 0


if __name__ == "__main__":
    raise SystemExit(main())
