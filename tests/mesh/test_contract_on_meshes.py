"""The contract on meshes: every row placed and traced on both, each kind of row compiled on one."""

import jax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_clip import metrics
from registry import KINDS, ROWS
from trees import (
    GRADS,
    PARAMS,
    assert_close,
    assert_same_shardings,
    shardings,
    steps,
    types,
    with_paths,
)

MESHES = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
# Each kind of row on one kind of mesh, by turns; the rest in `make test-full`.
BY_TURNS = {(row.id, (AxisType.Auto, AxisType.Explicit)[i % 2]) for i, row in enumerate(KINDS)}


def on_mesh(kind):
    """The kernel sharded over both of its axes, eight devices in all; the bias on each of them."""
    mesh = jax.make_mesh((4, 2), ("rows", "columns"), axis_types=(kind, kind))
    specs = {"dense": {"kernel": P("rows", "columns"), "bias": P()}}

    def put(arrays):
        return jax.tree.map(lambda spec, x: jax.device_put(x, NamedSharding(mesh, spec)), specs, arrays)

    return put, mesh


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        pytest.param(row, kind, marks=() if (row.id, kind) in BY_TURNS else pytest.mark.full)
        for row in ROWS
        for kind in (AxisType.Auto, AxisType.Explicit)
    ],
    indirect=["row"],
    ids=[f"{row.id}-{kind}" for row in ROWS for kind in ("Auto", "Explicit")],
)
def test_on_a_mesh(row, kind, compilations):
    """As on one device, shardings included; so the second step compiles nothing."""
    put, _ = on_mesh(kind)
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
    expected, expected_state = steps(row.id)[0]
    assert_close((updates, metrics(state)), (expected, metrics(expected_state)), atol=row.atol)
    compiled = len(compilations)
    step(grads, state, params)
    assert len(compilations) == compiled, "The second step compiled again."


@MESHES
def test_traced_on_a_mesh(row, kind):
    """With the mesh in force and without."""
    put, mesh = on_mesh(kind)
    tx, params, grads = row.make(), put(PARAMS), put(GRADS[0])
    state = tx.init(params)
    updates, new = jax.eval_shape(tx.update, grads, state, params)
    assert types((updates, new)) == types((grads, state))
    with jax.set_mesh(mesh):
        state = tx.init(params)
        traced = jax.eval_shape(tx.update, grads, state, params)
        old, new = jax.tree.leaves((grads, state)), jax.tree.leaves(traced)
        assert [(x.shape, x.dtype) for x in old] == [(x.shape, x.dtype) for x in new]


def test_state_is_committed_with_the_params(row):
    params = jax.device_put(PARAMS, jax.devices()[1])
    for _, x in with_paths(row.make().init(params)):
        assert x.devices() == {jax.devices()[1]}
        assert x.committed


@MESHES
def test_init_on_a_mesh_needs_no_arrays(row, kind):
    put, _ = on_mesh(kind)
    params = put(PARAMS)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
    )
    expected, state = row.make().init(params), row.make().init(abstract)
    assert types(state) == types(expected)
    assert_same_shardings(shardings(expected), shardings(state))
