"""The notebooks as they are kept: run from top to bottom, a figure for each claim, no file beside."""

import ast
import json
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

# By module: the package to install for it, None for what comes with optax_clip.
PACKAGES = {
    "jax": None,
    "numpy": None,
    "optax": None,
    "optax_clip": None,
    "flax": "flax",
    "matplotlib": "matplotlib",
    "orbax": "orbax-checkpoint",
    "scipy": "scikit-learn",
    "sklearn": "scikit-learn",
    "threadpoolctl": "scikit-learn",
}


def code_of(path):
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def imported(code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "").split(".")[0]


def test_all_are_here():
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_kept_as_it_ran(path):
    first, *cells = json.loads(path.read_text("utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    claims = re.findall(r"^\d\. ", "".join(first["source"]), re.MULTILINE)
    figures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(figures) == len(claims) > 0


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_by_itself(path):
    code = code_of(path)
    modules = {module for cell in code for module in imported(cell)} - sys.stdlib_module_names
    assert modules <= PACKAGES.keys()
    needed = {PACKAGES[module] for module in modules} - {None}
    told = re.search(r"^# %pip install (.+) path/to/a/clone/of/optax_clip$", code[0], re.MULTILINE)
    assert told and set(told[1].split()) == needed
    group = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["dependency-groups"]["notebooks"]
    assert needed <= set(group)
