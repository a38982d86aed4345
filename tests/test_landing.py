"""Where weights end after `apply_updates` has rounded, by the ways of every platform."""

import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import optax_clip as oc
from optax_clip import _landing

# The weights, and what comes to be projected.
PAIRS = [
    ("float32", "float32"),
    ("bfloat16", "bfloat16"),
    ("float16", "float16"),
    ("bfloat16", "float32"),
    ("float32", "bfloat16"),
]
OPTIMIZERS = {"sgd": optax.sgd(0.3), "adam": optax.adam(0.1, eps=1e-3), "lion": optax.lion(0.1)}
SETS = {
    "box": (oc.box(-0.1, 0.3), lambda x: (x < -0.1) | (x > 0.3)),
    "box without 0": (oc.box(0.25, 0.75), lambda x: (x < 0.25) | (x > 0.75)),
    "non_negative": (oc.non_negative(), lambda x: x < 0),
    "ball of a unit": (oc.norm_ball(3.0, scope="unit"), lambda x: np.linalg.norm(x, axis=0) > 3.0),
    "shell": (oc.norm_shell(0.5, 20.0), lambda x: np.linalg.norm(x) > 20.0),
}
BEHIND = {
    "box": ("sgd", "adam", "lion"),
    "box without 0": ("adam",),
    "non_negative": ("sgd",),
    "ball of a unit": ("sgd", "adam"),
    "shell": ("lion",),
}


def wide(x):
    return np.asarray(x, np.float64)


def name(pair):
    return " ".join(pair)


@pytest.mark.usefixtures("platform", "standard_promotion")
def test_what_is_made_projected_and_added_in_one_program_lands():
    """Weights of each type in one tree; NaN is outside."""
    random = np.random.default_rng(0)
    spread = np.geomspace(0.01, 1, 100)
    draw = lambda: spread * random.normal(size=(300, 100))  # noqa: E731
    params = {name(pair): jnp.asarray(draw(), pair[0]) for pair in PAIRS}
    cast = optax.stateless(lambda us, _: {name(pair): us[name(pair)].astype(pair[1]) for pair in PAIRS})
    chains = {
        (kind, each): optax.chain(OPTIMIZERS[each], cast, oc.project_weights(SETS[kind][0]))
        for kind, optimizers in BEHIND.items()
        for each in optimizers
    }

    @jax.jit
    def step(carry, grads):
        after = {}
        for key, tx in chains.items():
            weights, state = carry[key]
            updates, state = tx.update(grads, state, weights)
            after[key] = optax.apply_updates(weights, updates), state
        return after

    carry = {key: (params, tx.init(params)) for key, tx in chains.items()}
    for _ in range(2):
        carry = step(carry, {name(pair): jnp.asarray(draw(), pair[0]) for pair in PAIRS})
        for (kind, each), (weights, _) in carry.items():
            for pair, x in weights.items():
                if (kind, pair) != ("shell", "float32 bfloat16"):  # which needs a second step
                    outside = SETS[kind][1](wide(x)) | np.isnan(wide(x)).any()
                    assert not np.any(outside), (kind, each, pair)


GRIDS = {
    "float16": np.arange(2**16, dtype=np.uint16).view(np.float16),
    "bfloat16": np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.arange(2**8, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.arange(2**8, dtype=np.uint8).view(ml_dtypes.float8_e5m2),
}


def finite(dtype):
    with np.errstate(invalid="ignore"):
        numbers = wide(GRIDS[dtype])
    return numbers[np.isfinite(numbers)]


@pytest.mark.parametrize("dtype", GRIDS)
def test_the_next_number_of_every_normal_one(dtype):
    grid = np.unique(finite(dtype))
    info = jnp.finfo(dtype)
    least = max(float(info.smallest_normal), 2.0**-125 / float(info.eps))  # whose step is normal
    at = np.flatnonzero(np.abs(grid[1:-1]) >= least) + 1
    d = jnp.asarray(grid[at], jnp.float32)
    step = _landing._to_the_next(d, jnp.dtype(dtype))
    np.testing.assert_array_equal(wide((d + step).astype(dtype)), grid[at + 1])
    np.testing.assert_array_equal(wide((d - step).astype(dtype)), grid[at - 1])


def test_every_sum_of_float8_is_that_of_apply_updates(standard_promotion):
    for dtype in ("float8_e4m3fn", "float8_e5m2"):
        numbers = finite(dtype)
        p, u = (jnp.asarray(x.ravel(), dtype) for x in np.meshgrid(numbers, numbers))
        ours = jax.jit(_landing.add_as_apply_updates)(p, u)
        np.testing.assert_array_equal(wide(ours), wide(jax.jit(optax.apply_updates)(p, u)))


def stepped(tx, params, updates, **extra):
    new, state = jax.jit(functools.partial(tx.update, **extra))(updates, tx.init(params), params)
    return optax.apply_updates(params, new), new, oc.metrics(state)


@pytest.mark.parametrize("narrow", ["float32", "bfloat16", "float16"])
def test_weights_of_float64_with_narrower_updates(narrow, x64, standard_promotion):
    """0.1 is no number of any of these types; the weights come from 0.3 times as far outside."""
    params = jnp.array([0.13, -0.13, 0.05, 0.1])
    updates = jnp.zeros(4, narrow)
    sets = [
        oc.box(-0.1, 0.1),
        oc.norm_ball(0.1, ord=math.inf),
        oc.norm_ball(0.18),
        oc.norm_shell(0.1, 0.18),
    ]
    sets += [oc.norm_ball(0.3, ord=1)]
    for constraint in sets:
        tx = oc.project_weights(constraint)
        ended, new, _ = stepped(tx, params, updates)
        assert ended.shape == new.shape == (4,) and new.dtype == narrow and ended.dtype == "float64"
        once = float(jnp.finfo(narrow).eps) * 0.1
        assert oc.violation(ended, constraint) <= once
        ended, *_ = stepped(tx, ended, updates)
        assert oc.violation(ended, constraint) == 0, constraint
    halved = oc.rescale_weights(lambda path, leaf, peak: 1 / peak, signal="peak")
    ended, new, _ = stepped(halved, params, updates, peak=2.0)
    assert new.shape == (4,) and np.all(np.abs(ended) <= np.abs(params) / 2)
    heads = oc.qk_clip(lambda path, leaf, eta: eta, max_logit=1.0)
    ended, new, _ = stepped(heads, params, updates, max_logits=jnp.float32(2.0))
    assert new.shape == (4,) and np.all(np.abs(ended) <= np.abs(params) / 2)


@pytest.mark.parametrize("narrow", ["float16"])
def test_a_miss_below_the_normal_numbers_of_the_update(narrow):
    """The next number below 0 is then the smallest there is."""
    below = np.nextafter(np.float32(0.1), np.float32(0))  # the largest float32 in the box
    params = jnp.array([np.nextafter(below, np.float32(1))])
    with jax.numpy_dtype_promotion("standard"):
        ended, _, _ = stepped(oc.project_weights(oc.box(-0.1, 0.1)), params, jnp.zeros(1, narrow))
    assert 0 < float(ended[0]) <= 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tiny_weights_whose_steps_a_cpu_would_flush(dtype):
    random = np.random.default_rng(0)
    params, updates = (jnp.asarray(3e-34 * random.normal(size=10_000), dtype) for _ in range(2))
    ended, _, _ = stepped(oc.project_weights(oc.box(-1e-34, 1e-34)), params, updates)
    assert np.all(np.abs(wide(ended)) <= 1e-34)


INFINITE = [(-math.inf, 1.0), (-1.0, math.inf), (-math.inf, math.inf), (0.5, 0.5), (-1.0, 1.0)]


@pytest.mark.usefixtures("platform")
def test_the_share_of_weights_at_a_bound():
    params = {"w": jnp.array([[-3.0, -1.0, -0.5], [0.5, 1.0, 2.0]]), "b": jnp.array([1.0, 30.0])}
    for low, high in INFINITE:
        _, _, found = stepped(
            oc.project_weights(oc.box(low, high)), params, jax.tree.map(jnp.zeros_like, params)
        )
        every = np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)])
        assert found.keys() == {"project/fraction", "project/steps"}
        ended = np.clip(every, low, high)
        assert float(found["project/fraction"]) == pytest.approx(
            np.mean((ended == low) | (ended == high))
        )


def test_on_other_steps_the_share_is_0():
    params, seen = jnp.array([3.0, 0.5]), []
    tx = oc.project_weights(oc.box(-1.0, 1.0), every=2)
    state = tx.init(params)
    for _ in range(4):
        updates, state = jax.jit(tx.update)(jnp.zeros(2), state, params)
        params = optax.apply_updates(params, updates)
        seen.append(float(oc.metrics(state)["project/fraction"]))
    assert seen == [0, 0.5, 0, 0.5]


BALLS = {
    "number": lambda r: oc.norm_ball(r, ord=math.inf),
    "unit": lambda r: oc.norm_ball(r, ord=math.inf, scope="unit"),
    "global": lambda r: oc.norm_ball(r, ord=math.inf, scope="global"),
    "groups": lambda r: oc.norm_ball({"w": r}, ord=math.inf, scope=oc.groups(lambda path, leaf: "w")),
}


@pytest.mark.parametrize("kind", BALLS)
def test_a_complex_ball_of_order_inf_is_by_modulus(kind):
    ball, x = BALLS[kind](0.1), jnp.array([3 + 4j, 0.05j, 3e38 + 3e38j])
    found = np.asarray(oc.project(x, ball), np.complex128)
    np.testing.assert_allclose(found, [0.06 + 0.08j, 0.05j, 0.1 * (1 + 1j) / math.sqrt(2)], rtol=3e-6)
    assert np.all(np.abs(found) <= 0.1)
    assert oc.violation(jnp.array([3 + 4j]), ball) == pytest.approx(4.9, rel=1e-6)
    weights, updates = {"w": jnp.array([0.05j, 0.02 + 0j])}, {"w": jnp.array([3 + 4j, 0.01j])}
    ended, new, recorded = stepped(oc.project_weights(ball), weights, updates)
    assert np.all(np.abs(np.asarray(ended["w"], np.complex128)) <= 0.1)
    np.testing.assert_array_equal(new["w"][1], updates["w"][1])
    assert recorded == {"project/fraction": 0.5, "project/steps": 1}


def test_a_complex_ball_of_order_inf_relative_to_the_start():
    params = jnp.array([3 + 4j, 1j])
    ended, _, found = stepped(
        oc.project_weights(oc.norm_ball(oc.initial(0.5), ord=math.inf)),
        params,
        jnp.zeros(2, jnp.complex64),
    )
    np.testing.assert_allclose(ended, [1.5 + 2j, 1j], rtol=3e-6)
    assert found["project/fraction"] == 0.5


def test_the_ball_of_order_inf_is_inside_of_a_radius_that_is_no_float():
    for kind, make in BALLS.items():
        found = oc.project({"w": jnp.array([1.0, -1.0])}, make(0.1))["w"]
        assert np.all(np.abs(np.asarray(found, np.float64)) <= 0.1), kind
