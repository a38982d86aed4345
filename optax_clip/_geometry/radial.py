"""Rescale the scopes of a tree: to a limit that a norm exceeds, or between two bounds."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from optax_clip import _xla
from optax_clip._numerics import broadcast_like, round_toward_zero, scale, straight_through, widen
from optax_clip._trees import Scopes
from optax_clip.norms import Norm


class Clip(NamedTuple):
    """Of the scopes of a cell: which change, by which two factors; which are over, and norms after."""

    changed: Array
    first: Array
    second: Array
    over: Array
    after: Array


class Move(NamedTuple):
    """Of the scopes of a cell: which change, which of them inwards, by which two factors, how far."""

    changed: Array
    over: Array
    first: Array
    second: Array
    gap: Array


def clip(norm: Norm, limit: Array, fine: Array, *, exactly: bool, spoilt: float) -> Clip:
    """``x limit / norm`` where the norm is over its limit, or ``exactly`` there; if not fine, spoilt."""
    limit = jnp.maximum(limit, 0)
    over = (norm.root != 0) | jnp.isnan(limit) if exactly else norm.exceeds(limit)
    zeroed = over | (limit == 0)  # also what the device takes for a norm of 0
    # Where nothing is rescaled the derivatives of the factors are 0, and not that times inf or NaN.
    used = zeroed & fine
    own = Norm(*(jnp.where(used, part, 1) for part in norm))
    first, second = own.factors(jnp.where(used, limit, 1))
    after = jnp.where(over, limit, norm.value)
    return Clip(zeroed | ~fine, first, jnp.where(fine, second, spoilt), over, after)


def move_between(norm: Norm, n: Any, low: Array, high: Array, *, sphere: bool) -> Move:
    """``x target / norm``, the target inside [low, high] by what a norm of n entries cannot tell."""
    high = jnp.where(jnp.isnan(low), low, high)
    margin, inside = norm_error(n, norm.root.dtype)
    ends = low * (1 + inside), high * (1 - inside)
    thin = ends[0] >= ends[1]  # thinner than what a norm can tell: onto the bound itself
    slack = jnp.where(thin, margin, -margin)
    over = ~(norm.root <= high * norm.scale * (1 + slack))
    under = norm.root < low * norm.scale * (1 - slack)
    target = jnp.where(over, jnp.where(thin, high, ends[1]), jnp.where(thin, low, ends[0]))
    movable = jnp.isfinite(norm.root) & (norm.root > 0)
    moves = movable & (over | under)
    used = movable & (moves | sphere)
    second = jnp.where(used, target, 1) / jnp.where(used, norm.root, 1)
    gap = jnp.where(moves, jnp.abs(norm.value - target), 0)
    return Move(moves, over, jnp.where(used, norm.scale, 1), second, gap)


def norm_error(n: Any, dtype: Any) -> tuple[Any, Any]:
    """What a norm of n entries cannot tell, relatively, and how far inside to aim beyond that."""
    unit = float(jnp.finfo(dtype).eps) / 2
    margin = (2 + np.log2(np.maximum(n, 1)) / 2) * unit
    return np.asarray(margin, dtype), np.asarray(margin + 6 * unit, dtype)


def beside_leaves(scopes: Scopes, plans: Sequence[Sequence[Array]]) -> list[tuple[Array, ...]]:
    """For each leaf the numbers of its scope.

    Behind a barrier, a cell at a time: XLA would else form them anew for each entry.
    """
    cells = [_xla.once(tuple(plan)) for plan in plans]
    columns = [scopes.per_leaf(list(column)) for column in zip(*cells, strict=True)]
    return list(zip(*columns, strict=True))


def rescaled(x: Array, first: Array, second: Array) -> Array:
    """``x * first * second`` in the precision of the factors."""
    return scale(widen(x, first.dtype), first, second)


def clipped(scopes: Scopes, xs: list[Array], plans: Sequence[Clip], kept: Array | None) -> list[Array]:
    """The leaves, clipped; of a step that is not ``kept`` zeros."""
    rows = beside_leaves(scopes, [plan[:3] for plan in plans])
    new = [_in_range(rescaled(x, *factors), x) for x, (_, *factors) in zip(xs, rows, strict=True)]
    if kept is not None:
        kept = _xla.once(kept)
        new = [lax.select(kept, y, jnp.zeros_like(y)) for y in new]
    return _xla.select(xs, [changed for changed, *_ in rows], new)


def _in_range(y: Array, x: Array) -> Array:
    """What is made longer stays finite in a narrow dtype."""
    most = float(jnp.finfo(x.dtype).max)
    return lax.clamp(jnp.asarray(-most, y.dtype), y, jnp.asarray(most, y.dtype)) if most < 2.0**16 else y


def moved(x: Array, changed: Array, over: Array, first: Array, second: Array, *, sphere: bool) -> Array:
    """``x * first * second`` where it ``changed``, rounded towards 0 if it was too long."""
    product = rescaled(x, first, second)
    new = product.astype(x.dtype)
    if sphere:
        x = straight_through(x, new)  # the derivative on the sphere is that of the projection too
    else:
        new = lax.select(broadcast_like(over, x), round_toward_zero(product, x.dtype), new)
    return lax.select(broadcast_like(changed, x), new, x)
