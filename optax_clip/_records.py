"""What a transform writes into its state for `metrics` to read; nowhere else is its layout known."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array, lax

from optax_clip import _validate
from optax_clip._mesh import all_reduce, axis_size, place_like, reduction_axes
from optax_clip._validate import AxisName

__all__ = ["RecordedState"]

# The packed entries of a state, and the metrics that they hold in this order.
GAUGES = {
    "norms": ("norm_before", "norm_after", "threshold", "fraction"),
    "values": ("value", "value_threshold"),
    "moves": ("distance", "fraction"),
    "share": ("fraction",),
    "logits": ("max_logit", "fraction"),
    "scope": ("norm_before", "norm_after", "threshold"),
    "updates": ("updates",),
    "params": ("params",),
    "ratios": ("updates", "params", "ratio"),
}
COUNTERS = {
    "counts": ("steps", "steps_clipped", "steps_nonfinite"),
    "guarded": ("steps", "steps_clipped", "steps_nonfinite", "steps_skipped"),
    "turns": ("steps",),
    "signals": ("steps", "steps_nonfinite"),
}
FIELDS = GAUGES | COUNTERS
PARTS = "by_part"  # below it, metrics by path or label


class RecordedState(NamedTuple):
    """What a transform did (read it with `metrics`), and what it remembers.

    Every transform of this package has such a state, unless ``record=False`` and nothing to remember
    leave an `optax.EmptyState`. It holds nothing but arrays in dicts, lists and tuples. To serialise a
    program that takes it, tell JAX its name once:

        >>> import jax
        >>> from optax_clip import RecordedState
        >>> _ = jax.export.register_namedtuple_serialization(
        ...     RecordedState, serialized_name="optax_clip.RecordedState"
        ... )

    Args:
        recorded: the metrics, packed; all zeros before the first step.
        memory: what the next step needs: of a threshold rule, of a set, of a wrapped optimizer.
    """

    recorded: dict[str, Any]
    memory: Any

    @property
    def inner_state(self) -> Any:
        """The state of the optimizer inside a wrapper, as Optax's own wrappers name it."""
        return self.memory["inner_state"]


class Report(NamedTuple):
    """What a step has to say: numbers by field, and what happened, to be counted."""

    gauges: Mapping[str, Sequence[Any]]
    happened: Mapping[str, Sequence[Any]]
    parts: Mapping[str, Mapping[str, Sequence[Any]]] = {}  # by path or label: field -> numbers


def transform(
    name: str,
    fields: tuple[str, ...],
    init: Callable[[Any], Any],
    step: Callable[..., tuple[Any, Any, Callable[[], Report]]],
    *,
    record: bool = True,
    remembers: bool = True,
    parts: Callable[[Any], Mapping[str, str]] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A transform from a step that reports.

    Args:
        name: prefix of the metrics.
        fields: the entries of `FIELDS` that every step reports.
        init: ``params -> memory``.
        step: ``(updates, memory, params, **extra) -> (updates, memory, report)``; the report is made
            only if it is recorded.
        record: whether it is.
        remembers: whether there is a memory; without memory and record the state is
            `optax.EmptyState`, and any state is accepted.
        parts: ``params -> {path or label: field}``, what is reported besides.
    """
    _validate.name(name=name)
    bare = not record and not remembers

    def first(params: optax.Params) -> Any:
        if bare:
            return optax.EmptyState()
        packed: dict[str, Any] = {field: _zeros(field) for field in fields}
        if parts is not None:
            named = {f"{part}/{field}": _zeros(field) for part, field in parts(params).items()}
            # Optax asks for a state without leaves: one number then stands for all parts.
            packed[PARTS] = _nested(named) or jnp.zeros(())
        recorded = _nested({name: packed}) if record else {}
        return RecordedState(place_like(recorded, params), init(params))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, Any]:
        new, memory, report = step(updates, None if bare else state.memory, params, **extra)
        if bare:
            return new, optax.EmptyState()
        recorded = _written(state.recorded, name, report()) if record else state.recorded
        return new, RecordedState(recorded, memory)

    return optax.GradientTransformationExtraArgs(first, update)


def _zeros(field: str) -> Array:
    return jnp.zeros(len(FIELDS[field]), jnp.int32 if field in COUNTERS else jnp.float32)


def _nested(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Dicts of dicts, a level for each "/", since keys of a state are joined by it elsewhere."""
    tree: dict[str, Any] = {}
    for path, value in entries.items():
        *above, last = path.split("/")
        inner = tree
        for key in above:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return tree


def distinct(names: Sequence[str], field: str) -> list[str]:
    """Names below which an entry has a place of its own: those that meet are numbered.

    Keys may hold a "/", so that two leaves have one path, or one path ends inside another's entry.
    """
    given, found = set(names), []
    entries: set[tuple[str, ...]] = set()
    above: set[tuple[str, ...]] = set()
    for name in names:
        numbered = (f"{name}_{n}" for n in itertools.count(1) if f"{name}_{n}" not in given)
        for each in itertools.chain([name], numbered):
            entry = (*each.split("/"), field)
            places = [entry[:k] for k in range(1, len(entry) + 1)]
            if entry not in above and entries.isdisjoint(places):
                break
        entries.add(entry)
        above.update(places)
        found.append(each)
    return found


def _written(last: dict[str, Any], name: str, report: Report) -> dict[str, Any]:
    before = last
    for key in name.split("/"):
        before = before[key]
    packed: dict[str, Any] = {field: _pack(values) for field, values in report.gauges.items()}
    for field, happened in report.happened.items():
        packed[field] = increment(before[field], jnp.stack([jnp.asarray(x) for x in happened]))
    if PARTS in before:
        named = {
            f"{part}/{field}": _pack(values)
            for part, fields in report.parts.items()
            for field, values in fields.items()
        }
        packed[PARTS] = _updated(before[PARTS], _nested(named))
    return place_like(_nested({name: packed}), last)


def _updated(old: Any, new: Any) -> Any:
    """The new entries, and beside them the old ones that there is nothing new of."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new or old if isinstance(new, dict) else new
    return {key: _updated(value, new[key]) if key in new else value for key, value in old.items()}


def _pack(values: Sequence[Any]) -> Array:
    return jnp.stack([jnp.asarray(x).astype(jnp.float32) for x in values])


def fraction(flags: Sequence[Array], axis_name: AxisName = None) -> Array:
    """The share of True among all entries of some arrays, wherever they are."""
    axes = [reduction_axes(axis_name, x) for x in flags]
    size = max(sum(x.size * axis_size(names) for x, names in zip(flags, axes, strict=True)), 1)
    counts = [jnp.sum(x, dtype=jnp.float32) for x in flags]
    total: Array = functools.reduce(jnp.add, all_reduce(counts, axes, lax.psum), jnp.float32(0))
    return total / size


def increment(count: Array, happened: Any = True) -> Array:
    """Count up, and stay at the largest int32."""
    more: Array = happened & (count < 2**31 - 1)
    return count + more.astype(count.dtype)
