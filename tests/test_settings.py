"""Bounds, radii and limits as users give them: trees that fit the weights, key by key."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clip as oc


def negative(tree):
    return jax.tree.map(lambda x: -x, tree)


def clipped(updates, tx):
    return tx.update(updates, None)[0]


# Each setting of the package, as (setting, weights) -> weights; as numbers from 1 up.
SETTINGS = {
    "box": lambda s, w: oc.project(w, oc.box(0.0, s)),
    "box, lower": lambda s, w: negative(oc.project(negative(w), oc.box(negative(s), 0.0))),
    "norm_ball": lambda s, w: oc.project(w, oc.norm_ball(s)),
    "norm_ball, 1": lambda s, w: oc.project(w, oc.norm_ball(s, ord=1)),
    "norm_ball, inf": lambda s, w: oc.project(w, oc.norm_ball(s, ord=np.inf)),
    "norm_sphere": lambda s, w: oc.project(w, oc.norm_sphere(s)),
    "norm_shell": lambda s, w: oc.project(w, oc.norm_shell(0.0, s)),
    "simplex": lambda s, w: oc.project(w, oc.simplex(s)),
    "clip_by_value": lambda s, w: clipped(w, oc.clip_by_value(s, record=False)),
    "clip_by_value, lower": lambda s, w: clipped(w, oc.clip_by_value(s, lower=-1.0, record=False)),
}
SETTING = pytest.mark.parametrize("setting", SETTINGS)


@SETTING
def test_prefixes_are_compared_key_by_key(setting):
    # Haiku's keys: the first is no parent of the second.
    given = {"mlp": 1.0, "mlp/~/linear_0": 2.0}
    weights = {"mlp": {"w": jnp.array([9.0])}, "mlp/~/linear_0": {"w": jnp.array([9.0])}}
    got = SETTINGS[setting](given, weights)
    assert got["mlp"]["w"] == pytest.approx(1.0, rel=1e-6)
    assert got["mlp/~/linear_0"]["w"] == pytest.approx(2.0, rel=1e-6)


def test_radii_of_matrices_are_found_key_by_key():
    ball = oc.spectral_ball({"a": 1.0, "a/b": 2.0})
    got = oc.project({"a": {"b": jnp.full((1, 1), 9.0)}, "a/b": jnp.full((1, 1), 9.0)}, ball)
    np.testing.assert_allclose([got["a"]["b"][0, 0], got["a/b"][0, 0]], [1.0, 2.0], rtol=1e-6)


def test_the_kernel_beside_a_bias_has_the_same_keys_above_it():
    params = {"a": {"bias": jnp.zeros(1)}, "a/kernel": jnp.full((1, 1), 5.0)}
    tx = oc.project_weights(oc.init_box(1.0))
    grown = jax.tree.map(lambda x: jnp.full_like(x, 100.0), params)
    new, _ = tx.update(grown, tx.init(params), params)
    assert (new["a"]["bias"], new["a/kernel"]) == (100.0, 0.0)  # only the kernel is bounded


@SETTING
@pytest.mark.parametrize(
    "given, weights, named",
    [
        ({"a": 1.0, "tpyo": 2.0}, {"a": 9.0}, "'tpyo'"),
        ([1.0, 1.0, 3.0], [9.0, 9.0], r"\[2\]"),
        ({"a": {"b": 1.0, "c": 1.0}}, {"a": {"b": 9.0}}, r"\['a'\]\['c'\]"),
        ({"a": 1.0, "a/b": 1.0}, {"a": {"b": 9.0}}, "'a/b'"),
    ],
    ids=["key", "list", "deeper", "slash"],
)
def test_a_number_too_many_is_named(setting, given, weights, named):
    weights = jax.tree.map(lambda x: jnp.array([x]), weights)
    with pytest.raises(ValueError, match=rf"prefix of the weights, got \w+{named}|\[{named}\]"):
        SETTINGS[setting](given, weights)


@pytest.mark.parametrize("left_out", [None, optax.MaskedNode(), {}], ids=["None", "masked", "empty"])
def test_a_number_for_what_a_mask_left_out_is_none_too_many(left_out):
    limits = {"a": {"b": 1.0, "c": 2.0}, "d": 3.0}
    updates = {"a": left_out, "d": jnp.array([9.0])}
    assert clipped(updates, oc.clip_by_value(limits, record=False))["d"] == 3.0


def test_numbers_for_all_weights_inside_masks_and_parts():
    params = {"a": {"b": jnp.array([9.0])}, "c": jnp.array([9.0])}
    box = oc.project_weights(oc.box(0.0, {"a": {"b": 1.0}, "c": 2.0}))
    zeros = optax.tree.zeros_like(params)
    masked = optax.masked(box, {"a": False, "c": True})
    by_part = optax.partition({"x": box, "y": optax.identity()}, {"a": {"b": "x"}, "c": "y"})
    for tx, expected in ((masked, (0.0, -7.0)), (by_part, (-8.0, 0.0))):
        new, _ = tx.update(zeros, tx.init(params), params)
        assert (new["a"]["b"], new["c"]) == expected


@jax.tree_util.register_pytree_with_keys_class
class Net:
    """A network as Equinox has them: a tree that can be called."""

    def __init__(self, w, inner=None, activation=None):
        self.w, self.inner, self.activation = w, inner, activation

    def __call__(self, x):
        return self.activation(self.w * x)

    def tree_flatten_with_keys(self):
        fields = ("w", "inner", "activation")
        return [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in fields], None

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(*children)


@SETTING
def test_a_module_that_can_be_called_is_a_tree(setting):
    weights = Net(jnp.array([9.0]), inner=Net(jnp.array([9.0])))
    for number in (float, jnp.asarray, np.float32, lambda x: np.array([x])):
        given = Net(number(1.0), inner=Net(number(2.0)))
        got = SETTINGS[setting](given, weights)
        assert got.w == pytest.approx(1.0, rel=1e-6)
        assert got.inner.w == pytest.approx(2.0, rel=1e-6)


def test_a_module_without_numbers_and_a_partial_are_functions():
    class Halving:
        def __call__(self, path, leaf):
            return 0.5

    partial = jax.tree_util.Partial(lambda half, path, leaf: half, jnp.array(0.5))
    for formula in (Halving(), partial):
        assert oc.project(jnp.array([9.0]), oc.box(0.0, formula)) == 0.5


def test_bounds_in_one_kind_of_tree_and_in_another_are_ordered():
    with pytest.raises(ValueError, match="lower"):
        oc.box({"w": 2.0}, Net(1.0))


@pytest.mark.parametrize(
    "make",
    [
        lambda x: oc.box(-x, x),
        lambda x: oc.box(-1.0, {"w": x}),
        lambda x: oc.norm_ball({"w": x[:1]}),
        lambda x: oc.norm_ball(x[:1], ord=1),
        lambda x: oc.norm_ball(x, ord=np.inf),
        lambda x: oc.norm_sphere([x[:1]]),
        lambda x: oc.norm_shell(x[:1], x[:1]),
        lambda x: oc.simplex((x[:1],)),
        lambda x: oc.spectral_ball(x.reshape(2)[:1]),
    ],
)
def test_a_set_keeps_what_numpy_gave_it(make):
    """Else a set that is equal to its old self, and a key of compiled programs, means something else."""
    x = np.ones(2)
    given, same, expected = make(x), make(x), make(np.ones(2))
    hash(given)  # as a set that has been used has been; the other one has not
    x *= 5
    assert given == expected and same == expected and given != make(x)


def test_containers_are_kept_as_they_were():
    bounds = {"w": 1.0}
    given = oc.box(0.0, bounds)
    bounds["w"] = 5.0
    assert given == oc.box(0.0, {"w": 1.0})
    assert oc.project({"w": jnp.array(9.0)}, given)["w"] == 1.0


NUMBERS = {
    "limit": lambda x: oc.clip_by_value(x),
    "lower": lambda x: oc.clip_by_value(x, lower=-x),
    "tree": lambda x: oc.clip_by_value([x]),
    "threshold": lambda x: oc.clip_by_norm(x),
    "norm": lambda x: oc.normalize_by_norm(x),
    "groups": lambda x: oc.clip_by_norm({"all": x}, scope=oc.groups(lambda path, leaf: "all")),
    "ratio": lambda x: oc.clip_by_norm(oc.relative_to_params(x)),
    "singular values": lambda x: oc.clip_singular_values(x),
    "spikes": lambda x: oc.skip_spikes(optax.identity(), x),
    "losses": lambda x: oc.skip_spikes(optax.identity(), 1e9, value_rule=x),
    "box": lambda x: oc.project_weights(oc.box(-x, x)),
    "initial": lambda x: oc.project_weights(oc.norm_ball(oc.initial(x))),
    "qk": lambda x: oc.qk_clip(lambda path, leaf, eta: eta, max_logit=x),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_transform_keeps_what_numpy_gave_it(name):
    def step(change):
        x = np.array(1.0, np.float32)
        tx = NUMBERS[name](x)
        x += change
        extra = {"value": 4.0, "max_logits": jnp.array(4.0)}
        updates, weights = [jnp.full((1, 1), 4.0)], [jnp.ones((1, 1))]
        return tx.update(updates, tx.init(weights), weights, **extra)[0][0]

    assert step(change=100.0) == step(change=0.0) != 4.0
