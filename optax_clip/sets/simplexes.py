"""Sets on which entries sum up: the simplex and the ball of order 1, by root finding."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from jax import Array, lax

from optax_clip import _validate
from optax_clip._numerics import (
    accumulator,
    as_if,
    broadcast_like,
    everywhere,
    scale,
    shorten,
    widen,
)
from optax_clip._trees import Layout
from optax_clip._validate import AxisName, Scope
from optax_clip.norms import measure, modulus, pool_scopes, scope_sizes, shares
from optax_clip.sets.constraint import (
    Constraint,
    Setting,
    largest,
    margins,
    per_scope,
    require_real,
    settings,
)

__all__ = ["simplex"]

# How a set cuts the weights into scopes.
Cut = Callable[[optax.Params], Layout]


def simplex(total: Setting = 1.0, *, scope: Scope = "leaf", axis_name: AxisName = None) -> Constraint:
    r"""Each leaf, unit or other scope a distribution: entries at least 0 with a given sum.

    .. math:: P(w)_i = \max(w_i - \theta, 0), \quad \theta \text{ such that } \sum_{i \in s} P(w)_i = T

    θ is found by Newton's method, which on this piecewise linear sum ends after some ten passes over the
    weights; nothing is sorted.

    Args:
        total: the sum T >= 0: a number, a 0-d array, or a tree of these that is a prefix of the weights.
        scope: which entries share a sum, as in `clip_by_norm`.
        axis_name: mapped axes to sum over, as in `tree_norms`.

    Returns:
        A set for `project_weights`, `project` and `violation`. Entries are never negative, unless
        updates have a narrower dtype than the weights; the sum is within 4 eps of T, the eps of the
        dtype of the leaf, after an update from within the set or near it. A scope with an inf or NaN
        entry is left as it is. The violation is the larger of the error of the sum and of the most
        negative entry.

    Raises:
        ValueError: for a negative, infinite or NaN total, an unknown scope, a complex leaf.
        TypeError: if the total is not a number.

    Examples:
        >>> import jax.numpy as jnp
        >>> from optax_clip import project, simplex
        >>> print(project(jnp.array([0.5, 1.0, -2.0]), simplex(1.0)))
        [0.25 0.75 0.  ]

    References:
        Michelot, 1986, https://doi.org/10.1007/BF00938486; Condat, 2016,
        https://doi.org/10.1007/s10107-015-0946-6
    """
    settings(functools.partial(_validate.at_least, 0), total=total)
    settings(_validate.finite, total=total)
    _validate.scope(scope)
    _validate.axes(axis_name=axis_name)
    cut = functools.partial(Layout.of, scope=scope, axis_name=axis_name)

    def nearest(params: optax.Params) -> optax.Params:
        layout = _real(cut(params))
        terms = _wide(layout)
        sums, lowest = _pool(layout, terms), _lowest(layout, terms)
        highest = _pool(layout, terms, maximum=True)
        totals = per_scope(layout, sums, total=total)
        keeps = []
        ends = zip(sums, lowest, highest, totals, scope_sizes(layout), strict=True)
        for got, low, high, wanted, n in ends:
            margin, _ = margins(n, got.dtype)
            near = jnp.abs(got - wanted) <= wanted * margin
            keeps.append(near & (low >= 0) | ~jnp.isfinite(low) | ~jnp.isfinite(high))
        new = []
        for x, y, keep in zip(
            layout.measured, _cut(layout, terms, totals), shares(layout, keeps), strict=True
        ):
            moved = y.astype(x.dtype)
            new.append(lax.select(broadcast_like(keep, x), as_if(x, moved), moved))
        moved_tree: optax.Params = layout.rebuild(new)
        return moved_tree

    def excess(params: optax.Params) -> Array:
        layout = _real(cut(params))
        terms = _wide(layout)
        if not terms:
            return jnp.zeros((), jnp.float32)
        sums, lowest = _pool(layout, terms), _lowest(layout, terms)
        totals = per_scope(layout, sums, total=total)
        outside = [
            jnp.maximum(jnp.abs(got - wanted), -low)
            for got, low, wanted in zip(sums, lowest, totals, strict=True)
        ]
        return largest([jnp.maximum(x, 0) for x in outside])

    return Constraint(nearest, excess, shrinks=None, axis_name=axis_name)


def l1_ball(radius: Setting, cut: Cut) -> Callable[[Any], Any]:
    """The projection onto the ball of order 1: the absolute values onto a simplex, where outside."""

    def nearest(params: optax.Params) -> optax.Params:
        layout = cut(params)
        norms = measure(layout, ord=1)
        radii = per_scope(layout, [norm.root for norm in norms], radius=radius)
        overs, totals = [], []
        for norm, wanted, n in zip(norms, radii, scope_sizes(layout), strict=True):
            margin, inside = margins(n, norm.root.dtype)
            over = (norm.root > wanted * norm.scale * (1 - margin)) & jnp.isfinite(norm.root)
            overs.append(over)
            totals.append(jnp.where(over, wanted * (1 - inside), 1))
        lengths = _cut(layout, [modulus(x) for x in _wide(layout)], totals)
        new = [
            lax.select(broadcast_like(over, x), _turn(x, y), x)
            for x, y, over in zip(layout.measured, lengths, shares(layout, overs), strict=True)
        ]
        moved: optax.Params = layout.rebuild(new)
        return moved

    return nearest


def _turn(x: Array, length: Array) -> Array:
    """An entry of that length, or a little less, in the direction of ``x``."""
    if not jnp.iscomplexobj(x):
        return shorten(length * lax.stop_gradient(jnp.sign(widen(x, length.dtype))), x.dtype)
    return shorten(scale(x, length / jnp.where(x == 0, 1, jnp.abs(x))), x.dtype)


def _cut(layout: Layout, terms: list[Array], totals: list[Array]) -> list[Array]:
    """``max(t - θ, 0)`` with θ such that each scope sums to its total.

    Newton's steps from below never pass θ nor go back, and end when no entry falls out any more. Taken
    from the largest entry, all that matters is small, however far from 0 the entries are. The steps
    are constants to derivatives; one more step after them has the derivative of θ.
    """
    peaks = [lax.stop_gradient(peak) for peak in _pool(layout, terms, maximum=True)]
    depths = [t - peak for t, peak in zip(terms, shares(layout, peaks), strict=True)]
    fixed = [lax.stop_gradient(d) for d in depths]
    goals = [lax.stop_gradient(total) for total in totals]

    def step(thetas: list[Array], depths: list[Array], goals: list[Array]) -> tuple[Any, Any]:
        each = shares(layout, thetas)
        above = [d > theta for d, theta in zip(depths, each, strict=True)]
        counts = _pool(layout, [a.astype(d.dtype) for a, d in zip(above, depths, strict=True)])
        sums = _pool(
            layout, [jnp.where(a, d - theta, 0) for a, d, theta in zip(above, depths, each, strict=True)]
        )
        moves = [
            (got - goal) / jnp.maximum(count, 1)
            for got, goal, count in zip(sums, goals, counts, strict=True)
        ]
        return [theta + move for theta, move in zip(thetas, moves, strict=True)], counts

    def newton(thetas: list[Array], depths: list[Array]) -> list[Array]:
        def body(carry: tuple[Any, Any, Array]) -> tuple[Any, Any, Array]:
            thetas, last, _ = carry
            moved, counts = step(thetas, depths, goals)
            # A rounding may take θ back, and an entry in and out for ever.
            new = [jnp.maximum(*pair) for pair in zip(thetas, moved, strict=True)]
            fewer = [jnp.any(c < n) for c, n in zip(counts, last, strict=True)]
            return new, counts, _anywhere(fewer)

        all_of_them = [theta * 0 + jnp.inf for theta in thetas]
        start = thetas, all_of_them, jnp.array(True)
        new: list[Array] = lax.while_loop(lambda carry: carry[2], body, start)[0]
        return new

    sizes = [
        jnp.broadcast_to(jnp.asarray(n, p.dtype), p.shape)
        for n, p in zip(scope_sizes(layout), peaks, strict=True)
    ]
    starts = [
        jnp.maximum(-goal, (got - goal) / jnp.maximum(n, 1))
        for got, goal, n in zip(_pool(layout, fixed), goals, sizes, strict=True)
    ]
    thetas = newton(starts, fixed)
    # A rounding of θ would count for each of the entries above it: once more, from θ as origin.
    depths = [d - theta for d, theta in zip(depths, shares(layout, thetas), strict=True)]
    fixed = [lax.stop_gradient(d) for d in depths]
    below, _ = step([jnp.zeros_like(theta) for theta in thetas], fixed, goals)
    thetas, _ = step(newton(below, fixed), depths, totals)
    return [jnp.maximum(d - theta, 0) for d, theta in zip(depths, shares(layout, thetas), strict=True)]


def _pool(layout: Layout, terms: list[Array], *, maximum: bool = False) -> list[Array]:
    initial = -jnp.inf if maximum else 0
    return pool_scopes(layout, terms, accumulator(terms), maximum=maximum, initial=initial)


def _lowest(layout: Layout, terms: list[Array]) -> list[Array]:
    return [-peak for peak in _pool(layout, [-t for t in terms], maximum=True)]


def _wide(layout: Layout) -> list[Array]:
    dtype = accumulator(layout.measured)
    return [widen(x, dtype) for x in layout.measured]


def _real(layout: Layout) -> Layout:
    for i, x in zip(layout.places, layout.measured, strict=True):
        require_real(layout.paths[i], x, of="simplex")
    return layout


def _anywhere(flags: list[Array]) -> Array:
    """Is one of them true, on any device?"""
    return ~everywhere(functools.reduce(operator.and_, [~f for f in flags], jnp.array(True)))
