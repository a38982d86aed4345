"""A whole step, clip and optimizer, beside the optimizer alone: the norm clip of every training run."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import optax

from benchmarks._timing import (
    CLIPS,
    DTYPES,
    OPTIMIZERS,
    Row,
    Step,
    cell,
    interleaved,
    line,
    normal,
    quartiles,
    ratios,
    reading,
    size_of,
    trees,
)

ROUNDS = 15


def run(*, smoke: bool) -> list[Row]:
    print(
        "The step: clip_by_global_norm and optimizer, as a multiple of the optimizer alone [quartiles]"
    )
    print("reads: what the clip adds, in reads of the gradients at the speed of one large array")
    line("", "alone, ms", "read, GB/s", "ours", "Optax", "ours, reads", "Optax, reads")
    return list(_rows(smoke))


def _rows(smoke: bool) -> Iterator[Row]:
    for tree, shapes in trees(smoke).items():
        for dtype in DTYPES:
            params = normal(shapes, dtype, seed=0, scale=0.02)
            grads = normal(shapes, dtype, seed=1)
            for optimizer in OPTIMIZERS:
                names = {"tree": tree, "dtype": dtype, "optimizer": optimizer}
                yield {"group": "step", **names, **_measure(optimizer, params, grads, names, smoke)}


def _measure(optimizer: str, params: Any, grads: Any, names: dict[str, str], smoke: bool) -> Row:
    def step(clip: optax.GradientTransformation) -> Step:
        return Step(optax.chain(clip, OPTIMIZERS[optimizer]()), params, grads)

    seconds = interleaved(
        {name: step(clip()) for name, clip in CLIPS.items()} | {"read": reading(grads)},
        2 if smoke else ROUNDS,
    )
    read = seconds.pop("read")
    row = ratios(seconds) | {"read_gb_per_s": size_of(grads) / float(np.median(read)) / 1e9}
    for name in ("ours", "optax"):
        row |= quartiles(f"{name}_reads", (seconds[name] - seconds["alone"]) / read)
    cells = [cell(row, name) for name in ("ours", "optax")]
    cells += [cell(row, f"{name}_reads") for name in ("ours", "optax")]
    line(", ".join(names.values()), f"{row['alone_ms']:.2f}", f"{row['read_gb_per_s']:.1f}", *cells)
    return row
