"""`project` and `violation` of some weights, for loops that call `update` without them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clip as oc

PARAMS = {"a": {"kernel": jnp.array([3.0, 4.0]), "bias": jnp.array([9.0])}, "b": jnp.array([0.0, 2.0])}
KERNELS = oc.where(lambda path, leaf: path.endswith("kernel"))
MASKS = {
    "tree": {"a": {"kernel": True, "bias": False}, "b": False},
    "callable": KERNELS,
    "numpy": {"a": {"kernel": np.bool_(True), "bias": jnp.array(False)}, "b": np.array(False)},
}
SETS = {
    "box": oc.box(-1.0, {"a": {"kernel": 2.5, "bias": 1.0}, "b": 1.0}),
    "sphere, global": oc.norm_sphere(1.0, scope="global"),
    "callable": lambda params: jax.tree.map(lambda x: x / 2, params),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", SETS)
def test_a_mask_does_what_optax_masked_does(name, mask):
    kernel = PARAMS["a"]["kernel"]
    alone = SETS[name] if name != "box" else oc.box(-1.0, 2.5)
    expected = {**PARAMS, "a": {**PARAMS["a"], "kernel": oc.project(kernel, alone)}}
    got = oc.project(PARAMS, SETS[name], mask=MASKS[mask])
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert oc.violation(PARAMS, SETS[name], mask=MASKS[mask]) == oc.violation(kernel, alone) > 0
    tx = optax.masked(oc.project_weights(SETS[name]), MASKS[mask])
    updates, _ = tx.update(optax.tree.zeros_like(PARAMS), tx.init(PARAMS), PARAMS)
    after = optax.apply_updates(PARAMS, updates)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), after, expected)


def test_a_mask_may_be_a_prefix_and_choose_all_or_nothing():
    half = oc.project(PARAMS, SETS["callable"], mask={"a": True, "b": False})
    assert half["a"]["bias"] == 4.5 and half["b"] is PARAMS["b"]
    whole = oc.project(PARAMS, SETS["callable"], mask=True)
    assert whole["b"][1] == 1.0
    assert oc.project(PARAMS, SETS["callable"], mask=False) is not None
    assert oc.violation(PARAMS, SETS["box"], mask=False) == 0


def test_a_jitted_step_without_weights_in_update():
    tx = optax.sgd(1.0)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state)
        return oc.project(optax.apply_updates(params, updates), oc.norm_ball(1.0), mask=KERNELS), state

    grads = jax.tree.map(jnp.ones_like, PARAMS)
    params, _ = step(PARAMS, tx.init(PARAMS), grads)
    np.testing.assert_allclose(params["a"]["kernel"], np.array([2, 3]) / 13**0.5, rtol=1e-6)
    assert params["a"]["bias"] == 8.0 and params["b"].tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("mask", [{"a": 1, "b": 0}, "kernel", {"a": oc.box(0.0, 1.0), "b": True}])
def test_a_mask_of_anything_but_bools(mask):
    for function in (oc.project, oc.violation):
        with pytest.raises(TypeError, match="mask"):
            function(PARAMS, oc.box(-1.0, 1.0), mask=mask)
