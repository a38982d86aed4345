"""The model that the demo trains: a tanh RNN that guesses the next character of a real text."""

from collections import Counter
from collections.abc import Iterator
from pydoc_data.topics import topics

import jax
import numpy as np
import optax
from flax import nnx

import optax_clip

HIDDEN, TIME, BATCH = 128, 100, 32
RECURRENT = "rnn/cell/dense_h/kernel"  # the matrix that is applied once for each step of time


def load_text(min_count: int = 100) -> tuple[np.ndarray, int]:
    """Return Python's help pages as indices of characters, and the size of the vocabulary.

    Letters become small; the characters seen less than `min_count` times share the last index.
    """
    text = "\n".join(topics[title] for title in sorted(topics)).lower()
    counts = Counter(text)
    kept = sorted(char for char in counts if counts[char] >= min_count)
    index = {char: i for i, char in enumerate(kept)}
    return np.array([index.get(char, len(kept)) for char in text], np.int32), len(kept) + 1


def batches(text: np.ndarray, steps: int, seed: int) -> Iterator[np.ndarray]:
    """Yield `steps` batches of pieces of the text: inputs and, one further on, targets."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        starts = rng.integers(len(text) - TIME, size=BATCH)
        yield text[starts[:, None] + np.arange(TIME + 1)]


class CharRNN(nnx.Module):
    """One-hot characters, a tanh RNN, a linear head."""

    def __init__(self, vocab: int, *, rngs: nnx.Rngs) -> None:
        self.vocab = vocab
        self.rnn = nnx.RNN(nnx.SimpleCell(vocab, HIDDEN, rngs=rngs))
        self.head = nnx.Linear(HIDDEN, vocab, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.head(self.rnn(jax.nn.one_hot(tokens, self.vocab)))


def train_step(model: CharRNN, optimizer: nnx.Optimizer, tokens: jax.Array) -> dict[str, jax.Array]:
    """Take one step in place; return the loss before it and the metrics of the optimizer."""

    def loss_fn(model: CharRNN) -> jax.Array:
        logits = model(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    recurrent = optax_clip.global_norm(model.rnn.cell.dense_h.kernel[...])
    return {"loss": loss, "recurrent": recurrent, **optax_clip.metrics(optimizer.opt_state)}
