"""Draw the sweep: a row for each setting, a panel for each task, a colour for each rate."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from benchmarks._charlm import TAIL, Run
from benchmarks._tasks import Task

COLOURS = ("#0072B2", "#D55E00")  # of Okabe and Ito's palette: colour-blind readers can tell them apart
MARKERS = ("o", "D")
FIXED = 16  # the first so many settings are fixed thresholds


def draw(tasks: Sequence[Task], runs: Sequence[dict[str, tuple[Run, ...]]], out: Path) -> None:
    figure = Figure(figsize=(10, 7.4), dpi=130)
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    figure.subplots_adjust(left=0.205, right=0.985, bottom=0.145, top=0.94, wspace=0.07)
    names = list(runs[0])
    panels[0].set_yticks(range(len(names)), names, fontsize=10)
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    for axes, task, of_task in zip(panels, tasks, runs, strict=True):
        panel(axes, task, of_task)
    figure.supxlabel(
        f"loss, mean of the last {TAIL} steps (log scale; ×: diverged; dashed: best fixed threshold; "
        "dotted: blind guess)",
        fontsize=9.5,
        x=0.5,
        y=0.012,
    )
    figure.savefig(out)


def panel(axes: Axes, task: Task, runs: dict[str, tuple[Run, ...]]) -> None:
    finite = [run.final_loss for pair in runs.values() for run in pair if run.diverged is None]
    low, high = min([task.guess, *finite]), max([task.guess, *finite])
    ticks = (1,) if high > 100 * low else (1, 2, 5) if high > 4 * low else (1, 2, 2.5, 3, 4, 5)
    axes.set_title(f"{task.name}, {task.about}", fontsize=10.5)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=ticks))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.axhspan(FIXED - 0.5, len(runs) - 0.4, color="black", alpha=0.045, linewidth=0)
    room = (high / low) ** 0.06
    axes.set_xlim(low / room, high * room)
    axes.axvline(task.guess, color="black", linestyle=":", linewidth=1.2)
    for j in (1, 0):
        losses = np.array([np.nan if p[j].diverged else p[j].final_loss for p in runs.values()])
        axes.axvline(np.nanmin(losses[:FIXED]), color=COLOURS[j], linestyle="--", linewidth=1)
        axes.plot(losses[:FIXED], range(FIXED), color=COLOURS[j], linewidth=1.2)
        label = f"rate {task.rates[j]:g}"
        rows = range(len(losses))
        axes.plot(losses, rows, MARKERS[j], color=COLOURS[j], markersize=5.5, label=label)
        lost = np.flatnonzero(np.isnan(losses))
        axes.plot([high * room] * len(lost), lost, "x", color=COLOURS[j], markersize=8, clip_on=False)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1],
        labels[::-1],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.045),
        ncols=2,
        frameon=False,
    )
