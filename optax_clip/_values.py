"""Value objects: what a factory makes is compared, hashed, copied, pickled and printed by its call."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Hashable, Iterable
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np

P = ParamSpec("P")
T = TypeVar("T")


def value_object(factory: Callable[P, T]) -> Callable[P, T]:
    """A factory of NamedTuples whose products are equal where factory and arguments are.

    A NamedTuple of functions is else equal to itself alone, since each call makes new functions. The
    products stay instances of their class; with fields replaced they are plain ones again.

    Numbers, strings, callables and other hashable arguments are compared by ``==``, arrays by dtype,
    shape and bytes, containers and other pytrees entry by entry. A product with a traced argument, or
    one that is neither an array nor hashable, is equal to itself alone. Arrays of NumPy are copied.

    Examples:
        >>> from typing import NamedTuple
        >>> from optax_clip._values import value_object
        >>> class Line(NamedTuple):
        ...     at: object
        >>> @value_object
        ... def line(slope, *, offset=0.0):
        ...     return Line(lambda x: slope * x + offset)
        >>> line(2.0, offset=1.0), line(2.0) == line(2.0, offset=0.0)
        (line(2.0, offset=1.0), True)
    """
    signature = inspect.signature(factory)

    @functools.wraps(factory)
    def make(*args: P.args, **kwargs: P.kwargs) -> T:
        given: Any = owned((args, kwargs))
        args, kwargs = given
        product: Any = factory(*args, **kwargs)
        kind: Any = product._kind if isinstance(product, _Value) else type(product)
        value: Any = tuple.__new__(_value_class(kind), product)
        value._factory, value._given = make, signature.bind(*args, **kwargs)
        made: T = value
        return made

    return make


@functools.cache
def _value_class(kind: type) -> type:
    return type(kind.__name__, (_Value, kind), {"_kind": kind, "__module__": kind.__module__})


class _Value:
    """Mixed into a NamedTuple: the call in place of the fields."""

    _kind: Any
    _factory: Callable[..., Any]
    _given: inspect.BoundArguments

    def __new__(cls, *fields: Any, **named: Any) -> Any:
        """Fields without a call, as JAX gives them when it rebuilds a tree, make a plain NamedTuple."""
        return cls._kind(*fields, **named)

    @classmethod
    def _make(cls, fields: Iterable[Any]) -> Any:
        return cls._kind._make(fields)

    @functools.cached_property
    def _key(self) -> Hashable | None:
        """The call as something hashable; None where an argument has no value to compare."""
        arguments = inspect.BoundArguments(self._given.signature, self._given.arguments.copy())
        arguments.apply_defaults()
        try:
            key = self._factory, tuple(map(_frozen, arguments.arguments.values()))
            hash(key)
        except (TypeError, ValueError, RuntimeError):
            return None
        return key

    def __eq__(self, other: object) -> bool:
        if self is other or not isinstance(other, _Value) or self._key is None:
            return self is other
        return bool(self._key == other._key)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return object.__hash__(self) if self._key is None else hash(self._key)

    def __repr__(self) -> str:
        words, by_name = [], False
        for name, parameter in self._given.signature.parameters.items():
            by_name |= name not in self._given.arguments or parameter.kind is parameter.KEYWORD_ONLY
            if name in self._given.arguments:
                words.append(f"{name}=" * by_name + _printed(self._given.arguments[name]))
        return f"{self._factory.__name__}({', '.join(words)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(self._factory, *self._given.args, **self._given.kwargs), ()

    def __copy__(self) -> "_Value":
        return self

    def __deepcopy__(self, memo: object) -> "_Value":
        return self


def owned(x: T) -> T:
    """An argument as it is now: arrays of NumPy and containers may be changed in place later."""

    def copied(y: Any) -> Any:
        return y.copy() if isinstance(y, np.ndarray) else y

    try:
        copies: T = jax.tree.map(copied, x, is_leaf=_is_value)
    except ValueError:  # keys that JAX cannot sort
        return x
    return copies


def _is_value(x: Any) -> bool:
    return isinstance(x, _Value)


def _frozen(x: Any) -> Hashable:
    leaves, treedef = jax.tree.flatten(x, is_leaf=_is_value)
    return treedef, tuple(map(_frozen_leaf, leaves))


def _frozen_leaf(x: Any) -> Hashable:
    if isinstance(x, (jax.Array, np.ndarray, np.generic)):
        array = np.asarray(x)  # A TypeError for a traced one.
        return array.dtype.name, array.shape, array.tobytes()
    if dataclasses.is_dataclass(x):
        return type(x), *(_frozen(getattr(x, field.name)) for field in dataclasses.fields(x))
    hashable: Hashable = x
    return hashable


def _printed(x: Any) -> str:
    return x.__name__ if inspect.isfunction(x) or inspect.isclass(x) else repr(x)
