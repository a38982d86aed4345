"""Compile an Adam step for an H100 and a TPU v5e, which need not be there, and count what it moves.

Units are the bytes that the step reads and writes in HBM, as multiples of the bytes of the gradients:
Adam alone is 7, four read and three written. What a conditional is handed counts as read, what a loop is
handed as read and written, however often it turns; what one turn moves stands beside it. Nothing is run,
so there are no times here.

    python -m benchmarks.compiled --only box --chips H100 --largest 8
"""

import argparse
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import optax

from benchmarks import _chips, _hlo, training_step
from benchmarks._timing import DTYPES, Row, compile_step, line, size_of
from benchmarks.overheads import ADAM, Case, Peer, cases

CHIPS = (_chips.H100, _chips.V5E)
SIDE, MATRICES = 8192, 2  # larger than the fast memory of a TPU
COUNTS = ("units", "temporaries", "kernels", "conditionals", "loops", "units_per_turn")
ALONE = Case("Adam alone", ADAM)


def run(*, smoke: bool) -> list[Row]:
    title = f"Compiled for {' and '.join(CHIPS)}"
    reason = _chips.missing()
    if reason is not None:
        print(f"{title}: skipped: {reason}")
        return []
    side, dtypes = (64, DTYPES[:1]) if smoke else (SIDE, DTYPES)
    few = ("clip_by_global_norm", "box") if smoke else ()
    rows = training_step.run_compiled(smoke=smoke)
    print(f"\n{title}: an Adam step on {MATRICES} matrices of {side} x {side} and biases (Optax's)")
    print("units are HBM traffic, temporaries memory, both in multiples of the gradients' bytes")
    return rows + list(_rows(CHIPS, dtypes, side, few))


def _rows(
    chips: tuple[str, ...], dtypes: tuple[str, ...], side: int, only: tuple[str, ...], largest: int = 0
) -> Iterator[Row]:
    for name, dtype in itertools.product(chips, dtypes):
        line(
            f"{name}, {dtype}",
            *(kind.replace("_", " ") for kind in COUNTS),
            "  with".ljust(38),
            width=16,
        )
        device = _chips.chip(name)
        for case in (ALONE, *cases()):
            if not only or case.label in only:
                yield _row(case, name, structs(device, dtype, side), largest)


def structs(device: jax.Device, dtype: str, side: int = SIDE) -> list[jax.ShapeDtypeStruct]:
    """The weights of some layers on a device, without entries."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    shapes = [(side, side), (side,)] * MATRICES
    return [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape in shapes]


def _row(case: Case, chip: str, params: list[jax.ShapeDtypeStruct], largest: int) -> Row:
    peer = case.peer
    row: Row = {"group": "compiled", "name": case.label, "peer": peer.label if peer else None}
    row |= {"chip": chip, "dtype": str(params[0].dtype), "optimizer": "adam"}
    contenders = {"": Peer(case.label, case.ours), "optax_": peer}
    kernels: dict[str, list[_hlo.Operation]] = {}
    for prefix, contender in contenders.items():
        if contender is not None:
            counts, kernels[prefix] = _tried(contender, params)
            row |= {f"{prefix}{key}": value for key, value in counts.items()}
    cells = (_cell(row, kind) for kind in COUNTS)
    line(case.label, *cells, f"  {row['peer'] or '':36}", width=16)
    for prefix, operations in kernels.items():
        _print_largest(contenders[prefix].label, operations[:largest])
    return row


def _tried(contender: Peer, params: Any) -> tuple[Row, list[_hlo.Operation]]:
    """The counts, or what the compiler said instead."""
    try:
        return measure(contender.tx, params, contender.finish)
    except Exception as error:
        first = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"{contender.label}: {first}")
        return {"error": first}, []


def measure(
    tx: optax.GradientTransformation, params: Any, finish: Any = lambda params: params
) -> tuple[Row, list[_hlo.Operation]]:
    """What a step with a transform moves, and its kernels, those that move most first.

    The weights' shardings say for which chip; where they are on several, it is what each of them does.
    """
    compiled = compile_step(tx, params, params, finish)
    program = _hlo.read(compiled.as_text())
    kernels, unit = program.kernels(), size_of(params)
    return {
        "units": sum(kernel.moved for kernel in kernels) / unit,
        "temporaries": compiled.memory_analysis().temp_size_in_bytes / unit,
        "kernels": len(kernels),
        "conditionals": program.count("conditional"),
        "loops": program.count("while"),
        "units_per_turn": sum(kernel.moved for kernel in program.turns()) / unit,
    }, sorted(kernels, key=lambda kernel: -kernel.moved)


def _cell(row: Row, kind: str) -> str:
    """Ours, and Optax's in brackets."""
    texts = [
        f"{row[key]:.2f}" if isinstance(row[key], float) else f"{row[key]}"
        for key in (kind, f"optax_{kind}")
        if key in row
    ]
    return " ".join([texts[0], *(f"({text})" for text in texts[1:])]) if kind in row else "-"


def _print_largest(label: str, operations: list[_hlo.Operation]) -> None:
    for operation in operations:
        size = f"{operation.moved / 2**20:9.1f} MiB"
        print(f"    {label:28}{size} {operation.kind:12} {operation.name:36} {operation.shape[:90]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.compiled",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [ALONE.label, *(case.label for case in cases())]
    parser.add_argument("--only", nargs="+", metavar="ROW", default=(), help=", ".join(names))
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=CHIPS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--largest", type=int, default=0, help="show so many kernels of each step")
    args = parser.parse_args()
    if unknown := set(args.only) - set(names):
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    if reason := _chips.missing():
        parser.exit(1, f"{reason}\n")
    for _ in _rows(tuple(args.chips), tuple(args.dtypes), SIDE, tuple(args.only), args.largest):
        pass


if __name__ == "__main__":
    main()
