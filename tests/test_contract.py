"""The contract: every row of the registry goes through the same checks."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_clip import metrics
from registry import BY_ID, ROWS

# Side by side in one tree, which is also how mixed precision looks.
DTYPES = [("float16", "bfloat16", "float32"), ("float64", "float32")]
NUMBERS = (0.25, 1.0, 4.0)


def tree(seed, size=1.0):
    random = np.random.default_rng(seed)
    shapes = {"dense": {"kernel": (8, 4), "bias": (4,)}}
    return jax.tree.map(
        lambda shape: jnp.asarray(size * random.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


PARAMS = tree(0)
GRADS = [tree(seed, size) for seed, size in ((1, 2.0), (2, 0.01), (3, 3.0))]
STACKED = jax.tree.map(lambda *leaves: jnp.stack(leaves), *GRADS)


@pytest.fixture(params=ROWS, ids=lambda row: row.id)
def row(request):
    with jax.numpy_dtype_promotion(request.param.promotion):
        yield request.param


@pytest.fixture
def compilations():
    """A list that grows by one with each program that XLA compiles."""
    seen = []

    def listen(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


@functools.cache
def jitted(row_id):
    """A row's transform with its update compiled, shared by the tests."""
    row = BY_ID[row_id]
    tx = row.make()
    compiled = jax.jit(tx.update)

    def update(grads, state, params):
        with jax.numpy_dtype_promotion(row.promotion):  # Else each mode would compile its own.
            return compiled(grads, state, params)

    return optax.GradientTransformationExtraArgs(tx.init, update)


@functools.cache
def first_step(row_id):
    tx = jitted(row_id)
    return tx.update(GRADS[0], tx.init(PARAMS), PARAMS)


def assert_close(actual, expected, rtol=3e-6, atol=1e-6):
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=atol)


def types(arrays):
    """Shape, dtype, weak type and explicit sharding of each leaf."""
    return jax.tree.map(jax.typeof, arrays)


def shardings(arrays):
    return [(jax.tree_util.keystr(path), x.sharding, x.ndim) for path, x in with_paths(arrays)]


def entry(stacked, i):
    return jax.tree.map(lambda x: x[i], stacked)


def with_paths(arrays):
    return jax.tree_util.tree_leaves_with_path(arrays)


def assert_same_shardings(before, after):
    for (path, old, ndim), (_, new, _) in zip(before, after, strict=True):
        assert new.is_equivalent_to(old, ndim), f"{path}: {old} became {new}"


# --- Compiled, placed, transformed ---------------------------------------------------------------


def test_jitted_is_eager_and_compiles_once(row, compilations):
    """Also: state and updates look the same after, and extra args that nobody knows change nothing.

    The state is donated, which also fails where one buffer stands for two entries.
    """
    tx = row.make()
    assert isinstance(tx, optax.GradientTransformationExtraArgs)

    def update(grads, state, params):
        return tx.update(grads, state, params, value=jnp.float32(1), nobody_knows="this")

    step = jax.jit(chex.assert_max_traces(update, n=1), donate_argnums=1)
    state, eager_state = tx.init(PARAMS), tx.init(PARAMS)
    looks, compiled = types(state), []
    for grads in GRADS:
        before = len(compilations)
        updates, state = step(grads, state, PARAMS)
        compiled.append(len(compilations) - before)
        eager_updates, eager_state = tx.update(grads, eager_state, PARAMS)
        assert_close((updates, state), (eager_updates, eager_state), atol=row.atol)
        assert types(updates) == types(eager_updates) == types(grads)
        assert types(state) == types(eager_state) == looks
    assert compiled[0] > 0, "This test no longer sees compilations."
    assert not any(compiled[1:])
    tx.update(GRADS[-1], eager_state, PARAMS)
    before = len(compilations)
    tx.update(GRADS[-1], eager_state, PARAMS)
    assert len(compilations) == before, "It compiles in each step outside of jit."
    steps = [int(x) for key, x in metrics(state).items() if key.endswith("/steps")]
    assert set(steps) == ({len(GRADS)} if row.counts else set())


def on_mesh(kind):
    """The kernel sharded over both of its axes, eight devices in all; the bias on each of them."""
    mesh = jax.make_mesh((4, 2), ("rows", "columns"), axis_types=(kind, kind))
    specs = {"dense": {"kernel": P("rows", "columns"), "bias": P()}}

    def put(arrays):
        return jax.tree.map(lambda spec, x: jax.device_put(x, NamedSharding(mesh, spec)), specs, arrays)

    return put, mesh


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_on_a_mesh(row, kind, compilations):
    """As on one device, shardings included; so the second step compiles nothing."""
    put, mesh = on_mesh(kind)
    tx = row.make()
    params, grads = put(PARAMS), put(GRADS[0])
    state = tx.init(params)
    looks, placed = types(state), shardings(state)
    step = jax.jit(tx.update, donate_argnums=1)
    updates, state = step(grads, state, params)
    assert types(state) == looks
    assert types(updates) == types(grads)
    assert_same_shardings(placed, shardings(state))
    assert_same_shardings(shardings(grads), shardings(updates))
    expected, expected_state = first_step(row.id)
    assert_close((updates, metrics(state)), (expected, metrics(expected_state)), atol=row.atol)
    compiled = len(compilations)
    step(grads, state, params)
    assert len(compilations) == compiled, "The second step compiled again."
    with jax.set_mesh(mesh):  # Traced only: another context is another program.
        state = tx.init(params)
        traced = jax.jit(tx.update).trace(grads, state, params)
        old, new = jax.tree.leaves((grads, state)), jax.tree.leaves(traced.out_info)
        assert [(x.shape, x.dtype) for x in old] == [(x.shape, x.dtype) for x in new]


def test_state_is_committed_with_the_params(row):
    params = jax.device_put(PARAMS, jax.devices()[1])
    for _, x in with_paths(row.make().init(params)):
        assert x.devices() == {jax.devices()[1]}
        assert x.committed


def test_scan_and_cond(row):
    """The state is a carry of `lax.scan`, and a branch of `lax.cond` beside the state as it was."""
    tx = jitted(row.id)
    wanted = jnp.array([True, False, True])

    def body(carry, xs):
        grads, wanted = xs
        state, params = carry
        updates, state = jax.lax.cond(
            wanted, lambda: tx.update(grads, state, params), lambda: (grads, state)
        )
        return (state, optax.apply_updates(params, updates)), updates

    start = tx.init(PARAMS), PARAMS
    scanned, all_updates = jax.lax.scan(body, start, (STACKED, wanted))
    state, params = start
    for i, grads in enumerate(GRADS):
        updates = grads
        if wanted[i]:
            updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        assert_close(entry(all_updates, i), updates, atol=row.atol)
    assert_close(scanned, (state, params), atol=row.atol)


def test_vmap(row):
    """Over gradients, states, weights and, where there is one, the number of the row."""

    def make(number):
        return row.make() if row.number is None else row.make(number)

    def step(number, grads, state, params):
        return make(number).update(grads, state, params)

    numbers = jnp.array(NUMBERS)
    many_params = jax.tree.map(lambda x: jnp.stack([x, x / 4, -x]), PARAMS)
    states = jax.vmap(row.make().init)(many_params)
    mapped = jax.jit(jax.vmap(step))(numbers, STACKED, states, many_params)
    for i, number in enumerate(NUMBERS):
        expected = step(number, GRADS[i], entry(states, i), entry(many_params, i))
        assert_close(entry(mapped, i), expected, atol=row.atol)


def test_grad(row):
    """The derivative agrees with a difference; it and the second are finite at a zero gradient."""
    tx = row.make()
    grads = {"dense": {"kernel": jnp.array([[2.0, -1.0], [0.1, 3.0]]), "bias": jnp.array([0.2, -0.9])}}
    params = {"dense": {"kernel": jnp.array([[0.7, 0.1], [0.3, -0.9]]), "bias": jnp.array([0.6, 0.2])}}
    along = {"dense": {"kernel": jnp.array([[0.3, 1.0], [-0.7, 0.5]]), "bias": jnp.array([1.0, 0.4])}}

    def function(grads, params):
        updates, _ = tx.update(grads, tx.init(params), params)
        # Weighted, as the norm of what a clip returns does not depend on the gradient.
        out = jax.tree.map(lambda u, w: jnp.sum((u + u**2) * (w + 2)), updates, along)
        return out["dense"]["kernel"] + out["dense"]["bias"]

    @jax.jit
    def derivatives(grads, params):
        with_value = jax.value_and_grad(function)
        return jax.jvp(lambda g: with_value(g, params), (grads,), (along,))

    step = 1e-2  # None of the rows has a kink this near.
    (above, _), _ = derivatives(optax.tree.add_scale(grads, step, along), params)
    (below, _), _ = derivatives(optax.tree.add_scale(grads, -step, along), params)
    (_, slope), (forward, _) = derivatives(grads, params)
    backward = optax.tree.vdot(slope, along)
    np.testing.assert_allclose(backward, forward, rtol=1e-3, atol=1e-3)
    if row.constant_limit:
        np.testing.assert_allclose(backward, (above - below) / (2 * step), rtol=2e-2, atol=2e-2)
    zero = jax.tree.map(jnp.zeros_like, grads)
    for weights in (params, zero):
        chex.assert_tree_all_finite(derivatives(zero, weights))


def test_export(row):
    state = jitted(row.id).init(PARAMS)
    export = jax.export.export(jax.jit(row.make().update), platforms=["cpu", "cuda", "tpu"])
    exported = export(GRADS[0], state, PARAMS)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert [x.dtype for x in exported.out_avals] == [x.dtype for x in jax.tree.leaves((GRADS[0], state))]


# --- Inside Optax --------------------------------------------------------------------------------


def test_inject_hyperparams(row, standard_promotion):
    tx = optax.inject_hyperparams(row.factory, static_args=row.static_args)(**row.kwargs)
    step = jax.jit(chex.assert_max_traces(tx.update, n=1))
    state, expected_state = tx.init(PARAMS), jitted(row.id).init(PARAMS)
    for grads in GRADS:
        updates, state = step(grads, state, PARAMS)
        expected, expected_state = jitted(row.id).update(grads, expected_state, PARAMS)
        assert_close((updates, metrics(state)), (expected, metrics(expected_state)), atol=row.atol)


def labels(kernel, bias):
    return {"dense": {"kernel": kernel, "bias": bias}}


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


def test_multi_steps(row, standard_promotion):
    tx = optax.MultiSteps(row.make(), every_k_schedule=2)
    step = jax.jit(chex.assert_max_traces(tx.update, n=1))
    state = tx.init(PARAMS)
    updates, state = step(GRADS[0], state, PARAMS)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, GRADS[0]))
    updates, state = step(GRADS[2], state, PARAMS)
    mean = jax.tree.map(lambda x, y: (x + y) / 2, GRADS[0], GRADS[2])
    expected = jitted(row.id).update(mean, jitted(row.id).init(PARAMS), PARAMS)
    assert_close((updates, metrics(state)), (expected[0], metrics(expected[1])), atol=row.atol)
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    for _ in range(2):
        updates, state = step(zero, state, PARAMS)
        chex.assert_tree_all_finite((updates, without_threshold(state)))


def without_threshold(state):
    """The metrics that are finite on every finite step; a rule may set no limit in its warm-up."""
    return {key: x for key, x in metrics(state).items() if not key.endswith("threshold")}


def spoilt(arrays):
    """One NaN."""
    kernel = arrays["dense"]["kernel"].at[0, 0].set(jnp.nan)
    return {"dense": arrays["dense"] | {"kernel": kernel}}


def test_apply_if_finite(row, standard_promotion):
    tx = optax.apply_if_finite(row.make(), max_consecutive_errors=5)
    step = jax.jit(chex.assert_max_traces(tx.update, n=1))
    before = tx.init(PARAMS)
    updates, state = step(GRADS[0], before, PARAMS)
    assert_close((updates, state.inner_state), first_step(row.id), atol=row.atol)
    broken = spoilt(GRADS[0])
    updates, after = step(broken, state, PARAMS)
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
    chex.assert_trees_all_equal(jax.jit(tx.init)(PARAMS), expected)
    assert types(tx.init(abstract)) == types(jax.jit(tx.init)(PARAMS)) == types(expected)
    assert types(jax.eval_shape(tx.init, PARAMS)) == types(expected)
    assert types(jax.eval_shape(tx.init, abstract)) == types(expected)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_init_on_a_mesh_needs_no_arrays(row, kind):
    put, _ = on_mesh(kind)
    params = put(PARAMS)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
    )
    expected, state = row.make().init(params), row.make().init(abstract)
    assert types(state) == types(expected)
    assert_same_shardings(shardings(expected), shardings(state))


@pytest.mark.filterwarnings("default")  # Orbax warns of itself.
def test_orbax_round_trip(tmp_path):
    """All rows in one checkpoint: the time goes into opening it."""
    states = {str(i): first_step(row.id)[1] for i, row in enumerate(ROWS) if row.promotion == "strict"}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", states)
        checkpointer.wait_until_finished()
        fresh = {i: jitted(ROWS[int(i)].id).init(PARAMS) for i in states}
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
        assert_close((updates, state), first_step(row.id), atol=row.atol)


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


@pytest.mark.parametrize("dtypes", DTYPES, ids="-".join)
def test_edges(row, dtypes):
    """Far outside, inside and at zero: nothing but finite numbers in the dtypes that came in."""
    with jax.enable_x64("float64" in dtypes):
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
            chex.assert_tree_all_finite((updates, without_threshold(new)))
            chex.assert_trees_all_equal({key: updates[key] for key in rest}, rest)
            if size < 1 and row.only_outside:
                chex.assert_trees_all_equal(updates, grads)
            if size == 0 and not row.needs_params:
                assert not any(np.any(updates[dtype]) for dtype in dtypes)


def test_empty(row):
    for empty in ({}, {"w": jnp.zeros((0, 3))}, {"w": None}, {"w": jnp.arange(3)}):
        tx = row.make()
        state = tx.init(empty)
        updates, new = tx.update(empty, state, empty)
        chex.assert_trees_all_equal(updates, empty)
        assert types(new) == types(state)
        chex.assert_tree_all_finite(without_threshold(new))
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
    updates, state = jitted(row.id).update(broken, jitted(row.id).init(PARAMS), PARAMS)
    if row.elementwise:
        assert_close(updates, spoilt(first_step(row.id)[0]), atol=row.atol)
    elif not row.needs_params:
        chex.assert_trees_all_equal(
            updates, jax.tree.map(lambda x: jnp.full_like(x, row.spoilt), PARAMS)
        )
    found = {key.rsplit("/", 1)[1]: value for key, value in metrics(state).items()}
    if row.counts and not row.needs_params:
        assert (found["steps"], found["steps_nonfinite"]) == (1, 1)
        assert (found["steps_clipped"], found["fraction"]) == (0, 0)
