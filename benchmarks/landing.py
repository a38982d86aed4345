"""Count the weights that end outside of their set after a step, on the device that JAX finds.

The update is made, projected and added in one program, as in training: what a compiler fuses or
contracts there shows here. Random weights, some inside and some not; the numbers of the sets are exact
in each type. NaN is outside.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_clip
from benchmarks._timing import Row, line

SIDE, STEPS = 1024, 3
TYPES = (  # of the weights, and of what comes to be projected
    ("float32", "float32"),
    ("bfloat16", "bfloat16"),
    ("float16", "float16"),
    ("bfloat16", "float32"),
    ("float32", "bfloat16"),
)
OPTIMIZERS: dict[str, optax.GradientTransformation] = {
    "none": optax.identity(),
    "sgd": optax.sgd(0.3),
    "adam": optax.adam(0.1, eps=1e-3),  # the usual 1e-8 is 0 in float16, and 0 / 0 NaN
    "lion": optax.lion(0.1),
}


class Set(NamedTuple):
    """A set, and which of a matrix's entries, or of its columns, are outside, in float64."""

    constraint: optax_clip.Constraint
    outside: Callable[[np.ndarray], np.ndarray]


def between(lower: float, upper: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: ~((x >= lower) & (x <= upper))


def within(radius: float, order: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: ~(np.linalg.norm(x, order, axis=0) <= radius)


SETS = {
    "box": Set(optax_clip.box(-0.125, 0.25), between(-0.125, 0.25)),
    "box without 0": Set(optax_clip.box(0.25, 0.75), between(0.25, 0.75)),
    "non_negative": Set(optax_clip.non_negative(), between(0.0, np.inf)),
    "L2 ball of each unit": Set(optax_clip.norm_ball(8.0, scope="unit"), within(8.0, 2)),
    "L1 ball of each unit": Set(optax_clip.norm_ball(64.0, ord=1, scope="unit"), within(64.0, 1)),
}


def as_type(dtype: str) -> optax.GradientTransformation:
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u: u.astype(dtype), updates))


def count(kind: Set, optimizer: str, types: tuple[str, str], side: int) -> tuple[int, int]:
    """How many are outside after each of some steps, all together, and of how many."""
    tx = optax.chain(
        OPTIMIZERS[optimizer], as_type(types[1]), optax_clip.project_weights(kind.constraint)
    )

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    rng = np.random.default_rng(0)
    # Columns from far inside a ball to outside of it.
    spread = np.geomspace(0.01, 1, side)
    params = jnp.asarray(spread * rng.normal(size=(side, side)), types[0])
    state, outside, among = tx.init(params), 0, 0
    for _ in range(STEPS):
        grads = jnp.asarray(spread * rng.normal(size=(side, side)), types[1])
        params, state = step(params, state, grads)
        found = kind.outside(np.asarray(params, np.float64))
        outside, among = outside + int(found.sum()), among + found.size
    return outside, among


def rows(side: int) -> Iterator[Row]:
    device = jax.devices()[0].device_kind
    print(f"Landing on {device}: outside after {STEPS} steps on {side} x {side} weights")
    line("", *OPTIMIZERS, "of", width=12)
    for name, kind in SETS.items():
        for types in TYPES:
            counts = {optimizer: count(kind, optimizer, types, side) for optimizer in OPTIMIZERS}
            outside = {optimizer: found for optimizer, (found, _) in counts.items()}
            among = next(iter(counts.values()))[1]
            label = f"{name}, {types[0]} weights, {types[1]}"
            line(label.ljust(60), *outside.values(), among, width=12)
            yield {"name": name, "weights": types[0], "updates": types[1], "of": among, **outside}


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.landing", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="small arrays, to see that it runs")
    found = list(rows(32 if parser.parse_args().smoke else SIDE))
    outside = sum(row[optimizer] for row in found for optimizer in OPTIMIZERS)
    print(f"{outside:,} outside of {len(OPTIMIZERS) * sum(row['of'] for row in found):,}")


if __name__ == "__main__":
    main()
