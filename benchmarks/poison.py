"""What bad steps do to the clips that learn: the authors' programs beside this library.

    python -m benchmarks.poison

prints one table. The norms of two leaves scatter around 0.3, and every 50th step is a spike of 20 times
that; each case spoils some steps. A cell says how long it takes, from the first sound step on, until as
much gets through as in a run without the case, spikes included.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_clip
from tests import reference

LATE, AFTER, PERIOD = 1000, 1000, 50
STEPS = LATE + AFTER + PERIOD + 1
SPIKES = np.where(np.arange(STEPS) % PERIOD == 40, 20.0, 1.0)[:, None]
NORMS = {
    "noisy": 0.3 * np.exp(0.2 * np.random.default_rng(0).normal(size=(STEPS, 2))) * SPIKES,
    "steady": 0.3 * SPIKES.repeat(2, axis=1),
}
Clip = Callable[[np.ndarray], np.ndarray]


class Case(NamedTuple):
    """Norms times ``factor`` in the steps from ``start`` to ``stop``, or for good."""

    factor: float | list[float]
    start: int
    stop: int | None
    norms: str = "noisy"


ONE_LEAF = [0.0, 1.0]
CASES = {
    "one NaN": Case(math.nan, LATE, LATE + 1),
    "one NaN at step 10": Case(math.nan, 10, 11),
    "one inf": Case(math.inf, LATE, LATE + 1),
    "one zero gradient at step 10": Case(0.0, 10, 11),
    "the first 30 gradients zero": Case(0.0, 0, 30),
    "one leaf zero for 150 steps": Case(ONE_LEAF, 0, 150),
    "one spike of 10,000": Case(1e4, LATE, LATE + 1),
    "one spike of 10,000 at step 10": Case(1e4, 10, 11),
    "5 times larger from then on": Case(5.0, LATE, None),
    "5 times smaller from then on": Case(0.2, LATE, None),
    "constant, then 20% larger": Case(1.2, LATE, None, "steady"),
}


def whole(norms: np.ndarray) -> np.ndarray:
    """The norm of both leaves, in one column."""
    return np.linalg.norm(norms, axis=1, keepdims=True)


def published_autoclip(norms: np.ndarray) -> np.ndarray:
    return reference.published_autoclip(whole(norms)[:, 0])["clipped"][:, None]


def published_zclip(norms: np.ndarray) -> np.ndarray:
    """Without the cap of 1 on its limit, which hides what its statistics do."""
    return reference.published_zclip(whole(norms)[:, 0], max_norm=None)["clipped"][:, None]


def published_adagc(norms: np.ndarray) -> np.ndarray:
    return reference.published_adagc(norms)["clipped"]


def of_this_library(tx: optax.GradientTransformation) -> Clip:
    """A clip of gradients that are norms: two leaves of one entry."""

    def step(state, norms):
        updates, state = tx.update(list(norms), state)
        return state, jnp.stack(updates)

    run = jax.jit(lambda norms: jax.lax.scan(step, tx.init(list(norms[0])), norms)[1])
    return lambda norms: np.asarray(run(jnp.asarray(norms, jnp.float32)), np.float64)


def clips() -> dict[str, Clip]:
    """Norms of shape (steps, leaves) -> clipped ones, of the tree or of each leaf."""
    autoclip, zclip = (of_this_library(tx()) for tx in (optax_clip.autoclip, optax_clip.zclip))
    return {
        "AutoClip, published": published_autoclip,
        "AutoClip, here": lambda norms: whole(autoclip(norms)),
        "ZClip, published": published_zclip,
        "ZClip, here": lambda norms: whole(zclip(norms)),
        "AdaGC, published": published_adagc,
        "AdaGC, here": of_this_library(optax_clip.adagc()),
    }


def means(clipped: np.ndarray) -> np.ndarray:
    """Over one period, from each step on."""
    return np.lib.stride_tricks.sliding_window_view(clipped, PERIOD, axis=0).mean(axis=-1)


def outcome(clip: Clip, usual: np.ndarray, case: Case) -> str:
    """How a clip takes a case, in a few words; ``usual`` is what it lets through without."""
    norms = NORMS[case.norms].copy()
    norms[case.start : case.stop] *= case.factor
    sound = slice(case.stop or case.start, (case.stop or case.start) + AFTER + PERIOD)
    level = 1.0 if case.stop else case.factor
    ratio = means(clip(norms)[sound]) / level / means(usual[sound])
    last = ratio[-1]
    if np.isnan(last).any():
        return "NaN for good"
    if (last == 0).any():
        return "0 for good"
    off = np.flatnonzero((abs(ratio - 1) > 0.1).any(axis=1))
    if off.size == 0:
        return "unharmed"
    if off[-1] < AFTER:
        return f"{math.ceil((off[-1] + 1) / 10) * 10} steps"
    worst = last[np.argmax(abs(np.log(last)))]
    return "no limit for good" if worst > 1 else f"{worst:.0%} after {AFTER:,} steps"


def table() -> str:
    """The table in Markdown."""
    columns = []
    for name, clip in clips().items():
        usual = {kind: clip(norms) for kind, norms in NORMS.items()}
        columns.append([name, "---"] + [outcome(clip, usual[c.norms], c) for c in CASES.values()])
    rows = zip(["", "---", *CASES], *columns, strict=True)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    print(table())
