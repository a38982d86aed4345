"""What docs/switching.md says of others' formulas: written here from their source, in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_clip import clip_by_global_norm, clip_tree, metrics, skip_spikes, where, zscore
from pages import names


def page(heading):
    return names(f"switching: {heading}")


# --- Factors -------------------------------------------------------------------------------------


def ours(norm, limit):
    clipped, before = clip_tree(jnp.float32([norm]), limit)
    assert float(before) == np.float32(norm)
    return float(clipped[0]) / norm


@pytest.mark.parametrize(("norm", "limit"), [(20.0, 1.0), (1000.0, 0.1)])
def test_eps_of_pytorch_is_nothing_at_large_norms(norm, limit):
    assert ours(norm, limit) == pytest.approx(min(1, limit / (norm + 1e-6)), rel=2e-7)


def test_eps_of_pytorch_at_small_norms():
    """At a norm of 1e-3: 1e-3 / (1e-3 + 1e-6) of what the formula says."""
    assert ours(1e-3, 1e-4) == pytest.approx(0.1, rel=1e-6)
    assert pytest.approx(0.1 * (1 - 1e-3), rel=1e-5) == 1e-4 / (1e-3 + 1e-6)


def test_eps_of_axlearn_is_lost_above_a_quarter():
    norms = np.random.default_rng(0).uniform(0.25, 10, 1000).astype(np.float32)
    np.testing.assert_array_equal(norms + np.float32(1e-8), norms)
    assert np.float32(0.24) + np.float32(1e-8) != np.float32(0.24)


# --- Spikes --------------------------------------------------------------------------------------


def left_out(values, window=128, factor=6.0):
    """MaxText's test of a series: mean and Bessel's deviation of the last values, spikes and NaN too."""
    seen, out = [], []
    for count, value in enumerate(values):
        last = np.array(seen[-window:])
        mean = last.sum() / max(1, len(last))
        deviation = np.sqrt(((last - mean) ** 2).sum() / max(1, len(last) - 1))
        late = count + 1 >= max(2, window // 2)
        out.append(late and not value - mean <= factor * deviation)
        seen.append(value)
    return np.array(out)


def norms(spike):
    series = np.random.default_rng(0).normal(3.0, 0.2, 400)
    series[200] = spike
    return series


def test_spike_test_after_the_clip():
    """A spike of 100 among norms of 3: seen before the clip at 1, not after it."""
    raw = norms(100.0)
    assert np.flatnonzero(left_out(raw)).tolist() == [200]
    assert not left_out(np.minimum(raw, 1.0)).any()


def test_spike_test_and_nan():
    """With theirs the NaN and the 128 steps after it; with ours the NaN."""
    raw = norms(np.nan)
    assert np.flatnonzero(left_out(raw)).tolist() == list(range(200, 200 + 129))
    tx = skip_spikes(optax.sgd(1.0), zscore(6.0))

    def step(state, norm):
        updates, state = tx.update(norm, state)
        return state, updates

    with jax.numpy_dtype_promotion("standard"):
        state, updates = jax.lax.scan(step, tx.init(jnp.float32(0)), jnp.asarray(raw, jnp.float32))
    assert np.flatnonzero(np.asarray(updates) == 0).tolist() == [200]
    assert int(metrics(state)["skip/steps_skipped"]) == 1


# --- States --------------------------------------------------------------------------------------


def test_state_without_params():
    """The state of a number limit does not depend on the weights, as AXLearn's partition needs it."""
    clip = clip_by_global_norm(1.0)
    weights = {"w": jnp.ones((2, 3))}
    empty, full = jax.eval_shape(clip.init, {}), jax.eval_shape(clip.init, weights)
    assert empty == full and jax.tree.leaves(full)
    assert all(leaf.size <= 4 for leaf in jax.tree.leaves(full))


def test_without_a_record():
    """`record=False`: Optax's empty state, and whatever a trainer gives in its place."""
    grads = {"w": jnp.array([3.0, 4.0])}
    with_record, without = clip_by_global_norm(1.0), clip_by_global_norm(1.0, record=False)
    assert without.init(grads) == optax.EmptyState()
    expected, _ = with_record.update(grads, with_record.init(grads))
    for state in (optax.EmptyState(), None, {"params": grads}):
        updates, after = without.update(grads, state, None)
        np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-6)
        assert after is state or after == optax.EmptyState()


def test_checkpoint_of_optax_goes_on():
    """The page's run: Adam's moments are those saved, and the update is the one with Optax's clip."""
    found = page("Existing checkpoints")
    (clip, adam), old = found["state"], found["old"]
    assert not metrics(clip) or int(metrics(clip)["clip/steps"]) == 1
    assert int(adam[0].count) == 2
    with jax.numpy_dtype_promotion("standard"):
        expected, _ = old.update(found["grads"], found["trained"], found["params"])
    np.testing.assert_allclose(found["updates"]["w"], expected["w"], rtol=1e-6)


# --- Names ---------------------------------------------------------------------------------------


@jax.tree_util.register_pytree_node_class
class NamedArray:
    """As Haliax registers its own: one child without a name."""

    def __init__(self, array):
        self.array = array

    def tree_flatten(self):
        return (self.array,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def test_paths_of_named_arrays():
    paths = []
    tree = {"mlp": {"weight": NamedArray(jnp.ones(2)), "bias": NamedArray(jnp.ones(1))}}
    where(lambda path, leaf: paths.append(path) or True)(tree)
    assert paths == ["mlp/bias/0", "mlp/weight/0"]


def test_reported():
    seen = page("Libraries that take a transform")["seen"]
    assert [int(one["clip/steps"]) for one in seen] == [1]
    assert float(seen[0]["clip/norm_before"]) == 5


def test_maxtext_norm():
    grads, norm = page("MaxText")["apply_gradient_clipping"]({"w": jnp.array([3.0, 4.0])}, 1.0)
    np.testing.assert_allclose(grads["w"], [0.6, 0.8], rtol=1e-6)
    assert float(norm) == 5
