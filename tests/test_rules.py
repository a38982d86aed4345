"""Rules outside of a transform: their memory, the dtypes of norms, windows, values at the edge."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_clip import ema_ratio, relative_to_params, window_quantile, window_zscore, zscore
from test_thresholds import EPS, RULES, assert_same_bits

# --- Memory --------------------------------------------------------------------------------------

every_rule = pytest.mark.parametrize("rule", RULES)
every_dtype = pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64], ids=["float32", "float64"])
# Two scopes of one sign and size, as norms are.
SERIES = (
    np.exp(np.random.default_rng(2).normal(size=(90, 2))) * np.where(np.arange(90) < 50, 1, 30)[:, None]
)


def make(rule, **more):
    factory, _, kwargs, _ = RULES[rule]
    if rule == "window_quantile":
        kwargs = kwargs | {"window": 11}
    return factory(**kwargs | more)


@functools.partial(jax.jit, static_argnums=0)
def steps_of(rule, state, series):
    def step(state, norms):
        total = jnp.sqrt(jnp.sum(norms**2))
        limits, state = rule.update(norms, state, jnp.ones_like(norms), total)
        return state, (limits, state)

    return jax.lax.scan(step, state, series)[1]


def feed(rule, series, state=None, dtype=jnp.float32):
    """Limits and states, step by step, outside of any transform."""
    series = jnp.asarray(series, dtype)
    start = rule.init(jnp.zeros_like(series[0])) if state is None else state
    return jax.device_get(steps_of(rule, start, series))


@every_dtype
@every_rule
def test_the_first_memory_is_zeros(rule, dtype, x64):
    """A plain dict, of the dtype of the norms and int32, with names that nest in a path."""
    state = make(rule).init(jnp.zeros((2,), dtype))
    assert type(state) is dict and not any("/" in key for key in state)
    assert {x.dtype for x in state.values()} <= {jnp.dtype(dtype), jnp.dtype("int32")}
    assert not any(jnp.any(x != 0) for x in state.values())
    assert len({id(x) for x in state.values()}) == len(state)  # Else it cannot be donated.


@every_rule
def test_zeros_reset_a_memory(rule):
    """After 30 steps, in warm-up or long after it: not a bit differs from a new start."""
    for steps in (5, 30):
        _, states = feed(make(rule), SERIES[:steps])
        zeros = jax.tree.map(lambda x: jnp.zeros_like(x[-1]), states)
        assert_same_bits(feed(make(rule), SERIES, zeros), feed(make(rule), SERIES))


@every_dtype
@every_rule
def test_in_the_dtype_of_the_norms(rule, dtype, x64):
    """In float64 the limits are the oracle's to all its digits; states and limits keep the dtype."""
    _, oracle, kwargs, ulps = RULES[rule]
    kwargs = kwargs | ({"window": 11} if rule == "window_quantile" else {})
    wanted = oracle(**kwargs)
    series = SERIES.astype(dtype)
    expected = [wanted.step(n, np.ones(2), np.linalg.norm(n)) for n in series.astype(float)]
    limits, states = feed(make(rule), series, dtype=dtype)
    np.testing.assert_allclose(limits, expected, 4 * ulps * float(jnp.finfo(dtype).eps))
    assert limits.dtype == dtype
    assert {x.dtype for x in states.values()} <= {np.dtype(dtype), np.dtype("int32")}


@pytest.mark.parametrize("rearm", [3, jnp.int32(3)], ids=["int", "array"])
def test_rearming_sets_the_running_norm_to_the_true_one(rearm):
    """At the third clipped norm in a row; without a number the memory has no such count."""
    series = np.array([1.0, 1.0, 8.0, 9.0, 10.0, 8.0])[:, None]
    _, states = feed(ema_ratio(2.0, decay=0.5, warmup=2, max_norm=9.0, rearm=rearm), series)
    # 1, 1, then half of it and half of the limit 2 gamma: 1.5, 2.25, and instead of 3.375 the norm 10.
    np.testing.assert_array_equal(states["gamma"][:, 0], [1, 1, 1.5, 2.25, 10, 9])
    _, states = feed(ema_ratio(2.0, decay=0.5, warmup=2, max_norm=9.0), series)
    np.testing.assert_array_equal(states["gamma"][:5, 0], [1, 1, 1.5, 2.25, 3.375])
    assert "streak" not in states


# --- Windows -------------------------------------------------------------------------------------

# Many scopes of any size at once, since a rule works entry by entry.
SIZES = 10.0 ** np.random.default_rng(4).uniform(-30, 30, size=(12, 400))
CONSTANT_RULES = [
    zscore(0.0),
    zscore(0.0, warmup=3),
    window_zscore(0.0, window=7),
    window_quantile(0.37, window=7),
]


@pytest.mark.parametrize("q", [1.0, 1 - 2**-53, 1 - 1e-8, 0.9])
@every_dtype
def test_no_norm_is_above_the_maximum_of_its_window(dtype, q, x64):
    for size in (SIZES, 1 + 1e-6 * np.log(SIZES)):
        series = size.astype(dtype)
        limits, _ = feed(window_quantile(q, window=5), series, dtype=dtype)
        largest = np.array([series[max(0, t - 4) : t + 1].max(axis=0) for t in range(12)])
        assert np.all(limits <= largest) and (q < 1 or np.all(limits == largest))


@pytest.mark.parametrize("rule", CONSTANT_RULES, ids=str)
@every_dtype
def test_a_constant_is_never_above_its_limit(dtype, rule, x64):
    series = np.broadcast_to(SIZES[0].astype(dtype), (40, 400))
    assert np.all(series <= feed(rule, series, dtype=dtype)[0])
    if rule is CONSTANT_RULES[2]:  # Of a loss, which may be negative.
        assert np.all(-series <= feed(rule, -series, dtype=dtype)[0])


def test_weights_beyond_float32(x64):
    """In the dtype of the weights: 0.01 times 1e60, and never below 0.01 times the least norm."""
    rule = relative_to_params(0.01)
    norms, weights = jnp.array([1.0, 1.0]), jnp.array([1e60, 0.0])
    limits, _ = rule.update(norms, rule.init(norms), weights, jnp.float64(2.0))
    np.testing.assert_allclose(limits, [1e58, 1e-5], 1e-15)
    for ratio, limit in ((0.01, jnp.inf), (2e-60, 2.0)):  # Beside gradients in float32.
        rule = relative_to_params(ratio)
        limits, _ = rule.update(norms.astype("float32"), {}, weights, jnp.float32(2.0))
        assert limits.dtype == jnp.float32 and limits[0] == limit


class SkipByZScore:
    """What OLMo-core's optimizer looks at, in NumPy: the last values, the newest not among them."""

    def __init__(self, z, window):
        self.z, self.window, self.values = z, window, []

    def limit(self, value):
        last = np.array(self.values[-self.window :])
        if np.isfinite(value):
            self.values.append(value)
        if len(last) < self.window / 2:
            return math.inf
        return np.mean(last) + self.z * np.std(last, ddof=1)


@every_dtype
def test_window_zscore_of_losses(dtype, x64):
    """A loss with a NaN, an inf, a spike, a change of level, and negative values, as of a likelihood."""
    random = np.random.default_rng(3)
    losses = 2 * np.exp(-np.arange(600) / 80) - 1 + 0.05 * random.normal(size=600)
    losses[[10, 70, 300]] = math.nan, math.inf, 7.0
    losses[400:] += 3
    losses = losses.astype(dtype)
    oracle = SkipByZScore(4.0, 64)
    expected = np.array([oracle.limit(x) for x in losses.astype(float)])
    limits, states = feed(window_zscore(4.0, window=64), losses, dtype=dtype)
    np.testing.assert_allclose(limits, expected, 64 * float(jnp.finfo(dtype).eps), 1e-6)
    assert np.isinf(limits[:33]).all() and np.isfinite(limits[33:]).all()  # 32 values, and one NaN.
    assert losses[300] > limits[300] and losses[400] > limits[400]
    assert np.all(losses[464:] <= limits[464:]) and np.min(losses[200:300]) < 0
    np.testing.assert_array_equal(states["values"][-1], losses[-64:])
    assert states["seen"][-1] == 598


def test_window_zscore_counts_zeros():
    limits, _ = feed(window_zscore(1.0, window=4), np.array([0.0, 0.0, 2.0, 0.0, 2.0, -2.0, 0.0]))
    # The last four each: of 0, 0, 2, 0, of 0, 2, 0, 2, of 2, 0, 2, -2.
    root = np.sqrt
    expected = [math.inf, math.inf, 0, 2 / 3 + root(4 / 3), 0.5 + 1, 1 + root(4 / 3), 0.5 + root(11 / 3)]
    np.testing.assert_allclose(limits, expected, 4 * EPS)


def test_a_window_shapes_the_program():
    with pytest.raises(ValueError, match="static_args"):
        jax.jit(lambda window: window_zscore(6.0, window=window).init(jnp.zeros(())))(8)
    for window, error in ((1, ValueError), (2.5, TypeError)):
        with pytest.raises(error, match="window"):
            window_zscore(6.0, window=window)
    with pytest.raises(ValueError, match="z >= 0"):
        window_zscore(-1.0)
