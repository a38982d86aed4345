"""What every test runs under: one CPU device, strict promotion, reproducible examples.

Tests of several devices are in `tests/mesh` and take a process of their own: JAX fixes the number as it
starts.
"""

import gc
import os
from pathlib import Path

# Read when jax starts its backend, so they are set before anything imports it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import chex
import hypothesis
import jax
import pytest

import full
from optax_clip import _xla
from registry import ROWS

MESH = Path(__file__).parent / "mesh"

# What is imported stays, and traces are many small objects: Python would look through all for a tenth of
# the time.
gc.freeze()
gc.set_threshold(20_000, 20, 20)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# A program is compiled once, by whichever test and worker comes first, and not again in the next run.
cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".jax_cache"))
jax.config.update("jax_compilation_cache_dir", cache)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# The first example of a test compiles, so a deadline would only measure XLA.
hypothesis.settings.register_profile("local", deadline=None, max_examples=30)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=30, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def _in_mesh(config):
    """Which of the paths asked for lie in `tests/mesh`."""
    paths = [config.invocation_params.dir / arg.split("::")[0] for arg in config.args]
    return [path.resolve().is_relative_to(MESH) for path in paths]


def pytest_configure(config):
    if len(set(_in_mesh(config))) > 1:
        raise pytest.UsageError("Expected tests/mesh, which has eight devices, in a call of its own.")


def pytest_ignore_collect(collection_path, config):
    return True if collection_path == MESH and not any(_in_mesh(config)) else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """With ``--dist loadgroup``: what compiles the same programs runs in one process."""
    left = full.spread(items)
    for item in items:
        args = item.callspec.params if hasattr(item, "callspec") else {}
        group = args["row"].id if "row" in args else f"{item.module.__name__} {args.get('chip', '')}"
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(group))
        if mark := "more" if item in left else full.mark_of(item):
            item.add_marker(mark)


@pytest.fixture(autouse=True)
def _fresh_trace_counter():
    chex.clear_trace_counter()


@pytest.fixture(params=ROWS, ids=lambda row: row.id)
def row(request):
    """Each row of the registry, under the promotion rules that it needs."""
    with jax.numpy_dtype_promotion(request.param.promotion):
        yield request.param


@pytest.fixture
def compilations():
    """A list that grows by one with each program that XLA compiles."""
    seen = []

    def listen(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="module", params=["cpu", "cuda", "tpu"])
def platform(request):
    """The formulas of each platform, run by the CPU: the one seam is told another name.

    What was traced before is forgotten, else a cached trace would answer for another platform.
    """

    def by_platform(*arrays, default, **ways):
        return ways.get(request.param, default)(*arrays)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_xla, "by_platform", by_platform)
        jax.clear_caches()
        yield request.param
    jax.clear_caches()


@pytest.fixture
def x64():
    """64-bit types for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def standard_promotion():
    """For one test that runs code of Optax's which mixes dtypes: Adam, schedules, MultiSteps."""
    with jax.numpy_dtype_promotion("standard"):
        yield
