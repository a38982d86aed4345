"""Checks of arguments. What is known raises at once; a traced value cannot, and passes."""

import math
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Ord = float | str | None
Scope = str | int | tuple[int, ...] | Callable[[str, Any], str | int | tuple[int, ...]]
AxisName = Hashable | tuple[Hashable, ...] | None


def is_traced(x: object) -> bool:
    return isinstance(x, jax.core.Tracer)


def number(**named: Any) -> None:
    """Each value is one real number, not NaN: Python, NumPy, or a 0-d array."""
    for name, x in named.items():
        if not _is_real(x):
            raise TypeError(f"Expected {name} to be a real number, got {name}={x!r}.")
        if jnp.ndim(x):
            raise ValueError(f"Expected {name} to be one number, got {name} of shape {jnp.shape(x)}.")
        _require(name, x, lambda value: not math.isnan(value), f"{name} not to be NaN")


def at_least(bound: float, **named: Any) -> None:
    """Each value is one real number >= bound."""
    number(**named)
    for name, x in named.items():
        _require(name, x, lambda value: value >= bound, f"{name} >= {bound:g}")


def between(low: float, high: float, **named: Any) -> None:
    """Each value is one real number in [low, high]."""
    number(**named)
    for name, x in named.items():
        _require(name, x, lambda value: low <= value <= high, f"{low:g} <= {name} <= {high:g}")


def decay(**named: Any) -> None:
    """Each value is one real number in [0, 1)."""
    number(**named)
    for name, x in named.items():
        _require(name, x, lambda value: 0 <= value < 1, f"0 <= {name} < 1")


def finite(**named: Any) -> None:
    """Each value is one finite real number."""
    number(**named)
    for name, x in named.items():
        _require(name, x, math.isfinite, f"{name} to be finite")


def integer(minimum: int, **named: Any) -> None:
    """Each value is one integer >= minimum."""
    for name, x in named.items():
        if isinstance(x, bool) or not jnp.issubdtype(_dtype(x), jnp.integer):
            raise TypeError(f"Expected {name} to be an integer, got {name}={x!r}.")
    at_least(minimum, **named)


def ordered(**named: Any) -> None:
    """The first of two numbers is at most the second."""
    number(**named)
    (low, x), (high, y) = named.items()
    if not is_traced(x) and not is_traced(y) and float(x) > float(y):
        raise ValueError(f"Expected {low} <= {high}, got {low}={x!r} and {high}={y!r}.")


def one_of(choices: tuple[str, ...], **named: Any) -> None:
    for name, x in named.items():
        if x not in choices:
            raise ValueError(f"Expected {name} to be one of {choices}, got {name}={x!r}.")


def label(**named: Any) -> None:
    for name, x in named.items():
        if not isinstance(x, str) or not x:
            raise TypeError(f"Expected {name} to be a non-empty string, got {name}={x!r}.")


def static(**named: Any) -> None:
    """Each value shapes the program, so it may not be an array that could be traced."""
    for name, x in named.items():
        if isinstance(x, jax.Array):
            raise ValueError(
                f"Expected {name} to be a static Python value, got {name}={x!r}. "
                f"Under optax.inject_hyperparams pass static_args=({name!r},)."
            )


def order(ord: Any) -> None:
    """The order of a norm: None, "rms" or a number >= 1."""
    static(ord=ord)
    if ord is None or (isinstance(ord, str) and ord == "rms"):
        return
    if not _is_real(ord) or not ord >= 1:
        raise ValueError(f'Expected ord to be None, "rms" or a number >= 1, got ord={ord!r}.')


def scope(scope: Any) -> None:
    """A scope: a word, the axes to reduce, or a callable that gives one of these."""
    static(scope=scope)
    axes = scope if isinstance(scope, tuple) else (scope,)
    words = scope in ("global", "leaf", "unit") if isinstance(scope, str) else callable(scope)
    if not words and not all(isinstance(a, int) and not isinstance(a, bool) for a in axes):
        raise ValueError(
            'Expected scope to be "global", "leaf", "unit", an int, a tuple of ints or a callable '
            f"(path, leaf) -> scope, got scope={scope!r}."
        )


def axis_names(axis_name: AxisName) -> tuple[Hashable, ...]:
    """A name, or several, or none, as a tuple."""
    return () if axis_name is None else axis_name if isinstance(axis_name, tuple) else (axis_name,)


def axes(**named: Any) -> None:
    """Each value is None, the name of a mapped axis, or a tuple of names."""
    for name, x in named.items():
        if not all(isinstance(each, Hashable) and each is not None for each in axis_names(x)):
            raise TypeError(f"Expected {name} to be a name or a tuple of names, got {name}={x!r}.")


def _is_real(x: Any) -> bool:
    real = jnp.integer, jnp.floating
    return not isinstance(x, bool) and any(jnp.issubdtype(_dtype(x), kind) for kind in real)


def _dtype(x: Any) -> Any:
    """The dtype of a number or an array; bool for all else, which no check takes for a number."""
    if isinstance(x, (int, float)):
        return np.dtype(type(x))
    return x.dtype if isinstance(x, (jax.Array, np.ndarray, np.generic)) else np.dtype(bool)


def _require(name: str, x: Any, holds: Callable[[float], bool], what: str) -> None:
    if not is_traced(x) and not holds(float(x)):
        raise ValueError(f"Expected {what}, got {name}={x!r}.")
