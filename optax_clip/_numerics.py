"""Float care: wide sums, factors that keep subnormals, one rounding at the end."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax


def accumulator(leaves: Sequence[Any]) -> Any:
    """float64 if a leaf is float64 or complex128, else float32."""
    wide = any(jnp.finfo(x.dtype).bits == 64 for x in leaves)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def as_dtype(x: Any, dtype: Any) -> Array:
    """A number in another dtype, inf where that cannot hold it."""
    with np.errstate(over="ignore"):
        return jnp.asarray(x, dtype)


def widen(x: Array, dtype: Any) -> Array:
    """``x`` in the accumulator's precision, complex if ``x`` is."""
    if x.dtype == dtype:
        return x
    return x.astype(np.result_type(dtype, np.complex64) if jnp.iscomplexobj(x) else dtype)


def scale(x: Array, *factors: Array) -> Array:
    """``x * factors[0] * factors[1] ...``, formed in the factors' precision, rounded once."""
    y = widen(x, factors[0].dtype)
    for factor in factors:
        y = lax.complex(y.real * factor, y.imag * factor) if jnp.iscomplexobj(y) else y * factor
    return y if y.dtype == x.dtype else y.astype(x.dtype)


def power_of_two(x: Array) -> Array:
    """The largest power of two <= x, kept where its inverse is normal; a constant to autodiff."""
    info = jnp.finfo(x.dtype)
    bits = jnp.dtype(f"uint{info.bits}")
    exponent = np.array(jnp.inf, x.dtype).view(bits)
    power = lax.bitcast_convert_type(
        lax.bitcast_convert_type(lax.stop_gradient(x), bits) & exponent, x.dtype
    )
    limit = 2.0 ** (info.maxexp - 2)
    return jnp.clip(power, 1 / limit, limit)


def reciprocal(power: Array) -> Array:
    """``1 / power`` of a power of two, in integers.

    Compilers turn ``(x / p) / (1 / p)`` into ``x p / p``, which underflows.
    """
    one = np.array(1, power.dtype)
    bits = jnp.dtype(f"uint{jnp.finfo(power.dtype).bits}")
    twice = np.array(2 * int(one.view(bits)), bits)
    return lax.bitcast_convert_type(twice - lax.bitcast_convert_type(power, bits), power.dtype)


def broadcast_like(flag: Array, x: Array) -> Array:
    """``flag`` in the shape of ``x``; against a truth made of ``x``, which brings its sharding along."""
    same = flag.shape == x.shape and jax.typeof(flag).sharding == jax.typeof(x).sharding
    return flag if same or flag.ndim == 0 else flag & ((x == x) | (x != x))


@jax.custom_jvp
def straight_through(value: Array, source: Array) -> Array:
    """``value``, with the derivative of ``source``."""
    del source
    return value


straight_through.defjvps(None, lambda tangent, out, value, source: tangent)


def has_nan(x: Array, **axes: Any) -> Array:
    """1 where an entry is NaN, else 0, over all or some axes.

    Maxima drop a NaN: a CPU's among thousands of entries, and those across devices. Sums do not, and a
    CPU's fast sum takes in a clamp, but no comparison.
    """
    return jnp.isnan(jnp.sum(jnp.clip(x, -1, 1), **axes)).astype(x.dtype)


def is_float8(dtype: Any) -> bool:
    return not jnp.issubdtype(dtype, jnp.complexfloating) and jnp.finfo(dtype).bits <= 8


@functools.cache
def float8_grid(dtype: Any) -> np.ndarray:
    """All finite numbers of a float8 type, ascending, in float32."""
    values = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    return np.unique(values[np.isfinite(values)])


def nextafter(x: Array, towards: Array) -> Array:
    """The neighbour of ``x``; its derivative is that of ``x``, as JAX has none for it."""
    x_, towards_ = lax.stop_gradient((x, towards))
    if not is_float8(x.dtype):
        return straight_through(jnp.nextafter(x_, towards_), x)
    grid = jnp.asarray(float8_grid(x.dtype))
    wide, goal = x_.astype(jnp.float32), towards_.astype(jnp.float32)
    step = jnp.sign(goal - wide).astype(jnp.int32)
    index = jnp.clip(jnp.searchsorted(grid, wide) + step, 0, grid.size - 1)
    return straight_through(grid[index].astype(x.dtype), x)


def round_down(x: Any, dtype: Any) -> Any:
    """The largest number of ``dtype`` that is <= x. NumPy stays NumPy, where 0.1 is a float64."""
    xp: Any = jnp if isinstance(x, Array) else np
    if is_float8(dtype):
        grid = xp.asarray(float8_grid(dtype), x.dtype)
        return grid[xp.maximum(xp.searchsorted(grid, x, side="right") - 1, 0)].astype(dtype)
    with np.errstate(over="ignore", under="ignore"):
        y = xp.asarray(x).astype(dtype)
    y = lax.optimization_barrier(y) if xp is jnp else y
    below = (nextafter if xp is jnp else np.nextafter)(y, xp.full_like(y, -np.inf))
    return xp.where(y.astype(x.dtype) > x, below, y)


def round_up(x: Any, dtype: Any) -> Any:
    """The smallest number of ``dtype`` that is >= x."""
    return -round_down(-x, dtype)


def round_toward_zero(x: Array, dtype: Any) -> Array:
    """``x`` in another dtype, each part rounded to the side of zero."""
    if x.dtype == dtype:
        return x
    if jnp.iscomplexobj(x):
        part = jnp.finfo(dtype).dtype
        return lax.complex(round_toward_zero(x.real, part), round_toward_zero(x.imag, part))
    if dtype == jnp.bfloat16 and x.dtype == jnp.float32:  # the upper half of the bits
        upper = lax.bitcast_convert_type(lax.stop_gradient(x), jnp.uint32) & jnp.uint32(0xFFFF0000)
        return straight_through(lax.bitcast_convert_type(upper, jnp.float32), x).astype(dtype)
    return jnp.copysign(round_down(jnp.abs(x), dtype).astype(x.dtype), x).astype(dtype)


def precise(x: Any) -> Any:
    """A concrete number in float64, so that it can be rounded inwards; a traced one as it is."""
    if isinstance(x, Array):
        return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x
    return np.asarray(x, np.float64)


def aligned(x: Array, ndim: int) -> Array:
    """``x`` with leading axes of size 1, as NumPy broadcasts; a number as it is."""
    return x.reshape((1,) * (ndim - x.ndim) + x.shape) if x.ndim else x
