"""Measure what flows through a chain, and change nothing."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array

from optax_clip import _validate
from optax_clip._records import Report, part_names, transform
from optax_clip._trees import Scopes
from optax_clip._validate import AxisName, Groups, Ord, Scope
from optax_clip.norms import Order, measure

__all__ = ["record_norms"]


def record_norms(
    scope: Scope = "leaf",
    *,
    of: tuple[str, ...] = ("updates",),
    ord: Ord = None,
    axis_name: AxisName = None,
    name: str = "norms",
    record: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Record the norms of updates and weights by path or label, for dashboards. It changes nothing.

    Anywhere in a chain: first it measures gradients, after the learning rate the step that is taken.

    .. math:: \|u_s\|, \quad \|w_s\|, \quad \frac{\|u_s\|}{\|w_s\|} \quad \text{for each scope } s

    Args:
        scope: which entries share a norm: ``"leaf"``, ``"global"`` or `groups`.
        of: ``("updates",)``, ``("params",)``, or both, which also gives their ratio. With the weights
            the update needs ``params``.
        ord: which norm, as in `global_norm`. Static.
        axis_name: mapped axes to sum over, as in `global_norm`.
        name: prefix of the metrics.
        record: False to switch it off.

    Returns:
        A transform with the metrics ``{name}/{path}/updates``, and with both ``/params`` and ``/ratio``;
        with `groups` labels instead of paths, with the scope ``"global"`` neither, but ``{name}/steps``.
        The ratio to weights of norm 0 is 0.

    Raises:
        ValueError: for an unknown scope, order or ``of``, and in the update without ``params`` if asked
            for their norms.

    Examples:
        >>> import jax.numpy as jnp
        >>> from optax_clip import metrics, record_norms
        >>> tx = record_norms(of=("updates", "params"))
        >>> params = {"dense": {"kernel": jnp.array([[6.0, 8.0]])}}
        >>> updates = {"dense": {"kernel": jnp.array([[3.0, 4.0]])}}
        >>> _, state = tx.update(updates, tx.init(params), params)
        >>> for key, value in metrics(state).items():
        ...     print(key, value)
        norms/dense/kernel/updates 5.0
        norms/dense/kernel/params 10.0
        norms/dense/kernel/ratio 0.5

    References:
        You, Gitman, Ginsburg, 2017, https://arxiv.org/abs/1708.03888, for the ratio.
    """
    _validate.scope(scope)
    Order.of(ord)
    _validate.axis_name(axis_name=axis_name)
    _validate.record(record)
    known = ("updates",), ("params",), ("updates", "params"), ("params", "updates")
    if tuple(of) not in known:
        raise ValueError(
            f'Expected of to be a tuple of "updates" and "params", such as ("params",), got of={of!r}.'
        )
    if not isinstance(scope, Groups) and scope not in ("leaf", "global"):
        raise ValueError(f'Expected scope to be "leaf", "global" or groups(label), got scope={scope!r}.')
    field = of[0] if len(of) == 1 else "ratios"
    reading = _Reading(scope, ord, tuple(of), axis_name, field)
    fields, part = ((field, "turns"), None) if scope == "global" else ((), field)
    return transform(
        name, fields, lambda params: (), reading.step,
        record=record, remembers=False, scope=scope, axis_name=axis_name, part=part,
    )  # fmt: skip


class _Reading(NamedTuple):
    """What `record_norms` was called with, and the field that its numbers go to."""

    scope: Scope
    ord: Ord
    of: tuple[str, ...]
    axis_name: AxisName
    field: str

    def step(
        self, updates: optax.Updates, memory: Any, params: Any, **extra: Any
    ) -> tuple[Any, Any, Any]:
        del extra
        if "params" in self.of:
            _validate.params_given(params, of="record_norms")
        return updates, memory, lambda: self.report(updates, params)

    def report(self, updates: optax.Updates, params: Any) -> Report:
        scopes, xs = Scopes.of(updates, self.scope, self.axis_name, beside=params)
        columns = []
        if "updates" in self.of:
            columns.append(_norms(scopes, xs, self.ord))
        if "params" in self.of:
            columns.append(_norms(scopes, scopes.leaves_of(params, of="record_norms"), self.ord))
        if len(columns) == 2:
            u, w = columns
            columns.append(jnp.where(w > 0, u / jnp.where(w > 0, w, 1), 0))
        if self.scope == "global":
            return Report({self.field: [x[0] for x in columns]}, {"turns": (True,)})
        names = part_names(scopes, self.field)
        return Report({}, {}, {name: [x[i] for x in columns] for i, name in enumerate(names)})


def _norms(scopes: Scopes, xs: list[Array], ord: Ord) -> Array:
    return jnp.atleast_1d(measure(scopes, xs, ord)[0].value)
