"""Matrix functions on meshes: as on one device, and no matrix is gathered."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_clip._geometry import matrices
from test_matrices import F32, cap, eps


def collectives(compiled):
    names = r" (all-[a-z]+|reduce-scatter|collective-[a-z]+)(?:-start)?\("
    return set(re.findall(names, compiled.as_text()))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda k: k.name)
@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((64, 32), P("a", None)),
        ((64, 32), P(None, "a")),
        ((64, 32), P("a", "b")),
        ((32, 64), P("a", "b")),
        ((8, 16, 8), P("a")),
        ((4, 16, 8), P("a", None, "b")),
        ((10, 6), P("b", None)),
    ],
    ids=str,
)
def test_on_a_mesh_nothing_is_gathered(shape, spec, kind):
    x = jnp.asarray(np.random.default_rng(3).normal(size=shape) / 4, F32)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind))
    split = jax.device_put(x, NamedSharding(mesh, spec))
    for function in (lambda x: cap(x, method="polar", landing=True), _top):
        run = jax.jit(function).lower(split).compile()
        assert collectives(run) <= {"all-reduce", "reduce-scatter", "all-to-all", "collective-permute"}
        new = run(split)
        np.testing.assert_allclose(new, jax.jit(function)(x), rtol=0, atol=4 * eps(F32))
        if kind == AxisType.Explicit and new.ndim == x.ndim:
            assert new.sharding.is_equivalent_to(split.sharding, x.ndim)


def _top(x):
    return matrices.largest_singular_value(x, method="polar")


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda k: k.name)
def test_eigh_on_a_mesh(kind):
    x = jnp.asarray(np.random.default_rng(3).normal(size=(64, 32)) / 4, F32)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind))
    run = jax.jit(lambda x: cap(x, method="eigh", landing=True))
    new = run(jax.device_put(x, NamedSharding(mesh, P("a", "b"))))
    np.testing.assert_allclose(new, run(x), rtol=0, atol=4 * eps(F32))
