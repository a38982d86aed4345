"""Train one small recurrent network with and without bounds, print a table and draw a figure.

The learning rate is high enough that training without bounds blows up. The limit by value allows
the same largest norm as the limit by norm. autoclip and zclip, with their default arguments, learn the
limit from the norms that they see, here those of a run that blows up.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

import optax_clip
from benchmarks._charlm import (
    MOMENTUM,
    RATE,
    RECURRENT,
    TAIL,
    CharRNN,
    Run,
    align,
    arguments,
    batches,
    load_text,
    train_step,
)

MAX_NORM = 0.25  # of the gradient
LIMIT = 0.0015  # of each entry: times the root of their number, 179, it is close to MAX_NORM
RADIUS = 8.0  # of the recurrent matrix, which starts orthogonal, with a norm of sqrt(128) = 11.3
WINDOW = 50  # steps in the running share

SGD = optax.sgd(RATE, momentum=MOMENTUM)
MEASURE = optax_clip.clip_by_global_norm(jnp.inf)  # clips nothing, records the norm
CLIP = optax_clip.clip_by_global_norm(MAX_NORM)
PROJECT = optax.masked(
    optax_clip.project_weights(optax_clip.norm_ball(RADIUS)),
    optax_clip.where(lambda path, _: path.endswith(RECURRENT)),
)

# The projection comes last, since only then it sees where the step would land.
SETTINGS = {
    "nothing": optax.chain(MEASURE, SGD),
    f"by value {LIMIT:g}": optax.chain(optax_clip.clip_by_value(LIMIT), SGD),
    f"global norm {MAX_NORM:g}": optax.chain(CLIP, SGD),
    "autoclip": optax.chain(optax_clip.autoclip(), SGD),
    "zclip": optax.chain(optax_clip.zclip(), SGD),
    f"projection {RADIUS:g}": optax.chain(MEASURE, SGD, PROJECT),
    f"norm {MAX_NORM:g} + projection {RADIUS:g}": optax.chain(CLIP, SGD, PROJECT),
}
NOTHING, VALUE, NORM, AUTO, Z, PROJECTION, BOTH = SETTINGS
# Okabe and Ito's palette, which colour-blind readers can tell apart.
PALETTE = ("#7f7f7f", "#E69F00", "#0072B2", "#D55E00", "#56B4E9", "#CC79A7", "#009E73")
COLOURS = dict(zip(SETTINGS, PALETTE, strict=True))


@dataclass(frozen=True)
class TimedRun(Run):
    seconds: float


def train(
    tx: optax.GradientTransformation, text: np.ndarray, vocab: int, steps: int, seed: int, bar: tqdm
) -> TimedRun:
    """Train until the end, or until the loss is not finite."""
    began = time.perf_counter()
    model = CharRNN(vocab, rngs=nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    step = nnx.jit(train_step)
    rows = []
    for tokens in batches(text, steps, seed):
        rows.append({key: float(x) for key, x in step(model, optimizer, tokens).items()})
        bar.set_postfix(loss=f"{rows[-1]['loss']:.2f}", refresh=False)
        bar.update()
        if not math.isfinite(rows[-1]["loss"]):
            break
    bar.update(steps - len(rows))
    log = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    return TimedRun(log, time.perf_counter() - began)


def table(runs: dict[str, TimedRun]) -> str:
    head = ("setting", "final loss", "largest norm", "clipped", "projected", "weight norm", "time")
    rows = [head]
    for name, run in runs.items():
        projected = run.log.get("project/fraction")
        rows.append(
            (
                name,
                run.outcome,
                f"{run.largest_norm:.3g}",
                f"{run.clipped.mean():.0%}",
                "-" if projected is None else f"{np.mean(projected > 0):.0%}",
                f"{np.fmax.reduce(run.log['recurrent']):.3g}",
                f"{run.seconds:.1f} s",
            )
        )
    return align(rows)


def running_mean(x: np.ndarray, window: int) -> np.ndarray:
    """The mean over the last `window` entries, over fewer at the start."""
    return np.array([np.mean(x[max(0, end - window) : end]) for end in range(1, len(x) + 1)])


def draw(runs: dict[str, TimedRun], vocab: int, out: Path) -> None:
    figure = Figure(figsize=(12, 4.6), dpi=130, layout="constrained")
    losses, norms, shares = figure.subplots(1, 3)

    def plot(axes: Axes, name: str, y: np.ndarray, **kwargs: Any) -> None:
        axes.plot(np.arange(1, len(y) + 1), y, color=COLOURS[name], **kwargs)

    guess = math.log(vocab)
    top = 1.75 * guess
    off = [name for name, run in runs.items() if not run.final_loss < top]
    losses.set_title(f"Loss\nmean of the last {TAIL} steps", fontsize=11)
    losses.set_ylabel("nats per character")
    losses.set_ylim(1, top)  # else one run that blows up would squash the others
    for name, run in runs.items():
        label = f"{name} ({run.outcome})"
        plot(losses, name, running_mean(run.log["loss"], TAIL), label=label)
        if run.diverged is not None:
            losses.plot(run.diverged, top, "X", color=COLOURS[name], clip_on=False)
    losses.axhline(
        guess, color="black", linestyle=":", linewidth=1.2, label=f"blind guess ({guess:.3g})"
    )
    if off:
        words = "off the scale: " + ", ".join(off)
        losses.text(0.98, 0.96, words, ha="right", va="top", fontsize=9, transform=losses.transAxes)

    alone, both = (runs[name].clipped.mean() for name in (NORM, BOTH))
    norms.set_title(
        f"Norm before clipping\nclipped: {alone:.0%} of steps, {both:.0%} with both",
        fontsize=11,
    )
    norms.set_ylabel("norm (log scale)")
    norms.set_yscale("log")
    norms.axhline(
        MAX_NORM,
        color="black",
        linestyle="--",
        linewidth=1.2,
        zorder=3,
        label=f"limit of the norm ({MAX_NORM:g})",
    )
    for name in (NOTHING, AUTO, NORM, BOTH):
        plot(norms, name, runs[name].log["clip/norm_before"], linewidth=0.7)

    shares.set_title(f"Steps clipped\nshare of the last {WINDOW} steps", fontsize=11)
    shares.set_ylim(-3, 103)
    shares.set_ylabel("percent")
    for name in (Z, AUTO, NORM, BOTH, VALUE):
        dashes = (0, (4, 4)) if name == VALUE else "-"  # its line may lie on another
        plot(shares, name, 100 * running_mean(runs[name].clipped, WINDOW), linestyle=dashes)

    for axes in (losses, norms, shares):
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, title="setting (final loss)")
    figure.savefig(out)


def sentence(runs: dict[str, TimedRun], vocab: int) -> str:
    """Say what to look at; every number is read from the runs."""
    loss = {name: run.outcome for name, run in runs.items()}
    weight = {name: np.fmax.reduce(run.log["recurrent"]) for name, run in runs.items()}
    return (
        f"What to see: the loss, {math.log(vocab):.3g} for a blind guess, ends at {loss[NOTHING]} "
        f"without bounds and at {loss[PROJECTION]} with bounded weights alone, but at {loss[VALUE]}, "
        f"{loss[NORM]} and {loss[BOTH]} where the gradient is clipped at a fixed limit, the last with a "
        f"recurrent matrix of norm {weight[BOTH]:.3g} instead of {weight[NORM]:.3g}. {AUTO} and {Z} end "
        f"at {loss[AUTO]} and {loss[Z]}: their limits follow the norms, also those of a blow-up."
    )


def main() -> None:
    args = arguments("demo", __doc__, steps=1000, out="demo.png").parse_args()

    text, vocab = load_text()
    print(f"{len(text):,} characters of {vocab} kinds, {args.steps} steps for each setting")
    runs = {}
    with tqdm(total=args.steps * len(SETTINGS), unit="step", mininterval=0.5) as bar:
        for name, tx in SETTINGS.items():
            bar.set_description(name)
            runs[name] = train(tx, text, vocab, args.steps, args.seed, bar)
    print(f"\n{table(runs)}\n")
    print(
        f"Final loss: mean of the last {min(TAIL, args.steps)} steps. Largest norm: of the "
        "gradient before clipping.\nWeight norm: the largest of the recurrent matrix. "
        "Time: with compilation.\n"
    )
    draw(runs, vocab, args.out)
    print(f"{sentence(runs, vocab)}\nFigure: {args.out}")


if __name__ == "__main__":
    main()
