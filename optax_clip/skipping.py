"""Leave out bad steps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.typing import ArrayLike

from optax_clip import _validate, _xla
from optax_clip._mesh import place_like
from optax_clip._records import Report, clip_report, increment, transform
from optax_clip._trees import Scopes
from optax_clip._validate import AxisName
from optax_clip._values import owned
from optax_clip.norms import all_finite, measure
from optax_clip.thresholds.engine import Limits, One, Seen, ThresholdRule, as_rule

__all__ = ["skip_spikes"]


def skip_spikes(
    inner: optax.GradientTransformation,
    rule: One,
    *,
    value_rule: One | None = None,
    max_consecutive: ArrayLike = 50,
    axis_name: AxisName = None,
    name: str = "skip",
    record: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Leave out the steps whose gradient, or whose loss, is a spike or not finite.

    .. math:: u_t = 0 \;\text{ where } \|g_t\| > C_t, \text{ else } \mathrm{inner}(g_t)

    A step that is left out gives a zero update and leaves the state of the inner optimizer as it was, so
    that a bad batch neither moves the weights nor enters the moments.

    Args:
        inner: the optimizer to guard.
        rule: the limit C on the norm of the whole gradient: a `ThresholdRule` such as `zscore`, a number
            >= 0, a 0-d array or a schedule ``step -> number``.
        value_rule: likewise a limit on the loss, such as `window_zscore`; it may be negative. The
            update then needs ``value=``, the loss of the step, and a step above either limit is left
            out.
        max_consecutive: after so many spikes left out in a row the next finite step is taken.
        axis_name: mapped axes to sum over, as in `global_norm`.
        name: prefix of the metrics.
        record: False to record nothing.

    Returns:
        A transform with the metrics of `clip_by_global_norm`, where a spike that is left out counts as
        clipped, and the counter ``{name}/steps_skipped`` of all steps left out; with ``value_rule`` also
        ``{name}/value`` and ``value_threshold``. A step that is not finite is always left out and does
        not count towards ``max_consecutive``. On a step that is left out ``inner`` is given zeros, and
        its result is thrown away.

    Raises:
        ValueError: for a negative or NaN limit, ``max_consecutive < 1``, and in the update without
            ``value`` if there is a ``value_rule``.
        TypeError: for an argument of another type, such as ``rule`` and ``inner`` swapped.

    Examples:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from optax_clip import metrics, skip_spikes
        >>> tx = skip_spikes(optax.sgd(0.5), 10.0)
        >>> state = tx.init(jnp.zeros(2))
        >>> for g in (jnp.array([3.0, 4.0]), jnp.array([30.0, 40.0]), jnp.array([jnp.nan, 1.0])):
        ...     g, state = tx.update(g, state)
        ...     print(g)
        [-1.5 -2. ]
        [0. 0.]
        [0. 0.]
        >>> print(metrics(state)["skip/steps_skipped"])
        2

    References:
        OLMo Team, 2025, 2 OLMo 2 Furious, https://arxiv.org/abs/2501.00656
    """
    guard = _Guard(
        _guarded(inner), Limits.of(None, rule=rule), _value_rule(value_rule), value_rule is not None,
        owned(max_consecutive), axis_name,
    )  # fmt: skip
    _validate.integer(1, max_consecutive=max_consecutive)
    _validate.axis_name(axis_name=axis_name)
    _validate.record(record)
    fields = ("norms", "guarded", *["values"] * guard.reads_value)
    return transform(
        name, fields, guard.init, guard.step,
        record=record, by_tree=guard.limit.by_tree, axis_name=axis_name,
    )  # fmt: skip


class _Judged(NamedTuple):
    """What became of a step: whether it is taken, whether it was a spike, and by which numbers."""

    take: Array
    skipped: Array
    finite: Array
    norm: Array
    threshold: Array
    value: Array
    highest: Array
    memory: dict[str, Any]

    def report(self, reads_value: bool) -> Report:
        after, share = jnp.where(self.take, self.norm, 0), self.skipped.astype(jnp.float32)
        clip = clip_report(self.norm, after, self.threshold, share, self.finite)
        counts = {"guarded": (*clip.happened["counts"], ~self.take)}
        return Report(
            {**clip.gauges, **({"values": (self.value, self.highest)} if reads_value else {})}, counts
        )


class _Guard(NamedTuple):
    """What `skip_spikes` was called with."""

    inner: optax.GradientTransformationExtraArgs
    limit: Limits
    value_rule: ThresholdRule
    reads_value: bool
    max_consecutive: ArrayLike
    axis_name: AxisName

    def init(self, params: optax.Params) -> Any:
        first = {
            "skipped_in_a_row": jnp.zeros((), jnp.int32),
            "value": self.value_rule.init(jnp.zeros((), jnp.float32)),
        }
        inner_state = self.inner.init(params)
        rule = self.limit.init(params, "global")
        return {**place_like(first, params), "rule": rule, "inner_state": inner_state}

    def judge(self, scopes: Scopes, xs: list[Array], value: Any, memory: Any, params: Any) -> _Judged:
        """Is the step taken? And what the rules remember of it."""
        norms = measure(scopes, xs, None)
        before, loss = norms[0].value, _loss(value, needed=self.reads_value)
        finite = all_finite(norms) & jnp.isfinite(loss)
        params = params if self.limit.asks_for_weights else None
        seen = Seen(scopes, norms, jnp.where(finite, before, jnp.nan), [finite], params, None)
        (threshold,), new_rule = self.limit.update(seen, memory["rule"])
        told = lax.stop_gradient(jnp.where(finite, loss, jnp.nan))
        highest, new_value = self.value_rule.update(told, memory["value"], None, told)
        in_a_row = memory["skipped_in_a_row"]
        spike = finite & ~((before <= threshold) & (loss <= highest))
        skipped = spike & (in_a_row < jnp.asarray(self.max_consecutive))
        streak = jnp.where(finite, jnp.where(skipped, increment(in_a_row), 0), in_a_row)
        kept = {"skipped_in_a_row": streak, "value": new_value, "rule": new_rule}
        take = _xla.once(finite & ~skipped)
        return _Judged(take, skipped, finite, before, threshold, loss, highest, kept)

    def step(
        self, updates: optax.Updates, memory: Any, params: Any, *, value: Any = None, **extra: Any
    ) -> tuple[Any, Any, Any]:
        scopes, xs = Scopes.of(updates, "global", self.axis_name)
        xs = _xla.materialized(xs)
        judged = self.judge(scopes, xs, value, memory, params)
        take, old = judged.take, memory["inner_state"]
        if value is not None:
            extra["value"] = value
        safe = scopes.rebuild(updates, [_keep(take, x) for x in xs])
        new, inner_state = self.inner.update(safe, old, params, **extra)
        kept = jax.tree.map(lambda x, y: jnp.where(take, x, y), inner_state, old)
        taken, leaves = Scopes.of(new, "global", axis_name=())
        landed = taken.rebuild(new, [_keep(take, x) for x in leaves])
        return (
            landed,
            {**judged.memory, "inner_state": kept},
            lambda: judged.report(self.reads_value),
        )


def _guarded(inner: Any) -> optax.GradientTransformationExtraArgs:
    if not (hasattr(inner, "init") and hasattr(inner, "update")) or isinstance(inner, ThresholdRule):
        raise TypeError(
            "Expected inner to be an Optax transform, as in skip_spikes(inner, rule), got "
            f"inner={inner!r}."
        )
    return optax.with_extra_args_support(inner)


def _value_rule(value_rule: Any) -> ThresholdRule:
    """A limit on the loss, which may be negative: a number, a schedule, a rule or none."""
    return as_rule(-jnp.inf, value_rule=jnp.inf if value_rule is None else value_rule)


def _loss(value: Any, *, needed: bool) -> Array:
    if not needed:
        return jnp.zeros((), jnp.float32)
    if value is None:
        raise ValueError(
            "Expected value, the loss of the step, in update of skip_spikes with a value_rule, got "
            "value=None. Call tx.update(grads, state, params, value=loss)."
        )
    if jnp.ndim(value):
        raise ValueError(f"Expected value to be one number, got value of shape {jnp.shape(value)}.")
    return jnp.asarray(value).astype(jnp.float32)


def _keep(take: Array, x: Array) -> Array:
    return lax.select(take, x, jnp.zeros_like(x))
