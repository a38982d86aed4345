"""Scopes by unit on several devices: the program grows with the leaves, not with their square."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_clip as oc


def lines(tx, leaves):
    """The lines of the compiled program, for matrices in parts and biases on each device."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    struct = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    pairs = [((8, 3), P("data")), ((3,), P())]
    params = [struct(s, sharding=NamedSharding(mesh, spec)) for s, spec in pairs * (leaves // 2)]
    state = jax.eval_shape(tx.init, params)
    return jax.jit(tx.update).lower(params, state, params).compile().as_text().count("\n")


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="older XLA repeats more: 3 times the lines")
@pytest.mark.parametrize(
    "tx",
    [oc.clip_by_norm(1.0, scope="unit"), oc.project_weights(oc.norm_ball(1.0, scope="unit"))],
    ids=["clip", "ball"],
)
def test_twice_the_leaves_twice_the_program(tx):
    """0.2 had 3 times the lines for a clip of 24 leaves that it had for 12."""
    few, many, more = (lines(tx, n) for n in (4, 8, 16))
    assert more - many <= 2.2 * (many - few)
