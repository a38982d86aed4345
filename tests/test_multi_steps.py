"""One NaN in `optax.MultiSteps`: what freezes for good, and which orders recover."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_clip import box, clip_by_global_norm, metrics, project_weights, skip_spikes, violation

BAD, STEPS, EVERY = 3, 12, 2  # The bad micro-batch is the second of its pair.
GRAD, RATE = 4.0, 0.1
LIMIT = 1.0  # So a clipped gradient moves the weight by RATE * LIMIT.


def accumulated(inner, **kwargs):
    return optax.MultiSteps(inner, EVERY, **kwargs).gradient_transformation()


def trained(tx):
    """The weight after each micro-step, and the last state."""
    w, update = jnp.zeros(()), jax.jit(tx.update)
    state, weights = tx.init(w), []
    for i in range(STEPS):
        grad = jnp.float32(np.nan if i == BAD else -GRAD)
        updates, state = update(grad, state, w)
        w = optax.apply_updates(w, updates)
        weights.append(float(w))
    return np.array(weights), state


def sgd():
    return optax.sgd(RATE)


def zeroing():
    return clip_by_global_norm(LIMIT, nonfinite="zero")


INSIDE = {
    "skip_spikes": lambda: skip_spikes(sgd(), jnp.inf),
    "zero": lambda: optax.chain(zeroing(), sgd()),
    "apply_if_finite": lambda: optax.apply_if_finite(sgd(), 5),
}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", INSIDE)
def test_inside_freezes(name):
    """The accumulated mean is reset by a product with 0, which keeps a NaN: no step after it counts."""
    weights, state = trained(accumulated(INSIDE[name]()))
    assert weights[0] < weights[1] == weights[BAD - 1]
    np.testing.assert_array_equal(weights[BAD:], weights[BAD - 1])
    assert np.isnan(state.acc_grads)
    updates = (STEPS - BAD) // EVERY + 1  # Each of them was left out, the bad one and all after it.
    counts = {key: int(value) for key, value in metrics(state).items() if key.endswith("nonfinite")}
    assert set(counts.values()) <= {updates}


@pytest.mark.usefixtures("standard_promotion")
def test_plain_is_loud():
    """Without anything inside the weights are NaN, which a check of the loss sees."""
    weights, _ = trained(accumulated(sgd()))
    assert np.isfinite(weights[:BAD]).all() and np.isnan(weights[BAD:]).all()


def moved(per_update):
    """The weight after each micro-step: one update after `EVERY` micro-batches, each mean as given."""
    return np.cumsum(per_update)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    "tx",
    [
        lambda: skip_spikes(accumulated(sgd()), jnp.inf),
        lambda: optax.apply_if_finite(accumulated(sgd()), 5),
        lambda: accumulated(sgd(), should_skip_update_fn=optax.skip_not_finite),
    ],
    ids=["skip_spikes", "apply_if_finite", "skip_not_finite"],
)
def test_around_recovers(tx):
    """The bad micro-batch is as if it had not been: the next one completes the pair."""
    weights, state = trained(tx())
    step = RATE * GRAD
    expected = moved([step * (i in (1, 4, 6, 8, 10)) for i in range(STEPS)])
    np.testing.assert_allclose(weights, expected, rtol=1e-5)
    counts = [int(n) for key, n in metrics(state).items() if key.endswith(("nonfinite", "skipped"))]
    assert set(counts) <= {1}


@pytest.mark.usefixtures("standard_promotion")
def test_zero_around_recovers():
    """The bad micro-batch counts as zeros in the mean of its pair."""
    weights, state = trained(optax.chain(zeroing(), accumulated(sgd())))
    step = RATE * LIMIT
    expected = moved([step * {1: 1, 3: 0.5, 5: 1, 7: 1, 9: 1, 11: 1}.get(i, 0) for i in range(STEPS)])
    np.testing.assert_allclose(weights, expected, rtol=1e-5)
    assert int(metrics(state)["clip/steps_nonfinite"]) == 1


@pytest.mark.usefixtures("standard_promotion")
def test_the_whole_order():
    """`skip_spikes` around, clip first inside, projection last inside."""
    limits = box(-0.25, 0.25)
    inner = optax.chain(clip_by_global_norm(LIMIT), sgd(), project_weights(limits))
    weights, state = trained(skip_spikes(accumulated(inner), jnp.inf))
    np.testing.assert_allclose(weights[[0, 1, 3, 4, 6, 11]], [0, 0.1, 0.1, 0.2, 0.25, 0.25], rtol=1e-5)
    assert violation(jnp.float32(weights[-1]), limits) == 0
    found = metrics(state)
    assert int(found["skip/steps_skipped"]) == 1
    assert int(found["clip/steps_nonfinite"]) == 0
