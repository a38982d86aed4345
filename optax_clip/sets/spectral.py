"""The spectral ball: matrices with bounded singular values."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optax_clip import _matrices, _validate
from optax_clip._matrices import Method
from optax_clip._numerics import accumulator, as_dtype, varying_axes
from optax_clip._trees import Layout, is_inexact, place_along, place_like, shape_of
from optax_clip.sets.constraint import Constraint, Memory, Setting, largest, margins, settings, spread

__all__ = ["spectral_ball"]


def spectral_ball(
    radius: Setting = 1.0,
    *,
    method: Method | None = None,
    power_iterations: int | None = None,
    flatten: bool = False,
    axis_name: tuple[()] | None = None,
) -> Constraint:
    r"""Each matrix with singular values of at most the radius: a bounded Lipschitz constant.

    The nearest point, with ``method``, or with ``power_iterations=k`` a cheap approach to the ball:

    .. math:: P(W) = U \min(\Sigma, r) V^H \quad \text{for } W = U \Sigma V^H, \qquad
        W \min(1, r / \sigma), \quad \sigma \approx \|W\|_2

    The nearest point takes two products with the matrix, some 20 with the smaller Gram matrix, and the
    sign of a Hermitian matrix of that size, which the methods find differently: ``"polar"`` by 36 more
    products (87 in float64), ``"eigh"`` by LAPACK's eigendecomposition. From more than 2.5 times out it
    takes two passes, and one more for each further factor of 8.

    Power iterations cost 2 k products of the matrix with a vector. They go on, each step, from the
    vector of the last, and find σ from below: weights approach the ball over some steps and do not land.

    Args:
        radius: the largest singular value r >= 0: a number, a 0-d array, or a tree of these that is a
            prefix of the weights.
        method: ``"polar"`` or ``"eigh"``; None for the faster one, ``"eigh"`` on CPU for matrices whose
            smaller side is above 64, else ``"polar"``. Static.
        power_iterations: None for the nearest point; k >= 1 to approach the ball. Static.
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
        the leaf's dtype; 16-bit weights from far outside are there after the second step. In float32
        each entry of the nearest point is within 1e-5 of the radius up to 30 times outside.
        Power iterations from `project`, which remembers no vector, are 30 more. Derivatives take the
        singular vectors as constants. On a mesh ``"polar"`` splits every product over the devices and
        gathers no matrix, where the axes divide both sides; ``"eigh"`` decomposes the Gram matrix on
        each device. On CPU ``"eigh"`` is up to 100 times slower while other processes use the cores,
        because LAPACK's threads wait for each other: set ``OPENBLAS_NUM_THREADS=1`` then.

    Raises:
        ValueError: for a negative or NaN radius, another method, a method together with
            ``power_iterations``, ``power_iterations < 1``, a tree that is not a prefix.
        TypeError: for an argument of another type.

    Examples:
        >>> import jax.numpy as jnp
        >>> from optax_clip import project, spectral_ball
        >>> print(jnp.round(project(jnp.array([[3.0, 0.0], [0.0, 0.5]]), spectral_ball(1.0)), 4))
        [[1.  0. ]
         [0.  0.5]]

    References:
        Yoshida, Miyato, 2017, https://arxiv.org/abs/1705.10941; Miyato, Kataoka, Koyama, Yoshida, 2018,
        https://arxiv.org/abs/1802.05957; the polynomials: Amsel, Persson, Musco, Gower, 2025,
        https://arxiv.org/abs/2505.16932
    """
    settings(functools.partial(_validate.at_least, 0), radius=radius)
    if not isinstance(flatten, bool):
        raise TypeError(f"Expected flatten to be True or False, got flatten={flatten!r}.")
    if axis_name not in (None, ()):
        raise ValueError(f"Expected axis_name to be None or (), got axis_name={axis_name!r}.")

    if method not in (None, "polar", "eigh"):
        raise ValueError(f'Expected method to be None, "polar" or "eigh", got method={method!r}.')
    if method is not None and power_iterations is not None:
        raise ValueError(
            "Expected a method or power_iterations, not both, got "
            f"method={method!r} and power_iterations={power_iterations!r}."
        )

    def matrices(params: optax.Params) -> tuple[Layout, list[Array], list[Array | None]]:
        layout = Layout.of(params, "leaf")
        radii = [jnp.maximum(as_dtype(r, jnp.float32), 0) for r in spread(layout, radius=radius)]
        return layout, radii, [_matrix(x, flatten, axis_name) for x in layout.measured]

    def nearest(params: optax.Params) -> optax.Params:
        layout, radii, found = matrices(params)
        cap = functools.partial(_matrices.cap_singular_values, method=method, landing=True)
        return _rebuilt(
            layout, [None if x is None else cap(x, r) for x, r in zip(found, radii, strict=True)]
        )

    def excess(params: optax.Params) -> Array:
        _, radii, found = matrices(params)
        return largest(
            [
                jnp.maximum(
                    _matrices.largest_singular_value(x, method=method) - r.astype(accumulator([x])), 0
                )
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
                old, dtype = vectors[place], accumulator([x])
                _, inside = margins(x.shape[-2] * x.shape[-1], dtype)
                goal, row = r.astype(dtype) * (1 - inside), old.reshape(*x.shape[:-2], x.shape[-1])
                scaled[i], row = _matrices.power_step(x, goal, row, power_iterations + more)
                kept[place] = row.reshape(old.shape)
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


def _matrix(x: Array, flatten: bool, axis_name: tuple[()] | None) -> Array | None:
    """A leaf as a matrix or a batch of them; None if it is none."""
    if x.ndim < 2 or x.size == 0:
        return None
    names = varying_axes(x)
    if names and axis_name is None:
        raise ValueError(
            f"Expected whole matrices in a spectral_ball, got a leaf of shape {x.shape} that varies "
            f"over the mesh axes {names}. Give axis_name=() if each device holds whole matrices, else "
            "project outside of shard_map."
        )
    if not flatten:
        return x
    shape, sharding = (math.prod(x.shape[:-1]), x.shape[-1]), jax.typeof(x).sharding
    if not _is_explicit(sharding):
        return x.reshape(shape)
    first, last = sharding.spec[0], sharding.spec[-1]
    x = jax.sharding.reshard(x, _first_and_last(x))
    matrix: Array = lax.reshape(x, shape, out_sharding=sharding.update(spec=PartitionSpec(first, last)))
    return matrix


def _rebuilt(layout: Layout, matrices: list[Array | None]) -> optax.Params:
    leaves = []
    for x, y in zip(layout.measured, matrices, strict=True):
        if y is not None and y.shape != x.shape:
            if _is_explicit(jax.typeof(x).sharding):
                y = lax.reshape(y, x.shape, out_sharding=_first_and_last(x))
                y = jax.sharding.reshard(y, jax.typeof(x).sharding)
            else:
                y = y.reshape(x.shape)
        leaves.append(x if y is None else y)
    tree: optax.Params = layout.rebuild(leaves)
    return tree


def _first_and_last(x: Array) -> NamedSharding:
    """The sharding of a leaf that is split along its first and last axis only, to become a matrix."""
    sharding = jax.typeof(x).sharding
    first, last = sharding.spec[0], sharding.spec[-1]
    spec: NamedSharding = sharding.update(spec=PartitionSpec(first, *(None,) * (x.ndim - 2), last))
    return spec


def _is_explicit(sharding: NamedSharding) -> bool:
    return AxisType.Explicit in sharding.mesh.axis_types
