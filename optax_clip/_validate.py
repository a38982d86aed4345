"""Checks of arguments. What is known raises at once; a traced value cannot, and passes."""

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Ord = float | str | None


@dataclasses.dataclass(frozen=True)
class Groups:
    """The scope in which the leaves of one label share a norm."""

    label: Callable[[str, Any], str]

    def __repr__(self) -> str:
        return f"groups({self.label!r})"


Scope = str | int | tuple[int, ...] | Groups | Callable[[str, Any], str | int | tuple[int, ...]]
Record = bool | str
AxisName = Hashable | tuple[Hashable, ...] | None


def is_traced(x: object) -> bool:
    return isinstance(x, jax.core.Tracer)


def number(_ndim: int | None = 0, _off: str = "", **named: Any) -> None:
    """Each value is one real number, not NaN; any array of them with ``_ndim=None``."""
    for name, x in named.items():
        _one_real(name, x, _ndim, _off)
        _require(name, x, lambda value: ~np.isnan(value), f"{name} not to be NaN")


def measured(**named: Any) -> None:
    """Each value is one real number >= 0, or the NaN of a bad step."""
    for name, x in named.items():
        _one_real(name, x, 0)
        _require(name, x, lambda value: ~(value < 0), f"{name} >= 0")


def off(x: Any, infinity: str = "jnp.inf") -> str:
    """The hint for those who give None to switch a limit off."""
    return f" To switch a clip off give {infinity}." if x is None and infinity else ""


def real(**named: Any) -> None:
    """Each value is a real number or an array of them."""
    for name, x in named.items():
        if not is_real(x):
            raise TypeError(f"Expected {name} to be a real number or an array, got {name}={x!r}.")


def at_least(bound: float, _ndim: int | None = 0, **named: Any) -> None:
    """Each value is one real number >= bound."""
    number(_ndim, **named)
    for name, x in named.items():
        _require(name, x, lambda value: value >= bound, f"{name} >= {bound:g}")


def limit(_ndim: int | None = 0, **named: Any) -> None:
    """Each value is one real number >= 0; inf is no limit."""
    number(_ndim, "jnp.inf", **named)
    at_least(0, _ndim, **named)


def between(low: float, high: float, **named: Any) -> None:
    """Each value is one real number in [low, high]."""
    number(**named)
    for name, x in named.items():
        _require(
            name, x, lambda value: (low <= value) & (value <= high), f"{low:g} <= {name} <= {high:g}"
        )


def in_unit_interval(**named: Any) -> None:
    """Each value is one real number in [0, 1)."""
    number(**named)
    for name, x in named.items():
        _require(name, x, lambda value: (value >= 0) & (value < 1), f"0 <= {name} < 1")


def finite(_ndim: int | None = 0, **named: Any) -> None:
    """Each value is one finite real number."""
    number(_ndim, **named)
    for name, x in named.items():
        _require(name, x, np.isfinite, f"{name} to be finite")


def integer(minimum: int, **named: Any) -> None:
    """Each value is one integer >= minimum that an int32 holds."""
    for name, x in named.items():
        if isinstance(x, bool) or not jnp.issubdtype(_dtype(x), jnp.integer):
            raise TypeError(f"Expected {name} to be an integer, got {name}={x!r}.")
    at_least(minimum, **named)
    for name, x in named.items():
        _require(name, x, lambda value: value < 2**31, f"{name} < 2**31")


def positive(**named: Any) -> None:
    """Each value is one finite real number > 0."""
    finite(**named)
    for name, x in named.items():
        _require(name, x, lambda value: value > 0, f"{name} > 0")


def ordered(**named: Any) -> None:
    """The first of two numbers, or arrays, is nowhere above the second."""
    number(None, **named)
    (low, x), (high, y) = named.items()
    if is_traced(x) or is_traced(y):
        return
    a, b = np.broadcast_arrays(*(np.asarray(z).astype(np.float64) for z in (x, y)))
    if np.any(a > b):
        at = tuple(int(i) for i in np.argwhere(a > b)[0])
        got = f"{low}={x!r} and {high}={y!r}" if not at else f"{a[at]} > {b[at]} at position {at}"
        raise ValueError(f"Expected {low} <= {high}, got {got}.")


def one_of(choices: tuple[str, ...], **named: Any) -> None:
    for name, x in named.items():
        if x not in choices:
            raise ValueError(f"Expected {name} to be one of {choices}, got {name}={x!r}.")


def method(method: Any) -> None:
    """How singular values are found; None to choose by platform."""
    if method not in (None, "polar", "eigh"):
        raise ValueError(f'Expected method to be None, "polar" or "eigh", got method={method!r}.')


def params_given(params: Any, *, of: str) -> None:
    """The update was called with the weights."""
    if params is None:
        raise ValueError(
            f"Expected params in update of {of}, got params=None. Call tx.update(grads, state, params)."
        )


def name(**named: Any) -> None:
    for name, x in named.items():
        if not isinstance(x, str) or not x:
            raise TypeError(f"Expected {name} to be a non-empty string, got {name}={x!r}.")


def record(record: Any, *words: str) -> None:
    """Whether to record: True or False, or one of some words."""
    if not isinstance(record, bool) and record not in words:
        expected = " or ".join(repr(x) for x in (True, False, *words))
        raise TypeError(f"Expected record to be {expected}, got record={record!r}.")


def labels(paths: Any, names: Mapping[int, Any]) -> None:
    """Each leaf has a label that is a non-empty string."""
    for i, label in names.items():
        if not isinstance(label, str) or not label:
            raise TypeError(
                f"Expected label(path, leaf) to be a non-empty string, got {label!r} for {paths[i]!r}."
            )


def static(**named: Any) -> None:
    """Each value shapes the program, so it may not be an array that could be traced."""
    for name, x in named.items():
        if isinstance(x, jax.Array):
            raise ValueError(
                f"Expected {name} to be a static Python value, got {name}={x!r}. "
                f"Under optax.inject_hyperparams pass static_args=({name!r},)."
            )


def scope(scope: Any) -> None:
    """A scope: a word, the axes to reduce, or a callable that gives one of these."""
    static(scope=scope)
    axes = scope if isinstance(scope, tuple) else (scope,)
    named = callable(scope) or isinstance(scope, Groups)
    words = scope in ("global", "leaf", "unit") if isinstance(scope, str) else named
    if not words and not all(isinstance(a, int) and not isinstance(a, bool) for a in axes):
        raise ValueError(
            'Expected scope to be "global", "leaf", "unit", groups(label), an int, a tuple of ints or a '
            f"callable (path, leaf) -> scope, got scope={scope!r}."
        )


def axis_names(axis_name: AxisName) -> tuple[Hashable, ...]:
    """A name, or several, or none, as a tuple."""
    return () if axis_name is None else axis_name if isinstance(axis_name, tuple) else (axis_name,)


def axis_name(**named: Any) -> None:
    """Each value is None, the name of a mapped axis, or a tuple of names."""
    for name, x in named.items():
        if not all(isinstance(each, Hashable) and each is not None for each in axis_names(x)):
            raise TypeError(f"Expected {name} to be a name or a tuple of names, got {name}={x!r}.")


def _one_real(name: str, x: Any, ndim: int | None, infinity: str = "") -> None:
    if not is_real(x):
        raise TypeError(f"Expected {name} to be a real number, got {name}={x!r}.{off(x, infinity)}")
    if ndim is not None and jnp.ndim(x) != ndim:
        raise ValueError(f"Expected {name} to be one number, got {name} of shape {jnp.shape(x)}.")


def is_real(x: Any) -> bool:
    real = jnp.integer, jnp.floating
    return not isinstance(x, bool) and any(jnp.issubdtype(_dtype(x), kind) for kind in real)


def _dtype(x: Any) -> Any:
    """The dtype of a number or an array; bool for all else, which no check takes for a number."""
    if isinstance(x, (int, float)):
        return np.dtype(type(x))
    return x.dtype if isinstance(x, (jax.Array, np.ndarray, np.generic)) else np.dtype(bool)


def _require(name: str, x: Any, holds: Callable[[Any], Any], what: str) -> None:
    if is_traced(x):
        return
    values = np.asarray(x).astype(np.float64)
    bad = np.argwhere(~np.asarray(holds(values)))
    if len(bad):
        at = tuple(int(i) for i in bad[0])
        got = f"{name}={x!r}" if not at else f"{values[at]} at position {at}"
        raise ValueError(f"Expected {what}, got {got}.")
