"""Scopes and leaves: which entries belong together."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from optax_clip import _validate
from optax_clip._validate import AxisName, Scope

T = TypeVar("T")


def path_string(path: Any) -> str:
    """Keys joined by "/", the same for linen and for nnx at init (where Variables add ".value")."""
    if path and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value":
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def is_inexact(x: Any) -> bool:
    """Is ``x`` a float or complex array or number? All other leaves pass through untouched."""
    dtype = getattr(x, "dtype", np.dtype(bool))
    return isinstance(x, (float, complex)) or bool(jnp.issubdtype(dtype, jnp.inexact))


def shape_of(x: Any) -> tuple[int, ...]:
    """The shape of an array, a scalar or a `jax.ShapeDtypeStruct`."""
    return tuple(getattr(x, "shape", ()))


def reduced_axes(scope: Scope, path: Any, leaf: Any) -> tuple[int, ...]:
    """The axes of ``leaf`` that share one norm."""
    shape = shape_of(leaf)
    if callable(scope):
        scope = scope(path_string(path), leaf)
        if callable(scope) or scope == "global":
            raise ValueError(
                f'Expected scope(path, leaf) to be "leaf", "unit" or axes, got {scope!r} for leaf '
                f"{path_string(path)!r}."
            )
        _validate.scope(scope)
    if isinstance(scope, str):
        units = scope == "unit" and len(shape) > 1
        return tuple(range(len(shape) - units))
    axes = scope if isinstance(scope, tuple) else (scope,)
    inside = [a % len(shape) for a in axes if -len(shape) <= a < len(shape)]
    if len(set(inside)) < len(axes):
        raise ValueError(
            f"Expected scope to name distinct axes of every leaf, got scope={scope!r} for leaf "
            f"{path_string(path)!r} of shape {shape}."
        )
    return tuple(sorted(inside))


class Layout(NamedTuple):
    """A tree cut into scopes.

    ``leaves`` has a place for every leaf and for every None, so that a leaf whose gradient is None
    keeps its place in the state. ``places`` are those of the inexact leaves, ``axes`` what is reduced
    in each of these, ``axis_name`` what besides on other devices.
    """

    paths: list[Any]
    leaves: list[Any]
    treedef: Any
    places: tuple[int, ...]
    axes: tuple[tuple[int, ...], ...]
    pooled: str | None
    axis_name: AxisName

    @classmethod
    def of(cls, tree: Any, scope: Scope, axis_name: AxisName = None) -> "Layout":
        found, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None)
        paths, leaves = [path for path, _ in found], [leaf for _, leaf in found]
        places = tuple(i for i, leaf in enumerate(leaves) if is_inexact(leaf))
        axes = tuple(reduced_axes(scope, *found[i]) for i in places)
        pooled = scope if isinstance(scope, str) and scope in ("global", "leaf") else None
        return cls(paths, leaves, treedef, places, axes, pooled, axis_name)

    def beside(self, tree: Any) -> "Layout":
        """The same scopes, with the leaves of another tree: the weights that gradients belong to."""
        return self._replace(leaves=self.treedef.flatten_up_to(tree))

    @property
    def measured(self) -> list[Array]:
        return [jnp.asarray(self.leaves[i]) for i in self.places]

    @property
    def kept_shapes(self) -> list[tuple[int, ...]]:
        """The shape of each inexact leaf with its reduced axes kept as size 1."""
        shapes = [shape_of(self.leaves[i]) for i in self.places]
        return [
            tuple(1 if i in axes else n for i, n in enumerate(shape))
            for shape, axes in zip(shapes, self.axes, strict=True)
        ]

    def rebuild(self, measured: Sequence[Any], *, other: Callable[[Any], Any] | None = None) -> Any:
        """The tree with its inexact leaves replaced, all others as they are or as ``other`` says."""
        leaves = self.leaves if other is None else [other(leaf) for leaf in self.leaves]
        new = dict(zip(self.places, measured, strict=True))
        return self.treedef.unflatten([new.get(i, leaf) for i, leaf in enumerate(leaves)])


def place_like(state: T, params: Any) -> T:
    """Put ``state`` where ``params`` live, as after the first step, so that nothing recompiles."""
    if any(_validate.is_traced(leaf) for leaf in jax.tree.leaves((state, params))):
        return state
    for leaf in jax.tree.leaves(params):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and not isinstance(sharding.mesh, AbstractMesh):
            sharding = NamedSharding(sharding.mesh, PartitionSpec())
        elif not getattr(leaf, "committed", False):
            continue
        placed: T = jax.device_put(state, sharding)
        return placed
    return state


def place_along(state: T, leaf: Any, axes: tuple[int, ...]) -> T:
    """Put arrays that end in the shape of a leaf's norms where these norms are computed."""
    sharding = getattr(leaf, "sharding", None)
    if _validate.is_traced(leaf) or not isinstance(sharding, NamedSharding):
        return place_like(state, leaf)
    spec = (*sharding.spec, *(None,) * (len(leaf.shape) - len(sharding.spec)))
    kept = [None if i in axes else name for i, name in enumerate(spec)]
    shape = [1 if i in axes else n for i, n in enumerate(leaf.shape)]

    def put(x: Array) -> Array:
        along = [None] * (x.ndim - len(shape)) + kept if list(x.shape[-len(shape) :]) == shape else []
        placed: Array = jax.device_put(x, NamedSharding(sharding.mesh, PartitionSpec(*along)))
        return placed

    placed: T = state if isinstance(sharding.mesh, AbstractMesh) else jax.tree.map(put, state)
    return placed
