"""Time and error of the projections, beside those of Optax.

Ratios of medians: each pair runs in turn, A B A B, in one process. Errors are the largest of an entry,
relative to the radius, against float64 NumPy.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_clip
from benchmarks._timing import Row, medians


def exact_simplex(x: np.ndarray, total: float) -> np.ndarray:
    """The nearest point of the simplex in float64, by sorting."""
    x = x - np.max(x)
    ordered = np.sort(x)[::-1]
    thetas = (np.cumsum(ordered) - total) / np.arange(1, x.size + 1)
    theta = thetas[np.nonzero(ordered > thetas)[0].max()]
    return np.maximum(x - theta, 0)


def exact_l1(x: np.ndarray, radius: float) -> np.ndarray:
    return np.sign(x) * exact_simplex(np.abs(x), radius) if np.abs(x).sum() > radius else x


def exact_spectral(x: np.ndarray, radius: float) -> np.ndarray:
    u, s, v = np.linalg.svd(x, full_matrices=False)
    return (u * np.minimum(s, radius)) @ v


def svd(x: jax.Array, radius: float) -> jax.Array:
    u, s, v = jnp.linalg.svd(x, full_matrices=False)
    return (u * jnp.minimum(s, radius)) @ v


def row(name: str, pair: tuple[Any, Any], exact: Any, x: np.ndarray, radius: float, repeats: int) -> Row:
    ours, theirs = medians(pair, x, repeats)
    wanted = exact(x.astype(np.float64), radius)
    errors = [np.abs(np.asarray(jax.jit(f)(x), np.float64) - wanted).max() / radius for f in pair]
    return show(name, ours, theirs, *errors)


def show(name: str, ours: float, theirs: float, *errors: float) -> Row:
    """Print one line of the table, and return it for bench.json."""
    times = f"{ours * 1e3:9.1f}{theirs * 1e3:9.1f}{theirs / ours:7.1f}"
    print(f"{name:32}{times}" + "".join(f"{x:{n}.1e}" for x, n in zip(errors, (11, 9), strict=False)))
    found = dict(zip(("our_error", "their_error"), map(float, errors), strict=False))
    spent = {"ours_ms": ours * 1e3, "theirs_ms": theirs * 1e3, "theirs_to_ours": theirs / ours}
    return {"group": "projections", "name": name.strip(), "dtype": "float32", **spent, **found}


def projection(constraint: optax_clip.Constraint) -> Callable[[Any], Any]:
    return lambda x: optax_clip.project(x, constraint)


def power_step(x: Any, radius: float) -> Callable[[Any], Any]:
    """One update of the cheap form, whose state goes from step to step."""
    tx = optax_clip.project_weights(optax_clip.spectral_ball(radius, power_iterations=1))
    state = tx.init(jnp.asarray(x))
    return lambda x: tx.update(x, state, x)[0]


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.projections", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="small arrays, to see that it runs")
    run(smoke=parser.parse_args().smoke)


def run(*, smoke: bool) -> list[Row]:
    n, side, repeats = (4_000, 16, 1) if smoke else (4_000_000, 512, 5)
    rng = np.random.default_rng(0)
    normal = rng.normal(size=n).astype(np.float32)
    matrices = {
        f"{side} x {side}": rng.normal(size=(side, side)).astype(np.float32),
        f"{side // 2} x {8 * side}": rng.normal(size=(side // 2, 8 * side)).astype(np.float32),
    }
    print(
        f"Projections: {n:,} float32 entries against optax.projections, matrices against jnp.linalg.svd"
    )
    print(f"{'':32}{'ours, ms':>9}{'theirs':>9}{'ratio':>7}{'our error':>11}{'theirs':>9}")
    rows = []
    for radius in (1.0, 100.0, n / 40):
        theirs = functools.partial(optax.projections.projection_l1_ball, scale=radius)
        pair = projection(optax_clip.norm_ball(radius, ord=1)), theirs
        rows.append(row(f"L1 ball, radius {radius:g}", pair, exact_l1, normal, radius, repeats))
    for total, offset in ((1.0, 0.0), (100.0, 0.0), (1.0, 1e4)):
        theirs = functools.partial(optax.projections.projection_simplex, scale=total)
        pair = projection(optax_clip.simplex(total)), theirs
        x = normal + np.float32(offset)
        rows.append(
            row(f"simplex {total:g}, entries near {offset:g}", pair, exact_simplex, x, total, repeats)
        )
    for name, x in matrices.items():
        for factor in (1.2, 30.0):
            radius = float(np.linalg.norm(x, 2)) / factor
            for method in ("eigh", "polar"):
                ball = optax_clip.spectral_ball(radius, method=method)
                pair = projection(ball), functools.partial(svd, radius=radius)
                label = f"{method}, {name}, {factor:g} r"
                rows.append(row(label, pair, exact_spectral, x, radius, repeats))
        first, second = medians([power_step(x, radius), pair[0]], x, repeats)
        rows.append(show("  one power iteration, polar", first, second))
    return rows + methods((8, 16) if smoke else (64, 128, 256, 512, 1024), 1 if smoke else 3)


def methods(sides: tuple[int, ...], repeats: int) -> list[Row]:
    """Products against LAPACK for square matrices just outside the ball."""
    print(f"\n{'':32}{'polar, ms':>9}{'eigh':>9}{'ratio':>7}{'polar error':>11}{'eigh':>9}")
    rows = []
    for side in sides:
        x = np.random.default_rng(0).normal(size=(side, side)).astype(np.float32)
        radius = float(np.linalg.norm(x, 2)) / 1.2
        pair = [projection(optax_clip.spectral_ball(radius, method=m)) for m in ("polar", "eigh")]
        rows.append(row(f"polar and eigh, {side} x {side}", pair, exact_spectral, x, radius, repeats))
    return rows


if __name__ == "__main__":
    main()
