"""Act on weights: project them onto a set after each step."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from optax_clip import _owners, _validate, _xla
from optax_clip._landing import add_as_apply_updates, land, reach
from optax_clip._mesh import all_reduce, axis_size, place_like, reduction_axes, together
from optax_clip._numerics import accumulator, beyond, widen
from optax_clip._records import Report, increment, transform
from optax_clip._trees import Scopes, is_inexact
from optax_clip._values import owned
from optax_clip.sets.constraint import Constraint, Move, as_constraint

__all__ = ["project", "project_weights", "violation"]

ConstraintLike = Constraint | Callable[[optax.Params], optax.Params]


def project(params: optax.Params, constraint: ConstraintLike) -> optax.Params:
    r"""Project weights onto a set.

    .. math:: P_S(w) = \arg\min_{v \in S} \|v - w\|_2

    Args:
        params: weights of any shape and float dtype; leaves that are not inexact pass through.
        constraint: a set such as `box` or `norm_ball`, or any callable ``params -> params``.

    Returns:
        The weights in the set, each leaf in its own dtype. Weights inside the set by more than the
        rounding error of their norm are returned bit for bit.

    Raises:
        TypeError: if the constraint is neither a set nor callable.

    Examples:
        >>> import jax.numpy as jnp
        >>> from optax_clip import norm_sphere, project
        >>> print(project({"w": jnp.array([3.0, 4.0])}, norm_sphere(10.0)))
        {'w': Array([6., 8.], dtype=float32)}
    """
    return as_constraint(constraint).nearest(params)


def violation(params: optax.Params, constraint: ConstraintLike) -> Array:
    r"""How far weights are outside a set.

    .. math:: \max_s \big(\|w_s\| - r\big)_+

    for norm sets, the largest excess over the scopes; for boxes the largest distance of an entry from
    its interval; for a sphere the largest deviation of a norm that is not 0; for a plain callable the
    largest distance that it moves an entry.

    Args:
        params: weights of any shape and float dtype.
        constraint: a set, or any callable ``params -> params``.

    Returns:
        A float32 scalar, 0 inside.

    Raises:
        TypeError: if the constraint is neither a set nor callable, or no leaf is a float.

    Examples:
        >>> import jax.numpy as jnp
        >>> from optax_clip import norm_ball, violation
        >>> print(violation({"w": jnp.array([3.0, 4.0])}, norm_ball(2.0)))
        3.0
    """
    wanted = as_constraint(constraint)
    _floats_given(params)
    return wanted.excess(params)


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
        once. Metrics: ``distance``, the 2-norm of the move of the weights, ``fraction``, the share of
        entries that it moved, and ``steps``.

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
        held = memory if each_step else memory["set"]
        count = 0 if each_step else increment(memory["count"])
        kept = _owners.opened(held, lambda: first(params)) if by_tree else held

        def projected() -> tuple[optax.Updates, Any, tuple[Array, Array]]:
            return redirect(wanted, updates, params, kept, record=record)

        def untouched() -> tuple[optax.Updates, Any, tuple[Array, Array]]:
            return updates, kept, (jnp.float32(0), jnp.float32(0))

        due = True if each_step else count % jnp.maximum(jnp.int32(every), 1) == 0
        new, kept, moved = _xla.cond(due, projected, untouched)
        held = _owners.closed(held, kept) if by_tree else kept
        memory = held if each_step else {"set": held, "count": count}
        return new, memory, lambda: Report({"moves": moved}, {"turns": (True,)})

    remembers = not always or by_tree
    return transform(
        name, ("moves", "turns"), init, step, record=record, remembers=remembers, by_tree=by_tree
    )


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
    pairs = list(map(together, us, scopes.leaves_of(params, of="project_weights")))
    us, ps = ([pair[i] for pair in pairs] for i in (0, 1))
    return scopes.rebuild(updates, us), scopes.rebuild(params, ps)


class _How(NamedTuple):
    """Static: where to, of which tree, whether to say how far, and the shapes of all weights."""

    constraint: Constraint
    scopes: Scopes
    record: bool
    params: Any

    def nearest(self, reached: list[Array], memory: Any) -> Move:
        tree = self.scopes.alone(reached)
        if self.constraint.move is None:
            return Move(self.constraint(tree), memory)
        return self.constraint.move(tree, memory, self.params)


Landed = tuple[list[Array], Any, tuple[Array, Array]]


def redirect(
    constraint: Constraint, updates: optax.Updates, params: optax.Params, memory: Any, *, record: bool
) -> tuple[optax.Updates, Any, tuple[Array, Array]]:
    """The updates that land in the set, its memory, how far the weights move and which share."""
    scopes, us = Scopes.of(updates, "leaf", constraint.axis_name, beside=params)
    if constraint.ends is None:
        us = _xla.written_once(us)
    how = _How(constraint, scopes, record, params)
    way = _landed_and_measured if record and constraint.ends else _landed
    new, memory, moved = way(how, scopes.leaves_of(params, of="project_weights"), us, memory)
    return scopes.rebuild(updates, new), memory, moved


def _landed(how: _How, ps: list[Array], us: list[Array], memory: Any) -> Landed:
    """Where to, and the updates that land there."""
    reached = [reach(p, u) for p, u in zip(ps, us, strict=True)]
    move = how.nearest(reached, memory)
    _, targets = Scopes.of(move.params, "leaf", axis_name=())
    each = zip(ps, us, reached, targets, strict=True)
    new = [land(*those, shrinks=how.constraint.shrinks) for those in each]
    nothing = jnp.float32(0), jnp.float32(0)
    moved = move.report or functools.partial(_moves, how, ps, reached, new)
    return new, move.memory, moved() if how.record else nothing


def _landed_and_measured(how: _How, ps: list[Array], us: list[Array], memory: Any) -> Landed:
    ways = (functools.partial(way, how) for way in (_measured_then_landed, _landed))
    cpu, default = ways
    return _xla.by_platform(ps, us, memory, cpu=cpu, default=default)


def _measured_then_landed(how: _How, ps: list[Array], us: list[Array], memory: Any) -> Landed:
    """On CPU: sums that read weights and updates alone, before the weights are overwritten."""
    bounds: Any = how.constraint.ends
    ends, numbers = bounds(how.scopes.alone(ps), memory), [_xla.constants(accumulator([p])) for p in ps]
    rows = list(zip(*lax.stop_gradient((ps, us)), ends, strict=True))
    own, again = (
        [_xla.apart(p, u, *each, *own) for (p, u, each), own in zip(rows, numbers, strict=True)]
        for _ in range(2)
    )
    gaps, marks = ([_outside(*each[:6]) for each in parts] for parts in (own, again))
    squares = [jnp.sum(gap * gap) for gap in gaps]
    counts = [jnp.sum(_xla.indicator(gap, *each[6:])) for gap, each in zip(marks, again, strict=True)]
    whole = functools.reduce(jnp.logical_and, (x == x for x in counts), jnp.array(True))

    def exactly() -> list[Array]:
        return [jnp.sum(~(_outside(p, u, *each) <= 0), dtype=accumulator([p])) for p, u, each in rows]

    counts = _xla.cond(_xla.for_all(whole), lambda: counts, exactly)
    each = map(lax.optimization_barrier, zip(us, squares, counts, strict=True))
    us, squares, counts = map(list, zip(*each, strict=True)) if us else ([], [], [])
    new, memory, _ = _landed(how._replace(record=False), ps, us, memory)
    return new, memory, _over_all(how, ps, squares, counts)


def _outside(p: Array, u: Array, *ends: Array) -> Array:
    return jnp.maximum(beyond(add_as_apply_updates(p, u), *ends), 0)


def _moves(how: _How, ps: list[Array], reached: list[Array], new: list[Array]) -> tuple[Array, Array]:
    """From where the weights end up, as `optax.apply_updates` computes it, so that XLA does so once."""
    pairs = [
        _xla.two_sums(*lax.stop_gradient(_gap(s, p, v)))
        for s, p, v in zip(reached, ps, new, strict=True)
    ]
    squares, counts = zip(*pairs, strict=True) if pairs else ((), ())
    return _over_all(how, ps, squares, counts)


def _gap(reached: Array, p: Array, new: Array) -> tuple[Array, Array]:
    """The square of how far an entry was moved, and whether it was."""
    end: Any = optax.apply_updates(p, new)
    wide = accumulator([p])
    s, end = widen(reached, wide), widen(end, wide)
    if p.dtype == jnp.bfloat16:
        end = lax.reduce_precision(end, 8, 7)  # XLA may keep more
    gap = jnp.abs(s - end) if jnp.iscomplexobj(s) else s - end
    return gap * gap, (s != end).astype(wide)


def _over_all(
    how: _How, ps: Sequence[Array], squares: Sequence[Array], counts: Sequence[Array]
) -> tuple[Array, Array]:
    """Distance and fraction from the sums of each leaf, on all devices that hold a part of it."""
    axes = [reduction_axes(how.constraint.axis_name, p) for p in ps]
    size = max(sum(p.size * axis_size(names) for p, names in zip(ps, axes, strict=True)), 1)
    sums = all_reduce([*squares, *counts], [*axes, *axes], lax.psum)
    parts = [x.astype(jnp.float32) for x in sums]
    square, count = (
        functools.reduce(jnp.add, half, jnp.float32(0)) for half in (parts[: len(ps)], parts[len(ps) :])
    )
    return jnp.sqrt(square), count / size
