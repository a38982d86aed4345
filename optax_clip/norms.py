"""Measure: the norm of a whole tree, of each leaf, of each unit."""

import functools
import math
import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from optax_clip import _validate
from optax_clip._numerics import (
    accumulator,
    across_devices,
    apart,
    cond,
    devices,
    everywhere,
    mapped_over,
    power_of_two,
    scale,
    varying_axes,
    widen,
)
from optax_clip._trees import Layout, path_string, shape_of
from optax_clip._validate import AxisName, Ord, Scope

__all__ = ["global_norm", "per_layer", "tree_norms"]

_SMALL = 2**16  # entries of a leaf that XLA takes longer to compile a sum for than to run it

# What is summed for one leaf, the axes to reduce, and the mapped axes.
_Term = tuple[Array, tuple[int, ...], tuple[Hashable, ...]]


class Norm(NamedTuple):
    """A norm kept as ``root / scale``, ``scale`` a power of two, so that neither part overflows."""

    root: Array
    scale: Array

    @property
    def value(self) -> Array:
        return self.root / self.scale

    @classmethod
    def of(cls, value: Array) -> "Norm":
        """Bring ``value`` into [1, 2)."""
        power = power_of_two(value)
        return cls(value / power, 1 / power)


def global_norm(tree: Any, *, ord: Ord = None, axis_name: AxisName = None) -> Array:
    r"""Norm of the whole tree as one vector.

    Unlike a plain root of a sum of squares it neither overflows nor underflows: float16 gradients of
    300, float32 gradients of 1e25 or 1e-30 have their true norm.

    .. math:: \|g\|_p = \Big(\sum_i |g_i|^p\Big)^{1/p}

    Args:
        tree: arrays of any shape and float or complex dtype; complex entries count by modulus. Leaves
            of other dtypes and None are not counted.
        ord: ``None`` or 2, 1, ``math.inf``, any float p >= 1, or ``"rms"`` for the root of the mean
            square. Static.
        axis_name: mapped axes to sum over besides those that the types of the leaves name inside
            `jax.shard_map`; for `jax.pmap`, ``vmap(axis_name=...)`` and ``check_vma=False``.

    Returns:
        A float32 scalar, float64 if a leaf is. 0 for an empty tree; inf or NaN if an entry is, and inf
        where the norm itself is beyond the dtype. The derivative at a zero norm is 0. Entries below the
        smallest normal number count as 0 where the device flushes them, as CPUs do.

    Raises:
        ValueError: if ``ord`` is not one of the above or is a JAX array.

    Examples:
        >>> import jax.numpy as jnp
        >>> from optax_clip import global_norm
        >>> tree = {"w": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)}
        >>> print(global_norm(tree), global_norm(tree, ord=1))
        5.0 7.0
        >>> print(global_norm(jnp.full(4, 1e30)))
        2e+30
    """
    norm: Array = tree_norms(tree, scope="global", ord=ord, axis_name=axis_name)
    return norm


def tree_norms(tree: Any, *, scope: Scope = "leaf", ord: Ord = None, axis_name: AxisName = None) -> Any:
    r"""Norms of the parts of a tree: per leaf, per unit, or over given axes.

    .. math:: \|g_s\|_p = \Big(\sum_{i \in s} |g_i|^p\Big)^{1/p} \quad \text{for each scope } s

    Args:
        tree: arrays of any shape and float or complex dtype.
        scope: which entries share a norm. ``"global"``, ``"leaf"``; ``"unit"`` for one index of the
            last axis, the layout ``(..., in, out)`` of Flax kernels; an int or a tuple of ints for the
            axes that are reduced; or a callable ``(path, leaf) -> one of these but "global"``.
        ord: which norm, as in `global_norm`.
        axis_name: mapped axes to sum over, as in `global_norm`. Inside `jax.shard_map` a scope that
            keeps a dimension needs it for leaves that differ between devices (``()`` if each device
            holds whole units).

    Returns:
        A tree like ``tree`` of float32 (float64 if a leaf is) norms, reduced axes kept as size 1, None
        for leaves that are not inexact. With ``scope="global"`` a scalar.

    Raises:
        ValueError: for an unknown scope or order, or an axis that a leaf does not have.

    Examples:
        >>> import jax.numpy as jnp
        >>> from optax_clip import tree_norms
        >>> kernel = jnp.array([[3.0, 0.0], [4.0, 2.0]])
        >>> print(tree_norms({"kernel": kernel}, scope="unit")["kernel"])
        [[5. 2.]]
    """
    _validate.order(ord)
    _validate.scope(scope)
    _validate.axes(axis_name=axis_name)
    layout = Layout.of(tree, scope, axis_name)
    norms = [norm.value for norm in measure(layout, ord=ord)]
    return norms[0] if layout.pooled == "global" else as_tree(layout, norms)


def per_layer(path: str, leaf: Any) -> tuple[int, ...]:
    r"""A scope for stacked layers and experts: one norm for each index of the first axis.

    Such leaves come from `flax.nnx.scan`, `flax.nnx.vmap` and `flax.linen.scan`, where all layers share
    one array, and from mixtures of experts.

    .. math:: \|g_k\|_p = \Big(\sum_{i} |g_{k i}|^p\Big)^{1/p} \quad \text{for each layer } k

    Args:
        path: the path of the leaf; not looked at.
        leaf: an array with a leading axis of layers.

    Returns:
        All axes of the leaf but the first, to be reduced. A leaf of rank 1 has one norm an entry, so
        give leaves that are not stacked another scope.

    Examples:
        >>> import jax.numpy as jnp
        >>> from optax_clip import per_layer, tree_norms
        >>> layers = {"kernel": jnp.array([[[3.0, 4.0]], [[6.0, 8.0]]])}
        >>> print(tree_norms(layers, scope=per_layer)["kernel"].ravel())
        [ 5. 10.]

        Where only some leaves are stacked:

        >>> def scope(path, leaf):
        ...     return per_layer(path, leaf) if path.startswith("layers") else "leaf"
        >>> print(tree_norms({"layers": layers, "head": jnp.array([3.0, 4.0])}, scope=scope)["head"])
        [5.]
    """
    del path
    return tuple(range(1, len(shape_of(leaf))))


def as_tree(layout: Layout, values: Sequence[Array]) -> Any:
    """One value a scope as a tree, in the shape of each leaf with its reduced axes kept."""
    parts = list(values[0]) if layout.pooled == "leaf" else values
    kept = [part.reshape(shape) for part, shape in zip(parts, layout.kept_shapes, strict=True)]
    return layout.rebuild(kept, other=lambda leaf: None)


def measure(
    layout: Layout,
    *,
    ord: Ord,
    parts: Sequence[tuple[Array, ...]] | None = None,
    read: Callable[..., Array] = lambda x: x,
) -> list[Norm]:
    """The norms of a layout: one scalar (global), one vector (leaf), or one array a leaf.

    A fast sum of powers, and a second one with every scope brought into range only where the first is
    not to be trusted. Of each leaf is measured what ``read`` makes of its ``parts``, for each sum anew.
    """
    p = exponent(ord)
    dtype = accumulator(layout.measured)
    counts = [np.asarray(n, dtype) for n in scope_sizes(layout)]
    info = jnp.finfo(dtype)
    # The share of a sum that underflow may have taken is then below 2^-17.
    floor = 0.0 if p in (1, math.inf) else float(info.smallest_normal) / (64 * float(info.eps))

    def leaves(*factors: list[Array]) -> list[Array]:
        given = [(x,) for x in layout.measured] if parts is None else parts
        return [leaf(*each) for each in zip(given, *factors, strict=True)]

    def leaf(own: tuple[Array, ...], *factors: Array) -> Array:
        both = apart(*own, *factors)
        return scale(widen(read(*both[: len(own)]), dtype), *both[len(own) :])

    def pool(terms: list[Array], *, p: float) -> list[Array]:
        return pool_scopes(layout, terms, dtype, maximum=p == math.inf)

    def root(sums: list[Array]) -> list[Array]:
        means = [s / jnp.maximum(n, 1) if ord == "rms" else s for s, n in zip(sums, counts, strict=True)]
        return [_root(s, p) for s in means]

    def rescaled(*factors: list[Array]) -> list[Array]:
        terms = leaves(*(shares(layout, each) for each in factors))
        return root(pool([_power(x, p) for x in terms], p=p))

    sums = pool([_power(x, p) for x in leaves()], p=p)
    low = [s < n * floor for s, n in zip(sums, counts, strict=True)]
    high = [~(s <= info.max) for s in sums]

    def by_size() -> list[Norm]:
        # Squares of float32 are in range times 2^-96 or 2^80.
        small, large = 2.0 ** (-3 * info.maxexp // 4), 2.0 ** (5 * info.maxexp // 8)
        factors = [
            jnp.where(above, small, jnp.where(below, large, 1)).astype(dtype)
            for below, above in zip(low, high, strict=True)
        ]
        return [Norm(r, k) for r, k in zip(rescaled(factors), factors, strict=True)]

    def by_peak() -> list[Norm]:
        # High powers are in range relative to the largest entry; its power of two is kept apart, since
        # a product with that is exact.
        peaks = pool([jnp.abs(lax.stop_gradient(x)) for x in leaves()], p=math.inf)
        factors = [1 / power_of_two(peak) for peak in peaks]
        tops = [peak * k for peak, k in zip(peaks, factors, strict=True)]
        tops = [jnp.where((top > 0) & (top < jnp.inf), top, 1) for top in tops]
        roots = rescaled(factors, [1 / top for top in tops])
        return [Norm(r * top, k) for r, top, k in zip(roots, tops, factors, strict=True)]

    trusted = [~jnp.any(below | above) for below, above in zip(low, high, strict=True)]
    return cond(
        everywhere(functools.reduce(operator.and_, trusted, jnp.array(True))),
        lambda: [Norm.of(r) for r in root(sums)],
        by_size if p == 2 else by_peak,
    )


def total(layout: Layout, values: Sequence[Array], *, ord: Ord) -> Array:
    """The norm of the whole tree from the norms of its scopes."""
    if layout.pooled == "global":
        return values[0]
    p = exponent(ord)
    counts = scope_sizes(layout)
    dtype = accumulator(layout.measured)
    names = [varying_axes(v) for v in values]

    def pool(terms: list[Array], *, maximum: bool = False) -> Array:
        parts = [jnp.max(t, initial=0) if maximum else jnp.sum(t) for t in terms]
        parts = across_devices(parts, names, lax.pmax if maximum else lax.psum)
        return _join(parts, dtype, maximum=maximum)

    peak = pool(list(values), maximum=True)
    peak = jnp.where((peak > 0) & (peak < jnp.inf), peak, 1)
    scaling = 1 / power_of_two(peak)
    top = peak * scaling
    terms = [_power(v * scaling / top, p) for v in values]
    if ord == "rms":
        sizes = [
            jnp.broadcast_to(jnp.asarray(n, dtype), t.shape) for n, t in zip(counts, terms, strict=True)
        ]
        terms = [t * n for t, n in zip(terms, sizes, strict=True)]
        return top * _root(pool(terms) / jnp.maximum(pool(sizes), 1), p) / scaling
    return top * _root(pool(terms, maximum=p == math.inf), p) / scaling


def exponent(ord: Ord) -> float:
    return 2.0 if ord is None or ord == "rms" else float(ord)


def _power(x: Array, p: float) -> Array:
    """``|x|^p``, with derivatives of 0 at 0 in every order but the square's own."""
    if p == 2:
        return x.real * x.real + x.imag * x.imag if jnp.iscomplexobj(x) else x * x
    y = modulus(x)
    if p in (1, math.inf):
        return y
    zero = y == 0
    return jnp.where(zero, 0, jnp.where(zero, 1, y) ** p)


def modulus(x: Array) -> Array:
    """``|x|``, with a derivative of 0 at 0, where that of `jnp.abs` is 1."""
    return jnp.abs(x) if jnp.iscomplexobj(x) else x * lax.stop_gradient(jnp.sign(x))


def _root(x: Array, p: float) -> Array:
    """``x^(1/p)``, with a derivative of 0 at 0."""
    if p in (1, math.inf):
        return x
    zero = x == 0
    y = jnp.where(zero, 1, x)
    return jnp.where(zero, 0, jnp.sqrt(y) if p == 2 else y ** (1 / p))


def _join(parts: Sequence[Array], dtype: Any, *, maximum: bool) -> Array:
    """The sum, or the largest, of some scalars."""
    op: Callable[[Array, Array], Array] = jnp.maximum if maximum else jnp.add
    return functools.reduce(op, parts) if parts else jnp.zeros((), dtype)


def pool_scopes(
    layout: Layout,
    terms: Sequence[Array],
    dtype: Any,
    *,
    maximum: bool,
    initial: float = 0,
) -> list[Array]:
    """Reduce one term an entry to one value a scope."""
    keep, mapped = layout.pooled is None, mapped_axes(layout)
    pairs = list(zip(terms, layout.axes, mapped, strict=True))
    if layout.pooled == "global" and not maximum:
        pairs = _joined(pairs)
    values = [
        jnp.max(t, axis=axes, keepdims=keep, initial=initial)
        if maximum
        else jnp.sum(t, axis=axes, keepdims=keep)
        for t, axes, _ in pairs
    ]
    collective = lax.pmax if maximum else lax.psum
    if layout.pooled == "global":
        groups = list(dict.fromkeys(names for *_, names in pairs))
        same = [[v for v, (*_, m) in zip(values, pairs, strict=True) if m == group] for group in groups]
        joined = [_join(parts, dtype, maximum=maximum) for parts in same]
        return [_join(across_devices(joined, groups, collective), dtype, maximum=maximum)]
    values = across_devices(values, mapped, collective)
    if layout.pooled == "leaf":
        return [jnp.stack(values) if values else jnp.zeros((0,), dtype)]
    return values


def _joined(pairs: list[_Term]) -> list[_Term]:
    """Small terms of one type added up, eight at a time, before they are summed.

    XLA's CPU compiler takes longer for a sum than for all else that is done with a small leaf. On
    several devices leaves of one type may be split differently, and to add them would move them.
    """
    if jax.device_count() > 1:
        return pairs
    alike: dict[Any, list[_Term]] = {}
    for i, (t, axes, names) in enumerate(pairs):
        key = (jax.typeof(t), names) if t.size <= _SMALL else i
        alike.setdefault(key, []).append((t, axes, names))
    eights = [same[i : i + 8] for same in alike.values() for i in range(0, len(same), 8)]
    return [(functools.reduce(operator.add, [t for t, *_ in some]), *some[0][1:]) for some in eights]


def shares(layout: Layout, values: Sequence[Array]) -> list[Array]:
    """For each inexact leaf the value of its scope: a scalar, or an array with reduced axes kept."""
    n = len(layout.places)
    if layout.pooled == "global":
        return [values[0]] * n
    return [values[0][i] for i in range(n)] if layout.pooled == "leaf" else list(values)


def mapped_axes(layout: Layout) -> list[tuple[Hashable, ...]]:
    """The mapped axes to reduce each leaf over.

    A type says over which mesh axes a leaf varies, not which of its dimensions they split: a scope
    that keeps a dimension has to be told.
    """
    mapped = []
    for i, x, axes in zip(layout.places, layout.measured, layout.axes, strict=True):
        names = mapped_over(layout.axis_name, x)
        if len(axes) < x.ndim:
            if names and layout.axis_name is None:
                raise ValueError(
                    f"Expected axis_name for leaf {path_string(layout.paths[i])!r} of shape "
                    f"{x.shape}, which varies over the mesh axes {names}: a scope that keeps a "
                    "dimension cannot know which dimension they split. Give axis_name=() if each "
                    "device holds whole units. Got axis_name=None."
                )
            names = mapped_over(layout.axis_name)
        mapped.append(names)
    return mapped


def scope_sizes(layout: Layout) -> list[Any]:
    """How many entries share each norm, on all devices."""
    sizes = [
        math.prod(x.shape[a] for a in axes) * devices(names)
        for x, axes, names in zip(layout.measured, layout.axes, mapped_axes(layout), strict=True)
    ]
    if layout.pooled == "global":
        return [sum(sizes)]
    return [np.asarray(sizes)] if layout.pooled == "leaf" else sizes


def all_finite(norms: Sequence[Norm]) -> Array:
    """Is every entry finite? A finite norm beyond the dtype still has a finite root."""
    finite = [jnp.all(jnp.isfinite(norm.root)) for norm in norms]
    return everywhere(functools.reduce(operator.and_, finite, jnp.array(True)))
