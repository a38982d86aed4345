"""Act on weights: project them onto a set after each step."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from optax_clip import _owners, _validate, _xla
from optax_clip._landing import add_as_apply_updates, as_stored, land, land_between
from optax_clip._mesh import all_reduce, axis_size, place_like, reduction_axes, together
from optax_clip._numerics import accumulator, clamp, widen
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
    wanted = as_constraint(constraint)
    first = wanted.init or (lambda params: ())
    by_tree = wanted.init is not None
    _validate.integer(1, every=every)
    every = owned(every)
    _validate.record(record)
    always = not _validate.is_traced(every) and int(every) == 1

    def init(params: optax.Params) -> Any:
        kept = _owners.kept(first(params), params) if by_tree else ()
        return kept if always else {"set": kept, "count": place_like(jnp.zeros((), jnp.int32), params)}

    def step(updates: optax.Updates, memory: Any, params: Any, **extra: Any) -> tuple[Any, Any, Any]:
        del extra
        _validate.params_given(params, of="project_weights")
        updates, params = _where_they_meet(updates, params)
        each_step = not _counts(memory, every)
        whole = memory if each_step else memory["set"]
        count = 0 if each_step else increment(memory["count"])
        kept = _owners.opened(whole, lambda: first(params)) if by_tree else whole

        def projected() -> tuple[optax.Updates, Any, Any]:
            return redirect(wanted, updates, params, kept, record=record)

        def untouched() -> tuple[optax.Updates, Any, Any]:
            return updates, kept, (jnp.float32(0),) * (2 if record and not wanted.bounds else 0)

        due = True if each_step else count % jnp.maximum(jnp.int32(every), 1) == 0
        new, kept, moves = _xla.cond(due, projected, untouched)
        whole = _owners.closed(whole, kept) if by_tree else kept
        memory = whole if each_step else {"set": whole, "count": count}

        def report() -> Report:
            if wanted.bounds is None:
                return Report({"moves": moves}, {"turns": (True,)})
            share = jnp.where(due, at_bounds(wanted, new, params, kept), 0)
            return Report({"share": (share,)}, {"turns": (True,)})

        return new, memory, report

    fields = "share" if wanted.bounds else "moves", "turns"
    remembers = not always or by_tree
    return transform(
        name, fields, init, step,
        record=record, remembers=remembers, by_tree=by_tree, axis_name=wanted.axis_name,
    )  # fmt: skip


def at_bounds(
    constraint: Constraint, updates: optax.Updates, params: optax.Params, memory: Any
) -> Array:
    """The share of the weights that a step leaves at a bound.

    Counted where `optax.apply_updates` writes them, so that XLA writes them once.
    """
    scopes, us = Scopes.of(updates, "leaf", axis_name=(), beside=params)
    ps = scopes.leaves_of(params, of="project_weights")
    bounds: Any = constraint.bounds
    ends = [_applied(p, u) for p, u in zip(ps, us, strict=True)]
    pairs = zip(ends, bounds(scopes.alone(ps), memory, params), strict=True)
    counts = [_xla.count_outside(end, *_reached(end, *pair), at=True) for end, pair in pairs]
    (number,) = _over_all(constraint.axis_name, ps, counts)
    return number / _entries(constraint.axis_name, ps)


def _reached(end: Array, low: Array, high: Array) -> tuple[Array, Array]:
    """What counts as at a bound: for a complex weight, whose modulus is rounded, near it."""
    near = 1 - 16 * float(jnp.finfo(high.dtype).eps) if jnp.iscomplexobj(end) else 1
    return low, high * near


Landed = tuple[list[Array], Any, Sequence[Array]]


def _counts(memory: Any, every: Any) -> bool:
    """Are steps counted? An `every` that is traced was 1 at init if they are not."""
    counted = isinstance(memory, dict) and "count" in memory
    if not counted and not _validate.is_traced(every) and int(every) > 1:
        raise ValueError(
            f"Expected in update of project_weights with every={every!r} a state that counts steps, got "
            "one that does not, as of every=1."
        )
    return counted


def _where_they_meet(updates: optax.Updates, params: optax.Params) -> tuple[Any, Any]:
    """Both on the devices where `optax.apply_updates` adds them up."""
    scopes, us = Scopes.of(updates, "leaf", axis_name=(), beside=params)
    us, ps = together(us, scopes.leaves_of(params, of="project_weights"))
    return scopes.rebuild(updates, us), scopes.rebuild(params, ps)


class _How(NamedTuple):
    """Static: where to, of which tree, whether to say how far, and the shapes of all weights."""

    constraint: Constraint
    scopes: Scopes
    record: bool
    params: Any


def redirect(
    constraint: Constraint, updates: optax.Updates, params: optax.Params, memory: Any, *, record: bool
) -> tuple[optax.Updates, Any, Sequence[Array]]:
    """The updates that land in the set, its memory, how far the weights move and which share.

    Neither is told of a set that bounds each entry.
    """
    scopes, us = Scopes.of(updates, "leaf", constraint.axis_name, beside=params)
    how = _How(constraint, scopes, record, params)
    way = _into_bounds if constraint.bounds else _rescaled if constraint.factors else _moved
    new, memory, moved = way(how, scopes.leaves_of(params, of="project_weights"), us, memory)
    return scopes.rebuild(updates, new), memory, moved


def _into_bounds(how: _How, ps: list[Array], us: list[Array], memory: Any) -> Landed:
    """Entry by entry, in the pass that makes the updates."""
    bounds: Any = how.constraint.bounds
    pairs = bounds(how.scopes.alone(ps), memory, how.params)
    return [_between(p, u, *pair) for p, u, pair in zip(ps, us, pairs, strict=True)], memory, ()


def _between(p: Array, u: Array, low: Array, high: Array) -> Array:
    if not jnp.iscomplexobj(p):
        return land_between(p, u, low, high)
    u = lax.optimization_barrier(u)
    return land(p, u, clamp(add_as_apply_updates(p, u), low, high), shrinks=True)


def _rescaled(how: _How, ps: list[Array], us: list[Array], memory: Any) -> Landed:
    """By what is measured first: updates are written once, and the norms read them for themselves."""
    factors: Any = how.constraint.factors
    us = list(map(lax.optimization_barrier, us))
    # Symptom: a TPU writes p + u for the landing. XLA computes it once for both: each has its own read.
    trees = [how.scopes.alone(list(map(lax.optimization_barrier, each))) for each in (ps, us)]
    measured = factors(trees[0], memory, how.params, trees[1])
    reached = [add_as_apply_updates(p, u) for p, u in zip(ps, us, strict=True)]
    new = _landed(how, ps, us, measured.of(reached))
    return new, memory, measured.report() if how.record else ()


def _moved(how: _How, ps: list[Array], us: list[Array], memory: Any) -> Landed:
    """By any other set or callable."""
    us = list(map(lax.optimization_barrier, us))
    reached = [add_as_apply_updates(p, u) for p, u in zip(ps, us, strict=True)]
    tree = how.scopes.alone(reached)
    move = how.constraint.move
    params, memory = move(tree, memory, how.params) if move else (how.constraint(tree), memory)
    _, targets = Scopes.of(params, "leaf", axis_name=())
    new = _landed(how, ps, us, targets)
    return new, memory, _moves(how, ps, reached, new) if how.record else ()


def _landed(how: _How, *columns: list[Array]) -> list[Array]:
    return [land(*each, shrinks=how.constraint.shrinks) for each in zip(*columns, strict=True)]


def _moves(how: _How, ps: list[Array], reached: list[Array], new: list[Array]) -> tuple[Array, Array]:
    """From where the weights end up, as `optax.apply_updates` computes it, so that XLA does so once."""
    pairs = [
        _xla.two_sums(*lax.stop_gradient(_gap(s, p, v)))
        for s, p, v in zip(reached, ps, new, strict=True)
    ]
    squares, counts = zip(*pairs, strict=True) if pairs else ((), ())
    axis_name = how.constraint.axis_name
    square, number = _over_all(axis_name, ps, squares, counts)
    return jnp.sqrt(square), number / _entries(axis_name, ps)


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


def _over_all(axis_name: Any, ps: Sequence[Array], *columns: Sequence[Array]) -> list[Array]:
    """Sums of each leaf, column by column, on all devices that hold a part of it."""
    axes = [reduction_axes(axis_name, p) for p in ps]
    parts = all_reduce([x for column in columns for x in column], axes * len(columns), lax.psum)
    halves = [parts[k * len(ps) :][: len(ps)] for k in range(len(columns))]
    return [
        functools.reduce(jnp.add, [x.astype(jnp.float32) for x in half], jnp.float32(0))
        for half in halves
    ]


def _entries(axis_name: Any, ps: Sequence[Array]) -> int:
    return max(sum(p.size * axis_size(reduction_axes(axis_name, p)) for p in ps), 1)
