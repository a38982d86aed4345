"""The public face: names, docstrings, the registry, the version."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import optax_clip
from full import FULL
from registry import ROWS

ROOT = Path(__file__).parents[1]
NAMES = optax_clip.__all__
# Functions and classes that a person calls; `metrics` reads, the others make or measure.
OBJECTS = {name: getattr(optax_clip, name) for name in NAMES}


def is_transform(value):
    """Whether a function makes an Optax transform, by what it says it returns."""
    return inspect.isfunction(value) and "GradientTransformation" in str(
        inspect.signature(value).return_annotation
    )


TRANSFORMS = [name for name, value in OBJECTS.items() if is_transform(value)]


def test_all_is_sorted_and_complete():
    assert sorted(set(NAMES)) == NAMES
    modules = {path.stem for path in Path(optax_clip.__file__).parent.iterdir()}
    public = {name for name in vars(optax_clip) if not name.startswith("_")} - modules
    assert public == set(NAMES)


def test_modules_export_what_the_package_does():
    for name, value in OBJECTS.items():
        module = inspect.getmodule(value)
        assert name in module.__all__, f"{module.__name__}.__all__ lacks {name}"


@pytest.mark.parametrize("name", NAMES)
def test_docstring_with_example(name):
    doc = inspect.getdoc(OBJECTS[name]) or ""
    assert ">>> " in doc, f"{name} has no example"
    summary = doc.splitlines()[0]
    assert summary.endswith("."), summary


def test_every_transform_has_a_row():
    assert {"clip_by_value", "clip_by_global_norm", "clip_by_norm", "normalize_by_norm"} <= {*TRANSFORMS}
    rows = {row.factory.__name__ for row in ROWS}
    assert rows == {*TRANSFORMS}


def test_rows_have_names_of_their_own():
    ids = [row.id for row in ROWS]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_share_their_words(name):
    """Optional arguments are keyword-only, and each transform takes a name for its metrics."""
    parameters = inspect.signature(OBJECTS[name]).parameters.values()
    assert any(p.name == "name" and p.default for p in parameters)
    optional = [p for p in parameters if p.default is not p.empty]
    assert all(p.kind is p.KEYWORD_ONLY for p in optional[1:])


def test_version():
    version = optax_clip.__version__
    assert f"\n## [{version}] - " in (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text("utf-8")


def test_a_copy_that_is_not_installed():
    """A clone or a vendored copy: no metadata of a distribution is looked up."""
    code = """
import importlib.metadata
def absent(name):
    raise importlib.metadata.PackageNotFoundError(name)
importlib.metadata.version = importlib.metadata.distribution = absent
import optax_clip
print(optax_clip.__file__, optax_clip.__version__)
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.stdout.split() == [str(ROOT / "optax_clip/__init__.py"), optax_clip.__version__], (
        run.stderr
    )


@pytest.mark.parametrize("name", NAMES)
def test_reference_has_every_name(name):
    pages = "".join(page.read_text("utf-8") for page in ROOT.glob("docs/api/*.md"))
    assert re.search(rf"\n.. auto(function|class):: {name}\n", pages)


@pytest.mark.parametrize("module", FULL)
def test_what_is_left_to_the_full_run_is_there(module):
    folder = Path(__file__).parent
    (path,) = (*folder.glob(f"{module}.py"), *folder.glob(f"mesh/{module}.py"))
    found = set(re.findall(r"^def (test_\w+)", path.read_text("utf-8"), re.MULTILINE))
    assert FULL[module].keys() <= found
