"""Train three small tasks under many fixed thresholds and under each rule that learns one.

Each task first records the norms of a run without a clip, at its lower rate. From that record come two
thresholds that a user might choose, and the cap of zclip, twice the median. Then all thresholds and
rules train at two rates side by side, on the same batches, in one compiled program.
"""

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_clip
from benchmarks import _sweep_figure
from benchmarks._charlm import TAIL, Run, align, arguments
from benchmarks._tasks import TASKS, Task

LIMITS = np.append(2.0 ** np.arange(-8, 7), np.inf)  # from far too strict to no clip
NO_CLIP = "no clip"
MEDIAN, HIGH = "the record's median", "its 95th percentile"
GOOD = 0.1  # a setting is good within that share of the loss of the best fixed threshold
LOGGED = ("clip/norm_before", "clip/steps_clipped")


def train(task: Task, tx: optax.GradientTransformation) -> dict[str, jax.Array]:
    """Train from the start; return the losses and what the transform recorded, step by step."""

    def step(carry: Any, batch: Any) -> tuple[Any, dict[str, jax.Array]]:
        weights, state = carry
        loss, grads = jax.value_and_grad(task.loss)(weights, batch)
        updates, state = tx.update(grads, state, weights)
        log = {"loss": loss, **recorded(state)}
        return (optax.apply_updates(weights, updates), state), log

    _, log = jax.lax.scan(step, (task.weights, tx.init(task.weights)), task.batches)
    return log


def rules(
    optimizer: optax.GradientTransformation, cap: float
) -> dict[str, optax.GradientTransformation]:
    """Return every rule for plain gradients; `clip_by_update_rms` is for those of Adam and the like."""
    clips = {
        "autoclip()": optax_clip.autoclip(),
        "zclip()": optax_clip.zclip(),
        "zclip(max_norm=c)": optax_clip.zclip(max_norm=cap),
        "adagc()": optax_clip.adagc(),
        "adaptive_grad_clip()": optax_clip.adaptive_grad_clip(),
        "running_quantile(0.5)": optax_clip.clip_by_global_norm(optax_clip.running_quantile(0.5)),
    }
    skip = optax_clip.skip_spikes(optimizer, optax_clip.zscore(2.5), name="clip")
    return {name: optax.chain(clip, optimizer) for name, clip in clips.items()} | {
        "skip_spikes(zscore(2.5))": skip
    }


def one_of(
    transforms: Sequence[optax.GradientTransformation], index: jax.Array
) -> optax.GradientTransformation:
    """The transform of that index, which may be traced: all act, and one of them counts.

    The gradients, which cost most, are so computed in one piece of the program for all of them.
    """

    def init(params: Any) -> Any:
        return index, tuple(tx.init(params) for tx in transforms)

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        both = [tx.update(grads, s, params) for tx, s in zip(transforms, state[1], strict=True)]
        updates, states = zip(*both, strict=True)
        return jax.tree.map(lambda *xs: jax.lax.select_n(index, *xs), *updates), (index, states)

    return optax.GradientTransformation(init, update)


def recorded(state: Any) -> dict[str, jax.Array]:
    """The metrics of a clip, or those of the one that counts."""
    if isinstance(state[0], jax.Array):
        index, states = state
        each = [recorded(s) for s in states]
        return {key: jax.lax.select_n(index, *(log[key] for log in each)) for key in LOGGED}
    found = optax_clip.metrics(state)
    return {key: found[key] for key in LOGGED}


def record(task: Task) -> np.ndarray:
    """Return the norms of a run at the lower rate without a clip, those that are finite."""
    measure = optax_clip.clip_by_global_norm(jnp.inf)
    log = jax.jit(lambda: train(task, optax.chain(measure, task.optimizer(task.rates[0]))))()
    norms = np.asarray(log["clip/norm_before"])
    return norms[np.isfinite(norms)]


def sweep(task: Task, norms: np.ndarray) -> dict[str, tuple[Run, ...]]:
    """Return the runs of each setting, one a rate; some settings follow from recorded norms."""
    median, high = np.percentile(norms, (50, 95))
    names = [*(f"{x:.3g}" for x in LIMITS[:-1]), NO_CLIP, MEDIAN, HIGH]
    learned = list(rules(task.optimizer(task.rates[0]), 1.0))

    def fixed(limit: jax.Array, rate: jax.Array) -> dict[str, jax.Array]:
        return train(task, optax.chain(optax_clip.clip_by_global_norm(limit), task.optimizer(rate)))

    def by_rule(index: jax.Array, rate: jax.Array) -> dict[str, jax.Array]:
        return train(task, one_of([*rules(task.optimizer(rate), 2 * median).values()], index))

    def side_by_side(limits: jax.Array, indices: jax.Array, rates: jax.Array) -> Any:
        each = ((fixed, limits), (by_rule, indices))
        return [jax.vmap(jax.vmap(run, (None, 0)), (0, None))(xs, rates) for run, xs in each]

    limits = jnp.asarray([*LIMITS, median, high], jnp.float32)
    parts = jax.jit(side_by_side)(limits, jnp.arange(len(learned)), jnp.asarray(task.rates))
    logs = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
    return {
        name: tuple(ended({key: x[i, j] for key, x in logs.items()}) for j in range(len(task.rates)))
        for i, name in enumerate([*names, *learned])
    }


def ended(log: dict[str, np.ndarray]) -> Run:
    """The run until its loss is not finite: the program goes on, for the sake of the others."""
    return Run({key: x[: Run(log).diverged] for key, x in log.items()})


def rank(run: Run) -> float:
    return run.final_loss if run.diverged is None else np.inf


def best_limits(runs: dict[str, tuple[Run, ...]], j: int) -> tuple[str, float, list[str]]:
    """The best of the fixed thresholds at a rate, its loss, and all that are good."""
    losses = {name: rank(runs[name][j]) for name in list(runs)[: len(LIMITS)]}
    best = min(losses, key=losses.__getitem__)
    good = [name for name, loss in losses.items() if loss <= (1 + GOOD) * losses[best]]
    return best, losses[best], good


def report(task: Task, norms: np.ndarray, runs: dict[str, tuple[Run, ...]]) -> str:
    """The record, the runs, and which thresholds are good."""
    head = [cell for rate in task.rates for cell in (f"loss at {rate:g}", "clipped")]
    rows = [("setting", *head)]
    for name, pair in runs.items():
        rows.append((name, *(c for run in pair for c in (run.outcome, f"{run.clipped.mean():.1%}"))))
    table = optax_clip.threshold_table(norms)
    lines = [f"The record, at rate {task.rates[0]:g}:", str(table), "", align(rows), ""]
    for j, rate in enumerate(task.rates):
        best, loss, good = best_limits(runs, j)
        lines.append(
            f"Rate {rate:g}: the best of {len(LIMITS)} thresholds is {best}, with {loss:.4g}; "
            f"within {GOOD:.0%} of it: {len(good)}, {', '.join(good)}."
        )
    return "\n".join(lines)


def summary(tasks: Sequence[Task], runs: Sequence[dict[str, tuple[Run, ...]]]) -> str:
    """The loss of each setting as a multiple of that of the best fixed threshold."""
    rows = [
        ("loss / best threshold's", *(f"{t.name} {rate:g}" for t in tasks for rate in t.rates), "worst")
    ]
    for name in list(runs[0])[len(LIMITS) - 1 :]:
        shares = [
            rank(of_task[name][j]) / best_limits(of_task, j)[1]
            for task, of_task in zip(tasks, runs, strict=True)
            for j in range(len(task.rates))
        ]
        rows.append((name, *(f"{x:.3g}" for x in [*shares, max(shares)])))
    return align(rows)


def main() -> None:
    parser = arguments("sweep", __doc__, steps=300, out="sweep.png")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="which to train")
    args = parser.parse_args()
    tasks = [TASKS[name](args.steps, args.seed) for name in args.tasks]
    print(f"{args.steps} steps for each setting, seed {args.seed}")
    runs = []
    for task in tasks:
        began = time.perf_counter()
        norms = record(task)
        runs.append(sweep(task, norms))
        took = time.perf_counter() - began
        print(f"\n{task.name} ({task.about}), {took:.0f} s with compilation\n", flush=True)
        print(report(task, norms, runs[-1]), flush=True)
    print(f"\n{summary(tasks, runs)}\n")
    print(
        f"Loss: mean of the last {min(TAIL, args.steps)} steps. Clipped: share of steps; for "
        "skip_spikes, of steps left out.\nc: twice the median of the record."
    )
    _sweep_figure.draw(tasks, runs, args.out)
    print(f"Figure: {args.out}")


if __name__ == "__main__":
    main()
