"""The only room that speaks of XLA: one seam for platforms, and what XLA has to be told."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from optax_clip._numerics import accumulator, broadcast_like, straight_through, widen

T = TypeVar("T")
_THREADS = 2**17  # so many keep a GPU's memory busy


def by_platform(*arrays: Any, default: Callable[..., T], **ways: Callable[..., T]) -> T:
    """The way of the platform that the arrays are, or will be, on: ``cpu``, ``cuda`` or another."""
    leaves = jax.tree.leaves(arrays)
    if any(isinstance(x, jax.core.Tracer) for x in leaves):
        result: T = lax.platform_dependent(*arrays, default=default, **ways)
        return result
    return ways.get(_platform(leaves), default)(*arrays)


def _platform(leaves: Sequence[Any]) -> str:
    """What `lax.platform_dependent` calls the platform of concrete arrays: ``gpu`` is no name there."""
    arrays = [x for x in leaves if isinstance(x, Array)]
    device = next(iter(arrays[0].devices())) if arrays else jax.devices()[0]
    if device.platform != "gpu":
        return str(device.platform)
    return "cuda" if "cuda" in device.client.platform_version.lower() else "rocm"


Ends = tuple[tuple[int, int], ...]


def _by_hidden_starts(ends: Ends, vector: Array) -> list[Array]:
    """Starts from behind a barrier: equal leaves have equal kernels, which XLA compiles once."""
    starts = once([jnp.int32(start) for start, _ in ends])
    return [
        lax.dynamic_slice_in_dim(vector, start, stop - first)
        for start, (first, stop) in zip(starts, ends, strict=True)
    ]


def pieces(ends: Ends, vector: Array) -> list[Array]:
    """The parts of a vector."""

    def plain(vector: Array) -> list[Array]:
        return [vector[start:stop] for start, stop in ends]

    if ends == ((0, vector.size),):
        return [vector]
    return by_platform(vector, cpu=functools.partial(_by_hidden_starts, ends), default=plain)


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


def once(x: T) -> T:
    """A barrier: XLA computes this once, and not anew in each kernel that reads it."""
    computed: T = lax.optimization_barrier(x)
    return computed


def each_once(xs: Sequence[Array]) -> list[Array]:
    """A barrier a leaf: one over all is waited for as a whole, and mixes their meshes on older JAX."""
    return list(map(once, xs))


def separate_reads(*parts: Array) -> tuple[Array, ...]:
    """The same arrays, for one sum over them.

    XLA would write to memory what several sums share, a float32 copy or a broadcast scalar, and rewrite
    ``(x k) (x k)`` of a constant x as ``k k x x``, which overflows. So each has a barrier of its own.
    """
    if len(parts) == 1 and parts[0].dtype.itemsize > 2:
        return parts
    return once(parts)


def of_all(combine: Callable[[Array, Array], Array], parts: Sequence[Array]) -> Array:
    """One value of the values of many leaves.

    XLA would combine them anew in each kernel that reads the result, and compile for as long as the
    square of their number. So they stand behind one barrier, and the result behind another.
    """
    if len(parts) == 1:
        return parts[0]
    return once(functools.reduce(combine, once(list(parts))))


def one_more(found: list[Array], steps: list[Array]) -> list[Array]:
    """What a loop found, with the derivative of one more step; on CPU that step, as its sums are exact.

    Inside a loop a CPU sums entry after entry, which costs digits.
    """

    def as_found(found: list[Array], steps: list[Array]) -> list[Array]:
        return [straight_through(*pair) for pair in zip(found, steps, strict=True)]

    return by_platform(found, steps, cpu=lambda found, steps: list(steps), default=as_found)


def _select_bits(x: Array, flag: Array, y: Array) -> Array:
    flag = broadcast_like(flag, x)
    plain = lax.select(flag, y.astype(x.dtype), x)
    if x.dtype != jnp.bfloat16 or y.dtype != jnp.float32:
        return plain
    bits = lax.bitcast_convert_type(lax.reduce_precision(y, 8, 7), jnp.uint32)
    upper = lax.convert_element_type(lax.shift_right_logical(bits, jnp.full_like(bits, 16)), jnp.uint16)
    chosen = lax.select(flag, upper, lax.bitcast_convert_type(x, jnp.uint16))
    return straight_through(lax.bitcast_convert_type(chosen, x.dtype), plain)


def count_outside(x: Array, low: Array, high: Array, *, at: bool = False) -> Array:
    """How many entries are below ``low`` or above ``high``, or ``at`` one of them; complex by modulus.

    On a CPU in arithmetic, where an entry that is NaN makes the number NaN; ``x`` has to be in memory
    there, else it is written for this sum.
    """
    dtype = accumulator([x])
    low, high = low.astype(dtype), high.astype(dtype)

    def compared(x: Array, low: Array, high: Array) -> Array:
        x = size(x, dtype)
        outside = (x <= low) | (x >= high) if at else (x < low) | (x > high)
        return jnp.sum(outside, dtype=dtype)

    def in_arithmetic(x: Array, low: Array, high: Array) -> Array:
        # Arithmetic only: XLA's fast sum takes in no comparison or choice, which are written to memory
        # first. So are constants that two sums share: each takes its own from a barrier.
        info = jnp.finfo(dtype)
        least = float(info.smallest_normal)  # times its inverse any normal gap is at least 1
        own = [jnp.asarray(n, dtype) for n in (0, 1, 1 / least, float(info.max))]
        x, low, high, zero, one, huge, most = once((x, low, high, *own))
        x = size(x, dtype)
        finite = jnp.minimum(jnp.maximum(x, -most), most)  # inf - inf, at no bound, is NaN
        ends = high - finite, finite - low
        gap = jnp.minimum(*ends) if at else -jnp.minimum(*ends)
        number = jnp.sum(jnp.minimum(jnp.maximum(gap, zero) * huge, one))
        return x.size - number if at else number

    def size(x: Array, dtype: Any) -> Array:
        wide = widen(x, dtype)
        return jnp.abs(wide) if jnp.iscomplexobj(x) else wide

    return by_platform(lax.stop_gradient(x), low, high, cpu=in_arithmetic, default=compared)


def select(xs: list[Array], flags: list[Array], ys: list[Array]) -> list[Array]:
    """For each leaf the second of two choices where a flag says so, in the dtype of the first.

    XLA on a CPU writes to memory what is converted to bfloat16, or chosen between two such numbers, but
    computes integers anew in each pass that reads them. So bfloat16 is chosen by its bits there.
    """

    def plain(xs: list[Array], flags: list[Array], ys: list[Array]) -> list[Array]:
        each = zip(xs, flags, ys, strict=True)
        return [lax.select(broadcast_like(flag, x), y.astype(x.dtype), x) for x, flag, y in each]

    def by_bits(xs: list[Array], flags: list[Array], ys: list[Array]) -> list[Array]:
        return [_select_bits(x, flag, y) for x, flag, y in zip(xs, flags, ys, strict=True)]

    if not any(x.dtype == jnp.bfloat16 for x in xs):
        return plain(xs, flags, ys)
    return by_platform(xs, flags, ys, cpu=by_bits, default=plain)


def written_once(xs: list[Array]) -> list[Array]:
    """A barrier a leaf on an NVIDIA GPU, so that XLA stores what a norm and a projection read.

    It would compute that twice, and join the leaves that read from one vector to a kernel whose second
    result is copied.
    """
    return by_platform(xs, cuda=each_once, default=list)


def materialized(xs: Sequence[Array]) -> list[Array]:
    """Each as an array in memory, before it is measured.

    XLA would fuse the three forms of a gradient that a norm sums into the product that makes it, which
    on an accelerator then writes three gradients. On a CPU products are written anyway.
    """
    return by_platform(list(xs), cpu=list, default=each_once)


def two_sums(x: Array, y: Array) -> tuple[Array, Array]:
    """Two sums, as one of complex numbers: a second one splits an optimizer's kernel."""

    def as_complex(x: Array, y: Array) -> tuple[Array, Array]:
        both = jnp.sum(lax.complex(x, y))
        return both.real, both.imag

    def plain(x: Array, y: Array) -> tuple[Array, Array]:
        return jnp.sum(x), jnp.sum(y)

    return by_platform(x, y, cuda=as_complex, default=plain)


def sums_of_columns(axes: tuple[int, ...], xs: Sequence[Array]) -> list[Array]:
    """Several sums over the same axes, which are kept as size 1.

    Three sums of columns do not fit into the shared memory of one kernel, which is then split and reads
    twice. Sums of some rows at a time need none.
    """

    def plain(xs: list[Array]) -> list[Array]:
        return [jnp.sum(x, axis=axes, keepdims=True) for x in xs]

    first = xs[0]
    axis = max(axes, key=lambda a: first.shape[a], default=0)
    rows = min(first.size // _THREADS, first.shape[axis]) if axes else 0
    if rows < 4 or first.ndim - 1 in axes:
        return plain(list(xs))

    def by_rows(xs: list[Array]) -> list[Array]:
        return plain(once(_windows(axis, rows, xs)))

    return by_platform(list(xs), cuda=by_rows, default=plain)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _windows(axis: int, rows: int, xs: list[Array]) -> list[Array]:
    """Sums of so many rows each, of all arrays in one loop, for which JAX has no derivative."""
    zeros = [jnp.zeros((), x.dtype) for x in xs]
    return list(lax.reduce_window(xs, zeros, _each_added, *_window(axis, rows, xs[0])))


@_windows.defjvp
def _windows_jvp(axis: int, rows: int, primals: Any, tangents: Any) -> tuple[list[Array], list[Array]]:
    how = _window(axis, rows, primals[0][0])
    moved = [lax.reduce_window(t, jnp.zeros((), t.dtype), lax.add, *how) for t in tangents[0]]
    return _windows(axis, rows, *primals), moved


def _each_added(xs: list[Array], ys: list[Array]) -> list[Array]:
    return [x + y for x, y in zip(xs, ys, strict=True)]


def _window(axis: int, rows: int, x: Array) -> tuple[Any, Any, Any]:
    """Its sizes, its steps and the padding."""
    sizes = [rows if a == axis else 1 for a in range(x.ndim)]
    padding = [(0, -n % size) for n, size in zip(x.shape, sizes, strict=True)]
    return sizes, sizes, padding
