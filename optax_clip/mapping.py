"""Constraints that arrive: gradients that know of the set, before an optimizer bends them."""

import functools
from typing import Any

import jax.numpy as jnp
import optax

from optax_clip import _owners, _validate
from optax_clip._mesh import together
from optax_clip._numerics import as_dtype
from optax_clip._records import Report, transform
from optax_clip._trees import Scopes
from optax_clip.projection import ConstraintLike, project_weights
from optax_clip.sets.constraint import as_constraint
from optax_clip.sets.mappings import by_difference, by_entry

__all__ = ["constrained", "gradient_mapping"]


def gradient_mapping(
    constraint: ConstraintLike, *, reach: float = 0.01, name: str = "mapping", record: bool = True
) -> optax.GradientTransformationExtraArgs:
    r"""The gradient without what a set would take back, so that an optimizer arrives at its best point.

    First in a chain that ends with `project_weights` on the same set; `constrained` is both in one call.
    A projection behind an optimizer that is not plain descent (Adam, Lion, RMSProp, Adafactor, Muon)
    stops where the optimizer's step is normal to the set, which is not where the gradient is. In boxes
    that is the same for all of these but Muon. The gradient mapping is 0 exactly at the constrained
    stationary points: what arrives there stays, and no momentum winds up against a wall.

    .. math:: g \leftarrow \frac{w - P_S(w - a g)}{a}, \qquad a_s \|g_s\| = \rho \|w_s\|
        \quad \text{for each scope } s

    Args:
        constraint: a set such as `box` or `norm_ball`, or any callable ``params -> params``. Under
            `optax.inject_hyperparams` name it in ``static_args``.
        reach: how far ahead the set is felt, ρ > 0, as a share of the weights.
        name: prefix of the metrics.
        record: False to record nothing; the state is then `optax.EmptyState` unless the set remembers.

    Returns:
        A transform whose update needs ``params``. The gradient is one that the optimizer will
        *subtract*; where it adds (a negative rate, ``flip_sign=False``) put ``optax.scale(-1)`` before
        it.

        The scopes are those of the set: each leaf for a spectral ball, the whole tree for a callable,
        and in a box each entry, so that nothing is summed. Weights of 0 count as of norm 1; in a box
        they look no further than themselves. Where ``w - a g`` is inside, the gradient comes back bit
        for bit, whatever its size. At the wall nothing large is subtracted: it is ``f g + (1 - f) w /
        a`` for norm sets of order 2, with f from two norms and a cosine, and ``clip(g, (w - u) / a,
        (w - l) / a)`` for boxes. The work is in float32 or wider, and updates keep their dtype. The
        gradient of a scope that is not finite passes as it is. Metrics: ``fraction``, the share of
        entries whose gradient was changed, and ``steps``.

    Raises:
        TypeError: if the constraint is neither a set nor callable, or ``reach`` not a number.
        ValueError: if ``reach`` is not above 0 and finite, or the update is called without ``params``.

    Examples:
        >>> import jax.numpy as jnp
        >>> from optax_clip import gradient_mapping, norm_ball
        >>> tx = gradient_mapping(norm_ball(1.0))
        >>> params = jnp.array([1.0, 0.0])
        >>> state = tx.init(params)
        >>> print(tx.update(jnp.array([1.0, 0.5]), state, params)[0])
        [1.  0.5]

        It points inside. What pushes out is taken away, and what slides along the ball stays:

        >>> print(jnp.round(tx.update(jnp.array([-1.0, 0.5]), state, params)[0], 2))
        [0.   0.5]

    References:
        Nesterov, 2013, https://doi.org/10.1007/s10107-012-0629-5; Beck, 2017,
        https://doi.org/10.1137/1.9781611974997
    """
    wanted = as_constraint(constraint)
    _validate.positive(reach=reach)
    _validate.record(record)
    remembered = _owners.Memory(wanted.init)
    mapped = wanted.mapped or functools.partial(by_entry if wanted.bounds else by_difference, wanted)

    def step(updates: optax.Updates, memory: Any, params: Any, **extra: Any) -> tuple[Any, Any, Any]:
        del extra
        _validate.params_given(params, of="gradient_mapping")
        scopes, gs = Scopes.of(updates, "leaf", axis_name=(), beside=params)
        gs, ps = together(gs, scopes.leaves_of(params, of="gradient_mapping"))
        ahead = jnp.maximum(as_dtype(reach, jnp.float32), jnp.finfo(jnp.float32).tiny)
        kept = remembered.opened(memory, params)
        new, kept, share = mapped(scopes.alone(ps), scopes.alone(gs), kept, params, ahead)
        memory = remembered.closed(memory, kept)

        def report() -> Report:
            return Report({"share": (share(),)}, {"turns": (True,)})

        return scopes.rebuild(updates, new), memory, report

    by_tree = wanted.init is not None
    return transform(
        name, ("share", "turns"), remembered.init, step,
        record=record, remembers=by_tree, by_tree=by_tree, axis_name=wanted.axis_name,
    )  # fmt: skip


def constrained(
    inner: optax.GradientTransformation,
    constraint: ConstraintLike,
    *,
    reach: float = 0.01,
    every: int = 1,
    name: str = "project",
    record: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""An optimizer that arrives at the minimum over a set: gradient mapping, optimizer, projection.

    ``chain(gradient_mapping(constraint), inner, project_weights(constraint))`` in one call, which cannot
    be put in the wrong order.

    .. math:: w \leftarrow P_S\big(w + \mathrm{inner}(G(w))\big), \qquad
        G(w) = \frac{w - P_S(w - a g)}{a}

    Args:
        inner: the optimizer, learning rate and clips included, that subtracts its gradients: any
            transform or chain. It is given extra arguments if it takes some. Weight decay in it is not
            seen by the mapping; with ``add_decayed_weights`` before this transform, in a chain, it is
            part of what is minimised.
        constraint: a set such as `norm_ball`, or any callable ``params -> params``. Under
            `optax.inject_hyperparams` name it in ``static_args``.
        reach: how far ahead the set is felt, as in `gradient_mapping`.
        every: project only each ``every``-th step, counted from 1.
        name: prefix of the metrics of the projection. Those of the mapping are ``mapping``, with another
            name than the default ``{name}_mapping``.
        record: False to record nothing.

    Returns:
        A transform whose update needs ``params``. After `optax.apply_updates` the weights are in the set
        as after `project_weights`.

    Raises:
        TypeError: if the constraint is neither a set nor callable, or an argument of another type.
        ValueError: if ``reach`` is not above 0 and finite, ``every < 1``, or the update is called
            without ``params``.

    Examples:
        The minimum of a quadratic function over the unit ball, beside where a projection alone leads:

        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from optax_clip import constrained, norm_ball, project_weights
        >>> scales, ball = jnp.array([1.0, 4.0]), norm_ball(1.0)
        >>> def solve(tx):
        ...     def step(carry, _):
        ...         params, state = carry
        ...         gradient = scales * (params - jnp.array([3.0, 1.0]))
        ...         updates, state = tx.update(gradient, state, params)
        ...         return (optax.apply_updates(params, updates), state), None
        ...     start = jnp.zeros(2)
        ...     (params, _), _ = jax.lax.scan(step, (start, tx.init(start)), None, 2000)
        ...     return [f"{x:.3f}" for x in params]
        >>> adam = optax.adam(optax.cosine_decay_schedule(0.1, 2000))
        >>> print(solve(constrained(adam, ball)))
        ['0.804', '0.594']
        >>> print(solve(optax.chain(adam, project_weights(ball))))
        ['0.716', '0.698']
    """
    mapping = "mapping" if name == "project" else f"{name}_mapping"
    return optax.chain(
        gradient_mapping(constraint, reach=reach, name=mapping, record=record),
        inner,
        project_weights(constraint, every=every, name=name, record=record),
    )
