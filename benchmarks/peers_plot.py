"""The cells as a picture: speed relative to the fastest peer, and fraction of the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .peers_native import optional
from .peers_problem import PASSES
from .peers_report import Cell, Race, cells_of

__all__ = ["draw"]

# Colours that people with any colour vision can tell apart, and a marker each.
STYLES = {
    "nchw": ("#0072B2", "o", "NCHW"),
    "nhwc": ("#D55E00", "s", "NHWC"),
    "nc": ("#009E73", "D", "dense"),
}


def draw(races: Sequence[Race], path: Path, *, title: str) -> None:
    """Write a PNG: a row per pass; ratios to the left, rooflines to the right.

    Parameters
    ----------
    races : sequence of Race
        What was measured, numbabn among it.
    path : Path
        File to write.
    title : str
        Machine and threads, for the heading.
    """
    optional("matplotlib").use("Agg")
    plt = optional("matplotlib.pyplot")
    passes = [name for name in PASSES if any(r.pass_name == name for r in races)]
    shapes = list(dict.fromkeys(race.shape for race in races))
    figure, axes = plt.subplots(
        *(len(passes), 2),
        figsize=(2 * max(4.5, 1 + 0.24 * len(shapes)), 1.2 + 2.1 * len(passes)),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for (left, right), pass_name in zip(axes, passes, strict=True):
        cells = [c for race in races if race.pass_name == pass_name for c in cells_of(race)]
        points(left, cells, shapes, "versus_best")
        points(right, cells, shapes, "roofline")
        left.set_yscale("log", base=2)
        left.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
        left.set_ylabel(pass_name.replace("_", " "))
        fractions = [c.roofline for c in cells if c.roofline is not None]
        right.set_ylim(0, max([1.05, *(1.05 * f for f in fractions)]))
        for axis in (left, right):
            axis.axhline(1, color="black", linewidth=1)
            axis.grid(axis="y", color="0.9")
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_xticks(range(len(shapes)), shapes, rotation=90, fontsize=8)
    axes[0][0].set_title("speed over the fastest peer in any layout", fontsize=10)
    axes[0][1].set_title("fraction of the roofline (inputs read once)", fontsize=10)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=3, frameon=False)
    figure.align_ylabels(axes[:, 0])
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def points(axis: Any, cells: Sequence[Cell], shapes: Sequence[str], key: str) -> None:
    """One marker per cell, the layouts of a shape side by side."""
    for layout, (colour, marker, label) in STYLES.items():
        chosen = [c for c in cells if c.layout == layout and getattr(c, key) is not None]
        shift = {"nchw": -0.15, "nhwc": 0.15, "nc": 0.0}[layout]
        if chosen:
            axis.plot(
                [shapes.index(c.shape) + shift for c in chosen],
                [getattr(c, key) for c in chosen],
                *(marker,),
                color=colour,
                markersize=5,
                label=label,
            )
