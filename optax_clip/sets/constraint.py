"""What a set is, and what the sets share."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.typing import ArrayLike

from optax_clip import _validate
from optax_clip._numerics import accumulator, across_devices, as_dtype, mapped_over, widen
from optax_clip._trees import Layout, path_string
from optax_clip._validate import AxisName

__all__ = ["Constraint"]

# A number, or a tree of numbers that is a prefix of the weights.
Setting = ArrayLike | Any


class Memory(NamedTuple):
    """What a set keeps in the state of `project_weights`.

    Args:
        init: ``params -> memory``.
        nearest: ``(params, memory) -> (params, memory)``.
        marks: ``(params, memory) -> tree of bool``, which entries the metric ``fraction`` counts; None
            for those that the projection moved.
    """

    init: Callable[[optax.Params], Any]
    nearest: Callable[[optax.Params, Any], tuple[optax.Params, Any]]
    marks: Callable[[optax.Params, Any], Any] | None = None


class Constraint(NamedTuple):
    """A closed set of weights: how to get into it, how far a point is outside, and how to land.

    Args:
        nearest: ``params -> params``, the projection, in the dtype of each leaf. A leaf that is inside
            comes back bit for bit.
        excess: ``params -> scalar``, how far outside; 0 inside.
        shrinks: whether the set stays a set when entries shrink towards 0; None if it has no inside,
            like a sphere, so that no side is the better one to land on.
        memory: for a set that remembers, such as `init_box`; `project_weights` then keeps it.
        entrywise: whether each entry is bounded on its own, as in a box.
        axis_name: mapped axes that the metrics are summed over, as in `global_norm`.

    Examples:
        Weights on multiples of 1/8:

        >>> import jax
        >>> import jax.numpy as jnp
        >>> from optax_clip import Constraint, project
        >>> def nearest(params):
        ...     return jax.tree.map(lambda x: jnp.round(x * 8) / 8, params)
        >>> grid = Constraint(nearest, lambda params: jnp.abs(nearest(params) - params).max())
        >>> print(project(jnp.array([0.3, -0.9]), grid))
        [ 0.25  -0.875]
    """

    nearest: Callable[[optax.Params], optax.Params]
    excess: Callable[[optax.Params], Array]
    shrinks: bool | None = False
    memory: Memory | None = None
    entrywise: bool = False
    axis_name: AxisName = None

    def __call__(self, params: optax.Params) -> optax.Params:
        """The projection, so that a set is itself a callable ``params -> params``."""
        return self.nearest(params)


def as_constraint(constraint: Any) -> Constraint:
    """A set as it is; a callable ``params -> params`` with the distance it moves as violation."""
    if isinstance(constraint, Constraint):
        return constraint
    if not callable(constraint):
        raise TypeError(
            "Expected constraint to be a set or a callable params -> params, got "
            f"constraint={constraint!r}."
        )

    def nearest(params: optax.Params) -> optax.Params:
        moved: optax.Params = jax.tree.map(_in_dtype_of, constraint(params), params)
        return moved

    def excess(params: optax.Params) -> Array:
        moved = jax.tree.map(_distance, nearest(params), params)
        return largest(moved)

    return Constraint(nearest, excess)


def remembering(constraint: Constraint) -> Memory:
    """The memory of a set, an empty one for most."""
    return constraint.memory or Memory(lambda params: (), lambda params, _: (constraint(params), ()))


def settings(check: Callable[..., None], **named: Setting) -> None:
    """Check each number of a setting, named by its path if it is a tree."""
    for name, value in named.items():
        for path, x in numbers(value):
            check(**{f"{name}{path}": x})


def ordered(**named: Setting) -> None:
    """The first of two settings is nowhere above the second; either may be a prefix of the other."""
    settings(_validate.number, **named)
    (low, x), (high, y) = named.items()
    for p, a in jax.tree_util.tree_leaves_with_path(x):
        for q, b in jax.tree_util.tree_leaves_with_path(y):
            if p[: len(q)] == q[: len(p)]:
                names = low + jax.tree_util.keystr(p), high + jax.tree_util.keystr(q)
                _validate.ordered(**dict(zip(names, (a, b), strict=True)))


def spread(layout: Layout, **named: Setting) -> list[Any]:
    """One number for each inexact leaf, from a number or a tree that is a prefix of the weights."""
    ((name, value),) = named.items()
    table = dict(jax.tree_util.tree_leaves_with_path(value))
    found = []
    for path in (layout.paths[i] for i in layout.places):
        above = [path[:k] for k in range(len(path) + 1) if path[:k] in table]
        if not above:
            raise ValueError(
                f"Expected {name} to be a number or a tree that is a prefix of the weights, got a "
                f"tree without a number for {path_string(path)!r}."
            )
        found.append(table[above[0]])
    return found


def per_scope(layout: Layout, likes: Sequence[Array], **named: Setting) -> list[Array]:
    """A setting beside the norms of a layout: one scalar, one vector, or one scalar a leaf; >= 0."""
    ((name, value),) = named.items()
    if layout.pooled == "global":
        if len(numbers(value)) > 1 or numbers(value)[0][0]:
            raise ValueError(f'Expected {name} to be one number with scope="global", got a tree.')
        return [_as(jax.tree.leaves(value)[0], likes[0])]
    values = spread(layout, **named)
    if layout.pooled == "leaf":
        parts = [_as(x, likes[0]) for x in values]
        return [jnp.stack(parts) if parts else likes[0]]
    return [_as(x, like) for x, like in zip(values, likes, strict=True)]


def margins(n: Any, dtype: Any) -> tuple[Any, Any]:
    """What a norm of n entries cannot tell, relatively, and how far inside to aim beyond that."""
    unit = float(jnp.finfo(dtype).eps) / 2
    margin = (2 + np.log2(np.maximum(n, 1)) / 2) * unit
    return np.asarray(margin, dtype), np.asarray(margin + 6 * unit, dtype)


def numbers(value: Setting) -> list[tuple[str, Any]]:
    """The numbers of a setting, each with its path as Python writes it, "" for a lone one."""
    found = jax.tree_util.tree_leaves_with_path(value)
    return [(jax.tree_util.keystr(path), x) for path, x in found] or [("", value)]


def _as(x: ArrayLike, like: Array) -> Array:
    return jnp.maximum(as_dtype(x, like.dtype), 0)


def leafwise(function: Callable[..., Any], **named: Setting) -> Callable[[Any], Any]:
    """Apply ``function(path, leaf, *numbers)`` to each inexact leaf, with its number of each setting."""

    def over_tree(params: Any) -> Any:
        layout = Layout.of(params, "leaf")
        paths = [layout.paths[i] for i in layout.places]
        numbers = [spread(layout, **{name: value}) for name, value in named.items()]
        return layout.rebuild(
            [function(*each) for each in zip(paths, layout.measured, *numbers, strict=True)]
        )

    return over_tree


def largest(tree: Any, axis_name: AxisName = None) -> Array:
    """The largest entry of a tree, 0 if it is empty; on all devices that hold a part of it."""
    parts = [jnp.max(x, initial=0).astype(jnp.float32) for x in Layout.of(tree, "leaf").measured]
    parts = across_devices(parts, [mapped_over(axis_name, x) for x in parts], lax.pmax)
    peak: Array = functools.reduce(jnp.maximum, parts, jnp.float32(0))
    return peak


def require_real(path: Any, x: Array, *, of: str) -> None:
    if jnp.iscomplexobj(x):
        raise ValueError(
            f"Expected real weights in a {of}, got {x.dtype} at {path_string(path)!r} of shape "
            f"{x.shape}."
        )


def precise(x: Any) -> Any:
    """A concrete number in float64, so that it can be rounded inwards; a traced one as it is."""
    if isinstance(x, jax.Array):
        return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x
    return np.float64(x)


def _in_dtype_of(new: ArrayLike, x: Array) -> Array:
    return jnp.asarray(new).astype(x.dtype)


def _distance(x: Array, y: Array) -> Array:
    dtype = accumulator([x])
    return jnp.abs(widen(x, dtype) - widen(y, dtype))
