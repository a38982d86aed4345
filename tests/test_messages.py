"""Mistakes that are easily made: what the message says, and which of them used to pass in silence."""

import math
import warnings

import jax
import jax.numpy as jnp
import optax
import pytest

from optax_clip import (
    adagc,
    adaptive_grad_clip,
    box,
    clip_by_global_norm,
    clip_by_norm,
    clip_by_value,
    clip_tree,
    groups,
    init_box,
    mask_outward,
    metrics,
    non_negative,
    norm_ball,
    norm_sphere,
    normalize_by_norm,
    project,
    project_weights,
    record_norms,
    relative_to_params,
    rescale_weights,
    simplex,
    skip_spikes,
    spectral_ball,
    violation,
    where,
    zclip,
    zscore,
)

G = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([1.0])}
SETS = [
    norm_ball(1.0),
    norm_sphere(1.0),
    box(0.0, 1.0),
    non_negative(),
    simplex(1.0),
    spectral_ball(1.0),
    init_box(1.0),
]


def update(tx, params=G, grads=G, **extra):
    return tx.update(grads, tx.init(grads), params, **extra)


@pytest.mark.parametrize("factory", [norm_ball, norm_sphere, box, simplex, spectral_ball, init_box])
def test_parentheses_forgotten(factory):
    with pytest.raises(TypeError) as error:
        update(project_weights(factory))
    text = str(error.value) + "".join(getattr(error.value, "__notes__", ()))
    assert "constraint=" in text and factory.__name__ in text


def test_parentheses_forgotten_of_a_ball():
    with pytest.raises(TypeError, match=r"which makes one: call it, as in norm_ball\(1\.0\)"):
        update(project_weights(norm_ball))


@pytest.mark.parametrize("rule", [zscore(1.0), 10.0, optax.constant_schedule(1.0)])
def test_rule_and_inner_swapped(rule):
    with pytest.raises(TypeError, match=r"Expected inner .*skip_spikes\(inner, rule\)"):
        skip_spikes(rule, optax.sgd(0.1))


@pytest.mark.parametrize(
    "factory", [clip_by_global_norm, clip_by_norm, normalize_by_norm, clip_by_value]
)
def test_what_a_limit_may_be(factory):
    with pytest.raises(TypeError, match=r"a number, .*a schedule"):
        factory("1.0")
    with pytest.raises(TypeError, match=r"To switch a clip off give jnp\.inf\."):
        factory(None)


# What needs params, and the name that a reader knows it by.
NEED_PARAMS = [
    (lambda: adaptive_grad_clip(), "adaptive_grad_clip"),
    (lambda: clip_by_norm(relative_to_params(0.1)), "relative_to_params"),
    (lambda: project_weights(box(0.0, 1.0)), "project_weights"),
    (lambda: mask_outward(box(0.0, 1.0)), "mask_outward"),
    (lambda: record_norms(of=("params",)), "record_norms"),
]


@pytest.mark.parametrize("make, name", NEED_PARAMS, ids=lambda x: x if isinstance(x, str) else "")
def test_missing_params_say_how_to_call(make, name):
    with pytest.raises(ValueError, match=rf"{name}.*tx\.update\(grads, state, params\)"):
        update(make(), params=None)


@pytest.mark.parametrize("make, name", NEED_PARAMS, ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.parametrize("other", [None, jnp.arange(1)], ids=["none", "int"])
def test_none_beside_an_update(make, name, other):
    """The message names the leaf and the transform."""
    got = "None" if other is None else "int32"
    with pytest.raises(
        ValueError, match=rf"{'adaptive' if 'relative' in name else name}.*leaf 'b', got {got}"
    ):
        update(make(), params={**G, "b": other})


@pytest.mark.parametrize(
    "make",
    [clip_by_global_norm, clip_by_norm, clip_by_value, normalize_by_norm],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize(
    "params", [{"a": None, "b": None}, {"c": jnp.ones(2)}, jnp.arange(3)], ids=["none", "other", "int"]
)
def test_what_needs_no_weights_looks_at_none(make, params):
    expected, _ = update(make(1.0), params=None)
    updates, _ = update(make(1.0), params=params)
    assert all(map(jnp.array_equal, jax.tree.leaves(updates), jax.tree.leaves(expected)))


@pytest.mark.parametrize(
    "changed", [lambda p: [p], lambda p: {**p, "b": p["b"][None]}], ids=["structure", "shape"]
)
def test_a_callable_of_another_structure_or_shape(changed):
    for call in (lambda: project(G, changed), lambda: update(project_weights(changed))):
        with pytest.raises(ValueError, match="same structure and shapes"):
            call()


def test_a_callable_for_one_leaf():
    with pytest.raises((TypeError, AttributeError)) as error:
        project(G, lambda leaf: leaf.clip(0, 1))
    assert any("not leaf by leaf" in note for note in error.value.__notes__)


def test_a_given_norm_is_one_number():
    with pytest.raises(
        ValueError, match=r"Expected grad_norm to be one number, got grad_norm of shape \(3,\)"
    ):
        update(clip_by_global_norm(1.0), grad_norm=jnp.ones(3))


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: clip_by_value(zscore(2.0)),
            r"got limit=zscore\(2\.0\)\. Rules go to clip_by_norm\.",
        ),
        (
            lambda: clip_by_value(None, lower=-1.0),
            r"got limit=None\. To switch a clip off give jnp\.inf",
        ),
        (lambda: adagc(max_norm=None), r"got max_norm=None\. To switch a clip off give jnp\.inf\."),
        (lambda: norm_ball({"a": None}), r"got radius\['a'\]=None\. To switch .* jnp\.inf\."),
        (lambda: box(None, 1.0), r"got lower=None\. To switch .* -jnp\.inf\."),
        (lambda: box(0.0, None), r"got upper=None\. To switch .* give jnp\.inf\."),
        (lambda: norm_sphere(None), r"got radius=None\.$"),
        (lambda: adaptive_grad_clip(eps=None), r"got eps=None\.$"),
        (lambda: clip_by_global_norm({"a": 1.0}), r"or a ThresholdRule, got max_norm=\{'a': 1\.0\}\.$"),
        (lambda: skip_spikes(optax.sgd(1.0), {"a": 1.0}), r"ThresholdRule, got rule=\{'a': 1\.0\}\.$"),
        (lambda: rescale_weights(3.0, signal="peak"), r"got factors=3\.0\."),
        (lambda: update(clip_by_global_norm(1.0), grad_norm="a"), r"real number, got grad_norm='a'\."),
        (lambda: clip_tree(G, 1.0, norm="x"), r"Expected norm to be a real number, got norm='x'\."),
        (lambda: clip_tree(G, relative_to_params(0.1)), r"got max_norm=relative_to_params\(0\.1\)\."),
    ],
)
def test_what_is_of_another_type(make, message):
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: record_norms(of="params"), r"a tuple .*such as \(\"params\",\), got of='params'"),
        (
            lambda: normalize_by_norm({"a": math.inf}, scope=groups(lambda path, leaf: path)),
            r"Expected norm\['a'\] to be finite, got norm\['a'\]=inf\.",
        ),
        (lambda: project(G, init_box(1.0)), r"got kappa=1\.0\. If this came from optax\.inject"),
        (
            lambda: update(clip_by_value(1.0, lower=0.0), grads={"a": G["a"], "b": jnp.array([1j])}),
            r"got complex64 at 'b' and lower=0\.0\.",
        ),
        (lambda: clip_tree(G, 1.0, norm=jnp.ones(2)), r"got norm of shape \(2,\)"),
        (
            lambda: project(G, norm_ball(jnp.ones(2), scope="global")),
            r'one number with scope="global" or groups, got radius of shape \(2,\)\.',
        ),
        (lambda: project(G, norm_ball(len, scope="global")), r"got radius=<function len"),
        (lambda: project(G, norm_ball({"a": 1.0}, scope="global")), r"got radius=\{'a': 1\.0\}\."),
    ],
)
def test_values_that_do_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("constraint", SETS, ids=lambda c: repr(c))
def test_sets_under_inject_hyperparams(constraint):
    with pytest.raises((TypeError, ValueError), match=r"static_args=\('constraint',\)"):
        optax.inject_hyperparams(project_weights)(constraint).init(G)


def test_mask_outward_under_inject_hyperparams():
    with pytest.raises(TypeError, match=r"static_args=\('constraint',\)"):
        optax.inject_hyperparams(mask_outward)(box(0.0, 1.0)).init(G)


# --- What used to pass in silence -----------------------------------------------------------------


def test_a_mask_that_picks_nothing_warns_once():
    tree = {name: jnp.ones(1) for name in "abcd"}
    mask = where(lambda path, leaf: path == "kernel")
    with pytest.warns(UserWarning, match=r"chooses no leaf.*\['a', 'b', 'c'\]"):
        mask(tree)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mask(tree)
        where(lambda path, leaf: path == "a")(tree)
        for empty in ({}, {"a": None}, {"a": optax.MaskedNode()}):
            where(lambda path, leaf: False)(empty)


@pytest.mark.parametrize("constraint", SETS[:-1], ids=lambda c: repr(c))
def test_violation_of_integers(constraint):
    with pytest.raises(TypeError, match="Expected params with a float leaf, got params of int32"):
        violation(jnp.array([5, 7]), constraint)
    assert float(violation({"step": jnp.arange(3), "w": jnp.array([[0.0, 1.0]])}, constraint)) == 0
    assert float(violation({}, constraint)) == 0


@pytest.mark.parametrize("thing", [clip_by_global_norm(1.0), optax.sgd(0.1), jnp.sum])
def test_metrics_of_what_is_no_state(thing):
    with pytest.raises(TypeError, match="Expected opt_state to be the state of a transform"):
        metrics(thing)


# --- Names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 0, 1)])
def test_a_given_name_keeps_its_metrics(order):
    """Clips at 1 and 2, both called "clip", and one at 3 that the user called "clip_1"."""
    clips = [clip_by_global_norm(1.0), clip_by_global_norm(2.0), clip_by_global_norm(3.0, name="clip_1")]
    tx = optax.chain(*(clips[i] for i in order))
    found = metrics(tx.update(G, tx.init(G))[1])
    limits = {key: float(x) for key, x in found.items() if key.endswith("threshold")}
    assert limits == {"clip/threshold": 1.0, "clip_2/threshold": 2.0, "clip_1/threshold": 3.0}


def test_zclip_named_as_a_clip():
    tx = optax.chain(zclip(name="clip"), clip_by_global_norm(1.0), clip_by_value(2.0, name="clip_1"))
    assert {key.split("/")[0] for key in metrics(tx.init(G))} == {"clip", "clip_1", "clip_2"}
