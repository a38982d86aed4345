"""Every public transform, one row each: `tests/test_contract.py` puts each row through the same checks.

A new transform is not done before its row is here. Most are one line:

    Row("autoclip", autoclip, {"percentile": 10}, number="percentile"),
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

import optax_clip as oc


class Row(NamedTuple):
    """One transform and what the checks need to know about it."""

    id: str
    factory: Callable[..., optax.GradientTransformationExtraArgs]
    kwargs: dict[str, Any]
    # An argument that may be traced or mapped over; for a set, the set as a function of its number.
    number: str | Callable[[Any], oc.Constraint] | None = None
    # What `inject_hyperparams` must not take for a schedule or trace.
    static_args: tuple[str, ...] = ()
    needs_params: bool = False
    # Each entry depends on no other.
    elementwise: bool = False
    # What is inside the bounds comes back bit for bit.
    only_outside: bool = True
    # What two programs may differ by; a decomposition tells no more.
    atol: float = 1e-6
    # The smallest rank of a leaf: 1 where an axis is named.
    min_rank: int = 0
    # The limit is a constant to derivatives, but depends on the gradient of the same step.
    constant_limit: bool = True
    # The state depends on shapes and dtypes alone, so that `init` needs no arrays.
    abstract: bool = True
    # What a NaN turns the updates into.
    spoilt: float = math.nan
    # Its metrics count steps.
    counts: bool = True
    # Its metrics speak of a signal, which is there without weights.
    measures_signal: bool = False
    # "standard" for other people's code that mixes dtypes.
    promotion: str = "strict"
    # The number that `kwargs` has, where it is inside a set.
    at: float | None = None

    @property
    def numbers(self) -> tuple[float, float, float]:
        """Its own number between a smaller and a larger one."""
        own = self.kwargs[self.number] if isinstance(self.number, str) else self.at or 1.0
        return own / 4, own, min(own * 4, 100.0)

    def make(self, number: Any = None) -> optax.GradientTransformationExtraArgs:
        """The transform, with another number if one is given."""
        kwargs = dict(self.kwargs)
        if callable(self.number) and number is not None:
            kwargs["constraint"] = self.number(number)
        elif number is not None:
            kwargs[self.number] = number
        return self.factory(**kwargs)


def weights(id: str, constraint: Any, at: Any = None, every: int = 1, **more: Any) -> Row:
    """A row for a set, or for ``constraint(at)``: then ``at`` is the number to vary."""
    kwargs = {"constraint": constraint if at is None else constraint(at), "every": every}
    number = None if at is None else constraint
    more = {"number": number, "at": at, "static_args": ("constraint",), "needs_params": True, **more}
    return Row(id, oc.project_weights, kwargs, **more)


def mapping(id: str, constraint: Any, at: Any, **more: Any) -> Row:
    """A row for the gradient mapping of the set ``constraint(at)``."""
    more = {"number": constraint, "static_args": ("constraint",), "needs_params": True, **more}
    return Row(id, oc.gradient_mapping, {"constraint": constraint(at)}, **more)


def told(factory: Callable[..., Any], **signals: Any) -> Callable[..., Any]:
    """A factory of transforms whose update is always given some extra arguments."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
        tx = factory(*args, **kwargs)

        def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
            return tx.update(updates, state, params, **{**signals, **extra})

        return optax.GradientTransformationExtraArgs(tx.init, update)

    return make


def by_first_head(path: str, leaf: Any, eta: Any) -> Any:
    """Biases alone, where there is a kernel beside them, are left alone."""
    return None if path.endswith("bias") else jnp.sqrt(eta["heads"][0])


def by_kind(path: str, leaf: Any) -> str:
    """A scope that differs from leaf to leaf."""
    return "unit" if path.endswith("kernel") else "leaf"


def by_role(path: str, leaf: Any) -> str:
    return "kernels" if path.endswith("kernel") else "rest"


def halving(step: Any) -> Any:
    return 1.0 / (1.0 + jnp.asarray(step).astype(jnp.float32))


# A limit of half the largest norm seen so far, and 1 at first.
half_of_largest = oc.ThresholdRule(
    lambda norms: jnp.full_like(norms, 2.0),
    lambda norms, last, *_: (last / 2, jnp.maximum(last, jnp.nan_to_num(norms, posinf=0.0))),
)

# Each in every scope, with so short a memory that three steps show all of it.
RULES = {
    "window_quantile": oc.window_quantile(0.5, window=2),
    "window_zscore": oc.window_zscore(0.5, window=2),
    "running_quantile": oc.running_quantile(0.5, rate=0.5, warmup=1),
    "zscore": oc.zscore(1.0, warmup=1),
    "ema_ratio": oc.ema_ratio(1.05, warmup=2),
}
SCOPES = ("global", "leaf", "unit")


def rule(id: str, threshold: oc.ThresholdRule, scope: str) -> Row:
    return Row(
        id,
        oc.clip_by_norm,
        {"threshold": threshold, "scope": scope},
        only_outside=False,
        constant_limit="ema" not in id,
    )


ROWS = (
    Row("clip_by_value", oc.clip_by_value, {"limit": 0.5}, number="limit", elementwise=True),
    Row(
        "clip_by_value, lower",
        oc.clip_by_value,
        {"limit": 0.5, "lower": -0.25},
        number="limit",
        elementwise=True,
    ),
    Row("clip_by_global_norm", oc.clip_by_global_norm, {"max_norm": 1.0}, number="max_norm"),
    Row(
        "clip_by_global_norm, ord=1, zero",
        oc.clip_by_global_norm,
        {"max_norm": 1.0, "ord": 1, "nonfinite": "zero"},
        number="max_norm",
        static_args=("ord",),
        spoilt=0.0,
    ),
    Row("clip_by_norm, leaf", oc.clip_by_norm, {"threshold": 1.0}, number="threshold"),
    Row("clip_by_norm, unit", oc.clip_by_norm, {"threshold": 1.0, "scope": "unit"}, number="threshold"),
    Row(
        "clip_by_norm, axes",
        oc.clip_by_norm,
        {"threshold": 1.0, "scope": (0,)},
        number="threshold",
        min_rank=1,
    ),
    Row(
        "clip_by_norm, callable",
        oc.clip_by_norm,
        {"threshold": 1.0, "scope": by_kind},
        number="threshold",
        static_args=("scope",),
    ),
    Row("clip_by_norm, schedule", oc.clip_by_norm, {"threshold": halving}),
    Row("clip_by_norm, rule", oc.clip_by_norm, {"threshold": half_of_largest}),
    Row("clip_by_norm, rule, unit", oc.clip_by_norm, {"threshold": half_of_largest, "scope": "unit"}),
    Row("normalize_by_norm", oc.normalize_by_norm, {"norm": 1.0}, number="norm", only_outside=False),
    *(rule(f"{kind}, {scope}", each, scope) for kind, each in RULES.items() for scope in SCOPES),
    Row(
        "relative_to_params",
        oc.clip_by_norm,
        {"threshold": oc.relative_to_params(0.5)},
        needs_params=True,
    ),
    Row("adaptive_grad_clip", oc.adaptive_grad_clip, {"ratio": 0.5}, number="ratio", needs_params=True),
    Row(
        "autoclip",
        oc.autoclip,
        {"percentile": 50},
        number="percentile",
        static_args=("window",),
        only_outside=False,
    ),
    Row("zclip", oc.zclip, {"z": 1.0, "warmup": 1}, number="z"),
    Row(
        "adagc",
        oc.adagc,
        {"ratio": 1.05, "warmup": 2},
        number="ratio",
        only_outside=False,
        constant_limit=False,
    ),
    Row("clip_by_update_rms", oc.clip_by_update_rms, {"max_rms": 1.0}, number="max_rms"),
    Row(
        "skip_spikes",
        oc.skip_spikes,
        {"inner": optax.identity(), "rule": 1.0},
        number="rule",
        spoilt=0.0,
    ),
    Row(
        "skip_spikes, rule",
        oc.skip_spikes,
        {"inner": optax.identity(), "rule": oc.zscore(1.0, warmup=1)},
        only_outside=False,
        spoilt=0.0,
    ),
    Row(
        "clip_by_norm, groups",
        oc.clip_by_norm,
        {"threshold": 1.0, "scope": oc.groups(by_role)},
        number="threshold",
        static_args=("scope",),
    ),
    Row(
        "record_norms",
        oc.record_norms,
        {"scope": oc.groups(by_role)},
        static_args=("scope", "of"),
        elementwise=True,
        counts=False,
    ),
    Row(
        "skip_spikes, value rule",
        told(oc.skip_spikes, value=1.0),
        {
            "inner": optax.identity(),
            "rule": 1.0,
            "value_rule": oc.window_zscore(3.0, window=4),
        },
        spoilt=0.0,
    ),
    Row(
        "clip_singular_values",
        oc.clip_singular_values,
        {"threshold": 1.0},
        number="threshold",
        constant_limit=False,
        atol=2e-5,
    ),
    Row(
        "rescale_weights",
        told(oc.rescale_weights, peak=8.0),
        {"factors": lambda path, leaf, peak: 2.0 / jnp.maximum(peak, 2.0), "signal": "peak"},
        static_args=("factors",),
        needs_params=True,
        elementwise=True,
        only_outside=False,
    ),
    Row(
        "qk_clip",
        told(oc.qk_clip, max_logits={"heads": np.array([4.0, -2.0], np.float32)}),
        {"factors": by_first_head, "max_logit": 2.0},
        number="max_logit",
        static_args=("factors",),
        needs_params=True,
        elementwise=True,
        only_outside=False,
        measures_signal=True,
    ),
    weights("box", lambda upper: oc.box(-0.5, upper), at=0.5, elementwise=True),
    weights("box, every=2", oc.box(-0.5, 0.5), every=2, elementwise=True),
    weights("non_negative", oc.non_negative(), elementwise=True),
    weights("norm_ball", oc.norm_ball, at=1.0),
    weights("norm_ball, inf", lambda r: oc.norm_ball(r, ord=math.inf), at=0.5, elementwise=True),
    weights("norm_ball, unit", lambda r: oc.norm_ball(r, scope="unit"), at=1.0),
    weights("norm_sphere", oc.norm_sphere, at=1.0, only_outside=False),
    weights(
        "norm_sphere, initial",
        lambda k: oc.norm_sphere(oc.initial(k)),
        at=0.5,
        only_outside=False,
        abstract=False,
    ),
    weights(
        "norm_ball, initial, inf",
        lambda k: oc.norm_ball(oc.initial(k), ord=math.inf),
        at=0.5,
        elementwise=True,
        only_outside=False,
        abstract=False,
    ),
    weights("norm_ball, 1", lambda r: oc.norm_ball(r, ord=1), at=1.0),
    weights("norm_ball, 1, unit", lambda r: oc.norm_ball(r, ord=1, scope="unit"), at=1.0),
    weights(
        "norm_ball, 1, global",
        lambda r: oc.norm_ball(r, ord=1, scope="global"),
        at=1.0,
        only_outside=False,
    ),
    weights("norm_shell", lambda r: oc.norm_shell(0.125, r), at=1.0, only_outside=False),
    weights("simplex", oc.simplex, at=1.0, only_outside=False),
    weights("simplex, unit", lambda r: oc.simplex(r, scope="unit"), at=1.0, only_outside=False),
    weights("spectral_ball", oc.spectral_ball, at=1.0, constant_limit=False, atol=2e-5),
    weights("spectral_ball, power", oc.spectral_ball(1.0, power_iterations=2), constant_limit=False),
    weights("init_box", oc.init_box, at=2.0, elementwise=True, only_outside=False, abstract=False),
    Row(
        "mask_outward",
        oc.mask_outward,
        {"constraint": oc.box(-0.5, 0.25)},
        static_args=("constraint",),
        needs_params=True,
        elementwise=True,
    ),
    mapping("gradient_mapping, box", lambda r: oc.box(-0.5, r), at=0.5, elementwise=True),
    mapping("gradient_mapping, norm_ball", oc.norm_ball, at=1.0),
    mapping(
        "gradient_mapping, norm_sphere, unit",
        lambda r: oc.norm_sphere(r, scope="unit"),
        at=1.0,
        only_outside=False,
    ),
    mapping("gradient_mapping, simplex", oc.simplex, at=1.0, only_outside=False, constant_limit=False),
    weights("simplex, upper", lambda r: oc.simplex(r, upper=2.0), at=1.0, only_outside=False),
    mapping("gradient_mapping, init_box", oc.init_box, at=2.0, elementwise=True, abstract=False),
    Row(
        "constrained",
        oc.constrained,
        {"inner": optax.identity(), "constraint": oc.norm_ball(1.0)},
        number=oc.norm_ball,
        static_args=("constraint",),
        needs_params=True,
    ),
    weights("optax.projections", optax.projections.projection_l2_ball, promotion="standard"),
)

BY_ID = {row.id: row for row in ROWS}

# Rows with no part that another has not: a rule in one more scope, a set, a call by another name. They
# are traced, run outside of jit and held to their oracles like all, and compiled in `make test-full`. A
# new row is not here.
OF_A_KIND = {
    "clip_by_norm, axes": "clip_by_norm, unit",
    "clip_by_norm, callable": "clip_by_norm, groups",
    "clip_by_norm, rule, unit": "clip_by_norm, rule",
    "window_quantile, leaf": "window_quantile, global",
    "window_quantile, unit": "zscore, unit",
    "window_zscore, global": "window_zscore, leaf",
    "window_zscore, unit": "zscore, unit",
    "running_quantile, global": "zscore, global",
    "running_quantile, leaf": "running_quantile, unit",
    "ema_ratio, global": "ema_ratio, leaf",
    "ema_ratio, unit": "ema_ratio, leaf",
    "adaptive_grad_clip": "relative_to_params",
    "autoclip": "window_quantile, global",
    "zclip": "zscore, global",
    "adagc": "ema_ratio, leaf",
    "clip_by_update_rms": "clip_by_norm, leaf",
    "non_negative": "box",
    "norm_ball, inf": "box",
    "norm_ball, initial, inf": "init_box",
    "norm_ball, 1, unit": "norm_ball, 1",
    "norm_ball, 1, global": "norm_ball, 1",
    "simplex, unit": "simplex",
    "optax.projections": "norm_ball",
}
KINDS = tuple(row for row in ROWS if row.id not in OF_A_KIND)

# The same program as another call.
CALLS = {
    "clip_by_global_norm": lambda: oc.clip_by_norm(1.0, scope="global"),
    "adaptive_grad_clip": lambda: oc.clip_by_norm(oc.relative_to_params(0.5), scope=by_kind),
    "autoclip": lambda: oc.clip_by_norm(oc.window_quantile(0.5, window=1000), scope="global"),
    "zclip": lambda: oc.clip_by_norm(oc.zscore(1.0, warmup=1), scope="global"),
    "adagc": lambda: oc.clip_by_norm(oc.ema_ratio(1.05, warmup=2, max_norm=1.0), scope="leaf"),
    "clip_by_update_rms": lambda: oc.clip_by_norm(1.0, scope="leaf", ord="rms"),
    "non_negative": lambda: oc.project_weights(oc.box(0.0, math.inf)),
}
