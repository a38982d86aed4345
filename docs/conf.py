"""The pages: guides and notebooks as they stand, the reference from the docstrings."""

import inspect
import re
import shutil
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

import optax_clip

HERE = Path(__file__).parent

project = "optax_clip"
author = "The optax_clip authors"
copyright = "2026, the optax_clip authors, Apache-2.0"
version = release = optax_clip.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
nitpicky = True  # a reference to a name that is not there is a warning, and those are errors
nitpick_ignore_regex = [("py:.*", r"(jax|jnp|optax|nnx|numpy|flax)\b.*"), ("py:class", ".*")]
default_role = "py:obj"  # `clip_by_norm` in a docstring is a link

autodoc_typehints = "none"  # the text says what an argument may be; the unions are long
autosummary_generate = False
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Returns"]  # all of it is text: no type before a colon
add_module_names = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the outputs in the notebooks are those of the full setting

copybutton_prompt_text = r">>> |\.\.\. "  # not copied, nor is what an example prints
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = f"optax_clip {release}"
html_math_renderer = "mathml"  # the browser draws formulas: no script, no network
html_static_path = ["_static"]
html_css_files = ["custom.css"]

# What a docstring must have: of a class, of a function.
PARTS = {True: ("Args:", ">>> "), False: ("Args:", "Returns:", "Examples:", ">>> ")}

# Links as GitHub and a clone need them, and as the pages do.
LINKS = {
    "](docs/": "](",
    "](../notebooks/": "](notebooks/",
    "](../docs/": "](../",
    "](CHANGELOG.md)": "](changelog.md)",
    "](CONTRIBUTING.md)": "](contributing.md)",
}

log = logging.getLogger(__name__)


def copy_notebooks(app: Sphinx, config: object) -> None:
    """Put the notebooks where Sphinx finds them: it reads no folder but its own."""
    shutil.rmtree(HERE / "notebooks", ignore_errors=True)
    shutil.copytree(
        HERE.parent / "notebooks", HERE / "notebooks", ignore=shutil.ignore_patterns("[_.]*")
    )


def relink(app: Sphinx, page: str, source: list[str]) -> None:
    """Turn the links of a file in the repository into those of a page; the first page is the README."""
    if page == "index":
        source[0] = (HERE.parent / "README.md").read_text("utf-8") + source[0]
    for there, here in LINKS.items():
        source[0] = source[0].replace(there, here)


def link_tables(app: Sphinx, tree: nodes.document) -> None:
    """Make public names and calls in tables links to the reference."""
    for cell in tree.findall(nodes.entry):
        for code in list(cell.findall(nodes.literal)):
            name = re.fullmatch(r"(\w+)(\(.*\))?", code.astext())
            linked = isinstance(code.parent, nodes.reference | addnodes.pending_xref)
            if name and name[1] in optax_clip.__all__ and not linked:
                where = {"refdomain": "py", "reftype": "obj", "reftarget": f"optax_clip.{name[1]}"}
                link = addnodes.pending_xref("", refexplicit=True, refwarn=True, **where)
                code.replace_self(link)
                link += code


def mathml(tex: str, display: str) -> str:
    """Turn a formula into what the browser draws; warn of a command that is not known."""
    drawn = convert(" ".join(tex.split()).replace(r"\arg", r"\mathrm{arg}"), display=display)
    if "\\" in drawn:
        log.warning("no MathML for %s", tex)
    return drawn


def inline_formula(page: HTML5Translator, node: nodes.math) -> None:
    """Write a formula into its line."""
    page.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def formula(page: HTML5Translator, node: nodes.math_block) -> None:
    """Write a formula on a line of its own."""
    page.body.append(f'<div class="math">{mathml(node.astext(), "block")}</div>')
    raise nodes.SkipNode


def check_reference(app: Sphinx, env: BuildEnvironment) -> None:
    """Warn of a public name that the reference leaves out, or whose docstring lacks a section."""
    pages = env.get_domain("py").objects
    for name in optax_clip.__all__:
        thing = getattr(optax_clip, name)
        text = inspect.getdoc(thing) or ""
        lacking = [part for part in PARTS[inspect.isclass(thing)] if part not in text]
        if lacking:
            log.warning("the docstring of %s has no %s", name, " ".join(lacking))
        if f"optax_clip.{name}" not in pages:
            log.warning("%s is on no page of docs/api", name)


def setup(app: Sphinx) -> None:
    """Do each at its moment."""
    app.connect("config-inited", copy_notebooks)
    app.connect("source-read", relink)
    app.connect("doctree-read", link_tables)
    app.add_html_math_renderer("mathml", (inline_formula, None), (formula, None))
    app.connect("env-check-consistency", check_reference)
