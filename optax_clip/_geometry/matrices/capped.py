"""Capped singular values: the nearest matrix whose largest singular value is at most a limit."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from optax_clip._geometry.matrices.polar import SIGNS, bound_of
from optax_clip._geometry.matrices.split import (
    Method,
    Split,
    adjoint,
    by_platform,
    identity,
    largest_entry,
    normalized,
    over_matrix,
    tall,
    wave,
)
from optax_clip._mesh import placed_like
from optax_clip._numerics import accumulator, power_of_two, scale, straight_through, widen

_NEAR = 2.5  # from so many times the goal one pass tells singular values near the goal to some eps
_STOP, _FAR = 2.0, 8.0  # what a pass before that caps at: times the goal, or the bound over this


@functools.partial(jax.jit, static_argnames=("method", "landing"))
def cap_singular_values(
    x: Array, limit: Array, *, method: Method | None = None, landing: bool = False
) -> Array:
    r"""Each matrix with its singular values capped, :math:`U \min(\Sigma, c) V^H`.

    With :math:`X = W^H W - c^2 I` the part outside is :math:`E = X (I + \mathrm{msign}(X)) / 2 c^2`, and
    the result :math:`W (I + E)^{-1/2} = W + W D`. Where all singular values are at most c the matrix
    comes back bit for bit, and so does one with an inf or NaN entry.

    Args:
        x: (..., m, n), any inexact dtype.
        limit: c >= 0, a number or (...).
        method: how the sign is found: ``"polar"``, products alone; ``"eigh"``, LAPACK's eigenvalues;
            None for the faster one on the platform. Static.
        landing: aim so far inside that the result, and a weight that an update takes there, end within
            the limit after rounding. Static.
    """
    dtype = accumulator([x])
    limit = jnp.maximum(limit.astype(dtype), 0)
    capped: Array = by_platform(functools.partial(_capped, landing=landing), method, x, limit)
    return capped


def _capped(x: Array, limit: Array, *, method: Method, landing: bool) -> Array:
    own, back = tall(x)
    split = Split.of(own)
    own = split.by_rows(own)
    y = widen(own, accumulator([x]))
    limit = split.over_batch(limit, y)
    finite = jnp.all(jnp.isfinite(y), axis=(-2, -1))
    y = jnp.where(over_matrix(finite), y, 0)
    peak = lax.stop_gradient(largest_entry(y))
    aim = _aim(limit, peak, x.dtype) if landing else limit
    new, reaches = _cap(split, y, aim, peak, method)
    move = over_matrix(finite & ~(reaches <= limit))
    return placed_like(split.by_rows(back(jnp.where(move, new.astype(x.dtype), own))), x)


def _aim(limit: Array, peak: Array, dtype: Any) -> Array:
    """Where to cap so as to land inside after rounding."""
    eps, own = float(jnp.finfo(dtype).eps), float(jnp.finfo(limit.dtype).eps)
    # Far outside the rounding of the update outgrows the ball; half of it is enough to aim inside.
    return jnp.maximum(limit * (1 - 2 * eps - 2 * own) - peak * (eps / 4), limit / 2)


class _Pass(NamedTuple):
    """A matrix on its way into the ball: ``value * unit == start @ (I + change)``."""

    value: Array
    goal: Array
    bound: Array  # on the largest singular value of value
    unit: Array
    change: Array
    outside: Array  # the projector on what lay outside in the last pass
    beyond: Array  # of which that was the positive part
    ends: Array


def _cap(split: Split, y: Array, limit: Array, peak: Array, method: Method) -> tuple[Array, Array]:
    """Singular values capped, and what the largest one reaches at least where it is above the limit."""
    start, unit = lax.stop_gradient(y), power_of_two(peak)
    ratio, most = lax.stop_gradient(limit) / unit, 2 * math.sqrt(math.prod(y.shape[-2:]))
    goal = jnp.clip(ratio, 2.0**-100, most)
    value = scale(start, over_matrix(1 / unit))
    bound, none = bound_of(split, value), jnp.zeros_like(split.inner(value, value))
    first = _Pass(value, goal, bound, unit, none, none, none, jnp.any(bound < 0))
    last = lax.while_loop(lambda now: ~now.ends, functools.partial(_nearer, split, method), first)
    reached = _largest_outside(split, scale(start, over_matrix(1 / unit)), last) * unit
    new = scale(last.value, over_matrix(last.unit), over_matrix(jnp.minimum(ratio / goal, 1)))
    # Derivatives take the singular vectors as constants: linear in the matrix, and in the limit.
    linear = y + split.product(y, last.change)
    safe = jnp.where(limit > 0, limit, 1)
    growth = over_matrix(safe / lax.stop_gradient(safe) - 1)
    edge = split.product(new, last.outside)
    return straight_through(new, linear + edge * growth.astype(edge.dtype)), reached


def _nearer(split: Split, method: Method, now: _Pass) -> _Pass:
    """Cap at the goal, or from far outside first at twice the goal, or 1/8 of the bound."""
    far = now.bound > _NEAR * now.goal
    ends = ~jnp.any(far)
    cap = jnp.where(far, jnp.maximum(_STOP * now.goal, now.bound / _FAR), now.goal)
    gram = split.inner(now.value, now.value)
    square = over_matrix(cap * cap)
    beyond = gram - scale(identity(gram), square)
    size = 1.01 * jnp.maximum(now.bound**2 - cap**2, cap**2)
    size = jnp.where(size == 0, 1, size)  # both squares underflow
    sign = SIGNS[method](split, scale(beyond, over_matrix(1 / size)))
    outside = (sign + identity(sign)) / 2
    part = split.product(beyond, outside)
    excess = scale((part + split.by_rows(adjoint(part))) / 2, over_matrix(1 / cap), over_matrix(1 / cap))
    change = _inverse_root(split, excess, jnp.maximum(now.bound / cap, 1.01))
    change = jnp.where(over_matrix(far | ends), change, 0)
    unit = jnp.where(far, power_of_two(cap), 1)
    value = now.value + split.product(now.value, change)
    return _Pass(
        scale(value, over_matrix(1 / unit)),
        now.goal / unit,
        jnp.where(far, 1.01 * cap, now.bound) / unit,
        now.unit * unit,
        now.change + change + split.product(now.change, change),
        outside,
        beyond,
        ends,
    )


def _inverse_root(split: Split, excess: Array, top: Array) -> Array:
    """``(I + E)^(-1/2) - I`` for ``0 <= E <= top^2 - 1``, by Newton and Schulz' iteration.

    Each step takes singular values s in [1, top] to ``s (1 - a (s^2 - 1))``, with this a none below 1.
    """

    def step(carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        root, left, top, _ = carry
        a = 1 / (top * (top + 1))
        move = scale(left, over_matrix(-a))
        twice = 2 * move + split.product(move, move)
        new = root + move + split.product(root, move), left + twice + split.product(left, twice)
        return *new, (2 / 3) * (1 + a) * jnp.sqrt((1 + a) / (3 * a)), top

    # Convergence is quadratic, so it ends after a step from within half the digits.
    enough = 1 + math.sqrt(jnp.finfo(top.dtype).eps) / 2
    start = jnp.zeros_like(excess), excess, top, 2 * top
    root: Array = lax.while_loop(lambda carry: jnp.any(carry[-1] > enough), step, start)[0]
    return root


def _largest_outside(split: Split, y: Array, last: _Pass) -> Array:
    """How far ``|y v| / |v|`` reaches for v among what lay outside: never above the largest value."""
    part = last.outside
    # Blocks that know nothing of each other may be outside, or nearly.
    first = split.by_rows(wave(part.shape[:-1], part.dtype)[..., None])

    def step(_: int, vector: Array) -> Array:
        for matrix in (part, last.beyond, part):
            vector = normalized(split.inner(matrix, vector))
        return vector

    # The first turn outside of the loop, where a mapped axis makes of its start what varies.
    image = split.product(y, lax.fori_loop(1, 12, step, step(0, first)))
    return jnp.sqrt(jnp.sum(jnp.abs(image) ** 2, axis=(-2, -1)))
