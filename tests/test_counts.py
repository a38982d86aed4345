"""Counters are called `count`, so that Optax's tools resume schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_clip import (
    box,
    clip_by_global_norm,
    clip_by_norm,
    clip_by_value,
    clip_singular_values,
    groups,
    metrics,
    normalize_by_norm,
    project_weights,
    skip_spikes,
    zscore,
)


def limit(step):
    """8 at first, and 2 from step 500 on: a clip that starts anew is seen."""
    return jnp.where(step >= 500, 2.0, 8.0)


GRADS = {"a": jnp.full((2, 2), 2.0), "b": jnp.full(4, 2.0)}  # of norm 4 each
BY_NAME = groups(lambda path, x: path)
SCHEDULED = {
    "global": (clip_by_global_norm(limit), 2.0),
    "unit": (clip_by_norm(limit, scope="unit"), 2.0),
    "groups": (clip_by_norm(limit, scope=BY_NAME), 2.0),
    "a table": (clip_by_norm({"a": limit, "b": 5.0}, scope=BY_NAME), 2.0),
    "beside a rule": (clip_by_norm({"a": limit, "b": zscore(2.0)}, scope=BY_NAME), 2.0),
    "normalize": (normalize_by_norm(limit), 2.0),
    "singular values": (clip_singular_values(limit), 2.0),
    "value": (clip_by_value(limit), 2.0),
    "skip": (skip_spikes(optax.sgd(1.0), limit), 2.0),
}


@pytest.mark.parametrize("case", SCHEDULED.values(), ids=SCHEDULED)
def test_a_schedule_goes_on_where_it_is_set(case):
    tx, expected = case
    first = tx.init(GRADS)
    for state, wanted in ((first, 8.0), (optax.tree_utils.tree_set(first, count=500), expected)):
        _, new = tx.update(GRADS, state, GRADS)
        found = [float(x) for k, x in metrics(new).items() if k.endswith("/threshold")]
        assert wanted in found
        assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, first)


def test_the_limit_on_the_loss():
    tx = skip_spikes(optax.sgd(1.0), 100.0, value_rule=limit)
    state = optax.tree_utils.tree_set(tx.init(GRADS), count=jnp.int32(500))
    _, state = tx.update(GRADS, state, GRADS, value=3.0)
    assert metrics(state)["skip/value_threshold"] == 2
    assert metrics(state)["skip/steps_skipped"] == 1


def test_every():
    """Of 3: from a count of 500 the next step is the 501st, which is due."""
    tx, params = project_weights(box(-1.0, 1.0), every=3), jnp.full(2, 5.0)
    state = tx.init(params)
    for count, due in ((None, False), (500, True), (501, False)):
        given = state if count is None else optax.tree_utils.tree_set(state, count=count)
        updates, new = tx.update(jnp.zeros(2), given, params)
        np.testing.assert_array_equal(updates, [-4, -4] if due else [0, 0])
        assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)


@pytest.mark.usefixtures("standard_promotion")
def test_all_counts_of_a_chain_at_once():
    tx = optax.chain(clip_by_global_norm(limit), optax.adam(limit), project_weights(box(0, 1), every=2))
    state = optax.tree_utils.tree_set(tx.init(GRADS), count=jnp.int32(500))
    counts = [int(x) for _, x in optax.tree_utils.tree_get_all_with_path(state, "count")]
    assert counts == [500] * 4
    _, state = tx.update(GRADS, state, GRADS)
    assert [int(x) for _, x in optax.tree_utils.tree_get_all_with_path(state, "count")] == [501] * 4
