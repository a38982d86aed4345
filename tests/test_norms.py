"""Measure: every order in every scope against float64, over the whole range of every dtype."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import reference
from optax_clip import clip_tree, global_norm, tree_norms

ORDS = (None, 1, 2, 3.5, math.inf, "rms")
DTYPES = ("float16", "bfloat16", "float32", "complex64", "float64")
RTOL = 1e-5  # What the design promises of a float32 norm.


def by_path(path, leaf):
    return (0, 2) if path == "conv" else "leaf"


# Each with an axis that every leaf of TREE below has.
SCOPES = ("global", "leaf", "unit", 0, -1, (0, -1), (), by_path)


@pytest.fixture
def dtype(request):
    """A dtype by name, with 64-bit types where it needs them."""
    with jax.enable_x64(request.param in ("float64", "complex128")):
        yield jnp.dtype(request.param)


def each(*names):
    return pytest.mark.parametrize("dtype", names, indirect=True)


def cast(values, dtype):
    """Numbers in a dtype; complex ones are turned by 3-4-5, which keeps their modulus."""
    turn = 0.6 + 0.8j if jnp.issubdtype(dtype, jnp.complexfloating) else 1.0
    return jnp.asarray(np.asarray(values, np.float64) * turn).astype(dtype)


def normal(shape, dtype, seed=0):
    return cast(np.random.default_rng(seed).normal(size=shape), dtype)


def check(norms, expected, rtol=RTOL):
    """Both are trees of norms, or both are scalars."""
    found, wanted = (jax.tree.leaves_with_path(x) for x in (norms, expected))
    assert [path for path, _ in found] == [path for path, _ in wanted]
    for (path, n), (_, m) in zip(found, wanted, strict=True):
        assert n.shape == np.shape(m), path
        np.testing.assert_allclose(np.asarray(n, np.float64), m, rtol=rtol, err_msg=str(path))


# --- Against the oracle --------------------------------------------------------------------------


@pytest.mark.parametrize("ord", ORDS)
@each(*DTYPES)
def test_every_scope(dtype, ord):
    tree = {"conv": normal((2, 3, 4), dtype), "dense": normal((3, 2), dtype, 1)}
    for scope in SCOPES:
        norms = tree_norms(tree, scope=scope, ord=ord)
        check(norms, reference.tree_norms(tree, scope, ord))
        width = "float64" if dtype in ("float64", "complex128") else "float32"
        assert all(n.dtype == width for n in jax.tree.leaves(norms))
    check(global_norm(tree, ord=ord), reference.global_norm(tree, ord))


@pytest.mark.parametrize("ord", ORDS)
def test_compiled(ord):
    scopes = ("global", "leaf", "unit")
    tree = {"w": normal((3, 2), "float32"), "b": normal((2,), "bfloat16")}
    found = jax.jit(lambda tree: [tree_norms(tree, scope=scope, ord=ord) for scope in scopes])(tree)
    check(found, [reference.tree_norms(tree, scope, ord) for scope in scopes])


def test_by_hand():
    tree = {"w": jnp.array([[3.0, 0.0], [4.0, -12.0]]), "b": jnp.array([2.0, 0.0, 0.0, 0.0])}
    # 9 + 16 + 144 + 4 = 173;  3 + 4 + 12 + 2 = 21;  173 / 8 entries.
    check(global_norm(tree), math.sqrt(173))
    check(global_norm(tree, ord=1), 21.0)
    check(global_norm(tree, ord=math.inf), 12.0)
    check(global_norm(tree, ord="rms"), math.sqrt(173 / 8))
    check(tree_norms(tree), {"w": np.full((1, 1), 13.0), "b": np.array([2.0])})
    check(tree_norms(tree, ord="rms"), {"w": np.full((1, 1), 6.5), "b": np.array([1.0])})
    check(tree_norms(tree, scope="unit"), {"w": np.array([[5.0, 12.0]]), "b": np.array([2.0])})
    check(tree_norms(tree, scope=-1, ord=1), {"w": np.array([[3.0], [16.0]]), "b": np.array([2.0])})


@pytest.mark.parametrize("ord", ORDS)
def test_mixed_dtypes(x64, ord):
    """One float64 leaf makes the sum and the result float64."""
    tree = [normal(4, "float16"), normal(4, "float32", 1), normal(4, "float64", 2)]
    norm = global_norm(tree, ord=ord)
    assert norm.dtype == "float64"
    check(norm, reference.global_norm(tree, ord), rtol=1e-14)
    assert global_norm(tree[:2], ord=ord).dtype == "float32"


# --- Over the whole range of a dtype -------------------------------------------------------------

EXTREMES = [
    ("float16", (300.0, 1e-4, 6e-8, 65504.0)),
    ("bfloat16", (1e25, 1e-30, 3e38)),
    ("float32", (1e25, 1e-30, 4e-38, 1e38)),  # a third of 4e-38 is still normal
    ("complex64", (1e25, 1e-30, 1e38)),
    ("float64", (1e200, 1e-200, 1e307)),
]
EXTREMES = [(dtype, size) for dtype, sizes in EXTREMES for size in sizes]


@pytest.mark.parametrize("dtype, size", EXTREMES, indirect=["dtype"])
def test_squares_out_of_range(dtype, size):
    tree = [cast([[size, 0.0], [size / 2, -size]], dtype), cast([size, size / 3], dtype)]
    for ord in ORDS if size in (300.0, 1e25, 1e-30) else (None, 1, 3.5):
        for scope in ("global", "leaf", "unit"):
            expected = reference.tree_norms(tree, scope, ord)
            if max(np.max(n) for n in jax.tree.leaves(expected)) < jnp.finfo("float32").max:
                check(tree_norms(tree, scope=scope, ord=ord), expected)


@pytest.mark.parametrize("ord", [100.0, 200.0])
def test_high_order(ord):
    # 0.1^100 underflows, 1.9^200 overflows; the norm is close to the largest entry.
    for size in (0.1, 1.0, 1.9, 1e10):
        tree = [cast([size, size, size / 2], "float32")]
        check(global_norm(tree, ord=ord), reference.global_norm(tree, ord))


@pytest.mark.parametrize("compiled", [False, True])
def test_beyond_float32(compiled):
    """Two of 3.4e38 are 4.8e38 long, and float32 ends at 3.4028e38."""
    tree = [jnp.full((2, 1), 3.4e38), jnp.float32([3.0, 4.0])]
    wrap = jax.jit if compiled else lambda f: f
    norms = {s: wrap(lambda x, s=s: tree_norms(x, scope=s))(tree) for s in ("global", "leaf", "unit")}
    assert norms["global"] == math.inf
    for scope in ("leaf", "unit"):
        check(norms[scope], [np.full((1, 1), math.inf), np.array([5.0])])
    check(global_norm(tree, ord=math.inf), 3.4e38)
    check(global_norm(tree, ord="rms"), 3.4e38 / math.sqrt(2))  # sqrt(2 * 3.4e38^2 / 4)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("small", [0.0, 1e-30, 1e-20, 1e25])
def test_units_of_all_sizes_side_by_side(small, compiled):
    # Units of norms 5, 5 small, 0 and 13 in one leaf.
    units = np.array([[3.0, 3 * small, 0.0, 5.0], [4.0, 4 * small, 0.0, 12.0]])
    measure = lambda tree: tree_norms(tree, scope="unit")  # noqa: E731
    norms = (jax.jit(measure) if compiled else measure)([jnp.asarray(units, jnp.float32)])
    check(norms, [np.array([[5.0, 5 * small, 0.0, 13.0]])])


def test_leaves_of_all_sizes_side_by_side():
    tree = [cast([3 * size, 4 * size], "float32") for size in (1.0, 1e-30, 0.0, 1e30)]
    check(tree_norms(tree), [np.array([5 * size]) for size in (1.0, 1e-30, 0.0, 1e30)])
    check(global_norm(tree), 5e30)


@pytest.mark.parametrize("ord", [None, 3.5, "rms"])
def test_a_tail_that_underflows(ord):
    """Where the first sum only just seems fine, what underflow took from it must not be missed."""
    for size in 10.0 ** np.arange(-19, -8):
        x = cast(np.full(4096, 1e-19), "float32").at[0].set(size)
        check(global_norm([x], ord=ord), reference.global_norm([x], ord))


def test_many_leaves():
    # sqrt(2000) = 44.72; a bfloat16 sum of ones stops at 256, whose root is 16.
    tree = [jnp.ones((), "bfloat16")] * 2000
    assert f"{global_norm(tree):.2f}" == "44.72"


def test_many_entries():
    # A plain float32 sum of ones stops at 2^24 = 16.8 million.
    ones = jnp.ones(2**25, "bfloat16")
    check(global_norm([ones]), 2**12.5)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("ord", ORDS)
def test_nonfinite_entries(ord, value):
    """NaN gives NaN, otherwise inf gives inf, only in the scope it is in."""
    tree = [jnp.array([[1.0, value], [2.0, 1e25]]), jnp.array([3.0, 4.0])]
    for scope in ("global", "leaf", "unit"):
        check(tree_norms(tree, scope=scope, ord=ord), reference.tree_norms(tree, scope, ord))
    both = [jnp.array([math.inf, math.nan])]
    assert math.isnan(global_norm(both, ord=ord))


# --- What is not measured ------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["global", "leaf", "unit", ()])
def test_other_leaves_do_not_count(scope):
    other = {
        "int": jnp.array([[7, 8]]),
        "bool": np.array([True]),
        "float0": np.zeros((2,), jax.dtypes.float0),
        "key": jax.random.key(0),
        "one": 100,
        "none": None,
    }
    tree = {"x": jnp.array([[3.0, 4.0]]), **other}
    norms = tree_norms(tree, scope=scope)
    alone = tree_norms({"x": tree["x"]}, scope=scope)
    if scope == "global":
        assert norms == alone == 5.0
    else:
        assert norms == {"x": norms["x"], **dict.fromkeys(other)}
        assert (norms["x"] == alone["x"]).all()


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("tree", [{}, [], None, {"a": None}, [jnp.array([1, 2])], [jnp.zeros((0, 3))]])
def test_nothing_to_measure(tree, ord):
    assert global_norm(tree, ord=ord) == 0
    assert global_norm(tree, ord=ord).dtype == "float32"


@pytest.mark.parametrize("ord", ORDS)
def test_zero_size_leaves(ord):
    tree = [jnp.zeros((0, 3)), jnp.zeros((3, 0)), jnp.array([3.0, 4.0])]
    for scope in ("global", "leaf", "unit"):
        check(tree_norms(tree, scope=scope, ord=ord), reference.tree_norms(tree, scope, ord))
    check(global_norm(tree, ord=ord), reference.global_norm(tree[2:], ord))


@pytest.mark.parametrize("x64", [False, True])
def test_scalars_as_leaves(x64):
    with jax.enable_x64(x64):
        tree = [3.0, np.float16(4.0), np.float64(0.0), 12j, np.array(0.0), 7, True]
        check(global_norm(tree), 13.0)  # 9 + 16 + 144 = 169
        check(tree_norms(tree, scope="leaf"), [3.0, 4.0, 0.0, 12.0, 0.0, None, None])


# --- Derivatives ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scope, ord", [*(("unit", ord) for ord in (*ORDS, 1.5)), ("global", None), ("global", 1)]
)
def test_derivatives_are_finite_at_zero(scope, ord):
    def f(x):
        norms = tree_norms([x, jnp.array([1.0])], scope=scope, ord=ord)
        return norms if scope == "global" else norms[0].sum()

    both = jax.jit(lambda x: (jax.grad(f)(x), jax.hessian(f)(x)))
    for x in (jnp.array([[0.0, 3.0], [0.0, 0.0]]), jnp.zeros((2, 2))):
        slope, curve = both(x)
        assert jnp.isfinite(slope).all() and jnp.isfinite(curve).all()
    if scope == "unit":
        assert (slope == 0).all()


@pytest.mark.parametrize("ord", [None, 1, math.inf])
def test_complex_derivatives_are_finite_at_zero(ord):
    def f(parts):
        return global_norm([jax.lax.complex(*parts)], ord=ord)

    for x in (jnp.zeros((2, 2)), jnp.array([[0.0, 3.0], [0.0, 4.0]])):
        assert jnp.isfinite(jax.grad(f)(x)).all()
        assert jnp.isfinite(jax.hessian(f)(x)).all()


def test_gradient_by_hand():
    # x / |x| = [3, 4] / 5, also where the squares overflow.
    for size in (1.0, 1e25, 1e-30):
        grad = jax.grad(global_norm)(jnp.float32([3 * size, 4 * size]))
        np.testing.assert_allclose(grad, [0.6, 0.8], rtol=RTOL)


@pytest.mark.parametrize("ord", [None, 1, 3.5])
def test_derivatives_against_differences(x64, ord):
    """Also for entries that are exactly 0."""
    x = jnp.array([3.0, 0.0, -4.0, 0.5])
    f = jax.jit(lambda x: global_norm([x], ord=ord))
    h = 1e-4
    steps = h * np.eye(4)
    slope = [(f(x + e) - f(x - e)) / (2 * h) for e in steps]
    np.testing.assert_allclose(jax.grad(f)(x), slope, atol=1e-6)
    smooth = slice(None) if ord != 1 else np.array([0, 2, 3])  # |x| has a kink at 0
    slopes = jax.jit(jax.grad(f))
    curve = np.array([(slopes(x + e) - slopes(x - e)) / (2 * h) for e in steps])
    found = np.asarray(jax.hessian(f)(x))
    np.testing.assert_allclose(found[smooth], curve[smooth], atol=1e-5)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e25])
def test_constants_of_the_program(size):
    """Leaves known to the compiler, which then reorders products: (x k)(x k) is not k k x x."""
    tree = {"zero": jnp.zeros(()), "some": jnp.full((), size), "more": jnp.full(3, size)}
    found = jax.jit(lambda: tree_norms(tree))()
    for key, x in tree.items():
        np.testing.assert_allclose(found[key].ravel(), [np.linalg.norm(np.float64(x))], rtol=1e-6)
    made = jax.jit(lambda: global_norm([jnp.zeros(4), jnp.full(4, size)]))()
    np.testing.assert_allclose(made, 2 * size, rtol=1e-6)


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("mode", ["eager", "jit"])
def test_one_nan_among_thousands(mode, ord):
    """A CPU's maximum drops it."""
    x = np.ones((2500, 2), np.float32)
    x[1165, 1] = np.nan
    for scope, expected in {"global": [True], "leaf": [True], "unit": [False, True]}.items():
        measure = functools.partial(tree_norms, scope=scope, ord=ord)
        found = (jax.jit(measure) if mode == "jit" else measure)([jnp.asarray(x)])
        assert np.isnan(jax.tree.leaves(found)[0]).ravel().tolist() == expected


@pytest.mark.parametrize("scope", ["global", "leaf", "unit"])
def test_a_modulus_beyond_float32(scope):
    x = np.array([3e38 + 3e38j, 1, 1e-38j], np.complex64)
    clipped, norm = clip_tree([jnp.asarray(x)], 1.0, ord=math.inf, scope=scope)
    np.testing.assert_allclose(clipped[0], [(1 + 1j) / math.sqrt(2), 0, 0], rtol=1e-6, atol=1e-38)
    assert np.isposinf(jax.tree.leaves(norm)[0]).all()
