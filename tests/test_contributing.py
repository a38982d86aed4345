"""The worked examples of CONTRIBUTING.md do what they say, in every scope and on every platform."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clip
import pages
from test_house import code_lines

PAGE = (pages.ROOT / "CONTRIBUTING.md").read_text("utf-8")


def section(name):
    return pages.names(f"CONTRIBUTING: {name}")


@pytest.mark.parametrize(("scope", "axes"), [("unit", 0), ("leaf", None), (1, 1)])
def test_a_set(scope, axes):
    zero_mean = section("A set of weights")["zero_mean"]
    w = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    want = w - w.astype(np.float64).mean(axis=axes, keepdims=True)
    got = jax.jit(optax_clip.project, static_argnums=1)({"w": w}, zero_mean(scope=scope))["w"]
    np.testing.assert_allclose(got, want, atol=1e-6)
    far = np.abs(w.astype(np.float64).mean(axis=axes)).max()
    assert optax_clip.violation({"w": w}, zero_mean(scope=scope)) == pytest.approx(far, rel=1e-5)
    tx = optax_clip.project_weights(zero_mean(scope=scope))
    params, step = {"w": jnp.asarray(w)}, {"w": jnp.full((3, 4), 0.5)}
    landed = optax.apply_updates(params, tx.update(step, tx.init(params), params)[0])
    np.testing.assert_allclose(landed["w"], want, atol=1e-6)


def test_a_set_is_short():
    code = pages.sections(PAGE)["A set of weights"]
    body = code[code.index("def zero_mean") : code.index("params = {")]
    assert len(code_lines(body)) <= 25
    assert len(set(re.findall(r"from optax_clip\.(\S+) import", code))) <= 3


def test_a_rule():
    rule = section("A rule for thresholds")["decaying_maximum"](0.5)
    norms, state = jnp.array([1.0, np.nan]), rule.init(jnp.zeros(2))
    limits, state = rule.update(norms, state, None, norms)
    np.testing.assert_array_equal(limits, np.inf)
    limits, state = rule.update(jnp.array([3.0, 5.0]), state, None, norms)
    np.testing.assert_array_equal(limits, [2, np.inf])  # twice 1; the NaN was not taken in
    limits, state = rule.update(norms, state, None, norms)
    np.testing.assert_array_equal(limits, [4, 10])  # twice what came through, 2 and 5
    limits, state = rule.update(norms, state, None, norms)
    np.testing.assert_array_equal(limits, [2, 5])  # half of that


def test_an_order():
    names = section("An order")
    assert "mean" not in names["ORDERS"]
    names["ORDERS"]["mean"] = names["Order"](1.0, mean=True)
    try:
        tree = {"a": jnp.array([3.0, -5.0]), "b": jnp.array([[1.0, 0.0], [-1.0, 2.0]])}
        assert optax_clip.global_norm(tree, ord="mean") == pytest.approx(12 / 6)
        found = optax_clip.tree_norms(tree, scope="unit", ord="mean")
        np.testing.assert_allclose(found["b"], [[1.0, 1.0]])
        tx = optax_clip.clip_by_norm(1.0, scope="unit", ord="mean")
        state = tx.init(tree)
        assert optax_clip.metrics(tx.update(tree, state)[1])["clip/norm_before"] == pytest.approx(2)
    finally:
        del names["ORDERS"]["mean"]
    with pytest.raises(ValueError, match='Expected ord to be None, "rms" or a number >= 1'):
        optax_clip.global_norm(tree, ord="mean")


def test_what_one_platform_needs(platform):
    both = section("What one platform needs")["sum_and_sum_of_squares"]
    assert tuple(map(float, jax.jit(both)(jnp.array([3.0, 4.0])))) == (7, 25)
    assert ("complex" in str(jax.make_jaxpr(both)(jnp.ones(2)))) == (platform == "cuda")


def test_constraint_documents_every_field():
    told = inspect.getdoc(optax_clip.Constraint)
    assert all(f"{field}: " in told for field in optax_clip.Constraint._fields)
