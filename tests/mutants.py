"""A list of bugs: one line broken at a time, each of which a test has to see.

    make mutants                    # all of them
    make mutants ARGS="norms _mesh"  # those in files named so

The package and its tests are copied, a line is changed, the tests named beside it run until one falls,
and that one is printed. To add one, write a row: the text stands in its file exactly once, and the tests
are few. At the end all that fell run once more on the package as it is.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
COPIED = (
    "optax_clip", "tests", "benchmarks", "docs",
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "pyproject.toml",
)  # fmt: skip


class Mutant(NamedTuple):
    """A fault: in a file of the package ``old`` becomes ``new``, and these tests see it.

    The tests are what pytest is given: files in this folder or parts of them, and ``-k``.
    """

    file: str
    tests: str
    old: str
    new: str
    full: bool = False  # none but those of `make test-full`


# fmt: off
MUTANTS = (
    # Trees: scopes, joins, homes.
    Mutant("_trees.py", "test_merged.py test_layout.py test_norms.py",
           "alike.setdefault((jax.typeof(t), *rest)",
           "alike.setdefault((jax.typeof(t),)"),
    Mutant("_trees.py", "test_norms.py -k many_leaves",
           "[terms[i] for i in some]) for some in eights] for terms in ways",
           "[terms[i] for i in some[:7]]) for some in eights] for terms in ways"),
    Mutant("_trees.py", "test_weak_types.py",
           "    return kept, [",
           "    return scopes, ["),
    Mutant("_trees.py", "test_weak_types.py test_contract.py",
           "return scopes, [_strong(leaves[i]) for i in places]",
           "return scopes, [jnp.asarray(leaves[i]) for i in places]"),
    Mutant("_trees.py", "test_platforms.py -k 'test_norms and cuda'",
           "jnp.sum(x, axis=tuple(range(1, x.ndim)))",
           "jnp.sum(x, axis=tuple(range(x.ndim - 1)))"),
    Mutant("_trees.py", "test_norms.py -k by_hand",
           "groups[key] = combine(groups[key], part) if key in groups else part",
           "groups[key] = part"),
    Mutant("_owners.py", "test_owners.py -k refused",
           'return f"{shape_of(leaf)} {label}"',
           'return f" {label}"'),
    Mutant("_owners.py", "test_owners.py -k 'mask or many'",
           "if _digest(rows[i:j], width) != marks[at : at + width]:",
           "if _digest(rows[i:j], width) == marks[at : at + width]:"),
    # Norms: ranges, orders.
    Mutant("norms.py", "test_norms.py -k 'squares_out_of_range or tail'",
           "s < _like(n, s) * floor, large, 1)",
           "s < 0 * floor * _like(n, s), large, 1)"),
    Mutant("norms.py", "test_platforms.py -k 'test_norms and cuda'",
           "jnp.where(k < 1, less, jnp.where(k > 1, more, middle))",
           "jnp.where(k > 1, more, middle)"),
    Mutant("norms.py", "test_platforms.py -k 'test_norms and cpu'",
           "again() -> tuple[Cells, Cells]:\n        pairs = zip(parts, powers.scopes.per_leaf(scales)",
           "again() -> tuple[Cells, Cells]:\n        pairs = zip(parts, powers.scopes.per_leaf(ones)"),
    Mutant("norms.py", "test_platforms.py -k 'test_norms and cuda'",
           "jnp.maximum(modulus(part * k), least), x)",
           "jnp.minimum(modulus(part * k), least), x)"),
    Mutant("norms.py", "test_platforms.py -k 'slopes and cuda'",
           "lax.clamp(-most, part * k, most)",
           "part * k"),
    Mutant("norms.py", "test_norms.py -k 'every_scope or by_hand'",
           "found = _averaged(scopes, sums) if mean else sums", "found = sums"),
    Mutant("norms.py", "test_clipping.py -k test_nonfinite_gradients",
           "jnp.max((~jnp.isfinite(norm.root))",
           "jnp.min((~jnp.isfinite(norm.root))"),
    Mutant("_trees.py", "test_norms.py -k thousands",
           "jnp.where(flag > 0, jnp.nan, top)",
           "top"),
    Mutant("norms.py", "test_violation.py -k thousands",
           "return jnp.where(flag > 0, jnp.nan, top)",
           "return top"),
    Mutant("_geometry/radial.py", "test_clipping.py -k 'second_derivatives or made_zero'",
           "own = Norm(*(jnp.where(used, part, 1) for part in norm))",
           "own = norm"),
    Mutant("_geometry/matrices/capped.py", "test_matrices.py -k blocks",
           "first = split.by_rows(wave(part.shape[:-1], part.dtype)[..., None])",
           "first = split.by_rows(part[..., :1])"),
    Mutant("_numerics.py", "test_norms.py -k mixed_dtypes",
           "return jnp.dtype(jnp.float64 if wide else jnp.float32)",
           "return jnp.dtype(jnp.float32)"),
    Mutant("_numerics.py", "test_edges.py -k one_number",
           "return xp.where(y.astype(x.dtype) > x, below, y)",
           "return xp.where(y.astype(x.dtype) >= x, below, y)"),
    Mutant("norms.py", "test_platforms.py -k 'test_norms and cuda'",
           "wide = [widen(powers.read(*part), powers.dtype) for part in parts]",
           "wide = [powers.read(*part) for part in parts]"),
    Mutant("_geometry/intervals.py", "test_landing.py -k modulus",
           "inside=4 * ",
           "inside=-4 * "),
    # XLA: barriers and branches.
    Mutant("_xla.py", "test_memory.py -k no_temporary",
           "if len(parts) == 1 and parts[0].dtype.itemsize > 2:\n        return parts",
           "return parts", full=True),
    Mutant("norms.py", "test_norms.py -k 'every_scope and float16'",
           "return widen(_xla.once(x) if made else x, powers.dtype)",
           "return _xla.once(x) if made else x"),
    Mutant("_xla.py", "test_memory.py -k counts_as_one",
           "jnp.minimum(jnp.maximum(gap, zero) * huge, one)",
           "jnp.minimum(jnp.maximum(gap, zero), one)"),
    Mutant("_xla.py", "test_landing.py -k at_a_bound",
           "return x.size - number if at else number",
           "return number"),
    Mutant("_xla.py", "test_memory.py -k vmap",
           "return for_all(jnp.all(flag, axis=0)), False",
           "return for_all(jnp.any(flag, axis=0)), False"),
    Mutant("_xla.py", "test_memory.py -k replaced",
           "chosen = lax.select(flag, upper, lax.bitcast_convert_type(x, jnp.uint16))",
           "chosen = upper"),
    Mutant("_xla.py", "test_xla.py -k columns",
           "padding = [(0, -n % size)",
           "padding = [(0, 0 * -n % size)"),
    Mutant("_xla.py", "mesh/test_units.py",
           "return once(functools.reduce(combine, once(list(parts))))",
           "return functools.reduce(combine, list(parts))"),
    # Meshes.
    Mutant("thresholds/engine.py", "mesh/test_sharding.py -k smallest_limit",
           "each = all_reduce(each, [varying_axes(x) for x in each], lax.pmax)",
           "each = list(each)"),
    Mutant("_geometry/sums.py", "mesh/test_meshes.py -k 'whole_units and simplex'",
           "all_devices_agree(functools.reduce(operator.and_, same))",
           "functools.reduce(operator.and_, same)"),
    Mutant("_geometry/capped_sums.py", "mesh/test_meshes.py -k 'whole_units and upper'",
           "all_devices_agree(functools.reduce(operator.and_, map(jnp.all, at.done)))",
           "functools.reduce(operator.and_, map(jnp.all, at.done))"),
    Mutant("_mesh.py", "mesh/test_sharding.py -k axes_are_read",
           "if names:\n            same =",
           "if False:\n            same ="),
    Mutant("_mesh.py", "mesh/test_sharding.py -k axes_are_read",
           "(*given, *(a for a in varying_axes(x) if a not in given))",
           "given"),
    Mutant("_mesh.py", "mesh/test_contract_on_meshes.py mesh/test_sharding.py",
           "sharding = NamedSharding(sharding.mesh, PartitionSpec())",
           "pass"),
    Mutant("_mesh.py", "mesh/test_layouts.py -k only_jit",
           "return jax.device_count() > 1",
           "return False"),
    Mutant("_mesh.py", "test_layout.py",
           "mesh.size > 1 or set(mesh.axis_types) != {AxisType.Auto}",
           "mesh.size > 1"),
    Mutant("_mesh.py", "mesh/test_meshes.py -k careful_sum",
           "return broken == 0",
           "return broken <= 1"),
    Mutant("_mesh.py", "mesh/test_layouts.py -k whole_beside_split",
           "return jax.sharding.reshard(x, sharding), jax.sharding.reshard(y, sharding)",
           "return x, y"),
    Mutant("_mesh.py", "mesh/test_signals.py -k metrics_over",
           "iter(all_reduce(values, list(axes) * len(columns), lax.psum))",
           "iter(values)"),
    Mutant("rescaling.py", "mesh/test_signals.py -k maximum_over",
           "all_reduce(leaves, [names] * len(leaves), lax.pmax)",
           "leaves"),
    # Clips.
    Mutant("clipping/_acting.py", "test_local.py -k alone",
           "jnp.isfinite(n.root) if local else finite",
           "finite"),
    Mutant("clipping/_acting.py", "test_local.py -k statistics",
           'if self.nonfinite != "local" or cut.scopes.is_global:',
           "if True:"),
    Mutant("clipping/_acting.py", "test_local.py -k alone",
           'scope = self.scope if self.scope == "leaf" else axes',
           'scope = "leaf"'),
    Mutant("clipping/_acting.py", "test_local.py -k waits",
           'alone = self.nonfinite == "local" and not (self.limits.by_tree or scopes.is_joint)',
           "alone = False"),
    Mutant("clipping/by_value.py", "test_clipping.py -k traced_negative",
           "highs = [jnp.maximum(top, 0) for top in highs]",
           "highs = list(highs)"),
    Mutant("clipping/by_singular_values.py", "test_singular_values.py -k traced",
           "broken = ~finite | jnp.isnan(limit)",
           "broken = ~finite"),
    Mutant("clipping/measuring.py", "test_recording.py test_contract.py test_public.py",
           "jnp.where(w > 0, u / jnp.where(w > 0, w, 1), 0)",
           "jnp.where(w > 0, w / jnp.where(u > 0, u, 1), 0)"),
    Mutant("_records.py", "test_local.py -k broken_scope",
           "finite & (share > 0), ~finite)",
           "share > 0, ~finite)"),
    Mutant("adaptive.py", "test_adaptive.py -k rms",
           'rule, scope="leaf", ord="rms"',
           'rule, scope="leaf", ord=2'),
    Mutant("skipping.py", "test_adaptive.py -k in_a_row",
           "skipped = spike & (in_a_row < jnp.asarray(self.max_consecutive))",
           "skipped = spike & (in_a_row <= jnp.asarray(self.max_consecutive))"),
    Mutant("skipping.py", "test_adaptive.py -k skipped_step",
           "kept = jax.tree.map(lambda x, y: jnp.where(take, x, y), inner_state, old)",
           "kept = inner_state"),
    # What is recorded.
    Mutant("_records.py", "test_contract.py -k 'looks_the_same and clip_by_value'",
           "more: Array = happened & (count < 2**31 - 1)",
           "more: Array = happened & (count < 0)"),
    Mutant("_records.py", "test_recording.py test_frozen.py test_contract.py",
           "return {key: _updated(value, new[key]) if key in new else value",
           "return {key: value"),
    Mutant("_records.py", "test_names.py",
           "if entry not in above and entries.isdisjoint(places):",
           "if True:"),
    Mutant("recording.py", "test_metrics.py -k called_like",
           "return counted and all(map(fits, entries))",
           "return counted"),
    # Rules.
    Mutant("thresholds/memory.py", "test_thresholds.py -k 'without_a_gradient or no_gradient'",
           "return jnp.isfinite(norms) & (norms > 0)",
           "return jnp.isfinite(norms)"),
    Mutant("thresholds/memory.py", "test_thresholds.py -k oracle",
           "jnp.where(flag, x, y), new, old)",
           "jnp.where(flag, y, y), new, old)"),
    Mutant("thresholds/memory.py", "test_thresholds.py -k oracle",
           "jnp.concatenate([window[1:], value[None]])",
           "jnp.concatenate([window[:-1], value[None]])"),
    Mutant("thresholds/rules.py", "test_thresholds.py -k 'oracle or warm_up or first'",
           "_deviations(norms, state, number(z, norms), known & ~warming)",
           "_deviations(norms, state, number(z, norms), known)"),
    Mutant("thresholds/rules.py", "test_thresholds.py -k 'oracle or warm_up'",
           "warming = (seen < count(warmup)) | (gamma == 0)",
           "warming = (seen <= count(warmup)) | (gamma == 0)"),
    Mutant("thresholds/rules.py", "test_thresholds.py -k quantile",
           "(number(q, norms) - (~over).astype(norms.dtype))",
           "(number(q, norms) - over.astype(norms.dtype))"),
    Mutant("thresholds/rules.py", "test_thresholds.py test_adaptive.py",
           "jnp.where(over, common, jnp.inf)",
           "jnp.where(over, number(max_norm, norms), jnp.inf)"),
    Mutant("thresholds/windows.py", "test_thresholds.py -k 'oracle or warm_up'",
           "jnp.where(seen <= count(warmup), jnp.inf, limits)",
           "jnp.where(seen < count(warmup), jnp.inf, limits)"),
    Mutant("thresholds/windows.py", "test_thresholds.py -k 'oracle or zscore'",
           "jnp.maximum(held - 1, 1)",
           "jnp.maximum(held, 1)"),
    Mutant("thresholds/engine.py", "test_clipping.py -k schedule",
           '{"count": increment(state["count"])}',
           '{"count": state["count"]}'),
    Mutant("thresholds/engine.py", "test_no_backend.py",
           "jax.ShapeDtypeStruct((), jnp.float32)",
           "jnp.zeros(())"),
    # Where weights land.
    Mutant("_landing.py", "test_landing.py -k every_normal",
           "step = 0.7 * float(info.eps)",
           "step = 0.3 * float(info.eps)"),
    Mutant("_landing.py", "test_landing.py -k 'float64 or below'",
           "jnp.where(end > high, new.u - step, ",
           "jnp.where(end > high, new.u + step, "),
    Mutant("projection.py", "test_landing.py -k other_steps",
           "jnp.where(due, self._share(ps, new), 0)",
           "self._share(ps, new)"),
    Mutant("projection.py", "test_frozen.py",
           "way = _Way(self.wanted, scopes, params,",
           "way = _Way(self.wanted, scopes, None,"),
    Mutant("projection.py", "test_projection.py -k every_projects",
           '(memory["set"], increment(memory["count"])) if counted',
           '(memory["set"], memory["count"]) if counted'),
    # Sets.
    Mutant("_geometry/intervals.py", "test_projection.py -k rounded_inwards",
           "low, high = round_up(precise(low), dtype), round_down(precise(high), dtype)",
           "low, high = round_up(precise(low), dtype), round_up(precise(high), dtype)"),
    Mutant("_geometry/radial.py", "test_projection.py -k edges_of_the_norm_sets",
           "movable = jnp.isfinite(norm.root) & (norm.root > 0)",
           "movable = jnp.isfinite(norm.root)"),
    Mutant("sets/constraint.py", "test_initial.py -k zeros",
           "jnp.where((high == 0) & relative, jnp.inf, high)",
           "jnp.where((high < 0) & relative, jnp.inf, high)"),
    Mutant("_geometry/sums.py", "test_sets.py test_projection.py",
           "again = at.phase == 1, settled & (at.phase == 0)",
           "again = at.phase == 1, settled & (at.phase == 9)"),
    Mutant("sets/simplexes.py", "test_sets.py test_projection.py",
           "return near & (low >= 0) & (over <= 0) | ~jnp.isfinite(high)",
           "return near & (over <= 0) | ~jnp.isfinite(high)"),
    Mutant("sets/simplexes.py", "test_capped_simplex.py",
           "return near & (low >= 0) & (over <= 0) | ~jnp.isfinite(high)",
           "return near & (low >= 0) | ~jnp.isfinite(high)"),
    Mutant("sets/simplexes.py", "test_capped_simplex.py",
           "shrinks=None if upper is None else True",
           "shrinks=None"),
    Mutant("_geometry/capped_sums.py", "test_capped_simplex.py -k bisection",
           "(s - goal) / jnp.maximum(n - m, 1)",
           "(s - goal) / jnp.maximum(n, 1)"),
    Mutant("_geometry/capped_sums.py", "test_capped_simplex.py -k derivative",
           "for goal in (goals, totals):",
           "for goal in ():"),
    Mutant("sets/spectral.py", "test_initial.py -k zeros",
           "return jnp.where(value == 0, jnp.inf, value)",
           "return value"),
    Mutant("_geometry/matrices/capped.py", "test_matrices.py",
           "jnp.all(jnp.isfinite(y), axis=(-2, -1))",
           "jnp.all(jnp.isfinite(y), axis=(-2, -1)) | True"),
    Mutant("_geometry/matrices/polar.py", "test_matrices.py -k 'polar_factor or powers_of_two'",
           "for unit in reversed(units):",
           "for unit in units:"),
    Mutant("masks.py", "test_outward.py",
           "return ((g > 0) | (g < 0)) & (jnp.abs(end - own)",
           "return (jnp.abs(end - own)"),
    Mutant("rescaling.py", "test_rescaling.py -k below",
           "over = logits > limit",
           "over = logits >= 0"),
    # Gradient mappings.
    Mutant("sets/mappings.py", "test_mapping.py -k 'formula and ball and not L1'",
           "step = reach * (reach - 2 * there * self.cosine)",
           "step = reach * (reach + 2 * there * self.cosine)"),
    Mutant("sets/mappings.py", "test_mapping.py -k keeps_a_part",
           "left = scale(w - end, 1 / size, jnp.abs(g))",
           "left = scale(w - end, 1 / size)"),
    Mutant("sets/mappings.py", "test_mapping.py -k not_finite",
           "taken = jnp.isfinite(root) & jnp.isfinite(slope.root)",
           "taken = jnp.isfinite(root)"),
    Mutant("sets/mappings.py", "test_mapping.py -k one_read",
           "low = jnp.log2(size.scale) + jnp.log2(slope.scale) > 50 * most / 128",
           "low = jnp.log2(size.scale) + jnp.log2(slope.scale) > 500 * most / 128"),
    Mutant("mapping.py", "test_mapping.py -k 'box or keeps_a_part'",
           "by_entry if wanted.bounds else by_difference",
           "by_difference"),
    Mutant("mapping.py", "test_mapping.py -k constrained_is_the_chain",
           'mapping = "mapping" if name == "project" else f"{name}_mapping"',
           'mapping = "mapping"'),
    # What a person gives and reads.
    Mutant("_values.py", "test_settings.py -k keeps_what_numpy",
           "y.copy() if isinstance(y, np.ndarray) else y",
           "y"),
    Mutant("_settings.py", "test_settings.py -k too_many_is_named",
           "if keys not in above and places.isdisjoint(_prefixes(keys)):",
           "if False:"),
    Mutant("_settings.py", "test_settings.py -k key_by_key",
           "hits = [table[keys] for keys in _prefixes(path.keys) if keys in table]",
           "hits = [table[keys] for keys in table if str(path).startswith('/'.join(keys))]"),
    Mutant("_validate.py", "test_edges.py -k one_number",
           "if np.any(a > b):",
           "if np.any(a >= b):"),
    Mutant("choosing.py", "test_choosing.py -k loop",
           "for cut in cuts]  # of the steps that are clipped",
           "for cut in cuts[::-1]]"),
)
# fmt: on


def check() -> None:
    """Each text stands in its file once, so that it is this line that breaks; its tests are there."""
    for mutant in MUTANTS:
        found = (ROOT / "optax_clip" / mutant.file).read_text("utf-8").count(mutant.old)
        if found != 1:
            raise SystemExit(
                f"Expected once in optax_clip/{mutant.file}, found {found} times:\n{mutant.old}"
            )
        for word in _command(mutant.tests):
            if word.startswith("tests/") and not (ROOT / word.partition("::")[0]).exists():
                raise SystemExit(f"Expected a file of tests for optax_clip/{mutant.file}, got {word}")


def falls(mutant: Mutant, folder: Path) -> str | None:
    """The first test that sees the fault, in a copy of the package."""
    path = folder / "optax_clip" / mutant.file
    text = path.read_text("utf-8")
    path.write_text(text.replace(mutant.old, mutant.new), "utf-8")
    try:
        return _first_to_fall(_command(mutant.tests), folder, full=mutant.full)
    finally:
        path.write_text(text, "utf-8")


def _command(tests: str) -> list[str]:
    words = shlex.split(tests)
    return [f"tests/{word}" if ".py" in word else word for word in words]


def _first_to_fall(tests: list[str], folder: Path, *, full: bool) -> str | None:
    flags = os.environ.get("XLA_FLAGS", "")
    quickly = "" if full else " --xla_backend_optimization_level=0"
    env = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"), **os.environ}
    env |= {"XLA_FLAGS": flags + quickly, "PYTHONDONTWRITEBYTECODE": "1"}
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=no", "-p", "no:cacheprovider"]
    command = [*pytest, "-m", "full or more" if full else "not full and not more", *tests]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode == -signal.SIGABRT:  # XLA's, of devices that wait for each other
        return f"{shlex.join(tests)}, which is aborted"
    if done.returncode not in (0, 1, 2, 5):  # pytest breaks, or somebody ended it; 5: no such tests
        raise SystemExit(f"{shlex.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}")
    found = re.search(r"^(?:FAILED|ERROR) (\S.*?)(?: - |$)", done.stdout, re.MULTILINE)
    return found and found[1]


def main(names: list[str]) -> int:
    check()
    chosen = [m for m in MUTANTS if not names or any(name in m.file for name in names)]
    seen: list[str | None] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for each in COPIED:
            copy = shutil.copytree if (ROOT / each).is_dir() else shutil.copy
            copy(ROOT / each, folder / each)
        for mutant in chosen:
            seen.append(falls(mutant, folder))
            line = " ".join(mutant.new.split())
            print(f"{mutant.file}: {line}\n    {seen[-1] or 'NO TEST FALLS'}", flush=True)
        broken = _broken(chosen, seen, folder)
    survived = seen.count(None)
    print(f"{len(chosen) - survived} of {len(chosen)} fall", *broken, sep="\n")
    return survived > 0 or bool(broken)


def _broken(chosen: list[Mutant], seen: list[str | None], folder: Path) -> list[str]:
    """Of the tests that fell those that fall without a fault, which say nothing."""
    calls: dict[tuple[bool, bool], set[str]] = {}
    for mutant, test in zip(chosen, seen, strict=True):
        if test and "::" in test:
            calls.setdefault((mutant.full, test.startswith("tests/mesh")), set()).add(test)
    falling = (_first_to_fall(sorted(tests), folder, full=full) for (full, _), tests in calls.items())
    return [f"{test} falls without a fault" for test in falling if test]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
