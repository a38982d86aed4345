"""Sets on which entries sum up: the simplex and the ball of order 1, by root finding."""

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from optax_clip import _settings, _validate, _xla
from optax_clip._mesh import all_devices_agree
from optax_clip._numerics import (
    accumulator,
    broadcast_like,
    round_toward_zero,
    scale,
    straight_through,
    widen,
)
from optax_clip._settings import Setting
from optax_clip._trees import Cells, Scopes
from optax_clip._validate import AxisName, Scope
from optax_clip._values import value_object
from optax_clip.norms import modulus
from optax_clip.sets import capped
from optax_clip.sets.capped import Cut
from optax_clip.sets.constraint import Constraint, NormBounds, largest, margins, require_real

__all__ = ["simplex"]


@value_object
def simplex(
    total: Setting = 1.0,
    *,
    upper: Setting | None = None,
    scope: Scope = "leaf",
    axis_name: AxisName = None,
) -> Constraint:
    r"""Each leaf, unit or other scope a distribution: entries at least 0 with a given sum.

    With ``upper`` no entry is above that: mixtures with caps, portfolios, sparse attention.

    .. math:: P(w)_i = \min(\max(w_i - \theta, 0), u_i), \quad
        \theta \text{ such that } \sum_{i \in s} P(w)_i = T

    θ is found by Newton's method, which on this piecewise linear sum ends after some ten passes over the
    weights; nothing is sorted. With ``upper`` it is kept between two bounds on θ.

    Args:
        total: the sum T >= 0: a number, an array that broadcasts to the sums of each leaf, a tree of
            these that is a prefix of the weights, or a formula ``(path, leaf) -> number``.
        upper: the largest entry u >= 0: None for no such bound, a number, an array that broadcasts to
            each leaf, a tree of these that is a prefix of the weights, or a formula ``(path, leaf) ->
            number``.
        scope: which entries share a sum, as in `clip_by_norm`.
        axis_name: mapped axes to sum over, as in `tree_norms`.

    Returns:
        A set for `project_weights`, `project` and `violation`. No entry is above ``upper``, as the dtype
        of the leaf rounds it down. Entries are never negative, unless
        updates have a narrower dtype than the weights; the sum is within 4 eps of T, the eps of the
        dtype of the leaf, after an update from within the set or near it. A scope with a +inf
        or NaN entry is left as it is; an entry of -inf, such as a masked logit, becomes 0. The violation
        is the larger of the error of the sum and of the most negative entry, or of the largest one above
        ``upper``. A traced ``upper`` that has no room for the total gives entries that are all at it.

    Raises:
        ValueError: for a negative, infinite or NaN total, a negative or NaN ``upper``, an unknown scope,
            a complex leaf; where the upper bounds of a scope sum up to less than its total.
        TypeError: if the total or ``upper`` is not a number.

    Examples:
        >>> import jax.numpy as jnp
        >>> from optax_clip import project, simplex
        >>> print(project(jnp.array([0.5, 1.0, -2.0]), simplex(1.0)))
        [0.25 0.75 0.  ]
        >>> print(project(jnp.array([0.5, 1.0, -2.0]), simplex(1.0, upper=0.5)))
        [0.5 0.5 0. ]

    References:
        Michelot, 1986, https://doi.org/10.1007/BF00938486; Condat, 2016,
        https://doi.org/10.1007/s10107-015-0946-6
    """
    _settings.absolute(total=total, upper=upper)
    total = _settings.finite(total=total)
    upper = upper if upper is None else _settings.limit(upper=upper)
    _validate.scope(scope)
    _validate.axis_name(axis_name=axis_name)

    def read(params: optax.Params) -> _Read:
        scopes, xs = Scopes.of(params, scope, axis_name)
        require_real(scopes, xs, of="simplex")
        wide = [widen(x, accumulator(xs)) for x in xs]
        lowest = [-peak for peak in scopes.max([-t for t in wide], initial=-jnp.inf)]
        highest, sums = scopes.max(wide, initial=-jnp.inf), scopes.sum(wide)
        totals = _settings.per_scope(scopes, xs, sums, total=total)
        caps = None if upper is None else capped.bounds(scopes, xs, upper, total)
        over = [0 * low for low in lowest] if caps is None else capped.excess(scopes, wide, caps)
        return _Read(scopes, xs, caps, _Sums(sums, lowest, highest, totals, over))

    def move(params: optax.Params, memory: Any, beside: Any) -> tuple[optax.Params, Any]:
        del beside
        scopes, xs, caps, found = read(params)
        keeps = [_is_on(*each) for each in zip(*found, scopes.counts, strict=True)]
        cut = Cut(scopes, _as_it_is)
        new = (
            soft_threshold(cut, xs, found.totals)
            if caps is None
            else capped.threshold(cut, xs, caps, found.totals)
        )
        kept = zip(xs, new, _xla.written_once(scopes.per_leaf(keeps)), strict=True)
        inside = [_unless(keep, x, y.astype(x.dtype)) for x, y, keep in kept]
        return scopes.rebuild(params, inside), memory

    def excess(params: optax.Params) -> Array:
        _, xs, _, found = read(params)
        ends = zip(found.sums, found.lowest, found.totals, found.over, strict=True)
        errors = [(jnp.abs(s - t), -low, over) for s, low, t, over in ends if xs]
        return largest([jnp.maximum(functools.reduce(jnp.maximum, each), 0) for each in errors])

    return Constraint(
        lambda params: move(params, None, None)[0], excess,
        shrinks=None if upper is None else True, move=move, axis_name=axis_name, scope=scope,
    )  # fmt: skip


class _Sums(NamedTuple):
    """Of each scope the sum, the lowest and the highest entry, what to sum to, how far above a cap."""

    sums: Cells
    lowest: Cells
    highest: Cells
    totals: Cells
    over: Cells


class _Read(NamedTuple):
    """The leaves, their caps, and what is known of their scopes."""

    scopes: Scopes
    xs: list[Array]
    caps: list[Array] | None
    sums: _Sums


def _is_on(got: Array, low: Array, high: Array, wanted: Array, over: Array, n: Any) -> Array:
    """Is a scope on the simplex, as far as its sum can tell, or not to be moved?"""
    margin, _ = margins(n, got.dtype)
    near: Array = jnp.abs(got - wanted) <= wanted * margin
    return near & (low >= 0) & (over <= 0) | ~jnp.isfinite(high)


def _unless(keep: Array, x: Array, moved: Array) -> Array:
    return lax.select(broadcast_like(keep, x), straight_through(x, moved), moved)


def l1_ball(
    bounds: NormBounds, params: optax.Params, memory: Any, beside: Any
) -> tuple[optax.Params, Any]:
    """The projection onto the ball of order 1: the absolute values onto a simplex, where outside."""
    scopes, xs, norms = bounds.cut(params, beside)
    radii = bounds.read("radius", scopes, xs, [norm.root for norm in norms], memory)
    overs, totals = [], []
    for norm, radius, n in zip(norms, radii, scopes.counts, strict=True):
        margin, inside = margins(n, norm.root.dtype)
        over = ~(norm.root <= radius * norm.scale * (1 - margin)) & jnp.isfinite(norm.root)
        overs.append(over & ~bounds.free("radius", radius))
        totals.append(jnp.where(overs[-1], radius * (1 - inside), 1))
    lengths = soft_threshold(Cut(scopes, modulus), xs, totals)
    rows = zip(xs, lengths, _xla.written_once(scopes.per_leaf(overs)), strict=True)
    new = [lax.select(broadcast_like(over, x), _with_modulus(x, y), x) for x, y, over in rows]
    return scopes.rebuild(params, new), memory


def _with_modulus(x: Array, length: Array) -> Array:
    """An entry of that length, or a little less, in the direction of ``x``."""
    if not jnp.iscomplexobj(x):
        return round_toward_zero(length * lax.stop_gradient(jnp.sign(widen(x, length.dtype))), x.dtype)
    return round_toward_zero(scale(x, length / jnp.where(x == 0, 1, jnp.abs(x))), x.dtype)


def _as_it_is(x: Array) -> Array:
    return x


@functools.partial(jax.jit, static_argnums=0)
def soft_threshold(cut: Cut, xs: list[Array], totals: Cells) -> list[Array]:
    """``max(t - θ, 0)`` with θ such that each scope sums to its total.

    Entries are measured from the largest one, so a common offset costs no precision. The search is
    constant to derivatives; one more of its steps has the derivative of θ, and on CPU its value.
    """
    fixed, goals = lax.stop_gradient((xs, totals))
    peaks = cut.scopes.max(cut.wide(fixed), initial=-jnp.inf)
    found = _newton(cut, fixed, peaks, goals)
    origins = [peaks, found.origins]
    steps, _ = _newton_step(cut, xs, origins, totals, found.thetas)
    thetas = _xla.one_more(found.thetas, steps)
    return [jnp.maximum(d, 0) for d in cut.depths(xs, [*origins, thetas])]


def _newton_step(
    cut: Cut, xs: list[Array], origins: list[Cells], goals: Cells, thetas: Cells
) -> tuple[Cells, Cells]:
    """One step towards the root, and how many entries are above."""
    depths = cut.depths(xs, [*origins, thetas])
    counts = cut.scopes.sum([(d > 0).astype(d.dtype) for d in depths])
    sums = cut.scopes.sum([jnp.where(d > 0, d, 0) for d in depths])
    rows = zip(thetas, sums, goals, counts, strict=True)
    return [theta + (got - goal) / jnp.maximum(n, 1) for theta, got, goal, n in rows], counts


class _Search(NamedTuple):
    """θ measured from an origin, the entries above at the last step, and how far the search is."""

    origins: Cells
    thetas: Cells
    counts: Cells
    phase: Array  # 0: from below; 1: one step back, from what was found; 2: from below again; 3: done


def _newton(cut: Cut, xs: list[Array], peaks: Cells, goals: Cells) -> _Search:
    """Newton's steps from below never pass θ nor go back, and end when the same entries are above.

    A second search is measured from what the first one found, as a rounding of θ counts for each entry
    above it; so its first step may have to go back.
    """
    zeros = [peak * 0 for peak in peaks]
    nowhere = [zero + jnp.inf for zero in zeros]

    def body(at: _Search) -> _Search:
        moved, counts = _newton_step(cut, xs, [peaks, at.origins], goals, at.thetas)
        same = [jnp.all(c == n) for c, n in zip(counts, at.counts, strict=True)]
        settled = all_devices_agree(functools.reduce(operator.and_, same))
        back, again = at.phase == 1, settled & (at.phase == 0)
        # A rounding may take θ back, and an entry in and out for ever.
        new = _where(back, moved, [jnp.maximum(*pair) for pair in zip(at.thetas, moved, strict=True)])
        return _Search(
            _where(again, new, at.origins), _where(again, zeros, new),
            _where(again | back, nowhere, counts), at.phase + (back | settled).astype(jnp.int32),
        )  # fmt: skip

    start = _Search(zeros, _below(cut, xs, peaks, goals), nowhere, jnp.int32(0))
    found: _Search = lax.while_loop(lambda at: at.phase < 3, body, start)
    return found


def _below(cut: Cut, xs: list[Array], peaks: Cells, goals: Cells) -> Cells:
    """Newton's step from below all entries, kept where θ can be: from -goal to -goal / n."""
    rows = zip(cut.scopes.sum(cut.wide(xs)), peaks, goals, cut.scopes.counts, strict=True)
    starts = []
    for total, peak, goal, n in rows:
        number = jnp.maximum(jnp.asarray(n, peak.dtype), 1)
        step = (total - goal) / number - peak
        starts.append(jnp.minimum(jnp.maximum(step, -goal), -goal / number))
    return starts


def _where(flag: Array, xs: Cells, ys: Cells) -> Cells:
    return [jnp.where(flag, x, y) for x, y in zip(xs, ys, strict=True)]
