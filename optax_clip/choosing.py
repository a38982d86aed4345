"""Choose a limit: what each candidate would have clipped of the norms that a run recorded."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from optax_clip import _validate

__all__ = ["ThresholdTable", "threshold_table"]

PERCENTILES = (5, 10, 25, 50, 75, 90, 95, 99, 100)


class ThresholdTable(NamedTuple):
    """What candidate limits would have clipped; `threshold_table` makes it, and ``print`` lays it out.

    Args:
        limits: the candidates, of shape ``(k,)``, as the other arrays; all are float64.
        clipped: the share of steps whose norm was above the limit.
        factor: the mean of limit / norm over those steps, 1 where there are none.
        strongest: the smallest such factor, that of the largest norm.
        steps: how many finite norms there were.
        steps_nonfinite: how many were inf or NaN, and are left out.

    Examples:
        >>> from optax_clip import ThresholdTable, threshold_table
        >>> table = threshold_table([1.0, 2.0, 3.0, 4.0], limits=[2.0])
        >>> isinstance(table, ThresholdTable)
        True
        >>> print(table.clipped)
        [0.5]
    """

    limits: NDArray[np.float64]
    clipped: NDArray[np.float64]
    factor: NDArray[np.float64]
    strongest: NDArray[np.float64]
    steps: int
    steps_nonfinite: int

    def __str__(self) -> str:
        rows = [("limit", "clipped", "factor", "strongest")]
        columns = (self.limits, self.clipped, self.factor, self.strongest)
        for limit, clipped, factor, strongest in zip(*columns, strict=True):
            rows.append((f"{limit:.4g}", f"{clipped:.1%}", f"{factor:.3f}", f"{strongest:.3f}"))
        lines = ["  ".join(f"{cell:>9}" for cell in row) for row in rows]
        return "\n".join([*lines, f"{self.steps} steps, and {self.steps_nonfinite} with inf or NaN"])


def threshold_table(norms: ArrayLike, limits: ArrayLike | None = None) -> ThresholdTable:
    r"""Tell what each candidate limit would have clipped of recorded norms, and by how much.

    For the norms of a run at a rate that goes well, recorded with ``clip_by_global_norm(jnp.inf)`` as
    ``clip/norm_before``. A clipped run would have had other norms, so the table is a first estimate.

    .. math:: p(c) = \frac{1}{n} \sum_t [g_t > c], \quad
        f(c) = \operatorname{mean}_{t: g_t > c} \frac{c}{g_t}, \quad s(c) = \min_t \min(1, c / g_t)

    Args:
        norms: one norm a step, of any shape and real dtype, also a list of 0-d arrays; concrete.
        limits: the candidates, numbers >= 0; None for percentiles 5, 10, 25, 50, 75, 90, 95, 99 and
            100 of the finite norms.

    Returns:
        A `ThresholdTable` of float64 NumPy arrays, limits in ascending order, each once. Norms that
        are inf or NaN are dropped and counted. A limit of inf clips nothing; a limit of 0 every
        norm that is not 0, by the factor 0.

    Raises:
        ValueError: for norms of which none is finite, a negative norm, or a limit that is negative
            or NaN.

    Examples:
        >>> from optax_clip import threshold_table
        >>> print(threshold_table([1.0, 1.0, 2.0, 4.0, float("nan")], limits=[1.0, 2.0, 4.0]))
            limit    clipped     factor  strongest
                1      50.0%      0.375      0.250
                2      25.0%      0.500      0.500
                4       0.0%      1.000      1.000
        4 steps, and 1 with inf or NaN

        Of the norms 2 and 4 a limit of 1 leaves a half and a quarter, 0.375 in the mean.
        To draw it: ``plt.semilogx(table.limits, table.clipped)``.
    """
    given = np.asarray(norms).astype(np.float64).ravel()
    seen = given[np.isfinite(given)]
    if not seen.size:
        raise ValueError(f"Expected norms of which at least one is finite, got none among {given.size}.")
    _validate.at_least(0, None, norms=seen)
    cuts = np.percentile(seen, PERCENTILES) if limits is None else np.asarray(limits).astype(np.float64)
    _validate.at_least(0, None, limits=cuts)
    cuts = np.unique(cuts)
    factors = [cut / seen[seen > cut] for cut in cuts]  # of the steps that are clipped
    return ThresholdTable(
        limits=cuts,
        clipped=np.array([f.size / seen.size for f in factors]),
        factor=np.array([f.mean() if f.size else 1.0 for f in factors]),
        strongest=np.array([f.min(initial=1.0) for f in factors]),
        steps=seen.size,
        steps_nonfinite=given.size - seen.size,
    )
