"""A clip fuses into the optimizer's own pass: nothing of the size of the gradients is written for it."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_clip as oc
from optax_clip import _xla, norms

CLIPS = {
    "global": oc.clip_by_global_norm(1.0),
    "global, zero": oc.clip_by_global_norm(1.0, nonfinite="zero"),
    "global, 1": oc.clip_by_global_norm(1.0, ord=1),
    "leaf": oc.clip_by_norm(1.0),
    "unit": oc.clip_by_norm(1.0, scope="unit"),
    "value": oc.clip_by_value(0.5),
    "value, lower": oc.clip_by_value(0.5, lower=-0.1),
    "normalize": oc.normalize_by_norm(),
    "adaptive_grad_clip": oc.adaptive_grad_clip(),
    "autoclip": oc.autoclip(window=10),
    "zclip": oc.zclip(),
    "adagc": oc.adagc(),
}
OPTIMIZERS = {"sgd": optax.sgd(1e-3), "adam": optax.adam(1e-3)}


def temporary(tx, leaves):
    """The temporary bytes of a donated step, in units of the bytes of the gradients."""

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    args = leaves, jax.eval_shape(tx.init, leaves), leaves
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile()
    size = sum(x.size * x.dtype.itemsize for x in leaves)
    return compiled.memory_analysis().temp_size_in_bytes / size


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("clip", CLIPS)
def test_no_temporary_of_the_size_of_the_gradients(clip, dtype, optimizer, standard_promotion):
    leaves = [jax.ShapeDtypeStruct((512, 256), dtype)] * 4
    assert temporary(optax.chain(CLIPS[clip], OPTIMIZERS[optimizer]), leaves) < 0.05


def test_optax_writes_the_clipped_tree(standard_promotion):
    """What the limit above would catch."""
    leaves = [jax.ShapeDtypeStruct((512, 256), "bfloat16")] * 4
    assert temporary(optax.chain(optax.clip_by_global_norm(1.0), OPTIMIZERS["adam"]), leaves) > 0.9


# --- The formulations that make it so --------------------------------------------------------------


def replaced(x, flag, y):
    return _xla.select([x], [flag], [y])[0]


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jitted"])
def test_replaced_rounds_as_astype_does(jit):
    """Over all bfloat16 numbers, and float32 ones between them: bit for bit."""
    run = jax.jit(replaced) if jit else replaced
    x = jnp.asarray(np.arange(2**16, dtype=np.uint16).view(jnp.bfloat16))
    bits = (np.arange(2**16, dtype=np.uint32) << 16) + np.random.default_rng(0).integers(
        2**16, size=2**16, dtype=np.uint32
    )
    bits |= np.where(np.isnan(bits.view(np.float32)), 0x400000, 0).astype(
        np.uint32
    )  # as arithmetic does
    bits[:4] = [0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF]  # two ties, above one, to inf
    y = jnp.asarray(bits.view(np.float32))
    got = np.asarray(run(x, jnp.array(True), y))
    with np.errstate(all="ignore"):
        wanted = bits.view(np.float32).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(wanted))
    number = ~np.isnan(wanted) & (np.abs(bits.view(np.float32)) >= 2.0**-126)
    np.testing.assert_array_equal(got[number].view(np.uint16), wanted[number].view(np.uint16))
    kept = np.asarray(run(x, jnp.array(False), y))
    np.testing.assert_array_equal(kept.view(np.uint16), np.asarray(x).view(np.uint16))


def test_replaced_has_the_derivative_of_a_choice():
    x, flag = jnp.array([1.0, 2.0], jnp.bfloat16), jnp.array([True, False])
    loss = lambda x: jnp.sum(replaced(x, flag, 3 * x.astype(jnp.float32)).astype(jnp.float32))  # noqa: E731
    np.testing.assert_array_equal(jax.grad(loss)(x), [3, 1])


def test_an_entry_counts_as_one_or_zero():
    """In arithmetic: above 0 and beyond, at 0, and what is no number."""
    count = jax.jit(
        lambda x, at: _xla.count_outside(x, jnp.array(-jnp.inf), jnp.array(0.0), at=at), static_argnums=1
    )
    gaps = jnp.array([-jnp.inf, -1, -0.0, 0, 2.0**-126, 1e-30, 1, 3e38, jnp.inf])
    assert count(gaps[1:], False) == 5 and count(gaps[1:], True) == 7
    assert np.isnan(count(jnp.array([1.0, jnp.nan]), False))


def test_small_leaves_are_joined_on_one_device(monkeypatch):
    """Eight of one type share a sum, for which XLA's CPU compiler takes longest."""
    random = np.random.default_rng(0)
    shapes = [(20, 5)] * 19 + [(7,)] * 3 + [(2**16 + 1,)] * 2
    tree = [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes]
    exact = np.sqrt(sum(np.sum(np.asarray(x, np.float64) ** 2) for x in tree))

    def sums(scope):
        norm = jax.jit(lambda tree: norms.tree_norms(tree, scope=scope))
        return norm.lower(tree).as_text().count("stablehlo.reduce("), norm(tree)

    # The fast sum, the careful one, and one reduction to choose between them.
    for devices, reductions in ((8, 24), (1, 3 + 1 + 2)):
        monkeypatch.setattr(jax, "device_count", lambda n=devices: n)
        found, norm = sums("global")
        assert found == 2 * reductions + 1
        np.testing.assert_allclose(norm, exact, rtol=1e-6)
    np.testing.assert_allclose(jax.tree.leaves(sums("leaf")[1])[0], np.linalg.norm(tree[0]), rtol=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e25])
def test_joined_sums_are_safe_and_have_derivatives(size, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    tree = [jnp.full((2, 2), size)] * 9
    np.testing.assert_allclose(oc.global_norm(tree), 6 * size, rtol=1e-6)
    for x in jax.grad(oc.global_norm)(tree):
        np.testing.assert_allclose(x, jnp.full((2, 2), 1 / 6), rtol=1e-6)


# --- The page ------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[1] / "docs/speed.md"


def test_the_page(capsys, standard_promotion):
    """It prints what the page says: no temporary to speak of, one sum and three passes."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    exec(compile(code, str(PAGE), "exec"), {"__name__": "__main__"})
    first, *fusions = capsys.readouterr().out.splitlines()
    assert int(first.split()[0]) < 10_000
    assert [line.split()[0] for line in fusions if "ynn" not in line] == ["bf16[1024,1024]"] * 3


def test_a_branch_stays_one_under_vmap():
    """It is taken by all or by none; one of huge and one of tiny entries have it taken."""
    clip = jax.jit(jax.vmap(jax.vmap(lambda x: oc.clip_tree(x, 1.0)[0])))
    x = jnp.array([[[3.0, 4.0], [3e30, 4e30]], [[3e-30, 4e-30], [0.0, 0.0]]])
    assert "conditional" in clip.lower(x).compile().as_text()
    np.testing.assert_allclose(clip(x)[0], [[0.6, 0.8], [0.6, 0.8]], rtol=1e-6)
    np.testing.assert_array_equal(clip(x)[1], x[1])
    np.testing.assert_allclose(clip(x.at[0, 1].set(30.0))[0, 0], [0.6, 0.8], rtol=1e-6)
