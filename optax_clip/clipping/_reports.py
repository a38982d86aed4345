"""The metrics of a clip, of the whole tree and of its parts."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from optax_clip import _validate
from optax_clip._records import Report, distinct
from optax_clip._trees import Cells, Scopes
from optax_clip._validate import Groups, Record, Scope


def clip_report(
    before: Array, after: Array, threshold: Array, share: Array, finite: Array, parts: Any = None
) -> Report:
    """The metrics of a clip."""
    counts = (True, finite & (share > 0), ~finite)
    return Report({"norms": (before, after, threshold, share)}, {"counts": counts}, parts or {})


class NamedParts(NamedTuple):
    """The scopes that have names, for metrics of their own: groups by label, leaves by path."""

    scope: Scope

    def init(self, params: Any) -> dict[str, str]:
        return dict.fromkeys(
            part_names(Scopes.of(params, self.scope, axis_name=())[0], "scope"), "scope"
        )

    def report(self, scopes: Scopes, before: Cells, after: Cells, limits: Cells) -> dict[str, Any]:
        names = part_names(scopes, "scope")
        limit = jnp.broadcast_to(limits[0], before[0].shape)
        rows = zip(names, before[0], after[0], limit, strict=True)
        return {name: {"scope": row} for name, *row in rows}


def part_names(scopes: Scopes, field: str) -> list[str]:
    """The labels, or the paths of the leaves, as names of parts that record some field."""
    if scopes.labels is not None:
        return distinct(scopes.labels, field)
    # Numbered among all leaves, since some may have no update now.
    names = distinct([path or "leaf" for path in scopes.paths], field)
    return [names[i] for i in scopes.places]


def named_parts(scope: Scope, record: Record) -> NamedParts | None:
    _validate.record(record, "scopes")
    if record == "scopes" and scope != "leaf" and not isinstance(scope, Groups):
        raise ValueError(
            f'Expected record="scopes" only with scope="leaf" or groups, got scope={scope!r}.'
        )
    return NamedParts(scope) if record and (record == "scopes" or isinstance(scope, Groups)) else None
