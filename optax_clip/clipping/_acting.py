"""What every clip by norm does to a tree: measure, decide, rescale."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from optax_clip import _validate, _xla
from optax_clip._numerics import accumulator, as_dtype, scale, widen
from optax_clip._trees import Cells, Scopes
from optax_clip._validate import AxisName, Groups, Ord, Scope
from optax_clip.norms import Norm, all_finite, measure, total
from optax_clip.thresholds.engine import A_RULE, Limits, Seen

POLICIES = ("propagate", "zero", "local")
_SMALL = 2**16  # entries of a leaf that is measured together with the other small ones


class Clipped(NamedTuple):
    """What became of a tree.

    Args:
        leaves: the inexact ones, each scope rescaled.
        memory: what the limits remember.
        scopes: how the tree was cut, for the cells below.
        total: the norm of the whole tree before.
        finite: is every entry finite?
        before: the norm of each scope.
        limits: of these.
        over: which scopes were rescaled.
        after: the norms after, but where ``fine`` is False.
        fine: which scopes are finite; unless each is judged on its own, whether all are.
    """

    leaves: list[Array]
    memory: Any
    scopes: Scopes
    total: Array
    finite: Array
    before: Cells
    limits: Cells
    over: Cells
    after: Cells
    fine: Cells


class Clipping(NamedTuple):
    """What a clip by norm was called with. Static."""

    limits: Limits
    scope: Scope
    ord: Ord
    nonfinite: str
    axis_name: AxisName
    normalize: bool = False

    def check(self) -> None:
        _validate.scope(self.scope)
        _validate.order(self.ord)
        _validate.axis_name(axis_name=self.axis_name)
        _validate.one_of(POLICIES, nonfinite=self.nonfinite)

    @property
    def is_local(self) -> bool:
        return self.nonfinite == "local"

    def act(self, tree: Any, memory: Any, params: Any, **norm: ArrayLike | None) -> Clipped:
        """Clip; ``norm`` by its name, if it is known already, of the scope ``"global"``."""
        params = params if self.limits.asks_for_weights else None
        scopes, xs = Scopes.of(tree, self.scope, self.axis_name, beside=params)
        parts = self._parts(scopes, xs, params)
        norms = [_measured_or_given(part, self.ord, **norm) for part in parts]
        finite = all_finite([each for of_part in norms for each in of_part])
        fine = [[jnp.isfinite(n.root) if self.is_local else finite for n in some] for some in norms]

        def whole(cells: Sequence[Cells]) -> Cells:
            return _joined(scopes, parts, cells)

        before = whole([[n.value for n in some] for some in norms])
        size = total(scopes, before, self.ord)
        heard = self._heard(scopes, before, whole(fine), size)
        done = []
        for part, n, f in zip(parts, norms, fine, strict=True):
            seen = Seen(part.scopes, n, heard, f, part.params, self.ord)
            done.append(self._rescale(seen, part.xs, memory, finite))
        leaves = _in_order(parts, [each.leaves for each in done])
        return Clipped(
            leaves=leaves,
            memory=done[0].memory,
            scopes=scopes,
            total=size,
            finite=finite,
            before=before,
            limits=whole([each.limits for each in done]),
            over=whole([each.over for each in done]),
            after=whole([each.after for each in done]),
            fine=whole(fine),
        )

    def _parts(self, scopes: Scopes, xs: list[Array], params: Any) -> "list[_Part]":
        """What is measured and rescaled before anything else is looked at: all, or a leaf.

        A leaf on its own need not be kept until the last is measured, if nothing about another concerns
        it.
        """
        apart = self.is_local and self.limits.act_alone
        if not apart or scopes.is_global or isinstance(self.scope, Groups):
            return [_Part(scopes, _xla.materialized(xs), params, tuple(range(len(xs))))]
        weights = None if params is None else scopes.leaves_of(params, of=A_RULE)
        return [self._part(scopes, xs, weights, some) for some in in_batches(xs)]

    def _part(self, scopes: Scopes, xs: list[Array], weights: Any, order: tuple[int, ...]) -> "_Part":
        """Some leaves as a tree of their own, cut as they are in the whole."""

        def axes(path: str, _: Any) -> tuple[int, ...]:
            return scopes.axes[order[int(path)]]

        some = _xla.materialized([xs[i] for i in order])
        scope = self.scope if self.scope == "leaf" else axes
        params = None if weights is None else [weights[i] for i in order]
        return _Part(Scopes.of(some, scope, self.axis_name)[0], some, params, order)

    def _heard(self, scopes: Scopes, before: Cells, fine: Cells, size: Array) -> Array:
        """The norm of the whole tree as rules are told it: of what is finite, or NaN."""
        if scopes.is_global or not self.is_local:
            return jnp.where(fine[0], size, jnp.nan)
        kept = [jnp.where(f, n, 0) for f, n in zip(fine, before, strict=True)]
        return total(scopes, kept, self.ord)

    def _rescale(self, seen: Seen, xs: list[Array], memory: Any, finite: Array) -> "_Done":
        """Multiply each scope that is over its limit by limit / norm."""
        limits, memory = self.limits.update(seen, memory)
        each = zip(seen.norms, limits, seen.fine, strict=True)
        plans = [_plan(*those, normalize=self.normalize) for those in each]
        # Behind a barrier: compilers would else form the factors anew for each entry.
        columns = zip(*(lax.optimization_barrier(plan.factors) for plan in plans), strict=True)
        flags, firsts, seconds = (seen.scopes.per_leaf(list(column)) for column in columns)
        moved = [
            scale(widen(x, first.dtype), first, second)
            for x, first, second in zip(xs, firsts, seconds, strict=True)
        ]
        if self.nonfinite == "zero":
            kept = lax.optimization_barrier(finite)
            moved = [lax.select(kept, y, jnp.zeros_like(y)) for y in moved]
        leaves = _xla.select(xs, flags, moved)
        # Of a tree without scopes the limit is still one.
        pairs = zip(limits, plans, strict=True)
        shown = [jnp.broadcast_to(x, p.over.shape) if p.over.size else x for x, p in pairs]
        return _Done(
            leaves, memory, shown, [plan.over for plan in plans], [plan.after for plan in plans]
        )


def in_batches(xs: Sequence[Array]) -> list[tuple[int, ...]]:
    """Each large leaf on its own, all small ones together: kernels cost, too."""
    large: list[tuple[int, ...]] = [(i,) for i, x in enumerate(xs) if x.size > _SMALL]
    small = tuple(i for i, x in enumerate(xs) if x.size <= _SMALL)
    return [*large, small] if small or not large else large


class _Part(NamedTuple):
    """Some leaves, with their weights if the limits ask for these; at which places of the whole."""

    scopes: Scopes
    xs: list[Array]
    params: Any
    order: tuple[int, ...]


class _Done(NamedTuple):
    leaves: list[Array]
    memory: Any
    limits: Cells
    over: Cells
    after: Cells


def _in_order(parts: Sequence[_Part], each: Sequence[Sequence[Array]]) -> list[Array]:
    """One value a leaf, from those of the parts."""
    places = {
        i: x for part, xs in zip(parts, each, strict=True) for i, x in zip(part.order, xs, strict=True)
    }
    return [places[i] for i in range(len(places))]


def _joined(scopes: Scopes, parts: Sequence[_Part], each: Sequence[Cells]) -> Cells:
    """The cells of the whole tree from those of its parts."""
    if len(parts) == 1:
        return each[0]
    values = _in_order(parts, [part.scopes.per_leaf(x) for part, x in zip(parts, each, strict=True)])
    widest = np.result_type(*(x.dtype for x in values))
    # Behind barriers: in a kernel with the factors of a leaf the rest would make these wait.
    return scopes.cells([lax.optimization_barrier(x.astype(widest)) for x in values])


def _measured_or_given(part: _Part, ord: Ord, **named: Any) -> list[Norm]:
    norm = next(iter(named.values()), None)
    if norm is None or not part.scopes.is_global:
        return measure(part.scopes, part.xs, ord)
    _validate.measured(**named)
    return [Norm.of(as_dtype(norm, accumulator(part.xs)))]


class _Plan(NamedTuple):
    """What becomes of the scopes of a cell: whether they change, by which two factors."""

    factors: tuple[Array, Array, Array]
    over: Array
    after: Array


def _plan(norm: Norm, limit: Array, fine: Array, *, normalize: bool) -> _Plan:
    limit = jnp.maximum(limit, 0)
    over = (norm.root != 0) | jnp.isnan(limit) if normalize else norm.exceeds(limit)
    zeroed = over | (limit == 0)  # also what the device takes for a norm of 0
    first, second = norm.factors(jnp.where(zeroed, limit, 1))
    second = jnp.where(fine, second, jnp.nan)
    after = jnp.where(over, limit, norm.value)
    return _Plan((zeroed | ~fine, first, second), over, after)
