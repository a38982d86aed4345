"""The contract: every row of the registry goes through the same checks.

Each row is traced and run outside of jit. What XLA makes of it is compiled for each kind of row, and for
all of them in `make test-full`.
"""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from optax_clip import metrics
from registry import BY_ID, CALLS, KINDS, ROWS
from trees import (
    GRADS,
    PARAMS,
    STACKED,
    assert_close,
    entry,
    labels,
    steps,
    traced,
    types,
    without_threshold,
)


def rows(*quickly):
    """All rows: one of each kind, or those named, and the rest in `make test-full`."""
    kept = quickly or [row.id for row in KINDS]
    params = [pytest.param(row, marks=() if row.id in kept else pytest.mark.full) for row in ROWS]
    return pytest.mark.parametrize("row", params, indirect=True, ids=[row.id for row in ROWS])


@functools.cache
def jitted(row_id):
    """A row's transform with its update compiled, shared by the tests."""
    row = BY_ID[row_id]
    tx = row.make()
    update = jax.jit(chex.assert_max_traces(tx.update, n=1))

    def step(grads, state, params):
        with jax.numpy_dtype_promotion(row.promotion):  # Else each mode would compile its own.
            return update(grads, state, params)

    return optax.GradientTransformationExtraArgs(tx.init, step)


# --- Traced, compiled, mapped, differentiated ----------------------------------------------------


def test_every_step_looks_the_same(row):
    """In a trace too: updates are as the gradients were, and the state as it was before."""
    tx = row.make()
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    state = tx.init(PARAMS)
    looks = types((GRADS[0], state))
    assert traced(tx.update, GRADS[0], state, PARAMS) == looks
    for result in steps(row.id):
        assert types(result) == looks
    found = {int(x) for key, x in metrics(steps(row.id)[-1][1]).items() if key.endswith("/steps")}
    assert found == ({len(GRADS)} if row.counts else set())


def test_outside_of_jit_a_step_compiles_nothing_new(row, compilations):
    _, state = steps(row.id)[-1]
    row.make().update(GRADS[-1], state, PARAMS)
    before = len(compilations)
    row.make().update(GRADS[-1], state, PARAMS)
    assert len(compilations) == before


@rows()
def test_jitted_is_eager_and_compiles_once(row, compilations):
    """Extra args that nobody knows change nothing.

    The state is donated, which also fails where one buffer stands for two entries.
    """
    tx = row.make()

    def update(grads, state, params):
        return tx.update(grads, state, params, value=jnp.float32(1), nobody_knows="this")

    step = jax.jit(chex.assert_max_traces(update, n=1), donate_argnums=1)
    state, counts = tx.init(PARAMS), []
    looks = types(state)
    for grads, expected in zip(GRADS, steps(row.id), strict=True):
        before = len(compilations)
        updates, state = step(grads, state, PARAMS)
        counts.append(len(compilations) - before)
        assert_close((updates, state), expected, atol=row.atol)
        assert types(updates) == types(grads)
        assert types(state) == looks
    assert counts[0] > 0, "This test no longer sees compilations."
    assert not any(counts[1:])


@pytest.mark.parametrize("name", CALLS)
def test_a_name_is_the_same_program_as_its_call(name):
    """To the letter, but for where its functions lie in memory."""
    programs = [
        re.sub("0x[0-9a-f]+", "", str(jax.make_jaxpr(tx.update)(GRADS[0], tx.init(PARAMS), PARAMS)))
        for tx in (BY_ID[name].make(), CALLS[name]())
    ]
    assert programs[0] == programs[1]


def scanned(tx):
    """The state is a carry of `lax.scan`, and a branch of `lax.cond` beside the state as it was."""

    def body(carry, xs):
        grads, wanted = xs
        state, params = carry
        updates, state = jax.lax.cond(
            wanted, lambda: tx.update(grads, state, params), lambda: (grads, state)
        )
        return (state, optax.apply_updates(params, updates)), updates

    return lambda state, wanted: jax.lax.scan(body, (state, PARAMS), (STACKED, wanted))


def test_scan_and_cond(row):
    tx = row.make()
    state = tx.init(PARAMS)
    carry, updates = traced(scanned(tx), state, jnp.ones(3, bool))
    assert carry == types((state, PARAMS))
    assert updates == types(STACKED)


@pytest.mark.full
@pytest.mark.parametrize("row", KINDS, indirect=True, ids=lambda row: row.id)
def test_scan_and_cond_compiled(row):
    tx = jitted(row.id)
    wanted = jnp.array([True, False, True])
    state, params = tx.init(PARAMS), PARAMS
    last, all_updates = scanned(tx)(state, wanted)
    for i, grads in enumerate(GRADS):
        updates = grads
        if wanted[i]:
            updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        assert_close(entry(all_updates, i), updates, atol=row.atol)
    assert_close(last, (state, params), atol=row.atol)


SMALL = {"dense": {"kernel": jnp.array([[2.0, -1.0], [0.1, 3.0]]), "bias": jnp.array([0.2, -0.9])}}
SMALL_PARAMS = {"dense": {"kernel": jnp.array([[0.7, 0.1], [0.3, -0.9]]), "bias": jnp.array([0.6, 0.2])}}
ALONG = {"dense": {"kernel": jnp.array([[0.3, 1.0], [-0.7, 0.5]]), "bias": jnp.array([1.0, 0.4])}}


@rows(
    "clip_by_value",
    "clip_by_global_norm",
    "clip_by_norm, unit",
    "normalize_by_norm",
    "zscore, leaf",
    "relative_to_params",
    "skip_spikes",
    "clip_singular_values",
    "qk_clip",
    "box",
    "norm_ball",
    "norm_ball, 1",
    "norm_sphere",
    "simplex",
    "mask_outward",
)
def test_vmap_of_derivatives(row):
    """Over gradients, weights, states and, where there is one, the number of the row.

    The derivative agrees with a difference; it and the second are finite at a zero gradient.
    """

    def step(number, grads, params):
        tx = row.make() if row.number is None else row.make(number)
        updates, state = tx.update(grads, tx.init(params), params)
        # Weighted, as the norm of what a clip returns does not depend on the gradient.
        out = jax.tree.map(lambda u, w: jnp.sum((u + u**2) * (w + 2)), updates, ALONG)
        return out["dense"]["kernel"] + out["dense"]["bias"], (updates, state)

    def derivatives(number, grads, params):
        with_value = jax.value_and_grad(step, argnums=1, has_aux=True)
        moved = jax.jvp(lambda g: with_value(number, g, params), (grads,), (ALONG,))
        ((value, results), slope), ((forward, _), second) = moved
        return value, slope, forward, second, results

    mapped = jax.jit(jax.vmap(derivatives))
    numbers = jnp.array(row.numbers, jnp.float32)
    same = jnp.full(3, numbers[1])
    delta = 1e-2  # None of the rows has a kink this near.
    moved = [optax.tree.add_scale(SMALL, size, ALONG) for size in (-delta, 0.0, delta)]
    params = [SMALL_PARAMS] * 3
    stack = lambda *trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)  # noqa: E731

    values, slopes, forwards, *_ = mapped(same, stack(*moved), stack(*params))
    backward = optax.tree.vdot(entry(slopes, 1), ALONG)
    np.testing.assert_allclose(backward, forwards[1], rtol=1e-3, atol=1e-3)
    if row.constant_limit:
        np.testing.assert_allclose(backward, (values[2] - values[0]) / (2 * delta), rtol=2e-2, atol=2e-2)

    sizes = [optax.tree.scale(size, SMALL) for size in (1.0, 0.01, 2.0)]
    params = [optax.tree.scale(size, SMALL_PARAMS) for size in (1.0, 0.25, -1.0)]
    *_, results = mapped(numbers, stack(*sizes), stack(*params))
    for i in range(3):
        _, expected = step(numbers[i], sizes[i], params[i])
        assert_close(entry(results, i), expected, atol=row.atol)

    zero = jax.tree.map(jnp.zeros_like, SMALL)
    found = mapped(same, stack(zero, zero, zero), stack(SMALL_PARAMS, zero, SMALL_PARAMS))
    chex.assert_tree_all_finite(found[:4])


def test_export(row):
    state = row.make().init(PARAMS)
    export = jax.export.export(jax.jit(row.make().update), platforms=["cpu", "cuda", "tpu"])
    exported = export(GRADS[0], state, PARAMS)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert [x.dtype for x in exported.out_avals] == [x.dtype for x in jax.tree.leaves((GRADS[0], state))]


# --- Inside Optax --------------------------------------------------------------------------------


def test_inject_hyperparams(row, standard_promotion):
    tx = optax.inject_hyperparams(row.factory, static_args=row.static_args)(**row.kwargs)
    state = tx.init(PARAMS)
    looks = types(state)
    assert traced(tx.update, GRADS[0], state, PARAMS) == (types(GRADS[0]), looks)
    for grads, (expected, expected_state) in zip(GRADS, steps(row.id), strict=True):
        updates, state = tx.update(grads, state, PARAMS)
        assert types(state) == looks
        assert_close((updates, metrics(state)), (expected, metrics(expected_state)), atol=row.atol)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.masked(tx, labels(True, False)),
        lambda tx: optax.partition({"a": tx, "b": optax.identity()}, labels("a", "b")),
    ],
    ids=["masked", "partition"],
)
def test_only_some_leaves(row, wrap):
    """Eagerly, as the function under it is the same that the tests above compile."""
    bare = row.make()
    tx = wrap(bare)
    params, grads = ({"dense": {"kernel": t["dense"]["kernel"]}} for t in (PARAMS, GRADS[0]))
    state, bare_state = tx.init(PARAMS), bare.init(params)
    looks = types(state)
    for _ in range(2):
        updates, state = tx.update(GRADS[0], state, PARAMS)
        assert types(state) == looks
        expected, bare_state = bare.update(grads, bare_state, params)
        chex.assert_trees_all_equal(updates["dense"].pop("bias"), GRADS[0]["dense"]["bias"])
        assert_close((updates, metrics(state)), (expected, metrics(bare_state)), atol=row.atol)


def wrapped(row):
    return optax.MultiSteps(row.make(), 2), optax.apply_if_finite(row.make(), max_consecutive_errors=5)


def test_inside_conditionals_of_optax(row, standard_promotion):
    """Both branches have one look: that of the state before."""
    for tx in wrapped(row):
        state = tx.init(PARAMS)
        assert traced(tx.update, GRADS[0], state, PARAMS) == types((GRADS[0], state))


def spoilt(arrays):
    """One NaN."""
    kernel = arrays["dense"]["kernel"].at[0, 0].set(jnp.nan)
    return {"dense": arrays["dense"] | {"kernel": kernel}}


# One of each way to keep a state; the rest in `make test-full`.
STATES = (
    "clip_by_norm, leaf",
    "zscore, unit",
    "skip_spikes, rule",
    "record_norms",
    "qk_clip",
    "box, every=2",
    "norm_sphere, initial",
)


@rows(*STATES)
def test_multi_steps(row, standard_promotion):
    tx, _ = wrapped(row)
    step = jax.jit(chex.assert_max_traces(tx.update, n=1))
    state = tx.init(PARAMS)
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, state = step(GRADS[0], state, PARAMS)
    chex.assert_trees_all_equal(updates, zero)
    updates, state = step(GRADS[2], state, PARAMS)
    mean = jax.tree.map(lambda x, y: (x + y) / 2, GRADS[0], GRADS[2])
    bare = row.make()
    expected = bare.update(mean, bare.init(PARAMS), PARAMS)
    assert_close((updates, metrics(state)), (expected[0], metrics(expected[1])), atol=row.atol)
    for _ in range(2):
        updates, state = step(zero, state, PARAMS)
        chex.assert_tree_all_finite((updates, without_threshold(metrics(state))))


@rows(*STATES)
def test_apply_if_finite(row, standard_promotion):
    _, tx = wrapped(row)
    step = jax.jit(chex.assert_max_traces(tx.update, n=1))
    updates, state = step(GRADS[0], tx.init(PARAMS), PARAMS)
    assert_close((updates, state.inner_state), steps(row.id)[0], atol=row.atol)
    updates, after = step(spoilt(GRADS[0]), state, PARAMS)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))
    chex.assert_trees_all_equal(after.inner_state, state.inner_state)


def test_named_chain(row):
    before = optax.chain(optax.scale(0.5), optax.trace(0.9))
    bare = row.make()
    tx = optax.named_chain(
        ("scale", optax.scale(0.5)), ("trace", optax.trace(0.9)), ("last", row.make())
    )
    state, before_state, bare_state = tx.init(PARAMS), before.init(PARAMS), bare.init(PARAMS)
    looks = types(state)
    for grads in GRADS:
        updates, state = tx.update(grads, state, PARAMS)
        assert types(state) == looks
        scaled, before_state = before.update(grads, before_state, PARAMS)
        expected, bare_state = bare.update(scaled, bare_state, PARAMS)
        assert_close((updates, state["last"]), (expected, bare_state), atol=row.atol)
    assert metrics(state).keys() == metrics(bare_state).keys()


# --- The state on its own ------------------------------------------------------------------------


def test_init_needs_no_arrays(row):
    tx = row.make()
    expected = tx.init(PARAMS)
    abstract = jax.eval_shape(lambda: PARAMS)
    if row.abstract:
        chex.assert_trees_all_equal(tx.init(abstract), expected)
    assert types(tx.init(abstract)) == types(expected)
    assert traced(tx.init, PARAMS) == traced(tx.init, abstract) == types(expected)


@pytest.mark.full
def test_init_jitted():
    """All rows in one program."""
    rows = {str(i): row.make() for i, row in enumerate(ROWS)}
    init = lambda params: {i: tx.init(params) for i, tx in rows.items()}  # noqa: E731
    chex.assert_trees_all_equal(jax.jit(init)(PARAMS), init(PARAMS))


@pytest.mark.filterwarnings("default")  # Orbax warns of itself.
def test_orbax_round_trip(tmp_path):
    """All rows in one checkpoint: the time goes into opening it."""
    states = {str(i): steps(row.id)[0][1] for i, row in enumerate(ROWS) if row.promotion == "strict"}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", states)
        checkpointer.wait_until_finished()
        fresh = {i: ROWS[int(i)].make().init(PARAMS) for i in states}
        restored = checkpointer.restore(tmp_path / "state", fresh)
    chex.assert_trees_all_equal(restored, states)
    assert types(restored) == types(states)


# --- The edge table, as far as it is common to all -------------------------------------------------


def passed_by():
    """Leaves that pass through: as gradients, and the weights they belong to."""
    grads = {"index": jnp.arange(3), "flag": jnp.array([True, False]), "frozen": None}
    return grads, grads | {"frozen": jnp.full(3, 0.125)}


def test_params_only_where_needed(row):
    tx = row.make()
    if row.needs_params:
        with pytest.raises(ValueError, match=r"params=None"):
            tx.update(GRADS[0], tx.init(PARAMS))
    else:
        updates, state = tx.update(GRADS[0], tx.init(PARAMS))
        assert_close((updates, state), steps(row.id)[0], atol=row.atol)


def test_other_leaves_pass_through(row):
    """Also float0, the gradient of an int, which does not go through `jit`."""
    tx = row.make()
    grads, params = passed_by()
    grads |= {"of an int": np.zeros(2, jax.dtypes.float0), "w": GRADS[0]["dense"]["kernel"]}
    params |= {"of an int": jnp.arange(2), "w": PARAMS["dense"]["kernel"]}
    updates, state = tx.update(grads, tx.init(params), params)
    for key in grads.keys() - {"w"}:
        assert updates[key] is grads[key], key
    alone = {"w": grads["w"]}, {"w": params["w"]}
    expected, alone_state = tx.update(alone[0], tx.init(alone[1]), alone[1])
    assert_close((updates["w"], metrics(state)), (expected["w"], metrics(alone_state)), atol=row.atol)


def follow_the_edges(row, dtypes):
    """Far outside, inside and at zero: nothing but finite numbers in the dtypes that came in."""
    tx = row.make() if row.number is None else row.make(jnp.array(1.0, jnp.float32))
    step = jax.jit(chex.assert_max_traces(tx.update, n=1))
    rest, params = passed_by()
    params |= {dtype: jnp.full((4, 3), 0.0625, dtype) for dtype in dtypes}
    state = tx.init(params)
    looks = types(state)
    for size in (4.0, 1e-3, 0.0):
        values = size * np.linspace(1.0, 0.5, 12).reshape(4, 3)
        grads = rest | {dtype: jnp.asarray(values, dtype) for dtype in dtypes}
        updates, new = step(grads, state, params)
        assert types(updates) == types(grads)
        assert types(new) == looks
        chex.assert_tree_all_finite((updates, without_threshold(metrics(new))))
        chex.assert_trees_all_equal({key: updates[key] for key in rest}, rest)
        if size < 1 and row.only_outside:
            chex.assert_trees_all_equal(updates, grads)
        if size == 0 and not row.needs_params:
            assert not any(np.any(updates[dtype]) for dtype in dtypes)


@rows()
def test_edges(row):
    """Mixed precision: three types side by side in one tree."""
    follow_the_edges(row, ("float16", "bfloat16", "float32"))


@pytest.mark.full
def test_edges_in_64_bits(row, x64):
    follow_the_edges(row, ("float64", "float32"))


def test_empty(row):
    for empty in ({}, {"w": jnp.zeros((0, 3))}, {"w": None, "index": jnp.arange(3)}):
        tx = row.make()
        state = tx.init(empty)
        updates, new = tx.update(empty, state, empty)
        chex.assert_trees_all_equal(updates, empty)
        assert types(new) == types(state)
        chex.assert_tree_all_finite(without_threshold(metrics(new)))
        for key, value in metrics(new).items():
            if key.endswith(("before", "after", "distance", "fraction")) and not row.measures_signal:
                assert value == 0, key


def test_scalars_as_leaves(row):
    if row.min_rank > 0:
        pytest.skip("names an axis")
    tx = row.make()
    grads, params = {"a": 3.0, "b": np.float32(4.0)}, {"a": 0.5, "b": np.float32(-0.25)}
    updates, _ = tx.update(grads, tx.init(params), params)
    arrays = [jax.tree.map(lambda x: jnp.array(x, jnp.float32), t) for t in (grads, params)]
    expected, _ = tx.update(arrays[0], tx.init(arrays[1]), arrays[1])
    assert_close(updates, expected, atol=row.atol)


def test_nan(row):
    """One NaN never gives a half-broken tree, and a transform of gradients counts it."""
    broken = spoilt(GRADS[0])
    tx = row.make()
    updates, state = tx.update(broken, tx.init(PARAMS), PARAMS)
    if row.elementwise:
        assert_close(updates, spoilt(steps(row.id)[0][0]), atol=row.atol)
    elif not row.needs_params:
        chex.assert_trees_all_equal(
            updates, jax.tree.map(lambda x: jnp.full_like(x, row.spoilt), PARAMS)
        )
    found = {key.rsplit("/", 1)[1]: value for key, value in metrics(state).items()}
    if row.counts and not row.needs_params:
        assert (found["steps"], found["steps_nonfinite"]) == (1, 1)
        assert (found["steps_clipped"], found["fraction"]) == (0, 0)
