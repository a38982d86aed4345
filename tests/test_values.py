"""Value objects: equal calls make equal, hashable, copyable, picklable values that print as called."""

import copy
import functools
import inspect
import pickle
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clip as oc
from optax_clip._values import value_object


class Made(NamedTuple):
    """Such as a rule or a set: functions, and a field with a default."""

    call: Callable
    flag: bool = False


@value_object
def made(a, b=2.0, *, c=None, d="x"):
    """What it is for."""
    return Made(lambda x: (a, b, c, d, x))


@value_object
def renamed(a):
    return made(a, c=1)


def double(x):
    return 2 * x


def of(*args, **kwargs):
    """Two calls with arguments that are equal, but not the same objects where that can be."""
    return made(*args, **kwargs), made(*copy.deepcopy(args), **copy.deepcopy(kwargs))


EQUAL = [
    of(1.0),
    of(1),
    (made(1), made(1.0)),
    (made(1.0), made(1.0, 2.0, c=None, d="x")),
    (made(1.0, 3.0), made(b=3.0, a=1.0)),
    of("leaf", c=(0, 1)),
    of(None),
    of(double),
    of(np.float32(1.5)),
    of(np.arange(6.0).reshape(2, 3)),
    of(jnp.arange(3)),
    (made(jnp.arange(3)), made(np.arange(3, dtype=np.int32))),
    of(jnp.bfloat16(0.5)),
    of({"kernel": np.ones(2), "bias": [1.0, jnp.zeros(())]}),
    (made({"x": 1, "y": 2}), made({"y": 2, "x": 1})),
    of(made(3.0), c=[made("x")]),
    of(jax.ShapeDtypeStruct((2,), "float32")),
    (renamed(1), renamed(1)),
]
UNEQUAL = [
    (made(1.0), made(2.0)),
    (made(1.0), made(1.0, c=1)),
    (made(1.0), made("1.0")),
    (made(double), made(lambda x: 2 * x)),
    (made(np.ones(2)), made(np.ones(3))),
    (made(np.ones(2)), made(np.ones((2, 1)))),
    (made(np.ones(2)), made(np.ones(2, "float32"))),
    (made(np.ones(2)), made(np.array([1.0, 2.0]))),
    (made(np.zeros(2, "int32")), made(np.zeros(2, "float32"))),
    (made([1.0]), made((1.0,))),
    (made({"x": 1}), made({"y": 1})),
    (made(None), made(())),
    (made(made(1)), made(made(2))),
    (made(1, c=1), renamed(1)),
    (made(1.0), Made(double)),
    (made(1.0), tuple(made(1.0))),
]


@pytest.mark.parametrize("x, y", EQUAL)
def test_equal_calls(x, y):
    assert x is not y and [x == y, x != y] == [True, False]
    assert hash(x) == hash(y) and len({x, y}) == 1


@pytest.mark.parametrize("x, y", UNEQUAL)
def test_unequal_calls(x, y):
    assert [x == y, y == x, x != y, y != x] == [False, False, True, True]
    assert x == x and len({x, y, x}) == 2


@pytest.mark.parametrize("pair", EQUAL)
def test_copies_and_pickles(pair):
    for x in pair:
        copies = [copy.copy(x), copy.deepcopy(x)]
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
            copies.append(pickle.loads(pickle.dumps(x, protocol)))
        for y in copies:
            assert y == x and hash(y) == hash(x) and type(y) is type(x) and repr(y) == repr(x)


@pytest.mark.parametrize(
    "value, text",
    [
        (made(2.5), "made(2.5)"),
        (made(a=2.5, d="y", c=1), "made(2.5, c=1, d='y')"),
        (made(2.5, 2.0), "made(2.5, 2.0)"),
        (made(1, c=double), "made(1, c=double)"),
        (made(made(1), c=[made(2)]), "made(made(1), c=[made(2)])"),
        (renamed(3), "renamed(3)"),
        (oc.zscore(2.5, decay=0.97), "zscore(2.5, decay=0.97)"),
        (oc.zscore(z=2.5), "zscore(2.5)"),
        (oc.window_quantile(0.5, window=None), "window_quantile(0.5, window=None)"),
    ],
)
def test_print_as_called(value, text):
    assert repr(value) == str(value) == text


def test_a_positional_argument_after_one_left_out_is_named():
    @value_object
    def far(a=1, b=2):
        return Made(double)

    assert repr(far(b=3)) == "far(b=3)"


def test_the_factory_looks_as_before():
    assert made.__doc__ == "What it is for." and made.__name__ == "made"
    assert str(inspect.signature(made)) == "(a, b=2.0, *, c=None, d='x')"
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'a'"):
        made()


def test_what_is_made_is_a_tuple_as_before():
    """Fields, order, class; with a field replaced, or as JAX rebuilds it, a plain one."""
    x = made(1.0)
    call, flag = x
    assert (
        isinstance(x, Made) and x.call is call and x.flag is flag is False and x._fields == Made._fields
    )
    for y in (x._replace(flag=True), jax.tree.map(lambda leaf: leaf, x), Made(*x)):
        assert type(y) is Made and y.call is call
        assert y != x and x != y
    assert x._replace(flag=True).flag is True


def test_traced_arguments_compare_by_identity():
    seen = []

    @jax.jit
    def f(a):
        x, y = made(a), made(a)
        seen.extend([x == y, x == x, x != y, hash(x) == hash(x), "made(" in repr(x), len({x, y})])
        assert copy.deepcopy(x) is x
        return x.call(0)[0] + made({"a": [a]}).call(0)[0]["a"][0]

    assert f(1.0) == 2.0
    assert seen == [False, True, True, True, True, 2]


def test_what_cannot_be_compared_does_not_fail():
    class Odd:
        __hash__ = None

    for odd in (Odd(), {1: 0, "x": 0}, jax.random.key(0)):
        x = made(odd)
        assert x == x and x != made(odd) and hash(x) == hash(x)


# --- Rules ----------------------------------------------------------------------------------------

RULES = {
    "relative_to_params": lambda: oc.relative_to_params(0.1, eps=jnp.float32(1e-3)),
    "window_quantile": lambda: oc.window_quantile(0.5, window=4),
    "window_zscore": lambda: oc.window_zscore(6.0, window=4),
    "running_quantile": lambda: oc.running_quantile(np.float64(0.5), rate=0.1),
    "zscore": lambda: oc.zscore(2.5, max_norm=1.0),
    "ema_ratio": lambda: oc.ema_ratio(1.05, rearm=50),
}


@pytest.mark.parametrize("make", RULES.values(), ids=RULES)
def test_rules_are_values(make):
    x, y = make(), make()
    assert isinstance(x, oc.ThresholdRule) and x == y and hash(x) == hash(y)
    assert pickle.loads(pickle.dumps(x)) == x
    assert len({make(), *(other() for other in RULES.values())}) == len(RULES)


@pytest.mark.parametrize("make", RULES.values(), ids=RULES)
def test_equal_rules_give_one_trace(make):
    traces = []

    @functools.partial(jax.jit, static_argnames="rule")
    def step(norm, rule):
        traces.append(rule)
        return rule.update(norm, rule.init(norm), norm, norm)[0]

    for _ in range(3):
        step(jnp.float32(1.0), rule=make())
    assert len(traces) == 1
    step(jnp.float32(1.0), rule=oc.zscore(9.0))
    assert len(traces) == 2


def test_a_rule_made_by_hand_is_as_ever():
    init, update = oc.zscore(2.5)
    rule = oc.ThresholdRule(init, update)
    assert rule == oc.ThresholdRule(init, update) == (init, update)
    assert rule != oc.ThresholdRule(update, init)
    assert repr(rule).startswith("ThresholdRule(init=")


def test_rules_go_into_transforms(standard_promotion):
    """As they are, and as a hyperparameter that is not one."""
    params = jnp.ones(2)
    tx = optax.inject_hyperparams(oc.clip_by_norm, static_args=("threshold",))(oc.zscore(2.5, warmup=1))
    updates, _ = tx.update(params, tx.init(params))
    np.testing.assert_array_equal(updates, params)
