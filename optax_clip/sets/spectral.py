"""The spectral ball: matrices with bounded singular values."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optax_clip import _validate
from optax_clip._numerics import (
    accumulator,
    as_dtype,
    as_if,
    cond,
    power_of_two,
    scale,
    shorten,
    varying_axes,
    widen,
)
from optax_clip._trees import Layout, is_inexact, place_along, place_like, shape_of
from optax_clip.sets.constraint import Constraint, Memory, Setting, largest, margins, settings, spread

__all__ = ["spectral_ball"]


def spectral_ball(
    radius: Setting = 1.0,
    *,
    power_iterations: int | None = None,
    flatten: bool = False,
    axis_name: tuple[()] | None = None,
) -> Constraint:
    r"""Each matrix with singular values of at most the radius: a bounded Lipschitz constant.

    .. math:: P(W) = U \min(\Sigma, r) V^\top \quad \text{for } W = U \Sigma V^\top

    by eigendecompositions of the smaller Gram matrix: for an m x n matrix, m >= n, about ``m n^2``
    products for the Gram matrix, as many for the result, and some ``10 n^3`` between. That is the
    nearest point. The cheap form with ``power_iterations=k`` scales the whole matrix, for ``2 k m n``
    products:

    .. math:: W \min(1, r / \sigma), \quad \sigma \approx \|W\|_2

    with σ from k power iterations that go on, each step, from the vector of the last.

    Args:
        radius: the largest singular value r >= 0: a number, a 0-d array, or a tree of these that is a
            prefix of the weights.
        power_iterations: None for the nearest point; k >= 1 for the cheap form. Static.
        flatten: take a leaf as one matrix of ``(all but the last axis, last axis)``, the usual one of a
            convolution kernel ``(height, width, in, out)``. Static.
        axis_name: ``()`` where each device holds whole matrices inside `jax.shard_map`, such as its own
            experts; a matrix that is split there cannot be projected.

    Returns:
        A set for `project_weights`, `project` and `violation`. As in `jax.numpy.linalg` the last two
        axes are the matrix and those before them a batch: stacked layers, experts. A convolution kernel
        is then bounded tap by tap, or as a whole with ``flatten=True``; neither is the norm of the
        convolution itself. Leaves of rank below 2 are left as they are, and so are matrices with an inf
        or NaN entry. From near the ball the nearest point lands within 4 eps of the radius, the eps of
        the leaf's dtype; 16-bit weights from far outside are there after the second step. Float32
        tells the nearest point to 1e-4 of the radius up to some 100 times outside.
        The cheap form finds σ from below, so weights approach the ball over some steps rather than
        land in it; from `project`, which remembers no vector, it takes 30 iterations more. Derivatives
        take the singular vectors as constants.

    Raises:
        ValueError: for a negative or NaN radius, ``power_iterations < 1``, a tree that is not a prefix.
        TypeError: for an argument of another type.

    Examples:
        >>> import jax.numpy as jnp
        >>> from optax_clip import project, spectral_ball
        >>> print(jnp.round(project(jnp.array([[3.0, 0.0], [0.0, 0.5]]), spectral_ball(1.0)), 4))
        [[1.  0. ]
         [0.  0.5]]

    References:
        Yoshida, Miyato, 2017, https://arxiv.org/abs/1705.10941; Miyato, Kataoka, Koyama, Yoshida, 2018,
        https://arxiv.org/abs/1802.05957
    """
    settings(functools.partial(_validate.at_least, 0), radius=radius)
    if not isinstance(flatten, bool):
        raise TypeError(f"Expected flatten to be True or False, got flatten={flatten!r}.")
    if axis_name not in (None, ()):
        raise ValueError(f"Expected axis_name to be None or (), got axis_name={axis_name!r}.")

    def matrices(params: optax.Params) -> tuple[Layout, list[Array], list[Array | None]]:
        layout = Layout.of(params, "leaf")
        radii = [jnp.maximum(as_dtype(r, jnp.float32), 0) for r in spread(layout, radius=radius)]
        return layout, radii, [_matrix(x, flatten, axis_name) for x in layout.measured]

    def nearest(params: optax.Params) -> optax.Params:
        layout, radii, found = matrices(params)
        return _rebuilt(
            layout, [None if x is None else _cap(x, r) for x, r in zip(found, radii, strict=True)]
        )

    def excess(params: optax.Params) -> Array:
        _, radii, found = matrices(params)
        return largest(
            [
                jnp.maximum(_spectrum(widen(x, accumulator([x])))[0] - r.astype(accumulator([x])), 0)
                for x, r in zip(found, radii, strict=True)
                if x is not None
            ]
        )

    if power_iterations is None:
        return Constraint(nearest, excess)
    _validate.static(power_iterations=power_iterations)
    _validate.integer(1, power_iterations=power_iterations)

    def init(params: optax.Params) -> tuple[Any, ...]:
        return tuple(_first_vector(x, flatten) for x in Layout.of(params, "leaf").leaves)

    def step(params: optax.Params, vectors: Any, more: int = 0) -> tuple[optax.Params, tuple[Any, ...]]:
        layout, radii, found = matrices(params)
        kept, scaled = list(vectors), list(found)
        for i, (place, x, r) in enumerate(zip(layout.places, found, radii, strict=True)):
            if x is not None:
                count = power_iterations + more
                scaled[i], kept[place] = _scaled(x, r, vectors[place], count)
        return _rebuilt(layout, scaled), tuple(kept)

    return Constraint(
        lambda params: step(params, init(params), 30)[0], excess, shrinks=True, memory=Memory(init, step)
    )


def _first_vector(leaf: Any, flatten: bool) -> Any:
    """A row for each matrix, any but one that it maps to 0; () for a leaf that is no matrix."""
    shape = shape_of(leaf)
    if not is_inexact(leaf) or len(shape) < 2 or 0 in shape:
        return ()
    reduced = tuple(range(0 if flatten else len(shape) - 2, len(shape) - 1))
    wave = jnp.cos(jnp.arange(shape[-1], dtype=jnp.float32))
    dtype = jnp.complex64 if jnp.issubdtype(leaf.dtype, jnp.complexfloating) else jnp.float32
    kept = [1 if i in reduced else n for i, n in enumerate(shape)]
    row = jnp.broadcast_to(wave, kept).astype(dtype)
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, NamedSharding) and _is_explicit(sharding):
        return place_like(row, leaf)
    return place_along(row, leaf, reduced)


def _matrix_shape(leaf: Any, flatten: bool) -> tuple[int, ...] | None:
    shape = shape_of(leaf)
    if len(shape) < 2:
        return None
    return (math.prod(shape[:-1]), shape[-1]) if flatten else shape


def _matrix(x: Array, flatten: bool, axis_name: tuple[()] | None) -> Array | None:
    """A leaf as a matrix or a batch of them; None if it is none. Whole on each device of the mesh."""
    shape = _matrix_shape(x, flatten)
    if shape is None or x.size == 0:
        return None
    names = varying_axes(x)
    if names and axis_name is None:
        raise ValueError(
            f"Expected whole matrices in a spectral_ball, got a leaf of shape {x.shape} that varies "
            f"over the mesh axes {names}. Give axis_name=() if each device holds whole matrices, else "
            "project outside of shard_map."
        )
    if _is_explicit(jax.typeof(x).sharding):
        x = jax.sharding.reshard(x, jax.typeof(x).sharding.update(spec=PartitionSpec()))
    return x.reshape(shape)


def _rebuilt(layout: Layout, matrices: list[Array | None]) -> optax.Params:
    leaves = []
    for x, y in zip(layout.measured, matrices, strict=True):
        if y is not None:
            y = y.reshape(x.shape)
            if _is_explicit(jax.typeof(x).sharding):
                y = jax.sharding.reshard(y, jax.typeof(x).sharding)
        leaves.append(x if y is None else y)
    tree: optax.Params = layout.rebuild(leaves)
    return tree


def _is_explicit(sharding: NamedSharding) -> bool:
    return AxisType.Explicit in sharding.mesh.axis_types
