"""Trees that mix weakly typed leaves, made of Python numbers, with others, on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_clip as oc
from registry import KINDS
from trees import types


def mixed(k, rank=0):
    """Of each shape a weak leaf and a strong one; more vectors than are summed at once."""
    weak = {"kernel": jnp.full((8, 4), k), "bias": jnp.full(4, k)}
    found = {"dense": weak, "half": jnp.full((8, 4), k, jnp.bfloat16)}
    found["out"] = jax.tree.map(lambda x: x.astype(x.dtype), weak)
    found["gates"] = [jnp.full(3, k) if i % 2 else jnp.full(3, k, jnp.float32) for i in range(10)]
    return found | ({} if rank else {"number": k, "scalar": jnp.asarray(k), "strong": jnp.float32(k)})


def strong(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), tree)


def as_they_are(tree):
    """Shapes and dtypes, whatever the weak types: what is not looked at passes through."""
    return jax.tree.map(lambda x: (x.shape, x.dtype), types(tree))


@pytest.mark.parametrize("row", KINDS, ids=lambda row: row.id)
def test_every_kind_takes_them(row):
    """Updates and state have the types of the strongly typed tree, so that nothing recompiles."""
    grads, params, tx = mixed(0.3, row.min_rank), mixed(0.7, row.min_rank), row.make()
    with jax.numpy_dtype_promotion(row.promotion):
        state = tx.init(params)
        updates, after = jax.eval_shape(tx.update, grads, state, params)
        wanted = jax.eval_shape(tx.update, strong(grads), state, strong(params))
    assert as_they_are(updates) == as_they_are(wanted[0])
    assert types(after) == types(wanted[1]) == types(state)


CLIPS = {
    "global": oc.clip_by_global_norm(0.5),
    "leaf": oc.clip_by_norm(0.5),
    "unit": oc.clip_by_norm(0.5, scope="unit"),
    "value": oc.clip_by_value(0.25),
    "ball": oc.project_weights(oc.norm_ball(1.0, scope="global")),
}


@pytest.mark.parametrize("name", CLIPS)
def test_numbers_of_the_strongly_typed_tree(name):
    """Twice: what the first step returns is what the second is given."""
    tx, step = CLIPS[name], jax.jit(CLIPS[name].update)
    grads, params = mixed(0.3), mixed(0.7)
    found, wanted = (grads, tx.init(params)), (strong(grads), tx.init(strong(params)))
    for _ in range(2):
        found, wanted = step(*found, params), step(*wanted, strong(params))
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
        assert metrics_of(found) == metrics_of(wanted)


def metrics_of(step):
    return {key: float(x) for key, x in oc.metrics(step[1]).items()}


@pytest.mark.parametrize("scope", ["global", "leaf", "unit"])
@pytest.mark.parametrize("way", ["default", "cpu"])
def test_norms_by_every_way(monkeypatch, way, scope):
    """3, 4 and 12 are 13 long: one weak leaf between two others of its shape."""

    def by_platform(*arrays, default, **ways):
        return ways.get(way, default)(*arrays)

    monkeypatch.setattr(oc._xla, "by_platform", by_platform)
    tree = {"a": jnp.full(1, 3.0), "b": jnp.full(1, 4.0, jnp.float32), "c": jnp.full(1, 12.0)}
    found = jax.jit(lambda t: oc.tree_norms(t, scope=scope))(tree)
    if scope == "global":
        assert float(found) == pytest.approx(13, rel=1e-6)
    else:
        assert [float(x.sum()) for x in jax.tree.leaves(found)] == pytest.approx([3, 4, 12], rel=1e-6)
