"""From a wanted weight to an update that reaches it, after `optax.apply_updates` has rounded."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from optax_clip._numerics import is_float8, straight_through


def sum_dtype(p: Any, u: Any) -> Any:
    """The dtype that JAX adds two arrays in, which strict promotion would refuse to name."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(p.dtype, u.dtype)


def carrier(p: Array, u: Array) -> Any:
    """A dtype of at least 32 bits that holds the numbers of both arrays."""
    return (
        np.promote_types(sum_dtype(p, u), np.float32) if not is_float8(sum_dtype(p, u)) else jnp.float32
    )


def as_stored(x: Array, dtype: Any) -> Array:
    """``x`` as an array of ``dtype`` holds it, in the wide dtype of ``x``.

    XLA contracts a product with the sum that follows, and keeps 16-bit results in 32 bits; neither
    passes what stands here. A clamp to the finite numbers does it without writing to memory.
    """
    if dtype == jnp.bfloat16 and x.dtype == jnp.float32:
        return lax.reduce_precision(x, 8, 7)
    if dtype != x.dtype:
        stored: Array = lax.optimization_barrier(x.astype(dtype))
        return stored.astype(x.dtype)
    info = jnp.finfo(dtype)
    least, most = float(info.smallest_normal), float(info.max)
    size = jnp.abs(x)
    return lax.select((size >= least) & (size <= most), jnp.clip(x, -most, most), x)


def add_as_apply_updates(p: Array, u: Array) -> Array:
    """``p + u`` as `optax.apply_updates` rounds it, in the dtype of ``p``.

    Of two bfloat16 numbers the float32 sum rounds to the same, and costs a GPU's compiler less.
    """
    wide = sum_dtype(p, u)
    if p.dtype == jnp.bfloat16 and wide.itemsize <= 4:
        total = p.astype(jnp.float32) + u.astype(jnp.float32)
        return lax.reduce_precision(total, 8, 7).astype(p.dtype)
    rounded = (p.astype(wide) + u.astype(wide)).astype(p.dtype)
    exact = p.dtype == wide and wide.itemsize >= 4
    return rounded if exact else lax.optimization_barrier(rounded)


def held(p: Array, u: Array) -> Array:
    """An update that is made in the pass which adds it to ``p``, kept apart from what makes it.

    What comes from memory needs it not.
    """
    if jnp.iscomplexobj(u):
        return lax.complex(held(p.real, u.real), held(p.real, u.imag))
    return as_stored(u.astype(carrier(p, u)), u.dtype).astype(u.dtype)


def land(
    p: Array, u: Array, reached: Array, target: Array,
    *, shrinks: bool | None = True, bounds: tuple[Array, Array] | None = None,
) -> Array:  # fmt: skip
    """An update in the dtype of ``u`` that takes ``p`` to ``target``, in the set after rounding.

    ``target - p`` rounds, and so does the sum: where that misses, the next number is the update. A
    target equal to what ``u`` reaches keeps ``u``.

    Args:
        p: weights.
        u: their update, from memory or `held`.
        reached: ``p + u`` as it rounds.
        target: where they shall be, in the dtype of ``p``.
        shrinks: whether the set stays a set when entries shrink; a sum then misses it that is not
            between 0 and the target. If not, one that is on the side of the target that ``reached`` was
            on. None: it has no inside, so the nearest sum is the best one, and steps to one side would
            add up.
        bounds: of each entry, or of its modulus; a sum outside misses.
    """
    if jnp.iscomplexobj(p):
        parts = [[part(x) for x in (p, u, reached, target)] for part in (jnp.real, jnp.imag)]
        shrinks = shrinks if bounds is None else True
        return lax.complex(*(land(*part, shrinks=shrinks) for part in parts)).astype(u.dtype)
    wide = carrier(p, u)
    w, s, t = (x.astype(wide) for x in (p, reached, target))
    new = _rounded(t - w, u.dtype)
    if bounds is not None or shrinks is not None:
        low, high = bounds or _room(s, t, shrinks=shrinks)
        probe = add_as_apply_updates(p, new.astype(u.dtype)).astype(wide)
        step = _to_the_next(new, u.dtype)
        above, below = probe > high.astype(wide), probe < low.astype(wide)
        new = _rounded(jnp.where(above, new - step, jnp.where(below, new + step, new)), u.dtype)
    kept = straight_through(u.astype(wide), new)
    return jnp.where(s == t, kept, new).astype(u.dtype)


def _rounded(x: Array, dtype: Any) -> Array:
    """What is no product needs no more than its own rounding."""
    return x if x.dtype == dtype else as_stored(x, dtype)


def _room(reached: Array, target: Array, *, shrinks: bool | None) -> tuple[Array, Array]:
    """Between which numbers a sum is in the set."""
    if shrinks:
        return jnp.minimum(target, 0), jnp.maximum(target, 0)
    low = jnp.where(reached < target, target, -jnp.inf)
    return low, jnp.where(reached > target, target, jnp.inf)


def _to_the_next(d: Array, dtype: Any) -> Array:
    """What takes ``d`` to the next number of a dtype, once it is rounded: 0.7 to 1.4 of their spacing.

    Only a difference that was rounded can miss. In its own dtype that is a normal number; in a narrower
    one it may be below those, where the spacing is that of the smallest.
    """
    info, size = jnp.finfo(dtype), jnp.abs(lax.stop_gradient(d))
    if dtype != d.dtype:
        size = jnp.maximum(size, float(info.smallest_normal))
    return size * (0.7 * float(info.eps))
