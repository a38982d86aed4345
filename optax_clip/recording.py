"""Read what happened out of an optimizer state."""

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from optax_clip._records import FIELDS, PARTS, RecordedState

__all__ = ["RecordedState", "metrics"]


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
        ``name_1``, then ``name_2``. Empty if there are none.

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
    if any(callable(x) for x in jax.tree.leaves(opt_state)):
        raise TypeError(
            f"Expected opt_state to be the state of a transform, got opt_state={opt_state!r}."
        )
    records: dict[Any, dict[str, dict[str, jax.Array]]] = {}
    for path, packed in jax.tree_util.tree_leaves_with_path(opt_state):
        keys = [str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", "")))) for k in path]
        # A field of that name; in a state that was turned into dicts, a key.
        places = [i for i, k in enumerate(path) if str(k) == ".recorded"]
        places += [i for i, key in enumerate(keys) if key == "recorded"]
        if places:
            at = places[0]
            owner = records.setdefault(tuple(path[:at]), {})
            for name, key, value in _unpacked(keys[at + 1 :], packed):
                owner.setdefault(name, {})[key] = value
    given = {name for record in records.values() for name in record}
    taken: set[str] = set()
    found: dict[str, jax.Array] = {}
    for record in records.values():
        for name, values in record.items():
            numbered = (f"{name}_{n}" for n in itertools.count(1))
            free = next(
                each
                for each in itertools.chain([name], numbered)
                if each not in (taken if each == name else taken | given)
                and not any(f"{each}/{key}" in found for key in values)
            )
            taken.add(free)
            counters_last = sorted(values, key=lambda key: key.rsplit("/", 1)[-1].startswith("steps"))
            found |= {f"{free}/{key}": values[key] for key in counters_last}
    return found


def _unpacked(keys: list[str], packed: Any) -> Iterator[tuple[str, str, jax.Array]]:
    """The name of the transform, and the key and value of each metric, of one packed entry."""
    keys = keys[:-1] if keys[-1:] == ["value"] else keys  # of an nnx.Variable
    if not keys or keys[-1] not in FIELDS or jnp.ndim(packed) == 0:
        return
    *above, field = keys
    at = above.index(PARTS) if PARTS in above else len(above)
    for i, key in enumerate(FIELDS[field]):
        yield "/".join(above[:at]), "/".join([*above[at + 1 :], key]), packed[..., i]
