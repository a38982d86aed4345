"""Clip by norm in any scope, and normalise."""

from collections.abc import Mapping
from typing import Any

import optax
from jax.typing import ArrayLike

from optax_clip import _validate
from optax_clip._validate import AxisName, Ord, Record, Scope
from optax_clip.clipping._acting import Clipping
from optax_clip.thresholds.engine import Limits, Threshold, ThresholdRule

__all__ = ["clip_by_global_norm", "clip_by_norm", "clip_tree", "normalize_by_norm"]


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
            makes every inexact leaf 0. ``"local"``: it makes its own scope NaN; the others are clipped.
        axis_name: mapped axes to sum over, as in `global_norm`.

    Returns:
        The clipped tree, each leaf in its own dtype, and the norm before: a float32 scalar (float64
        if a leaf is), or the tree of norms with a scope other than global. A tree within the limit
        comes back bit for bit. A limit of 0 gives zeros, inf only measures. A traced negative limit
        counts as 0, a traced NaN makes the tree NaN.

    Raises:
        ValueError: for a negative or NaN limit, a negative norm, an unknown scope, order or policy.
        TypeError: for a limit or a norm that is not a number.

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
    limits = Limits.of(scope, max_norm=max_norm)
    how = Clipping(limits, scope, ord, nonfinite, axis_name)
    how.check()
    if limits.asks_for_weights or limits.remembers:
        raise TypeError(f"Expected max_norm to be a number, got max_norm={max_norm!r}.")
    if norm is not None and scope != "global":
        raise ValueError(f'Expected norm only with scope="global", got scope={scope!r}.')
    done = how.act(tree, None, None, norm=norm)
    scopes = done.cut.scopes
    return scopes.rebuild(tree, done.leaves), scopes.as_tree(done.found.before)


def clip_by_norm(
    threshold: Threshold,
    *,
    scope: Scope = "leaf",
    ord: Ord = None,
    nonfinite: str = "propagate",
    axis_name: AxisName = None,
    name: str = "clip",
    record: Record = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Clip updates by the norm of each leaf, unit or other scope.

    Keeps the direction inside each scope and bounds its length, against a number, a schedule or a rule
    that learns the limit.

    .. math:: g_s \leftarrow g_s \min\Big(1, \frac{C_s}{\|g_s\|}\Big) \quad \text{for each scope } s

    Args:
        threshold: the limit C on the norm: a number >= 0, a 0-d array, a schedule ``step -> number``,
            or a `ThresholdRule`; with `groups` also a dict ``label -> one of these``. A schedule that
            turns negative raises outside `jax.jit` and counts as 0 inside.
        scope: which entries share a norm: ``"global"``, ``"leaf"``, ``"unit"`` (one index of the last
            axis), the axes to reduce, `groups`, or a callable ``(path, leaf) -> one of the others but
            "global"``.
        ord: ``None`` or 2, 1, ``math.inf``, a float p >= 1, or ``"rms"``. Static.
        nonfinite: ``"propagate"``: an inf or NaN entry anywhere makes every inexact leaf NaN, so that
            a loss check sees it. Put `optax.apply_if_finite` around what follows the clip; around the
            clip it discards the metrics of that step. ``"zero"``: it makes every inexact leaf 0.
            ``"local"``: it makes its own scope NaN, and the others are clipped as usual. A number, a
            schedule or `relative_to_params` then scales a leaf as soon as it is measured, so that the
            gradients of a large model need not all be kept until the last is there. The step counts as
            non-finite, ``fraction`` is of the other scopes, and the norms of the tree are inf or NaN; a
            rule sees NaN as norm of that scope, and as ``total`` the norm of the others.
        axis_name: mapped axes to sum over, as in `global_norm`.
        name: prefix of the metrics.
        record: False to record nothing: the state is then `optax.EmptyState` unless the threshold
            remembers, and a state of any other clip is accepted. ``"scopes"``, for the scope ``"leaf"``:
            also ``{name}/{path}/norm_before``, ``norm_after`` and ``threshold`` of each leaf.

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
    limits = Limits.of(scope, threshold=threshold)
    return Clipping(limits, scope, ord, nonfinite, axis_name).transform(name, record)


def clip_by_global_norm(
    max_norm: Threshold,
    *,
    ord: Ord = None,
    nonfinite: str = "propagate",
    axis_name: AxisName = None,
    name: str = "clip",
    record: Record = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Clip updates by the norm of the whole tree: the classic cure for exploding gradients.

    Put it first in the chain. ``clip_by_global_norm(jnp.inf)`` only records the norm.

    .. math:: g \leftarrow g \min\Big(1, \frac{C}{\|g\|}\Big)

    Args:
        max_norm: the limit C on the norm: a number >= 0, a 0-d array, a schedule ``step -> number``, or
            a `ThresholdRule`.
        ord: ``None`` or 2, 1, ``math.inf``, a float p >= 1, or ``"rms"``. Static.
        nonfinite: ``"propagate"`` or ``"zero"``, as in `clip_by_norm`; ``"local"`` is here the first of
            them, as the tree is one scope.
        axis_name: mapped axes to sum over, as in `global_norm`.
        name: prefix of the metrics.
        record: False to record nothing: the state is then `optax.EmptyState` unless the threshold
            remembers, and a state of any other clip is accepted.

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
    limits = Limits.of(None, max_norm=max_norm)
    return Clipping(limits, "global", ord, nonfinite, axis_name).transform(name, record)


def normalize_by_norm(
    norm: Threshold = 1.0,
    *,
    scope: Scope = "global",
    ord: Ord = None,
    nonfinite: str = "propagate",
    axis_name: AxisName = None,
    name: str = "normalize",
    record: Record = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescale updates to exactly one norm, up or down.

    Only the direction of the gradient is used, as in normalised gradient descent; by a rule its length
    follows that of the weights, as in LARS and Hyperball.

    .. math:: g_s \leftarrow g_s \frac{C}{\|g_s\|} \quad \text{for each scope } s

    Args:
        norm: the norm C >= 0 to give each scope: a number, a 0-d array, a schedule or a
            `ThresholdRule`, such as ``relative_to_params(1.0, eps=0.0)`` for the norm of the weights;
            with `groups` also a dict ``label -> one of these``.
        scope: which entries share a norm, as in `clip_by_norm`.
        ord: which norm, as in `clip_by_norm`. Static.
        nonfinite: ``"propagate"``, ``"zero"`` or ``"local"``, as in `clip_by_norm`.
        axis_name: mapped axes to sum over, as in `global_norm`.
        name: prefix of the metrics.
        record: False to record nothing: the state is then `optax.EmptyState` unless the threshold
            remembers, and a state of any other clip is accepted.

    Returns:
        A transform whose metrics count every rescaled scope as clipped. A zero norm stays zero. What is
        too large for float16 or float8 becomes their largest number.

    Raises:
        ValueError: for a negative, infinite or NaN norm, an unknown scope, order or policy.
        TypeError: for a norm that is neither a number, a schedule nor a rule.

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
    limits = Limits.of(scope, norm=norm)
    each = {f"norm[{k!r}]": x for k, x in norm.items()} if isinstance(norm, Mapping) else {"norm": norm}
    for key, x in each.items():
        if not callable(x) and not isinstance(x, ThresholdRule):
            _validate.finite(0, **{key: x})
    return Clipping(limits, scope, ord, nonfinite, axis_name, normalize=True).transform(name, record)
