"""The spectral ball: matrices with bounded singular values."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from optax_clip import _settings, _validate
from optax_clip._geometry import matrices
from optax_clip._geometry.matrices import Method
from optax_clip._geometry.radial import norm_error
from optax_clip._mesh import everywhere, is_explicit, place_like, varying_axes
from optax_clip._numerics import accumulator, as_dtype
from optax_clip._settings import Initial, Setting
from optax_clip._trees import Scopes, flatten, is_inexact, shape_of
from optax_clip._values import value_object
from optax_clip.sets.constraint import Constraint, at_start_only, largest

__all__ = ["spectral_ball"]


@value_object
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
        radius: the largest singular value r >= 0: a number, an array that broadcasts to the batch of
            matrices of each leaf, a tree of these that is a prefix of the weights, a formula
            ``(path, leaf) -> number``, or `initial` for a multiple of the largest singular value at
            init.
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
    radius = _settings.limit(radius=radius)
    if not isinstance(flatten, bool):
        raise TypeError(f"Expected flatten to be True or False, got flatten={flatten!r}.")
    if axis_name not in (None, ()):
        raise ValueError(f"Expected axis_name to be None or (), got axis_name={axis_name!r}.")
    _validate.method(method)
    if method is not None and power_iterations is not None:
        raise ValueError(
            "Expected a method or power_iterations, not both, got "
            f"method={method!r} and power_iterations={power_iterations!r}."
        )
    if power_iterations is not None:
        _validate.static(power_iterations=power_iterations)
        _validate.integer(1, power_iterations=power_iterations)
    ball = _Ball(radius, method, power_iterations, flatten, axis_name)
    relative, cheap = isinstance(radius, Initial), power_iterations is not None
    constraint = Constraint(
        ball.nearest, ball.excess, shrinks=cheap, move=ball.move,
        init=ball.init if cheap or relative else None, axis_name=axis_name, scope="leaf",
    )  # fmt: skip
    return at_start_only(constraint, "radius", radius) if relative else constraint


class _Matrices(NamedTuple):
    """The leaves of a tree that are matrices, or batches of them: their places, values and radii."""

    scopes: Scopes
    leaves: list[Array]
    found: list[tuple[int, int, Array, Array]]  # number among the leaves, place, matrix, radius


class _Ball(NamedTuple):
    """What `spectral_ball` was called with."""

    radius: Any
    method: Method | None
    power_iterations: int | None
    flatten: bool
    axis_name: tuple[()] | None

    def matrices(self, params: optax.Params, memory: Any = None) -> _Matrices:
        scopes, xs = Scopes.of(params, "leaf", axis_name=())
        ys = [_matrix(x, self.flatten, self.axis_name) for x in xs]
        if isinstance(self.radius, Initial):
            kappa = as_dtype(self.radius.kappa, jnp.float32)
            radii: list[Any] = [
                _free_if_zero(memory["radius"][i]) * kappa if y is not None else 0
                for i, y in zip(scopes.places, ys, strict=True)
            ]
        else:
            batches = [() if y is None else y.shape[:-2] for y in ys]
            radii = _settings.per_leaf(scopes, xs, batches, radius=self.radius)
        radii = [jnp.maximum(as_dtype(r, jnp.float32), 0) for r in radii]
        each = zip(range(len(xs)), scopes.places, ys, radii, strict=True)
        return _Matrices(scopes, xs, [(i, place, y, r) for i, place, y, r in each if y is not None])

    def init(self, params: optax.Params) -> Any:
        """Largest singular values and vectors, one a leaf; one number for a tree without leaves."""
        _, leaves, _ = flatten(params)
        if not leaves:
            return jnp.zeros(())
        vectors = tuple(_first_vector(x, self.flatten) for x in leaves)
        if not isinstance(self.radius, Initial):
            return vectors
        radius = place_like(tuple(_first_value(x, self.flatten) for x in leaves), params)
        return {"radius": radius} | ({} if self.power_iterations is None else {"vectors": vectors})

    def nearest(self, params: optax.Params) -> optax.Params:
        """From `project`, which remembers no vector, 30 power iterations more."""
        if self.power_iterations is None:
            inside, _ = self.move(params, None, None)
        else:
            inside, _ = self.move(params, self.init(params), None, more=30)
        return inside

    def move(
        self, params: optax.Params, memory: Any, beside: Any, more: int = 0
    ) -> tuple[optax.Params, Any]:
        del beside
        relative = isinstance(self.radius, Initial)
        scopes, leaves, found = self.matrices(params, memory)
        if not leaves:
            return params, memory
        vectors = list(memory["vectors"] if relative and self.power_iterations else memory or ())
        for i, place, x, radius in found:
            if self.power_iterations is None:
                y = matrices.cap_singular_values(x, radius, method=self.method, landing=True)
            else:
                y, vectors[place] = _scaled(x, radius, vectors[place], self.power_iterations + more)
            leaves[i] = _as_leaf(y, leaves[i])
        if self.power_iterations is not None:
            memory = {**memory, "vectors": tuple(vectors)} if relative else tuple(vectors)
        return scopes.rebuild(params, leaves), memory

    def excess(self, params: optax.Params) -> Array:
        gaps = []
        for _, _, x, radius in self.matrices(params).found:
            value = matrices.largest_singular_value(x, method=self.method)
            limit = radius.astype(value.dtype)
            gaps.append(jnp.where(value <= limit, 0, value - limit))
        return largest(gaps)


def _free_if_zero(value: Array) -> Array:
    """A matrix of zeros at the start is left free."""
    return jnp.where(value == 0, jnp.inf, value)


def _scaled(x: Array, radius: Array, vector: Array, iterations: int) -> tuple[Array, Array]:
    """A step of the power iteration, and the vector to go on from."""
    dtype = accumulator([x])
    _, inside = norm_error(x.shape[-2] * x.shape[-1], dtype)
    row = vector.reshape(*x.shape[:-2], x.shape[-1])
    row = jnp.where(jnp.any(row != 0, axis=-1, keepdims=True), row, matrices.wave(row.shape, row.dtype))
    y, row = matrices.power_step(x, radius.astype(dtype) * (1 - inside), row, iterations)
    return y, everywhere(row.reshape(vector.shape))


def _first_value(leaf: Any, flatten: bool) -> Any:
    """Largest singular values of a leaf, NaN where only the shape is known; () if it is no matrix."""
    shape = shape_of(leaf)
    if not is_inexact(leaf) or len(shape) < 2 or 0 in shape:
        return ()
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jnp.full(() if flatten else shape[:-2], jnp.nan, jnp.float32)
    value = matrices.largest_singular_value(_matrix(jnp.asarray(leaf), flatten, ()))
    return value.astype(jnp.float32)


def _first_vector(leaf: Any, flatten: bool) -> Any:
    """A row for each matrix, any but one that it maps to 0; () for a leaf that is no matrix."""
    shape = shape_of(leaf)
    if not is_inexact(leaf) or len(shape) < 2 or 0 in shape:
        return ()
    reduced = tuple(range(0 if flatten else len(shape) - 2, len(shape) - 1))
    dtype = jnp.complex64 if jnp.issubdtype(leaf.dtype, jnp.complexfloating) else jnp.float32
    kept = [1 if i in reduced else n for i, n in enumerate(shape)]
    return place_like(matrices.wave(kept, dtype), leaf)


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
    if not is_explicit(x):
        return x.reshape(shape)
    first, last = sharding.spec[0], sharding.spec[-1]
    x = jax.sharding.reshard(x, _first_and_last(x))
    matrix: Array = lax.reshape(x, shape, out_sharding=sharding.update(spec=PartitionSpec(first, last)))
    return matrix


def _as_leaf(y: Array, x: Array) -> Array:
    """A matrix in the shape, and on the devices, of its leaf."""
    if y.shape == x.shape:
        return y
    if not is_explicit(x):
        return y.reshape(x.shape)
    whole = lax.reshape(y, x.shape, out_sharding=_first_and_last(x))
    placed: Array = jax.sharding.reshard(whole, jax.typeof(x).sharding)
    return placed


def _first_and_last(x: Array) -> NamedSharding:
    """The sharding of a leaf that is split along its first and last axis only, to become a matrix."""
    sharding = jax.typeof(x).sharding
    first, last = sharding.spec[0], sharding.spec[-1]
    spec: NamedSharding = sharding.update(spec=PartitionSpec(first, *(None,) * (x.ndim - 2), last))
    return spec
