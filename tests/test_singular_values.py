"""Clipped singular values against the SVD in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_clip import clip_singular_values, metrics, zscore


def oracle(x, limit):
    """U min(s, c) V^H of each matrix."""
    x = np.asarray(x, np.complex128 if np.iscomplexobj(x) else np.float64)
    u, s, v = np.linalg.svd(x, full_matrices=False)
    return (u * np.minimum(s, limit)[..., None, :]) @ v


def clip(tx, tree):
    return jax.jit(tx.update)(tree, tx.init(tree))


def matrices(shape, dtype="float32", seed=0, size=1.0):
    x = size * np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(x, dtype)


@pytest.mark.parametrize("method", ["polar", "eigh", None])
def test_is_the_svd_with_capped_values(method):
    tree = {str(shape): matrices(shape) for shape in [(5, 5), (9, 4), (4, 9), (2, 3, 6, 4), (1, 7)]}
    updates, _ = clip(clip_singular_values(1.0, method=method), tree)
    for key, x in tree.items():
        error = np.abs(updates[key] - oracle(x, 1.0)).max()
        print(f"{key}: {error:.1e}")
        assert error < 1e-5, key


def test_any_size_and_far_outside():
    def step(x, limit):
        tx = clip_singular_values(limit)
        return tx.update(x, tx.init(x))[0]

    step = jax.jit(step)
    for size, limit in ((1e-2, 5e-3), (1e15, 5e14), (30.0, 4.0)):
        x = matrices((8, 6), size=size)
        expected = oracle(np.asarray(x, np.float64) / limit, 1.0)
        np.testing.assert_allclose(step(x, jnp.float32(limit)) / limit, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "complex64"])
def test_other_dtypes(dtype):
    x = matrices((8, 6), dtype)
    if dtype == "complex64":
        x = x + 1j * matrices((8, 6), dtype, seed=1)
    updates, _ = clip(clip_singular_values(1.0), {"w": x})
    assert updates["w"].dtype == x.dtype
    error = np.abs(
        np.asarray(updates["w"], np.complex128) - oracle(np.asarray(x, np.complex128), 1.0)
    ).max()
    print(f"{dtype}: {error:.1e}")
    assert error <= max(float(jnp.finfo(dtype).eps), 1e-5)


def test_within_the_limit_every_bit_stays():
    """Each matrix of a batch by itself, and leaves that are no matrices."""
    x = jnp.stack([matrices((5, 4), size=0.01), matrices((5, 4), seed=1)])
    tree = {"w": x, "b": jnp.array([30.0, 40.0]), "s": jnp.array(9.0), "n": jnp.arange(3)}
    updates, state = clip(clip_singular_values(1.0), tree)
    np.testing.assert_array_equal(updates["w"][0], x[0])
    assert np.all(updates["w"][1] != x[1])
    for key in "bsn":
        np.testing.assert_array_equal(updates[key], tree[key])
    found = metrics(state)
    assert (found["clip/fraction"], found["clip/threshold"], found["clip/steps_clipped"]) == (
        0.5,
        1.0,
        1,
    )
    for when, some in (("before", tree), ("after", updates)):
        parts = [np.asarray(some[key], np.float64) for key in "wbs"]
        norm = np.sqrt(sum(np.sum(part**2) for part in parts))
        np.testing.assert_allclose(found[f"clip/norm_{when}"], norm, rtol=1e-6)


@pytest.mark.parametrize(("limit", "is_zero"), [(0.0, True), (jnp.inf, False)])
def test_ends_of_the_limit(limit, is_zero):
    tree = {"w": matrices((5, 4)), "zero": jnp.zeros((3, 2))}
    tx = clip_singular_values(limit)
    updates, state = clip(tx, tree)
    np.testing.assert_array_equal(updates["w"], 0 * tree["w"] if is_zero else tree["w"])
    np.testing.assert_array_equal(updates["zero"], tree["zero"])
    assert metrics(state)["clip/fraction"] == (0.5 if is_zero else 0)
    slope = jax.grad(lambda tree: jnp.sum(tx.update(tree, tx.init(tree))[0]["w"] ** 2))(tree)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(slope))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("policy", ["propagate", "zero"])
def test_not_finite_acts_on_the_whole_tree(policy, bad):
    tree = {"w": matrices((5, 4)), "b": jnp.array([1.0, bad]), "n": jnp.arange(3)}
    updates, state = clip(clip_singular_values(1.0, nonfinite=policy), tree)
    expected = jnp.nan if policy == "propagate" else 0.0
    for key in "wb":
        np.testing.assert_array_equal(updates[key], jnp.full_like(tree[key], expected))
    np.testing.assert_array_equal(updates["n"], tree["n"])
    found = metrics(state)
    assert (found["clip/steps_nonfinite"], found["clip/steps_clipped"], found["clip/fraction"]) == (
        1,
        0,
        0,
    )


def test_traced_limits():
    """One that is NaN makes all NaN, vectors too, which no other limit concerns."""
    x, bias = matrices((5, 4)), jnp.ones(4)

    def step(limit):
        tx = clip_singular_values(limit)
        return tx.update((x, bias), tx.init((x, bias)))[0]

    found, beside = jax.jit(jax.vmap(step))(jnp.array([-1.0, jnp.nan, 0.5]))
    assert np.all(found[0] == 0)
    assert np.all(np.isnan(found[1]))
    np.testing.assert_allclose(found[2], oracle(x, 0.5), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(beside, np.array([1, np.nan, 1])[:, None] * np.ones(4))


def test_schedule():
    x = matrices((5, 4))
    tx = clip_singular_values(lambda step: 1.0 / (1.0 + jnp.asarray(step).astype(jnp.float32)))
    state = tx.init(x)
    for limit in (1.0, 0.5):
        updates, state = tx.update(x, state)
        np.testing.assert_allclose(updates, oracle(x, limit), rtol=0, atol=1e-5)
        assert metrics(state)["clip/threshold"] == limit


def test_arguments():
    with pytest.raises(ValueError, match="threshold >= 0"):
        clip_singular_values(-1.0)
    with pytest.raises(TypeError, match="threshold"):
        clip_singular_values(zscore(1.0))
    with pytest.raises(TypeError, match=r"jnp\.inf"):
        clip_singular_values(None)
    with pytest.raises(ValueError, match="method"):
        clip_singular_values(1.0, method="svd")
    with pytest.raises(ValueError, match="nonfinite"):
        clip_singular_values(1.0, nonfinite="skip")
