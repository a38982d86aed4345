"""The formulas of every platform, run by the CPU and held to the same oracles.

A program is compiled once for a platform and a scope; numbers of any size go through it.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clip as oc
import reference
from optax_clip import _xla

ORDS = (None, 1, 3.5, math.inf, "rms")
SCOPES = ("global", "leaf", "unit")
EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-7}
SMALLEST = 2.0**-126  # of the normal numbers: what is below may count as 0


def normal(shape, dtype="float32", seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


# Leaves of one entry too, of which a compiler makes constants.
SHAPE = {
    "w": normal((5, 3)),
    "half": normal((4, 2), "bfloat16", 1),
    "one": jnp.ones((1, 1)),
    "b": jnp.ones(()),
}
SIZES = (0.0, 1e-42, 1e-38, 1e-30, 1e-21, 1.0, 1e19, 1e25, 1e37)


def times(x, size):
    return jnp.asarray(np.asarray(x, np.float64) * size).astype(x.dtype)


def scaled(size):
    return {key: times(x, size) for key, x in SHAPE.items()}


@functools.cache
def program(platform, function, *args):
    """Compiled while the platform is in force, once."""
    del platform
    return jax.jit(functools.partial(function, *args))


def close(found, expected, rtol, atol=0.0):
    found, expected = jax.tree.leaves(found), jax.tree.leaves(expected)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float64), y, rtol=rtol, atol=atol)


# --- Norms ---------------------------------------------------------------------------------------


def all_norms(scope, tree):
    return [oc.tree_norms(tree, scope=scope, ord=ord) for ord in ORDS]


@pytest.mark.parametrize("scope", SCOPES)
def test_norms(platform, scope):
    """Of every order, from subnormal entries to those whose norm is the largest number."""
    run = program(platform, all_norms, scope)
    for size in SIZES:
        tree = scaled(size)
        for ord, found in zip(ORDS, run(tree), strict=True):
            expected = reference.tree_norms(tree, scope, ord)
            # Entries below the normal numbers may count as 0, each in its dtype.
            below = 30 * SMALLEST if size < 1e-30 else 0.0
            close(found, expected, rtol=1e-5, atol=below)


@pytest.mark.parametrize("scope", SCOPES)
def test_one_leaf_of_zeros_beside_others(platform, scope):
    run = program(platform, all_norms, scope)
    for size in SIZES[3:]:
        for key in SHAPE:
            tree = scaled(size) | {key: jnp.zeros_like(SHAPE[key])}
            for ord, found in zip(ORDS, run(tree), strict=True):
                close(found, reference.tree_norms(tree, scope, ord), rtol=1e-5)


def slopes(scope, tree):
    def total(tree):
        return sum(jnp.sum(n) for n in jax.tree.leaves(oc.tree_norms(tree, scope=scope)))

    return jax.grad(total)(tree)


@pytest.mark.parametrize("scope", SCOPES)
def test_slopes_of_norms(platform, scope):
    """Each entry over its norm, which has the same size everywhere; 0 at 0."""
    run = program(platform, slopes, scope)
    tree = scaled(1.0)
    norms = reference.per_leaf(reference.tree_norms(tree, scope), tree, scope)
    expected = {key: np.asarray(x, np.float64) / norms[key] for key, x in tree.items()}
    for size in SIZES[3:-1]:
        found = run(scaled(size))
        for key, x in expected.items():
            np.testing.assert_allclose(np.asarray(found[key], np.float64), x, rtol=0.02, atol=1e-3)
    for x in jax.tree.leaves(run(scaled(0.0))):
        assert np.isfinite(np.asarray(x, np.float64)).all()


# --- The edge table of the clips ------------------------------------------------------------------


def both(scope, tree, limit):
    """By both policies, with what they record."""
    found = []
    for nonfinite in ("propagate", "zero"):
        tx = oc.clip_by_norm(limit, scope=scope, nonfinite=nonfinite)
        updates, state = tx.update(tree, tx.init(tree))
        found.append((updates, oc.metrics(state)))
    return found


def spoilt(value):
    return SHAPE | {"w": SHAPE["w"].at[1, 2].set(value)}


EDGES = {
    "below": (scaled(0.01), 1.0),
    "above": (scaled(4.0), 0.5),
    "no limit": (scaled(4.0), math.inf),
    "a limit of 0": (scaled(4.0), 0.0),
    "a limit of 0, zeros": (scaled(0.0), 0.0),
    "a negative limit": (scaled(4.0), -1.0),
    "a limit that is NaN": (scaled(4.0), math.nan),
    "zeros": (scaled(0.0), 1.0),
    "squares that underflow": (scaled(1e-30), 1e-31),
    "squares that overflow": (scaled(1e25), 1.0),
    "a norm beyond float32": ({key: jnp.full_like(x, 3e38) for key, x in SHAPE.items()}, 1.0),
    "NaN": (spoilt(math.nan), 1.0),
    "inf": (spoilt(math.inf), 1.0),
}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("case", EDGES)
def test_edges_of_clips(platform, scope, case):
    tree, limit = EDGES[case]
    found = program(platform, both, scope)(tree, jnp.float32(limit))
    for nonfinite, (updates, record) in zip(("propagate", "zero"), found, strict=True):
        expected, metrics = reference.clip_by_norm(tree, limit, scope, None, nonfinite)
        for key, x in tree.items():
            eps = EPS[str(x.dtype)]
            assert updates[key].dtype == x.dtype
            new = np.asarray(updates[key], np.float64)
            np.testing.assert_allclose(new, expected[key], rtol=8 * eps, atol=SMALLEST, err_msg=key)
            if case in ("below", "no limit", "zeros"):
                np.testing.assert_array_equal(updates[key], x)
        assert int(record["clip/steps_nonfinite"]) == (case in ("NaN", "inf"))
        if case not in ("NaN", "inf", "a limit that is NaN", "a norm beyond float32"):
            for name in ("norm_before", "norm_after", "threshold", "fraction"):
                close(record[f"clip/{name}"], metrics[name], rtol=0.01)


def by_value(tree, limit):
    tx = oc.clip_by_value(limit, lower=-2 * limit)
    updates, state = tx.update(tree, tx.init(tree))
    return updates, oc.metrics(state)


def test_clip_by_value(platform):
    run = program(platform, by_value)
    cases = (scaled(4.0), 0.5), (scaled(0.1), 1.0), (scaled(1e25), 1e24), (spoilt(math.inf), 0.5)
    for tree, limit in cases:
        updates, record = run(tree, jnp.float32(limit))
        expected, metrics = reference.clip_by_value(tree, -2 * limit, limit)
        for key, x in expected.items():
            rtol = EPS[str(tree[key].dtype)]
            np.testing.assert_allclose(np.asarray(updates[key], np.float64), x, rtol=rtol)
        if np.isfinite(tree["w"]).all():
            for name in ("norm_before", "norm_after", "threshold", "fraction"):
                close(record[f"clip/{name}"], metrics[name], rtol=1e-2 if "after" in name else 1e-5)


# --- Sets -----------------------------------------------------------------------------------------

# Which oracle, by what numbers, and whether rounding may not lead outside.
SETS = {
    "box": (oc.box(-0.5, 0.25), "leaf", {"lower": -0.5, "upper": 0.25}),
    "norm_ball": (oc.norm_ball(1.0), "leaf", {"radius": 1.0}),
    "norm_ball, unit": (oc.norm_ball(0.5, scope="unit"), "unit", {"radius": 0.5}),
    "norm_ball, 1": (oc.norm_ball(1.0, ord=1), "leaf", {"radius": 1.0}),
    "norm_ball, 1, unit": (oc.norm_ball(0.5, ord=1, scope="unit"), "unit", {"radius": 0.5}),
    "norm_sphere": (oc.norm_sphere(1.0, scope="global"), "global", {"radius": 1.0}),
    "norm_shell": (oc.norm_shell(0.5, 1.0), "leaf", {"lower": 0.5, "upper": 1.0}),
    "simplex": (oc.simplex(1.0), "leaf", {"total": 1.0}),
    "spectral_ball": (oc.spectral_ball(1.0), "leaf", {"radius": 1.0}),
}
KIND = {
    "norm_ball": "l2_ball",
    "norm_ball, unit": "l2_ball",
    "norm_ball, 1": "l1_ball",
    "norm_ball, 1, unit": "l1_ball",
    "norm_sphere": "sphere",
    "norm_shell": "shell",
}


def step(name, params, updates):
    tx = oc.project_weights(SETS[name][0])
    updates, state = tx.update(updates, tx.init(params), params)
    return optax.apply_updates(params, updates), oc.metrics(state)


@pytest.mark.parametrize("name", SETS)
def test_where_weights_land(platform, name):
    """In the set, at the nearest point to where the update led, and as far away as is recorded."""
    _, scope, values = SETS[name]
    params = {"w": normal((6, 4), seed=2) / 4, "half": normal((6, 4), "bfloat16", 3) / 4}
    run = program(platform, step, name)
    for size in (0.0, 0.5, 3.0):
        updates = {key: size * normal((6, 4), x.dtype, 4) for key, x in params.items()}
        landed, record = run(params, updates)
        reached = {
            key: np.asarray((x + updates[key]).astype(x.dtype)).astype(np.float64)
            for key, x in params.items()
        }
        nearest = reference.project(reached, KIND.get(name, name), scope, **values)
        moved = math.sqrt(
            sum(np.sum((np.asarray(landed[key], np.float64) - x) ** 2) for key, x in reached.items())
        )
        for key, x in nearest.items():
            eps = EPS[str(landed[key].dtype)]
            np.testing.assert_allclose(np.asarray(landed[key], np.float64), x, rtol=0, atol=8 * eps)
        if name in ("box", "norm_ball", "norm_ball, unit", "norm_ball, 1", "norm_ball, 1, unit"):
            assert (
                reference.violation(landed, KIND.get(name, name), scope, **values) <= 4 * EPS["float32"]
            )
        close(record["project/distance"], moved, rtol=1e-2, atol=1e-6)


def nearest_points(tree, radius):
    return {
        "l1_ball": oc.project(tree, oc.norm_ball(radius, ord=1)),
        "simplex": oc.project(tree, oc.simplex(radius)),
    }


def test_soft_thresholds(platform):
    """Of entries a thousand times smaller and larger than a radius from tiny to huge."""
    run = program(platform, nearest_points)
    for radius in (1e-20, 1.0, 1e20):
        for size in (1e-3, 1.0, 1e3):
            tree = {
                "w": jnp.asarray(np.asarray(normal((40, 5)), np.float64) * size * radius, jnp.float32)
            }
            for kind, found in run(tree, jnp.float32(radius)).items():
                named = {"l1_ball": "radius", "simplex": "total"}[kind]
                expected = reference.project(tree, kind, **{named: float(np.float32(radius))})
                error = np.asarray(found["w"], np.float64) - expected["w"]
                assert np.abs(error).max() <= 16 * EPS["float32"] * max(size, 1) * radius, (kind, size)


# --- The seam -------------------------------------------------------------------------------------


def test_the_seam_is_the_one_that_is_asked(platform):
    """So that the tests above run what they say."""
    ways = {"cpu": lambda x: x + 1, "cuda": lambda x: x + 2}
    found = jax.jit(lambda x: _xla.by_platform(x, default=lambda x: x + 3, **ways))(0.0)
    assert float(found) == {"cpu": 1.0, "cuda": 2.0, "tpu": 3.0}[platform]
