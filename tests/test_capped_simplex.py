"""The simplex with a cap against bisection in float64, and how weights land in it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.constrained import exact_capped
from optax_clip import project, project_weights, simplex, violation


@pytest.mark.parametrize(
    ("n", "total", "upper", "offset"),
    [(5, 1, 0.3, 0), (5, 1, 0.2, 0), (3, 1, 1 / 3, 0), (64, 1, 0.1, 1e3), (1000, 10, 0.05, 0)],
)
def test_against_bisection(n, total, upper, offset):
    x = (np.random.default_rng(n).normal(size=n) + offset).astype(np.float32)
    constraint = simplex(float(total), upper=upper)
    y = np.asarray(project(jnp.asarray(x), constraint), np.float64)
    eps = np.finfo(np.float32).eps
    np.testing.assert_allclose(y, exact_capped(np.float64(x), total, upper), atol=4 * eps * total)
    assert abs(y.sum() - total) <= 4 * eps * total
    assert y.min() >= 0 and y.max() <= upper
    again = project(jnp.asarray(y, jnp.float32), constraint)
    np.testing.assert_array_equal(again, np.float32(y))


def test_caps_and_scopes():
    """A cap for each entry, a distribution for each row."""
    caps = np.array([0.1, 0.2, 0.9, np.inf])
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    y = np.asarray(project({"w": jnp.asarray(x)}, simplex(1.0, upper=caps, scope=(1,)))["w"])
    for row, found in zip(np.float64(x), y, strict=True):
        np.testing.assert_allclose(found, exact_capped(row, 1.0, np.minimum(caps, 1)), atol=1e-6)
    both = project({"a": jnp.zeros(6), "b": jnp.ones(4)}, simplex(1.0, upper=0.2, scope="global"))
    np.testing.assert_allclose(both["b"], 0.2, rtol=1e-6)
    assert float(both["a"].sum() + both["b"].sum()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_lands(dtype):
    """Never above the cap after `apply_updates`, and the sum within 4 eps."""
    random = np.random.default_rng(0)
    cap = jnp.asarray(np.float64(0.3)).astype(dtype)
    constraint = simplex(1.0, upper=0.3)
    tx = project_weights(constraint)
    step = jax.jit(tx.update)
    weights = project(jnp.asarray(random.random(8), dtype), constraint)
    state = tx.init(weights)
    for _ in range(20):
        updates, state = step(jnp.asarray(0.2 * random.normal(size=8), dtype), state, weights)
        weights = optax.apply_updates(weights, updates)
        wide = np.asarray(weights, np.float64)
        assert wide.max() <= min(float(cap), 0.3)
        assert wide.min() >= 0
        assert abs(wide.sum() - 1) <= 4 * float(jnp.finfo(dtype).eps)


def test_violation_sees_the_cap():
    weights = jnp.array([0.5, 0.25, 0.25])
    assert violation(weights, simplex(1.0)) == 0
    assert float(violation(weights, simplex(1.0, upper=0.4))) == pytest.approx(0.1, abs=1e-6)


@pytest.mark.parametrize("scope", ["leaf", "unit", "global"])
def test_no_room(scope):
    with pytest.raises(ValueError, match=r"upper=0\.1 and total=1\.0"):
        project({"w": jnp.zeros((5, 1))}, simplex(1.0, upper=0.1, scope=scope))


def test_derivative():
    """Of the entries between the bounds: each less the mean of them."""
    x = jnp.array([0.9, 0.5, 0.3, -2.0])  # 0.4, 0.4, 0.2, 0 with a cap of 0.4
    jacobian = jax.jacobian(lambda x: project(x, simplex(1.0, upper=0.4)))(x)
    np.testing.assert_allclose(project(x, simplex(1.0, upper=0.4)), [0.4, 0.4, 0.2, 0], atol=1e-6)
    np.testing.assert_allclose(jacobian, np.zeros((4, 4)), atol=1e-6)
    x = jnp.array([0.9, 0.35, 0.3, -2.0])  # 0.4, 0.325, 0.275, 0
    jacobian = jax.jacobian(lambda x: project(x, simplex(1.0, upper=0.4)))(x)
    wanted = np.zeros((4, 4))
    wanted[1:3, 1:3] = [[0.5, -0.5], [-0.5, 0.5]]
    np.testing.assert_allclose(jacobian, wanted, atol=1e-6)


def test_where_the_caps_alone_fill_the_total_nothing_moves():
    """At a vertex each entry is at 0 or at its cap, so all derivatives are 0."""
    x = jnp.array([0.8, -0.7])
    for jit in (jax.jit, lambda f: f):
        point = jit(lambda x: project(x, simplex(1.0, upper=1.0)))
        np.testing.assert_array_equal(point(x), [1, 0])
        np.testing.assert_array_equal(jax.jacobian(point)(x), np.zeros((2, 2)))


def test_the_right_sum_above_a_cap_is_not_in_the_set():
    constraint = simplex(1.0, upper=0.625)
    np.testing.assert_array_equal(project(jnp.array([0.875, 0.125]), constraint), [0.625, 0.375])
    np.testing.assert_array_equal(project(jnp.array([0.5, 0.5]), constraint), [0.5, 0.5])


def test_no_entry_lands_above_its_cap():
    """Of weights far above it the nearest update misses the cap by a rounding, on either side."""
    random = np.random.default_rng(0)
    params = jnp.asarray(random.normal(size=4096) * 3, jnp.float32)
    tx = project_weights(simplex(8.0, upper=0.01))
    updates, _ = tx.update(jnp.asarray(random.normal(size=4096), jnp.float32), tx.init(params), params)
    landed = np.asarray(optax.apply_updates(params, updates))
    assert np.sum(landed >= np.float32(0.01) * (1 - 1e-6)) > 400
    assert landed.max() <= np.float32(0.01)
