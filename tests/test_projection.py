"""Weights end in the set after `apply_updates` has rounded; what was inside keeps its update."""

import functools

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
from optax_clip import _landing

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


JITTED_STEP = jax.jit(train_step, static_argnums=0)


def draw(start, params_dtype, updates_dtype, size=MILLION, huge=False):
    """Weights and updates; with ``huge`` a third of the latter is 300 times larger, a third enormous."""
    rng = np.random.default_rng(0)
    scale = {"inside": 0.03, "outside": 1.0}[start]
    params = np.clip(rng.normal(size=size) * scale, -3 * scale, 3 * scale)
    updates = rng.normal(size=size) * 0.1
    if huge:
        updates[::3] *= 300
        updates[1::3] = np.sign(updates[1::3]) * float(jnp.finfo(updates_dtype).max) / 2
    return jnp.asarray(params, params_dtype), jnp.asarray(updates, updates_dtype)


SAME = [(d, d) for d in DTYPES]
# An update with fewer bits than the weights cannot reach every weight: it takes some steps to arrive.
NARROW = (jnp.float32, jnp.bfloat16)
PAIRS = [*SAME, NARROW, (jnp.bfloat16, jnp.float32)]
EAGER_AND_JIT = pytest.mark.parametrize("wrap", [lambda f, **_: f, jax.jit], ids=["eager", "jit"])
BY_NAME = {"ids": lambda d: jnp.dtype(d).name}

BOXES = {
    "box": (optax_clip.box(-0.1, 0.1), -0.1, 0.1),
    "box without 0": (optax_clip.box(0.05, 0.1), 0.05, 0.1),
    "non_negative": (optax_clip.non_negative(), 0, np.inf),
    "ball of order inf": (optax_clip.norm_ball(0.1, ord=np.inf), -0.1, 0.1),
}


@pytest.mark.parametrize("start", ["inside", "outside"])
@pytest.mark.parametrize(("p_dtype", "u_dtype"), PAIRS, **BY_NAME)
@pytest.mark.parametrize("kind", BOXES)
def test_no_entry_of_a_million_lands_outside_a_box(kind, p_dtype, u_dtype, start):
    constraint, low, high = BOXES[kind]
    params, updates = draw(start, p_dtype, u_dtype, huge=True)
    landed, new, _ = JITTED_STEP(constraint, params, updates)
    assert landed.dtype == p_dtype and new.dtype == u_dtype
    assert np.sum((wide(landed) < low) | (wide(landed) > high)) == 0
    assert optax_clip.violation(landed, constraint) == 0
    # Each of the update and the sum rounds once, and one step of the update goes inwards.
    exact = np.clip(wide(JITTED_STEP(free, params, updates)[0]), low, high)
    ulp = eps(u_dtype if (p_dtype, u_dtype) == NARROW else p_dtype)
    reach = np.maximum(np.abs(exact), np.abs(wide(params)))
    assert np.all(np.abs(wide(landed) - exact) <= 2 * ulp * reach)


def free(params):
    return params


@pytest.mark.parametrize("kind", BOXES)
def test_no_entry_lands_outside_a_box_without_jit(kind):
    constraint, low, high = BOXES[kind]
    for p_dtype, u_dtype in PAIRS:
        params, updates = draw("outside", p_dtype, u_dtype, size=10_000, huge=True)
        landed, _, _ = train_step(constraint, params, updates)
        assert np.sum((wide(landed) < low) | (wide(landed) > high)) == 0


@pytest.mark.parametrize("start", ["inside", "outside"])
@pytest.mark.parametrize("dtype", DTYPES, **BY_NAME)
@pytest.mark.parametrize("bound", [1e-40, 1e-7])
def test_bounds_among_the_subnormal_numbers_hold(bound, dtype, start):
    params, updates = draw(start, dtype, dtype, huge=True)
    if start == "inside":
        params = (params.astype(jnp.float32) * np.float32(bound)).astype(dtype)
    landed, _, _ = JITTED_STEP(optax_clip.box(-bound, bound), params, updates)
    assert np.sum(np.abs(wide(landed)) > bound) == 0


@pytest.mark.parametrize(("p_dtype", "u_dtype"), [*SAME, (jnp.bfloat16, jnp.float32)], **BY_NAME)
@pytest.mark.parametrize("bounds", [(1.0, 1.0), (1.0, 1.01)], ids=str)
def test_a_box_narrower_than_the_weights_can_tell_is_reached_in_two_steps(bounds, p_dtype, u_dtype):
    params, updates = draw("outside", p_dtype, u_dtype, huge=True)
    params = params * jnp.asarray(100, p_dtype)
    for _ in range(2):
        params, _, _ = JITTED_STEP(optax_clip.box(*bounds), params, updates)
    assert np.sum((wide(params) < bounds[0]) | (wide(params) > bounds[1])) == 0


@pytest.mark.parametrize("start", ["inside", "outside"])
@pytest.mark.parametrize(("p_dtype", "u_dtype"), PAIRS, **BY_NAME)
@pytest.mark.parametrize("radius", [0.9, 1000.0])
@pytest.mark.parametrize("ord", [1, 2])
def test_a_ball_of_a_million_entries_holds_in_float64(ord, radius, p_dtype, u_dtype, start):
    params, updates = draw(start, p_dtype, u_dtype)
    constraint = optax_clip.norm_ball(radius, ord=ord)
    for _ in range(4 if (p_dtype, u_dtype) == NARROW else 1):
        params, _, _ = JITTED_STEP(constraint, params, updates)
    assert np.linalg.norm(wide(params), ord) <= radius
    assert optax_clip.violation(params, constraint) == 0


@pytest.mark.parametrize("dtype", DTYPES, **BY_NAME)
@pytest.mark.parametrize("ord", [1, 2])
def test_a_ball_holds_without_jit_and_for_huge_updates(ord, dtype):
    params, updates = draw("outside", dtype, dtype, size=10_000, huge=True)
    landed, _, _ = train_step(optax_clip.norm_ball(0.9, ord=ord), params, updates)
    assert np.linalg.norm(wide(landed), ord) <= 0.9


@EAGER_AND_JIT
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)
@pytest.mark.parametrize(
    "constraint",
    [optax_clip.box(-0.1, 0.1), optax_clip.norm_ball(500.0), optax_clip.norm_ball(5e5, ord=1)],
    ids=["box", "ball", "ball of order 1"],
)
def test_what_lands_inside_keeps_its_update_bit_for_bit(constraint, dtype, wrap):
    params, updates = draw("inside", dtype, dtype)
    _, new, recorded = wrap(train_step, static_argnums=0)(constraint, params, updates)
    reached, _, _ = wrap(train_step, static_argnums=0)(free, params, updates)
    inside = np.abs(wide(reached)) <= (0.1 if constraint.shrinks is False else np.inf)
    plain = wrap(lambda u: optax.scale(-0.37).update(u, optax.EmptyState())[0])(updates)
    assert inside.mean() > 0.5
    np.testing.assert_array_equal(np.asarray(new)[inside], np.asarray(plain)[inside])
    if constraint.bounds:
        assert "project/distance" not in recorded
    else:
        assert float(recorded["project/fraction"]) == 1 - inside.mean() == recorded["project/distance"]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)
def test_training_on_the_sphere_stays_within_4_eps(dtype):
    params, updates = draw("inside", dtype, dtype, size=1000)
    constraint = optax_clip.norm_sphere(2.0)
    for _ in range(3):
        params, _, _ = jax.jit(train_step, static_argnums=0)(constraint, params, updates)
    assert abs(np.linalg.norm(wide(params)) / 2 - 1) <= 4 * eps(dtype)
    assert optax_clip.violation(params, constraint) <= 2 * 4 * eps(dtype)


@pytest.mark.parametrize(
    ("constraint", "size"),
    [
        (optax_clip.norm_sphere(0.1, scope="unit"), lambda w: np.linalg.norm(w, axis=0)),
        (optax_clip.simplex(0.1, scope="unit"), lambda w: w.sum(axis=0)),
    ],
    ids=["sphere", "simplex"],
)
def test_landing_from_far_outside_on_a_set_with_no_inside(constraint, size):
    """Weights ten times too large: roundings of their size, but to no one side, then 4 eps."""
    params = jax.random.normal(jax.random.key(0), (64, 64))
    for bound in (16, 4):
        params, _, _ = jax.jit(train_step, static_argnums=0)(constraint, params, jnp.zeros_like(params))
        off = size(wide(params)) / 0.1 - 1
        assert np.abs(off).max() <= bound * eps(jnp.float32)
        assert off.min() < 0 < off.max()


SETS = {
    "box": (lambda s: optax_clip.box(-0.5, 0.25), {"lower": -0.5, "upper": 0.25}),
    "non_negative": (lambda s: optax_clip.non_negative(), {}),
    "l1_ball": (lambda s: optax_clip.norm_ball(1.5, ord=1, scope=s), {"radius": 1.5}),
    "l2_ball": (lambda s: optax_clip.norm_ball(1.5, scope=s), {"radius": 1.5}),
    "linf_ball": (lambda s: optax_clip.norm_ball(0.5, ord=np.inf, scope=s), {"radius": 0.5}),
    "shell": (lambda s: optax_clip.norm_shell(2.0, 2.5, scope=s), {"lower": 2.0, "upper": 2.5}),
    "sphere": (lambda s: optax_clip.norm_sphere(1.5, scope=s), {"radius": 1.5}),
    "simplex": (lambda s: optax_clip.simplex(1.5, scope=s), {"total": 1.5}),
    "spectral_ball": (lambda s: optax_clip.spectral_ball(1.5), {"radius": 1.5}),
}
WITHOUT_SCOPE = ("box", "non_negative", "spectral_ball")
SCOPES = ["global", "leaf", "unit", 0, (0, -1)]
CASES = [(kind, s) for kind in SETS for s in SCOPES if s == "leaf" or kind not in WITHOUT_SCOPE]


def tree(dtype, scale=1.0):
    rng = np.random.default_rng(1)
    return {
        "kernel": jnp.asarray(scale * rng.normal(size=(4, 3)), dtype),
        "bias": jnp.asarray(scale * rng.normal(size=3), dtype),
        "conv": jnp.asarray(scale * rng.normal(size=(2, 3, 4)), dtype),
    }


def check_against_the_oracle(kind, scope, dtype):
    make, values = SETS[kind]
    params = tree(dtype)
    if scope == (0, -1):
        del params["bias"]  # it has one axis only
    expected = reference.project(params, kind, scope=scope, **values)
    projected = optax_clip.project(params, make(scope))
    # The spectral ball aims 34 eps of its radius of 1.5 inside, and its decomposition tells 16.
    rtol, atol = (2, 20) if kind != "spectral_ball" else (4, 100)
    for name, x in params.items():
        assert projected[name].dtype == x.dtype
        np.testing.assert_allclose(
            wide(projected[name]),
            expected[name],
            rtol=rtol * eps(dtype),
            atol=atol * min(eps(dtype), eps(jnp.float32)) + (kind == "spectral_ball") * 4 * eps(dtype),
        )
    # The violation is a float32, formed in float64 for float64 weights.
    found = optax_clip.violation(params, make(scope))
    outside = reference.violation(params, kind, scope=scope, **values)
    np.testing.assert_allclose(found, outside, rtol=8 * eps(jnp.float32), atol=8 * eps(jnp.float32))
    inside = reference.violation(projected, kind, scope=scope, **values)
    exact = kind not in ("simplex", "shell", "sphere")
    assert inside <= (0 if exact and dtype != jnp.float64 else 1.5 * 4 * eps(dtype))


@pytest.mark.parametrize("dtype", DTYPES, **BY_NAME)
@pytest.mark.parametrize(("kind", "scope"), CASES, ids=str)
def test_projection_and_violation_match_the_oracle(kind, scope, dtype):
    check_against_the_oracle(kind, scope, dtype)


@pytest.mark.parametrize(("kind", "scope"), CASES, ids=str)
def test_projection_and_violation_match_the_oracle_in_64_bits(kind, scope, x64):
    check_against_the_oracle(kind, scope, jnp.float64)


@pytest.mark.parametrize("scope", ["global", "leaf"])
@pytest.mark.parametrize("kind", [kind for kind in SETS if kind not in ("shell", "spectral_ball")])
def test_parity_with_optax_projections(kind, scope, standard_promotion):
    def fill(params, value):
        return jax.tree.map(lambda x: jnp.full_like(x, value), params)

    theirs = {
        "box": lambda x: optax.projections.projection_box(x, fill(x, -0.5), fill(x, 0.25)),
        "non_negative": optax.projections.projection_non_negative,
        "l1_ball": lambda x: optax.projections.projection_l1_ball(x, 1.5),
        "l2_ball": lambda x: optax.projections.projection_l2_ball(x, 1.5),
        "linf_ball": lambda x: optax.projections.projection_linf_ball(x, 0.5),
        "simplex": lambda x: optax.projections.projection_simplex(x, 1.5),
        "sphere": lambda x: optax.projections.projection_l2_sphere(x, 1.5),
    }[kind]
    params = tree(jnp.float32)
    projected = optax_clip.project(params, SETS[kind][0](scope))
    expected = theirs(params) if scope == "global" else {k: theirs(x) for k, x in params.items()}
    for name in params:
        np.testing.assert_allclose(projected[name], expected[name], rtol=2e-6, atol=1e-6)


floats = st.floats(-4, 4, width=32)
vectors = arrays(np.float32, 6, elements=floats)


CONVEX = ["box", "non_negative", "l1_ball", "l2_ball", "linf_ball", "simplex", "spectral_ball"]


@pytest.mark.parametrize("kind", CONVEX)
@given(x=vectors, y=vectors)
def test_invariants_of_the_convex_sets(kind, x, y):
    project, violation = jitted(kind)
    once = project(x)
    tight = kind != "simplex"  # no float32 numbers may have the sum
    assert violation(once) <= (0 if tight else 1.5 * 4 * eps(jnp.float32))  # in the set
    np.testing.assert_allclose(project(once), once, rtol=0, atol=0 if tight else 1e-6)  # idempotent
    # Nearest point: <x - P(x), y - P(x)> <= 0 for every y in the set.
    p, inside = wide(once), wide(project(y))
    assert np.sum((wide(x) - p) * (inside - p)) <= 1e-5 * (1 + np.sum(wide(x) ** 2))


@functools.cache
def jitted(kind):
    constraint = SETS[kind][0]("leaf")
    shape = (2, 3) if kind == "spectral_ball" else (6,)
    project = jax.jit(lambda x: optax_clip.project(x.reshape(shape), constraint).ravel())
    return project, jax.jit(lambda x: optax_clip.violation(x.reshape(shape), constraint))


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
    # Two of four entries end at a bound.
    assert optax_clip.metrics(state) == {"project/fraction": 0.5, "project/steps": 1}
    # Of the norms sqrt(16.25) = 4.03 and 5, the second is moved by 0.5.
    tx = optax_clip.project_weights(optax_clip.norm_ball(4.5))
    _, state = tx.update(updates, tx.init(params), params)
    assert optax_clip.metrics(state) == {
        "project/distance": pytest.approx(0.5, rel=1e-5),
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


def test_sums_of_bfloat16_are_the_nearest():
    """They are formed in float32, whose rounding before that to bfloat16 does no harm."""
    random = np.random.default_rng(0)
    p, u = (
        jnp.asarray(random.normal(size=100_000) * 10 ** random.uniform(-4, 4, 100_000), jnp.bfloat16)
        for _ in range(2)
    )
    found = jax.jit(_landing.add_as_apply_updates)(p, u)
    np.testing.assert_array_equal(found, jax.jit(optax.apply_updates)(p, u))
    exact, found = wide(p) + wide(u), wide(found)
    _, exponents = np.frexp(found)
    assert (np.abs(found - exact) <= np.ldexp(1.0, exponents - 9)).all()
