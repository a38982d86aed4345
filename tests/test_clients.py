"""Libraries that take an Optax transform: with our clip as with Optax's, a projection, the metrics.

`make test-clients` installs them in an environment of their own.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_clip import clip_by_global_norm, metrics, norm_ball, project_weights, violation, where

LIMIT = 0.1  # Far below every gradient here, so that each step is clipped.
RADIUS = 0.2
STEPS = 20
DATA = jnp.asarray(5 + np.random.default_rng(0).normal(size=(60, 2)), jnp.float32)

# The libraries' own warnings, and rounding that they do in more than one type.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


class Fit(NamedTuple):
    losses: Any
    params: Any  # As the optimizer has them.
    opt_state: Any  # None where the library gives none back.


def numpyro_svi(tx):
    numpyro = pytest.importorskip("numpyro")
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoNormal

    def model(data):
        mean = numpyro.sample("mean", numpyro.distributions.Normal(jnp.zeros(2), 3.0).to_event(1))
        numpyro.sample("data", numpyro.distributions.Normal(mean, 1.0).to_event(1), obs=data)

    svi = SVI(model, AutoNormal(model), tx, Trace_ELBO())
    found = svi.run(jax.random.key(0), STEPS, DATA[:, None], progress_bar=False)
    _, (params, opt_state) = found.state.optim_state
    return Fit(found.losses, params, opt_state)


def blackjax_meanfield_vi(tx):
    blackjax = pytest.importorskip("blackjax")

    def logdensity(position):
        return -jnp.sum((position["mean"] - DATA) ** 2)

    algorithm = blackjax.meanfield_vi(logdensity, tx, num_samples=4)
    step = jax.jit(algorithm.step)
    state, losses = algorithm.init({"mean": jnp.zeros(2)}), []
    for key in jax.random.split(jax.random.key(0), STEPS):
        state, info = step(key, state)
        losses.append(info.elbo)
    return Fit(losses, (state.mu, state.rho), state.opt_state)


def flowjax_fit_to_data(tx):
    pytest.importorskip("flowjax")
    import equinox as eqx
    import paramax
    from flowjax.distributions import Normal
    from flowjax.train import fit_to_data

    def is_fixed(leaf):
        return isinstance(leaf, paramax.NonTrainable)

    fitted, losses = fit_to_data(
        jax.random.key(0),
        Normal(jnp.zeros(2)),
        DATA,
        optimizer=tx,
        max_epochs=STEPS // 2,
        batch_size=20,
        val_prop=1 / 3,
        return_best=False,
        show_progress=False,
    )
    return Fit(losses["train"], eqx.partition(fitted, eqx.is_inexact_array, is_leaf=is_fixed)[0], None)


def jaxopt_optax_solver(tx):
    jaxopt = pytest.importorskip("jaxopt")
    solver = jaxopt.OptaxSolver(fun=lambda w: jnp.sum((w["mean"] - DATA) ** 2), opt=tx)
    params = {"mean": jnp.zeros(2)}
    state, losses = solver.init_state(params), []
    step = jax.jit(solver.update)
    for _ in range(STEPS):
        params, state = step(params, state)
        losses.append(state.value)
    return Fit(losses, params, state.internal_state)


def gpjax_fit(tx):
    gpx = pytest.importorskip("gpjax")
    import equinox as eqx

    x = jnp.linspace(0, 1, 20)[:, None]
    data = gpx.Dataset(X=x, y=5 + jnp.sin(6 * x))
    prior = gpx.gps.Prior(mean_function=gpx.mean_functions.Constant(), kernel=gpx.kernels.RBF())
    model, losses = gpx.fit(
        model=prior * gpx.likelihoods.Gaussian(),
        objective=lambda model, data: -gpx.objectives.conjugate_mll(model, data),
        train_data=data,
        optim=tx,
        num_iters=STEPS,
        verbose=False,
    )
    return Fit(losses, eqx.filter(model, eqx.is_array), None)


def optimistix_optax_minimiser(tx):
    optx = pytest.importorskip("optimistix")

    def loss(w, args):
        return jnp.sum((w["mean"] - DATA) ** 2)

    solver = optx.OptaxMinimiser(tx, rtol=0.0, atol=0.0)
    found = optx.minimise(loss, solver, {"mean": jnp.zeros(2)}, max_steps=STEPS, throw=False)
    return Fit([loss(found.value, None)], found.value, found.state.opt_state)


CLIENTS = [
    numpyro_svi,
    blackjax_meanfield_vi,
    flowjax_fit_to_data,
    jaxopt_optax_solver,
    gpjax_fit,
    optimistix_optax_minimiser,
]
TRANSFORMS = {
    "none": lambda: [],
    "optax": lambda: [optax.clip_by_global_norm(LIMIT)],
    "ours": lambda: [clip_by_global_norm(LIMIT)],
}


@functools.cache
def fit(client, clip):
    """A fit of the library with a clip and plain descent, as some trust the library to do it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return client(optax.chain(*TRANSFORMS[clip](), optax.sgd(0.05)))


@pytest.mark.parametrize("client", CLIENTS)
def test_losses(client):
    ours, theirs, unclipped = (fit(client, clip) for clip in ("ours", "optax", "none"))
    np.testing.assert_allclose(ours.losses, theirs.losses, rtol=1e-5)
    assert not np.allclose(ours.losses, unclipped.losses, rtol=1e-2)
    for mine, other in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-6)


def all_steps(found):
    return {key: int(found[f"clip/{key}"]) for key in ("steps", "steps_clipped")} == {
        "steps": STEPS,
        "steps_clipped": STEPS,
    }


@pytest.mark.parametrize("client", CLIENTS)
def test_metrics(client):
    """From the state, where the library gives it back."""
    state = fit(client, "ours").opt_state
    if state is None:
        assert client in (flowjax_fit_to_data, gpjax_fit)
        return
    found = metrics(state)
    assert all_steps(found), found
    assert float(found["clip/norm_before"]) > LIMIT
    assert float(found["clip/norm_after"]) == pytest.approx(LIMIT, rel=1e-6)


def reported(tx, report):
    """The transform of docs/switching.md for libraries that keep the state to themselves."""

    def update(updates, state, params=None, **extra):
        updates, state = tx.update(updates, state, params, **extra)
        jax.debug.callback(report, metrics(state))
        return updates, state

    return optax.GradientTransformationExtraArgs(tx.init, update)


@pytest.mark.parametrize("client", CLIENTS)
def test_projection(client):
    """Weights end in their balls, and at least one at its bound; the metrics come by callback."""
    constraint, seen = norm_ball(RADIUS), []
    tx = optax.chain(clip_by_global_norm(LIMIT), optax.sgd(1.0), project_weights(constraint))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        found = client(reported(optax.with_extra_args_support(tx), seen.append))
    jax.effects_barrier()
    assert float(violation(found.params, constraint)) == 0
    norms = [np.linalg.norm(np.asarray(x, np.float64)) for x in jax.tree.leaves(found.params)]
    assert max(norms) > 0.999 * RADIUS
    assert len(seen) == STEPS
    last = max(seen, key=lambda one: int(one["clip/steps"]))
    assert all_steps(last), last
    assert float(last["project/fraction"]) > 0


# --- Haiku's mappings ----------------------------------------------------------------------------


def haiku_weights(freeze):
    hk = pytest.importorskip("haiku")
    net = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(2, name="head")(x)))
    params = net.init(jax.random.key(0), jnp.ones((1, 3)))
    return hk.data_structures.to_immutable_dict(params) if freeze else params


def test_haiku():
    """The immutable mapping as the dict, bit for bit, in a chain with a clip and a projection."""
    tx = optax.chain(clip_by_global_norm(LIMIT), optax.sgd(1.0), project_weights(norm_ball(RADIUS)))
    ends = []
    for freeze in (False, True):
        params = haiku_weights(freeze)
        grads = jax.tree.map(jnp.ones_like, params)
        updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
        ended = optax.apply_updates(params, updates)
        assert type(ended) is type(params)
        assert float(violation(ended, norm_ball(RADIUS))) == 0
        ends.append([jax.tree.leaves(ended), metrics(state)])
    jax.tree.map(np.testing.assert_array_equal, *ends)


def masked():
    """A projection of matrices, and the paths that it was asked about."""
    paths = []

    def is_matrix(path, leaf):
        paths.append(path)
        return leaf.ndim > 1

    return optax.masked(project_weights(norm_ball(RADIUS)), where(is_matrix)), paths


def test_haiku_masks():
    """Paths and masks want dicts: the immutable mapping hides its keys, and Optax's mask raises."""
    params, (tx, paths) = haiku_weights(freeze=False), masked()
    updates, _ = tx.update(params, tx.init(params), params)
    ended = optax.apply_updates(params, updates)
    assert float(violation(ended["head"]["w"], norm_ball(RADIUS))) == 0
    assert set(paths) == {"head/b", "head/w"}

    params, (tx, paths) = haiku_weights(freeze=True), masked()
    with pytest.raises(ValueError, match="structure"):
        tx.update(params, tx.init(params), params)
    assert set(paths) == {"0", "1"}
