"""What `make test` leaves to `make test-full`, beside what is marked so where it stands.

Programs as XLA optimises them, millions of entries, and the same in one more dtype, size or mode. Each
entry says of the arguments of a test whether it is one of those.
"""

from collections.abc import Callable
from typing import Any


def always(**_: Any) -> bool:
    return True


def all_but(**kept: Any) -> Callable[..., bool]:
    """Where an argument is none of those that `make test` keeps."""
    return lambda **args: any(args[name] not in values for name, values in kept.items())


def eager_in_other_dtypes(mode: str, dtype: str = "float32", **_: Any) -> bool:
    """Every dtype is compiled; outside of jit one says whether the code runs there."""
    return mode == "eager" and dtype != "float32"


def _named(x: Any) -> str:
    return getattr(x, "__name__", str(x))


def other_pairs(p_dtype: Any, u_dtype: Any, start: str, **_: Any) -> bool:
    """A million entries in two dtypes, from outside."""
    return start != "outside" or _named(p_dtype) != _named(u_dtype) or _named(p_dtype) == "float16"


FULL: dict[str, dict[str, Callable[..., bool]]] = {
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


def is_full(item: Any) -> bool:
    """Does a test that pytest has collected stand above?"""
    rule = FULL.get(item.module.__name__, {}).get(getattr(item, "originalname", item.name))
    args = item.callspec.params if hasattr(item, "callspec") else {}
    return rule is not None and rule(**args)
