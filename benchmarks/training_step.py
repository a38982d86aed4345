"""A whole training step, gradients made inside, with every clip and set, beside the step without.

A clip that is given its gradients reads them from memory. In a real step they come out of a product of
matrices: what reads them may be fused into that product, or make them all wait.

    python -m benchmarks.training_step --only box --dtypes float32
    python -m benchmarks.training_step --chips H100 --only box
"""

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.stages import Compiled

import optax_clip as oc
from benchmarks import _chips, _hlo
from benchmarks._timing import DTYPES, Row, cell, interleaved, line, normal, ratios, size_of
from benchmarks.overheads import (
    ADAM,
    Peer,
    after_adam,
    by_rank,
    clipped,
    in_box,
    l2_ball,
    l2_sphere,
    per_leaf,
    skipping,
)

CHIPS = (_chips.H100, _chips.V5E)
ROUNDS = 9


class Network(NamedTuple):
    """Layers of one matrix each, and how many examples go through them."""

    layers: int
    side: int
    batch: int

    def params(self, dtype: str) -> dict[str, jax.Array]:
        """With orthogonal-like weights, so that signals keep their size."""
        shapes = {f"{i:02}": (self.side, self.side) for i in range(self.layers)}
        weights: dict[str, jax.Array] = normal(shapes, dtype, seed=0, scale=self.side**-0.5)
        return weights

    def examples(self, dtype: str) -> jax.Array:
        x: jax.Array = normal((self.batch, self.side), dtype, seed=1)
        return x


ON_CPU = Network(layers=10, side=1000, batch=32)
ON_CHIPS = Network(layers=6, side=4096, batch=512)
TINY = Network(layers=2, side=8, batch=4)


def loss(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    for w in params.values():
        x = jnp.tanh(x @ w)
    return jnp.mean((x - 1) ** 2).astype(jnp.float32)


def compile_training(
    tx: optax.GradientTransformation, params: Any, x: Any, finish: Any = lambda params: params
) -> Compiled:
    """A step that is given away its weights and state. Shapes suffice."""

    def step(params: Any, state: Any, x: Any) -> tuple[Any, Any]:
        updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        return finish(optax.apply_updates(params, updates)), state

    state = jax.eval_shape(tx.init, params)
    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, x).compile()


class Bound(NamedTuple):
    """A clip or a set around Adam, with its record and without, and Optax's way to do the same."""

    label: str
    ours: optax.GradientTransformation
    bare: optax.GradientTransformation | None = None
    peer: Peer | None = None

    @property
    def contenders(self) -> dict[str, Peer]:
        found = {"ours": Peer(self.label, self.ours)}
        if self.bare is not None:
            found["bare"] = Peer(self.label, self.bare)
        return found | ({"optax": self.peer} if self.peer is not None else {})


def first(label: str, clip: Callable[..., Any], peer: Peer | None = None) -> Bound:
    """A clip before Adam."""
    with_record, without = (optax.chain(clip(record=record), ADAM) for record in (True, False))
    return Bound(label, with_record, without, peer)


def last(label: str, constraint: oc.Constraint, project: Callable[[Any], Any] | None = None) -> Bound:
    """A set after Adam, and a function of the new weights."""
    with_record, without = (
        optax.chain(ADAM, oc.project_weights(constraint, record=record)) for record in (True, False)
    )
    peer = Peer("projection", finish=project) if project is not None else None
    return Bound(label, with_record, without, peer)


ALONE = Bound("Adam alone", ADAM)


def clips() -> Iterator[Bound]:
    part = functools.partial
    by_group = {"matrix": 1.0, "vector": 0.1}
    agc = clipped("adaptive_grad_clip", optax.adaptive_grad_clip(0.01))
    yield first(
        "clip_by_global_norm",
        part(oc.clip_by_global_norm, 1.0),
        clipped("clip_by_global_norm", optax.clip_by_global_norm(1.0)),
    )
    yield first("clip_by_norm, leaf", part(oc.clip_by_norm, 1.0))
    yield first(
        "clip_by_norm, leaf, rms",
        part(oc.clip_by_norm, 1e-4, ord="rms"),
        clipped("clip_by_block_rms", optax.clip_by_block_rms(1e-4)),
    )
    yield first("clip_by_norm, unit", part(oc.clip_by_norm, 1.0, scope="unit"))
    for label, clip, peer in (
        ("clip_by_norm, leaf, local", part(oc.clip_by_norm, 1.0), None),
        ("clip_by_norm, unit, local", part(oc.clip_by_norm, 1.0, scope="unit"), None),
        ("adaptive_grad_clip, local", part(oc.adaptive_grad_clip, 0.01), agc),
    ):
        yield first(label, part(clip, nonfinite="local"), peer)
    yield first("clip_by_norm, groups", part(oc.clip_by_norm, by_group, scope=oc.groups(by_rank)))
    yield first("adaptive_grad_clip", part(oc.adaptive_grad_clip, 0.01), agc)
    yield first("clip_by_value", part(oc.clip_by_value, 1e-4), clipped("clip", optax.clip(1e-4)))
    yield first(
        "normalize_by_norm",
        oc.normalize_by_norm,
        clipped("normalize_by_update_norm", optax.normalize_by_update_norm()),
    )
    for rule in (oc.autoclip, oc.zclip, oc.adagc):
        yield first(rule.__name__, rule)
    yield first("running_quantile", part(oc.clip_by_norm, oc.running_quantile(0.9), scope="global"))
    yield first("zscore, unit", part(oc.clip_by_norm, oc.zscore(2.0), scope="unit"))
    yield Bound(
        "clip_by_update_rms, after scale_by_adam",
        after_adam(oc.clip_by_update_rms(0.5)),
        after_adam(oc.clip_by_update_rms(0.5, record=False)),
        Peer("optax.clip_by_block_rms", after_adam(optax.clip_by_block_rms(0.5))),
    )
    yield Bound(
        "skip_spikes",
        oc.skip_spikes(ADAM, 1e9),
        oc.skip_spikes(ADAM, 1e9, record=False),
        Peer("MultiSteps, skip_large_updates", skipping(1e9)),
    )


def sets() -> Iterator[Bound]:
    yield last("box", oc.box(-0.01, 0.02), per_leaf(lambda x: in_box(x, -0.01, 0.02)))
    yield last("norm_ball, leaf", oc.norm_ball(2.0), per_leaf(lambda x: l2_ball(x, 2.0)))
    yield last("norm_ball, unit", oc.norm_ball(0.1, scope="unit"))
    yield last(
        "norm_ball, global", oc.norm_ball(5.0, scope="global"), lambda params: l2_ball(params, 5.0)
    )
    yield last("norm_sphere, leaf", oc.norm_sphere(2.0), per_leaf(lambda x: l2_sphere(x, 2.0)))
    yield last("norm_shell, leaf", oc.norm_shell(1.0, 2.0))


def bounds() -> list[Bound]:
    """All rows of the tables."""
    return [*clips(), *sets()]


# --- On a CPU, by the clock ----------------------------------------------------------------------


class _Training:
    """A step as a contender: each call goes on from the weights and state of the last."""

    def __init__(self, network: Network, dtype: str, contender: Peer) -> None:
        params, self.x = network.params(dtype), network.examples(dtype)
        self.compiled = compile_training(contender.tx, params, self.x, contender.finish)
        self.temporaries = self.compiled.memory_analysis().temp_size_in_bytes / size_of(params)
        self.carry = params, jax.jit(contender.tx.init)(params)

    def __call__(self) -> Any:
        self.carry = self.compiled(*self.carry, self.x)
        return self.carry


def run(*, smoke: bool) -> list[Row]:
    network, dtypes, rounds = (TINY, DTYPES[:1], 1) if smoke else (ON_CPU, DTYPES, ROUNDS)
    print(
        f"A training step, gradients made inside: {network.layers} layers of {network.side} x "
        f"{network.side}, batch {network.batch}, Adam"
    )
    print("as a multiple of the step without a bound [quartiles]; temporaries as one of the gradients")
    few = ("clip_by_global_norm", "box") if smoke else ()
    return list(_timed(network, dtypes, rounds, few))


def _timed(
    network: Network, dtypes: tuple[str, ...], rounds: int, only: tuple[str, ...]
) -> Iterator[Row]:
    for dtype in dtypes:
        line(dtype, "alone, ms", "ours", "record=False", "Optax", "temporaries", "  with".ljust(38))
        alone = _Training(network, dtype, Peer(ALONE.label))
        for bound in bounds():
            if not only or bound.label in only:
                yield _timed_row(bound, alone, network, dtype, rounds)


def _timed_row(bound: Bound, alone: _Training, network: Network, dtype: str, rounds: int) -> Row:
    steps = {"alone": alone} | {
        key: _Training(network, dtype, contender) for key, contender in bound.contenders.items()
    }
    row = ratios(interleaved(steps, rounds))
    row |= {f"{key}_temporaries": step.temporaries for key, step in steps.items()}
    held = " ".join(f"{steps[key].temporaries:.2f}" for key in steps)
    peer = bound.peer.label if bound.peer else None
    cells = (cell(row, key) for key in ("ours", "bare", "optax"))
    line(bound.label, f"{row['alone_ms']:.1f}", *cells, held, f"  {peer or '':36}")
    return {"group": "training", "name": bound.label, "peer": peer, "dtype": dtype, **row}


# --- For an H100 and a TPU, by their compilers ---------------------------------------------------


def measure(contender: Peer, chip: str, dtype: str, network: Network = ON_CHIPS) -> dict[str, float]:
    """What a step moves, and what it holds, in multiples of the gradients."""
    place = jax.sharding.SingleDeviceSharding(_chips.chip(chip))
    struct = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.dtype(dtype), sharding=place)
    params = {f"{i:02}": struct((network.side, network.side)) for i in range(network.layers)}
    x = struct((network.batch, network.side))
    compiled = compile_training(contender.tx, params, x, contender.finish)
    kernels, unit = _hlo.read(compiled.as_text()).kernels(), size_of(params)
    return {
        "units": sum(kernel.moved for kernel in kernels) / unit,
        "temporaries": compiled.memory_analysis().temp_size_in_bytes / unit,
    }


def run_compiled(*, smoke: bool) -> list[Row]:
    """The same, by the compilers of chips that need not be there."""
    network, dtypes = (TINY, DTYPES[:1]) if smoke else (ON_CHIPS, DTYPES)
    few = ("clip_by_global_norm",) if smoke else ()
    return list(_compiled(network, CHIPS, dtypes, few))


def _compiled(
    network: Network, chips: tuple[str, ...], dtypes: tuple[str, ...], only: tuple[str, ...]
) -> Iterator[Row]:
    print(
        f"A training step, gradients made inside: {network.layers} layers of {network.side} x "
        f"{network.side}, batch {network.batch}, Adam"
    )
    print("units; temporaries, both in multiples of the gradients' bytes")
    for chip, dtype in itertools.product(chips, dtypes):
        line(f"{chip}, {dtype}", "ours", "record=False", "Optax", "  with".ljust(38))
        for bound in (ALONE, *bounds()):
            if not only or bound.label in only:
                yield _compiled_row(bound, chip, dtype, network)


def _compiled_row(bound: Bound, chip: str, dtype: str, network: Network) -> Row:
    found = {key: measure(peer, chip, dtype, network) for key, peer in bound.contenders.items()}
    cells = [
        f"{found[key]['units']:.2f}; {found[key]['temporaries']:.2f}" if key in found else "-"
        for key in ("ours", "bare", "optax")
    ]
    peer = bound.peer.label if bound.peer else None
    line(bound.label, *cells, f"  {peer or '':36}")
    counts = {f"{key}_{kind}": x for key, each in found.items() for kind, x in each.items()}
    names = {"name": bound.label, "peer": peer, "chip": chip, "dtype": dtype}
    return {"group": "compiled_training", **names, **counts}


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.training_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [ALONE.label, *(bound.label for bound in bounds())]
    parser.add_argument("--only", nargs="+", metavar="ROW", default=(), help="; ".join(names))
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=(), help="compile for these")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    if unknown := set(args.only) - set(names):
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    only, dtypes = tuple(args.only), tuple(args.dtypes)
    if args.chips and (reason := _chips.missing()):
        parser.exit(1, f"{reason}\n")
    rows = (
        _compiled(ON_CHIPS, tuple(args.chips), dtypes, only)
        if args.chips
        else _timed(ON_CPU, dtypes, args.rounds, only)
    )
    for _ in rows:
        pass


if __name__ == "__main__":
    main()
