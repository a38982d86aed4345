"""What people do to a state: tell its parts apart, name them, save them, put them back, replace one."""

import io
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization, traverse_util

from optax_clip import (
    RecordedState,
    clip_by_global_norm,
    clip_by_norm,
    init_box,
    metrics,
    norm_sphere,
    project_weights,
    window_quantile,
    zclip,
)
from registry import BY_ID, ROWS

PARAMS = {
    "dense": {"kernel": jnp.linspace(-1.0, 1.0, 6).reshape(3, 2), "bias": jnp.zeros(2)},
    "head": jnp.full((2, 2), 0.5),
}
GRADS = jax.tree.map(lambda x: 2 * jnp.ones_like(x), PARAMS)


@pytest.fixture(params=ROWS, ids=lambda row: row.id)
def row(request):
    with jax.numpy_dtype_promotion("standard"):  # Adam mixes dtypes.
        yield request.param


def after_one_step(tx):
    return tx.update(GRADS, tx.init(PARAMS), PARAMS)[1]


def filled(state):
    """A state of the same look in which no two numbers are equal, for checks that run no step."""
    leaves, treedef = jax.tree.flatten(state)
    ends = np.cumsum([0, *(x.size for x in leaves)])
    new = [
        np.arange(i, j).reshape(x.shape).astype(x.dtype)
        for i, j, x in zip(ends, ends[1:], leaves, strict=False)
    ]
    return treedef.unflatten(map(jnp.asarray, new))


def assert_same(actual, expected):
    chex.assert_trees_all_equal(actual, expected)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    assert jax.tree.map(jax.typeof, actual) == jax.tree.map(jax.typeof, expected)


# --- Which part is which --------------------------------------------------------------------------


def test_map_params(row):
    """Of a chain with Adam, nothing but its moments is like the weights."""
    tx = optax.chain(row.make(), optax.adam(0.1))
    state = tx.init(PARAMS)
    seen = optax.tree.map_params(tx, lambda x: "weights", state, transform_non_params=lambda x: "other")
    jax.tree.map(lambda x, part: None, seen, state)  # It is a prefix: one mark may stand for a memory.
    adam, (clip, *_) = optax.tree.get(seen, "ScaleByAdamState"), seen
    assert set(jax.tree.leaves((adam.mu, adam.nu))) == {"weights"}
    assert set(jax.tree.leaves((clip, adam.count))) == {"other"}


def test_map_params_inside(row):
    """Nor does a wrapper, or a mask, change that."""
    tx = optax.chain(optax.masked(row.make(), {"dense": True, "head": False}), optax.trace(0.9))
    seen = optax.tree.map_params(tx, lambda x: "weights", tx.init(PARAMS))
    assert set(jax.tree.leaves(seen[1])) == {"weights"}
    assert "weights" not in map(str, jax.tree.leaves(seen[0]))


def test_shapes_without_arrays(row):
    tx = optax.chain(row.make(), optax.adam(0.1))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), jax.eval_shape(tx.init, PARAMS)) == jax.tree.map(
        lambda x: (x.shape, x.dtype), tx.init(PARAMS)
    )


# --- Saved and put back ---------------------------------------------------------------------------


def test_names_and_back(row):
    """Flat, each array with a name of its own; and as bytes of Flax."""
    tx = optax.chain(row.make(), optax.adam(0.1))
    state = filled(tx.init(PARAMS))
    flat = traverse_util.flatten_dict(serialization.to_state_dict(state), sep="/", keep_empty_nodes=True)
    arrays = {key: x for key, x in flat.items() if x is not traverse_util.empty_node}
    assert len(arrays) == len(jax.tree.leaves(state))
    nested = traverse_util.unflatten_dict(flat, sep="/")
    assert_same(serialization.from_state_dict(tx.init(PARAMS), nested), state)
    restored = serialization.from_bytes(tx.init(PARAMS), serialization.to_bytes(state))
    assert_same(jax.tree.map(jnp.asarray, restored), state)


def test_leaf_by_leaf(row):
    """As Equinox saves a tree: its leaves in order, put back into a state that is made anew."""
    state, file = filled(row.make().init(PARAMS)), io.BytesIO()
    for x in jax.tree.leaves(state):
        np.save(file, x)
    file.seek(0)
    like, treedef = jax.tree.flatten(row.make().init(PARAMS))
    assert_same(treedef.unflatten([jnp.asarray(np.load(file), x.dtype) for x in like]), state)
    assert file.read() == b""


def test_pickle(row):
    state = filled(row.make().init(PARAMS))
    assert_same(pickle.loads(pickle.dumps(state)), state)


@pytest.mark.parametrize("id", ["clip_by_global_norm", "zscore, unit", "init_box", "box, every=2"])
def test_exported(id):
    """A program with a state as argument and result, serialised, after the line in the docstring."""
    pytest.importorskip("flatbuffers")
    register()
    tx = BY_ID[id].make()
    exported = jax.export.export(jax.jit(tx.update))(GRADS, tx.init(PARAMS), PARAMS)
    loaded = jax.export.deserialize(exported.serialize())
    updates, state = loaded.call(GRADS, tx.init(PARAMS), PARAMS)
    expected = jax.jit(tx.update)(GRADS, tx.init(PARAMS), PARAMS)
    assert jax.tree.structure((updates, state)) == jax.tree.structure(expected)
    chex.assert_trees_all_close((updates, state), expected, rtol=1e-6, atol=1e-6)


def register():
    """Once a process; a doctest of the class may have done it."""
    for kind in (RecordedState, optax.EmptyState):
        try:
            jax.export.register_namedtuple_serialization(
                kind, serialized_name=f"{kind.__module__.split('.')[0]}.{kind.__name__}"
            )
        except ValueError as error:
            assert "already" in str(error) or "Duplicate" in str(error)


# --- Reset and replaced ---------------------------------------------------------------------------

# Their memory comes from the weights at the start, or is not a count or a mean.
NOT_FROM_ZEROS = {
    "norm_ball, initial, inf",
    "norm_sphere, initial",
    "init_box",
    "clip_by_norm, rule",
    "clip_by_norm, rule, unit",
    "spectral_ball, power",
    "gradient_mapping, init_box",
}


def test_zeros_reset(row):
    """A state of zeros is a new one, but where the start is remembered; and there it breaks nothing."""
    tx = row.make()
    state = tx.init(PARAMS)
    zeros = optax.tree.zeros_like(state)
    if row.id not in NOT_FROM_ZEROS:
        assert_same(zeros, state)
    else:
        chex.assert_tree_all_finite(tx.update(GRADS, zeros, PARAMS)[0])


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("id", ["clip_by_global_norm", "zscore, leaf", "init_box"])
def test_one_part_replaced(id):
    """The other parts of the chain go on from where they were."""
    tx = optax.named_chain(("adam", optax.scale_by_adam()), ("bound", BY_ID[id].make()))
    state = after_one_step(tx)
    state = {**state, "bound": tx.init(PARAMS)["bound"]}
    _, state = tx.update(GRADS, state, PARAMS)
    assert int(state["adam"].count) == 2
    (steps,) = [int(x) for key, x in metrics(state).items() if key.endswith("/steps")]
    assert steps == 1


def back(old, new):
    """A state of the old transform, as bytes, into the new one."""
    return serialization.from_bytes(new.init(PARAMS), serialization.to_bytes(after_one_step(old)))


FITS = {
    "another number": (clip_by_global_norm(1.0), clip_by_global_norm(2.0)),
    "another scope": (clip_by_norm(1.0), clip_by_norm(1.0, scope="unit")),
    "a number for a traced one": (clip_by_global_norm(1.0), clip_by_global_norm(jnp.float32(3.0))),
    "another policy": (clip_by_global_norm(1.0), clip_by_global_norm(1.0, nonfinite="zero")),
    "another z": (zclip(2.0), zclip(3.0, warmup=2)),
    "another kappa": (project_weights(init_box(1.0)), project_weights(init_box(2.0))),
}
DOES_NOT = {
    "a rule for a number": (clip_by_global_norm(1.0), zclip()),
    "a number for a rule": (zclip(), clip_by_global_norm(1.0)),
    "another name": (clip_by_global_norm(1.0), clip_by_global_norm(1.0, name="grads")),
    "another part": (clip_by_global_norm(1.0), project_weights(norm_sphere(1.0))),
    "no record": (clip_by_global_norm(1.0), clip_by_global_norm(1.0, record=False)),
}


@pytest.mark.parametrize("pair", FITS.values(), ids=FITS)
def test_a_changed_limit_that_fits(pair):
    old, new = pair
    restored = back(old, new)
    _, state = new.update(GRADS, jax.tree.map(jnp.asarray, restored), PARAMS)
    (steps,) = [int(x) for key, x in metrics(state).items() if key.endswith("/steps")]
    assert steps == 2
    assert jax.tree.structure(state) == jax.tree.structure(new.init(PARAMS))


@pytest.mark.parametrize("pair", DOES_NOT.values(), ids=DOES_NOT)
def test_a_changed_limit_that_does_not_fit(pair):
    with pytest.raises((ValueError, KeyError)):
        back(*pair)


def test_a_window_of_another_length_is_of_another_shape():
    """Flax restores it without a word, so the shapes are what tells."""
    old, new = (clip_by_global_norm(window_quantile(0.5, window=n)) for n in (4, 8))
    shapes = [sorted(x.shape for x in jax.tree.leaves(tx.init(PARAMS))) for tx in (old, new)]
    assert shapes[0] != shapes[1]
