"""The code of the guides that makes a mesh."""

import pytest

from pages import ON_DEVICES, names


@pytest.mark.parametrize("place", ON_DEVICES)
def test_code_runs(place):
    names(place)
