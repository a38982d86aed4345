"""Where optimizers with a constraint arrive: least squares over a set, against its minimum in float64.

Each cell is the loss after 4,000 steps with a cosine rate, over the constrained minimum: the worst of
three runs, whose gradients are multiplied by 1e-4, 1 and 1e4. `constrained` beside `project_weights`
behind the same optimizer, and beside the projections of Optax after `apply_updates`.

    python -m benchmarks --only constrained
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_clip
from benchmarks._timing import Row
from benchmarks.overheads import per_leaf, per_unit
from benchmarks.projections import exact_l1, exact_simplex, exact_spectral

STEPS = 4_000
CURVE = 120  # points of a curve that are kept
SIZES = (1e-4, 1.0, 1e4)
SHAPES = {"a": (8, 4), "b": (6, 4)}
Tree = dict[str, Any]

OPTIMIZERS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "Adam": lambda rate: optax.adam(rate(0.03)),
    "Lion": lambda rate: optax.lion(rate(0.01)),
    "RMSProp": lambda rate: optax.rmsprop(rate(0.03)),
    "Adafactor": lambda rate: optax.adafactor(rate(0.1)),
    "Muon": lambda rate: optax.contrib.muon(rate(0.05)),
}


class Set(NamedTuple):
    """A set, its projection in float64 NumPy, Optax's if it has one, and the leaves it is tried on."""

    constraint: Any
    exact: Callable[[Tree], Tree]
    optax: Callable[[Any], Any] | None = None
    leaves: str = "a"


def each(project: Callable[[np.ndarray], np.ndarray]) -> Callable[[Tree], Tree]:
    return lambda tree: {key: project(x) for key, x in tree.items()}


def columns(project: Callable[[np.ndarray], np.ndarray]) -> Callable[[Tree], Tree]:
    return each(lambda x: np.stack([project(column) for column in x.T], axis=1))


def within(low: float, high: float) -> Callable[[np.ndarray], np.ndarray]:
    """Onto the norms between two values."""
    return lambda x: x * np.clip(np.linalg.norm(x), low, high) / np.linalg.norm(x)


def whole(radius: float) -> Callable[[Tree], Tree]:
    """Onto the ball of the whole tree as one vector."""

    def project(tree: Tree) -> Tree:
        norm = np.sqrt(sum((x**2).sum() for x in tree.values()))
        return {key: x * min(1, radius / norm) for key, x in tree.items()}

    return project


def flat(project: Callable[[np.ndarray, float], np.ndarray], size: float) -> Callable[[Tree], Tree]:
    return each(lambda x: project(x.ravel(), size).reshape(x.shape))


def exact_capped(x: np.ndarray, total: float, upper: Any) -> np.ndarray:
    """The nearest point of the simplex with a cap, by bisection."""
    low, high = x.min() - np.max(upper), x.max()
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(x - middle, 0, upper).sum() > total else (low, middle)
    return np.clip(x - low, 0, upper)


def sets() -> dict[str, Set]:
    given = optax.projections
    return {
        "ball": Set(optax_clip.norm_ball(1.0), each(within(0, 1)), per_leaf(given.projection_l2_ball)),
        "ball, unit": Set(
            optax_clip.norm_ball(0.5, scope="unit"),
            columns(within(0, 0.5)),
            per_unit(lambda x: given.projection_l2_ball(x, 0.5)),
        ),
        "ball, global": Set(
            optax_clip.norm_ball(1.5, scope="global"),
            whole(1.5),
            lambda tree: given.projection_l2_ball(tree, 1.5),
            leaves="ab",
        ),
        "sphere": Set(
            optax_clip.norm_sphere(1.0), each(within(1, 1)), per_leaf(given.projection_l2_sphere)
        ),
        "shell": Set(optax_clip.norm_shell(0.5, 1.0), each(within(0.5, 1))),
        "L1 ball": Set(
            optax_clip.norm_ball(2.0, ord=1),
            flat(exact_l1, 2.0),
            per_leaf(lambda x: given.projection_l1_ball(x, 2.0)),
        ),
        "simplex": Set(
            optax_clip.simplex(1.0), flat(exact_simplex, 1.0), per_leaf(given.projection_simplex)
        ),
        "capped simplex": Set(
            optax_clip.simplex(1.0, upper=0.25),
            flat(lambda x, total: exact_capped(x, total, 0.25), 1.0),
        ),
        "spectral ball": Set(optax_clip.spectral_ball(0.5), each(lambda x: exact_spectral(x, 0.5))),
        "box": Set(
            optax_clip.box(-0.2, 0.3),
            each(lambda x: np.clip(x, -0.2, 0.3)),
            per_leaf(lambda x: given.projection_box(x, -0.2, 0.3)),
        ),
        "callable": Set(
            lambda tree: given.projection_l2_ball(tree, 1.5),
            whole(1.5),
            lambda tree: given.projection_l2_ball(tree, 1.5),
            leaves="ab",
        ),
    }


class Problem(NamedTuple):
    """``sum tr(W' H W) / 2 - tr(B' W) + c``, the mean square of a linear model, in float64."""

    hessians: Tree
    slopes: Tree
    constant: float

    def loss(self, tree: Tree) -> Any:
        terms = [
            0.5 * (tree[key] * (self.hessians[key] @ tree[key])).sum()
            - (self.slopes[key] * tree[key]).sum()
            for key in tree
        ]
        return sum(terms) + self.constant

    def gradient(self, tree: Tree) -> Tree:
        return {key: self.hessians[key] @ tree[key] - self.slopes[key] for key in tree}


def problem(leaves: str, rows: int = 64) -> Problem:
    """Features in units from 1 to 5, and weights outside of all sets."""
    rng = np.random.default_rng(0)
    hessians, slopes, constant = {}, {}, 0.0
    for key in leaves:
        m, n = SHAPES[key]
        x = rng.normal(size=(rows, m)) * np.geomspace(1, 5, m)
        y = x @ rng.normal(size=(m, n))
        hessians[key], slopes[key] = x.T @ x / rows, x.T @ y / rows
        constant += 0.5 * (y**2).sum() / rows
    return Problem(hessians, slopes, constant)


def minimum(task: Problem, project: Callable[[Tree], Tree], steps: int = 20_000) -> float:
    """The least loss in the set, by projected gradient descent in float64."""
    step = 1 / max(np.linalg.eigvalsh(h).max() for h in task.hessians.values())
    tree = project(start(task, np.float64))
    for _ in range(steps):
        slope = task.gradient(tree)
        new = project({key: tree[key] - step * slope[key] for key in tree})
        gap = max(np.abs(new[key] - tree[key]).max() for key in tree)
        tree = new
        if gap < 1e-13:
            break
    return float(task.loss(tree))


def start(task: Problem, dtype: Any) -> Tree:
    rng = np.random.default_rng(1)
    return {key: (0.1 * rng.normal(size=SHAPES[key])).astype(dtype) for key in task.hessians}


def train(
    task: Problem, tx: optax.GradientTransformation, finish: Callable[[Any], Any], steps: int
) -> np.ndarray:
    """The losses of each step, for gradients of each size."""
    of_arrays = Problem(*(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), task[:2])), task.constant)

    def run(size: jax.Array) -> jax.Array:
        def step(carry: Any, _: Any) -> Any:
            weights, state = carry
            grads = jax.tree.map(lambda g: g * size, of_arrays.gradient(weights))
            updates, state = tx.update(grads, state, weights)
            weights = finish(optax.apply_updates(weights, updates))
            return (weights, state), of_arrays.loss(weights)

        weights = jax.tree.map(jnp.asarray, start(task, np.float32))
        return jax.lax.scan(step, (weights, tx.init(weights)), None, steps)[1]

    return np.asarray(jax.jit(jax.vmap(run))(jnp.asarray(SIZES, jnp.float32)), np.float64)


def as_it_is(tree: Any) -> Any:
    return tree


def run(*, smoke: bool) -> list[Row]:
    steps = 50 if smoke else STEPS
    optimizers = dict(list(OPTIMIZERS.items())[:: 4 if smoke else 1])
    chosen = dict(list(sets().items())[:: 5 if smoke else 1])
    print(
        f"Constrained: loss over the constrained minimum after {steps:,} steps, the worst of gradients"
    )
    print("times 1e-4, 1 and 1e4: constrained (project_weights alone, optax.projections by hand)")
    print(f"{'':16}" + "".join(f"{name:>24}" for name in optimizers))
    rows: list[Row] = []
    for label, given in chosen.items():
        found = [_row(label, given, name, steps) for name in optimizers]
        print(f"{label:16}" + "".join(f"{_cell(row):>24}" for row in found), flush=True)
        rows += found
    return rows


def _row(label: str, given: Set, name: str, steps: int) -> Row:
    task = problem(given.leaves)
    least = minimum(task, given.exact)
    inner = OPTIMIZERS[name](lambda rate: optax.cosine_decay_schedule(rate, steps))
    ways = {
        "ours": (optax_clip.constrained(inner, given.constraint), as_it_is),
        "projected": (optax.chain(inner, optax_clip.project_weights(given.constraint)), as_it_is),
    }
    if given.optax is not None:
        ways["optax"] = inner, given.optax
    losses = {way: train(task, *how, steps) / least for way, how in ways.items()}
    shown = np.unique(np.geomspace(1, steps, CURVE).astype(int)) - 1
    curves = {f"{way}_curve": x[1, shown].tolist() for way, x in losses.items()}
    worst = {way: float(x[:, -1].max()) for way, x in losses.items()}
    row: Row = {"group": "constrained", "name": label, "optimizer": name, **worst}
    return row | curves | {"steps": (shown + 1).tolist()}


def _cell(row: Row) -> str:
    others = ", ".join(f"{row[way]:.3f}" for way in ("projected", "optax") if way in row)
    return f"{row['ours']:.4f} ({others})"
