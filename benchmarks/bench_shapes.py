"""asv: the geometric mean of a pass's time over the whole list of shapes, by layout.

One process measures them all, where bench_passes takes one for each cell: so that no shape goes
unwatched, though what stands out here has to be looked for with benchmarks/peers.py.
"""

from __future__ import annotations

from .quick import leave_out
from .shapes import LAYOUTS, PASSES, SHAPES


class AllShapes:
    """Seconds, by pass and layout; dense layers are among both."""

    params = (list(PASSES), list(LAYOUTS))
    param_names = ("pass", "layout")
    version = "1"
    timeout = 600
    unit = "seconds"

    def setup_cache(self) -> dict[str, float]:
        """Time every pass over every shape."""
        from .peers_report import geometric_mean
        from .peers_timing import race
        from .suite import cell

        times: dict[str, list[float]] = {}
        try:
            for shape in (shape for shape in SHAPES if not leave_out(shape.name)):
                for pass_name in PASSES:
                    for layout in shape.layouts:
                        contestant = cell(pass_name, shape.name, layout)
                        timing = race([contestant], budget=0.05, min_rounds=3)[contestant.name]
                        for alike in LAYOUTS if len(shape.layouts) == 1 else (layout,):
                            times.setdefault(f"{pass_name} {alike}", []).append(timing.typical)
        except NotImplementedError:  # a commit before there was such a function
            return {}
        return {key: geometric_mean(values) or 0.0 for key, values in times.items()}

    def setup(self, found: dict[str, float], pass_name: str, layout: str) -> None:
        if not found:
            raise NotImplementedError("no batch_norm_forward")  # asv: skip

    def track_mean_time(self, found: dict[str, float], pass_name: str, layout: str) -> float:
        return found[f"{pass_name} {layout}"]
