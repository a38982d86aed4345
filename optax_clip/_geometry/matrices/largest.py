"""The largest singular value, and a power iteration that approaches it over the steps."""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from optax_clip._geometry.matrices.split import (
    Method,
    Split,
    by_platform,
    column,
    largest_entry,
    normalized,
    over_matrix,
    tall,
)
from optax_clip._mesh import placed_like
from optax_clip._numerics import accumulator, power_of_two, round_toward_zero, scale, widen
from optax_clip.norms import root, square_of


@functools.partial(jax.jit, static_argnames="method")
def largest_singular_value(x: Array, *, method: Method | None = None) -> Array:
    """The largest singular value (...) of each matrix (..., m, n), NaN where an entry is not finite.

    By products it is ``|W v|`` for v from 20 squarings of the Gram matrix: never above it, but for
    rounding, and at most 2e-6 below. Else by LAPACK's eigenvalues.
    """
    value: Array = by_platform(_largest, method, x)
    return value


def _largest(x: Array, *, method: Method) -> Array:
    y, _ = tall(widen(x, accumulator([x])))
    split = Split.of(y)
    y = split.by_rows(y)
    unit = power_of_two(largest_entry(y))
    y = scale(y, over_matrix(1 / unit))
    gram = split.inner(y, y)
    if method == "eigh":
        values = jnp.linalg.eigvalsh(split.put(gram), symmetrize_input=False)
        return root(jnp.maximum(jnp.max(values, axis=-1), 0)) * unit

    def square(power: Array, _: None) -> tuple[Array, None]:
        power = split.inner(power, power)
        return scale(power, over_matrix(1 / power_of_two(largest_entry(power)))), None

    power = lax.scan(square, gram, None, length=20)[0]
    # A constant to derivatives, which are then those of the largest value.
    vector = lax.stop_gradient(column(split, power, jnp.sum(jnp.abs(power) ** 2, axis=-2)))
    return root(jnp.sum(square_of(split.product(y, vector)), axis=(-2, -1))) * unit


@functools.partial(jax.jit, static_argnames="iterations")
def power_step(x: Array, goal: Array, vector: Array, iterations: int) -> tuple[Array, Array]:
    """``x min(1, goal / s)`` with s from power iterations, and the vector (..., n) to go on from.

    A matrix with an inf or NaN entry, or that maps the vector to 0, stays as it is, as does its vector.
    """
    split = Split.of(x)
    own = split.by_rows(x)
    wide = widen(own, accumulator([x]))
    goal, unit = split.over_batch(goal, wide), power_of_two(largest_entry(wide))
    y = lax.stop_gradient(scale(wide, over_matrix(1 / unit)))

    def iterate(vector: Array) -> tuple[Array, Array]:
        left = split.product(y, vector[..., None])
        right = split.inner(y, normalized(left))
        size = jnp.sqrt(jnp.sum(jnp.abs(right) ** 2, axis=(-2, -1)))
        return normalized(right)[..., 0], size

    start = split.by_rows(vector[..., None].astype(y.dtype))[..., 0]
    new, sigma = lax.fori_loop(1, iterations, lambda _, carry: iterate(carry[0]), iterate(start))
    over = jnp.isfinite(sigma) & ~(sigma <= goal / unit)
    first, second = jnp.where(over, 1 / unit, 1), jnp.where(over, goal, 1) / jnp.where(over, sigma, 1)
    smaller = round_toward_zero(scale(wide, over_matrix(first), over_matrix(second)), x.dtype)
    kept = jnp.where((jnp.isfinite(sigma) & (sigma > 0))[..., None], new, start)
    chosen = placed_like(jnp.where(over_matrix(over), smaller, own), x)
    return chosen, placed_like(kept.astype(vector.dtype), vector)
