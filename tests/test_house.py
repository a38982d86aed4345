"""What the source looks like: one room speaks of XLA, geometry knows no policy, nothing is long."""

import ast
import io
import re
import statistics
import tokenize
from pathlib import Path

import pytest

from mutants import MUTANTS

ROOT = Path(__file__).parents[1] / "optax_clip"
FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
OF_XLA = ("optimization_barrier", "platform_dependent", "device_count")
# Beside `_xla.py`: float care needs a barrier, and one function decides how norms are laid out.
ALSO = {
    "_numerics.py": {"optimization_barrier"},
    "_landing.py": {"optimization_barrier"},
    "_mesh.py": {"device_count"},
}


def code_lines(source: str) -> set[int]:
    """The lines that bear a token, docstrings out."""
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {
        line
        for token in tokens
        if token.type not in silent and token.string
        for line in range(token.start[0], token.end[0] + 1)
    }
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def functions(file: Path) -> dict[str, int]:
    """The lines of code of each function of a file."""
    source = (ROOT / file).read_text("utf-8")
    lines = code_lines(source)
    return {
        f"{file}: {node.name}": sum(node.lineno <= line <= node.end_lineno for line in lines)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef)
    }


@pytest.mark.parametrize("file", FILES, ids=str)
def test_one_room_speaks_of_xla(file):
    names = re.findall(r"\w+", (ROOT / file).read_text("utf-8"))
    spoken = set(OF_XLA) & set(names)
    assert str(file) == "_xla.py" or spoken <= ALSO.get(str(file), set())


def test_that_room_has_them():
    assert not {"optimization_barrier", "platform_dependent"} - set(
        re.findall(r"\w+", (ROOT / "_xla.py").read_text("utf-8"))
    )


@pytest.mark.parametrize("file", [f for f in FILES if f.parts[0] == "_geometry"], ids=str)
def test_geometry_knows_no_policy(file):
    imported = re.findall(r"(?:from|import) optax_clip\.?(\w*)", (ROOT / file).read_text("utf-8"))
    assert set(imported) <= {"", "_geometry", "_mesh", "_numerics", "_trees", "norms", "_xla"}


def test_nothing_is_long():
    sizes = {name: size for file in FILES for name, size in functions(file).items()}
    assert {name: size for name, size in sizes.items() if size > 30} == {}
    assert statistics.median(sizes.values()) <= 6
    files = {str(f): len(code_lines((ROOT / f).read_text("utf-8"))) for f in FILES}
    assert {name: size for name, size in files.items() if size > 350} == {}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.file}: {m.old[:40]}")
def test_a_listed_bug_is_one_line_that_is_there(mutant):
    assert (ROOT / mutant.file).read_text("utf-8").count(mutant.old) == 1
    assert mutant.new != mutant.old
