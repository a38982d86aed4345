"""Trees that the tests share, so that what runs eagerly compiles once, and ways to compare them."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np

from registry import BY_ID


def tree(seed, size=1.0):
    random = np.random.default_rng(seed)
    shapes = {"dense": {"kernel": (8, 4), "bias": (4,)}}
    return jax.tree.map(
        lambda shape: jnp.asarray(size * random.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


PARAMS = tree(0)
GRADS = [tree(seed, size) for seed, size in ((1, 2.0), (2, 0.01), (3, 3.0))]
STACKED = jax.tree.map(lambda *leaves: jnp.stack(leaves), *GRADS)


@functools.cache
def steps(row_id):
    """The updates and the state after each of the gradients, outside of jit."""
    row = BY_ID[row_id]
    tx, found = row.make(), []
    state = tx.init(PARAMS)
    with jax.numpy_dtype_promotion(row.promotion):
        for grads in GRADS:
            updates, state = tx.update(grads, state, PARAMS)
            found.append((updates, state))
    return found


def assert_close(actual, expected, rtol=3e-6, atol=1e-6):
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=atol)


def types(arrays):
    """Shape, dtype, weak type and explicit sharding of each leaf."""
    return jax.tree.map(jax.typeof, arrays)


def traced(function, *args):
    """The types of what a function returns, without compiling it."""
    return types(jax.eval_shape(function, *args))


def entry(stacked, i):
    return jax.tree.map(lambda x: x[i], stacked)


def with_paths(arrays):
    return jax.tree_util.tree_leaves_with_path(arrays)


def shardings(arrays):
    return [(jax.tree_util.keystr(path), x.sharding, x.ndim) for path, x in with_paths(arrays)]


def assert_same_shardings(before, after):
    for (path, old, ndim), (_, new, _) in zip(before, after, strict=True):
        assert new.is_equivalent_to(old, ndim), f"{path}: {old} became {new}"


def labels(kernel, bias):
    return {"dense": {"kernel": kernel, "bias": bias}}


def without_threshold(found):
    """The metrics that are finite on every finite step; a rule may set no limit in its warm-up."""
    return {key: x for key, x in found.items() if not key.endswith("threshold")}
