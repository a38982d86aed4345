"""Measure the transforms beside Optax's own: tables as it goes, then bench.json and bench.png,
and beside it constrained.png.

All times are of interleaved runs in one process, and ratios are taken round by round: other work on the
machine falls on all alike. Milliseconds are context.
"""

import argparse
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path

import jax

import optax_clip
from benchmarks import (
    _constrained_figure,
    collectives,
    compiled,
    constrained,
    growth,
    memory,
    overheads,
    peers_torch,
    projections,
    step,
    training,
    training_step,
)
from benchmarks._charlm import picture
from benchmarks._figure import draw
from benchmarks._timing import Row

# torch comes last, as its threads would go on spinning beside the others.
GROUPS = {
    "training": training_step.run,
    "step": step.run,
    "overheads": overheads.run,
    "growth": growth.run,
    "memory": memory.run,
    "projections": projections.run,
    "constrained": constrained.run,
    "demo": training.run,
    "collectives": collectives.run,
    "compiled": compiled.run,
    "torch": peers_torch.run,
}

SHOWN = ("device", "cores", "jax", "optax")  # below the figure


def surroundings() -> Row:
    """What the numbers depend on."""
    packages = ("jax", "jaxlib", "optax", "numpy")
    return {
        "device": jax.devices()[0].device_kind,
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "optax_clip": optax_clip.__version__,
        **{name: version(name) for name in packages},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--smoke", action="store_true", help="small arrays, to see that it runs")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="these groups")
    parser.add_argument("--json", type=Path, default="bench.json", help="where the numbers go")
    parser.add_argument("--figure", type=picture, default="bench.png", help="where the figure goes")
    args = parser.parse_args()
    if not args.json.parent.is_dir():
        parser.error(f"the folder {str(args.json.parent)!r} does not exist")

    where = surroundings()
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    rows: list[Row] = []
    seconds = {}
    for name in GROUPS:
        if name in args.only:
            print()
            start = time.perf_counter()
            rows += GROUPS[name](smoke=args.smoke)
            seconds[name] = round(time.perf_counter() - start, 1)
    record = {"smoke": args.smoke, **where, "seconds": seconds, "rows": rows}
    args.json.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    written = [str(args.json)]
    if draw(rows, args.figure, ", ".join(f"{key} {where[key]}" for key in SHOWN)):
        written.append(str(args.figure))
    arrivals = args.figure.with_stem("constrained")
    if _constrained_figure.draw(rows, arrivals):
        written.append(str(arrivals))
    print(f"\n{sum(seconds.values()):.0f} s. Written: {', '.join(written)}")


if __name__ == "__main__":
    main()
