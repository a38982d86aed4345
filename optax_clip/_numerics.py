"""Float care: sums that cannot overflow, factors that keep subnormals, exact landing."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from optax_clip._validate import AxisName, axis_names

T = TypeVar("T")


def cond(pred: Any, true_fun: Callable[[], T], false_fun: Callable[[], T]) -> T:
    """`lax.cond`, but a concrete predicate takes its branch without compiling the other."""
    if isinstance(pred, jax.core.Tracer):
        result: T = lax.cond(pred, true_fun, false_fun)
        return result
    return true_fun() if pred else false_fun()


def accumulator(leaves: Sequence[Array]) -> Any:
    """float64 if a leaf is float64 or complex128, else float32."""
    wide = any(jnp.finfo(x.dtype).bits == 64 for x in leaves)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def as_dtype(x: Any, dtype: Any) -> Array:
    """A number in another dtype, inf where that cannot hold it."""
    with np.errstate(over="ignore"):
        return jnp.asarray(x, dtype)


def widen(x: Array, dtype: Any) -> Array:
    """``x`` in the accumulator's precision, complex if ``x`` is."""
    return x.astype(np.result_type(dtype, np.complex64) if jnp.iscomplexobj(x) else dtype)


def scale(x: Array, *factors: Array) -> Array:
    """``x * factors[0] * factors[1] ...``, formed in the factors' precision, rounded once."""
    y = widen(x, factors[0].dtype) if factors else x
    for factor in factors:
        if jnp.iscomplexobj(y):
            y = lax.complex(y.real * factor, y.imag * factor)
        else:
            y = y * factor
    return y.astype(x.dtype)


def replaced(x: Array, flag: Array, y: Array) -> Array:
    """``x``, and where the flag says so ``y``, rounded to the dtype of ``x``.

    XLA's CPU compiler copies neither a conversion to bfloat16 nor a choice between two such numbers into
    each pass that reads the result, but writes it to memory. With integers it does, hence the bits.
    """
    flag = broadcast_like(flag, x)
    plain = lax.select(flag, y.astype(x.dtype), x)
    if x.dtype != jnp.bfloat16 or y.dtype != jnp.float32:
        return plain
    bits = lax.bitcast_convert_type(lax.reduce_precision(y, 8, 7), jnp.uint32)
    upper = lax.convert_element_type(lax.shift_right_logical(bits, jnp.full_like(bits, 16)), jnp.uint16)
    chosen = lax.select(flag, upper, lax.bitcast_convert_type(x, jnp.uint16))
    return as_if(lax.bitcast_convert_type(chosen, x.dtype), plain)


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


def broadcast_like(flag: Array, x: Array) -> Array:
    """``flag`` in the shape of ``x``; against a truth made of ``x``, which brings its sharding along."""
    same = flag.shape == x.shape and jax.typeof(flag).sharding == jax.typeof(x).sharding
    return flag if same or flag.ndim == 0 else flag & ((x == x) | (x != x))


def varying_axes(x: Any) -> tuple[Hashable, ...]:
    """The manual mesh axes over which ``x`` differs between devices inside `jax.shard_map`."""
    aval = jax.typeof(x)
    manual = getattr(aval, "mat", None)
    names = getattr(aval, "vma", frozenset()) if manual is None else manual.varying
    return tuple(sorted(names, key=str))


def devices(names: tuple[Hashable, ...]) -> int:
    """How many devices, or mapped copies, share some mapped axes."""
    count: int = lax.psum(1, names) if names else 1
    return count


def mapped_over(axis_name: AxisName, x: Any = 0.0) -> tuple[Hashable, ...]:
    """The mapped axes to reduce ``x`` over: those given, and those that its type names."""
    given = axis_names(axis_name)
    try:
        devices(given)
    except NameError:
        raise NameError(
            "Expected axis_name to name axes that shard_map, vmap or pmap maps here, got "
            f"axis_name={axis_name!r}."
        ) from None
    return (*given, *(a for a in varying_axes(x) if a not in given))


def across_devices(
    values: Sequence[Array],
    names: Sequence[tuple[Hashable, ...]],
    collective: Callable[..., Any],
) -> list[Array]:
    """Reduce each value over its own mapped axes, one collective for all that share them."""
    out = list(values)
    for axes in dict.fromkeys(names):
        if axes:
            same = [i for i, other in enumerate(names) if other == axes]
            for i, value in zip(same, collective([out[i] for i in same], axes), strict=True):
                out[i] = value
    return out


def everywhere(flag: Array) -> Array:
    """Is it true on all devices? A branch that sums over devices has to be taken by all or by none."""
    (broken,) = across_devices([(~flag).astype(jnp.int32)], [varying_axes(flag)], lax.psum)
    return broken == 0


@jax.custom_jvp
def as_if(value: Array, source: Array) -> Array:
    """``value``, with the derivative of ``source``."""
    del source
    return value


as_if.defjvps(None, lambda tangent, out, value, source: tangent)


def apart(*parts: Array) -> tuple[Array, ...]:
    """The same arrays, for one sum over them.

    What several sums have in common, a float32 copy or a broadcast scalar, XLA's CPU compiler computes
    once and writes to memory. Behind barriers of their own they have nothing in common. Nor does XLA
    then turn ``(x k) (x k)`` for a constant x into ``k k x x``, which overflows.
    """
    if len(parts) == 1 and parts[0].dtype.itemsize > 2:
        return parts
    whole: tuple[Array, ...] = lax.optimization_barrier(parts)
    return whole


def positive(gap: Callable[..., Array], *parts: Array) -> Array:
    """1 where ``gap(*parts) > 0``, else 0, to be summed; NaN where it is NaN, less below 2^-126.

    In arithmetic that XLA's fast sums on CPU take in. They know neither comparison nor choice, whose
    result is then written to memory first.
    """
    dtype = accumulator(parts)
    constants = [jnp.asarray(c, dtype) for c in (0, 1, 1 / float(jnp.finfo(dtype).smallest_normal))]
    *own, zero, one, huge = apart(*lax.stop_gradient(parts), *constants)
    return jnp.minimum(jnp.maximum(gap(*(widen(x, dtype) for x in own)), zero) * huge, one)


def nextafter(x: Array, towards: Array) -> Array:
    """The neighbour of ``x``; its derivative is that of ``x``, as JAX has none for it."""
    return as_if(jnp.nextafter(*lax.stop_gradient((x, towards))), x)


def round_down(x: Any, dtype: Any) -> Any:
    """The largest number of ``dtype`` that is <= x. NumPy stays NumPy, where 0.1 is a float64."""
    xp: Any = jnp if isinstance(x, Array) else np
    with np.errstate(over="ignore", under="ignore"):
        y = xp.asarray(x).astype(dtype)
    y = lax.optimization_barrier(y) if xp is jnp else y
    below = (nextafter if xp is jnp else np.nextafter)(y, xp.full_like(y, -np.inf))
    return xp.where(y.astype(x.dtype) > x, below, y)


def round_up(x: Any, dtype: Any) -> Any:
    """The smallest number of ``dtype`` that is >= x."""
    return -round_down(-x, dtype)


def shorten(x: Array, dtype: Any) -> Array:
    """``x`` in another dtype, each part rounded to the side of zero."""
    if x.dtype == dtype:
        return x
    if jnp.iscomplexobj(x):
        part = jnp.finfo(dtype).dtype
        return lax.complex(shorten(x.real, part), shorten(x.imag, part))
    return jnp.copysign(round_down(jnp.abs(x), dtype), x.astype(dtype))


def clamp(x: Array, low: Array, high: Array) -> Array:
    """``x`` in [low, high]; what is inside keeps its bits, as a minimum may flush subnormals."""
    wide = widen(x, accumulator([x]))
    y = jnp.minimum(jnp.maximum(wide, low.astype(wide.dtype)), high.astype(wide.dtype))
    return replaced(x, wide != y, y)


def applied(p: Array, u: Array) -> Array:
    """``p + u`` as `optax.apply_updates` rounds it."""
    wide = _common(p, u)
    total = p.astype(wide) + u.astype(wide)
    if p.dtype == jnp.bfloat16 and total.dtype.itemsize <= 4:
        return lax.reduce_precision(total.astype(jnp.float32), 8, 7).astype(p.dtype)
    rounded = total.astype(p.dtype)
    # XLA may keep what it computes next in more than 16 bits.
    return lax.optimization_barrier(rounded) if p.dtype.itemsize < 4 else rounded


def _common(p: Array, u: Array) -> Any:
    """The dtype that JAX adds the two in, which strict promotion would refuse to name."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(p.dtype, u.dtype)


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
    wide = _common(p, u)
    new = (target.astype(wide) - p.astype(wide)).astype(u.dtype)
    probe = applied(p, new)
    if shrinks:
        missed = (jnp.abs(probe) > jnp.abs(target)) | (probe * target < 0)
        towards = -p.astype(u.dtype)
    else:
        missed = (probe > target) & (reached > target) | (probe < target) & (reached < target)
        towards = jnp.where(reached > target, -jnp.inf, jnp.inf).astype(u.dtype)
    if shrinks is not None:
        new = jnp.where(missed, nextafter(new, towards), new)
    return jnp.where(reached == target, as_if(u, new), new)
