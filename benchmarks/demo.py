"""Train one small recurrent network four times at a rate that is too high for it, and draw a figure.

Without bounds it is lost. A fixed limit on the norm of the gradient saves it, and so does autoclip,
which learns its limit from the norms that it sees. Both clip most steps, and the recurrent matrix grows:
its largest singular value says by how much one step of time can amplify. A spectral ball keeps that at
1, so that gradients do not explode, and nothing has to be clipped.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from tqdm import tqdm

import optax_clip
from benchmarks._charlm import (
    MOMENTUM,
    RECURRENT,
    TAIL,
    CharRNN,
    Run,
    align,
    arguments,
    batches,
    load_text,
    loss_of,
)

RATE, WARM_UP = 0.5, 100  # the rate rises from 0 over that many steps, so that autoclip sees calm ones
MAX_NORM = 0.5  # of the gradient
RADIUS = 1.0  # of the recurrent matrix, which starts orthogonal: all its singular values are 1
SMOOTH = 20  # steps in the running means of the figure

SGD = optax.sgd(optax.schedules.linear_schedule(0.0, RATE, WARM_UP), momentum=MOMENTUM)
MEASURE = optax_clip.clip_by_global_norm(jnp.inf)  # clips nothing, records the norm
# The projection comes last, since only then it sees where the step would land.
PROJECT = optax.masked(
    optax_clip.project_weights(optax_clip.spectral_ball(RADIUS, method="polar")),
    optax_clip.where(lambda path, _: path.endswith(RECURRENT)),
)
SETTINGS = {
    "no bounds": optax.chain(MEASURE, SGD),
    f"fixed limit {MAX_NORM:g}": optax.chain(optax_clip.clip_by_global_norm(MAX_NORM), SGD),
    "learned limit": optax.chain(optax_clip.autoclip(), SGD),
    f"spectral ball {RADIUS:g}": optax.chain(MEASURE, SGD, PROJECT),
}
NOTHING, FIXED, LEARNED, BALL = SETTINGS
LIMITED = {FIXED: "--", LEARNED: "-"}  # how their limits are drawn
# From Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = dict(zip(SETTINGS, ("#7f7f7f", "#0072B2", "#D55E00", "#009E73"), strict=True))


@dataclass(frozen=True)
class DemoRun(Run):
    gain: float  # the largest singular value of the recurrent matrix at the end
    chance: float  # the loss of knowing only how frequent each character is

    @property
    def lost(self) -> bool:
        return not self.final_loss < self.chance  # NaN is lost, too

    @property
    def outcome(self) -> str:
        return f"lost* ({super().outcome})" if self.lost else super().outcome


def train(
    tx: optax.GradientTransformation, text: np.ndarray, vocab: int, steps: int, seed: int, bar: tqdm
) -> DemoRun:
    """Train in one compiled program."""
    graph, weights, rest = nnx.split(CharRNN(vocab, rngs=nnx.Rngs(seed)), nnx.Param, ...)

    def step(carry: Any, tokens: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        weights, state = carry
        loss, grads = jax.value_and_grad(
            lambda weights: loss_of(nnx.merge(graph, weights, rest, copy=True), tokens)
        )(weights)
        updates, state = tx.update(grads, state, weights)
        jax.debug.callback(lambda: bar.update())
        log = {"loss": loss, **optax_clip.metrics(state)}
        return (optax.apply_updates(weights, updates), state), log

    data = np.stack(list(batches(text, steps, seed)))
    (weights, _), log = jax.jit(lambda *args: jax.lax.scan(step, *args))(
        (weights, tx.init(weights)), data
    )
    jax.effects_barrier()
    matrix = np.asarray(weights.rnn.cell.dense_h.kernel[...])
    gain = float(np.linalg.norm(matrix, 2)) if np.isfinite(matrix).all() else math.nan
    log = {key: np.asarray(x) for key, x in log.items()}
    return DemoRun(log, gain, frequencies_alone(text))


def frequencies_alone(text: np.ndarray) -> float:
    """Return the entropy of a character in nats, the loss of a guess by frequency."""
    shares = np.unique(text, return_counts=True)[1] / len(text)
    return float(-np.sum(shares * np.log(shares)))


def table(runs: dict[str, DemoRun]) -> str:
    rows = [("setting", "final loss", "clipped", "norm", "limit", "largest norm", "gain")]
    for name, run in runs.items():
        norm, limit = (run.log[key] for key in ("clip/norm_before", "clip/threshold"))
        rows.append(
            (
                name,
                run.outcome,
                f"{run.clipped.mean():.0%}",
                f"{np.median(norm[-TAIL:]):.3g}",
                f"{limit[-1]:.3g}" if math.isfinite(limit[-1]) else "-",
                f"{run.largest_norm:.3g}",
                f"{run.gain:.3g}",
            )
        )
    return align(rows)


def notes(steps: int, chance: float) -> str:
    return (
        f"Final loss: nats per character, mean of the last {min(TAIL, steps)} steps. Norm: of the "
        "gradient before the clip, median\nof those steps; limit: the last in force. Gain: the largest "
        "singular value of the recurrent matrix at the\nend.\n"
        f"* No better than the frequencies of the characters alone ({chance:.3g}). The numbers of such "
        "a run differ\nfrom machine to machine."
    )


def running_mean(x: np.ndarray, window: int) -> np.ndarray:
    """The mean over the last `window` entries, over fewer at the start."""
    return np.array([np.mean(x[max(0, end - window) : end]) for end in range(1, len(x) + 1)])


def draw(runs: dict[str, DemoRun], title: str, out: Path) -> None:
    """Two panels, one above the other, in letters that can be read on a phone."""
    figure = Figure(figsize=(6.4, 7.0), dpi=200, layout="constrained")
    figure.suptitle(title, fontsize=12)
    losses, norms = figure.subplots(2, 1, sharex=True, height_ratios=(3, 4))
    draw_losses(losses, runs)
    draw_norms(norms, runs)
    for axes in (losses, norms):
        axes.tick_params(labelsize=12)
        axes.margins(x=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    norms.set_xlabel("step", fontsize=13)
    labels = {"fontsize": 12, "frameon": False, "handlelength": 1.2, "columnspacing": 1.0}
    figure.legend(loc="outside lower center", ncols=2, **labels)
    figure.savefig(out)


def steps_of(y: np.ndarray) -> np.ndarray:
    return np.arange(1, len(y) + 1)


def draw_losses(axes: Axes, runs: dict[str, DemoRun]) -> None:
    chance = runs[NOTHING].chance
    axes.axhline(chance, color="black", linestyle=":", linewidth=1.2)
    axes.text(
        len(runs[LEARNED].log["loss"]), chance, "frequencies alone", ha="right", va="top", fontsize=11
    )
    top = 1.5 * chance  # else a run that is lost would squash the others
    axes.set_title("Loss, nats per character", fontsize=13, loc="left")
    axes.set_ylim(1.4, top)
    for name, run in runs.items():
        y = running_mean(run.log["loss"], SMOOTH)
        end = "lost" if run.lost else f"{run.final_loss:.3g}"
        axes.plot(steps_of(y), y, color=COLOURS[name], linewidth=2, label=f"{name}: {end}")
        if run.diverged is not None:
            axes.plot(run.diverged, top, "X", color=COLOURS[name], markersize=10, clip_on=False)


def draw_norms(axes: Axes, runs: dict[str, DemoRun]) -> None:
    axes.set_title(
        "Norm before the clip; in black the limits, fixed and learned", fontsize=13, loc="left"
    )
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    kept = np.concatenate([run.log["clip/norm_before"] for name, run in runs.items() if name != NOTHING])
    axes.set_ylim(kept.min() / 1.2, 3 * kept.max())  # else a run that is lost would squash the others
    for name, run in runs.items():
        norm, limit = (run.log[key] for key in ("clip/norm_before", "clip/threshold"))
        axes.plot(steps_of(norm), norm, color=COLOURS[name], linewidth=0.6, alpha=0.4)
        axes.plot(steps_of(norm), running_mean(norm, SMOOTH), color=COLOURS[name], linewidth=1.8)
        if name in LIMITED:
            axes.plot(steps_of(limit), limit, color="black", linestyle=LIMITED[name], linewidth=1.8)


def sentence(runs: dict[str, DemoRun]) -> str:
    """Say what to look at; every number is read from the runs."""
    loss = {name: run.outcome for name, run in runs.items()}
    gain = {name: run.gain for name, run in runs.items()}
    return (
        f"What to see: without bounds the run is {loss[NOTHING]}. A fixed limit ends at {loss[FIXED]};\n"
        f"autoclip, which is told no number, at {loss[LEARNED]}; and bounded weights, unclipped, at "
        f"{loss[BALL]}:\na step of time amplifies by at most {gain[BALL]:.3g}, instead of "
        f"{gain[LEARNED]:.3g} with the learned limit."
    )


def main() -> None:
    args = arguments("demo", __doc__, steps=400, out="demo.png").parse_args()

    began = time.perf_counter()
    text, vocab = load_text()
    rate = f"learning rate {RATE:g} after {WARM_UP} steps of warm-up"
    print(
        f"{len(text):,} characters of {vocab} kinds, {args.steps} steps of SGD for each setting, {rate}"
    )
    runs = {}
    with tqdm(total=args.steps * len(SETTINGS), unit="step", mininterval=0.5) as bar:
        for name, tx in SETTINGS.items():
            bar.set_description(name)
            runs[name] = train(tx, text, vocab, args.steps, args.seed, bar)
    print(f"\n{table(runs)}\n\n{notes(args.steps, runs[NOTHING].chance)}\n")
    draw(runs, f"A recurrent network, {rate}", args.out)
    print(
        f"{sentence(runs)}\nFigure: {args.out}. {time.perf_counter() - began:.0f} s, with compilation."
    )


if __name__ == "__main__":
    main()
