"""Sets on which entries sum up: the simplex and the ball of order 1, by root finding."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from optax_clip import _settings, _validate, _xla
from optax_clip._geometry.capped_sums import capped_threshold
from optax_clip._geometry.radial import norm_error
from optax_clip._geometry.sums import Entries, soft_threshold
from optax_clip._numerics import (
    accumulator,
    aligned,
    broadcast_like,
    precise,
    round_down,
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
from optax_clip.sets.constraint import Constraint, NormBounds, largest, require_real

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
    simplex = _Simplex(total, upper, scope, axis_name)
    return Constraint(
        lambda params: simplex.move(params, None, None)[0], simplex.excess,
        shrinks=None if upper is None else True, move=simplex.move, axis_name=axis_name, scope=scope,
    )  # fmt: skip


class _Simplex(NamedTuple):
    """What `simplex` was called with."""

    total: Any
    upper: Any
    scope: Scope
    axis_name: AxisName

    def read(self, params: optax.Params) -> "_Read":
        scopes, xs = Scopes.of(params, self.scope, self.axis_name)
        require_real(scopes, xs, of="simplex")
        wide = [widen(x, accumulator(xs)) for x in xs]
        lowest = [-peak for peak in scopes.max([-t for t in wide], initial=-jnp.inf)]
        highest, sums = scopes.largest(wide, initial=-jnp.inf), scopes.sum(wide)
        totals = _settings.per_scope(scopes, xs, sums, total=self.total)
        caps = None if self.upper is None else _caps(scopes, xs, self.upper, self.total)
        over = [jnp.zeros_like(low) for low in lowest] if caps is None else _above(scopes, wide, caps)
        return _Read(scopes, xs, caps, _Sums(sums, lowest, highest, totals, over))

    def move(self, params: optax.Params, memory: Any, beside: Any) -> tuple[optax.Params, Any]:
        del beside
        scopes, xs, caps, found = self.read(params)
        keeps = [_is_on(*each) for each in zip(*found, scopes.counts, strict=True)]
        entries = Entries(scopes, _as_it_is)
        if caps is None:
            new = soft_threshold(entries, xs, found.totals)
        else:
            new = capped_threshold(entries, xs, caps, found.totals)
        kept = zip(xs, new, _xla.written_once(scopes.per_leaf(keeps)), strict=True)
        inside = [_unless(keep, x, y.astype(x.dtype)) for x, y, keep in kept]
        return scopes.rebuild(params, inside), memory

    def excess(self, params: optax.Params) -> Array:
        scopes, xs, _, found = self.read(params)
        ends = zip(found.sums, found.lowest, found.totals, found.over, scopes.counts, strict=True)
        errors = [(jnp.abs(s - t), -low, over, jnp.asarray(n)) for s, low, t, over, n in ends if xs]
        gaps = [(functools.reduce(jnp.maximum, each), n) for *each, n in errors]
        return largest([jnp.where(n > 0, gap, 0) for gap, n in gaps])  # 0 where there is no entry


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
    margin, _ = norm_error(n, got.dtype)
    near: Array = jnp.abs(got - wanted) <= wanted * margin
    return near & (low >= 0) & (over <= 0) | ~jnp.isfinite(high)


def _unless(keep: Array, x: Array, moved: Array) -> Array:
    return lax.select(broadcast_like(keep, x), straight_through(x, moved), moved)


def l1_ball(
    bounds: NormBounds, params: optax.Params, memory: Any, beside: Any
) -> tuple[optax.Params, Any]:
    """The projection onto the ball of order 1: the absolute values onto a simplex, where outside."""
    scopes, xs, norms = bounds.cut(params, beside)
    radii = bounds.highs(scopes, xs, [norm.root for norm in norms], memory)
    overs, totals = [], []
    for norm, radius, n in zip(norms, radii, scopes.counts, strict=True):
        margin, inside = norm_error(n, norm.root.dtype)
        overs.append(~(norm.root <= radius * norm.scale * (1 - margin)) & jnp.isfinite(norm.root))
        totals.append(jnp.where(overs[-1], radius * (1 - inside), 1))
    lengths = soft_threshold(Entries(scopes, modulus), xs, totals)
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


def _caps(scopes: Scopes, xs: Sequence[Array], upper: Setting, total: Setting) -> list[Array]:
    """The cap of each entry, in float32 or wider, as its leaf can hold it."""
    caps = _settings.per_leaf(scopes, xs, [x.shape for x in xs], upper=upper)
    _require_room(scopes, xs, caps, total, upper)
    stored = [jnp.asarray(round_down(precise(cap), x.dtype)) for x, cap in zip(xs, caps, strict=True)]
    wide = accumulator(xs)
    return [jnp.maximum(aligned(cap, x.ndim).astype(wide), 0) for x, cap in zip(xs, stored, strict=True)]


def _require_room(
    scopes: Scopes, xs: Sequence[Array], caps: Sequence[Any], total: Any, upper: Any
) -> None:
    """The caps of each scope sum up to its total, as far as both are known and here."""
    if any(map(_validate.is_traced, [*caps, *jax.tree.leaves(total)])) or any(scopes.mapped):
        return
    whole = [np.broadcast_to(np.asarray(cap, float), x.shape) for x, cap in zip(xs, caps, strict=True)]
    rooms = [x.sum(axis=axes, keepdims=True) for x, axes in zip(whole, scopes.axes, strict=True)]
    totals = _goals(scopes, xs, total)
    if scopes.is_joint:
        rooms = [
            sum(room.sum() for room, other in zip(rooms, scopes.homes, strict=True) if other == home)
            for home in scopes.homes
        ]
    for place, x, room, goal in zip(scopes.places, xs, rooms, totals, strict=True):
        # A third, three times, may be a rounding below 1.
        if x.size and np.any(room * (1 + 1e-6) < np.asarray(goal, float)):
            raise ValueError(
                "Expected upper times the number of entries to be at least total, got "
                f"upper={upper!r} and total={total!r} for leaf {scopes.paths[place]!r} of shape "
                f"{x.shape}."
            )


def _goals(scopes: Scopes, xs: Sequence[Array], total: Any) -> list[Any]:
    """The total that each leaf has a part in, or that of each of its scopes."""
    if not scopes.is_joint:
        return _settings.per_leaf(scopes, xs, scopes.shapes, total=total)
    if not isinstance(total, Mapping):
        return [total] * len(xs)
    names: dict[Any, str] = dict(enumerate(scopes.labels or ()))
    return [total[names[row]] for _, row in scopes.homes]


def _above(scopes: Scopes, wide: Sequence[Array], caps: Sequence[Array]) -> Cells:
    """How far the entries of each scope are above their caps."""
    return scopes.max([x - cap for x, cap in zip(wide, caps, strict=True)], initial=-jnp.inf)
