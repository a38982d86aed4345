"""Norms of real gradients: those of the demo's network, leaf by leaf, over 1,000 steps.

    python -m tests.recorded_norms

trains it again at a rate of 1, clipped at 0.25, and writes `recorded_norms.txt`: one line a step.
"""

from pathlib import Path

import numpy as np

FILE = Path(__file__).with_suffix(".txt")
STEPS = 1000


def load():
    """The norms before clipping, of shape (steps, leaves), in float32."""
    return np.loadtxt(FILE, np.float32)


def record():
    """Train, and return the norms before clipping, step by step."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    import optax_clip
    from benchmarks._charlm import MOMENTUM, CharRNN, batches, load_text, loss_of

    text, vocab = load_text()
    model = CharRNN(vocab, rngs=nnx.Rngs(0))
    tx = optax.chain(optax_clip.clip_by_global_norm(0.25), optax.sgd(1.0, momentum=MOMENTUM))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, tokens):
        loss, grads = nnx.value_and_grad(loss_of)(model, tokens)
        optimizer.update(model, grads)
        return loss, jnp.stack([jnp.linalg.norm(x) for x in jax.tree.leaves(grads)])

    losses, norms = zip(*(step(model, optimizer, x) for x in batches(text, STEPS, 0)), strict=True)
    print(f"Loss: {losses[0]:.3g} at first, {losses[-1]:.3g} at last.")
    return np.array(norms)


if __name__ == "__main__":
    np.savetxt(FILE, record(), "%.4g")
