"""The polar factor, and the sign of a Hermitian matrix, by products or by LAPACK."""

import jax.numpy as jnp
from jax import Array, lax

from optax_clip._geometry.matrices.split import Split, adjoint, largest_entry, over_matrix, real, tall
from optax_clip._numerics import power_of_two, scale

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
STEPS = {
    32: [_GROWING] * 4 + [*_ENDING],  # l = 1e-6
    64: [_GROWING] * 20 + [*_ENDING, _ENDING[-1]],  # l = 2e-15
}


def msign(x: Array) -> Array:
    r"""The polar factor of each matrix by products alone; of a Hermitian matrix that is its sign.

    .. math:: \mathrm{msign}(W) = U V^H \quad \text{for } W = U \Sigma V^H

    in 12 steps of three products in float32, 29 in float64. Singular values below 1e-6 (2e-15) of the
    largest one come out between 0 and 1, zeros as 0.

    Args:
        x: (..., m, n), float32, float64, complex64 or complex128, finite.
    """
    y, back = tall(x)
    split = Split.of(y)
    y = split.by_rows(scale(y, over_matrix(1 / power_of_two(largest_entry(y)))))
    bound = bound_of(split, y)
    return back(_msign(split, y / over_matrix(jnp.where(bound > 0, bound, 1)).astype(y.dtype)))


def _msign(split: Split, x: Array) -> Array:
    """`msign` of a tall matrix of norm at most 1."""

    def step(x: Array, abc: Array) -> tuple[Array, None]:
        a, b, c = abc.astype(x.dtype)
        square = split.inner(x, x)
        return a * x + split.product(x, b * square + c * split.inner(square, square)), None

    polynomials = jnp.asarray(STEPS[jnp.finfo(x.dtype).bits], real(x))
    result: Array = lax.scan(step, split.by_rows(2 * x), polynomials)[0]
    return result


def bound_of(split: Split, x: Array) -> Array:
    """At least the largest singular value, at most ``n^(1/32)`` times that: ``|(x^H x)^8|_F^(1/16)``."""
    power, units = split.inner(x, x), []
    for _ in range(3):
        units.append(power_of_two(largest_entry(power)))
        power = scale(power, over_matrix(1 / units[-1]))
        power = split.inner(power, power)
    norm = jnp.sqrt(jnp.sum(jnp.abs(power) ** 2, axis=(-2, -1)))
    for unit in reversed(units):
        norm = jnp.sqrt(norm) * unit
    return jnp.sqrt(norm) * 1.001


def _eigenvalue_signs(split: Split, x: Array) -> Array:
    """The sign of a Hermitian matrix, by LAPACK's decomposition of the whole."""
    values, vectors = jnp.linalg.eigh(split.put(x), symmetrize_input=False)
    signed = vectors * jnp.sign(values)[..., None, :].astype(x.dtype)
    return split.by_rows(jnp.matmul(signed, adjoint(vectors), precision=lax.Precision.HIGHEST))


SIGNS = {"polar": _msign, "eigh": _eigenvalue_signs}
