"""What every clip by norm does to a tree: cut, measure, decide, rescale, record."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike

from optax_clip import _validate, _xla
from optax_clip._geometry import radial
from optax_clip._numerics import accumulator, as_dtype
from optax_clip._records import Report, clip_report, fraction, part_names, transform
from optax_clip._trees import Cells, Scopes
from optax_clip._validate import AxisName, Groups, Ord, Record, Scope
from optax_clip.norms import Norm, Order, all_finite, measure, total
from optax_clip.thresholds.engine import A_RULE, Limits, Seen, lowest

POLICIES = ("propagate", "zero", "local")
_SMALL = 2**16  # entries of a leaf that is measured together with the other small ones


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
        Order.of(self.ord)
        _validate.axis_name(axis_name=self.axis_name)
        _validate.one_of(POLICIES, nonfinite=self.nonfinite)

    def transform(self, name: str, record: Record) -> optax.GradientTransformationExtraArgs:
        self.check()
        by_part = self._records_parts(record)

        def step(
            updates: Any, memory: Any, params: Any, *, grad_norm: ArrayLike | None = None, **_: Any
        ) -> tuple[Any, Any, Any]:
            done = self.act(updates, memory, params, grad_norm=grad_norm)
            new = done.cut.scopes.rebuild(updates, done.leaves)
            return new, done.memory, lambda: self.report(done, by_part=by_part)

        return transform(
            name, ("norms", "counts"), lambda params: self.limits.init(params, self.scope), step,
            record=bool(record), remembers=self.limits.remembers, by_tree=self.limits.by_tree,
            scope=self.scope, axis_name=self.axis_name, part="scope" if by_part else None,
        )  # fmt: skip

    def _records_parts(self, record: Record) -> bool:
        """Are there metrics of each scope? Of groups always, of leaves by the word."""
        _validate.record(record, "scopes")
        grouped = isinstance(self.scope, Groups)
        if record == "scopes" and self.scope != "leaf" and not grouped:
            raise ValueError(
                f'Expected record="scopes" only with scope="leaf" or groups, got scope={self.scope!r}.'
            )
        return record == "scopes" or (grouped and bool(record))

    def act(self, tree: Any, memory: Any, params: Any, **norm: ArrayLike | None) -> "Clipped":
        """Clip; ``norm`` by its name, if it is known already, of the scope ``"global"``."""
        cut = self.cut(tree, params if self.limits.asks_for_weights else None)
        norms = [_measured_or_given(part, self.ord, **norm) for part in cut.parts]
        found = self.found(cut, norms)
        told = self.told(cut, found)
        seen = [
            Seen(part.scopes, some, told, fine, part.params, self.ord)
            for part, some, fine in zip(cut.parts, norms, found.fine, strict=True)
        ]
        limits, memories = zip(*(self.limits.update(each, memory) for each in seen), strict=True)
        plans = [self.plan(each, some) for each, some in zip(seen, limits, strict=True)]
        kept = found.finite if self.nonfinite == "zero" else None
        rows = zip(cut.parts, plans, strict=True)
        leaves = cut.leaves([radial.clipped(part.scopes, part.xs, plan, kept) for part, plan in rows])
        return Clipped(cut, leaves, memories[0], found, limits, plans)

    def cut(self, tree: Any, params: Any) -> "Cut":
        """What is measured and rescaled before anything else is looked at: all, or a leaf.

        A leaf on its own need not be kept until the last is measured, if nothing about another concerns
        it.
        """
        scopes, xs = Scopes.of(tree, self.scope, self.axis_name, beside=params)
        # With a memory of norms the limit of a scope depends on the others, or on steps before.
        alone = self.nonfinite == "local" and not (self.limits.by_tree or scopes.is_joint)
        if not alone:
            return Cut(scopes, [Part(scopes, _xla.materialized(xs), params, tuple(range(len(xs))))])
        weights = None if params is None else scopes.leaves_of(params, of=A_RULE)
        return Cut(scopes, [self._part(scopes, xs, weights, some) for some in in_batches(xs)])

    def _part(self, scopes: Scopes, xs: list[Array], weights: Any, order: tuple[int, ...]) -> "Part":
        """Some leaves as a tree of their own, cut as they are in the whole."""

        def axes(path: str, _: Any) -> tuple[int, ...]:
            return scopes.axes[order[int(path)]]

        some = _xla.materialized([xs[i] for i in order])
        scope = self.scope if self.scope == "leaf" else axes
        params = None if weights is None else [weights[i] for i in order]
        return Part(Scopes.of(some, scope, self.axis_name)[0], some, params, order)

    def found(self, cut: "Cut", norms: list[list[Norm]]) -> "Found":
        """The norms of the whole tree, and what of it is as it should be."""
        finite = all_finite([each for some in norms for each in some])
        local = self.nonfinite == "local"
        fine = [[jnp.isfinite(n.root) if local else finite for n in some] for some in norms]
        before = cut.cells([[n.value for n in some] for some in norms])
        return Found(before, total(cut.scopes, before, self.ord), finite, fine)

    def told(self, cut: "Cut", found: "Found") -> Array:
        """The norm of the whole tree as rules are told it: of what is finite, or NaN."""
        if self.nonfinite != "local" or cut.scopes.is_global:
            return jnp.where(found.fine[0][0], found.total, jnp.nan)
        pairs = zip(cut.cells(found.fine), found.before, strict=True)
        return total(cut.scopes, [jnp.where(f, n, 0) for f, n in pairs], self.ord)

    def plan(self, seen: Seen, limits: Cells) -> list[radial.Clip]:
        """What becomes of each scope."""
        each = zip(seen.norms, limits, seen.fine, strict=True)
        # Zeros come last, so that a step which is dropped has no derivative but 0.
        spoilt = 1.0 if self.nonfinite == "zero" else jnp.nan
        return [radial.clip(*own, exactly=self.normalize, spoilt=spoilt) for own in each]

    def report(self, done: "Clipped", *, by_part: bool) -> Report:
        cut, found, spoilt = done.cut, done.found, 0 if self.nonfinite == "zero" else jnp.nan
        fine, over, last, limit = map(cut.cells, (found.fine, done.over, done.after, done.shown))
        after = jnp.where(found.finite, total(cut.scopes, last, self.ord), spoilt)
        share = fraction([x & f for x, f in zip(over, fine, strict=True)])
        parts = {}
        if by_part:
            settled = [jnp.where(f, x, spoilt) for f, x in zip(fine, last, strict=True)]
            columns = [found.before[0], settled[0], jnp.broadcast_to(limit[0], settled[0].shape)]
            names = part_names(cut.scopes, "scope")
            parts = {name: row for name, *row in zip(names, *columns, strict=True)}
        return clip_report(found.total, after, lowest(limit), share, found.finite, parts)


class Part(NamedTuple):
    """Some leaves, with their weights if the limits ask for these; at which places of the whole."""

    scopes: Scopes
    xs: list[Array]
    params: Any
    order: tuple[int, ...]


class Cut(NamedTuple):
    """A tree in parts."""

    scopes: Scopes
    parts: list[Part]

    def leaves(self, each: Sequence[Sequence[Array]]) -> list[Array]:
        """The leaves of the whole tree from those of its parts."""
        places: dict[int, Array] = {}
        for part, xs in zip(self.parts, each, strict=True):
            places |= zip(part.order, xs, strict=True)
        return [places[i] for i in range(len(places))]

    def cells(self, each: Sequence[Cells]) -> Cells:
        """The cells of the whole tree from those of its parts."""
        if len(self.parts) == 1:
            return each[0]
        rows = zip(self.parts, each, strict=True)
        values = self.leaves([part.scopes.per_leaf(cells) for part, cells in rows])
        widest = np.result_type(*(x.dtype for x in values))
        # Behind barriers: in a kernel with the factors of a leaf the rest would make these wait.
        return self.scopes.cells(_xla.each_once([x.astype(widest) for x in values]))


class Found(NamedTuple):
    """What was measured: the norms, that of the whole, is all finite, and part by part what is."""

    before: Cells
    total: Array
    finite: Array
    fine: list[Cells]


class Clipped(NamedTuple):
    """What became of a tree, and part by part of its scopes."""

    cut: Cut
    leaves: list[Array]
    memory: Any
    found: Found
    limits: Sequence[Cells]
    plans: list[list[radial.Clip]]

    @property
    def over(self) -> list[Cells]:
        return [[plan.over for plan in some] for some in self.plans]

    @property
    def after(self) -> list[Cells]:
        return [[plan.after for plan in some] for some in self.plans]

    @property
    def shown(self) -> list[Cells]:
        """The limits, one a scope; of a tree without scopes still one."""
        rows = (zip(*pair, strict=True) for pair in zip(self.limits, self.over, strict=True))
        return [[jnp.broadcast_to(x, o.shape) if o.size else x for x, o in row] for row in rows]


def in_batches(xs: Sequence[Array]) -> list[tuple[int, ...]]:
    """Each large leaf on its own, all small ones together: kernels cost, too."""
    large: list[tuple[int, ...]] = [(i,) for i, x in enumerate(xs) if x.size > _SMALL]
    small = tuple(i for i, x in enumerate(xs) if x.size <= _SMALL)
    return [*large, small] if small or not large else large


def _measured_or_given(part: Part, ord: Ord, **named: Any) -> list[Norm]:
    norm = next(iter(named.values()), None)
    if norm is None or not part.scopes.is_global:
        return measure(part.scopes, part.xs, ord)
    _validate.measured(**named)
    return [Norm.of(as_dtype(norm, accumulator(part.xs)))]
