"""Imports inside the package only point down, and the two sides do not know each other."""

import ast
from pathlib import Path

import pytest

PACKAGE = "optax_clip"
ROOT = Path(__file__).parents[1] / PACKAGE

SHARED = [
    "_values",
    "_validate",
    "_numerics",
    "_mesh",
    "_xla",
    "_trees",
    "_landing",
    "_settings",
    "_owners",
    "_records",
    "norms",
    "_geometry",
]
GRADIENTS = [*SHARED, "thresholds", "clipping", "skipping", "adaptive"]
WEIGHTS = [*SHARED, "sets", "rescaling", "projection", "mapping", "masks"]
SIDES = {*GRADIENTS, *WEIGHTS}

# room -> the rooms it may import from
BELOW = {
    **{room: set(side[:i]) for side in (GRADIENTS, WEIGHTS) for i, room in enumerate(side)},
    "recording": SIDES,
    "choosing": SIDES,
    "__init__": {*SIDES, "recording", "choosing"},
}

FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))


def room_of(file: Path) -> str:
    """The file's room; a room that has grown into a package is still one room."""
    return file.parts[0].removesuffix(".py")


def imported_rooms(source: str, file: Path = Path("norms.py")) -> set[str]:
    """The rooms that a file imports from, wherever in it; the package itself is `__init__`."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            here = [PACKAGE, *file.parent.parts]
            base = here[: len(here) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            names += [".".join([*base, alias.name]) for alias in node.names]
    parts = [name.split(".") for name in names if name.split(".")[0] == PACKAGE]
    return {p[1] if len(p) > 1 and p[1] in BELOW else "__init__" for p in parts}


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_point_down(file):
    room = room_of(file)
    assert room in BELOW, f"{PACKAGE}/{file} has no place in the order of rooms"
    imported = imported_rooms((ROOT / file).read_text("utf-8"), file) - {room}
    assert imported <= BELOW[room], f"{room} may not import {sorted(imported - BELOW[room])}"


@pytest.mark.parametrize(
    ("source", "rooms"),
    [
        ("import jax, optax", set()),
        ("import optax_clip", {"__init__"}),
        ("import optax_clip.sets as s", {"sets"}),
        ("from optax_clip import clipping, _trees", {"clipping", "_trees"}),
        ("from optax_clip import clip_tree", {"__init__"}),
        ("from optax_clip.sets import box", {"sets"}),
        ("from . import sets", {"sets"}),
        ("from .sets import box", {"sets"}),
        ("def f():\n    from .adaptive import zclip", {"adaptive"}),
    ],
)
def test_the_reader_sees_every_form(source, rooms):
    assert imported_rooms(source) == rooms


def test_the_sides_are_apart():
    assert not BELOW["projection"] & {"thresholds", "clipping", "adaptive"}
    assert not BELOW["adaptive"] & {"sets", "projection", "recording"}
    assert BELOW["_geometry"] == {*SHARED} - {"_geometry"}
