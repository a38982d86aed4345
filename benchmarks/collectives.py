"""Count what an Adam step sends between devices, ours beside Optax's: eight of a CPU, 256 of a TPU pod.

The counts are of operations in the compiled program: one all-reduce may carry many numbers. In brackets
those of branches and loops: an ordinary step does not run the branch that sums again with care, where a
norm is out of the safe range. On the pod, which need not be there, the weights are split over both axes
of the mesh, and the biases over the second.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_clip
from benchmarks import _chips
from benchmarks._hlo import COLLECTIVES as KINDS
from benchmarks._hlo import collectives
from benchmarks._timing import Row, compile_step, line
from benchmarks.overheads import ADAM, Case, Peer, cases

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
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        rows = show(json.loads(text) for text in process.stdout or ())
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return rows


def show(rows: Iterator[Row]) -> list[Row]:
    """Print the rows as they come."""
    shown, devices = [], None
    for row in rows:
        if row["devices"] != devices:
            devices = row["devices"]
            print(f"Collectives: operations of a compiled Adam step on {row['mesh']}, (in branches)")
            optax_too = (f"Optax: {kind}" for kind in ("all-reduce", "all-gather", "other"))
            line("", "all-reduce", "all-gather", "other", *optax_too, width=19)
        peer = f"  {row.get('peer') or '':36}"
        cells = [*_cells(row, ""), *_cells(row, "optax_"), peer]
        line(f"{row['leaves']} leaves, {row['name']}", *cells, width=19)
        shown.append(row)
    if reason := _chips.missing():
        print(f"Collectives on a TPU pod: skipped: {reason}")
    return shown


def _cells(row: Row, prefix: str) -> list[str]:
    if f"{prefix}{KINDS[0]}" not in row:
        return ["-"] * 3
    cells = []
    for kinds in (KINDS[:1], KINDS[1:2], KINDS[2:]):
        always, sometimes = (
            sum(row[f"{prefix}{kind}{where}"] for kind in kinds) for where in ("", "_in_branches")
        )
        cells.append(f"{always} ({sometimes})" if sometimes else f"{always}")
    return cells


def placed(leaves: int) -> list[jax.Array]:
    """Matrices split over their rows, as in FSDP, every fourth leaf a bias on each device."""
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    arrays = [jnp.ones((16, 8)) if i % 4 else jnp.ones(8) for i in range(leaves)]
    specs = [P("data") if x.ndim > 1 else P() for x in arrays]
    return [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arrays, specs, strict=True)]


def count(program: str, prefix: str = "") -> Row:
    always, sometimes = collectives(program)
    row: Row = {}
    for kind in KINDS:
        row |= {f"{prefix}{kind}": always[kind], f"{prefix}{kind}_in_branches": sometimes[kind]}
    return row


def on_cpu(smoke: bool) -> Iterator[Row]:
    for leaves in (4,) if smoke else (10, 100, 1000):
        params = placed(leaves)
        for name, clip in CLIPS.items():
            if leaves < MANY or "adaptive" not in name:
                tx = optax.chain(clip(), optax.adam(1e-3))
                state = jax.jit(tx.init)(params)
                program = jax.jit(tx.update).lower(params, state, params).compile().as_text()
                names = {"name": name, "mesh": f"{DEVICES} CPU devices", "devices": DEVICES}
                yield {**names, "leaves": leaves, **count(program or "")}


def on_pod(smoke: bool) -> Iterator[Row]:
    """Every row of `overheads`, with Optax's equivalent."""
    mesh = _chips.pod()
    params = split(mesh)
    names = {"mesh": f"a TPU {_chips.POD} as 32 x 8", "devices": mesh.size, "leaves": len(params)}
    for case in [Case("Adam alone", ADAM), *cases()][: 2 if smoke else None]:
        row = {"name": case.label, **names, **_tried(Peer(case.label, case.ours), params)}
        if case.peer is not None:
            row |= {"peer": case.peer.label, **_tried(case.peer, params, "optax_")}
        yield row


def split(mesh: jax.sharding.Mesh) -> list[jax.ShapeDtypeStruct]:
    """Two layers on a mesh, without entries: matrices split over both axes, biases over the second."""
    layer = {(8192, 8192): P("data", "model"), (8192,): P("model")}
    return [
        jax.ShapeDtypeStruct(shape, "float32", sharding=NamedSharding(mesh, spec))
        for shape, spec in layer.items()
    ] * 2


def _tried(contender: Peer, params: Any, prefix: str = "") -> Row:
    """The counts, or what the compiler said instead."""
    try:
        program = compile_step(contender.tx, params, params, contender.finish).as_text()
    except Exception as error:
        first = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"{contender.label}: {first}", file=sys.stderr)
        return {f"{prefix}error": first}
    return count(program or "", prefix)


def rows(smoke: bool) -> Iterator[Row]:
    yield from on_cpu(smoke)
    if _chips.missing() is None:
        yield from on_pod(smoke)


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.collectives", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="few leaves, to see that it runs")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON, one a line")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    found = ({"group": "collectives", **row, "optimizer": "adam"} for row in rows(args.smoke))
    if args.json:
        for row in found:
            print(json.dumps(row), flush=True)
    else:
        show(found)


if __name__ == "__main__":
    main()
