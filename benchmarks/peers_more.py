"""Three questions beside the table: tiny calls, half precision, and one thread against several.

Each is a small race of its own (see peers_timing), printed as a table and returned as plain data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import bandwidth, peers_numbabn
from .peers_machine import cache_bytes
from .peers_native import Missing, optional
from .peers_problem import EPS, MOMENTUM, PASSES, Contestant, Problem, repeated
from .peers_report import number, table
from .peers_timing import Timing, race
from .peers_torch import to_torch

__all__ = ["half", "thread_scaling", "tiny"]

# Per channel one value in eval; training needs more than one.
TINY_EVAL = (1, 64, 1, 1)
TINY_TRAIN = (8, 64, 1, 1)
# 103 MB in float32, 51 MB in half precision: from memory in both.
BIG_SHAPE = (32, 64, 112, 112)
# Share of L3 that a pass's arrays may take to count as fitting it.
L3_SHARE = 0.75
SCALING_SHAPES = ((32, 256, 14, 14), (32, 512, 7, 7), (1, 64, 112, 112), (4096, 256))


def contestant(peer: str, kind: str, call: Callable[[], object]) -> Contestant:
    return Contestant(peer, "", kind, repeated(call))


def tiny(threads: int) -> dict[str, Any]:
    """Microseconds of calls so small that only what surrounds the kernel counts."""
    entered: list[Contestant] = []
    for module in (_tiny_numbabn, _tiny_torch):
        try:
            entered += module(threads)
        except Missing as reason:
            print(f"left out: {reason}")
    for c in entered:
        c.run(100)
    timings = race(entered, budget=10.0, min_rounds=15)
    print(f"## Tiny calls: eval forward {TINY_EVAL}, training {TINY_TRAIN}\n")
    rows = [[name, number(t.typical * 1e6), number(t.best * 1e6)] for name, t in timings.items()]
    print(table(["µs per call", "typical", "best"], rows), end="\n\n")
    ratios = {}
    for kind in ("eval forward", "training forward+backward"):
        theirs = timings.get(f"torch {kind}")
        for ours in ("out", "fresh"):
            mine = timings.get(f"numbabn {kind}, {ours}")
            if mine and theirs:
                ratios[f"{kind}, {ours}"] = mine.typical / theirs.typical
    for name, value in ratios.items():
        print(f"numbabn / torch, {name}: {value:.2f}")
    print()
    return {"seconds": _plain(timings), "numbabn_over_torch": ratios}


def _tiny_numbabn(threads: int) -> list[Contestant]:
    peers_numbabn.version()
    peers_numbabn.set_threads(threads)
    bn = optional("numbabn")
    a, b = Problem(TINY_EVAL), Problem(TINY_TRAIN)
    x, y = a.x("nchw"), a.out("nchw")
    eval_ = (x, a.running_mean, a.running_var, a.weight, a.bias, False, MOMENTUM, EPS)
    x_train, dy, y_train = b.x("nchw"), b.dy("nchw"), b.out("nchw")
    dx = np.empty_like(dy)
    stats = (b.running_mean.copy(), b.running_var.copy())
    train = (x_train, *stats, b.weight, b.bias, True, MOMENTUM, EPS)

    def both_ways(out: Any, dx: Any) -> Any:
        _, saved = bn.batch_norm_forward(*train, out=out)
        return bn.batch_norm_backward(dy, saved, out=dx)

    return [
        contestant("numbabn", "eval forward, out", lambda: bn.batch_norm(*eval_, out=y)),
        contestant("numbabn", "eval forward, fresh", lambda: bn.batch_norm(*eval_)),
        contestant("numbabn", "training forward+backward, out", lambda: both_ways(y_train, dx)),
        contestant("numbabn", "training forward+backward, fresh", lambda: both_ways(None, None)),
    ]


def _tiny_torch(threads: int) -> list[Contestant]:
    torch = optional("torch")
    torch.set_num_threads(threads)
    a, b = Problem(TINY_EVAL), Problem(TINY_TRAIN)
    x, *eval_ = map(to_torch, (a.x("nchw"), a.running_mean, a.running_var, a.weight, a.bias))
    x_train, dy = to_torch(b.x("nchw")), to_torch(b.dy("nchw"))
    weight, bias = to_torch(b.weight), to_torch(b.bias)
    stats = (to_torch(b.running_mean).clone(), to_torch(b.running_var).clone())
    batch_norm, native = torch.nn.functional.batch_norm, torch.native_batch_norm
    native_backward = torch.ops.aten.native_batch_norm_backward.default

    def both_ways() -> Any:
        _, mean, invstd = native(x_train, weight, bias, *stats, True, MOMENTUM, EPS)
        mask = [True, True, True]
        return native_backward(dy, x_train, weight, *stats, mean, invstd, True, EPS, mask)

    return [
        contestant("torch", "eval forward", lambda: batch_norm(x, *eval_, False, MOMENTUM, EPS)),
        contestant("torch", "training forward+backward", both_ways),
    ]


def _plain(timings: dict[str, Timing]) -> dict[str, float]:
    return {name: t.typical for name, t in timings.items()}


def thread_scaling(threads: int) -> dict[str, Any]:
    """How much faster all threads are than one, where the arrays of a pass fit in L3."""
    print(f"## {threads} threads over 1, arrays within L3\n")
    limit = L3_SHARE * (cache_bytes(3) or 16 << 20)
    rows, found = [], {}
    for pass_name in PASSES:
        arrays = 2 if pass_name.startswith("forward") else 3
        for shape in SCALING_SHAPES:
            problem = Problem(shape)
            if arrays * problem.nbytes > limit:
                continue
            entered = [_with_threads(c, n) for n in (1, threads) for c in _probes(problem, n)]
            try:
                for c in peers_numbabn.contestants(problem, pass_name, threads):
                    if c.kind == "out":
                        entered += [_with_threads(c, n) for n in (1, threads)]
            except Missing as reason:
                print(f"left out: {reason}")
                return {}
            for c in entered:
                c.run(1)
            timings = race(entered, budget=1.0, min_rounds=9)
            names = dict.fromkeys(c.name.rsplit(",", 1)[0] for c in entered)
            row = [f"{pass_name} {problem.label}"]
            for layout in (problem.layouts * 2)[:2]:
                one, all_ = (timings[f"numbabn {layout} out, {n}"].typical for n in (1, threads))
                row.append(number(one / all_))
            for name in names:
                one, all_ = (timings[f"{name}, {n}"].typical for n in (1, threads))
                found[f"{pass_name} {problem.label} {name}"] = one / all_
            probe = "copy" if arrays == 2 else "triad"
            row.append(number(found[f"{pass_name} {problem.label} memory {probe}"]))
            rows.append(row)
    print(table(["speedup", "nchw (or nc)", "nhwc (or nc)", "memory"], rows), end="\n\n")
    return found


def _probes(problem: Problem, threads: int) -> list[Contestant]:
    layout = problem.layouts[0]
    arrays = problem.x(layout), problem.dy(layout), problem.out(layout)
    try:
        probes = list(bandwidth.probes(*arrays, threads))
    except Missing:
        return []
    return [c for c in probes if c.kind in ("copy", "triad")]


def _with_threads(base: Contestant, threads: int) -> Contestant:
    """The same contestant with a thread count of its own (a probe was built with one)."""

    def run(reps: int) -> None:
        if base.peer == "numbabn":
            peers_numbabn.set_threads(threads)
        base.run(reps)

    return Contestant(base.peer, base.layout, f"{base.kind}, {threads}", run)


def half(threads: int) -> dict[str, Any]:
    """Speed in half precision over float32 on a tensor that comes from memory."""
    print(f"## Half precision: {BIG_SHAPE}, speed over float32, outputs given\n")
    rows, found = [], {}
    for pass_name in PASSES:
        for layout in ("nchw", "nhwc"):
            entered: list[Contestant] = []
            for dtype in ("float32", "float16", "bfloat16"):
                problem = Problem(BIG_SHAPE, dtype)
                try:
                    entered += [
                        Contestant(c.peer, layout, dtype, c.run)
                        for c in peers_numbabn.contestants(problem, pass_name, threads, (layout,))
                        if c.kind == "out"
                    ]
                except Missing as reason:
                    print(f"left out: {dtype}: {reason}")
            if not entered:
                return {}
            for c in entered:
                c.run(1)
            timings = race(entered, budget=1.0, min_rounds=9)
            times = {c.kind: timings[c.name].typical for c in entered}
            row = [f"{pass_name} {layout}", number(times["float32"] * 1e3)]
            for dtype in ("float16", "bfloat16"):
                speed = times["float32"] / times[dtype] if dtype in times else None
                row.append(number(speed))
                found[f"{pass_name} {layout} {dtype}"] = speed
            rows.append(row)
    print(table(["pass", "float32 ms", "float16", "bfloat16"], rows), end="\n\n")
    return found
