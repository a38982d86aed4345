"""Rules of little memory: pure pairs over an array of norms of any shape, one statistic an entry."""

import math
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from optax_clip import _validate
from optax_clip._records import increment
from optax_clip._values import value_object
from optax_clip.thresholds.engine import ThresholdRule
from optax_clip.thresholds.memory import count, counts, number, select, usable

__all__ = ["ema_ratio", "relative_to_params", "running_quantile", "zscore"]

Memory = dict[str, Array]


@value_object
def relative_to_params(ratio: ArrayLike, *, eps: ArrayLike = 1e-3) -> ThresholdRule:
    r"""A limit relative to the norm of the weights in the same scope: no update outgrows its weights.

    .. math:: C_s = \lambda \max(\|w_s\|, \epsilon)

    Args:
        ratio: the factor λ >= 0.
        eps: the norm ε >= 0 that weights are taken to have at least, so that weights of 0 can move.

    Returns:
        A `ThresholdRule` without memory. The update of its transform needs ``params``. NaN weights give
        a NaN limit.

    Raises:
        ValueError: for a negative or NaN argument, and in the update without ``params``.
        TypeError: for an argument that is not a number.

    Examples:
        >>> import jax.numpy as jnp
        >>> from optax_clip import clip_by_norm, relative_to_params
        >>> tx = clip_by_norm(relative_to_params(0.5), scope="global")
        >>> params = jnp.array([0.6, 0.8])
        >>> updates, _ = tx.update(jnp.array([3.0, 4.0]), tx.init(params), params)
        >>> print(updates)
        [0.3 0.4]

    References:
        Brock, De, Smith, Simonyan, 2021, https://arxiv.org/abs/2102.06171
    """
    _validate.limit(ratio=ratio)
    _validate.at_least(0, eps=eps)

    def update(
        norms: Array, state: Memory, param_norms: Array | None, total: Array
    ) -> tuple[Array, Memory]:
        _validate.params_given(
            param_norms, of="a transform by relative_to_params, such as adaptive_grad_clip"
        )
        known: Any = param_norms
        least = jnp.maximum(known, number(eps, known))
        return (number(ratio, known) * least).astype(norms.dtype), state

    return ThresholdRule(lambda norms: {}, update)


@value_object
def running_quantile(
    q: ArrayLike, *, rate: ArrayLike = 0.01, warmup: ArrayLike = 10, rearm: ArrayLike = 50
) -> ThresholdRule:
    r"""A limit that tracks a quantile of the norms with one number of memory a scope.

    A norm above the limit raises it, one below lowers it, in the proportion that balances at the
    quantile:

    .. math:: C_{t+1} = C_t \exp\big(\eta\, (q - 1[n_t \le C_t])\big)

    It starts at the geometric mean of the first norms. This is not differentially private: Andrew et al.
    add noise to the counts, which this does not.

    Args:
        q: the quantile, from 0 to 1.
        rate: the step η >= 0 of the logarithm of the limit.
        warmup: how many norms, at first, are not limited and make the start; at least 1 is.
        rearm: after max(rearm, ln 1e-6 / ln(1 - q)) clipped steps in a row, which chance alone hardly
            gives, the level has changed, and the limit is set to the present norm.

    Returns:
        A `ThresholdRule`. Norms that are not finite, or 0, are not taken in.

    Raises:
        ValueError: for q outside [0, 1], a negative rate or warm-up, ``rearm < 1``.
        TypeError: for an argument of another type.

    Examples:
        >>> import jax.numpy as jnp
        >>> from optax_clip import running_quantile
        >>> rule = running_quantile(0.5, rate=0.1, warmup=2)
        >>> state = rule.init(jnp.zeros(()))
        >>> for norm in (1.0, 4.0, 3.0, 3.0, 1.0):
        ...     limit, state = rule.update(jnp.array(norm), state, None, jnp.array(norm))
        ...     print(f"{limit:.4f}")
        inf
        inf
        2.0000
        2.1025
        2.2103

    References:
        Andrew, Thakkar, McMahan, Ramaswamy, 2021, https://arxiv.org/abs/1905.03871
    """
    _validate.between(0, 1, q=q)
    _validate.at_least(0, rate=rate)
    _validate.integer(0, warmup=warmup)
    _validate.integer(1, rearm=rearm)

    def init(norms: Array) -> Memory:
        return {"seen": counts(norms), "level": jnp.zeros_like(norms), "streak": counts(norms)}

    def update(norms: Array, state: Memory, *_: Any) -> tuple[Array, Memory]:
        known = usable(norms)
        seen = increment(state["seen"], known)
        warming = state["seen"] < jnp.maximum(count(warmup), 1)
        level = jnp.where(state["seen"] > 0, state["level"], jnp.where(known, norms, 1))
        limits = jnp.where(warming, jnp.inf, level)
        over = known & (norms > limits)
        streak = jnp.where(over, increment(state["streak"]), 0)
        lost = over & (streak.astype(norms.dtype) >= _patience(q, rearm, norms))
        to_mean = (jnp.log(jnp.where(known, norms, 1)) - jnp.log(level)) / _at_least_one(seen, norms)
        balance = number(rate, norms) * (number(q, norms) - (~over).astype(norms.dtype))
        moved = _positive(level * jnp.exp(jnp.where(warming, to_mean, balance)))
        new = {"level": jnp.where(lost, norms, moved), "streak": jnp.where(lost, 0, streak)}
        return limits, select(known, {"seen": seen, **new}, state)

    return ThresholdRule(init, update)


def _patience(q: ArrayLike, rearm: ArrayLike, norms: Array) -> Array:
    """After so many steps over a quantile in a row it is lost: by chance that is one time in a million.

    ln 1e-6 / ln(1 - q): inf at q = 0, where every step may be clipped, and 0 at q = 1.
    """
    return jnp.maximum(number(rearm, norms), math.log(1e-6) / jnp.log1p(-number(q, norms)))


def _positive(x: Array) -> Array:
    """Kept normal and finite, as what is multiplied from step to step."""
    info = jnp.finfo(x.dtype)
    return jnp.clip(x, info.smallest_normal, info.max)


@value_object
def zscore(
    z: ArrayLike,
    *,
    decay: ArrayLike = 0.97,
    warmup: ArrayLike = 25,
    max_norm: ArrayLike | None = None,
    rearm: ArrayLike = 50,
) -> ThresholdRule:
    r"""A limit on spikes: norms that stand out from their running mean by z standard deviations.

    .. math::
        z_t = \frac{n_t - \mu}{\sigma + 10^{-6}}, \quad
        C_t = \mu + \frac{z^2}{z_t} \sigma \;\text{ where } z_t > z

    so the further a norm stands out, the closer to the mean it is cut. Where it does not, the limit is
    the largest norm that would pass, :math:`\mu + z (\sigma + 10^{-6})`. Then, with x the norm after
    clipping, :math:`\mu \leftarrow a \mu + (1 - a) x` and
    :math:`\sigma^2 \leftarrow a \sigma^2 + (1 - a)(x - \mu)^2`.

    Args:
        z: the score >= 0 above which a norm is a spike.
        decay: the decay a of mean and variance, in [0, 1).
        warmup: how many norms, at first, are not limited and give mean and population variance; at least
            1 is.
        max_norm: a cap >= 0 on the limit, also in warm-up. It does not enter the statistics.
        rearm: after so many spikes in a row the level has changed, and the statistics take true norms
            until one is not a spike.

    Returns:
        A `ThresholdRule`. Norms that are not finite, or 0, are not taken in.

    Raises:
        ValueError: for a negative z, warm-up or max_norm, a decay outside [0, 1), ``rearm < 1``.
        TypeError: for an argument of another type.

    Examples:
        >>> import jax.numpy as jnp
        >>> from optax_clip import zscore
        >>> rule = zscore(2.0, warmup=2)
        >>> state = rule.init(jnp.zeros(()))
        >>> for norm in (1.0, 3.0, 10.0):
        ...     limit, state = rule.update(jnp.array(norm), state, None, jnp.array(norm))
        ...     print(f"{limit:.3f}")
        inf
        inf
        2.500

        The mean of 1 and 3 is 2 and their deviation 1, so 10 has the score 8: 2 + 2² / 8 = 2.5.

    References:
        Kumar, Owen, Roy Chowdhury, Güra, 2025, https://arxiv.org/abs/2504.02507
    """
    _validate.limit(z=z)
    _validate.in_unit_interval(decay=decay)
    _validate.integer(0, warmup=warmup)
    _validate.integer(1, rearm=rearm)
    if max_norm is not None:
        _validate.at_least(0, max_norm=max_norm)
    cap: ArrayLike = jnp.inf if max_norm is None else max_norm

    def update(norms: Array, state: Memory, *_: Any) -> tuple[Array, Memory]:
        known, warming = usable(norms), state["seen"] < jnp.maximum(count(warmup), 1)
        limits, spike = _deviations(norms, state, number(z, norms), known & ~warming)
        limits = jnp.where(warming, jnp.inf, limits)
        x = jnp.where(spike & (state["streak"] < count(rearm)), limits, norms)
        seen = increment(state["seen"], known)
        weight = jnp.where(warming, 1 / _at_least_one(seen, norms), 1 - number(decay, norms))
        new = {
            "seen": seen,
            **_moments(state, x, weight, warming),
            "streak": jnp.where(spike, increment(state["streak"]), 0),
        }
        return jnp.minimum(limits, jnp.maximum(number(cap, norms), 0)), select(known, new, state)

    return ThresholdRule(_no_moments, update)


def _no_moments(norms: Array) -> Memory:
    # Two arrays, not one twice: a state may be donated.
    mean, std = jnp.zeros_like(norms), jnp.zeros_like(norms)
    return {"seen": counts(norms), "mean": mean, "std": std, "streak": counts(norms)}


def _deviations(norms: Array, state: Memory, z: Array, judged: Array) -> tuple[Array, Array]:
    """The limit, lower for what is a spike, and which norms are."""
    mean, std = state["mean"], state["std"] + 1e-6
    highest = mean + z * std
    spike = judged & (norms > highest)
    cut = mean + z**2 * (std / jnp.where(spike, norms - mean, 1)) * state["std"]
    return jnp.where(spike, cut, highest), spike


def _moments(state: Memory, x: Array, weight: Array, warming: Array) -> Memory:
    """Mean and deviation with one norm more: Welford's update in warm-up, the running one after it."""
    gap = x - state["mean"]
    share = jnp.where(warming, jnp.sqrt(1 - weight), 1 - weight) * jnp.sqrt(weight)
    std = _hypot(jnp.sqrt(1 - weight) * state["std"], share * gap)
    return {"mean": state["mean"] + weight * gap, "std": std}


@value_object
def ema_ratio(
    ratio: ArrayLike,
    *,
    decay: ArrayLike = 0.98,
    warmup: ArrayLike = 100,
    max_norm: ArrayLike = 1.0,
    rearm: ArrayLike | None = None,
) -> ThresholdRule:
    r"""A limit at a multiple of the running mean of the clipped norms.

    .. math:: C_t = \lambda \gamma_{t-1}, \quad \gamma_t = b \gamma_{t-1} + (1 - b) \min(n_t, C_t)

    While ``t < warmup``, t counted from 1, the whole tree is clipped to ``max_norm`` instead, and γ is
    the smallest clipped norm so far.

    Args:
        ratio: the factor λ >= 0.
        decay: the decay b of γ, in [0, 1).
        warmup: the step from which on the limit is λγ.
        max_norm: the limit >= 0 on the norm of the whole tree in warm-up.
        rearm: after so many clipped steps in a row γ is set to the true norm. None for never, as in the
            paper, where γ grows by the factor 1 + (1 - b)(λ - 1) a step at most.

    Returns:
        A `ThresholdRule`. A norm that is not finite is not taken in, nor is one of 0, which would make γ
        and every later limit 0. A scope that has seen only zeros is limited as in warm-up until its
        first norm.

    Raises:
        ValueError: for a negative ratio, warm-up or max_norm, a decay outside [0, 1), ``rearm < 1``.
        TypeError: for an argument of another type.

    Examples:
        >>> import jax.numpy as jnp
        >>> from optax_clip import ema_ratio
        >>> rule = ema_ratio(1.5, decay=0.5, warmup=2, max_norm=2.0)
        >>> state = rule.init(jnp.zeros(()))
        >>> for norm in (4.0, 9.0, 2.0):
        ...     limit, state = rule.update(jnp.array(norm), state, None, jnp.array(norm))
        ...     print(limit, state["gamma"])
        2.0 2.0
        3.0 2.5
        3.75 2.25

    References:
        Wang, Liu, Xu, Chen, Zhu, Hong, Xu, Zhang, Shi, Ma, Wu, 2025, https://arxiv.org/abs/2502.11034
    """
    _validate.limit(ratio=ratio, max_norm=max_norm)
    _validate.in_unit_interval(decay=decay)
    _validate.integer(0, warmup=warmup)
    if rearm is not None:
        _validate.integer(1, rearm=rearm)

    def init(norms: Array) -> Memory:
        streak = {} if rearm is None else {"streak": counts(norms)}
        return {"seen": counts(norms), "gamma": jnp.zeros_like(norms), **streak}

    def update(
        norms: Array, state: Memory, param_norms: Array | None, total: Array
    ) -> tuple[Array, Memory]:
        seen, gamma = increment(state["seen"], jnp.isfinite(norms)), state["gamma"]
        warming = (seen < count(warmup)) | (gamma == 0)
        common = _global_limits(norms, total, max_norm)
        limits = jnp.where(warming, common, number(ratio, norms) * gamma)
        x = jnp.minimum(norms, limits)
        new = {"gamma": _running(gamma, x, number(decay, norms), warming)}
        if rearm is not None:
            new = _rearmed(norms, ~warming & (norms > limits), new["gamma"], state["streak"], rearm)
        old = {key: state[key] for key in new}
        return limits, {"seen": seen, **select(usable(norms) & (x > 0), new, old)}

    return ThresholdRule(init, update)


def _running(gamma: Array, x: Array, decay: Array, warming: Array) -> Array:
    """The running mean with one norm more; in warm-up the lowest norm."""
    lowest = jnp.where(gamma > 0, jnp.minimum(gamma, x), x)
    return jnp.where(warming, lowest, decay * gamma + (1 - decay) * x)


def _rearmed(norms: Array, over: Array, gamma: Array, streak: Array, rearm: ArrayLike) -> Memory:
    """After so many norms over the limit in a row the mean starts anew."""
    streak = jnp.where(over, increment(streak), 0)
    lost = streak >= count(rearm)
    return {"gamma": jnp.where(lost, norms, gamma), "streak": jnp.where(lost, 0, streak)}


def _global_limits(norms: Array, total: Array, max_norm: ArrayLike) -> Array:
    """The norm of each entry once the whole tree is clipped to ``max_norm``; inf if it is not."""
    top = jnp.finfo(norms.dtype).max  # stands for norms beyond the dtype
    whole = jnp.broadcast_to(jnp.minimum(total, top), norms.shape)
    over = (norms > 0) & (whole > number(max_norm, norms))
    # The share of the whole first: max_norm / whole may be too small for a float32.
    common = jnp.maximum(number(max_norm, norms), 0) * (
        jnp.minimum(norms, top) / jnp.where(over, whole, 1)
    )
    return jnp.where(over, common, jnp.inf)


def _at_least_one(seen: Array, norms: Array) -> Array:
    return jnp.maximum(seen, 1).astype(norms.dtype)


def _hypot(x: Array, y: Array) -> Array:
    """The root of the sum of squares, which may themselves be out of range."""
    peak = jnp.maximum(jnp.abs(x), jnp.abs(y))
    unit = jnp.where(peak > 0, peak, 1)
    return peak * jnp.sqrt((x / unit) ** 2 + (y / unit) ** 2)
