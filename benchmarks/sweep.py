"""Train the demo's network under many fixed thresholds and under each rule that learns one.

All settings see the same batches, in one compiled program: the fixed thresholds are one `vmap` over
`clip_by_global_norm`, the rules have their default arguments but where the name says otherwise.
"""

import argparse
import math
import textwrap
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

import optax_clip
from benchmarks._charlm import (
    MOMENTUM,
    TAIL,
    CharRNN,
    Run,
    align,
    arguments,
    batches,
    load_text,
    loss_of,
)

RATE = 1.0  # too high for training without bounds
LIMITS = 2.0 ** np.arange(-8, 8)  # from far too strict to above any norm of a run that goes well
GOOD = 0.05  # a threshold is good within that share of the best loss

# Okabe and Ito's palette, which colour-blind readers can tell apart, without its yellow.
COLOURS = ("#E69F00", "#56B4E9", "#0072B2", "#CC79A7", "#009E73", "#7f7f7f", "#D55E00")


def fixed(limit: jax.Array, sgd: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.chain(optax_clip.clip_by_global_norm(limit), sgd)


def rules(sgd: optax.GradientTransformation) -> dict[str, optax.GradientTransformation]:
    """Return every rule for plain gradients; `clip_by_update_rms` is for those of Adam and the like."""
    clips = {
        "autoclip()": optax_clip.autoclip(),
        "zclip()": optax_clip.zclip(),
        "zclip(max_norm=1)": optax_clip.zclip(max_norm=1.0),
        "adagc()": optax_clip.adagc(),
        "adaptive_grad_clip()": optax_clip.adaptive_grad_clip(),
        "running_quantile(0.5)": optax_clip.clip_by_global_norm(optax_clip.running_quantile(0.5)),
    }
    skip = optax_clip.skip_spikes(sgd, optax_clip.zscore(2.5), name="clip")
    return {name: optax.chain(clip, sgd) for name, clip in clips.items()} | {
        "skip_spikes(zscore(2.5))": skip
    }


def train(
    text: np.ndarray, vocab: int, steps: int, seed: int, rate: float
) -> tuple[dict[float, Run], dict[str, Run]]:
    """Return the runs with each fixed threshold and with each rule."""
    graph, weights, rest = nnx.split(CharRNN(vocab, rngs=nnx.Rngs(seed)), nnx.Param, ...)
    limits = jnp.asarray(LIMITS, jnp.float32)
    sgd = optax.sgd(rate, momentum=MOMENTUM)
    learned = rules(sgd)

    def start(tx: optax.GradientTransformation) -> Any:
        return weights, tx.init(weights)

    def step(tx: optax.GradientTransformation, carry: Any, tokens: jax.Array) -> tuple[Any, Any]:
        weights, state = carry
        loss, grads = jax.value_and_grad(
            lambda weights: loss_of(nnx.merge(graph, weights, rest, copy=True), tokens)
        )(weights)
        updates, state = tx.update(grads, state, weights)
        log = {"loss": loss, **optax_clip.metrics(state)}
        return (optax.apply_updates(weights, updates), state), log

    def step_all(carries: Any, tokens: jax.Array) -> tuple[Any, Any]:
        side_by_side = jax.vmap(lambda limit, carry: step(fixed(limit, sgd), carry, tokens))
        stepped = [side_by_side(limits, carries[0])]
        stepped += [step(tx, c, tokens) for tx, c in zip(learned.values(), carries[1:], strict=True)]
        jax.debug.callback(lambda: bar.update())
        return [carry for carry, _ in stepped], [log for _, log in stepped]

    carries = [jax.vmap(lambda limit: start(fixed(limit, sgd)))(limits), *map(start, learned.values())]
    data = np.stack(list(batches(text, steps, seed)))
    with tqdm(total=steps, unit="step", mininterval=0.5) as bar:
        _, logs = jax.jit(lambda *args: jax.lax.scan(step_all, *args))(carries, data)
        jax.effects_barrier()
    first, *others = ({key: np.asarray(x) for key, x in log.items()} for log in logs)
    columns = ({key: x[:, i] for key, x in first.items()} for i in range(len(LIMITS)))
    return (
        dict(zip(LIMITS.tolist(), map(ended, columns), strict=True)),
        dict(zip(learned, map(ended, others), strict=True)),
    )


def ended(log: dict[str, np.ndarray]) -> Run:
    """The run until its loss is not finite: the program goes on, for the sake of the others."""
    return Run({key: x[: Run(log).diverged] for key, x in log.items()})


def table(runs: dict[str, Run]) -> str:
    rows = [("setting", "final loss", "clipped", "largest norm", "median limit", "median after")]
    for name, run in runs.items():
        rows.append(
            (
                name,
                run.outcome,
                f"{run.clipped.mean():.1%}",
                f"{run.largest_norm:.3g}",
                f"{np.nanmedian(run.log['clip/threshold']):.3g}",
                f"{np.nanmedian(run.log['clip/norm_after']):.3g}",
            )
        )
    return align(rows)


def rank(run: Run) -> float:
    return run.final_loss if run.diverged is None else math.inf


def good_range(by_limit: dict[float, Run]) -> list[float]:
    """The best threshold and its neighbours, as far as they are good."""
    limits = sorted(by_limit)
    best = min(limits, key=lambda limit: rank(by_limit[limit]))
    good = [rank(by_limit[limit]) <= (1 + GOOD) * rank(by_limit[best]) for limit in limits]
    low = high = limits.index(best)
    while low > 0 and good[low - 1]:
        low -= 1
    while high + 1 < len(limits) and good[high + 1]:
        high += 1
    return limits[low : high + 1]


def sentences(by_limit: dict[float, Run], by_rule: dict[str, Run], guess: float) -> str:
    """Say which did best and by how much; every number is read from the runs."""
    best = min(by_limit, key=lambda limit: rank(by_limit[limit]))
    mark = rank(by_limit[best])
    ranked = sorted(by_rule, key=lambda name: rank(by_rule[name]))
    if not max(mark, rank(by_rule[ranked[0]])) < math.inf:
        return "All fixed thresholds diverged, or all rules."
    good = good_range(by_limit)
    span = f"{good[0]:.3g} to {good[-1]:.3g}, {len(good)} of them" if good[1:] else "no other"

    better, worse, lost = [], [], []
    for name in ranked:
        share = rank(by_rule[name]) / mark - 1
        if not rank(by_rule[name]) < guess:
            lost.append(f"{name} ({by_rule[name].outcome})")
        else:
            (worse if share > 0 else better).append(f"{name} by {abs(share):.1%}")
    parts = [
        f"The best of {len(by_limit)} fixed thresholds is {best:.3g}, with {mark:.4g}; "
        f"within {GOOD:.0%} of that: {span}.",
        f"The best rule is {ranked[0]}, with {by_rule[ranked[0]].outcome}.",
        f"Rules better than that threshold: {', '.join(better) or 'none'}.",
    ]
    if worse:
        parts.append(f"Rules worse than it: {', '.join(worse)}.")
    if lost:
        parts.append(f"Rules no better than a blind guess ({guess:.3g}): {', '.join(lost)}.")
    return "\n".join(textwrap.fill(part, 100) for part in parts)


def draw(
    by_limit: dict[float, Run], by_rule: dict[str, Run], guess: float, title: str, out: Path
) -> None:
    figure = Figure(figsize=(10, 6.6), dpi=130)
    losses, shares = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    figure.subplots_adjust(left=0.085, right=0.735, bottom=0.085, top=0.93, hspace=0.09)
    losses.set_title(title, fontsize=11)
    limits = list(by_limit)
    good = good_range(by_limit)
    for axes in (losses, shares):
        axes.axvspan(good[0] / 2**0.5, good[-1] * 2**0.5, color="#009E73", alpha=0.12, linewidth=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)

    finite = [rank(run) for run in [*by_limit.values(), *by_rule.values()] if run.diverged is None]
    top = 2 * max([guess, *finite])  # where the runs that diverged are drawn
    losses.set_yscale("log")
    losses.set_ylim(0.85 * min([guess, *finite]), top)
    losses.set_ylabel(f"loss, mean of the last {TAIL} steps\n(nats per character, log scale)")
    losses.axhline(guess, color="black", linestyle=":", linewidth=1.2)
    losses.text(limits[0], 1.05 * guess, f"blind guess ({guess:.3g})", va="bottom", fontsize=9)
    ends = [min(rank(run), top) for run in by_limit.values()]
    losses.plot(limits, ends, "o-", color="black", markersize=5, clip_on=False, zorder=3)
    for limit, run in by_limit.items():
        if run.diverged is not None:
            losses.plot(limit, top, "X", color="black", markersize=11, clip_on=False, zorder=4)
    label_levels(losses, {k: (min(rank(run), top), run.outcome) for k, run in by_rule.items()})

    shares.set_ylabel("steps clipped (percent)")
    shares.set_ylim(-4, 104)
    percent = [100 * run.clipped.mean() for run in by_limit.values()]
    shares.plot(limits, percent, "o-", color="black", markersize=5, clip_on=False, zorder=3)
    clipped = {name: run.clipped.mean() for name, run in by_rule.items()}
    label_levels(shares, {name: (100 * x, f"{x:.1%}") for name, x in clipped.items()})
    shares.set_xscale("log")
    shares.set_xlabel(
        f"fixed threshold of the global norm (black; shaded: within {GOOD:.0%} of the best loss)"
    )
    figure.savefig(out)


def label_levels(axes: Axes, levels: dict[str, tuple[float, str]]) -> None:
    """Draw a horizontal line for each name, and beside the axes the labels, none on another."""
    colours = dict(zip(levels, COLOURS, strict=True))
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = {name: float(to_axes.transform((1, y))[1]) for name, (y, _) in levels.items()}
    order = sorted(heights, key=heights.__getitem__)
    gap = 0.175 / axes.figure.get_figheight() / axes.get_position().height  # inches to axes
    places = [0.0]
    for name in order:
        places.append(max(heights[name], places[-1] + gap))
    places.append(1 + gap)
    for i in range(len(order), 0, -1):  # back down, where they were pushed out at the top
        places[i] = min(places[i], places[i + 1] - gap)
    for name, place in zip(order, places[1:-1], strict=True):
        axes.axhline(levels[name][0], color=colours[name], linewidth=1.6)
        axes.annotate(
            f"{name}: {levels[name][1]}",
            xy=(1, heights[name]),
            xytext=(1.05, place),
            xycoords="axes fraction",
            va="center",
            fontsize=9,
            arrowprops={"arrowstyle": "-", "color": colours[name], "linewidth": 1.6, "relpos": (0, 0.5)},
        )


def rate(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return number


def main() -> None:
    parser = arguments("sweep", __doc__, steps=1000, out="sweep.png")
    parser.add_argument("--rate", type=rate, default=RATE, help="learning rate")
    args = parser.parse_args()

    began = time.perf_counter()
    text, vocab = load_text()
    title = f"{args.steps} steps of SGD at learning rate {args.rate:g}, momentum {MOMENTUM:g}"
    print(f"{len(text):,} characters of {vocab} kinds, {title}, seed {args.seed}")
    by_limit, by_rule = train(text, vocab, args.steps, args.seed, args.rate)
    runs = {f"global norm {limit:.3g}": run for limit, run in by_limit.items()} | by_rule
    print(f"\n{table(runs)}\n")
    print(
        f"Final loss: mean of the last {min(TAIL, args.steps)} steps. Clipped: share of steps; for "
        "skip_spikes, of steps left out.\nLargest norm: before clipping. Median limit: for adagc of the "
        "smallest over the leaves, for adaptive_grad_clip\nover the units. Median after: of the norm "
        f"after clipping. Time: {time.perf_counter() - began:.0f} s, with compilation.\n"
    )
    guess = math.log(vocab)
    draw(by_limit, by_rule, guess, title, args.out)
    print(f"{sentences(by_limit, by_rule, guess)}\nFigure: {args.out}")


if __name__ == "__main__":
    main()
