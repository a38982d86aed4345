"""What `make test` leaves to `make test-full`, beside what is marked so where it stands.

Programs as XLA optimises them, millions of entries, matrices, and the same in one more dtype, size or
mode: of a test with parameters a few cases are left. The list of bugs is the witness that they see what
all of them do.
"""

from collections.abc import Callable, Sequence
from typing import Any


def always(**_: Any) -> bool:
    return True


def all_but(**kept: Any) -> Callable[..., bool]:
    """Where an argument is none of those that `make test` keeps."""
    return lambda **args: any(args[name] not in values for name, values in kept.items())


def eager_in_other_dtypes(mode: str, dtype: str = "float32", **_: Any) -> bool:
    """Outside of jit one dtype says whether the code runs there; float16 is in trees of mixed dtypes."""
    return dtype == "float16" or (mode == "eager" and dtype != "float32")


def _named(x: Any) -> str:
    return getattr(x, "__name__", str(x))


def other_pairs(p_dtype: Any, u_dtype: Any, start: str, **_: Any) -> bool:
    """A million entries in two dtypes, from outside."""
    return start != "outside" or _named(p_dtype) != _named(u_dtype) or _named(p_dtype) == "float16"


# Of each test with parameters that compiles `make test` runs so many cases, spread over them.
CASES = 2
ALL = 10**6
KEPT: dict[str, Any] = {
    # Traced, or outside of XLA: the price of a case is that of Python.
    **dict.fromkeys(
        (
            "test_choosing",
            "test_clients",
            "test_house",
            "test_imports",
            "test_landing",
            "test_layout",
            "test_merged",
            "test_messages",
            "test_names",
            "test_notebooks",
            "test_owners",
            "test_pages",
            "test_processes",
            "test_public",
            "test_readme",
            "test_recording",
            "test_rules",
            "test_settings",
            "test_states",
            "test_trainer_states",
            "test_units",
            "test_validate",
            "test_xla",
        ),
        ALL,
    ),
    # Each row of the registry looks the same from step to step, in each wrapper; each kind is compiled.
    "test_contract": {
        "test_edges": 12,
        "test_vmap_of_derivatives": 4,
        "test_only_some_leaves": 24,
        "test_inside_conditionals_of_optax": 12,
        "test_inject_hyperparams": 24,
        "test_named_chain": 12,
        "test_export": 24,
        "test_empty": 24,
        "": ALL,
    },
    "test_weak_types": {"test_every_kind_takes_them": 12},
    "test_metrics": {"": 12},
    "test_capped_simplex": ALL,
    "test_mapping": {"test_formula": ALL},
    "test_sets": {"test_weights_land_in_the_spectral_ball": ALL},
    "test_frozen": {"": 12},
    "test_ends_of_ranges": {"": 12},
    "test_platforms": {"test_edges_of_clips": 30, "": 6},
    "test_clipping": {"test_traced_negative_limit_is_zero": ALL},
    "test_norms": {"test_every_scope": 6},
    "test_thresholds": {"test_against_the_oracle": 6},
    "test_projection": {
        "test_projection_and_violation_match_the_oracle": 20,
        "test_what_lands_inside_keeps_its_update_bit_for_bit": 4,
    },
    "test_contract_on_meshes": {"test_on_a_mesh": 12, "": ALL},
    "test_meshes": {
        "test_inside_shard_map": 4,
        "test_axis_name_where_types_say_nothing": 4,
        "test_nothing_is_gathered": ALL,
        "test_one_device_alone_needs_the_careful_sum": ALL,
        "test_whole_units_on_each_device_beside_a_bias_in_parts": ALL,
    },
    "test_layouts": {"test_whole_beside_split": 17},
}


def cases(module: str, test: str) -> int:
    """How many cases of a test `make test` runs."""
    kept = KEPT.get(module, CASES)
    return kept if isinstance(kept, int) else kept.get(test, kept.get("", CASES))


def spread(items: Sequence[Any]) -> set[Any]:
    """Which of the tests that pytest has collected are one case too many."""
    alike: dict[Any, list[Any]] = {}
    for item in items:
        full = item.get_closest_marker("full") or mark_of(item)
        if hasattr(item, "callspec") and not full:
            alike.setdefault((item.module.__name__, item.originalname), []).append(item)
    left = set()
    for (module, test), some in alike.items():
        kept, last = cases(module, test), len(some) - 1
        if kept <= last:
            places = {round(k * last / max(kept - 1, 1)) for k in range(kept)}
            left |= {item for k, item in enumerate(some) if k not in places}
    return left


# What is left out, by the arguments of a test.
FULL: dict[str, dict[str, Callable[..., bool]]] = {
    "test_singular_values": {
        "test_is_the_svd_with_capped_values": all_but(method=("polar",)),
        "test_ends_of_the_limit": always,
    },
    "test_thresholds": {"test_the_table_of_the_page_is_what_the_program_prints": always},
    "test_local": {"test_beside_weights_and_normalized": always},
    "test_published": {"test_agc_of_weights_with_outputs_first": always},
    "test_landing": {
        "test_what_is_made_projected_and_added_in_one_program_lands": all_but(platform=("cpu",)),
        "test_the_share_of_weights_at_a_bound": all_but(platform=("cpu",)),
        "test_weights_of_float64_with_narrower_updates": all_but(narrow=("bfloat16",)),
    },
    "test_readme": {"test_code_runs": lambda place: not place.startswith("README")},
    "test_chained": {
        "test_jitted_is_eager_behind_an_optimizer": always,
        "test_the_share_of_a_box": all_but(size=(1, 5000), name=("adam",)),
    },
    "test_memory": {
        "test_no_temporary_of_the_size_of_the_gradients": always,
        "test_optax_writes_the_clipped_tree": always,
        "test_the_page": always,
    },
    "test_recipes": {"test_memory_does_not_grow_with_the_batch": always},
    "test_matrices": {
        "test_near_the_limit_it_is_the_nearest_matrix_to_some_eps": all_but(shape=((8, 32), (4, 4))),
        "test_far_from_the_limit": all_but(shape=((8, 32),), top=(30.0,)),
        "test_in_float64_and_complex": all_but(method=("polar",)),
        "test_in_sixteen_bits": all_but(method=("polar",)),
        "test_the_largest_singular_value": always,
    },
    "test_sets": {
        "test_hard_sums_are_at_least_as_exact_as_those_of_optax": always,
        "test_a_sparse_distribution_is_topped_up": all_but(n=(1000,)),
        "test_the_spectral_ball_is_the_nearest_point": all_but(
            shape=((8, 32), (12, 9)), method=("polar",)
        ),
        "test_weights_land_in_the_spectral_ball": all_but(start=(30.0,), method=("polar",)),
        "test_power_iterations_converge_over_the_steps": all_but(k=(2,)),
        "test_the_box_around_the_start_of_flax_models": always,
    },
    "test_projection": {
        "test_no_entry_of_a_million_lands_outside_a_box": other_pairs,
        "test_a_ball_of_a_million_entries_holds_in_float64": other_pairs,
    },
    "test_norms": {
        "test_every_scope": lambda dtype, ord, **_: (
            dtype not in ("float32", "bfloat16") and ord not in (None, 1)
        ),
    },
    "test_edges": {
        "test_balls_of_float8": all_but(kind=("float8_e4m3fn", "float8_e5m2")),
        "test_a_limit_of_zero_on_subnormal_numbers": all_but(jit=(True,)),
    },
    "test_initial": {"test_no_drift_over_ten_thousand_steps": always},
    "test_clipping": {
        name: eager_in_other_dtypes
        for name in (
            "test_above_the_limit",
            "test_below_the_limit_nothing_changes",
            "test_a_scope_below_its_limit_beside_one_above",
            "test_zero_limit",
            "test_squares_out_of_range",
            "test_norm_beyond_float32",
            "test_nonfinite_gradients",
            "test_clip_by_value",
            "test_clip_by_value_between",
            "test_clip_by_value_rounds_bounds_inwards",
            "test_clip_by_value_of_inf_and_nan",
            "test_normalize",
        )
    },
    "test_meshes": {
        "test_nothing_is_gathered": all_but(
            name=(
                "clip_by_global_norm",
                "clip_by_norm, unit",
                "clip_by_value",
                "box",
                "norm_ball",
                "simplex",
            )
        ),
    },
    "test_sharding": {"test_the_axes_are_read_from_the_types": all_but(ord=(None, 1))},
    "test_matrices_on_meshes": {
        "test_on_a_mesh_nothing_is_gathered": lambda kind, spec, **_: (
            kind.name == "Explicit" and "b" not in spec
        ),
    },
}


def mark_of(item: Any) -> str | None:
    """Does a test that pytest has collected stand above: about optimised programs, or one more case?"""
    rule = FULL.get(item.module.__name__, {}).get(getattr(item, "originalname", item.name))
    args = item.callspec.params if hasattr(item, "callspec") else {}
    if rule is None or not rule(**args):
        return None
    return "full" if rule in (always, other_pairs) else "more"
