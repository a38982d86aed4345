"""Clip each entry into an interval."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from optax_clip import _settings, _validate, _xla
from optax_clip._geometry.intervals import Bounds, inwards, length, nearest
from optax_clip._mesh import pooled, reduction_axes
from optax_clip._numerics import accumulator, as_dtype
from optax_clip._records import Report, clip_report, increment, transform
from optax_clip._settings import Initial, Setting
from optax_clip._trees import Scopes
from optax_clip._validate import AxisName
from optax_clip._values import owned
from optax_clip.clipping._acting import in_batches
from optax_clip.norms import global_norm, largest, measure
from optax_clip.thresholds.engine import ThresholdRule

__all__ = ["clip_by_value"]


def clip_by_value(
    limit: Setting | optax.Schedule,
    *,
    lower: Setting | None = None,
    axis_name: AxisName = None,
    name: str = "clip",
    record: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Clip each entry of the updates into an interval.

    The simplest bound. It bends the direction of the gradient, which clipping by norm does not.

    .. math:: g_i \leftarrow \max(-c, \min(c, g_i))

    Args:
        limit: the bound c >= 0 on each absolute value, or with ``lower`` the upper bound: a number, a
            0-d array, a schedule ``step -> number``, an array that broadcasts to each leaf, or a tree of
            numbers and arrays that is a prefix of the updates. A bound that a narrow dtype cannot
            represent is rounded inwards.
        lower: the lower bound, for an interval that is not symmetric: a number, an array or a tree.
        axis_name: mapped axes to sum the metrics over, as in `global_norm`.
        name: prefix of the metrics.
        record: False to record nothing: nothing is then read but what is clipped, and the state is
            `optax.EmptyState` unless the limit is a schedule.

    Returns:
        A transform whose metrics hold 2-norms, the limit as threshold (with ``lower``:
        ``min(limit, -lower)``) and the share of clipped entries. Complex entries are clamped by
        modulus. inf goes to the bound; NaN stays NaN and the step is counted as non-finite.

    Raises:
        ValueError: for a NaN limit, a negative one without ``lower``, or ``lower > limit``, and in the
            update for a complex leaf with ``lower``.
        TypeError: for a limit that is neither a number nor a schedule.

    Examples:
        >>> import jax.numpy as jnp
        >>> from optax_clip import clip_by_value
        >>> tx = clip_by_value(1.0)
        >>> updates, state = tx.update(jnp.array([-3.0, 0.5]), tx.init(jnp.zeros(2)))
        >>> print(updates)
        [-1.   0.5]

    References:
        Mikolov, 2012, Statistical Language Models Based on Neural Networks, PhD thesis, Brno.
    """
    interval = _Interval.of(limit, lower, axis_name, record)
    return transform(
        name, ("norms", "counts"), interval.init, interval.step,
        record=record, remembers=interval.scheduled,
    )  # fmt: skip


class _Interval(NamedTuple):
    """What `clip_by_value` was called with. Static."""

    lower: Any
    limit: Any
    scheduled: bool
    axis_name: AxisName
    record: bool

    @classmethod
    def of(cls, limit: Any, lower: Any, axis_name: AxisName, record: bool) -> "_Interval":
        _validate.axis_name(axis_name=axis_name)
        _validate.record(record)
        _check_kind(limit)
        lower, limit = owned((lower, limit))
        scheduled = _settings.is_formula(limit)
        if scheduled and lower is not None:
            raise TypeError(f"Expected a number as limit beside lower, got limit={limit!r}.")
        if lower is not None:
            _settings.absolute(lower=lower)
            lower, limit = _settings.ordered(lower=lower, limit=limit)
        elif not scheduled:
            limit = _settings.limit(limit=limit)
        return cls(lower, limit, scheduled, axis_name, record)

    def init(self, params: optax.Params) -> Any:
        del params
        return {"count": jnp.zeros((), jnp.int32)} if self.scheduled else ()

    def step(
        self, updates: optax.Updates, memory: Any, params: Any, **extra: Any
    ) -> tuple[optax.Updates, Any, Callable[[], Report]]:
        del params, extra
        scopes, xs = Scopes.of(updates, "global", self.axis_name)
        xs = _xla.written_once(xs) if self.record else xs
        high, memory = _follow(self.limit, memory) if self.scheduled else (self.limit, memory)
        limits, dtype = _limits(scopes, xs, self.lower, high), accumulator(xs)
        held = [inwards(x, *each) for x, each in zip(xs, limits, strict=True)]
        ends = [(low.astype(dtype), high.astype(dtype)) for low, high in held]
        pairs = [nearest(x, *each) for x, each in zip(xs, ends, strict=True)]
        new = _xla.select(xs, [changed for changed, _ in pairs], [y for _, y in pairs])

        def report() -> Report:
            threshold = _smallest(limits or _alone(self.lower, high), dtype)
            return _report(scopes, self.axis_name, xs, ends, threshold)

        return scopes.rebuild(updates, new), memory, report


def _check_kind(limit: Any) -> None:
    if limit is None or isinstance(limit, (str, Initial, ThresholdRule)):
        rules = " Rules go to clip_by_norm." if isinstance(limit, ThresholdRule) else ""
        raise TypeError(
            f"Expected limit to be a number, a tree of numbers or a schedule, got limit={limit!r}."
            f"{_validate.off(limit)}{rules}"
        )


def _follow(schedule: optax.Schedule, memory: Any) -> tuple[Any, Any]:
    if not isinstance(memory, dict):
        raise ValueError(
            "Expected in update of clip_by_value with a schedule a state that counts steps, got one "
            "that does not, as of a number."
        )
    limit = schedule(memory["count"])
    named: dict[str, Any] = {"limit(step)": limit}
    _validate.at_least(0, **named)
    return limit, {"count": increment(memory["count"])}


def _limits(scopes: Scopes, xs: Sequence[Array], lower: Any, high: Any) -> list[Bounds]:
    """Both bounds of each leaf, as they were given."""
    for i, x in zip(scopes.places, xs, strict=True):
        if lower is not None and jnp.iscomplexobj(x):
            raise ValueError(
                f"Expected no complex leaf beside lower, got {x.dtype} at {scopes.paths[i]!r} and "
                f"lower={lower!r}."
            )
    dtype, shapes = accumulator(xs), [x.shape for x in xs]
    highs = [as_dtype(top, dtype) for top in _settings.per_leaf(scopes, xs, shapes, limit=high)]
    if lower is None:
        highs = [jnp.maximum(top, 0) for top in highs]
        return [(-top, top) for top in highs]
    lows = [as_dtype(low, dtype) for low in _settings.per_leaf(scopes, xs, shapes, lower=lower)]
    return list(zip(lows, highs, strict=True))


def _statistics(
    axis_name: AxisName, batches: Sequence[Sequence[int]], xs: list[Array], ends: list[Bounds]
) -> list[Array]:
    """Norms before and after, is a NaN there, and how many entries are outside."""
    rows = [_norms(axis_name, [xs[i] for i in some], [ends[i] for i in some]) for some in batches]
    before, after = map(_pooled, zip(*rows, strict=True))
    counts = [_xla.count_outside(x, *each) for x, each in zip(xs, ends, strict=True)]
    axes = [reduction_axes(axis_name, x) for x in xs]
    return [before, after, jnp.isnan(before), *pooled(axes, counts)]


def _norms(axis_name: AxisName, xs: list[Array], ends: list[Bounds]) -> tuple[Array, Array]:
    """The norms of some leaves together, as they are and clamped."""
    scopes, xs = Scopes.of(xs, "global", axis_name)
    lows, highs = ([each[i] for each in ends] for i in (0, 1))
    (before,) = measure(scopes, xs, None, unwritten=True)
    (after,) = measure(scopes, xs, None, lows, highs, read=length, unwritten=True)
    return before.value, after.value


def _pooled(norms: Sequence[Array]) -> Array:
    """The norm of what has these norms."""
    if len(norms) == 1:
        return norms[0]
    widest = np.result_type(*(x.dtype for x in norms))
    return global_norm([x.astype(widest) for x in norms], axis_name=())


def _alone(lower: Any, high: Any) -> list[tuple[Any, Any]]:
    """The limits to report for a tree without leaves; none if they were given as a tree."""
    given = [x for x in (lower, high) if x is not None]
    if any(not isinstance(x, _settings.NUMBERS) or jnp.ndim(x) for x in given):
        return []
    return [(-high if lower is None else lower, high)]


def _smallest(limits: Sequence[tuple[Any, Any]], dtype: Any) -> Array:
    each = [jnp.minimum(as_dtype(high, dtype), as_dtype(-low, dtype)) for low, high in limits]
    return -largest([-x for x in each], [()] * len(each), least=-jnp.inf)


def _report(
    scopes: Scopes, axis_name: AxisName, xs: list[Array], ends: list[Bounds], threshold: Array
) -> Report:
    # On a CPU each large leaf has its own careful sum, in a branch of its own.
    apart, joint = in_batches(xs), [range(len(xs))]
    before, after, broken, outside = _xla.by_platform(
        xs, ends,
        cpu=functools.partial(_statistics, axis_name, apart),
        default=functools.partial(_statistics, axis_name, joint),
    )  # fmt: skip
    share = jnp.where(~broken & (outside > 0), outside / max(scopes.counts[0].item(), 1), 0)
    return clip_report(before, after, threshold, share, ~broken)
