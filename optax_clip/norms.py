"""Measure: the norm of a whole tree, of each leaf, group or unit."""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from optax_clip import _validate, _xla
from optax_clip._mesh import Axes, all_devices_agree, all_reduce, varying_axes
from optax_clip._numerics import accumulator, power_of_two, reciprocal, scale, widen
from optax_clip._trees import Cells, Scopes, shape_of
from optax_clip._validate import AxisName, Groups, Ord, Scope

__all__ = ["global_norm", "groups", "per_layer", "tree_norms"]


class Order(NamedTuple):
    """Which norm: the root of the sum of powers of the entries, or of their mean."""

    power: float
    mean: bool = False

    @classmethod
    def of(cls, ord: Any) -> "Order":
        """That of an argument ``ord``: None, a word or a number >= 1."""
        _validate.static(ord=ord)
        if ord is None or isinstance(ord, str):
            found = ORDERS.get(ord)
        else:
            found = cls(float(ord)) if _validate.is_real(ord) and ord >= 1 else None
        if found is None:
            words = ", ".join(f'"{word}"' for word in ORDERS if word)
            raise ValueError(f"Expected ord to be None, {words} or a number >= 1, got ord={ord!r}.")
        return found


ORDERS = {None: Order(2.0), "rms": Order(2.0, mean=True)}


class Norm(NamedTuple):
    """A norm kept as ``root / scale``, ``scale`` a power of two, so that neither part overflows."""

    root: Array
    scale: Array

    @property
    def value(self) -> Array:
        return self.root / self.scale

    @classmethod
    def of(cls, value: Array, scale: Any = 1) -> "Norm":
        """Normalise to 1 <= root < 2; a norm of 0, and one measured with scale < 1, stay as they are."""
        scale = jnp.asarray(scale, value.dtype)
        inverse = jnp.where((value == 0) | (scale < 1), 1, reciprocal(power_of_two(value)))
        return cls(value * inverse, scale * inverse)

    def exceeds(self, limit: Array) -> Array:
        """Is it above the limit, or the limit NaN?"""
        return ~(self.root <= limit * self.scale)

    def factors(self, limit: Array) -> tuple[Array, Array]:
        """Two numbers whose product is limit / norm; the first is 1 but at the ends of the range."""
        info = jnp.finfo(self.root.dtype)
        # What was shrunk has a root above 2, beside which a small limit would underflow.
        least = float(info.smallest_normal) / self.scale
        unit = jnp.where(self.root > 2, jnp.maximum(reciprocal(power_of_two(self.root)), least), 1)
        root, scale = self.root * unit, self.scale * unit
        ratio = limit / jnp.where(root > 0, root, 1)
        both = ratio * scale
        fits = (both >= info.smallest_normal) & (both <= info.max) | (ratio == 0)
        return jnp.where(fits, 1, scale), jnp.where(fits, both, ratio)


def global_norm(tree: Any, *, ord: Ord = None, axis_name: AxisName = None) -> Array:
    r"""Norm of the whole tree as one vector.

    Unlike a plain root of a sum of squares it neither overflows nor underflows: float16 gradients of
    300, float32 gradients of 1e25 or 1e-30 have their true norm.

    .. math:: \|g\|_p = \Big(\sum_i |g_i|^p\Big)^{1/p}

    Args:
        tree: arrays of any shape and float or complex dtype; complex entries count by modulus. Leaves
            of other dtypes and None are not counted.
        ord: ``None`` or 2, 1, ``math.inf``, any float p >= 1, or ``"rms"`` for the root of the mean
            square. Static.
        axis_name: mapped axes to sum over besides those that the types of the leaves name inside
            `jax.shard_map`; for `jax.pmap`, ``vmap(axis_name=...)`` and ``check_vma=False``.

    Returns:
        A float32 scalar, float64 if a leaf is. 0 for an empty tree; inf or NaN if an entry is, and inf
        where the norm itself is beyond the dtype. The derivative at a zero norm is 0. Entries below the
        smallest normal number count as 0 where the device flushes them, as CPUs do.

    Raises:
        ValueError: if ``ord`` is not one of the above or is a JAX array.

    Examples:
        >>> import jax.numpy as jnp
        >>> from optax_clip import global_norm
        >>> tree = {"w": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)}
        >>> print(global_norm(tree), global_norm(tree, ord=1))
        5.0 7.0
        >>> print(global_norm(jnp.full(4, 1e30)))
        2e+30
    """
    norm: Array = tree_norms(tree, scope="global", ord=ord, axis_name=axis_name)
    return norm


def tree_norms(tree: Any, *, scope: Scope = "leaf", ord: Ord = None, axis_name: AxisName = None) -> Any:
    r"""Norms of the parts of a tree: per leaf, per unit, or over given axes.

    .. math:: \|g_s\|_p = \Big(\sum_{i \in s} |g_i|^p\Big)^{1/p} \quad \text{for each scope } s

    Args:
        tree: arrays of any shape and float or complex dtype.
        scope: which entries share a norm. ``"global"``, ``"leaf"``; ``"unit"`` for one index of the
            last axis, the layout ``(..., in, out)`` of Flax kernels; an int or a tuple of ints for the
            axes that are reduced; `groups`; or a callable ``(path, leaf) -> one of the others but
            "global"``.
        ord: which norm, as in `global_norm`.
        axis_name: mapped axes to sum over, as in `global_norm`. Inside `jax.shard_map` a scope that
            keeps a dimension needs it for leaves that differ between devices (``()`` if each device
            holds whole units).

    Returns:
        A tree like ``tree`` of float32 (float64 if a leaf is) norms, reduced axes kept as size 1, None
        for leaves that are not inexact. With ``scope="global"`` a scalar, with `groups` a dict by label.

    Raises:
        ValueError: for an unknown scope or order, or an axis that a leaf does not have.

    Examples:
        >>> import jax.numpy as jnp
        >>> from optax_clip import tree_norms
        >>> kernel = jnp.array([[3.0, 0.0], [4.0, 2.0]])
        >>> print(tree_norms({"kernel": kernel}, scope="unit")["kernel"])
        [[5. 2.]]
    """
    Order.of(ord)
    _validate.scope(scope)
    _validate.axis_name(axis_name=axis_name)
    scopes, xs = Scopes.of(tree, scope, axis_name)
    return scopes.as_tree([norm.value for norm in measure(scopes, xs, ord)])


def groups(label: Callable[[str, Any], str]) -> Groups:
    r"""A scope in which the leaves of one label share a norm.

    For networks of which one part is trained differently, such as matrices by Muon and all else by
    AdamW, or for one limit each for encoder and decoder. All groups together cost one read and, on
    several devices, one collective.

    .. math:: \|g_l\|_p = \Big(\sum_{i \in l} |g_i|^p\Big)^{1/p} \quad \text{for each label } l

    Args:
        label: ``(path, leaf) -> str``. The path joins keys by "/", such as ``"dense/kernel"``.

    Returns:
        A scope for everything that takes one. `tree_norms` then gives a dict by label, and a clip takes
        one threshold for all or a dict ``label -> threshold``, and reports
        ``{name}/{label}/norm_before``, ``norm_after`` and ``threshold`` beside the metrics of the whole
        tree.

    Raises:
        TypeError: if the label is not callable, or gives something that is not a non-empty string.

    Examples:
        >>> import jax.numpy as jnp
        >>> from optax_clip import groups, tree_norms
        >>> kind = groups(lambda path, leaf: "matrix" if leaf.ndim > 1 else "vector")
        >>> tree = {"kernel": jnp.array([[3.0, 4.0]]), "bias": jnp.array([2.0]), "scale": jnp.zeros(3)}
        >>> norms = tree_norms(tree, scope=kind)
        >>> print(norms["matrix"], norms["vector"])
        5.0 2.0
    """
    if not callable(label):
        raise TypeError(f"Expected label to be callable, got label={label!r}.")
    return Groups(label)


def per_layer(path: str, leaf: Any) -> tuple[int, ...]:
    r"""A scope for stacked layers and experts: one norm for each index of the first axis.

    Such leaves come from `flax.nnx.scan`, `flax.nnx.vmap` and `flax.linen.scan`, where all layers share
    one array, and from mixtures of experts.

    .. math:: \|g_k\|_p = \Big(\sum_{i} |g_{k i}|^p\Big)^{1/p} \quad \text{for each layer } k

    Args:
        path: the path of the leaf; not looked at.
        leaf: an array with a leading axis of layers.

    Returns:
        All axes of the leaf but the first, to be reduced. A leaf of rank 1 has one norm an entry, so
        give leaves that are not stacked another scope.

    Examples:
        >>> import jax.numpy as jnp
        >>> from optax_clip import per_layer, tree_norms
        >>> layers = {"kernel": jnp.array([[[3.0, 4.0]], [[6.0, 8.0]]])}
        >>> print(tree_norms(layers, scope=per_layer)["kernel"].ravel())
        [ 5. 10.]

        Where only some leaves are stacked:

        >>> def scope(path, leaf):
        ...     return per_layer(path, leaf) if path.startswith("layers") else "leaf"
        >>> print(tree_norms({"layers": layers, "head": jnp.array([3.0, 4.0])}, scope=scope)["head"])
        [5.]
    """
    del path
    return tuple(range(1, len(shape_of(leaf))))


def measure(
    scopes: Scopes,
    xs: Sequence[Array],
    ord: Ord,
    *others: Sequence[Array],
    read: Any = lambda x: x,
    unwritten: bool = False,
) -> list[Norm]:
    """The norm of each scope, cell by cell, of what ``read`` makes of each leaf and its ``others``.

    ``unwritten``: a TPU takes the sums of a leaf into the product that makes it, if each is plain.
    """
    (p, mean), dtype = Order.of(ord), accumulator(xs)
    parts = list(zip(xs, *others, strict=True))
    if p == math.inf and not any(map(jnp.iscomplexobj, xs)):
        return [Norm.of(top) for top in scopes.largest([modulus(widen(read(*x), dtype)) for x in parts])]
    if p not in (1, 2):
        return _power_norms(scopes, [read(*x) for x in parts], p, mean=mean)
    powers = Powers(scopes, p, dtype, read)
    ways = {"cpu": functools.partial(_sum_and_again, powers)}
    if unwritten:
        ways["tpu"] = functools.partial(_three_sums, powers, plain=True)
    sums, scales = _xla.by_platform(parts, default=functools.partial(_three_sums, powers), **ways)
    found = _averaged(scopes, sums) if mean else sums
    return [Norm.of(root(s, p), k) for s, k in zip(found, scales, strict=True)]


def _averaged(scopes: Scopes, sums: Cells) -> Cells:
    return [s / jnp.maximum(_like(n, s), 1) for s, n in zip(sums, scopes.counts, strict=True)]


class Powers(NamedTuple):
    """Sums of ``|x|^p`` for p = 1 or 2, of entries as they are, shrunk and grown.

    Squares of float32 are in range times 2^-80 or 2^80, and those of float16 as they are.
    """

    scopes: Scopes
    p: float
    dtype: Any
    read: Callable[..., Array]

    @property
    def ends(self) -> tuple[float, float]:
        """What large entries are shrunk by, and small ones grown."""
        exponent = 5 * int(jnp.finfo(self.dtype).maxexp) // 8
        return 2.0**-exponent, 2.0**exponent

    def sum(self, xs: Sequence[Array]) -> Cells:
        return self.scopes.sum([_power(x, self.p) for x in xs])

    def scales(self, sums: Cells) -> Cells:
        """What brings the entries of a scope into range: 1 where their sum is to be trusted.

        One that is too high is not, and one so low that underflow may have taken 2^-17 of it.
        """
        info, (small, large) = jnp.finfo(self.dtype), self.ends
        floor = 0.0 if self.p == 1 else float(info.smallest_normal) / (64 * float(info.eps))
        scales = []
        for s, n in zip(sums, self.scopes.counts, strict=True):
            grown = jnp.where(s < _like(n, s) * floor, large, 1)
            scales.append(jnp.where(~(s <= info.max), small, grown).astype(self.dtype))
        return scales

    def ways(self, xs: Sequence[Array]) -> list[list[Array]]:
        """What is summed over: the powers of the entries as they are, shrunk and grown."""
        small, large = (jnp.asarray(k, self.dtype) for k in self.ends)
        forms = [xs, [_shrunk(x, small) for x in xs], [_grown(x, large) for x in xs]]
        return [[_power(x, self.p) for x in form] for form in forms]

    def chosen(self, plain: Cells, shrunk: Cells, grown: Cells) -> tuple[Cells, Cells]:
        """Of the three sums of each scope the one in range, and how its entries were scaled."""
        scales = self.scales(plain)
        rows = zip(scales, plain, shrunk, grown, strict=True)
        return [
            jnp.where(k < 1, less, jnp.where(k > 1, more, middle)) for k, middle, less, more in rows
        ], scales


Parts = list[tuple[Array, ...]]  # of each leaf, with what is read beside it


def _always_in_range(parts: Parts) -> bool:
    return all(jnp.finfo(x.dtype).maxexp <= 16 for x, *_ in parts)


def _three_sums(powers: Powers, parts: Parts, *, plain: bool = False) -> tuple[Cells, Cells]:
    """The sums of one read: as they are, shrunk, grown; one of the three is in range."""
    wide = [widen(powers.read(*part), powers.dtype) for part in parts]
    if _always_in_range(parts):
        sums = powers.sum(wide)
        return sums, [jnp.ones_like(s) for s in sums]
    terms = powers.ways(wide)
    return powers.chosen(*(map(powers.scopes.sum, terms) if plain else powers.scopes.sums(terms)))


def _sum_and_again(powers: Powers, parts: Parts) -> tuple[Cells, Cells]:
    """A CPU's fast sum, and where it is not to be trusted a second one with each scope in range.

    There the other two of three sums would each cost a read.
    """

    def read(*part: Array) -> Array:
        x = powers.read(*part)
        # XLA's fast sum takes in no rounding, such as that of a sum of bfloat16.
        made = len(part) > 1 and x.dtype == jnp.bfloat16
        return widen(_xla.once(x) if made else x, powers.dtype)

    plain = powers.sum([read(*_xla.separate_reads(*part)) for part in parts])
    ones = [jnp.ones_like(s) for s in plain]
    if _always_in_range(parts):
        return plain, ones
    scales = powers.scales(plain)
    trusted = [jnp.all(k == 1) for k in scales]

    def again() -> tuple[Cells, Cells]:
        pairs = zip(parts, powers.scopes.per_leaf(scales), strict=True)
        separate = [_xla.separate_reads(*part, k) for part, k in pairs]
        return powers.sum([scale(read(*part), k) for *part, k in separate]), scales

    everywhere = all_devices_agree(_xla.of_all(operator.and_, trusted or [jnp.array(True)]))
    flag = _xla.for_all(lax.stop_gradient(everywhere))
    return _xla.cond(flag, lambda: (plain, ones), again)


# XLA makes (x x) (k k) of (x k) (x k), where a leaf has one entry and k is a constant; k k is 0 or inf.
# So between each product and its square something is cut off.
def _shrunk(x: Array, k: Array) -> Array:
    """``|x| k``, for sums of what is large; at least a number whose square adds nothing to these."""
    least = 2.0 ** (-9 * jnp.finfo(x.dtype).maxexp // 16)
    return _by_part(lambda part: jnp.maximum(modulus(part * k), least), x)


def _grown(x: Array, k: Array) -> Array:
    """``x k``, for sums of what is small; at most a number whose square does not overflow."""
    most = jnp.asarray(2.0 ** (3 * jnp.finfo(x.dtype).maxexp // 8), k.dtype)
    return _by_part(lambda part: lax.clamp(-most, part * k, most), x)


def _by_part(change: Callable[[Array], Array], x: Array) -> Array:
    return lax.complex(change(x.real), change(x.imag)) if jnp.iscomplexobj(x) else change(x)


def _power_norms(scopes: Scopes, xs: Sequence[Array], p: float, *, mean: bool) -> list[Norm]:
    """High powers are in range relative to the largest entry, whose power of two is kept apart.

    So is a complex entry, whose modulus may overflow.
    """
    wide = [widen(x, accumulator(xs)) for x in xs]
    peaks = scopes.max([jnp.abs(lax.stop_gradient(x)) for x in wide])
    scales = [reciprocal(power_of_two(peak)) for peak in peaks]
    tops = [peak * k for peak, k in zip(peaks, scales, strict=True)]
    tops = [jnp.where((top > 0) & (top < jnp.inf), top, 1) for top in tops]
    columns = scopes.per_leaf(scales), scopes.per_leaf([1 / top for top in tops])
    terms = [_power(scale(x, *factors), p) for x, *factors in zip(wide, *columns, strict=True)]
    sums = scopes.largest(terms) if p == math.inf else scopes.sum(terms)
    sums = _averaged(scopes, sums) if mean else sums
    return [Norm(root(s, p) * top, k) for s, top, k in zip(sums, tops, scales, strict=True)]


def total(scopes: Scopes, values: Cells, ord: Ord) -> Array:
    """The norm of the whole tree from the norms of its scopes."""
    if scopes.is_global:
        return values[0]
    (p, mean), names = Order.of(ord), [varying_axes(v) for v in values]
    if p == math.inf:
        return largest(values, names)

    def pool(terms: Cells) -> Array:
        return _xla.of_all(operator.add, all_reduce([jnp.sum(t) for t in terms], names, lax.psum))

    peaks = all_reduce([jnp.max(v, initial=0) for v in values], names, lax.pmax)
    peak = _xla.of_all(jnp.maximum, peaks)
    peak = jnp.where((peak > 0) & (peak < jnp.inf), peak, 1)
    scaling = reciprocal(power_of_two(peak))
    top = peak * scaling
    terms = [_power(v * scaling / top, p) for v in values]
    if mean:
        sizes = [
            jnp.broadcast_to(_like(n, v), v.shape) for n, v in zip(scopes.counts, values, strict=True)
        ]
        average = pool([t * n for t, n in zip(terms, sizes, strict=True)]) / jnp.maximum(pool(sizes), 1)
        return top * root(average, p) / scaling
    return top * root(pool(terms), p) / scaling


def largest(xs: Sequence[Array], axes: Sequence[Axes], least: float = 0) -> Array:
    """The largest entry of some arrays on all devices that hold a part of them; NaN if one is."""
    tops = [jnp.max(x, initial=least) for x in xs] or [jnp.float32(least)]
    flags = [jnp.max(jnp.isnan(x), initial=False).astype(x.dtype) for x in xs] or [jnp.float32(0)]
    both = all_reduce([*tops, *flags], [*axes, *axes], lax.pmax)
    top, flag = (_xla.of_all(jnp.maximum, part) for part in (both[: len(tops)], both[len(tops) :]))
    return jnp.where(flag > 0, jnp.nan, top)


def all_finite(norms: Sequence[Norm]) -> Array:
    """Is every entry finite? A finite norm beyond the dtype still has a finite root.

    A maximum, not `all`: XLA joins it with the other maxima into one all-reduce.
    """
    finite = [
        jnp.max((~jnp.isfinite(norm.root)).astype(norm.root.dtype), initial=0) == 0 for norm in norms
    ]
    return all_devices_agree(_xla.of_all(operator.and_, finite or [jnp.array(True)]))


def _like(count: Any, x: Array) -> Array:
    return jnp.asarray(count, x.dtype)


def _power(x: Array, p: float) -> Array:
    """``|x|^p``, with derivatives of 0 at 0 in every order but the square's own."""
    if p == 2:
        return square_of(x)
    y = modulus(x)
    if p in (1, math.inf):
        return y
    zero = y == 0
    return jnp.where(zero, 0, jnp.where(zero, 1, y) ** p)


def square_of(x: Array) -> Array:
    """``|x|^2``."""
    return lax.mul(x, x) if not jnp.iscomplexobj(x) else x.real * x.real + x.imag * x.imag


def modulus(x: Array) -> Array:
    """``|x|``, with a derivative of 0 at 0, where that of `jnp.abs` is 1."""
    return jnp.abs(x) if jnp.iscomplexobj(x) else x * lax.stop_gradient(jnp.sign(x))


def root(x: Array, p: float = 2) -> Array:
    """``x^(1/p)``, with a derivative of 0 at 0, inf and NaN."""
    if p in (1, math.inf):
        return x
    still = (x == 0) | ~jnp.isfinite(x)
    y = jnp.where(still, 1, x)
    return jnp.where(still, lax.stop_gradient(x), jnp.sqrt(y) if p == 2 else y ** (1 / p))
