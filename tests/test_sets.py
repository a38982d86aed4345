"""The sets by other means: exact cases, hard cases, other people's programs, and trees of numbers."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import minimize

import optax_clip
import reference

F16, BF16, F32 = jnp.float16, jnp.bfloat16, jnp.float32
DTYPES = [F16, BF16, F32]
BY_NAME = {"ids": lambda d: jnp.dtype(d).name}
PROJECT = jax.jit(optax_clip.project, static_argnums=1)


def wide(x):
    return np.asarray(x).astype(np.float64)


def eps(dtype):
    return float(jnp.finfo(dtype).eps)


def l1_ball(radius, scope="leaf"):
    return optax_clip.norm_ball(radius, ord=1, scope=scope)


@functools.partial(jax.jit, static_argnums=0)
def step(constraint, params, updates):
    """Weights after an update of a fresh state."""
    tx = optax_clip.project_weights(constraint)
    return optax.apply_updates(params, tx.update(updates, tx.init(params), params)[0])


# --- Sums: the ball of order 1 and the simplex ------------------------------------------------------


def hard(name):
    rng = np.random.default_rng(0)
    normal = rng.normal(size=100_000)
    return {
        "ties": (np.repeat([3.0, 1.0, -1.0], 1000), 1.0),
        "all equal": (np.ones(1000), 1.0),
        "all inside": (np.full(1000, 1e-4), 1.0),
        "one huge": (np.r_[1e30, 1e-3 * normal[:999]], 1.0),
        "radius near 0": (normal[:1000], 1e-6),
        "radius 0": (normal[:1000], 0.0),
        "offset": (1e4 + normal, 1.0),
        "negative offset": (-1e4 + normal, 1.0),
        "geometric": (2.0 ** -np.arange(120), 1e-3),
        "geometric, nearly inside": (2.0 ** -np.arange(120), 1.9999),
        "normal": (normal, 1.0),
        "normal, large radius": (normal, 50_000.0),
        "heavy tails": (np.exp(8 * normal), 1.0),
        "nearly inside": (normal / np.abs(normal).sum() * 1.0001, 1.0),
        "sparse, nearly inside": (np.r_[0.6, 0.3999, np.zeros(100_000)], 1.0),
        "tiny": (1e-30 * normal[:1000], 1e-30),
    }[name]


HARD = [
    "ties",
    "all equal",
    "all inside",
    "one huge",
    "radius near 0",
    "radius 0",
    "offset",
    "negative offset",
    "geometric",
    "geometric, nearly inside",
    "normal",
    "normal, large radius",
    "heavy tails",
    "nearly inside",
    "sparse, nearly inside",
    "tiny",
]
SUMS = {
    "l1_ball": (l1_ball, "radius", optax.projections.projection_l1_ball),
    "simplex": (optax_clip.simplex, "total", optax.projections.projection_simplex),
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("kind", SUMS)
def test_hard_sums_are_at_least_as_exact_as_those_of_optax(kind, name, standard_promotion):
    make, argument, theirs = SUMS[kind]
    x, radius = hard(name)
    x = jnp.asarray(x, F32)
    exact = reference.project([x], kind, **{argument: radius})[0]
    ours = wide(PROJECT(x, make(radius)))
    error = np.abs(ours - exact).max()
    if radius == 0:
        assert error == 0  # Optax asserts that it is positive.
        return
    # The ball aims (8 + log2(n) / 2) / 2 eps inside, its entries share that; the simplex sums up to
    # its total within a few eps, whichever of the entries have the error.
    few = 10 if kind == "l1_ball" else 4
    assert error <= few * eps(F32) * radius
    assert error <= 2 * np.abs(wide(theirs(x, radius)) - exact).max() + few * eps(F32) * radius
    if kind == "l1_ball":
        assert np.abs(ours).sum() <= radius
    else:
        assert ours.min() >= 0 and abs(ours.sum() / radius - 1) <= 4 * eps(F32)


@pytest.mark.parametrize("dtype", [F16, BF16], **BY_NAME)
@pytest.mark.parametrize("name", ["ties", "normal", "offset", "sparse, nearly inside"])
@pytest.mark.parametrize("kind", SUMS)
def test_sums_of_16_bit_weights_round_once(kind, name, dtype):
    make, argument, _ = SUMS[kind]
    x, radius = hard(name)
    x = jnp.asarray(x, dtype)
    exact = reference.project([x], kind, **{argument: radius})[0]
    projected = PROJECT(x, make(radius))
    assert projected.dtype == dtype
    # One rounding, to the side of 0 for the ball, of what was that of float32.
    rtol = eps(dtype) * (1 if kind == "l1_ball" else 0.5)
    subnormal = float(jnp.finfo(dtype).smallest_subnormal)
    np.testing.assert_allclose(wide(projected), exact, rtol=rtol, atol=10 * eps(F32) + subnormal)


@pytest.mark.parametrize("n", [1000, 100_000, 1_000_000])
@pytest.mark.parametrize("total", [0.9901, 1.0, 1.1])
def test_a_sparse_distribution_is_topped_up(n, total):
    # n zeros beside 0.6 and 0.39: each entry gets (total - 0.99) / (n + 2), far less than a rounding
    # of 0.6.
    x = jnp.zeros(n + 2).at[:2].set(jnp.array([0.6, 0.39]))
    exact = reference.project([x], "simplex", total=total)[0]
    projected = wide(PROJECT(x, optax_clip.simplex(total)))
    # A float32 sum of so many equal terms is itself some eps off.
    np.testing.assert_allclose(projected[:2], exact[:2], rtol=16 * eps(F32))
    np.testing.assert_allclose(projected.sum(), total, rtol=8 * eps(F32))


@pytest.mark.parametrize("scope", ["leaf", "global"])
def test_finite_entries_whose_sum_is_not_finite_are_projected(scope):
    # The largest of equal entries: 1/4 each.
    for make in (l1_ball, optax_clip.simplex):
        projected = optax_clip.project(jnp.full(4, 3e38), make(1.0, scope=scope))
        np.testing.assert_allclose(projected, 0.25, rtol=10 * eps(F32))


@pytest.mark.parametrize("broken", [jnp.inf, -jnp.inf, jnp.nan])
def test_a_broken_scope_is_left_as_it_is(broken):
    x = jnp.array([[3.0, broken], [4.0, 2.0]])
    for make in (l1_ball, *[optax_clip.simplex] * (broken != -jnp.inf), optax_clip.norm_sphere):
        unit = optax_clip.project(x, make(1.0, scope="unit"))
        np.testing.assert_array_equal(unit[:, 1], x[:, 1])
        assert np.isfinite(unit[:, 0]).all() and not np.array_equal(unit[:, 0], x[:, 0])
        np.testing.assert_array_equal(optax_clip.project(x, make(1.0)), x)
    batch = jnp.stack([jnp.full((2, 2), broken), 5 * jnp.eye(2)])
    for power in (None, 2):
        new = optax_clip.project(batch, optax_clip.spectral_ball(1.0, power_iterations=power))
        np.testing.assert_array_equal(new[0], batch[0])
        np.testing.assert_allclose(new[1], jnp.eye(2), atol=40 * eps(F32))


def test_newton_ends_where_two_scopes_take_turns():
    """Rounding took an entry in and out of each column, in turns, so that one of them always moved."""
    x = np.zeros((64, 2), np.float32)
    x[[0, 2, 5], 0] = 0.06118273735046387, 0.3364419937133789, 0.6023750305175781
    x[[1, 3, 4], 1] = 0.591895580291748, 0.2495424747467041, 0.15856170654296875
    y = PROJECT(x, optax_clip.simplex(scope="unit"))
    np.testing.assert_allclose(y, x, atol=4 * eps(F32))
    np.testing.assert_allclose(wide(y).sum(axis=0), 1, atol=4 * eps(F32))


DIFFERENTIABLE = {
    "l1_ball": (l1_ball(1.0), {"radius": 1.0}),
    "simplex": (optax_clip.simplex(1.0), {"total": 1.0}),
    "shell": (optax_clip.norm_shell(5.0, 7.0), {"lower": 5.0, "upper": 7.0}),
    "l2_ball": (optax_clip.norm_ball(1.0), {"radius": 1.0}),
}


@pytest.mark.parametrize("kind", DIFFERENTIABLE)
def test_derivatives_are_those_of_finite_differences(kind):
    constraint, values = DIFFERENTIABLE[kind]
    x = np.random.default_rng(0).normal(size=6).astype(np.float32).astype(np.float64)
    steps = 1e-6 * np.eye(6)
    ends = [[reference.project([x + s * h], kind, **values)[0] for s in (1, -1)] for h in steps]
    expected = np.stack([(up - down) / 2e-6 for up, down in ends], axis=-1)
    x = jnp.asarray(x, F32)
    for derivative in (jax.jacobian, jax.jacfwd):
        found = derivative(lambda x: optax_clip.project(x, constraint))(x)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    p = jnp.full(6, 0.1)
    np.testing.assert_allclose(
        jax.jacobian(functools.partial(step, constraint, p))(x - p), expected, atol=1e-5
    )


@pytest.mark.parametrize("make", [l1_ball, optax_clip.simplex, optax_clip.norm_ball])
def test_derivatives_are_finite_at_zero_and_for_radius_zero(make):
    for x in (jnp.zeros(3), jnp.ones(3)):
        for radius in (0.0, 1.0):
            jacobians = jax.jacobian(lambda r, x: optax_clip.project(x, make(r)), (0, 1))(radius, x)
            assert all(np.isfinite(j).all() for j in jacobians)


@pytest.mark.parametrize(
    "make",
    [l1_ball, optax_clip.simplex, lambda r: optax_clip.norm_shell(r / 2, r), optax_clip.spectral_ball],
    ids=["l1_ball", "simplex", "shell", "spectral_ball"],
)
def test_vmap_over_radii_and_jit_give_the_same(make):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), F32)
    radii = jnp.array([0.1, 1.0, 3.0, 100.0])
    mapped = jax.jit(jax.vmap(lambda r: optax_clip.project(x, make(r))))(radii)
    for radius, each in zip(radii, mapped, strict=True):
        alone = optax_clip.project(x, make(float(radius)))
        np.testing.assert_allclose(each, alone, rtol=4 * eps(F32), atol=4 * eps(F32))


# --- The nearest point, by a general method ---------------------------------------------------------


def largest_value(x):
    return np.linalg.svd(x.reshape(2, 3), compute_uv=False)[0]


# A set, and functions that are >= 0 (of "ineq") or 0 (of "eq") in it.
NEAREST = {
    "ball of order 1": (l1_ball(1.0), [("ineq", lambda x: 1 - np.abs(x).sum())]),
    "ball of order 2": (optax_clip.norm_ball(1.0), [("ineq", lambda x: 1 - x @ x)]),
    "ball of order inf": (
        optax_clip.norm_ball(0.5, ord=np.inf),
        [("ineq", lambda x: 0.5 - x), ("ineq", lambda x: x + 0.5)],
    ),
    "box": (
        optax_clip.box(-0.25, 0.5),
        [("ineq", lambda x: 0.5 - x), ("ineq", lambda x: x + 0.25)],
    ),
    "simplex": (optax_clip.simplex(1.0), [("eq", lambda x: x.sum() - 1), ("ineq", lambda x: x)]),
    "shell": (
        optax_clip.norm_shell(4.0, 5.0),
        [("ineq", lambda x: x @ x - 16), ("ineq", lambda x: 25 - x @ x)],
    ),
    "spectral ball": (optax_clip.spectral_ball(1.0), [("ineq", lambda x: 1 - largest_value(x))]),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", NEAREST)
def test_no_point_of_the_set_is_nearer_by_a_general_method(kind, seed):
    constraint, inside = NEAREST[kind]
    x = np.random.default_rng(seed).normal(size=6 if kind == "spectral ball" else 5)
    found = minimize(
        lambda y: np.sum((y - x) ** 2),
        0.1 * x,
        constraints=[{"type": type, "fun": fun} for type, fun in inside],
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    shape = (2, 3) if kind == "spectral ball" else (5,)
    projected = optax_clip.project(jnp.asarray(x, F32).reshape(shape), constraint)
    distance = np.sum((wide(projected).ravel() - x) ** 2)
    assert distance <= found.fun * (1 + 1e-4) + 1e-6
    np.testing.assert_allclose(wide(projected).ravel(), found.x, atol=1e-3)


# --- Matrices ---------------------------------------------------------------------------------------


def matrix(shape, rank, top, dtype):
    """A random matrix, or batch, of that rank and largest singular value."""
    rng = np.random.default_rng(0)
    *batch, m, n = shape
    rank = rank or min(m, n)
    x = rng.normal(size=(*batch, m, rank)) @ rng.normal(size=(*batch, rank, n))
    return jnp.asarray(x / np.linalg.norm(x, 2, axis=(-2, -1), keepdims=True) * top, dtype)


def values_of(x):
    return np.linalg.svd(wide(x), compute_uv=False)


SHAPES = [
    ((32, 8), None),
    ((8, 32), None),
    ((16, 16), None),
    ((3, 8, 5), None),
    ((12, 9), 1),
    ((9, 12), 3),
]


METHODS = ["eigh", "polar"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("top", [0.9, 1.2, 30.0, 1000.0])
@pytest.mark.parametrize(("shape", "rank"), SHAPES, ids=str)
def test_the_spectral_ball_is_the_nearest_point(shape, rank, top, method):
    x = matrix(shape, rank, top, F32)
    constraint = optax_clip.spectral_ball(1.0, method=method)
    projected = PROJECT(x, constraint)
    if top < 1:
        np.testing.assert_array_equal(projected, x)
    exact = reference.project([x], "spectral_ball", radius=1.0)[0]
    # Far outside the rounding of the matrix itself counts: 1000 times outside it is 1e-4 of the radius.
    atol = {1.2: 8 * eps(F32), 30.0: 1e-5, 1000.0: 3e-4}.get(top, 0)
    np.testing.assert_allclose(projected, exact, rtol=0, atol=atol)
    assert values_of(projected).max() <= 1 + 4 * eps(F32)
    assert optax_clip.violation(projected, constraint) <= 4 * eps(F32)
    assert optax_clip.violation(x, constraint) == pytest.approx(max(top - 1, 0), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("top", [1e6, 1e30])
def test_matrices_enormously_far_outside_land_in_the_spectral_ball(top):
    for way in (*({"method": method} for method in METHODS), {"power_iterations": 2}):
        constraint = optax_clip.spectral_ball(1.0, **way)
        projected = optax_clip.project(jnp.full((4, 4), top), constraint)
        assert 0.49 <= values_of(projected).max() <= 1


@pytest.mark.parametrize("dtype", DTYPES, **BY_NAME)
@pytest.mark.parametrize("start", [0.5, 1.0, 30.0])
@pytest.mark.parametrize(("shape", "rank"), SHAPES[::2], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_weights_land_in_the_spectral_ball(shape, rank, start, dtype, method):
    params = {"kernel": matrix(shape, rank, start, dtype), "bias": jnp.full(3, 9, dtype)}
    updates = {"kernel": 0.5 * matrix(shape, None, 1.0, dtype), "bias": jnp.ones(3, dtype)}
    constraint = optax_clip.spectral_ball(1.0, method=method)
    for _ in range(3):
        params = step(constraint, params, updates)
        assert values_of(params["kernel"]).max() <= 1 + 4 * eps(dtype)
    np.testing.assert_array_equal(wide(params["bias"]), 12.0)
    assert params["kernel"].dtype == dtype
    # They come to rest at the radius, not far inside.
    assert values_of(params["kernel"]).max() >= 1 - (4 * eps(dtype) + 8 * eps(F32))


@pytest.mark.parametrize("power", [None, 2])
def test_flatten_takes_a_convolution_kernel_as_one_matrix(power):
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 8, 16)), F32)
    make = functools.partial(optax_clip.spectral_ball, 1.0, power_iterations=power)
    flat = optax_clip.project(kernel, make(flatten=True))
    np.testing.assert_array_equal(
        flat.reshape(72, 16), optax_clip.project(kernel.reshape(72, 16), make())
    )
    assert not np.allclose(flat, optax_clip.project(kernel, make()))


def power_training(params, k, steps, warm=True, rate=0.0):
    tx = optax_clip.project_weights(optax_clip.spectral_ball(1.0, power_iterations=k))
    fresh = state = tx.init(params)
    update, tops = jax.jit(tx.update), []
    for i in range(steps):
        noise = np.random.default_rng(i).normal(size=params.shape)
        new, state = update(jnp.asarray(rate * noise, params.dtype), state if warm else fresh, params)
        assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, fresh)
        assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, fresh)
        params = optax.apply_updates(params, new)
        tops.append(values_of(params).max())
    return state, tops


@pytest.mark.parametrize("dtype", DTYPES, **BY_NAME)
@pytest.mark.parametrize(("k", "steps"), [(1, 8), (2, 4), (5, 2)])
def test_power_iterations_converge_over_the_steps(k, steps, dtype):
    state, tops = power_training(matrix((40, 20), None, 3.0, dtype), k, steps)
    assert tops[0] >= tops[-1] and abs(tops[-1] - 1) <= 0.01 + 2 * eps(dtype)
    (vector,) = jax.tree.leaves(state.memory)
    assert vector.shape == (1, 20) and vector.dtype == F32
    assert np.linalg.norm(vector) == pytest.approx(1, rel=4 * eps(F32))


def test_power_iterations_go_on_from_the_last_vector():
    params = matrix((40, 20), None, 1.5, F32)
    warm = power_training(params, 1, 20, rate=0.01)[1][-1]
    cold = power_training(params, 1, 20, rate=0.01, warm=False)[1][-1]
    assert warm - 1 < (cold - 1) / 2


@pytest.mark.parametrize("way", [*({"method": m} for m in METHODS), {"power_iterations": 2}], ids=str)
def test_edges_of_the_spectral_ball(way):
    ball = functools.partial(optax_clip.spectral_ball, **way)
    for x in (jnp.zeros((3, 2)), jnp.zeros((0, 2)), jnp.array(9.0), jnp.array([9.0, 9.0])):
        np.testing.assert_array_equal(optax_clip.project(x, ball(1.0)), x)
    np.testing.assert_array_equal(optax_clip.project(jnp.ones((2, 2)), ball(0.0)), 0)
    np.testing.assert_array_equal(optax_clip.project(jnp.ones((2, 2)), ball(jnp.inf)), 1)
    x = jnp.array([[3j, 0], [0, 0.5]], jnp.complex64)
    np.testing.assert_allclose(
        values_of_complex(optax_clip.project(x, ball(1.0)))[0], 1, rtol=40 * eps(F32)
    )
    jacobian = jax.jacobian(lambda x: optax_clip.project(x, ball(0.5)))
    assert all(np.isfinite(jacobian(x)).all() for x in (jnp.zeros((2, 3)), jnp.ones((2, 3))))


def values_of_complex(x):
    return np.linalg.svd(np.asarray(x), compute_uv=False)


# --- Trees of bounds and radii ----------------------------------------------------------------------


def weights(dtype=F32):
    return {"a": {"k": jnp.ones((2, 3), dtype), "b": jnp.ones(3, dtype)}, "c": jnp.ones(4, dtype)}


RADII = {
    "norm_ball": optax_clip.norm_ball,
    "l1_ball": l1_ball,
    "norm_sphere": optax_clip.norm_sphere,
    "norm_shell": lambda r: optax_clip.norm_shell(r, r),
    "linf_ball": lambda r: optax_clip.norm_ball(r, ord=np.inf),
    "simplex": optax_clip.simplex,
    "spectral_ball": optax_clip.spectral_ball,
    "power": functools.partial(optax_clip.spectral_ball, power_iterations=2),
}


@pytest.mark.parametrize("kind", RADII)
def test_a_tree_of_radii_is_a_prefix_of_the_weights(kind):
    make, params = RADII[kind], weights()
    alone = {r: optax_clip.project(params, make(r)) for r in (0.25, 0.5)}
    expected = {"a": alone[0.25]["a"], "c": alone[0.5]["c"]}
    close = functools.partial(np.testing.assert_allclose, rtol=4 * eps(F32))
    for radii in (
        {"a": 0.25, "c": 0.5},
        {"a": {"k": 0.25, "b": np.float64(0.25)}, "c": np.array(0.5)},
        {"a": jnp.float32(0.25), "c": jnp.float32(0.5)},
    ):
        jax.tree.map(close, optax_clip.project(params, make(radii)), expected)
    traced = jax.jit(lambda r: optax_clip.project(params, make({"a": r, "c": 0.5})))(jnp.float32(0.25))
    jax.tree.map(close, traced, expected)
    landed = step(make({"a": 0.25, "c": 0.5}), params, jax.tree.map(jnp.zeros_like, params))
    jax.tree.map(functools.partial(close, atol=4 * eps(F32)), landed, expected)


def test_a_tree_of_bounds_is_a_prefix_of_the_weights():
    lower, upper = {"a": {"k": 2.0, "b": -1.0}, "c": -np.inf}, {"a": np.inf, "c": jnp.float32(0.5)}
    projected = optax_clip.project(weights(), optax_clip.box(lower, upper))
    assert [float(x.min()) for x in jax.tree.leaves(projected)] == [1.0, 2.0, 0.5]
    assert optax_clip.violation(weights(), optax_clip.box(lower, upper)) == 1.0
    traced = jax.jit(lambda c: optax_clip.project(weights(), optax_clip.box(-1.0, {"a": c, "c": 9.0})))
    assert [float(x.min()) for x in jax.tree.leaves(traced(0.5))] == [0.5, 0.5, 1.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: optax_clip.box({"a": 0.0, "c": 2.0}, {"a": {"k": -1.0}, "c": 3}),
            r"upper\['a'\]\['k'\]=-1",
        ),
        (lambda: optax_clip.box(0.0, {"a": [1.0, float("nan")]}), r"upper\['a'\]\[1\]=nan"),
        (
            lambda: optax_clip.norm_shell({"a": 2.0}, {"a": 1.0}),
            r"lower\['a'\]=2.0 and upper\['a'\]=1.0",
        ),
        (lambda: optax_clip.norm_ball({"a": {"k": -1.0}}), r"radius\['a'\]\['k'\]=-1.0"),
        (lambda: l1_ball({"a": float("nan")}), r"radius\['a'\]=nan"),
        (lambda: optax_clip.norm_sphere({"a": float("inf")}), r"radius\['a'\]=inf"),
        (lambda: optax_clip.spectral_ball({"a": -1.0}), r"radius\['a'\]=-1.0"),
        (lambda: optax_clip.simplex({"a": -1.0}), r"total\['a'\]=-1.0"),
        (lambda: optax_clip.simplex(-1.0), "total=-1.0"),
        (lambda: optax_clip.simplex(float("inf")), "total=inf"),
        (lambda: optax_clip.norm_shell(2.0, 1.0), "lower=2.0 and upper=1.0"),
        (lambda: optax_clip.norm_shell(-1.0, 1.0), "lower=-1.0"),
        (lambda: optax_clip.norm_ball({"a": "1"}), r"radius\['a'\]='1'"),
        (lambda: optax_clip.spectral_ball(1.0, power_iterations=0), "power_iterations=0"),
        (lambda: optax_clip.spectral_ball(1.0, method="svd"), "method='svd'"),
        (
            lambda: optax_clip.spectral_ball(1.0, method="polar", power_iterations=1),
            "not both, got method='polar' and power_iterations=1",
        ),
        (lambda: optax_clip.spectral_ball(1.0, power_iterations=1.5), "power_iterations=1.5"),
        (lambda: optax_clip.init_box(-1.0), "kappa=-1.0"),
        (lambda: optax_clip.init_box(float("inf")), "kappa=inf"),
        (lambda: optax_clip.init_box("2"), "kappa='2'"),
        (lambda: optax_clip.project(weights(), optax_clip.box(0.0, {"a": 1.0})), "upper .*for 'c'"),
        (lambda: optax_clip.project(weights(), optax_clip.box({"c": 1.0}, 2.0)), "lower .*for 'a/b'"),
        (lambda: optax_clip.project(weights(), optax_clip.norm_ball({"a": 1.0})), "radius .*for 'c'"),
        (lambda: optax_clip.violation(weights(), l1_ball({"a": 1.0})), "radius .*for 'c'"),
        (lambda: optax_clip.project(weights(), l1_ball({"a": 1.0})), "radius .*for 'c'"),
        (lambda: optax_clip.project(weights(), optax_clip.norm_sphere({"a": 1.0})), "radius .*for 'c'"),
        (lambda: optax_clip.project(weights(), optax_clip.simplex({"a": 1.0})), "total .*for 'c'"),
        (
            lambda: optax_clip.project(weights(), optax_clip.spectral_ball({"a": 1.0})),
            "radius .*for 'c'",
        ),
        (
            lambda: optax_clip.project(
                weights(), optax_clip.norm_ball({"a": 1.0, "c": 1.0}, scope="global")
            ),
            'radius .*scope="global"',
        ),
        (
            lambda: optax_clip.project(
                weights(), optax_clip.simplex({"a": 1.0, "c": 1.0}, scope="global")
            ),
            'total .*scope="global"',
        ),
        (lambda: optax_clip.project(jnp.ones(2, jnp.complex64), optax_clip.simplex()), "complex64"),
        (lambda: init_box_step(jnp.ones(2, jnp.complex64)), "real weights .*complex64"),
        (lambda: optax_clip.project(weights(), optax_clip.init_box(2.0)), "kappa=2.0"),
        (lambda: optax_clip.violation(weights(), optax_clip.init_box(2.0)), "kappa=2.0"),
    ],
)
def test_bad_input_names_the_argument_and_the_path(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def init_box_step(params):
    tx = optax_clip.project_weights(optax_clip.init_box(2.0))
    return tx.update(params, tx.init(params), params)


# --- The box around the start -----------------------------------------------------------------------


def test_the_box_around_the_start():
    params = {
        "dense": {"kernel": jnp.array([[0.5, -1.0]]), "bias": jnp.zeros(2)},
        "two": {"q": jnp.full((2, 2), 0.25), "k": jnp.full((2, 2), -0.75), "bias": jnp.zeros(2)},
        "norm": {"scale": jnp.zeros(2), "shift": jnp.full(2, 3.0)},
    }
    tx = optax_clip.project_weights(optax_clip.init_box(2.0))
    state = tx.init(params)
    # Twice the largest: bias beside its kernel, kernel; the zero scale has no kernel beside it;
    # bias beside two kernels takes the larger, 0.75.
    bounds = [2.0, 2.0, np.inf, 6.0, 1.5, 1.5, 0.5]
    np.testing.assert_array_equal(jax.tree.leaves(state.memory)[0], bounds)
    huge = jax.tree.map(lambda x: jnp.full_like(x, 100.0), params)
    updates, state = jax.jit(tx.update)(huge, state, params)
    landed = optax.apply_updates(params, updates)
    bounds[2] = 100.0
    assert [float(x.max()) for x in jax.tree.leaves(landed)] == bounds
    # All are at their bound but the two of the scale: 2 + 2 + 2 + 2 + 4 + 4 of 18.
    assert optax_clip.metrics(state)["project/fraction"] == pytest.approx(16 / 18)
    inwards = jax.tree.map(lambda x: jnp.full_like(x, -0.125), params)
    _, state = jax.jit(tx.update)(inwards, state, landed)
    assert optax_clip.metrics(state)["project/fraction"] == 0


@pytest.mark.parametrize("dtype", DTYPES, **BY_NAME)
def test_training_never_leaves_the_box_around_the_start(dtype):
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.normal(size=(300, 30)), dtype), "bias": jnp.zeros(30, dtype)}
    bound = 1.1 * np.abs(wide(params["kernel"])).max()
    tx = optax_clip.project_weights(optax_clip.init_box(1.1))
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(5):
        noise = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 10, dtype), params)
        new, state = update(noise, state, params)
        params = optax.apply_updates(params, new)
        for x in jax.tree.leaves(params):
            # The bound is a float32 itself, rounded inwards to the dtype of the leaf.
            assert np.abs(wide(x)).max() <= bound * (1 + eps(F32))
            assert np.abs(wide(x)).max() >= bound * (1 - eps(dtype))


def test_the_box_around_the_start_inside_other_transforms(standard_promotion):
    params = {"kernel": jnp.array([[0.5, -1.0]]), "bias": jnp.zeros(2)}
    grads = jax.tree.map(lambda x: jnp.full_like(x, -100.0), params)
    inner = optax.chain(optax.sgd(1.0), optax_clip.project_weights(optax_clip.init_box(2.0)))
    kernels = optax_clip.where(lambda path, leaf: path.endswith("kernel"))
    for tx, bias, steps in (
        (optax.MultiSteps(inner, 2), 2.0, 2),
        (optax.masked(inner, kernels), -100.0, 1),
    ):
        state, p = tx.init(params), params
        for _ in range(steps):
            updates, state = jax.jit(tx.update)(grads, state, p)
            p = optax.apply_updates(p, updates)
        np.testing.assert_array_equal(p["kernel"], [[2.0, 2.0]])
        np.testing.assert_array_equal(p["bias"], bias)


def test_the_box_around_the_start_of_flax_models():
    from flax import linen, nnx

    tx = optax.chain(optax.sgd(1.0), optax_clip.project_weights(optax_clip.init_box(2.0)))
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    bound = 2 * float(jnp.abs(model.kernel[...]).max())
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = nnx.grad(lambda model: -100 * jnp.sum(model(jnp.ones((1, 3)))))(model)
    optimizer.update(model, grads)
    for leaf in (model.kernel[...], model.bias[...]):  # the bias starts at 0
        np.testing.assert_allclose(leaf, bound, rtol=eps(F32))

    params = linen.Dense(2).init(jax.random.key(0), jnp.ones((1, 3)))
    bound = 2 * float(jnp.abs(params["params"]["kernel"]).max())
    grads = jax.tree.map(lambda x: jnp.full_like(x, -100.0), params)
    updates, _ = tx.update(grads, tx.init(params), params)
    for leaf in jax.tree.leaves(optax.apply_updates(params, updates)):
        np.testing.assert_allclose(leaf, bound, rtol=eps(F32))


# --- Coming from elsewhere --------------------------------------------------------------------------
#
# One kernel (in, out) with columns (3, 4) of norm 5, (0.6, 0.8) of norm 1 and (0.12, 0.16) of norm 0.2.
# Keras divides by its epsilon of 1e-7 plus the norm; that is left out here.

KERNEL = [[3.0, 0.6, 0.12], [4.0, 0.8, 0.16]]


@pytest.mark.parametrize(
    ("constraint", "expected"),
    [
        # MaxNorm(2, axis=0): 5 > 2, so (3, 4) * 2 / 5.
        (optax_clip.norm_ball(2.0, scope=0), [[1.2, 0.6, 0.12], [1.6, 0.8, 0.16]]),
        # UnitNorm(axis=0): each column by its norm.
        (optax_clip.norm_sphere(1.0, scope=0), [[0.6, 0.6, 0.6], [0.8, 0.8, 0.8]]),
        # MinMaxNorm(0.5, 2, rate=1, axis=0): 0.2 < 0.5 too, so (0.12, 0.16) * 0.5 / 0.2.
        (optax_clip.norm_shell(0.5, 2.0, scope=0), [[1.2, 0.6, 0.3], [1.6, 0.8, 0.4]]),
        # NonNeg leaves it.
        (optax_clip.non_negative(), KERNEL),
        # p.data.clamp_(-c, c) with c = 0.5, as in the weight clipping of Wasserstein GANs.
        (optax_clip.box(-0.5, 0.5), [[0.5, 0.5, 0.12], [0.5, 0.5, 0.16]]),
    ],
    ids=["MaxNorm", "UnitNorm", "MinMaxNorm", "NonNeg", "clamp_"],
)
def test_coming_from_keras_and_torch(constraint, expected):
    kernel = jnp.asarray(KERNEL)
    np.testing.assert_allclose(optax_clip.project(kernel, constraint), expected, rtol=1e-6)
    np.testing.assert_allclose(step(constraint, kernel, jnp.zeros_like(kernel)), expected, rtol=1e-6)


def test_coming_from_the_signs_of_non_neg_and_the_box_of_elsayed():
    flipped = -jnp.asarray(KERNEL)
    np.testing.assert_array_equal(optax_clip.project(flipped, optax_clip.non_negative()), 0)
    # Their bound is kappa * s for weights that start uniform in [-s, s]; with the largest at the start,
    # 4, and kappa = 0.5: clamped to [-2, 2] from the first step on.
    landed = step(optax_clip.init_box(0.5), flipped, jnp.zeros((2, 3)))
    np.testing.assert_allclose(landed, [[-2.0, -0.6, -0.12], [-2.0, -0.8, -0.16]])


def test_the_right_sum_alone_is_not_on_the_simplex():
    project = functools.partial(optax_clip.project, constraint=optax_clip.simplex(1.0))
    np.testing.assert_array_equal(project(jnp.array([1.5, -0.5])), [1, 0])
    np.testing.assert_array_equal(project(jnp.array([0.75, 0.25])), [0.75, 0.25])


@pytest.mark.parametrize(
    "ball",
    [
        optax_clip.spectral_ball(power_iterations=1),
        optax_clip.spectral_ball(optax_clip.initial()),
        optax_clip.spectral_ball(optax_clip.initial(), power_iterations=1),
    ],
)
def test_no_matrix_at_all(ball):
    params = {"a": jnp.ones((2, 2))}
    for tx, tree in (
        (optax.masked(optax_clip.project_weights(ball), {"a": False}), params),
        (optax_clip.project_weights(ball), {}),
    ):
        updates, _ = jax.jit(tx.update)(tree, tx.init(tree), tree)
        chex.assert_trees_all_equal(updates, tree)


def test_derivative_by_a_cap():
    """The entries at their caps move with them, and the free one makes up for that."""
    x = jnp.array([0.5, 1.0, -2.0])
    slopes = jax.jacrev(lambda t: optax_clip.project(x, optax_clip.simplex(1.0, upper=t)))(0.6)
    np.testing.assert_allclose(slopes, [-1, 1, 0], atol=1e-6)


def test_a_leaf_without_entries_is_no_violation():
    tree = {"a": jnp.array([0.5, 0.5]), "z": jnp.zeros((0, 4))}
    assert (
        optax_clip.violation(tree, optax_clip.simplex())
        == optax_clip.violation(tree, optax_clip.simplex(upper=0.6))
        == 0
    )
    assert optax_clip.violation({**tree, "a": jnp.array([0.5, 0.75])}, optax_clip.simplex()) == 0.25


def test_a_callable_is_given_the_floats():
    """By `project` and `violation` as by `project_weights`."""
    tree = {"w": jnp.array([3.0, 4.0]), "n": jnp.array(12)}
    ball = functools.partial(optax.projections.projection_l2_ball, scale=1.0)
    found = optax_clip.project(tree, ball)
    np.testing.assert_allclose(found["w"], [0.6, 0.8], rtol=1e-6)
    assert found["n"] is tree["n"]
    np.testing.assert_allclose(optax_clip.violation(tree, ball), 3.2, rtol=1e-6)


@pytest.mark.parametrize(
    "bounded",
    [
        optax_clip.norm_ball(jnp.inf),
        optax_clip.norm_shell(1.0, jnp.inf),
        optax_clip.norm_ball(jnp.inf, ord=1),
        optax_clip.spectral_ball(jnp.inf),
    ],
)
def test_no_limit_is_not_violated(bounded):
    assert optax_clip.violation(jnp.full((2, 2), 3e38), bounded) == 0
    assert np.isnan(optax_clip.violation(jnp.full((2, 2), jnp.nan), bounded))


@pytest.mark.parametrize("kappa", [jnp.array(2.0), np.array(2.0), 2.0])
def test_sets_of_an_initial_array_are_values(kappa):
    assert optax_clip.norm_ball(optax_clip.initial(kappa)) == optax_clip.norm_ball(
        optax_clip.initial(kappa * 1)
    )
    assert optax_clip.norm_ball(optax_clip.initial(kappa)) != optax_clip.norm_ball(
        optax_clip.initial(kappa * 2)
    )
