"""Every row behind an optimizer in one program, where no update comes from outside: as run eagerly."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_clip import box, metrics, project_weights
from registry import ROWS

OPTIMIZERS = {"sgd": optax.sgd(0.1), "adam": optax.adam(0.1)}
N = 1000
RANDOM = np.random.default_rng(0)
PARAMS = {
    "kernel": jnp.asarray(RANDOM.normal(size=(25, 40)), jnp.float32),
    "bias": jnp.linspace(-2.0, 2.0, 40),
}
GRADS = jax.tree.map(lambda x: jnp.asarray(RANDOM.normal(size=x.shape), jnp.float32), PARAMS)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_jitted_is_eager_behind_an_optimizer(row):
    """Both optimizers in one program: sums, shares and counters as well as weights."""
    chains = [optax.chain(optimizer, row.make()) for optimizer in OPTIMIZERS.values()]

    def step(params, grads, states):
        ended = []
        for tx, state in zip(chains, states, strict=True):
            updates, state = tx.update(grads, state, params)
            ended.append((optax.apply_updates(params, updates), state))
        return ended

    states = [tx.init(PARAMS) for tx in chains]
    eager, jitted = step(PARAMS, GRADS, states), jax.jit(step)(PARAMS, GRADS, states)
    chex.assert_trees_all_close(jitted, eager, rtol=1e-5, atol=max(row.atol, 1e-5))


@pytest.mark.parametrize("size", [1, 64, N, 4096, 5000])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_share_of_a_box(name, size, standard_promotion):
    """The share of weights at 1, counted by NumPy; and a box that holds all has none."""
    w = jnp.asarray(np.random.default_rng(1).normal(size=size), jnp.float32)
    gradient = jnp.zeros_like(w)

    def step(constraint):
        tx = optax.chain(OPTIMIZERS[name], project_weights(constraint))
        return metrics(jax.jit(tx.update)(gradient, tx.init(w), w)[1])

    outside = np.abs(np.asarray(w, np.float64)) > 1
    found = step(box(-1.0, 1.0))
    np.testing.assert_allclose(found["project/fraction"], outside.mean(), rtol=1e-6)
    assert step(box(-100.0, 100.0))["project/fraction"] == 0
