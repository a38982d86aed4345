"""Bad input raises at once, with the argument's name and its value in the message."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_clip import (
    ThresholdRule,
    clip_by_global_norm,
    clip_by_norm,
    clip_by_value,
    clip_tree,
    global_norm,
    normalize_by_norm,
    tree_norms,
)

TREE = {"w": jnp.ones((3, 2)), "b": jnp.ones(3)}
clip_a_tree = functools.partial(clip_tree, TREE)

# Each takes a limit first, under this name.
LIMITED = [
    (clip_by_value, "limit"),
    (clip_by_global_norm, "max_norm"),
    (clip_by_norm, "threshold"),
    (normalize_by_norm, "norm"),
    (clip_a_tree, "max_norm"),
]
SCOPED = [
    clip_by_norm,
    normalize_by_norm,
    clip_a_tree,
    lambda _, **kwargs: tree_norms(TREE, **kwargs),
]
ORDERED = [*SCOPED, clip_by_global_norm, lambda _, **kwargs: global_norm(TREE, **kwargs)]


@pytest.mark.parametrize("function, name", LIMITED)
@pytest.mark.parametrize(
    "value, error, shown",
    [
        (-1.0, ValueError, r"-1\.0"),
        (-1, ValueError, "-1"),
        (-math.inf, ValueError, "-inf"),
        (np.float32(-1), ValueError, "-1"),
        (jnp.float32(-1), ValueError, "-1"),
        (math.nan, ValueError, "nan"),
        (jnp.float32(math.nan), ValueError, "nan"),
        ("1.0", TypeError, r"'1\.0'"),
        (None, TypeError, "None"),
        (True, TypeError, "True"),
        (1j, TypeError, "1j"),
        ([1.0], TypeError, r"\[1\.0\]"),
        (jnp.array(True), TypeError, "True"),
        (jnp.ones(2), ValueError, r"\(2,\)"),
    ],
)
def test_limits(function, name, value, error, shown):
    with pytest.raises(error, match=rf"(?s)\b{name}\b.*{shown}"):
        function(value)


def test_the_message_reads_well():
    with pytest.raises(ValueError, match=r"^Expected max_norm >= 0, got max_norm=-1\.0\.$"):
        clip_by_global_norm(-1.0)


def test_normalize_to_infinity():
    with pytest.raises(ValueError, match="norm=inf"):
        normalize_by_norm(math.inf)


@pytest.mark.parametrize("function", SCOPED)
@pytest.mark.parametrize("scope", ["rows", "", None, 1.0, True, [0], (0, 1.0), ("leaf",)])
def test_scopes(function, scope):
    with pytest.raises(ValueError) as error:
        function(1.0, scope=scope)
    assert f"scope={scope!r}" in str(error.value)


@pytest.mark.parametrize("function", ORDERED)
@pytest.mark.parametrize("ord", [0, 0.5, -1, -math.inf, math.nan, "max", "2", True, [2], 2j])
def test_orders(function, ord):
    with pytest.raises(ValueError) as error:
        function(1.0, ord=ord)
    assert f"ord={ord!r}" in str(error.value)


@pytest.mark.parametrize("function", [clip_by_norm, clip_by_global_norm, normalize_by_norm, clip_a_tree])
@pytest.mark.parametrize("nonfinite", ["raise", "", None, True, 0.0])
def test_policies(function, nonfinite):
    with pytest.raises(ValueError) as error:
        function(1.0, nonfinite=nonfinite)
    assert f"nonfinite={nonfinite!r}" in str(error.value)


@pytest.mark.parametrize(
    "function", [clip_by_norm, clip_by_global_norm, normalize_by_norm, clip_by_value]
)
@pytest.mark.parametrize("name", [None, 3, ""])
def test_names(function, name):
    with pytest.raises(TypeError, match="name") as error:
        function(1.0, name=name)
    assert f"name={name!r}" in str(error.value)


def test_bounds_that_cross():
    with pytest.raises(ValueError, match=r"lower=2\.0 and limit=1\.0"):
        clip_by_value(1.0, lower=2.0)
    clip_by_value(1.0, lower=1.0)
    clip_by_value(-1.0, lower=-2.0)  # An interval may lie on one side of 0.


@pytest.mark.parametrize("lower, error", [(math.nan, ValueError), ("0", TypeError), (True, TypeError)])
def test_lower_bounds(lower, error):
    with pytest.raises(error, match=f"lower={lower!r}"):
        clip_by_value(1.0, lower=lower)


def test_complex_beside_a_lower_bound():
    tx = clip_by_value(1.0, lower=-2.0)
    with pytest.raises(ValueError, match=r"complex.*lower=-2\.0"):
        tx.update(jnp.array([1j]), tx.init(jnp.array([1j])))


def test_a_given_norm_is_that_of_the_whole_tree():
    with pytest.raises(ValueError, match=r"norm.*scope='leaf'"):
        clip_tree(TREE, 1.0, scope="leaf", norm=5.0)


def test_rules_are_pairs_of_functions():
    with pytest.raises(TypeError, match="threshold=ThresholdRule"):
        clip_by_norm(ThresholdRule(None, None))


# --- Leaves that do not fit ----------------------------------------------------------------------


@pytest.mark.parametrize("scope", [1, -2, (0, 1), (-2,), lambda path, x: 1])
def test_axes_that_a_leaf_does_not_have(scope):
    tree = {"head": {"bias": jnp.ones(3), "kernel": jnp.ones((3, 2))}}
    for check in (
        lambda: tree_norms(tree, scope=scope),
        lambda: clip_tree(tree, 1.0, scope=scope),
        lambda: clip_by_norm(1.0, scope=scope).init(tree),
        lambda: jax.eval_shape(lambda x: tree_norms(x, scope=scope), tree),
    ):
        with pytest.raises(ValueError, match=r"head/bias.*\(3,\)"):
            check()


def test_axes_named_twice():
    with pytest.raises(ValueError, match=r"scope=\(0, -2\).*'w'.*\(3, 2\)"):
        tree_norms({"w": TREE["w"]}, scope=(0, -2))


@pytest.mark.parametrize("answer", ["global", "rows", None, 1.5, lambda path, x: 0])
def test_what_a_callable_scope_may_answer(answer):
    with pytest.raises(ValueError, match="scope") as error:
        tree_norms(TREE, scope=lambda path, x: answer)
    assert repr(answer) in str(error.value)


# --- Traced values -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "factory, kwargs",
    [
        (clip_by_global_norm, {"max_norm": 1.0, "ord": 1}),
        (clip_by_norm, {"threshold": 1.0, "ord": math.inf}),
        (clip_by_norm, {"threshold": 1.0, "scope": 0}),
        (normalize_by_norm, {"norm": 1.0, "ord": 2.0}),
    ],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_what_shapes_the_program_may_not_be_traced(factory, kwargs, compiled, standard_promotion):
    params = jnp.ones((3, 2))
    (name,) = kwargs.keys() & {"ord", "scope"}

    def step(static_args=()):
        tx = optax.inject_hyperparams(factory, static_args=static_args)(**kwargs)
        return tx.update(params, tx.init(params))[0]

    run = jax.jit(step, static_argnums=0) if compiled else step
    with pytest.raises(ValueError, match=rf"{name}.*static_args"):
        run()
    expected = factory(**kwargs)
    updates, _ = expected.update(params, expected.init(params))
    np.testing.assert_allclose(run((name,)), updates, rtol=1e-6)


@pytest.mark.parametrize("name", ["ord", "scope"])
def test_tracers_of_any_jit(name):
    with pytest.raises(ValueError, match=rf"{name}=.*static_args"):
        jax.jit(lambda value: tree_norms(TREE, **{name: value}))(1)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_traced_limits_do_not_raise(value):
    def all_of_them(value):
        for factory in (clip_by_value, clip_by_global_norm, clip_by_norm, normalize_by_norm):
            factory(value)
        clip_by_value(1.0, lower=value)
        return clip_tree(TREE, value)

    jax.jit(all_of_them)(value)
