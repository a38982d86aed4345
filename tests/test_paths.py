"""Names of leaves in every container: all fields keep theirs, only a box's own `value` is left out."""

import dataclasses
from typing import Any, NamedTuple

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from optax_clip import (
    clip_by_norm,
    groups,
    init_box,
    metrics,
    norm_ball,
    project,
    project_weights,
    tree_norms,
    where,
)


class Tuple(NamedTuple):
    query: Any
    key: Any
    value: Any


@flax.struct.dataclass
class Struct:
    query: Any
    key: Any
    value: Any


@chex.dataclass
class Chex:
    query: Any
    key: Any
    value: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Registered:
    query: Any
    key: Any
    value: Any


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Module:
    """As Equinox registers a module: fields by the name of the attribute."""

    query: Any
    key: Any
    value: Any

    def tree_flatten_with_keys(self):
        fields = ("query", "key", "value")
        return [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in fields], None

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(*children)


class Variable(NamedTuple):
    """Not NNX's, in spite of its name."""

    value: Any


CONTAINERS = [dict, Tuple, Struct, Chex, Registered, Module]
NAMES = {"attention/query", "attention/key", "attention/value"}


def attention(container, fill=(1.0, 2.0, 3.0)):
    query, key, value = (jnp.full((2, 2), x) for x in fill)
    return {"attention": container(query=query, key=key, value=value)}


def paths_of(tree):
    paths = []
    where(lambda path, leaf: paths.append(path) or True)(tree)
    return paths


@pytest.mark.parametrize("container", CONTAINERS, ids=lambda c: c.__name__)
def test_fields(container):
    """In masks, scopes, groups, metrics and formulas."""
    tree = attention(container)
    assert set(paths_of(tree)) == NAMES
    mask = where(lambda path, leaf: path.endswith("/value"))(tree)
    assert jax.tree.leaves(mask).count(True) == 1
    seen = set()
    tree_norms(tree, scope=lambda path, leaf: seen.add(path) or "leaf")
    assert seen == NAMES
    norms = tree_norms(tree, scope=groups(lambda path, leaf: path))
    assert {path: float(x) for path, x in norms.items()} == dict(
        zip(sorted(NAMES), (4, 2, 6), strict=True)
    )
    found = metrics(clip_by_norm(1.0, record="scopes").init(tree))
    assert {f"clip/{path}/norm_before" for path in NAMES} <= set(found)
    ball = norm_ball(lambda path, leaf: 0.0 if path.endswith("value") else 9.0)
    for path, x in jax.tree_util.tree_leaves_with_path(project(tree, ball)):
        assert bool(jnp.all(x == 0)) == ("value" in jax.tree_util.keystr(path))


@pytest.mark.parametrize("container", CONTAINERS, ids=lambda c: c.__name__)
def test_errors(container):
    """They name the leaf that is meant."""
    tree = attention(container)
    tree["attention"] = container(query=jnp.ones((2, 2)), key=jnp.ones((2, 2)), value=jnp.ones(2))
    with pytest.raises(ValueError, match="'attention/value'"):
        tree_norms(tree, scope=1)


def test_prefix_tree_of_radii():
    """The prefix may be a dict beside weights of any container."""
    radii = {"attention": {"query": 9.0, "key": 9.0, "value": 0.0}}
    projected = project(attention(Tuple), norm_ball(radii))["attention"]
    assert not projected.value.any()
    np.testing.assert_array_equal(projected.key, 2.0)


class Layer(NamedTuple):
    value: Any
    bias: Any


def test_kernel_beside_a_bias():
    """A bias that starts at 0 has the bound of the field `value` beside it: 1 times 0.5."""
    params = Layer(jnp.full((2, 2), 0.5), jnp.zeros(2))
    tx = project_weights(init_box(1.0))
    updates, _ = tx.update(Layer(jnp.zeros((2, 2)), jnp.full(2, 100.0)), tx.init(params), params)
    np.testing.assert_array_equal(optax.apply_updates(params, updates).bias, 0.5)


def test_variables_of_nnx():
    """The same with Variables around the arrays as with the arrays alone, a field `value` included."""

    class Attention(nnx.Module):
        def __init__(self):
            self.query, self.value = (nnx.Param(jnp.ones((2, 2))) for _ in range(2))

    state = nnx.state(Attention(), nnx.Param)
    assert sorted(paths_of(state)) == ["query", "value"]
    assert sorted(paths_of(nnx.to_pure_dict(state))) == ["query", "value"]


def test_boxes_of_linen():
    boxed = {"value": linen.Partitioned(jnp.ones((2, 2)), names=("in", None)), "key": jnp.ones(2)}
    assert sorted(paths_of(boxed)) == ["key", "value"]
    assert paths_of({"a": Variable(jnp.ones(2))}) == ["a/value"]


def test_a_wrapper_inside_a_box():
    """Only the box's own step is left out, not a field below it."""
    boxed = {"w": linen.Partitioned(Variable(jnp.ones(2)), names=(None,))}
    assert paths_of(boxed) == ["w/value"]
