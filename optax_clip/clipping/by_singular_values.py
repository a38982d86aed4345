"""Clip the singular values of matrices."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from optax_clip import _validate, _xla
from optax_clip._geometry import matrices
from optax_clip._geometry.matrices import Method
from optax_clip._mesh import varying_axes
from optax_clip._records import Report, clip_report, fraction, transform
from optax_clip._trees import Scopes
from optax_clip.norms import all_finite, measure
from optax_clip.thresholds.engine import Limits, Seen, ThresholdRule

__all__ = ["clip_singular_values"]


def clip_singular_values(
    threshold: ArrayLike | Callable[[Array], ArrayLike],
    *,
    method: Method | None = None,
    nonfinite: str = "propagate",
    name: str = "clip",
    record: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Clip the singular values of each matrix: no direction of an update is longer than the limit.

    Large directions are shortened, small ones kept, where a clip by norm shrinks all alike. At a limit
    below all singular values it is the step of Muon, times the limit.

    .. math:: G \leftarrow U \min(\Sigma, c) V^H \quad \text{for } G = U \Sigma V^H

    Args:
        threshold: the limit c >= 0 on the singular values: a number, a 0-d array, or a schedule
            ``step -> number``.
        method: ``"polar"``, matrix products alone; ``"eigh"``, LAPACK's eigenvalues of the Gram matrix;
            None for the faster one on the platform. Static.
        nonfinite: ``"propagate"`` or ``"zero"``, as in `clip_by_norm`, on the whole tree.
        name: prefix of the metrics.
        record: False to record nothing; the state is then `optax.EmptyState` unless the threshold is a
            schedule.

    Returns:
        A transform for leaves of rank 2 and more: the last two axes are the matrix, those before them a
        batch. Leaves of rank below 2 pass through, but for the non-finite policy. Matrices whose
        singular values are at most c come back bit for bit; a limit of 0 gives zeros, inf only measures.
        In float32 each entry is within 1e-5 of the limit up to 30 times outside. In the metrics the
        norms are the 2-norms of the whole tree, ``threshold`` is the limit and ``fraction`` the share of
        matrices that were changed. Derivatives take the singular vectors as constants.

    Raises:
        ValueError: for a negative or NaN limit, an unknown method or policy, and in the update inside
            `jax.shard_map` for a matrix that varies over devices.
        TypeError: for a limit that is neither a number nor a schedule.

    Examples:
        >>> import jax.numpy as jnp
        >>> from optax_clip import clip_singular_values
        >>> tx = clip_singular_values(1.0)
        >>> matrix = jnp.array([[3.0, 0.0], [0.0, 0.5]])
        >>> updates, _ = tx.update(matrix, tx.init(matrix))
        >>> print(jnp.round(updates, 4))
        [[1.  0. ]
         [0.  0.5]]

    References:
        Yoshida, Miyato, 2017, https://arxiv.org/abs/1705.10941; the polynomials of ``"polar"``: Amsel,
        Persson, Musco, Gower, 2025, https://arxiv.org/abs/2505.16932
    """
    if isinstance(threshold, ThresholdRule):
        raise TypeError(f"Expected threshold to be a number or a schedule, got threshold={threshold!r}.")
    limits = Limits.of(None, threshold=threshold)
    _validate.method(method)
    _validate.one_of(("propagate", "zero"), nonfinite=nonfinite)
    _validate.record(record)
    capping = _Capping(limits, method, nonfinite)
    return transform(
        name, ("norms", "counts"), lambda params: limits.init(params, "global"), capping.step,
        record=record, remembers=limits.remembers,
    )  # fmt: skip


class _Capping(NamedTuple):
    """What `clip_singular_values` was called with. Static."""

    limits: Limits
    method: Method | None
    nonfinite: str

    def step(self, updates: optax.Updates, memory: Any, params: Any, **extra: Any) -> Any:
        del params, extra
        scopes, xs = Scopes.of(updates, "global")
        _require_whole(scopes, xs)
        xs = _xla.materialized(xs)
        norms = measure(scopes, xs, None)
        finite = all_finite(norms)
        seen = Seen(scopes, norms, norms[0].value, [finite], None, None)
        (limit,), memory = self.limits.update(seen, memory)
        # Not one number for both cases: where it is made outside of jit it would trip `jax.debug_nans`.
        zeroed = ~finite & (self.nonfinite == "zero")
        broken = ~finite | jnp.isnan(limit)
        capped = [self.capped(x, limit) for x in xs]
        new = [jnp.where(zeroed, 0, jnp.where(broken, jnp.nan, x)) for x in capped]

        def report() -> Report:
            (after,) = measure(scopes, new, None)
            share = jnp.where(finite, fraction(_changed(xs, new)), 0)
            return clip_report(norms[0].value, after.value, limit, share, finite)

        return scopes.rebuild(updates, new), memory, report

    def capped(self, x: Array, limit: Array) -> Array:
        if not _is_matrix(x):
            return x
        capped: Array = matrices.cap_singular_values(x, limit, method=self.method)
        return capped


def _changed(xs: Sequence[Array], new: Sequence[Array]) -> list[Array]:
    """Which matrices were changed, of each leaf that has any."""
    pairs = zip(xs, new, strict=True)
    return [jnp.any(x != y, axis=(-2, -1)) for x, y in pairs if _is_matrix(x)]


def _is_matrix(x: Array) -> bool:
    return x.ndim >= 2 and x.size > 0


def _require_whole(scopes: Scopes, xs: Sequence[Array]) -> None:
    for i, x in zip(scopes.places, xs, strict=True):
        if _is_matrix(x) and varying_axes(x):
            raise ValueError(
                f"Expected whole matrices in clip_singular_values, got leaf {scopes.paths[i]!r} of "
                f"shape {x.shape}, which varies over the mesh axes {varying_axes(x)}. Clip outside of "
                "shard_map."
            )
