"""Weights end in the set after `apply_updates` has rounded; what was inside keeps its update."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import optax_clip
import reference

MILLION = 1_000_000
HALF = [jnp.float16, jnp.bfloat16]
DTYPES = [*HALF, jnp.float32]


def wide(x):
    return np.asarray(x).astype(np.float64)


def eps(dtype):
    return float(jnp.finfo(dtype).eps)


def train_step(constraint, params, updates):
    """One step of a chain, as `optax.apply_updates` lands it, with a product before the projection."""
    tx = optax.chain(optax.scale(-0.37), optax_clip.project_weights(constraint))
    with jax.numpy_dtype_promotion("standard"):
        updates, state = tx.update(updates, tx.init(params), params)
        return optax.apply_updates(params, updates), updates, optax_clip.metrics(state)


def draw(start, params_dtype, updates_dtype, size=MILLION):
    rng = np.random.default_rng(0)
    scale = {"inside": 0.03, "outside": 1.0}[start]
    params = np.clip(rng.normal(size=size) * scale, -3 * scale, 3 * scale)
    updates = rng.normal(size=size) * 0.1
    return jnp.asarray(params, params_dtype), jnp.asarray(updates, updates_dtype)


PAIRS = [(d, d) for d in DTYPES] + [(jnp.float32, jnp.bfloat16), (jnp.bfloat16, jnp.float32)]
EAGER_AND_JIT = pytest.mark.parametrize("wrap", [lambda f, **_: f, jax.jit], ids=["eager", "jit"])


@EAGER_AND_JIT
@pytest.mark.parametrize("start", ["inside", "outside"])
@pytest.mark.parametrize(("p_dtype", "u_dtype"), PAIRS, ids=lambda d: jnp.dtype(d).name)
@pytest.mark.parametrize(
    ("constraint", "low", "high"),
    [
        (optax_clip.box(-0.1, 0.1), -0.1, 0.1),
        (optax_clip.box(0.05, 0.1), 0.05, 0.1),
        (optax_clip.non_negative(), 0, np.inf),
        (optax_clip.norm_ball(0.1, ord=np.inf), -0.1, 0.1),
    ],
    ids=["box", "box without 0", "non_negative", "ball of order inf"],
)
def test_no_entry_of_a_million_lands_outside_a_box(constraint, low, high, p_dtype, u_dtype, start, wrap):
    params, updates = draw(start, p_dtype, u_dtype)
    landed, new, _ = wrap(train_step, static_argnums=0)(constraint, params, updates)
    assert landed.dtype == p_dtype and new.dtype == u_dtype
    assert np.sum((wide(landed) < low) | (wide(landed) > high)) == 0
    assert optax_clip.violation(landed, constraint) == 0


@EAGER_AND_JIT
@pytest.mark.parametrize("start", ["inside", "outside"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)
@pytest.mark.parametrize("radius", [0.9, 30.0])
def test_a_ball_of_a_million_entries_holds_in_float64(radius, dtype, start, wrap):
    params, updates = draw(start, dtype, dtype)
    constraint = optax_clip.norm_ball(radius)
    step = wrap(train_step, static_argnums=0)
    landed, _, _ = step(constraint, params, updates)
    assert np.linalg.norm(wide(landed)) <= radius
    assert optax_clip.violation(landed, constraint) == 0


@EAGER_AND_JIT
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)
@pytest.mark.parametrize(
    "constraint", [optax_clip.box(-0.1, 0.1), optax_clip.norm_ball(500.0)], ids=["box", "ball"]
)
def test_what_lands_inside_keeps_its_update_bit_for_bit(constraint, dtype, wrap):
    params, updates = draw("inside", dtype, dtype)
    _, new, recorded = wrap(train_step, static_argnums=0)(constraint, params, updates)
    free, _, _ = wrap(train_step, static_argnums=0)(lambda x: x, params, updates)
    inside = np.abs(wide(free)) <= (0.1 if constraint.shrinks is False else np.inf)
    plain = wrap(lambda u: optax.scale(-0.37).update(u, optax.EmptyState())[0])(updates)
    assert inside.mean() > 0.5
    np.testing.assert_array_equal(np.asarray(new)[inside], np.asarray(plain)[inside])
    assert float(recorded["project/fraction"]) == pytest.approx(1 - inside.mean(), abs=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)
def test_training_on_the_sphere_stays_within_4_eps(dtype):
    params, updates = draw("inside", dtype, dtype, size=1000)
    constraint = optax_clip.norm_sphere(2.0)
    for _ in range(3):
        params, _, _ = jax.jit(train_step, static_argnums=0)(constraint, params, updates)
    assert abs(np.linalg.norm(wide(params)) / 2 - 1) <= 4 * eps(dtype)
    assert optax_clip.violation(params, constraint) <= 2 * 4 * eps(dtype)


SETS = {
    "box": (lambda s: optax_clip.box(-0.5, 0.25), {"lower": -0.5, "upper": 0.25}),
    "non_negative": (lambda s: optax_clip.non_negative(), {}),
    "l2_ball": (lambda s: optax_clip.norm_ball(1.5, scope=s), {"radius": 1.5}),
    "linf_ball": (lambda s: optax_clip.norm_ball(0.5, ord=np.inf, scope=s), {"radius": 0.5}),
    "sphere": (lambda s: optax_clip.norm_sphere(1.5, scope=s), {"radius": 1.5}),
}


def tree(dtype, scale=1.0):
    rng = np.random.default_rng(1)
    return {
        "kernel": jnp.asarray(scale * rng.normal(size=(4, 3)), dtype),
        "bias": jnp.asarray(scale * rng.normal(size=3), dtype),
        "conv": jnp.asarray(scale * rng.normal(size=(2, 3, 4)), dtype),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)
@pytest.mark.parametrize("scope", ["global", "leaf", "unit", 0, (0, -1)], ids=str)
@pytest.mark.parametrize("kind", SETS)
def test_projection_and_violation_match_the_oracle(kind, scope, dtype):
    make, values = SETS[kind]
    params = tree(dtype)
    if scope == (0, -1):
        del params["bias"]  # it has one axis only
    expected = reference.project(params, kind, scope=scope, **values)
    projected = optax_clip.project(params, make(scope))
    for name, x in params.items():
        assert projected[name].dtype == x.dtype
        np.testing.assert_allclose(
            wide(projected[name]), expected[name], rtol=2 * eps(dtype), atol=20 * eps(jnp.float32)
        )
    found = optax_clip.violation(params, make(scope))
    outside = reference.violation(params, kind, scope=scope, **values)
    np.testing.assert_allclose(found, outside, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", SETS)
def test_parity_with_optax_projections(kind):
    def fill(params, value):
        return jax.tree.map(lambda x: jnp.full_like(x, value), params)

    params = tree(jnp.float32)
    theirs = {
        "box": lambda x: optax.projections.projection_box(x, fill(x, -0.5), fill(x, 0.25)),
        "non_negative": optax.projections.projection_non_negative,
        "l2_ball": lambda x: optax.projections.projection_l2_ball(x, 1.5),
        "linf_ball": lambda x: optax.projections.projection_linf_ball(x, 0.5),
        "sphere": lambda x: optax.projections.projection_l2_sphere(x, 1.5),
    }[kind]
    projected = optax_clip.project(params, SETS[kind][0]("global"))
    with jax.numpy_dtype_promotion("standard"):
        expected = theirs(params)
    for name in params:
        np.testing.assert_allclose(projected[name], expected[name], rtol=2e-6)


floats = st.floats(-4, 4, width=32)
vectors = arrays(np.float32, 5, elements=floats)


@pytest.mark.parametrize("kind", ["box", "non_negative", "l2_ball", "linf_ball"])
@given(x=vectors, y=vectors)
def test_invariants_of_the_convex_sets(kind, x, y):
    constraint = SETS[kind][0]("leaf")
    once = optax_clip.project(jnp.asarray(x), constraint)
    assert optax_clip.violation(once, constraint) == 0  # in the set
    np.testing.assert_array_equal(optax_clip.project(once, constraint), once)  # idempotent
    # Nearest point: <x - P(x), y - P(x)> <= 0 for every y in the set.
    p, inside = wide(once), wide(optax_clip.project(jnp.asarray(y), constraint))
    assert np.dot(wide(x) - p, inside - p) <= 1e-5 * (1 + np.dot(x, x))


@given(x=vectors)
def test_a_ball_keeps_the_direction(x):
    p = wide(optax_clip.project(jnp.asarray(x), optax_clip.norm_ball(0.5)))
    assert np.dot(p, x) >= (1 - 1e-5) * np.linalg.norm(p) * np.linalg.norm(wide(x)) - 1e-30


def test_bounds_are_rounded_inwards():
    # bfloat16(0.1) is 0.10009765625; the next one below is 0.099609375.
    x = jnp.asarray([1.0, -1.0], jnp.bfloat16)
    np.testing.assert_array_equal(
        wide(optax_clip.project(x, optax_clip.box(-0.1, 0.1))), [0.099609375, -0.099609375]
    )
    # float32(0.1) is 0.100000001490116.
    assert wide(optax_clip.project(jnp.float32(1), optax_clip.box(-0.1, 0.1))) < 0.1
    traced = jax.jit(lambda b, x: optax_clip.project(x, optax_clip.box(-b, b)))
    assert wide(traced(jnp.float32(0.1), x)).max() == 0.099609375
    # As a bfloat16 the bound itself is 0.10009765625, which is exact in every wider dtype.
    assert wide(traced(jnp.bfloat16(0.1), x)).max() == 0.10009765625
    assert wide(traced(jnp.bfloat16(0.1), x.astype(jnp.float32))).max() == 0.10009765625


@EAGER_AND_JIT
def test_edges_of_the_norm_sets(wrap):
    zeros, x = jnp.zeros(3), jnp.array([3.0, 4.0])
    ball = wrap(lambda r, x: optax_clip.project(x, optax_clip.norm_ball(r)))
    np.testing.assert_array_equal(ball(0.0, x), jnp.zeros(2))
    np.testing.assert_array_equal(ball(jnp.inf, x), x)
    np.testing.assert_array_equal(ball(0.5, zeros), zeros)
    np.testing.assert_array_equal(jax.jit(ball)(-1.0, x), jnp.zeros(2))  # traced: as 0
    broken = jnp.array([jnp.nan, 4.0])
    np.testing.assert_array_equal(ball(1.0, broken), broken)
    sphere = wrap(lambda x: optax_clip.project(x, optax_clip.norm_sphere(10.0)))
    np.testing.assert_array_equal(sphere(zeros), zeros)
    np.testing.assert_allclose(sphere(x), [6.0, 8.0], rtol=1e-7)
    huge = ball(1.0, jnp.array([3e30, 4e30]))
    np.testing.assert_allclose(huge, [0.6, 0.8], rtol=1e-6)
    complex_ball = ball(1.0, jnp.array([3 + 0j, 4j], jnp.complex64))
    np.testing.assert_allclose(complex_ball, [0.6, 0.8j], rtol=1e-6)


def test_derivatives_are_finite_and_those_of_the_projection():
    def landed(p, u):
        tx = optax_clip.project_weights(optax_clip.norm_ball(1.0))
        return optax.apply_updates(p, tx.update(u, tx.init(p), p)[0])

    p, u = jnp.array([0.3, 0.4]), jnp.array([3.0, 4.0])
    # w = r v / |v| at v = p + u = (3.3, 4.4): dw/dv = r (I - v v^T / |v|^2) / |v|, |v| = 5.5.
    expected = (np.eye(2) - np.outer([0.6, 0.8], [0.6, 0.8])) / 5.5
    np.testing.assert_allclose(jax.jacobian(landed, argnums=1)(p, u), expected, atol=1e-6)
    assert np.isfinite(jax.jacobian(landed, argnums=1)(jnp.zeros(2), jnp.zeros(2))).all()


def test_the_derivative_on_the_sphere_is_tangential():
    w = jnp.array([0.6, 0.8])
    tangent = np.eye(2) - np.outer(w, w)
    sphere = optax_clip.norm_sphere(1.0)
    np.testing.assert_allclose(
        jax.jacobian(lambda w: optax_clip.project(w, sphere))(w), tangent, atol=1e-6
    )
    tx = optax_clip.project_weights(sphere)
    landed = lambda u: w + tx.update(u, tx.init(w), w)[0]  # noqa: E731
    np.testing.assert_allclose(jax.jacobian(landed)(jnp.zeros(2)), tangent, atol=1e-6)


@EAGER_AND_JIT
def test_every_projects_each_third_step(wrap):
    params, update = jnp.zeros(2), jnp.ones(2)
    tx = optax_clip.project_weights(optax_clip.box(-0.5, 0.5), every=3, name="p")
    state, seen = tx.init(params), []
    step = wrap(tx.update)
    for _ in range(6):
        new, state = step(update, state, params)
        params = optax.apply_updates(params, new)
        seen.append((float(params[0]), float(optax_clip.metrics(state)["p/fraction"])))
    # 1, 2, then 3 is cut to 0.5; 1.5, 2.5, then 3.5 is cut again.
    assert seen == [(1, 0), (2, 0), (0.5, 1), (1.5, 0), (2.5, 0), (0.5, 1)]
    assert optax_clip.metrics(state)["p/steps"] == 6


def test_metrics_of_one_step():
    params = {"a": jnp.array([0.0, 0.0]), "b": jnp.array([0.0, 0.0])}
    updates = {"a": jnp.array([4.0, 0.5]), "b": jnp.array([-5.0, 0.0])}
    tx = optax_clip.project_weights(optax_clip.box(-1.0, 1.0))
    new, state = tx.update(updates, tx.init(params), params)
    np.testing.assert_array_equal(new["b"], [-1.0, 0.0])
    # Two of four entries move, by 3 and by 4.
    assert optax_clip.metrics(state) == {
        "project/distance": 5.0,
        "project/fraction": 0.5,
        "project/steps": 1,
    }


def test_frozen_and_integer_leaves_pass_through():
    params = {"w": jnp.array([9.0]), "frozen": jnp.array([9.0]), "n": jnp.array(3)}
    updates = {"w": jnp.array([1.0]), "frozen": None, "n": jnp.array(1)}
    for constraint in (optax_clip.box(-1.0, 1.0), optax_clip.norm_ball(1.0, scope="global")):
        tx = optax_clip.project_weights(constraint)
        new, _ = tx.update(updates, tx.init(params), params)
        assert new["frozen"] is None and new["n"] == 1
        np.testing.assert_allclose(params["w"] + new["w"], 1.0, rtol=1e-6)


def test_any_callable_is_a_set():
    params = {"w": jnp.array([3.0, 4.0])}
    halve = lambda tree: jax.tree.map(lambda x: x / 2, tree)  # noqa: E731
    np.testing.assert_array_equal(optax_clip.project(params, halve)["w"], [1.5, 2.0])
    assert optax_clip.violation(params, halve) == 2  # |4 - 2|
    tx = optax_clip.project_weights(halve)
    new, _ = tx.update({"w": jnp.ones(2)}, tx.init(params), params)
    np.testing.assert_array_equal(params["w"] + new["w"], [2.0, 2.5])


def test_a_huge_update_lands_exactly():
    params = jnp.array([0.05, -0.05], jnp.bfloat16)
    landed, _, _ = train_step(optax_clip.box(-0.1, 0.1), params, jnp.array([-3e38, 3e38], jnp.bfloat16))
    np.testing.assert_array_equal(wide(landed), [0.099609375, -0.099609375])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optax_clip.box(1, 0), "lower=1 and upper=0"),
        (lambda: optax_clip.box(float("nan"), 0), "lower=nan"),
        (lambda: optax_clip.box("0", 1), "lower='0'"),
        (lambda: optax_clip.norm_ball(-1.0), "radius=-1.0"),
        (lambda: optax_clip.norm_ball(float("nan")), "radius=nan"),
        (lambda: optax_clip.norm_ball(None), "radius=None"),
        (lambda: optax_clip.norm_ball(1.0, ord=3), "ord=3"),
        (lambda: optax_clip.norm_ball(1.0, scope="rows"), "scope='rows'"),
        (lambda: optax_clip.norm_sphere(-1.0), "radius=-1.0"),
        (lambda: optax_clip.norm_sphere(float("inf")), "radius=inf"),
        (lambda: optax_clip.project_weights(1.0), "constraint=1.0"),
        (lambda: optax_clip.project_weights(optax_clip.non_negative(), every=0), "every=0"),
        (lambda: optax_clip.project_weights(optax_clip.non_negative(), every=1.5), "every=1.5"),
        (lambda: optax_clip.project_weights(optax_clip.non_negative(), name=""), "name=''"),
        (lambda: optax_clip.where("kernel"), "predicate='kernel'"),
    ],
)
def test_bad_input_names_the_argument_and_its_value(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_bad_input_of_the_update():
    tx = optax_clip.project_weights(optax_clip.box(0, 1))
    with pytest.raises(ValueError, match="params=None"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
    with pytest.raises(ValueError, match=r"complex64 at 'a/w' of shape \(2,\)"):
        optax_clip.project({"a": {"w": jnp.ones(2, jnp.complex64)}}, optax_clip.box(0, 1))
    with pytest.raises(ValueError, match=r"scope=1 for leaf 'b' of shape \(3,\)"):
        optax_clip.project({"b": jnp.ones(3)}, optax_clip.norm_ball(1.0, scope=1))
