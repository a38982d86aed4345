"""What a set is, and what the sets share."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike

from optax_clip import _settings, _validate, norms
from optax_clip._geometry.intervals import Bounds
from optax_clip._landing import add_as_apply_updates
from optax_clip._mesh import place_like, reduction_axes, share, varying_axes
from optax_clip._numerics import accumulator, as_dtype, widen
from optax_clip._settings import Initial, Setting
from optax_clip._trees import Cells, Scopes
from optax_clip._validate import AxisName, Groups, Ord, Scope
from optax_clip._values import owned
from optax_clip.norms import Norm, measure, total

__all__ = ["Constraint", "initial"]


# Optax calls a set there as if it were a schedule.
STATIC = " If this came from optax.inject_hyperparams, pass static_args=('constraint',)."


# What a norm set does to each leaf, with which numbers, and how far that moves the tree and which share.
Factors = tuple[Callable[..., Array], Sequence[Sequence[Array]], Callable[[], tuple[Array, Array]]]
Mapped = tuple[list[Array], Any, Callable[[], Array]]  # gradients, memory, which share was changed


class Constraint(NamedTuple):
    """A closed set of weights: how to get into it, how far a point is outside, and how to land.

    A projection and a distance make a set. The sets of this package say more: how they act on a leaf
    is data, ``bounds`` or ``factors``, which `project_weights` lands by.

    Args:
        nearest: ``params -> params``, the projection, in the dtype of each leaf. A leaf that is inside
            comes back bit for bit.
        excess: ``params -> scalar``, how far outside; 0 inside.
        shrinks: on which side of its target an update ends up that misses it by a rounding. True: nearer
            to 0, for sets that stay sets when entries shrink. False: further inside. None: on either,
            for sets without an inside, like a sphere.
        move: ``(params, memory, beside) -> (params, memory)``, the projection of a set that remembers.
            ``beside`` are all weights, as ``init`` saw them; those without an update are None in
            ``params``.
        init: ``params -> memory``, what `project_weights` keeps for a set that remembers.
        bounds: ``(params, memory, beside) -> [(lower, upper), ...]`` for a set that bounds each entry:
            those of each float leaf, arrays that broadcast to it and numbers of its dtype. They may
            depend on the shapes of the weights. A complex leaf has bounds on its modulus, in the dtype
            of a part.
        factors: ``(params, memory, beside, *updates) -> (apply, rows, report)`` for a set that rescales
            what the updates lead to, or without updates the weights: ``apply(leaf, *row)`` is the
            projection of a leaf, whose row holds numbers that broadcast to it; ``report()`` says how
            far the tree moves, and which share of its entries.
        axis_name: mapped axes that the metrics are summed over, as in `global_norm`.
        scope: which entries the set couples; `gradient_mapping` looks ahead in each scope by a step of
            its own.
        mapped: ``(params, grads, memory, beside, reach) -> (grads, memory, share)``, the gradient
            mapping, for a set that knows better than by the difference of two points: what is left of
            each float gradient, in its dtype; ``share()`` is that of the entries that were changed.

    Examples:
        Weights on multiples of 1/8:

        >>> import jax
        >>> import jax.numpy as jnp
        >>> from optax_clip import Constraint, project
        >>> def nearest(params):
        ...     return jax.tree.map(lambda x: jnp.round(x * 8) / 8, params)
        >>> grid = Constraint(nearest, lambda params: jnp.abs(nearest(params) - params).max())
        >>> print(project(jnp.array([0.3, -0.9]), grid))
        [ 0.25  -0.875]
    """

    nearest: Callable[[optax.Params], optax.Params]
    excess: Callable[[optax.Params], Array]
    shrinks: bool | None = False
    move: Callable[[optax.Params, Any, Any], tuple[optax.Params, Any]] | None = None
    init: Callable[[optax.Params], Any] | None = None
    bounds: Callable[[optax.Params, Any, Any], list[Bounds]] | None = None
    factors: Callable[..., Factors] | None = None
    axis_name: AxisName = None
    scope: Scope = "global"
    mapped: Callable[[optax.Params, optax.Updates, Any, optax.Params, Array], Mapped] | None = None

    def __call__(self, params: optax.Params) -> optax.Params:
        """The projection, so that a set is itself a callable ``params -> params``."""
        return self.nearest(params)


def initial(kappa: ArrayLike = 1.0) -> Initial:
    r"""A radius relative to the weights at the start: κ times the norm of each scope at init.

    For training on the sphere of the initial norms (Hyperball) and for bounds that follow the
    initialisation. `project_weights` keeps the norms that its ``init`` saw.

    .. math:: r_s = \kappa \|w_s^{(0)}\|

    Args:
        kappa: the factor κ >= 0, a number or a 0-d array.

    Returns:
        A radius or bound for `norm_ball`, `norm_sphere`, `norm_shell` and `spectral_ball`, in the order
        and the scope of the set. The norms are float32. A scope of zeros at init is left free. From an
        ``init`` on `jax.ShapeDtypeStruct` the norms are NaN, to be filled from a checkpoint. `project`
        and `violation`, which know of no start, raise `ValueError`.

    Raises:
        ValueError: for a negative, infinite or NaN kappa.
        TypeError: if kappa is not a number.

    Examples:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from optax_clip import initial, norm_sphere, project_weights
        >>> tx = optax.chain(optax.sgd(1.0), project_weights(norm_sphere(initial())))
        >>> params = jnp.array([3.0, 4.0])
        >>> updates, _ = tx.update(jnp.array([3.0, -4.0]), tx.init(params), params)
        >>> print(optax.apply_updates(params, updates))
        [0. 5.]

    References:
        Wen et al., 2025, Fantastic pretraining optimizers and where to find them,
        https://arxiv.org/abs/2509.02046; Hyperball: https://whenwen.github.io/wd_blog
    """
    _validate.at_least(0, kappa=kappa)
    _validate.finite(kappa=kappa)
    return Initial(owned(kappa))


class NormBounds(NamedTuple):
    """The bounds of a norm set, each number a scope, and the norms they are compared with."""

    scope: Scope
    axis_name: AxisName
    ord: Ord
    settings: Mapping[str, Setting | Initial]
    upper: str  # the name of the upper bound among the settings
    lower: str = ""  # and of the lower one, if there is one

    @property
    def remembers(self) -> bool:
        return any(isinstance(value, Initial) for value in self.settings.values())

    def init(self, params: optax.Params) -> dict[str, Array]:
        """The norms at the start, one vector for each bound that is relative to them.

        Where leaves share a norm it is kept leaf by leaf, as not all of them may have an update.
        """
        shared = self.scope == "global" or isinstance(self.scope, Groups)
        scopes, xs = Scopes.of(params, "leaf" if shared else self.scope, axis_name=())
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in xs):
            norms = jnp.full(scopes.memory, jnp.nan, jnp.float32)
        else:
            norms = scopes.join([n.value for n in measure(scopes, xs, self.ord)]).astype(jnp.float32)
        names = [name for name, value in self.settings.items() if isinstance(value, Initial)]
        return place_like({name: jnp.copy(norms) for name in names}, params)

    def per_leaf(self, scopes: Scopes, xs: Sequence[Array], memory: Any) -> list[Any]:
        """The upper bound of each leaf, as precise as it was given; inf where a scope is left free."""
        value: Any = self.settings[self.upper]
        if not isinstance(value, Initial):
            given = _settings.per_home(scopes, xs, **{self.upper: value})
            return [jnp.maximum(x, 0) if isinstance(x, Array) else x for x in given]
        like = [norm.root for norm in measure(scopes, xs, self.ord)]
        return scopes.per_leaf(self.highs(scopes, xs, like, memory))

    def cut(
        self, params: optax.Params, beside: Any = None, *updates: optax.Updates
    ) -> tuple[Scopes, list[Array], list[Norm]]:
        """The norms of the weights, or of where updates take them."""
        scopes, xs = Scopes.of(params, self.scope, self.axis_name, beside=beside)
        others = [scopes.leaves_of(tree, of="project_weights") for tree in updates]
        read = add_as_apply_updates if updates else lambda x: x
        return scopes, xs, measure(scopes, xs, self.ord, *others, read=read)

    def highs(self, scopes: Scopes, xs: Sequence[Array], like: Cells, memory: Any) -> Cells:
        """The upper bound, cell by cell; inf where a scope is left free, since it was 0 at the start."""
        highs, value = self._read(self.upper, scopes, xs, like, memory), self.settings[self.upper]
        if not isinstance(value, Initial):
            return highs
        relative = as_dtype(value.kappa, like[0].dtype) > 0
        return [jnp.where((high == 0) & relative, jnp.inf, high) for high in highs]

    def lows(self, scopes: Scopes, xs: Sequence[Array], like: Cells, memory: Any) -> Cells:
        """The lower bound, cell by cell; 0 where there is none."""
        if not self.lower:
            return [jnp.zeros_like(x) for x in like]
        return self._read(self.lower, scopes, xs, like, memory)

    def _read(self, name: str, scopes: Scopes, xs: Sequence[Array], like: Cells, memory: Any) -> Cells:
        value: Any = self.settings[name]
        if not isinstance(value, Initial):
            return _settings.per_scope(scopes, xs, like, **{name: value})
        norms = _at_start(scopes, memory[name], like, self.ord)
        norms = [x.astype(y.dtype) for x, y in zip(norms, like, strict=True)]
        return [jnp.maximum(jnp.asarray(value.kappa, x.dtype), 0) * x for x in norms]


def _at_start(scopes: Scopes, memory: Array, like: Cells, ord: Ord) -> Cells:
    """The norms at the start of what is there now."""
    if not scopes.is_global and scopes.labels is None:
        return scopes.split(memory, like)
    leaves = [memory[i] for i in scopes.places]
    whole = scopes._replace(axes=((),) * len(leaves), mapped=((),) * len(leaves))
    return [norm.value for norm in measure(whole, leaves, ord)]


def at_start_only(constraint: Constraint, name: str, value: Any) -> Constraint:
    """A set relative to the start, of which `project` and `violation` know nothing."""

    def raises(params: optax.Params) -> Any:
        del params
        raise ValueError(
            "Expected a set relative to the start inside project_weights, whose state holds it, as "
            f"project and violation know of none, got {name}={value!r}.{STATIC}"
        )

    return constraint._replace(nearest=raises, excess=raises)


def remembering(bounds: NormBounds, constraint: Constraint) -> Constraint:
    """With the norms at the start, if it needs them."""
    if not bounds.remembers:
        return constraint
    name = bounds.upper
    return at_start_only(constraint._replace(init=bounds.init), name, bounds.settings[name])


def as_constraint(constraint: Any) -> Constraint:
    """A set as it is; a callable ``params -> params`` with the distance it moves as violation."""
    if isinstance(constraint, Constraint):
        return constraint
    if not callable(constraint):
        hint = STATIC if isinstance(constraint, jax.Array) else ""
        raise TypeError(
            "Expected constraint to be a set or a callable params -> params, got "
            f"constraint={constraint!r}.{hint}"
        )

    def nearest(params: optax.Params) -> optax.Params:
        scopes, _, new = _moved(constraint, params)
        moved: optax.Params = scopes.rebuild(params, new)
        return moved

    def excess(params: optax.Params) -> Array:
        _, xs, new = _moved(constraint, params)
        return largest([_distance(y, x) for x, y in zip(xs, new, strict=True)])

    return Constraint(nearest, excess)


def _moved(constraint: Any, params: optax.Params) -> tuple[Scopes, list[Array], list[Array]]:
    """The floats, which alone a callable is given, and what it makes of them."""
    scopes, xs = Scopes.of(params, "leaf", axis_name=())
    part = scopes.alone(xs)
    new = _called(constraint, part)
    if isinstance(new, Constraint):
        raise TypeError(
            f"Expected constraint to be a set, got constraint={constraint!r}, which makes one: "
            f"call it, as in norm_ball(1.0).{STATIC}"
        )
    _same_shapes(constraint, new, part)
    pairs = zip(xs, jax.tree.leaves(new), strict=True)
    return scopes, xs, [jnp.asarray(y).astype(x.dtype) for x, y in pairs]


def _called(constraint: Any, params: Any) -> Any:
    try:
        return constraint(params)
    except Exception as error:
        error.add_note(
            f"Raised by constraint={constraint!r}, which is called with the tree of all weights, not "
            "leaf by leaf."
        )
        raise


def _same_shapes(constraint: Any, new: Any, params: Any) -> None:
    """The callable gives back a tree like the weights."""
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (new, params)]
    structures: list[Any] = [jax.tree.structure(tree) for tree in (new, params)]
    if structures[0] != structures[1] or shapes[0] != shapes[1]:
        raise ValueError(
            "Expected constraint to map the tree of all weights to one of the same structure and "
            f"shapes, got {shapes[0]} for {shapes[1]} from constraint={constraint!r}."
        )


def entries_moved(scopes: Scopes, moved: Cells) -> Array:
    """The share of entries in the scopes that were moved, wherever they are."""
    pairs = [(x.astype(jnp.float32), n) for x, n in zip(moved, scopes.counts, strict=True)]
    counts = [jnp.sum(x * jnp.asarray(n, jnp.float32)) for x, n in pairs]
    sizes = [np.sum(np.broadcast_to(n, x.shape)) for x, n in pairs]
    return share([varying_axes(x) for x in moved], counts, sizes)


def moved_by(scopes: Scopes, gaps: Cells, moved: Cells) -> Callable[[], tuple[Array, Array]]:
    """The report of a set that moves the norm of each scope by some gap."""
    return lambda: (total(scopes, gaps, None).astype(jnp.float32), entries_moved(scopes, moved))


def largest(xs: Sequence[Any], axis_name: AxisName = None) -> Array:
    """The largest entry of some arrays on all devices, 0 if there is none and NaN if one is."""
    axes = [reduction_axes(axis_name, x) for x in xs]
    return norms.largest([x.astype(jnp.float32) for x in xs], axes)


def require_real(scopes: Scopes, xs: Sequence[Array], *, of: str) -> None:
    for i, x in zip(scopes.places, xs, strict=True):
        if jnp.iscomplexobj(x):
            raise ValueError(
                f"Expected real weights in a {of}, got {x.dtype} at "
                f"{scopes.paths[i]!r} of shape {x.shape}."
            )


def _distance(x: Array, y: Array) -> Array:
    wide = accumulator([y])
    return jnp.abs(widen(x, wide) - widen(y, wide))
