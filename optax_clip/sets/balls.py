"""Norm sets: balls, spheres and the shells between two spheres."""

import functools
import math
from typing import Any

import jax.numpy as jnp
import optax
from jax import Array

from optax_clip import _settings, _validate
from optax_clip._geometry import radial
from optax_clip._settings import Setting
from optax_clip._trees import Scopes
from optax_clip._validate import AxisName, Ord, Scope
from optax_clip._values import value_object
from optax_clip.sets.boxes import cube, entrywise
from optax_clip.sets.constraint import Constraint, Factors, NormBounds, largest, moved_by, remembering
from optax_clip.sets.mappings import by_norms
from optax_clip.sets.simplexes import l1_ball

__all__ = ["norm_ball", "norm_shell", "norm_sphere"]


@value_object
def norm_ball(
    radius: Setting, *, ord: Ord = None, scope: Scope = "leaf", axis_name: AxisName = None
) -> Constraint:
    r"""Each leaf, unit or other scope of bounded norm: max-norm regularisation.

    .. math:: P(w)_s = w_s \min\Big(1, \frac{r}{\|w_s\|_2}\Big) \quad \text{for each scope } s

    For ``ord=inf`` each entry is clipped to [-r, r]; for ``ord=1`` all entries of a scope shrink by the
    same amount, which makes many of them 0:

    .. math:: P(w)_i = \mathrm{sign}(w_i) \max(|w_i| - \theta, 0)

    Args:
        radius: the largest norm r >= 0: a number, an array that broadcasts to the norms of each leaf,
            a tree of these that is a prefix of the weights, a formula ``(path, leaf) -> number``, or
            `initial`. One number with ``scope="global"``; with `groups` one, or a dict by label.
        ord: ``None`` or 2, 1, or ``math.inf``. Static.
        scope: which entries share a norm, as in `clip_by_norm`.
        axis_name: mapped axes to sum over, as in `tree_norms`.

    Returns:
        A set for `project_weights`, `project` and `violation`. What is outside lands a few float32
        roundings inside, so that its norm is at most r as measured in float64. Radius 0 gives zeros,
        inf leaves all as it is. A scope with an inf or NaN entry is left as it is, but for ``ord=inf``,
        where inf goes to the bound and NaN stays. A traced negative radius counts as 0.

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
    radius = _settings.limit(radius=radius)
    _validate.scope(scope)
    _validate.axis_name(axis_name=axis_name)
    _validate.static(ord=ord)
    if ord not in (None, 1, 2, math.inf):
        raise ValueError(f"Expected ord to be None, 1, 2 or inf, got ord={ord!r}.")
    bounds = NormBounds(scope, axis_name, ord, {"radius": radius}, "radius")
    if ord == math.inf:
        return remembering(bounds, entrywise(functools.partial(cube, bounds), axis_name))
    if ord == 1:
        move = functools.partial(l1_ball, bounds)
        return _norm_set(bounds, lambda params: move(params, None, None)[0], move=move)
    return _rescaled_set(bounds, shrinks=True)


@value_object
def norm_sphere(
    radius: Setting = 1.0, *, scope: Scope = "leaf", axis_name: AxisName = None
) -> Constraint:
    r"""Each leaf, unit or other scope of exactly one norm: unit-norm weights.

    .. math:: P(w)_s = w_s \frac{r}{\|w_s\|_2} \quad \text{for each scope } s

    Args:
        radius: the norm r >= 0: a number, an array that broadcasts to the norms of each leaf,
            a tree of these that is a prefix of the weights, a formula ``(path, leaf) -> number``, or
            `initial`. One number with ``scope="global"``; with `groups` one, or a dict by label.
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
    radius = _settings.finite(radius=radius)
    _validate.scope(scope)
    _validate.axis_name(axis_name=axis_name)
    bounds = NormBounds(scope, axis_name, None, {"radius": radius}, "radius", "radius")
    return _rescaled_set(bounds, shrinks=None)


@value_object
def norm_shell(
    lower: Setting, upper: Setting, *, scope: Scope = "leaf", axis_name: AxisName = None
) -> Constraint:
    r"""Each leaf, unit or other scope with a norm between two values.

    .. math:: P(w)_s = w_s \frac{\max(l, \min(u, \|w_s\|_2))}{\|w_s\|_2} \quad \text{for each scope } s

    Args:
        lower: the smallest norm l >= 0: a number, an array that broadcasts to the norms of each leaf,
            a tree of these that is a prefix of the weights, a formula ``(path, leaf) -> number``, or
            `initial`. One number with ``scope="global"``; with `groups` one, or a dict by label.
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
    lower, upper = _settings.finite(lower=lower), _settings.limit(upper=upper)
    lower, upper = _settings.ordered(lower=lower, upper=upper)
    _validate.scope(scope)
    _validate.axis_name(axis_name=axis_name)
    bounds = NormBounds(scope, axis_name, None, {"lower": lower, "upper": upper}, "upper", "lower")
    return _rescaled_set(bounds, shrinks=False)


def _rescaled_set(bounds: NormBounds, *, shrinks: bool | None) -> Constraint:
    """The set of all trees whose 2-norms are between two bounds."""
    factors = functools.partial(_factors, bounds)

    def nearest(params: optax.Params) -> optax.Params:
        scopes, xs = Scopes.of(params, "leaf", axis_name=())
        apply, rows, _ = factors(params, None, None)
        new = [apply(x, *row) for x, row in zip(xs, rows, strict=True)]
        inside: optax.Params = scopes.rebuild(params, new)
        return inside

    mapped = functools.partial(by_norms, bounds)
    return _norm_set(bounds, nearest, shrinks=shrinks, factors=factors, mapped=mapped)


def _norm_set(
    bounds: NormBounds, nearest: Any, *, shrinks: bool | None = True, **how: Any
) -> Constraint:
    """The set of all trees whose norms are between two bounds."""

    def excess(params: optax.Params) -> Array:
        """A scope of zeros is not below."""
        scopes, xs, norms = bounds.cut(params)
        values = [norm.value for norm in norms]
        lows, highs = (read(scopes, xs, values, None) for read in (bounds.lows, bounds.highs))
        ends = zip(values, lows, highs, strict=True)
        gaps = [
            (jnp.where(v > 0, low - v, 0), jnp.where(v <= high, 0, v - high)) for v, low, high in ends
        ]
        return largest([jnp.maximum(*pair) for pair in gaps])

    constraint = Constraint(
        nearest, excess, shrinks=shrinks, axis_name=bounds.axis_name, scope=bounds.scope, **how
    )
    return remembering(bounds, constraint)


def _factors(bounds: NormBounds, params: optax.Params, memory: Any, *besides: Any) -> Factors:
    """Rescale each scope whose norm is outside [lower, upper]."""
    scopes, xs, norms = bounds.cut(params, *besides)
    roots = [norm.root for norm in norms]
    lows, highs = (read(scopes, xs, roots, memory) for read in (bounds.lows, bounds.highs))
    each = zip(norms, scopes.counts, lows, highs, strict=True)
    sphere = bounds.lower == bounds.upper
    plans = [radial.move_between(*own, sphere=sphere) for own in each]
    rows = radial.beside_leaves(scopes, [plan[:4] for plan in plans])
    report = moved_by(scopes, [plan.gap for plan in plans], [plan.changed for plan in plans])
    return functools.partial(radial.moved, sphere=sphere), rows, report
