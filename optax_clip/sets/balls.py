"""Norm sets: balls, spheres and the shells between two spheres."""

import functools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array, lax

from optax_clip import _settings, _validate
from optax_clip._numerics import (
    broadcast_like,
    round_toward_zero,
    scale,
    straight_through,
    widen,
)
from optax_clip._settings import Setting
from optax_clip._trees import Scopes
from optax_clip._validate import AxisName, Ord, Scope
from optax_clip._values import value_object
from optax_clip.norms import Norm
from optax_clip.sets.boxes import entrywise, inwards
from optax_clip.sets.constraint import (
    Bounds,
    Constraint,
    Factors,
    NormBounds,
    largest,
    margins,
    moved_by,
    no_start,
)
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
    bounds = NormBounds(scope, axis_name, ord, {"radius": radius})
    if ord == math.inf:
        return _remembering(bounds, "radius", entrywise(functools.partial(_cube, bounds), axis_name))
    if ord == 1:
        move = functools.partial(l1_ball, bounds)
        return _norm_set(bounds, lambda params: move(params, None, None)[0], "", "radius", move=move)
    return _rescaled_set(bounds, "", "radius", shrinks=True)


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
    bounds = NormBounds(scope, axis_name, None, {"radius": radius})
    return _rescaled_set(bounds, "radius", "radius", shrinks=None)


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
    bounds = NormBounds(scope, axis_name, None, {"lower": lower, "upper": upper})
    return _rescaled_set(bounds, "lower", "upper", shrinks=False)


def _cube(
    bounds: NormBounds, params: optax.Params, memory: Any = None, beside: Any = None
) -> list[Bounds]:
    """The ball of order inf bounds each entry."""
    scopes, xs = Scopes.of(params, bounds.scope, axis_name=(), beside=beside)
    highs = bounds.highs("radius", scopes, xs, memory)
    return [inwards(x, -high, high) for x, high in zip(xs, highs, strict=True)]


def _rescaled_set(bounds: NormBounds, lower: str, upper: str, *, shrinks: bool | None) -> Constraint:
    """The set of all trees whose 2-norms are between two bounds."""
    factors = functools.partial(_factors, bounds, lower, upper)

    def nearest(params: optax.Params) -> optax.Params:
        scopes, xs = Scopes.of(params, "leaf", axis_name=())
        inside: optax.Params = scopes.rebuild(params, factors(params, None, None).of(xs))
        return inside

    mapped = functools.partial(by_norms, bounds, lower, upper)
    return _norm_set(bounds, nearest, lower, upper, shrinks=shrinks, factors=factors, mapped=mapped)


def _norm_set(
    bounds: NormBounds, nearest: Any, lower: str, upper: str, *, shrinks: bool | None = True, **how: Any
) -> Constraint:
    """The set of all trees whose norms are between two bounds, "" for none."""

    def excess(params: optax.Params) -> Array:
        """A scope of zeros is not below."""
        scopes, xs, norms = bounds.cut(params)
        values = [norm.value for norm in norms]
        lows, highs = bounds.both(lower, upper, scopes, xs, values, None)
        ends = zip(values, lows, highs, strict=True)
        gaps = [jnp.maximum(jnp.where(v > 0, low - v, 0), v - high) for v, low, high in ends]
        return largest([jnp.maximum(gap, 0) for gap in gaps])

    constraint = Constraint(
        nearest, excess, shrinks=shrinks, axis_name=bounds.axis_name, scope=bounds.scope, **how
    )
    return _remembering(bounds, upper, constraint)


def _remembering(bounds: NormBounds, upper: str, constraint: Constraint) -> Constraint:
    """With the norms at the start, if it needs them."""
    if not bounds.remembers:
        return constraint
    raises = no_start(upper, bounds.settings[upper])
    return constraint._replace(nearest=raises, excess=raises, init=bounds.init)


class _Plan(NamedTuple):
    """What becomes of the scopes of a cell: which move, which of them inwards, by which two factors."""

    move: Array
    over: Array
    first: Array
    second: Array
    gap: Array


def _plan(norm: Norm, n: Any, low: Array, high: Array, *, sphere: bool) -> _Plan:
    high = jnp.where(jnp.isnan(low), low, high)
    margin, inside = margins(n, norm.root.dtype)
    ends = low * (1 + inside), high * (1 - inside)
    thin = ends[0] >= ends[1]  # thinner than what a norm can tell: onto the bound itself
    slack = jnp.where(thin, margin, -margin)
    over = ~(norm.root <= high * norm.scale * (1 + slack))
    under = norm.root < low * norm.scale * (1 - slack)
    target = jnp.where(over, jnp.where(thin, high, ends[1]), jnp.where(thin, low, ends[0]))
    movable = jnp.isfinite(norm.root) & (norm.root > 0)
    move = movable & (over | under)
    used = movable & (move | sphere)
    second = jnp.where(used, target, 1) / jnp.where(used, norm.root, 1)
    gap = jnp.where(move, jnp.abs(norm.value - target), 0)
    return _Plan(move, over, jnp.where(used, norm.scale, 1), second, gap)


def _factors(
    bounds: NormBounds, lower: str, upper: str, params: optax.Params, memory: Any, *besides: Any
) -> Factors:
    """Rescale each scope whose norm is outside [lower, upper]."""
    scopes, xs, norms = bounds.cut(params, *besides)
    sphere = lower == upper
    lows, highs = bounds.both(lower, upper, scopes, xs, [norm.root for norm in norms], memory)
    highs = [jnp.where(bounds.free(upper, high), jnp.inf, high) for high in highs]
    each = zip(norms, scopes.counts, lows, highs, strict=True)
    plans = [_plan(*those, sphere=sphere) for those in each]
    # Behind a barrier: compilers would else form the factors anew for each entry.
    whole = lax.optimization_barrier([list(column) for column in zip(*plans, strict=True)])
    columns = [scopes.per_leaf(column) for column in whole[:4]]
    report = moved_by(scopes, [plan.gap for plan in plans], [plan.move for plan in plans])
    return Factors(functools.partial(_move, sphere=sphere), columns, report)


def _move(x: Array, move: Array, over: Array, first: Array, second: Array, *, sphere: bool) -> Array:
    """``x * first * second`` where ``move`` says so, rounded towards 0 if it was too long."""
    product = scale(widen(x, first.dtype), first, second)
    moved = product.astype(x.dtype)
    if sphere:
        x = straight_through(x, moved)  # the derivative on the sphere is that of the projection too
    else:
        moved = lax.select(broadcast_like(over, x), round_toward_zero(product, x.dtype), moved)
    return lax.select(broadcast_like(move, x), moved, x)
