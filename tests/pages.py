"""The code of the README and the guides, by heading.

The blocks under one heading run in order and share their names, as a reader would paste them; each
heading starts afresh. A block right after the line `<!-- skip -->` is left out.
"""

import contextlib
import functools
import re
import tempfile
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def sections(text: str) -> dict[str, str]:
    """Heading -> its Python, on the lines where the README has it, so that errors point there."""
    found: dict[str, list[str]] = {}
    heading, fence, last = "", None, ""
    for number, line in enumerate(text.splitlines()):
        if fence is not None and line.strip() == "```":
            fence = None
        elif fence == "python":
            code = found.setdefault(heading, [])
            code += [""] * (number - len(code)) + [line]
        elif fence is None and (opening := re.match(r"```(\w*)", line)):
            fence = "" if last == "<!-- skip -->" else opening[1]
        elif fence is None and (title := re.match(r"#+ (.+)", line)):
            heading = title[1]
        last = line.strip() or last
    return {heading: "\n".join(code) for heading, code in found.items()}


SOURCES = {
    f"{page.stem}: {heading}": (code, page)
    for page in [README, ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
    for heading, code in sections(page.read_text("utf-8")).items()
}
CODE = {place: compile(code, str(page), "exec") for place, (code, page) in SOURCES.items()}
ON_DEVICES = [place for place, (code, _) in SOURCES.items() if "make_mesh" in code]


@functools.cache
def _ran(place: str) -> dict[str, Any]:
    names = {"__name__": "__main__"}
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        exec(CODE[place], names)
    return names


def names(place: str) -> dict[str, Any]:
    """The names that the code under a heading leaves behind; it runs once in a process."""
    return dict(_ran(place))
