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
        return state, (jnp.stack([updates["a"], updates["b"]]), limit, state.memory)

    return jax.jit(lambda norms, state: jax.lax.scan(step, state, norms)[1])


def run(name, norms, rule_state=None):
    """Clipped norms, smallest limit and rule state of each step; a short run is filled up with ones."""
    start = ALGORITHMS[name][0].init(PARAMS)
    if rule_state is not None:
        start = start._replace(memory=rule_state)
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
        before = state_at(states, t - 1) if t else ALGORITHMS[name][0].init(PARAMS).memory
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
    (state,) = run("adagc", norms)[2].values()
    gamma = state["gamma"]
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
    (states,) = states.values()  # under the name of the tree
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
    restored = serialization.from_bytes(ALGORITHMS[name][0].init(PARAMS).memory, saved)
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


@pytest.mark.parametrize(
    "tx", [autoclip(window=4), zclip(), clip_by_norm(window_zscore(2.0), scope="global")]
)
def test_leaves_that_do_not_count(tx):
    """In the scope global no weights have to tell of them."""
    tree = {"w": jnp.array([3.0, 4.0]), "i": jnp.arange(2), "none": None}
    updates, _ = tx.update(tree, tx.init(tree))
    assert updates["none"] is None and updates["i"] is tree["i"]
    np.testing.assert_array_equal(updates["w"], tree["w"])
