"""From timings to numbers one can judge: ratios, fractions of the roofline, tables.

A *race* is one pass over one shape with everybody's timings; a *cell* is numbabn in one layout
within a race. Ratios are above 1 where numbabn is faster.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .bandwidth import PROBES, gigabytes_per_second
from .peers_problem import PASSES
from .peers_timing import Timing

__all__ = ["BIG", "Cell", "Race", "as_json", "cells_of", "geometric_mean", "report", "table"]

# Tensors from here on come from memory, not from cache, on the machines that this is for.
BIG = 50_000_000


@dataclass
class Race:
    """One pass over one shape: seconds per call by contestant's name."""

    pass_name: str
    shape: str
    nbytes: int
    layouts: tuple[str, ...]
    timings: dict[str, Timing]
    notes: dict[str, str] = field(default_factory=dict)

    def seconds(self, name: str) -> float | None:
        timing = self.timings.get(name)
        return timing.typical if timing else None

    @property
    def noisy(self) -> bool:
        """Whether other processes kept the processors busy throughout."""
        return all(timing.noisy for timing in self.timings.values())

    def fastest(self, prefix: str) -> float | None:
        found = [t.typical for name, t in self.timings.items() if name.startswith(prefix)]
        return min(found, default=None)


@dataclass(frozen=True)
class Cell:
    """numbabn in one layout of a race; None where something was not measured.

    Attributes
    ----------
    out, fresh : float
        Seconds with the output given, and without.
    best_peer : str
        The fastest contestant of another library, in any layout.
    versus_best : float
        Its time over `out`.
    versus_torch : float
        PyTorch's fastest way in the same layout, outputs given or not, over `out`.
    versus_torch_fresh : float
        Like for like without outputs given: PyTorch's time over `fresh`.
    roofline : float
        Time to move the least bytes at the bandwidth measured beside it, over `out`.
    roofline_two_reads : float
        The same where the inputs are read once more for the statistics (channels-last training).
    """

    pass_name: str
    shape: str
    layout: str
    nbytes: int
    out: float | None
    fresh: float | None
    best_peer: str
    versus_best: float | None
    versus_torch: float | None
    versus_torch_fresh: float | None
    roofline: float | None
    roofline_two_reads: float | None

    @property
    def fresh_over_out(self) -> float | None:
        return ratio(self.fresh, self.out)


def ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b is not None else None


def least_seconds(race: Race) -> tuple[float | None, float | None]:
    """Roofline of a race: inputs read once, and the same with inputs read once more before.

    Forward moves 1 read and 1 write per element and backward 2 and 1, so the first is the faster
    of the copies or triads of the same size. A second read comes before any write, since the
    statistics need all of it: its time is added at the speed of reading.
    """
    forward = race.pass_name.startswith("forward")
    once = race.fastest("memory copy" if forward else "memory triad")
    read = race.seconds("memory read")
    if once is None or read is None:
        return once, None
    return once, once + read * (1 if forward else 2)


def cells_of(race: Race) -> list[Cell]:
    """One cell for each layout of a race."""
    others = {
        name: timing.typical
        for name, timing in race.timings.items()
        if not name.startswith(("numbabn", "memory"))
    }
    best_peer = min(others, key=others.__getitem__, default="")
    once, twice = least_seconds(race)
    cells = []
    for layout in race.layouts:
        out, fresh = race.seconds(f"numbabn {layout} out"), race.seconds(f"numbabn {layout} fresh")
        two_reads = race.pass_name.endswith("train") and layout in ("nhwc", "nc")
        cells.append(
            Cell(
                pass_name=race.pass_name,
                shape=race.shape,
                layout=layout,
                nbytes=race.nbytes,
                out=out,
                fresh=fresh,
                best_peer=best_peer,
                versus_best=ratio(others.get(best_peer), out),
                versus_torch=ratio(race.fastest(f"torch {layout}"), out),
                versus_torch_fresh=ratio(race.seconds(f"torch {layout} fresh"), fresh),
                roofline=ratio(once, out),
                roofline_two_reads=ratio(twice, out) if two_reads else None,
            )
        )
    return cells


def geometric_mean(values: Iterable[float | None]) -> float | None:
    logs = [math.log(v) for v in values if v is not None]
    return math.exp(sum(logs) / len(logs)) if logs else None


def number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value * 1e3:.3g}" if value < 1 else f"{value * 1e3:.0f}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Aligned Markdown table: text to the left in the first column, numbers to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def text(line: Sequence[str]) -> str:
        first, *rest = line
        padded = [first.ljust(widths[0])]
        padded += [item.rjust(width) for item, width in zip(rest, widths[1:], strict=True)]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    return "\n".join([text(lines[0]), rule, *map(text, lines[1:])])


def times_table(races: Sequence[Race]) -> str:
    """Milliseconds of everybody, a row per shape."""
    names: dict[str, None] = {}
    for race in races:
        names.update(dict.fromkeys(n for n in race.timings if not n.startswith("memory")))
    rows = ([r.shape, *(milliseconds(r.seconds(name)) for name in names)] for r in races)
    return table(["ms", *names], rows)


def cells_table(cells: Sequence[Cell]) -> str:
    """Ratios, a row per shape and layout."""
    header = ["shape, layout", "out ms", "fastest peer", "× fastest", "× torch", "× torch, fresh"]
    header += ["roofline", "… two reads", "fresh/out"]
    return table(
        header,
        (
            [
                f"{cell.shape} {cell.layout}",
                milliseconds(cell.out),
                cell.best_peer,
                number(cell.versus_best),
                number(cell.versus_torch),
                number(cell.versus_torch_fresh),
                number(cell.roofline),
                number(cell.roofline_two_reads),
                number(cell.fresh_over_out),
            ]
            for cell in cells
        ),
    )


def summary_table(cells: Sequence[Cell]) -> str:
    """Geometric means per pass and layout, and the worst cell of each."""
    groups: list[tuple[str, list[Cell]]] = []
    for pass_name in PASSES:
        for layout in ("nchw", "nhwc", "nc"):
            group = [c for c in cells if (c.pass_name, c.layout) == (pass_name, layout)]
            if group:
                groups.append((f"{pass_name} {layout}", group))
    groups.append(("all", list(cells)))
    header = ["geometric means", "cells", "× fastest peer", "worst", "× torch", "× torch, fresh"]
    header += ["roofline, big", "… two reads", "fresh/out, worst"]

    def row(name: str, group: list[Cell]) -> list[str]:
        big = [c for c in group if c.nbytes >= BIG]
        return [
            name,
            str(len(group)),
            number(geometric_mean(c.versus_best for c in group)),
            number(min((c.versus_best for c in group if c.versus_best), default=None)),
            number(geometric_mean(c.versus_torch for c in group)),
            number(geometric_mean(c.versus_torch_fresh for c in group)),
            number(geometric_mean(c.roofline for c in big)),
            number(geometric_mean(c.roofline_two_reads for c in big)),
            number(max((c.fresh_over_out for c in group if c.fresh_over_out), default=None)),
        ]

    return table(header, (row(name, group) for name, group in groups))


def bandwidth_table(races: Sequence[Race]) -> str:
    """Best speed of each probe in any race, a row per size of array."""
    rows = []
    for nbytes in sorted({race.nbytes for race in races}):
        same = [race for race in races if race.nbytes == nbytes]
        row = [f"{nbytes / 1e6:.2f} MB"]
        for probe in PROBES:
            times = [t for r in same if (t := r.seconds(f"memory {probe}")) is not None]
            speed = gigabytes_per_second(probe, nbytes, min(times)) if times else None
            row.append(number(speed, 0))
        rows.append(row)
    return table(["GB/s by array", *PROBES], rows)


def report(races: Sequence[Race]) -> str:
    """Everything that was measured, as text."""
    parts = []
    for pass_name in PASSES:
        chosen = [race for race in races if race.pass_name == pass_name]
        if not chosen:
            continue
        cells = [cell for race in chosen for cell in cells_of(race)]
        parts += [f"## {pass_name}", times_table(chosen)]
        if any(cell.out is not None for cell in cells):
            parts.append(cells_table(cells))
    cells = [cell for race in races for cell in cells_of(race) if cell.out is not None]
    parts += ["## Memory, measured among the contestants", bandwidth_table(races)]
    if cells:
        parts += ["## Summary", summary_table(cells)]
        slow = [c for c in cells if c.versus_best is not None and c.versus_best < 1]
        lines = [f"Cells slower than the fastest peer: {len(slow)} of {len(cells)}"]
        lines += [
            f"- {c.pass_name} {c.shape} {c.layout}: {number(c.versus_best)}× {c.best_peer}, "
            f"roofline {number(c.roofline)}"
            for c in sorted(slow, key=lambda c: c.versus_best or 0)
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def as_json(races: Sequence[Race]) -> dict[str, Any]:
    """All timings and cells, as plain data."""
    return {
        "races": [
            {
                "pass": race.pass_name,
                "shape": race.shape,
                "nbytes": race.nbytes,
                "implementations": race.notes,
                "noisy": race.noisy,
                "seconds": {
                    name: {"typical": t.typical, "best": t.best, "rounds": t.seconds}
                    | {"quiet": t.quiet, "reps": t.reps}
                    for name, t in race.timings.items()
                },
            }
            for race in races
        ],
        "cells": [
            {**asdict(cell), "fresh_over_out": cell.fresh_over_out}
            for race in races
            for cell in cells_of(race)
        ],
        "geometric_means": {
            key: geometric_mean(getattr(cell, key) for race in races for cell in cells_of(race))
            for key in ("versus_best", "versus_torch", "versus_torch_fresh")
        },
    }
