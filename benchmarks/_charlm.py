"""What the demo and the sweep share: a tanh RNN that guesses the next character of a real text."""

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import jax
import numpy as np
import optax
from flax import nnx
from matplotlib.backend_bases import FigureCanvasBase

import optax_clip

HIDDEN, TIME, BATCH = 128, 100, 32
RECURRENT = "rnn/cell/dense_h/kernel"  # the matrix that is applied once for each step of time
MOMENTUM = 0.9  # of plain SGD
TAIL = 20  # the final loss is the mean over that many last steps


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


def loss_of(model: CharRNN, tokens: jax.Array) -> jax.Array:
    """Return the mean cross entropy of each character given those before it, in nats."""
    logits = model(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def train_step(model: CharRNN, optimizer: nnx.Optimizer, tokens: jax.Array) -> dict[str, jax.Array]:
    """Take one step in place; return the loss before it and the metrics of the optimizer."""
    loss, grads = nnx.value_and_grad(loss_of)(model, tokens)
    optimizer.update(model, grads)
    recurrent = optax_clip.global_norm(model.rnn.cell.dense_h.kernel[...])
    return {"loss": loss, "recurrent": recurrent, **optax_clip.metrics(optimizer.opt_state)}


@dataclass(frozen=True)
class Run:
    """What one setting left behind: for each metric one number a step."""

    log: dict[str, np.ndarray]

    @property
    def diverged(self) -> int | None:
        """The first step, counted from 1, whose loss is not finite."""
        bad = np.flatnonzero(~np.isfinite(self.log["loss"]))
        return int(bad[0]) + 1 if bad.size else None

    @property
    def final_loss(self) -> float:
        return float(np.mean(self.log["loss"][-TAIL:]))

    @property
    def clipped(self) -> np.ndarray:
        """1 for a step that was clipped, else 0."""
        return np.diff(self.log["clip/steps_clipped"], prepend=0)

    @property
    def largest_norm(self) -> float:
        """Of the gradient before clipping."""
        return float(np.fmax.reduce(self.log["clip/norm_before"]))

    @property
    def outcome(self) -> str:
        if self.diverged is not None:
            return f"diverged at step {self.diverged}"
        return f"{self.final_loss:.4g}"


def align(rows: Sequence[Sequence[str]]) -> str:
    """Lay out a table: names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def arguments(name: str, description: str | None, *, steps: int, out: str) -> argparse.ArgumentParser:
    """Return the parser of `python -m benchmarks.NAME`, with what both commands take."""
    parser = argparse.ArgumentParser(
        f"python -m benchmarks.{name}",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=positive_integer, default=steps, help="steps for each setting")
    parser.add_argument("--seed", type=seed, default=0, help="seed of the weights and batches")
    parser.add_argument("--out", type=picture, default=out, help="where the figure goes")
    return parser


def positive_integer(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def seed(text: str) -> int:
    number = int(text)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"expected 0 to 2**32 - 1, got {number}")
    return number


def picture(text: str) -> Path:
    path = Path(text)
    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:] not in kinds or path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a name like demo.png, got {text!r}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder {str(path.parent)!r} does not exist")
    return path
