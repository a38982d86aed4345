"""Which tree a memory belongs to. A state holds nothing but arrays, so the name of an entry tells."""

import base64
import functools
import hashlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp

from optax_clip._trees import as_struct, flatten, is_inexact, shape_of
from optax_clip._validate import Groups

_MARKS = 16  # letters that tell which leaf is the first to differ
_KEY = re.compile(r"of_(\d+)_leaves_([a-z2-7]{6})_([a-z2-7]{6})_([a-z2-7]*)")
_UNKNOWN = "?"


class Owner(NamedTuple):
    """A tree by its paths, and by what is at each: a shape, and in groups a label."""

    paths: tuple[str, ...]
    contents: tuple[str, ...]

    @classmethod
    def of(cls, tree: Any, scope: Any = None, beside: Any = None) -> "Owner":
        """``beside``, the weights, tell of the leaves that have no update."""
        paths, leaves, _ = flatten(tree)
        if beside is not None and any(x is None for x in leaves):
            others = dict(zip(*flatten(beside)[:2], strict=True))
            leaves = [others.get(p) if x is None else x for p, x in zip(paths, leaves, strict=True)]
        each = zip(paths, leaves, strict=True)
        return cls(tuple(paths), tuple(_content(scope, *leaf) for leaf in each))

    @property
    def key(self) -> str:
        return _key(self)


def _content(scope: Any, path: str, leaf: Any) -> str:
    if not is_inexact(leaf):
        return _UNKNOWN if leaf is None else ""
    label = scope.label(path, as_struct(leaf)) if isinstance(scope, Groups) else ""
    return f"{shape_of(leaf)} {label}"


@functools.lru_cache(maxsize=256)
def _key(owner: Owner) -> str:
    """How many leaves, a digest of the paths, one of all, and marks of the leaves in their order."""
    rows, n = list(zip(*owner, strict=True)), len(owner.paths)
    marks = "".join(_digest(rows[i:j], width) for i, j, width in _pieces(n))
    return f"of_{n}_leaves_{_digest(owner.paths, 6)}_{_digest(rows, 6)}_{marks}"


def _pieces(n: int) -> list[tuple[int, int, int]]:
    """Of each mark the leaves that it stands for, from and to, and how many letters it has."""
    number = min(n, _MARKS)
    return [(k * n // number, (k + 1) * n // number, _MARKS // number) for k in range(number)]


def _digest(words: Any, length: int) -> str:
    """The same in every process."""
    return base64.b32encode(hashlib.sha256(repr(words).encode()).digest()).decode().lower()[:length]


def kept(memory: Any, tree: Any, scope: Any = None) -> Any:
    """A memory under the name of its tree.

    Optax asks for a state without leaves: one number then stands for all.
    """
    owner = Owner.of(tree, scope)
    return {owner.key: memory} if owner.paths else jnp.zeros(())


def opened(held: Any, anew: Callable[[], Any]) -> Any:
    """What is remembered; of a tree without leaves there is nothing."""
    return next(iter(held.values())) if isinstance(held, dict) else anew()


def closed(held: Any, memory: Any) -> Any:
    """What is remembered next, under the same name."""
    return dict.fromkeys(held, memory) if isinstance(held, dict) else held


class Memory(NamedTuple):
    """What a transform remembers of a tree from its start on, or nothing if there is no ``first``."""

    first: Callable[[Any], Any] | None

    def init(self, params: Any) -> Any:
        return kept(self.first(params), params) if self.first else ()

    def opened(self, held: Any, params: Any) -> Any:
        first = self.first
        return opened(held, lambda: first(params)) if first else held

    def closed(self, held: Any, memory: Any) -> Any:
        return closed(held, memory) if self.first else memory


def keys(held: Any) -> Iterator[str]:
    """The names of trees in what a transform holds, but not in the states of others inside it."""
    for key, value in held.items() if isinstance(held, dict) else ():
        if is_key(key):
            yield key
        else:
            yield from keys(value)


def is_key(key: Any) -> bool:
    return _KEY.fullmatch(str(key)) is not None


def require(old: str, owner: Owner, *, of: str, in_parts: bool) -> None:
    """A name is that of a tree, whose leaves may be in parts, of which only the paths are known.

    Of a leaf without update or weights the shape is not known either.
    """
    if old == owner.key:
        return
    count, paths, _, marks = _parts(old)
    if paths == _parts(owner.key)[1] and (in_parts or _UNKNOWN in owner.contents):
        return
    n, at = len(owner.paths), _first_difference(int(count), marks, owner)
    shape = owner.contents[at].strip() if at < n else ""
    where = f"leaf {owner.paths[at]!r} {shape}".strip() if at < n else "the end"
    raise ValueError(
        f"Expected in update of {of} the tree that init saw, since it remembers something of each leaf, "
        f"got a tree of {n} leaves for a state of {count}, which differ from {where} on. Was a layer, a "
        "mask or a label changed? Make a new state, or carry over what it remembers as in the guide "
        '"States".'
    )


def _parts(key: str) -> tuple[str, ...]:
    match = _KEY.fullmatch(key)
    return match.groups() if match else ()


def _first_difference(count: int, marks: str, owner: Owner) -> int:
    """The first leaf, or the first of the few that share a mark."""
    rows, at = list(zip(*owner, strict=True)), 0
    for i, j, width in _pieces(count):
        if _digest(rows[i:j], width) != marks[at : at + width]:
            return i
        at += width
    return count
