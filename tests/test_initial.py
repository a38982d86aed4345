"""Sets relative to the weights at the start, and the recipes that stand on them, in float64 NumPy."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import reference
from optax_clip import (
    initial,
    norm_ball,
    norm_shell,
    norm_sphere,
    normalize_by_norm,
    project,
    project_weights,
    relative_to_params,
    spectral_ball,
    violation,
)
from pages import names

SCOPES = ("global", "leaf", "unit", (-2, -1))
SETS = {
    "sphere": lambda k, scope: norm_sphere(initial(k), scope=scope),
    "ball, 2": lambda k, scope: norm_ball(initial(k), scope=scope),
    "ball, 1": lambda k, scope: norm_ball(initial(k), ord=1, scope=scope),
    "ball, inf": lambda k, scope: norm_ball(initial(k), ord=math.inf, scope=scope),
    "shell": lambda k, scope: norm_shell(initial(k / 2), initial(k), scope=scope),
}
ORDERS = {"ball, 1": 1, "ball, inf": math.inf}


def tree(seed, size=1.0):
    random = np.random.default_rng(seed)
    shapes = {"a": (3, 6, 4), "b": (5, 4)}
    return {
        key: jnp.asarray(size * random.normal(size=shape), jnp.float32) for key, shape in shapes.items()
    }


def norms(tree, scope, ord=None):
    if scope == "global":
        return [np.asarray(reference.global_norm(tree, ord))]
    return [np.asarray(x) for x in jax.tree.leaves(reference.tree_norms(tree, scope, ord))]


def stepped(constraint, params, grads, **how):
    tx = project_weights(constraint, **how)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    return optax.apply_updates(params, updates), state


# --- Norms of the start --------------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES, ids=str)
@pytest.mark.parametrize("kind", SETS)
def test_bound_is_kappa_times_the_norm_at_init(kind, scope):
    params, grads = tree(0), tree(1, 5.0)
    new, _ = stepped(SETS[kind](0.5, scope), params, grads)
    ord = ORDERS.get(kind)
    for start, end in zip(norms(params, scope, ord), norms(new, scope, ord), strict=True):
        np.testing.assert_array_less(end, 0.5 * start * (1 + 3e-6))
        np.testing.assert_allclose(end, 0.5 * start, rtol=2e-5)


def test_spectral_ball_is_relative_to_the_largest_singular_value():
    params, grads = tree(0), tree(1, 5.0)
    for how in ({"method": "polar"}, {"method": "eigh"}):
        new, _ = stepped(spectral_ball(initial(0.5), **how), params, grads)
        for key in params:
            limit = 0.5 * np.linalg.norm(np.asarray(params[key], np.float64), 2, (-2, -1))
            np.testing.assert_allclose(
                np.linalg.norm(np.asarray(new[key], np.float64), 2, (-2, -1)), limit, rtol=1e-5
            )


@pytest.mark.parametrize("make", [*SETS, "spectral"])
def test_zeros_at_the_start_are_left_free(make):
    constraint = spectral_ball(initial()) if make == "spectral" else SETS[make](1.0, "leaf")
    params = {"w": jnp.zeros((4, 3)), "v": tree(0)["b"]}
    grads = {"w": tree(1)["b"][:4, :3], "v": tree(1)["b"]}
    new, _ = stepped(constraint, params, grads)
    np.testing.assert_array_equal(new["w"], grads["w"])
    assert np.any(new["v"] != params["v"] + grads["v"])


def test_ball_of_order_inf_is_a_box_relative_to_the_start():
    params, grads = tree(0), tree(1, 5.0)
    new, _ = stepped(norm_ball(initial(0.5), ord=math.inf), params, grads)
    for key, x in params.items():
        bound = 0.5 * jnp.abs(x).max()
        assert jnp.abs(new[key]).max() <= bound  # and at it, but for a rounding of the update
        np.testing.assert_allclose(new[key], jnp.clip(x + grads[key], -bound, bound), rtol=3e-7)


@pytest.mark.parametrize("make", [*SETS, "spectral"])
def test_project_and_violation_know_of_no_start(make):
    constraint = spectral_ball(initial()) if make == "spectral" else SETS[make](1.0, "leaf")
    for function in (project, violation):
        with pytest.raises(ValueError, match="initial"):
            function(tree(0), constraint)


@pytest.mark.parametrize("kappa", [-1.0, jnp.nan, jnp.inf])
def test_kappa(kappa):
    with pytest.raises(ValueError, match="kappa"):
        initial(kappa)


def test_radii_by_formula_and_by_array():
    params, grads = tree(0), tree(1, 5.0)
    by_shape, _ = stepped(
        norm_sphere(lambda path, x: math.sqrt(x.size) if path == "a" else 2.0), params, grads
    )
    np.testing.assert_allclose(np.linalg.norm(by_shape["a"]), math.sqrt(72), rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(by_shape["b"]), 2.0, rtol=1e-6)
    radii = np.array([1.0, 2.0, 3.0], np.float32)[:, None, None]
    by_array, _ = stepped(norm_sphere({"a": radii, "b": 4.0}, scope=(-2, -1)), params, grads)
    np.testing.assert_allclose(np.linalg.norm(by_array["a"], axis=(-2, -1)), radii.ravel(), rtol=1e-6)


# --- The state -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [*SETS, "spectral"])
def test_map_params_leaves_the_radii(make):
    constraint = spectral_ball(initial()) if make == "spectral" else SETS[make](1.0, "leaf")
    tx = optax.chain(optax.scale_by_adam(), project_weights(constraint))
    state = tx.init(tree(0))
    ones = optax.tree.map_params(tx, lambda x: x + 1, state)
    chex.assert_trees_all_equal(ones[1], state[1])
    assert np.all(ones[0].mu["a"] == 1)


@pytest.mark.filterwarnings("default")  # Orbax warns of itself.
def test_from_an_abstract_init_to_a_checkpoint(tmp_path):
    """NaN until it is filled, whatever the set."""
    sets = {**{k: make(1.0, "leaf") for k, make in SETS.items()}, "spectral": spectral_ball(initial())}
    tx = {key: project_weights(each) for key, each in sets.items()}
    states = {key: each.init(tree(0)) for key, each in tx.items()}
    empty = {key: each.init(jax.eval_shape(lambda: tree(0))) for key, each in tx.items()}
    for key in tx:
        assert jax.tree.map(jax.typeof, empty[key]) == jax.tree.map(jax.typeof, states[key])
        assert all(np.all(np.isnan(x)) for x in jax.tree.leaves(empty[key].memory))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", states)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", empty)
    chex.assert_trees_all_equal(restored, states)


# --- Ten thousand steps --------------------------------------------------------------------------

# Within four roundings of the dtype, as `norm_sphere` says; a radius taken anew from the weights at each
# step would walk away.
DRIFT = {"float32": 4 * 2.0**-23, "bfloat16": 4 * 2.0**-7}


@pytest.mark.parametrize("dtype", DRIFT)
def test_no_drift_over_ten_thousand_steps(dtype):
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 8)), dtype)}
    tx = project_weights(norm_sphere(initial(), scope=(-2, -1)))
    start = norms(params, (-2, -1))[0]

    def step(carry, key):
        params, state = carry
        updates = {"w": (0.1 * jax.random.normal(key, (2, 16, 8))).astype(dtype)}
        updates, state = tx.update(updates, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), jnp.linalg.norm(params["w"].astype(jnp.float32), axis=(-2, -1))

    keys = jax.random.split(jax.random.key(0), 10_000)
    (end, _), along = jax.jit(lambda carry: jax.lax.scan(step, carry, keys))((params, tx.init(params)))
    drift = np.abs(norms(end, (-2, -1))[0] / start - 1).max()
    largest = np.abs(np.asarray(along, np.float64) / start.reshape(2) - 1).max()
    print(f"{dtype}: after 10,000 steps {drift:.1e}, at most {largest:.1e} on the way")
    assert np.any(end["w"] != params["w"])
    assert drift <= largest + 1e-6
    assert largest < DRIFT[dtype]


# --- Recipes -------------------------------------------------------------------------------------


def on_sphere(inner, lr):
    """Hyperball: a step as long as the weights, times the learning rate, on the sphere of the start."""
    return optax.chain(
        inner,
        normalize_by_norm(relative_to_params(1.0, eps=0.0), scope=(-2, -1)),
        optax.scale_by_learning_rate(lr),
        project_weights(norm_sphere(initial(), scope=(-2, -1))),
    )


def frobenius(x):
    return np.sqrt(np.sum(x**2, axis=(-2, -1), keepdims=True))


def adam_direction(grads, b1=0.9, b2=0.999, eps=1e-8):
    m = v = 0.0
    for t, g in enumerate(grads, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        yield (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)


def muon_direction(grads, beta=0.95, coefficients=(3.4445, -4.775, 2.0315)):
    """Nesterov's momentum, then Newton and Schulz' five steps from the matrix over its norm."""
    a, b, c = coefficients
    m = 0.0
    for t, g in enumerate(grads, 1):
        m = beta * m + (1 - beta) * g
        x = beta * m / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
        x = x.T if (tall := x.shape[0] > x.shape[1]) else x
        x = x / np.linalg.norm(x)
        for _ in range(5):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        yield x.T if tall else x


def hyperball(w, directions, lr):
    """w <- R n(w - lr R n(u)), n(x) = x / |x|_F, R = |w_0|_F."""
    radius = np.linalg.norm(w)
    for u in directions:
        w = w - lr * np.linalg.norm(w) * u / np.linalg.norm(u)
        w = radius * w / np.linalg.norm(w)
    return w


def stacked_muon():
    """Optax's Muon for `[..., in, out]`: it takes all other axes as a batch."""
    numbers = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    return optax.contrib.scale_by_muon(
        weight_dimension_numbers=lambda params: jax.tree.map(lambda _: numbers, params)
    )


@pytest.mark.parametrize(
    ("inner", "direction"),
    [(optax.scale_by_adam, adam_direction), (stacked_muon, muon_direction)],
    ids=["AdamH", "MuonH"],
)
def test_hyperball_on_a_stack_is_its_formula_on_each_matrix(inner, direction, standard_promotion):
    """[layers, experts, in, out] against separate matrices in float64."""
    random = np.random.default_rng(0)
    start = random.normal(size=(2, 3, 6, 4)) * random.uniform(0.1, 3, size=(2, 3, 1, 1))
    all_grads = random.normal(size=(5, 2, 3, 6, 4))
    params, tx = {"w": jnp.asarray(start, jnp.float32)}, on_sphere(inner(), 0.1)
    state, step = tx.init(params), jax.jit(tx.update)
    for g in all_grads:
        updates, state = step({"w": jnp.asarray(g, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
    expected = np.empty_like(start)
    for index in np.ndindex(2, 3):
        grads = [g[index] for g in all_grads]
        expected[index] = hyperball(start[index], direction(grads), 0.1)
    error = np.abs(np.asarray(params["w"], np.float64) - expected).max() / np.abs(expected).max()
    print(f"{direction.__name__}: {error:.1e}")
    with jax.numpy_rank_promotion("allow"):
        np.testing.assert_allclose(params["w"], expected, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(
        frobenius(np.asarray(params["w"], np.float64)), frobenius(start), rtol=1e-6
    )


def test_lars_is_a_normalisation_by_a_rule(standard_promotion):
    """You, Gitman, Ginsburg 2017: each layer's step is eta |w| (g + b w) / |g + b w|, then momentum."""
    random = np.random.default_rng(0)
    w, all_grads = random.normal(size=(6, 4)), random.normal(size=(5, 6, 4))
    tx = optax.chain(
        optax.add_decayed_weights(0.01),
        normalize_by_norm(relative_to_params(0.001, eps=0.0), scope="leaf"),
        optax.scale_by_learning_rate(2.0),
        optax.trace(0.9),
    )
    params = {"w": jnp.asarray(w, jnp.float32)}
    state, velocity = tx.init(params), 0.0
    for g in all_grads:
        updates, state = tx.update({"w": jnp.asarray(g, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
        d = g + 0.01 * w
        velocity = 0.9 * velocity + 2.0 * 0.001 * np.linalg.norm(w) * d / np.linalg.norm(d)
        w = w - velocity
    np.testing.assert_allclose(params["w"], w, rtol=1e-5, atol=1e-6)


def test_lars_is_optax_s_trust_ratio(standard_promotion):
    params, grads = tree(0), tree(1)
    ours = normalize_by_norm(relative_to_params(0.001, eps=0.0), scope="leaf")
    theirs = optax.scale_by_trust_ratio(trust_coefficient=0.001)
    got, _ = ours.update(grads, ours.init(params), params)
    expected, _ = theirs.update(grads, theirs.init(params), params)
    chex.assert_trees_all_close(got, expected, rtol=1e-6)


def page(heading):
    return names(f"projections: {heading}")


def test_the_recipes_of_the_page_train_on_the_sphere():
    found = page("Norms of the start")
    for losses in found["losses"].values():
        assert losses[-1] < losses[0] / 2
    for name, model in found["trained"].items():
        before, after = (reference.tree_norms(m, (-2, -1)) for m in (found["params"], model))
        for key in before:
            np.testing.assert_allclose(after[key], before[key], rtol=1e-6, err_msg=f"{name} {key}")
