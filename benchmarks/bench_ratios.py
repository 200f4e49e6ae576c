"""asv: the passes beside memory's speed, np.copyto, NumPy and PyTorch, timed in turns in one run.

A ratio within one run travels from machine to machine, where a time does not. All are "how many
times as long as", so that less is better, as asv takes it, except for the fraction of the
bandwidth, which is 1 at the limit.
"""

from __future__ import annotations

from contextlib import suppress
from types import ModuleType
from typing import TYPE_CHECKING

from .quick import is_quick, leave_out
from .shapes import PASSES, SHAPE_BY_NAME

if TYPE_CHECKING:
    from .peers_problem import Contestant, Problem

# asv starts a process for each value, so what measures is imported where it measures.

# Seconds for everybody's turns at one pass over one shape.
BUDGET, FEWEST_ROUNDS = 0.5, 3
# Of shape and layout: from memory, in L2, and a dense layer.
CELLS = (
    "32x64x112x112 nchw",
    "32x64x112x112 nhwc",
    "32x256x14x14 nchw",
    "32x256x14x14 nhwc",
    "65536x64 nc",
)

Found = dict[str, dict[str, float | None]]


def _entered(problem: Problem, pass_name: str) -> list[Contestant]:
    """numbabn, whoever of the others is installed, np.copyto, and memory's probes."""
    import numpy as np

    from . import bandwidth, peers_numbabn, peers_numpy, peers_torch
    from .peers_machine import available_cpus
    from .peers_native import Missing
    from .peers_problem import Contestant, repeated

    threads = available_cpus()
    entered = list(peers_numbabn.contestants(problem, pass_name, threads))
    others: tuple[ModuleType, ...] = (peers_numpy, peers_torch)
    for module in others:
        try:
            module.version()
            if module is peers_torch:
                peers_torch.set_threads(threads)
            entered += module.contestants(problem, pass_name, threads)
        except Missing:
            continue
    layout = problem.layouts[0]
    x, out = problem.x(layout), problem.out(layout)
    copy = repeated(lambda: np.copyto(out, x))
    entered.append(Contestant("copyto", layout, "out", copy))
    for contestant in entered:
        contestant.run(1)
    with suppress(Missing):
        entered += bandwidth.probes(x, problem.dy(layout), out, threads)
    return entered


def _ratios(problem: Problem, pass_name: str) -> Found:
    """The ratios of each layout, by ``"<pass> <shape> <layout>"``."""
    from .peers_report import Race, cells_of
    from .peers_timing import race

    budget = 0.0 if is_quick() else BUDGET
    timings = race(_entered(problem, pass_name), budget=budget, min_rounds=FEWEST_ROUNDS)
    measured = Race(pass_name, problem.label, problem.nbytes, problem.layouts, timings)
    copyto = measured.fastest("copyto")
    found: Found = {}
    for cell in cells_of(measured):
        ours, torch = cell.out, cell.versus_torch
        numpy = measured.fastest(f"numpy {cell.layout}")
        found[f"{pass_name} {problem.label} {cell.layout}"] = {
            "bandwidth": cell.roofline,
            "copyto": ours / copyto if ours and copyto else None,
            "numpy": ours / numpy if ours and numpy else None,
            "torch": 1 / torch if torch else None,
        }
    return found


class Ratios:
    """Ratios of float32 passes, by pass, and shape with layout."""

    params = (list(PASSES), list(CELLS))
    param_names = ("pass", "cell")
    version = "1"
    timeout = 600
    unit = "ratio"

    def setup_cache(self) -> Found:
        """Race once for all benchmarks of the class."""
        from . import peers_numbabn
        from .peers_native import Missing
        from .peers_problem import Problem

        found: Found = {}
        try:
            peers_numbabn.version()
        except Missing:  # a commit before there was such a function
            return found
        for name in dict.fromkeys(cell.split()[0] for cell in CELLS):
            if leave_out(name):
                continue
            problem = Problem(SHAPE_BY_NAME[name].sizes)
            for pass_name in PASSES:
                found |= _ratios(problem, pass_name)
        return found

    def setup(self, found: Found, pass_name: str, cell: str) -> None:
        if not found:
            raise NotImplementedError("no batch_norm_forward")  # asv: skip
        if leave_out(cell.split()[0]):
            raise NotImplementedError("not in a quick run")  # asv: skip
        self.found = found[f"{pass_name} {cell}"]

    def _value(self, key: str) -> float:
        value = self.found[key]
        # NaN is asv's "not measured": there is no compiler, or no PyTorch.
        return float("nan") if value is None else value

    def track_fraction_of_bandwidth(self, *_: object) -> float:
        """Time to read the inputs and write the output once, over the pass's time."""
        return self._value("bandwidth")

    def track_time_over_copyto(self, *_: object) -> float:
        """Time over that of ``np.copyto(out, x)``, which is one thread's memcpy."""
        return self._value("copyto")

    def track_time_over_numpy(self, *_: object) -> float:
        """Time over that of batch norm as one writes it in NumPy."""
        return self._value("numpy")

    def track_time_over_torch(self, *_: object) -> float:
        """Time over that of PyTorch's fastest way in the same layout."""
        return self._value("torch")
