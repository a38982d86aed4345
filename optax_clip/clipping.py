"""Act on gradients: clip by norm in any scope, clip by value, normalise."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.typing import ArrayLike

from optax_clip import _validate
from optax_clip._numerics import (
    accumulator,
    as_dtype,
    clamp,
    positive,
    power_of_two,
    replaced,
    round_down,
    round_up,
    scale,
    widen,
)
from optax_clip._records import first_record, record
from optax_clip._trees import Layout, place_like
from optax_clip._validate import AxisName, Ord, Scope
from optax_clip.norms import Norm, all_finite, as_tree, measure, shares, total
from optax_clip.thresholds.engine import Fixed, Threshold, ThresholdRule, as_rule, decide, start

__all__ = ["clip_by_global_norm", "clip_by_norm", "clip_by_value", "clip_tree", "normalize_by_norm"]


class ClipState(NamedTuple):
    """What a clip did (read it with `metrics`), and what its threshold rule remembers."""

    recorded: dict[str, Array]
    rule_state: Any


def clip_tree(
    tree: optax.Updates,
    max_norm: ArrayLike,
    *,
    scope: Scope = "global",
    ord: Ord = None,
    norm: ArrayLike | None = None,
    nonfinite: str = "propagate",
    axis_name: AxisName = None,
) -> tuple[optax.Updates, Any]:
    r"""Clip the norm of a tree, for those who write their own training loop.

    .. math:: g_s \leftarrow g_s \min\Big(1, \frac{C}{\|g_s\|}\Big) \quad \text{for each scope } s

    Args:
        tree: arrays of any shape and float or complex dtype; other leaves pass through.
        max_norm: the limit C >= 0, a number or a 0-d array.
        scope: which entries share a norm, as in `tree_norms`.
        ord: which norm, as in `global_norm`.
        norm: the norm of the tree if it is known already; only with ``scope="global"``.
        nonfinite: ``"propagate"``: an inf or NaN entry makes every inexact leaf NaN. ``"zero"``: it
            makes every inexact leaf 0.
        axis_name: mapped axes to sum over, as in `global_norm`.

    Returns:
        The clipped tree, each leaf in its own dtype, and the norm before: a float32 scalar (float64
        if a leaf is), or the tree of norms with a scope other than global. A tree within the limit
        comes back bit for bit. A limit of 0 gives zeros, inf only measures. A traced negative limit
        counts as 0, a traced NaN makes the tree NaN.

    Raises:
        ValueError: for a negative or NaN limit, an unknown scope, order or policy.
        TypeError: for a limit that is not a number.

    Examples:
        >>> import jax.numpy as jnp
        >>> from optax_clip import clip_tree
        >>> grads = {"w": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)}
        >>> clipped, norm = clip_tree(grads, 2.5)
        >>> print(clipped["w"], clipped["b"], norm)
        [1.5 0. ] 2.0 5.0

    References:
        Pascanu, Mikolov, Bengio, 2013, https://arxiv.org/abs/1211.5063
    """
    _validate.at_least(0, max_norm=max_norm)
    _check(scope=scope, ord=ord, nonfinite=nonfinite, axis_name=axis_name)
    if norm is not None and scope != "global":
        raise ValueError(f'Expected norm only with scope="global", got scope={scope!r}.')
    layout = Layout.of(tree, scope, axis_name)
    norms = _measured_or_given(layout, norm, ord=ord)
    limits = [as_dtype(max_norm, n.root.dtype) for n in norms]
    clipped = _rescale(layout, norms, limits, all_finite(norms), nonfinite=nonfinite).tree
    values = [n.value for n in norms]
    return clipped, values[0] if layout.pooled == "global" else as_tree(layout, values)


def clip_by_norm(
    threshold: Threshold,
    *,
    scope: Scope = "leaf",
    ord: Ord = None,
    nonfinite: str = "propagate",
    axis_name: AxisName = None,
    name: str = "clip",
) -> optax.GradientTransformationExtraArgs:
    r"""Clip updates by the norm of each leaf, unit or other scope.

    Keeps the direction inside each scope and bounds its length, against a number, a schedule or a rule
    that learns the limit.

    .. math:: g_s \leftarrow g_s \min\Big(1, \frac{C_s}{\|g_s\|}\Big) \quad \text{for each scope } s

    Args:
        threshold: the limit C on the norm: a number >= 0, a 0-d array, a schedule ``step -> number``,
            or a `ThresholdRule`. A schedule that turns negative raises outside `jax.jit` and counts as
            0 inside.
        scope: which entries share a norm: ``"global"``, ``"leaf"``, ``"unit"`` (one index of the last
            axis), the axes to reduce, or a callable ``(path, leaf) -> one of these but "global"``.
        ord: ``None`` or 2, 1, ``math.inf``, a float p >= 1, or ``"rms"``. Static.
        nonfinite: ``"propagate"``: an inf or NaN entry anywhere makes every inexact leaf NaN, so that
            a loss check sees it, or `optax.apply_if_finite` around what comes after the clip (around
            the clip it hides such a step from the metrics). ``"zero"``: it makes every inexact leaf 0.
        axis_name: mapped axes to sum over, as in `global_norm`.
        name: prefix of the metrics.

    Returns:
        A transform whose state records the metrics (see `metrics`). Leaves keep their dtype; what is
        within the limit comes back bit for bit; a limit of 0 gives zeros and inf only measures; a zero
        norm stays as it is, with finite derivatives. With ``scope="global"`` its update takes
        ``grad_norm=``, the norm of the tree if it is known already.

    Raises:
        ValueError: for a negative or NaN limit, an unknown scope, order or policy, or an axis that a
            leaf does not have.
        TypeError: for a limit that is neither a number, a schedule nor a rule.

    Examples:
        >>> import jax.numpy as jnp
        >>> from optax_clip import clip_by_norm
        >>> tx = clip_by_norm(2.0, scope="unit")
        >>> kernel = jnp.array([[3.0, 0.0], [4.0, 1.0]])
        >>> updates, state = tx.update(kernel, tx.init(kernel))
        >>> print(updates)
        [[1.2 0. ]
         [1.6 1. ]]

    References:
        Pascanu, Mikolov, Bengio, 2013, https://arxiv.org/abs/1211.5063
    """
    rule = as_rule(threshold=threshold)
    return _clip(rule, scope=scope, ord=ord, nonfinite=nonfinite, axis_name=axis_name, name=name)


def clip_by_global_norm(
    max_norm: Threshold,
    *,
    ord: Ord = None,
    nonfinite: str = "propagate",
    axis_name: AxisName = None,
    name: str = "clip",
) -> optax.GradientTransformationExtraArgs:
    r"""Clip updates by the norm of the whole tree: the classic cure for exploding gradients.

    Put it first in the chain. ``clip_by_global_norm(jnp.inf)`` only records the norm.

    .. math:: g \leftarrow g \min\Big(1, \frac{C}{\|g\|}\Big)

    Args:
        max_norm: the limit C on the norm: a number >= 0, a 0-d array, a schedule ``step -> number``, or
            a `ThresholdRule`.
        ord: ``None`` or 2, 1, ``math.inf``, a float p >= 1, or ``"rms"``. Static.
        nonfinite: ``"propagate"`` or ``"zero"``, as in `clip_by_norm`.
        axis_name: mapped axes to sum over, as in `global_norm`.
        name: prefix of the metrics.

    Returns:
        A transform as `clip_by_norm` makes it, with the same edge cases.

    Raises:
        ValueError: for a negative or NaN limit, an unknown order or policy.
        TypeError: for a limit that is neither a number, a schedule nor a rule.

    Examples:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from optax_clip import clip_by_global_norm, metrics
        >>> tx = optax.chain(clip_by_global_norm(1.0), optax.sgd(0.5))
        >>> params = jnp.array([0.0, 0.0])
        >>> updates, state = tx.update(jnp.array([3.0, 4.0]), tx.init(params), params)
        >>> print(updates, metrics(state)["clip/norm_before"])
        [-0.3 -0.4] 5.0

    References:
        Pascanu, Mikolov, Bengio, 2013, https://arxiv.org/abs/1211.5063
    """
    rule = as_rule(max_norm=max_norm)
    return _clip(rule, scope="global", ord=ord, nonfinite=nonfinite, axis_name=axis_name, name=name)


def normalize_by_norm(
    norm: ArrayLike | optax.Schedule = 1.0,
    *,
    scope: Scope = "global",
    ord: Ord = None,
    nonfinite: str = "propagate",
    axis_name: AxisName = None,
    name: str = "normalize",
) -> optax.GradientTransformationExtraArgs:
    r"""Rescale updates to exactly one norm, up or down.

    Only the direction of the gradient is used, as in normalised gradient descent.

    .. math:: g_s \leftarrow g_s \frac{C}{\|g_s\|} \quad \text{for each scope } s

    Args:
        norm: the norm C >= 0 to give each scope: a number, a 0-d array or a schedule.
        scope: which entries share a norm, as in `clip_by_norm`.
        ord: which norm, as in `clip_by_norm`. Static.
        nonfinite: ``"propagate"`` or ``"zero"``, as in `clip_by_norm`.
        axis_name: mapped axes to sum over, as in `global_norm`.
        name: prefix of the metrics.

    Returns:
        A transform whose metrics count every rescaled scope as clipped. A zero norm stays zero.

    Raises:
        ValueError: for a negative, infinite or NaN norm, an unknown scope, order or policy.
        TypeError: for a norm that is neither a number nor a schedule.

    Examples:
        >>> import jax.numpy as jnp
        >>> from optax_clip import normalize_by_norm
        >>> tx = normalize_by_norm(10.0)
        >>> updates, state = tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))
        >>> print(updates)
        [6. 8.]

    References:
        Hazan, Levy, Shalev-Shwartz, 2015, https://arxiv.org/abs/1507.02030
    """
    if not callable(norm):
        _validate.finite(norm=norm)
    rule = as_rule(norm=norm)
    return _clip(
        rule, scope=scope, ord=ord, nonfinite=nonfinite, axis_name=axis_name, name=name, exact=True
    )


def clip_by_value(
    limit: ArrayLike | optax.Schedule,
    *,
    lower: ArrayLike | None = None,
    axis_name: AxisName = None,
    name: str = "clip",
) -> optax.GradientTransformationExtraArgs:
    r"""Clip each entry of the updates into an interval.

    The simplest bound. It bends the direction of the gradient, which clipping by norm does not.

    .. math:: g_i \leftarrow \max(-c, \min(c, g_i))

    Args:
        limit: the bound c >= 0 on each absolute value, or with ``lower`` the upper bound: a number, a
            0-d array or a schedule ``step -> number``. A bound that a narrow dtype cannot represent
            is rounded inwards.
        lower: the lower bound, for an interval that is not symmetric.
        axis_name: mapped axes to sum the metrics over, as in `global_norm`.
        name: prefix of the metrics.

    Returns:
        A transform whose metrics hold 2-norms, the limit as threshold (with ``lower``:
        ``min(limit, -lower)``) and the share of clipped entries. Complex entries are clamped by
        modulus. inf goes to the bound; NaN stays NaN and the step is counted as non-finite.

    Raises:
        ValueError: for a negative or NaN limit, for ``lower > limit``, and in the update for a complex
            leaf with ``lower``.
        TypeError: for a limit that is neither a number nor a schedule.

    Examples:
        >>> import jax.numpy as jnp
        >>> from optax_clip import clip_by_value
        >>> tx = clip_by_value(1.0)
        >>> updates, state = tx.update(jnp.array([-3.0, 0.5]), tx.init(jnp.zeros(2)))
        >>> print(updates)
        [-1.   0.5]

    References:
        Mikolov, 2012, Statistical Language Models Based on Neural Networks, PhD thesis, Brno.
    """
    _validate.axes(axis_name=axis_name)
    _validate.label(name=name)
    if lower is None:
        rule = as_rule(limit=limit)
    else:
        if callable(limit):
            raise TypeError(f"Expected a number as limit beside lower, got limit={limit!r}.")
        _validate.ordered(lower=lower, limit=limit)
        rule = Fixed(lambda _: (), lambda norms, state, *_: (as_dtype(limit, norms.dtype), state))

    def init(params: optax.Params) -> ClipState:
        recorded = first_record(name)
        return place_like(ClipState(recorded, rule.init(recorded[f"{name}/threshold"])), params)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, ClipState]:
        del params, extra
        layout = Layout.of(updates, "global", axis_name)
        dtype = accumulator(layout.measured)
        high, rule_state = rule.update(jnp.zeros((), dtype), state.rule_state, None, jnp.zeros(()))
        high = high.astype(dtype)
        low = -high if lower is None else as_dtype(lower, dtype)
        if lower is not None and any(jnp.iscomplexobj(x) for x in layout.measured):
            raise ValueError(f"Expected no complex leaf beside lower, got lower={lower!r}.")
        (before,) = measure(layout, ord=None)
        ends = [(x, *_inwards(x, low, high)) for x in layout.measured]
        (after,) = measure(layout, ord=None, parts=ends, read=_length)
        recorded = record(
            state.recorded,
            name,
            before=before.value,
            after=after.value,
            threshold=jnp.minimum(high, -low),
            over=[_outside(x, low, high) for x in layout.measured],
            finite=~jnp.isnan(before.root),
            axis_name=axis_name,
        )
        clipped = [_clamp(*each) for each in ends]
        return layout.rebuild(clipped), ClipState(recorded, rule_state)

    return optax.GradientTransformationExtraArgs(init, update)


class _Rescaled(NamedTuple):
    """A tree with its scopes rescaled, what was rescaled, and the norms after."""

    tree: Any
    over: list[Array]
    after: list[Array]


def _rescale(
    layout: Layout,
    norms: Sequence[Norm],
    limits: Sequence[Array],
    finite: Array,
    *,
    nonfinite: str,
    exact: bool = False,
) -> _Rescaled:
    """Multiply each scope that is over its limit by limit / norm.

    XLA fuses the result into the optimizer's pass only if the factors come from behind a barrier. The
    factor is applied in two parts where it is itself outside the float range.
    """
    overs, parts, after = [], [], []
    for norm, bound in zip(norms, limits, strict=True):
        limit = jnp.maximum(bound, 0)
        same = norm.root == 0 if exact else norm.root <= limit * norm.scale
        over = ~(same & ~jnp.isnan(limit))
        ratio = jnp.where(over, limit, 1) / jnp.where(over & (norm.root != 0), norm.root, 1)
        factor = ratio * norm.scale
        info = jnp.finfo(factor.dtype)
        fits = (factor >= info.smallest_normal) & (factor <= info.max)
        first = jnp.where(over & ~fits, norm.scale, 1)
        second = jnp.where(over, jnp.where(fits, factor, ratio), 1)
        second = jnp.where(finite, second, jnp.nan)
        parts.append(lax.optimization_barrier((over | ~finite, first, second)))
        overs.append(over & finite)
        emptied = jnp.where(finite, jnp.where(over, limit, norm.value), jnp.nan)
        after.append(jnp.where(finite, emptied, 0) if nonfinite == "zero" else emptied)
    columns = zip(*parts, strict=True) if parts else ((), (), ())
    whole = lax.optimization_barrier(finite)

    def moved(x: Array, first: Array, second: Array) -> Array:
        product = scale(widen(x, first.dtype), first, second)
        return lax.select(whole, product, jnp.zeros_like(product)) if nonfinite == "zero" else product

    leaves = [
        replaced(x, changed, moved(x, first, second))
        for x, changed, first, second in zip(
            layout.measured, *(shares(layout, column) for column in columns), strict=True
        )
    ]
    return _Rescaled(layout.rebuild(leaves), overs, after)


def _measured_or_given(layout: Layout, norm: ArrayLike | None, *, ord: Ord) -> list[Norm]:
    if norm is None or layout.pooled != "global":
        return measure(layout, ord=ord)
    return [Norm.of(as_dtype(norm, accumulator(layout.measured)))]


def _clip(
    rule: ThresholdRule,
    *,
    scope: Scope,
    ord: Ord,
    nonfinite: str,
    axis_name: AxisName,
    name: str,
    exact: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """The transform behind every clip by norm: measure, decide, rescale, record."""
    _check(scope=scope, ord=ord, nonfinite=nonfinite, axis_name=axis_name)
    _validate.label(name=name)

    def init(params: optax.Params) -> ClipState:
        layout = Layout.of(params, scope)
        return ClipState(place_like(first_record(name), params), start(rule, layout, params))

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        grad_norm: ArrayLike | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, ClipState]:
        del extra
        layout = Layout.of(updates, scope, axis_name)
        norms = _measured_or_given(layout, grad_norm, ord=ord)
        before = total(layout, [n.value for n in norms], ord=ord)
        finite = all_finite(norms)
        limits, lowest, rule_state = decide(
            rule, state.rule_state, layout, norms, params, before, finite, ord=ord
        )
        clipped = _rescale(layout, norms, limits, finite, nonfinite=nonfinite, exact=exact)
        recorded = record(
            state.recorded,
            name,
            before=before,
            after=total(layout, clipped.after, ord=ord),
            threshold=lowest,
            over=clipped.over,
            finite=finite,
        )
        return clipped.tree, ClipState(recorded, rule_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _check(*, scope: Scope, ord: Ord, nonfinite: str, axis_name: AxisName) -> None:
    _validate.scope(scope)
    _validate.order(ord)
    _validate.axes(axis_name=axis_name)
    _validate.one_of(("propagate", "zero"), nonfinite=nonfinite)


def _inwards(x: Array, low: Array, high: Array) -> tuple[Array, Array]:
    """The bounds as a leaf of that dtype can hold them."""
    part = jnp.finfo(x.dtype).dtype
    return round_up(low, part).astype(low.dtype), round_down(high, part).astype(high.dtype)


def _clamp(x: Array, low: Array, high: Array) -> Array:
    """Each entry into [low, high], by modulus if complex; for bounds that the dtype can hold."""
    if not jnp.iscomplexobj(x):
        return clamp(x, low, high)
    # Near modulus 1, as that of what is finite may not be; an infinite part alone is a direction.
    ends = [jnp.where(jnp.isinf(part), jnp.sign(part), 0) for part in (x.real, x.imag)]
    infinite = jnp.isinf(x.real) | jnp.isinf(x.imag)
    size = power_of_two(jnp.maximum(jnp.abs(x.real), jnp.abs(x.imag)))
    way = jnp.where(infinite, lax.complex(*ends), scale(x, 1 / size))
    over = (jnp.abs(x) > high) | jnp.isnan(high)
    bounded = scale(way, high / jnp.where(over, jnp.abs(way), 1))
    return jnp.where(over & ~jnp.isnan(x), bounded, x)


def _length(x: Array, low: Array, high: Array) -> Array:
    """What the norm of a clamped entry needs: the entry, or its absolute value."""
    if jnp.iscomplexobj(x):
        return jnp.minimum(jnp.abs(x), high)
    return jnp.maximum(jnp.minimum(widen(x, low.dtype), high), low)


def _outside(x: Array, low: Array, high: Array) -> Array:
    """1 where an entry is outside, else 0; infinity counts as the largest number, on both sides."""
    most = jnp.asarray(jnp.finfo(high.dtype).max, high.dtype)
    ends = jnp.maximum(low, -most), jnp.minimum(high, most), most
    if jnp.iscomplexobj(x):
        return positive(lambda x, _, high, most: jnp.minimum(jnp.abs(x), most) - high, x, *ends)
    return positive(
        lambda x, low, high, most: jnp.maximum(jnp.minimum(x, most) - high, low - jnp.maximum(x, -most)),
        x,
        *ends,
    )
