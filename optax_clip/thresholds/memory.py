"""What the memories of the rules share.

A memory is a dict of arrays: statistics in the dtype of the norms, counts in int32. It starts as zeros,
so that zeros reset it.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from optax_clip._numerics import as_dtype

T = TypeVar("T")


def counts(norms: Array) -> Array:
    """One count an entry, 0 at first."""
    return jnp.zeros_like(norms, jnp.int32)


def count(x: Any) -> Array:
    """An argument of a rule beside its counts."""
    return as_dtype(x, jnp.int32)


def number(x: Any, norms: Array) -> Array:
    """An argument of a rule in the dtype of the norms."""
    return as_dtype(x, norms.dtype)


def usable(norms: Array) -> Array:
    """Is there a norm to learn from? A zero one says that nothing came through."""
    return jnp.isfinite(norms) & (norms > 0)


def select(flag: Array, new: T, old: T) -> T:
    """The new memory of the entries whose flag is set, the old one of the others."""
    chosen: T = jax.tree.map(lambda x, y: jnp.where(flag, x, y), new, old)
    return chosen


def push(window: Array, value: Array, flag: Array) -> Array:
    """Values in the order of their coming, the newest last; where the flag is not set, as they were."""
    return jnp.where(flag[None], jnp.concatenate([window[1:], value[None]]), window)
