"""Where the rooms meet: dtypes that differ, limits of the parts, starts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_clip as oc


@pytest.mark.parametrize(
    "tx",
    [oc.clip_by_norm(1.0, nonfinite="local"), oc.clip_by_value(0.5)],
    ids=["local", "value"],
)
def test_large_leaves_of_two_dtypes(tx):
    with jax.enable_x64(True):
        grads = {
            "a": jnp.ones(70_000),
            "b": jnp.ones(70_001, jnp.float32),
            "c": jnp.ones(3, jnp.float32),
        }
        updates, state = tx.update(grads, tx.init(grads))
        got = oc.metrics(state)
    assert [x.dtype for x in updates.values()] == [x.dtype for x in grads.values()]
    assert float(got["clip/norm_before"]) == pytest.approx(140_004**0.5, rel=1e-6)
    assert float(got["clip/fraction"]) == 1


@pytest.mark.parametrize("constraint", [oc.box(-1.0, 1.0), oc.norm_ball(1.0, ord=1)], ids=repr)
def test_updates_in_another_dtype_than_the_weights(constraint):
    params, updates = jnp.full(4, 0.75, jnp.bfloat16), jnp.full(4, 0.5, jnp.float32)
    tx = oc.project_weights(constraint)
    landed, state = tx.update(updates, tx.init(params), params)
    assert landed.dtype == jnp.float32
    end = np.asarray(params, np.float64) + np.asarray(landed, np.float64)
    assert oc.violation(jnp.asarray(end, jnp.bfloat16), constraint) == 0
    assert float(oc.metrics(state)["project/fraction"]) == 1


def capped(columns, total, caps):
    """The projection of each column, by halving in float64."""
    low, high = columns.min(0) - np.max(caps) - total, columns.max(0)
    for _ in range(200):
        middle = (low + high) / 2
        more = np.clip(columns - middle, 0, caps).sum(0) > total
        low, high = np.where(more, middle, low), np.where(more, high, middle)
    return np.clip(columns - low, 0, caps)


@pytest.mark.parametrize("rows, spread", [(8, 0.1), (8, 0.01), (5, 1.0)])
def test_capped_simplexes_where_many_bends_meet(rows, spread):
    rng = np.random.default_rng(0)
    columns = np.float32(rng.integers(-10, 11, size=(rows, 2000)) * spread)
    caps = np.full((rows, 1), np.float32(2 / rows))
    constraint = oc.simplex(1.0, upper=jnp.asarray(caps), scope="unit")
    found = np.asarray(jax.jit(oc.project, static_argnums=1)(columns, constraint), np.float64)
    np.testing.assert_allclose(found, capped(np.float64(columns), 1.0, caps), atol=5e-7)
    assert np.all(found <= caps)


def test_capped_simplex_of_entries_that_nothing_reaches():
    columns = jnp.array([[-jnp.inf, 1.0, 2.0], [1e38, 1e38, 0.0], [3e38, 3e38, -3e38]]).T
    found = oc.project(columns, oc.simplex(1.0, upper=0.75, scope="unit"))
    want = [[0, 0.25, 0.75], [0.5, 0.5, 0], [0.5, 0.5, 0]]
    np.testing.assert_allclose(found.T, want, atol=1e-6)


@pytest.mark.parametrize(
    "constraint",
    [
        oc.norm_ball(oc.initial(0.0)),
        oc.norm_ball(oc.initial(0.0), ord=1),
        oc.norm_ball(oc.initial(0.0), ord=np.inf),
        oc.norm_sphere(oc.initial(0.0)),
        oc.init_box(0.0),
    ],
    ids=repr,
)
def test_nothing_of_the_start_is_nothing(constraint):
    params, updates = jnp.array([3.0, 4.0]), jnp.array([1.0, -1.0])
    tx = oc.project_weights(constraint)
    landed, _ = tx.update(updates, tx.init(params), params)
    assert (params + landed).tolist() == [0, 0]


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_keeps_its_gradient(broken):
    tx = oc.gradient_mapping(oc.box(-1.0, 1.0))
    params = jnp.array([broken, 1.0])
    grads = jnp.array([-2.0, -3.0])
    mapped, state = tx.update(grads, tx.init(params), params)
    assert mapped.tolist() == [-2, 0]
    assert float(oc.metrics(state)["mapping/fraction"]) == 0.5
