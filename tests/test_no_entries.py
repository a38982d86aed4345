"""Trees whose only leaf has no entries, and so no unit, in every scope."""

import math

import jax
import jax.numpy as jnp
import pytest

import optax_clip as oc

SCOPES = {
    "leaf": "leaf",
    "unit": "unit",
    "axes": (0,),
    "by unit": lambda path, leaf: "unit",
    "each entry": lambda path, leaf: (),
    "group": oc.groups(lambda path, leaf: "all"),
}


def made(scope):
    yield oc.clip_by_norm(1.0, scope=scope)
    yield oc.clip_by_norm(oc.zscore(1.0), scope=scope)
    yield oc.adaptive_grad_clip(0.1, scope=scope)
    for constraint in (
        oc.norm_sphere(1.0, scope=scope),
        oc.norm_shell(oc.initial(0.5), oc.initial(), scope=scope),
        oc.norm_ball(1.0, ord=1, scope=scope),
        oc.norm_ball(1.0, ord=math.inf, scope=scope),
        oc.simplex(1.0, scope=scope),
    ):
        yield oc.project_weights(constraint)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("shape", [(3, 0), (0, 3)], ids=str)
def test_a_leaf_without_entries_passes_through(scope, shape):
    params = {"a": jnp.zeros(shape)}
    for tx in made(SCOPES[scope]):
        state = tx.init(params)
        updates, after = jax.eval_shape(tx.update, params, state, params)
        assert updates["a"].shape == shape
        assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)


@pytest.mark.parametrize("scope", ["by unit", "each entry"])
def test_norms_of_no_scope_are_none(scope):
    assert oc.tree_norms({"a": jnp.zeros((3, 0))}, scope=SCOPES[scope])["a"].size == 0


def test_the_ball_of_order_inf_by_groups():
    ball = oc.norm_ball(2.0, ord=math.inf, scope=oc.groups(lambda path, leaf: "all"))
    assert oc.project([jnp.array([3.0, -1.0])], ball)[0].tolist() == [2.0, -1.0]
