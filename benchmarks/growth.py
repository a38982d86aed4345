"""How the step grows: with the number of leaves, in time and in compilation, and with their size."""

import time
from collections.abc import Iterator

import jax
import numpy as np
import optax

from benchmarks._timing import (
    CLIPS,
    OPTIMIZERS,
    Row,
    Step,
    cell,
    interleaved,
    line,
    normal,
    ratios,
    structs,
)

ROUNDS = 11
MANY = 1000  # leaves from which on compilation is measured once
# Adam's state of the largest tree would not fit into the memory of a small machine.
SIZES = (1_000, 100_000, 10_000_000, 100_000_000)
COUNTS = (10, 100, 1000, 2000)


def run(*, smoke: bool) -> list[Row]:
    print("Growth: more leaves at equal total size, and more entries in 10 leaves")
    print("time as a multiple of the optimizer alone [quartiles]; seconds to trace, lower and compile")
    line("", "alone, ms", "ours", "Optax", *(f"{name}, compile" for name in ("alone", "ours", "Optax")))
    rows = [*_by_leaves(smoke), *_by_entries(smoke)]
    print("Compilation of the clip alone, without an optimizer, in seconds")
    line("", "ours", "Optax")
    return [*rows, *_clip_alone(smoke)]


def _by_leaves(smoke: bool) -> Iterator[Row]:
    entries = 1_000 if smoke else 10_000_000
    for leaves in (2, 10) if smoke else COUNTS:
        yield _measure(leaves, entries, "adam", smoke, builds=1 if smoke or leaves >= MANY else 3)


def _by_entries(smoke: bool) -> Iterator[Row]:
    for entries in (100, 1_000) if smoke else SIZES:
        yield _measure(10, entries, "sgd", smoke, builds=1)


def _clip_alone(smoke: bool) -> Iterator[Row]:
    for leaves in (2, 10) if smoke else COUNTS:
        params = structs([(10_000_000 // leaves,)] * leaves, "float32")
        row: Row = {"group": "growth", "name": "clip alone", "leaves": leaves}
        for name in ("ours", "optax"):
            tx = CLIPS[name]()
            start = time.perf_counter()
            jax.jit(tx.update).lower(params, jax.eval_shape(tx.init, params)).compile()
            row[f"{name}_compile_s"] = time.perf_counter() - start
        line(f"{leaves:,} leaves", *(f"{row[f'{name}_compile_s']:.2f}" for name in ("ours", "optax")))
        yield row


def _measure(leaves: int, entries: int, optimizer: str, smoke: bool, *, builds: int) -> Row:
    """Time the three steps, after compiling each so often, afresh."""
    shapes = [(entries // leaves,)] * leaves
    params = normal(shapes, "float32", seed=0, scale=0.02)
    grads = normal(shapes, "float32", seed=1)
    spent: dict[str, list[float]] = {name: [] for name in CLIPS}
    for _ in range(builds):
        steps = {}
        for name, clip in CLIPS.items():
            steps[name] = Step(optax.chain(clip(), OPTIMIZERS[optimizer]()), params, grads)
            spent[name].append(steps[name].compile_seconds)
    row = ratios(interleaved(steps, 2 if smoke else ROUNDS))
    row |= {f"{name}_compile_s": float(np.median(each)) for name, each in spent.items()}
    compiled = [f"{row[f'{name}_compile_s']:.2f}" for name in CLIPS]
    label = f"{leaves:,} leaves, {entries:,} entries, {optimizer}"
    line(label, f"{row['alone_ms']:.2f}", cell(row, "ours"), cell(row, "optax"), *compiled)
    names = {"group": "growth", "leaves": leaves, "entries": entries, "optimizer": optimizer}
    return {**names, "dtype": "float32", **row}
