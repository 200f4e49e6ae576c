"""What was measured, as a table in the terminal, as JSON, and as a picture."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from numbabn.bench.problem import PASSES, Contestant, Problem, is_installed

__all__ = ["Row", "as_json", "draw", "rows", "show"]

HEADINGS = ("pass", "threads", "who", "ms", "GB/s", "roofline", "vs ours")


@dataclass(frozen=True)
class Row:
    """One contestant's time in one pass.

    Attributes
    ----------
    pass_name, who : str
        What was done, and by whom.
    threads : int
        How many shared the work.
    seconds : float
        Median time of a call.
    gigabytes_per_second : float
        Bytes that the pass has to move at least, in 1e9 per second.
    roofline : float or None
        Time to move these bytes with as many threads, over `seconds`.
    speedup : float or None
        `seconds` over numbabn's time with as many threads.
    """

    pass_name: str
    who: str
    threads: int
    seconds: float
    gigabytes_per_second: float
    roofline: float | None
    speedup: float | None


def rows(given: Problem, pass_name: str, timings: Sequence[tuple[Contestant, float]]) -> list[Row]:
    """The contestants of one pass, each beside the roofline of as many threads."""
    found = []
    for contestant, seconds in timings:
        if contestant.who == "memory":
            continue
        alike = [(c.who, s) for c, s in timings if c.threads == contestant.threads]
        least = min((s for who, s in alike if who == "memory"), default=None)
        ours = min((s for who, s in alike if who == "numbabn"), default=None)
        found.append(
            Row(
                pass_name,
                contestant.who,
                contestant.threads,
                seconds,
                given.least_bytes(pass_name) / seconds / 1e9,
                None if least is None else least / seconds,
                None if ours is None else seconds / ours,
            )
        )
    return sorted(found, key=lambda row: (PASSES.index(row.pass_name), row.threads))


def as_json(given: Problem, found: Sequence[Row], machine: dict[str, object]) -> str:
    """Everything measured, with what it was measured on."""
    facts = {"shape": given.shape, "dtype": given.dtype_name, "layout": given.layout}
    return json.dumps({**facts, "machine": machine, "rows": [asdict(r) for r in found]}, indent=1)


def _cells(row: Row) -> tuple[str, ...]:
    other = row.who != "numbabn" and row.speedup is not None
    return (
        row.pass_name.replace("_", " "),
        str(row.threads),
        row.who,
        f"{1e3 * row.seconds:.3g}",
        f"{row.gigabytes_per_second:.1f}",
        "" if row.roofline is None else f"{row.roofline:.0%}",
        f"{row.speedup:.2f}×" if other else "",
    )


def show(title: str, found: Sequence[Row]) -> None:
    """Print the table, with rich where it is installed."""
    cells = [_cells(row) for row in found]
    used = [i for i in range(len(HEADINGS)) if i != 6 or any(c[6] for c in cells)]
    note = "GB/s and roofline count each input once and the output once."
    if not is_installed("rich"):
        widths = [max(len(c[i]) for c in [HEADINGS, *cells]) for i in range(len(HEADINGS))]
        print(title)
        for line in [HEADINGS, *cells]:
            aligned = (
                line[i].ljust(widths[i]) if i in (0, 2) else line[i].rjust(widths[i]) for i in used
            )
            print("  ".join(aligned).rstrip())
        print(note)
        print("pip install 'numbabn[cli]' makes this a nicer table.", file=sys.stderr)
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, caption=note, box=SIMPLE_HEAD)
    table.title_justify = table.caption_justify = "left"
    for i in used:
        table.add_column(HEADINGS[i], justify="left" if i in (0, 2) else "right", no_wrap=True)
    for row, line, following in zip(found, cells, [*found[1:], None], strict=True):
        last = following is None or following.pass_name != row.pass_name
        style = "bold" if row.who == "numbabn" else ""
        table.add_row(*(line[i] for i in used), end_section=last, style=style)
    Console().print(table)


# Colours that people with any colour vision can tell apart.
COLOURS = {"numbabn": "#0072B2", "torch": "#D55E00", "numpy": "#999999"}
MARKERS = ("o", "s", "^", "D")


def draw(title: str, found: Sequence[Row], path: str) -> None:
    """Write a PNG: fraction of the roofline for each pass, and the gain of more threads."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    counts = sorted({row.threads for row in found if row.who == "numbabn"})
    panels = 1 if len(counts) == 1 else 2
    figure, axes = plt.subplots(
        *(1, panels), figsize=(1 + 5 * panels, 4), squeeze=False, layout="constrained"
    )
    _bars(axes[0][0], found, counts[-1])
    if panels == 2:
        _scaling(axes[0][1], found, counts)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _bars(axis: Any, found: Sequence[Row], threads: int) -> None:
    """Fraction of the roofline, a group of bars per pass."""
    chosen = [(row, row.roofline) for row in found if row.threads == threads and row.roofline]
    names = [who for who in COLOURS if any(row.who == who for row, _ in chosen)]
    width = 0.8 / len(names)
    for i, who in enumerate(names):
        own = [row for row, _ in chosen if row.who == who]
        places = [PASSES.index(r.pass_name) + (i - (len(names) - 1) / 2) * width for r in own]
        heights = [fraction for row, fraction in chosen if row.who == who]
        bars = axis.bar(places, heights, 0.92 * width, color=COLOURS[who], label=who)
        axis.bar_label(bars, [f"{1e3 * row.seconds:.3g} ms" for row in own], fontsize=7)
    axis.axhline(1, color="black", linewidth=1)
    axis.set_xticks(range(len(PASSES)), [p.replace("_", "\n") for p in PASSES])
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.set_title(f"fraction of the roofline, {threads} thread{'s' * (threads > 1)}", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    if len(names) > 1:
        axis.legend(frameon=False, fontsize=8, ncols=len(names), loc="upper left")
        axis.set_ylim(top=1.15 * max(1.05, *(fraction for _, fraction in chosen)))


def _scaling(axis: Any, found: Sequence[Row], counts: Sequence[int]) -> None:
    """Speed over that of the fewest threads, one line per pass."""
    for pass_name, marker in zip(PASSES, MARKERS, strict=True):
        own = {
            r.threads: r.seconds for r in found if (r.who, r.pass_name) == ("numbabn", pass_name)
        }
        gains = [own[counts[0]] / own[count] for count in counts]
        axis.plot(counts, gains, marker=marker, label=pass_name.replace("_", " "))
    ideal = [count / counts[0] for count in counts]
    axis.plot(counts, ideal, color="black", linewidth=1, linestyle=":", label="ideal")
    axis.set_xticks(counts)
    axis.set_xlabel("threads")
    axis.set_title(f"numbabn's speed over {counts[0]} thread{'s' * (counts[0] > 1)}", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
