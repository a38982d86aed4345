"""What a transform writes into its state for `metrics` to read."""

import functools
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array, lax

from optax_clip._numerics import across_devices, cond, devices, mapped_over
from optax_clip._trees import place_like
from optax_clip._validate import AxisName


def first_record(name: str) -> dict[str, Array]:
    gauges = ("norm_before", "norm_after", "threshold", "fraction")
    counters = ("steps", "steps_clipped", "steps_nonfinite")
    return {f"{name}/{key}": jnp.zeros((), jnp.float32) for key in gauges} | {
        f"{name}/{key}": jnp.zeros((), jnp.int32) for key in counters
    }


def record(
    last: dict[str, Array],
    name: str,
    *,
    before: Array,
    after: Array,
    threshold: Array,
    over: Sequence[Array],
    finite: Array,
    axis_name: AxisName = None,
) -> dict[str, Array]:
    """The metrics of one step. ``over`` says of each scope, or entry, whether it was clipped."""
    fraction = share(over, axis_name)
    gauges = {
        "norm_before": before,
        "norm_after": after,
        "threshold": threshold,
        "fraction": jnp.where(finite & (fraction > 0), fraction, 0),
    }
    counts: dict[str, Array | bool] = {
        "steps": True,
        "steps_clipped": finite & (fraction > 0),
        "steps_nonfinite": ~finite,
    }
    new = {f"{name}/{key}": jnp.asarray(x).astype(jnp.float32) for key, x in gauges.items()}
    for key, happened in counts.items():
        new[f"{name}/{key}"] = increment(last[f"{name}/{key}"], happened)
    return place_like(new, last)


def share(
    flags: Sequence[Array],
    axis_name: AxisName = None,
    exactly: Callable[[], Sequence[Array]] | None = None,
) -> Array:
    """The share of True, or of 1, among all entries of some arrays, wherever they are.

    Where a flag is NaN, ``exactly`` gives the flags anew, from comparisons, which are slower.
    """
    names = [mapped_over(axis_name, x) for x in flags]
    size = max(sum(x.size * devices(axes) for x, axes in zip(flags, names, strict=True)), 1)

    def counted(flags: Sequence[Array]) -> Array:
        marked = [jnp.sum(x, dtype=jnp.float32) for x in flags]
        parts = across_devices(marked, names, lax.psum)
        total: Array = functools.reduce(jnp.add, parts, jnp.float32(0))
        return total

    number = counted(flags)
    if exactly is not None:
        number = cond(jnp.isnan(number), lambda: counted(exactly()), lambda: number)
    return number / size


def increment(count: Array, happened: Array | bool = True) -> Array:
    """Count up, and stay at the largest int32."""
    more: Array = happened & (count < 2**31 - 1)
    return count + more.astype(count.dtype)
