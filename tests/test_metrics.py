"""`metrics` outside of jit: as cheap as jitted, on whatever holds a state; and whose numbers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from optax_clip import (
    clip_by_norm,
    groups,
    metrics,
    project_weights,
    record_norms,
    recording,
    skip_spikes,
)
from registry import ROWS

PARAMS = {"dense": {"kernel": jnp.full((2, 2), 0.5), "bias": jnp.zeros(2)}}
GRADS = jax.tree.map(lambda x: x + 2.0, PARAMS)
TX = optax.chain(clip_by_norm(1.0, record="scopes"), optax.trace(0.9), record_norms())


@pytest.fixture(scope="module")
def state():
    return TX.update(GRADS, TX.init(PARAMS), PARAMS)[1]


def test_no_transfer_and_no_operation_of_its_own(state):
    expected = metrics(state)
    assert expected["clip/dense/bias/norm_before"] == pytest.approx(8**0.5)
    with jax.transfer_guard("disallow"), jax.log_compiles(False):
        found = metrics(state)
        held = metrics(jax.tree.map(np.asarray, state))
    chex.assert_trees_all_equal(found, expected)
    chex.assert_trees_all_equal(held, expected)
    assert all(isinstance(x, jax.Array) for x in held.values())


def test_few_programs_whatever_the_number_of_leaves(monkeypatch):
    """Some arrays at once: an operation a number took a tenth of a second for a hundred leaves."""
    calls = []
    split = recording._split
    monkeypatch.setattr(recording, "_split", lambda xs: calls.append(len(xs)) or split(xs))
    params = {f"l{i}": jnp.ones(()) for i in range(100)}
    assert len(metrics(clip_by_norm(1.0, record="scopes").init(params))) == 7 + 3 * 100
    assert sorted(calls) == [38, 64]  # 100 of leaves, norms and counts


def test_the_plan_is_made_once(state):
    metrics(state)
    before = recording._found.cache_info().misses, recording._named.cache_info().misses
    metrics(jax.tree.map(lambda x: x + 1, state))
    assert before == (recording._found.cache_info().misses, recording._named.cache_info().misses)


def test_shapes_alone(state):
    expected = jax.tree.map(lambda x: (x.shape, x.dtype), metrics(state))
    for found in (metrics(jax.eval_shape(lambda: state)), jax.eval_shape(metrics, state)):
        assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == expected


def test_stacked(state):
    """Of many runs at once each metric is a vector."""
    both = jax.tree.map(lambda *x: jnp.stack(x), state, state)
    assert {key: x.shape for key, x in metrics(both).items()} == dict.fromkeys(metrics(state), (2,))


def test_a_container_that_does_not_hash(state):
    class Held:
        def __init__(self, inside):
            self.inside = inside

    jax.tree_util.register_pytree_node(Held, lambda x: ((x.inside,), [1]), lambda _, x: Held(*x))
    assert metrics(Held(state)).keys() == metrics(state).keys()


# --- Whose numbers --------------------------------------------------------------------------------

WEIGHTS = {
    "norms": {"recorded": {"norms": jnp.ones(4), "counts": jnp.ones(3)}},
    "deeper": {"recorded": {"x": {"norms": jnp.ones(4), "counts": jnp.ones(3)}}},
    "part": {"recorded": {"x": {"by_part": {"updates": jnp.ones(1)}}}},
}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("params", WEIGHTS.values(), ids=WEIGHTS)
def test_weights_that_are_called_like_a_record(params):
    """Their moments are no metrics, in Optax's states and in dicts."""
    tx = optax.chain(clip_by_norm(1.0), optax.adam(0.1))
    state = tx.init(params)
    assert {key.split("/")[0] for key in metrics(state)} == {"clip"}
    assert metrics(state[1]) == metrics(params) == {}
    pure = nnx.to_pure_dict(nnx.state(nnx.Dict(a=nnx.data(jax.tree.map(nnx.Param, params)))))
    assert metrics({"weights": pure, "state": state}).keys() == metrics(state).keys()


@pytest.mark.parametrize(
    "name",
    ["by_part", "recorded", "memory", "value", "norms", "a/by_part", "a//b", "/", "of_1_leaves", "é .*"],
)
def test_any_name(name):
    tx = clip_by_norm(1.0, name=name, scope=groups(lambda path, x: "by_part"))
    _, state = jax.jit(tx.update)(GRADS, tx.init(PARAMS), PARAMS)
    found = metrics(state)
    assert {key.removeprefix(f"{name}/") for key in found} == {
        *("norm_before", "norm_after", "threshold", "fraction", "steps", "steps_clipped"),
        *("steps_nonfinite", "by_part/norm_before", "by_part/norm_after", "by_part/threshold"),
    }
    assert all(key.startswith(f"{name}/") for key in found)


def test_an_empty_name():
    with pytest.raises(TypeError, match="name to be a non-empty string"):
        clip_by_norm(1.0, name="")


# --- What does not apply --------------------------------------------------------------------------

REPORTS = [row for row in ROWS if row.factory in (project_weights, record_norms, skip_spikes)]


@pytest.mark.parametrize("row", REPORTS, ids=lambda row: row.id)
def test_nothing_is_nan_after_a_finite_step(row):
    """Copies of a state on two devices compare equal then."""
    with jax.numpy_dtype_promotion(row.promotion):
        tx = row.make()
        _, state = tx.update(jax.tree.map(jnp.zeros_like, PARAMS), tx.init(PARAMS), PARAMS)
    assert not any(np.isnan(x) for x in metrics(state).values())
