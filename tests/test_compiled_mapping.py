"""What a gradient mapping adds to a projection on an H100 and on a TPU, as their compilers say."""

import jax
import optax
import pytest

import optax_clip as oc
from benchmarks import _chips, compiled
from benchmarks.overheads import ADAM

if reason := _chips.missing():
    pytest.skip(reason, allow_module_level=True)

# Weights and gradients are read for two norms and a cosine, the weights once more; a box sums nothing.
MORE = {"ball": (oc.norm_ball(2.0), 3.05), "box": (oc.box(-0.01, 0.02), 0.05)}


@pytest.mark.parametrize("name", MORE)
@pytest.mark.parametrize("chip", compiled.CHIPS)
def test_units_beside_project_weights(chip, name, standard_promotion):
    jax.config.update("jax_enable_compilation_cache", False)
    constraint, more = MORE[name]
    params = compiled.structs(_chips.chip(chip), "float32")
    ways = (
        optax.chain(ADAM, oc.project_weights(constraint, record=False)),
        oc.constrained(ADAM, constraint, record=False),
    )
    alone, mapped = (compiled.measure(tx, params)[0]["units"] for tx in ways)
    jax.config.update("jax_enable_compilation_cache", True)
    assert mapped <= alone + more
