"""Three small tasks on data that ships with packages, for the sweep."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

from benchmarks import _charlm

Loss = Callable[[Any, Any], jax.Array]


@dataclass(frozen=True)
class Task:
    """A model, its data, and the optimizer that a clip is put before, at a safe rate and a high one."""

    name: str
    about: str
    optimizer: Callable[[float], optax.GradientTransformation]
    rates: tuple[float, float]
    weights: Any
    loss: Loss  # (weights, batch) -> mean loss
    batches: Any  # of all steps, stacked
    guess: float  # the loss of a blind guess


def momentum(rate: float) -> optax.GradientTransformation:
    return optax.sgd(rate, momentum=_charlm.MOMENTUM)


def functional(model: nnx.Module, loss: Loss) -> tuple[Any, Loss]:
    """Return the weights of the model, and its loss as a pure function of them."""
    graph, weights, rest = nnx.split(model, nnx.Param, ...)
    return weights, lambda weights, batch: loss(nnx.merge(graph, weights, rest, copy=True), batch)


def characters(steps: int, seed: int) -> Task:
    """The network of the demo: a tanh RNN that guesses the next character of Python's help pages."""
    text, vocab = _charlm.load_text()
    weights, loss = functional(_charlm.CharRNN(vocab, rngs=nnx.Rngs(seed)), _charlm.loss_of)
    pieces = np.stack(list(_charlm.batches(text, steps, seed)))[:, :16, :51]
    return Task("characters", "SGD", momentum, (0.03, 0.3), weights, loss, pieces, np.log(vocab))


class Digits(nnx.Module):
    """Two hidden layers of rectified units for images of 8 x 8."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(64, 128, rngs=rngs)
        self.second = nnx.Linear(128, 128, rngs=rngs)
        self.head = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.head(nnx.relu(self.second(nnx.relu(self.first(images)))))


def digits_loss(model: Digits, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    images, labels = batch
    return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()


def digits(steps: int, seed: int) -> Task:
    """Scikit-learn's 1,797 handwritten digits, batches of 64."""
    images, labels = load_digits(return_X_y=True)
    picked = np.random.default_rng(seed).integers(len(images), size=(steps, 64))
    batches = (np.float32(images / 16)[picked], np.int32(labels)[picked])
    weights, loss = functional(Digits(nnx.Rngs(seed)), digits_loss)
    return Task("digits", "SGD", momentum, (0.05, 0.5), weights, loss, batches, np.log(10))


class Block(nnx.Module):
    """Attention to what came before, then two dense layers; each after a layer norm, each added."""

    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        past = nnx.make_causal_mask(x[..., 0])
        x = x + self.attention(self.norms[0](x), mask=past)
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class Transformer(nnx.Module):
    """Two blocks over characters and places."""

    def __init__(self, vocab: int, width: int, length: int, *, rngs: nnx.Rngs) -> None:
        self.characters = nnx.Embed(vocab, width, rngs=rngs)
        self.places = nnx.Embed(length, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, rngs=rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, vocab, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.characters(tokens) + self.places(jnp.arange(tokens.shape[-1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def transformer(steps: int, seed: int) -> Task:
    """The same text, 32 characters at a time, with AdamW."""
    text, vocab = _charlm.load_text()
    model = Transformer(vocab, 32, 32, rngs=nnx.Rngs(seed))
    weights, loss = functional(model, _charlm.loss_of)
    pieces = np.stack(list(_charlm.batches(text, steps, seed)))[:, :8, :33]
    return Task("transformer", "AdamW", optax.adamw, (0.003, 0.03), weights, loss, pieces, np.log(vocab))


TASKS = {task.__name__: task for task in (characters, digits, transformer)}
