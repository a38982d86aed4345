"""The code of the guides that makes a mesh."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pages import ON_DEVICES, names
from test_recipes import flat, gradient, mean_of_clipped, page


@pytest.mark.parametrize("place", ON_DEVICES)
def test_code_runs(place):
    names(place)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_each_rank(kind):
    found = page("Each rank, before the mean")
    ranks = found["ranks"]
    split = (np.split(found[name], ranks) for name in "xy")
    parts = [gradient(*one) for one in zip(*split, strict=True)]
    expected, finite = mean_of_clipped(parts)
    assert int(found["finite"]) == finite == ranks - 1 == 7
    np.testing.assert_allclose(flat(found["grads"]), expected, rtol=1e-5, atol=1e-6)

    mesh = jax.make_mesh((ranks,), ("data",), axis_types=(kind,))
    specs = P(), P("data"), P("data")
    with jax.numpy_dtype_promotion("standard"):
        step = jax.shard_map(
            found["per_rank"], mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False
        )
        placed = jax.device_put((found["x"], found["y"]), NamedSharding(mesh, P("data")))
        grads, _ = jax.jit(step)(found["params"], *placed)
    np.testing.assert_allclose(flat(grads), expected, rtol=1e-5, atol=1e-6)
