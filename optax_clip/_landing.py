"""From a wanted weight to an update that reaches it, after `optax.apply_updates` has rounded."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from optax_clip._numerics import is_float8, nextafter, straight_through


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
    if dtype == jnp.bfloat16:
        return lax.reduce_precision(x, 8, 7)
    if jnp.finfo(dtype).bits <= 16:
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
    return lax.optimization_barrier(rounded) if p.dtype.itemsize < 4 else rounded


def reach(p: Array, u: Array) -> Array:
    """Where the update takes the weights."""
    if jnp.iscomplexobj(p):
        return lax.complex(reach(p.real, u.real), reach(p.imag, u.imag))
    return add_as_apply_updates(p, as_stored(u.astype(carrier(p, u)), u.dtype).astype(u.dtype))


def land(p: Array, u: Array, reached: Array, target: Array, *, shrinks: bool | None) -> Array:
    """An update in the dtype of ``u`` that takes ``p`` to ``target``, in the set after rounding.

    ``target - p`` rounds, and so does the sum: one neighbouring step of the update mends a miss.
    A target equal to what ``u`` reaches keeps ``u``.

    Args:
        p: weights.
        u: their update.
        reached: ``p + u`` as it rounds.
        target: where they shall be, in the dtype of ``p``.
        shrinks: whether the set stays a set when entries shrink; it is then missed where the sum is
            longer than the target. If not, it is missed where the sum ends on the side of the target
            that ``reached`` was on. None: it has no inside, so the nearest sum is the best one, and
            steps to one side would add up.
    """
    if jnp.iscomplexobj(p):
        parts = [[part(x) for x in (p, u, reached, target)] for part in (jnp.real, jnp.imag)]
        return lax.complex(*(land(*part, shrinks=shrinks) for part in parts)).astype(u.dtype)
    wide = carrier(p, u)
    w, s, t = (x.astype(wide) for x in (p, reached, target))
    new = as_stored(t - w, u.dtype)
    probe = add_as_apply_updates(p, new.astype(u.dtype)).astype(wide)
    if shrinks:
        other_side = (probe > 0) & (t < 0) | (probe < 0) & (t > 0)
        missed, up = (jnp.abs(probe) > jnp.abs(t)) | other_side, new < -w
    else:
        missed, up = (probe > t) & (s > t) | (probe < t) & (s < t), s < t
    if shrinks is not None:
        new = jnp.where(missed, _neighbour(new, up, u.dtype), new)
    kept = straight_through(u.astype(wide), new)
    return as_stored(jnp.where(s == t, kept, new), u.dtype).astype(u.dtype)


def _neighbour(x: Array, up: Array, dtype: Any) -> Array:
    """The next number of ``dtype``, above or below, in the wide dtype of ``x``."""
    ends = jnp.where(up, jnp.inf, -jnp.inf).astype(dtype)
    if dtype != jnp.bfloat16:
        return nextafter(x.astype(dtype), ends).astype(x.dtype)
    bits = lax.bitcast_convert_type(lax.stop_gradient(x), jnp.int32)
    one = jnp.int32(1 << 16)  # a bfloat16 is the upper half of a float32
    moved = jnp.where((x > 0) == up, bits + one, bits - one)
    from_zero = jnp.where(up, one, one | jnp.int32(-(2**31)))
    stepped = lax.bitcast_convert_type(jnp.where(x == 0, from_zero, moved), jnp.float32)
    return straight_through(stepped, x)
