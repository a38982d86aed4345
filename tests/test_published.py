"""The named algorithms against what their papers and the authors' programs do."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import recorded_norms
import reference
from optax_clip import adagc, adaptive_grad_clip, autoclip, zclip
from test_adaptive import EPS, at, random_tree, run

# --- Against the papers, over 1,000 steps of a training ----------------------------------------------
#
# Leaves of one entry each, so that the recorded norms are gradients and the updates are clipped norms.


@functools.cache
def recorded():
    return recorded_norms.load()


def clipped_record(tx):
    """Clipped norms and metrics, step by step."""
    norms = {f"{i}": jnp.asarray(x) for i, x in enumerate(recorded().T)}
    updates, record, _ = run(tx, norms, at(norms, 0))
    return np.stack(list(updates.values()), axis=1), record


def test_autoclip_as_published():
    wanted = reference.published_autoclip(np.linalg.norm(recorded().astype(float), axis=1))
    clipped, record = clipped_record(autoclip())
    np.testing.assert_allclose(record["clip/threshold"], wanted["limit"], 4 * EPS)
    # The program divides by the norm and 1e-6.
    np.testing.assert_allclose(np.linalg.norm(clipped, axis=1), wanted["clipped"], 1e-4)
    assert 0.5 < np.mean(record["clip/fraction"]) < 1


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_zclip_as_published(max_norm):
    """From the end of its warm-up on the program tells limits that bind."""
    wanted = reference.published_zclip(
        np.linalg.norm(recorded().astype(float), axis=1), max_norm=max_norm
    )
    clipped, record = clipped_record(zclip(max_norm=max_norm))
    np.testing.assert_allclose(np.linalg.norm(clipped, axis=1), wanted["clipped"], 1e-4)
    norms = record["clip/norm_before"]
    over = wanted["limit"] < norms * (1 - 1e-6)
    np.testing.assert_allclose(record["clip/threshold"][over], wanted["limit"][over], 64 * EPS)
    np.testing.assert_array_equal(record["clip/fraction"] > 0, over)
    assert over.sum() > 15


def test_adagc_as_published():
    """Algorithm 1, also where a leaf is clipped on more than 50 steps in a row after the warm-up."""
    wanted = reference.published_adagc(recorded())
    clipped, _ = clipped_record(adagc())
    np.testing.assert_allclose(clipped, wanted["clipped"], 64 * EPS)
    over = (clipped < recorded() * (1 - 1e-6))[100:]
    assert np.lib.stride_tricks.sliding_window_view(over, 60, axis=0).all(axis=-1).any()


# Ranks 2 and 4, vectors of any rank, and a scalar; the weights of one unit are 0.
AGC_SHAPES = [(3, 5), (2, 3, 1, 5), (5,), (1, 5), (1, 1, 5), (1, 1, 1, 5), (5, 1), (3, 1, 1, 1), ()]


def test_agc_as_published():
    """One gradient a step, of the recorded norm, in the directions of random kernels."""
    random = np.random.default_rng(7)
    params = [random.normal(size=shape).astype(np.float32) for shape in AGC_SHAPES]
    params[0][:, 2] = 0
    size = np.linalg.norm(recorded(), axis=1) / 200
    grads = [random.normal(size=(1000, *s)) * size.reshape(-1, *[1] * len(s)) for s in AGC_SHAPES]
    grads = [x.astype(np.float32) for x in grads]
    updates, record, _ = run(adaptive_grad_clip(), grads, params)
    for x, grad, weight in zip(updates, grads, params, strict=True):
        wanted = [reference.published_agc(g, weight) for g in grad]
        np.testing.assert_allclose(x, wanted, 8 * EPS)
    assert 0.1 < np.mean(record["clip/fraction"]) < 0.9


@pytest.mark.parametrize("shape", [(4,), (1, 4), (1, 1, 4), (1, 1, 1, 4), (4, 1, 1)])
def test_agc_takes_a_vector_for_one_unit(shape):
    """Of the weights the norm is 5, of the gradient 9: times 0.1 * 5 / 9."""
    w, g = (jnp.array(x).reshape(shape) for x in ([1.0, 2, 2, 4], [8.0, 1, 0, 4]))
    tx = adaptive_grad_clip(0.1)
    updates, _ = tx.update(g, tx.init(w), w)
    np.testing.assert_allclose(updates.ravel(), [4 / 9, 0.5 / 9, 0, 2 / 9], 1e-6)


def test_agc_of_several_heads_as_published():
    """Rank 3, where the authors' programs and Optax reduce axis 0 alone."""
    grads, params = (random_tree(seed, 3)["kernel"] for seed in (8, 9))
    for scope, wanted in ((0, True), ("unit", False)):
        tx = adaptive_grad_clip(0.1, scope=scope)
        updates, _ = tx.update(grads, tx.init(params), params)
        same = np.allclose(updates, reference.published_agc(grads, params, 0.1), 8 * EPS)
        assert same == wanted


def out_first(path, leaf):
    """As docs/thresholds.md has it."""
    if sum(n > 1 for n in leaf.shape) <= 1:
        return "leaf"
    return tuple(range(1, leaf.ndim))


def test_agc_of_weights_with_outputs_first():
    """Linear layers and convolutions in the layout of PyTorch and Equinox, and biases (out, 1, 1)."""
    random = np.random.default_rng(10)
    shapes = [(5, 3), (5, 2, 3), (5, 2, 3, 3), (5, 1, 1), (5,)]
    params, grads = ([random.normal(size=s).astype(np.float32) for s in shapes] for _ in range(2))
    tx = adaptive_grad_clip(0.1, scope=out_first)
    updates, _ = tx.update(grads, tx.init(params), params)
    for x, g, w in zip(updates, grads, params, strict=True):
        rows = (1, -1) if g.size == 5 else (5, -1)
        size, weight = (np.linalg.norm(y.reshape(rows), axis=1, keepdims=True) for y in (g, w))
        wanted = g.reshape(rows) * np.minimum(1, 0.1 * weight / size)
        np.testing.assert_allclose(x.reshape(rows), wanted, 8 * EPS)
