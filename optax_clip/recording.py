"""Read what happened out of an optimizer state."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_clip._owners import is_key
from optax_clip._records import COUNTERS, FIELDS, PARTS, RecordedState
from optax_clip._trees import shape_of
from optax_clip._validate import is_traced

__all__ = ["RecordedState", "metrics"]

_AT_ONCE = 64  # arrays in one program: XLA takes seconds to compile one for a thousand numbers


def metrics(opt_state: Any) -> dict[str, jax.Array]:
    """Collect the metrics of every optax_clip transform in an optimizer state.

    It looks at any depth: chains, masks, partitions, `optax.MultiSteps`, wrappers, linen's
    ``TrainState.opt_state`` and ``nnx.Optimizer.opt_state``; inside `jax.jit` and outside.

    Args:
        opt_state: the state of an Optax transform, or a tree that holds one.

    Returns:
        Scalars by name, ready for any logger: ``{name}/norm_before``, ``norm_after``, ``threshold``
        and ``fraction`` (float32) of the last step, the counters ``{name}/steps``, ``steps_clipped``
        and ``steps_nonfinite`` (int32); for `skip_spikes` ``{name}/steps_skipped`` besides; for
        `project_weights` ``{name}/fraction`` and ``steps``, and ``distance`` for sets other than boxes;
        for `mask_outward` the first two. Of two transforms with one name the later one is called
        ``name_1``, then ``name_2``. Empty if there are none. Where scopes have limits of their own
        ``threshold`` is the smallest; what was left of the whole is ``norm_after / norm_before``. Of
        averages over steps those of ``fraction`` and of the norms say something, those of counters do
        not.

    Raises:
        TypeError: if there are none and ``opt_state`` holds functions, as a transform does.

    Examples:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from optax_clip import clip_by_global_norm, metrics
        >>> tx = optax.chain(clip_by_global_norm(1.0), optax.sgd(0.1))
        >>> params = jnp.zeros(2)
        >>> _, state = tx.update(jnp.array([3.0, 4.0]), tx.init(params), params)
        >>> for key, value in metrics(state).items():
        ...     print(key, value)
        clip/norm_before 5.0
        clip/norm_after 1.0
        clip/threshold 1.0
        clip/fraction 1.0
        clip/steps 1
        clip/steps_clipped 1
        clip/steps_nonfinite 0
    """
    leaves, treedef = jax.tree.flatten(opt_state)
    found = [entries for entries in _records(treedef) if _is_record(entries, leaves)]
    if not found and any(map(callable, leaves)):
        raise TypeError(
            f"Expected opt_state to be the state of a transform, got opt_state={opt_state!r}."
        )
    numbers = _unpacked({entry.leaf: leaves[entry.leaf] for entry in itertools.chain(*found)})
    return {key: numbers[leaf][column] for key, leaf, column in _named(tuple(found))}


class _Entry(NamedTuple):
    """A packed array of a state: which leaf, of which transform, below which path or label, what."""

    leaf: int
    name: str
    part: tuple[str, ...]
    field: str


Entries = tuple[_Entry, ...]


def _records(treedef: Any) -> tuple[Entries, ...]:
    """What may be records in a state of this structure, transform by transform."""
    try:
        return _found(treedef)
    except TypeError:  # A container that does not hash.
        return _found.__wrapped__(treedef)


@functools.lru_cache(maxsize=128)
def _found(treedef: Any) -> tuple[Entries, ...]:
    numbered = treedef.unflatten(range(treedef.num_leaves))
    records: dict[Any, list[_Entry | None]] = {}
    for leaf, (path, _) in enumerate(jax.tree_util.tree_leaves_with_path(numbered)):
        keys = [str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", "")))) for k in path]
        # A field of that name; in a state that was turned into dicts, a key.
        places = [i for i, key in enumerate(keys[:-2]) if key == "recorded"]
        fields = [i for i in places if str(path[i]) == ".recorded"]
        for at in fields[:1] or places[-1:]:
            records.setdefault(tuple(path[:at]), []).append(_entry(leaf, keys[at + 1 :]))
    return tuple(
        tuple(entry for entry in entries if entry) for entries in records.values() if any(entries)
    )


def _entry(leaf: int, keys: list[str]) -> _Entry | None:
    keys = keys[:-1] if keys[-1:] == ["value"] else keys  # of an nnx.Variable
    if len(keys) < 2 or keys[-1] not in FIELDS:
        return None
    *above, field = keys
    cuts = [i for i, key in enumerate(above) if i and above[i - 1] == PARTS and is_key(key)]
    name = above[: cuts[0] - 1] if cuts else above
    return _Entry(leaf, "/".join(name), tuple(above[cuts[0] + 1 :]) if cuts else (), field)


def _is_record(entries: Entries, leaves: list[Any]) -> bool:
    """Are they, by their sizes and kinds? Weights may have such names, and then their moments do."""

    def fits(entry: _Entry) -> bool:
        x, kind = leaves[entry.leaf], jnp.integer if entry.field in COUNTERS else jnp.inexact
        return shape_of(x)[-1:] == (len(FIELDS[entry.field]),) and jnp.issubdtype(x.dtype, kind)

    counted = any(entry.field in COUNTERS or entry.part for entry in entries)
    return counted and all(map(fits, entries))


@functools.lru_cache(maxsize=128)
def _named(records: tuple[Entries, ...]) -> list[tuple[str, int, int]]:
    """Each metric by its name, and which column of which leaf it is."""
    given = {entry.name for entries in records for entry in entries}
    taken: set[str] = set()
    found: dict[str, tuple[int, int]] = {}
    for entries in records:
        for name in dict.fromkeys(entry.name for entry in entries):
            each = _columns([entry for entry in entries if entry.name == name])
            free = next(
                new
                for new in itertools.chain([name], (f"{name}_{n}" for n in itertools.count(1)))
                if new not in (taken if new == name else taken | given)
                and not any(f"{new}/{key}" in found for key in each)
            )
            taken.add(free)
            found |= {f"{free}/{key}": place for key, place in each.items()}
    return [(key, *place) for key, place in found.items()]


def _columns(entries: Sequence[_Entry]) -> dict[str, tuple[int, int]]:
    """What one transform records, the counters last."""
    each = {
        "/".join([*entry.part, key]): (entry.leaf, column)
        for entry in entries
        for column, key in enumerate(FIELDS[entry.field])
    }
    return dict(sorted(each.items(), key=lambda item: item[0].rsplit("/", 1)[-1].startswith("steps")))


def _unpacked(packed: dict[int, Any]) -> dict[int, tuple[jax.Array, ...]]:
    """The columns of each array, by few programs and no transfer."""
    together: dict[Any, list[int]] = {}
    arrays = {i: jax.device_put(x) if isinstance(x, np.ndarray) else x for i, x in packed.items()}
    for i, x in arrays.items():
        together.setdefault(_place(x), []).append(i)
    columns: dict[int, tuple[jax.Array, ...]] = {}
    for place, leaves in together.items():
        for k in range(0, len(leaves), _AT_ONCE):
            some = leaves[k : k + _AT_ONCE]
            split = functools.partial(jax.eval_shape, _split) if place is None else _split
            columns |= zip(some, split([arrays[i] for i in some]), strict=True)
    return columns


def _place(x: Any) -> Any:
    """Where an array is, since a program takes those of the same devices; None for a shape alone."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return None
    return "traced" if is_traced(x) else x.sharding


@jax.jit
def _split(arrays: list[jax.Array]) -> list[tuple[jax.Array, ...]]:
    return [tuple(x[..., i] for i in range(x.shape[-1])) for x in arrays]
