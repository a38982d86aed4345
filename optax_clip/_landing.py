"""From a wanted weight to an update that reaches it, after `optax.apply_updates` has rounded."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from optax_clip._numerics import is_float8, straight_through


def as_stored(x: Array, dtype: Any) -> Array:
    """``x`` as an array of ``dtype`` holds it, in the wide dtype of ``x``.

    XLA contracts a product with the sum that follows, and keeps 16-bit results in 32 bits; neither
    passes what stands here. A clamp to the finite numbers does it without writing to memory.
    """
    if dtype != x.dtype:
        return _rounded(x, dtype)
    info = jnp.finfo(dtype)
    least, most = float(info.smallest_normal), float(info.max)
    size = jnp.abs(x)
    return lax.select((size >= least) & (size <= most), jnp.clip(x, -most, most), x)


def _rounded(x: Array, dtype: Any) -> Array:
    """The same for what is no product, and is left as it is in its own dtype."""
    if dtype == x.dtype:
        return x
    if dtype == jnp.bfloat16 and x.dtype == jnp.float32:
        return lax.reduce_precision(x, 8, 7)
    stored: Array = lax.optimization_barrier(x.astype(dtype))
    return stored.astype(x.dtype)


class Step(NamedTuple):
    """Real weights and their update, in a dtype of at least 32 bits that holds the numbers of both.

    CPUs convert a bfloat16 to the wide dtype and back wherever a formula says so, so it is done once.

    Args:
        p: weights.
        u: their update.
        dtypes: of the weights, of the update, and the one that JAX adds both in.
    """

    p: Array
    u: Array
    dtypes: tuple[Any, Any, Any]

    @classmethod
    def of(cls, p: Array, u: Array, *, written: bool = True) -> "Step":
        """An update that is not ``written`` to memory before is kept apart from what makes it."""
        with jax.numpy_dtype_promotion("standard"):
            added = jnp.promote_types(p.dtype, u.dtype)
        wide = jnp.dtype(np.float32) if is_float8(added) else np.promote_types(added, np.float32)
        v = u.astype(wide)
        return cls(p.astype(wide), v if written else as_stored(v, u.dtype), (p.dtype, u.dtype, added))

    @property
    def end(self) -> Array:
        """Where it takes the weights, as `optax.apply_updates` rounds their sum."""
        dtype, _, added = self.dtypes
        total = self.p + self.u
        return _rounded(_rounded(total, added) if is_float8(added) else total, dtype)

    def to(self, target: Array, ends: tuple[Array, Array] | None) -> "Step":
        """The update that takes the weights to a target, or where that misses, the next one inwards.

        ``target - p`` rounds, and so does the sum.

        Args:
            target: numbers of the dtype of the weights.
            ends: what the sum has to be between. None where the nearest sum is the best one.
        """
        _, dtype, _ = self.dtypes
        new = self._replace(u=_rounded(target - self.p, dtype))
        if ends is None:
            return new
        low, high = (x.astype(new.p.dtype) for x in ends)
        end, step = new.end, _to_the_next(new.u, dtype)
        inwards = jnp.where(end > high, new.u - step, jnp.where(end < low, new.u + step, new.u))
        return new._replace(u=_rounded(inwards, dtype))

    def unless_at(self, target: Array, ends: tuple[Array, Array] | None) -> Array:
        """The update to a target; itself, bit for bit, where that is where it leads."""
        new = self.to(target, ends).u
        kept = straight_through(self.u, new)
        return jnp.where(self.end == target, kept, new).astype(self.dtypes[1])


def _to_the_next(d: Array, dtype: Any) -> Array:
    """What takes ``d`` to the next number of a dtype, once it is rounded: 0.7 to 1.4 of their spacing.

    Only a difference that was rounded can miss. In its own dtype that is a normal number; in a narrower
    one it may be below those, where the spacing is that of the smallest. A step that is itself below
    the normal numbers would be flushed to 0.
    """
    info = jnp.finfo(dtype)
    step = 0.7 * float(info.eps)
    least = max(step * float(info.smallest_normal), float(jnp.finfo(d.dtype).smallest_normal))
    return jnp.maximum(jnp.abs(lax.stop_gradient(d)) * step, least)


def add_as_apply_updates(p: Array, u: Array, *, written: bool = True) -> Array:
    """``p + u`` as `optax.apply_updates` rounds it, in the dtype of ``p``."""
    return _by_parts(lambda p, u: Step.of(p, u, written=written).end.astype(p.dtype), p, u)


def land_between(p: Array, u: Array, low: Array, high: Array) -> Array:
    """An update that is made in the same pass, changed to one that takes ``p`` between two bounds."""
    step = Step.of(p, u, written=False)
    ends = low.astype(step.p.dtype), high.astype(step.p.dtype)
    return step.unless_at(jnp.clip(step.end, *ends), ends)


def land(p: Array, u: Array, target: Array, *, shrinks: bool | None, written: bool = True) -> Array:
    """An update changed to one that takes ``p`` to ``target``, in the set after rounding.

    Args:
        p: weights.
        u: their update.
        target: where they shall be, in the dtype of ``p``.
        shrinks: whether the set stays a set when entries shrink; a sum then misses it that is not
            between 0 and the target. If not, one that is on the side of the target from which it comes.
            None: it has no inside, so steps to one side would add up.
        written: whether the update comes from memory.
    """

    def each(p: Array, u: Array, target: Array) -> Array:
        step = Step.of(p, u, written=written)
        goal = target.astype(step.p.dtype)
        room = None if shrinks is None else _room(step.end, goal, shrinks=shrinks)
        return step.unless_at(goal, room)

    return _by_parts(each, p, u, target)


def _room(reached: Array, target: Array, *, shrinks: bool) -> tuple[Array, Array]:
    if shrinks:
        return jnp.minimum(target, 0), jnp.maximum(target, 0)
    low = jnp.where(reached < target, target, -jnp.inf)
    return low, jnp.where(reached > target, target, jnp.inf)


def _by_parts(act: Any, *xs: Array) -> Array:
    """Real and imaginary parts land by themselves."""
    if not jnp.iscomplexobj(xs[0]):
        real: Array = act(*xs)
        return real
    return lax.complex(*(act(*map(part, xs)) for part in (jnp.real, jnp.imag)))
