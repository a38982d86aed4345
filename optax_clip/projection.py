"""Act on weights: project them onto a set after each step."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from optax_clip import _owners, _validate, _xla
from optax_clip._geometry.intervals import Bounds, clamp
from optax_clip._landing import add_as_apply_updates, as_stored, land, land_between
from optax_clip._mesh import entries, place_like, pooled, reduction_axes, share, together
from optax_clip._numerics import accumulator, widen
from optax_clip._records import Report, increment, transform
from optax_clip._settings import is_formula
from optax_clip._trees import Scopes, is_inexact
from optax_clip._values import owned
from optax_clip.sets.constraint import Constraint, as_constraint

__all__ = ["project", "project_weights", "violation"]

ConstraintLike = Constraint | Callable[[optax.Params], optax.Params]
Mask = Any  # a tree of bools that is a prefix of the weights, or a callable that makes one of them


def project(
    params: optax.Params, constraint: ConstraintLike, *, mask: Mask | None = None
) -> optax.Params:
    r"""Project weights onto a set.

    .. math:: P_S(w) = \arg\min_{v \in S} \|v - w\|_2

    Args:
        params: weights of any shape and float dtype; leaves that are not inexact pass through.
        constraint: a set such as `box` or `norm_ball`, or any callable ``params -> params``.
        mask: which weights, as `optax.masked` takes it: a tree of bools that is a prefix of the weights,
            or a callable ``params -> mask`` such as `where` makes; None for all. The others are returned
            as they are, and share no norm.

    Returns:
        The weights in the set, each leaf in its own dtype. Weights inside the set by more than the
        rounding error of their norm are returned bit for bit.

    Raises:
        TypeError: if the constraint is neither a set nor callable, or the mask not of bools.

    Examples:
        >>> import jax.numpy as jnp
        >>> from optax_clip import norm_sphere, project
        >>> print(project({"w": jnp.array([3.0, 4.0])}, norm_sphere(10.0)))
        {'w': Array([6., 8.], dtype=float32)}

        In a loop that has no `project_weights`, after the step, and only the kernels:

        >>> from optax_clip import where
        >>> kernels = where(lambda path, leaf: path.endswith("kernel"))
        >>> params = {"bias": jnp.array([3.0]), "kernel": jnp.array([3.0, 4.0])}
        >>> print(project(params, norm_sphere(10.0), mask=kernels))
        {'bias': Array([3.], dtype=float32), 'kernel': Array([6., 8.], dtype=float32)}
    """
    wanted = as_constraint(constraint)
    if mask is None:
        return wanted.nearest(params)
    flags, part = _part(params, mask)
    whole: optax.Params = jax.tree.map(
        lambda flag, new, old: new if flag else old, flags, wanted.nearest(part), params
    )
    return whole


def _part(params: optax.Params, mask: Mask) -> tuple[Any, optax.Params]:
    """The mask as a tree of bools, and the weights that it chooses, as `optax.masked` shows them."""
    flags = mask(params) if is_formula(mask) else mask
    for flag in jax.tree.leaves(flags):
        if not isinstance(flag, bool) and getattr(flag, "dtype", None) != jnp.bool_:
            raise TypeError(
                f"Expected mask to be a tree of bools or a callable params -> mask, got mask={mask!r}."
            )
    return flags, jax.tree.map(lambda flag, x: x if flag else optax.MaskedNode(), flags, params)


def violation(params: optax.Params, constraint: ConstraintLike, *, mask: Mask | None = None) -> Array:
    r"""How far weights are outside a set.

    .. math:: \max_s \big(\|w_s\| - r\big)_+

    for norm sets, the largest excess over the scopes; for boxes the largest distance of an entry from
    its interval; for a sphere the largest deviation of a norm that is not 0; for a plain callable the
    largest distance that it moves an entry.

    Args:
        params: weights of any shape and float dtype.
        constraint: a set, or any callable ``params -> params``.
        mask: which weights, as in `project`.

    Returns:
        A float32 scalar, 0 inside.

    Raises:
        TypeError: if the constraint is neither a set nor callable, no leaf is a float, or the mask is
            not of bools.

    Examples:
        >>> import jax.numpy as jnp
        >>> from optax_clip import norm_ball, violation
        >>> print(violation({"w": jnp.array([3.0, 4.0])}, norm_ball(2.0)))
        3.0
    """
    wanted = as_constraint(constraint)
    part = params if mask is None else _part(params, mask)[1]
    _floats_given(part)
    return wanted.excess(jax.tree.map(_as_stored, part))


def _as_stored(x: Any) -> Any:
    """Right after an update XLA hands on the sum as it was before it was rounded to 16 bits."""
    if not is_inexact(x) or jnp.finfo(jnp.asarray(x).dtype).bits != 16:
        return x
    x = jnp.asarray(x)
    return as_stored(x.astype(jnp.float32), x.dtype).astype(x.dtype)


def _floats_given(params: Any) -> None:
    """Integers alone pass through every set, which would read as a violation of 0."""
    leaves = jax.tree.leaves(params)
    if leaves and not any(map(is_inexact, leaves)):
        raise TypeError(
            f"Expected params with a float leaf, got params of {jnp.asarray(leaves[0]).dtype} alone."
        )


def project_weights(
    constraint: ConstraintLike, *, every: int = 1, name: str = "project", record: bool = True
) -> optax.GradientTransformationExtraArgs:
    r"""Keep the weights in a set: turn an update into one that lands inside.

    It must come last in the chain, after the learning rate and weight decay, since what follows it would
    move the weights out again. Inside `optax.MultiSteps` it belongs to the inner optimizer.

    .. math:: u \leftarrow P_S(w + u) - w

    Args:
        constraint: a set such as `box` or `norm_ball`, or any callable ``params -> params``. Under
            `optax.inject_hyperparams` name it in ``static_args``.
        every: project only each ``every``-th step, counted from 1.
        name: prefix of the metrics.
        record: False to record nothing; the state is then `optax.EmptyState` unless the set remembers
            or ``every`` counts.

    Returns:
        A transform whose update needs ``params``. After `optax.apply_updates` has rounded, the weights
        are in the set:

        ======================= ========================================== ===========
        set                     guarantee                                  after steps
        ======================= ========================================== ===========
        box, init_box           exact                                      1
        norm_ball               norm at most the radius in float64         1
        sphere, simplex,        within 4 eps of the dtype of the weights   1 from near,
        shell, spectral_ball                                               2 from far
        ======================= ========================================== ===========

        A weight that was going to land inside keeps its update bit for bit, and updates keep their
        dtype. Updates in a narrower dtype than the weights cannot reach every set from far outside at
        once.

        Metrics: ``fraction`` and ``steps``. For sets that bound each entry, ``fraction`` is the share
        of weights that are at a bound after the step (an infinite one is none; NaN weights may make it
        NaN), for others the share that the projection moved; these report ``distance`` too, the 2-norm
        of the move. On steps that do not project both are 0.

    Raises:
        TypeError: if the constraint is neither a set nor callable, or ``every`` not an integer.
        ValueError: if ``every < 1``, or if the update is called without ``params``.

    Examples:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from optax_clip import box, project_weights
        >>> params = jnp.array([0.5, -0.75])
        >>> gradient = jnp.array([-4.0, 1.0])
        >>> def step(tx):
        ...     updates, _ = tx.update(gradient, tx.init(params), params)
        ...     return optax.apply_updates(params, updates)
        >>> print(step(optax.chain(optax.sgd(0.25), project_weights(box(-1.0, 1.0)))))
        [ 1. -1.]

        First in the chain it bounds ``params + gradient``, which is not where the weights go:

        >>> print(step(optax.chain(project_weights(box(-1.0, 1.0)), optax.sgd(4.0))))
        [ 6.5  -4.75]
    """
    projection = _Projection(as_constraint(constraint), owned(every), record)
    projection.check()
    wanted, by_tree = projection.wanted, projection.wanted.init is not None
    return transform(
        name, ("share" if wanted.bounds else "moves", "turns"), projection.init, projection.step,
        record=record, remembers=by_tree or projection.counts, by_tree=by_tree,
        axis_name=wanted.axis_name,
    )  # fmt: skip


class _Projection(NamedTuple):
    """What `project_weights` was called with. Static."""

    wanted: Constraint
    every: Any
    record: bool

    def check(self) -> None:
        _validate.integer(1, every=self.every)
        _validate.record(self.record)

    @property
    def counts(self) -> bool:
        """Are steps counted? An `every` that is traced is counted for, too."""
        return _validate.is_traced(self.every) or int(self.every) != 1

    def init(self, params: optax.Params) -> Any:
        kept = _owners.Memory(self.wanted.init).init(params)
        if not self.counts:
            return kept
        return {"set": kept, "count": place_like(jnp.zeros((), jnp.int32), params)}

    def step(
        self, updates: optax.Updates, memory: Any, params: Any, **extra: Any
    ) -> tuple[optax.Updates, Any, Callable[[], Report]]:
        del extra
        _validate.params_given(params, of="project_weights")
        scopes, us = Scopes.of(updates, "leaf", self.wanted.axis_name, beside=params)
        us, ps = together(us, scopes.leaves_of(params, of="project_weights"))
        counted = _is_counted(memory, self.every)
        held, count = (memory["set"], increment(memory["count"])) if counted else (memory, 0)
        due = count % jnp.maximum(jnp.int32(self.every), 1) == 0 if counted else True
        remembered = _owners.Memory(self.wanted.init)
        way = _Way(self.wanted, scopes, params, remembered.opened(held, params), self.record)
        new, kept, moves = _xla.cond(due, lambda: way.landed(ps, us), lambda: way.stayed(us))
        held = remembered.closed(held, kept)
        memory = {"set": held, "count": count} if counted else held
        last = way._replace(memory=kept)
        return scopes.rebuild(updates, new), memory, lambda: last.report(ps, new, moves, due)


def _is_counted(memory: Any, every: Any) -> bool:
    """Are steps counted? An `every` that is traced was 1 at init if they are not."""
    counted = isinstance(memory, dict) and "count" in memory
    if not counted and not _validate.is_traced(every) and int(every) > 1:
        raise ValueError(
            f"Expected in update of project_weights with every={every!r} a state that counts steps, got "
            "one that does not, as of every=1."
        )
    return counted


Landed = tuple[
    list[Array], Any, Sequence[Array]
]  # updates, what the set remembers, how far and how many


class _Way(NamedTuple):
    """Where weights go to: a set, of which tree, and what it remembers; ``beside`` has all shapes."""

    to: Constraint
    scopes: Scopes
    beside: Any
    memory: Any
    record: bool

    def landed(self, ps: list[Array], us: list[Array]) -> Landed:
        """Reach, nearest, land: by bounds of each entry, by factors of each scope, by any projection."""
        way = self._between if self.to.bounds else self._rescaled if self.to.factors else self._moved
        return way(ps, us)

    def stayed(self, us: list[Array]) -> Landed:
        """A step between two projections."""
        return us, self.memory, (jnp.float32(0),) * (2 if self.record and not self.to.bounds else 0)

    def report(self, ps: list[Array], new: list[Array], moves: Sequence[Array], due: Any) -> Report:
        """Of bounds which share of the weights is at one, else how far a step was changed."""
        if self.to.bounds:
            return Report({"share": (jnp.where(due, self._share(ps, new), 0),)}, {"turns": (True,)})
        return Report({"moves": moves}, {"turns": (True,)})

    def _bounds(self, ps: list[Array]) -> list[Bounds]:
        bounds: Any = self.to.bounds
        pairs: list[Bounds] = bounds(self.scopes.alone(ps), self.memory, self.beside)
        return pairs

    def _between(self, ps: list[Array], us: list[Array]) -> Landed:
        """Entry by entry, in the pass that makes the updates."""
        rows = zip(ps, us, self._bounds(ps), strict=True)
        return [_landed_between(p, u, *pair) for p, u, pair in rows], self.memory, ()

    def _rescaled(self, ps: list[Array], us: list[Array]) -> Landed:
        """By what is measured first: updates are written once, and norms read them for themselves."""
        factors: Any = self.to.factors
        us = _xla.each_once(us)
        # Each reads for itself: XLA would compute p + u once for both, which a TPU then writes.
        trees = [self.scopes.alone(_xla.each_once(each)) for each in (ps, us)]
        apply, rows, report = factors(trees[0], self.memory, self.beside, trees[1])
        targets = [apply(x, *row) for x, row in zip(_reached(ps, us), rows, strict=True)]
        return self._land(ps, us, targets), self.memory, report() if self.record else ()

    def _moved(self, ps: list[Array], us: list[Array]) -> Landed:
        """By any other set or callable."""
        us = _xla.each_once(us)
        reached = _reached(ps, us)
        tree, move = self.scopes.alone(reached), self.to.move
        params, memory = move(tree, self.memory, self.beside) if move else (self.to(tree), self.memory)
        _, targets = Scopes.of(params, "leaf", axis_name=())
        new = self._land(ps, us, targets)
        return new, memory, self._moves(ps, reached, new) if self.record else ()

    def _land(self, *columns: list[Array]) -> list[Array]:
        return [land(*each, shrinks=self.to.shrinks) for each in zip(*columns, strict=True)]

    def _axes(self, ps: list[Array]) -> list[Any]:
        return [reduction_axes(self.to.axis_name, p) for p in ps]

    def _moves(self, ps: list[Array], reached: list[Array], new: list[Array]) -> tuple[Array, Array]:
        """From where the weights end up as `optax.apply_updates` computes it, so XLA does so once."""
        rows = zip(reached, ps, new, strict=True)
        pairs = [_xla.two_sums(*lax.stop_gradient(_gap(*row))) for row in rows]
        squares, counts = zip(*pairs, strict=True) if pairs else ((), ())
        axes = self._axes(ps)
        square, number = pooled(axes, squares, counts)
        return jnp.sqrt(square), number / entries(axes, [p.size for p in ps])

    def _share(self, ps: list[Array], new: list[Array]) -> Array:
        """The share of the weights at a bound.

        Counted where `optax.apply_updates` writes them, so that XLA writes them once.
        """
        rows = zip(ps, new, self._bounds(ps), strict=True)
        counts = [_at_bound(_applied(p, u), *pair) for p, u, pair in rows]
        return share(self._axes(ps), counts, [p.size for p in ps])


def _reached(ps: list[Array], us: list[Array]) -> list[Array]:
    return [add_as_apply_updates(p, u) for p, u in zip(ps, us, strict=True)]


def _landed_between(p: Array, u: Array, low: Array, high: Array) -> Array:
    if not jnp.iscomplexobj(p):
        return land_between(p, u, low, high)
    u = _xla.once(u)
    return land(p, u, clamp(add_as_apply_updates(p, u), low, high), shrinks=True)


def _at_bound(end: Array, low: Array, high: Array) -> Array:
    """How many entries are at a bound; near it if they are complex, as a modulus is rounded."""
    near = 1 - 16 * float(jnp.finfo(high.dtype).eps) if jnp.iscomplexobj(end) else 1
    return _xla.count_outside(end, low, high * near, at=True)


def _gap(reached: Array, p: Array, new: Array) -> tuple[Array, Array]:
    """The square of how far an entry was moved, and whether it was."""
    wide = accumulator([p])
    s, end = widen(reached, wide), widen(_applied(p, new), wide)
    if p.dtype == jnp.bfloat16:
        end = lax.reduce_precision(end, 8, 7)  # XLA may keep more
    gap = jnp.abs(s - end) if jnp.iscomplexobj(s) else s - end
    return gap * gap, (s != end).astype(wide)


def _applied(p: Array, u: Array) -> Array:
    """As Optax writes it, also where JAX is told to refuse sums of two dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        end: Any = optax.apply_updates(p, u)
    return jnp.asarray(end)
