"""What docs/sharp_edges.md and docs/coming_from.md say of other people's wrappers and containers."""

import collections.abc
import os
import subprocess
import sys

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import reference
from optax_clip import (
    adaptive_grad_clip,
    box,
    clip_by_global_norm,
    clip_by_norm,
    clip_by_value,
    metrics,
    norm_ball,
    norm_sphere,
    project,
    project_weights,
    violation,
    where,
    zclip,
)
from pages import names

SETS = {"ball": norm_ball(1.0), "box": box(-0.5, 0.5), "sphere": norm_sphere(1.0)}
EPS = float(np.finfo(np.float32).eps)


def page(heading):
    return names(f"sharp_edges: {heading}")


# --- Line searches -------------------------------------------------------------------------------


def rosenbrock(w):
    return jnp.sum((1 - w[:-1]) ** 2 + 100 * (w[1:] - w[:-1] ** 2) ** 2)


def quadratic(w):
    return jnp.sum(jnp.array([1.0, 4.0, 9.0, 2.0]) * (w - jnp.array([3.0, -1.0, 2.0, 0.2])) ** 2) / 2


def minimised(loss, inner, constraint, value_and_grad, steps):
    """The loss at the end, from weights of 0."""
    tx = optax.chain(inner, project_weights(constraint))

    def step(carry, _):
        w, state = carry
        value, grad = value_and_grad(w, state=state)
        updates, state = tx.update(grad, state, w, value=value, grad=grad, value_fn=loss)
        return (optax.apply_updates(w, updates), state), None

    w = jnp.zeros(4)
    (w, _), _ = jax.jit(lambda: jax.lax.scan(step, (w, tx.init(w)), None, steps))()
    return float(loss(w))


def afresh(loss):
    return lambda w, state: jax.value_and_grad(loss)(w)


@pytest.mark.full
@pytest.mark.usefixtures("standard_promotion")
def test_lbfgs_with_what_it_remembers():
    """It becomes NaN, sooner or later as the last bits are."""
    ways = optax.value_and_grad_from_state(rosenbrock), afresh(rosenbrock)
    stale, fresh = (minimised(rosenbrock, optax.lbfgs(), box(-2.0, 0.5), way, 300) for way in ways)
    assert np.isfinite(fresh)
    assert not stale < 2 * fresh


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    "learned", [optax.contrib.dadapt_adamw, lambda: optax.contrib.mechanize(optax.sgd(0.1))]
)
def test_learned_rates_do_not_arrive_in_a_box(learned):
    bounds, steps = box(-0.5, 0.5), 1000
    best = float(quadratic(jnp.array([0.5, -0.5, 0.5, 0.2])))
    found = minimised(quadratic, learned(), bounds, afresh(quadratic), steps)
    assert np.isnan(found) if learned is optax.contrib.dadapt_adamw else found > best + 0.05
    assert minimised(quadratic, optax.sgd(0.1), bounds, afresh(quadratic), steps) < best + 1e-5


# --- Schedule-free -------------------------------------------------------------------------------


def schedule_free(base):
    return optax.contrib.schedule_free(base, learning_rate=0.5)


PLACES = {
    "inside": lambda constraint: schedule_free(optax.chain(optax.sgd(0.5), project_weights(constraint))),
    "around": lambda constraint: optax.chain(schedule_free(optax.sgd(0.5)), project_weights(constraint)),
    "on z": lambda constraint: schedule_free(
        page("Schedule-free and lookahead")["projected_base"](
            optax.with_extra_args_support(optax.sgd(0.5)), constraint
        )
    ),
}


def worst(place, constraint):
    """How far y, z and x were outside at most, over 100 steps on random gradients."""
    tx = PLACES[place](constraint)
    w = project(jnp.array([0.1, 0.2]), constraint)

    def step(carry, grad):
        w, state = carry
        updates, state = tx.update(grad, state, w)
        w = optax.apply_updates(w, updates)
        own = state[0] if place == "around" else state
        x = optax.contrib.schedule_free_eval_params(own, w)
        return (w, state), jnp.stack([violation(a, constraint) for a in (w, own.z, x)])

    grads = np.random.default_rng(0).normal(size=(100, 2)).astype(np.float32)
    _, outside = jax.lax.scan(step, (w, tx.init(w)), grads)
    return dict(zip("yzx", np.asarray(outside).max(0), strict=True))


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", ["ball", "box"])
def test_schedule_free(name):
    inside, around, on_z = (worst(place, SETS[name]) for place in PLACES)
    assert min(inside.values()) > 0.01  # None of the three is bounded.
    assert around["y"] == 0 and around["z"] > 1
    assert on_z["z"] == 0
    assert max(on_z.values()) <= 8 * EPS


@pytest.mark.usefixtures("standard_promotion")
def test_schedule_free_cannot_hold_a_sphere():
    on_z = worst("on z", SETS["sphere"])
    assert on_z["z"] <= 4 * EPS
    assert min(on_z["x"], on_z["y"]) > 0.1


@pytest.mark.usefixtures("standard_promotion")
def test_schedule_free_follows_z():
    """The copy is z, bit for bit, and the metrics are at hand."""
    found = page("Schedule-free and lookahead")
    state = found["state"]
    np.testing.assert_array_equal(state.z, state.base_optimizer_state[2])
    assert int(metrics(state)["project/steps"]) == 100


# --- Lookahead -----------------------------------------------------------------------------------


LOOKAHEAD = {
    "inside": lambda c: optax.lookahead(optax.chain(optax.sgd(0.5), project_weights(c)), 3, 0.5),
    "around": lambda c: optax.chain(optax.lookahead(optax.sgd(0.5), 3, 0.5), project_weights(c)),
}


def worst_pair(place, constraint):
    """How far the fast and the slow weights were outside at most, over 50 steps."""
    tx = LOOKAHEAD[place](constraint)
    pair = optax.LookaheadParams.init_synced(project(jnp.array([0.6, -0.8]), constraint))

    def step(carry, _):
        pair, state = carry
        updates, state = tx.update(pair.fast - jnp.array([3.0, 4.0]), state, pair)
        pair = optax.apply_updates(pair, updates)
        return (pair, state), jnp.stack([violation(w, constraint) for w in pair])

    _, outside = jax.lax.scan(step, (pair, tx.init(pair)), length=50)
    return np.asarray(outside).max(0)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("place", LOOKAHEAD)
@pytest.mark.parametrize("name", ["ball", "box"])
def test_lookahead(place, name):
    most = worst_pair(place, SETS[name])
    assert most.max() <= (0 if place == "around" else 4 * EPS)


@pytest.mark.usefixtures("standard_promotion")
def test_lookahead_on_a_sphere():
    assert worst_pair("around", SETS["sphere"]).max() <= 4 * EPS
    assert worst_pair("inside", SETS["sphere"])[1] > 0.1


# --- Containers ----------------------------------------------------------------------------------


@jax.tree_util.register_pytree_node_class
class Immutable(collections.abc.Mapping):
    """As Haiku's: no item assignment, and leaves without their keys."""

    def __init__(self, *args):
        self._items = dict(*args)

    def __getitem__(self, key):
        return self._items[key]

    def __iter__(self):
        return iter(self._items)

    def __len__(self):
        return len(self._items)

    def tree_flatten(self):
        leaves, structure = jax.tree.flatten(self._items)
        return leaves, structure

    @classmethod
    def tree_unflatten(cls, structure, leaves):
        return cls(jax.tree.unflatten(structure, leaves))


WEIGHTS = {"dense": {"b": np.zeros(2, np.float32), "w": np.full((3, 2), 2, np.float32)}}
FREEZE = {"haiku": Immutable, "flax": flax.core.freeze}
TRANSFORMS = {
    "global": lambda: clip_by_global_norm(1.0),
    "unit": lambda: clip_by_norm(1.0, scope="unit"),
    "value": lambda: clip_by_value(0.1),
    "agc": adaptive_grad_clip,
    "zclip": zclip,
    "ball": lambda: project_weights(norm_ball(1.0)),
}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("container", FREEZE)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_immutable_mappings(container, name):
    """As with dicts, bit for bit, and the container comes back."""
    tx, found = TRANSFORMS[name](), []
    for freeze in (dict, FREEZE[container]):
        params = freeze(jax.tree.map(jnp.asarray, WEIGHTS))
        grads = jax.tree.map(jnp.ones_like, params)
        updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
        assert type(updates) is type(params)
        found.append([jax.tree.leaves(updates), metrics(state)])
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_paths_and_masks_of_immutable_mappings():
    """Flax's tells its keys, Haiku's does not, and there `optax.masked` cannot work either."""
    paths = []
    where(lambda path, leaf: paths.append(path) or True)(flax.core.freeze(WEIGHTS))
    where(lambda path, leaf: paths.append(path) or True)(Immutable(WEIGHTS))
    assert paths == ["dense/b", "dense/w", "0", "1"]
    for transform in (optax.scale(0.1), project_weights(norm_ball(1.0))):
        params = flax.core.freeze(WEIGHTS)
        tx = optax.masked(transform, jax.tree.map(lambda x: x.ndim > 1, params))
        tx.update(params, tx.init(params), params)
        frozen = Immutable(WEIGHTS)
        tx = optax.masked(transform, jax.tree.map(lambda x: x.ndim > 1, frozen))
        with pytest.raises(ValueError, match="structure"):
            tx.update(frozen, tx.init(frozen), frozen)


# --- Layout --------------------------------------------------------------------------------------


def test_out_first():
    """AGC and max-norm of (out, in, ...) are those of the transposed kernel, an output being a unit."""
    found = page("What is a unit")
    rng = np.random.default_rng(0)
    shapes = {"dense": (3, 4), "conv": (3, 2, 5, 5), "bias": (3,)}
    w, g = ({k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()} for _ in range(2))
    updates, _ = found["clip"].update(g, found["clip"].init(w), w)
    for key in shapes:
        grad, weight = (np.moveaxis(tree[key], 0, -1) for tree in (g, w))
        (expected,), _ = reference.agc([grad], [weight], ratio=0.01)
        np.testing.assert_allclose(np.moveaxis(updates[key], 0, -1), expected, rtol=1e-5)
    ended = project(w, found["max_norm"])
    for key in ("dense", "conv"):
        norms = np.sqrt((np.asarray(ended[key], np.float64) ** 2).reshape(3, -1).sum(1))
        before = np.sqrt((w[key].astype(np.float64) ** 2).reshape(3, -1).sum(1))
        np.testing.assert_allclose(norms, np.minimum(before, 2.0), rtol=1e-5)


# --- Off and zero --------------------------------------------------------------------------------


def test_zero_is_zero_and_off_is_inf():
    g = jnp.array([3.0, 4.0])
    for off in (0, 0.0, None):  # What a config of another framework may say.
        tx = clip_by_global_norm(off or jnp.inf)
        updates, state = tx.update(g, tx.init(g))
        np.testing.assert_array_equal(updates, g)
        assert float(metrics(state)["clip/norm_before"]) == 5
    for tx in (clip_by_global_norm(0.0), clip_by_value(0.0), clip_by_norm(0.0)):
        np.testing.assert_array_equal(tx.update(g, tx.init(g))[0], 0)
        np.testing.assert_array_equal(tx.update(0 * g, tx.init(g))[0], 0)
    np.testing.assert_array_equal(project(g, norm_ball(0.0)), 0)
    assert np.isnan(optax.clip_by_global_norm(0.0).update(0 * g, optax.EmptyState())[0]).all()
    for factory in (clip_by_global_norm, clip_by_value, clip_by_norm, norm_ball):
        with pytest.raises(TypeError, match="None"):
            factory(None)


# --- Restoring into another clip -----------------------------------------------------------------


@pytest.mark.usefixtures("standard_promotion")
def test_restored_into_another_clip():
    """With flax's bytes, as on the page: Adam went on from where it was, the clip started anew."""
    found = page("Restoring into another clip")
    trained, state = found["trained"], found["state"]
    assert int(state[1][0].count) == int(trained[1][0].count) + 1 == 2
    np.testing.assert_allclose(
        state[1][0].mu["w"], 0.9 * np.asarray(trained[1][0].mu["w"]) + 0.1 / np.sqrt(3), rtol=1e-6
    )
    assert int(metrics(state)["clip/steps"]) == 1
    assert jax.tree.structure(state) == jax.tree.structure(found["new"].init(found["params"]))


@pytest.mark.usefixtures("standard_promotion")
def test_restored_with_orbax_by_name(tmp_path):
    params = {"w": jnp.ones(3)}
    old = optax.named_chain(("clip", clip_by_global_norm(1.0)), ("adam", optax.adam(0.1)))
    clip = zclip(max_norm=1.0)
    new = optax.named_chain(("clip", clip), ("adam", optax.adam(0.1)))
    _, trained = old.update({"w": jnp.arange(3.0)}, old.init(params), params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", trained)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", old.init(params))
    state = {**restored, "clip": clip.init(params)}
    np.testing.assert_array_equal(state["adam"][0].mu["w"], trained["adam"][0].mu["w"])
    _, state = jax.jit(new.update)({"w": jnp.ones(3)}, state, params)
    assert int(metrics(state)["clip/steps"]) == 1
    assert int(state["adam"][0].count) == 2


# --- Cores ---------------------------------------------------------------------------------------

THREADS = """
import ctypes, pathlib
import scipy.linalg
home = pathlib.Path(scipy.__file__).parent
found = [*home.parent.glob("scipy.libs/*openblas*"), *home.glob(".dylibs/*openblas*")]
print(ctypes.CDLL(str(found[0])).scipy_openblas_get_num_threads() if found else "none")
"""


def test_threads_of_lapack():
    """The variable on the page is heeded by the OpenBLAS of SciPy, whose LAPACK JAX's `eigh` calls."""
    cores = os.cpu_count() or 1
    seen = []
    for wanted in ("1", str(cores + 1)):
        env = {**os.environ, "OPENBLAS_NUM_THREADS": wanted}
        run = subprocess.run([sys.executable, "-c", THREADS], env=env, capture_output=True, text=True)
        seen.append(run.stdout.strip())
    if "none" in seen:
        pytest.skip("SciPy's OpenBLAS is not where its wheels have it")
    assert seen[0] == "1", seen
    assert int(seen[1]) > 1 or cores == 1, seen
    assert jax.jit(jnp.linalg.eigh).lower(jnp.eye(3)).as_text().count("lapack") > 0
