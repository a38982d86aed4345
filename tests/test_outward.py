"""`mask_outward`: a weight at its wall feels no push against it, so that no momentum winds up."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_clip import box, init_box, mask_outward, metrics, non_negative, norm_ball, project_weights


def step(constraint, params, grads):
    tx = mask_outward(constraint)
    updates, state = tx.update(grads, tx.init(params), params)
    return updates, metrics(state)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_by_hand(dtype):
    # Descent goes against the gradient: at 1 a negative one pushes outward, at -1 a positive one.
    params = jnp.array([1.0, 1.0, -1.0, -1.0, 0.5, 1.0], dtype)
    grads = jnp.array([-2.0, 2.0, 2.0, -2.0, -2.0, 0.0], dtype)
    updates, recorded = step(box(-1.0, 1.0), params, grads)
    assert updates.dtype == dtype
    np.testing.assert_array_equal(np.float32(updates), [0.0, 2.0, 0.0, -2.0, -2.0, 0.0])
    assert recorded == {"outward/fraction": pytest.approx(2 / 6), "outward/steps": 1}


def test_other_boxes():
    grads = jnp.array([1.0, -1.0])
    np.testing.assert_array_equal(step(non_negative(), jnp.zeros(2), grads)[0], [0, -1])
    ball = norm_ball(2.0, ord=math.inf)
    np.testing.assert_array_equal(step(ball, jnp.array([-2.0, 2.0]), grads)[0], [0, 0])
    bounds = {"a": 1.0, "b": 2.0}
    at = {"a": jnp.array(1.0), "b": jnp.array(1.0)}
    updates, _ = step(box(-3.0, bounds), at, {"a": jnp.array(-1.0), "b": jnp.array(-1.0)})
    assert (updates["a"], updates["b"]) == (0, -1)


def test_a_weight_that_landed_beside_its_bound_counts_as_at_it():
    params = jnp.array([0.1, -0.1], jnp.float32)  # float32(0.1) is above 0.1; the box ends below it.
    landed = jnp.nextafter(params, jnp.zeros(2))
    updates, _ = step(box(-0.1, 0.1), landed, jnp.array([-1.0, 1.0]))
    np.testing.assert_array_equal(updates, [0.0, 0.0])


def mean_error(tx, rounds=2, steps=150):
    """Weights in [-1, 1] pulled to 3 and to -0.5 in turn: their mean distance from the best."""
    targets = jnp.tile(jnp.repeat(jnp.array([3.0, -0.5]), steps), rounds)

    def body(carry, target):
        weights, state = carry
        updates, state = tx.update(weights - target, state, weights)
        weights = optax.apply_updates(weights, updates)
        return (weights, state), jnp.abs(weights - jnp.clip(target, -1.0, 1.0)).mean()

    start = jnp.zeros(4)
    return float(jax.lax.scan(body, (start, tx.init(start)), targets)[1].mean())


@pytest.mark.parametrize(
    "optimizer", [optax.sgd(0.05, momentum=0.9), optax.adam(0.02)], ids=["sgd", "adam"]
)
def test_momentum_does_not_wind_up(optimizer, standard_promotion):
    wall = box(-1.0, 1.0)
    plain = mean_error(optax.chain(optimizer, project_weights(wall)))
    masked = mean_error(optax.chain(mask_outward(wall), optimizer, project_weights(wall)))
    assert masked < 0.85 * plain


@pytest.mark.parametrize("constraint", [norm_ball(1.0), init_box(1.0), lambda x: x, 1.0])
def test_sets_that_are_no_box(constraint):
    with pytest.raises(TypeError, match="constraint="):
        mask_outward(constraint)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_float8(dtype):
    """Types without infinity, whose neighbours are far apart."""
    p, g = (jnp.array(x).astype(dtype) for x in ([1, -1, 0.5, 0.875], [-2, 2, -2, -2]))
    tx = mask_outward(box(-1.0, 1.0))
    np.testing.assert_array_equal(tx.update(g, tx.init(p), p)[0].astype(np.float32), [0, 0, -2, -2])
    tx = mask_outward(non_negative())
    p, g = jnp.array([1, 0.5, 8, 0]).astype(dtype), jnp.ones(4).astype(dtype)
    np.testing.assert_array_equal(tx.update(g, tx.init(p), p)[0].astype(np.float32), [1, 1, 1, 0])


def test_complex_weights_are_refused():
    tx = mask_outward(norm_ball(1.0, ord=jnp.inf))
    p = jnp.array([0.6 + 0.8j])
    with pytest.raises(ValueError, match="real weights in a mask_outward, got complex64"):
        tx.update(-p, tx.init(p), p)
