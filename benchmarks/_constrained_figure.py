"""Draw where constrained optimizers arrive: loss against steps, a panel for each set."""

from pathlib import Path

from matplotlib.figure import Figure

from benchmarks._timing import Row

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")  # Okabe and Ito's
COLUMNS = 4
LEAST = 1e-5  # what float32 cannot tell from the minimum


def draw(rows: list[Row], out: Path) -> bool:
    """Draw the rows of the group; False if there are none."""
    rows = [row for row in rows if row["group"] == "constrained"]
    if not rows:
        return False
    names = list(dict.fromkeys(row["name"] for row in rows))
    optimizers = list(dict.fromkeys(row["optimizer"] for row in rows))
    lines = -(-len(names) // COLUMNS)
    figure = Figure(figsize=(11, 2.6 * lines + 0.6), dpi=110, layout="constrained")
    panels = figure.subplots(lines, COLUMNS, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, name in zip(panels, names, strict=False):
        axes.set_title(name, fontsize=10)
        axes.set(xscale="log", yscale="log", ylim=(LEAST / 2, 3))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        for row in rows:
            if row["name"] == name:
                colour = COLOURS[optimizers.index(row["optimizer"])]
                for way, style in (("ours", "-"), ("projected", ":")):
                    gaps = [max(loss - 1, LEAST) for loss in row[f"{way}_curve"]]
                    axes.plot(row["steps"], gaps, style, color=colour, linewidth=1.4)
    for axes in panels[len(names) :]:
        axes.axis("off")
    for optimizer, colour in zip(optimizers, COLOURS, strict=False):
        panels[-1].plot([], [], color=colour, label=optimizer)
    for label, style in (("constrained", "-"), ("project_weights alone", ":")):
        panels[-1].plot([], [], style, color="black", label=label)
    figure.legend(loc="outside upper center", ncols=len(optimizers) + 2, frameon=False, fontsize=9)
    figure.supxlabel("step", fontsize=9.5)
    figure.supylabel("loss over the constrained minimum, minus 1", fontsize=9.5)
    figure.savefig(out)
    return True
