"""What a transform writes into its state for `metrics` to read; nowhere else is its layout known."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array

from optax_clip import _owners, _validate
from optax_clip._mesh import inside_shard_map, place_like, reduction_axes, share
from optax_clip._trees import Scopes, flatten
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

    What goes by leaf stands below a name made of the paths and shapes of its tree, and an update with
    the state of another tree raises `ValueError`. Of the state of a wrapped optimizer it has the
    attributes.

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

    def __getattr__(self, name: str) -> Any:
        """What the state inside a wrapper has, such as ``gradient_step`` or ``hyperparams``."""
        inside = self.memory.get("inner_state") if isinstance(self.memory, dict) else None
        if inside is None or name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(inside, name)


class Report(NamedTuple):
    """What a step has to say: numbers by field, and what happened, to be counted."""

    gauges: Mapping[str, Sequence[Any]]
    happened: Mapping[str, Sequence[Any]]
    parts: Mapping[str, Sequence[Any]] = {}  # the numbers of each path or label


def clip_report(
    before: Array, after: Array, threshold: Array, share: Array, finite: Array, parts: Any = None
) -> Report:
    """What every clip has to say."""
    counts = (True, finite & (share > 0), ~finite)
    return Report({"norms": (before, after, threshold, share)}, {"counts": counts}, parts or {})


def transform(
    name: str,
    fields: tuple[str, ...],
    init: Callable[[Any], Any],
    step: Callable[..., tuple[Any, Any, Callable[[], Report]]],
    *,
    record: bool = True,
    remembers: bool = True,
    by_tree: bool = False,
    scope: Any = None,
    axis_name: AxisName = None,
    part: str | None = None,
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
        by_tree: whether the memory has a part under the name of its tree (`_owners.kept`).
        scope: of which the labels, if there are any, belong to that name, and which has parts.
        axis_name: of mapped axes over which leaves may be in parts, of other shapes than ``init`` saw.
        part: the entry of `FIELDS` that is reported besides of each leaf or label; None for nothing.
    """
    _validate.name(name=name)
    mapped = bool(_validate.axis_names(axis_name))
    layout = _Layout(name, fields, record, by_tree, scope, mapped, part if record else None)
    if not record and not remembers:
        return _bare(step)

    def first(params: optax.Params) -> Any:
        recorded = layout.zeros(params) if record else {}
        return RecordedState(place_like(recorded, params), init(params))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, Any]:
        layout.require(state, updates, params)
        new, memory, report = step(updates, state.memory, params, **extra)
        recorded = layout.written(state.recorded, report()) if record else state.recorded
        return new, RecordedState(recorded, memory)

    return optax.GradientTransformationExtraArgs(first, update)


def _bare(step: Callable[..., tuple[Any, Any, Any]]) -> optax.GradientTransformationExtraArgs:
    """A transform without state."""

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, Any]:
        del state
        return step(updates, None, params, **extra)[0], optax.EmptyState()

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


class _Layout(NamedTuple):
    """What `transform` was called with: what its states look like."""

    name: str
    fields: tuple[str, ...]
    record: bool
    by_tree: bool
    scope: Any
    mapped: bool
    part: str | None

    def zeros(self, params: optax.Params) -> dict[str, Any]:
        packed: dict[str, Any] = {field: _zeros(field) for field in self.fields}
        if self.part:
            names = part_names(Scopes.of(params, self.scope, axis_name=())[0], self.part)
            parts = _nested({f"{name}/{self.part}": _zeros(self.part) for name in names})
            packed[PARTS] = _owners.kept(parts, params, self.scope)
        return _nested({self.name: packed})

    def written(self, last: dict[str, Any], report: Report) -> dict[str, Any]:
        before = self._own(last)
        packed: dict[str, Any] = {field: _pack(values) for field, values in report.gauges.items()}
        for field, happened in report.happened.items():
            packed[field] = increment(before[field], jnp.stack([jnp.asarray(x) for x in happened]))
        if self.part:
            new = _nested({f"{name}/{self.part}": _pack(row) for name, row in report.parts.items()})
            old = _owners.opened(before[PARTS], dict)
            packed[PARTS] = _owners.closed(before[PARTS], _updated(old, new))
        return place_like(_nested({self.name: packed}), last)

    def _own(self, recorded: Any) -> dict[str, Any]:
        """What is recorded under the name, {} if nothing is."""
        for key in self.name.split("/"):
            recorded = recorded.get(key, {}) if isinstance(recorded, dict) else {}
        return recorded if isinstance(recorded, dict) else {}

    def require(self, state: Any, updates: optax.Updates, params: Any) -> None:
        """A state is one of this transform, and of this tree."""
        this = f"the transform named {self.name!r}"
        if getattr(state, "_fields", None) != RecordedState._fields:
            raise TypeError(
                f"Expected in update of {this} its own state, a RecordedState as init makes it, got "
                f"{_kind(state)}. In a chain each transform has a state of its own, in their order."
            )
        wanted = {*self.fields, *([PARTS] if self.part else [])} if self.record else set()
        if not wanted <= set(self._own(state.recorded)):
            raise ValueError(
                f"Expected in update of {this} its own state, which records {sorted(wanted)} under that "
                f"name, got a state that records {_outline(state.recorded)}."
            )
        found = set(_owners.keys({"recorded": state.recorded, "memory": state.memory}))
        if not found and not self.by_tree:
            return
        owner = _owners.Owner.of(updates, self.scope, beside=params)
        for key in found:
            _owners.require(key, owner, of=this, in_parts=self.mapped or inside_shard_map())
        if self.by_tree and owner.paths and not set(_owners.keys({"memory": state.memory})):
            raise ValueError(
                f"Expected in update of {this} a state that remembers something of each of "
                f"{len(owner.paths)} leaves, got one that remembers nothing: another threshold's or "
                "set's, or of a tree without leaves."
            )


def _kind(state: Any) -> str:
    kind = type(state).__name__
    return f"{kind} with the entries {sorted(map(str, state))}" if isinstance(state, dict) else kind


def _outline(recorded: Any) -> str:
    """What is recorded, without its numbers."""
    paths, _, _ = flatten(recorded)
    return ", ".join(paths[:6]) or "nothing, as with record=False"


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


def part_names(scopes: Scopes, field: str) -> list[str]:
    """The labels, or the paths of the leaves, as names of parts that record some field."""
    if scopes.labels is not None:
        return distinct(scopes.labels, field)
    # Numbered among all leaves, since some may have no update now.
    names = distinct([path or "leaf" for path in scopes.paths], field)
    return [names[i] for i in scopes.places]


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
    return share(axes, [jnp.sum(x, dtype=jnp.float32) for x in flags], [x.size for x in flags])


def increment(count: Array, happened: Any = True) -> Array:
    """Count up, and stay at the largest int32; also from a Python number that Optax's tools set."""
    count = jnp.asarray(count, jnp.int32)
    more: Array = happened & (count < 2**31 - 1)
    return count + more.astype(jnp.int32)
