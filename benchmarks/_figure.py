"""Draw what the clips cost: bars of the ratio to the optimizer alone."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks._timing import Row

COLOURS = {
    "ours": "#0072B2",
    "optax": "#E69F00",
}  # Okabe and Ito's, which the colour-blind can tell apart
LABELS = {"ours": "optax_clip", "optax": "Optax"}
MOST = 4.0  # longer bars end here, with their number beside them, so that the others can be read


def draw(rows: list[Row], out: Path, caption: str) -> bool:
    """Draw the groups that are there, one below the other; False if there is nothing to draw."""
    panels = {
        "The step with clip_by_global_norm": {
            f"{row['tree']}, {row['dtype']}, {row['optimizer']}": row
            for row in rows
            if row["group"] == "step"
        },
        "All scopes, rules and sets, with Adam": {
            row["name"] + (f"  ({row['peer']})" if row["peer"] else ""): row
            for row in rows
            if row["group"] == "overheads"
        },
    }
    panels = {title: bars for title, bars in panels.items() if bars}
    if not panels:
        return False
    heights = [len(bars) + 2 for bars in panels.values()]
    figure = Figure(figsize=(10, 1 + 0.36 * sum(heights)), dpi=130, layout="constrained")
    grid = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)
    for axes, (title, bars) in zip(grid[:, 0], panels.items(), strict=True):
        _bars(axes, title, bars)
    grid[-1, 0].set_xlabel(f"time of the step, as a multiple of the optimizer alone\n{caption}")
    grid[0, 0].legend(loc="lower right", ncols=2, frameon=False, bbox_to_anchor=(1, 1))
    figure.savefig(out)
    return True


def _bars(axes: Axes, title: str, bars: dict[str, Row]) -> None:
    """One pair of bars a row, from the top; the whisker spans the quartiles."""
    axes.set_title(title, loc="left", fontsize=11)
    for side, (name, colour) in enumerate(COLOURS.items()):
        drawn = [(y, row) for y, row in enumerate(bars.values()) if name in row]
        places = [y + 0.38 * (side - 0.5) for y, _ in drawn]
        lengths = [min(row[name], MOST) for _, row in drawn]
        axes.barh(places, lengths, 0.36, color=colour, label=LABELS[name])
        for place, (_, row) in zip(places, drawn, strict=True):
            ends = [min(row[f"{name}_{end}"], MOST) for end in ("low", "high")]
            axes.plot(ends, [place, place], color="black", linewidth=0.9)
            text = f"{row[name]:.2f}" if row[name] < 10 else f"{row[name]:.0f}"
            axes.text(
                max(ends[1], row[name] if row[name] < MOST else 0) + 0.03,
                place,
                text,
                va="center",
                fontsize=7,
            )
    axes.axvline(1, color="black", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(bars)), list(bars), fontsize=8)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, MOST + 0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
