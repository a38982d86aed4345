"""`gradient_mapping` and `constrained` against the formula in float64, and where they arrive."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clip as oc
from benchmarks import constrained as bench
from optax_clip._trees import Scopes
from optax_clip.sets import mappings

REACH = 0.01
SETS = bench.sets()
SIZES = (1e-30, 1.0, 1e20)
# Sets that subtract nothing large at the wall keep all digits; the others lose eps / reach.
EXACT = {"ball", "ball, unit", "ball, global", "sphere", "shell", "box"}


def tree(seed, size=1.0):
    random = np.random.default_rng(seed)
    return {key: size * random.normal(size=shape) for key, shape in bench.SHAPES.items()}


def scopes_of(name, x, y):
    """The lengths of two trees in the scope of each entry."""
    if name in ("ball, global", "callable"):
        return [dict.fromkeys(t, np.sqrt(sum((v**2).sum() for v in t.values()))) for t in (x, y)]
    axis = 0 if name == "ball, unit" else None
    lengths = np.abs if name == "box" else functools.partial(np.linalg.norm, axis=axis, keepdims=True)
    return [{key: lengths(v) for key, v in t.items()} for t in (x, y)]


def expected(name, weights, grads):
    """``(w - P(w - a g)) / a``, from the formula."""
    sizes, slopes = scopes_of(name, weights, grads)
    steps = {key: REACH * sizes[key] / slopes[key] for key in weights}
    ends = SETS[name].exact({key: weights[key] - steps[key] * grads[key] for key in weights})
    return {key: (weights[key] - ends[key]) / steps[key] for key in weights}


def on_set(name):
    """Weights on the set as float32 holds them, and as they are meant."""
    exact = SETS[name].exact(tree(0, 3.0))
    stored = oc.project({key: jnp.asarray(x, jnp.float32) for key, x in exact.items()}, SETS[name][0])
    return stored, exact


@pytest.mark.parametrize("name", SETS)
def test_formula(name, standard_promotion):
    weights, exact = on_set(name)
    tx = oc.gradient_mapping(SETS[name].constraint)
    update, state = jax.jit(tx.update), tx.init(weights)
    for size in SIZES:
        grads = {key: np.float32(g * size) for key, g in tree(1).items()}
        new, state = update(grads, state, weights)
        wide = {key: g.astype(np.float64) for key, g in grads.items()}
        for key, wanted in expected(name, exact, wide).items():
            error = np.abs(np.asarray(new[key], np.float64) - wanted).max() / np.abs(wide[key]).max()
            assert error < (1e-6 if name in EXACT else 5e-5), (size, key)
    assert int(oc.metrics(state)["mapping/steps"]) == len(SIZES)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", sorted({*SETS} - {"sphere", "simplex", "capped simplex"}))
def test_inside_bit_for_bit(name, dtype, standard_promotion):
    """Eagerly, so that nothing is compiled."""
    size = 0.02 if name != "shell" else 0.12
    weights = {key: jnp.asarray(x, dtype) for key, x in tree(0, size).items()}
    tx = oc.gradient_mapping(SETS[name].constraint)
    for size in SIZES if dtype != "float16" else (1e-4, 1.0, 1e4):
        grads = {key: jnp.asarray(g * size, dtype) for key, g in tree(1).items()}
        new, state = tx.update(grads, tx.init(weights), weights)
        for key, g in grads.items():
            np.testing.assert_array_equal(new[key], g)
        assert oc.metrics(state)["mapping/fraction"] == 0


@pytest.mark.parametrize("constraint", [oc.norm_ball(1.0), oc.norm_sphere(1.0), oc.norm_shell(0.5, 1.0)])
def test_what_slides_keeps_its_digits(constraint):
    """Beside a push against the wall a million times larger."""
    random = np.random.default_rng(0)
    w, side = random.normal(size=(2, 1000))
    w /= np.linalg.norm(w)
    side -= w * (w @ side)
    weights = oc.project(jnp.asarray(w, jnp.float32), constraint)
    tx = oc.gradient_mapping(constraint)
    update, state = jax.jit(tx.update), tx.init(weights)
    slides, _ = update(jnp.asarray(1e-6 * side, jnp.float32), state, weights)
    step = 1 / np.sqrt(1 + REACH**2)  # the length of the circle's chord, from a step of that reach
    along = float(np.vdot(slides, side) / (side @ side))
    assert along == pytest.approx(1e-6 * step, rel=1e-6)
    pushed, _ = update(jnp.asarray(-w, jnp.float32), state, weights)
    assert np.linalg.norm(pushed) < 1e-6


def test_one_read_measures_as_two():
    """The way of the accelerators, at the ends of the range, with squares and products beyond it."""
    random = np.random.default_rng(0)
    shapes = [(6, 4), (3,), (1,)]
    scopes, _ = Scopes.of([jnp.zeros(s) for s in shapes], "leaf")
    once, twice = (
        jax.jit(functools.partial(way, scopes))
        for way in (mappings._measured_once, mappings._measured_twice)
    )
    for sizes in ((1, 1), (1e-25, 1e-20), (1e25, 1e20), (1e-30, 1e30), (1e15, 1e-32)):
        trees = [[random.normal(size=s) * k for s in shapes] for k in sizes]
        arrays = [[jnp.asarray(x, jnp.float32) for x in t] for t in trees]
        cosines = [
            np.vdot(w, g) / np.linalg.norm(w) / np.linalg.norm(g) for w, g in zip(*trees, strict=True)
        ]
        for way in (once, twice):
            norms, slopes, dots = way(*arrays)
            np.testing.assert_allclose(np.concatenate(dots, axis=None), cosines, atol=1e-6)
            for found, t in ((norms, trees[0]), (slopes, trees[1])):
                lengths = [np.linalg.norm(x) for x in t]
                np.testing.assert_allclose(found[0].value, lengths, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["ball", "L1 ball", "box"])
def test_narrow_dtypes(name, dtype, standard_promotion):
    """As in float32 from the same numbers, rounded once."""
    weights, _ = on_set(name)
    weights = {key: x.astype(dtype) for key, x in weights.items()}
    grads = {key: jnp.asarray(g, dtype) for key, g in tree(1).items()}
    tx = oc.gradient_mapping(SETS[name].constraint)
    new, _ = tx.update(grads, tx.init(weights), weights)
    wide = [{key: x.astype(jnp.float32) for key, x in t.items()} for t in (weights, grads)]
    wanted, _ = tx.update(wide[1], tx.init(wide[0]), wide[0])
    for key, x in new.items():
        assert x.dtype == dtype
        eps = float(jnp.finfo(dtype).eps)
        near = np.abs(np.float32(x) - np.float32(wanted[key]))
        # A box is narrower by a rounding of its bounds in bfloat16.
        room = eps / REACH if name == "box" else eps
        assert near.max() <= room * np.abs(wanted[key]).max()


def test_what_is_not_finite_passes(standard_promotion):
    weights = {"a": jnp.array([0.6, 0.8]), "b": jnp.array([0.6, 0.8])}
    grads = {"a": jnp.array([jnp.nan, -2.0]), "b": jnp.array([-0.6, -0.8])}
    halved = functools.partial(jax.tree.map, lambda x: x / 2)  # moves what is finite beside it, too
    for constraint in (oc.norm_ball(1.0), oc.norm_ball(1.0, ord=1), halved):
        tx = oc.gradient_mapping(constraint)
        new, _ = tx.update(grads, tx.init(weights), weights)
        np.testing.assert_array_equal(new["a"], grads["a"])
        assert np.isfinite(new["b"]).all()


def test_complex():
    """Of a pair (re, im) as of two real weights."""
    w, g = np.array([0.6 + 0.0j, 0.0 + 0.8j]), np.array([-1.0 + 0.5j, 0.25 - 2.0j])
    tx = oc.gradient_mapping(oc.norm_ball(1.0))
    pairs = [np.stack([x.real, x.imag]).astype(np.float32) for x in (w, g)]
    weights, grads = (jnp.asarray(x, jnp.complex64) for x in (w, g))
    new, _ = tx.update(grads, tx.init(weights), weights)
    wanted, _ = tx.update(jnp.asarray(pairs[1]), tx.init(jnp.asarray(pairs[0])), jnp.asarray(pairs[0]))
    np.testing.assert_allclose(np.stack([new.real, new.imag]), wanted, rtol=1e-6, atol=1e-6)


def test_weights_of_zero_keep_a_gradient_that_leads_inside():
    for constraint in (oc.norm_ball(1.0), oc.non_negative(), oc.box(-1.0, 1.0)):
        tx = oc.gradient_mapping(constraint)
        new, _ = tx.update(jnp.full(3, -1.0), tx.init(jnp.zeros(3)), jnp.zeros(3))
        np.testing.assert_array_equal(new, [-1, -1, -1])
    # At the bound: 0 is that of non_negative.
    tx = oc.gradient_mapping(oc.non_negative())
    new, _ = tx.update(jnp.array([1.0, -1.0]), tx.init(jnp.zeros(2)), jnp.zeros(2))
    np.testing.assert_array_equal(new, [0, -1])


def test_sets_that_remember_the_start():
    """The sphere of the norm at the start, and a box twice as wide as the weights there."""
    weights, grads = jnp.array([3.0, 4.0]), jnp.array([-3.0, -4.0])
    tx = oc.gradient_mapping(oc.norm_sphere(oc.initial()))
    state = tx.init(weights)
    outward, state = tx.update(grads, state, weights)
    assert np.abs(outward).max() < 1e-5
    tx = oc.gradient_mapping(oc.init_box(2.0))
    state = tx.init(weights)
    free, state = tx.update(grads, state, weights)
    held, _ = tx.update(grads, state, 2 * weights)
    np.testing.assert_array_equal(free, grads)
    np.testing.assert_array_equal(held, [-3, 0])


# --- Where they arrive ---------------------------------------------------------------------------

STEPS = 1_500


@pytest.mark.parametrize("name", SETS)
def test_arrives(name, standard_promotion):
    """Adam at the constrained minimum of a float64 solver, in any unit of the gradients."""
    with jax.numpy_rank_promotion("allow"):
        given = SETS[name]
        task = bench.problem(given.leaves)
        least = bench.minimum(task, given.exact)
        adam = optax.adam(optax.cosine_decay_schedule(0.03, STEPS))
        losses = bench.train(task, oc.constrained(adam, given.constraint), bench.as_it_is, STEPS)
    assert (losses[:, -1] <= 1.002 * least).all()
    assert (losses[:, -1] >= (1 - 1e-4) * least).all()


def test_a_projection_alone_does_not(standard_promotion):
    """Else the test above would show nothing."""
    given = SETS["ball"]
    task = bench.problem(given.leaves)
    adam = optax.adam(optax.cosine_decay_schedule(0.03, STEPS))
    tx = optax.chain(adam, oc.project_weights(given.constraint))
    losses = bench.train(task, tx, bench.as_it_is, STEPS)
    assert (losses[:, -1] > 1.2 * bench.minimum(task, given.exact)).all()


def multiplier(*before):
    """min x^2 with x >= 1: descent in x, ascent in the multiplier of ``x^2 + m (1 - x)``, m >= 0."""
    ascent = oc.constrained(optax.sgd(0.05 if before else -0.05), oc.non_negative())
    ascent, descent = optax.chain(*before, ascent), optax.sgd(0.05)

    def step(carry, _):
        x, m, states = carry
        down, first = descent.update(2 * x - m, states[0], x)
        up, second = ascent.update(1 - x, states[1], m)
        return (x + down, m + up, (first, second)), None

    zero = jnp.zeros(())
    (x, m, _), _ = jax.lax.scan(step, (zero, zero, (descent.init(zero), ascent.init(zero))), None, 2000)
    return float(x), float(m)


def test_a_multiplier_ascends(standard_promotion):
    """The gradient has to be one that is subtracted: else it is held at 0 from the start."""
    assert multiplier(optax.scale(-1.0)) == pytest.approx((1, 2), abs=1e-4)
    assert multiplier() == (0, 0)


# --- The rest of the contract --------------------------------------------------------------------


def test_constrained_is_the_chain(standard_promotion):
    """To the bit, with extra arguments passed on; the names of the metrics."""
    seen = []

    def update(updates, state, params=None, *, value, **extra):
        seen.append(value)
        return jax.tree.map(lambda g: -0.1 * g, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    ball = oc.norm_ball(1.0)
    parts = oc.gradient_mapping(ball), inner, oc.project_weights(ball)
    weights, grads = jnp.array([0.6, 0.8]), jnp.array([-1.0, 0.5])
    found = []
    for tx in (oc.constrained(inner, ball), optax.chain(*parts)):
        new, state = tx.update(grads, tx.init(weights), weights, value=3.0)
        found.append((new, oc.metrics(state)))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert seen == [3.0, 3.0]
    assert {"mapping/fraction", "mapping/steps", "project/fraction", "project/steps"} <= {*found[0][1]}
    named = oc.constrained(inner, ball, name="critic").init(weights)
    assert {"critic_mapping/steps", "critic/steps"} <= {*oc.metrics(named)}
    bare = oc.constrained(inner, ball, record=False).init(weights)
    assert bare == (optax.EmptyState(), (), optax.EmptyState())


def test_metrics_count_entries():
    """Of three leaves of 2, 2 and 4 entries the first is at the wall."""
    weights = [jnp.array([0.6, 0.8]), jnp.array([0.1, 0.1]), jnp.full(4, 0.1)]
    tx = oc.gradient_mapping(oc.norm_ball(1.0))
    _, state = tx.update([-w for w in weights], tx.init(weights), weights)
    assert float(oc.metrics(state)["mapping/fraction"]) == pytest.approx(2 / 8)


@pytest.mark.parametrize("reach", [0.0, -1.0, float("inf"), float("nan")])
def test_reach_is_checked(reach):
    with pytest.raises(ValueError, match="reach"):
        oc.gradient_mapping(oc.norm_ball(1.0), reach=reach)


def test_arguments_are_checked():
    with pytest.raises(TypeError, match="reach"):
        oc.gradient_mapping(oc.norm_ball(1.0), reach="far")
    with pytest.raises(TypeError, match="constraint=3"):
        oc.constrained(optax.sgd(0.1), 3)
    with pytest.raises(ValueError, match="every"):
        oc.constrained(optax.sgd(0.1), oc.norm_ball(1.0), every=0)


def test_an_entry_near_its_bound_keeps_a_part():
    tx = oc.gradient_mapping(oc.box(-1.0, 1.0))
    weights, grads = jnp.array([0.995, 0.5]), jnp.array([-2.0, -2.0])
    new, _ = tx.update(grads, tx.init(weights), weights)
    # A step of 0.01 * 0.995 upwards; 0.005 of it are left of the way, and so of the gradient.
    np.testing.assert_allclose(new, [-2 * 0.005 / 0.00995, -2], rtol=1e-4)
