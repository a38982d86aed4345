"""Bounds, radii and limits as users give them: a number, an array, a tree of these, a formula."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from optax_clip import _validate
from optax_clip._numerics import as_dtype
from optax_clip._trees import Cells, Scopes, as_struct, flatten


@dataclasses.dataclass(frozen=True)
class Initial:
    """A multiple of the norms at init."""

    kappa: ArrayLike

    def __repr__(self) -> str:
        return f"initial({self.kappa!r})"


# A number, an array, a tree of these that is a prefix of the weights, or a formula (path, leaf) ->
# number.
Setting = ArrayLike | Mapping[str, Any] | Sequence[Any] | Callable[[str, Any], ArrayLike]


def at_least(bound: float, **named: Any) -> None:
    """Each number of a setting is at least the bound, and not NaN."""
    for name, x in _numbers(named):
        _validate.at_least(bound, None, **{name: x})


def finite(**named: Any) -> None:
    """Each number of a setting is finite."""
    for name, x in _numbers(named):
        _validate.finite(None, **{name: x})


def ordered(**named: Any) -> None:
    """The first of two settings is nowhere above the second; either may be a prefix of the other."""
    for name, x in _numbers(named):
        _validate.number(None, **{name: x})
    (low, x), (high, y) = named.items()
    if callable(x) or callable(y) or isinstance(x, Initial) or isinstance(y, Initial):
        return
    for p, a in jax.tree_util.tree_leaves_with_path(x):
        for q, b in jax.tree_util.tree_leaves_with_path(y):
            if p[: len(q)] == q[: len(p)]:
                names = low + jax.tree_util.keystr(p), high + jax.tree_util.keystr(q)
                _validate.ordered(**dict(zip(names, (a, b), strict=True)))


def _numbers(named: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The numbers of some settings, each with its name and its path as Python writes it."""
    found = []
    for name, value in named.items():
        if isinstance(value, Initial):
            found.append((f"{name}.kappa", value.kappa))
        elif not callable(value):
            leaves = jax.tree_util.tree_leaves_with_path(value, is_leaf=lambda x: x is None)
            found += [(name + jax.tree_util.keystr(path), x) for path, x in leaves] or [(name, value)]
    return found


def per_leaf(
    scopes: Scopes, xs: Sequence[Array], shapes: Sequence[tuple[int, ...]], **named: Any
) -> list[Any]:
    """The value of a setting for each inexact leaf: a number, or an array that broadcasts to a shape."""
    ((name, value),) = named.items()
    paths = [scopes.paths[i] for i in scopes.places]
    if callable(value):
        found = [value(path, as_struct(x)) for path, x in zip(paths, xs, strict=True)]
        for path, x in zip(paths, found, strict=True):
            _validate.number(None, **{f"{name}({path!r}, leaf)": x})
    else:
        prefixes, numbers, _ = flatten(value)
        table = dict(zip(prefixes, numbers, strict=True))
        found = [_above(table, path, name) for path in paths]
    for path, x, shape in zip(paths, found, shapes, strict=True):
        fits(jnp.shape(x), shape, path, name)
    return found


def _above(table: dict[str, Any], path: str, name: str) -> Any:
    """The entry of a prefix of the path."""
    keys = path.split("/")
    above = ["/".join(keys[:k]) for k in range(len(keys) + 1)]
    hits = [table[p] for p in above if p in table]
    if not hits:
        raise ValueError(
            f"Expected {name} to be a number or a tree that is a prefix of the weights, got a tree "
            f"without a number for {path!r}."
        )
    return hits[0]


def fits(given: tuple[int, ...], shape: tuple[int, ...], path: str, name: str) -> None:
    padded = (1,) * (len(shape) - len(given)) + given
    if len(given) > len(shape) or any(m not in (1, n) for m, n in zip(padded, shape, strict=True)):
        raise ValueError(
            f"Expected {name} to broadcast to shape {shape} for leaf {path!r}, got shape {given}."
        )


def per_scope(scopes: Scopes, xs: Sequence[Array], like: Cells, **named: Any) -> Cells:
    """A setting beside the norms of its scopes, cell by cell, >= 0."""
    ((name, value),) = named.items()
    dtype = like[0].dtype
    if scopes.is_global or scopes.labels is not None:
        by_label = value if scopes.labels and isinstance(value, Mapping) else None
        if by_label is not None:
            missing = set(scopes.labels or ()) - set(by_label)
            if missing:
                raise ValueError(f"Expected {name} for each label, got none for {sorted(missing)}.")
            return [jnp.stack([_bound(by_label[label], dtype) for label in scopes.labels or ()])]
        if (
            callable(value)
            or jax.tree_util.treedef_is_leaf(jax.tree.structure(value)) is False
            or jnp.ndim(value)
        ):
            raise ValueError(
                f'Expected {name} to be one number with scope="global" or groups, got a tree.'
            )
        return [_bound(value, dtype)]
    values = [_bound(x, dtype) for x in per_leaf(scopes, xs, scopes.shapes, **named)]
    parts = []
    for (_, where), x, shape in zip(scopes.homes, values, scopes.shapes, strict=True):
        flat = isinstance(where, int)
        parts.append(
            x.reshape(()) if flat else jnp.broadcast_to(x, shape) if where else aligned(x, len(shape))
        )
    return scopes.cells(parts)


def aligned(x: Array, ndim: int) -> Array:
    """``x`` with leading axes of size 1, as NumPy broadcasts; a number as it is."""
    return x.reshape((1,) * (ndim - x.ndim) + x.shape) if x.ndim else x


def _bound(x: Any, dtype: Any) -> Array:
    return jnp.maximum(as_dtype(x, dtype), 0)


def precise(x: Any) -> Any:
    """A concrete number in float64, so that it can be rounded inwards; a traced one as it is."""
    if isinstance(x, jax.Array):
        return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x
    return np.asarray(x, np.float64)
