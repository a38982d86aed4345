"""Masks: which weights, and which gradients, a transform acts on."""

import warnings
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from jax import Array

from optax_clip import _validate
from optax_clip._mesh import together
from optax_clip._numerics import accumulator
from optax_clip._records import Report, fraction, transform
from optax_clip._trees import Scopes, as_struct, flatten
from optax_clip.sets.constraint import STATIC, Constraint, require_real

__all__ = ["mask_outward", "where"]


def mask_outward(
    constraint: Constraint, *, name: str = "outward", record: bool = True
) -> optax.GradientTransformationExtraArgs:
    r"""Take out the gradient of weights that sit at a bound and would be pushed further out.

    First in a chain that ends with `project_weights` on the same box. Without it momentum winds up while
    a weight is held at its bound, and holds it there after the gradient has turned. It is what
    `gradient_mapping`, which takes every set, does in a box, with a wall that is felt only when it is
    reached.

    The gradient has to be one that will be *subtracted*: where updates are added (a negative learning
    rate, ``flip_sign=False``, ascent in a multiplier) put ``optax.scale(-1)`` before this transform.

    .. math:: g_i \leftarrow 0 \;\text{ where } P(w_i - \infty\, \mathrm{sign}(g_i)) = w_i

    Args:
        constraint: `box`, `non_negative`, or `norm_ball` with ``ord=math.inf``. Under
            `optax.inject_hyperparams` name it in ``static_args``.
        name: prefix of the metrics.
        record: False to record nothing; the state is then `optax.EmptyState`.

    Returns:
        A transform whose update needs ``params``. A weight within 4 eps of its bound (1/32 in
        float8) counts as at it. All other entries keep their bits. Metrics: ``fraction``, the share of
        entries taken out, and ``steps``.

    Raises:
        TypeError: if the constraint is not a set that bounds each entry on its own.
        ValueError: if the update is called without ``params``, or for a complex leaf.

    Examples:
        >>> import jax.numpy as jnp
        >>> from optax_clip import box, mask_outward
        >>> tx = mask_outward(box(-1.0, 1.0))
        >>> params = jnp.array([1.0, 1.0, 0.5])
        >>> gradient = jnp.array([-2.0, 2.0, -2.0])
        >>> print(tx.update(gradient, tx.init(params), params)[0])
        [ 0.  2. -2.]

        The first would grow beyond 1; the second comes back from its bound.
    """
    if not isinstance(constraint, Constraint) or constraint.bounds is None or constraint.init:
        hint = STATIC if isinstance(constraint, Array) else ""
        raise TypeError(f"Expected constraint to be a box, got constraint={constraint!r}.{hint}")
    _validate.record(record)
    bounds = constraint.bounds

    def step(updates: optax.Updates, memory: Any, params: Any, **extra: Any) -> tuple[Any, Any, Any]:
        del extra
        _validate.params_given(params, of="mask_outward")
        scopes, gs = Scopes.of(updates, "leaf", axis_name=(), beside=params)
        ps = scopes.leaves_of(params, of="mask_outward")
        gs, ps = together(gs, ps)
        require_real(scopes, ps, of="mask_outward")
        rows = zip(gs, ps, bounds(scopes.alone(ps), None, params), strict=True)
        held = [_is_held(g, p, *ends) for g, p, ends in rows]
        kept = [jnp.where(h, 0, g) for h, g in zip(held, gs, strict=True)]

        def report() -> Report:
            return Report({"share": (fraction(held, constraint.axis_name),)}, {"turns": (True,)})

        return scopes.rebuild(updates, kept), memory, report

    return transform(name, ("share", "turns"), lambda params: (), step, record=record, remembers=False)


def _is_held(g: Array, p: Array, low: Array, high: Array) -> Array:
    """Is a weight at the bound that its gradient pushes to, as near as a dtype can tell?"""
    wide = accumulator([p])
    end, own = jnp.where(g > 0, low, high).astype(wide), p.astype(wide)
    near = min(4 * float(jnp.finfo(p.dtype).eps), 2.0**-5)
    return ((g > 0) | (g < 0)) & (jnp.abs(end - own) <= near * jnp.abs(own))


def where(predicate: Callable[[str, Any], bool]) -> Callable[[Any], Any]:
    """Make a mask for `optax.masked` from the paths of the leaves.

    Args:
        predicate: ``(path, leaf) -> bool``. The path joins keys by "/", such as ``"dense/kernel"`` or
            ``"params/dense/kernel"``: the same for linen and nnx, at init and at update.

    Returns:
        A callable ``tree -> tree of bool``. It warns, once, if it picks no leaf at all.

    Raises:
        TypeError: if the predicate is not callable.

    Examples:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from optax_clip import norm_ball, project_weights, where
        >>> kernels = where(lambda path, leaf: path.endswith("kernel"))
        >>> print(kernels({"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}))
        {'dense': {'bias': False, 'kernel': True}}
        >>> tx = optax.masked(project_weights(norm_ball(1.0)), kernels)
    """
    if not callable(predicate):
        raise TypeError(f"Expected predicate to be callable, got predicate={predicate!r}.")

    seen: list[Any] = []

    def mask(tree: Any) -> Any:
        paths, leaves, treedef = flatten(tree)
        flags = [
            None if x is None else bool(predicate(p, as_struct(x)))
            for p, x in zip(paths, leaves, strict=True)
        ]
        if any(x is not None for x in leaves) and not any(flags) and not seen:
            seen.append(paths)
            warnings.warn(
                f"where(predicate={predicate!r}) chooses no leaf; the first paths are {paths[:3]}.",
                stacklevel=2,
            )
        return treedef.unflatten(flags)

    return mask
