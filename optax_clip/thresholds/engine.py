"""What a rule is, and how it is asked in each scope."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from optax_clip import _owners, _validate, _xla
from optax_clip._mesh import all_reduce, place_like, placed_like, varying_axes
from optax_clip._numerics import accumulator, as_dtype
from optax_clip._records import increment
from optax_clip._trees import Cells, Scopes, flatten
from optax_clip._validate import Groups, Ord
from optax_clip._values import owned
from optax_clip.norms import Norm, measure

__all__ = ["ThresholdRule"]


class ThresholdRule(NamedTuple):
    """A rule that turns the norms of a step into limits, and remembers what it needs.

    It works elementwise on an array of norms of any shape: one scalar for scope ``"global"``, one
    vector of all scopes otherwise (without memory it may be one array a leaf). So every rule works in
    every scope.

    Args:
        init: ``norms -> state`` with arrays of fixed shape, in the dtype of the norms or int32. A state
            of zeros, as `optax.tree.zeros_like` makes it, had better be a valid start.
        update: ``(norms, state, param_norms, total) -> (limits, state)`` with ``limits`` shaped like
            ``norms``. ``param_norms`` are the norms of the weights in the same scopes (None if the
            update was called without params), ``total`` is the norm of the whole tree, a scalar. On a
            non-finite step every norm is NaN, with ``nonfinite="local"`` that of each broken scope, and
            ``total`` is then that of the others. Derivatives do not flow through the norms.

    Examples:
        A limit of twice the largest norm of the step before:

        >>> import jax.numpy as jnp
        >>> from optax_clip import ThresholdRule, clip_by_norm
        >>> def init(norms):
        ...     return jnp.zeros_like(norms)
        >>> def update(norms, last, param_norms, total):
        ...     limits = jnp.where(last > 0, 2 * last, jnp.inf)
        ...     return limits, jnp.where(jnp.isfinite(norms), norms, last)
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


One = ArrayLike | Callable[[Array], ArrayLike] | ThresholdRule
Threshold = One | Mapping[str, One]


class _Given(ThresholdRule):
    """A number or a schedule: it asks for no weights, so any params will do."""


_ALL = ""  # no label
A_RULE = "a clip by a rule, such as adaptive_grad_clip,"  # where it asks for weights


class Seen(NamedTuple):
    """What a rule is told of a step: of what is not ``fine`` NaN."""

    scopes: Scopes
    norms: list[Norm]
    total: Array
    fine: Cells
    params: Any
    ord: Ord


class Limits(NamedTuple):
    """A threshold in the scopes of a tree: one rule for all, or one a label."""

    name: str
    rules: Mapping[str, ThresholdRule]  # by label; that for all has the name _ALL
    memories: Mapping[str, Any]  # the shapes of what each remembers of one norm
    remembers: bool
    by_tree: bool  # of norms, which are those of one tree; a schedule counts steps alone
    asks_for_weights: bool

    @classmethod
    def of(cls, scope: Any, **named: Any) -> "Limits":
        """From a number, schedule or rule, or with groups a dict of these; no dict if scope is None."""
        ((name, threshold),) = named.items()
        if scope is None or not isinstance(threshold, Mapping):
            rules = {_ALL: as_rule(**named)}
        elif isinstance(scope, Groups):
            each = sorted(threshold.items())
            rules = {k: as_rule(**{f"{name}[{k!r}]": x}) for k, x in each}
        else:
            raise ValueError(
                f"Expected {name} to be a dict only with scope=groups(label), got {name}={threshold!r}."
            )
        memories = {k: _memory(rule) for k, rule in rules.items()}
        held = [rule for k, rule in rules.items() if jax.tree.leaves(memories[k])]
        learned = [any(not isinstance(rule, _Given) for rule in some) for some in (held, rules.values())]
        return cls(name, rules, memories, bool(held), *learned)

    def init(self, params: Any, scope: Any) -> Any:
        """The memory: one vector over all scopes, one number a label, on the devices of the weights."""
        scopes, xs = Scopes.of(params, scope, axis_name=())
        self._require_each(scopes)
        memory = place_like(self._first(scopes, accumulator(xs)), params)
        return _owners.kept(memory, params, scope) if self.by_tree else memory

    def _first(self, scopes: Scopes, dtype: Any) -> Any:
        if _ALL in self.rules:
            return self.rules[_ALL].init(jnp.zeros(scopes.memory, dtype))
        return {label: rule.init(jnp.zeros((), dtype)) for label, rule in self.rules.items()}

    def update(self, seen: Seen, memory: Any) -> tuple[Cells, Any]:
        """A limit for each scope, cell by cell, and the next memory."""
        first = functools.partial(self._first, seen.scopes, seen.norms[0].root.dtype)
        held = first() if memory is None else memory
        old = self._own(_owners.opened(held, first) if self.by_tree else held)
        norms, total = _told(seen, old)
        rule, params = self._asked(seen.scopes), _param_norms(seen, norms)
        if not self.remembers:
            beside: Sequence[Array | None] = params or [None] * len(norms)
            limits = [rule(n, old, p, total)[0] for n, p in zip(norms, beside, strict=True)]
            return _like_norms(seen, limits), memory
        joined = seen.scopes.join(norms)
        _same_scopes(seen, old if _ALL in self.rules else (), joined)
        limit, new = rule(joined, old, seen.scopes.join(params) if params else None, total)
        new = _in_dtypes_of(old, new)
        memory = _owners.closed(memory, new) if self.by_tree else new
        return _like_norms(seen, seen.scopes.split(limit, norms)), memory

    def _asked(self, scopes: Scopes) -> Callable[..., tuple[Array, Any]]:
        """The update of the rule for all, or one over the vector of labels, each asking its own."""
        if _ALL in self.rules:
            return self.rules[_ALL].update
        self._require_each(scopes)

        def update(norms: Array, states: Any, params: Array | None, total: Array) -> tuple[Array, Any]:
            limits, new = [norms[:0]], dict(states)
            for row, label in enumerate(scopes.labels or ()):
                of_params = None if params is None else params[row]
                asked = self.rules[label].update(norms[row], states[label], of_params, total)
                limit, new[label] = asked
                limits.append(limit.astype(norms.dtype)[None])
            return jnp.concatenate(limits), new

        return update

    def _require_each(self, scopes: Scopes) -> None:
        missing = set() if _ALL in self.rules else set(scopes.labels or ()) - set(self.rules)
        if missing:
            raise ValueError(f"Expected {self.name} for each label, got none for {sorted(missing)}.")

    def _own(self, states: Any) -> Any:
        """States that are those of these rules; as arrays, where Optax's tools set a number."""
        wanted = self.memories.get(_ALL, self.memories)
        structures: list[Any] = [jax.tree.structure(x) for x in (wanted, states)]
        if structures[0] != structures[1]:
            raise ValueError(
                f"Expected in update the memory of {self.name}, with the entries {_entries(wanted)}, "
                f"got that of another threshold, with {_entries(states)}."
            )
        return jax.tree.map(lambda x, y: jnp.asarray(y, getattr(y, "dtype", x.dtype)), wanted, states)


def as_rule(_least: float = 0, **named: Any) -> ThresholdRule:
    """A number, a 0-d array or a schedule ``step -> number`` as a rule; a rule as it is."""
    ((name, threshold),) = named.items()
    if isinstance(threshold, ThresholdRule):
        if not callable(threshold.init) or not callable(threshold.update):
            raise TypeError(f"Expected {name} to have init and update, got {name}={threshold!r}.")
        return threshold
    if threshold is None or isinstance(threshold, (str, tuple, Mapping)):
        raise TypeError(
            f"Expected {name} to be a number, a schedule or a ThresholdRule, got {name}={threshold!r}."
            + _validate.off(threshold)
        )

    def bounded(norms: Array, limit: ArrayLike) -> Array:
        return jnp.maximum(as_dtype(limit, norms.dtype), _least)

    if callable(threshold):

        def follow(norms: Array, state: Any, *_: Any) -> tuple[Array, Any]:
            limit = threshold(state["count"])
            _validate.at_least(_least, **{f"{name}(step)": limit})
            return jnp.full_like(norms, bounded(norms, limit)), {"count": increment(state["count"])}

        return _Given(lambda norms: {"count": jnp.zeros((), jnp.int32)}, follow)
    _validate.at_least(_least, **named)
    number = owned(threshold)
    return _Given(lambda norms: (), lambda norms, state, *_: (bounded(norms, number), state))


def _memory(rule: ThresholdRule) -> Any:
    # A shape, not an array: what is made before the devices are chosen may not choose them.
    return jax.eval_shape(rule.init, jax.ShapeDtypeStruct((), jnp.float32))


def _entries(states: Any) -> str:
    paths, _, _ = flatten(states)
    return ", ".join(paths) or "nothing"


def _told(seen: Seen, states: Any) -> tuple[Cells, Array]:
    """The norms as a rule sees them: NaN where it is not finite, in the dtype of its memory."""
    kinds = [x.dtype for x in jax.tree.leaves(states) if jnp.issubdtype(x.dtype, jnp.floating)]
    values = [jnp.where(f, n.value, jnp.nan) for f, n in zip(seen.fine, seen.norms, strict=True)]
    dtype = kinds[0] if kinds else values[0].dtype
    *norms, total = (lax.stop_gradient(v.astype(dtype)) for v in (*values, seen.total))
    return norms, total


def _param_norms(seen: Seen, norms: Cells) -> Cells | None:
    if seen.params is None:
        return None
    weights = measure(seen.scopes, seen.scopes.leaves_of(seen.params, of=A_RULE), seen.ord)
    return [lax.stop_gradient(w.value.astype(n.dtype)) for w, n in zip(weights, norms, strict=True)]


def _same_scopes(seen: Seen, state: Any, joined: Array) -> None:
    """A leaf whose update is None keeps its place among units only if its weights are there to tell."""
    if seen.params is not None or seen.scopes.is_global:
        return
    absent = len(seen.scopes.places) < len(seen.scopes.paths)
    others = [x.shape for x in jax.tree.leaves(state) if x.ndim and x.shape[-1:] != joined.shape]
    if absent and others:
        raise ValueError(
            "Expected params beside updates that are None where init saw weights, got params=None. Call "
            "tx.update(grads, state, params)."
        )


def _like_norms(seen: Seen, limits: Cells) -> Cells:
    """The limits in the dtype of the norms that they are for, and on their devices."""
    return [placed_like(x.astype(n.root.dtype), n.root) for x, n in zip(limits, seen.norms, strict=True)]


def _in_dtypes_of(old: Any, new: Any) -> Any:
    return jax.tree.map(lambda x, y: y.astype(x.dtype), old, new)


def lowest(limits: Cells) -> Array:
    """The smallest limit in force on any device, inf if there is no scope.

    A maximum, which XLA joins with the others into one all-reduce if no kernel has it with their sums.
    """
    # Limits are at least 0, so that inf can stand for a NaN, which a maximum may drop.
    terms = [jnp.where(jnp.isnan(x), jnp.inf, -x) for x in _xla.each_once(limits)]
    each = [jnp.max(x, initial=-jnp.inf) for x in terms]
    each = all_reduce(each, [varying_axes(x) for x in each], lax.pmax)
    top = functools.reduce(jnp.maximum, each)
    return jnp.where(top == jnp.inf, jnp.nan, -top)
