"""The named algorithms: against their formulas, against Optax where it has them, and `skip_spikes`."""

import functools
import inspect
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import reference
from optax_clip import (
    ThresholdRule,
    adagc,
    adaptive_grad_clip,
    autoclip,
    clip_by_global_norm,
    clip_by_norm,
    clip_by_update_rms,
    ema_ratio,
    metrics,
    skip_spikes,
    window_quantile,
    zclip,
    zscore,
)

EPS = float(jnp.finfo(jnp.float32).eps)
SHAPES = {"bias": (2,), "half": (5, 2), "kernel": (3, 2)}


def random_tree(seed, *lead, size=1.0):
    random = np.random.default_rng(seed)
    return {
        key: jnp.asarray(
            size * random.normal(size=(*lead, *shape)), "bfloat16" if key == "half" else "float32"
        )
        for key, shape in SHAPES.items()
    }


def stream(steps, seed=0):
    """Gradients of many steps, some of them spikes, one NaN, one zero."""
    size = np.exp(0.2 * np.random.default_rng(seed).normal(size=steps)) / 2
    size[[steps // 2, steps - 10]] *= 30
    size[steps // 3], size[steps // 4] = math.nan, 0
    grads = random_tree(seed, steps)
    return {k: x * jnp.asarray(size.reshape(-1, *[1] * (x.ndim - 1)), x.dtype) for k, x in grads.items()}


def at(tree, t):
    return jax.tree.map(lambda x: x[t], tree)


def run(tx, grads, params, state=None):
    """Updates and metrics of each step, and the last state."""

    def step(state, grads):
        updates, state = tx.update(grads, state, params)
        return state, (updates, metrics(state))

    start = tx.init(params) if state is None else state
    last, (updates, record) = jax.jit(lambda s, g: jax.lax.scan(step, s, g))(start, grads)
    return *jax.device_get((updates, record)), last


def assert_step(updates, record, expected, rtol):
    """One step against what an oracle returns, ``(tree, metrics)``."""
    tree, said = expected
    for key, value in said.items():
        np.testing.assert_allclose(record[f"clip/{key}"], value, rtol, err_msg=key)
    for key, x in updates.items():
        close = rtol + (key == "half") * 2.0**-8  # Half a unit in the last place of bfloat16.
        np.testing.assert_allclose(reference.wide(x), tree[key], close, err_msg=key)


# --- What the table of the design says ------------------------------------------------------------

DEFAULTS = {
    adaptive_grad_clip: {"ratio": 0.01, "eps": 1e-3, "scope": "unit"},
    autoclip: {"percentile": 10, "window": None},
    zclip: {"z": 2.5, "decay": 0.97, "warmup": 25, "max_norm": None},
    adagc: {"ratio": 1.05, "decay": 0.98, "warmup": 100, "max_norm": 1.0},
    clip_by_update_rms: {"max_rms": 1.0},
}
COMMON = {"nonfinite": "propagate", "axis_name": None, "name": "clip", "record": True}
NAMED = list(DEFAULTS)

every_algorithm = pytest.mark.parametrize("factory", NAMED, ids=lambda f: f.__name__)


def defaults_of(function):
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


@every_algorithm
def test_defaults(factory):
    assert defaults_of(factory) == DEFAULTS[factory] | COMMON


def test_defaults_of_skip_spikes():
    assert defaults_of(skip_spikes) == {
        "value_rule": None,
        "max_consecutive": 50,
        "axis_name": None,
        "name": "skip",
        "record": True,
    }


# --- Against the formulas -------------------------------------------------------------------------


def each_on_its_own(clip):
    """An oracle without memory as one of steps."""
    return lambda: clip


def clip_rms(leaves, params, limit=0.7):
    """u / max(1, RMS(u) / d), leaf by leaf."""
    return reference.clip_by_norm(leaves, limit, "leaf", "rms")


def stepper(*args):
    return lambda: reference.ClipByRule(*args).step


ORACLES = {
    "adaptive_grad_clip": (
        adaptive_grad_clip(0.3),
        each_on_its_own(functools.partial(reference.agc, ratio=0.3)),
    ),
    "autoclip": (autoclip(), stepper(lambda: reference.WindowQuantile(0.1))),
    "autoclip, window": (autoclip(25.0, window=20), stepper(lambda: reference.WindowQuantile(0.25, 20))),
    "zclip": (zclip(), stepper(lambda: reference.ZScore(2.5))),
    "zclip, max_norm": (zclip(max_norm=1.5), stepper(lambda: reference.ZScore(2.5, max_norm=1.5))),
    "adagc": (adagc(), stepper(lambda: reference.EmaRatio(1.05), "leaf")),
    "clip_by_update_rms": (clip_by_update_rms(0.7), each_on_its_own(clip_rms)),
}


@pytest.mark.parametrize("id", ORACLES)
def test_against_the_oracle(id):
    tx, make = ORACLES[id]
    step, grads, params = make(), stream(240), random_tree(1)
    updates, record, _ = run(tx, grads, params)
    host, weights = jax.device_get((grads, params))
    clipped = nonfinite = 0
    for t in range(240):
        tree, said = step(at(host, t), weights)
        finite = reference.is_finite(at(host, t))
        clipped, nonfinite = clipped + (said["fraction"] > 0), nonfinite + (not finite)
        counters = {"steps": t + 1, "steps_clipped": clipped, "steps_nonfinite": nonfinite}
        if not finite:
            said = {"norm_before": math.nan, "norm_after": math.nan, "fraction": 0}
        assert_step(at(updates, t), at(record, t), (tree, said | counters), 64 * EPS)
    assert nonfinite == 1 and 1 <= clipped < 240


def test_autoclip_is_a_percentile():
    """Of the last 1000 norms, as `numpy.percentile` has it."""
    norms = np.exp(np.random.default_rng(0).normal(size=1100)).astype(np.float32)
    updates, record, _ = run(autoclip(10), norms, jnp.zeros(()))
    expected = [np.percentile(norms[max(0, t - 999) : t + 1], 10) for t in range(1100)]
    np.testing.assert_allclose(record["clip/threshold"], expected, 4 * EPS)
    np.testing.assert_allclose(updates, np.minimum(norms, expected), 4 * EPS)


@pytest.mark.parametrize("max_rms", [1.0, 0.5, jnp.float32(2.0), lambda step: 1.0])
def test_update_rms_by_its_formula(max_rms):
    tx = clip_by_update_rms(max_rms)
    update = random_tree(2, size=3.0)
    updates, _ = jax.jit(tx.update)(update, tx.init(update))
    limit = 1.0 if callable(max_rms) else float(max_rms)
    for key, x in update.items():
        x = reference.wide(x)
        expected = x / max(1.0, np.sqrt(np.mean(x**2)) / limit)
        np.testing.assert_allclose(
            reference.wide(updates[key]), expected, 2.0**-8 if key == "half" else 4 * EPS
        )


# --- Against Optax --------------------------------------------------------------------------------


def in_float32(tree):
    return jax.tree.map(lambda x: x.astype("float32"), tree)


def assert_same_updates(tx, other, grads, params):
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    expected, _ = jax.jit(other.update)(grads, other.init(params), params)
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)
    assert any(jnp.any(x != y) for x, y in zip(*map(jax.tree.leaves, (updates, grads)), strict=True))


def test_as_optax_adaptive_grad_clip(standard_promotion):
    """Kernels of rank 2 and 4, and vectors; of a convolution's rank 3 Optax reduces axis 0 alone."""
    grads, params = (in_float32(random_tree(seed)) for seed in (3, 4))
    kernel = np.random.default_rng(5).normal(size=(2, 3, 3, 2, 4))
    grads["conv"], params["conv"] = jnp.asarray(kernel, jnp.float32)
    grads["wide"], params["wide"] = grads["conv"][:1, :1, 0], params["conv"][:1, :1, 0]
    grads["row"], params["row"] = grads["conv"][:1, 0, 0], params["conv"][:1, 0, 0]
    assert_same_updates(adaptive_grad_clip(0.5), optax.adaptive_grad_clip(0.5), grads, params)
    grads, params = {"w": grads["conv"][0]}, {"w": params["conv"][0]}
    tx = adaptive_grad_clip(0.5, scope=0)
    assert_same_updates(tx, optax.adaptive_grad_clip(0.5), grads, params)


def test_as_optax_clip_by_block_rms():
    grads = in_float32(random_tree(6, size=3.0))
    assert_same_updates(clip_by_update_rms(0.7), optax.clip_by_block_rms(0.7), grads, grads)


# --- What all of them take ------------------------------------------------------------------------


@every_algorithm
def test_nonfinite(factory):
    params = {"kernel": jnp.ones((3, 2))}
    bad = {"kernel": params["kernel"].at[0, 0].set(math.inf)}
    for policy, value in (("propagate", math.nan), ("zero", 0.0)):
        tx = factory(nonfinite=policy, name="mine")
        updates, state = jax.jit(tx.update)(bad, tx.init(params), params)
        expected = jax.tree.map(lambda x, value=value: jnp.full_like(x, value), params)
        chex.assert_trees_all_equal(updates, expected)
        assert metrics(state)["mine/steps_nonfinite"] == 1


@pytest.mark.parametrize(
    "factory",
    [*NAMED, functools.partial(skip_spikes, optax.identity(), 3.0)],
    ids=[*(f.__name__ for f in NAMED), "skip_spikes"],
)
def test_axis_name(factory):
    """Each of four copies holds a part of every unit; together they do what one alone does."""
    params = {"kernel": jnp.arange(1.0, 9).reshape(4, 2), "bias": jnp.arange(1.0, 5)}
    grads = {"kernel": params["kernel"][::-1] * 5, "bias": params["bias"] * 3}
    rule = {} if factory is not adaptive_grad_clip else {"ratio": 0.5}

    def step(tx, grads, params):
        updates, state = tx.update(grads, tx.init(params), params)
        return updates, metrics(state)

    expected, said = jax.jit(lambda g, p: step(factory(**rule), g, p))(grads, params)
    split = functools.partial(jax.tree.map, lambda x: x[:, None])
    mapped = jax.vmap(lambda g, p: step(factory(axis_name="i", **rule), g, p), axis_name="i")
    updates, record = jax.jit(mapped)(split(grads), split(params))
    chex.assert_trees_all_close(updates, split(expected), rtol=1e-6)
    chex.assert_trees_all_close(record, jax.tree.map(lambda x: jnp.full(4, x), said), rtol=1e-6)


# --- State ----------------------------------------------------------------------------------------


def shapes(tx, tree):
    state = tx.init(tree).memory
    _, after = jax.eval_shape(tx.update, tree, tx.init(tree))
    assert jax.tree.map(jax.typeof, after.memory) == jax.tree.map(jax.typeof, state)
    assert {x.dtype.name for x in jax.tree.leaves(state)} == {"float32", "int32"}
    return [x.shape for x in jax.tree.leaves(state)]


def test_what_the_state_holds():
    """One entry for the whole tree, whatever its shapes; one a leaf; one a unit."""
    tree, other = random_tree(0), {"w": jnp.ones((7, 5, 3))}
    for tx in (zclip(), autoclip(window=8), clip_by_global_norm(ema_ratio(1.05))):
        assert shapes(tx, tree) == shapes(tx, other)
    assert shapes(autoclip(window=8), tree) == [(), (8,)]
    assert shapes(zclip(), tree) == [()] * 4
    assert shapes(clip_by_norm(window_quantile(0.1, window=8)), tree) == [(3,), (8, 3)]
    assert shapes(adagc(), tree) == [(3,)] * 2
    assert shapes(clip_by_norm(ema_ratio(1.05, rearm=50)), tree) == [(3,)] * 3
    assert shapes(clip_by_norm(zscore(2.5), scope="unit"), tree) == [(5,)] * 4


# Ten lines that a user might write: twice the largest of the last four norms.
def init(norms):
    return jnp.full((4, *norms.shape), jnp.inf)


def update(norms, last, param_norms, total):
    shifted = jnp.concatenate([last[1:], norms[None]])
    return 2 * last.max(axis=0), jnp.where(jnp.isfinite(norms), shifted, last)


twice_the_largest = ThresholdRule(init, update)


class TwiceTheLargest(reference.Rule):
    def first(self):
        return [math.inf] * 4

    def limit(self, entry, n, weight, total):
        limit = 2 * max(entry)
        if math.isfinite(n):
            entry[:] = [*entry[1:], n]
        return limit


@pytest.mark.parametrize("scope", ["global", "leaf", "unit", 0, lambda path, x: "leaf"])
def test_a_rule_of_ones_own(scope):
    grads, params = stream(60), random_tree(1)
    updates, record, _ = run(clip_by_norm(twice_the_largest, scope=scope), grads, params)
    clip = reference.ClipByRule(TwiceTheLargest, scope)
    host = jax.device_get(grads)
    for t in range(60):
        expected = clip.step(at(host, t))
        if reference.is_finite(at(host, t)):
            assert_step(at(updates, t), at(record, t), expected, 4 * EPS)
    assert record["clip/steps_clipped"][-1] > 1


def test_a_rule_under_a_mask():
    """The norm is that of the leaves under the mask, as if there were no others."""
    grads, params = stream(60), random_tree(1)
    mask = {"bias": False, "half": True, "kernel": True}
    updates, record, _ = run(optax.masked(zclip(warmup=5), mask), grads, params)
    shown = [{k: x for k, x in tree.items() if mask[k]} for tree in (grads, params)]
    expected, said, _ = run(zclip(warmup=5), *shown)
    np.testing.assert_array_equal(updates.pop("bias"), grads["bias"])
    chex.assert_trees_all_equal((updates, record), (expected, said))


# --- Skipping -------------------------------------------------------------------------------------

PARAMS = {"w": jnp.array([0.5, -0.5]), "b": jnp.array([0.25])}
GRADS = {"w": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}  # Of norm 5.
BAD = {"w": jnp.array([jnp.nan, 0.0]), "b": jnp.array([jnp.inf])}
ZERO = jax.tree.map(jnp.zeros_like, PARAMS)

LIMITS = {
    "number": 10.0,
    "array": jnp.float32(10.0),
    "schedule": lambda step: 10.0 + 0 * step.astype("float32"),
    "rule": zscore(2.5, warmup=1, max_norm=10.0),
}


def times(factor):
    return BAD if math.isnan(factor) else jax.tree.map(lambda x: x * factor, GRADS)


def taken_and_counted(factors, limit=10.0, **options):
    """Which of some steps, multiples of a gradient of norm 5, are taken; and the metrics at the end."""
    tx = skip_spikes(optax.sgd(1.0), limit, **options)
    step, state, taken = jax.jit(tx.update), tx.init(PARAMS), []
    for factor in factors:
        updates, state = step(times(factor), state, PARAMS)
        wanted = jax.tree.map(jnp.negative, times(factor))
        taken.append(bool(jnp.any(updates["b"] != 0)))
        chex.assert_trees_all_equal(updates, wanted if taken[-1] else ZERO)
    return taken, metrics(state)


@pytest.mark.parametrize("limit", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_a_skipped_step_leaves_everything_alone(limit, compiled, standard_promotion):
    """Not a bit of the weights or of Adam's state differs; the next step is as if nothing had been."""
    tx = skip_spikes(optax.adam(0.1), limit)
    step = jax.jit(tx.update) if compiled else tx.update
    _, before = step(GRADS, tx.init(PARAMS), PARAMS)
    expected, _ = step(GRADS, before, PARAMS)
    for factor in (3.0, 1e30, math.nan):
        updates, after = step(times(factor), before, PARAMS)
        chex.assert_trees_all_equal(updates, ZERO)
        chex.assert_trees_all_equal(optax.apply_updates(PARAMS, updates), PARAMS)
        chex.assert_trees_all_equal(after.inner_state, before.inner_state)
        chex.assert_trees_all_equal(step(GRADS, after, PARAMS)[0], expected)


def test_what_is_counted():
    """Taken, spike, NaN, zero, just at the limit, spike."""
    taken, found = taken_and_counted([1.0, 3.0, math.nan, 0.0, 2.0, 4.0])
    assert taken == [True, False, False, False, True, False]  # A zero step is no step either way.
    assert {key: float(x) for key, x in found.items()} == {
        "skip/norm_before": 20.0,
        "skip/norm_after": 0.0,
        "skip/threshold": 10.0,
        "skip/fraction": 1.0,
        "skip/steps": 6,
        "skip/steps_clipped": 2,
        "skip/steps_nonfinite": 1,
        "skip/steps_skipped": 3,
    }


def test_after_too_many_in_a_row_one_is_taken():
    """Steps that are not finite do not count, and do not interrupt the count."""
    taken, _ = taken_and_counted([3.0, math.nan, 3.0, math.nan, 3.0, 3.0, 3.0, 3.0], max_consecutive=2)
    assert taken == [False] * 4 + [True, False, False, True]
    taken, found = taken_and_counted([3.0, 1.0, 3.0, 1.0, 3.0], max_consecutive=2)
    assert taken == [False, True, False, True, False]
    taken, found = taken_and_counted([math.nan] * 4, max_consecutive=1)
    assert taken == [False] * 4 and found["skip/steps_skipped"] == 4


def test_skipping_by_a_rule_follows_a_new_level():
    tx = skip_spikes(optax.sgd(1.0), zscore(2.5, warmup=5, rearm=20), max_consecutive=1000)
    size = np.exp(0.1 * np.random.default_rng(0).normal(size=300))
    size[100:] *= 5
    updates, record, _ = run(tx, size.astype(np.float32), jnp.zeros(()))
    assert np.all(updates[100:120] == 0)
    assert np.mean(updates[150:] != 0) > 0.95
    np.testing.assert_array_equal(record["skip/norm_after"], -updates)
    np.testing.assert_array_equal(record["skip/steps_skipped"], np.cumsum(updates == 0))


def test_skipping_in_scan_and_vmap(standard_promotion):
    """Each of three runs skips a step of its own."""
    tx = optax.chain(skip_spikes(optax.adam(0.1), 10.0), optax.scale(0.5))
    factors = jnp.array([[1.0, 3.0, 1.0], [3.0, 1.0, 1.0], [1.0, 1.0, 3.0]])

    def train(factors):
        def step(carry, factor):
            params, state = carry
            updates, state = tx.update(jax.tree.map(lambda g: g * factor, GRADS), state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        return jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), factors)

    (params, state), history = jax.jit(jax.vmap(train))(factors)
    np.testing.assert_array_equal(metrics(state)["skip/steps_skipped"], [1, 1, 1])
    np.testing.assert_array_equal(history["b"][0, 0], history["b"][0, 1])
    np.testing.assert_array_equal(history["b"][1, 0], PARAMS["b"])
    np.testing.assert_array_equal(history["b"][2, 1], history["b"][2, 2])
    # Two steps of the same gradient each.
    np.testing.assert_allclose(params["b"], jnp.broadcast_to(params["b"][0], (3, 1)), 1e-6)


def test_extra_args_reach_the_inner_optimizer():
    def scale(updates, state, params=None, *, value, **extra):
        return jax.tree.map(lambda x: x * value, updates), state + 1

    inner = optax.GradientTransformationExtraArgs(lambda params: jnp.zeros((), jnp.int32), scale)
    tx = skip_spikes(inner, 10.0)
    updates, state = tx.update(GRADS, tx.init(PARAMS), PARAMS, value=jnp.float32(2), unknown=1)
    chex.assert_trees_all_equal(updates, times(2.0))
    updates, state = tx.update(times(3.0), state, PARAMS, value=jnp.float32(2))
    chex.assert_trees_all_equal(updates, ZERO)
    assert state.inner_state == 1


@pytest.mark.parametrize("inner", [optax.sgd(0.1), optax.adamw(0.1)], ids=["sgd", "adamw"])
def test_derivatives_of_a_skipped_step(inner, standard_promotion):
    """By the gradient and by a number in it 0, by the weights 1, whatever is not finite."""
    tx = skip_spikes(inner, 10.0)
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)

    def moved(scale, grads, params):
        grads = jax.tree.map(lambda g, p: g + scale * p, grads, params)
        updates, _ = tx.update(grads, state, params)
        return sum(jnp.sum(x) for x in jax.tree.leaves(optax.apply_updates(params, updates)))

    for grads in (BAD, times(3.0)):
        slopes = jax.jit(jax.grad(moved, argnums=(0, 1, 2)))(jnp.float32(0.5), grads, PARAMS)
        chex.assert_trees_all_equal(slopes, (jnp.float32(0), ZERO, jax.tree.map(jnp.ones_like, PARAMS)))


@pytest.mark.parametrize("limit", [-1.0, jnp.float32(-1.0), optax.constant_schedule(-1.0)])
def test_a_limit_on_a_loss_below_zero(limit):
    tx = skip_spikes(optax.sgd(0.1), jnp.inf, value_rule=limit)
    step = jax.jit(lambda state, loss: tx.update(GRADS, state, PARAMS, value=loss)[1])
    state = step(step(tx.init(PARAMS), -2.0), -0.5)
    assert metrics(state)["skip/steps_skipped"] == 1 and metrics(state)["skip/value_threshold"] == -1
