"""The table of limits against counts in NumPy, and the recipe that trains under many limits at once."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import recorded_norms
from optax_clip import clip_tree, threshold_table
from pages import names

NORMS = st.lists(
    st.one_of(st.floats(0, 2.0**100, width=32), st.sampled_from([np.inf, np.nan, 0.0, 1.0])), min_size=1
).filter(lambda norms: np.isfinite(norms).any())


def by_hand(norms, limit):
    """Share, mean factor and smallest factor of a limit, step by step."""
    factors = []
    for norm in norms:
        if norm > limit:
            factors.append(limit / norm)
    share = len(factors) / len(norms)
    return (share, sum(factors) / len(factors), min(factors)) if factors else (0.0, 1.0, 1.0)


@given(NORMS, st.lists(st.floats(0, 2.0**100), min_size=1))
def test_against_a_loop(norms, limits):
    table = threshold_table(norms, limits)
    finite = [x for x in norms if np.isfinite(x)]
    assert (table.steps, table.steps_nonfinite) == (len(finite), len(norms) - len(finite))
    assert table.limits.tolist() == sorted(set(limits))
    for limit, *row in zip(table.limits, table.clipped, table.factor, table.strongest, strict=True):
        np.testing.assert_allclose(row, by_hand(finite, limit), rtol=1e-12)


@given(NORMS)
def test_candidates_by_themselves(norms):
    """Looser limits clip fewer steps, the p-th percentile at most 100 - p percent, the last one none."""
    table = threshold_table(norms)
    assert (np.diff(table.limits) > 0).all() and (np.diff(table.clipped) <= 0).all()
    finite = np.array([x for x in norms if np.isfinite(x)])
    for p in (5, 50, 95):
        at = np.searchsorted(table.limits, np.percentile(finite, p))
        assert table.clipped[at] <= 1 - p / 100 + 1 / len(finite)
    assert table.limits[-1] == finite.max() and table.clipped[-1] == 0


def test_what_the_clip_does():
    """Share and factors are those of the clip itself."""
    grads = jnp.array([[3.0, 4.0], [0.6, 0.8], [6.0, 8.0]])  # norms 5, 1, 10
    clipped, norms = jax.vmap(lambda g: clip_tree(g, 2.0))(grads)
    factors = np.linalg.norm(clipped, axis=1) / np.linalg.norm(grads, axis=1)
    table = threshold_table(norms, limits=2.0)
    over = factors < 1 - 1e-6
    assert table.clipped == over.mean() == 2 / 3
    np.testing.assert_allclose(table.factor, factors[over].mean(), rtol=1e-6)
    np.testing.assert_allclose(table.strongest, factors.min(), rtol=1e-6)


def test_a_norm_at_the_limit_is_not_clipped():
    assert threshold_table([2.0, 2.0], [2.0]).clipped == 0


def test_of_a_real_run():
    norms = np.sqrt((recorded_norms.load().astype(np.float64) ** 2).sum(1))
    table = threshold_table(norms)
    assert table.steps == len(norms) == 1000
    np.testing.assert_allclose(
        table.clipped, [0.95, 0.9, 0.75, 0.5, 0.25, 0.1, 0.05, 0.01, 0], atol=1e-9
    )


@pytest.mark.parametrize(
    "norms", [[jnp.float32(3), jnp.float32(1)], jnp.array([[3.0], [1.0]], "bfloat16"), np.array([3, 1])]
)
def test_takes_what_loops_record(norms):
    table = threshold_table(norms, limits=[1.0, 2.0, np.inf])
    np.testing.assert_allclose(table.clipped, [0.5, 0.5, 0])
    np.testing.assert_allclose(table.factor, [1 / 3, 2 / 3, 1])
    assert all(x.dtype == np.float64 and x.shape == (3,) for x in table[:4])


def test_limit_of_zero():
    table = threshold_table([0.0, 0.0, 2.0, 1.0], [0.0])
    assert (table.clipped, table.factor, table.strongest) == (0.5, 0, 0)


@pytest.mark.parametrize(
    ("norms", "limits", "words"),
    [
        ([], None, "Expected norms of which at least one is finite, got none among 0."),
        ([np.nan, np.inf], None, "got none among 2."),
        ([1.0, -2.0], None, "Expected norms >= 0, got -2.0 at position (1,)."),
        ([1.0], [1.0, -1.0], "Expected limits >= 0, got -1.0 at position (1,)."),
        ([1.0], [np.nan], "Expected limits not to be NaN"),
    ],
)
def test_raises(norms, limits, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        threshold_table(norms, limits)


@pytest.fixture(scope="module")
def recipe():
    """The names that the code of the guide leaves behind."""
    return names("choosing: Many thresholds at once")


def test_each_column_is_a_run_of_its_own(recipe):
    """The runs side by side are those with each threshold alone, a plain number, in a Python loop."""
    limits, logs = recipe["limits"], recipe["logs"]
    assert logs["loss"].shape == (len(limits), recipe["steps"])
    for i in (0, len(limits) // 2, len(limits) - 1):
        alone = recipe["train"](float(limits[i]))
        for key in ("loss", "clip/norm_before", "clip/threshold"):
            np.testing.assert_allclose(logs[key][i], alone[key], rtol=1e-4)
        np.testing.assert_array_equal(logs["clip/steps_clipped"][i], alone["clip/steps_clipped"])


def test_the_last_threshold_only_records(recipe):
    logs = recipe["logs"]
    assert np.isinf(recipe["limits"][-1]) and (logs["clip/steps_clipped"][-1] == 0).all()
    assert recipe["table"].steps == recipe["steps"]
    assert (logs["clip/steps_clipped"][0, -1]) == recipe["steps"]  # the first clips each step


def test_one_program(recipe):
    """All thresholds share one compiled loop: nothing is traced or compiled for each."""
    program = str(jax.make_jaxpr(jax.vmap(recipe["train"]))(recipe["limits"]))
    assert program.count(" scan[") == 1
