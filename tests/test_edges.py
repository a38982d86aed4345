"""Values at the edge: float8, subnormal and infinite entries, the boundary, bounds for each entry."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_clip import (
    adagc,
    adaptive_grad_clip,
    box,
    clip_by_global_norm,
    clip_by_norm,
    clip_by_value,
    clip_singular_values,
    groups,
    mask_outward,
    metrics,
    norm_ball,
    norm_shell,
    norm_sphere,
    project,
    project_weights,
    simplex,
    spectral_ball,
    tree_norms,
    violation,
    where,
)

# Largest numbers <= 0.3 and <= 0.1: 1.125 * 2^-2 (2^-2 with two bits of mantissa) and 1.5 * 2^-4.
FLOAT8 = {
    "float8_e4m3fn": (0.28125, 0.09375),
    "float8_e4m3fnuz": (0.28125, 0.09375),
    "float8_e4m3b11fnuz": (0.28125, 0.09375),
    "float8_e5m2": (0.25, 0.09375),
    "float8_e5m2fnuz": (0.25, 0.09375),
}


def every_number(kind):
    """All finite numbers of a float8 type."""
    numbers = np.arange(256, dtype=np.uint8).view(jnp.dtype(kind))
    return jnp.asarray(numbers[np.isfinite(numbers.astype(np.float32))])


def wide(x):
    return np.asarray(x).astype(np.float64)


@pytest.mark.parametrize("kind", FLOAT8)
def test_bounds_of_float8(kind):
    """Every finite number ends at the next one inwards of its bound, or stays."""
    limit, bound = FLOAT8[kind]
    x = every_number(kind)
    tx = clip_by_value(0.3)
    clipped, _ = jax.jit(tx.update)(x, tx.init(x))
    assert clipped.dtype == x.dtype
    np.testing.assert_array_equal(wide(clipped), np.clip(wide(x), -limit, limit))
    np.testing.assert_array_equal(wide(project(x, box(-0.1, 0.1))), np.clip(wide(x), -bound, bound))


@pytest.mark.parametrize("kind", FLOAT8)
@pytest.mark.parametrize("ord", [None, 1, math.inf])
def test_balls_of_float8(kind, ord):
    """Inside, and from the projection in float64 at most one step of a mantissa of two bits inwards."""
    x = jnp.asarray([1.0, -1.0, 0.5, 0.0], kind)
    ended = project(x, norm_ball(1.0, ord=ord))
    assert ended.dtype == x.dtype
    assert np.linalg.norm(wide(ended), ord or 2) <= 1
    expected = {None: wide(x) / 1.5, 1: [0.5, -0.5, 0, 0], math.inf: wide(x)}[ord]  # by hand: |x| = 1.5
    np.testing.assert_allclose(wide(ended), expected, rtol=0.25, atol=1e-6)
    tx = project_weights(norm_ball(1.0, ord=ord))
    updates, _ = jax.jit(tx.update)(x, tx.init(x), x)
    landed = optax.apply_updates(x, updates)
    assert landed.dtype == x.dtype and np.linalg.norm(wide(landed), ord or 2) <= 1


@pytest.mark.parametrize("kind", FLOAT8)
@pytest.mark.parametrize("constraint", [norm_sphere(1.0), norm_shell(1.0, 1.2), simplex(1.0)], ids=repr)
def test_other_sets_of_float8(kind, constraint):
    """Finite, and as near as rounding to two bits after the first allows."""
    x = jnp.asarray([1.0, -1.0, 0.5, 0.0], kind)
    assert float(violation(project(x, constraint), constraint)) <= 0.125


# --- The boundary ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [4, 64, 1024])
def test_a_point_on_the_boundary_of_the_1_ball(n):
    """It moves by no more than what a float32 sum of n entries cannot tell, and six roundings."""
    x = jnp.full(n, 1 / n)
    moved = np.abs(wide(project(x, norm_ball(1.0, ord=1))) - wide(x)).max() * n
    assert moved <= (8 + math.log2(n) / 2) * 2.0**-24 + n * 2.0**-24 / n


@pytest.mark.parametrize(
    "x, expected",
    [
        ([0.0, 0.0, -np.inf], [0.5, 0.5, 0.0]),
        ([3.0, -np.inf, -np.inf], [1.0, 0.0, 0.0]),
        ([0.0, np.inf], [0.0, np.inf]),
        ([np.nan, 0.0], [np.nan, 0.0]),
        ([-np.inf, -np.inf], [-np.inf, -np.inf]),
        ([-np.inf, np.inf], [-np.inf, np.inf]),
    ],
)
@pytest.mark.parametrize("jit", [False, True])
def test_simplex_of_masked_logits(x, expected, jit):
    f = jax.jit(project, static_argnums=1) if jit else project
    np.testing.assert_array_equal(f(jnp.asarray(x), simplex(1.0)), np.float32(expected))


def test_simplex_of_masked_logits_by_unit():
    """Each column by itself: one with -inf beside one with NaN."""
    x = jnp.array([[0.0, np.nan], [0.0, 1.0], [-np.inf, 1.0]])
    np.testing.assert_array_equal(
        project(x, simplex(1.0, scope="unit")), np.float32([[0.5, np.nan], [0.5, 1], [0, 1]])
    )


SUBNORMAL = [
    jnp.array([1e-40, 0.0, -1e-45]),
    jnp.array([6e-8, 0.0], jnp.float16),
    jnp.array([1e-40], jnp.bfloat16),
]


@pytest.mark.parametrize("jit", [False, True])
def test_a_limit_of_zero_on_subnormal_numbers(jit):
    clips = [clip_by_norm(0.0, ord=ord) for ord in (None, 1, 3, math.inf, "rms")]
    clips += [clip_by_global_norm(0.0), clip_by_value(0.0), clip_by_norm(0.0, scope="unit")]

    def all_of_them(tree):
        return [tx.update(tree, tx.init(tree))[0] for tx in clips], project(tree, box(0.0, 0.0))

    clipped, projected = (jax.jit(all_of_them) if jit else all_of_them)(SUBNORMAL)
    for x in jax.tree.leaves(clipped):
        assert not np.any(wide(x))  # but for the sign of a zero
    for x in projected:
        assert not np.any(np.asarray(x).view(np.uint8))


def test_a_number_is_an_array_to_callables():
    tree = {"a": 3.0, "b": np.float32(4.0)}
    axes = tree_norms(tree, scope=lambda path, leaf: tuple(range(leaf.ndim)))
    assert {key: float(x) for key, x in axes.items()} == {"a": 3.0, "b": 4.0}
    tx = clip_by_norm(1.0, scope=lambda path, leaf: tuple(range(leaf.ndim)))
    assert float(tx.update(tree, tx.init(tree))[0]["a"]) == 1.0
    assert float(tree_norms(tree, scope=groups(lambda path, leaf: str(leaf.ndim)))["0"]) == 5.0
    assert where(lambda path, leaf: leaf.ndim == 0)(tree) == {"a": True, "b": True}
    assert float(project(tree, box(0.0, lambda path, leaf: 1.0 + leaf.ndim))["a"]) == 1.0
    assert float(project(tree, norm_ball(lambda path, leaf: 1.0 + leaf.ndim))["a"]) <= 1.0


# --- Bounds for each entry ------------------------------------------------------------------------

X = {"w": jnp.array([[-3.0, 0.5], [2.0, 7.0]]), "b": jnp.array([4.0, -4.0])}
BOUNDS = {
    "arrays that broadcast": (jnp.zeros(2), jnp.array([1.0, 5.0])),
    "a number and an array": (-1.0, jnp.array([1.0, 5.0])),
    "numpy": (np.zeros(2), np.ones(2)),
    "a tree of arrays": (
        {"w": jnp.array([[0.0], [1.0]]), "b": -1.0},
        {"w": jnp.full((2, 2), 3.0), "b": jnp.ones(2)},
    ),
}


def each_leaf(bound):
    return bound if isinstance(bound, dict) else {"w": bound, "b": bound}


@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)
def test_boxes_for_each_entry(bounds):
    low, high = map(each_leaf, bounds)
    projected, lands = project(X, box(*bounds)), project_weights(box(*bounds))
    updates, _ = lands.update(jax.tree.map(jnp.zeros_like, X), lands.init(X), X)
    clip = clip_by_value(bounds[1], lower=bounds[0])
    clipped, _ = clip.update(X, clip.init(X))
    for key, x in X.items():
        expected = np.clip(wide(x), low[key], high[key])
        np.testing.assert_array_equal(projected[key], expected)
        np.testing.assert_array_equal(clipped[key], expected)
        np.testing.assert_array_equal(x + updates[key], expected)
    masked = mask_outward(box(*bounds))
    kept, _ = masked.update(jax.tree.map(lambda x: -x, X), masked.init(X), projected)
    assert float(kept["b"][0]) == (0.0 if float(projected["b"][0]) < 4 else -4.0)


def test_a_box_as_optax_has_it():
    """`projection_box(w, l, u)` of arrays."""
    low, high = jnp.zeros(2), jnp.array([1.0, 5.0])
    np.testing.assert_array_equal(
        project(X["b"], box(low, high)), optax.projections.projection_box(X["b"], low, high)
    )


def test_radii_for_each_norm():
    """By unit: columns of norm 5 and 13 against 1 and 26, then a radius for each leaf."""
    w = jnp.array([[3.0, 5.0], [4.0, 12.0]])
    ended = wide(project(w, norm_ball(jnp.array([1.0, 26.0]), scope="unit")))
    np.testing.assert_allclose(ended, [[0.6, 5], [0.8, 12]], rtol=2e-6)
    sums = wide(project(w, simplex(np.array([1.0, 2.0]), scope="unit"))).sum(0)
    np.testing.assert_allclose(sums, [1, 2], rtol=1e-6)
    tree = project({"a": w, "b": w}, norm_sphere({"a": 1.0, "b": jnp.array([2.0, 3.0])}, scope="unit"))
    np.testing.assert_allclose(np.linalg.norm(wide(tree["b"]), axis=0), [2, 3], rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(wide(tree["a"]), axis=0), 1, rtol=1e-6)


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: box(jnp.zeros(2), jnp.array([1.0, -1.0])),
            r"lower <= upper, got 0\.0 > -1\.0 at position \(1,\)",
        ),
        (
            lambda: box({"w": 2.0}, {"w": np.ones((1, 2))}),
            r"lower\['w'\] <= upper\['w'\].*position \(0, 0\)",
        ),
        (
            lambda: clip_by_value(jnp.ones(2), lower=np.array([0.0, 3.0])),
            r"lower <= limit, got 3\.0 > 1\.0 at position \(1,\)",
        ),
        (lambda: norm_shell(jnp.array([1.0, 3.0]), 2.0), r"lower <= upper.*position \(1,\)"),
        (lambda: clip_by_value(jnp.array([1.0, -1.0])), r"limit >= 0, got -1\.0 at position \(1,\)"),
        (
            lambda: norm_ball({"w": np.array([1.0, np.nan])}),
            r"radius\['w'\] not to be NaN.*position \(1,\)",
        ),
        (
            lambda: project(X, box(jnp.zeros(3), 1.0)),
            r"lower to broadcast to shape \(2,\) for leaf 'b', got shape \(3,\)",
        ),
        (
            lambda: project(X, norm_ball(jnp.ones(3), scope="unit")),
            r"radius to broadcast to shape .* got shape \(3,\)",
        ),
        (lambda: project(X, box(0.0, {"w": 1.0})), "upper .* without a number for 'b'"),
    ],
)
def test_bounds_that_are_wrong_name_path_and_position(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "dtype, lower, upper, got",
    [
        ("float32", 0.1, 0.1, "for leaf 'a', got lower=0.1 and upper=0.1."),
        ("bfloat16", 1.001, 1.002, "for leaf 'a', got lower=1.001 and upper=1.002."),
        ("float8_e4m3fn", 0.1, 0.1, "for leaf 'a', got lower=0.1 and upper=0.1."),
        (
            "float32",
            np.array([0.0, 0.1]),
            np.array([1.0, 0.1]),
            "for leaf 'a' at position (1,), got lower=0.1 and upper=0.1.",
        ),
    ],
)
@pytest.mark.parametrize("jit", [False, True])
def test_boxes_without_a_number_of_the_dtype(dtype, lower, upper, got, jit):
    """0.1 is no number of any binary dtype; the two of bfloat16 next to 1 are 1 and 1.0078125."""
    call = jax.jit(project, static_argnums=1) if jit else project
    with pytest.raises(ValueError) as error:
        call({"a": jnp.ones(2, dtype)}, box(lower, upper))
    assert str(error.value) == f"Expected a number of dtype {dtype} between lower and upper {got}"


@pytest.mark.parametrize(
    "lower, upper, landed",
    [(0.5, 0.5, 0.5), (0.0, -0.0, 0.0), (-0.0, 0.0, 0.0), (jnp.float32(0.1),) * 2 + (np.float32(0.1),)],
)
def test_boxes_of_one_number(lower, upper, landed):
    x = jnp.array([-3.0, 0.25, 7.0])
    np.testing.assert_array_equal(project(x, box(lower, upper)), np.full(3, landed, np.float32))
    np.testing.assert_array_equal(violation(project(x, box(lower, upper)), box(lower, upper)), 0)


def test_one_ratio_of_agc_is_one_number():
    with pytest.raises((TypeError, ValueError), match="ratio"):
        adaptive_grad_clip(jnp.ones(2))


LIMITED = {
    "norm_ball": lambda r: norm_ball(r),
    "norm_ball, 1": lambda r: norm_ball(r, ord=1),
    "norm_ball, inf": lambda r: norm_ball(r, ord=math.inf),
    "norm_sphere": lambda r: norm_sphere(r),
    "norm_shell": lambda r: norm_shell(r, 2.0),
    "spectral_ball": lambda r: spectral_ball(r),
    "spectral_ball, power": lambda r: spectral_ball(r, power_iterations=1),
}


@pytest.mark.parametrize("name", LIMITED)
def test_a_traced_radius_that_is_nan(name):
    x = jnp.array([[3.0, 0.0], [0.0, 0.5]])
    new = jax.jit(lambda r: project(x, LIMITED[name](r)))(jnp.nan)
    assert np.isnan(new).all()


def test_a_ball_of_order_inf_for_each_label():
    ball = norm_ball({"a": 1.0, "b": 0.5}, ord=math.inf, scope=groups(lambda path, leaf: path))
    new = project({"a": jnp.array([3.0, -0.25]), "b": jnp.array([-3.0, 0.25])}, ball)
    np.testing.assert_array_equal(new["a"], [1.0, -0.25])
    np.testing.assert_array_equal(new["b"], [-0.5, 0.25])


def test_a_formula_for_a_ball_of_order_inf_that_is_traced_and_negative():
    new = jax.jit(lambda r: project(jnp.ones(2), norm_ball(lambda path, leaf: r, ord=math.inf)))(-1.0)
    np.testing.assert_array_equal(new, [0.0, 0.0])


def test_a_callable_on_numbers_of_python():
    assert project(2.0, lambda tree: tree / 2) == 1.0
    assert violation({"a": 2.0}, lambda tree: {"a": 1.5}) == 0.5


@pytest.mark.parametrize(
    "tree", [{"a": [3e38], "b": [3e38]}, {"a": [3e38, 3e38]}], ids=["leaves", "leaf"]
)
def test_a_warm_up_whose_norm_is_beyond_float32(tree):
    """Neither nothing nor all: the norm counts as the largest number, 0.8 of what it is."""
    grads = {key: jnp.asarray(x, jnp.float32) for key, x in tree.items()}
    tx = adagc(max_norm=1.0)
    updates, _ = tx.update(grads, tx.init(grads))
    norm = np.linalg.norm(np.concatenate([np.asarray(x) for x in updates.values()]))
    assert 0.99 < norm < 1.25


@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_the_derivative_of_capped_values_at_zero(limit):
    tx, zero = clip_singular_values(limit), jnp.zeros((2, 3))
    for cap in (
        lambda x: tx.update(x, tx.init(x))[0],
        lambda x: project(x, spectral_ball(limit)),
    ):
        assert np.isfinite(jax.grad(lambda x: jnp.sum(cap(x)))(zero)).all()  # noqa: B023


def test_the_threshold_of_a_tree_without_leaves():
    for tx, expected in ((clip_by_value(2.0), 2.0), (clip_by_value(2.0, lower=-1.0), 1.0)):
        assert metrics(tx.update({}, tx.init({}))[1])["clip/threshold"] == expected
