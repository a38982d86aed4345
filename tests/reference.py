"""Oracles in float64 NumPy, written from the formulas of the design and the papers, not the code.

Trees are flat: a dict ``{name: array}`` or a list of arrays. A leaf is an array or scalar of any
dtype, or ``None`` (no gradient). Leaves that are not inexact (``None``, int, bool, float0) pass
through untouched and count nowhere. Inexact leaves come back as float64 or complex128.

Three rooms: measure and clip (trees), threshold rules (classes fed one array of norms a step),
sets (projection and violation). The ``published_*`` functions at the end transcribe what the
authors' own programs do, their weaknesses included, for comparison tables.
"""

import math
from types import SimpleNamespace

import ml_dtypes
import numpy as np

# --- Trees ----------------------------------------------------------------------------------------


def is_inexact(leaf):
    """Whether a leaf is real or complex floating point, the 16- and 8-bit float dtypes included."""
    if leaf is None:
        return False
    dtype = np.asarray(leaf).dtype
    if dtype.kind in "fc":
        return True
    try:
        ml_dtypes.finfo(dtype)
    except (ValueError, TypeError, KeyError):
        return False
    return True


def wide(leaf):
    """The leaf as float64, or complex128 where it is complex; the values are the same."""
    x = np.asarray(leaf)
    return x.astype(np.complex128 if x.dtype.kind == "c" else np.float64)


def items(leaves):
    """``(path, leaf)`` pairs; the path of a list entry is its index as a string."""
    if isinstance(leaves, dict):
        return list(leaves.items())
    return [(str(i), leaf) for i, leaf in enumerate(leaves)]


def inexact_items(leaves):
    """``(path, float64 leaf)`` for the inexact leaves only."""
    return [(path, wide(leaf)) for path, leaf in items(leaves) if is_inexact(leaf)]


def rebuild(leaves, new, otherwise=lambda leaf: leaf):
    """The tree with ``new[path]`` at the inexact leaves and ``otherwise(leaf)`` at the others."""
    pairs = [(p, new[p] if is_inexact(leaf) else otherwise(leaf)) for p, leaf in items(leaves)]
    return dict(pairs) if isinstance(leaves, dict) else [leaf for _, leaf in pairs]


def scope_axes(scope, path, x):
    """The axes of the leaf ``x`` that share one norm, as a tuple of non-negative ints.

    leaf: all of them. unit: all but the last; all of them for rank 0 and 1. An int or a tuple:
    those. A callable: what it answers for ``(path, x)``.
    """
    if callable(scope):
        scope = scope(path, x)
    if isinstance(scope, str):
        if scope == "leaf" or (scope == "unit" and x.ndim < 2):
            return tuple(range(x.ndim))
        if scope == "unit":
            return tuple(range(x.ndim - 1))
        raise ValueError(f"No axes of one leaf for scope={scope!r}.")
    axes = scope if isinstance(scope, tuple) else (scope,)
    for axis in axes:
        if not -x.ndim <= axis < x.ndim:
            raise ValueError(f"Leaf {path!r} of shape {x.shape} has no axis {axis}.")
    return tuple(axis % x.ndim for axis in axes)


# --- Norms ----------------------------------------------------------------------------------------


def norm(x, ord=None, axes=None, keepdims=False):
    """The norm of ``x`` over ``axes`` (all of them for ``None``), with ``m = max |x_i|`` taken out.

    ord None or 2: m sqrt(sum (|x_i| / m)^2); 1: sum |x_i|; inf: m; p: m (sum (|x_i| / m)^p)^(1/p);
    "rms": m sqrt(mean (|x_i| / m)^2). Nothing to add up, or only zeros: 0. NaN gives NaN, else inf
    gives inf.
    """
    size = np.abs(wide(x))
    axes = tuple(range(size.ndim)) if axes is None else axes
    largest = np.max(size, axis=axes, keepdims=True, initial=0.0)
    scale = np.where(np.isfinite(largest) & (largest > 0), largest, 1.0)
    share = size / scale
    p = 2.0 if ord is None or ord == "rms" else float(ord)
    if math.isinf(p):
        result = largest
    else:
        total = np.sum(share**p, axis=axes, keepdims=True)
        if ord == "rms":
            total = total / max(math.prod(size.shape[axis] for axis in axes), 1)
        result = scale * total ** (1.0 / p)
    return result if keepdims else np.squeeze(result, axis=axes)[()]


def global_norm(leaves, ord=None):
    """The norm of all entries of all inexact leaves as one vector; 0 for an empty tree."""
    flat = [np.abs(x).ravel() for _, x in inexact_items(leaves)]
    return float(norm(np.concatenate(flat) if flat else np.zeros(0), ord))


def tree_norms(leaves, scope="leaf", ord=None):
    """One norm a scope: a float for "global", else a tree of norms, reduced axes kept as size 1."""
    if isinstance(scope, str) and scope == "global":
        return global_norm(leaves, ord)
    norms = {
        path: norm(x, ord, scope_axes(scope, path, x), keepdims=True)
        for path, x in inexact_items(leaves)
    }
    return rebuild(leaves, norms, lambda leaf: None)


# --- Clipping -------------------------------------------------------------------------------------


def is_finite(leaves):
    """Whether every entry of every inexact leaf is finite."""
    return all(bool(np.all(np.isfinite(x))) for _, x in inexact_items(leaves))


def fill(leaves, value):
    """The tree with every entry of every inexact leaf replaced by ``value``."""

    def full(x):
        return np.full_like(x, complex(value, value) if x.dtype.kind == "c" else value)

    return rebuild(leaves, {path: full(x) for path, x in inexact_items(leaves)})


def per_leaf(values, leaves, scope):
    """``{path: values of that leaf}`` out of a number for all leaves or a tree like ``leaves``."""
    paths = [path for path, _ in inexact_items(leaves)]
    if isinstance(values, dict | list) and not (isinstance(scope, str) and scope == "global"):
        tree = dict(items(values))
        return {path: np.asarray(tree[path], np.float64) for path in paths}
    return {path: np.asarray(values, np.float64) for path in paths}


def rescaled(leaves, targets, scope, ord, always):
    """Clip (or, with ``always``, normalise): ``x * C / n`` where ``n > C`` (``n > 0``), else ``x``.

    Returns the tree, the norms and the targets, the latter two as lists of arrays, one a leaf (one
    in all for the scope "global").
    """
    norms = per_leaf(tree_norms(leaves, scope, ord), leaves, scope)
    targets = per_leaf(targets, leaves, scope)
    new = {}
    for path, x in inexact_items(leaves):
        n, limit = norms[path], np.maximum(targets[path], 0.0)  # A negative limit counts as 0.
        over = np.isfinite(n) & ((n > 0) if always else (n > limit))
        safe = np.where(over, n, 1.0)
        new[path] = np.where(over, x / safe * np.where(over, limit, 1.0), x)
    return rebuild(leaves, new), norms, targets


def clip_by_norm(leaves, threshold, scope="leaf", ord=None, nonfinite="propagate"):
    """x -> x where norm(x) <= C, else x * C / norm(x), scope by scope; ``(tree, metrics)``.

    ``threshold`` is a number, or a tree of numbers that broadcast against the norms of that scope.
    A non-finite entry anywhere turns all inexact leaves into NaN ("propagate") or 0 ("zero"). A NaN
    threshold gives NaN everywhere.

    metrics: ``norm_before`` and ``norm_after`` of the whole tree in ``ord``; ``threshold``, the
    smallest limit; ``fraction``, the share of scopes with norm > limit (0 on a non-finite step).
    """
    out, norms, limits = rescaled(leaves, threshold, scope, ord, always=False)
    if isinstance(scope, str) and scope == "global":  # One scope, however many leaves share it.
        norms, limits = {"": np.float64(global_norm(leaves, ord))}, {"": np.float64(threshold)}
    pairs = [np.broadcast_arrays(norms[path], np.maximum(limits[path], 0.0)) for path in norms]
    clipped = sum(int(np.sum(n > limit)) for n, limit in pairs)
    scopes = sum(n.size for n, _ in pairs)
    smallest = min((float(np.min(c)) for _, c in pairs if c.size), default=math.inf)
    if not is_finite(leaves):
        out, clipped = fill(leaves, {"propagate": math.nan, "zero": 0.0}[nonfinite]), 0
    elif any(np.any(np.isnan(c)) for _, c in pairs):
        out, smallest = fill(leaves, math.nan), math.nan
    metrics = {
        "norm_before": global_norm(leaves, ord),
        "norm_after": global_norm(out, ord),
        "threshold": smallest if pairs or isinstance(threshold, dict | list) else float(threshold),
        "fraction": clipped / scopes if scopes else 0.0,
    }
    return out, metrics


def normalize(leaves, target=1.0, scope="global", ord=None, nonfinite="propagate"):
    """x -> x * target / norm(x), up or down, scope by scope; a zero norm stays zero."""
    if not is_finite(leaves):
        return fill(leaves, {"propagate": math.nan, "zero": 0.0}[nonfinite])
    return rescaled(leaves, target, scope, ord, always=True)[0]


def clip_by_value(leaves, lower, upper):
    """min(max(x, lower), upper), entry by entry; ``lower=None`` is ``-upper``; ``(tree, metrics)``.

    Complex entries: z -> z where |z| <= upper, else z * upper / |z| (no ``lower`` then). inf goes
    to the bound (a complex one in the direction of its infinite parts), NaN stays.

    metrics: 2-norms before and after, ``threshold`` = upper, with ``lower`` min(upper, -lower), and
    ``fraction``, the share of entries outside.
    """
    new, outside, entries = {}, 0, 0
    for path, x in inexact_items(leaves):
        if x.dtype.kind == "c":
            over = np.abs(x) > upper
            new[path] = np.where(over, direction(x) * upper, x)
        else:
            low = -upper if lower is None else lower
            over = (x < low) | (x > upper)
            new[path] = np.clip(x, low, upper)
        outside, entries = outside + int(np.sum(over)), entries + x.size
    out = rebuild(leaves, new)
    metrics = {
        "norm_before": global_norm(leaves),
        "norm_after": global_norm(out),
        "threshold": float(upper if lower is None else min(upper, -lower)),
        "fraction": outside / entries if entries else 0.0,
    }
    return out, metrics


def direction(z):
    """z / |z|, 0 for 0; where z has infinite parts, that of the signs of those parts."""
    infinite = np.isinf(z.real) | np.isinf(z.imag)
    signs = np.where(np.isinf(z.real), np.sign(z.real), 0.0) + 1j * np.where(
        np.isinf(z.imag), np.sign(z.imag), 0.0
    )
    signs = np.where(np.isnan(z.real) | np.isnan(z.imag), np.nan, signs)
    z = np.where(infinite, signs, z)
    size = np.abs(z)
    with np.errstate(invalid="ignore"):  # NumPy warns of complex NaN.
        return z / np.where(size == 0, 1.0, size)


# --- Threshold rules ------------------------------------------------------------------------------


class Rule:
    """A rule over an array of norms: each entry has its own statistics and its own limit.

    ``step(norms, param_norms, total)`` returns the limits, shaped like ``norms``. ``state(name)``
    is one statistic as such an array. A norm that is not finite leaves the statistics untouched,
    counters included; the limit given back for it has no meaning. No rule learns from a norm of 0.
    """

    def __init__(self):
        self.entries = None
        self.shape = ()

    def step(self, norms, param_norms=None, total=None):
        norms = np.asarray(norms, np.float64)
        if self.entries is None:
            self.shape = norms.shape
            self.entries = [self.first() for _ in range(norms.size)]
        weights = np.full(norms.shape, np.nan) if param_norms is None else param_norms
        weights = np.broadcast_to(np.asarray(weights, np.float64), norms.shape)
        total = norm(norms) if total is None else float(total)
        limits = [
            self.limit(entry, float(n), float(w), total)
            for entry, n, w in zip(self.entries, norms.ravel(), weights.ravel(), strict=True)
        ]
        return np.array(limits, np.float64).reshape(norms.shape)

    def state(self, name):
        values = [getattr(entry, name) for entry in self.entries]
        return np.array([np.nan if v is None else v for v in values]).reshape(self.shape)

    def first(self):
        return SimpleNamespace()

    def limit(self, entry, n, weight, total):
        raise NotImplementedError


def tells(n):
    """Whether a norm is one to learn from: finite, and not 0."""
    return math.isfinite(n) and n > 0


class RelativeToParams(Rule):
    """limit = ratio * max(||w||, eps); with unit norms this is AGC (Brock et al. 2021)."""

    def __init__(self, ratio, eps=1e-3):
        super().__init__()
        self.ratio, self.eps = ratio, eps

    def limit(self, entry, n, weight, total):
        return self.ratio * max(weight, self.eps)


class WindowQuantile(Rule):
    """limit = the q-quantile, linearly interpolated, of the last ``window`` norms, this one included.

    During the first ``warmup`` norms: inf.
    """

    def __init__(self, q, window=None, warmup=0):
        super().__init__()
        self.q, self.window, self.warmup = q, 1000 if window is None else window, warmup

    def first(self):
        return SimpleNamespace(norms=[], seen=0)

    def limit(self, entry, n, weight, total):
        if tells(n):
            entry.norms = [*entry.norms, n][-self.window :]
            entry.seen += 1
        if not entry.norms or entry.seen <= self.warmup:
            return math.inf
        return float(np.quantile(entry.norms, self.q, method="linear"))


class WindowZScore(Rule):
    """limit = mean + z std, ddof = 1, of the last ``window`` values, this one not included.

    Of fewer than max(2, window // 2) values: inf. Any finite value counts, negative ones and 0 too.
    """

    def __init__(self, z, window=128):
        super().__init__()
        self.z, self.window = z, window

    def first(self):
        return []

    def limit(self, entry, n, weight, total):
        last = np.array(entry[-self.window :])
        if math.isfinite(n):
            entry.append(n)
        if len(last) < max(2, self.window // 2):
            return math.inf
        return float(np.mean(last) + self.z * np.std(last, ddof=1))


class RunningQuantile(Rule):
    """C' = C exp(rate (q - 1[n <= C])), from the geometric mean of the first ``warmup`` norms on.

    During these, of which there is at least one: inf. At the k-th norm over the limit in a row, where
    k >= max(rearm, ln 1e-6 / ln(1 - q)), C' = n instead. At q = 0 that is never, at q = 1 k >= rearm.
    """

    def __init__(self, q, rate=0.01, warmup=10, rearm=50):
        super().__init__()
        self.q, self.rate, self.warmup = q, rate, max(warmup, 1)
        with np.errstate(divide="ignore"):
            self.patience = max(rearm, math.log(1e-6) / np.log1p(-np.float64(q)))

    def first(self):
        return SimpleNamespace(norms=[], level=None, streak=0)

    def limit(self, entry, n, weight, total):
        level = entry.level
        if not tells(n):
            return math.inf if level is None else level
        if level is None:
            entry.norms.append(n)
            if len(entry.norms) == self.warmup:
                entry.level = math.exp(np.mean(np.log(entry.norms)))
            return math.inf
        entry.streak = entry.streak + 1 if n > level else 0
        entry.level = level * math.exp(self.rate * (self.q - (n <= level)))
        if entry.streak >= self.patience:
            entry.level, entry.streak = n, 0
        return level


class ZScore(Rule):
    """ZClip (Kumar et al. 2025), and re-arming.

    While fewer than ``warmup`` norms were seen: no limit. Then mean and population variance of
    those. After that z_t = (n - mean) / (std + 1e-6), and where z_t > z

        limit = mean + z^2 / z_t * std,   x = limit,   else limit = mean + z (std + 1e-6),   x = n,
        mean' = a mean + (1 - a) x,   var' = a var + (1 - a) (x - mean')^2.

    Where ``rearm`` spikes came right before, x = n for a spike too. ``max_norm`` caps every limit
    and enters no statistic.
    """

    def __init__(self, z, decay=0.97, warmup=25, max_norm=None, rearm=50):
        super().__init__()
        self.z, self.decay, self.warmup, self.rearm = z, decay, max(warmup, 1), rearm
        self.cap = math.inf if max_norm is None else max_norm

    def first(self):
        return SimpleNamespace(norms=[], mean=None, var=None, streak=0)

    def limit(self, entry, n, weight, total):
        if entry.mean is None:
            if tells(n):
                entry.norms.append(n)
            if len(entry.norms) == self.warmup:
                entry.mean = float(np.mean(entry.norms))
                entry.var = float(np.mean((np.array(entry.norms) - entry.mean) ** 2))
            return self.cap
        std = math.sqrt(entry.var)
        score = (n - entry.mean) / (std + 1e-6)
        spike = tells(n) and score > self.z
        limit = entry.mean + (self.z**2 / score * std if spike else self.z * (std + 1e-6))
        if tells(n):
            x = limit if spike and entry.streak < self.rearm else n
            entry.streak = entry.streak + 1 if spike else 0
            entry.mean = self.decay * entry.mean + (1 - self.decay) * x
            entry.var = self.decay * entry.var + (1 - self.decay) * (x - entry.mean) ** 2
        return min(limit, self.cap)


class EmaRatio(Rule):
    """AdaGC (Wang et al. 2025), and re-arming. Steps count from 1, those with a norm of 0 too.

    While step < warmup, or as long as an entry has seen only zeros:

        limit = n * max_norm / total, inf where total <= max_norm,
        gamma' = min(gamma, clipped norm); first: that norm.

    After: limit = ratio * gamma, gamma' = b gamma + (1 - b) * clipped norm. The clipped norm is
    min(n, limit); gamma takes in no zero. At the ``rearm``-th clipped norm in a row gamma' = n; for
    None there is no such norm.
    """

    def __init__(self, ratio, decay=0.98, warmup=100, max_norm=1.0, rearm=None):
        super().__init__()
        self.ratio, self.decay, self.warmup = ratio, decay, warmup
        self.max_norm, self.rearm = max_norm, rearm

    def first(self):
        return SimpleNamespace(step=0, gamma=None, streak=0)

    def limit(self, entry, n, weight, total):
        entry.step += math.isfinite(n)
        warming = entry.step < self.warmup or entry.gamma is None
        if warming:
            limit = n * self.max_norm / total if tells(n) and total > self.max_norm else math.inf
        else:
            limit = self.ratio * entry.gamma
        clipped = min(n, limit)
        if tells(n) and clipped > 0:
            over = not warming and n > limit
            entry.streak = entry.streak + 1 if over else 0
            if warming:
                entry.gamma = clipped if entry.gamma is None else min(entry.gamma, clipped)
            else:
                entry.gamma = self.decay * entry.gamma + (1 - self.decay) * clipped
            if self.rearm is not None and entry.streak >= self.rearm:
                entry.gamma, entry.streak = n, 0
        return limit


class ClipByRule:
    """A rule in front of ``clip_by_norm``: ``step(leaves, params)`` returns ``(tree, metrics)``.

    ``make_rule()`` gives a fresh rule; there is one for the tree (scope "global") or one a leaf. On
    a non-finite step every norm that a rule is given is NaN.
    """

    def __init__(self, make_rule, scope="global", ord=None, nonfinite="propagate"):
        self.make_rule, self.scope, self.ord, self.nonfinite = make_rule, scope, ord, nonfinite
        self.rules = {}

    def step(self, leaves, params=None):
        total = global_norm(leaves, self.ord) if is_finite(leaves) else math.nan
        norms = tree_norms(leaves, self.scope, self.ord)
        weights = None if params is None else tree_norms(params, self.scope, self.ord)
        if isinstance(self.scope, str) and self.scope == "global":
            limits = float(self.limits("", norms, weights, total))
        else:
            sizes = {} if weights is None else dict(items(weights))
            limits = {
                path: self.limits(path, n, sizes.get(path), total) for path, n in inexact_items(norms)
            }
            limits = rebuild(leaves, limits, lambda leaf: None)
        return clip_by_norm(leaves, limits, self.scope, self.ord, self.nonfinite)

    def limits(self, path, norms, weights, total):
        rule = self.rules.setdefault(path, self.make_rule())
        norms = np.asarray(norms) * (1.0 if math.isfinite(total) else math.nan)
        limits = rule.step(norms, weights, total)
        return limits if math.isfinite(total) else np.full(limits.shape, math.inf)


def agc_scope(path, x):
    """The unit of AGC: all of a leaf with at most one axis longer than 1, else an index of the last."""
    return "leaf" if np.squeeze(x).ndim <= 1 else "unit"


def agc(leaves, params, ratio=0.01, eps=1e-3, scope=agc_scope):
    """AGC, Brock et al. 2021: unit norms against ratio * max(||w||, eps); ``(tree, metrics)``."""
    return ClipByRule(lambda: RelativeToParams(ratio, eps), scope).step(leaves, params)


# --- Sets -----------------------------------------------------------------------------------------
#
# project_*(x, ..., axes): the nearest point of the set, each scope (the entries that share all
# indices outside ``axes``; ``None``: all entries) on its own. violation_*: how far outside, >= 0.


def by_rows(f, x, axes=None):
    """Apply ``f`` (vector -> vector) to each scope of ``x``."""
    axes = tuple(range(x.ndim)) if axes is None else axes
    kept = [axis for axis in range(x.ndim) if axis not in axes]
    order = kept + list(axes)
    moved = np.transpose(x, order)
    split = [math.prod(x.shape[axis] for axis in part) for part in (kept, axes)]
    rows = [f(row) for row in moved.reshape(split)]
    result = np.array(rows, x.dtype).reshape(moved.shape)
    return np.transpose(result, np.argsort(order))


def excess(values):
    """The largest value, at least 0; NaN if there is one."""
    return float(np.max(values, initial=0.0))


def project_box(x, lower, upper, axes=None):
    """min(max(x, lower), upper)."""
    return np.minimum(np.maximum(wide(x), lower), upper)


def violation_box(x, lower, upper, axes=None):
    """max(lower - x, x - upper, 0) of the entry farthest outside."""
    return max(excess(lower - wide(x)), excess(wide(x) - upper))


def project_non_negative(x, axes=None):
    """max(x, 0)."""
    return np.maximum(wide(x), 0.0)


def violation_non_negative(x, axes=None):
    """max(-x, 0) of the smallest entry."""
    return excess(-wide(x))


def project_l2_ball(x, radius, axes=None):
    """x where ||x||_2 <= r, else x * r / ||x||_2."""
    x, n = wide(x), norm(x, 2, axes, keepdims=True)
    over = n > radius
    return np.where(over, x / np.where(over, n, 1.0) * np.where(over, radius, 1.0), x)


def project_linf_ball(x, radius, axes=None):
    """x where |x_i| <= r, else x_i * r / |x_i|, entry by entry."""
    x = wide(x)
    size = np.abs(x)
    over = size > radius
    return np.where(over, x / np.where(over, size, 1.0) * np.where(over, radius, 1.0), x)


def project_l1_ball(x, radius, axes=None):
    """x where ||x||_1 <= r, else sign(x) * (the simplex projection of |x| with total r)."""

    def one(row):
        size = np.abs(row)
        if not np.sum(size) > radius:
            return row
        return row / np.where(size > 0, size, 1.0) * simplex_of(size, radius)

    return by_rows(one, wide(x), axes)


def violation_ball(x, radius, ord=None, axes=None):
    """max(||x|| - r, 0) of the scope farthest outside."""
    return excess(norm(x, ord, axes) - radius)


def project_sphere(x, radius=1.0, axes=None):
    """x * r / ||x||_2; a zero vector stays 0."""
    x, n = wide(x), norm(x, 2, axes, keepdims=True)
    return x / np.where(n > 0, n, 1.0) * radius


def violation_sphere(x, radius=1.0, axes=None):
    """| ||x||_2 - r | of the worst scope; r for a zero vector."""
    return excess(np.abs(norm(x, 2, axes) - radius))


def project_shell(x, lower, upper, axes=None):
    """x * min(max(||x||_2, lower), upper) / ||x||_2; a zero vector stays 0."""
    x, n = wide(x), norm(x, 2, axes, keepdims=True)
    inside = (lower <= n) & (n <= upper)
    return np.where(inside, x, x / np.where(n > 0, n, 1.0) * np.clip(n, lower, upper))


def violation_shell(x, lower, upper, axes=None):
    """max(||x||_2 - upper, lower - ||x||_2, 0) of the worst scope."""
    n = norm(x, 2, axes)
    return max(excess(n - upper), excess(lower - n))


def simplex_of(v, total=1.0):
    """The nearest point of {w >= 0, sum w = total} to a vector, by sorting (Duchi et al. 2008).

    With u = v sorted downwards, rho = max{j : u_j > (u_1 + ... + u_j - total) / j} and theta that
    quotient at rho: w = max(v - theta, 0). A constant added to v changes nothing, so the largest
    entry is taken off first.
    """
    if v.size == 0 or total == 0:
        return np.zeros_like(v)
    v = v - np.max(v)
    u = np.sort(v)[::-1]
    theta = (np.cumsum(u) - total) / np.arange(1, v.size + 1)
    rho = np.max(np.nonzero(u > theta)[0])
    return np.maximum(v - theta[rho], 0.0)


def project_simplex(x, total=1.0, axes=None):
    """The nearest point of {w >= 0, sum w = total}."""
    return by_rows(lambda row: simplex_of(row, total), wide(x), axes)


def violation_simplex(x, total=1.0, axes=None):
    """max(|sum x - total|, -min x, 0) of the worst scope."""
    x = wide(x)
    axes = tuple(range(x.ndim)) if axes is None else axes
    return max(excess(np.abs(np.sum(x, axis=axes) - total)), excess(-x))


def project_spectral_ball(x, radius=1.0, axes=None):
    """U min(s, r) V^H of each matrix in the last two axes; rank below 2 untouched."""
    x = wide(x)
    if x.ndim < 2 or x.size == 0:
        return x
    u, s, vh = np.linalg.svd(x, full_matrices=False)
    near = (u * np.minimum(s, radius)[..., None, :]) @ vh
    return np.where(np.max(s, axis=-1)[..., None, None] > radius, near, x)


def violation_spectral_ball(x, radius=1.0, axes=None):
    """max(largest singular value - r, 0) of the worst matrix; 0 for rank below 2."""
    x = wide(x)
    if x.ndim < 2 or x.size == 0:
        return 0.0
    return excess(np.linalg.svd(x, compute_uv=False) - radius)


def ball_violation_of(ord):
    """The violation of the ball of that norm."""
    return lambda x, radius, axes=None: violation_ball(x, radius, ord, axes)


SETS = {
    "box": (project_box, violation_box),
    "l1_ball": (project_l1_ball, ball_violation_of(1)),
    "l2_ball": (project_l2_ball, ball_violation_of(2)),
    "linf_ball": (project_linf_ball, ball_violation_of(math.inf)),
    "non_negative": (project_non_negative, violation_non_negative),
    "shell": (project_shell, violation_shell),
    "simplex": (project_simplex, violation_simplex),
    "spectral_ball": (project_spectral_ball, violation_spectral_ball),
    "sphere": (project_sphere, violation_sphere),
}


def project(leaves, kind, scope="leaf", **values):
    """Each inexact leaf (scope "global": all of them as one vector) onto the set ``SETS[kind]``."""
    nearest = SETS[kind][0]
    found = inexact_items(leaves)
    if isinstance(scope, str) and scope == "global" and kind != "spectral_ball":
        if not found:
            return leaves
        flat = nearest(np.concatenate([x.ravel() for _, x in found]), **values)
        parts = np.split(flat, np.cumsum([x.size for _, x in found])[:-1])
        new = {path: part.reshape(x.shape) for (path, x), part in zip(found, parts, strict=True)}
    else:
        scope = "leaf" if kind == "spectral_ball" else scope
        new = {path: nearest(x, axes=scope_axes(scope, path, x), **values) for path, x in found}
    return rebuild(leaves, new)


def violation(leaves, kind, scope="leaf", **values):
    """The largest violation over all scopes of the tree; 0 for a tree without inexact leaves."""
    outside = SETS[kind][1]
    found = inexact_items(leaves)
    if isinstance(scope, str) and scope == "global" and kind != "spectral_ball":
        return outside(np.concatenate([x.ravel() for _, x in found]), **values) if found else 0.0
    scope = "leaf" if kind == "spectral_ball" else scope
    return excess([outside(x, axes=scope_axes(scope, path, x), **values) for path, x in found])


# --- What the authors' programs do ----------------------------------------------------------------
#
# Each takes the norms of a whole run and returns a dict of arrays, one entry a step: ``clipped``
# (the norm of the gradient that the optimizer then gets), the limit, and the statistics after the
# step. NaN and zeros are treated as Python's and IEEE's comparisons happen to treat them there.


def torch_clipped(n, max_norm):
    """n * min(1, max_norm / (n + 1e-6)), the norm after PyTorch's clip_grad_norm_; NaN stays."""
    return float(n * np.minimum(max_norm / (n + 1e-6), 1.0))


def published_agc(grad, weight, ratio=0.01, eps=1e-3):
    """AGC (Brock et al. 2021) of one leaf, as in both of the authors' programs for NFNets.

    One norm for a leaf that squeezed is a scalar or vector; axis 0 reduced in ranks 2 and 3; all but
    the last in rank 4; other ranks raise.
    """
    grad, weight = wide(grad), wide(weight)
    if np.squeeze(grad).ndim <= 1:
        axes = None
    else:
        axes = {2: (0,), 3: (0,), 4: (0, 1, 2)}[grad.ndim]

    def unit_norms(x):
        return np.sqrt(np.sum(x**2, axis=axes, keepdims=axes is not None))

    limit = ratio * np.maximum(unit_norms(weight), eps)
    size = unit_norms(grad)
    return np.where(size > limit, grad * (limit / np.maximum(size, 1e-6)), grad)


def steps_by_leaves(norms):
    """The norms as an array of shape (steps, leaves); a plain list of norms is one leaf."""
    norms = np.asarray(norms, np.float64)
    return norms[:, None] if norms.ndim == 1 else norms


def published_autoclip(norms, percentile=10):
    """AutoClip (Seetharaman et al. 2020): limit = percentile of all norms so far, with this one.

    One NaN stays in the history, so the limit is NaN from there on, and so is every later gradient.
    Zeros count like any norm: while they make up the percentile the limit is 0 and the gradient 0.
    The history grows without bound, so after many steps a new level is followed ever more slowly.
    """
    history, limits, clipped = [], [], []
    with np.errstate(invalid="ignore"):
        for n in map(float, norms):
            history.append(n)
            limits.append(float(np.percentile(history, percentile)))
            clipped.append(torch_clipped(n, limits[-1]))
    return {"limit": np.array(limits), "clipped": np.array(clipped)}


def published_zclip(norms, z=2.5, decay=0.97, warmup=25, max_norm=1.0):
    """ZClip (Kumar et al. 2025), the authors' program with its defaults (adaptive scaling).

    The first ``warmup`` steps are clipped to ``max_norm`` alone and collected unclipped; then mean
    and population variance. Later, with z_t = (n - mean) / (std + 1e-6), a step with z_t > z is
    clipped to mean + z std / (z_t / z), which is also what the running statistics take, and
    ``max_norm`` caps the clip. The factor is limit / (n + 1e-6).

    A NaN compares as "not above", so it passes unclipped into the mean and variance, which are NaN
    from there on (a NaN in the warm-up: from its end on): nothing but ``max_norm`` is left. An inf
    after the warm-up harms nothing, in it the variance becomes NaN. A warm-up of only zeros, or of
    one constant, leaves a variance of 0: every larger norm is clipped to the mean, and the mean and
    variance never move again.
    """
    buffer, mean, var = [], None, None
    record = {name: [] for name in ("limit", "clipped", "mean", "var")}
    cap = math.inf if max_norm is None else float(max_norm)
    with np.errstate(invalid="ignore"):
        for n in map(np.float64, norms):
            if mean is None:
                buffer.append(n)
                if len(buffer) >= warmup:
                    average = np.mean(buffer)
                    stats = average, np.mean((np.array(buffer) - average) ** 2)
                else:
                    stats = None, None
                limit, clipped = cap, n if max_norm is None else torch_clipped(n, cap)
            else:
                score = (n - mean) / (np.sqrt(var) + 1e-6)
                over = bool(score > z)
                own = mean + z * np.sqrt(var) / (score / z) if over else n
                limit = cap if cap < own else own  # NaN is kept, as Python's min keeps it.
                clipped = n * (limit / (n + 1e-6)) if n > limit else n
                average = decay * mean + (1 - decay) * own
                stats = average, decay * var + (1 - decay) * (own - average) ** 2
            mean, var = stats
            values = (limit, clipped, *(np.nan if v is None else v for v in stats))
            for name, value in zip(record, values, strict=True):
                record[name].append(float(value))
    return {name: np.array(values) for name, values in record.items()}


def published_adagc(norms, ratio=1.05, decay=0.98, warmup=100, max_norm=1.0):
    """AdaGC (Wang et al. 2025), Algorithm 1 of the paper, on norms of shape (steps, leaves).

    Step t counts from 1. While t < warmup: h = min(max_norm / total, 1) for all leaves, and
    gamma = min(gamma, h n) (t = 1: h n). After: h = min(ratio gamma / n, 1) a leaf, and
    gamma = b gamma + (1 - b) h n. The clipped norm is h n.

    A NaN or inf makes gamma NaN for good (in the warm-up that of every leaf at once), and with it
    every gradient after the warm-up. One zero in the warm-up makes gamma 0 for good: after the
    warm-up that leaf gets only zeros, and NaN where its norm is 0 again (0 / 0). A zero after it
    only lowers gamma.
    """
    norms = steps_by_leaves(norms)
    gamma, record = None, {"limit": [], "clipped": [], "gamma": []}
    with np.errstate(invalid="ignore", divide="ignore"):
        for t, n in enumerate(norms, start=1):
            if t < warmup or gamma is None:
                factor = np.minimum(max_norm / np.sqrt(np.sum(n**2)), 1.0)
                clipped = factor * n
                limit = clipped
                gamma = clipped if gamma is None else np.minimum(gamma, clipped)
            else:
                limit = ratio * gamma
                clipped = np.minimum(limit / n, 1.0) * n
                gamma = decay * gamma + (1 - decay) * clipped
            for name, value in zip(record, (limit, clipped, gamma), strict=True):
                record[name].append(value)
    return {name: np.array(values) for name, values in record.items()}


def published_adagc_paddle(norms, ratio=1.04, decay=0.99, warmup=100, max_norm=1.0, eps=1e-8):
    """AdaGC as PaddlePaddle's ClipGradByAdaptiveNorm runs it, on norms of shape (steps, leaves).

    It differs from the paper: ``warmup + 1`` warm-up steps; in them gamma is the smallest norm
    BEFORE the global clip; comparisons instead of min, so a NaN norm is "not above": it is not
    clipped, a NaN in the warm-up changes gamma only on the first step, one after it makes gamma NaN
    for good and that leaf is never clipped again. Zeros lock it as in the paper, but without NaN.
    """
    norms = steps_by_leaves(norms)
    gamma, record = norms[0].copy(), {"limit": [], "clipped": [], "gamma": []}
    with np.errstate(invalid="ignore", divide="ignore"):
        for t, n in enumerate(norms):
            if t <= warmup:
                factor = max_norm / (np.sqrt(np.sum(n**2)) + eps)
                clipped = n * factor if factor < 1 else n
                limit = clipped
                gamma = np.where(n < gamma, n, gamma)
            else:
                limit = ratio * gamma
                clipped = np.where(n > limit, n * (limit / (n + eps)), n)
                gamma = decay * gamma + (1 - decay) * np.where(n > limit, limit, n)
            for name, value in zip(record, (limit, clipped, gamma), strict=True):
                record[name].append(value)
    return {name: np.array(values) for name, values in record.items()}
