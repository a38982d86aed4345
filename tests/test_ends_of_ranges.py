"""Huge entries, states of zeros, and no NaN on the way to a finite result."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clip as oc

MATRIX = jnp.array([[3.0, 0.0], [0.0, 0.5]])


@pytest.mark.parametrize("nonfinite", ["propagate", "zero"])
def test_no_nan_is_made_of_finite_gradients(nonfinite):
    tx = oc.clip_singular_values(1.0, nonfinite=nonfinite)
    with jax.debug_nans(True):
        updates, _ = tx.update(MATRIX, tx.init(MATRIX))
    np.testing.assert_allclose(updates, [[1.0, 0.0], [0.0, 0.5]], atol=1e-6)


@pytest.mark.parametrize("nonfinite, expected", [("propagate", np.nan), ("zero", 0.0)])
def test_the_policy_for_singular_values(nonfinite, expected):
    tx = oc.clip_singular_values(1.0, nonfinite=nonfinite)
    updates, _ = tx.update(MATRIX.at[0, 0].set(jnp.inf), tx.init(MATRIX))
    np.testing.assert_array_equal(updates, np.full((2, 2), expected))


@pytest.mark.parametrize("radius", [1.0, oc.initial(0.5)], ids=["number", "initial"])
def test_power_iterations_go_on_from_zeros_as_from_a_new_state(radius):
    tx = oc.project_weights(oc.spectral_ball(radius, power_iterations=1))
    params = jnp.stack([MATRIX, 2 * MATRIX])
    state = tx.init(params)
    vectors = [x for x in jax.tree.leaves(state.memory) if x.shape == (2, 1, 2)]
    assert len(vectors) == 1
    reset = jax.tree.map(lambda x: jnp.zeros_like(x) if x.shape == (2, 1, 2) else x, state)
    update = jax.jit(tx.update)
    for _ in range(2):
        new, state = update(params, state, params)
        again, reset = update(params, reset, params)
        assert (again == new).all() and (optax.apply_updates(params, new) != 2 * params).any()
        jax.tree.map(np.testing.assert_array_equal, state, reset)


@pytest.mark.parametrize("total", [1.0, 1e30, 3e38])
@pytest.mark.parametrize(
    "x",
    [[1e38, 2e38, 3e38], [1e38] * 3, [-3e38] * 3, [3e38, -3e38, 1.0], [-np.inf, 3e38, 3e38], [0.0] * 3],
    ids=str,
)
def test_huge_entries_and_totals_of_a_simplex(x, total):
    given = jnp.asarray(x, jnp.float32)
    x = np.asarray(given, np.float64) - float(
        given.max()
    )  # or float64 would not see a total of 1 either
    theta = max((np.sort(x)[::-1][:k].sum() - total) / k for k in (1, 2, 3))
    got = oc.project(given, oc.simplex(total))
    np.testing.assert_allclose(got, np.maximum(x - theta, 0), rtol=1e-5, atol=total * 1e-6)
