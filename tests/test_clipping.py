"""Act on gradients: the edge-case table of the design, row by row, for every dtype and scope."""

import functools
import math
import sys

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import reference
from optax_clip import (
    ThresholdRule,
    clip_by_global_norm,
    clip_by_norm,
    clip_by_value,
    clip_tree,
    groups,
    metrics,
    normalize_by_norm,
    zscore,
)

DTYPES = ("float16", "bfloat16", "float32", "complex64", "float64")
SCOPES = ("global", "leaf", "unit")
MODES = ("eager", "jit")
TURN = 0.6 + 0.8j  # Of modulus 1: complex gradients keep the norms of the real ones.

KINDS = {
    "global": clip_by_global_norm,
    "leaf": clip_by_norm,
    "unit": functools.partial(clip_by_norm, scope="unit"),
    "value": clip_by_value,
    "normalize": normalize_by_norm,
}

# The default is left out, so that its programs are shared with the other tests.
POLICY = {"propagate": {}, "zero": {"nonfinite": "zero"}}

every_dtype = pytest.mark.parametrize("dtype", DTYPES, indirect=True)
every_mode = pytest.mark.parametrize("mode", MODES)


@pytest.fixture
def dtype(request):
    """A dtype by name, with 64-bit types where it needs them."""
    with jax.enable_x64(request.param == "float64"):
        yield jnp.dtype(request.param)


def cast(values, dtype):
    turn = TURN if jnp.issubdtype(dtype, jnp.complexfloating) else 1.0
    return jnp.asarray(np.asarray(values, np.float64) * turn).astype(dtype)


def gradients(dtype, size=1.0):
    """A kernel with units of norm 5 and 0, and a bias of norm 12; 13 in all, times size."""
    return {
        "bias": cast([12 * size, 0.0], dtype),
        "kernel": cast([[3 * size, 0.0], [4 * size, 0.0]], dtype),
        "step": jnp.array([7, 8], "int32"),
    }


def eps(*leaves):
    return max(float(jnp.finfo(x.dtype).eps) for x in leaves)


def inexact(tree):
    return [x for x in jax.tree.leaves(tree) if reference.is_inexact(x)]


@functools.cache
def stepper(kind, mode, **options):
    """``(threshold, tree) -> (updates, metrics)`` of a first step; jitted, the threshold is traced."""

    def step(threshold, tree):
        tx = KINDS[kind](threshold, **options)
        updates, state = tx.update(tree, tx.init(tree))
        return updates, metrics(state)

    return jax.jit(step) if mode == "jit" else step


def run(kind, threshold, tree, mode, **options):
    """One step; checks what always holds: structure, dtypes, and that int leaves pass through."""
    name = "normalize" if kind == "normalize" else "clip"
    updates, record = stepper(kind, mode, **options)(threshold, tree)
    assert jax.tree.structure(updates) == jax.tree.structure(tree)
    for new, old in zip(jax.tree.leaves(updates), jax.tree.leaves(tree), strict=True):
        assert new.dtype == old.dtype and new.shape == old.shape
        assert reference.is_inexact(old) or (new == old).all()
    return updates, {key.removeprefix(name + "/"): x for key, x in record.items()}


def assert_same_bits(tree, expected):
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes(), (x, y)


def assert_all(tree, predicate):
    assert all(bool(np.all(predicate(reference.wide(x)))) for x in inexact(tree)), tree


def assert_close(tree, expected, ulps=4, atol=0.0):
    """To a few eps of each leaf's dtype, or of float32 where that is wider."""
    for x, y in zip(inexact(tree), inexact(expected), strict=True):
        np.testing.assert_allclose(reference.wide(x), reference.wide(y), rtol=ulps * eps(x), atol=atol)


def assert_record(record, expected, rtol=1e-5):
    for key, value in expected.items():
        np.testing.assert_allclose(record[key], value, rtol=rtol, err_msg=key)


def is_zero(x):
    return x == 0


# --- Above and below the limit -------------------------------------------------------------------


@every_mode
@pytest.mark.parametrize("kind", SCOPES)
@every_dtype
def test_above_the_limit(dtype, kind, mode):
    """Against the oracle; 6.5 is half of 13 and leaves the kernel, of norm 5, alone in leaf and unit."""
    tree = gradients(dtype)
    clipped, record = run(kind, 6.5, tree, mode)
    expected, said = reference.clip_by_norm(tree, 6.5, kind)
    assert_close(clipped, expected)
    for norm in (
        inexact(reference.tree_norms(clipped, kind))
        if kind != "global"
        else [reference.global_norm(clipped)]
    ):
        assert np.all(norm <= 6.5 * (1 + 4 * eps(*inexact(tree))))
    if kind != "global":
        assert_same_bits(clipped["kernel"], tree["kernel"])
    assert_record(record, {**said, "steps": 1, "steps_clipped": 1, "steps_nonfinite": 0})
    # One scope; two leaves; two units and a bias.
    assert_record(record, {"fraction": {"global": 1, "leaf": 1 / 2, "unit": 1 / 3}[kind]})


@pytest.mark.parametrize("ord", [1, math.inf, 3.5, "rms"])
@pytest.mark.parametrize("kind", SCOPES)
def test_every_order(kind, ord):
    tree = gradients("float32")
    clipped, record = run(kind, 2.0, tree, "jit", ord=ord)
    expected, said = reference.clip_by_norm(tree, 2.0, kind, ord)
    assert_close(clipped, expected, ulps=16)
    assert_record(record, said)


@pytest.mark.parametrize("scope", [0, -1, (0,), (), lambda path, x: "unit" if x.ndim > 1 else "leaf"])
def test_other_scopes(scope):
    tree = gradients("float32")
    tx = clip_by_norm(2.0, scope=scope)
    clipped, state = tx.update(tree, tx.init(tree))
    expected, said = reference.clip_by_norm(tree, 2.0, scope)
    assert_close(clipped, expected)
    assert_record({k.removeprefix("clip/"): x for k, x in metrics(state).items()}, said)


@every_mode
@pytest.mark.parametrize("kind", (*SCOPES, "value"))
@every_dtype
def test_below_the_limit_nothing_changes(dtype, kind, mode):
    """Not a bit, of negative zeros, of subnormals, and with a norm that is exactly the limit."""
    info = jnp.finfo(dtype)
    tiny = float(info.smallest_subnormal)
    tree = gradients(dtype)
    tree["bias"] = tree["bias"].at[1].set(tiny)
    tree["kernel"] = tree["kernel"].at[:, 1].set(cast([-0.0, -5 * tiny], dtype))
    for limit in (13.0 * (1 + 1e-6 * (dtype == "complex64")), 60000.0, math.inf):
        clipped, record = run(kind, limit, tree, mode)
        assert_same_bits(clipped, tree)
        assert_record(record, {"norm_before": 13, "norm_after": 13, "threshold": limit, "fraction": 0})
        assert_record(record, {"steps": 1, "steps_clipped": 0, "steps_nonfinite": 0})
    small = {**tree, "bias": tree["kernel"][:, 1], "kernel": tree["kernel"].at[:, 0].set(-tiny)}
    assert_same_bits(run(kind, 1.0, small, mode)[0], small)


@every_mode
@pytest.mark.parametrize("dtype", ("float16", "bfloat16", "float32"), indirect=True)
def test_a_scope_below_its_limit_beside_one_above(dtype, mode):
    tiny = jnp.finfo(dtype).smallest_subnormal
    kernel = cast([[3.0, tiny, -0.0], [4.0, 3 * tiny, 0.1]], dtype)
    clipped, _ = run("unit", 2.5, {"kernel": kernel, "bias": kernel[:, 1]}, mode)
    assert_same_bits(clipped["bias"], kernel[:, 1])
    assert_same_bits(clipped["kernel"][:, 1:], kernel[:, 1:])
    assert_close([clipped["kernel"][:, 0]], [np.array([1.5, 2.0])])


@pytest.mark.parametrize("dtype", ("float16", "bfloat16", "float32", "complex64"), indirect=True)
def test_the_bound_holds_for_many_random_trees(dtype):
    random = np.random.default_rng(0)
    for limit in 10.0 ** random.uniform(-2, 2, size=20):
        tree = {"x": cast(random.normal(size=(40, 5)) * 100, dtype)}
        clipped, _ = run("global", limit, tree, "jit")
        assert reference.global_norm(clipped) <= limit * (1 + 4 * eps(tree["x"]))
        assert_close(clipped, reference.clip_by_norm(tree, limit, "global")[0], atol=1e-7)


# --- Limits that are not ordinary ----------------------------------------------------------------


@every_mode
@pytest.mark.parametrize("kind", (*SCOPES, "value", "normalize"))
@every_dtype
def test_zero_limit(dtype, kind, mode):
    clipped, record = run(kind, 0.0, gradients(dtype), mode)
    assert_all(clipped, is_zero)
    assert_record(record, {"norm_before": 13, "norm_after": 0, "threshold": 0, "steps_clipped": 1})
    zeros = gradients(dtype, 0.0)
    clipped, record = run(kind, 0.0, zeros, mode)
    assert_all(clipped, is_zero)
    assert_record(record, {"norm_before": 0, "norm_after": 0, "fraction": 0, "steps_clipped": 0})


@pytest.mark.parametrize("kind", (*SCOPES, "value", "normalize"))
@every_dtype
def test_traced_negative_limit_is_zero(dtype, kind):
    clipped, record = run(kind, -3.0, gradients(dtype), "jit")
    assert_all(clipped, is_zero)
    assert_record(record, {"norm_after": 0, "threshold": 0, "steps_clipped": 1, "steps_nonfinite": 0})


@pytest.mark.parametrize("kind", (*SCOPES, "value", "normalize"))
@every_dtype
def test_traced_nan_limit_is_nan(dtype, kind):
    for size in (1.0, 0.0):
        clipped, record = run(kind, math.nan, gradients(dtype, size), "jit")
        assert_all(clipped, np.isnan)
        assert math.isnan(record["threshold"]) and math.isnan(record["norm_after"])
        assert record["norm_before"] == pytest.approx(13 * size)


@pytest.mark.parametrize(
    "limit",
    [
        6,
        np.float64(6.5),
        np.float16(6.5),
        np.int32(6),
        np.array(6.5),
        jnp.float32(6.5),
        jnp.bfloat16(6.5),
        jnp.int32(6),
        lambda step: 6.5,
        lambda step: 6,
        lambda step: jnp.float32(6.5),
        lambda step: np.float64(6.5) / (step + 1),
        optax.constant_schedule(6.5),
    ],
)
@pytest.mark.parametrize("kind", ("global", "leaf", "value", "normalize"))
def test_any_kind_of_number(kind, limit, standard_promotion):
    """The dtype of the limit never shows: `run` compares the dtypes. 6 or 6.5 of 13."""
    value = limit(jnp.int32(0)) if callable(limit) else limit
    for name in ("bfloat16", "float32"):
        clipped, record = run(kind, limit, gradients(name), "eager")
        assert_record(record, {"threshold": value, "norm_before": 13})
        if kind in ("global", "normalize"):
            assert_record(record, {"norm_after": value})
            assert_close(clipped["bias"], [np.array([float(value) * 12 / 13, 0])])


@pytest.mark.parametrize("limit", [sys.float_info.max, 1e300, 10**10, 10**30])
@pytest.mark.parametrize("kind", ("global", "unit", "value"))
def test_limits_beyond_float32(kind, limit):
    """They are a usual way to say that there is no limit."""
    tree = gradients("float32")
    assert_same_bits(run(kind, limit, tree, "eager")[0], tree)


@pytest.mark.parametrize("kind", (*SCOPES, "value", "normalize"))
def test_schedule(kind):
    """Steps count from 0: the limits are 8, 4 and 2."""
    tx = KINDS[kind](lambda step: 8.0 / 2.0 ** step.astype("float32"))
    tree, update = gradients("float32"), jax.jit(tx.update)
    state = tx.init(tree)
    for i, limit in enumerate((8.0, 4.0, 2.0)):
        clipped, state = update(tree, state)
        now = {k.split("/")[1]: x for k, x in metrics(state).items()}
        assert_record(now, {"threshold": limit, "steps": i + 1, "steps_clipped": i + 1})
        if kind == "value":
            expected = reference.clip_by_value(tree, None, limit)[0]
        elif kind == "normalize":
            expected = reference.normalize(tree, limit)
        else:
            expected = reference.clip_by_norm(tree, limit, kind)[0]
        assert_close(clipped, expected)


# --- Norms out of range --------------------------------------------------------------------------

# dtype, size of the entries, limit.
EXTREMES = [
    ("float16", 300.0, 1.0),
    ("float16", 5000.0, 1e4),  # 13 of them end at 65,504.
    ("float16", 1e-3, 1e-4),
    ("bfloat16", 1e25, 1.0),
    ("bfloat16", 1e-30, 1e-31),
    ("bfloat16", 2e37, 1e-3),
    ("float32", 1e25, 1.0),
    ("float32", 1e25, 1e-10),
    ("float32", 1e-30, 1e-31),
    ("float32", 2e37, 1e-5),
    ("complex64", 1e25, 1.0),
    ("complex64", 1e-30, 1e-31),
    ("complex64", 2e37, 1e-3),
    ("float64", 1e200, 1.0),
    ("float64", 1e-200, 1e-201),
]


@every_mode
@pytest.mark.parametrize("dtype, size, limit", EXTREMES, indirect=["dtype"])
def test_squares_out_of_range(dtype, size, limit, mode):
    tree = gradients(dtype, size)
    for kind in SCOPES if dtype != "complex64" else ("global",):
        clipped, record = run(kind, limit, tree, mode)
        expected, said = reference.clip_by_norm(tree, limit, kind)
        tiny = float(jnp.finfo(dtype).smallest_subnormal)
        assert_close(clipped, expected, atol=tiny / 2)
        if dtype != "float64":  # The metrics are float32.
            assert_record(record, {**said, "steps_clipped": 1, "steps_nonfinite": 0})
        assert_same_bits(run(kind, 14 * size, tree, mode)[0], tree)
    normalized, _ = run("normalize", 1.0, tree, mode)
    assert_close(normalized, reference.normalize(tree), atol=float(jnp.finfo(dtype).smallest_subnormal))


@every_mode
@pytest.mark.parametrize("kind", SCOPES)
@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "complex64"), indirect=True)
def test_norm_beyond_float32(dtype, kind, mode):
    """Two of 3.38e38 are 4.78e38 long: reported as inf, and clipped to 1 / sqrt(2) all the same."""
    tree = {"x": cast(np.full((2, 1), 3.38e38), dtype)}
    clipped, record = run(kind, 1.0, tree, mode)
    assert_close(clipped, {"x": cast(np.full((2, 1), 0.5**0.5), dtype)})
    assert_record(record, {"norm_before": math.inf, "norm_after": 1, "fraction": 1})
    assert_record(record, {"steps_clipped": 1, "steps_nonfinite": 0})
    clipped, record = run(kind, math.inf, tree, mode)
    assert_same_bits(clipped, tree)
    assert_record(record, {"norm_before": math.inf, "norm_after": math.inf, "fraction": 0})
    assert_record(record, {"steps_clipped": 0, "steps_nonfinite": 0})
    clipped, _ = run(kind, 0.0, tree, mode)
    assert_all(clipped, is_zero)


def test_leaves_whose_common_norm_is_beyond_float32():
    """Each leaf is measurable, 3e38, the tree is not: 4.2e38."""
    tree = {"a": jnp.float32([3e38]), "b": jnp.float32([3e38])}
    for kind, limit, new in (("leaf", 1.0, 1.0), ("unit", 2.0, 2.0), ("global", 1.0, 0.5**0.5)):
        clipped, record = run(kind, limit, tree, "jit")
        assert_close(clipped, {"a": jnp.float32([new]), "b": jnp.float32([new])})
        assert_record(record, {"norm_before": math.inf, "steps_clipped": 1, "steps_nonfinite": 0})


def test_many_leaves():
    tree = [jnp.ones((), "bfloat16")] * 2000
    tx = clip_by_global_norm(1.0)
    clipped, state = tx.update(tree, tx.init(tree))
    # 1 / 44.72 = 0.02236, whose nearest bfloat16 is 0.0223388671875.
    assert set(map(float, clipped)) == {0.0223388671875}
    assert f"{metrics(state)['clip/norm_before']:.2f}" == "44.72"


# --- Gradients that are not finite ---------------------------------------------------------------


@every_mode
@pytest.mark.parametrize("nonfinite, becomes", [("propagate", math.nan), ("zero", 0.0)])
@pytest.mark.parametrize("kind", (*SCOPES, "normalize"))
@every_dtype
def test_nonfinite_gradients(dtype, kind, nonfinite, becomes, mode):
    """The whole tree, whatever the scope and the limit, except the leaves that are not inexact."""
    if nonfinite == "zero" and mode == "jit" and dtype not in ("float32", "complex64"):
        pytest.skip("The program differs in its last select alone, and each compiles for half a second.")
    for bad in (math.inf, math.nan):
        tree = gradients(dtype)
        tree["kernel"] = tree["kernel"].at[1, 1].set(bad)
        for limit in (1.0,) if mode == "eager" or kind == "normalize" else (0.0, 1.0, 100.0, math.inf):
            updates, record = run(kind, limit, tree, mode, **POLICY[nonfinite])
            assert_all(updates, np.isnan if math.isnan(becomes) else is_zero)
            assert not np.isfinite(record["norm_before"])
            assert_record(record, {"norm_after": becomes, "threshold": limit, "fraction": 0})
            assert_record(record, {"steps": 1, "steps_clipped": 0, "steps_nonfinite": 1})


def test_zero_policy_keeps_finite_gradients():
    for kind in SCOPES:
        assert_same_bits(
            run(kind, 20.0, gradients("float32"), "jit", nonfinite="zero")[0], gradients("float32")
        )
        clipped, _ = run(kind, 6.5, gradients("float32"), "jit", nonfinite="zero")
        assert_close(clipped, reference.clip_by_norm(gradients("float32"), 6.5, kind)[0])


@pytest.mark.parametrize("nonfinite", ["propagate", "zero"])
def test_counters_over_a_run(nonfinite):
    """Norms of 13, 1.3, NaN, 0, inf, 26 against a limit of 2: two of six clipped, two not finite."""
    tx = clip_by_global_norm(2.0, nonfinite=nonfinite, name="grads")
    state = tx.init(gradients("float32"))
    update = jax.jit(tx.update)
    for size in (1.0, 0.1, math.nan, 0.0, math.inf, 2.0):
        _, state = update(gradients("float32", size), state)
    record = {key.removeprefix("grads/"): x for key, x in metrics(state).items()}
    assert_record(record, {"steps": 6, "steps_clipped": 2, "steps_nonfinite": 2})
    assert_record(record, {"norm_before": 26, "norm_after": 2, "fraction": 1, "threshold": 2})


# --- What is not a gradient ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", (*SCOPES, "value", "normalize"))
@pytest.mark.parametrize("tree", [{}, None, [None], [jnp.array([1, 2])], [jnp.zeros((0, 2))]])
def test_nothing_to_clip(tree, kind):
    for limit in (0.0, 1.0):
        updates, record = run(kind, limit, tree, "eager")
        assert_same_bits(updates, tree)
        assert_record(record, {"norm_before": 0, "norm_after": 0, "fraction": 0, "steps_clipped": 0})


@pytest.mark.parametrize("kind", KINDS)
def test_other_leaves_pass_through(kind):
    other = [None, np.array([True]), np.zeros(2, jax.dtypes.float0), optax.MaskedNode(), 100, "name"]
    tx = KINDS[kind](1.0)
    tree = [jnp.array([3.0, 4.0]), *other]
    updates, state = tx.update(tree, tx.init(tree))
    assert all(new is old or new == () for new, old in zip(updates[1:], other, strict=True))
    name = "normalize" if kind == "normalize" else "clip"
    assert metrics(state)[f"{name}/norm_before"] == 5.0


@pytest.mark.parametrize("kind", (*SCOPES, "normalize"))
def test_scalars_as_leaves(kind):
    # 3-4-12 and 13: each becomes 1 on its own, or a thirteenth of itself.
    tree = [3.0, np.float16(4.0), 12j]
    tx = KINDS[kind](1.0)
    updates, _ = tx.update(tree, tx.init(tree))
    alone = kind in ("leaf", "unit")
    wanted = [1.0, 1.0, 1j] if alone else [3 / 13, 4 / 13, 12j / 13]
    np.testing.assert_allclose(np.asarray(updates), wanted, rtol=1e-3)
    assert [x.dtype for x in updates] == ["float32", "float16", "complex64"]


# --- By value ------------------------------------------------------------------------------------


@every_mode
@every_dtype
def test_clip_by_value(dtype, mode):
    """Limit 3.5: the entries 12 and 4 of six are outside; 12.25 + 9 + 12.25 = 33.5."""
    tree = gradients(dtype)
    clipped, record = run("value", 3.5, tree, mode)
    assert_close(clipped, reference.clip_by_value(tree, None, 3.5)[0], ulps=1)
    assert all(np.all(np.abs(reference.wide(x)) <= 3.5 * (1 + 4 * eps(x))) for x in inexact(clipped))
    assert_record(record, {"norm_before": 13, "norm_after": 33.5**0.5, "threshold": 3.5})
    assert_record(record, {"fraction": 2 / 6, "steps_clipped": 1, "steps_nonfinite": 0}, rtol=1e-3)


@every_mode
@pytest.mark.parametrize("lower, limit", [(-1.0, 2.0), (-2.0, 1.0), (0.5, 1.0), (-math.inf, 0.0)])
@pytest.mark.parametrize("dtype", ("bfloat16", "float32"), indirect=True)
def test_clip_by_value_between(dtype, lower, limit, mode):
    tree = {"x": cast([-3.0, -0.75, 0.0, 0.75, 3.0], dtype)}
    clipped, record = run("value", limit, tree, mode, lower=lower)
    expected, said = reference.clip_by_value(tree, lower, limit)
    assert_close(clipped, expected, ulps=0)
    assert_record(record, {**said, "threshold": min(limit, -lower)})


@every_mode
@pytest.mark.parametrize("dtype", ("float16", "bfloat16", "float32", "float64"), indirect=True)
def test_clip_by_value_rounds_bounds_inwards(dtype, mode):
    for limit in (0.1, 1e-3, 3.3):
        clipped, _ = run("value", limit, {"x": cast([1e4, -1e4], dtype)}, mode)
        high, low = reference.wide(clipped["x"])
        assert high == -low
        # 0.1 itself is rounded to float32 once, as everything that is computed is.
        assert limit * (1 - 2 * eps(clipped["x"])) <= high <= max(limit, float(np.float32(limit)))


@every_mode
@pytest.mark.parametrize("dtype", ("float16", "bfloat16", "float32", "float64"), indirect=True)
def test_clip_by_value_of_inf_and_nan(dtype, mode):
    tree = {"x": cast([math.inf, -math.inf, 0.25, 3.0], dtype)}
    clipped, record = run("value", 1.0, tree, mode)
    assert clipped["x"].tolist() == [1.0, -1.0, 0.25, 1.0]
    assert_record(
        record, {"norm_before": math.inf, "norm_after": (3 + 1 / 16) ** 0.5, "fraction": 3 / 4}
    )
    assert_record(record, {"steps_clipped": 1, "steps_nonfinite": 0})
    clipped, record = run("value", 1.0, {"x": tree["x"].at[2].set(math.nan)}, mode)
    np.testing.assert_array_equal(reference.wide(clipped["x"]), [1.0, -1.0, math.nan, 1.0])
    assert_record(record, {"norm_before": math.nan, "norm_after": math.nan, "threshold": 1})
    assert_record(record, {"steps_clipped": 0, "steps_nonfinite": 1})


@every_mode
def test_clip_by_value_of_complex_extremes(mode):
    """By modulus: inf goes to the bound in its own direction, as does what overflows on the way."""
    z = [complex(math.inf, 0), complex(0, -math.inf), 3e38 + 3e38j, -3e-30 + 4e-30j, 0.3 + 0.4j]
    tree = {"z": jnp.array(z, "complex64")}
    clipped, record = run("value", 1.0, tree, mode)
    half = 0.5**0.5
    np.testing.assert_allclose(clipped["z"], [1, -1j, half + half * 1j, *z[3:]], rtol=1e-6)
    assert_record(record, {"fraction": 3 / 5, "steps_clipped": 1, "steps_nonfinite": 0})
    clipped, _ = run("value", 5e-31, {"z": tree["z"][3:]}, mode)
    np.testing.assert_allclose(clipped["z"], [-3e-31 + 4e-31j, 3e-31 + 4e-31j], rtol=1e-6)
    clipped, record = run("value", 1.0, {"z": tree["z"].at[0].set(complex(math.nan, 1))}, mode)
    assert np.isnan(clipped["z"][0]) and not np.isnan(clipped["z"][1:]).any()
    assert_record(record, {"steps_clipped": 0, "steps_nonfinite": 1})


# --- Normalised ----------------------------------------------------------------------------------


@every_mode
@pytest.mark.parametrize(
    "dtype, scope",
    [*((name, "global") for name in DTYPES), ("float32", "leaf"), ("bfloat16", "unit")],
    indirect=["dtype"],
)
def test_normalize(dtype, scope, mode):
    """Up and down; the unit of norm 0 stays 0 and is not counted."""
    options = {} if scope == "global" else {"scope": scope}
    for norm in (0.5, 26.0):
        tree = gradients(dtype)
        updates, record = run("normalize", norm, tree, mode, **options)
        assert_close(updates, reference.normalize(tree, norm, scope))
        fraction = 2 / 3 if scope == "unit" else 1
        assert_record(record, {"norm_before": 13, "threshold": norm, "fraction": fraction})
        after = norm if scope == "global" else norm * 2**0.5  # Two scopes of that norm.
        assert_record(record, {"norm_after": after, "steps_clipped": 1})
    zeros, record = run("normalize", 0.5, gradients(dtype, 0.0), mode, **options)
    assert_same_bits(zeros, gradients(dtype, 0.0))
    assert_record(record, {"norm_after": 0, "fraction": 0, "steps_clipped": 0})


# --- The pure function ---------------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
@every_dtype
def test_clip_tree(dtype, scope):
    tree = gradients(dtype)
    for limit in (0.0, 6.5, 20.0, math.inf):
        clipped, norms = clip_tree(tree, limit, scope=scope)
        same, _ = run(scope, limit, tree, "eager")
        assert_same_bits(clipped, same)
    if scope == "global":
        assert norms.shape == () and norms == pytest.approx(13)
    else:
        expected = reference.tree_norms(tree, scope)
        assert norms["step"] is None and norms["kernel"].shape == expected["kernel"].shape
        assert_close(norms, expected, ulps=2**13 if dtype == "complex64" else 4)


def test_clip_tree_with_a_traced_limit():
    clip, tree = jax.jit(clip_tree), gradients("float32")
    for limit, size in ((-1.0, 0.0), (0.0, 0.0), (6.5, 0.5), (26.0, 1.0), (math.inf, 1.0)):
        clipped, norm = clip(tree, limit)
        assert_close(clipped, gradients("float32", size))
        assert norm == pytest.approx(13)
    assert_all(clip(tree, math.nan)[0], np.isnan)


@pytest.mark.parametrize("nonfinite, becomes", [("propagate", math.nan), ("zero", 0.0)])
@pytest.mark.parametrize("scope", SCOPES)
def test_clip_tree_of_nonfinite(scope, nonfinite, becomes):
    clipped, _ = clip_tree(gradients("float32", math.inf), 1.0, scope=scope, nonfinite=nonfinite)
    assert_all(clipped, np.isnan if math.isnan(becomes) else is_zero)


def test_clip_tree_with_a_given_norm():
    """A norm of 26 that is given is believed: 13 is clipped to half of 6.5."""
    clipped, norm = clip_tree(gradients("float32"), 6.5, norm=26.0)
    assert_close(clipped, gradients("float32", 0.25))
    assert norm == 26.0


@pytest.mark.parametrize("grad_norm", [26.0, np.float64(26.0), jnp.float32(26.0), jnp.bfloat16(26.0)])
def test_grad_norm(grad_norm):
    """With scope global it replaces the norm, 13; every other scope measures its own."""
    for kind, size in (("global", 0.25), ("normalize", 0.25), ("leaf", None), ("unit", None)):
        tree, tx = gradients("float32"), KINDS[kind](6.5)
        updates, state = tx.update(tree, tx.init(tree), grad_norm=grad_norm)
        if size is not None:
            assert_close(updates, gradients("float32", size))
            name = "normalize" if kind == "normalize" else "clip"
            assert metrics(state)[f"{name}/norm_before"] == 26.0
        else:
            assert_close(updates, reference.clip_by_norm(tree, 6.5, kind)[0])


def test_grad_norm_of_zero_and_nan():
    tx = clip_by_global_norm(6.5)
    tree = gradients("float32")
    assert_same_bits(tx.update(tree, tx.init(tree), grad_norm=0.0)[0], tree)
    updates, state = tx.update(tree, tx.init(tree), grad_norm=jnp.nan)
    assert_all(updates, np.isnan)
    assert metrics(state)["clip/steps_nonfinite"] == 1


# --- Rules ---------------------------------------------------------------------------------------


def spy(limit):
    """A rule of one limit for all, and the list of what it was called with."""
    calls = []

    def update(norms, state, param_norms, total):
        calls.append((norms, param_norms, total))
        return jnp.full_like(norms, limit), state + 1

    return ThresholdRule(lambda norms: jnp.zeros_like(norms), update), calls


# Norms of gradients() in the order of its leaves: bias, kernel, and the int leaf, which has none.
SEEN = {"global": [13.0], "leaf": [[12.0, 5.0, 0.0]], "unit": [[12.0, 5.0, 0.0]]}


@pytest.mark.parametrize("scope", SCOPES)
def test_what_a_rule_is_given(scope):
    rule, calls = spy(6.5)
    tx = clip_by_norm(rule, scope=scope)
    tree = gradients("float32")
    updates, state = tx.update(tree, tx.init(tree), gradients("float32", 2.0))
    assert_close(updates, reference.clip_by_norm(tree, 6.5, scope)[0])
    assert len(calls) == 1
    for (norms, param_norms, total), expected in zip(calls, SEEN[scope], strict=True):
        assert norms.dtype == param_norms.dtype == total.dtype == "float32"
        assert norms.tolist() == expected and total == 13.0
        assert (param_norms == 2 * norms).all()
    calls.clear()
    tree["bias"] = tree["bias"].at[0].set(math.inf)
    tx.update(tree, state)  # without params
    for norms, param_norms, total in calls:
        measured = norms[:2] if scope == "leaf" else norms  # The third leaf has no norm.
        assert jnp.isnan(measured).all() and jnp.isnan(total) and param_norms is None


@every_mode
@pytest.mark.parametrize("scope", SCOPES)
def test_a_rule_remembers_each_place(scope, mode):
    """The limit is the largest norm of earlier steps; a leaf without gradient keeps its place."""
    rule = ThresholdRule(
        lambda norms: jnp.zeros_like(norms),
        lambda norms, most, *_: (
            jnp.where(most > 0, most, jnp.inf),
            jnp.maximum(most, jnp.nan_to_num(norms, nan=0.0)),
        ),
    )
    params = {name: jnp.ones((2, 1)) for name in "abc"}
    column = lambda size: jnp.array([[3.0], [4.0]]) * size  # noqa: E731
    tx = clip_by_norm(rule, scope=scope)
    update = jax.jit(tx.update) if mode == "jit" else tx.update
    state = tx.init(params)
    for grads in (
        {"a": column(1), "b": None, "c": column(3)},
        {"a": None, "b": column(2), "c": column(1)},
        {"a": column(9), "b": column(9), "c": column(math.nan)},
    ):
        _, state = update(grads, state, params)
    # Alone, a is held to 5, b to 10 and c to 15; together, of 15 at most, the tree is
    # 5 sqrt(2^2 + 3^2 + 3^2) long and the largest before was 5 sqrt(1^2 + 3^2).
    updates, _ = update({"a": column(2), "b": column(3), "c": column(3)}, state, params)
    shared = (10 / 22) ** 0.5
    sizes = (
        {"a": 2 * shared, "b": 3 * shared, "c": 3 * shared}
        if scope == "global"
        else {"a": 1, "b": 2, "c": 3}
    )
    assert_close(updates, {name: column(size) for name, size in sizes.items()})


# --- Derivatives ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_are_finite_at_zero(kind):
    def f(x, limit):
        updates, _ = stepper(kind, "eager")(limit, x)
        return jnp.sum(updates * jnp.array([1.0, 2.0]))

    both = jax.jit(lambda *args: (jax.grad(f)(*args), jax.hessian(f)(*args)))
    for x in (jnp.zeros(2), jnp.array([0.0, 3.0])):
        for limit in (0.0, 1.0, math.inf) if kind != "normalize" else (0.0, 1.0):
            slope, curve = both(x, limit)
            assert jnp.isfinite(slope).all() and jnp.isfinite(curve).all()


def test_derivative_by_hand():
    # Of x / |x| at [3, 4]: (I - u u^T) / 5 with u = [0.6, 0.8]. Below the limit: I.
    def f(x, limit):
        return clip_tree(x, limit)[0]

    x = jnp.array([3.0, 4.0])
    expected = np.array([[0.64, -0.48], [-0.48, 0.36]]) / 5
    np.testing.assert_allclose(jax.jacobian(f)(x, 1.0), expected, rtol=1e-6)
    assert (jax.jacobian(f)(x, 6.0) == jnp.eye(2)).all()


# --- Parity with Optax, where Optax is right -----------------------------------------------------

PAIRS = {
    "clip": (optax.clip(1.0), clip_by_value(1.0), 0),
    "clip_by_global_norm": (optax.clip_by_global_norm(1.0), clip_by_global_norm(1.0), 4),
    "clip_by_block_rms": (optax.clip_by_block_rms(1.0), clip_by_norm(1.0, ord="rms"), 4),
    "normalize_by_update_norm": (optax.normalize_by_update_norm(eps=0.0), normalize_by_norm(), 4),
}


@pytest.mark.parametrize("theirs, ours, ulps", PAIRS.values(), ids=PAIRS)
def test_like_optax(theirs, ours, ulps, standard_promotion):
    random = np.random.default_rng(0)
    for size in (1e-3, 1.0, 1e3):
        tree = [jnp.asarray(random.normal(size=s) * size, "float32") for s in [(3, 2), (4,), ()]]
        expected, _ = theirs.update(tree, theirs.init(tree))
        updates, _ = ours.update(tree, ours.init(tree))
        for x, y in zip(updates, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=ulps * eps(x), atol=1e-7 * (ulps > 0))


# --- Invariants ----------------------------------------------------------------------------------


def trees(dtype):
    """A small tree of any finite numbers of a dtype that are not subnormal, which XLA may flush."""
    info = jnp.finfo(dtype)
    low, high = float(info.smallest_normal), float(info.max)
    sizes = st.floats(math.log2(low) + 1, math.log2(high) - 1).map(lambda e: 2.0**e)
    entries = st.one_of(st.just(0.0), st.floats(-100, 100), sizes, sizes.map(lambda x: -x))
    arrays = lambda shape: hnp.arrays(np.float64, shape, elements=entries)  # noqa: E731
    make = lambda a, b: {"a": jnp.asarray(a).astype(dtype), "b": jnp.asarray(b).astype(dtype)}  # noqa: E731
    return st.builds(make, arrays((2, 2)), arrays((3,)))


anything = st.sampled_from(["float16", "bfloat16", "float32"]).flatmap(trees)
limits = st.one_of(st.floats(0.01, 100), st.floats(-30, 30).map(lambda e: 10.0**e))


@pytest.mark.parametrize("kind", SCOPES)
@given(tree=anything, limit=limits)
def test_clipping_invariants(kind, tree, limit):
    limit = float(np.float32(limit))
    clipped, _ = run(kind, limit, tree, "jit")
    expected, said = reference.clip_by_norm(tree, limit, kind)
    info = jnp.finfo(tree["a"].dtype)
    step = float(info.smallest_subnormal if info.dtype == "float16" else info.smallest_normal)
    # The direction is kept, up to what the dtype can hold, or XLA flushes.
    for key, x in clipped.items():
        np.testing.assert_allclose(reference.wide(x), expected[key], rtol=2e-5 + eps(x), atol=step)
    # The norm is bounded.
    for norm in jax.tree.leaves(reference.tree_norms(clipped, kind)):
        assert np.all(norm <= limit * (1 + 4 * max(eps(tree["a"]), 2.0**-17)) + 4 * step)
    # Below the limit nothing changes.
    if said["norm_before"] <= limit * (1 - 1e-5):
        assert_same_bits(clipped, tree)
    # A second time changes no more than rounding did.
    again, _ = run(kind, limit, clipped, "jit")
    assert_close(again, clipped, ulps=128 if info.bits == 32 else 4, atol=step)


@given(tree=anything, limit=limits)
def test_clip_by_value_invariants(tree, limit):
    limit = float(np.float32(limit))
    clipped, _ = run("value", limit, tree, "jit")
    for x, old in zip(inexact(clipped), inexact(tree), strict=True):
        x, old = reference.wide(x), reference.wide(old)
        assert np.all(np.abs(x) <= limit) and np.all(x * old >= 0)
        assert np.array_equal(x[np.abs(old) <= limit], old[np.abs(old) <= limit])
    assert_same_bits(run("value", limit, clipped, "jit")[0], clipped)


@pytest.mark.parametrize("scope", ["global", "leaf", "unit"])
def test_an_empty_tree_reports_the_limit(scope):
    tx = clip_by_norm(2.0, scope=scope)
    assert metrics(tx.update({}, tx.init({}))[1])["clip/threshold"] == 2


@pytest.mark.parametrize("limit", [1.0, optax.constant_schedule(1.0), zscore(2.0)])
def test_an_empty_tree_has_no_labels(limit):
    tx = clip_by_norm({"a": limit}, scope=groups(lambda path, leaf: "a"))
    updates, state = tx.update({}, tx.init({}))
    assert updates == {} and metrics(state)["clip/steps"] == 1


@pytest.mark.parametrize("scope", ["global", "leaf", "unit"])
def test_a_norm_and_a_limit_sixty_decades_apart(scope):
    tree = {"w": jnp.array([0.0, 1.5e32], jnp.float32), "b": jnp.zeros(2)}
    for limit in (1e-30, 1e-5, 1e30):
        tx = clip_by_norm(limit, scope=scope)
        clipped, _ = tx.update(tree, tx.init(tree))
        np.testing.assert_allclose(clipped["w"], [0, limit], rtol=1e-5)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("ord", [None, 1, math.inf])
@pytest.mark.parametrize(("nonfinite", "left", "count"), [("zero", 0, 1), ("propagate", np.nan, 1)])
def test_one_nan_among_thousands(nonfinite, left, count, ord, scope):
    tree = {"a": jnp.ones(5000).at[2331].set(jnp.nan), "b": jnp.ones((2, 2))}
    tx = clip_by_norm(0.5, scope=scope, ord=ord, nonfinite=nonfinite)
    updates, state = tx.update(tree, tx.init(tree))
    for x in jax.tree.leaves(updates):
        np.testing.assert_array_equal(x, np.full(x.shape, left))
    assert metrics(state)["clip/steps_nonfinite"] == count


def test_what_is_made_zero_has_a_derivative_of_zero():
    def moved(w, bad):
        return sum(jnp.sum(x) for x in clip_tree([bad, w], 1.0, nonfinite="zero")[0])

    for bad in (jnp.inf, jnp.nan):
        slopes = jax.jit(jax.grad(moved))(jnp.ones(2), jnp.array([bad, 1.0]))
        np.testing.assert_array_equal(slopes, [0, 0])


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("ord", [None, 1, math.inf])
def test_second_derivatives_where_nothing_is_clipped(ord, scope):
    def moved(x):
        return jnp.sum(clip_tree(x, 1.0, ord=ord, scope=scope)[0] * jnp.array([2.0, 3.0]))

    for size in (1e-30, 1e-20, 0.1):
        x = size * jnp.array([3.0, 4.0])
        np.testing.assert_array_equal(jax.grad(moved)(x), [2, 3])
        np.testing.assert_array_equal(jax.jit(jax.hessian(moved))(x), np.zeros((2, 2)))


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn", "float8_e5m2"])
def test_normalised_beyond_a_narrow_dtype(dtype):
    """To the end of its range, in the direction that there was."""
    x = jnp.array([3.0, -4.0, 0.5, 0.0]).astype(dtype)
    most = float(jnp.finfo(dtype).max)
    tx = normalize_by_norm(1e6)
    updates, state = tx.update(x, tx.init(x))
    np.testing.assert_array_equal(np.asarray(updates).astype(np.float32), [most, -most, most, 0])
    assert metrics(state)["normalize/steps_nonfinite"] == 0


def test_an_infinite_entry_at_an_infinite_bound_is_not_clipped():
    for g in (
        jnp.array([jnp.inf, -5.0, -7.0, 0.0]),
        {"a": jnp.array([jnp.inf, 0]), "b": jnp.full(2, -5.0)},
    ):
        tx = clip_by_value(jnp.inf, lower=-1.0)
        _, state = tx.update(g, tx.init(g))
        found = metrics(state)
        assert (found["clip/fraction"], found["clip/steps_clipped"]) == (0.5, 1)
