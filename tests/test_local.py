"""What is not finite stays in its own scope: nonfinite="local"."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

import optax_clip as oc
from optax_clip import metrics
from optax_clip.clipping import _acting

LIMIT = 2.0
RNG = np.random.default_rng(0)
GRADS = {
    "a": RNG.normal(size=(4, 3)).astype(np.float32),
    "b": np.array([[np.nan, 1.0], [2.0, 3.0], [4.0, 5.0]], np.float32),
    "c": np.array([6.0, 8.0, 0.1], np.float32),
    "d": np.array([np.inf, 1.0], np.float32),
    "e": np.array([0.5, 0.1], np.float32),
}
WEIGHTS = {key: RNG.normal(size=x.shape).astype(np.float32) for key, x in GRADS.items()}


@pytest.fixture(params=[0, 2**16], ids=["each leaf apart", "small leaves together"])
def apart(request, monkeypatch):
    monkeypatch.setattr(_acting, "_SMALL", request.param)


def scopes(x, kind):
    """The scopes of a leaf, along its first axis."""
    return x.reshape(-1, x.shape[-1]).T if kind == "unit" and x.ndim > 1 else x.reshape(1, -1)


def clipped(x, limits, kind, normalize=False):
    """By the formula, in float64; NaN in each scope that is not finite."""
    rows = scopes(x.astype(np.float64), kind)
    norms = np.sqrt(np.sum(rows**2, axis=1))
    factors = limits / norms if normalize else np.minimum(1, limits / norms)
    new = np.where(np.isfinite(norms), factors, np.nan)[:, None] * rows
    new = np.where(np.isfinite(norms)[:, None], new, np.nan)
    return new.T.reshape(x.shape) if kind == "unit" and x.ndim > 1 else new.reshape(x.shape)


def step(tx, grads=GRADS, state=None, params=WEIGHTS):
    state = tx.init(params) if state is None else state
    return jax.jit(tx.update)(grads, state, params)


def agree(updates, expected):
    for key, want in expected.items():
        np.testing.assert_allclose(updates[key], want, rtol=2e-6, err_msg=key)


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize(
    "limit", [LIMIT, lambda count: LIMIT - count.astype(float)], ids=["number", "schedule"]
)
@pytest.mark.parametrize("kind", ["leaf", "unit"])
def test_a_broken_scope_is_alone(kind, limit):
    updates, state = step(oc.clip_by_norm(limit, scope=kind, nonfinite="local"))
    agree(updates, {key: clipped(x, LIMIT, kind) for key, x in GRADS.items()})
    np.testing.assert_array_equal(updates["e"], GRADS["e"])  # within the limit, bit for bit
    log = metrics(state)
    rows = np.concatenate([np.sqrt(np.sum(scopes(x, kind) ** 2, axis=1)) for x in GRADS.values()])
    fine = np.isfinite(rows)
    assert log["clip/fraction"] == pytest.approx(np.sum(rows[fine] > LIMIT) / rows.size)
    assert log["clip/threshold"] == LIMIT
    assert np.isnan(log["clip/norm_before"]) and np.isnan(log["clip/norm_after"])
    assert (log["clip/steps"], log["clip/steps_nonfinite"], log["clip/steps_clipped"]) == (1, 1, 0)


@pytest.mark.usefixtures("apart")
def test_beside_weights_and_normalized():
    norms = {key: np.sqrt(np.sum(scopes(w, "unit") ** 2, axis=1)) for key, w in WEIGHTS.items()}
    updates, _ = step(oc.adaptive_grad_clip(0.5, nonfinite="local"))
    agree(updates, {key: clipped(x, 0.5 * norms[key], "unit") for key, x in GRADS.items()})
    updates, _ = step(oc.normalize_by_norm(3.0, scope="leaf", nonfinite="local"))
    agree(updates, {key: clipped(x, 3.0, "leaf", normalize=True) for key, x in GRADS.items()})


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("nonfinite", ["propagate", "local"])
def test_finite_gradients_are_clipped_as_ever(nonfinite):
    """The metrics too; with the second step a schedule has moved on."""
    grads = {key: np.nan_to_num(x, nan=7.0, posinf=9.0) for key, x in GRADS.items()}
    tx = oc.clip_by_norm(lambda count: LIMIT - count.astype(float), nonfinite=nonfinite, record="scopes")
    _, state = step(tx, grads)
    updates, state = step(tx, grads, state)
    agree(updates, {key: clipped(x, LIMIT - 1, "leaf") for key, x in grads.items()})
    log = metrics(state)
    sizes = {key: np.linalg.norm(x.astype(np.float64)) for key, x in grads.items()}
    capped = {key: min(size, LIMIT - 1) for key, size in sizes.items()}
    for key, size in sizes.items():
        assert log[f"clip/{key}/norm_before"] == pytest.approx(size)
        assert log[f"clip/{key}/norm_after"] == pytest.approx(capped[key])
    assert log["clip/norm_before"] == pytest.approx(np.sqrt(sum(n**2 for n in sizes.values())))
    assert log["clip/norm_after"] == pytest.approx(np.sqrt(sum(n**2 for n in capped.values())))
    assert (log["clip/steps_clipped"], log["clip/steps_nonfinite"]) == (2, 0)


def test_a_label_is_a_scope():
    by_letter = oc.groups(lambda path, _: "early" if path < "c" else "late" if path < "d" else path)
    updates, state = step(oc.clip_by_norm(LIMIT, scope=by_letter, nonfinite="local", record="scopes"))
    assert all(np.isnan(updates[key]).all() for key in "abd")
    agree(updates, {key: clipped(GRADS[key], LIMIT, "leaf") for key in "ce"})
    log = metrics(state)
    assert np.isnan(log["clip/early/norm_after"]) and log["clip/late/norm_after"] == LIMIT


def test_a_tree_is_one_scope():
    """Then it is as if it were propagated."""
    for tx in (oc.clip_by_global_norm(1.0, nonfinite="local"), oc.zclip(nonfinite="local")):
        updates, _ = step(tx)
        assert all(np.isnan(x).all() for x in updates.values())
    with pytest.raises(ValueError, match="locally"):
        oc.clip_by_norm(1.0, nonfinite="locally")


def test_statistics_lose_the_broken_scope_alone():
    """AdaGC's warm-up clips what is finite to the norm of the whole, and remembers that."""
    tx = oc.adagc(2.0, warmup=2, decay=0.5, max_norm=1.0, nonfinite="local")
    grads = {"a": np.array([3.0, 0.0], np.float32), "b": np.array([0.0, 4.0], np.float32)}
    broken = grads | {"b": np.array([np.nan, 4.0], np.float32)}
    updates, state = step(tx, broken, params=grads)
    agree(updates, {"a": [1.0, 0.0], "b": [np.nan, np.nan]})  # 3 is the norm of what is finite
    # From step 2 on a is limited to 2 times the 1 that it had; b has seen nothing, and is limited as in
    # warm-up, to its share of 1 in the norm 5: 4 / 5.
    updates, _ = step(tx, grads, state, grads)
    agree(updates, {"a": [2.0, 0.0], "b": [0.0, 0.8]})


def test_clip_tree_and_transformations():
    """A batch of trees, one of them broken; and the derivative of the others."""

    @functools.partial(jax.vmap)
    def norms(grads):
        return oc.clip_tree(grads, LIMIT, scope="leaf", nonfinite="local")

    batch = {key: jnp.stack([x, np.nan_to_num(x, nan=1.0, posinf=1.0)]) for key, x in GRADS.items()}
    updates, before = jax.jit(norms)(batch)
    for row in range(2):
        agree(
            {key: x[row] for key, x in updates.items()},
            {key: clipped(np.asarray(x[row]), LIMIT, "leaf") for key, x in batch.items()},
        )
    assert np.isnan(before["b"][0]).all() and np.isfinite(before["b"][1]).all()

    def length(c):
        clip, _ = oc.clip_tree(GRADS | {"c": c}, LIMIT, scope="leaf", nonfinite="local")
        return jnp.sum(clip["c"])

    unit = GRADS["c"] / np.linalg.norm(GRADS["c"])
    want = LIMIT / np.linalg.norm(GRADS["c"]) * (1 - unit * unit.sum())
    np.testing.assert_allclose(jax.grad(length)(GRADS["c"]), want, rtol=1e-4, atol=1e-6)


def depends(program, source):
    """Which outputs of a program without calls depend on an input."""
    reached = {program.jaxpr.invars[source]}
    for equation in program.jaxpr.eqns:
        inputs = {v for v in equation.invars if not isinstance(v, jax.extend.core.Literal)}
        if inputs & reached:
            reached |= set(equation.outvars)
    return [v in reached for v in program.jaxpr.outvars]


@pytest.mark.parametrize("limit", [LIMIT, lambda count: LIMIT, oc.relative_to_params(0.1)])
@pytest.mark.parametrize("scope", ["leaf", "unit"])
def test_a_leaf_waits_for_no_other(scope, limit, monkeypatch):
    """Large ones: its update depends on no other leaf, by the program; with a policy for all it does."""
    monkeypatch.setattr(_acting, "_SMALL", 0)
    grads = {key: jnp.ones((4, 3)) for key in "ab"}

    def waits(nonfinite):
        tx = oc.clip_by_norm(limit, scope=scope, nonfinite=nonfinite)
        state = tx.init(grads)
        program = jax.make_jaxpr(lambda g: tx.update(g, state, grads)[0])(grads)
        return depends(program, 0)[1]

    assert waits("propagate") and not waits("local")
