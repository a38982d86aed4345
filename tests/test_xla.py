"""What a GPU does instead of a formula, run on CPU, where it has to give the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_clip import _xla


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(_xla, "by_platform", lambda *xs, default, cuda: cuda(*xs))


RNG = np.random.default_rng(0)
SHAPES = [
    ((2048, 1024), (0,)),  # 16 rows at a time
    ((2051, 1021), (0,)),  # the last of them cut off
    ((3, 900, 401), (0, 1)),
    ((900, 3, 401), (0,)),
    ((700, 2000), (1,)),  # rows, as they are
    ((64, 8), (0,)),  # small, as it is
    ((8,), (0,)),
    ((), ()),
]


@pytest.mark.parametrize(("shape", "axes"), SHAPES)
def test_sums_of_columns(shape, axes):
    xs = [RNG.normal(size=shape).astype(np.float32) ** 2 for _ in range(3)]
    sums = jax.jit(_xla.sums_of_columns, static_argnums=0)(axes, list(map(jnp.asarray, xs)))
    for x, got in zip(xs, sums, strict=True):
        want = np.sum(x, axis=axes, keepdims=True, dtype=np.float64)
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_sums_of_columns_have_derivatives():
    x = jnp.asarray(RNG.normal(size=(1100, 600)), jnp.float32)

    def loss(x):
        squares, lengths = _xla.sums_of_columns((0,), [x * x, jnp.abs(x)])
        return jnp.sum(squares) + jnp.sum(lengths)

    np.testing.assert_allclose(jax.grad(loss)(x), 2 * x + jnp.sign(x), rtol=1e-6)


def test_sums_of_columns_under_vmap():
    x = jnp.asarray(RNG.normal(size=(2, 1100, 600)), jnp.float32)
    (got,) = jax.vmap(lambda x: _xla.sums_of_columns((0,), [x]))(x)
    np.testing.assert_allclose(got, jnp.sum(x, axis=1, keepdims=True), atol=1e-4)


def test_large_columns_are_summed_in_steps():
    """Else the cases above would compare a sum with itself."""
    text = str(jax.make_jaxpr(lambda x: _xla.sums_of_columns((0,), [x]))(jnp.zeros((2048, 1024))))
    assert "reduce_window" in text


def test_two_sums():
    xs = RNG.normal(size=(2, 30, 40)).astype(np.float32)
    got = _xla.two_sums(*map(jnp.asarray, xs))
    np.testing.assert_allclose(got, np.sum(xs, axis=(1, 2), dtype=np.float64), rtol=1e-5)


@pytest.mark.parametrize("way", ["cpu", "cuda", "default"])
def test_a_platform_takes_its_own_way_in_a_program(way, monkeypatch):
    """What the fixture stands for: `lax.platform_dependent` with the same names."""
    monkeypatch.undo()
    ways = {"cpu": lambda x: x + 1, "cuda": lambda x: x * 2}
    run = jax.jit(lambda x: _xla.by_platform(x, default=lambda x: -x, **ways))
    name = {"cpu": "cpu", "cuda": "cuda", "default": "tpu"}[way]
    text = run.trace(jnp.ones(3)).lower(lowering_platforms=(name,)).as_text()
    words = {"cpu": "stablehlo.add", "cuda": "stablehlo.multiply", "default": "stablehlo.negate"}
    assert [key for key, word in words.items() if word in text] == [way]
