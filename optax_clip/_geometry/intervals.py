"""Entries between two bounds, complex ones by modulus."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from optax_clip._numerics import (
    accumulator,
    aligned,
    power_of_two,
    precise,
    reciprocal,
    round_down,
    round_up,
    scale,
    widen,
)

Bounds = tuple[Array, Array]  # the lower and the upper one of a leaf


def nearest(x: Array, low: Array, high: Array, *, inside: float = 0) -> tuple[Array, Array]:
    """Which entries are to change, and to what, in the wide dtype; complex ones shorter by a share.

    What is between the bounds keeps its bits: a device that flushes subnormal numbers takes them for 0.
    """
    wide = widen(x, accumulator([x]))
    low, high = (end.astype(jnp.finfo(wide.dtype).dtype) for end in (low, high))
    y = _within_modulus(wide, high, inside) if jnp.iscomplexobj(x) else _between(wide, low, high)
    return (wide != y) | (low == high), y


def clamp(x: Array, low: Array, high: Array) -> Array:
    """Entries in [low, high], complex ones a few roundings inside where they were longer."""
    changed, y = nearest(x, low, high, inside=4 * float(jnp.finfo(high.dtype).eps))
    return lax.select(changed, y.astype(x.dtype), x)


def length(x: Array, low: Array, high: Array) -> Array:
    """What the norm of an entry between bounds needs: the entry, or its modulus."""
    return _between(jnp.abs(x) if jnp.iscomplexobj(x) else widen(x, low.dtype), low, high)


def _between(x: Array, low: Array, high: Array) -> Array:
    return jnp.minimum(jnp.maximum(x, low), high)


def _within_modulus(x: Array, high: Array, inside: float) -> Array:
    """Rescale to a modulus near 1 first: that of a finite number can overflow.

    An infinite part alone gives the direction.
    """
    parts, infinite = (x.real, x.imag), jnp.isinf(x.real) | jnp.isinf(x.imag)
    ends = lax.complex(*(jnp.where(jnp.isinf(part), jnp.sign(part), 0) for part in parts))
    unit = reciprocal(power_of_two(jnp.maximum(*map(jnp.abs, parts))))
    way = jnp.where(infinite, ends, scale(x, unit))
    over = ~(jnp.abs(x) <= high)
    bounded = scale(way, high * (1 - inside) / jnp.where(over, jnp.abs(way), 1))
    return jnp.where(over & ~jnp.isnan(x), bounded, x)


def outside(x: Array, low: Array, high: Array) -> Array:
    """How far each entry is outside; infinity counts as the largest number, which is no bound."""
    wide = accumulator([x])
    most = float(jnp.finfo(wide).max)
    size = jnp.clip(jnp.abs(x) if jnp.iscomplexobj(x) else x.astype(wide), -most, most)
    low, high = (jnp.clip(end.astype(wide), -most, most) for end in (low, high))
    return jnp.maximum(size - high, low - size)


def inwards(x: Array, low: Any, high: Any) -> Bounds:
    """Bounds beside a leaf, rounded to the inside into its dtype, or into that of its parts."""
    dtype = jnp.finfo(x.dtype).dtype
    low, high = round_up(precise(low), dtype), round_down(precise(high), dtype)
    return aligned(jnp.asarray(low), x.ndim), aligned(jnp.asarray(high), x.ndim)
