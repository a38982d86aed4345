"""The recipes of docs/recipes.md against sums in NumPy, example by example."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_clip import clip_by_global_norm, clip_tree
from pages import names

LIMIT = 1.0


def page(heading):
    return names(f"recipes: {heading}")


def gradient(x, y):
    """Of the mean square of x w + b - y at w = 0, b = 0: -2 mean(y x), -2 mean(y)."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return np.append(-2 * (y[:, None] * x).mean(0), -2 * y.mean())


def mean_of_clipped(parts):
    """Oracle: clip each part, drop what is not finite, mean of the rest, and how many those are."""
    good = [g for g in parts if np.isfinite(g).all()]
    clipped = [g * min(1, LIMIT / np.linalg.norm(g)) for g in good]
    return np.mean(clipped, axis=0), len(good)


def flat(grads):
    return np.append(np.asarray(grads["w"], np.float64), float(grads["b"]))


def test_each_example():
    found = page("Each example, in bounded memory")
    parts = [gradient(x[None], y[None]) for x, y in zip(found["x"], found["y"], strict=True)]
    expected, finite = mean_of_clipped(parts)
    np.testing.assert_allclose(flat(found["grads"]), expected, rtol=1e-5, atol=1e-6)
    assert int(found["counts"]["finite"]) == finite == 31
    over = sum(np.linalg.norm(g) > LIMIT for g in parts)
    assert 0 < int(found["counts"]["clipped"]) == over < 31


def test_each_example_is_no_clip_of_the_mean():
    """The example that is far off weighs no more than the others."""
    found = page("Each example, in bounded memory")
    keep = np.isfinite(found["x"]).all(1)
    mean = gradient(found["x"][keep], found["y"][keep])
    ours = flat(found["grads"])
    cosine = mean @ ours / np.linalg.norm(mean) / np.linalg.norm(ours)
    assert cosine < 0.9


def temporaries(examples, size):
    """Bytes of a compiled step that clips the gradient of a matrix (128, 128) example by example."""

    def grads(w, x):
        return clip_tree(jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w) ** 2))(w), LIMIT)[0]

    mapped = optax.microbatching.micro_vmap(
        grads,
        in_axes=(None, 0),
        microbatch_size=size,
        accumulator=optax.microbatching.AccumulationType.SUM,
    )
    arrays = (
        jax.ShapeDtypeStruct((128, 128), "float32"),
        jax.ShapeDtypeStruct((examples, 128), "float32"),
    )
    with jax.numpy_rank_promotion("allow"):
        return jax.jit(mapped).lower(*arrays).compile().memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_the_batch():
    gradient = 128 * 128 * 4
    assert temporaries(64, 8) - temporaries(32, 8) < gradient
    assert temporaries(64, 64) > 32 * gradient > temporaries(64, 8)


def test_each_micro_batch():
    found = page("Each micro-batch, in a scan")
    parts = [gradient(*one) for one in zip(*found["batches"], strict=True)]
    expected, finite = mean_of_clipped(parts)
    np.testing.assert_allclose(flat(found["grads"]), expected, rtol=1e-5, atol=1e-6)
    assert int(found["finite"]) == finite == 3
    np.testing.assert_allclose(found["norms"], [np.linalg.norm(g) for g in parts], rtol=1e-5)


def test_each_micro_batch_is_the_clip_around_multi_steps(standard_promotion):
    """But for the zeroed one, which counts there: 3 finite of 4."""
    found = page("Each micro-batch, in a scan")
    inner = optax.MultiSteps(optax.scale(1.0), 4).gradient_transformation()
    tx = optax.chain(clip_by_global_norm(LIMIT, nonfinite="zero"), inner)
    state = tx.init(found["params"])
    for batch in zip(*found["batches"], strict=True):
        grads = jax.grad(found["loss"])(found["params"], *batch)
        updates, state = tx.update(grads, state, found["params"])
    np.testing.assert_allclose(flat(updates), flat(found["grads"]) * 3 / 4, rtol=1e-5, atol=1e-6)
