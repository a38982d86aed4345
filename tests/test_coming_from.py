"""Each name of the tables in docs/coming_from.md: Optax's own run beside ours, of others the formula."""

import functools
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_clip import (
    adaptive_grad_clip,
    box,
    clip_by_global_norm,
    clip_by_norm,
    clip_by_value,
    clip_tree,
    global_norm,
    non_negative,
    norm_ball,
    norm_shell,
    norm_sphere,
    normalize_by_norm,
    project,
    project_weights,
    simplex,
    skip_spikes,
    spectral_ball,
)

PAGE = (Path(__file__).parents[1] / "docs" / "coming_from.md").read_text("utf-8")
SHAPES = {"kernel": (4, 3), "conv": (3, 3, 2, 4), "bias": (3,)}
pytestmark = pytest.mark.usefixtures("standard_promotion")


def tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(scale * rng.normal(size=s), jnp.float32) for k, s in SHAPES.items()}


GRADS, WEIGHTS = tree(0), tree(1)


def update(tx, grads=GRADS, weights=WEIGHTS):
    return tx.update(grads, tx.init(weights), weights)[0]


def close(ours, theirs, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol, atol), ours, theirs)


def differ(ours, theirs):
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return not all(np.allclose(a, b, rtol=1e-3) for a, b in pairs)


# --- Optax, gradients ----------------------------------------------------------------------------

SAME = {
    "optax.clip(c)": (optax.clip(0.5), clip_by_value(0.5)),
    "optax.clip_by_global_norm(c)": (optax.clip_by_global_norm(0.5), clip_by_global_norm(0.5)),
    "optax.clip_by_block_rms(c)": (optax.clip_by_block_rms(0.5), clip_by_norm(0.5, ord="rms")),
    "optax.adaptive_grad_clip(r)": (optax.adaptive_grad_clip(0.1), adaptive_grad_clip(0.1)),
    "optax.normalize_by_update_norm()": (optax.normalize_by_update_norm(), normalize_by_norm()),
}


@pytest.mark.parametrize("name", SAME)
def test_optax(name):
    assert f"`{name}`" in PAGE
    theirs, ours = (update(tx) for tx in SAME[name])
    close(ours, theirs)
    assert differ(ours, GRADS)


def test_adaptive_grad_clip_of_rank_3():
    draws = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    grads, weights = {"k": jnp.asarray(draws[0])}, {"k": jnp.asarray(draws[1])}
    theirs = update(optax.adaptive_grad_clip(0.1), grads, weights)
    close(update(adaptive_grad_clip(0.1, scope=0), grads, weights), theirs)
    assert differ(update(adaptive_grad_clip(0.1), grads, weights), theirs)


def test_normalize_tiny_norms():
    tiny = tree(0, 1e-12)
    assert float(global_norm(update(normalize_by_norm(), tiny))) == pytest.approx(1, rel=1e-5)
    assert float(global_norm(update(optax.normalize_by_update_norm(), tiny))) < 0.01


def test_zero_nans():
    """Theirs zeroes the entry, ours the step."""
    grads = {**GRADS, "bias": GRADS["bias"].at[0].set(jnp.nan)}
    theirs = update(optax.zero_nans(), grads)
    close(theirs, {**grads, "bias": grads["bias"].at[0].set(0)})
    ours = update(clip_by_global_norm(jnp.inf, nonfinite="zero"), grads)
    close(ours, jax.tree.map(jnp.zeros_like, grads))


def test_skip_large_updates():
    """The limit there is the square of ours; weights and moments are the same."""
    skip = functools.partial(optax.skip_large_updates, max_squared_norm=4.0)
    theirs = optax.MultiSteps(optax.adam(0.1), 1, should_skip_update_fn=skip).gradient_transformation()
    ours = skip_spikes(optax.adam(0.1), 2.0)
    ends = []
    for tx in (theirs, ours):
        w, state = jnp.zeros(2), tx.init(jnp.zeros(2))
        for norm in (1.0, 1.9, 2.1, 0.5, math.nan, 1.0):
            updates, state = tx.update(jnp.array([0.6, 0.8]) * norm, state, w)
            w = optax.apply_updates(w, updates)
        ends.append(w)
    close(*ends)


WRAPPERS = {
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
    "masked": lambda tx: optax.masked(tx, {"kernel": True, "conv": False, "bias": True}),
    "contrib.schedule_free": lambda tx: optax.contrib.schedule_free(tx, 0.1),
    "partition": lambda tx: optax.partition({"a": tx, "b": optax.sgd(1.0)}, dict.fromkeys(SHAPES, "a")),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers(name):
    assert f"`{name}`" in PAGE
    clips = optax.clip_by_global_norm(0.5), clip_by_global_norm(0.5)
    theirs, ours = (update(WRAPPERS[name](optax.chain(clip, optax.adam(0.1)))) for clip in clips)
    close(ours, theirs)


def test_lookahead():
    pair = optax.LookaheadParams.init_synced(WEIGHTS)
    clips = optax.clip_by_global_norm(0.5), clip_by_global_norm(0.5)
    theirs, ours = (
        update(optax.lookahead(optax.chain(clip, optax.sgd(0.1)), 1, 0.5), GRADS, pair) for clip in clips
    )
    close(ours, theirs)


def test_inject_hyperparams():
    clips = optax.clip_by_global_norm, clip_by_global_norm
    theirs, ours = (update(optax.inject_hyperparams(clip)(max_norm=0.5)) for clip in clips)
    close(ours, theirs)


def test_per_example_global_norm_clip():
    """The sum over examples of clipped gradients, and how many were clipped."""
    batched = jax.tree.map(lambda g: jnp.stack([g, 10 * g, 0.01 * g]), GRADS)
    leaves, structure = jax.tree.flatten(batched)
    theirs, clipped = optax.per_example_global_norm_clip(leaves, 1.0)
    each, norms = jax.vmap(lambda g: clip_tree(g, 1.0))(batched)
    close(jax.tree.map(lambda g: g.sum(0), each), jax.tree.unflatten(structure, theirs))
    assert int(jnp.sum(norms > 1.0)) == int(clipped) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # The second is the old name.
def test_norms():
    for theirs in (optax.tree.norm, optax.global_norm):
        assert float(global_norm(GRADS)) == pytest.approx(float(theirs(GRADS)), rel=1e-6)


# --- Optax, weights ------------------------------------------------------------------------------

PROJECTIONS = {
    "projection_box": (
        lambda w: optax.projections.projection_box(w, *(dict.fromkeys(w, c) for c in (-0.3, 0.5))),
        box(-0.3, 0.5),
    ),
    "projection_l2_ball": (
        lambda w: optax.projections.projection_l2_ball(w, 2.0),
        norm_ball(2.0, scope="global"),
    ),
    "_l1_ball": (
        lambda w: optax.projections.projection_l1_ball(w, 2.0),
        norm_ball(2.0, ord=1, scope="global"),
    ),
    "_linf_ball": (
        lambda w: optax.projections.projection_linf_ball(w, 0.5),
        norm_ball(0.5, ord=math.inf, scope="global"),
    ),
    "projection_l2_sphere": (
        lambda w: optax.projections.projection_l2_sphere(w, 2.0),
        norm_sphere(2.0, scope="global"),
    ),
    "_simplex": (lambda w: optax.projections.projection_simplex(w, 2.0), simplex(2.0, scope="global")),
}


@pytest.mark.parametrize("name", PROJECTIONS)
def test_projections(name):
    assert name in PAGE
    theirs, ours = PROJECTIONS[name]
    close(project(WEIGHTS, ours), theirs(WEIGHTS), rtol=2e-5)
    assert differ(theirs(WEIGHTS), WEIGHTS)


def test_keep_params_nonnegative():
    assert "`optax.keep_params_nonnegative()`" in PAGE
    theirs, ours = (
        optax.apply_updates(WEIGHTS, update(tx, GRADS))
        for tx in (optax.keep_params_nonnegative(), project_weights(non_negative()))
    )
    close(ours, theirs, atol=1e-7)
    assert all((leaf >= 0).all() for leaf in jax.tree.leaves(ours))


@pytest.mark.parametrize(
    "projection",
    [
        lambda w: optax.projections.projection_halfspace(w, WEIGHTS, 1.0),
        lambda w: optax.projections.projection_hyperplane(w, WEIGHTS, 1.0),
        lambda w: optax.projections.projection_l1_sphere(w, 2.0),
    ],
    ids=["halfspace", "hyperplane", "l1_sphere"],
)
def test_any_callable_is_a_set(projection):
    moved = optax.apply_updates(WEIGHTS, GRADS)
    ended = optax.apply_updates(WEIGHTS, update(project_weights(projection)))
    close(ended, projection(moved), rtol=1e-4, atol=1e-5)
    assert differ(ended, moved)


# --- Keras, PyTorch: the formulas ----------------------------------------------------------------


def norm_of(x, axis=None):
    return np.sqrt((np.asarray(x, np.float64) ** 2).sum(axis=axis, keepdims=axis is not None))


def each(f):
    return {key: f(np.asarray(leaf, np.float64)) for key, leaf in GRADS.items()}


TOTAL = math.sqrt(sum(float(norm_of(leaf)) ** 2 for leaf in GRADS.values()))
CUBIC = sum((np.abs(np.asarray(leaf, np.float64)) ** 3).sum() for leaf in GRADS.values()) ** (1 / 3)
GRADIENTS = {
    "clipvalue=c": (each(lambda g: np.clip(g, -0.5, 0.5)), clip_by_value(0.5)),
    "clipnorm=c": (
        each(lambda g: g * 1.5 / max(norm_of(g), 1.5)),
        clip_by_norm(1.5, scope="leaf"),
    ),
    "global_clipnorm=c": (each(lambda g: g * 1.5 / max(TOTAL, 1.5)), clip_by_global_norm(1.5)),
    "clip_grad_norm_(parameters, c)": (
        each(lambda g: g * min(1, 1.5 / (TOTAL + 1e-6))),
        clip_by_global_norm(1.5),
    ),
    "norm_type=p": (each(lambda g: g * 1.5 / CUBIC), clip_by_global_norm(1.5, ord=3)),
    "clip_grad_value_(parameters, c)": (each(lambda g: np.clip(g, -0.5, 0.5)), clip_by_value(0.5)),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_elsewhere(name):
    assert name in PAGE
    theirs, ours = GRADIENTS[name]
    close(update(ours), theirs)
    assert differ(update(ours), GRADS)


KERNEL = np.asarray(2 * WEIGHTS["kernel"], np.float64)
COLUMNS = norm_of(KERNEL, 0)  # One for each output of a kernel (in, out).
CONSTRAINTS = {
    "MaxNorm(2, axis=0)": (KERNEL * np.clip(COLUMNS, 0, 2) / (1e-7 + COLUMNS), norm_ball(2.0, scope=0)),
    "UnitNorm(axis=0)": (KERNEL / (1e-7 + COLUMNS), norm_sphere(1.0, scope=0)),
    "NonNeg()": (KERNEL * (KERNEL >= 0), non_negative()),
    "MinMaxNorm(0.5, 2.0, axis=0)": (
        KERNEL * np.clip(COLUMNS, 0.5, 2.0) / (1e-7 + COLUMNS),
        norm_shell(0.5, 2.0, scope=0),
    ),
    "p.data.clamp_(-c, c)": (np.clip(KERNEL, -0.5, 0.5), box(-0.5, 0.5)),
    "p.data.renorm_(2, 0, c)": (
        KERNEL * np.where(COLUMNS > 2, 2 / (COLUMNS + 1e-7), 1),  # Of the transposed weight (out, in).
        norm_ball(2.0, scope="unit"),
    ),
}


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_constraints_elsewhere(name):
    assert name in PAGE
    theirs, ours = CONSTRAINTS[name]
    found = project(jnp.asarray(KERNEL, jnp.float32), ours)
    np.testing.assert_allclose(found, theirs, rtol=2e-6, atol=1e-6)
    assert not np.allclose(found, KERNEL)


def test_spectral_norm():
    """Theirs divides by the largest singular value, always; the ball moves the large ones alone."""
    kernel = np.diag([3.0, 0.5]).astype(np.float32)
    ended = project(jnp.asarray(kernel), spectral_ball(1.0))
    np.testing.assert_allclose(ended, np.diag([1, 0.5]), atol=1e-5)
    assert (kernel / np.linalg.norm(kernel, 2))[1, 1] == pytest.approx(1 / 6)


def test_every_row_of_optax_is_here():
    """A new row in Optax's table asks for a test above."""
    table = PAGE.split("## Optax")[1].split("Checkpoints made")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| ")][1:]
    tested = Path(__file__).read_text("utf-8")
    for row in rows:
        names = re.findall(r"[a-z0-9_]{4,}", row.replace("..._", "_"))
        known = [name for name in names if name not in ("optax", "projections")]
        assert any(name in tested.split("def test_every_row")[0] for name in known), row
