"""What a step holds besides its arguments: the temporary memory of the compiled program."""

from collections.abc import Iterator
from typing import Any

import optax

from benchmarks._timing import (
    CLIPS,
    DTYPES,
    OPTIMIZERS,
    Row,
    compile_step,
    line,
    size_of,
    structs,
    trees,
)


def run(*, smoke: bool) -> list[Row]:
    print("Memory: temporary bytes of the compiled step, in units of the bytes of the gradients")
    line("", "alone", "ours", "Optax")
    return list(_rows(smoke))


def _rows(smoke: bool) -> Iterator[Row]:
    for tree, shapes in trees(smoke).items():
        for dtype in DTYPES:
            params = structs(shapes, dtype)
            for optimizer in ("sgd", "adam"):
                row: Row = {}
                for name, clip in CLIPS.items():
                    tx = optax.chain(clip(), OPTIMIZERS[optimizer]())
                    analysis: Any = compile_step(tx, params, params).memory_analysis()
                    row[f"{name}_temporary"] = analysis.temp_size_in_bytes / size_of(params)
                names = {"tree": tree, "dtype": dtype, "optimizer": optimizer}
                line(", ".join(names.values()), *(f"{x:.3f}" for x in row.values()))
                yield {"group": "memory", **names, **row}
