"""Rules that remember a window of values and sort or average it on each step."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from optax_clip import _validate
from optax_clip._numerics import power_of_two
from optax_clip._records import increment
from optax_clip._values import value_object
from optax_clip.thresholds.engine import ThresholdRule
from optax_clip.thresholds.memory import count, counts, number, push, usable

__all__ = ["window_quantile", "window_zscore"]

Memory = dict[str, Array]


@value_object
def window_quantile(q: ArrayLike, *, window: int | None = None, warmup: ArrayLike = 0) -> ThresholdRule:
    r"""A limit at a quantile of the last norms, the present one included.

    .. math:: C_t = Q_q(n_{t-k+1}, \dots, n_t), \quad k = \min(t, \text{window})

    with linear interpolation, as `numpy.quantile`.

    Args:
        q: the quantile, from 0 to 1.
        window: how many norms to remember; None for 1000. Static.
        warmup: for how many norms, at first, there is no limit.

    Returns:
        A `ThresholdRule` that keeps ``window`` numbers a scope and sorts them each step; for
        many scopes `running_quantile` is the cheap one. It follows a lasting change of level within
        ``window`` steps. Norms that are not finite, or 0, are not taken in: a unit whose gradient is
        mostly 0 would have the limit 0.

    Raises:
        ValueError: for q outside [0, 1], ``window < 1``, a traced window, a negative warm-up.
        TypeError: for an argument of another type.

    Examples:
        >>> import jax.numpy as jnp
        >>> from optax_clip import window_quantile
        >>> rule = window_quantile(0.5, window=3)
        >>> state = rule.init(jnp.zeros(()))
        >>> for norm in (1.0, 2.0, 9.0, 4.0):
        ...     limit, state = rule.update(jnp.array(norm), state, None, jnp.array(norm))
        ...     print(limit)
        1.0
        1.5
        2.0
        4.0

    References:
        Seetharaman, Wichern, Pardo, Le Roux, 2020, https://arxiv.org/abs/2007.14469
    """
    _validate.between(0, 1, q=q)
    size = 1000 if window is None else window
    _validate.static(window=size)
    _validate.integer(1, window=size)
    _validate.integer(0, warmup=warmup)
    # A product of the coarse part with a count below 4096 is exact in float32.
    exact: Any = q if isinstance(q, jax.Array) else np.asarray(q).item()
    coarse = round(exact * 4096, 0) / 4096
    fine = exact - coarse

    def init(norms: Array) -> Memory:
        return {"seen": counts(norms), "values": jnp.zeros((size, *norms.shape), norms.dtype)}

    def update(norms: Array, state: Memory, *_: Any) -> tuple[Array, Memory]:
        known = usable(norms)
        seen = increment(state["seen"], known)
        values = push(state["values"], norms, known)
        newest = jnp.clip(seen, 1, size) - 1
        # The position newest * q, its fraction apart from the whole part, so that it keeps its bits.
        steps = newest.astype(norms.dtype)
        whole = jnp.floor(steps * number(coarse, norms))
        rest = steps * number(coarse, norms) - whole + steps * number(fine, norms)
        below = jnp.clip(whole + jnp.floor(rest), 0).astype(jnp.int32)
        share = rest - jnp.floor(rest)
        ordered = jnp.sort(jnp.where(values > 0, values, jnp.inf), axis=0)
        low, high = (
            jnp.take_along_axis(ordered, jnp.minimum(i, newest)[None], axis=0)[0]
            for i in (below, below + 1)
        )
        limits = jnp.where(share > 0, jnp.minimum(low + (high - low) * share, high), low)
        return jnp.where(seen <= count(warmup), jnp.inf, limits), {"seen": seen, "values": values}

    return ThresholdRule(init, update)


@value_object
def window_zscore(z: ArrayLike, *, window: int = 128) -> ThresholdRule:
    r"""A limit by mean and standard deviation of the last values, for losses as well as norms.

    .. math:: C_t = \mu + z \sigma, \quad
        \mu = \frac{1}{k} \sum_{i=1}^{k} x_{t-i}, \quad
        \sigma^2 = \frac{1}{k - 1} \sum_{i=1}^{k} (x_{t-i} - \mu)^2, \quad
        k = \min(t - 1, \text{window})

    with Bessel's correction, over the values before the present one. There is no limit before
    max(2, window // 2) of them.

    Args:
        z: how many deviations >= 0 a value may lie above the mean.
        window: how many values >= 2 to remember. Static.

    Returns:
        A `ThresholdRule` that keeps ``window`` numbers a scope. It remembers true values, whatever was
        clipped or skipped, so it follows a lasting change of level within ``window`` steps. Negative
        values and zeros count; what is not finite is not taken in. A constant is never above its limit.
        OLMo-core, Levanter and MaxText skip by this rule with z = 6: OLMo-core what lies below
        :math:`\mu - z \sigma` too, and one value earlier; Levanter with the population's deviation.

    Raises:
        ValueError: for a negative z, ``window < 2`` or a traced window.
        TypeError: for an argument of another type.

    Examples:
        >>> import jax.numpy as jnp
        >>> from optax_clip import window_zscore
        >>> rule = window_zscore(2.0, window=4)
        >>> state = rule.init(jnp.zeros(()))
        >>> for loss in (-1.0, 0.0, 1.0, jnp.nan, 8.0, 2.0):
        ...     limit, state = rule.update(jnp.array(loss), state, None, jnp.array(loss))
        ...     print(f"{limit:.3f}")
        inf
        inf
        0.914
        2.000
        2.000
        10.165

        The mean of -1, 0 and 1 is 0 and their deviation 1, so the limit is 2, before 8 is in.

    References:
        OLMo Team, 2025, 2 OLMo 2 Furious, https://arxiv.org/abs/2501.00656
    """
    _validate.limit(z=z)
    _validate.static(window=window)
    _validate.integer(2, window=window)

    def init(norms: Array) -> Memory:
        return {"seen": counts(norms), "values": jnp.zeros((window, *norms.shape), norms.dtype)}

    def update(norms: Array, state: Memory, *_: Any) -> tuple[Array, Memory]:
        seen, values = state["seen"], state["values"]
        known = jnp.isfinite(norms)
        held = jnp.minimum(seen, window)
        mean, std = _mean_and_std(values, held)
        limits = mean + jnp.maximum(number(z, norms), 0) * std
        limits = jnp.where(held < max(2, window // 2), jnp.inf, limits)
        return limits, {"seen": increment(seen, known), "values": push(values, norms, known)}

    return ThresholdRule(init, update)


def _mean_and_std(values: Array, held: Array) -> tuple[Array, Array]:
    """Of the last ``held`` values, with Bessel's correction; exact where they are all the same."""
    size = values.shape[0]
    slots = lax.broadcasted_iota(jnp.int32, values.shape, 0)
    inside = slots >= size - held[None]
    # By a power of two, which rounds nothing, so that squares stay in range.
    unit = power_of_two(jnp.max(jnp.abs(values), axis=0))
    newest = values[-1] / unit
    offsets = jnp.where(inside, values / unit[None] - newest[None], 0)
    mean = jnp.sum(offsets, axis=0) / jnp.maximum(held, 1).astype(values.dtype)
    squares = jnp.where(inside, (offsets - mean[None]) ** 2, 0)
    variance = jnp.sum(squares, axis=0) / jnp.maximum(held - 1, 1).astype(values.dtype)
    return unit * (newest + mean), unit * jnp.sqrt(variance)
