"""Algorithms from papers, each a norm, a rule and an action."""

import math
from typing import Any

import optax
from jax import Array
from jax.typing import ArrayLike

from optax_clip import _validate
from optax_clip._mesh import varying_axes
from optax_clip._trees import shape_of
from optax_clip._validate import AxisName, Record, Scope
from optax_clip.clipping.by_norm import clip_by_norm
from optax_clip.thresholds.engine import as_rule
from optax_clip.thresholds.rules import ema_ratio, relative_to_params, zscore
from optax_clip.thresholds.windows import window_quantile

__all__ = ["adagc", "adaptive_grad_clip", "autoclip", "clip_by_update_rms", "zclip"]


def adaptive_grad_clip(
    ratio: ArrayLike = 0.01,
    *,
    eps: ArrayLike = 1e-3,
    scope: Scope = "unit",
    nonfinite: str = "propagate",
    axis_name: AxisName = None,
    name: str = "clip",
    record: Record = True,
) -> optax.GradientTransformationExtraArgs:
    r"""AGC: clip each unit relative to the norm of its weights, for training without batch norm.

    .. math:: g_i \leftarrow g_i \min\Big(1, \lambda \frac{\max(\|w_i\|, \epsilon)}{\|g_i\|}\Big)

    Args:
        ratio: the factor λ >= 0.
        eps: the norm ε >= 0 that a unit is taken to have at least.
        scope: which entries share a norm, as in `clip_by_norm`, but that with ``"unit"`` a leaf with at
            most one axis longer than 1 is one unit.
        nonfinite: ``"propagate"``, ``"zero"`` or ``"local"``, as in `clip_by_norm`.
        axis_name: mapped axes to sum over, as in `global_norm`.
        name: prefix of the metrics.
        record: as in `clip_by_norm`.

    Returns:
        ``clip_by_norm(relative_to_params(ratio, eps=eps), scope="unit")``, whose update needs
        ``params``. The paper leaves the last linear layer out: mask it with `optax.masked`. A unit is
        one index of the last axis, for every rank. The authors' two programs and
        `optax.adaptive_grad_clip` agree but for rank 3, which they take for several heads
        ``(in, heads, out)`` and reduce over axis 0 alone: for these give ``scope=0``. For weights
        ``(out, in, ...)`` give a callable, as the guide on thresholds shows.

    Raises:
        ValueError: for a negative or NaN argument, and in the update without ``params``.
        TypeError: for an argument that is not a number.

    Examples:
        >>> import jax.numpy as jnp
        >>> from optax_clip import adaptive_grad_clip
        >>> tx = adaptive_grad_clip(0.1)
        >>> kernel = jnp.array([[3.0, 0.0], [4.0, 1.0]])
        >>> updates, _ = tx.update(jnp.ones((2, 2)), tx.init(kernel), kernel)
        >>> print(updates)
        [[0.35355338 0.07071068]
         [0.35355338 0.07071068]]

    References:
        Brock, De, Smith, Simonyan, 2021, https://arxiv.org/abs/2102.06171
    """
    rule = relative_to_params(ratio, eps=eps)
    if isinstance(scope, str) and scope == "unit":
        scope = _unit_or_leaf
    return clip_by_norm(
        rule, scope=scope, nonfinite=nonfinite, axis_name=axis_name, name=name, record=record
    )


def _unit_or_leaf(path: str, leaf: Any) -> str:
    """By unit, but a vector is one unit whatever its rank."""
    del path
    is_row = math.prod(shape_of(leaf)[:-1]) == 1 and not (isinstance(leaf, Array) and varying_axes(leaf))
    return "leaf" if is_row else "unit"


def autoclip(
    percentile: ArrayLike = 10,
    *,
    window: int | None = None,
    nonfinite: str = "propagate",
    axis_name: AxisName = None,
    name: str = "clip",
    record: Record = True,
) -> optax.GradientTransformationExtraArgs:
    r"""AutoClip: clip the global norm at a percentile of the norms seen so far.

    .. math:: g \leftarrow g \min\Big(1, \frac{C_t}{\|g\|}\Big), \quad
        C_t = Q_{p / 100}(\|g_{t-k+1}\|, \dots, \|g_t\|)

    Args:
        percentile: the percentile p, from 0 to 100. With 10, nine steps of ten are clipped.
        window: how many norms to remember; None for 1000. Static.
        nonfinite: ``"propagate"``, ``"zero"`` or ``"local"``, as in `clip_by_norm`.
        axis_name: mapped axes to sum over, as in `global_norm`.
        name: prefix of the metrics.
        record: as in `clip_by_norm`.

    Returns:
        ``clip_by_global_norm(window_quantile(percentile / 100, window=window))``. The authors' code
        keeps every norm of the run, NaN included, which makes every later limit NaN; here a window
        bounds the memory and takes in neither NaN nor inf nor 0.

    Raises:
        ValueError: for a percentile outside [0, 100], ``window < 1`` or a traced window.
        TypeError: for an argument of another type.

    Examples:
        >>> import jax.numpy as jnp
        >>> from optax_clip import autoclip
        >>> tx = autoclip(50)
        >>> state = tx.init(jnp.zeros(2))
        >>> for g in (jnp.array([3.0, 4.0]), jnp.array([9.0, 12.0])):
        ...     g, state = tx.update(g, state)
        ...     print(g)
        [3. 4.]
        [6. 8.]

        The median of the norms 5 and 15 is 10.

    References:
        Seetharaman, Wichern, Pardo, Le Roux, 2020, https://arxiv.org/abs/2007.14469
    """
    _validate.between(0, 100, percentile=percentile)
    rule = window_quantile(percentile / 100, window=window)
    return clip_by_norm(
        rule, scope="global", nonfinite=nonfinite, axis_name=axis_name, name=name, record=record
    )


def zclip(
    z: ArrayLike = 2.5,
    *,
    decay: ArrayLike = 0.97,
    warmup: ArrayLike = 25,
    max_norm: ArrayLike | None = None,
    nonfinite: str = "propagate",
    axis_name: AxisName = None,
    name: str = "clip",
    record: Record = True,
) -> optax.GradientTransformationExtraArgs:
    r"""ZClip: clip only spikes, steps whose global norm stands out from its running mean.

    .. math:: g \leftarrow g \min\Big(1, \frac{\mu + z^2 \sigma / z_t}{\|g\|}\Big)
        \;\text{ where } z_t = \frac{\|g\| - \mu}{\sigma + 10^{-6}} > z

    Args:
        z: the score >= 0 above which a norm is a spike.
        decay: the decay of mean and variance, in [0, 1).
        warmup: how many norms, at first, are not limited and give mean and variance.
        max_norm: a cap >= 0 on the limit, also in warm-up.
        nonfinite: ``"propagate"``, ``"zero"`` or ``"local"``, as in `clip_by_norm`.
        axis_name: mapped axes to sum over, as in `global_norm`.
        name: prefix of the metrics.
        record: as in `clip_by_norm`.

    Returns:
        ``clip_by_global_norm(zscore(z, decay=decay, warmup=warmup, max_norm=max_norm))``. It differs
        from the authors' code in this: ``max_norm`` is None by default as in the paper's algorithm,
        theirs is 1; a NaN leaves the statistics alone, where theirs are NaN for good; and after 50
        spikes in a row they follow the new level.

    Raises:
        ValueError: for a negative z, warm-up or max_norm, or a decay outside [0, 1).
        TypeError: for an argument of another type.

    Examples:
        >>> import jax.numpy as jnp
        >>> from optax_clip import zclip
        >>> tx = zclip(2.0, warmup=2)
        >>> state = tx.init(jnp.zeros(2))
        >>> for size in (1.0, 3.0, 10.0):
        ...     g, state = tx.update(jnp.array([0.6, 0.8]) * size, state)
        ...     print(f"{jnp.linalg.norm(g):.3f}")
        1.000
        3.000
        2.500

        The mean of 1 and 3 is 2 and their deviation 1, so 10 has the score 8: 2 + 2² / 8 = 2.5.

    References:
        Kumar, Owen, Roy Chowdhury, Güra, 2025, https://arxiv.org/abs/2504.02507
    """
    rule = zscore(z, decay=decay, warmup=warmup, max_norm=max_norm)
    return clip_by_norm(
        rule, scope="global", nonfinite=nonfinite, axis_name=axis_name, name=name, record=record
    )


def adagc(
    ratio: ArrayLike = 1.05,
    *,
    decay: ArrayLike = 0.98,
    warmup: ArrayLike = 100,
    max_norm: ArrayLike = 1.0,
    nonfinite: str = "propagate",
    axis_name: AxisName = None,
    name: str = "clip",
    record: Record = True,
) -> optax.GradientTransformationExtraArgs:
    r"""AdaGC: clip each leaf relative to the running mean of its own clipped norm.

    .. math:: g_i \leftarrow g_i \min\Big(1, \frac{\lambda \gamma_{i}}{\|g_i\|}\Big), \quad
        \gamma_i \leftarrow b \gamma_i + (1 - b) \|g_i\|

    and before step ``warmup`` the whole tree to ``max_norm``, γ then being the smallest clipped norm.

    Args:
        ratio: the factor λ >= 0.
        decay: the decay b of γ, in [0, 1).
        warmup: the step, counted from 1, from which on leaves are clipped on their own.
        max_norm: the limit >= 0 on the norm of the whole tree in warm-up.
        nonfinite: ``"propagate"``, ``"zero"`` or ``"local"``, as in `clip_by_norm`.
        axis_name: mapped axes to sum over, as in `global_norm`.
        name: prefix of the metrics.
        record: as in `clip_by_norm`.

    Returns:
        ``clip_by_norm(ema_ratio(ratio, decay=decay, warmup=warmup, max_norm=max_norm), scope="leaf")``.
        It is Algorithm 1 of the paper but for what would break it: one zero gradient in warm-up makes γ
        of that leaf 0 for good there, one NaN makes it NaN; here neither is taken in. By default most
        steps are clipped for hundreds of steps, and γ grows by 0.1% a step at most; `ema_ratio` has
        ``rearm`` for those who want it to follow faster. PaddlePaddle's version takes the norms before
        the global clip into γ and has other defaults.

    Raises:
        ValueError: for a negative ratio, warm-up or max_norm, or a decay outside [0, 1).
        TypeError: for an argument of another type.

    Examples:
        >>> import jax.numpy as jnp
        >>> from optax_clip import adagc
        >>> tx = adagc(1.5, decay=0.5, warmup=2, max_norm=5.0)
        >>> state = tx.init(jnp.zeros(2))
        >>> for g in (jnp.array([6.0, 8.0]), jnp.array([6.0, 8.0])):
        ...     g, state = tx.update(g, state)
        ...     print(g)
        [3. 4.]
        [4.5 6. ]

    References:
        Wang, Liu, Xu, Chen, Zhu, Hong, Xu, Zhang, Shi, Ma, Wu, 2025, https://arxiv.org/abs/2502.11034
    """
    rule = ema_ratio(ratio, decay=decay, warmup=warmup, max_norm=max_norm)
    return clip_by_norm(
        rule, scope="leaf", nonfinite=nonfinite, axis_name=axis_name, name=name, record=record
    )


def clip_by_update_rms(
    max_rms: ArrayLike | optax.Schedule = 1.0,
    *,
    nonfinite: str = "propagate",
    axis_name: AxisName = None,
    name: str = "clip",
    record: Record = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Adafactor's update clipping: bound the root mean square of each leaf of the update.

    It goes after the preconditioner, such as `optax.scale_by_adam`, and before the learning rate: there
    an update has a root mean square near 1 unless the second moment lags behind.

    .. math:: u \leftarrow \frac{u}{\max(1, \mathrm{RMS}(u) / d)}

    Args:
        max_rms: the limit d >= 0, a number or a schedule ``step -> number``.
        nonfinite: ``"propagate"``, ``"zero"`` or ``"local"``, as in `clip_by_norm`.
        axis_name: mapped axes to average over, as in `global_norm`.
        name: prefix of the metrics.
        record: as in `clip_by_norm`.

    Returns:
        ``clip_by_norm(max_rms, scope="leaf", ord="rms")``.

    Raises:
        ValueError: for a negative or NaN limit.
        TypeError: for a limit that is neither a number nor a schedule.

    Examples:
        >>> import jax.numpy as jnp
        >>> from optax_clip import clip_by_update_rms
        >>> tx = clip_by_update_rms(1.0)
        >>> updates, _ = tx.update(jnp.full(4, 3.0), tx.init(jnp.zeros(4)))
        >>> print(updates)
        [1. 1. 1. 1.]

    References:
        Shazeer, Stern, 2018, https://arxiv.org/abs/1804.04235
    """
    rule = as_rule(max_rms=max_rms)
    return clip_by_norm(
        rule, scope="leaf", ord="rms", nonfinite=nonfinite, axis_name=axis_name, name=name, record=record
    )
