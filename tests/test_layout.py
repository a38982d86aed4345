"""How norms are laid out is decided in one place: by the mesh, and then by the number of devices."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_clip as oc

SPECS = {"kernel": P("data", "model"), "stacked": P(None, "data"), "bias": P("model"), "scale": P()}
TREE = {"kernel": np.ones((4, 2)), "stacked": np.ones((2, 4)), "bias": np.ones(2), "scale": np.ones(2)}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("scope", ["unit", -1, (0,), "leaf"])
def test_a_mesh_of_one_device(kind, scope):
    """How a large program is tried on one chip. Unlike types cannot be concatenated."""
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(kind, kind))
    tree = {
        key: jax.device_put(jnp.asarray(x, jnp.float32), NamedSharding(mesh, SPECS[key]))
        for key, x in TREE.items()
    }
    for tx in (
        oc.clip_by_norm(oc.zscore(1.0), scope=scope),
        oc.project_weights(oc.norm_ball(0.5, scope=scope)),
    ):
        state = tx.init(tree)
        updates, after = jax.eval_shape(tx.update, tree, state, tree)
        assert shapes((updates, after)) == shapes((tree, state))


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@pytest.mark.parametrize("scope", ["unit", "leaf"])
def test_norms_on_an_explicit_mesh_of_one_device(scope):
    """Each column of ones is as long as the root of its length."""
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    kernel = jax.device_put(jnp.ones((4, 2)), NamedSharding(mesh, SPECS["kernel"]))
    bias = jax.device_put(jnp.ones(9), NamedSharding(mesh, SPECS["scale"]))
    found = jax.jit(lambda tree: oc.tree_norms(tree, scope=scope))({"bias": bias, "kernel": kernel})
    wanted = [2, 2] if scope == "unit" else [np.sqrt(8)]
    np.testing.assert_allclose(np.asarray(found["kernel"]).ravel(), wanted, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(found["bias"]).ravel(), [3], rtol=1e-6)


def test_no_other_place_counts_devices():
    package = Path(oc.__file__).parent
    found = [path.name for path in package.rglob("*.py") if "device_count" in path.read_text("utf-8")]
    assert found == ["_mesh.py"]
