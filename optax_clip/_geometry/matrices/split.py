"""Which axes of a mesh split a matrix, products that keep it so, and what the functions share."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optax_clip import _xla
from optax_clip._numerics import power_of_two, scale

Method = Literal["polar", "eigh"]


class Split(NamedTuple):
    """Which axes of a mesh split the batch and the rows of matrices, and products that keep it so."""

    mesh: Any = None
    batch: tuple[tuple[str, ...], ...] = ()
    rows: tuple[str, ...] = ()

    @classmethod
    def of(cls, x: Array) -> "Split":
        """An axis of the mesh splits the batch if it can, else the rows if it divides both sides.

        What splits the batch already stays there.

        On an Explicit mesh that is each axis that splits the matrix, on an Auto one each axis at all, as
        the types do not tell.
        """
        mesh, spec = jax.typeof(x).sharding.mesh, jax.typeof(x).sharding.spec
        kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
        used = {name for part in spec for name in names_of(part)}
        explicit = AxisType.Explicit in kinds.values()
        left = [n for n, kind in kinds.items() if (n in used if explicit else kind == AxisType.Auto)]
        own = [names_of(part) for part in spec[:-2]]
        batch = []
        for at, size in enumerate(x.shape[:-2]):
            others = {name for names in (*own[:at], *own[at + 1 :]) for name in names}
            rest = [name for name in left if name not in own[at] and name not in others]
            batch.append(dividing(mesh, [*own[at], *rest], size))
            left = [name for name in left if name not in batch[-1]]
        rows = dividing(mesh, left, math.gcd(*x.shape[-2:]))
        return cls(mesh, tuple(batch), rows) if rows or any(batch) or (explicit and used) else cls()

    def sharding(self, *matrix: tuple[str, ...]) -> NamedSharding:
        return NamedSharding(
            self.mesh, PartitionSpec(*(axes or None for axes in (*self.batch, *matrix)))
        )

    @property
    def explicit(self) -> bool:
        return self.mesh is not None and AxisType.Explicit in self.mesh.axis_types

    def put(self, x: Array, rows: tuple[str, ...] = (), columns: tuple[str, ...] = ()) -> Array:
        return self._placed(x, rows, columns)

    def _placed(self, x: Array, *matrix: tuple[str, ...]) -> Array:
        if self.mesh is None:
            return x
        place: Any = jax.sharding.reshard if self.explicit else lax.with_sharding_constraint
        placed: Array = place(x, self.sharding(*matrix))
        return placed

    def by_rows(self, x: Array) -> Array:
        return self.put(x, self.rows)

    def over_batch(self, x: Array, like: Array) -> Array:
        """A number for each matrix, where the matrices are."""
        return self._placed(jnp.broadcast_to(x, like.shape[:-2]))

    def inner(self, a: Array, b: Array) -> Array:
        """``a^H b``, a sum over rows."""
        return self._sum("...ki,...kj->...ij", jnp.conj(self.by_rows(a)), self.by_rows(b))

    def product(self, a: Array, b: Array) -> Array:
        """``a b``, a sum over the columns of a."""
        return self._sum("...ik,...kj->...ij", self.put(a, (), self.rows), self.by_rows(b))

    def _sum(self, axes: str, a: Array, b: Array) -> Array:
        place: dict[str, Any] = {"out_sharding": self.sharding(self.rows, ())} if self.explicit else {}
        return self.by_rows(jnp.einsum(axes, a, b, precision=lax.Precision.HIGHEST, **place))


def names_of(part: Any) -> tuple[str, ...]:
    """The axes of a mesh that split a dimension, as a `PartitionSpec` has them."""
    return () if part is None else (part,) if isinstance(part, str) else tuple(part)


def dividing(mesh: Any, names: Sequence[str], size: int) -> tuple[str, ...]:
    """The axes that split a dimension of that size evenly, the first ones first."""
    taken: list[str] = []
    for name in names:
        if size % mesh.shape[name] == 0:
            taken, size = [*taken, name], size // mesh.shape[name]
    return tuple(taken)


def adjoint(x: Array) -> Array:
    return jnp.conj(jnp.matrix_transpose(x))


def over_matrix(x: Array) -> Array:
    """A number for each matrix, as one that broadcasts against it."""
    return x[..., None, None]


def identity(x: Array) -> Array:
    n = x.shape[-1]
    return jnp.eye(n, dtype=x.dtype).reshape(*(1,) * (x.ndim - 2), n, n)


def tall(x: Array) -> tuple[Array, Callable[[Array], Array]]:
    """The matrix or its adjoint, whichever has no fewer rows than columns, and the way back."""
    wide = x.shape[-2] < x.shape[-1]
    return (adjoint(x), adjoint) if wide else (x, lambda y: y)


def largest_entry(x: Array) -> Array:
    return jnp.max(jnp.abs(x), axis=(-2, -1))


def real(x: Array) -> Any:
    return jnp.finfo(x.dtype).dtype


def column(split: Split, x: Array, lengths: Array) -> Array:
    """The column of a Hermitian matrix where a length is largest, normalized."""
    places = lax.broadcasted_iota(jnp.int32, lengths.shape, lengths.ndim - 1)
    chosen = places == jnp.argmax(lengths, axis=-1, keepdims=True).astype(jnp.int32)
    return normalized(split.inner(x, split.by_rows(chosen[..., None].astype(x.dtype))))


def wave(shape: Sequence[int], dtype: Any) -> Array:
    """Rows with a part of each direction, to start from."""
    return jnp.broadcast_to(jnp.cos(jnp.arange(shape[-1], dtype=jnp.float32)), shape).astype(dtype)


def normalized(vector: Array) -> Array:
    unit = power_of_two(largest_entry(vector))
    vector = scale(vector, over_matrix(1 / unit))
    length = jnp.sqrt(jnp.sum(jnp.abs(vector) ** 2, axis=(-2, -1)))
    return scale(vector, over_matrix(1 / jnp.where(length > 0, length, 1)))


# --- Which method


def default_method(platform: str, side: int) -> Method:
    """The faster one of the methods: on CPU LAPACK's for a smaller side above 64, else products."""
    return "eigh" if platform == "cpu" and side > 64 else "polar"


def by_platform(compute: Callable[..., Any], method: Method | None, x: Array, *others: Array) -> Any:
    methods = {p: method or default_method(p, min(x.shape[-2:])) for p in ("cpu", "default")}
    if methods["cpu"] == methods["default"]:
        return compute(x, *others, method=methods["default"])
    ways = {p: functools.partial(compute, method=way) for p, way in methods.items()}
    return _xla.by_platform(x, *others, **ways)
