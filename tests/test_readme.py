"""The README and the guides: their Python code runs, and the README names everything public."""

import re

import pytest

import optax_clip
from pages import CODE, ON_DEVICES, README, names, sections


@pytest.mark.parametrize("place", [place for place in CODE if place not in ON_DEVICES])
def test_code_runs(place):
    names(place)


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
