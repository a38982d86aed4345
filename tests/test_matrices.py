"""Matrix functions against float64 decompositions, by both methods."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg

from optax_clip import metrics, project, project_weights, spectral_ball, violation
from optax_clip._geometry import matrices
from optax_clip._geometry.matrices import polar, split

F32 = jnp.float32
METHODS = ["eigh", "polar"]
SHAPES = [(1, 1), (1, 7), (4, 4), (32, 8), (8, 32), (64, 64)]
SPECTRA = ["normal", "condition 1e6", "near the limit", "half at the limit", "equal"]


def eps(dtype):
    return float(jnp.finfo(dtype).eps)


def matrix(kind, shape, top, seed=0):
    """In float64, with its largest singular value at ``top``, the limit being 1."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape)
    u, s, v = np.linalg.svd(x, full_matrices=False)
    k = len(s)
    values = {
        "normal": s * top / s[0],
        "condition 1e6": top * np.geomspace(1, 1e-6, k),
        "near the limit": np.r_[top, 1 + 1e-5 * rng.normal(size=k - 1)],
        "half at the limit": np.r_[[top] * (k - k // 2), np.ones(k // 2)],
        "equal": np.full(k, top),
    }[kind]
    return (u * values) @ v


def wide(x):
    return np.asarray(x).astype(np.complex128 if jnp.iscomplexobj(x) else np.float64)


def exact(x, limit=1.0):
    """U min(S, c) V^H."""
    u, s, v = np.linalg.svd(wide(x), full_matrices=False)
    return (u * np.minimum(s, limit)[..., None, :]) @ v


def largest(x):
    return np.linalg.norm(wide(x), 2, axis=(-2, -1))


def cap(x, limit=1.0, **kwargs):
    return matrices.cap_singular_values(x, jnp.asarray(limit, F32), **kwargs)


# --- The polar factor ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 4), (32, 8), (8, 32), (3, 9, 6)], ids=str)
def test_the_polar_factor(shape):
    x = np.random.default_rng(1).normal(size=shape) * 1e20
    u, _, v = np.linalg.svd(x, full_matrices=False)
    np.testing.assert_allclose(matrices.msign(jnp.asarray(x, F32)), u @ v, atol=4e-6)


def test_the_polar_factor_of_a_hermitian_matrix_is_its_sign():
    rng = np.random.default_rng(2)
    q, _ = np.linalg.qr(rng.normal(size=(6, 6)) + 1j * rng.normal(size=(6, 6)))
    values = np.array([-1, -0.5, -1e-4, 1e-4, 0.5, 1])
    x = jnp.asarray((q * values) @ q.conj().T, jnp.complex64)
    np.testing.assert_allclose(matrices.msign(x), (q * np.sign(values)) @ q.conj().T, atol=2e-3)
    np.testing.assert_array_equal(matrices.msign(jnp.zeros((3, 2))), 0)
    np.testing.assert_allclose(
        matrices.msign(jnp.diag(jnp.array([2.0, 0, -3]))), np.diag([1, 0, -1]), atol=1e-6
    )


@pytest.mark.parametrize(("bits", "least"), [(32, 1e-6), (64, 2e-15)])
def test_the_polynomials_compose_to_the_sign(bits, least):
    x = np.geomspace(least, 1, 10_000)
    y = 2 * x
    for a, b, c in polar.STEPS[bits]:
        y = a * y + b * y**3 + c * y**5
        assert y.max() < 2.001
    np.testing.assert_allclose(y, 1, rtol=0, atol=1e-8 if bits == 32 else 1e-15)


# --- Capped singular values ----------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_near_the_limit_it_is_the_nearest_matrix_to_some_eps(shape, method):
    for kind in SPECTRA:
        x = jnp.asarray(matrix(kind, shape, 1.2), F32)
        capped, landed = cap(x, method=method), cap(x, method=method, landing=True)
        np.testing.assert_allclose(capped, exact(x), rtol=0, atol=2 * eps(F32), err_msg=kind)
        np.testing.assert_allclose(landed, exact(x), rtol=0, atol=8 * eps(F32), err_msg=kind)
        assert largest(landed) <= 1 + 4 * eps(F32)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("top", [5.0, 30.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_far_from_the_limit(shape, top, method):
    for kind in SPECTRA:
        x = jnp.asarray(matrix(kind, shape, top), F32)
        landed = cap(x, method=method, landing=True)
        np.testing.assert_allclose(landed, exact(x), rtol=0, atol=1e-5, err_msg=kind)
        assert largest(landed) <= 1 + 8 * eps(F32)


@pytest.mark.parametrize("method", METHODS)
def test_in_float64_and_complex(method, x64):
    complexes = matrix("normal", (6, 4), 30.0) + 1j * matrix("half at the limit", (6, 4), 3.0)
    for x in (matrix("near the limit", (12, 9), 1.2), matrix("normal", (9, 12), 30.0), complexes):
        x = jnp.asarray(x)
        for landing in (False, True):
            new = cap(x, method=method, landing=landing)
            assert new.dtype == x.dtype
            np.testing.assert_allclose(new, exact(x), rtol=0, atol=200 * eps(jnp.float64))
        assert largest(new) <= 1 + 4 * eps(jnp.float64)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=lambda d: jnp.dtype(d).name)
def test_in_sixteen_bits(dtype, method):
    x = jnp.asarray(matrix("half at the limit", (32, 24), 1.2), dtype)
    landed = cap(x, method=method, landing=True)
    assert landed.dtype == dtype
    np.testing.assert_allclose(wide(landed), exact(x), rtol=0, atol=4 * eps(dtype))
    assert largest(landed) <= 1 + 4 * eps(dtype)
    # One above the limit among many just below is seen, one that is just below is left.
    for top, moves in ((1.03, True), (0.995, False)):
        values = np.r_[top, np.full(15, 0.99)]
        x = jnp.asarray(exact(matrix("equal", (16, 16), 1.0), 1.0) @ np.diag(values), F32).astype(dtype)
        assert (np.asarray(cap(x, method=method, landing=True)) != np.asarray(x)).any() == moves


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("landing", [False, True])
def test_each_matrix_of_a_batch_is_on_its_own(method, landing):
    """Far outside, near, then inside, zero, tiny, with NaN, with inf: these five keep their bits."""
    tops = (1e4, 1.2, 0.9, 0, 1e-30, 2, 2)
    x = np.stack([matrix("normal", (6, 4), top, seed) for seed, top in enumerate(tops)])
    x[5, 0, 0], x[6, 5, 3] = np.nan, np.inf
    x = jnp.asarray(x, F32)
    new = cap(x, method=method, landing=landing)
    for i in (2, 3, 4, 5, 6):
        np.testing.assert_array_equal(new[i], x[i])
    for i in (0, 1):
        alone = cap(x[i], method=method, landing=landing)
        np.testing.assert_allclose(new[i], alone, atol=8 * eps(F32))
        assert 0.99 if i else 0.5 <= largest(new[i]) <= 1 + 4 * eps(F32)
    np.testing.assert_allclose(new[1], exact(x[1]), atol=8 * eps(F32))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("unit", [2.0**-100, 2.0**100])
def test_powers_of_two_change_nothing(unit, method):
    x = jnp.asarray(matrix("normal", (8, 6), 3.0), F32)
    np.testing.assert_array_equal(cap(x * unit, unit, method=method) / unit, cap(x, method=method))


@pytest.mark.parametrize("method", METHODS)
def test_limits_at_the_edge(method):
    x = jnp.asarray(matrix("normal", (5, 3), 2.0), F32)
    np.testing.assert_array_equal(cap(x, jnp.inf, method=method), x)
    np.testing.assert_array_equal(cap(x, 0.0, method=method, landing=True), 0)
    np.testing.assert_array_equal(cap(x, -1.0, method=method), 0)
    for limits in ((1.0, 0.5), (1e-30, 1e30)):
        both = cap(jnp.stack([x, x]), limits, method=method)
        for new, limit in zip(both, limits, strict=True):
            np.testing.assert_allclose(new, exact(x, limit), rtol=0, atol=1e-5 * limit)
    assert 0 < largest(cap(jnp.full((4, 4), 1e30), 1e-30, method=method)) <= 1.001e-30


@pytest.mark.parametrize("method", METHODS)
def test_derivatives_take_the_singular_vectors_as_constants(method):
    x, dx = (jnp.asarray(matrix("normal", (5, 4), top, seed), F32) for top, seed in ((9.0, 1), (1.0, 2)))
    u, s, v = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    tangent = jax.jvp(lambda x: cap(x, method=method), (x,), (dx,))[1]
    np.testing.assert_allclose(tangent, (np.asarray(dx) @ v.T * np.minimum(1, 1 / s)) @ v, atol=1e-5)
    one, by_limit = jnp.ones(()), lambda c: matrices.cap_singular_values(x, c, method=method)
    np.testing.assert_allclose(jax.jvp(by_limit, (one,), (one,))[1], (u * (s > 1)) @ v, atol=1e-5)
    inside = jax.jvp(lambda x: cap(x, 100.0, method=method), (x,), (dx,))[1]
    np.testing.assert_array_equal(inside, dx)
    grads = jax.grad(lambda x: jnp.sum(cap(x, method=method) ** 2))(jnp.zeros((3, 3)))
    np.testing.assert_array_equal(grads, 0)


def test_the_default_and_what_is_compiled():
    assert [split.default_method(p, n) for p in ("cpu", "tpu") for n in (64, 65)] == [
        "polar", "eigh", "polar", "polar",
    ]  # fmt: skip
    text = {
        (method, n): cap.lower(jnp.ones((n, n)), 1.0, method=method).compile().as_text()
        for cap in (jax.jit(cap, static_argnames="method"),)
        for method, n in (("eigh", 8), ("polar", 8), (None, 8), (None, 65))
    }
    assert {key: "lapack" in program for key, program in text.items()} == {
        ("eigh", 8): True, ("polar", 8): False, (None, 8): False, (None, 65): True,
    }  # fmt: skip
    assert " conditional(" not in text["polar", 8]


# --- The largest singular value ------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_largest_singular_value(method):
    for kind in SPECTRA:
        for shape in SHAPES:
            x = jnp.asarray(matrix(kind, shape, 1.2), F32)
            found = matrices.largest_singular_value(x, method=method)
            np.testing.assert_allclose(found, largest(x), rtol=2e-6, err_msg=f"{kind} {shape}")
    x = jnp.stack([jnp.zeros((3, 2)), jnp.full((3, 2), 1e30), jnp.full((3, 2), jnp.nan)])
    np.testing.assert_allclose(
        matrices.largest_singular_value(x, method=method), [0, 6**0.5 * 1e30, np.nan], rtol=1e-6
    )


@pytest.mark.parametrize("method", ["polar", "eigh"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_that_know_nothing_of_each_other(dtype, method):
    """One lies between the aim and the radius, where it was projected before, and another outside."""
    ball, eps = spectral_ball(1.0, method=method), float(jnp.finfo(dtype).eps)
    rng = np.random.default_rng(0)
    for beside in (1.0, 1 - eps, 0.5):
        blocks = [
            np.linalg.qr(rng.normal(size=(n, n)))[0] * r for n, r in [(2, beside), (3, 1.5), (1, 1.1)]
        ]
        x = jnp.asarray(scipy.linalg.block_diag(*blocks, np.eye(2) * beside)).astype(dtype)
        values = np.linalg.svd(np.asarray(project(x, ball), np.float64), compute_uv=False)
        assert values.max() <= 1 + 4 * eps
        assert values.min() >= min(beside, 1) - 8 * eps


def test_weights_at_the_radius_stay_there():
    p = jnp.eye(4)
    tx = optax.chain(optax.sgd(0.1), project_weights(spectral_ball(1.0)))
    state, g = tx.init(p), jnp.zeros_like(p).at[2, 2].set(-1.0)
    for _ in range(4):
        updates, state = tx.update(g, state, p)
        p = optax.apply_updates(p, updates)
    np.testing.assert_allclose(p, np.eye(4), atol=1e-6)
    assert metrics(state)["project/fraction"] > 0


@pytest.mark.parametrize("method", ["polar", "eigh"])
def test_derivative_of_a_violation(method):
    ball = spectral_ball(0.5, method=method)
    slope = jax.jit(jax.grad(lambda x: violation(x, ball)))
    for shape in ((2, 2), (4, 3), (3, 5)):
        x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
        u, _, v = np.linalg.svd(np.float64(x))
        np.testing.assert_allclose(slope(x), np.outer(u[:, 0], v[0]), atol=2e-6)
    np.testing.assert_array_equal(slope(np.zeros((2, 2), np.float32)), np.zeros((2, 2)))
