"""Act on weights by a signal of the forward pass: rescale them, as QK-Clip does."""

import keyword
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.typing import ArrayLike

from optax_clip import _settings, _validate, _xla
from optax_clip._landing import add_as_apply_updates, land
from optax_clip._mesh import all_reduce, reduction_axes, together
from optax_clip._numerics import (
    accumulator,
    aligned,
    as_dtype,
    broadcast_like,
    round_toward_zero,
    scale,
    widen,
)
from optax_clip._records import Report, fraction, transform
from optax_clip._trees import Scopes
from optax_clip._validate import AxisName
from optax_clip._values import owned
from optax_clip.norms import largest

__all__ = ["qk_clip", "rescale_weights"]

Factors = Callable[[str, Any, Any], ArrayLike | None]
Gauges = dict[str, tuple[Any, ...]]


def rescale_weights(
    factors: Factors, *, signal: str, name: str = "rescale", record: bool = True
) -> optax.GradientTransformationExtraArgs:
    r"""Multiply weights by factors that follow from a signal of the forward pass.

    Last in the chain, before `project_weights`: what follows it would not be rescaled.

    .. math:: u \leftarrow f\,(w + u) - w, \quad f = f(\text{signal})

    Args:
        factors: ``(path, leaf, signal) -> factor``: what to multiply the weights ``leaf`` by, a number
            or an array that broadcasts to its shape, or None to leave them alone. Under
            `optax.inject_hyperparams` name it in ``static_args``.
        signal: the keyword under which the update is given the signal, an array or a tree of arrays;
            reduced over devices and micro-batches already. Static.
        name: prefix of the metrics.
        record: False to record nothing; the state is then `optax.EmptyState`.

    Returns:
        A transform whose update needs ``params`` and the signal. Where a factor is 1 the update keeps
        its bits. Elsewhere the weights are f (w + u) after `optax.apply_updates`, rounded towards 0;
        updates keep their dtype. ``factors`` is given the signal in float32, with NaN for an entry that
        is not finite; where it then gives NaN or inf, f is 1. Weights without an update (None) are left
        alone. Metrics: ``fraction``, the share of factors that are not 1, ``steps``, and
        ``steps_nonfinite``, those with an inf or NaN in the signal.

    Raises:
        TypeError: if ``factors`` is not callable, ``signal`` no identifier, or a factor not real.
        ValueError: if ``signal`` is an argument of every update, such as ``"params"``, if the update is
            called without ``params`` or without the signal, or if a factor does not broadcast to its
            leaf.

    Examples:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from optax_clip import rescale_weights
        >>> tx = rescale_weights(lambda path, leaf, peak: 2.0 / jnp.maximum(peak, 2.0), signal="peak")
        >>> params = jnp.array([1.0, -3.0])
        >>> updates, _ = tx.update(jnp.zeros(2), tx.init(params), params, peak=8.0)
        >>> print(optax.apply_updates(params, updates))
        [ 0.25 -0.75]

    References:
        Kimi Team, 2025, Kimi K2: Open Agentic Intelligence, https://arxiv.org/abs/2507.20534
    """
    _validate.static(signal=signal)
    taken = "updates", "state", "params"
    if not isinstance(signal, str) or not signal.isidentifier() or keyword.iskeyword(signal):
        raise TypeError(f"Expected signal to be the name of a keyword, got signal={signal!r}.")
    if signal in taken:
        raise ValueError(f"Expected signal to be none of {taken}, got signal={signal!r}.")

    def share(given: Any, seen: Any, scaled: list[_Scaled]) -> Gauges:
        del given, seen
        return {"share": (fraction([each.factor != 1 for each in scaled if each.p.size]),)}

    return _by_signal(
        _How(factors, signal, "rescale_weights", share), ("share", "signals"), name, record
    )


def qk_clip(
    factors: Factors,
    *,
    max_logit: ArrayLike = 100.0,
    axis_name: AxisName = None,
    name: str = "qk_clip",
    record: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Keep attention logits bounded: shrink query and key weights of heads whose logits grow.

    Last in the chain, before `project_weights`. The update is given the largest logit S of each head,
    over the batch and all positions, after scaling and before masks and softmax:
    ``tx.update(grads, state, params, max_logits=tree)``.

    .. math:: \eta_h = \min\Big(1, \frac{\tau}{S_h}\Big), \quad
        u \leftarrow f(\eta)\,(w + u) - w

    Args:
        factors: ``(path, leaf, eta) -> factor``, as in `rescale_weights`; ``eta`` is a tree like
            ``max_logits``, float32 in (0, 1]. With √η for the query and key weights of a head the
            logits shrink by η. The guide has the factors for MHA, GQA, MLA and stacked layers.
        max_logit: the limit τ >= 0 on the logits, a number or a 0-d array.
        axis_name: mapped axes over which to take the largest S, such as those that split the batch.
        name: prefix of the metrics.
        record: False to record nothing; the state is then `optax.EmptyState`.

    Returns:
        A transform whose update needs ``params`` and ``max_logits``, as `rescale_weights` makes it. At
        or below the limit, for a negative S too, η is 1 and updates keep their bits; so it is where S is
        inf or NaN. Metrics: ``max_logit``, the largest S, ``fraction``, the share of heads with η < 1,
        ``steps``, and ``steps_nonfinite``, those with an inf or NaN among the logits.

    Raises:
        TypeError: if ``factors`` is not callable, or ``max_logit`` not a number.
        ValueError: for a negative or NaN limit, if the update is called without ``params`` or without
            ``max_logits``, or if a factor does not broadcast to its leaf.

    Examples:
        Two heads, whose largest logits were 50 and 400:

        >>> import jax.numpy as jnp
        >>> import optax
        >>> from optax_clip import qk_clip
        >>> tx = qk_clip(lambda path, kernel, eta: jnp.sqrt(eta)[:, None], max_logit=100.0)
        >>> params = {"q": jnp.ones((2, 3)), "k": jnp.ones((2, 3))}
        >>> grads = {"q": jnp.zeros((2, 3)), "k": jnp.zeros((2, 3))}
        >>> updates, _ = tx.update(grads, tx.init(params), params, max_logits=jnp.array([50.0, 400.0]))
        >>> print(optax.apply_updates(params, updates)["q"])
        [[1.  1.  1. ]
         [0.5 0.5 0.5]]

    References:
        Kimi Team, 2025, Kimi K2: Open Agentic Intelligence (MuonClip), https://arxiv.org/abs/2507.20534
    """
    _validate.limit(max_logit=max_logit)
    _validate.axis_name(axis_name=axis_name)
    max_logit = owned(max_logit)

    def everywhere(logits: Any) -> Any:
        leaves, treedef = jax.tree.flatten(lax.stop_gradient(logits))  # pmax has no derivative
        names = reduction_axes(axis_name)
        return jax.tree.unflatten(treedef, all_reduce(leaves, [names] * len(leaves), lax.pmax))

    def eta(logits: Array) -> Array:
        limit = jnp.maximum(as_dtype(max_logit, logits.dtype), 0)
        over = logits > limit
        return jnp.where(over, limit / jnp.where(over, logits, 1), 1)

    def gauges(logits: Any, etas: Any, scaled: list[_Scaled]) -> Gauges:
        del scaled
        share = fraction([x < 1 for x in jax.tree.leaves(etas)])
        return {"logits": (_largest(jax.tree.leaves(logits)), share)}

    how = _How(
        factors, "max_logits", "qk_clip", gauges, everywhere, lambda tree: jax.tree.map(eta, tree)
    )
    return _by_signal(how, ("logits", "signals"), name, record)


class _Scaled(NamedTuple):
    """Weights, their update, and the factor that they get."""

    p: Array
    u: Array
    factor: Array


class _How(NamedTuple):
    """Static: what makes factors of a signal, and what is reported of both."""

    factors: Factors
    signal: str
    caller: str
    gauges: Callable[[Any, Any, list[_Scaled]], Gauges]
    everywhere: Callable[[Any], Any] = lambda given: given
    seen: Callable[[Any], Any] = lambda given: given

    def given(self, params: Any, extra: dict[str, Any]) -> Any:
        """The signal in float32, on all devices."""
        _validate.params_given(params, of=self.caller)
        if extra.get(self.signal) is None:
            raise ValueError(
                f"Expected {self.signal} in update of {self.caller}, got none. Call "
                f"tx.update(grads, state, params, {self.signal}=...) with what the forward pass gave."
            )
        return self.everywhere(jax.tree.map(_wide, extra[self.signal]))

    def factor(self, path: str, p: Array, signal: Any) -> Array | None:
        """That of a leaf, beside which it broadcasts; 1 where it is not finite."""
        found = self.factors(path, p, signal)
        if found is None:
            return None
        _validate.real(**{f"factors({path!r}, leaf, {self.signal})": found})
        _settings.fits(jnp.shape(found), p.shape, path, "the factor")
        f = aligned(as_dtype(found, accumulator([p])), p.ndim)
        return jnp.where(jnp.isfinite(f), f, 1)


def _by_signal(
    how: _How, fields: tuple[str, ...], name: str, record: bool
) -> optax.GradientTransformationExtraArgs:
    if not callable(how.factors):
        raise TypeError(
            f"Expected factors to be a callable (path, leaf, signal), got factors={how.factors!r}."
        )
    _validate.record(record)

    def init(params: optax.Params) -> Any:
        del params
        return ()

    def step(updates: optax.Updates, memory: Any, params: Any, **extra: Any) -> tuple[Any, Any, Any]:
        given = how.given(params, extra)
        signal = how.seen(jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, jnp.nan), given))
        scopes, us = Scopes.of(updates, "leaf", axis_name=(), beside=params)
        ps = scopes.leaves_of(params, of=how.caller)
        ps, us = together(ps, us)
        paths = [scopes.paths[i] for i in scopes.places]
        # Once: XLA would form the factors anew for each entry.
        fs = _xla.once([how.factor(*leaf, signal) for leaf in zip(paths, ps, strict=True)])
        scaled = [None if f is None else _Scaled(p, u, f) for p, u, f in zip(ps, us, fs, strict=True)]
        new = [u if each is None else _rescaled(*each) for u, each in zip(us, scaled, strict=True)]

        def report() -> Report:
            gauges = how.gauges(given, signal, [each for each in scaled if each is not None])
            return Report(gauges, {"signals": (True, ~_all_finite(jax.tree.leaves(given)))})

        return scopes.rebuild(updates, new), memory, report

    return transform(name, fields, init, step, record=record, remembers=False)


def _rescaled(p: Array, u: Array, factor: Array) -> Array:
    """The update that takes the weights to ``factor * (p + u)``."""
    reached = add_as_apply_updates(p, u, written=False)
    target = round_toward_zero(scale(widen(reached, factor.dtype), factor), p.dtype)
    landed = land(p, u, target, shrinks=True, written=False)
    return lax.select(broadcast_like(factor == 1, u), u, landed)


def _wide(x: Any) -> Array:
    x = jnp.asarray(x)
    wide: Array = x.astype(accumulator([x]) if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.float32)
    return wide


def _largest(xs: Sequence[Array]) -> Array:
    """The largest entry on any device, 0 if there is none and NaN if one is."""
    some = [x.astype(jnp.float32) for x in xs if x.size]
    axes = [reduction_axes(None, x) for x in some]
    return largest(some, axes, least=-jnp.inf) if some else jnp.float32(0)


def _all_finite(xs: Sequence[Array]) -> Array:
    return fraction([~jnp.isfinite(x) for x in xs]) == 0
