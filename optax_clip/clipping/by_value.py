"""Clip each entry into an interval."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from optax_clip import _settings, _validate, _xla
from optax_clip._mesh import all_reduce, reduction_axes
from optax_clip._numerics import (
    accumulator,
    as_dtype,
    power_of_two,
    reciprocal,
    round_down,
    round_up,
    scale,
    widen,
)
from optax_clip._records import Report, increment, transform
from optax_clip._settings import Initial, Setting
from optax_clip._trees import Scopes
from optax_clip._validate import AxisName
from optax_clip._values import owned
from optax_clip.clipping._acting import in_batches
from optax_clip.clipping._reports import clip_report
from optax_clip.norms import global_norm, measure
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

    def init(params: optax.Params) -> Any:
        del params
        return {"count": jnp.zeros((), jnp.int32)} if scheduled else ()

    def step(updates: optax.Updates, memory: Any, params: Any, **extra: Any) -> tuple[Any, Any, Any]:
        del params, extra
        scopes, xs = Scopes.of(updates, "global", axis_name)
        xs = _xla.written_once(xs) if record else xs
        high: Any = limit
        if scheduled:
            high, memory = _follow(high, memory)
        limits = _limits(scopes, xs, lower, high)
        ends = [_ends(x, *each) for x, each in zip(xs, limits, strict=True)]
        inside = [_inside(x, *each) for x, each in zip(xs, ends, strict=True)]
        # A device that flushes subnormal numbers takes them for 0.
        flags = [
            (y != widen(x, y.dtype)) | (low == high)
            for x, y, (low, high) in zip(xs, inside, ends, strict=True)
        ]
        clipped = _xla.select(xs, flags, inside)

        def report() -> Any:
            threshold = _smallest(limits or _alone(lower, high), accumulator(xs))
            return _report(scopes, _Reading(axis_name), xs, ends, threshold)

        return scopes.rebuild(updates, clipped), memory, report

    return transform(name, ("norms", "counts"), init, step, record=record, remembers=scheduled)


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


def _limits(scopes: Scopes, xs: Sequence[Array], lower: Any, high: Any) -> list[tuple[Array, Array]]:
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


def _ends(x: Array, low: Array, high: Array) -> tuple[Array, Array]:
    """The bounds as a leaf of its dtype can hold them."""
    part = jnp.finfo(x.dtype).dtype
    held = round_up(low, part).astype(low.dtype), round_down(high, part).astype(high.dtype)
    return _settings.aligned(held[0], x.ndim), _settings.aligned(held[1], x.ndim)


def _inside(x: Array, low: Array, high: Array) -> Array:
    """Each entry in [low, high], by modulus if complex; in the wide dtype."""
    wide = widen(x, low.dtype)
    if not jnp.iscomplexobj(x):
        return jnp.minimum(jnp.maximum(wide, low), high)
    # Rescale to modulus near 1 first: the modulus of a finite number can overflow. An infinite part
    # alone gives the direction.
    ends = [jnp.where(jnp.isinf(part), jnp.sign(part), 0) for part in (wide.real, wide.imag)]
    infinite = jnp.isinf(wide.real) | jnp.isinf(wide.imag)
    size = power_of_two(jnp.maximum(jnp.abs(wide.real), jnp.abs(wide.imag)))
    way = jnp.where(infinite, lax.complex(*ends), scale(wide, reciprocal(size)))
    over = (jnp.abs(wide) > high) | jnp.isnan(high)
    bounded = scale(way, high / jnp.where(over, jnp.abs(way), 1))
    return jnp.where(over & ~jnp.isnan(wide), bounded, wide)


def _length(x: Array, low: Array, high: Array) -> Array:
    """What the norm of a clamped entry needs: the entry, or its absolute value."""
    if jnp.iscomplexobj(x):
        return jnp.minimum(jnp.abs(x), high)
    return jnp.maximum(jnp.minimum(widen(x, low.dtype), high), low)


class _Reading(NamedTuple):
    """How the numbers of a report are summed: over which mapped axes, each leaf on its own or not."""

    axis_name: AxisName
    apart: bool = False


def _statistics(how: _Reading, xs: list[Array], ends: list[tuple[Array, Array]]) -> list[Array]:
    """Norms before and after, is a NaN there, and how many entries are outside."""
    places = in_batches(xs) if how.apart else [tuple(range(len(xs)))]
    rows = [_norms(how.axis_name, [xs[i] for i in some], [ends[i] for i in some]) for some in places]
    before, after = (_pooled([row[i] for row in rows]) for i in (0, 1))
    counts = [_xla.count_outside(x, *each).astype(jnp.float32) for x, each in zip(xs, ends, strict=True)]
    axes = [reduction_axes(how.axis_name, x) for x in xs]
    outside = functools.reduce(jnp.add, all_reduce(counts, axes, lax.psum), jnp.float32(0))
    return [before, after, jnp.isnan(before), outside]


def _norms(axis_name: AxisName, xs: list[Array], ends: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    """The norms of some leaves together, as they are and clamped."""
    scopes, xs = Scopes.of(xs, "global", axis_name)
    lows, highs = ([each[i] for each in ends] for i in (0, 1))
    (before,) = measure(scopes, xs, None, unwritten=True)
    (after,) = measure(scopes, xs, None, lows, highs, read=_length, unwritten=True)
    return before.value, after.value


def _pooled(norms: list[Array]) -> Array:
    """The norm of what has these norms."""
    if len(norms) == 1:
        return norms[0]
    widest = np.result_type(*(x.dtype for x in norms))
    return global_norm([x.astype(widest) for x in norms], axis_name=())


def _alone(lower: Any, high: Any) -> list[tuple[Any, Any]]:
    """The bounds where there is no leaf to tell more: of a tree none."""
    given = [x for x in (lower, high) if x is not None]
    if any(not isinstance(x, _settings.NUMBERS) or jnp.ndim(x) for x in given):
        return []
    return [(-high if lower is None else lower, high)]


def _smallest(limits: Sequence[tuple[Any, Any]], dtype: Any) -> Array:
    each = [
        jnp.min(jnp.minimum(as_dtype(high, dtype), as_dtype(-low, dtype)), initial=jnp.inf)
        for low, high in limits
    ]
    return functools.reduce(jnp.minimum, each, jnp.asarray(jnp.inf, dtype))


def _report(scopes: Scopes, how: _Reading, xs: list[Array], ends: Any, threshold: Array) -> Report:
    before, after, broken, outside = _xla.by_platform(
        xs,
        ends,
        cpu=functools.partial(_statistics, how._replace(apart=True)),
        default=functools.partial(_statistics, how),
    )
    share = jnp.where(~broken & (outside > 0), outside / max(scopes.counts[0].item(), 1), 0)
    return clip_report(before, after, threshold, share, ~broken)
