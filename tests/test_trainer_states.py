"""docs/states.md: the states of this package inside the rules of trainers that nobody here wrote."""

import copy
import functools
import pickle

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P

from optax_clip import (
    RecordedState,
    clip_by_global_norm,
    metrics,
    skip_spikes,
)
from test_readme import CODE


@functools.cache
def page(heading):
    names = {"__name__": "__main__"}
    with jax.numpy_dtype_promotion("standard"):
        exec(CODE[f"states: {heading}"], names)
    return names


# --- Shardings ------------------------------------------------------------------------------------

OF_ADAM = {"dense": {"bias": P(), "kernel": P("fsdp")}}


def by_kind(specs):
    """The specs of Adam's moments, and the set of all others."""
    adam = optax.tree.get(specs, "ScaleByAdamState")
    others = jax.tree.map(
        lambda x: None if isinstance(x, optax.ScaleByAdamState) else x,
        specs,
        is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState),
    )
    return (adam.mu, adam.nu), set(jax.tree.leaves(others))


@pytest.mark.parametrize("name", ["by_type", "by_path"])
def test_specs(name):
    """Moments like the weights, all else whole, though paths of records end like those of kernels."""
    assert by_kind(page("Shardings by type and by path")[name]) == ((OF_ADAM, OF_ADAM), {P()})


def test_placed():
    found = page("Shardings by type and by path")
    assert jax.tree.map(lambda x: x.sharding, found["placed"]) == found["shardings"]


def test_a_rule_for_a_type_of_state():
    """T5X's: states are told by their type, and each has a function of its own."""
    found = page("Shardings by type and by path")
    rules = {
        RecordedState: lambda state, axes: found["recorded_state"](state, axes, derive),
        optax.ScaleByAdamState: lambda state, axes: optax.ScaleByAdamState(None, axes, axes),
        optax.EmptyState: lambda state, axes: state,
    }

    def derive(state, axes):
        known = lambda x: type(x) in rules  # noqa: E731
        return jax.tree.map(lambda x: rules[type(x)](x, axes), state, is_leaf=known)

    axes = derive(found["state"], OF_ADAM)
    assert by_kind(axes) == ((OF_ADAM, OF_ADAM), set())
    as_none = functools.partial(jax.tree.structure, is_leaf=lambda x: x is None)
    assert as_none(axes) == as_none(jax.tree.map(lambda x: None, found["state"]))


# --- What wraps -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("standard_promotion")
def test_attributes_of_what_is_inside():
    accumulated = optax.MultiSteps(optax.sgd(0.5), 2)
    tx = skip_spikes(accumulated.gradient_transformation(), 10.0)
    params = jnp.ones(2)
    state = tx.init(params)
    for steps in (0, 1):
        assert not accumulated.has_updated(state)
        _, state = tx.update(params, state, params)
        assert (state.mini_step, state.gradient_step) == ((1, 0), (0, 1))[steps]
    assert accumulated.has_updated(state)
    inner = optax.inject_hyperparams(optax.sgd)(learning_rate=0.25)
    state = skip_spikes(optax.chain(inner, optax.identity()), 10.0).init(params)
    assert state.inner_state[0].hyperparams["learning_rate"] == 0.25
    state = skip_spikes(skip_spikes(inner, 5.0), 10.0).init(params)
    assert state.hyperparams is state.inner_state.inner_state.hyperparams


def test_attributes_that_nothing_has():
    state = skip_spikes(optax.sgd(0.5), 10.0).init(jnp.ones(2))
    for one in (state, clip_by_global_norm(1.0).init(jnp.ones(2))):
        assert not hasattr(one, "gradient_step") and not hasattr(one, "__jax_array__")
        for other in (copy.deepcopy(one), copy.copy(one), pickle.loads(pickle.dumps(one))):
            assert type(other) is RecordedState
            assert jax.tree.structure(other) == jax.tree.structure(one)


# --- Averages -------------------------------------------------------------------------------------


def test_what_a_clip_by_leaf_left_of_the_whole():
    """One of two leaves is cut from 5 to 1: sqrt(1 + 0.25) of sqrt(25 + 0.25)."""
    found = page("Averages of what is logged")
    assert float(found["left"]) == pytest.approx((1.25 / 25.25) ** 0.5, rel=1e-6)


def test_a_schedule_resumed():
    found = page("Checkpoints and resumed schedules")
    said = metrics(found["state"])
    assert said["clip/threshold"] == 0.5
    assert said["project/fraction"] == 0  # the 501st step is not the 510th
