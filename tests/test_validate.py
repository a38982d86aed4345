"""Bad input raises at once, with the argument's name and its value in the message."""

import functools
import inspect
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clip
from optax_clip import (
    ThresholdRule,
    adagc,
    adaptive_grad_clip,
    autoclip,
    box,
    clip_by_global_norm,
    clip_by_norm,
    clip_by_update_rms,
    clip_by_value,
    clip_singular_values,
    clip_tree,
    ema_ratio,
    global_norm,
    groups,
    init_box,
    initial,
    norm_ball,
    norm_shell,
    norm_sphere,
    normalize_by_norm,
    project,
    relative_to_params,
    rescale_weights,
    running_quantile,
    simplex,
    skip_spikes,
    spectral_ball,
    tree_norms,
    violation,
    window_quantile,
    zclip,
    zscore,
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
    if function is clip_by_value and (isinstance(value, list) or np.ndim(value)):
        pytest.skip("takes arrays and trees of numbers")
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


@pytest.mark.parametrize("value", [-5.0, np.float32(-5), jnp.float32(-5), -math.inf])
def test_a_given_norm_is_not_negative(value):
    with pytest.raises(ValueError, match=r"Expected norm >= 0, got norm="):
        clip_tree(TREE, 1.0, norm=value)
    tx = clip_by_global_norm(1.0)
    with pytest.raises(ValueError, match=r"Expected grad_norm >= 0, got grad_norm="):
        tx.update(TREE, tx.init(TREE), grad_norm=value)


@pytest.mark.parametrize("value", [math.nan, jnp.float32(math.nan)])
def test_a_given_norm_of_a_bad_step(value):
    clipped, norm = clip_tree(TREE, 1.0, norm=value, nonfinite="zero")
    assert math.isnan(float(norm)) and not np.any(clipped["w"])


def test_a_given_norm_is_that_of_the_whole_tree():
    with pytest.raises(ValueError, match=r"norm.*scope='leaf'"):
        clip_tree(TREE, 1.0, scope="leaf", norm=5.0)


def test_rules_are_pairs_of_functions():
    with pytest.raises(TypeError, match="threshold=ThresholdRule"):
        clip_by_norm(ThresholdRule(None, None))


@pytest.mark.parametrize("functions", [(None, max), (max, None), (3, "x")])
@pytest.mark.parametrize(
    "factory, name",
    [
        (clip_by_norm, "threshold"),
        (clip_by_global_norm, "max_norm"),
        (clip_by_update_rms, "max_rms"),
        (functools.partial(skip_spikes, optax.identity()), "rule"),
    ],
)
def test_a_rule_that_is_none(factory, name, functions):
    with pytest.raises(TypeError, match=f"{name}=ThresholdRule") as error:
        factory(ThresholdRule(*functions))
    assert repr(functions[0]) in str(error.value)


def test_a_label_without_a_limit():
    """It raises where the tree is first seen, and by the name of the argument."""
    tx = normalize_by_norm({"w": 1.0}, scope=groups(lambda path, leaf: path))
    with pytest.raises(ValueError, match=r"Expected norm for each label, got none for \['b'\]"):
        tx.init(TREE)
    state = tx.init({"w": TREE["w"]})
    with pytest.raises(ValueError, match="the tree that init saw"):  # a state is asked first whose it is
        tx.update(TREE, state)


@pytest.mark.parametrize(
    "signal, error",
    [
        ("params", ValueError),
        ("updates", ValueError),
        ("state", ValueError),
        ("class", TypeError),
        ("None", TypeError),
        ("1st", TypeError),
    ],
)
def test_signals(signal, error):
    with pytest.raises(error, match=f"signal='{signal}'"):
        rescale_weights(lambda path, leaf, peak: 1.0, signal=signal)


@pytest.mark.parametrize("factory", [spectral_ball, functools.partial(clip_singular_values, 1.0)])
def test_methods(factory):
    with pytest.raises(ValueError, match=r"Expected method to be .*, got method='qr'"):
        factory(method="qr")


# --- Bounds that are formulas, or relative to the start -------------------------------------------


def always(number):
    return lambda path, leaf: number


@pytest.mark.parametrize(
    "constraint, message",
    [
        (norm_ball(always(-1.0)), r"radius\('w', leaf\) >= 0, got radius\('w', leaf\)=-1\.0"),
        (norm_ball(always(-1.0), ord=1), r"radius\('w', leaf\)=-1\.0"),
        (norm_ball(always(-1.0), ord=math.inf), r"radius\('w', leaf\)=-1\.0"),
        (
            norm_ball(always(np.array([1.0, -1.0])), scope="unit"),
            r"radius\('w', leaf\) .*position \(1,\)",
        ),
        (simplex(always(-1.0)), r"total\('w', leaf\)=-1\.0"),
        (simplex(always(math.inf)), r"total\('w', leaf\)=inf"),
        (spectral_ball(always(-1.0)), r"radius\('w', leaf\)=-1\.0"),
        (norm_sphere(always(math.inf)), r"radius\('w', leaf\)=inf"),
        (norm_shell(always(math.inf), math.inf), r"lower\('w', leaf\)=inf"),
        (norm_shell(1.0, always(-1.0)), r"upper\('w', leaf\)=-1\.0"),
        (norm_shell(always(3.0), always(1.0)), r"lower\('w', leaf\)=3\.0 and upper\('w', leaf\)=1\.0"),
        (norm_shell(always(3.0), {"w": 1.0}), r"lower\('w', leaf\)=3\.0 and upper=1\.0"),
        (norm_shell({"w": 3.0}, always(1.0)), r"lower=3\.0 and upper\('w', leaf\)=1\.0"),
        (box(1.0, always(-1.0)), r"lower=1\.0 and upper\('w', leaf\)=-1\.0"),
        (box(always(math.nan), 1.0), r"lower\('w', leaf\)=nan"),
        (box(0.0, always(math.nan)), r"upper\('w', leaf\)=nan"),
    ],
    ids=str,
)
def test_numbers_of_formulas(constraint, message):
    tree = {"w": jnp.ones((3, 2))}
    with pytest.raises(ValueError, match=message):
        project(tree, constraint)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x: violation(x, constraint), tree)


def test_traced_numbers_of_formulas_pass():
    """A negative radius counts as 0."""
    shrink = jax.jit(lambda x, r: project(x, norm_ball(always(r))))
    assert not np.any(shrink(jnp.ones(3), -1.0))
    cross = jax.jit(lambda x, low, high: project(x, box(always(low), always(high))))
    assert np.all(np.isfinite(cross(jnp.ones(3), 2.0, 1.0)))


def test_bounds_relative_to_the_start_that_cross():
    with pytest.raises(ValueError, match=r"lower\.kappa=3\.0 and upper\.kappa=1\.0"):
        norm_shell(initial(3.0), initial(1.0))
    norm_shell(initial(1.0), initial(1.0))
    norm_shell(initial(3.0), 1.0)


@pytest.mark.parametrize(
    "make, name",
    [
        (lambda x: box(-1.0, x), "upper"),
        (lambda x: box(x, 1.0), "lower"),
        (lambda x: simplex(x), "total"),
        (lambda x: clip_by_value(x), "limit"),
        (lambda x: clip_by_value(x, lower=0.0), "limit"),
        (lambda x: clip_by_value(1.0, lower=x), "lower"),
        (lambda x: init_box(x), "kappa"),
    ],
)
def test_what_may_not_be_relative_to_the_start(make, name):
    with pytest.raises(TypeError, match=rf"{name}=initial\(2\.0\)"):
        make(initial(2.0))


# --- Rules and named algorithms -------------------------------------------------------------------

NOT_NUMBERS = [(math.nan, ValueError), ("0.5", TypeError), (None, TypeError), (True, TypeError)]
BELOW_0 = [(-0.1, ValueError), (np.float32(-1), ValueError), *NOT_NUMBERS]
NOT_COUNTS = [(-1, ValueError), (1.0, TypeError), ("3", TypeError), (True, TypeError)]
SHARES = [(1.5, ValueError), (math.inf, ValueError), *BELOW_0]
DECAYS = [(1.0, ValueError), (1, ValueError), (jnp.float32(1), ValueError), *BELOW_0]
ARGUMENTS = [
    (relative_to_params, {"ratio": BELOW_0, "eps": BELOW_0}),
    (window_quantile, {"q": SHARES, "window": [(0, ValueError), *NOT_COUNTS], "warmup": NOT_COUNTS}),
    (running_quantile, {"q": SHARES, "rate": BELOW_0, "warmup": NOT_COUNTS, "rearm": NOT_COUNTS}),
    (running_quantile, {"rearm": [(0, ValueError)]}),
    (zscore, {"z": BELOW_0, "decay": DECAYS, "warmup": NOT_COUNTS, "rearm": [(0, ValueError)]}),
    (zscore, {"max_norm": [case for case in BELOW_0 if case[0] is not None]}),
    (ema_ratio, {"ratio": BELOW_0, "decay": DECAYS, "warmup": NOT_COUNTS, "rearm": [(0, ValueError)]}),
    (ema_ratio, {"max_norm": BELOW_0}),
    (adaptive_grad_clip, {"ratio": BELOW_0, "eps": BELOW_0}),
    (autoclip, {"percentile": [(100.5, ValueError), (-1, ValueError), *NOT_NUMBERS]}),
    (autoclip, {"window": [(0, ValueError), *NOT_COUNTS]}),
    (zclip, {"z": BELOW_0, "decay": DECAYS, "warmup": NOT_COUNTS, "max_norm": [(-1.0, ValueError)]}),
    (adagc, {"ratio": BELOW_0, "decay": DECAYS, "warmup": NOT_COUNTS, "max_norm": BELOW_0}),
    (clip_by_update_rms, {"max_rms": BELOW_0}),
    (functools.partial(skip_spikes, optax.identity()), {"rule": BELOW_0}),
    (
        functools.partial(skip_spikes, optax.identity(), 1.0),
        {"max_consecutive": [(0, ValueError), *NOT_COUNTS], "name": [("", TypeError), (3, TypeError)]},
    ),
]
# The first argument, where it has no default.
NEEDED = {
    relative_to_params: {"ratio": 0.5},
    window_quantile: {"q": 0.5},
    running_quantile: {"q": 0.5},
    zscore: {"z": 2.0},
    ema_ratio: {"ratio": 1.05},
}


@pytest.mark.parametrize("factory, arguments", ARGUMENTS)
def test_arguments_of_rules(factory, arguments):
    for name, cases in arguments.items():
        for value, error in cases:
            with pytest.raises(error) as raised:
                factory(**NEEDED.get(factory, {}) | {name: value})
            assert re.search(rf"\b{name}=", str(raised.value)), raised.value
            assert repr(value) in str(raised.value)


def test_the_ends_of_the_ranges():
    for q in (0, 1, 0.0, 1.0, np.float32(0.5), jnp.float32(0.5)):
        window_quantile(q, window=1), running_quantile(q, rate=0, warmup=0, rearm=1)
        autoclip(100 * q)
    zscore(0, decay=0, warmup=0, max_norm=0, rearm=1)
    ema_ratio(0, decay=0, warmup=0, max_norm=0, rearm=1)
    relative_to_params(0, eps=0)
    skip_spikes(optax.identity(), 0, max_consecutive=1)


@pytest.mark.parametrize("factory", [relative_to_params, adaptive_grad_clip, zscore])
def test_rules_read_well(factory):
    name = "z" if factory is zscore else "ratio"
    with pytest.raises(ValueError, match=rf"^Expected {name} >= 0, got {name}=-1\.0\.$"):
        factory(-1.0)


@pytest.mark.parametrize(
    "tx",
    [
        adaptive_grad_clip(),
        clip_by_norm(relative_to_params(0.5)),
        clip_by_norm(relative_to_params(0.5), scope="global"),
        skip_spikes(optax.identity(), relative_to_params(0.5)),
    ],
)
def test_rules_that_need_params(tx):
    for step in (tx.update, jax.jit(tx.update)):
        with pytest.raises(ValueError, match=r"relative_to_params.*params=None"):
            step(TREE, tx.init(TREE))


@pytest.mark.parametrize("factory", [window_quantile, autoclip])
def test_a_window_may_not_be_traced(factory):
    for make in (jax.jit(lambda n: factory(0.5, window=n)), lambda n: factory(0.5, window=jnp.int32(n))):
        with pytest.raises(ValueError, match=r"window=.*static_args=\('window',\)"):
            make(3)


def test_a_window_under_inject_hyperparams():
    make = optax.inject_hyperparams(autoclip)
    with pytest.raises(ValueError, match=r"window=.*static_args=\('window',\)"):
        make(10, window=3).init(TREE)
    tx = optax.inject_hyperparams(autoclip, static_args=("window",))(10, window=3)
    tx.update(TREE, tx.init(TREE))


@pytest.mark.parametrize("value", [-1.0, 1.5, 200.0, math.nan])
def test_traced_numbers_of_rules_do_not_raise(value):
    def all_of_them(value):
        for factory, arguments in ARGUMENTS:
            for name in arguments.keys() - {"window", "warmup", "rearm", "max_consecutive", "name"}:
                factory(**NEEDED.get(factory, {}) | {name: value})

    jax.jit(all_of_them)(value)


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


# The arguments that a public function with `axis_name` cannot do without.
REQUIRED = {
    "max_norm": 1.0,
    "threshold": 1.0,
    "limit": 1.0,
    "tree": TREE,
    "inner": optax.identity(),
    "rule": 1.0,
    "lower": 0.0,
    "upper": 1.0,
    "radius": 1.0,
    "kappa": 1.0,
    "factors": lambda path, leaf, eta: None,
}
MAPPED = [
    name
    for name in optax_clip.__all__
    if name[0].islower()
    and callable(getattr(optax_clip, name))
    and "axis_name" in inspect.signature(getattr(optax_clip, name)).parameters
]


@pytest.mark.parametrize("name", MAPPED)
@pytest.mark.parametrize("axis_name", [["i"], ("i", ["j"]), ("i", None)], ids=str)
def test_axis_names(name, axis_name):
    function = getattr(optax_clip, name)
    needed = {key: x for key, x in REQUIRED.items() if key in inspect.signature(function).parameters}
    with pytest.raises((TypeError, ValueError), match=r"Expected axis_name .* got axis_name="):
        function(**needed, axis_name=axis_name)


def test_what_takes_an_axis_name():
    """All that computes a norm, or sums a metric."""
    assert {"clip_by_value", "norm_ball", "box", "simplex", "adagc", "skip_spikes"} <= set(MAPPED)
