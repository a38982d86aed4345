"""Boxes: each weight in an interval of its own."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike

from optax_clip import _settings, _validate
from optax_clip._geometry.intervals import Bounds, clamp, inwards, outside
from optax_clip._mesh import place_like
from optax_clip._numerics import as_dtype, round_down, round_up
from optax_clip._settings import Setting
from optax_clip._trees import Scopes, flatten, shape_of
from optax_clip._validate import AxisName
from optax_clip._values import value_object
from optax_clip.sets.constraint import (
    Constraint,
    NormBounds,
    at_start_only,
    initial,
    largest,
    require_real,
)

__all__ = ["box", "init_box", "non_negative"]


@value_object
def box(lower: Setting, upper: Setting, *, axis_name: AxisName = None) -> Constraint:
    r"""Each weight in an interval: weight clipping.

    .. math:: P(w)_i = \max(l, \min(u, w_i))

    Args:
        lower: the smallest value l: a number (``-math.inf`` for none), an array that broadcasts to each
            leaf, a tree of these that is a prefix of the weights, or a formula ``(path, leaf) ->
            number``.
        upper: the largest value u, likewise.
        axis_name: mapped axes to sum the metrics over, as in `global_norm`.

    Returns:
        A set for `project_weights`, `project` and `violation`. Bounds that the dtype of a leaf cannot
        represent are rounded inwards, so that a bfloat16 weight is never above 0.1, and a float8 one is
        finite. NaN stays NaN.

    Raises:
        ValueError: if ``lower > upper`` anywhere or a bound is NaN; for a complex leaf, where no number
            of its dtype is between the bounds of a leaf, a tree is not a prefix of the weights or an
            array does not broadcast to its leaf.
        TypeError: if a bound is not a number.

    Examples:
        >>> import jax.numpy as jnp
        >>> from optax_clip import box, project
        >>> print(project(jnp.array([-3.0, 0.5, 2.0]), box(-1.0, 1.0)))
        [-1.   0.5  1. ]
        >>> print(project({"a": jnp.array(3.0), "b": jnp.array(3.0)}, box(0.0, {"a": 1.0, "b": 2.0})))
        {'a': Array(1., dtype=float32), 'b': Array(2., dtype=float32)}

    References:
        Arjovsky, Chintala, Bottou, 2017, https://arxiv.org/abs/1701.07875
    """
    _settings.absolute(lower=lower, upper=upper)
    lower, upper = _settings.ordered(lower=lower, upper=upper)
    _validate.axis_name(axis_name=axis_name)

    def bounds(params: optax.Params, memory: Any = (), beside: Any = None) -> list[Bounds]:
        del memory, beside
        scopes, xs = Scopes.of(params, "leaf", axis_name)
        require_real(scopes, xs, of="box")
        shapes = [x.shape for x in xs]
        lows = _settings.per_leaf(scopes, xs, shapes, lower=lower)
        highs = _settings.per_leaf(scopes, xs, shapes, upper=upper)
        for i, x, low, high in zip(scopes.places, xs, lows, highs, strict=True):
            _require_room(scopes.paths[i], x.dtype, low, high)
        return [inwards(*each) for each in zip(xs, lows, highs, strict=True)]

    return entrywise(bounds, axis_name)


@value_object
def non_negative(*, axis_name: AxisName = None) -> Constraint:
    r"""Each weight at least 0.

    .. math:: P(w)_i = \max(0, w_i)

    Args:
        axis_name: mapped axes to sum the metrics over, as in `global_norm`.

    Returns:
        The set ``box(0, inf)``, with its edge cases.

    Examples:
        >>> import jax.numpy as jnp
        >>> from optax_clip import non_negative, project
        >>> print(project(jnp.array([-3.0, 0.5]), non_negative()))
        [0.  0.5]

    References:
        Lee, Seung, 1999, https://doi.org/10.1038/44565
    """
    return box(0.0, math.inf, axis_name=axis_name)


@value_object
def init_box(kappa: ArrayLike, *, axis_name: AxisName = None) -> Constraint:
    r"""Each weight in a box that is relative to the weights at the start: against loss of plasticity.

    .. math:: P(w)_i = \max(-\kappa m, \min(\kappa m, w_i)), \quad m = \max_i |w_i^{(0)}|
        \quad \text{for each leaf}

    Args:
        kappa: the factor κ >= 0, a number or a 0-d array.
        axis_name: mapped axes to sum the metrics over, as in `global_norm`; the bounds are those of
            the weights that ``init`` saw.

    Returns:
        A set for `project_weights`, which keeps the bounds of the weights that its ``init`` saw in its
        state. A leaf that starts at 0, such as a bias, takes the bound of the kernel beside it (the
        leaf of rank 2 or more under the same parent, the largest bound of several), else it has none.
        Elsayed et al. take for m the bound of the uniform initialisation; we use the largest initial
        weight: nearly the same for uniform initialisation, and defined for every other. From an ``init``
        on `jax.ShapeDtypeStruct` the bounds are NaN, to be filled from a checkpoint.

    Raises:
        ValueError: for a negative, infinite or NaN kappa; for a complex leaf; from `project` and
            `violation`, which know of no start.
        TypeError: if kappa is not a number.

    Examples:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from optax_clip import init_box, project_weights
        >>> tx = optax.chain(optax.sgd(1.0), project_weights(init_box(2.0)))
        >>> params = {"kernel": jnp.array([[0.5, -0.25]]), "bias": jnp.zeros(1)}
        >>> grads = {"kernel": jnp.array([[3.0, 0.0]]), "bias": jnp.array([-3.0])}
        >>> updates, _ = tx.update(grads, tx.init(params), params)
        >>> print(optax.apply_updates(params, updates))
        {'bias': Array([1.], dtype=float32), 'kernel': Array([[-1.  , -0.25]], dtype=float32)}

    References:
        Elsayed, Lan, Lyle, Mahmood, 2024, https://arxiv.org/abs/2407.01704
    """
    _validate.at_least(0, kappa=kappa)
    _validate.finite(kappa=kappa)
    _validate.axis_name(axis_name=axis_name)

    # The start is kept as bounds, times kappa: what is left to say of kappa is whether it is 0.
    some = np.sign(kappa) if not _validate.is_traced(kappa) else jnp.sign(kappa)
    bounds = NormBounds("leaf", axis_name, math.inf, {"kappa": initial(some)}, "kappa")

    def init(params: optax.Params) -> dict[str, Array]:
        paths, leaves, _ = flatten(params)
        own = as_dtype(kappa, jnp.float32) * bounds.init(params)["kappa"]
        for at, path in enumerate(paths):
            beside = [
                own[i] for i, (other, x) in enumerate(zip(paths, leaves, strict=True))
                if other.keys[:-1] == path.keys[:-1] and len(shape_of(x)) > 1
            ]  # fmt: skip
            spare = functools.reduce(jnp.maximum, beside, jnp.float32(0))
            spare = jnp.where((spare == 0) & (as_dtype(kappa, jnp.float32) > 0), jnp.inf, spare)
            own = own.at[at].set(jnp.where(own[at] == 0, spare, own[at]))
        return place_like({"kappa": own}, params)

    def ends(params: optax.Params, memory: Any, beside: Any = None) -> list[Bounds]:
        require_real(*Scopes.of(params, "leaf", axis_name=()), of="box")
        return cube(bounds, params, memory, beside)

    return at_start_only(entrywise(ends, axis_name)._replace(init=init), "kappa", kappa)


def cube(
    bounds: NormBounds, params: optax.Params, memory: Any = None, beside: Any = None
) -> list[Bounds]:
    """The ball of order inf bounds each entry."""
    scopes, xs = Scopes.of(params, bounds.scope, axis_name=(), beside=beside)
    highs = bounds.per_leaf(scopes, xs, memory)
    return [inwards(x, -high, high) for x, high in zip(xs, highs, strict=True)]


def entrywise(bounds: Callable[..., list[Bounds]], axis_name: AxisName) -> Constraint:
    """The set of all trees whose entries are between their bounds, complex ones by modulus."""

    def nearest(params: optax.Params) -> optax.Params:
        scopes, xs = Scopes.of(params, "leaf", axis_name=())
        pairs = zip(xs, bounds(params), strict=True)
        inside: optax.Params = scopes.rebuild(params, [clamp(x, *pair) for x, pair in pairs])
        return inside

    def excess(params: optax.Params) -> Array:
        _, xs = Scopes.of(params, "leaf", axis_name=())
        pairs = zip(xs, bounds(params), strict=True)
        return largest([outside(x, *pair) for x, pair in pairs], axis_name)

    return Constraint(nearest, excess, bounds=bounds, axis_name=axis_name)


def _require_room(path: str, dtype: Any, lower: Any, upper: Any) -> None:
    """Some number of the dtype is between both bounds of a leaf, entry by entry."""
    if _validate.is_traced(lower) or _validate.is_traced(upper):
        return
    low, high = (np.asarray(x).astype(np.float64) for x in (lower, upper))
    crossed = np.argwhere(round_up(low, dtype) > round_down(high, dtype))
    if len(crossed):
        at = tuple(int(i) for i in crossed[0])
        low, high = (x[at] for x in np.broadcast_arrays(low, high))
        where = f" at position {at}" if at else ""
        raise ValueError(
            f"Expected a number of dtype {dtype} between lower and upper for leaf {path!r}{where}, got "
            f"lower={low} and upper={high}."
        )
