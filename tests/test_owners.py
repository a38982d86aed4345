"""What a state remembers belongs to one tree: kept for that one, refused for every other."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.core import FrozenDict
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import optax_clip
from optax_clip import (
    ThresholdRule,
    adagc,
    clip_by_norm,
    ema_ratio,
    gradient_mapping,
    groups,
    init_box,
    initial,
    metrics,
    norm_ball,
    norm_shell,
    norm_sphere,
    normalize_by_norm,
    project_weights,
    record_norms,
    running_quantile,
    skip_spikes,
    spectral_ball,
    window_quantile,
    window_zscore,
    zclip,
    zscore,
)
from optax_clip._owners import Owner
from test_readme import CODE

FIRST = groups(lambda path, x: path[0])
OWN = ThresholdRule(lambda n: (jnp.zeros_like(n),), lambda n, s, w, t: (jnp.full_like(n, 1.0), (n,)))
RULES = {
    "zscore": zscore(2.0),
    "running_quantile": running_quantile(0.5),
    "window_quantile": window_quantile(0.5, window=4),
    "window_zscore": window_zscore(2.0, window=4),
    "ema_ratio": ema_ratio(1.05),
    "own": OWN,
}
SPHERE = norm_sphere(initial())
REMEMBER = {
    **{
        f"{k}, {s}": clip_by_norm(rule, scope=s) for k, rule in RULES.items() for s in ("global", "unit")
    },
    **{f"{k}, groups": clip_by_norm(rule, scope=FIRST) for k, rule in RULES.items()},
    "a table": clip_by_norm(
        {"a": zscore(2.0), "b": 1.0, "c": optax.constant_schedule(1.0)}, scope=FIRST
    ),
    "adagc": adagc(),
    "normalize": normalize_by_norm(zscore(2.0)),
    "skip_spikes": skip_spikes(optax.sgd(0.1), zscore(2.0)),
    "initial": project_weights(SPHERE),
    "mapping, initial": gradient_mapping(SPHERE),
    "initial, inf": project_weights(norm_ball(initial(), ord=np.inf)),
    "initial, unit": project_weights(norm_shell(initial(0.5), initial(2.0), scope="unit")),
    "initial, every": project_weights(SPHERE, every=2),
    "init_box": project_weights(init_box(1.0)),
    "power_iterations": project_weights(spectral_ball(power_iterations=1)),
    "initial, spectral": project_weights(spectral_ball(initial(), power_iterations=1)),
    "record": record_norms(),
    "record of groups": record_norms(FIRST),
    "record of scopes": clip_by_norm(1.0, record="scopes"),
    "record of labels": clip_by_norm(1.0, scope=FIRST),
}
NAMES = {
    "mapping, initial": "mapping",
    "normalize": "normalize",
    "skip_spikes": "skip",
    "record": "norms",
    "record of groups": "norms",
}
X, Y = jax.ShapeDtypeStruct((3, 2), jnp.float32), jax.ShapeDtypeStruct((4, 2), jnp.float32)
# The tree that init saw, another, and the first path that differs.
CHANGES = {
    "replaced": ({"a": X, "b": X}, {"b": X, "c": X}, "'b'"),
    "added": ({"a": X, "b": X}, {"a": X, "b": X, "c": X}, "'c'"),
    "removed": ({"a": X, "b": X, "c": X}, {"a": X, "c": X}, "'c'"),
    "the last removed": ({"a": X, "b": X}, {"a": X}, "the end"),
    "another shape": ({"a": X, "b": X}, {"a": X, "b": Y}, r"'b' \(4, 2\)"),
    "another order": (
        collections.OrderedDict(a=X, b=X), collections.OrderedDict(b=X, a=X), "'b'",
    ),
}  # fmt: skip


def after(tx, tree, other, **extra):
    """The state of one tree, and an update of another with it; nothing is computed."""
    state = jax.eval_shape(tx.init, tree)
    return jax.eval_shape(tx.update, other, state, other, **extra)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("id", REMEMBER)
def test_refused(id, change):
    tree, other, where = change
    name = NAMES.get(id, "project" if id.startswith(("init", "power")) else "clip")
    counts = f"{len(other)} leaves for a state of {len(tree)}"
    with pytest.raises(ValueError, match=f"{name!r}.*{counts}.*{where}"):
        after(REMEMBER[id], tree, other)


@pytest.mark.parametrize("id", REMEMBER)
def test_kept(id):
    tree = {"a": X, "b": X}
    _, state = after(REMEMBER[id], tree, tree)
    assert jax.tree.structure(state) == jax.tree.structure(jax.eval_shape(REMEMBER[id].init, tree))


@pytest.mark.parametrize("make", [adagc, zclip, lambda: clip_by_norm(1.0, record="scopes")])
def test_a_mask_that_moved(make):
    tree = {"a": jnp.ones(2), "b": jnp.ones(2)}
    masked = [optax.masked(make(), {"a": a, "b": not a}) for a in (True, False)]
    with pytest.raises(ValueError, match=r"1 leaves for a state of 1, .*'b'"):
        masked[1].update(tree, masked[0].init(tree), tree)


@pytest.mark.parametrize("rule", [zscore(2.0), 1.0], ids=["memory", "record"])
def test_a_label_that_changed(rule):
    """The same leaves, of which another one is in the group; and a group of another name."""
    tree = {"a": X, "b": X, "c": X}
    labels = [dict(zip("abc", labels, strict=True)) for labels in ("xxy", "xyy", "xxz")]
    one, *others = (clip_by_norm(rule, scope=groups(lambda p, x, to=to: to[p])) for to in labels)
    state = jax.eval_shape(one.init, tree)
    for tx, where in zip(others, ("'b'", "'c'"), strict=True):
        with pytest.raises(ValueError, match=where):
            jax.eval_shape(tx.update, tree, state, tree)


def test_before_anything_is_computed():
    def never(*_):
        raise AssertionError("computed")

    start = lambda norms: jnp.zeros_like(norms)  # noqa: E731
    tx = clip_by_norm(ThresholdRule(start, never), scope=lambda path, x: "leaf")
    state = tx.init({"a": jnp.ones(2)})
    with pytest.raises(ValueError, match="2 leaves for a state of 1"), jax.log_compiles(False):
        tx.update({"a": "no array", "b": jnp.ones(2)}, state)


def test_where_many_leaves_differ():
    """Of more leaves than marks the message names the first of the few that share one."""
    names = [f"l{i:03d}" for i in range(320)]
    tree = {name: X for name in names}
    other = {name if name != "l205" else "l205x": X for name in names}
    with pytest.raises(ValueError, match="differ from leaf 'l200'"):
        after(zclip(), tree, other)


def test_the_name_is_the_same_in_every_process():
    """Checkpoints have it."""
    tree = {"a": jnp.ones((3, 2)), "b": {"c": jnp.ones(4), "n": 3, "none": None}}
    assert Owner.of(tree).key == "of_4_leaves_exyvxs_54pral_d5kwbyz3dzzphtxr"
    assert list(zclip().init(tree).memory) == [Owner.of(tree).key]


# --- What is no other tree ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "id", ["zscore, global", "zscore, unit", "adagc", "initial", "record of scopes"]
)
def test_frozen_leaves(id):
    """Updates that are None keep their place beside their weights; those of a global norm without."""
    tx, params = REMEMBER[id], {"a": X, "b": X}
    state = jax.eval_shape(tx.init, params)
    updates = {"a": None, "b": X}
    _, new = jax.eval_shape(tx.update, updates, state, params)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    if id == "zscore, global":
        jax.eval_shape(tx.update, updates, state)
    with pytest.raises(ValueError, match="'c'"):
        jax.eval_shape(tx.update, {"a": None, "c": X}, state, {"a": X, "c": X})


@pytest.mark.parametrize("id", ["zscore, unit", "adagc", "initial", "init_box", "record of scopes"])
def test_containers(id):
    """Frozen or not, Variables or arrays: the same paths."""
    tx = REMEMBER[id]
    plain = {"a": {"kernel": jnp.ones((3, 2))}, "b": {"kernel": jnp.ones((3, 2))}}
    boxed = nnx.State(jax.tree.map(nnx.Param, plain))
    for one, other in ((plain, FrozenDict(plain)), (boxed, plain), (plain, boxed)):
        after(tx, one, other)


def test_mapped():
    """Over init and update; over update alone with one state for all."""
    tx, tree = adagc(), {"a": jnp.ones((5, 2, 3)), "b": jnp.ones((5, 4))}
    state = jax.eval_shape(jax.vmap(tx.init), tree)
    jax.eval_shape(jax.vmap(tx.update), tree, state, tree)
    one = jax.tree.map(lambda x: x[0], tree)
    jax.eval_shape(jax.vmap(tx.update, in_axes=(0, None, None)), tree, tx.init(one), one)


def test_parts_inside_shard_map():
    """There a leaf has the shape of its part; its path is what tells."""
    mesh = jax.make_mesh((1,), ("i",), axis_types=(AxisType.Auto,))
    tx = adagc()
    state = tx.init({"a": jnp.ones((4, 2))})  # as if of two devices

    def inside(path):
        update = lambda x: tx.update({path: x}, state)[0][path]  # noqa: E731
        specs = {"in_specs": P("i"), "out_specs": P("i")}
        return jax.eval_shape(jax.shard_map(update, mesh=mesh, **specs), jnp.ones((2, 2)))

    assert inside("a").shape == (2, 2)
    with pytest.raises(ValueError, match="'b'"):
        inside("b")


WRAPPED = {
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "partition": lambda tx: optax.partition({"a": tx, "b": adagc()}, {"a": "a", "b": "b"}),
    "inject": lambda tx: optax.inject_hyperparams(adagc)(ratio=1.05),
    "flatten": optax.flatten,
    "lookahead": lambda tx: optax.chain(tx, optax.sgd(0.1)),
}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_wrapped_and_scanned(wrap):
    tx, params = wrap(adagc()), {"a": jnp.ones((3, 2)), "b": jnp.ones(2)}
    body = lambda state, _: (tx.update(params, state, params)[1], None)  # noqa: E731
    jax.eval_shape(lambda state: jax.lax.scan(body, state, length=3), tx.init(params))


def test_a_tree_without_leaves():
    for tx in (zclip(), adagc(), project_weights(SPHERE), clip_by_norm(1.0, record="scopes")):
        _, state = tx.update({}, tx.init({}), {})
        assert jax.tree.structure(state) == jax.tree.structure(tx.init({}))
    with pytest.raises(ValueError, match="remembers nothing"):
        zclip().update({"a": jnp.ones(2)}, zclip().init({}))


@pytest.mark.filterwarnings("default")  # Orbax warns of itself.
def test_a_checkpoint(tmp_path):
    tx, params = optax.chain(adagc(), project_weights(SPHERE)), {"a": jnp.ones(2), "b": jnp.ones(3)}
    _, state = tx.update(params, tx.init(params), params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(tx.init, params))
    assert metrics(tx.update(params, restored, params)[1])["clip/steps"] == 2


# --- Carried over ---------------------------------------------------------------------------------


def test_carried_over_on_purpose():
    page = {"__name__": "__main__"}
    exec(CODE["states: Carried over on purpose"], page)
    before, now = page["before"], page["now"]
    tx = project_weights(SPHERE)
    state = page["by_leaf"](tx.init(before), tx.init(now), before, now)
    # embed keeps its 12 ones; the 9 ones and the 15 halves are new.
    np.testing.assert_allclose(
        jax.tree.leaves(state.memory)[0], [np.sqrt(12), 3, np.sqrt(15 / 4)], rtol=1e-6
    )
    state = page["by_leaf"](
        tx.init(before), tx.init(before | {"head": 7 * before["head"]}), before, before
    )
    np.testing.assert_allclose(jax.tree.leaves(state.memory)[0], [np.sqrt(12), np.sqrt(24)], rtol=1e-6)
    assert metrics(page["state"])["project/steps"] == 1


# --- States of others -----------------------------------------------------------------------------

PARAMS = {"a": jnp.ones(2), "b": jnp.ones(2)}
CLIP = clip_by_norm(1.0)
OTHERS = {
    "none": (CLIP, lambda: optax.EmptyState(), TypeError, "'clip'.*RecordedState.*got EmptyState"),
    "a chain": (CLIP, lambda: (CLIP.init(PARAMS),), TypeError, "'clip'.*got tuple"),
    "dicts": (CLIP, lambda: {"recorded": {}}, TypeError, "'clip'.*dict with the entries"),
    "another name": (
        clip_by_norm(1.0, name="grads"), lambda: CLIP.init(PARAMS), ValueError, "'grads'.*clip/norms",
    ),
    "another transform": (
        clip_by_norm(1.0, name="project"), lambda: project_weights(norm_ball(1.0)).init(PARAMS),
        ValueError, "'project'.*'norms'.*project/moves",
    ),
    "no record": (adagc(), lambda: adagc(record=False).init(PARAMS), ValueError, "'clip'.*nothing"),
    "no parts": (
        clip_by_norm(1.0, record="scopes"), lambda: CLIP.init(PARAMS), ValueError, "'by_part'",
    ),
    "a number's": (zclip(), lambda: CLIP.init(PARAMS), ValueError, "remembers nothing"),
    "a rule's": (CLIP, lambda: zclip().init(PARAMS), ValueError, "another threshold"),
    "another rule's": (
        zclip(), lambda: optax_clip.autoclip(window=4).init(PARAMS), ValueError, "mean.*values",
    ),
    "no schedule's": (
        clip_by_norm(optax.constant_schedule(1.0)), lambda: CLIP.init(PARAMS), ValueError, "count",
    ),
    "no schedule's, value": (
        optax_clip.clip_by_value(optax.constant_schedule(1.0)),
        lambda: optax_clip.clip_by_value(1.0).init(PARAMS), ValueError, "counts steps",
    ),
    "every step's": (
        project_weights(norm_ball(1.0), every=2), lambda: project_weights(norm_ball(1.0)).init(PARAMS),
        ValueError, "counts steps",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS.values(), ids=OTHERS)
def test_a_state_of_another_transform(case):
    tx, state, error, match = case
    with pytest.raises(error, match=match):
        tx.update(PARAMS, state(), PARAMS)


def test_weights_and_set_swapped():
    for call in (optax_clip.violation, optax_clip.project):
        with pytest.raises(TypeError, match="Expected constraint to be a set or a callable"):
            call(norm_ball(1.0), PARAMS)


def test_any_state_where_there_is_none():
    tx = clip_by_norm(1.0, record=False)
    assert tx.update(PARAMS, None)[1] == optax.EmptyState()
