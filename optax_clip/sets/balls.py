"""Norm sets: balls, spheres and the shells between two spheres."""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from optax_clip import _validate
from optax_clip._numerics import as_if, broadcast_like, scale, shorten, widen
from optax_clip._trees import Layout
from optax_clip._validate import AxisName, Ord, Scope
from optax_clip.norms import measure, scope_sizes, shares
from optax_clip.sets.boxes import box
from optax_clip.sets.constraint import (
    Constraint,
    Setting,
    largest,
    margins,
    ordered,
    per_scope,
    settings,
)
from optax_clip.sets.simplexes import Cut, l1_ball

__all__ = ["norm_ball", "norm_shell", "norm_sphere"]

# The least and the largest norm, each under the name that the user gave it by.
Bounds = tuple[dict[str, Setting], dict[str, Setting]]


def norm_ball(
    radius: Setting, *, ord: Ord = None, scope: Scope = "leaf", axis_name: AxisName = None
) -> Constraint:
    r"""Each leaf, unit or other scope of bounded norm: max-norm regularisation.

    .. math:: P(w)_s = w_s \min\Big(1, \frac{r}{\|w_s\|_2}\Big) \quad \text{for each scope } s

    For ``ord=inf`` each entry is clipped to [-r, r]; for ``ord=1`` all entries of a scope shrink by the
    same amount, which makes many of them 0:

    .. math:: P(w)_i = \mathrm{sign}(w_i) \max(|w_i| - \theta, 0)

    Args:
        radius: the largest norm r >= 0: a number, a 0-d array, or a tree of these that is a prefix of
            the weights (one number with ``scope="global"``).
        ord: ``None`` or 2, 1, or ``math.inf``. Static.
        scope: which entries share a norm, as in `clip_by_norm`.
        axis_name: mapped axes to sum over, as in `tree_norms`.

    Returns:
        A set for `project_weights`, `project` and `violation`. What is outside lands a few float32
        roundings inside, so that its norm is at most r as measured in float64. Radius 0 gives zeros,
        inf leaves all as it is. A scope with an inf or NaN entry is left as it is. A traced negative
        radius counts as 0.

    Raises:
        ValueError: for a negative or NaN radius, an unknown order or scope, a tree that is not a prefix.
        TypeError: if the radius is not a number.

    Examples:
        >>> import jax.numpy as jnp
        >>> from optax_clip import norm_ball, project
        >>> print(project(jnp.array([3.0, 4.0]), norm_ball(1.0)))
        [0.59999967 0.7999996 ]

    References:
        Srebro, Rennie, Jaakkola, 2005, Maximum-Margin Matrix Factorization; Srivastava et al., 2014,
        https://jmlr.org/papers/v15/srivastava14a.html; for order 1 Michelot, 1986,
        https://doi.org/10.1007/BF00938486, and Condat, 2016, https://doi.org/10.1007/s10107-015-0946-6
    """
    settings(functools.partial(_validate.at_least, 0), radius=radius)
    _validate.scope(scope)
    _validate.axes(axis_name=axis_name)
    _validate.static(ord=ord)
    if ord not in (None, 1, 2, math.inf):
        raise ValueError(f"Expected ord to be None, 1, 2 or inf, got ord={ord!r}.")
    if ord == math.inf:
        bound = jax.tree.map(lambda r: jnp.maximum(r, 0) if isinstance(r, Array) else r, radius)
        return box(jax.tree.map(operator.neg, bound), bound, axis_name=axis_name)
    bounds: Bounds = {"lower": 0.0}, {"radius": radius}
    cut = functools.partial(Layout.of, scope=scope, axis_name=axis_name)
    nearest = l1_ball(radius, cut) if ord == 1 else _by_norm(cut, *bounds)
    return Constraint(nearest, _norm_excess(cut, *bounds, ord), shrinks=True, axis_name=axis_name)


def norm_sphere(
    radius: Setting = 1.0, *, scope: Scope = "leaf", axis_name: AxisName = None
) -> Constraint:
    r"""Each leaf, unit or other scope of exactly one norm: unit-norm weights.

    .. math:: P(w)_s = w_s \frac{r}{\|w_s\|_2} \quad \text{for each scope } s

    Args:
        radius: the norm r >= 0: a number, a 0-d array, or a tree of these that is a prefix of the
            weights.
        scope: which entries share a norm, as in `clip_by_norm`.
        axis_name: mapped axes to sum over, as in `tree_norms`.

    Returns:
        A set for `project_weights`, `project` and `violation`. The norm is within 4 eps of r, the eps
        of the dtype of the leaf, after an update from near it; from weights ten times larger and more
        after the second one. A zero vector has no direction and stays 0: start 16-bit weights that are
        hundreds of times too large from `project`, since an update can round them to 0.

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
    settings(functools.partial(_validate.at_least, 0), radius=radius)
    settings(_validate.finite, radius=radius)
    _validate.scope(scope)
    _validate.axes(axis_name=axis_name)
    bounds: Bounds = {"radius": radius}, {"radius": radius}
    cut = functools.partial(Layout.of, scope=scope, axis_name=axis_name)
    nearest = _by_norm(cut, *bounds, sphere=True)
    return Constraint(nearest, _norm_excess(cut, *bounds), shrinks=None, axis_name=axis_name)


def norm_shell(
    lower: Setting, upper: Setting, *, scope: Scope = "leaf", axis_name: AxisName = None
) -> Constraint:
    r"""Each leaf, unit or other scope with a norm between two values.

    .. math:: P(w)_s = w_s \frac{\max(l, \min(u, \|w_s\|_2))}{\|w_s\|_2} \quad \text{for each scope } s

    Args:
        lower: the smallest norm l >= 0: a number, a 0-d array, or a tree of these that is a prefix of
            the weights.
        upper: the largest norm u >= l, likewise.
        scope: which entries share a norm, as in `clip_by_norm`.
        axis_name: mapped axes to sum over, as in `tree_norms`.

    Returns:
        A set for `project_weights`, `project` and `violation`. What is longer than u lands as in
        `norm_ball`, what is shorter than l within 4 eps of l, the eps of the dtype of the leaf. A zero
        vector has no direction and stays 0.

    Raises:
        ValueError: for a negative or NaN bound, ``lower > upper`` anywhere, an infinite lower one, or an
            unknown scope.
        TypeError: if a bound is not a number.

    Examples:
        >>> import jax.numpy as jnp
        >>> from optax_clip import norm_shell, project
        >>> shell = norm_shell(10.0, 20.0)
        >>> print(f"{jnp.linalg.norm(project(jnp.array([3.0, 4.0]), shell)):.4f}")
        10.0000
        >>> print(project(jnp.array([9.0, 12.0]), shell))
        [ 9. 12.]

    References:
        Keras, ``MinMaxNorm``, https://keras.io/api/layers/constraints
    """
    settings(functools.partial(_validate.at_least, 0), lower=lower, upper=upper)
    settings(_validate.finite, lower=lower)
    ordered(lower=lower, upper=upper)
    _validate.scope(scope)
    _validate.axes(axis_name=axis_name)

    bounds: Bounds = {"lower": lower}, {"upper": upper}
    cut = functools.partial(Layout.of, scope=scope, axis_name=axis_name)
    return Constraint(_by_norm(cut, *bounds), _norm_excess(cut, *bounds), axis_name=axis_name)


def _by_norm(
    cut: Cut, lower: dict[str, Setting], upper: dict[str, Setting], *, sphere: bool = False
) -> Callable[[Any], Any]:
    """The projection that rescales each scope whose norm is outside [lower, upper]."""

    def nearest(params: optax.Params) -> optax.Params:
        layout = cut(params)
        norms = measure(layout, ord=None)
        roots = [norm.root for norm in norms]
        floors = per_scope(layout, roots, **lower)
        ceilings = per_scope(layout, roots, **upper)
        sizes = scope_sizes(layout)
        columns = []
        for norm, low, high, n in zip(norms, floors, ceilings, sizes, strict=True):
            margin, inside = margins(n, norm.root.dtype)
            ends = low * (1 + inside), high * (1 - inside)
            thin = ends[0] >= ends[1]  # thinner than what a norm can tell: onto the bound itself
            slack = jnp.where(thin, margin, -margin)
            over = norm.root > high * norm.scale * (1 + slack)
            under = norm.root < low * norm.scale * (1 - slack)
            target = jnp.where(over, jnp.where(thin, high, ends[1]), jnp.where(thin, low, ends[0]))
            movable = jnp.isfinite(norm.root) & (norm.root > 0)
            move = movable & (over | under)
            used = movable if sphere else move
            second = jnp.where(used, target, 1) / jnp.where(used, norm.root, 1)
            columns.append((move, over, jnp.where(used, norm.scale, 1), second))
        parts = [shares(layout, column) for column in zip(*columns, strict=True)] or [[]] * 4
        new = [_move(x, *each, sphere=sphere) for x, *each in zip(layout.measured, *parts, strict=True)]
        moved: optax.Params = layout.rebuild(new)
        return moved

    return nearest


def _move(x: Array, move: Array, over: Array, first: Array, second: Array, *, sphere: bool) -> Array:
    """``x * first * second`` where ``move`` says so, rounded towards 0 if it was too long."""
    product = scale(widen(x, first.dtype), first, second)
    moved = product.astype(x.dtype)
    if sphere:
        x = as_if(x, moved)  # the derivative on the sphere is that of the projection too
    else:
        moved = lax.select(broadcast_like(over, x), shorten(product, x.dtype), moved)
    return lax.select(broadcast_like(move, x), moved, x)


def _norm_excess(
    cut: Cut, lower: dict[str, Setting], upper: dict[str, Setting], ord: Ord = None
) -> Callable[[Any], Array]:
    """How far the norms are outside [lower, upper]; a scope of zeros is not below."""

    def over_tree(params: optax.Params) -> Array:
        layout = cut(params)
        values = [norm.value for norm in measure(layout, ord=ord)]
        bounds = per_scope(layout, values, **lower), per_scope(layout, values, **upper)
        outside = [
            jnp.maximum(jnp.where(norm > 0, low - norm, 0), norm - high)
            for norm, low, high in zip(values, *bounds, strict=True)
        ]
        return largest([jnp.maximum(x, 0) for x in outside])

    return over_tree
