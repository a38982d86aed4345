"""A list of bugs: one line broken at a time, each of which a test has to see.

    make mutants                    # all of them
    make mutants ARGS="norms _mesh"  # those in files named so

The package and its tests are copied, a line is changed, the tests named beside it run until one falls,
and that one is printed. To add one, write a row: the text stands in its file exactly once.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
COPIED = ("optax_clip", "tests", "benchmarks", "docs", "README.md", "pyproject.toml", "CHANGELOG.md")


class Mutant(NamedTuple):
    """A fault: in a file of the package ``old`` becomes ``new``, and these tests see it."""

    file: str
    old: str
    new: str
    tests: str
    full: bool = False  # none but those of `make test-full`


MUTANTS = (
    # Norms: trees, ranges, orders.
    Mutant(
        "_trees.py",
        "alike.setdefault((jax.typeof(t), *rest)",
        "alike.setdefault((t.shape, *rest)",
        "test_norms.py test_weak_types.py",
    ),
    Mutant(
        "_trees.py",
        "[terms[i] for i in some]) for some in eights] for terms in ways",
        "[terms[i] for i in some[:7]]) for some in eights] for terms in ways",
        "test_norms.py test_memory.py",
    ),
    Mutant(
        "_trees.py",
        "return scopes, [_strong(leaves[i]) for i in places]",
        "return scopes, [jnp.asarray(leaves[i]) for i in places]",
        "test_weak_types.py test_contract.py",
    ),
    Mutant(
        "_trees.py",
        "return jnp.sum(x, axis=-1) if x.ndim > 1",
        "return jnp.sum(x, axis=0) if x.ndim > 1",
        "test_platforms.py test_norms.py",
    ),
    Mutant(
        "_trees.py",
        "groups[key] = combine(groups[key], part) if key in groups else part",
        "groups[key] = part",
        "test_norms.py",
    ),
    Mutant(
        "norms.py",
        "return [(~(s <= info.max), s < _like(n, s) * floor)",
        "return [(~(s <= info.max), s < 0 * floor * _like(n, s))",
        "test_norms.py test_platforms.py",
    ),
    Mutant(
        "norms.py",
        "sums.append(jnp.where(high, less, jnp.where(low, more, middle)))",
        "sums.append(jnp.where(low, more, middle))",
        "test_platforms.py",
    ),
    Mutant(
        "norms.py",
        "jnp.where(high, small, jnp.where(low, large, 1))",
        "jnp.where(high, small, jnp.where(low, small, 1))",
        "test_platforms.py",
    ),
    Mutant(
        "norms.py",
        "jnp.maximum(modulus(part * k), least), x)",
        "modulus(part * k), x)",
        "test_platforms.py test_zeros.py",
    ),
    Mutant("norms.py", 's / jnp.maximum(_like(n, s), 1) if ord == "rms" else s', "s", "test_norms.py"),
    Mutant(
        "norms.py",
        "jnp.max((~jnp.isfinite(norm.root))",
        "jnp.min((~jnp.isfinite(norm.root))",
        "test_clipping.py test_platforms.py",
    ),
    Mutant(
        "_numerics.py",
        "return jnp.dtype(jnp.float64 if wide else jnp.float32)",
        "return jnp.dtype(jnp.float32)",
        "test_norms.py",
    ),
    Mutant(
        "_numerics.py",
        "return xp.where(y.astype(x.dtype) > x, below, y)",
        "return xp.where(y.astype(x.dtype) >= x, below, y)",
        "test_clipping.py test_edges.py",
    ),
    Mutant(
        "_numerics.py", "y = widen(x, factors[0].dtype)", "y = x", "test_clipping.py test_platforms.py"
    ),
    # XLA: barriers and branches.
    Mutant(
        "_xla.py",
        "if len(parts) == 1 and parts[0].dtype.itemsize > 2:\n        return parts",
        "return parts",
        "test_norms.py test_zeros.py test_memory.py",
        full=True,
    ),
    Mutant(
        "_xla.py",
        "jnp.minimum(jnp.maximum(gap, zero) * huge, one)",
        "jnp.minimum(jnp.maximum(gap, zero), one)",
        "test_memory.py test_clipping.py",
    ),
    Mutant(
        "_xla.py",
        "return for_all(jnp.all(flag, axis=0)), False",
        "return for_all(jnp.any(flag, axis=0)), False",
        "test_memory.py",
    ),
    Mutant(
        "_xla.py",
        "chosen = lax.select(flag, upper, lax.bitcast_convert_type(x, jnp.uint16))",
        "chosen = upper",
        "test_memory.py test_clipping.py",
    ),
    Mutant("_xla.py", "padding = [(0, -n % size)", "padding = [(0, 0 * -n % size)", "test_xla.py"),
    # Meshes.
    Mutant(
        "thresholds/engine.py",
        "each = all_reduce(each, [varying_axes(x) for x in each], lax.pmax)",
        "each = list(each)",
        "mesh/test_meshes.py mesh/test_sharding.py",
    ),
    Mutant(
        "sets/simplexes.py",
        "all_devices_agree(functools.reduce(operator.and_, same))",
        "functools.reduce(operator.and_, same)",
        "mesh/test_meshes.py",
    ),
    Mutant(
        "_mesh.py",
        "if names:\n            same =",
        "if False:\n            same =",
        "mesh/test_sharding.py",
    ),
    Mutant(
        "_mesh.py",
        "(*given, *(a for a in varying_axes(x) if a not in given))",
        "given",
        "mesh/test_sharding.py",
    ),
    Mutant(
        "_mesh.py",
        "sharding = NamedSharding(sharding.mesh, PartitionSpec())",
        "pass",
        "mesh/test_contract_on_meshes.py",
    ),
    Mutant(
        "_mesh.py",
        "return jax.device_count() > 1",
        "return False",
        "mesh/test_meshes.py mesh/test_layouts.py",
    ),
    Mutant("_mesh.py", "return broken == 0", "return broken <= 1", "mesh/test_meshes.py"),
    Mutant(
        "_records.py",
        "all_reduce(counts, axes, lax.psum), jnp.float32(0))",
        "counts, jnp.float32(0))",
        "mesh/test_meshes.py mesh/test_signals.py",
    ),
    Mutant(
        "rescaling.py",
        "all_reduce(leaves, [names] * len(leaves), lax.pmax)",
        "leaves",
        "mesh/test_signals.py",
    ),
    # Clips.
    Mutant(
        "clipping/by_value.py",
        "highs = [jnp.maximum(top, 0) for top in highs]",
        "highs = list(highs)",
        "test_clipping.py",
    ),
    Mutant(
        "clipping/by_singular_values.py",
        "broken = ~finite | jnp.isnan(limit)",
        "broken = ~finite",
        "test_singular_values.py test_contract.py",
    ),
    Mutant(
        "skipping.py",
        "skipped = spike & (in_a_row < jnp.asarray(self.max_consecutive))",
        "skipped = spike & (in_a_row <= jnp.asarray(self.max_consecutive))",
        "test_adaptive.py",
    ),
    Mutant(
        "skipping.py",
        "kept = jax.tree.map(lambda x, y: jnp.where(take, x, y), inner_state, old)",
        "kept = inner_state",
        "test_adaptive.py",
    ),
    Mutant(
        "_records.py",
        "more: Array = happened & (count < 2**31 - 1)",
        "more: Array = happened & (count < 0)",
        "test_contract.py",
    ),
    Mutant(
        "_records.py",
        "return {key: _updated(value, new[key]) if key in new else value",
        "return {key: value",
        "test_recording.py",
    ),
    # Rules.
    Mutant(
        "thresholds/memory.py",
        "return jnp.isfinite(norms) & (norms > 0)",
        "return jnp.isfinite(norms)",
        "test_thresholds.py",
    ),
    Mutant(
        "thresholds/memory.py",
        "jnp.where(flag, x, y), new, old)",
        "jnp.where(flag, y, y), new, old)",
        "test_thresholds.py",
    ),
    Mutant(
        "thresholds/memory.py",
        "jnp.concatenate([window[1:], value[None]])",
        "jnp.concatenate([window[:-1], value[None]])",
        "test_thresholds.py",
    ),
    Mutant(
        "thresholds/rules.py",
        "spike = known & ~warming & (norms > highest)",
        "spike = known & (norms > highest)",
        "test_thresholds.py",
    ),
    Mutant(
        "thresholds/rules.py",
        "warming = (seen < count(warmup)) | (gamma == 0)",
        "warming = (seen <= count(warmup)) | (gamma == 0)",
        "test_thresholds.py",
    ),
    Mutant(
        "thresholds/rules.py",
        "(number(q, norms) - (~over).astype(norms.dtype))",
        "(number(q, norms) - over.astype(norms.dtype))",
        "test_thresholds.py",
    ),
    Mutant(
        "thresholds/rules.py",
        "jnp.where(over, common, jnp.inf)",
        "jnp.where(over, number(max_norm, norms), jnp.inf)",
        "test_thresholds.py test_adaptive.py",
    ),
    Mutant(
        "thresholds/windows.py",
        "jnp.where(seen <= count(warmup), jnp.inf, limits)",
        "jnp.where(seen < count(warmup), jnp.inf, limits)",
        "test_thresholds.py test_rules.py",
    ),
    Mutant(
        "thresholds/windows.py", "jnp.maximum(held - 1, 1)", "jnp.maximum(held, 1)", "test_thresholds.py"
    ),
    # Sets and where weights land.
    Mutant(
        "sets/simplexes.py",
        "again = at.phase == 1, settled & (at.phase == 0)",
        "again = at.phase == 1, settled & (at.phase == 9)",
        "test_sets.py test_projection.py",
    ),
    Mutant(
        "sets/simplexes.py",
        "return near & (low >= 0) | ~jnp.isfinite(high)",
        "return near | ~jnp.isfinite(high)",
        "test_sets.py test_projection.py",
    ),
    Mutant(
        "sets/spectral.py",
        "return jnp.where(value == 0, jnp.inf, value)",
        "return value",
        "test_initial.py",
    ),
    Mutant(
        "_matrices/capped.py",
        "jnp.all(jnp.isfinite(y), axis=(-2, -1))",
        "jnp.all(jnp.isfinite(y), axis=(-2, -1)) | True",
        "test_matrices.py",
    ),
    Mutant(
        "_matrices/capped.py",
        "- peak * (eps / 4), limit / 2)",
        ", limit / 2)",
        "test_sets.py test_matrices.py",
    ),
    Mutant(
        "masks.py",
        "return (g != 0) & (jnp.abs(bound - p) <= 4",
        "return (jnp.abs(bound - p) <= 4",
        "test_outward.py",
    ),
    Mutant("rescaling.py", "over = logits > limit", "over = logits >= 0", "test_rescaling.py"),
    # What a person reads.
    Mutant(
        "choosing.py",
        "for cut in cuts]  # of the steps that are clipped",
        "for cut in cuts[::-1]]",
        "test_choosing.py",
    ),
)


def check() -> None:
    """Each text stands in its file once, so that it is this line that breaks."""
    for mutant in MUTANTS:
        found = (ROOT / "optax_clip" / mutant.file).read_text("utf-8").count(mutant.old)
        if found != 1:
            raise SystemExit(
                f"Expected once in optax_clip/{mutant.file}, found {found} times:\n{mutant.old}"
            )


def falls(mutant: Mutant, folder: Path) -> str | None:
    """The first test that sees the fault, in a copy of the package."""
    path = folder / "optax_clip" / mutant.file
    text = path.read_text("utf-8")
    path.write_text(text.replace(mutant.old, mutant.new), "utf-8")
    try:
        runs = (_run(test, "full" if mutant.full else "not full", folder) for test in _there(mutant))
        return next(filter(None, runs), None)
    finally:
        path.write_text(text, "utf-8")


def _there(mutant: Mutant) -> list[str]:
    return [test for test in shlex.split(mutant.tests) if (ROOT / "tests" / test).exists()]


def _run(test: str, marked: str, folder: Path) -> str | None:
    flags = os.environ.get("XLA_FLAGS", "")
    if marked == "not full":
        flags += " --xla_backend_optimization_level=0"
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
    env = os.environ | {
        "XLA_FLAGS": flags,
        "JAX_COMPILATION_CACHE_DIR": cache,
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "--tb=no",
        "-p",
        "no:cacheprovider",
        "-m",
        marked,
    ]
    done = subprocess.run(
        [*command, f"tests/{test}"], cwd=folder, env=env, capture_output=True, text=True
    )
    found = re.search(r"^(?:FAILED|ERROR) (\S.*?)(?: - |$)", done.stdout, re.MULTILINE)
    if found is None and done.returncode not in (0, 5):
        return f"tests/{test}, which ends with {done.returncode}"
    return found and found[1]


def main(names: list[str]) -> int:
    check()
    chosen = [m for m in MUTANTS if not names or any(name in m.file for name in names)]
    survived = 0
    with tempfile.TemporaryDirectory() as folder:
        for each in COPIED:
            copy = shutil.copytree if (ROOT / each).is_dir() else shutil.copy
            copy(ROOT / each, Path(folder) / each)
        for mutant in chosen:
            seen = falls(mutant, Path(folder))
            survived += seen is None
            print(
                f"{mutant.file}: {' '.join(mutant.new.split())}\n    {seen or 'NO TEST FALLS'}",
                flush=True,
            )
    print(f"{len(chosen) - survived} of {len(chosen)} fall")
    return survived > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
