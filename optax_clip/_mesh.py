"""Many devices: mapped axes, all-reduces, and where state lives."""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from optax_clip._validate import AxisName, axis_names, is_traced

T = TypeVar("T")
Axes = tuple[Hashable, ...]


def varying_axes(x: Any) -> Axes:
    """The manual mesh axes over which ``x`` differs between devices inside `jax.shard_map`."""
    aval = jax.typeof(x)
    manual = getattr(aval, "mat", None)
    names = getattr(aval, "vma", frozenset()) if manual is None else manual.varying
    return tuple(sorted(names, key=str))


def axis_size(names: Axes) -> int:
    """How many devices, or mapped copies, share some mapped axes."""
    count: int = lax.psum(1, names) if names else 1
    return count


def reduction_axes(axis_name: AxisName, x: Any = 0.0) -> Axes:
    """The mapped axes to reduce ``x`` over: those given, and those that its type names."""
    given = axis_names(axis_name)
    try:
        axis_size(given)
    except NameError:
        raise NameError(
            "Expected axis_name to name axes that shard_map, vmap or pmap maps here, got "
            f"axis_name={axis_name!r}."
        ) from None
    return (*given, *(a for a in varying_axes(x) if a not in given))


def all_reduce(
    values: Sequence[Array], axes: Sequence[Axes], collective: Callable[..., Any]
) -> list[Array]:
    """Reduce each value over its own mapped axes, one collective for all that share them."""
    out = list(values)
    for names in dict.fromkeys(axes):
        if names:
            same = [i for i, other in enumerate(axes) if other == names]
            for i, value in zip(same, collective([out[i] for i in same], names), strict=True):
                out[i] = value
    return out


def pooled(axes: Sequence[Axes], *columns: Sequence[Array]) -> list[Array]:
    """Of each column of one value a leaf the sum, on all devices that hold a part."""
    values = [x.astype(jnp.float32) for column in columns for x in column]
    parts = iter(all_reduce(values, list(axes) * len(columns), lax.psum))
    each = ([next(parts) for _ in column] for column in columns)
    return [functools.reduce(jnp.add, column, jnp.float32(0)) for column in each]


def entries(axes: Sequence[Axes], sizes: Sequence[int]) -> float:
    """How many entries leaves have, wherever they are; at least 1."""
    each = zip(sizes, axes, strict=True)
    return max(float(sum(n * axis_size(names) for n, names in each)), 1.0)


def share(axes: Sequence[Axes], counts: Sequence[Array], sizes: Sequence[int]) -> Array:
    """What was counted in each leaf as a share of all entries."""
    found: Array = pooled(axes, counts)[0] / entries(axes, sizes)
    return found


def all_devices_agree(flag: Array) -> Array:
    """Is it true on all devices? A branch that sums over devices has to be taken by all or by none."""
    (broken,) = all_reduce([(~flag).astype(jnp.int32)], [varying_axes(flag)], lax.psum)
    return broken == 0


def inside_shard_map() -> bool:
    """Is an array here the part of one device?"""
    return AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types


def spans_devices(leaves: Sequence[Any]) -> bool:
    """Where a leaf may be in parts on several devices, norms are not joined: that would move them.

    The mesh in force tells, or that of a leaf's type, wherever the program is compiled. Beside Explicit
    and manual axes unlike types cannot be joined, even those of a single device.
    """
    types = [jax.typeof(x).sharding.mesh for x in leaves if isinstance(x, Array)]
    meshes = [mesh for mesh in [jax.sharding.get_abstract_mesh(), *types] if not mesh.empty]
    if not meshes:
        return jax.device_count() > 1
    return any(mesh.size > 1 or set(mesh.axis_types) != {AxisType.Auto} for mesh in meshes)


def is_explicit(x: Any) -> bool:
    """Is ``x`` on a mesh whose axes are part of its type?"""
    sharding = jax.typeof(x).sharding
    return AxisType.Explicit in sharding.mesh.axis_types


def replicated(x: Array) -> Array:
    """``x`` whole on each device where the mesh is explicit; XLA places it elsewhere."""
    if not is_explicit(x):
        return x
    whole: Array = jax.sharding.reshard(x, jax.typeof(x).sharding.update(spec=PartitionSpec()))
    return whole


def everywhere(x: Array) -> Array:
    """``x`` whole on each device of a mesh, as `place_like` puts it at first."""
    mesh = jax.typeof(x).sharding.mesh
    if set(mesh.axis_types) != {AxisType.Auto}:
        return x if AxisType.Manual in mesh.axis_types else replicated(x)
    whole: Array = lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec()))
    return whole


def placed_like(x: Array, other: Array) -> Array:
    """``x`` where another array of its shape is, on an explicit mesh; one number for all is anywhere."""
    ours, theirs = (jax.typeof(each).sharding for each in (x, other))
    there = ours == theirs or x.shape != other.shape
    meet = is_explicit(x) and is_explicit(other)  # what no mesh holds yet goes where it is needed
    return jax.sharding.reshard(x, theirs) if meet and not there else x


def together(xs: Sequence[Array], ys: Sequence[Array]) -> tuple[list[Array], list[Array]]:
    """Both where JAX adds them up: on an explicit mesh a whole array goes to where the other is."""
    pairs = [_together(x, y) for x, y in zip(xs, ys, strict=True)]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _together(x: Array, y: Array) -> tuple[Array, Array]:
    ours, theirs = (jax.typeof(each).sharding for each in (x, y))
    if ours == theirs or not (is_explicit(x) and is_explicit(y)):
        return x, y
    kinds = [jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=each) for each in (ours, theirs)]
    sharding = jax.eval_shape(lax.add, *kinds).sharding
    return jax.sharding.reshard(x, sharding), jax.sharding.reshard(y, sharding)


def place_like(state: T, params: Any) -> T:
    """Replicate ``state`` over the mesh of ``params``, where `update` returns it: else it recompiles."""
    if any(is_traced(leaf) for leaf in jax.tree.leaves((state, params))):
        return state
    for leaf in jax.tree.leaves(params):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and not isinstance(sharding.mesh, AbstractMesh):
            sharding = NamedSharding(sharding.mesh, PartitionSpec())
        elif not getattr(leaf, "committed", False):
            continue
        placed: T = jax.device_put(state, sharding)
        return placed
    return state
