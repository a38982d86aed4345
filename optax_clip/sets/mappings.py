"""Gradient mappings: what a set leaves of a gradient that will be subtracted.

A gradient is looked at after a step ``a g`` as long as a share of the weights, ``a |g| = reach |w|`` for
each scope: so it has no unit. What is inside there keeps its gradient bit for bit.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array, lax

from optax_clip import _xla
from optax_clip._geometry.intervals import clamp
from optax_clip._geometry.radial import beside_leaves, norm_error
from optax_clip._numerics import accumulator, broadcast_like, reciprocal, scale, widen
from optax_clip._records import fraction
from optax_clip._trees import Cells, Scopes
from optax_clip.norms import Norm, Powers, measure, root
from optax_clip.sets.constraint import (
    Constraint,
    Mapped,
    NormBounds,
    entries_moved,
)


def by_difference(
    constraint: Constraint, params: optax.Params, grads: optax.Updates, memory: Any, beside: Any,
    reach: Array,
) -> Mapped:  # fmt: skip
    """``(w - P(w - a g)) / a`` for any set."""
    scopes, gs = Scopes.of(grads, constraint.scope, constraint.axis_name, beside=beside)
    _, ws = Scopes.of(params, "leaf", axis_name=())
    dtype = accumulator([*ws, *gs])
    sizes, slopes = (_norms(scopes, xs, dtype) for xs in (ws, gs))
    steps = [_Step.of(*pair, reach) for pair in zip(sizes, slopes, strict=True)]
    numbers = beside_leaves(scopes, lax.stop_gradient(steps))
    rows = [
        (widen(w, dtype), widen(g, dtype), _Step(*own))
        for w, g, own in zip(ws, gs, numbers, strict=True)
    ]
    ahead = [w - step.there(g) for w, g, step in rows]
    tree = scopes.alone(ahead)
    move = constraint.move
    nearest, kept = move(tree, memory, beside) if move else (constraint(tree), memory)
    _, ends = Scopes.of(nearest, "leaf", axis_name=())
    each = list(zip(rows, ahead, ends, strict=True))
    changed = [(end != v) & broadcast_like(step.taken, v) for (*_, step), v, end in each]
    new = _xla.select(gs, changed, [step.back(w - end) for (w, _, step), _, end in each])
    return new, kept, functools.partial(fraction, changed, constraint.axis_name)


class _Step(NamedTuple):
    """From a gradient to its step and back, for each scope, by factors that stay in range."""

    taken: Array
    slope_scale: Array
    shorter: Array
    size_scale: Array
    longer: Array

    @classmethod
    def of(cls, size: Norm, slope: Norm, reach: Array) -> "_Step":
        root, scaling = _or_one(size)
        taken = jnp.isfinite(root) & jnp.isfinite(slope.root)
        length, some = reach.astype(root.dtype) * root, taken & (slope.root > 0)
        shorter = jnp.where(some, length, 0) / jnp.where(some, slope.root, 1)
        return cls(taken, slope.scale, shorter, scaling, slope.root / length)

    def there(self, g: Array) -> Array:
        return scale(g, self.slope_scale, self.shorter, reciprocal(self.size_scale))

    def back(self, gap: Array) -> Array:
        return scale(gap, self.size_scale, self.longer, reciprocal(self.slope_scale))


def _norms(scopes: Scopes, xs: Sequence[Array], dtype: Any) -> list[Norm]:
    return [Norm(*(x.astype(dtype) for x in norm)) for norm in measure(scopes, xs, None)]


def _or_one(size: Norm) -> tuple[Array, Array]:
    """The norm of weights; weights of 0 count as of norm 1."""
    return jnp.where(size.root == 0, 1, size.root), jnp.where(size.root == 0, 1, size.scale)


# --- Boxes ---------------------------------------------------------------------------------------

_LEAST = 2.0**-100  # how far a weight of 0 looks


def by_entry(
    constraint: Constraint, params: optax.Params, grads: optax.Updates, memory: Any, beside: Any,
    reach: Array,
) -> Mapped:  # fmt: skip
    """``clip(g, (w - u) / a, (w - l) / a)``: each entry is a scope of its own, so none is summed."""
    bounds: Any = constraint.bounds
    _, gs = Scopes.of(grads, "leaf", axis_name=())
    _, ws = Scopes.of(params, "leaf", axis_name=())
    rows = zip(ws, gs, bounds(params, memory, beside), strict=True)
    pairs = [_clipped(w, g, low, high, reach) for w, g, (low, high) in rows]
    left, changed = map(list, zip(*pairs, strict=True)) if pairs else ([], [])
    new = _xla.select(gs, changed, left)
    return new, memory, functools.partial(fraction, changed, constraint.axis_name)


def _clipped(w: Array, g: Array, low: Array, high: Array, reach: Array) -> tuple[Array, Array]:
    """What is left of the gradient, and whether that is less than all."""
    dtype = accumulator([w, g])
    w, g = widen(w, dtype), widen(g, dtype)
    size = lax.stop_gradient(jnp.maximum(reach.astype(dtype) * jnp.abs(w), _LEAST))
    ahead = w - scale(lax.stop_gradient(jnp.sign(g)), size)
    end = clamp(ahead, low, high)
    left = scale(w - end, 1 / size, jnp.abs(g))
    return left, (end != ahead) & jnp.isfinite(g) & jnp.isfinite(w)


# --- Norm sets -----------------------------------------------------------------------------------


def by_norms(
    bounds: NormBounds, params: optax.Params, grads: optax.Updates, memory: Any, beside: Any,
    reach: Array,
) -> Mapped:  # fmt: skip
    """``f g + (1 - f) w / a``: of each scope the step ends at ``f`` of its length, or at all of it."""
    scopes, gs = Scopes.of(grads, bounds.scope, bounds.axis_name, beside=beside)
    _, ws = Scopes.of(params, "leaf", axis_name=())
    dtype = accumulator([*ws, *gs])
    triangles = _triangles(scopes, [widen(w, dtype) for w in ws], [widen(g, dtype) for g in gs])
    roots = [t.size.root for t in triangles]
    lows, highs = (read(scopes, ws, roots, memory) for read in (bounds.lows, bounds.highs))
    each = zip(triangles, scopes.counts, lows, highs, strict=True)
    plans = [t.plan(n, low, high, reach.astype(dtype)) for t, n, low, high in each]
    flags, left = [], []
    for w, g, (changed, *factors) in zip(ws, gs, beside_leaves(scopes, plans), strict=True):
        flags.append(changed)
        left.append(scale(widen(g, dtype), factors[0]) + scale(widen(w, dtype), *factors[1:]))
    new = _xla.select(gs, flags, left)
    moved = [plan.changed for plan in plans]
    return new, memory, lambda: entries_moved(scopes, moved)


class _Plan(NamedTuple):
    """For each scope: is its gradient changed, by which factor, and by which four of the weights."""

    changed: Array
    of_gradient: Array
    size_scale: Array
    share: Array
    slope_root: Array
    slope_unit: Array


class _Triangle(NamedTuple):
    """Weights, gradient and step of a scope: two sides and the cosine between them."""

    size: Norm
    slope: Norm
    cosine: Array

    def plan(self, n: Any, low: Array, high: Array, reach: Array) -> _Plan:
        """In units of ``|w|``, where the step is as long as ``reach``.

        With ``q = |w - a g|`` ahead and ``t`` the bound on it, ``1 - f`` is ``(q^2 - t^2) / q (q + t)``,
        and weights that landed at the bound are at it.
        """
        root, scaling = _or_one(self.size)
        there = (self.size.root > 0).astype(root.dtype)  # weights of 0 have no direction
        ends = [_at_one(bound * scaling / root, n) for bound in (low, high)]
        step = reach * (reach - 2 * there * self.cosine)
        short, long = ((there - end) * (there + end) + step for end in ends)
        over, under = long > 0, short < 0
        square = there + step
        ahead = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
        end = jnp.where(over, ends[1], jnp.where(under, ends[0], ahead))
        gap = jnp.where(over, long, jnp.where(under, short, 0))
        finite = jnp.isfinite(self.size.root) & jnp.isfinite(self.slope.root)
        changed = finite & (over | under) & (ahead > 0)
        q = jnp.where(changed, ahead, 1)
        lost = jnp.where(changed, gap, 0) / (q * (q + jnp.where(changed, end, 1)))
        share = lost / (reach * root)
        unit = reciprocal(self.slope.scale)
        return _Plan(changed, jnp.where(changed, end, 1) / q, scaling, share, self.slope.root, unit)


def _at_one(bound: Array, n: Any) -> Array:
    """A bound in units of the norm; 1 where it is as near as landing takes weights to it."""
    _, inside = norm_error(n, bound.dtype)
    far = float(jnp.finfo(bound.dtype).max) ** 0.25  # its square is finite
    return jnp.where(jnp.abs(bound - 1) <= 2 * inside, 1, jnp.minimum(bound, far))


def _triangles(scopes: Scopes, ws: list[Array], gs: list[Array]) -> list[_Triangle]:
    sizes, slopes, dots = _xla.by_platform(
        ws, gs,
        cpu=functools.partial(_measured_twice, scopes),
        default=functools.partial(_measured_once, scopes),
    )  # fmt: skip
    return [_Triangle(*each) for each in zip(sizes, slopes, dots, strict=True)]


Measured = tuple[list[Norm], list[Norm], Cells]


def _measured_twice(scopes: Scopes, ws: list[Array], gs: list[Array]) -> Measured:
    """Norms, then the cosines of what is scaled by them."""
    sizes, slopes = measure(scopes, ws, None), measure(scopes, gs, None)
    columns = (scopes.per_leaf([norm.scale for norm in norms]) for norms in (sizes, slopes))
    pairs = zip(ws, gs, *columns, strict=True)
    dots = scopes.sum([_product(scale(w, k), scale(g, m)) for w, g, k, m in pairs])
    return sizes, slopes, [_over(dot, *each) for dot, *each in zip(dots, sizes, slopes, strict=True)]


def _measured_once(scopes: Scopes, ws: list[Array], gs: list[Array]) -> Measured:
    """All sums in one read of both trees: squares as they are, shrunk and grown, products in two ways.

    XLA gives a ninth sum a kernel, and so a read, of its own on a GPU.
    """
    powers = Powers(scopes, 2.0, accumulator([*ws, *gs]), lambda x: x)
    most = int(jnp.finfo(powers.dtype).maxexp)
    shrink, grow, cap = (2.0 ** (k * most // 128) for k in (-20, 40, 40))
    pairs = list(zip(ws, gs, strict=True))
    shrunk = [_product(*_larger_scaled(w, g, shrink**2)) for w, g in pairs]
    grown = [_product(*_smaller_scaled(w, g, cap, grow**2)) for w, g in pairs]
    sums = scopes.sums([*powers.ways(ws), *powers.ways(gs), shrunk, grown])
    sizes, slopes = (
        [Norm.of(root(s), k) for s, k in zip(*powers.chosen(*some), strict=True)]
        for some in (sums[:3], sums[3:6])
    )
    cosines = []
    for size, slope, shrunk, grown in zip(sizes, slopes, *sums[6:], strict=True):
        low = jnp.log2(size.scale) + jnp.log2(slope.scale) > 50 * most / 128
        back, dot = jnp.where(low, 1 / grow, 1 / shrink), jnp.where(low, grown, shrunk)
        cosines.append(_over(dot * (size.scale * back) * (slope.scale * back), size, slope))
    return sizes, slopes, cosines


def _product(w: Array, g: Array) -> Array:
    """Its sum is the product of two vectors, of complex ones the real part."""
    if not jnp.iscomplexobj(w):
        return w * g
    return w.real * g.real + w.imag * g.imag


def _larger_scaled(w: Array, g: Array, k: float) -> tuple[Array, Array]:
    larger = jnp.abs(w) > jnp.abs(g)
    return jnp.where(larger, w * k, w), jnp.where(larger, g, g * k)


def _smaller_scaled(w: Array, g: Array, cap: float, k: float) -> tuple[Array, Array]:
    larger = jnp.abs(w) > jnp.abs(g)
    return jnp.where(larger, w, _within(w, cap) * k), jnp.where(larger, _within(g, cap) * k, g)


def _over(dot: Array, size: Norm, slope: Norm) -> Array:
    """The cosine, from the product of what was scaled by the norms' powers of two."""
    root = size.root * slope.root
    return jnp.clip(jnp.where(root > 0, dot, 0) / jnp.where(root > 0, root, 1), -1, 1)


def _within(x: Array, cap: float) -> Array:
    if jnp.iscomplexobj(x):
        return lax.complex(jnp.clip(x.real, -cap, cap), jnp.clip(x.imag, -cap, cap))
    return jnp.clip(x, -cap, cap)
