"""`violation` speaks of weights as they are stored, also in the program that made them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_clip import box, norm_ball, project_weights, simplex, violation


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_right_after_an_update(dtype):
    """What XLA keeps of a sum in 32 bits is not in the array, and would read as a violation."""
    limit = 0.1
    tx = project_weights(box(-limit, limit))
    p, u = (jax.random.normal(jax.random.key(i), (64, 64)).astype(dtype) for i in range(2))

    @jax.jit
    def step(p, u):
        updates, _ = tx.update(u, tx.init(p), p)
        new = optax.apply_updates(p, updates)
        return new, violation(new, box(-limit, limit))

    new, found = step(p, u)
    outside = np.abs(np.asarray(new, np.float64)).max() - limit
    assert outside <= 0 and found == 0
    assert violation(jnp.full(2, 0.5, dtype), box(-0.25, 0.25)) == 0.25


@pytest.mark.parametrize(
    "bounded",
    [box(-2.0, 2.0), norm_ball(1.0), norm_ball(1.0, ord=math.inf), norm_ball(1.0, ord=1), simplex()],
)
def test_one_nan_among_thousands(bounded):
    """A CPU's maximum drops it."""
    assert np.isnan(violation({"a": jnp.ones(5000).at[2331].set(jnp.nan), "b": jnp.ones(3)}, bounded))
