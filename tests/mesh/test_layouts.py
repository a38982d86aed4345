"""Explicit meshes: matrices split in every way, and whole gradients beside weights that are split."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_clip as oc


@pytest.fixture
def mesh():
    mesh = jax.make_mesh(
        (2, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:4]
    )
    with jax.set_mesh(mesh):
        yield mesh


def layouts(rank):
    """All ways to split an array by two axes of a mesh."""
    for i, j in itertools.product(range(-1, rank), repeat=2):
        spec = [()] * rank
        for at, name in ((i, "x"), (j, "y")):
            if at >= 0:
                spec[at] += (name,)
        yield PartitionSpec(*(names or None for names in spec))
        if i == j >= 0:
            yield PartitionSpec(*(names[::-1] or None for names in spec))


def landed(constraint):
    tx = oc.project_weights(constraint)
    return lambda x: optax.apply_updates(x, tx.update(jnp.zeros_like(x), tx.init(x), x)[0])


def clipped(x):
    tx = oc.clip_singular_values(1.0)
    return tx.update(x, tx.init(x))[0]


MATRICES = {
    "ball": landed(oc.spectral_ball(1.0)),
    "eigh": landed(oc.spectral_ball(np.array([1.0, 1.0, 1.0, 2.0]), method="eigh")),
    "power": landed(oc.spectral_ball(1.0, power_iterations=2)),
    "initial": landed(oc.spectral_ball(oc.initial())),
    "clip": clipped,
    "violation": lambda x: oc.violation(x, oc.spectral_ball(1.0)),
}


@pytest.mark.parametrize("name", MATRICES)
def test_stacked_matrices_in_every_layout(mesh, name):
    specs = list(layouts(3))
    assert len(specs) == 19
    for spec in specs:
        sharding = NamedSharding(mesh, spec)
        x = jax.ShapeDtypeStruct((4, 4, 4), jnp.float32, sharding=sharding)
        result = jax.eval_shape(MATRICES[name], x)
        assert result.shape == () or result.sharding.spec == spec, spec


@pytest.mark.parametrize("spec", [(None, "x", None), ("y", "x", None)], ids=str)
def test_singular_values_of_stacked_matrices_split_inside(mesh, spec):
    x = np.random.default_rng(0).normal(size=(2, 2, 2)).astype(np.float32)
    u, s, v = np.linalg.svd(x.astype(np.float64))
    placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    expected = u @ (np.minimum(s, 0.5)[..., None] * v)
    ball = oc.spectral_ball(0.5)
    np.testing.assert_allclose(oc.project(placed, ball), expected, atol=1e-5)
    np.testing.assert_allclose(oc.violation(placed, ball), s.max() - 0.5, rtol=1e-5)
    power = oc.project(placed, oc.spectral_ball(0.5, power_iterations=2))
    np.testing.assert_allclose(power, x * np.minimum(1, 0.5 / s.max(-1))[:, None, None], rtol=1e-4)


by_role = oc.groups(lambda path, leaf: path)
TRANSFORMS = {
    "box": oc.project_weights(oc.box(-1.0, {"w": np.ones((4, 4), np.float32), "b": 1.0})),
    "every": oc.project_weights(oc.non_negative(), every=2),
    "init_box": oc.project_weights(oc.init_box(0.5)),
    "ball": oc.project_weights(oc.norm_ball(1.0, scope="global")),
    "ball, inf": oc.project_weights(oc.norm_ball(oc.initial(), ord=math.inf, scope="unit")),
    "ball, 1": oc.project_weights(oc.norm_ball(oc.initial(), ord=1, scope=(0,))),
    "sphere": oc.project_weights(oc.norm_sphere(oc.initial(), scope="unit")),
    "shell": oc.project_weights(oc.norm_shell(0.5, 1.0, scope=by_role)),
    "simplex": oc.project_weights(oc.simplex(scope=(0,))),
    "spectral_ball": oc.project_weights(oc.spectral_ball(1.0)),
    "power iterations": oc.project_weights(oc.spectral_ball(1.0, power_iterations=1)),
    "callable": oc.project_weights(lambda params: jax.tree.map(lambda x: x / 2, params)),
    "mapping, box": oc.gradient_mapping(oc.box(-1.0, 1.0)),
    "mapping, ball": oc.gradient_mapping(oc.norm_ball(1.0, scope="unit")),
    "mapping, simplex": oc.gradient_mapping(oc.simplex(1.0)),
    "mask_outward": oc.mask_outward(oc.box(-1.0, 1.0)),
    "qk_clip": oc.qk_clip(lambda path, leaf, eta: eta),
    "adamw": optax.add_decayed_weights(0.1),
}
WHOLE, SPLIT = PartitionSpec(None, None), [PartitionSpec("x", "y"), PartitionSpec(None, ("x", "y"))]


@pytest.mark.parametrize("name", TRANSFORMS)
def test_whole_beside_split(mesh, name):
    """The update is split where either is, as that of Optax's AdamW is."""
    tx = optax.with_extra_args_support(TRANSFORMS[name])

    def update(updates, params):
        return tx.update(updates, tx.init(params), params, max_logits=jnp.array(200.0))[0]

    def tree(spec):
        placed = NamedSharding(mesh, spec), NamedSharding(mesh, PartitionSpec(None))
        w, b = (jnp.zeros(shape).astype(jnp.float32) for shape in ((4, 4), (4,)))
        return {
            key: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
            for key, x, sharding in zip("wb", (w, b), placed, strict=True)
        }

    for spec in SPLIT:
        for pair in ((WHOLE, spec), (spec, WHOLE)):
            assert jax.eval_shape(update, *map(tree, pair))["w"].sharding.spec == spec, pair


@pytest.mark.parametrize("scope", ["leaf", "unit"])
def test_limits_of_split_weights_for_whole_gradients(mesh, scope):
    w, g = np.ones((2, 2), np.float32), np.full((2, 2), 5.0, np.float32)
    places = [NamedSharding(mesh, spec) for spec in (PartitionSpec(None, "x"), WHOLE)]
    tx = oc.clip_by_norm(oc.relative_to_params(1.0), scope=scope)
    for ours, theirs in (places, places[::-1]):
        params = jax.device_put(w, ours)
        updates, _ = jax.jit(tx.update)(jax.device_put(g, theirs), tx.init(params), params)
        np.testing.assert_allclose(updates, w, rtol=1e-6)


def test_the_landed_weights_are_those_of_one_device(mesh):
    params, updates = np.eye(4, dtype=np.float32) * 3, np.ones((4, 4), np.float32)
    split = NamedSharding(mesh, PartitionSpec("x", "y")), NamedSharding(mesh, WHOLE)
    tx = oc.project_weights(oc.norm_ball(2.0, scope="unit"))
    reached = (params + updates).astype(np.float64)
    expected = reached * 2.0 / np.linalg.norm(reached, axis=0)  # each column has the norm sqrt(19)
    for ours, theirs in (split, split[::-1]):
        p, u = jax.device_put(params, ours), jax.device_put(updates, theirs)
        new, _ = jax.jit(tx.update)(u, tx.init(p), p)
        np.testing.assert_allclose(optax.apply_updates(p, new), expected, rtol=2e-6)


def test_what_only_jit_knows_to_be_split_is_not_joined():
    """Types say nothing of it, and no mesh is in force: the number of devices decides."""
    split = NamedSharding(jax.make_mesh((8,), ("x",)), PartitionSpec(None, "x"))
    tx = oc.clip_by_norm(1.0, scope="unit", record=False)
    clip = jax.jit(lambda grads: tx.update(grads, tx.init(grads))[0], in_shardings=split)
    text = (
        clip.lower(dict.fromkeys("ab", jax.ShapeDtypeStruct((16, 64), jnp.float32))).compile().as_text()
    )
    assert "all-gather" not in text and "collective-permute" not in text
