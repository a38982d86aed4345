"""Rescaling by a signal: QK-Clip against attention logits in float64 NumPy, and its edges."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_clip import box, metrics, project_weights, qk_clip, rescale_weights
from pages import names

DTYPES = ("float32", "bfloat16", "float16")
TAU = 10.0


def page(heading):
    return names(f"qk_clip: {heading}")


def factors_of(kind):
    """From the page, under the promotion rules that its readers have."""
    factors = page("Which weights shrink, and by what")[kind]

    def allowed(path, leaf, eta):
        with jax.numpy_rank_promotion("allow"):
            return factors(path, leaf, eta)

    return allowed


def wide(tree):
    return {key: np.asarray(x, np.float64) for key, x in tree.items()}


def apply(tx, params, grads=None, state=None, **signal):
    grads = jax.tree.map(jnp.zeros_like, params) if grads is None else grads
    state = tx.init(params) if state is None else state
    updates, state = jax.jit(tx.update)(grads, state, params, **signal)
    with jax.numpy_dtype_promotion("standard"):  # 16-bit weights with float32 updates.
        return optax.apply_updates(params, updates), updates, state


# --- Logits of the new weights -------------------------------------------------------------------

HEADS, GROUPS, FEATURES, DIM, RANK = 4, 2, 6, 5, 7
NOPE, ROPE = 16, 8


def weights(shapes, dtype, seed=0):
    """Heads of growing size, so that some are over the limit and some are not."""
    random = np.random.default_rng(seed)
    sizes = np.array([0.05, 0.3, 1.0, 3.0])
    made = {}
    for name, shape in shapes.items():
        per_head = sizes if HEADS in shape[-2:-1] else np.ones(shape[-2])
        made[name] = jnp.asarray(per_head[:, None] * random.normal(size=shape), dtype)
    return made


def mha(w, x):
    q, k = (np.einsum("if,fhd->ihd", x, w[name]) + w[f"{name}_bias"] for name in ("query", "key"))
    return np.einsum("ihd,jhd->hij", q, k)


def gqa(w, x):
    q, k = (np.einsum("if,fhd->ihd", x, w[name]) for name in ("query", "key"))
    return np.einsum("ihd,jhd->hij", q, np.repeat(k, HEADS // GROUPS, axis=1))


def turned(x):
    """Rotary positions: pairs of dimensions turned by an angle that grows with the position."""
    angle = np.arange(len(x))[:, None] * 10.0 ** -np.arange(ROPE // 2)
    angle = angle.reshape(len(x), *(1,) * (x.ndim - 2), ROPE // 2)
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)], -1
    )


def mla(w, x):
    q = np.einsum("ir,rhd->ihd", x @ w["query_down"], w["query_up"])
    latent = x @ w["key_value_down"]
    k = np.einsum("ir,rhd->ihd", latent, w["key_value_up"])[..., :NOPE]
    rotary = turned(x @ w["key_rope"])
    return np.einsum("ihd,jhd->hij", q[..., :NOPE], k) + np.einsum(
        "ihd,jd->hij", turned(q[..., NOPE:]), rotary
    )


SHAPES = {
    "mha": {
        "query": (FEATURES, HEADS, DIM),
        "query_bias": (HEADS, DIM),
        "key": (FEATURES, HEADS, DIM),
        "key_bias": (HEADS, DIM),
        "value": (FEATURES, HEADS, DIM),
    },
    "gqa": {
        "query": (FEATURES, HEADS, DIM),
        "key": (FEATURES, GROUPS, DIM),
        "value": (FEATURES, GROUPS, DIM),
    },
    "mla": {
        "query_down": (FEATURES, RANK),
        "query_up": (RANK, HEADS, NOPE + ROPE),
        "key_value_down": (FEATURES, RANK),
        "key_value_up": (RANK, HEADS, NOPE + 12),
        "key_rope": (FEATURES, ROPE),
    },
}
LOGITS = {"mha": mha, "gqa": gqa, "mla": mla}
X = np.random.default_rng(9).normal(size=(11, FEATURES))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", SHAPES)
def test_largest_logit_is_at_most_the_limit(kind, dtype):
    """min(S, tau) for each head, and heads within it keep their bits."""
    params = weights(SHAPES[kind], dtype)
    before = LOGITS[kind](wide(params), X)
    largest = before.max(axis=(1, 2))
    assert 0 < np.sum(largest > TAU) < HEADS
    tx = qk_clip(factors_of(kind), max_logit=TAU)
    zeros = {name: jnp.zeros(x.shape) for name, x in params.items()}
    new, _, state = apply(tx, params, zeros, max_logits=jnp.asarray(largest, jnp.float32))
    after = LOGITS[kind](wide(new), X).max(axis=(1, 2))
    # Each weight is rounded towards 0, by one eps at most; a logit is a sum of products of two.
    positive = {name: np.abs(x) for name, x in wide(params).items()}
    size = LOGITS[kind](positive, np.abs(X)).max(axis=(1, 2)) * np.minimum(1, TAU / largest)
    error = np.abs(after - np.minimum(largest, TAU)) / size
    print(f"{kind} {dtype}: largest error {error.max() / float(jnp.finfo(dtype).eps):.2f} eps")
    assert error.max() < 4 * float(jnp.finfo(dtype).eps)
    for name in params:
        inside = largest <= TAU if HEADS in params[name].shape[-2:-1] else slice(None)
        np.testing.assert_array_equal(new[name][..., inside, :], params[name][..., inside, :])
    recorded = metrics(state)
    np.testing.assert_allclose(recorded["qk_clip/max_logit"], largest.max(), rtol=1e-6)
    assert recorded["qk_clip/fraction"] == np.mean(largest > TAU)


def test_values_of_mla_keep_their_bits():
    params = weights(SHAPES["mla"], "float32")
    new, _, _ = apply(
        qk_clip(factors_of("mla"), max_logit=1.0), params, max_logits=jnp.full(HEADS, 50.0)
    )
    np.testing.assert_array_equal(new["key_value_up"][..., NOPE:], params["key_value_up"][..., NOPE:])
    assert np.all(new["key_value_up"][..., :NOPE] != params["key_value_up"][..., :NOPE])


def test_each_layer_of_a_stack_by_itself():
    factors = page("Stacked layers")["stacked"]
    params = {"query": jnp.ones((3, FEATURES, HEADS, DIM)), "key": jnp.ones((3, FEATURES, HEADS, DIM))}
    logits = np.ones((3, HEADS), np.float32)
    logits[1, 2] = 4 * TAU
    new, _, _ = apply(qk_clip(factors, max_logit=TAU), params, max_logits=jnp.asarray(logits))
    expected = np.ones((3, FEATURES, HEADS, DIM))
    expected[1, :, 2] = 0.5
    for leaf in new.values():
        np.testing.assert_array_equal(leaf, expected)


# --- The step ------------------------------------------------------------------------------------


def root(path, leaf, eta):
    return jnp.sqrt(eta).reshape(*(1,) * (leaf.ndim - 2), -1, 1)


def a_step(dtype, update_dtype, seed=0):
    random = np.random.default_rng(seed)
    params = {"q": jnp.asarray(random.normal(size=(50, HEADS, 40)), dtype)}
    return params, {"q": jnp.asarray(0.1 * random.normal(size=(50, HEADS, 40)), update_dtype)}


@pytest.mark.parametrize(("dtype", "update_dtype"), [*((d, d) for d in DTYPES), ("bfloat16", "float32")])
def test_after_the_step(dtype, update_dtype):
    """f (w + u) in float64, from what `apply_updates` would have reached, never longer than that."""
    params, grads = a_step(dtype, update_dtype)
    logits = jnp.array([-5.0, TAU, 1.3 * TAU, 40 * TAU])
    eta = np.array([1, 1, 1 / 1.3, 1 / 40])
    new, updates, _ = apply(qk_clip(root, max_logit=TAU), params, grads, max_logits=logits)
    assert updates["q"].dtype == grads["q"].dtype
    with jax.numpy_dtype_promotion("standard"):
        reached = np.asarray(optax.apply_updates(params, grads)["q"], np.float64)
    expected = np.sqrt(eta)[:, None] * reached
    got = np.asarray(new["q"], np.float64)
    eps = float(jnp.finfo(dtype).eps)
    # The factor is float32: its rounding, and that of the product.
    assert np.all(np.abs(got) <= np.abs(expected) * (1 + 2e-7))
    spacing = eps * np.maximum(np.abs(expected), np.abs(np.asarray(params["q"], np.float64)) / 2)
    error = np.abs(got - expected) / np.maximum(spacing, float(jnp.finfo(dtype).tiny))
    print(f"{dtype}, updates {update_dtype}: {error.max():.2f} eps of the larger of f (w + u) and w / 2")
    assert error.max() < 2.5
    for head in (0, 1):
        np.testing.assert_array_equal(updates["q"][:, head], grads["q"][:, head])


@pytest.mark.parametrize("dtype", DTYPES)
def test_below_the_limit_every_bit_stays(dtype):
    params, grads = a_step(dtype, dtype)
    grads["q"] = grads["q"].at[0, 0, 0].set(float(jnp.finfo(dtype).smallest_subnormal))
    _, updates, state = apply(
        qk_clip(root), params, grads, max_logits=jnp.array([0.0, -3.0, 100.0, 5.0])
    )
    assert updates["q"].tobytes() == grads["q"].tobytes()
    assert metrics(state)["qk_clip/fraction"] == 0
    assert metrics(state)["qk_clip/max_logit"] == 100


def test_small_factors_are_not_rounded_away():
    """0.999 in bfloat16, whose numbers are 0.004 apart."""
    params = {"q": jnp.full((3, HEADS, 2), 1.5, "bfloat16")}
    new, _, _ = apply(qk_clip(root, max_logit=1.0), params, max_logits=jnp.full(HEADS, 1.002))
    assert np.all(new["q"] == 1.5 - 2**-7)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_what_is_not_finite_changes_nothing_there(bad):
    params, grads = a_step("float32", "float32")
    tx = qk_clip(root, max_logit=TAU)
    logits = jnp.array([bad, 1.0, 4 * TAU, 1.0])
    new, updates, state = apply(tx, params, grads, max_logits=logits)
    expected, _, _ = apply(tx, params, grads, max_logits=logits.at[0].set(0))
    np.testing.assert_array_equal(new["q"], expected["q"])
    np.testing.assert_array_equal(updates["q"][:, 0], grads["q"][:, 0])
    found = metrics(state)
    assert (found["qk_clip/steps"], found["qk_clip/steps_nonfinite"]) == (1, 1)
    assert found["qk_clip/fraction"] == 0.25
    _, _, state = apply(tx, params, grads, state, max_logits=jnp.ones(HEADS))
    found = metrics(state)
    assert (found["qk_clip/steps"], found["qk_clip/steps_nonfinite"]) == (2, 1)


def test_factors_that_are_not_finite_are_one():
    """And an infinite signal reads as NaN, so that no formula makes it a factor of 0."""
    params = {"w": jnp.array([1.0, 2.0, 3.0])}
    tx = rescale_weights(lambda path, leaf, s: 1 / s, signal="s")
    new, _, state = apply(tx, params, s=jnp.array([2.0, jnp.inf, 0.0]))
    np.testing.assert_array_equal(new["w"], [0.5, 2.0, 3.0])
    found = metrics(state)
    assert found["rescale/steps_nonfinite"] == 1
    np.testing.assert_allclose(found["rescale/fraction"], 1 / 3, rtol=1e-6)


def test_factors_above_one_grow():
    params = {"w": jnp.array([1.0, -2.0]), "b": jnp.array([1.0])}
    tx = rescale_weights(lambda path, leaf, s: s if path == "w" else None, signal="s")
    new, _, _ = apply(tx, params, s=3.0)
    np.testing.assert_array_equal(new["w"], [3.0, -6.0])
    np.testing.assert_array_equal(new["b"], [1.0])


@pytest.mark.parametrize("limit", [0.0, jnp.inf])
def test_ends_of_the_limit(limit):
    params, grads = a_step("float32", "float32")
    new, updates, _ = apply(
        qk_clip(root, max_logit=limit), params, grads, max_logits=jnp.array([0.0, -1.0, 3.0, 9.0])
    )
    over = slice(2, None) if limit == 0 else slice(4, None)
    assert np.all(new["q"][:, over] == 0)
    np.testing.assert_array_equal(updates["q"][:, :2], grads["q"][:, :2])


def test_before_a_projection():
    params = {"w": jnp.array([3.0])}
    tx = optax.chain(
        rescale_weights(lambda path, leaf, s: s, signal="s"), project_weights(box(-1.0, 1.0))
    )
    new, _, _ = apply(tx, params, s=2.0)
    assert new["w"] == 1.0


def test_record_off():
    params, grads = a_step("float32", "float32")
    tx = qk_clip(root, max_logit=TAU, record=False)
    assert tx.init(params) == optax.EmptyState()
    logits = jnp.array([1.0, 2.0, 50.0, 70.0])
    _, updates, _ = apply(tx, params, grads, max_logits=logits)
    _, expected, _ = apply(qk_clip(root, max_logit=TAU), params, grads, max_logits=logits)
    np.testing.assert_array_equal(updates["q"], expected["q"])


# --- Wrong calls ---------------------------------------------------------------------------------


def test_the_signal_is_asked_for():
    params = {"w": jnp.ones(2)}
    tx = qk_clip(lambda path, leaf, eta: None)
    with pytest.raises(ValueError, match=r"tx\.update\(grads, state, params, max_logits=\.\.\.\)"):
        tx.update(params, tx.init(params), params)
    with pytest.raises(ValueError, match="params=None"):
        tx.update(params, tx.init(params), max_logits=1.0)


@pytest.mark.parametrize("factor", [jnp.ones(3), jnp.ones((2, 2))])
def test_factors_broadcast_to_their_leaf(factor):
    params = {"w": jnp.ones(2)}
    tx = rescale_weights(lambda path, leaf, s: factor, signal="s")
    with pytest.raises(ValueError, match=r"broadcast to shape \(2,\) for leaf 'w'"):
        tx.update(params, tx.init(params), params, s=1.0)


def test_arguments():
    with pytest.raises(TypeError, match="callable"):
        qk_clip(0.5)
    with pytest.raises(ValueError, match="max_logit >= 0"):
        qk_clip(root, max_logit=-1.0)
    with pytest.raises(TypeError, match="keyword"):
        rescale_weights(root, signal="no name")
    tx = rescale_weights(lambda path, leaf, s: "half", signal="s")
    with pytest.raises(TypeError, match="real number"):
        tx.update({"w": jnp.ones(2)}, tx.init({"w": jnp.ones(2)}), {"w": jnp.ones(2)}, s=1.0)


# --- Micro-batches, copies --------------------------------------------------------------------


def test_multi_steps_hands_on_the_last_signal():
    """As the page says: a spike in another micro-batch is lost, and a running maximum keeps it."""
    params, tx = {"q": jnp.ones((3, 2, 2))}, optax.MultiSteps(qk_clip(root), 2)
    spike, calm = jnp.array([400.0, 10.0]), jnp.array([20.0, 30.0])
    state, new = tx.init(params), params
    for logits in (spike, calm):
        with jax.numpy_dtype_promotion("standard"):
            new, _, state = apply(tx, new, None, state, max_logits=logits)
    np.testing.assert_array_equal(new["q"], params["q"])
    found = page("Several devices, micro-batches, two copies of the weights")["params"]
    np.testing.assert_array_equal(found["query"][0], [[0.5] * 3, [1.0] * 3])


def test_the_copy_follows_the_master():
    """A clip of the bfloat16 copy alone is gone with the next cast; that of the master stays."""
    master = {"q": jnp.full((3, 1, 2), 1.5)}
    tx = qk_clip(root, max_logit=TAU)
    copy = jax.tree.map(lambda x: x.astype(jnp.bfloat16), master)
    clipped_copy, _, _ = apply(tx, copy, max_logits=jnp.array([4 * TAU]))
    assert np.all(clipped_copy["q"] == 0.75)
    still, _, _ = apply(optax.sgd(0.1), master)
    assert np.all(still["q"].astype(jnp.bfloat16) == 1.5)
    clipped, _, _ = apply(tx, master, max_logits=jnp.array([4 * TAU]))
    assert np.all(clipped["q"].astype(jnp.bfloat16) == 0.75)


# --- The network of the page ---------------------------------------------------------------------


def test_the_network_trains_within_the_limit():
    """The loss falls, and what a step adds to a logit is all that is above the limit."""
    history = page("A network that trains with it")["history"]
    losses = np.array([float(value) for value, _ in history])
    largest = np.array([np.max(logits) for _, logits in history])
    assert losses[-1] < losses[0] / 2
    assert largest[0] > 5  # what the network starts with
    assert largest[1:].max() < 2.0 * 1.35
