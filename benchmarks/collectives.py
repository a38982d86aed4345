"""Count what an Adam step sends between eight devices, ours beside Optax's.

The counts are of operations in the compiled program: one all-reduce may carry many numbers. In brackets
those of the branch that sums again with care, where a norm is out of the safe range: an ordinary step
does not run it.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_clip
from benchmarks._hlo import COLLECTIVES as KINDS
from benchmarks._hlo import collectives
from benchmarks._timing import Row, line

DEVICES = 8
MANY = 1000  # leaves at which the scopes that keep a dimension take many minutes to compile
CLIPS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "no clip": optax.identity,
    "optax.clip_by_global_norm": lambda: optax.clip_by_global_norm(1.0),
    "clip_by_global_norm": lambda: optax_clip.clip_by_global_norm(1.0),
    "clip_by_norm, leaf": lambda: optax_clip.clip_by_norm(1.0),
    "optax.adaptive_grad_clip": lambda: optax.adaptive_grad_clip(0.01),
    "adaptive_grad_clip": lambda: optax_clip.adaptive_grad_clip(0.01),
}


def run(*, smoke: bool) -> list[Row]:
    """Count in a process of its own: eight devices on one machine would slow the other groups."""
    command = [sys.executable, "-m", "benchmarks.collectives", "--json", *["--smoke"] * smoke]
    rows: list[Row] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    show(rows)
    return rows


def show(rows: list[Row]) -> None:
    print(f"Collectives: operations of a compiled Adam step on {DEVICES} devices, (in branches)")
    line("", "all-reduce", "all-gather", "other")
    for row in rows:
        counts = {kind: _cell(row[kind], row[f"{kind}_in_branches"]) for kind in KINDS[:2]}
        others = (sum(row[f"{kind}{where}"] for kind in KINDS[2:]) for where in ("", "_in_branches"))
        line(f"{row['leaves']} leaves, {row['name']}", *counts.values(), _cell(*others))


def _cell(always: int, sometimes: int) -> str:
    return f"{always} ({sometimes})" if sometimes else f"{always}"


def placed(leaves: int) -> list[jax.Array]:
    """Matrices split over their rows, as in FSDP, every fourth leaf a bias on each device."""
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    arrays = [jnp.ones((16, 8)) if i % 4 else jnp.ones(8) for i in range(leaves)]
    specs = [P("data") if x.ndim > 1 else P() for x in arrays]
    return [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arrays, specs, strict=True)]


def count(name: str, params: list[jax.Array]) -> Row:
    tx = optax.chain(CLIPS[name](), optax.adam(1e-3))
    state = jax.jit(tx.init)(params)
    program = jax.jit(tx.update).lower(params, state, params).compile().as_text()
    always, sometimes = collectives(program or "")
    row: Row = {"group": "collectives", "name": name, "leaves": len(params), "optimizer": "adam"}
    for kind in KINDS:
        row |= {kind: always[kind], f"{kind}_in_branches": sometimes[kind]}
    return row


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.collectives", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="few leaves, to see that it runs")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    rows = []
    for leaves in (4,) if args.smoke else (10, 100, 1000):
        params = placed(leaves)
        names = [name for name in CLIPS if leaves < MANY or "adaptive" not in name]
        rows += [count(name, params) for name in names]
    if args.json:
        print(json.dumps(rows))
    else:
        show(rows)


if __name__ == "__main__":
    main()
