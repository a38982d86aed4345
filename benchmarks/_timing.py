"""What the groups share: interleaved timing, a train step that owns its weights, rows and tables."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.stages import Compiled

import optax_clip

Row = dict[str, Any]  # one line of a table, as bench.json keeps it
LEAST = 0.005  # seconds a sample lasts at least, so that the clock and the scheduler do not show
WARM_UPS = 2
MAX_NORM = 1.0  # far below the norm of the gradients, so that every step is clipped

OPTIMIZERS = {
    "sgd": lambda: optax.sgd(1e-3),
    "adam": lambda: optax.adam(1e-3),
    "adamw": lambda: optax.adamw(optax.cosine_decay_schedule(1e-3, 100_000), weight_decay=0.01),
}

DTYPES = ("float32", "bfloat16")
CLIPS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "alone": optax.identity,
    "ours": lambda: optax_clip.clip_by_global_norm(MAX_NORM),
    "optax": lambda: optax.clip_by_global_norm(MAX_NORM),
}


def interleaved(contenders: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    """Return the seconds of one call, for each round, after warm-up; all take turns: A B A B.

    A contender returns all that it made, which is waited for. Short ones are called several times a
    round.
    """
    calls = {}
    for name, contender in contenders.items():
        for _ in range(WARM_UPS):
            start = time.perf_counter()
            jax.block_until_ready(contender())
        calls[name] = 1 + int(LEAST / (time.perf_counter() - start))
    seconds = {name: np.empty(rounds) for name in contenders}
    for turn in range(rounds):
        for name, contender in contenders.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                jax.block_until_ready(contender())
            seconds[name][turn] = (time.perf_counter() - start) / calls[name]
    return seconds


def medians(functions: Sequence[Callable[[Any], Any]], x: Any, rounds: int) -> list[float]:
    """Return the median seconds of each function of one array, jitted, run in turn."""
    x, compiled = jnp.asarray(x), [jax.jit(function) for function in functions]
    seconds = interleaved({str(i): functools.partial(f, x) for i, f in enumerate(compiled)}, rounds)
    return [float(np.median(each)) for each in seconds.values()]


def quartiles(name: str, values: np.ndarray) -> Row:
    low, median, high = np.percentile(values, (25, 50, 75)).tolist()
    return {name: median, f"{name}_low": low, f"{name}_high": high}


def ratios(seconds: dict[str, np.ndarray]) -> Row:
    """The ratio of each contender to the first, round by round, and the milliseconds of all."""
    baseline, *others = seconds
    row: Row = {f"{name}_ms": 1e3 * float(np.median(each)) for name, each in seconds.items()}
    for name in others:
        row |= quartiles(name, seconds[name] / seconds[baseline])
    return row


def cell(row: Row, name: str) -> str:
    """A median and its quartiles as a table shows them, to three digits or so."""
    if name not in row:
        return "-"
    digits = max(0, 2 - len(f"{abs(row[name]):.0f}") + 1)
    middle, low, high = (f"{row[key]:.{digits}f}" for key in (name, f"{name}_low", f"{name}_high"))
    return f"{middle} [{low}, {high}]"


def compile_step(
    tx: optax.GradientTransformation,
    params: Any,
    grads: Any,
    finish: Callable[[Any], Any] = lambda params: params,
) -> Compiled:
    """Compile a step that is given away its weights and state, as in training.

    `finish` acts on the new weights, for peers that are functions and not transforms. Shapes suffice.
    """

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return finish(optax.apply_updates(params, updates)), state

    state = jax.eval_shape(tx.init, params)
    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, grads).compile()


class Step:
    """A train step as a contender: each call goes on from the weights and state of the last."""

    def __init__(
        self,
        tx: optax.GradientTransformation,
        params: Any,
        grads: Any,
        finish: Callable[[Any], Any] = lambda params: params,
    ) -> None:
        start = time.perf_counter()
        self.compiled = compile_step(tx, params, grads, finish)
        self.compile_seconds = time.perf_counter() - start
        self.grads = grads
        self.carry = jax.tree.map(jnp.copy, params), jax.jit(tx.init)(params)

    def __call__(self) -> Any:
        self.carry = self.compiled(*self.carry, self.grads)
        return self.carry


def reading(tree: Any) -> Callable[[], Any]:
    """One read of as many bytes as the tree has, by NumPy from one array: what the memory allows."""
    x = np.ones(max(1, size_of(tree) // 4), np.float32)
    return lambda: np.dot(x, x)


def size_of(tree: Any) -> int:
    """The bytes of a tree of arrays or shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


Shapes = Any  # a tree of shape tuples


def gpt(layers: int, d: int, vocab: int, length: int) -> Shapes:
    """The weights of a GPT, as a nested dict."""

    def dense(wide: int, out: int) -> Shapes:
        return {"kernel": (wide, out), "bias": (out,)}

    norm = {"scale": (d,), "bias": (d,)}
    layer = {
        "norm_1": norm,
        "attention": {"qkv": dense(d, 3 * d), "out": dense(d, d)},
        "norm_2": norm,
        "mlp": {"up": dense(d, 4 * d), "down": dense(4 * d, d)},
    }
    return {
        "embed": {"tokens": (vocab, d), "positions": (length, d)},
        "layers": {str(i): layer for i in range(layers)},
        "norm": norm,
    }


LARGE = [(2_500_000,)] * 10
SMALL = [(64,)] * 3


def trees(smoke: bool) -> dict[str, Shapes]:
    """The shapes of a few large leaves, of many small ones, and of a real model."""
    if smoke:
        return {"GPT, tiny": gpt(1, 8, 32, 8)}
    return {
        "10 x 2.5 M": LARGE,
        "100 x 100 k": [(100_000,)] * 100,
        "GPT, 42 M": gpt(12, 512, 8192, 1024),
    }


def structs(shapes: Shapes, dtype: str) -> Any:
    """A tree of arrays without entries, which is what compiling needs."""
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def normal(shapes: Shapes, dtype: str, *, seed: int, scale: float = 1.0) -> Any:
    """A tree of normal entries; every leaf is a piece of one sequence, so large trees come at once."""
    rng = np.random.default_rng(seed)
    pool = scale * rng.standard_normal(1_000_003, np.float32)

    def leaf(struct: jax.ShapeDtypeStruct) -> jax.Array:
        entries = np.resize(np.roll(pool, -int(rng.integers(pool.size))), struct.shape)
        return jnp.asarray(entries, dtype)

    return jax.tree.map(leaf, structs(shapes, dtype))


def line(name: str, *cells: Any, width: int = 22) -> None:
    """Print one line of a table, at once: the name to the left, the cells to the right."""
    print(f"{name:44}" + "".join(f"{cell!s:>{width}}" for cell in cells).rstrip(), flush=True)
