"""Scopes and leaves: which entries belong together."""

import functools
import math
import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from optax_clip import _validate, _xla
from optax_clip._mesh import (
    all_reduce,
    axis_size,
    everywhere,
    is_explicit,
    reduction_axes,
    spans_devices,
)
from optax_clip._numerics import has_nan
from optax_clip._validate import AxisName, Groups, Scope

_ROW = 128  # entries of a row that is summed on its own
_SMALL = 2**16  # entries of a leaf that XLA takes longer to compile a sum of than the device to sum

# Where the norm of a leaf stands: in which cell, and there as a whole (None), as one entry, or as a
# piece (start, stop, shape).
Home = tuple[int, int | tuple[int, int, tuple[int, ...]] | None]
Cells = list[Array]


def is_box(x: Any) -> bool:
    """Is ``x`` a Variable of NNX or a box of linen, whose only field ``value`` is no part of a path?"""
    names = ("Variable", "VariableState", "AxisMetadata")
    return any(c.__name__ in names and c.__module__.startswith("flax.") for c in type(x).__mro__)


def is_inexact(x: Any) -> bool:
    """Is ``x`` a float or complex array or number? All other leaves pass through untouched."""
    dtype = getattr(x, "dtype", np.dtype(bool))
    return isinstance(x, (float, complex)) or bool(jnp.issubdtype(dtype, jnp.inexact))


def shape_of(x: Any) -> tuple[int, ...]:
    """The shape of an array, a scalar or a `jax.ShapeDtypeStruct`."""
    return tuple(getattr(x, "shape", ()))


class Path(str):
    """The keys on the way to a leaf, joined by "/"; a key may hold one itself, as Haiku's do."""

    keys: tuple[str, ...]

    @classmethod
    def of(cls, keys: Sequence[str]) -> "Path":
        path = cls("/".join(keys))
        path.keys = tuple(keys)
        return path


def is_none(x: Any) -> bool:
    return x is None


def is_empty(x: Any) -> bool:
    """Is there nothing in ``x``: None, or what a mask left in the place of a part?"""
    return not jax.tree_util.tree_leaves(x)


def flatten(tree: Any, is_leaf: Callable[[Any], bool] = is_none) -> tuple[list[Path], list[Any], Any]:
    """Paths, leaves and structure of a tree, with a place for each None."""
    found, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    outer = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: is_leaf(x) or is_box(x))
    boxes = {path for path, x in outer if is_box(x)}
    paths = []
    for path, _ in found:
        inside = [k for k in range(len(path)) if path[:k] in boxes]
        kept = [key for k, key in enumerate(path) if k not in inside]
        paths.append(Path.of([jax.tree_util.keystr((key,), simple=True) for key in kept]))
    return paths, [leaf for _, leaf in found], treedef


def _strong(x: Any) -> Any:
    """An array whose type is its own: that of a Python number gives way, so equal leaves differ."""
    return x if isinstance(x, jax.ShapeDtypeStruct) else lax.convert_element_type(x, jnp.result_type(x))


def as_struct(leaf: Any) -> Any:
    """What a callable of the user is given: an array also where the leaf is a number."""
    return jnp.asarray(leaf) if isinstance(leaf, (bool, int, float, complex)) else leaf


def reduced_axes(scope: Scope, path: str, leaf: Any) -> tuple[int, ...]:
    """The axes of ``leaf`` that share one norm."""
    shape = shape_of(leaf)
    if callable(scope):
        scope = scope(path, as_struct(leaf))
        if callable(scope) or isinstance(scope, Groups) or scope == "global":
            raise ValueError(
                f'Expected scope(path, leaf) to be "leaf", "unit" or axes, got {scope!r} for leaf '
                f"{path!r}."
            )
        _validate.scope(scope)
    if isinstance(scope, Groups):
        return tuple(range(len(shape)))
    if isinstance(scope, str):
        units = scope == "unit" and len(shape) > 1
        return tuple(range(len(shape) - units))
    axes = scope if isinstance(scope, tuple) else (scope,)
    inside = [a % len(shape) for a in axes if -len(shape) <= a < len(shape)]
    if len(set(inside)) < len(axes):
        raise ValueError(
            f"Expected scope to name distinct axes of every leaf, got scope={scope!r} for leaf "
            f"{path!r} of shape {shape}."
        )
    return tuple(sorted(inside))


class Scopes(NamedTuple):
    """How a tree is cut into scopes. Static; the inexact leaves travel beside it, as a list.

    The norms of the scopes are kept in cells, which are arrays:

    ============  ================  ======================================
    scope         one device        several, where joining would move them
    ============  ================  ======================================
    global        one scalar        one scalar
    leaf, groups  one vector        one vector
    unit, axes    one vector        one array a leaf
    ============  ================  ======================================

    Args:
        treedef: the structure, with a place for each None.
        paths: of each place.
        places: those of the inexact leaves.
        axes: what is reduced in each of these.
        mapped: and over which mapped axes.
        shapes: of each leaf with its reduced axes kept as size 1.
        sizes: how many entries of the leaf, on all devices, share a norm.
        homes: where their norm stands.
        labels: of the groups.
        rows: of the vector that a rule remembers, the rows that are measured; None if all are.
        memory: the shape of that vector.
        spread: may a leaf be in parts on several devices?
    """

    treedef: Any
    paths: tuple[Path, ...]
    places: tuple[int, ...]
    axes: tuple[tuple[int, ...], ...]
    mapped: tuple[tuple[Hashable, ...], ...]
    shapes: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    homes: tuple[Home, ...]
    labels: tuple[str, ...] | None
    rows: tuple[int, ...] | None
    memory: tuple[int, ...]
    spread: bool

    @classmethod
    def of(
        cls, tree: Any, scope: Scope, axis_name: AxisName = None, beside: Any = None
    ) -> "tuple[Scopes, list[Array]]":
        """Cut a tree. ``beside``, the weights, tell of the leaves that have no gradient."""
        paths, leaves, treedef = flatten(tree)
        others = leaves if beside is None else treedef.flatten_up_to(beside)
        shown = [y if x is None else x for x, y in zip(leaves, others, strict=True)]
        places = tuple(i for i, x in enumerate(leaves) if is_inexact(x))
        axes = {i: reduced_axes(scope, paths[i], x) for i, x in enumerate(shown) if is_inexact(x)}
        kept = {
            i: tuple(1 if a in axes[i] else n for a, n in enumerate(shape_of(shown[i]))) for i in axes
        }
        mapped = [_mapped(paths[i], leaves[i], axes[i], axis_name) for i in places]
        sizes = [
            math.prod(shape_of(leaves[i])[a] for a in axes[i]) * axis_size(names)
            for i, names in zip(places, mapped, strict=True)
        ]
        spread = spans_devices([*leaves, *others])
        homes, labels, rows, memory = _homes(scope, paths, shown, places, kept, spread=spread)
        scopes = cls(
            treedef, tuple(paths), places, tuple(axes[i] for i in places), tuple(mapped),
            tuple(kept[i] for i in places), tuple(sizes), homes, labels, rows, memory, spread,
        )  # fmt: skip
        return scopes, [_strong(leaves[i]) for i in places]

    def leaves_of(self, tree: Any, *, of: str) -> list[Array]:
        """The leaves of another tree at the same places: the weights that gradients belong to."""
        leaves = self.treedef.flatten_up_to(tree)
        for i in self.places:
            if not is_inexact(leaves[i]):
                got = None if leaves[i] is None else jnp.asarray(leaves[i]).dtype
                raise ValueError(
                    f"Expected float params in update of {of} beside the update of leaf "
                    f"{self.paths[i]!r}, got {got}."
                )
        return [_strong(leaves[i]) for i in self.places]

    def rebuild(self, tree: Any, new: Sequence[Any]) -> Any:
        """The tree with its inexact leaves replaced, all others as they are."""
        leaves = self.treedef.flatten_up_to(tree)
        for i, x in zip(self.places, new, strict=True):
            leaves[i] = x
        return self.treedef.unflatten(leaves)

    def alone(self, new: Sequence[Any]) -> Any:
        """The tree with nothing but its inexact leaves."""
        leaves: list[Any] = [None] * self.treedef.num_leaves
        for i, x in zip(self.places, new, strict=True):
            leaves[i] = x
        return self.treedef.unflatten(leaves)

    def as_tree(self, cells: Cells) -> Any:
        """One value a scope, as a tree in the shape of each leaf with reduced axes kept, or by label."""
        if self.labels is not None:
            return {label: cells[0][row] for row, label in enumerate(self.labels)}
        if self.is_global:
            return cells[0]
        parts = zip(self.per_leaf(cells), self.shapes, strict=True)
        return self.alone([x.reshape(shape) for x, shape in parts])

    @property
    def is_global(self) -> bool:
        return self.memory == ()

    @property
    def is_joint(self) -> bool:
        """May a norm be shared by leaves?"""
        return self.is_global or self.labels is not None

    def per_leaf(self, cells: Cells) -> list[Array]:
        """For each leaf the value of its scope: a scalar, or an array with reduced axes kept."""
        found: list[Any] = [cells[cell] for cell, _ in self.homes]
        cut = [(i, where) for i, (_, where) in enumerate(self.homes) if where is not None]
        if not cut:
            return found
        # A scope that cuts its cells has one alone.
        ends = [(where, where + 1, ()) if isinstance(where, int) else where for _, where in cut]
        pieces = _xla.pieces(tuple((start, stop) for start, stop, _ in ends), cells[0])
        for (i, _), (*_, shape), piece in zip(cut, ends, pieces, strict=True):
            found[i] = piece.reshape(shape)
        return found

    def cells(self, parts: Sequence[Any], combine: Callable[[Any, Any], Any] = operator.add) -> Cells:
        """One value a leaf as cells; those that share a norm combined."""
        merged: dict[Home, Any] = {}
        for home, part in zip(self.homes, parts, strict=True):
            merged[home] = combine(merged[home], part) if home in merged else part
        table: dict[int, dict[Any, Any]] = {}
        for (cell, where), part in merged.items():
            table.setdefault(cell, {})[where] = part
        return [self._cell(pieces) for pieces in table.values()] or [jnp.zeros(self._empty, jnp.float32)]

    @property
    def _length(self) -> int:
        """The rows of a cell that is a vector."""
        return len(self.places if self.labels is None else self.labels)

    @property
    def _empty(self) -> tuple[int, ...]:
        return () if self.is_global else (self._length,)

    def _cell(self, pieces: dict[Any, Any]) -> Any:
        ((where, first), *_) = pieces.items()
        xp = jnp if isinstance(first, Array) else np
        if where is None:
            return first
        if isinstance(where, tuple):
            return xp.concatenate([part.ravel() for part in pieces.values()])
        rows = range(self._length)  # in the order of their numbers, 0 where no leaf has one
        return xp.stack([pieces.get(row, xp.zeros_like(first)) for row in rows])

    def sum(self, terms: Sequence[Array]) -> Cells:
        """Sum one term an entry over each scope."""
        scopes, (terms,) = _joined(self, [terms])
        return scopes._reduce(terms, jnp.sum, lax.psum, operator.add)

    def sums(self, ways: Sequence[Sequence[Array]]) -> list[Cells]:
        """Several sums over each scope in one read of the leaves.

        On one device rows are summed first; the partial sums of all ways are then stacked and reduced
        in one kernel a leaf.
        """
        if self.spread:
            return [self.sum(terms) for terms in ways]
        if any(isinstance(where, tuple) for _, where in self.homes):
            pairs = zip(self.axes, zip(*ways, strict=True), strict=True)
            summed = [_xla.sums_of_columns(axes, terms) for axes, terms in pairs]
            return [self.sum(terms) for terms in zip(*summed, strict=True)]
        scopes, joined = _joined(self, ways)
        columns = zip(*joined, strict=True)
        pieces = [jnp.stack([_rows_summed(t) for t in column]) for column in columns]
        parts = [jnp.sum(x, axis=tuple(range(1, x.ndim))) for x in pieces]
        values = all_reduce(parts, scopes.mapped, lax.psum)
        cells = scopes.cells(values)
        return [[cell[..., i] for cell in cells] for i in range(len(ways))]

    def max(self, terms: Sequence[Array], initial: float = 0) -> Cells:
        """The largest term of each scope; of NaN nothing is promised."""
        return self._reduce(terms, functools.partial(jnp.max, initial=initial), lax.pmax, jnp.maximum)

    def largest(self, terms: Sequence[Array], initial: float = 0) -> Cells:
        """The same; NaN if a term is."""
        tops, flags = self.max(terms, initial), self._reduce(terms, has_nan, lax.pmax, jnp.maximum)
        return [jnp.where(flag > 0, jnp.nan, top) for top, flag in zip(tops, flags, strict=True)]

    def _reduce(self, terms: Sequence[Array], reduce: Any, collective: Any, combine: Any) -> Cells:
        keep = [not isinstance(where, int) and not self.is_global for _, where in self.homes]
        parts = [reduce(t, axis=a, keepdims=k) for t, a, k in zip(terms, self.axes, keep, strict=True)]
        # On a CPU XLA takes seconds to compile a kernel that sums leaves and adds up their sums.
        parts = _xla.each_once(parts)
        groups: dict[Any, Array] = {}
        for home, names, part in zip(self.homes, self.mapped, parts, strict=True):
            key = home, names
            groups[key] = combine(groups[key], part) if key in groups else part
        values = all_reduce(list(groups.values()), [names for _, names in groups], collective)
        merged = [home for home, _ in groups]
        return self._replace(homes=tuple(merged)).cells(values, combine)

    @property
    def counts(self) -> list[Any]:
        """How many entries share each norm: beside each cell, as NumPy numbers."""
        lengths = [where[1] - where[0] if isinstance(where, tuple) else () for _, where in self.homes]
        numbers = [np.full(length, n) for length, n in zip(lengths, self.sizes, strict=True)]
        return self.cells(numbers) if numbers else [np.zeros(self._empty)]

    def join(self, cells: Cells) -> Array:
        """All norms as one vector, 0 where nothing is measured; for one norm a scalar."""
        if self.is_global:
            return cells[0]
        parts = [everywhere(x).ravel() for x in cells]
        whole = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
        if self.rows is None:
            return whole
        return jnp.zeros(self.memory, whole.dtype).at[np.asarray(self.rows, int)].set(whole)

    def split(self, vector: Array, like: Cells) -> Cells:
        """The reverse, beside some cells."""
        if self.is_global:
            return [vector]
        vector = everywhere(vector)
        whole = vector if self.rows is None else vector[np.asarray(self.rows, int)]
        ends = np.cumsum([0, *(x.size for x in like)])
        pieces = [
            everywhere(whole[i:j]).reshape(x.shape)
            for i, j, x in zip(ends, ends[1:], like, strict=False)
        ]
        return [_beside(piece, x) for piece, x in zip(pieces, like, strict=True)]


def _joined(scopes: Scopes, ways: Sequence[Sequence[Array]]) -> tuple[Scopes, Sequence[Sequence[Array]]]:
    """Small terms of one type and scope added up, eight at a time, before they are summed.

    XLA takes longer for a sum than for all else that is done with a small leaf. On several devices
    leaves of one type may be split differently, and to add them would move them. Several sums are
    joined by one plan, that of the first.
    """
    if scopes.spread:
        return scopes, ways
    alike: dict[Any, list[int]] = {}
    terms = zip(ways[0], scopes.homes, scopes.mapped, scopes.axes, strict=True)
    for i, (t, *rest) in enumerate(terms):
        alike.setdefault((jax.typeof(t), *rest) if t.size <= _SMALL else i, []).append(i)
    eights = [same[k : k + 8] for same in alike.values() for k in range(0, len(same), 8)]
    first = [some[0] for some in eights]
    kept = scopes._replace(
        homes=tuple(scopes.homes[i] for i in first),
        mapped=tuple(scopes.mapped[i] for i in first),
        axes=tuple(scopes.axes[i] for i in first),
    )
    return kept, [
        [functools.reduce(lax.add, [terms[i] for i in some]) for some in eights] for terms in ways
    ]


def _rows_summed(x: Array) -> Array:
    return jnp.sum(x, axis=-1) if x.ndim > 1 and x.shape[-1] >= _ROW else x


def _homes(
    scope: Scope,
    paths: Sequence[str],
    shown: list[Any],
    places: tuple[int, ...],
    kept: dict[int, Any],
    *,
    spread: bool,
) -> tuple[tuple[Home, ...], tuple[str, ...] | None, tuple[int, ...] | None, tuple[int, ...]]:
    """The homes, labels, rows and memory of `Scopes`."""
    every = range(len(places))
    if isinstance(scope, Groups):
        names = {i: scope.label(paths[i], as_struct(shown[i])) for i in kept}
        _validate.labels(paths, names)
        labels = tuple(sorted(set(map(str, names.values()))))
        return tuple((0, labels.index(names[i])) for i in places), labels, None, (len(labels),)
    if isinstance(scope, str) and scope == "global":
        return tuple((0, None) for _ in every), None, None, ()
    if isinstance(scope, str) and scope == "leaf":
        rows = places if len(places) < len(paths) else None
        return tuple((0, k) for k in every), None, rows, (len(paths),)
    sizes = {i: math.prod(shape) for i, shape in kept.items()}
    ends = dict(zip(sizes, np.cumsum(list(sizes.values())).tolist(), strict=True))
    rows = tuple(r for i in places for r in range(ends[i] - sizes[i], ends[i]))
    memory = (sum(sizes.values()),)
    homes: list[Home] = [(k, None) for k in every]
    if not spread:
        stops = np.cumsum([sizes[i] for i in places]).tolist()
        homes = [(0, (stop - sizes[i], stop, kept[i])) for i, stop in zip(places, stops, strict=True)]
    return tuple(homes), None, None if len(rows) == memory[0] else rows, memory


def _mapped(path: str, x: Any, axes: tuple[int, ...], axis_name: AxisName) -> tuple[Hashable, ...]:
    """The mapped axes to reduce a leaf over.

    A type says over which mesh axes a leaf varies, not which of its dimensions they split: a scope
    that keeps a dimension has to be told.
    """
    names = reduction_axes(axis_name, x if isinstance(x, Array) else 0.0)
    if len(axes) == len(shape_of(x)):
        return names
    if names and axis_name is None:
        raise ValueError(
            f"Expected axis_name for leaf {path!r} of shape {x.shape}, which varies over the mesh axes "
            f"{names}: a scope that keeps a dimension cannot know which dimension they split. Give "
            "axis_name=() if each device holds whole units. Got axis_name=None."
        )
    return reduction_axes(axis_name)


def _beside(piece: Array, x: Array) -> Array:
    """``piece`` on the devices of ``x``, where the mesh is explicit."""
    sharding = jax.typeof(x).sharding
    same = jax.typeof(piece).sharding == sharding
    return piece if same or not is_explicit(x) else jax.sharding.reshard(piece, sharding)
