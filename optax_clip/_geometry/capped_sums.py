"""The search for what to take off entries that are then cut at 0 and at a cap."""

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from optax_clip._geometry.sums import Entries
from optax_clip._mesh import all_devices_agree
from optax_clip._numerics import accumulator
from optax_clip._trees import Cells


@functools.partial(jax.jit, static_argnums=0)
def capped_threshold(cut: Entries, xs: list[Array], caps: list[Array], totals: Cells) -> list[Array]:
    """``min(max(t - θ, 0), cap)`` with θ such that each scope sums to its total.

    The search is constant to derivatives. Two more steps measure the entries from what it found, as a
    rounding of θ counts for each entry; they have the derivative of θ.
    """
    fixed, goals = lax.stop_gradient((xs, totals))
    wide = cut.wide(fixed)
    peaks = cut.scopes.max(wide, initial=-jnp.inf)
    origins = [peaks, _search(cut, fixed, lax.stop_gradient(caps), peaks, goals)]
    thetas = [0 * peak for peak in peaks]
    for goal in (goals, totals):
        thetas = _step(cut, xs, caps, origins, goal, lax.stop_gradient(thetas)).thetas
    depths = cut.depths(xs, [*origins, thetas])
    return [_cut(d, cap) for d, cap in zip(depths, caps, strict=True)]


def _cut(depth: Array, cap: Array) -> Array:
    """Between 0 and a cap; at either one constant to derivatives, as they are not counted as free."""
    return jnp.where(depth >= cap, cap, jnp.where(depth <= 0, 0, depth))


class _Point(NamedTuple):
    """After a step: where to, the sums before it, and how many entries were above 0 and at their cap."""

    thetas: Cells
    sums: Cells
    above: Cells
    full: Cells


def _step(
    cut: Entries, xs: list[Array], caps: list[Array], origins: list[Cells], goals: Cells, thetas: Cells
) -> _Point:
    """Newton's step towards the root; none where no entry moves."""
    depths = cut.depths(xs, [*origins, thetas])
    pairs = list(zip(depths, caps, strict=True))
    sums = cut.scopes.sum([_cut(d, cap) for d, cap in pairs])
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


def _search(cut: Entries, xs: list[Array], caps: list[Array], peaks: Cells, goals: Cells) -> Cells:
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
