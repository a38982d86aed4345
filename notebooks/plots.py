"""What the notebooks share: the fast setting of CI, one look, and the figures drawn more than once."""

import os
from collections.abc import Sequence
from typing import Any, TypeVar

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

FAST = bool(os.environ.get("NOTEBOOKS_FAST"))
T = TypeVar("T")

# Okabe and Ito's palette, which colour-blind readers can tell apart, without its yellow.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = COLOURS = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#7f7f7f",
)

plt.rcParams.update(
    {
        "axes.grid": True,
        "axes.prop_cycle": plt.cycler(color=COLOURS),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 11,
        "figure.constrained_layout.use": True,
        "figure.dpi": 110,
        "font.size": 10,
        "grid.alpha": 0.25,
        "legend.frameon": False,
        "lines.linewidth": 1.6,
        "savefig.facecolor": "white",
    }
)


def pick(full: T, fast: T) -> T:
    """The first as the outputs here were made, the second where `NOTEBOOKS_FAST` is set, as in CI."""
    return fast if FAST else full


def panels(columns: int = 1, rows: int = 1, *, height: float = 3.4, **kwargs: Any) -> tuple[Figure, Any]:
    """A figure as wide as the page, and its axes as an array (one alone as it is)."""
    return plt.subplots(rows, columns, figsize=(9, height * rows), **kwargs)


def smooth(y: np.ndarray, window: int) -> np.ndarray:
    """The mean over the last `window` values, along the last axis; over fewer at the start."""
    total = np.cumsum(np.asarray(y, np.float64), axis=-1)
    late = total[..., window:] - total[..., :-window]
    counts = np.arange(1, min(window, total.shape[-1]) + 1)
    return np.concatenate([total[..., :window] / counts, late / window], axis=-1)


def seeds(
    ax: Axes, runs: np.ndarray, *, label: str, x: Sequence[float] | None = None, **kwargs: Any
) -> None:
    """One setting under several seeds, as (seeds, steps): the median, and a band from least to most."""
    runs = np.atleast_2d(runs)
    x = np.arange(1, runs.shape[1] + 1) if x is None else np.asarray(x)
    (line,) = ax.plot(x, np.median(runs, axis=0), label=label, **kwargs)
    ax.fill_between(
        x, runs.min(axis=0), runs.max(axis=0), color=line.get_color(), alpha=0.18, linewidth=0
    )


def histogram(
    ax: Axes, values: np.ndarray, *, marks: dict[str, float], log: bool = True, **kwargs: Any
) -> None:
    """A histogram, on a log axis by default, with named vertical lines such as percentiles or bounds."""
    values = np.ravel(values)
    if log:
        ax.set_xscale("log")
        kwargs.setdefault("bins", np.geomspace(values.min(), values.max(), 50))
    ax.hist(values, **{"bins": 60, "color": SKY} | kwargs)
    for colour, (name, place) in zip((GREY, GREEN, ORANGE, RED, PURPLE), marks.items(), strict=False):
        ax.axvline(place, color=colour, linestyle="--", label=f"{name}: {place:.3g}")
    if marks:
        ax.legend()


def cell(x: object) -> str:
    """A number with four digits, also one in an array without axes; anything else as it prints."""
    x = x.item() if hasattr(x, "item") else x
    return f"{x:.4g}" if isinstance(x, float) else str(x)


def table(rows: Sequence[Sequence[object]]) -> None:
    """Print rows under their headings, numbers to the right."""
    cells = [list(map(cell, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for name, *rest in cells:
        print("  ".join([name.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]).rstrip())
