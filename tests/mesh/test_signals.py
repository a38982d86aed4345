"""Signals for QK-Clip that lie on several devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_clip import metrics, qk_clip
from test_rescaling import TAU, a_step, apply, root


@pytest.mark.parametrize("check_vma", [True, False])
def test_maximum_over_devices(check_vma):
    """Two devices, each with another part of the batch; and two with other heads."""
    mesh = jax.make_mesh((2, 2), ("data", "heads"), axis_types=(AxisType.Auto,) * 2)
    params, grads = a_step("float32", "float32")
    logits = jnp.array([[4 * TAU, 1.0, 2.0, 3.0], [5.0, 2 * TAU, 1.0, 1.0]])
    tx = qk_clip(root, max_logit=TAU, axis_name="data", record=False)

    def step(params, grads, logits):
        return tx.update(grads, tx.init(params), params, max_logits=logits[0])[0]

    spec = P(None, "heads")
    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=(spec, spec, P("data", "heads")), out_specs=spec, check_vma=check_vma
    )
    updates = jax.jit(mapped)(params, grads, logits)
    _, expected, _ = apply(qk_clip(root, max_logit=TAU), params, grads, max_logits=logits.max(axis=0))
    np.testing.assert_allclose(updates["q"], expected["q"], rtol=1e-6, atol=1e-6)


def test_metrics_over_devices():
    mesh = jax.make_mesh((4,), ("heads",), axis_types=(AxisType.Auto,))
    params, grads = a_step("float32", "float32")
    tx = qk_clip(root, max_logit=TAU)

    def step(params, grads, logits):
        return metrics(tx.update(grads, tx.init(params), params, max_logits=logits)[1])

    spec = P(None, "heads")
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(spec, spec, P("heads")), out_specs=P())
    found = jax.jit(mapped)(params, grads, jnp.array([1.0, jnp.nan, 50.0, 2.0]))
    assert found["qk_clip/fraction"] == 0.25
    assert found["qk_clip/steps_nonfinite"] == 1


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_heads_on_a_mesh(kind):
    mesh = jax.make_mesh((4,), ("heads",), axis_types=(kind,))
    params, grads = a_step("float32", "float32")
    logits = jnp.array([1.0, 2.0, 50.0, 70.0])
    tx = qk_clip(root, max_logit=TAU)
    new, _, _ = apply(tx, params, grads, max_logits=logits)
    params, grads = jax.device_put((params, grads), NamedSharding(mesh, P(None, "heads")))
    logits = jax.device_put(logits, NamedSharding(mesh, P("heads")))
    split = qk_clip(lambda p, leaf, eta: jnp.sqrt(eta)[None, :, None], max_logit=TAU)
    got, _, state = apply(split, params, grads, max_logits=logits)
    np.testing.assert_array_equal(got["q"], new["q"])
    assert got["q"].sharding.is_equivalent_to(params["q"].sharding, 3)
    assert metrics(state)["qk_clip/max_logit"] == 70
