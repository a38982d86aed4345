"""The README and the guides: their Python code runs, and the README names everything public.

The blocks under one heading run in order and share their names, as a reader would paste them; each
heading starts afresh. A block right after the line `<!-- skip -->` is left out.
"""

import re
from pathlib import Path

import jax
import pytest

import optax_clip

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


CODE = {
    f"{page.stem}: {heading}": compile(code, str(page), "exec")
    for page in [README, *sorted(ROOT.glob("docs/*.md"))]
    for heading, code in sections(page.read_text("utf-8")).items()
}


@pytest.mark.parametrize("place", CODE)
def test_code_runs(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(CODE[place], {"__name__": "__main__"})


@pytest.mark.parametrize("name", [n for n in optax_clip.__all__ if n != "__version__"])
def test_names_everything_public(name):
    assert re.search(rf"`{name}\b", README.read_text("utf-8")), f"README.md does not mention {name}"


def test_is_short():
    assert len(README.read_text("utf-8").splitlines()) < 250


def test_sections():
    text = """# A
```python
x = 1
```
text
```python
y = x
```
## B
<!-- skip -->

```python
never()
# not a heading
```
```bash
make
```
### C
```python
# not a heading
z = 3
```
"""
    found = sections(text)
    assert list(found) == ["A", "C"]
    assert found["A"] == "\n\nx = 1\n\n\n\ny = x"
    assert found["C"].split("\n")[20:] == ["# not a heading", "z = 3"]
