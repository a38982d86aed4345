"""What docs/switching.md says of DreamerV3 and of constraints by layer, from their formulas in NumPy."""

import jax.numpy as jnp
import numpy as np

import optax_clip as oc


def clip_by_agc(update, param, clip, pmin=1e-3):
    """`embodied/jax/opt.py`: each leaf on its own."""
    upper = clip * max(pmin, np.linalg.norm(np.asarray(param, np.float64)))
    size = np.linalg.norm(np.asarray(update, np.float64))
    return np.asarray(update, np.float64) / max(1.0, size / upper)


def test_the_clip_of_dreamer_is_agc_by_leaf():
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(3, 4)), "bias": np.zeros(4), "small": rng.normal(size=2)}
    params = {key: jnp.asarray(x, jnp.float32) for key, x in params.items()}
    updates = {key: x * 0.1 + (0.0 if key == "small" else 2.0) for key, x in params.items()}
    tx = oc.adaptive_grad_clip(0.3, scope="leaf")
    clipped, _ = tx.update(updates, tx.init(params), params)
    for key, x in params.items():
        np.testing.assert_allclose(clipped[key], clip_by_agc(updates[key], x, 0.3), rtol=1e-6)
    assert (clipped["small"] == updates["small"]).all()


def test_a_projection_of_one_weight_is_a_constraint_of_a_layer():
    w = jnp.array([[3.0, 0.3], [4.0, 0.4]])
    constrained = oc.project(w, oc.norm_ball(2.0, scope="unit"))
    # Of a unit-wise maximum of 2: the first column has the norm 5, the second 0.5.
    np.testing.assert_allclose(constrained, [[1.2, 0.3], [1.6, 0.4]], rtol=1e-6)
