"""The rules: pure pairs over an array of norms of any shape, one statistic an entry."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from optax_clip import _validate
from optax_clip._numerics import as_dtype
from optax_clip._records import increment
from optax_clip.thresholds.engine import ThresholdRule

__all__ = ["ema_ratio", "relative_to_params", "running_quantile", "window_quantile", "zscore"]


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
    _validate.at_least(0, ratio=ratio, eps=eps)

    def update(norms: Array, state: Any, lengths: Array | None, total: Array) -> tuple[Array, Any]:
        if lengths is None:
            raise ValueError("Expected params in update of relative_to_params, got params=None.")
        return _f32(ratio) * jnp.maximum(lengths, _f32(eps)), state

    return ThresholdRule(lambda norms: (), update)


class _Window(NamedTuple):
    seen: Array
    norms: Array


def window_quantile(q: ArrayLike, *, window: int | None = None, warmup: ArrayLike = 0) -> ThresholdRule:
    r"""A limit at a quantile of the last norms, the present one included.

    .. math:: C_t = Q_q(n_{t-k+1}, \dots, n_t), \quad k = \min(t, \text{window})

    with linear interpolation, as `numpy.quantile`.

    Args:
        q: the quantile, from 0 to 1.
        window: how many norms to remember; None for 1000. Static.
        warmup: for how many norms, at first, there is no limit.

    Returns:
        A `ThresholdRule` that keeps ``window`` float32 numbers a scope and sorts them each step; for
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

    def init(norms: Array) -> _Window:
        return _Window(_counts(norms), jnp.full((size, *norms.shape), jnp.inf, jnp.float32))

    def update(norms: Array, state: _Window, *_: Any) -> tuple[Array, _Window]:
        told = _tells(norms)
        shifted = jnp.concatenate([state.norms[1:], norms[None]])
        last = jnp.where(told[None], shifted, state.norms)
        seen = increment(state.seen, told)
        newest = jnp.clip(seen, 1, size) - 1
        # The position newest * q, its fraction apart from the whole part, so that it keeps its bits.
        steps = newest.astype(jnp.float32)
        whole = jnp.floor(steps * _f32(coarse))
        rest = steps * _f32(coarse) - whole + steps * _f32(fine)
        below = jnp.clip(whole + jnp.floor(rest), 0).astype(jnp.int32)
        share = rest - jnp.floor(rest)
        ordered = jnp.sort(last, axis=0)
        low, high = (
            jnp.take_along_axis(ordered, jnp.minimum(i, newest)[None], axis=0)[0]
            for i in (below, below + 1)
        )
        limits = jnp.where(share > 0, low + (high - low) * share, low)
        return jnp.where(seen <= jnp.asarray(warmup), jnp.inf, limits), _Window(seen, last)

    return ThresholdRule(init, update)


class _Level(NamedTuple):
    seen: Array
    level: Array
    streak: Array


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

    def init(norms: Array) -> _Level:
        return _Level(_counts(norms), jnp.ones_like(norms), _counts(norms))

    def update(norms: Array, state: _Level, *_: Any) -> tuple[Array, _Level]:
        told = _tells(norms)
        seen = increment(state.seen, told)
        warming = state.seen < jnp.maximum(jnp.asarray(warmup), 1)
        limits = jnp.where(warming, jnp.inf, state.level)
        over = told & (norms > limits)
        streak = jnp.where(over, state.streak + 1, 0)
        # ln 1e-6 / ln(1 - q): inf at q = 0, where every step may be clipped, and 0 at q = 1.
        patience = jnp.maximum(_f32(rearm), math.log(1e-6) / jnp.log1p(-_f32(q)))
        lost = over & (streak.astype(jnp.float32) >= patience)
        wanted = (jnp.log(jnp.where(told, norms, 1)) - jnp.log(state.level)) * (1 / seen.clip(1))
        step = jnp.where(warming, wanted, _f32(rate) * (_f32(q) - (~over).astype(jnp.float32)))
        info = jnp.finfo(jnp.float32)
        moved = jnp.clip(state.level * jnp.exp(step), info.smallest_normal, info.max)
        new = _Level(seen, jnp.where(lost, norms, moved), jnp.where(lost, 0, streak))
        return limits, _where(told, new, state)

    return ThresholdRule(init, update)


class _Spread(NamedTuple):
    seen: Array
    mean: Array
    std: Array
    streak: Array


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
    _validate.at_least(0, z=z)
    _validate.in_unit_interval(decay=decay)
    _validate.integer(0, warmup=warmup)
    _validate.integer(1, rearm=rearm)
    if max_norm is not None:
        _validate.at_least(0, max_norm=max_norm)
    cap = jnp.inf if max_norm is None else jnp.maximum(_f32(max_norm), 0)

    def init(norms: Array) -> _Spread:
        return _Spread(_counts(norms), jnp.zeros_like(norms), jnp.zeros_like(norms), _counts(norms))

    def update(norms: Array, state: _Spread, *_: Any) -> tuple[Array, _Spread]:
        told = _tells(norms)
        seen = increment(state.seen, told)
        mean, std = state.mean, state.std
        warming = state.seen < jnp.maximum(jnp.asarray(warmup), 1)
        highest = mean + _f32(z) * (std + 1e-6)
        spike = told & ~warming & (norms > highest)
        score = jnp.where(spike, norms - mean, 1) / (std + 1e-6)
        limits = jnp.where(
            spike, mean + _f32(z) ** 2 / score * std, jnp.where(warming, jnp.inf, highest)
        )
        x = jnp.where(spike & (state.streak < jnp.asarray(rearm)), limits, norms)
        # Welford's update in warm-up, the running one after it; a deviation, unlike a variance, stays
        # in range for every norm.
        weight = jnp.where(warming, 1 / seen.clip(1), 1 - _f32(decay))
        share = jnp.sqrt(weight) * jnp.where(warming, jnp.sqrt(1 - weight), 1 - weight)
        new = _Spread(
            seen,
            mean + weight * (x - mean),
            _hypot(jnp.sqrt(1 - weight) * std, share * (x - mean)),
            jnp.where(spike, increment(state.streak), 0),
        )
        return jnp.minimum(limits, cap), _where(told, new, state)

    return ThresholdRule(init, update)


class _Running(NamedTuple):
    seen: Array
    gamma: Array
    streak: Array


def ema_ratio(
    ratio: ArrayLike,
    *,
    decay: ArrayLike = 0.98,
    warmup: ArrayLike = 100,
    max_norm: ArrayLike = 1.0,
    rearm: ArrayLike = 50,
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
        rearm: after so many clipped steps in a row γ is set to the true norm.

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
        ...     print(limit, state.gamma)
        2.0 2.0
        3.0 2.5
        3.75 2.25

    References:
        Wang, Liu, Xu, Chen, Zhu, Hong, Xu, Zhang, Shi, Ma, Wu, 2025, https://arxiv.org/abs/2502.11034
    """
    _validate.at_least(0, ratio=ratio, max_norm=max_norm)
    _validate.in_unit_interval(decay=decay)
    _validate.integer(0, warmup=warmup)
    _validate.integer(1, rearm=rearm)

    def init(norms: Array) -> _Running:
        return _Running(_counts(norms), jnp.full_like(norms, jnp.inf), _counts(norms))

    def update(norms: Array, state: _Running, lengths: Any, total: Array) -> tuple[Array, _Running]:
        told = _tells(norms)
        seen = increment(state.seen, jnp.isfinite(norms))
        gamma = state.gamma
        warming = (seen < jnp.asarray(warmup)) | jnp.isinf(gamma)
        whole = jnp.broadcast_to(total, norms.shape)
        too_long = told & (whole > _f32(max_norm))
        # The share of the whole first: max_norm / whole may be too small for a float32.
        common = jnp.maximum(_f32(max_norm), 0) * (norms / jnp.where(too_long, whole, 1))
        limits = jnp.where(warming, jnp.where(too_long, common, jnp.inf), _f32(ratio) * gamma)
        over = told & ~warming & (norms > limits)
        streak = jnp.where(over, state.streak + 1, 0)
        lost = streak >= jnp.asarray(rearm)
        x = jnp.minimum(norms, limits)
        mixed = _f32(decay) * gamma + (1 - _f32(decay)) * x
        taken = jnp.where(warming, jnp.minimum(gamma, x), jnp.where(lost, norms, mixed))
        new = _Running(seen, taken, jnp.where(lost, 0, streak))
        return limits, _where(told & (x > 0), new, state)._replace(seen=seen)

    return ThresholdRule(init, update)


def _f32(x: ArrayLike) -> Array:
    return as_dtype(x, jnp.float32)


def _counts(norms: Array) -> Array:
    return jnp.zeros_like(norms, jnp.int32)


def _tells(norms: Array) -> Array:
    """Is there a norm to learn from? A zero one says that nothing came through."""
    return jnp.isfinite(norms) & (norms > 0)


def _where(told: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(told, x, y), new, old)


def _hypot(x: Array, y: Array) -> Array:
    """The root of the sum of squares, which may themselves be out of range."""
    peak = jnp.maximum(jnp.abs(x), jnp.abs(y))
    unit = jnp.where(peak > 0, peak, 1)
    return peak * jnp.sqrt((x / unit) ** 2 + (y / unit) ** 2)
