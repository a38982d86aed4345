"""Training loops in Flax NNX and linen: bounded kernels, metrics at hand, one spelling of paths."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState

from optax_clip import clip_by_global_norm, clip_by_norm, metrics, norm_ball, project_weights, where

RADIUS = 0.5
STEPS = 4
X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
Y = jnp.asarray(10 * np.random.default_rng(1).normal(size=(8, 2)), jnp.float32)


class Nnx(nnx.Module):
    def __init__(self):
        self.dense = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=nnx.Rngs(0))  # Not only Params.
        self.layers = nnx.List([nnx.Linear(4, 2, rngs=nnx.Rngs(1))])

    def __call__(self, x):
        return self.layers[0](jnp.tanh(self.norm(self.dense(x))))


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(2, name="head")(jnp.tanh(linen.Dense(4, name="dense")(x)))


def is_kernel(path, leaf):
    return path.endswith("kernel")


def optimizer():
    return optax.chain(
        clip_by_global_norm(1.0),
        optax.sgd(0.5),
        optax.masked(project_weights(norm_ball(RADIUS)), where(is_kernel)),
    )


def norm(x):
    return np.linalg.norm(np.asarray(x, np.float64))


def assert_trained(found, kernels, biases):
    """After STEPS steps with large gradients: some were clipped, and a kernel is at its bound."""
    assert int(found["clip/steps"]) == int(found["project/steps"]) == STEPS
    assert int(found["clip/steps_clipped"]) > 0
    assert int(found["clip/steps_nonfinite"]) == 0
    assert float(found["clip/threshold"]) == 1.0
    assert float(found["clip/norm_after"]) <= float(found["clip/norm_before"])
    assert float(found["project/fraction"]) > 0
    assert all(norm(kernel) <= RADIUS for kernel in kernels)
    assert max(norm(kernel) for kernel in kernels) > 0.999 * RADIUS
    assert max(norm(bias) for bias in biases) > RADIUS  # Not masked in, so not bounded.


# --- Flax NNX ------------------------------------------------------------------------------------


@nnx.jit
def nnx_step(model, opt):
    loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(X) - Y) ** 2))(model)
    opt.update(model, grads)
    return loss, metrics(opt.opt_state)


def test_nnx():
    model = Nnx()
    opt = nnx.Optimizer(model, optimizer(), wrt=nnx.Param)
    before = jax.tree.map(jax.typeof, nnx.as_pure(opt.opt_state))
    for _ in range(STEPS):
        loss, found = nnx_step(model, opt)
    assert jnp.isfinite(loss)
    assert jax.tree.map(jax.typeof, nnx.as_pure(opt.opt_state)) == before
    layers = model.dense, model.layers[0]
    assert_trained(found, [x.kernel[...] for x in layers], [x.bias[...] for x in layers])
    assert metrics(nnx.state(opt)).keys() == found.keys()


def test_nnx_passes_extra_args():
    """With `grad_norm=` the norm that the trainer has is taken for the norm of the gradient."""
    model = Nnx()
    opt = nnx.Optimizer(model, clip_by_global_norm(1.0), wrt=nnx.Param)
    grads = nnx.grad(lambda m: jnp.mean((m(X) - Y) ** 2))(model)
    opt.update(model, grads, grad_norm=jnp.float32(0.5))
    assert float(metrics(opt.opt_state)["clip/norm_before"]) == 0.5
    assert int(metrics(opt.opt_state)["clip/steps_clipped"]) == 0


# --- linen ---------------------------------------------------------------------------------------


@jax.jit
def linen_step(state):
    def loss(params):
        return jnp.mean((state.apply_fn(params, X) - Y) ** 2)

    value, grads = jax.value_and_grad(loss)(state.params)
    return value, state.apply_gradients(grads=grads)


def test_linen():
    model = Linen()
    variables = model.init(jax.random.key(0), X)
    state = TrainState.create(apply_fn=model.apply, params=variables, tx=optimizer())
    before = jax.tree.map(jax.typeof, state.opt_state)
    for _ in range(STEPS):
        loss, state = linen_step(state)
    assert jnp.isfinite(loss)
    assert jax.tree.map(jax.typeof, state.opt_state) == before
    layers = state.params["params"].values()
    found = metrics(state.opt_state)
    assert_trained(found, [x["kernel"] for x in layers], [x["bias"] for x in layers])


# --- Paths ---------------------------------------------------------------------------------------


class Seen:
    """What the predicate of `where` and a callable scope are given."""

    def __init__(self):
        self.paths = []

    def predicate(self, path, leaf):
        self.paths.append(f"where {path} {leaf.ndim}")
        return path.endswith("kernel")

    def scope(self, path, leaf):
        self.paths.append(f"scope {path} {leaf.ndim}")
        return "unit" if path.endswith("kernel") else "leaf"

    def optimizer(self):
        return optax.chain(
            clip_by_norm(1.0, scope=self.scope),
            optax.sgd(0.5),
            optax.masked(project_weights(norm_ball(RADIUS, scope=self.scope)), where(self.predicate)),
        )

    def take(self):
        """The paths since the last time; which are asked for how often is nobody's business."""
        seen, self.paths = set(self.paths), []
        return seen


def paths(words, leaves):
    return {f"{word} {path} {ndim}" for word in words for path, ndim in leaves.items()}


def test_nnx_paths():
    seen = Seen()
    model = Nnx()
    leaves = {
        "dense/kernel": 2,
        "dense/bias": 1,
        "norm/scale": 1,
        "norm/bias": 1,
        "layers/0/kernel": 2,
        "layers/0/bias": 1,
    }
    opt = nnx.Optimizer(model, seen.optimizer(), wrt=nnx.Param)
    init = seen.take()
    assert init == paths(["where", "scope"], leaves)
    nnx_step(model, opt)
    assert seen.take() == init


def test_linen_paths():
    seen = Seen()
    model = Linen()
    variables = model.init(jax.random.key(0), X)
    leaves = {
        "params/dense/kernel": 2,
        "params/dense/bias": 1,
        "params/head/kernel": 2,
        "params/head/bias": 1,
    }
    state = TrainState.create(apply_fn=model.apply, params=variables, tx=seen.optimizer())
    init = seen.take()
    assert init == paths(["where", "scope"], leaves)
    linen_step(state)
    assert seen.take() == init


@pytest.mark.parametrize(
    ("tree", "wanted"),
    [
        ({"l": [1.0, 2.0]}, ["l/0", "l/1"]),
        (linen.Dense(1).init(jax.random.key(0), X), ["params/bias", "params/kernel"]),
        (nnx.state(nnx.Linear(2, 1, rngs=nnx.Rngs(0))), ["bias", "kernel"]),
        (nnx.as_pure(nnx.state(nnx.Linear(2, 1, rngs=nnx.Rngs(0)))), ["bias", "kernel"]),
        (jax.tree.map(lambda x: x, nnx.Linear(2, 1, rngs=nnx.Rngs(0))), ["bias", "kernel"]),
        ({"value": 1.0, "a": {"value": 2.0}}, ["a/value", "value"]),  # A name like any other.
    ],
    ids=["list", "linen", "nnx", "nnx, pure", "nnx module", "value"],
)
def test_path_strings(tree, wanted):
    found = []
    where(lambda path, leaf: found.append(path) or True)(tree)
    assert sorted(found) == wanted
