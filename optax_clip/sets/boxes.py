"""Boxes: each weight in an interval of its own."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from optax_clip import _validate
from optax_clip._numerics import accumulator, as_dtype, clamp, round_down, round_up, widen
from optax_clip._trees import Layout, path_string, place_like, shape_of
from optax_clip._validate import AxisName
from optax_clip.sets.constraint import (
    Constraint,
    Memory,
    Setting,
    largest,
    leafwise,
    ordered,
    precise,
    require_real,
)

__all__ = ["box", "init_box", "non_negative"]


def box(lower: Setting, upper: Setting, *, axis_name: AxisName = None) -> Constraint:
    r"""Each weight in an interval: weight clipping.

    .. math:: P(w)_i = \max(l, \min(u, w_i))

    Args:
        lower: the smallest value l: a number (``-math.inf`` for none), a 0-d array, or a tree of these
            that is a prefix of the weights.
        upper: the largest value u, likewise.
        axis_name: mapped axes to sum the metrics over, as in `global_norm`.

    Returns:
        A set for `project_weights`, `project` and `violation`. Bounds that the dtype of a leaf cannot
        represent are rounded inwards, so that a bfloat16 weight is never above 0.1. NaN stays NaN.

    Raises:
        ValueError: if ``lower > upper`` anywhere or a bound is NaN; for a complex leaf, or where a tree
            is not a prefix of the weights.
        TypeError: if a bound is not a number.

    Examples:
        >>> import jax.numpy as jnp
        >>> from optax_clip import box, project
        >>> print(project(jnp.array([-3.0, 0.5, 2.0]), box(-1.0, 1.0)))
        [-1.   0.5  1. ]
        >>> print(project({"a": jnp.array(3.0), "b": jnp.array(3.0)}, box(0.0, {"a": 1.0, "b": 2.0})))
        {'a': Array(1., dtype=float32), 'b': Array(2., dtype=float32)}

    References:
        Arjovsky, Chintala, Bottou, 2017, https://arxiv.org/abs/1701.07875
    """
    ordered(lower=lower, upper=upper)
    _validate.axes(axis_name=axis_name)

    def nearest(path: Any, x: Array, low: Any, high: Any) -> Array:
        require_real(path, x, of="box")
        bounds = round_up(precise(low), x.dtype), round_down(precise(high), x.dtype)
        return clamp(x, *map(jnp.asarray, bounds))

    def excess(path: Any, x: Array, low: Any, high: Any) -> Array:
        require_real(path, x, of="box")
        y = widen(x, accumulator([x]))
        bounds = [as_dtype(precise(bound), y.dtype) for bound in (low, high)]
        return jnp.maximum(jnp.maximum(bounds[0] - y, y - bounds[1]), 0)

    both = {"lower": lower, "upper": upper}
    return Constraint(
        leafwise(nearest, **both),
        lambda params: largest(leafwise(excess, **both)(params), axis_name),
        entrywise=True,
        axis_name=axis_name,
    )


def non_negative(*, axis_name: AxisName = None) -> Constraint:
    r"""Each weight at least 0.

    .. math:: P(w)_i = \max(0, w_i)

    Args:
        axis_name: mapped axes to sum the metrics over, as in `global_norm`.

    Returns:
        The set ``box(0, inf)``, with its edge cases.

    Examples:
        >>> import jax.numpy as jnp
        >>> from optax_clip import non_negative, project
        >>> print(project(jnp.array([-3.0, 0.5]), non_negative()))
        [0.  0.5]

    References:
        Lee, Seung, 1999, https://doi.org/10.1038/44565
    """
    return box(0.0, math.inf, axis_name=axis_name)


def init_box(kappa: ArrayLike, *, axis_name: AxisName = None) -> Constraint:
    r"""Each weight in a box that is relative to the weights at the start: against loss of plasticity.

    .. math:: P(w)_i = \max(-\kappa m, \min(\kappa m, w_i)), \quad m = \max_i |w_i^{(0)}|
        \quad \text{for each leaf}

    Args:
        kappa: the factor κ >= 0, a number or a 0-d array.
        axis_name: mapped axes to sum the metrics over, as in `global_norm`; the bounds are those of
            the weights that ``init`` saw.

    Returns:
        A set for `project_weights`, which keeps the bounds of the weights that its ``init`` saw in its
        state. A leaf that starts at 0, such as a bias, takes the bound of the kernel beside it (the
        leaf of rank 2 or more under the same parent, the largest bound of several), else it has none.
        The metric ``fraction`` is the share of weights at their bound. Elsayed et al. take for m the
        bound of the uniform initialisation; the largest weight at the start is that, but for sampling,
        and is there for every other initialisation. From an ``init`` on `jax.ShapeDtypeStruct` the
        bounds are NaN, to be filled from a checkpoint.

    Raises:
        ValueError: for a negative, infinite or NaN kappa; for a complex leaf; from `project` and
            `violation`, which know of no start.
        TypeError: if kappa is not a number.

    Examples:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from optax_clip import init_box, project_weights
        >>> tx = optax.chain(optax.sgd(1.0), project_weights(init_box(2.0)))
        >>> params = {"kernel": jnp.array([[0.5, -0.25]]), "bias": jnp.zeros(1)}
        >>> grads = {"kernel": jnp.array([[3.0, 0.0]]), "bias": jnp.array([-3.0])}
        >>> updates, _ = tx.update(grads, tx.init(params), params)
        >>> print(optax.apply_updates(params, updates))
        {'bias': Array([1.], dtype=float32), 'kernel': Array([[-1.  , -0.25]], dtype=float32)}

    References:
        Elsayed, Lan, Lyle, Mahmood, 2024, https://arxiv.org/abs/2407.01704
    """
    _validate.at_least(0, kappa=kappa)
    _validate.finite(kappa=kappa)
    _validate.axes(axis_name=axis_name)

    def no_start(params: optax.Params) -> Any:
        del params
        raise ValueError(
            "Expected init_box inside project_weights, whose state holds the bounds; project and "
            f"violation know of no start. Got kappa={kappa!r}."
        )

    def init(params: optax.Params) -> tuple[Any, ...]:
        layout = Layout.of(params, "leaf")
        paths = [layout.paths[i] for i in layout.places]
        own = [as_dtype(kappa, jnp.float32) * _largest(layout.leaves[i]) for i in layout.places]
        bounds: list[Any] = [()] * len(layout.leaves)
        for place, path, bound in zip(layout.places, paths, own, strict=True):
            beside = [
                other
                for near, other, i in zip(paths, own, layout.places, strict=True)
                if _parent(near) == _parent(path) and len(shape_of(layout.leaves[i])) > 1
            ]
            spare = functools.reduce(jnp.maximum, beside, jnp.float32(0))
            spare = jnp.where(spare == 0, jnp.inf, spare)
            bounds[place] = jnp.where(bound == 0, spare, bound)
        return place_like(tuple(bounds), params)

    def ends(params: optax.Params, bounds: tuple[Any, ...]) -> tuple[Layout, list[Array]]:
        layout = Layout.of(params, "leaf")
        for i, x in zip(layout.places, layout.measured, strict=True):
            require_real(layout.paths[i], x, of="box")
        pairs = zip(layout.measured, layout.places, strict=True)
        return layout, [round_down(bounds[i], x.dtype) for x, i in pairs]

    def nearest(params: optax.Params, bounds: tuple[Any, ...]) -> tuple[optax.Params, Any]:
        layout, highs = ends(params, bounds)
        clamped = [clamp(x, -high, high) for x, high in zip(layout.measured, highs, strict=True)]
        return layout.rebuild(clamped), bounds

    def at_bound(params: optax.Params, bounds: tuple[Any, ...]) -> list[Array]:
        layout, highs = ends(params, bounds)
        return [jnp.abs(x) >= high for x, high in zip(layout.measured, highs, strict=True)]

    return Constraint(no_start, no_start, memory=Memory(init, nearest, at_bound), axis_name=axis_name)


def _largest(x: Any) -> Array:
    """The largest absolute value, NaN where only the shape is known."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return jnp.full((), jnp.nan, jnp.float32)
    peak: Array = jnp.max(jnp.abs(jnp.asarray(x)), initial=0).astype(jnp.float32)
    return peak


def _parent(path: Any) -> str:
    return path_string(path).rpartition("/")[0]
