"""Weights without an update, beside those that are trained, and what sets remember of both."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clip as oc

SCOPES = {
    "global": "global",
    "leaf": "leaf",
    "unit": "unit",
    "axes": (-2, -1),
    "a group each": oc.groups(lambda path, leaf: path),
    "a group for both": oc.groups(lambda path, leaf: "all"),
    "callable": lambda path, leaf: "unit" if path == "a" else "leaf",
}
SETS = {
    "sphere": lambda scope: oc.norm_sphere(oc.initial(), scope=scope),
    "shell": lambda scope: oc.norm_shell(oc.initial(0.5), oc.initial(), scope=scope),
    **{
        f"ball, {ord}": lambda scope, ord=ord: oc.norm_ball(oc.initial(), ord=ord, scope=scope)
        for ord in (1, 2, math.inf)
    },
}


def norm(name, x):
    order = {"ball, 1": 1, "ball, inf": math.inf}.get(name, 2)
    return np.linalg.norm(np.asarray(x, np.float64).ravel(), order)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", SETS)
def test_beside_frozen_weights_a_bound_is_that_of_its_own_weights(name, scope):
    # In every order a has the norm 20 and b the norm 2, and so have their only columns that are not 0.
    params = {"a": jnp.array([[0.0, 20.0]]), "b": jnp.array([[0.0, 0.0], [0.0, 2.0]])}
    tx = oc.project_weights(SETS[name](SCOPES[scope]))
    updates = {"a": None, "b": jnp.array([[0.0, 3.0], [0.0, 4.0]])}
    new, _ = tx.update(updates, tx.init(params), params)
    assert new["a"] is None
    assert norm(name, params["b"] + new["b"]) == pytest.approx(2.0, rel=1e-6)


def test_the_recipe_of_adamh_beside_frozen_weights():
    params = {"a": jnp.full((2, 2), 10.0), "b": jnp.eye(2)}
    scope = (-2, -1)
    tx = optax.chain(
        oc.normalize_by_norm(oc.relative_to_params(1.0, eps=0.0), scope=scope),
        optax.scale_by_learning_rate(0.5),
        oc.project_weights(oc.norm_sphere(oc.initial(), scope=scope)),
    )
    updates = {"a": None, "b": jnp.array([[0.0, 1.0], [1.0, 0.0]])}
    new, _ = jax.jit(tx.update)(updates, tx.init(params), params)
    # b - 0.5 |b| g / |g| = [[1, -0.5], [-0.5, 1]], of norm sqrt(2.5), back to the norm sqrt(2).
    expected = np.array([[1, -0.5], [-0.5, 1]]) * math.sqrt(2 / 2.5)
    np.testing.assert_allclose(params["b"] + new["b"], expected, rtol=1e-6)
