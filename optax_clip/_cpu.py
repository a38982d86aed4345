"""What XLA's CPU compiler has to be told; elsewhere stands the formula alone."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from optax_clip._mesh import all_devices_agree
from optax_clip._numerics import broadcast_like, scale, straight_through

T = TypeVar("T")


def instead(special: Callable[..., T]) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Give a formula another way that CPUs take: ``formula(static, *arrays)``, ``special`` likewise."""

    def decorate(formula: Callable[..., T]) -> Callable[..., T]:
        @functools.wraps(formula)
        def either(static: Any, *arrays: Any) -> T:
            leaves = jax.tree.leaves(arrays)
            if any(isinstance(x, jax.core.Tracer) for x in leaves):
                ways = functools.partial(special, static), functools.partial(formula, static)
                result: T = lax.platform_dependent(*arrays, cpu=ways[0], default=ways[1])
                return result
            return (special if _platform(leaves) == "cpu" else formula)(static, *arrays)

        return either

    return decorate


def by_platform(*arrays: Any, default: Callable[..., T], **special: Callable[..., T]) -> T:
    """The way of the platform that the arrays are, or will be, on."""
    leaves = jax.tree.leaves(arrays)
    if any(isinstance(x, jax.core.Tracer) for x in leaves):
        result: T = lax.platform_dependent(*arrays, default=default, **special)
        return result
    return special.get(_platform(leaves), default)(*arrays)


Ends = tuple[tuple[int, int], ...]


def _by_hidden_starts(ends: Ends, vector: Array) -> list[Array]:
    """Kernels of equal leaves that differ in no number are one to the compiler, which is slow."""
    starts = lax.optimization_barrier([jnp.int32(start) for start, _ in ends])
    return [
        lax.dynamic_slice_in_dim(vector, start, stop - first)
        for start, (first, stop) in zip(starts, ends, strict=True)
    ]


@instead(_by_hidden_starts)
def pieces(ends: Ends, vector: Array) -> list[Array]:
    """The parts of a vector."""
    return [vector[start:stop] for start, stop in ends]


def _platform(leaves: Sequence[Any]) -> str:
    for x in leaves:
        if isinstance(x, Array):
            return str(next(iter(x.devices())).platform)
    return jax.default_backend()


def cond(pred: Any, true_fun: Callable[[], T], false_fun: Callable[[], T]) -> T:
    """`lax.cond`, but a concrete predicate takes its branch without compiling the other."""
    if isinstance(pred, jax.core.Tracer):
        result: T = lax.cond(pred, true_fun, false_fun)
        return result
    return true_fun() if pred else false_fun()


@jax.custom_batching.custom_vmap
def for_all(flag: Array) -> Array:
    """Is it true for all that `jax.vmap` maps over? Of a branch on it one way is taken, else both."""
    return flag


@for_all.def_vmap
def _(size: int, batched: list[bool], flag: Array) -> tuple[Array, bool]:
    del size, batched
    return for_all(jnp.all(flag, axis=0)), False


def apart(*parts: Array) -> tuple[Array, ...]:
    """The same arrays, for one sum over them.

    What several sums have in common, a float32 copy or a broadcast scalar, is computed once and written
    to memory. Behind barriers of their own they have nothing in common. Nor is ``(x k) (x k)`` for a
    constant x then turned into ``k k x x``, which overflows.
    """
    if len(parts) == 1 and parts[0].dtype.itemsize > 2:
        return parts
    whole: tuple[Array, ...] = lax.optimization_barrier(parts)
    return whole


def sums_in_range(powers: Any, parts: list[tuple[Array, ...]]) -> tuple[list[Array], list[Array]]:
    """A fast sum, and where it is not to be trusted a second one with each scope brought into range.

    The extra sums of the formula would each cost a read.
    """
    plain = powers.sum([powers.wide(*apart(*part)) for part in parts])
    ones = [jnp.ones_like(s) for s in plain]
    if powers.never_out_of_range(parts):
        return plain, ones
    bad = powers.out_of_range(plain)
    trusted = [~jnp.any(high | low) for high, low in bad]

    def again() -> tuple[list[Array], list[Array]]:
        small, large = powers.small, powers.large
        scales = [
            jnp.where(high, small, jnp.where(low, large, 1)).astype(powers.dtype) for high, low in bad
        ]
        pairs = zip(parts, powers.scopes.per_leaf(scales), strict=True)
        separate = [apart(*part, k) for part, k in pairs]
        return powers.sum([scale(powers.wide(*part), k) for *part, k in separate]), scales

    everywhere = all_devices_agree(functools.reduce(operator.and_, trusted, jnp.array(True)))
    return cond(for_all(lax.stop_gradient(everywhere)), lambda: (plain, ones), again)


def one_more(found: list[Array], steps: list[Array]) -> list[Array]:
    """What a loop found, with the derivative of one more step; on CPU that step, as its sums are exact.

    Inside a loop a CPU sums entry after entry, which costs digits.
    """

    def as_found(found: list[Array], steps: list[Array]) -> list[Array]:
        return [straight_through(*pair) for pair in zip(found, steps, strict=True)]

    return by_platform(found, steps, cpu=lambda found, steps: list(steps), default=as_found)


def selected(_: None, xs: list[Array], flags: list[Array], ys: list[Array]) -> list[Array]:
    """The second of two choices where a flag says so, rounded to the dtype of the first.

    Neither a conversion to bfloat16 nor a choice between two such numbers is copied into each pass that
    reads the result, but written to memory. Integers are copied, hence the bits.
    """
    return [_select_bits(x, flag, y) for x, flag, y in zip(xs, flags, ys, strict=True)]


def _select_bits(x: Array, flag: Array, y: Array) -> Array:
    flag = broadcast_like(flag, x)
    plain = lax.select(flag, y.astype(x.dtype), x)
    if x.dtype != jnp.bfloat16 or y.dtype != jnp.float32:
        return plain
    bits = lax.bitcast_convert_type(lax.reduce_precision(y, 8, 7), jnp.uint32)
    upper = lax.convert_element_type(lax.shift_right_logical(bits, jnp.full_like(bits, 16)), jnp.uint16)
    chosen = lax.select(flag, upper, lax.bitcast_convert_type(x, jnp.uint16))
    return straight_through(lax.bitcast_convert_type(chosen, x.dtype), plain)


def indicator(gap: Array, zero: Array, one: Array, huge: Array) -> Array:
    """1 where ``gap > 0``, else 0, to be summed; NaN where it is NaN, less below the normal numbers.

    The fast sums take in arithmetic, but neither comparison nor choice, whose result is written to
    memory first. So are `constants` that two sums share: each takes its own from behind its barrier.
    """
    return jnp.minimum(jnp.maximum(gap, zero) * huge, one)


def constants(dtype: Any) -> tuple[Array, Array, Array]:
    """0, 1 and a number that takes every normal one above 1."""
    huge = 1 / float(jnp.finfo(dtype).smallest_normal)
    return jnp.asarray(0, dtype), jnp.asarray(1, dtype), jnp.asarray(huge, dtype)


def _selected(_: None, xs: list[Array], flags: list[Array], ys: list[Array]) -> list[Array]:
    """The second of two choices where a flag says so, rounded to the dtype of the first."""
    return [
        lax.select(broadcast_like(flag, x), y.astype(x.dtype), x)
        for x, flag, y in zip(xs, flags, ys, strict=True)
    ]


_select = instead(selected)(_selected)


def select(xs: list[Array], flags: list[Array], ys: list[Array]) -> list[Array]:
    """For each leaf the second of two choices where a flag says so, in the dtype of the first."""
    rounds = any(x.dtype == jnp.bfloat16 for x in xs)
    return (_select if rounds else _selected)(None, xs, flags, ys)
