"""Where a weight may live: closed sets and the projections onto them."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.typing import ArrayLike

from optax_clip import _validate
from optax_clip._numerics import (
    accumulator,
    across_devices,
    as_dtype,
    as_if,
    broadcast_like,
    clamp,
    round_down,
    round_up,
    scale,
    truncate,
    varying_axes,
    widen,
)
from optax_clip._trees import Layout, path_string
from optax_clip._validate import Ord, Scope
from optax_clip.norms import mapped_axes, measure, scope_sizes, shares

__all__ = ["Constraint", "box", "non_negative", "norm_ball", "norm_sphere"]


class Constraint(NamedTuple):
    """A closed set of weights: how to get into it, how far a point is outside, and how to land.

    Args:
        nearest: ``params -> params``, the projection, in the dtype of each leaf. A leaf that is inside
            comes back bit for bit.
        excess: ``params -> scalar``, how far outside; 0 inside.
        shrinks: whether the set stays a set when entries shrink towards 0.

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
    shrinks: bool = False

    def __call__(self, params: optax.Params) -> optax.Params:
        """The projection, so that a set is itself a callable ``params -> params``."""
        return self.nearest(params)


def box(lower: ArrayLike, upper: ArrayLike) -> Constraint:
    r"""Each weight in an interval: weight clipping.

    .. math:: P(w)_i = \max(l, \min(u, w_i))

    Args:
        lower: the smallest value l, a number (``-math.inf`` for none) or a 0-d array.
        upper: the largest value u, likewise.

    Returns:
        A set for `project_weights`, `project` and `violation`. Bounds that the dtype of a leaf cannot
        represent are rounded inwards, so that a bfloat16 weight is never above 0.1. NaN stays NaN.

    Raises:
        ValueError: if ``lower > upper`` or a bound is NaN; for a complex leaf.
        TypeError: if a bound is not a number.

    Examples:
        >>> import jax.numpy as jnp
        >>> from optax_clip import box, project
        >>> print(project(jnp.array([-3.0, 0.5, 2.0]), box(-1.0, 1.0)))
        [-1.   0.5  1. ]

    References:
        Arjovsky, Chintala, Bottou, 2017, https://arxiv.org/abs/1701.07875
    """
    _validate.ordered(lower=lower, upper=upper)
    low, high = _exact(lower), _exact(upper)

    def nearest(path: Any, x: Array) -> Array:
        _require_real(path, x)
        return clamp(x, jnp.asarray(round_up(low, x.dtype)), jnp.asarray(round_down(high, x.dtype)))

    def excess(path: Any, x: Array) -> Array:
        _require_real(path, x)
        y = widen(x, accumulator([x]))
        bounds = as_dtype(low, y.dtype), as_dtype(high, y.dtype)
        return jnp.maximum(jnp.maximum(bounds[0] - y, y - bounds[1]), 0)

    return Constraint(_leafwise(nearest), lambda params: largest(_leafwise(excess)(params)))


def non_negative() -> Constraint:
    r"""Each weight at least 0.

    .. math:: P(w)_i = \max(0, w_i)

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
    return box(0.0, math.inf)


def norm_ball(radius: ArrayLike, *, ord: Ord = None, scope: Scope = "leaf") -> Constraint:
    r"""Each leaf, unit or other scope of bounded norm: max-norm regularisation.

    .. math:: P(w)_s = w_s \min\Big(1, \frac{r}{\|w_s\|_2}\Big) \quad \text{for each scope } s

    and for ``ord=inf`` each entry clipped to [-r, r].

    Args:
        radius: the largest norm r >= 0, a number or a 0-d array.
        ord: ``None`` or 2, or ``math.inf``. Static.
        scope: which entries share a norm, as in `clip_by_norm`.

    Returns:
        A set for `project_weights`, `project` and `violation`. What is outside lands a few float32
        roundings inside, so that its norm is at most r as measured in float64. Radius 0 gives zeros,
        inf leaves all as it is. A scope with an inf or NaN entry is left as it is. A traced negative
        radius counts as 0.

    Raises:
        ValueError: for a negative or NaN radius, an unknown order or scope.
        TypeError: if the radius is not a number.

    Examples:
        >>> import jax.numpy as jnp
        >>> from optax_clip import norm_ball, project
        >>> print(project(jnp.array([3.0, 4.0]), norm_ball(1.0)))
        [0.59999967 0.7999996 ]

    References:
        Srebro, Rennie, Jaakkola, 2005, Maximum-Margin Matrix Factorization; Srivastava et al., 2014,
        https://jmlr.org/papers/v15/srivastava14a.html
    """
    _validate.at_least(0, radius=radius)
    _validate.scope(scope)
    _validate.static(ord=ord)
    if ord not in (None, 2, math.inf):
        raise ValueError(f"Expected ord to be None, 2 or inf, got ord={ord!r}.")
    if ord == math.inf:
        bound = _exact(radius)
        bound = jnp.maximum(bound, 0) if isinstance(bound, Array) else bound
        return box(-bound, bound)
    return Constraint(
        _by_norm(radius, scope, sphere=False),
        _norm_excess(scope, lambda norm: norm - _as(radius, norm)),
        shrinks=True,
    )


def norm_sphere(radius: ArrayLike = 1.0, *, scope: Scope = "leaf") -> Constraint:
    r"""Each leaf, unit or other scope of exactly one norm: unit-norm weights.

    .. math:: P(w)_s = w_s \frac{r}{\|w_s\|_2} \quad \text{for each scope } s

    Args:
        radius: the norm r >= 0, a number or a 0-d array.
        scope: which entries share a norm, as in `clip_by_norm`.

    Returns:
        A set for `project_weights`, `project` and `violation`. The norm is within 4 eps of r, the eps
        of the dtype of the leaf. A zero vector has no direction and stays 0.

    Raises:
        ValueError: for a negative, infinite or NaN radius, or an unknown scope.
        TypeError: if the radius is not a number.

    Examples:
        >>> import jax.numpy as jnp
        >>> from optax_clip import norm_sphere, project
        >>> print(project(jnp.array([3.0, 4.0]), norm_sphere(10.0)))
        [6. 8.]

    References:
        Salimans, Kingma, 2016, https://arxiv.org/abs/1602.07868
    """
    _validate.at_least(0, radius=radius)
    _validate.finite(radius=radius)
    _validate.scope(scope)
    return Constraint(
        _by_norm(radius, scope, sphere=True),
        _norm_excess(scope, lambda norm: jnp.where(norm > 0, jnp.abs(norm - _as(radius, norm)), 0)),
    )


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


def largest(tree: Any) -> Array:
    """The largest entry of a tree, 0 if it is empty; on all devices that hold a part of it."""
    parts = [jnp.max(x, initial=0).astype(jnp.float32) for x in Layout.of(tree, "leaf").measured]
    parts = across_devices(parts, [varying_axes(x) for x in parts], lax.pmax)
    peak: Array = functools.reduce(jnp.maximum, parts, jnp.float32(0))
    return peak


def _in_dtype_of(new: ArrayLike, x: Array) -> Array:
    return jnp.asarray(new).astype(x.dtype)


def _distance(x: Array, y: Array) -> Array:
    dtype = accumulator([x])
    return jnp.abs(widen(x, dtype) - widen(y, dtype))


def _exact(x: Any) -> Any:
    """A concrete number in float64, so that it can be rounded inwards; a traced one as it is."""
    if isinstance(x, jax.Array):
        return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x
    return np.float64(x)


def _as(x: ArrayLike, like: Array) -> Array:
    return jnp.maximum(as_dtype(x, like.dtype), 0)


def _require_real(path: Any, x: Array) -> None:
    if jnp.iscomplexobj(x):
        raise ValueError(
            f"Expected real weights in a box, got {x.dtype} at {path_string(path)!r} of shape {x.shape}."
        )


def _leafwise(function: Callable[[Any, Array], Array]) -> Callable[[Any], Any]:
    """Apply ``function(path, leaf)`` to each inexact leaf."""

    def over_tree(params: Any) -> Any:
        layout = Layout.of(params, "leaf")
        paths = [layout.paths[i] for i in layout.places]
        return layout.rebuild([function(*each) for each in zip(paths, layout.measured, strict=True)])

    return over_tree


def _by_norm(radius: ArrayLike, scope: Scope, *, sphere: bool) -> Callable[[Any], Any]:
    """The projection that rescales each scope to norm ``radius``: always, or only if it is longer."""

    def nearest(params: optax.Params) -> optax.Params:
        layout = Layout.of(params, scope)
        norms = measure(layout, ord=None, axis_name=None)
        counts = scope_sizes(layout, mapped_axes(layout, None))
        moves, firsts, seconds = [], [], []
        for norm, n in zip(norms, counts, strict=True):
            # What a float32 norm of n entries cannot tell; then the roundings of the product.
            unit = jnp.finfo(norm.root.dtype).eps / 2
            margin = ((2 + np.log2(np.maximum(n, 1)) / 2) * unit).astype(norm.root.dtype)
            target = _as(radius, norm.root)
            limit = target * norm.scale
            if sphere:
                close = jnp.abs(norm.root - limit) <= limit * margin
            else:
                close = norm.root <= limit * (1 - margin)
                target = target * (1 - margin - 6 * unit)
            movable = jnp.isfinite(norm.root) & (norm.root > 0)
            move = movable & ~close
            moves.append(move)
            used = movable if sphere else move
            firsts.append(jnp.where(used, norm.scale, 1))
            seconds.append(jnp.where(used, target, 1) / jnp.where(used, norm.root, 1))
        parts = [shares(layout, each) for each in (moves, firsts, seconds)]
        new = [
            _move(x, move, first, second, sphere=sphere)
            for x, move, first, second in zip(layout.measured, *parts, strict=True)
        ]
        moved: optax.Params = layout.rebuild(new)
        return moved

    return nearest


def _move(x: Array, move: Array, first: Array, second: Array, *, sphere: bool) -> Array:
    """``x * first * second`` where ``move`` says so, rounded to nearest on a sphere, else to zero."""
    product = scale(widen(x, first.dtype), first, second)
    if sphere:
        moved = product.astype(x.dtype)
        x = as_if(x, moved)  # the derivative on the sphere is that of the projection too
    elif jnp.iscomplexobj(x):
        real = x.real.dtype
        moved = lax.complex(truncate(product.real, real), truncate(product.imag, real))
    else:
        moved = truncate(product, x.dtype)
    return lax.select(broadcast_like(move, x), moved, x)


def _norm_excess(scope: Scope, excess: Callable[[Array], Array]) -> Callable[[Any], Array]:
    def over_tree(params: optax.Params) -> Array:
        norms = measure(Layout.of(params, scope), ord=None, axis_name=None)
        return largest([jnp.maximum(excess(norm.value), 0) for norm in norms])

    return over_tree
