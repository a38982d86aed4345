"""Read from a compiled program, XLA's HLO, what it moves and sends, its branches and its loops."""

import re
from collections import Counter
from typing import NamedTuple

# No kernels: names of what is there, and the second half of an asynchronous pair.
NAMES = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all", "opt-barrier"}
FREE = NAMES | {"copy-done", "slice-done", "async-done", "all-reduce-done", "all-gather-done"}
COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
LINE = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)")
HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
CALLED = re.compile(r"(?:body|to_apply)=%?([\w.\-]+)")


class Operation(NamedTuple):
    """One line of a computation, and the bytes that it moves in HBM, a chip's large memory."""

    kind: str
    name: str
    shape: str
    moved: int
    called: tuple[str, ...] = ()


class Program(NamedTuple):
    """The computations of a program by name; `entry` is the one that runs, kernel by kernel."""

    computations: dict[str, list[Operation]]
    entry: str

    def kernels(self) -> list[Operation]:
        """What the entry launches; a `call`, such as a GPU's recorded commands, stands for its parts."""
        return self._launched(self.entry) if self.entry else []

    def turns(self) -> list[Operation]:
        """What one turn of each loop of the program launches, once however often it turns."""
        loops = (o for each in self.computations.values() for o in each if o.kind == "while")
        return [inner for loop in loops for body in loop.called for inner in self._launched(body)]

    def count(self, kind: str) -> int:
        """Operations of a kind, wherever they are."""
        return sum(o.kind == kind for each in self.computations.values() for o in each)

    def _launched(self, name: str) -> list[Operation]:
        found = []
        for operation in self.computations[name]:
            if operation.kind == "call":
                found += [o for called in operation.called for o in self._launched(called)]
            elif operation.kind not in FREE:
                found.append(operation)
        return found


def read(text: str) -> Program:
    """Parse a program as `compiled.as_text()` prints it."""
    computations: dict[str, list[Operation]] = {}
    shapes: dict[str, str] = {}
    entry, current = "", None
    for line in text.splitlines():
        head = HEAD.match(line)
        if head:
            shapes, current = {}, computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif current is not None and (found := LINE.match(line)):
            name, shape, kind, rest = found.groups()
            shapes[name] = shape
            operands = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
            consumed = sum(in_hbm(shapes.get(operand, "")) for operand in operands)
            # An asynchronous start gives its operands out again beside its result.
            written = in_hbm(shape) - (consumed if kind.endswith("-start") else 0)
            moved = _in_slices(shape) if kind == "slice-start" else consumed + written
            current.append(Operation(kind, name, shape, moved, tuple(CALLED.findall(rest))))
    return Program(computations, entry)


def in_hbm(shape: str) -> int:
    """The bytes of a shape, tuples too, but for what lies elsewhere: S(1) is a TPU's fast memory."""
    total = 0
    for dtype, sizes, layout in ARRAY.findall(shape):
        if re.search(r"S\([1-9]", layout):
            continue
        count = 1
        for size in filter(None, sizes.split(",")):
            count *= int(size)
        total += count * bits(dtype) // 8
    return total


def _in_slices(shape: str) -> int:
    """The bytes of what is cut out and fetched into fast memory: of a part, not of its operand."""
    return sum(
        in_hbm(f"{dtype}[{sizes}]") for dtype, sizes, layout in ARRAY.findall(shape) if "S(1)" in layout
    )


def bits(dtype: str) -> int:
    """The bits of an entry: pred, s32, bf16, f8e4m3fn, c64; a token has none."""
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 8 * (dtype == "pred")


def collectives(text: str) -> tuple[Counter[str], Counter[str]]:
    """The collectives of a program: those on every step's way, and those in branches and loops."""
    program = read(text)
    always: Counter[str] = Counter()
    sometimes: Counter[str] = Counter()
    for name, operations in program.computations.items():
        found = always if name == program.entry else sometimes
        kinds = (operation.kind.removesuffix("-start") for operation in operations)
        found.update(kind for kind in kinds if kind in COLLECTIVES)
    return always, sometimes
