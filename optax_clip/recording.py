"""Read what happened out of an optimizer state."""

import itertools
from typing import Any

import jax

__all__ = ["metrics"]


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
        `project_weights` ``{name}/distance``, ``fraction`` and ``steps``, for `mask_outward` the last
        two. Of two transforms with one name the later one is called ``name_1``, then
        ``name_2``. Empty if there are none.

    Examples:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from optax_clip import clip_by_global_norm, metrics
        >>> tx = optax.chain(clip_by_global_norm(1.0), optax.sgd(0.1))
        >>> params = jnp.zeros(2)
        >>> _, state = tx.update(jnp.array([3.0, 4.0]), tx.init(params), params)
        >>> for key, value in metrics(state).items():
        ...     print(key, value)
        clip/fraction 1.0
        clip/norm_after 1.0
        clip/norm_before 5.0
        clip/steps 1
        clip/steps_clipped 1
        clip/steps_nonfinite 0
        clip/threshold 1.0
    """
    records: dict[Any, dict[str, dict[str, jax.Array]]] = {}
    for path, value in jax.tree_util.tree_leaves_with_path(opt_state):
        keys = [str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", "")))) for k in path]
        for i, (field, full) in enumerate(itertools.pairwise(keys)):
            if field == "recorded" and "/" in full:
                name, key = full.rsplit("/", 1)
                records.setdefault(tuple(path[: i + 1]), {}).setdefault(name, {})[key] = value
    found: dict[str, jax.Array] = {}
    taken: set[str] = set()
    for record in records.values():
        for name, values in record.items():
            free, n = name, 0
            while free in taken:
                n += 1
                free = f"{name}_{n}"
            taken.add(free)
            found |= {f"{free}/{key}": value for key, value in values.items()}
    return found
