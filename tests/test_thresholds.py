"""Rules: each against its oracle in every scope, and what a bad step may not do to any of them."""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization

import reference
from benchmarks import poison
from optax_clip import (
    adagc,
    autoclip,
    clip_by_global_norm,
    clip_by_norm,
    ema_ratio,
    metrics,
    relative_to_params,
    running_quantile,
    window_quantile,
    window_zscore,
    zclip,
    zscore,
)

EPS = float(jnp.finfo(jnp.float32).eps)
SCOPES = ("global", "leaf", "unit")

# --- Against the oracles -------------------------------------------------------------------------

# Rule, oracle, the arguments of both, and how many eps of float32 the limits may be off. The first two
# are exact but for the norm itself; the others add up roundings, a running quantile half an eps a step.
LENGTH = 400
RULES = {
    "relative_to_params": (relative_to_params, reference.RelativeToParams, {"ratio": 0.5}, 4),
    "window_quantile": (
        window_quantile,
        reference.WindowQuantile,
        {"q": 0.3, "window": 37, "warmup": 5},
        4,
    ),
    "window_zscore": (window_zscore, reference.WindowZScore, {"z": 1.0, "window": 29}, 32),
    "running_quantile": (
        running_quantile,
        reference.RunningQuantile,
        {"q": 0.6, "rate": 0.02, "warmup": 7, "rearm": 20},
        LENGTH // 2,
    ),
    "zscore": (
        zscore,
        reference.ZScore,
        {"z": 2.0, "decay": 0.9, "warmup": 12, "max_norm": 200.0, "rearm": 15},
        64,
    ),
    "ema_ratio": (
        ema_ratio,
        reference.EmaRatio,
        {"ratio": 1.2, "decay": 0.95, "warmup": 20, "max_norm": 3.0, "rearm": 15},
        16,
    ),
}
SHAPES = {"bias": (2,), "half": (4, 2), "kernel": (3, 2)}


@functools.cache
def bad_weather():
    """Weights, and gradients of LENGTH steps: spikes, NaN, inf, zeros, and a lasting change of level."""
    random = np.random.default_rng(0)
    size = np.exp(0.3 * random.normal(size=LENGTH))
    size[[3, 60, 61, 150, 300]] *= 100
    size[200:340] *= 20
    shaped = {k: size.reshape(-1, *(1 for _ in shape)) for k, shape in SHAPES.items()}
    grads = {k: shaped[k] * random.normal(size=(LENGTH, *shape)) for k, shape in SHAPES.items()}
    grads["kernel"][[0, 15, 90]] = grads["bias"][[8, 9, 110]] = grads["bias"][40:80] = 0
    for k in SHAPES:
        grads[k][[5, 130]] = 0
    grads["kernel"][7, 0, 1] = grads["half"][100, 0, 0] = math.nan
    grads["bias"][101, 0], grads["kernel"][102, 1, 1] = math.inf, -math.inf
    params = {k: 3 * random.normal(size=shape) for k, shape in SHAPES.items()}
    dtypes = {k: "bfloat16" if k == "half" else "float32" for k in SHAPES}
    return jax.device_get([{k: jnp.asarray(x[k], dtypes[k]) for k in x} for x in (params, grads)])


def step_of(tree, t):
    return {k: x[t] for k, x in tree.items()}


@functools.cache
def expected(rule, scope, **changed):
    """The oracle's updates and metrics, step by step."""
    params, grads = bad_weather()
    _, oracle, kwargs, _ = RULES[rule]
    clip = reference.ClipByRule(lambda: oracle(**kwargs | changed), scope)
    return [clip.step(step_of(grads, t), params) for t in range(LENGTH)]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("rule", RULES)
def test_against_the_oracle(rule, scope):
    params, grads = bad_weather()
    factory, _, kwargs, ulps = RULES[rule]
    tx = clip_by_norm(factory(**kwargs), scope=scope)

    def step(state, grads):
        updates, state = tx.update(grads, state, params)
        return state, (updates, metrics(state))

    _, (updates, record) = jax.device_get(jax.lax.scan(step, tx.init(params), grads))
    rtol = ulps * EPS
    for t, (wanted, said) in enumerate(expected(rule, scope)):
        if not reference.is_finite(step_of(grads, t)):
            assert all(np.isnan(x[t]).all() for x in updates.values()), t
            continue
        for key, value in said.items():
            np.testing.assert_allclose(record[f"clip/{key}"][t], value, rtol, err_msg=f"{key} at {t}")
        for k in SHAPES:
            within = reference.wide(grads[k][t]) == wanted[k]
            np.testing.assert_array_equal(updates[k][t][within], grads[k][t][within])
            close = rtol + (k == "half") * 2.0**-8  # Half a unit in the last place of bfloat16.
            np.testing.assert_allclose(reference.wide(updates[k][t]), wanted[k], close)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("rule", RULES)
def test_the_weather_is_bad_enough(rule, scope):
    """Many steps are clipped, not all, and every rule that re-arms has to."""
    assert 0.1 < np.mean([said["fraction"] > 0 for _, said in expected(rule, scope)]) < 1
    if "rearm" in RULES[rule][2]:
        runs = expected(rule, scope), expected(rule, scope, rearm=10**6)
        once, never = ([said["norm_after"] for _, said in run] for run in runs)
        assert once != pytest.approx(never, rel=0.1, nan_ok=True)


@pytest.mark.parametrize("q", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(
    "rule, oracle",
    [(window_quantile, reference.WindowQuantile), (running_quantile, reference.RunningQuantile)],
)
def test_any_quantile(rule, oracle, q):
    """Norms that rise on every step: at q = 0 each of them is clipped, and never re-arms."""
    found, wanted = rule(q), oracle(q)
    norms = jnp.asarray(1.05 ** np.arange(200.0), jnp.float32)

    def step(state, norm):
        return tuple(reversed(found.update(norm, state, None, norm)))

    _, limits = jax.lax.scan(step, found.init(norms[0]), norms)
    np.testing.assert_allclose(limits, [wanted.step(n) for n in np.asarray(norms)], 64 * EPS)


# --- Bad steps -----------------------------------------------------------------------------------
#
# Two leaves of one entry each, so that a gradient is its norms, and the updates are the clipped ones.

STEPS = 1500
EVENT = 300
NOISE = 0.3 * np.exp(0.2 * np.random.default_rng(0).normal(size=(STEPS, 2)))
PARAMS = {"a": jnp.float32(1.0), "b": jnp.float32(0.0)}

# Transform, its oracle (as rule and scope), and for how many norms at first there is no limit yet.
ALGORITHMS = {
    "relative_to_params": (
        clip_by_norm(relative_to_params(0.25, eps=0.5)),
        lambda: reference.RelativeToParams(0.25, 0.5),
        "leaf",
        0,
    ),
    "window_quantile": (
        clip_by_norm(window_quantile(0.5, window=100, warmup=10)),
        lambda: reference.WindowQuantile(0.5, 100, 10),
        "leaf",
        10,
    ),
    "running_quantile": (
        clip_by_norm(running_quantile(0.5)),
        lambda: reference.RunningQuantile(0.5),
        "leaf",
        10,
    ),
    "zscore": (clip_by_norm(zscore(2.5)), lambda: reference.ZScore(2.5), "leaf", 25),
    "ema_ratio": (
        clip_by_global_norm(ema_ratio(1.05, rearm=50)),
        lambda: reference.EmaRatio(1.05, rearm=50),
        "global",
        99,
    ),
    "ema_ratio, leaf": (
        clip_by_norm(ema_ratio(1.05, rearm=50)),
        lambda: reference.EmaRatio(1.05, rearm=50),
        "leaf",
        99,
    ),
    "autoclip": (autoclip(), lambda: reference.WindowQuantile(0.1), "global", 1),
    "zclip": (zclip(), lambda: reference.ZScore(2.5), "global", 25),
    "adagc": (adagc(), lambda: reference.EmaRatio(1.05), "leaf", 99),
}
ADAGC = ["ema_ratio", "ema_ratio, leaf", "adagc"]
LEARNING = [name for name in ALGORITHMS if name != "relative_to_params"]
WARMUP = {name: warmup for name, (*_, warmup) in ALGORITHMS.items()}

every_algorithm = pytest.mark.parametrize("name", ALGORITHMS)
every_learner = pytest.mark.parametrize("name", LEARNING)
every_follower = pytest.mark.parametrize("name", [name for name in LEARNING if name != "adagc"])


@functools.cache
def compiled(name):
    tx = ALGORITHMS[name][0]

    def step(state, norms):
        updates, state = tx.update({"a": norms[0], "b": norms[1]}, state, PARAMS)
        limit = metrics(state)["clip/threshold"]
        return state, (jnp.stack([updates["a"], updates["b"]]), limit, state.rule_state)

    return jax.jit(lambda norms, state: jax.lax.scan(step, state, norms)[1])


def run(name, norms, rule_state=None):
    """Clipped norms, smallest limit and rule state of each step; a short run is filled up with ones."""
    start = ALGORITHMS[name][0].init(PARAMS)
    if rule_state is not None:
        start = start._replace(rule_state=rule_state)
    padded = np.ones((STEPS, 2), np.float32)
    padded[: len(norms)] = norms
    results = jax.device_get(compiled(name)(padded, start))
    return jax.tree.map(lambda x: x[: len(norms)], results)


@functools.cache
def clean(name):
    return run(name, NOISE)


def state_at(states, step):
    return jax.tree.map(lambda x: x[step], states)


def passed(clipped, norms):
    """Which share of the gradient is let through, step by step."""
    return np.linalg.norm(clipped, axis=1) / np.linalg.norm(norms, axis=1)


def assert_same_bits(tree, expected):
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@every_algorithm
def test_a_step_that_is_not_finite(name, bad):
    """Not a bit of the statistics changes, in warm-up, at its end, later; the rest is as without it."""
    steps = [0, 5, 9, 24, 98, 99, EVENT, EVENT + 1]
    norms = np.insert(NOISE, np.array(steps) - np.arange(len(steps)), (bad, 1.0), axis=0)
    clipped, _, states = run(name, norms[:STEPS])
    for t in steps:
        assert np.isnan(clipped[t]).all()
        before = state_at(states, t - 1) if t else ALGORITHMS[name][0].init(PARAMS).rule_state
        assert_same_bits(state_at(states, t), before)
    rest = np.delete(clipped, steps, axis=0)
    assert_same_bits(rest, clean(name)[0][: len(rest)])


@every_learner
def test_one_spike(name):
    """It is cut to less than twice the usual, and moves the later limits by less than 2 percent."""
    norms = NOISE.copy()
    norms[EVENT] *= 1e4
    clipped, limits, _ = run(name, norms)
    assert np.all(clipped[EVENT] < 2 * NOISE.mean())
    before, now = clean(name), (clipped, limits)
    for i in (0, 1):
        np.testing.assert_allclose(now[i][EVENT + 1 :], before[i][EVENT + 1 :], 0.02)


@every_follower
def test_a_lasting_rise(name):
    """Five times larger norms pass as freely as before after so many steps: the window, or 70."""
    steps = {"window_quantile": 100, "autoclip": 1000}.get(name, 70)
    norms = NOISE.copy()
    norms[EVENT:] *= 5
    share, usual = passed(run(name, norms)[0], norms), passed(clean(name)[0], NOISE)
    assert np.all(share[EVENT : EVENT + 20] < 0.6 * usual[EVENT : EVENT + 20])
    assert np.all(share[EVENT + steps :] > 0.9 * usual[EVENT + steps :])
    np.testing.assert_allclose(share[-100:].mean(), usual[-100:].mean(), 0.01)


def test_adagc_follows_a_rise_as_the_paper_has_it():
    """A step in which all is clipped raises gamma by (1 - 0.98) (1.05 - 1) = 0.1 percent."""
    norms = NOISE.copy()
    norms[EVENT:] *= 50
    gamma = run("adagc", norms)[2]["gamma"]
    np.testing.assert_allclose(gamma[EVENT + 501] / gamma[EVENT + 1], 1.001**500, 1e-4)


@every_learner
def test_a_lasting_fall(name):
    """The limits, too, are a fifth of what they were, to 10 percent: after the window, or 330 steps.

    A running quantile needs ln 5 / (rate (1 - q)) = 322, the others a few times 1 / (1 - decay).
    """
    steps = {"window_quantile": 100, "autoclip": 1000}.get(name, 330)
    norms = NOISE.copy()
    norms[EVENT:] /= 5
    clipped, limits, _ = run(name, norms)
    np.testing.assert_allclose(5 * limits[EVENT + steps :], clean(name)[1][EVENT + steps :], 0.1)
    share, usual = passed(clipped, norms), passed(clean(name)[0], NOISE)
    assert np.all(share[EVENT:] > 0.9 * usual[EVENT:])


# From step, to step: at the start, through the whole warm-up, in the middle.
DROUGHTS = [(0, 20), (0, 150), (400, 460)]


@pytest.mark.parametrize("start, stop", DROUGHTS)
@every_learner
def test_a_leaf_without_a_gradient(name, start, stop):
    """It learns nothing from zeros, is not locked when it wakes, and the leaf beside does not notice."""
    norms = NOISE.copy()
    norms[start:stop, 0] = 0
    clipped, _, _ = run(name, norms)
    usual = clean(name)[0]
    asleep = norms[:, 0] == 0
    assert np.all(clipped[asleep, 0] == 0)
    assert np.all(clipped[~asleep, 0] > 0.2 * norms[~asleep, 0])
    np.testing.assert_allclose(passed(clipped, norms)[-100:], passed(usual, NOISE)[-100:], 0.05)
    if ALGORITHMS[name][2] == "leaf":
        np.testing.assert_allclose(clipped[:, 1], usual[:, 1], 16 * EPS)
        if name not in ADAGC:  # Whose steps count.
            alone = run(name, norms[~asleep])[0]
            np.testing.assert_allclose(clipped[~asleep, 0], alone[:, 0], 16 * EPS)


@pytest.mark.parametrize("start, stop", DROUGHTS)
@every_learner
def test_no_gradient_at_all(name, start, stop):
    norms = NOISE.copy()
    norms[start:stop] = 0
    clipped, _, states = run(name, norms)
    assert np.all(clipped[start:stop] == 0)
    assert np.all(clipped[stop:] > 0.2 * norms[stop:])
    before, after = state_at(states, start - 1), state_at(states, stop - 1)
    for key in before.keys() - {"seen"} if start > 0 else ():
        assert_same_bits(before[key], after[key])


@every_learner
def test_norms_without_variance(name):
    """Constant norms pass whole, or all but one step of a running quantile; so do 1 percent larger ones,
    after the window, or 60 steps, and until then 99 percent of them.
    """
    steps = {"window_quantile": 100, "autoclip": 1000}.get(name, 60)
    norms = np.full((STEPS, 2), 0.25)
    norms[EVENT:] *= 1.01
    share = passed(run(name, norms)[0], norms)
    rate = 0.01 * (name == "running_quantile")
    assert np.all(share[:EVENT] > (1 - rate) * (1 - 8 * EPS))
    assert np.all(share[EVENT:] > (1 - rate) / 1.01 * (1 - 8 * EPS))
    assert np.all(share[EVENT + steps :] > (1 - rate) * (1 - 0.001))


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e30])
@every_learner
def test_the_first_step(name, size):
    """Nothing to compare it with: it passes, but for AdaGC's limit of 1 on the whole tree."""
    norms = np.float32(size) * np.array([[0.75, 1.0]], np.float32)  # 1.25 in all.
    clipped, _, _ = run(name, norms)
    if name in ADAGC and size >= 1:
        np.testing.assert_allclose(clipped, [[0.6, 0.8]], 4 * EPS)
    else:
        assert_same_bits(clipped, norms)


@every_learner
def test_the_end_of_the_warm_up(name):
    """A hundredfold norm passes as its last one, at most scaled to 1, and is cut as the next one."""
    last = WARMUP[name] - 1
    norms = NOISE.copy()
    norms[last] *= 100
    clipped, limits, _ = run(name, norms)
    if name in ADAGC:
        np.testing.assert_allclose(np.linalg.norm(clipped[last]), 1.0, 8 * EPS)
    else:
        np.testing.assert_array_equal(clipped[last], norms[last].astype(np.float32))
    norms = NOISE.copy()
    norms[last + 1] *= 100
    clipped, limits, _ = run(name, norms)
    assert np.all(clipped[last + 1] < 0.15 * norms[last + 1])
    if last:
        assert np.all(np.isinf(limits[: last + 1]))
    assert np.isfinite(limits[last + 1])


@pytest.mark.parametrize("steps", [1, 5, 15, 60, EVENT])
@every_learner
def test_a_restart(name, steps):
    """From a checkpoint, also in mid warm-up: not a bit differs from a run without."""
    clipped, limits, states = clean(name)
    saved = serialization.to_bytes(state_at(states, steps - 1))
    restored = serialization.from_bytes(ALGORITHMS[name][0].init(PARAMS).rule_state, saved)
    now = run(name, NOISE[steps:], restored)
    assert_same_bits(now, jax.tree.map(lambda x: x[steps:], (clipped, limits, states)))


@pytest.mark.parametrize("size", [1e-30, 1e30])
@every_algorithm
def test_sizes_near_the_ends_of_the_range(name, size):
    """As the oracle has it, through a rise too. A logarithm near 70 has an error of 32 eps."""
    _, oracle, scope, _ = ALGORITHMS[name]
    norms = (size * NOISE[:EVENT]).astype(np.float32)
    norms[150:] *= 5
    clip = reference.ClipByRule(oracle, scope)
    params = {key: np.asarray(x) for key, x in PARAMS.items()}
    expected = [clip.step({"a": a, "b": b}, params) for a, b in norms]
    clipped, limits, _ = run(name, norms)
    rtol = (128 if name == "running_quantile" else 64) * EPS
    np.testing.assert_allclose(limits, [said["threshold"] for _, said in expected], rtol)
    np.testing.assert_allclose(clipped, [[tree["a"], tree["b"]] for tree, _ in expected], rtol)


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


# --- The page about them -------------------------------------------------------------------------

PAGE = (Path(__file__).parents[1] / "docs" / "thresholds.md").read_text("utf-8")


def test_the_table_of_the_page_is_what_the_program_prints():
    """If not: `python -m benchmarks.poison`."""
    assert poison.table() in PAGE


@pytest.mark.parametrize("max_norm", [1.0, 1e-3])
def test_adagc_clips_a_huge_first_gradient_in_its_direction(max_norm):
    tx = adagc(max_norm=max_norm)
    grads = jnp.array([6e37, 8e37])
    updates, _ = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(updates, [0.6 * max_norm, 0.8 * max_norm], rtol=1e-6)
