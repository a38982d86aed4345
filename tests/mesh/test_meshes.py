"""One meaning on a mesh, inside `shard_map`, under a mapped axis; and what is sent for it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_clip as oc
from benchmarks._hlo import collectives

MESH = {"x": 4, "y": 2}
SPECS = {"whole": P(), "rows": P("x"), "columns": P(None, "y"), "both": P("x", "y"), "half": P("x", "y")}
SHAPES = {"whole": (6,), "rows": (8,), "columns": (3, 4), "both": (8, 4), "half": (8, 4)}
KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)


def numbers(seed=0):
    random = np.random.default_rng(seed)
    return {
        key: jnp.asarray(random.normal(size=shape), jnp.bfloat16 if key == "half" else jnp.float32)
        for key, shape in SHAPES.items()
    }


def mesh_of(kind=AxisType.Auto):
    return jax.make_mesh(tuple(MESH.values()), tuple(MESH), axis_types=(kind,) * len(MESH))


def put(tree, mesh):
    return {key: jax.device_put(x, NamedSharding(mesh, SPECS[key])) for key, x in tree.items()}


def project(*args, **kwargs):
    return oc.project_weights(*args, **kwargs)


# Each with the most all-reduces of an ordinary step, and of what a norm out of the safe range adds.
# XLA joins those of all leaves, so their number does not count: there is one for each axis of the mesh
# that splits a leaf, times how often one thing follows from another. A clip by norm measures once; so do
# a clip by value, a box and a norm set, for the record. A unit then asks for the whole tree, for the
# record. Order 1 and the simplex find a root: the second number holds what a pass of the search sends.
TRANSFORMS = {
    "clip_by_global_norm": (lambda: oc.clip_by_global_norm(1.0), 2, 2),
    "clip_by_norm, leaf": (lambda: oc.clip_by_norm(1.0), 2, 2),
    "clip_by_norm, unit": (lambda: oc.clip_by_norm(1.0, scope="unit"), 4, 1),
    "autoclip": (lambda: oc.autoclip(), 2, 2),
    "zclip": (lambda: oc.zclip(warmup=1), 2, 2),
    "adagc": (lambda: oc.adagc(warmup=2), 2, 2),
    "adaptive_grad_clip": (lambda: oc.adaptive_grad_clip(), 4, 2),
    "skip_spikes": (lambda: oc.skip_spikes(optax.identity(), oc.zscore(1.0, warmup=1)), 2, 2),
    "clip_by_value": (lambda: oc.clip_by_value(0.5), 2, 4),
    "box": (lambda: project(oc.box(-0.5, 0.5)), 2, 2),
    "norm_ball": (lambda: project(oc.norm_ball(1.0)), 2, 2),
    "norm_ball, global": (lambda: project(oc.norm_ball(1.0, scope="global")), 2, 2),
    "norm_ball, unit": (lambda: project(oc.norm_ball(1.0, scope="unit")), 4, 1),
    "norm_ball, 1": (lambda: project(oc.norm_ball(1.0, ord=1)), 8, 4),
    "norm_ball, inf": (lambda: project(oc.norm_ball(1.0, ord=math.inf)), 2, 4),
    "norm_sphere": (lambda: project(oc.norm_sphere(1.0)), 2, 2),
    "norm_shell": (lambda: project(oc.norm_shell(0.1, 1.0)), 2, 2),
    "simplex": (lambda: project(oc.simplex(1.0)), 8, 2),
    "mask_outward": (lambda: oc.mask_outward(oc.box(-0.5, 0.5)), 2, 0),
}


def compiled(tx, mesh):
    grads, params = put(numbers(0), mesh), put(numbers(1), mesh)
    state = tx.init(params)
    return jax.jit(tx.update).lower(grads, state, params).compile(), (grads, state, params)


def assert_close(actual, expected):
    found = jax.tree_util.tree_leaves_with_path(actual)
    for (path, x), y in zip(found, jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        eps = float(jnp.finfo(x.dtype).eps) if jnp.issubdtype(x.dtype, jnp.floating) else 0
        x, y = (np.asarray(z).astype(np.float64) for z in (x, y))
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(x, y, rtol=max(32 * eps, 2e-6), atol=1e-6 + eps, err_msg=where)


@functools.cache
def on_one_device(name):
    tx = TRANSFORMS[name][0]()
    grads, params = numbers(0), numbers(1)
    return jax.jit(tx.update)(grads, tx.init(params), params)


# --- A mesh --------------------------------------------------------------------------------------


BRIEF = ("clip_by_global_norm", "clip_by_norm, unit", "clip_by_value", "zclip", "box", "norm_ball")
ON_MESHES = [(name, AxisType.Auto) for name in TRANSFORMS] + [
    (name, AxisType.Explicit) for name in BRIEF
]


@pytest.mark.parametrize(("name", "kind"), ON_MESHES, ids=lambda x: getattr(x, "name", x))
def test_nothing_is_gathered(name, kind):
    """Only sums of scalars and of units travel; and the mixed tree comes out as on one device."""
    make, ordinary, careful = TRANSFORMS[name]
    run, args = compiled(make(), mesh_of(kind))
    always, sometimes = collectives(run.as_text())
    assert {*always, *sometimes} <= {"all-reduce"}
    assert always["all-reduce"] <= ordinary
    assert sometimes["all-reduce"] <= careful
    updates, state = run(*args)
    assert_close((updates, oc.metrics(state)), _with_metrics(on_one_device(name)))
    for key, x in updates.items():
        assert x.sharding.is_equivalent_to(args[0][key].sharding, x.ndim), key


def _with_metrics(result):
    return result[0], oc.metrics(result[1])


@KINDS
def test_the_global_norm_sends_as_much_as_that_of_optax(kind):
    """One all-reduce for an axis of the mesh that splits a leaf: XLA joins those of all leaves."""
    with jax.numpy_dtype_promotion("standard"):
        theirs, _ = collectives(compiled(optax.clip_by_global_norm(1.0), mesh_of(kind))[0].as_text())
    ours, _ = collectives(compiled(oc.clip_by_global_norm(1.0), mesh_of(kind))[0].as_text())
    assert ours == theirs == {"all-reduce": len(MESH)}


@pytest.mark.parametrize("count", [1, 20])
def test_one_all_reduce_over_one_axis(count):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    grads = [jax.device_put(jnp.ones((8, 2)), NamedSharding(mesh, P("data")))] * count
    tx = oc.clip_by_global_norm(1.0)
    program = jax.jit(tx.update).lower(grads, tx.init(grads)).compile().as_text()
    assert collectives(program)[0] == {"all-reduce": 1}


@KINDS
def test_the_spectral_ball_by_products_gathers_no_matrix(kind):
    mesh, random = mesh_of(kind), np.random.default_rng(0)
    specs = {"rows": P("x"), "columns": P(None, "y"), "both": P("x", "y")}
    params = {key: jnp.asarray(random.normal(size=(16, 8)), jnp.float32) for key in specs}
    split = {key: jax.device_put(x, NamedSharding(mesh, specs[key])) for key, x in params.items()}
    grads = jax.tree.map(lambda x: x / 4, split)
    tx = project(oc.spectral_ball(1.0, method="polar"))
    run = jax.jit(tx.update).lower(grads, tx.init(split), split).compile()
    always, sometimes = collectives(run.as_text())
    if kind == AxisType.Explicit:  # on Auto meshes the rows are split further than the leaf was
        assert (always + sometimes)["all-gather"] == 0
    updates, _ = run(grads, tx.init(split), split)
    expected, _ = tx.update(jax.tree.map(lambda x: x / 4, params), tx.init(params), params)
    for key in specs:
        np.testing.assert_allclose(updates[key], expected[key], rtol=0, atol=1e-6)
        assert kind == AxisType.Auto or updates[key].sharding.is_equivalent_to(split[key].sharding, 2)


@KINDS
def test_the_spectral_ball_on_sides_that_no_axis_divides(kind):
    tx = project(oc.spectral_ball(1.0))
    run, args = compiled(tx, mesh_of(kind))
    updates, _ = run(*args)
    grads, params = numbers(0), numbers(1)
    expected, _ = tx.update(grads, tx.init(params), params)
    for key in ("rows", "columns", "both", "whole"):
        np.testing.assert_allclose(updates[key], expected[key], rtol=1e-5, atol=2e-6)


EAGER = {
    **{name: TRANSFORMS[name][0] for name in BRIEF},
    "every": lambda: project(oc.norm_ball(1.0), every=2),
}


@KINDS
@pytest.mark.parametrize("name", EAGER)
def test_eagerly(name, kind):
    """The same without `jit`; updates and state stay where gradients and state were."""
    mesh, tx = mesh_of(kind), EAGER[name]()
    grads, params = put(numbers(0), mesh), put(numbers(1), mesh)
    state = tx.init(params)
    updates, new = tx.update(grads, state, params)
    if name in TRANSFORMS:
        assert_close((updates, oc.metrics(new)), _with_metrics(on_one_device(name)))
    for x, y in zip(jax.tree.leaves((updates, new)), jax.tree.leaves((grads, state)), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


# --- shard_map -----------------------------------------------------------------------------------

INSIDE = {
    "zscore, leaf": lambda: oc.clip_by_norm(oc.zscore(1.0, warmup=1)),
    "window_quantile, leaf": lambda: oc.clip_by_norm(oc.window_quantile(0.5, window=2)),
    "relative_to_params": lambda: oc.clip_by_norm(oc.relative_to_params(0.5)),
    "adagc": lambda: oc.adagc(warmup=2),
    "clip_by_update_rms": lambda: oc.clip_by_update_rms(0.5),
    "clip_by_value": lambda: oc.clip_by_value(0.5),
    "skip_spikes": lambda: oc.skip_spikes(optax.identity(), oc.zscore(1.0, warmup=1)),
    "box": lambda: project(oc.box(-0.5, 0.5)),
    "norm_ball, 1": lambda: project(oc.norm_ball(1.0, ord=1)),
    "norm_ball, every": lambda: project(oc.norm_ball(1.0), every=2),
    "norm_sphere": lambda: project(oc.norm_sphere(1.0)),
    "norm_shell": lambda: project(oc.norm_shell(3.0, 4.0)),
    "simplex": lambda: project(oc.simplex(1.0)),
    "mask_outward": lambda: oc.mask_outward(oc.box(-0.5, 0.5)),
}


@pytest.mark.parametrize("name", INSIDE)
def test_inside_shard_map(name):
    """Sharded leaves are summed over their axes and replicated ones counted once, step after step."""
    tx = INSIDE[name]()
    params = numbers(1)
    run = jax.shard_map(tx.update, mesh=mesh_of(), in_specs=(SPECS, P(), SPECS), out_specs=(SPECS, P()))
    step, alone = jax.jit(run), jax.jit(tx.update)
    state = expected_state = tx.init(params)
    for size in (1.0, 8.0, 0.5):
        grads = jax.tree.map(lambda x: (x * size).astype(x.dtype), numbers(0))  # noqa: B023
        updates, state = step(grads, state, params)
        expected, expected_state = alone(grads, expected_state, params)
        assert_close((updates, state), (expected, expected_state))


def rows_mesh():
    return jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))


def test_units_inside_shard_map():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(8, 16)), jnp.float32)

    def run(spec, axis_name):
        tx = oc.clip_by_norm(0.5, scope="unit", axis_name=axis_name)
        step = jax.shard_map(tx.update, mesh=rows_mesh(), in_specs=(spec, P()), out_specs=(spec, P()))
        return jax.jit(step)(x, tx.init(x))

    alone = oc.clip_by_norm(0.5, scope="unit")
    expected = alone.update(x, alone.init(x))
    with pytest.raises(ValueError, match=r"Expected axis_name for leaf '' of shape \(1, 16\)"):
        run(P("i"), None)
    assert_close(run(P("i"), "i"), expected)  # Each device has a part of every unit.
    assert_close(run(P(None, "i"), ()), expected)  # Each device has whole units.


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e25])
def test_one_device_alone_needs_the_careful_sum(size):
    """All devices take the branch that sums over them, or they would wait for each other for ever."""
    kernel = jnp.asarray(np.random.default_rng(5).normal(size=(4, 8)), jnp.float32).at[:, 3].set(size)
    tree = {"kernel": kernel, "bias": jnp.ones(8)}
    specs = {"kernel": P(None, "i"), "bias": P("i")}
    tx = oc.clip_by_norm(0.5, scope="unit", axis_name=())
    state = tx.init(tree)
    run = jax.shard_map(tx.update, mesh=rows_mesh(), in_specs=(specs, P()), out_specs=(specs, P()))
    updates, _ = jax.jit(run)(tree, state)
    expected, _ = oc.clip_by_norm(0.5, scope="unit").update(tree, state)
    assert_close(updates, expected)
    # Four equal entries: of a norm of 0.5 each is 0.25.
    np.testing.assert_allclose(updates["kernel"][:, 3], min(size, 0.25), rtol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda **more: oc.clip_by_norm(oc.relative_to_params(0.1), scope="unit", **more),
        lambda **more: project(oc.norm_ball(0.5, scope="unit", **more)),
        lambda **more: project(oc.norm_ball(0.5, ord=1, scope="unit", **more)),
        lambda **more: project(oc.simplex(1.0, scope="unit", **more)),
        lambda **more: project(oc.simplex(1.0, upper=0.5, scope="unit", **more)),
    ],
    ids=["clip, by a rule", "norm_ball", "norm_ball, 1", "simplex", "simplex, upper"],
)
def test_whole_units_on_each_device_beside_a_bias_in_parts(make):
    """Limits, flags and turns of a search differ between devices, and the metrics are of all."""
    random = np.random.default_rng(6)
    grads, params = (
        {"kernel": jnp.asarray(scale * random.normal(size=(4, 8)), jnp.float32), "bias": jnp.ones(8)}
        for scale in (np.logspace(-1, 1, 8), np.logspace(1, 0, 8))
    )
    specs = {"kernel": P(None, "i"), "bias": P("i")}
    tx, alone = make(axis_name=()), make()
    step = jax.shard_map(
        tx.update, mesh=rows_mesh(), in_specs=(specs, P(), specs), out_specs=(specs, P())
    )
    updates, state = jax.jit(step)(grads, tx.init(params), params)
    expected = jax.jit(alone.update)(grads, alone.init(params), params)
    assert_close((updates, oc.metrics(state)), _with_metrics(expected))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mesh_axis_of_size_one(dtype):
    """A sum that keeps a dimension drops the name of a mesh axis of size 1 from it."""
    mesh = jax.make_mesh((8, 1), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    x = jnp.asarray(np.arange(1, 9).reshape(8, 1), dtype)
    placed = jax.device_put(x, NamedSharding(mesh, P("x", "y")))
    for tx in (
        oc.clip_by_norm(2.0, scope=1),
        project(oc.norm_ball(2.0, scope=1)),
        project(oc.norm_ball(2.0, ord=1, scope=1)),
        project(oc.simplex(2.0, scope=1)),
    ):
        with jax.set_mesh(mesh):
            updates, _ = jax.jit(tx.update)(placed, tx.init(placed), placed)
        expected, _ = jax.jit(tx.update)(x, tx.init(x), x)
        assert_close(updates, expected)
        assert updates.sharding.is_equivalent_to(placed.sharding, 2)


UNTYPED = {
    "global": lambda **more: oc.clip_by_global_norm(1.0, **more),
    "leaf": lambda **more: oc.clip_by_norm(1.0, **more),
    "unit": lambda **more: oc.clip_by_norm(0.5, scope="unit", **more),
    "value": lambda **more: oc.clip_by_value(0.5, **more),
    "adagc": lambda **more: oc.adagc(warmup=2, **more),
    "skip": lambda **more: oc.skip_spikes(optax.identity(), 1.0, **more),
    "box": lambda **more: project(oc.box(-0.5, 0.5, **more)),
    "outward": lambda **more: oc.mask_outward(oc.box(-0.5, 0.5, **more)),
    "init_box": lambda **more: project(oc.init_box(0.5, **more)),
    "norm_ball": lambda **more: project(oc.norm_ball(1.0, **more)),
    "norm_ball, unit": lambda **more: project(oc.norm_ball(1.0, scope="unit", **more)),
    "norm_ball, 1": lambda **more: project(oc.norm_ball(1.0, ord=1, **more)),
    "norm_ball, inf": lambda **more: project(oc.norm_ball(0.5, ord=math.inf, **more)),
    "norm_sphere": lambda **more: project(oc.norm_sphere(1.0, **more)),
    "norm_shell": lambda **more: project(oc.norm_shell(30.0, 40.0, **more)),
    "simplex": lambda **more: project(oc.simplex(1.0, **more)),
}


@pytest.mark.parametrize("name", UNTYPED)
def test_axis_name_where_types_say_nothing(name):
    """In an unchecked `shard_map`, and under `vmap` where no unit is asked for."""
    tx, alone = UNTYPED[name](axis_name="i"), UNTYPED[name]()
    random = np.random.default_rng(2)
    x, p = (jnp.asarray(random.normal(size=(8, 16)), jnp.float32) for _ in range(2))
    state = alone.init(p)
    expected = jax.jit(alone.update)(x, state, p)
    specs = {"mesh": rows_mesh(), "in_specs": (P("i"), P(), P("i")), "out_specs": (P("i"), P())}
    assert_close(jax.jit(jax.shard_map(tx.update, check_vma=False, **specs))(x, state, p), expected)
    if "unit" not in name:
        step = jax.jit(jax.vmap(lambda g, p: tx.update(g, state, p), axis_name="i"))
        updates, states = step(x, p)
        assert_close(updates, expected[0])
        assert_close(jax.tree.map(lambda s: s[3], states), expected[1])


def test_the_violation_of_what_types_say_nothing_of():
    x = jnp.arange(8.0)
    for ball in (oc.box, oc.norm_shell):
        excess = lambda x: oc.violation(x, ball(0.0, 5.0, axis_name="i"))  # noqa: B023, E731
        found = jax.vmap(excess, axis_name="i")(x)
        np.testing.assert_allclose(found, jnp.full(8, oc.violation(x, ball(0.0, 5.0))), rtol=1e-6)


def test_under_pmap():
    clip = functools.partial(oc.clip_tree, max_norm=1.0, axis_name="i")
    clipped, norms = jax.pmap(clip, axis_name="i")(jnp.ones((8, 2)))
    np.testing.assert_allclose(norms, jnp.full(8, 4.0))  # sqrt(16)
    np.testing.assert_allclose(clipped, jnp.full((8, 2), 0.25), rtol=1e-6)


@pytest.mark.parametrize("power_iterations", [None, 20])
def test_whole_matrices_on_each_device(power_iterations):
    """Experts split over the devices, each a matrix of its own."""
    experts = jnp.asarray(np.random.default_rng(4).normal(size=(8, 5, 3)), jnp.float32)
    make = functools.partial(oc.spectral_ball, 1.0, power_iterations=power_iterations)
    step = lambda x: oc.project(x, make(axis_name=()))  # noqa: E731
    run = jax.shard_map(step, mesh=rows_mesh(), in_specs=P("i"), out_specs=P("i"))
    assert_close(jax.jit(run)(experts), oc.project(experts, make()))


@pytest.mark.parametrize("axis_name", ["nowhere", ("i", "nowhere")])
def test_an_axis_that_is_not_there(axis_name):
    said = rf"Expected axis_name to name axes that .* maps here, got axis_name={axis_name!r}"
    said = said.replace("(", r"\(").replace(")", r"\)")
    wrong = (
        functools.partial(oc.global_norm, axis_name=axis_name),
        lambda x: oc.project(x, oc.norm_ball(1.0, axis_name=axis_name)),
        lambda x: oc.violation(x, oc.box(0.0, 1.0, axis_name=axis_name)),
    )
    for function in wrong:
        with pytest.raises(NameError, match=said):
            function(jnp.ones(8))
        with pytest.raises(NameError, match=said):
            jax.shard_map(function, mesh=rows_mesh(), in_specs=P("i"), out_specs=P("i"))(jnp.ones(8))


# --- Stacked layers ------------------------------------------------------------------------------


def test_a_norm_for_each_of_the_scanned_layers():
    """What a loop over the layers would clip, layer by layer, leaf by leaf."""

    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def layers(rngs):
        return nnx.Linear(4, 4, rngs=rngs)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def forward(layer, x):
        return jnp.tanh(layer(x))

    model = layers(nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(3).normal(size=(5, 4)), jnp.float32)
    grads = nnx.grad(lambda model: 50 * jnp.sum(forward(model, x) ** 2))(model)
    tx = oc.clip_by_norm(1.0, scope=oc.per_layer)
    params = nnx.state(model, nnx.Param)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    for got, grad in zip(jax.tree.leaves(updates), jax.tree.leaves(grads), strict=True):
        assert got.shape[0] == 3
        for layer, before in zip(np.asarray(got), np.asarray(grad), strict=True):
            norm = np.linalg.norm(before.astype(np.float64))
            np.testing.assert_allclose(layer, before * min(1, 1 / norm), rtol=1e-5, atol=1e-7)
    assert 0 < oc.metrics(state)["clip/fraction"] <= 1
