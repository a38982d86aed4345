"""What XLA's compiler for NVIDIA's GPUs has to be told; elsewhere stands the formula alone."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from optax_clip._cpu import by_platform

_THREADS = 2**17  # so many keep a GPU's memory busy


def written_once(xs: list[Array]) -> list[Array]:
    """Each written to memory: what a norm and a projection read is else computed a second time.

    Leaves that read their numbers from one vector else share a kernel, whose second result is copied.
    """
    return by_platform(xs, cuda=lambda xs: list(map(lax.optimization_barrier, xs)), default=list)


def two_sums(x: Array, y: Array) -> tuple[Array, Array]:
    """Two sums, as one of complex numbers: a second one splits an optimizer's kernel."""

    def as_complex(x: Array, y: Array) -> tuple[Array, Array]:
        both = jnp.sum(lax.complex(x, y))
        return both.real, both.imag

    def apart(x: Array, y: Array) -> tuple[Array, Array]:
        return jnp.sum(x), jnp.sum(y)

    return by_platform(x, y, cuda=as_complex, default=apart)


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
        return plain(lax.optimization_barrier(_windows(axis, rows, xs)))

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
