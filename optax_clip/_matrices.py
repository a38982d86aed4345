"""Matrix functions: the polar factor, capped singular values, the largest one, a power iteration.

The last two axes are the matrix, those before them a batch; real or complex. All is computed in float32,
or float64 for float64 leaves. On a mesh the rows are split over the devices, and each product sums over
what is split: no device holds or is sent a whole matrix.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optax_clip._numerics import (
    accumulator,
    power_of_two,
    round_toward_zero,
    scale,
    straight_through,
    widen,
)

__all__ = ["cap_singular_values", "default_method", "largest_singular_value", "msign", "power_step"]

Method = Literal["polar", "eigh"]

# Odd polynomials a x + b x^3 + c x^5 whose composition is nearest to the sign on [-1, -l] and [l, 1], by
# Remez' exchange for each step in turn (Polar Express, arXiv 2505.16932). The first one is for the many
# steps where l is still small; all but the last leave 0.5% of room for rounding, and none maps a value
# above 0.024 of the range nearer to 0 than a tenth of it.
_GROWING = (4.140039, -2.917559, 0.529469)
_ENDING = (
    (4.136225, -2.916584, 0.529603),
    (4.124307, -2.913547, 0.530028),
    (4.075924, -2.901375, 0.531848),
    (3.890965, -2.857537, 0.540421),
    (3.180945, -2.363521, 0.488278),
    (2.198755, -1.565818, 0.402014),
    (1.878784, -1.249618, 0.370910),
    (1.875, -1.25, 0.375),
)
_STEPS = {
    32: [_GROWING] * 4 + [*_ENDING],  # l = 1e-6
    64: [_GROWING] * 20 + [*_ENDING, _ENDING[-1]],  # l = 2e-15
}

_NEAR = 2.5  # from so many times the goal one pass tells singular values near the goal to some eps
_STOP, _FAR = 2.0, 8.0  # what a pass before that caps at: times the goal, or the bound over this


class _Split(NamedTuple):
    """Which axes of a mesh split the batch and the rows of matrices, and products that keep it so."""

    mesh: Any = None
    batch: tuple[tuple[str, ...], ...] = ()
    rows: tuple[str, ...] = ()

    @classmethod
    def of(cls, x: Array) -> "_Split":
        """An axis of the mesh splits the batch if it can, else the rows if it divides both sides.

        On an Explicit mesh that is each axis that splits the matrix, on an Auto one each axis at all, as
        the types do not tell.
        """
        mesh, spec = jax.typeof(x).sharding.mesh, jax.typeof(x).sharding.spec
        kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
        used = {name for part in spec if part for name in ((part,) if isinstance(part, str) else part)}
        explicit = AxisType.Explicit in kinds.values()
        left = [n for n, kind in kinds.items() if (n in used if explicit else kind == AxisType.Auto)]
        batch = []
        for size in x.shape[:-2]:
            batch.append(_dividing(mesh, left, size))
            left = [name for name in left if name not in batch[-1]]
        rows = _dividing(mesh, left, math.gcd(*x.shape[-2:]))
        return cls(mesh, tuple(batch), rows) if rows or any(batch) or explicit and used else cls()

    def sharding(self, *matrix: tuple[str, ...]) -> NamedSharding:
        return NamedSharding(
            self.mesh, PartitionSpec(*(axes or None for axes in (*self.batch, *matrix)))
        )

    @property
    def explicit(self) -> bool:
        return self.mesh is not None and AxisType.Explicit in self.mesh.axis_types

    def put(self, x: Array, rows: tuple[str, ...] = (), columns: tuple[str, ...] = ()) -> Array:
        if self.mesh is None:
            return x
        place = jax.sharding.reshard if self.explicit else lax.with_sharding_constraint
        placed: Array = place(x, self.sharding(rows, columns))
        return placed

    def by_rows(self, x: Array) -> Array:
        return self.put(x, self.rows)

    def inner(self, a: Array, b: Array) -> Array:
        """``a^H b``, a sum over rows."""
        return self._sum("...ki,...kj->...ij", jnp.conj(self.by_rows(a)), self.by_rows(b))

    def product(self, a: Array, b: Array) -> Array:
        """``a b``, a sum over the columns of a."""
        return self._sum("...ik,...kj->...ij", self.put(a, (), self.rows), self.by_rows(b))

    def _sum(self, axes: str, a: Array, b: Array) -> Array:
        place = {"out_sharding": self.sharding(self.rows, ())} if self.explicit else {}
        return self.by_rows(jnp.einsum(axes, a, b, precision=lax.Precision.HIGHEST, **place))


def _dividing(mesh: Any, names: Sequence[str], size: int) -> tuple[str, ...]:
    """The axes that split a dimension of that size evenly, the first ones first."""
    taken: list[str] = []
    for name in names:
        if size % mesh.shape[name] == 0:
            taken, size = [*taken, name], size // mesh.shape[name]
    return tuple(taken)


def _adjoint(x: Array) -> Array:
    return jnp.conj(jnp.matrix_transpose(x))


def _over_matrix(x: Array) -> Array:
    """A number for each matrix, as one that broadcasts against it."""
    return x[..., None, None]


def _identity(x: Array) -> Array:
    n = x.shape[-1]
    return jnp.eye(n, dtype=x.dtype).reshape(*(1,) * (x.ndim - 2), n, n)


def _tall(x: Array) -> tuple[Array, Callable[[Array], Array]]:
    """The matrix or its adjoint, whichever has no fewer rows than columns, and the way back."""
    wide = x.shape[-2] < x.shape[-1]
    return (_adjoint(x), _adjoint) if wide else (x, lambda y: y)


def _largest_entry(x: Array) -> Array:
    return jnp.max(jnp.abs(x), axis=(-2, -1))


def _real(x: Array) -> Any:
    return jnp.finfo(x.dtype).dtype


# --- The polar factor ----------------------------------------------------------------------------------


def msign(x: Array) -> Array:
    r"""The polar factor of each matrix by products alone; of a Hermitian matrix that is its sign.

    .. math:: \mathrm{msign}(W) = U V^H \quad \text{for } W = U \Sigma V^H

    in 12 steps of three products in float32, 29 in float64. Singular values below 1e-6 (2e-15) of the largest one come out between 0 and 1, zeros as 0.

    Args:
        x: (..., m, n), float32, float64, complex64 or complex128, finite.
    """
    y, back = _tall(x)
    split = _Split.of(y)
    y = split.by_rows(scale(y, _over_matrix(1 / power_of_two(_largest_entry(y)))))
    bound = _bound(split, y)
    return back(_msign(split, y / _over_matrix(jnp.where(bound > 0, bound, 1)).astype(y.dtype)))


def _msign(split: _Split, x: Array) -> Array:
    """`msign` of a tall matrix of norm at most 1."""

    def step(x: Array, abc: Array) -> tuple[Array, None]:
        a, b, c = abc.astype(x.dtype)
        square = split.inner(x, x)
        return a * x + split.product(x, b * square + c * split.inner(square, square)), None

    polynomials = jnp.asarray(_STEPS[jnp.finfo(x.dtype).bits], _real(x))
    result: Array = lax.scan(step, split.by_rows(2 * x), polynomials)[0]
    return result


def _bound(split: _Split, x: Array) -> Array:
    """At least the largest singular value, at most ``n^(1/32)`` times that: ``|(x^H x)^8|_F^(1/16)``."""
    power, units = split.inner(x, x), []
    for _ in range(3):
        units.append(power_of_two(_largest_entry(power)))
        power = scale(power, _over_matrix(1 / units[-1]))
        power = split.inner(power, power)
    norm = jnp.sqrt(jnp.sum(jnp.abs(power) ** 2, axis=(-2, -1)))
    for unit in reversed(units):
        norm = jnp.sqrt(norm) * unit
    return jnp.sqrt(norm) * 1.001


def _eigenvalue_signs(split: _Split, x: Array) -> Array:
    """The sign of a Hermitian matrix, by LAPACK's decomposition of the whole."""
    values, vectors = jnp.linalg.eigh(split.put(x), symmetrize_input=False)
    signed = vectors * jnp.sign(values)[..., None, :].astype(x.dtype)
    return split.by_rows(jnp.matmul(signed, _adjoint(vectors), precision=lax.Precision.HIGHEST))


_SIGNS = {"polar": _msign, "eigh": _eigenvalue_signs}


# --- Capped singular values ----------------------------------------------------------------------------


def default_method(platform: str, side: int) -> Method:
    """The faster one of the methods: on CPU LAPACK's for a smaller side above 64, else products."""
    return "eigh" if platform == "cpu" and side > 64 else "polar"


def _by_platform(compute: Callable[..., Any], method: Method | None, x: Array, *others: Array) -> Any:
    methods = {p: method or default_method(p, min(x.shape[-2:])) for p in ("cpu", "default")}
    if methods["cpu"] == methods["default"]:
        return compute(x, *others, method=methods["default"])
    ways = {p: functools.partial(compute, method=way) for p, way in methods.items()}
    return lax.platform_dependent(x, *others, **ways)


@functools.partial(jax.jit, static_argnames=("method", "landing"))
def cap_singular_values(
    x: Array, limit: Array, *, method: Method | None = None, landing: bool = False
) -> Array:
    r"""Each matrix with its singular values capped, :math:`U \min(\Sigma, c) V^H`.

    With :math:`X = W^H W - c^2 I` the part outside is :math:`E = X (I + \mathrm{msign}(X)) / 2 c^2`, and
    the result :math:`W (I + E)^{-1/2} = W + W D`. Where all singular values are at most c the matrix
    comes back bit for bit, and so does one with an inf or NaN entry.

    Args:
        x: (..., m, n), any inexact dtype.
        limit: c >= 0, a number or (...).
        method: how the sign is found: ``"polar"``, products alone; ``"eigh"``, LAPACK's eigenvalues;
            None for the faster one on the platform. Static.
        landing: aim so far inside that the result, and a weight that an update takes there, end within
            the limit after rounding. Static.
    """
    dtype = accumulator([x])
    limit = jnp.broadcast_to(jnp.maximum(limit.astype(dtype), 0), x.shape[:-2])
    return _by_platform(functools.partial(_capped, landing=landing), method, x, limit)


def _capped(x: Array, limit: Array, *, method: Method, landing: bool) -> Array:
    y, back = _tall(widen(x, accumulator([x])))
    split = _Split.of(y)
    y = split.by_rows(y)
    finite = jnp.all(jnp.isfinite(y), axis=(-2, -1))
    y = jnp.where(_over_matrix(finite), y, 0)
    peak = lax.stop_gradient(_largest_entry(y))
    aim = _aim(limit, peak, x.dtype) if landing else limit
    new, reaches = _cap(split, y, aim, peak, method)
    move = _over_matrix(finite & (reaches > limit))
    capped = _placed_like(split.by_rows(back(new)), x)
    return jnp.where(move, capped.astype(x.dtype), x)


def _aim(limit: Array, peak: Array, dtype: Any) -> Array:
    """Where to cap so as to land inside after rounding."""
    eps, own = float(jnp.finfo(dtype).eps), float(jnp.finfo(limit.dtype).eps)
    # Far outside the rounding of the update outgrows the ball; half of it is enough to aim inside.
    return jnp.maximum(limit * (1 - 2 * eps - 2 * own) - peak * (eps / 4), limit / 2)


class _Pass(NamedTuple):
    """A matrix on its way into the ball: ``value * unit == start @ (I + change)``."""

    value: Array
    goal: Array
    bound: Array  # on the largest singular value of value
    unit: Array
    change: Array
    outside: Array  # the projector on what lay outside in the last pass
    beyond: Array  # of which that was the positive part
    ends: Array


def _cap(split: _Split, y: Array, limit: Array, peak: Array, method: Method) -> tuple[Array, Array]:
    """Singular values capped, and what the largest one reaches at least where it is above the limit."""
    start, unit = lax.stop_gradient(y), power_of_two(peak)
    ratio, most = lax.stop_gradient(limit) / unit, 2 * math.sqrt(math.prod(y.shape[-2:]))
    goal = jnp.clip(ratio, 2.0**-100, most)
    value = scale(start, _over_matrix(1 / unit))
    bound, none = _bound(split, value), jnp.zeros_like(split.inner(value, value))
    first = _Pass(value, goal, bound, unit, none, none, none, jnp.any(bound < 0))
    last = lax.while_loop(lambda now: ~now.ends, functools.partial(_nearer, split, method), first)
    reached = _largest_outside(split, scale(start, _over_matrix(1 / unit)), last) * unit
    new = scale(last.value, _over_matrix(last.unit), _over_matrix(jnp.minimum(ratio / goal, 1)))
    # Derivatives take the singular vectors as constants: linear in the matrix, and in the limit.
    linear = y + split.product(y, last.change)
    safe = jnp.where(limit > 0, limit, 1)
    growth = _over_matrix(safe / lax.stop_gradient(safe) - 1)
    edge = split.product(new, last.outside)
    return straight_through(new, linear + edge * growth.astype(edge.dtype)), reached


def _nearer(split: _Split, method: Method, now: _Pass) -> _Pass:
    """Cap at the goal, or from far outside first at twice the goal, or 1/8 of the bound."""
    far = now.bound > _NEAR * now.goal
    ends = ~jnp.any(far)
    cap = jnp.where(far, jnp.maximum(_STOP * now.goal, now.bound / _FAR), now.goal)
    gram = split.inner(now.value, now.value)
    square = _over_matrix(cap * cap)
    beyond = gram - scale(_identity(gram), square)
    size = 1.01 * jnp.maximum(now.bound**2 - cap**2, cap**2)
    sign = _SIGNS[method](split, scale(beyond, _over_matrix(1 / size)))
    outside = (sign + _identity(sign)) / 2
    part = split.product(beyond, outside)
    excess = scale((part + split.by_rows(_adjoint(part))) / 2, 1 / square)
    change = _inverse_root(split, excess, jnp.maximum(now.bound / cap, 1.01))
    change = jnp.where(_over_matrix(far | ends), change, 0)
    unit = jnp.where(far, power_of_two(cap), 1)
    value = now.value + split.product(now.value, change)
    return _Pass(
        scale(value, _over_matrix(1 / unit)),
        now.goal / unit,
        jnp.where(far, 1.01 * cap, now.bound) / unit,
        now.unit * unit,
        now.change + change + split.product(now.change, change),
        outside,
        beyond,
        ends,
    )


def _inverse_root(split: _Split, excess: Array, top: Array) -> Array:
    """``(I + E)^(-1/2) - I`` for ``0 <= E <= top^2 - 1``, by Newton and Schulz' iteration.

    Each step takes singular values s in [1, top] to ``s (1 - a (s^2 - 1))``, and with this a none below 1.
    """

    def step(carry: tuple[Array, ...]) -> tuple[Array, ...]:
        root, left, top, _ = carry
        a = 1 / (top * (top + 1))
        move = scale(left, _over_matrix(-a))
        twice = 2 * move + split.product(move, move)
        new = root + move + split.product(root, move), left + twice + split.product(left, twice)
        return *new, (2 / 3) * (1 + a) * jnp.sqrt((1 + a) / (3 * a)), top

    # Convergence is quadratic, so it ends after a step from within half the digits.
    enough = 1 + math.sqrt(jnp.finfo(top.dtype).eps) / 2
    start = jnp.zeros_like(excess), excess, top, 2 * top
    root: Array = lax.while_loop(lambda carry: jnp.any(carry[-1] > enough), step, start)[0]
    return root


def _largest_outside(split: _Split, y: Array, last: _Pass) -> Array:
    """How far ``|y v| / |v|`` reaches for v among what lay outside: never above the largest value."""
    part = last.outside
    vector = _column(split, part, jnp.sum(jnp.where(_identity(part) == 1, part.real, 0), axis=-2))

    def step(_: int, vector: Array) -> Array:
        for matrix in (part, last.beyond, part):
            vector = _normalized(split.inner(matrix, vector))
        return vector

    image = split.product(y, lax.fori_loop(0, 4, step, vector))
    return jnp.sqrt(jnp.sum(jnp.abs(image) ** 2, axis=(-2, -1)))


def _column(split: _Split, x: Array, lengths: Array) -> Array:
    """The column of a Hermitian matrix where a length is largest, normalized."""
    places = lax.broadcasted_iota(jnp.int32, lengths.shape, lengths.ndim - 1)
    chosen = places == jnp.argmax(lengths, axis=-1, keepdims=True).astype(jnp.int32)
    return _normalized(split.inner(x, split.by_rows(chosen[..., None].astype(x.dtype))))


def _normalized(vector: Array) -> Array:
    unit = power_of_two(_largest_entry(vector))
    vector = scale(vector, _over_matrix(1 / unit))
    length = jnp.sqrt(jnp.sum(jnp.abs(vector) ** 2, axis=(-2, -1)))
    return scale(vector, _over_matrix(1 / jnp.where(length > 0, length, 1)))


# --- The largest singular value ------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="method")
def largest_singular_value(x: Array, *, method: Method | None = None) -> Array:
    """The largest singular value (...) of each matrix (..., m, n), NaN where an entry is not finite.

    By products it is ``|W v|`` for v from 20 squarings of the Gram matrix, so never above it, but for rounding,
    and at most 2e-6 below; else by LAPACK's eigenvalues.
    """
    return _by_platform(_largest, method, x)


def _largest(x: Array, *, method: Method) -> Array:
    y, _ = _tall(widen(x, accumulator([x])))
    split = _Split.of(y)
    unit = power_of_two(_largest_entry(y))
    y = split.by_rows(scale(y, _over_matrix(1 / unit)))
    gram = split.inner(y, y)
    if method == "eigh":
        values = jnp.linalg.eigvalsh(split.put(gram), symmetrize_input=False)
        return jnp.sqrt(jnp.maximum(jnp.max(values, axis=-1), 0)) * unit

    def square(power: Array, _: None) -> tuple[Array, None]:
        power = split.inner(power, power)
        return scale(power, _over_matrix(1 / power_of_two(_largest_entry(power)))), None

    power = lax.scan(square, gram, None, length=20)[0]
    vector = _column(split, power, jnp.sum(jnp.abs(power) ** 2, axis=-2))
    return jnp.sqrt(jnp.sum(jnp.abs(split.product(y, vector)) ** 2, axis=(-2, -1))) * unit


# --- Power iteration -----------------------------------------------------------------------------------


def power_step(x: Array, goal: Array, vector: Array, iterations: int) -> tuple[Array, Array]:
    """``x min(1, goal / s)`` with s from power iterations, and the vector (..., n) to go on from.

    A matrix with an inf or NaN entry, or that maps the vector to 0, stays as it is, and so does its vector.
    """
    wide = widen(x, accumulator([x]))
    unit = power_of_two(_largest_entry(wide))
    split = _Split.of(wide)
    y = split.by_rows(lax.stop_gradient(scale(wide, _over_matrix(1 / unit))))

    def iterate(vector: Array) -> tuple[Array, Array]:
        left = split.product(y, vector[..., None])
        right = split.inner(y, _normalized(left))
        size = jnp.sqrt(jnp.sum(jnp.abs(right) ** 2, axis=(-2, -1)))
        return _normalized(right)[..., 0], size

    start = split.by_rows(vector[..., None].astype(y.dtype))[..., 0]
    new, sigma = lax.fori_loop(1, iterations, lambda _, carry: iterate(carry[0]), iterate(start))
    over = jnp.isfinite(sigma) & (sigma > goal / unit)
    first, second = jnp.where(over, 1 / unit, 1), jnp.where(over, goal, 1) / jnp.where(over, sigma, 1)
    smaller = round_toward_zero(scale(wide, _over_matrix(first), _over_matrix(second)), x.dtype)
    kept = jnp.where((jnp.isfinite(sigma) & (sigma > 0))[..., None], new, start)
    return jnp.where(_over_matrix(over), smaller, x), _placed_like(kept.astype(vector.dtype), vector)


def _placed_like(x: Array, other: Array) -> Array:
    sharding = jax.typeof(other).sharding
    return jax.sharding.reshard(x, sharding) if AxisType.Explicit in sharding.mesh.axis_types else x
