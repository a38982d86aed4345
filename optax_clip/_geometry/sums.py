"""Entries less one number, and cut at 0, so that each scope has a given sum."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from optax_clip import _xla
from optax_clip._mesh import all_devices_agree
from optax_clip._numerics import accumulator, widen
from optax_clip._trees import Cells, Scopes


class Entries(NamedTuple):
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


@functools.partial(jax.jit, static_argnums=0)
def soft_threshold(cut: Entries, xs: list[Array], totals: Cells) -> list[Array]:
    """``max(t - θ, 0)`` with θ such that each scope sums to its total.

    Entries are measured from the largest one, so a common offset costs no precision. The search is
    constant to derivatives; one more of its steps has the derivative of θ, and on CPU its value.
    """
    fixed, goals = lax.stop_gradient((xs, totals))
    peaks = cut.scopes.max(cut.wide(fixed), initial=-jnp.inf)
    found = _newton(cut, fixed, peaks, goals)
    origins = [peaks, found.origins]
    steps, _ = _newton_step(cut, xs, origins, totals, found.thetas)
    thetas = _xla.one_more(found.thetas, steps)
    return [jnp.maximum(d, 0) for d in cut.depths(xs, [*origins, thetas])]


def _newton_step(
    cut: Entries, xs: list[Array], origins: list[Cells], goals: Cells, thetas: Cells
) -> tuple[Cells, Cells]:
    """One step towards the root, and how many entries are above."""
    depths = cut.depths(xs, [*origins, thetas])
    counts = cut.scopes.sum([(d > 0).astype(d.dtype) for d in depths])
    units = [_unit(goal) for goal in goals]
    scales = _xla.written_once(cut.scopes.per_leaf(units))
    sums = cut.scopes.sum([jnp.where(d > 0, d * k, 0) for d, k in zip(depths, scales, strict=True)])
    rows = zip(thetas, sums, goals, units, counts, strict=True)
    return [
        theta + (got - goal * unit) / jnp.maximum(n, 1) / unit for theta, got, goal, unit, n in rows
    ], counts


def _unit(goal: Array) -> Array:
    """A power of two with which entries that are below the goal have a finite sum."""
    return jnp.where(goal > 2.0**80, 2.0**-40, 1).astype(goal.dtype)


class _Search(NamedTuple):
    """θ measured from an origin, the entries above at the last step, and how far the search is."""

    origins: Cells
    thetas: Cells
    counts: Cells
    phase: Array  # 0: from below; 1: one step back, from what was found; 2: from below again; 3: done


def _newton(cut: Entries, xs: list[Array], peaks: Cells, goals: Cells) -> _Search:
    """Newton's steps from below never pass θ nor go back, and end when the same entries are above.

    A second search is measured from what the first one found, as a rounding of θ counts for each entry
    above it; so its first step may have to go back.
    """
    zeros = [peak * 0 for peak in peaks]
    nowhere = [zero + jnp.inf for zero in zeros]

    def body(at: _Search) -> _Search:
        moved, counts = _newton_step(cut, xs, [peaks, at.origins], goals, at.thetas)
        same = [jnp.all(c == n) for c, n in zip(counts, at.counts, strict=True)]
        settled = all_devices_agree(functools.reduce(operator.and_, same))
        back, again = at.phase == 1, settled & (at.phase == 0)
        # A rounding may take θ back, and an entry in and out for ever.
        new = _where(back, moved, [jnp.maximum(*pair) for pair in zip(at.thetas, moved, strict=True)])
        return _Search(
            _where(again, new, at.origins), _where(again, zeros, new),
            _where(again | back, nowhere, counts), at.phase + (back | settled).astype(jnp.int32),
        )  # fmt: skip

    start = _Search(zeros, _below(cut, xs, peaks, goals), nowhere, jnp.int32(0))
    found: _Search = lax.while_loop(lambda at: at.phase < 3, body, start)
    return found


def _below(cut: Entries, xs: list[Array], peaks: Cells, goals: Cells) -> Cells:
    """Newton's step from below all entries, kept where θ can be: from -goal to -goal / n."""
    rows = zip(cut.scopes.sum(cut.wide(xs)), peaks, goals, cut.scopes.counts, strict=True)
    starts = []
    for total, peak, goal, n in rows:
        number = jnp.maximum(jnp.asarray(n, peak.dtype), 1)
        step = jnp.where(jnp.isfinite(total), (total - goal) / number - peak, -jnp.inf)
        starts.append(jnp.minimum(jnp.maximum(step, -goal), -goal / number))
    return starts


def _where(flag: Array, xs: Cells, ys: Cells) -> Cells:
    return [jnp.where(flag, x, y) for x, y in zip(xs, ys, strict=True)]
