"""Act on weights: project them onto a set after each step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from optax_clip import _validate
from optax_clip._numerics import (
    accumulator,
    applied,
    cond,
    land,
    positive,
    widen,
)
from optax_clip._records import increment, share
from optax_clip._trees import Layout, path_string, place_like
from optax_clip.norms import measure
from optax_clip.sets.constraint import Constraint, Memory, as_constraint, remembering

__all__ = ["mask_outward", "project", "project_weights", "violation", "where"]

ConstraintLike = Constraint | Callable[[optax.Params], optax.Params]


class ProjectState(NamedTuple):
    """What a projection did (read it with `metrics`), and what its set remembers."""

    recorded: dict[str, Array]
    memory: Any


def project(params: optax.Params, constraint: ConstraintLike) -> optax.Params:
    r"""Project weights onto a set.

    .. math:: P_S(w) = \arg\min_{v \in S} \|v - w\|_2

    Args:
        params: weights of any shape and float dtype; leaves that are not inexact pass through.
        constraint: a set such as `box` or `norm_ball`, or any callable ``params -> params``.

    Returns:
        The weights in the set, each leaf in its own dtype. What is inside, by more than its norm can
        tell, comes back bit for bit.

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
        TypeError: if the constraint is neither a set nor callable.

    Examples:
        >>> import jax.numpy as jnp
        >>> from optax_clip import norm_ball, violation
        >>> print(violation({"w": jnp.array([3.0, 4.0])}, norm_ball(2.0)))
        3.0
    """
    return as_constraint(constraint).excess(params)


def project_weights(
    constraint: ConstraintLike, *, every: int = 1, name: str = "project"
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

    Returns:
        A transform whose update needs ``params``. After `optax.apply_updates` has rounded, the weights
        are in the set: exactly for boxes, at most the radius in float64 for norm balls, within 4 eps
        for the others, from far outside after the second step. A weight that was going to land inside
        keeps its update bit for bit, and updates keep their dtype. Updates in a narrower dtype than the
        weights cannot reach every set from far outside at once. Metrics: ``distance``, the 2-norm of
        what it changed in the updates, which is how far it moved the weights but for their rounding,
        ``fraction``, the share of entries that it changed, and ``steps``.

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
    memory = remembering(wanted)
    _validate.integer(1, every=every)
    _validate.label(name=name)

    def init(params: optax.Params) -> ProjectState:
        gauges = {f"{name}/{key}": jnp.zeros((), jnp.float32) for key in ("distance", "fraction")}
        recorded = gauges | {f"{name}/steps": jnp.zeros((), jnp.int32)}
        return ProjectState(place_like(recorded, params), memory.init(params))

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, ProjectState]:
        del extra
        if params is None:
            raise ValueError("Expected params in update of project_weights, got params=None.")
        steps = increment(state.recorded[f"{name}/steps"])

        def projected() -> tuple[_Projected, Any]:
            return _project_updates(wanted, memory, state.memory, updates, params)

        def untouched() -> tuple[_Projected, Any]:
            return _Projected(updates, jnp.float32(0), jnp.float32(0)), state.memory

        always = not _validate.is_traced(every) and int(every) == 1
        due = True if always else steps % jnp.maximum(jnp.int32(every), 1) == 0
        done, kept = cond(due, projected, untouched)
        recorded = {
            f"{name}/distance": done.distance,
            f"{name}/fraction": done.fraction,
            f"{name}/steps": steps,
        }
        return done.updates, ProjectState(place_like(recorded, state.recorded), kept)

    return optax.GradientTransformationExtraArgs(init, update)


def mask_outward(
    constraint: Constraint, *, name: str = "outward"
) -> optax.GradientTransformationExtraArgs:
    r"""Take out the gradient of weights that sit at a bound and would be pushed further out.

    First in a chain that ends with `project_weights` on the same box. Without it momentum winds up while
    a weight is held at its bound, and holds it there after the gradient has turned.

    .. math:: g_i \leftarrow 0 \;\text{ where } P(w_i - \infty\, \mathrm{sign}(g_i)) = w_i

    Args:
        constraint: `box`, `non_negative`, or `norm_ball` with ``ord=math.inf``. Under
            `optax.inject_hyperparams` name it in ``static_args``.
        name: prefix of the metrics.

    Returns:
        A transform whose update needs ``params``. A weight within 4 eps of its bound counts as at it.
        All other entries keep their bits. Metrics: ``fraction``, the share of entries taken out, and
        ``steps``.

    Raises:
        TypeError: if the constraint is not a set that bounds each entry on its own.
        ValueError: if the update is called without ``params``.

    Examples:
        >>> import jax.numpy as jnp
        >>> from optax_clip import box, mask_outward
        >>> tx = mask_outward(box(-1.0, 1.0))
        >>> params = jnp.array([1.0, 1.0, 0.5])
        >>> gradient = jnp.array([-2.0, 2.0, -2.0])
        >>> print(tx.update(gradient, tx.init(params), params)[0])
        [ 0.  2. -2.]

        The first would grow beyond 1; the second comes back from its bound.
    """
    if not isinstance(constraint, Constraint) or not constraint.entrywise:
        raise TypeError(f"Expected constraint to be a box, got constraint={constraint!r}.")
    _validate.label(name=name)

    def init(params: optax.Params) -> ProjectState:
        recorded = {
            f"{name}/fraction": jnp.zeros((), jnp.float32),
            f"{name}/steps": jnp.zeros((), jnp.int32),
        }
        return ProjectState(place_like(recorded, params), ())

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, ProjectState]:
        del extra
        if params is None:
            raise ValueError("Expected params in update of mask_outward, got params=None.")
        layout = Layout.of(updates, "leaf")
        weights = layout.beside(params).measured
        ends = [
            jnp.where(g == 0, p, -jnp.sign(g).astype(p.dtype) * jnp.inf)
            for g, p in zip(layout.measured, weights, strict=True)
        ]
        bounds = Layout.of(constraint(layout.rebuild(ends, other=lambda _: None)), "leaf").measured
        held = [
            (g != 0) & (jnp.abs(b - p) <= 4 * float(jnp.finfo(p.dtype).eps) * jnp.abs(p))
            for g, p, b in zip(layout.measured, weights, bounds, strict=True)
        ]
        kept = [jnp.where(h, 0, g) for h, g in zip(held, layout.measured, strict=True)]
        recorded = {
            f"{name}/fraction": share(held, constraint.axis_name),
            f"{name}/steps": increment(state.recorded[f"{name}/steps"]),
        }
        return layout.rebuild(kept), ProjectState(recorded, ())

    return optax.GradientTransformationExtraArgs(init, update)


def where(predicate: Callable[[str, Any], bool]) -> Callable[[Any], Any]:
    """Make a mask for `optax.masked` from the paths of the leaves.

    Args:
        predicate: ``(path, leaf) -> bool``. The path joins keys by "/", such as ``"dense/kernel"`` or
            ``"params/dense/kernel"``: the same for linen and nnx, at init and at update.

    Returns:
        A callable ``tree -> tree of bool``.

    Raises:
        TypeError: if the predicate is not callable.

    Examples:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from optax_clip import norm_ball, project_weights, where
        >>> kernels = where(lambda path, leaf: path.endswith("kernel"))
        >>> print(kernels({"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}))
        {'dense': {'bias': False, 'kernel': True}}
        >>> tx = optax.masked(project_weights(norm_ball(1.0)), kernels)
    """
    if not callable(predicate):
        raise TypeError(f"Expected predicate to be callable, got predicate={predicate!r}.")

    def mask(tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: bool(predicate(path_string(path), leaf)), tree
        )

    return mask


class _Projected(NamedTuple):
    """The updates that land in the set, how far that moves the weights, and the share it concerns."""

    updates: optax.Updates
    distance: Array
    fraction: Array


def _project_updates(
    constraint: Constraint, memory: Memory, kept: Any, updates: optax.Updates, params: optax.Params
) -> tuple[_Projected, Any]:
    layout = Layout.of(updates, "leaf")
    weights = layout.beside(params).measured
    # XLA contracts products with the sums below, which `apply_updates` would not repeat.
    wanted = [lax.optimization_barrier(u) for u in layout.measured]
    reached = [applied(p, u) for p, u in zip(weights, wanted, strict=True)]
    nearest, new = memory.nearest(layout.rebuild(reached, other=lambda _: None), kept)
    targets = Layout.of(nearest, "leaf").measured
    landed = [
        land(p, u, s, t, shrinks=constraint.shrinks)
        for p, u, s, t in zip(weights, wanted, reached, targets, strict=True)
    ]
    pairs = list(zip(wanted, landed, strict=True))
    if memory.marks is None:
        moved = [positive(_gap, *pair) for pair in pairs]
        fraction = share(moved, constraint.axis_name, lambda: [u != v for u, v in pairs])
    else:
        fraction = share(memory.marks(nearest, new), constraint.axis_name)
    whole = Layout.of(landed, "global", constraint.axis_name)
    distance = measure(whole, ord=None, parts=pairs, read=_gap)[0].value.astype(jnp.float32)
    return _Projected(layout.rebuild(landed), distance, fraction), new


def _gap(x: Array, y: Array) -> Array:
    dtype = accumulator([x, y])
    return jnp.abs(widen(x, dtype) - widen(y, dtype))
