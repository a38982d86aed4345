"""What a rule is, and how it is asked in each scope."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from optax_clip import _validate
from optax_clip._numerics import across_devices, as_dtype, varying_axes
from optax_clip._records import increment
from optax_clip._trees import Layout, place_along, place_like
from optax_clip._validate import Ord
from optax_clip.norms import Norm, measure

__all__ = ["ThresholdRule"]


class ThresholdRule(NamedTuple):
    """A rule that turns the norms of a step into limits, and remembers what it needs.

    It works elementwise on an array of norms of any shape: one scalar for scope ``"global"``, one
    vector for ``"leaf"``, one array a leaf otherwise. So every rule works in every scope.

    Args:
        init: ``norms -> state`` with arrays of fixed shape, float32 or int32.
        update: ``(norms, state, param_norms, total) -> (limits, state)`` with ``limits`` shaped like
            ``norms``. ``param_norms`` are the norms of the weights in the same scopes (None if the
            update was called without params), ``total`` is the norm of the whole tree, a scalar. On a
            non-finite step every norm is NaN. Derivatives do not flow through the norms.

    Examples:
        A limit of twice the largest norm of the step before:

        >>> import jax.numpy as jnp
        >>> from optax_clip import ThresholdRule, clip_by_norm
        >>> def init(norms):
        ...     return jnp.full_like(norms, jnp.inf)
        >>> def update(norms, last, param_norms, total):
        ...     return 2 * last, jnp.where(jnp.isfinite(norms), norms, last)
        >>> tx = clip_by_norm(ThresholdRule(init, update), scope="global")
        >>> state = tx.init(jnp.zeros(2))
        >>> for g in (jnp.array([3.0, 4.0]), jnp.array([30.0, 40.0])):
        ...     g, state = tx.update(g, state)
        ...     print(g)
        [3. 4.]
        [6. 8.]
    """

    init: Callable[[Array], Any]
    update: Callable[[Array, Any, Array | None, Array], tuple[Array, Any]]


class Fixed(ThresholdRule):
    """A rule that does not look at the norms."""


Threshold = ArrayLike | Callable[[Array], ArrayLike] | ThresholdRule


def as_rule(**named: Any) -> ThresholdRule:
    """A number, a 0-d array or a schedule ``step -> number`` as a rule; a rule as it is."""
    ((name, threshold),) = named.items()
    if isinstance(threshold, ThresholdRule):
        if not callable(threshold.init) or not callable(threshold.update):
            raise TypeError(f"Expected {name} to have init and update, got {name}={threshold!r}.")
        return threshold
    if callable(threshold):

        def follow(norms: Array, step: Array, *_: Any) -> tuple[Array, Array]:
            limit = threshold(step)
            _validate.at_least(0, **{f"{name}(step)": limit})
            return _full(norms, limit), increment(step)

        return Fixed(lambda norms: jnp.zeros((), jnp.int32), follow)
    _validate.at_least(0, **named)
    return Fixed(lambda norms: (), lambda norms, state, *_: (_full(norms, threshold), state))


def _full(norms: Array, limit: ArrayLike) -> Array:
    return jnp.full_like(norms, jnp.maximum(as_dtype(limit, norms.dtype), 0))


def _shapes(layout: Layout) -> list[tuple[int, ...] | None]:
    """The shape of the norms that each call of a rule gets: None for a place without a norm."""
    if layout.pooled == "global":
        return [()]
    if layout.pooled == "leaf":
        return [(len(layout.leaves),)]
    shapes: dict[int, tuple[int, ...]] = dict(zip(layout.places, layout.kept_shapes, strict=True))
    return [shapes.get(i) for i in range(len(layout.leaves))]


def start(rule: ThresholdRule, layout: Layout, params: Any) -> Any:
    """The first state of a rule: one for the scopes global and leaf, else a tuple with one a leaf."""
    if isinstance(rule, Fixed):
        return place_like(rule.init(jnp.zeros(())), params)
    shapes = _shapes(layout)
    states = [() if shape is None else rule.init(jnp.zeros(shape, jnp.float32)) for shape in shapes]
    if layout.pooled is not None:
        return place_like(states[0], params)
    axes = dict(zip(layout.places, layout.axes, strict=True))
    return tuple(
        place_along(state, leaf, axes[i]) if i in axes else state
        for i, (state, leaf) in enumerate(zip(states, layout.leaves, strict=True))
    )


def decide(
    rule: ThresholdRule,
    state: Any,
    layout: Layout,
    norms: Sequence[Norm],
    params: Any,
    before: Array,
    finite: Array,
    *,
    ord: Ord,
) -> tuple[list[Array], Array, Any]:
    """Ask the rule for a limit a scope, the smallest of them, and its next state.

    It sees float32, NaN on a non-finite step, 0 where nothing is measured; of ``params``, which may be
    None, the norms in the same scopes.
    """
    if isinstance(rule, Fixed):
        limit, state = rule.update(jnp.zeros((), before.dtype), state, None, before)
        flat = layout.pooled == "leaf"
        limits = [jnp.broadcast_to(limit, n.root.shape) if flat else limit for n in norms]
        return limits, limit, state

    def seen(values: Sequence[Array]) -> list[Array]:
        return [lax.stop_gradient(jnp.where(finite, v, jnp.nan).astype(jnp.float32)) for v in values]

    (whole,) = seen([before])
    values = seen([n.value for n in norms])
    lengths = None
    if params is not None:
        sizes = measure(layout.beside(params), ord=ord)
        lengths = [n.value.astype(jnp.float32) for n in sizes]
    if layout.pooled is None:
        states = list(state)
        limits = []
        for i, place in enumerate(layout.places):
            length = None if lengths is None else lengths[i]
            limit, states[place] = rule.update(values[i], states[place], length, whole)
            limits.append(limit)
        return [x.astype(before.dtype) for x in limits], smallest(limits), tuple(states)
    if layout.pooled == "leaf":
        index = np.asarray(layout.places, int)
        spread = [
            jnp.zeros((len(layout.leaves),), jnp.float32).at[index].set(v)
            for v in [*values, *(lengths or [])]
        ]
        limit, state = rule.update(spread[0], state, spread[1] if lengths else None, whole)
        return [limit[index].astype(before.dtype)], smallest([limit[index]]), state
    limit, state = rule.update(values[0], state, lengths[0] if lengths else None, whole)
    return [limit.astype(before.dtype)], limit, state


def smallest(limits: Sequence[Array]) -> Array:
    """The smallest limit in force on any device, inf if there is no scope."""
    lowest = [jnp.min(x, initial=jnp.inf) for x in limits]
    lowest = across_devices(lowest, [varying_axes(x) for x in lowest], lax.pmin)
    least: Array = functools.reduce(jnp.minimum, lowest, jnp.float32(jnp.inf))
    return least
