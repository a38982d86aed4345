"""The whole training step of the demo's network, forward and back, with and without bounds."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import optax_clip
from benchmarks._charlm import MOMENTUM, RECURRENT, CharRNN, batches, load_text, train_step
from benchmarks._timing import Row, cell, interleaved, line, quartiles

RATE = 0.01  # low, so that the run without bounds stays finite
ROUNDS = 61

SGD = optax.sgd(RATE, momentum=MOMENTUM)
CLIP = optax_clip.clip_by_global_norm(0.25)
PROJECT = optax.masked(
    optax_clip.project_weights(optax_clip.norm_ball(8.0)),
    optax_clip.where(lambda path, _: path.endswith(RECURRENT)),
)
SETTINGS = {
    "nothing": SGD,
    "global norm": optax.chain(CLIP, SGD),
    "Optax's global norm": optax.chain(optax.clip_by_global_norm(0.25), SGD),
    "zclip": optax.chain(optax_clip.zclip(), SGD),
    "zclip + projection": optax.chain(optax_clip.zclip(), SGD, PROJECT),
}


def run(*, smoke: bool) -> list[Row]:
    print("Whole training: the demo's network; every metric is read on the host in each step")
    line("", "step, ms", "per cent more")
    text, vocab = load_text()
    tokens = jnp.asarray(next(batches(text, 1, seed=0)))
    steps = {name: _training(tx, vocab, tokens) for name, tx in SETTINGS.items()}
    seconds = interleaved(steps, 2 if smoke else ROUNDS)
    return [_row(name, each, seconds["nothing"]) for name, each in seconds.items()]


def _row(name: str, seconds: np.ndarray, nothing: np.ndarray) -> Row:
    ms = 1e3 * float(np.median(seconds))
    row = {"group": "demo", "name": name, "ms": ms} | quartiles("percent", 100 * (seconds / nothing - 1))
    line(name, f"{ms:.2f}", "-" if seconds is nothing else cell(row, "percent"))
    return row


def _training(tx: optax.GradientTransformation, vocab: int, tokens: jax.Array) -> Callable[[], Any]:
    model = CharRNN(vocab, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    step = nnx.jit(train_step)

    def once() -> Any:
        log = step(model, optimizer, tokens)
        return {key: float(x) for key, x in log.items()}, nnx.state((model, optimizer))

    return once
