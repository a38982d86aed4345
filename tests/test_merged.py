"""Where the rooms meet: dtypes that differ, limits of the parts, starts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clip as oc


@pytest.mark.parametrize(
    "tx",
    [oc.clip_by_norm(1.0, nonfinite="local"), oc.clip_by_value(0.5)],
    ids=["local", "value"],
)
def test_large_leaves_of_two_dtypes(tx):
    with jax.enable_x64(True):
        grads = {"a": jnp.ones(70_000), "b": jnp.ones(70_001, jnp.float32), "c": jnp.ones(3, jnp.float32)}
        updates, state = tx.update(grads, tx.init(grads))
        got = oc.metrics(state)
    assert [x.dtype for x in updates.values()] == [x.dtype for x in grads.values()]
    assert float(got["clip/norm_before"]) == pytest.approx(140_004**0.5, rel=1e-6)
    assert float(got["clip/fraction"]) == 1


@pytest.mark.parametrize("constraint", [oc.box(-1.0, 1.0), oc.norm_ball(1.0, ord=1)], ids=repr)
def test_updates_in_another_dtype_than_the_weights(constraint):
    params, updates = jnp.full(4, 0.75, jnp.bfloat16), jnp.full(4, 0.5, jnp.float32)
    tx = oc.project_weights(constraint)
    landed, state = tx.update(updates, tx.init(params), params)
    assert landed.dtype == jnp.float32
    end = np.asarray(params, np.float64) + np.asarray(landed, np.float64)
    assert oc.violation(jnp.asarray(end, jnp.bfloat16), constraint) == 0
    assert float(oc.metrics(state)["project/fraction"]) == 1
