"""Bounds, radii and limits as users give them: a number, an array, a tree of these, a formula."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from optax_clip import _validate
from optax_clip._numerics import aligned, as_dtype
from optax_clip._trees import Cells, Path, Scopes, as_struct, flatten, is_empty, is_none


@dataclasses.dataclass(frozen=True)
class Initial:
    """A multiple of the norms at init."""

    kappa: ArrayLike

    def __repr__(self) -> str:
        return f"initial({self.kappa!r})"


NUMBERS = (bool, int, float, complex, np.generic, np.ndarray, Array)
Formula = Callable[[Any, Any], Any]  # (path, leaf) -> number or array
# A number, an array, a tree of these that is a prefix of the weights, or a formula.
Setting = ArrayLike | Mapping[str, Any] | Sequence[Any] | Callable[[str, Any], ArrayLike]


def limit(**named: Any) -> Any:
    """A setting whose numbers are at least 0; inf is no limit."""
    return _checked(functools.partial(_validate.limit, None), **named)


def finite(**named: Any) -> Any:
    """A setting whose numbers are at least 0 and finite."""

    def check(**number: Any) -> None:
        _validate.at_least(0, None, **number)
        _validate.finite(None, **number)

    return _checked(check, **named)


def is_formula(x: Any) -> bool:
    """Is it a function? A module that can be called is a tree if there are numbers in it."""
    if not callable(x) or isinstance(x, jax.tree_util.Partial):
        return callable(x)
    return not any(isinstance(leaf, NUMBERS) for leaf in jax.tree.leaves(x))


def _checked(check: Callable[..., None], **named: Any) -> Any:
    """A setting whose numbers pass a check: at once, those of a formula when it is called."""
    ((name, value),) = named.items()
    if isinstance(value, Initial):
        return value
    if not is_formula(value):
        for _, each, x in _numbers(name, value):
            check(**{each: x})
        return value

    @functools.wraps(value)
    def formula(path: str, leaf: Any) -> Any:
        x = value(path, leaf)
        check(**{_called(name, path): x})
        return x

    return formula


def absolute(**named: Any) -> None:
    """No setting is relative to the weights at init."""
    for name, x in named.items():
        if isinstance(x, Initial):
            raise TypeError(f"Expected {name} to be a real number, got {name}={x!r}.")


def ordered(**named: Any) -> Any:
    """Two settings, the first nowhere above the second; either may be a prefix of the other."""
    (low, x), (high, y) = named.items()
    if isinstance(x, Initial) and isinstance(y, Initial):
        _validate.ordered(**{f"{low}.kappa": x.kappa, f"{high}.kappa": y.kappa})
    if isinstance(x, Initial) or isinstance(y, Initial):
        return x, y
    for (name, value), off in zip(named.items(), ("-jnp.inf", "jnp.inf"), strict=True):
        for _, each, number in [] if is_formula(value) else _numbers(name, value):
            _validate.number(None, off, **{each: number})
    if is_formula(x) or is_formula(y):
        return _below(**named), y
    for p, each, a in _numbers(low, x):
        for q, other, b in _numbers(high, y):
            if p[: len(q)] == q[: len(p)]:
                _validate.ordered(**{each: a, other: b})
    return x, y


def _below(**named: Any) -> Formula:
    """The first of two settings as a formula, which is compared with the second when it is called."""
    formulas = [_formula(name, value) for name, value in named.items()]

    def formula(path: Path, leaf: Any) -> Any:
        names = [_called(name, path) if is_formula(x) else name for name, x in named.items()]
        numbers = [each(path, leaf) for each in formulas]
        _validate.ordered(**dict(zip(names, numbers, strict=True)))
        return numbers[0]

    return formula


def _called(name: str, path: str) -> str:
    return f"{name}({path!r}, leaf)"


def _numbers(name: str, value: Any) -> list[tuple[tuple[str, ...], str, Any]]:
    """The numbers of a setting, each with its keys, and its name and path as Python writes them.

    A field of a module may be None, as it is among the weights.
    """
    leaves = jax.tree_util.tree_leaves_with_path(value, is_leaf=is_none)
    rows = zip(flatten(value)[0], leaves, strict=True)
    found = [
        (keys.keys, name + jax.tree_util.keystr(path), x)
        for keys, (path, x) in rows
        if x is not None or not (path and isinstance(path[-1], jax.tree_util.GetAttrKey))
    ]
    return found or [((), name, value)]


def per_leaf(
    scopes: Scopes, xs: Sequence[Array], shapes: Sequence[tuple[int, ...]], **named: Any
) -> list[Any]:
    """The value of a setting for each inexact leaf: a number, or an array that broadcasts to a shape."""
    ((name, value),) = named.items()
    formula = _formula(name, value)
    paths = [scopes.paths[i] for i in scopes.places]
    if not is_formula(value):
        _require_known(scopes, name, value)
    found = [formula(path, as_struct(x)) for path, x in zip(paths, xs, strict=True)]
    for path, x, shape in zip(paths, found, shapes, strict=True):
        fits(jnp.shape(x), shape, path, name)
    return found


def _formula(name: str, value: Any) -> Formula:
    """A setting as a formula."""
    if is_formula(value):
        formula: Formula = value
        return formula
    table = {keys: x for keys, _, x in _numbers(name, value)}
    return lambda path, leaf: _above(table, path, name)


def _require_known(scopes: Scopes, name: str, value: Any) -> None:
    """Each number of a tree stands for a leaf, or for what a mask left out."""
    tree = scopes.treedef.unflatten([0] * scopes.treedef.num_leaves)
    places = {path.keys for path in flatten(tree, is_empty)[0]}
    above = {keys for place in places for keys in _prefixes(place)}
    for keys, each, _ in _numbers(name, value):
        if keys not in above and places.isdisjoint(_prefixes(keys)):
            raise ValueError(
                f"Expected {name} to be a number or a tree that is a prefix of the weights, got {each} "
                f"without weights; the first of these are {list(scopes.paths[:3])}."
            )


def _prefixes(keys: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [keys[:k] for k in range(len(keys) + 1)]


def _above(table: dict[tuple[str, ...], Any], path: Path, name: str) -> Any:
    """The entry of a prefix of the path, key by key."""
    hits = [table[keys] for keys in _prefixes(path.keys) if keys in table]
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
    dtype, shared = like[0].dtype, _shared(scopes, **named)
    if shared is not None:
        rows = [_bound(x, dtype) for x in shared]
        return [jnp.broadcast_to(rows[0] if len(rows) == 1 else jnp.stack(rows), like[0].shape)]
    values = [_bound(x, dtype) for x in per_leaf(scopes, xs, scopes.shapes, **named)]
    parts = []
    for (_, where), x, shape in zip(scopes.homes, values, scopes.shapes, strict=True):
        flat = isinstance(where, int)
        parts.append(
            x.reshape(()) if flat else jnp.broadcast_to(x, shape) if where else aligned(x, len(shape))
        )
    return scopes.cells(parts)


def per_home(scopes: Scopes, xs: Sequence[Array], **named: Any) -> list[Any]:
    """The value of a setting that bounds norms for each leaf, as it was given."""
    shared = _shared(scopes, **named)
    if shared is None:
        return per_leaf(scopes, xs, scopes.shapes, **named)
    return [shared[where if isinstance(where, int) else 0] for _, where in scopes.homes]


def _shared(scopes: Scopes, **named: Any) -> list[Any] | None:
    """The numbers of leaves that share a norm: one for the whole tree, or one a label."""
    ((name, value),) = named.items()
    if not scopes.is_global and scopes.labels is None:
        return None
    if scopes.labels and isinstance(value, Mapping):
        missing = set(scopes.labels) - set(value)
        if missing:
            raise ValueError(f"Expected {name} for each label, got none for {sorted(missing)}.")
        return [value[label] for label in scopes.labels]
    if is_formula(value) or not jax.tree_util.all_leaves([value]) or jnp.ndim(value):
        is_array = isinstance(value, (Array, np.ndarray))
        got = f"{name} of shape {value.shape}" if is_array else f"{name}={value!r}"
        raise ValueError(f'Expected {name} to be one number with scope="global" or groups, got {got}.')
    return [value] * max(len(scopes.labels or ()), 1)


def _bound(x: Any, dtype: Any) -> Array:
    return jnp.maximum(as_dtype(x, dtype), 0)
