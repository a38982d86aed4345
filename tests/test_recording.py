"""`metrics`: found at any depth, under the names and in the dtypes of the design."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from optax_clip import (
    box,
    clip_by_global_norm,
    clip_by_norm,
    clip_by_value,
    groups,
    mask_outward,
    metrics,
    non_negative,
    norm_ball,
    normalize_by_norm,
    project_weights,
    record_norms,
    skip_spikes,
)
from registry import ROWS

FLOATS = ("norm_before", "norm_after", "threshold", "fraction")
COUNTERS = ("steps", "steps_clipped", "steps_nonfinite")
KEYS = {
    "clip": {key: jnp.float32 for key in FLOATS} | {key: jnp.int32 for key in COUNTERS},
    "project": {"fraction": jnp.float32, "steps": jnp.int32},
}
KEYS["skip"] = KEYS["clip"] | {"steps_skipped": jnp.int32}
KEYS["normalize"] = KEYS["clip"]
KEYS["rescale"] = {"fraction": jnp.float32, "steps": jnp.int32, "steps_nonfinite": jnp.int32}
KEYS["qk_clip"] = KEYS["rescale"] | {"max_logit": jnp.float32}
KEYS["norms"] = {"rest/updates": jnp.float32}
# Beside those of every row of that name.
MORE_KEYS = {
    "clip_by_norm, groups": ("rest/norm_before", "rest/norm_after", "rest/threshold"),
    "skip_spikes, value rule": ("value", "value_threshold"),
}
KEYS["outward"] = {"fraction": jnp.float32, "steps": jnp.int32}
KEYS["mapping"] = KEYS["outward"]
MOST = 2**31 - 1

# Norm 5 against a limit of 2.5, so half of it is left.
PARAMS = {"w": jnp.array([0.5, -0.5]), "b": jnp.array([0.25])}
GRADS = {"w": jnp.array([3.0, 0.0]), "b": jnp.array([4.0])}
MASK = {"w": True, "b": False}


def expected_keys(name, kind="clip"):
    return {f"{name}/{key}" for key in KEYS[kind]}


def both():
    return optax.chain(clip_by_global_norm(2.5), optax.sgd(1.0), project_weights(box(-1.0, 1.0)))


@functools.cache
def clipped():
    """What one step of a clip alone records."""
    tx = clip_by_global_norm(2.5)
    return metrics(tx.update(GRADS, tx.init(PARAMS))[1])


def test_values_of_one_step():
    found = {key: float(value) for key, value in clipped().items()}
    assert found == {
        "clip/norm_before": 5.0,  # sqrt(3^2 + 4^2)
        "clip/norm_after": 2.5,
        "clip/threshold": 2.5,
        "clip/fraction": 1.0,
        "clip/steps": 1.0,
        "clip/steps_clipped": 1.0,
        "clip/steps_nonfinite": 0.0,
    }


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_names_and_dtypes(row):
    name = inspect.signature(row.factory).parameters["name"].default
    wanted = {f"{name}/{key}": dtype for key, dtype in KEYS[name].items()}
    wanted |= {f"{name}/{key}": jnp.float32 for key in MORE_KEYS.get(row.id, ())}
    if name == "project" and not row.elementwise:  # what bounds each entry knows of no distance
        wanted["project/distance"] = jnp.float32
    if row.id == "constrained":
        wanted |= {f"mapping/{key}": dtype for key, dtype in KEYS["mapping"].items()}
    with jax.numpy_dtype_promotion(row.promotion):
        params = {"w": jnp.ones((2, 2))}
        tx = row.make()
        state = tx.init(params)
        after = jax.eval_shape(lambda: metrics(tx.update(params, state, params)[1]))
        for found in (metrics(state), after):
            assert {key: value.dtype for key, value in found.items()} == wanted
            assert not any(value.shape or value.weak_type for value in found.values())


def test_another_name():
    for tx in (
        clip_by_value(1.0, name="inner/value"),
        clip_by_norm(1.0, name="inner/value"),
        normalize_by_norm(1.0, name="inner/value"),
    ):
        assert metrics(tx.init(PARAMS)).keys() == expected_keys("inner/value")
    tx = skip_spikes(optax.identity(), 1.0, name="guard")
    assert metrics(tx.init(PARAMS)).keys() == expected_keys("guard", "skip")
    tx = project_weights(box(0.0, 1.0), name="bounds")
    assert metrics(tx.init(PARAMS)).keys() == expected_keys("bounds", "project")


# --- Depth ---------------------------------------------------------------------------------------

WRAPPED = {
    "chain": lambda tx: optax.chain(optax.identity(), optax.chain(tx, optax.sgd(0.1)), optax.adam(0.1)),
    "named_chain": lambda tx: optax.named_chain(("first", tx), ("last", optax.sgd(0.1))),
    "masked": lambda tx: optax.masked(optax.masked(tx, lambda tree: jax.tree.map(bool, MASK)), True),
    "partition": lambda tx: optax.partition(
        {"a": optax.chain(tx, optax.sgd(0.1)), "b": optax.sgd(0.1)}, {"w": "a", "b": "b"}
    ),
    "MultiSteps": lambda tx: optax.MultiSteps(optax.chain(tx, optax.adam(0.1)), every_k_schedule=1),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(
        lambda learning_rate: optax.chain(tx, optax.sgd(learning_rate))
    )(learning_rate=0.1),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, max_consecutive_errors=3),
    "flatten": optax.flatten,
    "lookahead-like tuple": lambda tx: optax.chain(optax.chain(optax.chain(tx))),
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_any_depth(wrap, standard_promotion):
    tx = wrap(clip_by_norm(2.5, scope="leaf"))
    state = tx.init(PARAMS)
    assert metrics(state).keys() == expected_keys("clip")
    _, state = jax.jit(tx.update)(GRADS, state, PARAMS)
    assert metrics(state).keys() == expected_keys("clip")
    assert (metrics(state)["clip/steps"], metrics(state)["clip/steps_clipped"]) == (1, 1)
    chex.assert_trees_all_equal(jax.jit(metrics)(state), metrics(state))


def test_skip_spikes_and_what_it_guards():
    tx = skip_spikes(optax.chain(clip_by_global_norm(2.5), optax.sgd(0.1)), 10.0)
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    assert metrics(state).keys() == expected_keys("clip") | expected_keys("skip", "skip")


def test_inside_jit_and_scan():
    tx = both()

    def body(carry, _):
        params, state = carry
        updates, state = tx.update(GRADS, state, params)
        return (optax.apply_updates(params, updates), state), metrics(state)

    (_, state), history = jax.jit(lambda carry: jax.lax.scan(body, carry, length=3))(
        (PARAMS, tx.init(PARAMS))
    )
    assert history.keys() == expected_keys("clip") | expected_keys("project", "project")
    np.testing.assert_array_equal(history["clip/steps"], [1, 2, 3])
    np.testing.assert_array_equal(history["clip/norm_before"], [5.0, 5.0, 5.0])
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x[-1], history), metrics(state))


def test_any_container_of_states():
    tx = both()
    state = tx.update(GRADS, tx.init(PARAMS), PARAMS)[1]
    for holder in ({"opt_state": state, "step": 3}, [state, None], (PARAMS, state)):
        chex.assert_trees_all_equal(metrics(holder), metrics(state))


def test_none_is_an_empty_dict():
    for state in ((), None, {}, PARAMS, optax.adam(0.1).init(PARAMS), {"recorded": {"x": jnp.ones(())}}):
        assert metrics(state) == {}


def test_other_states_are_not_disturbed():
    """Nothing of ours may collide with the names that `optax.tree.get` looks for."""
    tx = optax.chain(clip_by_global_norm(2.5), optax.adam(0.1), project_weights(box(-1.0, 1.0)))
    state = tx.init(PARAMS)
    assert optax.tree.get(state, "count") == 0
    chex.assert_trees_all_equal_structs(optax.tree.get(state, "mu"), PARAMS)


# --- Two of one name -----------------------------------------------------------------------------


def test_duplicates_are_counted_in_order():
    tx = optax.chain(
        clip_by_global_norm(2.5),
        clip_by_value(1.0),
        clip_by_global_norm(0.5, name="other"),
        clip_by_norm(0.25),
        project_weights(box(-1.0, 1.0)),
        project_weights(norm_ball(1.0)),
    )
    state = tx.init(PARAMS)
    for _ in range(2):
        found = metrics(state)
        wanted = [expected_keys(name) for name in ("clip", "clip_1", "clip_2", "other")]
        wanted += [expected_keys(name, "project") for name in ("project", "project_1")]
        assert found.keys() == set().union({"project_1/distance"}, *wanted)  # of the ball
        _, state = tx.update(GRADS, state, PARAMS)
    thresholds = {k.split("/")[0]: float(x) for k, x in metrics(state).items() if "threshold" in k}
    assert thresholds == {"clip": 2.5, "clip_1": 1.0, "other": 0.5, "clip_2": 0.25}
    assert metrics(state)["clip/norm_before"] == 5.0
    assert metrics(state)["clip_1/norm_before"] == 2.5


def test_a_taken_number_is_skipped():
    """No two transforms share a key, whatever they are called."""
    tx = optax.chain(
        clip_by_value(1.0, name="clip_1"),
        clip_by_value(2.0, name="clip"),
        clip_by_value(3.0, name="clip"),
    )
    found = metrics(tx.init(PARAMS))
    assert len(found) == 3 * len(KEYS["clip"])
    assert expected_keys("clip_1") | expected_keys("clip") < found.keys()


# --- Counters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [both, lambda: clip_by_value(1.0)], ids=["chain", "value"])
@pytest.mark.parametrize("broken", [False, True], ids=["finite", "nan"])
def test_counters_saturate(make, broken):
    tx = make()
    full = jax.tree.map(lambda x: jnp.full_like(x, MOST) if x.dtype == jnp.int32 else x, tx.init(PARAMS))
    grads = jax.tree.map(lambda x: x.at[0].set(jnp.nan), GRADS) if broken else GRADS
    for step in (tx.update, jax.jit(tx.update)):
        _, state = step(grads, full, PARAMS)
        counts = {key: int(x) for key, x in metrics(state).items() if x.dtype == jnp.int32}
        assert counts == dict.fromkeys(counts, MOST)


def test_counters_count():
    """Steps: over the limit, within, zero, NaN, over."""
    tx = clip_by_global_norm(2.5)
    step = jax.jit(tx.update)
    state = tx.init(PARAMS)
    seen = []
    for factor in (1.0, 0.25, 0.0, np.nan, 2.0):
        _, state = step(jax.tree.map(lambda x, f=factor: x * f, GRADS), state)
        found = metrics(state)
        seen.append(tuple(int(found[f"clip/{key}"]) for key in COUNTERS))
    assert seen == [(1, 1, 0), (2, 1, 0), (3, 1, 0), (4, 1, 1), (5, 2, 1)]


def test_a_zero_gradient_at_threshold_zero_is_not_clipped():
    tx = clip_by_global_norm(0.0)
    _, state = tx.update(jax.tree.map(jnp.zeros_like, GRADS), tx.init(PARAMS))
    assert (metrics(state)["clip/steps"], metrics(state)["clip/steps_clipped"]) == (1, 0)
    _, state = tx.update(GRADS, state)
    assert (metrics(state)["clip/steps"], metrics(state)["clip/steps_clipped"]) == (2, 1)


# --- Flax NNX ------------------------------------------------------------------------------------


class Model(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(PARAMS["w"])
        self.b = nnx.Param(PARAMS["b"])


@nnx.jit
def nnx_step(model, optimizer):
    grads = nnx.grad(lambda m: jnp.vdot(m.w[...], GRADS["w"]) + jnp.vdot(m.b[...], GRADS["b"]))(model)
    optimizer.update(model, grads)
    return metrics(optimizer.opt_state), metrics(nnx.state(optimizer))


def test_nnx_states():
    """The optimizer's own states, which hold Variables, and those that `nnx.state` makes of them."""
    model = Model()
    optimizer = nnx.Optimizer(model, both(), wrt=nnx.Param)
    keys = expected_keys("clip") | expected_keys("project", "project")
    assert metrics(optimizer.opt_state).keys() == keys
    inside = nnx_step(model, optimizer)
    tx = both()
    expected = metrics(tx.update(GRADS, tx.init(PARAMS), PARAMS)[1])
    for found in (
        *inside,
        metrics(optimizer.opt_state),
        metrics(nnx.state(optimizer)),
        metrics(nnx.state(optimizer.opt_state)),
        metrics(nnx.state(optimizer, nnx.optimizer.OptState)),
        metrics(nnx.as_pure(optimizer.opt_state)),
        metrics(nnx.to_pure_dict(nnx.state(optimizer))),
        metrics(nnx.split(optimizer)[1]),
    ):
        assert all(isinstance(x, jax.Array) for x in found.values())
        chex.assert_trees_all_close(found, expected)


# --- The share, where an entry is not finite -------------------------------------------------------


def said(tx, grads, params, jit):
    update = jax.jit(tx.update) if jit else tx.update
    return metrics(update(grads, tx.init(params), params)[1])


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jitted"])
def test_the_share_is_a_number_beside_inf_and_nan(jit):
    """What is not finite spoils no count: an infinite entry may be inside. NaN weights may, in a box."""
    nan, inf = jnp.nan, jnp.inf
    params = jnp.array([0.5, 0.5, 0.5, 0.5])
    spoilt = jnp.array([nan, 1.0, -1.0, 0.0])
    huge = jnp.array([inf, 1.0, -1.0, 0.0])
    outward = mask_outward(box(-1.0, 0.5))
    assert said(outward, spoilt, params, jit)["outward/fraction"] == 0.25  # the third is held at 0.5
    assert said(outward, huge, params, jit)["outward/fraction"] == 0.25
    inside = project_weights(non_negative())
    assert said(inside, huge, params, jit)["project/fraction"] == 0.25  # -0.5 only: inf is inside
    inside = project_weights(box(-1.0, 1.0))
    assert said(inside, huge, params, jit)["project/fraction"] == 0.5  # inf and 1.5 end at 1


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jitted"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
def test_nothing_is_outside_of_infinity(dtype, jit):
    grads = jnp.array([jnp.inf, 1, 2], dtype)
    found = said(clip_by_value(jnp.inf), grads, grads, jit)
    assert found["clip/fraction"] == 0
    assert found["clip/steps_clipped"] == 0
    assert said(clip_by_value(1.5), grads, grads, jit)["clip/fraction"] == jnp.float32(2) / 3


def test_the_share_for_a_limit_that_is_traced_and_nan():
    clip = lambda limit: said(clip_by_value(limit), jnp.ones(2), jnp.ones(2), False)  # noqa: E731
    assert jax.jit(clip)(jnp.nan)["clip/fraction"] == 0


def test_a_share_has_no_derivative():
    def share(grads):
        return said(clip_by_value(1.0), grads, jnp.ones(2), False)["clip/fraction"]

    grads = jnp.array([1.0, 0.3])  # the first at its limit
    np.testing.assert_array_equal(jax.grad(share)(grads), [0, 0])
    assert jax.jvp(share, (grads,), (10 * grads,))[1] == 0


def test_names_that_lead_to_the_same_key():
    """A label below one name, and a second transform of the name that results."""
    tx = optax.chain(
        clip_by_norm(1.0, scope=groups(lambda path, leaf: "a")),
        clip_by_norm(2.0, name="clip/a"),
    )
    _, state = tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))
    found = metrics(state)
    assert found["clip/a/norm_before"] == 5 and found["clip/a_1/norm_before"] == 1


def test_a_chain_that_names_a_part_recorded():
    tx = optax.named_chain(("recorded", clip_by_norm(1.0)))
    assert "clip/norm_before" in metrics(tx.init(jnp.zeros(2)))


def test_the_ratio_is_that_of_the_update_to_the_weights():
    tx = record_norms(of=("updates", "params"))
    updates = {"w": jnp.array([3.0, 4.0]), "b": jnp.ones(1)}
    params = {"w": jnp.array([6.0, 8.0]), "b": jnp.zeros(1)}
    found = metrics(tx.update(updates, tx.init(params), params)[1])
    assert found["norms/w/ratio"] == 0.5  # 5 beside 10; beside weights of 0 there is no ratio
    assert (found["norms/b/ratio"], found["norms/b/updates"], found["norms/b/params"]) == (0, 1, 0)


def test_the_norm_of_the_whole_tree():
    tx = record_norms("global", of=("updates", "params"))
    updates, params = (
        {"a": jnp.full(1, 3.0), "b": jnp.full(1, 4.0)},
        {"a": jnp.zeros(1), "b": jnp.full(1, 10.0)},
    )
    state = optax.chain(tx, optax.sgd(0.1)).init(params)
    _, state = optax.chain(tx, optax.sgd(0.1)).update(updates, state, params)
    expected = {"norms/updates": 5, "norms/params": 10, "norms/ratio": 0.5, "norms/steps": 1}
    assert metrics(state) == expected
