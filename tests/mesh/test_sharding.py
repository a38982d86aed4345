"""One meaning inside `shard_map` and under a mapped axis as on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import optax_clip

SPECS = {"rows": P("i", None), "half": P("i"), "replicated": P()}


@pytest.fixture
def mesh():
    return jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))


@pytest.fixture
def tree():
    return {
        "rows": jnp.arange(32.0).reshape(8, 4),
        "half": jnp.linspace(-1, 1, 8).astype(jnp.bfloat16),
        "replicated": jnp.ones(4),
    }


def assert_close(actual, expected):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        x, y = (np.asarray(z).astype(np.float64) for z in (x, y))
        np.testing.assert_allclose(x, y, rtol=1e-2 if x.shape == (8,) else 1e-5, atol=1e-6)


@pytest.mark.parametrize("ord", [None, 1, np.inf, "rms"], ids=str)
@pytest.mark.parametrize("scope", ["global", "leaf"])
def test_the_axes_are_read_from_the_types(mesh, tree, scope, ord):
    clip = functools.partial(optax_clip.clip_tree, max_norm=1.0, scope=scope, ord=ord)
    norms = jax.tree.map(lambda _: P(), clip(tree)[1])
    sharded = jax.shard_map(clip, mesh=mesh, in_specs=(SPECS,), out_specs=(SPECS, norms))
    assert_close(jax.jit(sharded)(tree), clip(tree))


def test_a_chain_and_its_metrics(mesh, tree):
    tx = optax.chain(
        optax_clip.clip_by_global_norm(1.0),
        optax_clip.clip_by_value(0.3),
        optax_clip.project_weights(optax_clip.norm_ball(1.0)),
    )
    state = tx.init(tree)
    step = lambda grads, state: tx.update(grads, state, grads)  # noqa: E731
    sharded = jax.shard_map(step, mesh=mesh, in_specs=(SPECS, P()), out_specs=(SPECS, P()))
    (updates, new), (expected, alone) = jax.jit(sharded)(tree, state), step(tree, state)
    assert_close(updates, expected)
    for name, value in optax_clip.metrics(alone).items():
        np.testing.assert_allclose(optax_clip.metrics(new)[name], value, rtol=1e-5)


def test_a_scope_that_keeps_a_dimension_asks_for_axis_name(mesh, tree):
    def run(axis_name, spec):
        clip = lambda t: optax_clip.clip_tree(t, 1.0, scope="unit", axis_name=axis_name)[0]  # noqa: E731
        return jax.jit(jax.shard_map(clip, mesh=mesh, in_specs=spec, out_specs=spec))

    rows, columns = tree["rows"], tree["rows"].T
    with pytest.raises(ValueError, match=r"axis_name for leaf '' of shape \(1, 4\)"):
        run(None, P("i"))(rows)
    whole = optax_clip.clip_tree(rows, 1.0, scope="unit")[0]
    assert_close(run("i", P("i"))(rows), whole)  # rows are split, so units are summed over "i"
    whole = optax_clip.clip_tree(columns, 1.0, scope="unit")[0]
    assert_close(run((), P(None, "i"))(columns), whole)  # each device holds whole units
    with pytest.raises(NameError, match="nowhere"):
        run("nowhere", P("i"))(rows)


def test_axis_name_for_a_mapped_axis_and_for_an_unchecked_mesh(mesh, tree):
    rows = tree["rows"]
    expected, norm = optax_clip.clip_tree(rows, 1.0)
    clip = functools.partial(optax_clip.clip_tree, max_norm=1.0, axis_name="i")
    clipped, norms = jax.vmap(clip, axis_name="i")(rows)
    np.testing.assert_allclose(clipped, expected, rtol=1e-6)
    np.testing.assert_allclose(norms, jnp.full(8, norm), rtol=1e-6)
    unchecked = jax.shard_map(clip, mesh=mesh, in_specs=P("i"), out_specs=(P("i"), P()), check_vma=False)
    np.testing.assert_allclose(unchecked(rows)[0], expected, rtol=1e-6)


def test_the_careful_norm_is_global_too(mesh):
    x = jnp.array([3e30, 4e30] + [0.0] * 6)
    clip = lambda x: optax_clip.clip_tree(x, 1.0)  # noqa: E731
    sharded = jax.shard_map(clip, mesh=mesh, in_specs=P("i"), out_specs=(P("i"), P()))
    clipped, norm = jax.jit(sharded)(x)
    np.testing.assert_allclose(clipped[:2], [0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(norm, 5e30, rtol=1e-6)


def test_whole_units_on_each_device_share_the_smallest_limit(mesh):
    tx = optax_clip.adaptive_grad_clip(0.5, axis_name=())
    kernel = jnp.arange(1.0, 17.0).reshape(2, 8)
    state = tx.init(kernel)
    step = lambda grads: optax_clip.metrics(tx.update(grads, state, kernel[:, :1] + 0 * grads)[1])  # noqa: E731
    sharded = jax.shard_map(step, mesh=mesh, in_specs=P(None, "i"), out_specs=P())
    found, alone = jax.jit(sharded)(kernel), step(kernel)
    np.testing.assert_allclose(found["clip/threshold"], alone["clip/threshold"], rtol=1e-6)


def test_a_part_of_a_matrix_has_no_singular_values(mesh):
    project = lambda x: optax_clip.project(x, optax_clip.spectral_ball(1.0))  # noqa: E731
    sharded = jax.shard_map(project, mesh=mesh, in_specs=P(None, "i"), out_specs=P(None, "i"))
    with pytest.raises(ValueError, match="whole matrices"):
        sharded(jnp.ones((4, 8)))


def test_the_singular_values_of_split_matrices_raise(mesh):
    tx = optax_clip.clip_singular_values(1.0, record=False)

    def step(x):
        return tx.update(x, tx.init(x))[0]

    mapped = jax.shard_map(step, mesh=mesh, in_specs=P("i"), out_specs=P("i"))
    with pytest.raises(ValueError, match="whole matrices"):
        jax.jit(mapped)(jnp.ones((8, 4)))


@pytest.mark.parametrize("scope", ["global", "leaf"])
@pytest.mark.parametrize("where", ["shard_map", "mesh"])
def test_a_nan_on_one_device_alone(mesh, tree, where, scope):
    """The maximum over devices drops it."""
    tree["rows"] = tree["rows"].at[3, 1].set(jnp.nan)
    tx = optax_clip.clip_by_norm(1.0, scope=scope, ord=np.inf, nonfinite="zero")
    step = lambda grads: tx.update(grads, tx.init(grads))  # noqa: E731
    if where == "shard_map":
        step = jax.shard_map(step, mesh=mesh, in_specs=(SPECS,), out_specs=(SPECS, P()))
    else:
        tree = {key: jax.device_put(x, jax.NamedSharding(mesh, SPECS[key])) for key, x in tree.items()}
    updates, state = jax.jit(step)(tree)
    assert_close(updates, jax.tree.map(jnp.zeros_like, tree))
    assert optax_clip.metrics(state)["clip/steps_nonfinite"] == 1
