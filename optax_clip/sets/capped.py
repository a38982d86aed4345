"""The search for what to take off entries that are then cut at 0 and at a cap."""

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from optax_clip import _settings, _validate, _xla
from optax_clip._mesh import all_devices_agree
from optax_clip._numerics import accumulator, round_down, widen
from optax_clip._settings import Setting, aligned, precise
from optax_clip._trees import Cells, Scopes


class Cut(NamedTuple):
    """Static: the scopes, and what of an entry is cut, itself or its modulus."""

    scopes: Scopes
    read: Callable[[Array], Array]

    def wide(self, xs: Sequence[Array]) -> list[Array]:
        """What is cut, in float32 or wider."""
        return [self.read(widen(x, accumulator(xs))) for x in xs]

    def depths(self, xs: Sequence[Array], origins: Sequence[Cells]) -> list[Array]:
        """The entries, measured from some origins; read anew each time, so that none is written."""
        terms = self.wide(xs)
        for origin in origins:
            starts = _xla.written_once(self.scopes.per_leaf(origin))
            terms = [t - start for t, start in zip(terms, starts, strict=True)]
        return terms


def bounds(scopes: Scopes, xs: Sequence[Array], upper: Setting, total: Setting) -> list[Array]:
    """The cap of each entry, in float32 or wider, as its leaf can hold it."""
    caps = _settings.per_leaf(scopes, xs, [x.shape for x in xs], upper=upper)
    _require_room(scopes, xs, caps, total, upper)
    stored = [jnp.asarray(round_down(precise(cap), x.dtype)) for x, cap in zip(xs, caps, strict=True)]
    wide = accumulator(xs)
    return [jnp.maximum(aligned(cap, x.ndim).astype(wide), 0) for x, cap in zip(xs, stored, strict=True)]


def _require_room(
    scopes: Scopes, xs: Sequence[Array], caps: Sequence[Any], total: Any, upper: Any
) -> None:
    """The caps of each scope sum up to its total, as far as both are known and here."""
    if any(map(_validate.is_traced, [*caps, *jax.tree.leaves(total)])) or any(scopes.mapped):
        return
    whole = [np.broadcast_to(np.asarray(cap, float), x.shape) for x, cap in zip(xs, caps, strict=True)]
    rooms = [x.sum(axis=axes, keepdims=True) for x, axes in zip(whole, scopes.axes, strict=True)]
    totals = _goals(scopes, xs, total)
    if scopes.is_joint:
        rooms = [
            sum(room.sum() for room, other in zip(rooms, scopes.homes, strict=True) if other == home)
            for home in scopes.homes
        ]
    for place, x, room, goal in zip(scopes.places, xs, rooms, totals, strict=True):
        # A third, three times, may be a rounding below 1.
        if x.size and np.any(room * (1 + 1e-6) < np.asarray(goal, float)):
            raise ValueError(
                "Expected upper times the number of entries to be at least total, got "
                f"upper={upper!r} and total={total!r} for leaf {scopes.paths[place]!r} of shape "
                f"{x.shape}."
            )


def _goals(scopes: Scopes, xs: Sequence[Array], total: Any) -> list[Any]:
    """The total that each leaf has a part in, or that of each of its scopes."""
    if not scopes.is_joint:
        return _settings.per_leaf(scopes, xs, scopes.shapes, total=total)
    if not isinstance(total, Mapping):
        return [total] * len(xs)
    names: dict[Any, str] = dict(enumerate(scopes.labels or ()))
    return [total[names[row]] for _, row in scopes.homes]


def excess(scopes: Scopes, wide: Sequence[Array], caps: Sequence[Array]) -> Cells:
    """How far the entries of each scope are above their caps."""
    return scopes.max([x - cap for x, cap in zip(wide, caps, strict=True)], initial=-jnp.inf)


@functools.partial(jax.jit, static_argnums=0)
def threshold(cut: Cut, xs: list[Array], caps: list[Array], totals: Cells) -> list[Array]:
    """``min(max(t - θ, 0), cap)`` with θ such that each scope sums to its total.

    The search is constant to derivatives. Two more steps measure the entries from what it found, as a
    rounding of θ counts for each entry; they have the derivative of θ.
    """
    fixed, goals = lax.stop_gradient((xs, totals))
    wide = cut.wide(fixed)
    peaks = cut.scopes.max(wide, initial=-jnp.inf)
    origins = [peaks, _search(cut, fixed, caps, peaks, goals)]
    thetas = [0 * peak for peak in peaks]
    for goal in (goals, totals):
        thetas = _step(cut, xs, caps, origins, goal, lax.stop_gradient(thetas)).thetas
    depths = cut.depths(xs, [*origins, thetas])
    return [jnp.minimum(jnp.maximum(d, 0), cap) for d, cap in zip(depths, caps, strict=True)]


class _Point(NamedTuple):
    """After a step: where to, the sums before it, and how many entries were above 0 and at their cap."""

    thetas: Cells
    sums: Cells
    above: Cells
    full: Cells


def _step(
    cut: Cut, xs: list[Array], caps: list[Array], origins: list[Cells], goals: Cells, thetas: Cells
) -> _Point:
    """Newton's step towards the root; none where no entry moves."""
    depths = cut.depths(xs, [*origins, thetas])
    pairs = list(zip(depths, caps, strict=True))
    sums = cut.scopes.sum([jnp.minimum(jnp.maximum(d, 0), cap) for d, cap in pairs])
    above = cut.scopes.sum([(d > 0).astype(d.dtype) for d in depths])
    full = cut.scopes.sum([((d > 0) & (d >= cap)).astype(d.dtype) for d, cap in pairs])
    rows = zip(thetas, sums, goals, above, full, strict=True)
    moved = [t + jnp.where(n > m, (s - goal) / jnp.maximum(n - m, 1), 0) for t, s, goal, n, m in rows]
    return _Point(moved, sums, above, full)


class _Bracket(NamedTuple):
    """θ between two bounds, what the last step saw, and which scopes are done."""

    lows: Cells
    highs: Cells
    thetas: Cells
    above: Cells
    full: Cells
    done: Cells
    turn: Array


_TURNS = 100  # a third of them halves the room for θ, beyond what a float32 can tell


def _search(cut: Cut, xs: list[Array], caps: list[Array], peaks: Cells, goals: Cells) -> Cells:
    """θ measured from the largest entry: Newton's step where it stays between the bounds, else half way.

    A scope is done when a step of Newton's sees the same entries above 0 and at their caps as the one
    before: to the same numbers half way the sum need not be straight. Where a step goes up at one end
    of a bend and down at the other, Newton's go back and forth for ever, so each third one is half way.
    """
    wide = cut.wide(xs)
    lowest = cut.scopes.max([jnp.where(x > -jnp.inf, -x, -jnp.inf) for x in wide], initial=-jnp.inf)
    # Not of an entry of -inf, which stays at 0.
    rising = [jnp.where(x > -jnp.inf, cap, 0) for x, cap in zip(wide, caps, strict=True)]
    tallest, most = cut.scopes.max(rising), float(jnp.finfo(accumulator(wide)).max)
    start = [-jnp.minimum(cap, goal) for cap, goal in zip(tallest, goals, strict=True)]
    lows = [
        jnp.maximum(-low - peak + step, -most)
        for low, peak, step in zip(lowest, peaks, start, strict=True)
    ]
    zeros = [0 * peak for peak in peaks]

    def body(at: _Bracket) -> _Bracket:
        point = _step(cut, xs, caps, [peaks], goals, at.thetas)
        halve = at.turn % 3 == 2
        rows = [_halved(halve, *row) for row in zip(*at[:6], *point, goals, strict=True)]
        columns: list[Any] = list(map(list, zip(*rows, strict=True)))
        return _Bracket._make([*columns, at.turn + 1])

    def unsettled(at: _Bracket) -> Array:
        settled = all_devices_agree(functools.reduce(operator.and_, map(jnp.all, at.done)))
        return ~settled & (at.turn < _TURNS)

    nowhere = [zero - 1 for zero in zeros]
    first = _Bracket(lows, zeros, start, nowhere, nowhere, [z > 0 for z in zeros], jnp.int32(0))
    found: _Bracket = lax.while_loop(unsettled, body, first)
    return found.thetas


def _halved(
    halve: Array, low: Array, high: Array, theta: Array, above: Array, full: Array, done: Array,
    moved: Array, got: Array, now_above: Array, now_full: Array, goal: Array,
) -> tuple[Array, ...]:  # fmt: skip
    """The bounds of a scope, its next θ, what the step saw if it was one of Newton's, and is θ found?"""
    more = got > goal
    low, high = jnp.where(more, theta, low), jnp.where(more, high, theta)
    between = (moved >= low) & (moved <= high) & (now_above > now_full)
    found = between & (above == now_above) & (full == now_full) | (got == goal)
    straight = between & ~halve | found
    new = jnp.where(straight, moved, low + (high - low) / 2)
    seen = (jnp.where(straight, n, -1) for n in (now_above, now_full))
    return low, high, jnp.where(done, theta, new), *seen, done | found
