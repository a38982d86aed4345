"""What each transform and each set adds to an Adam step, beside Optax's equivalent where it has one.

Optax's projections are functions of the weights, of the whole tree as one vector: they are applied after
`apply_updates`, leaf by leaf or unit by unit where ours acts so.

    python -m benchmarks.overheads --only box "norm_ball, leaf"
"""

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optax_clip
from benchmarks._timing import OPTIMIZERS, Row, Step, cell, interleaved, line, normal, ratios

ROUNDS = 11
SIDE, MATRICES = 1000, 10
ADAM = OPTIMIZERS["adam"]()

l1_ball = optax.projections.projection_l1_ball
l2_ball = optax.projections.projection_l2_ball
l2_sphere = optax.projections.projection_l2_sphere
on_simplex = optax.projections.projection_simplex
in_box = optax.projections.projection_box


class Peer(NamedTuple):
    """Optax's way to do the same: a transform, or a function of the new weights."""

    label: str
    tx: optax.GradientTransformation = ADAM
    finish: Callable[[Any], Any] = lambda params: params


class Case(NamedTuple):
    label: str
    ours: optax.GradientTransformation
    peer: Peer | None = None


def before(label: str, clip: optax.GradientTransformation, peer: Peer | None = None) -> Case:
    return Case(label, optax.chain(clip, ADAM), peer)


def weights(label: str, constraint: optax_clip.Constraint, peer: Peer | None = None) -> Case:
    return Case(label, optax.chain(ADAM, optax_clip.project_weights(constraint)), peer)


def arriving(label: str, constraint: optax_clip.Constraint) -> Case:
    return Case(f"constrained, {label}", optax_clip.constrained(ADAM, constraint))


def clipped(name: str, clip: optax.GradientTransformation) -> Peer:
    return Peer(f"optax.{name}", optax.chain(clip, ADAM))


def by_logits(record: bool = True) -> optax.GradientTransformation:
    """QK-Clip of one head a matrix, whose largest logit is above the limit."""

    def factors(path: str, leaf: Any, eta: Any) -> Any:
        return jnp.sqrt(eta) if leaf.ndim > 1 else None

    clip = optax_clip.qk_clip(factors, record=record)
    return optax.GradientTransformationExtraArgs(
        clip.init, lambda *args, **extra: clip.update(*args, max_logits=jnp.float32(120), **extra)
    )


def per_leaf(project: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return functools.partial(jax.tree.map, project)


def per_unit(project: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function of vectors on each column of a matrix, and on a vector as it is."""
    columns = jax.vmap(project, in_axes=-1, out_axes=-1)
    return per_leaf(lambda x: columns(x) if x.ndim > 1 else project(x))


def after_adam(clip: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.chain(optax.scale_by_adam(), clip, optax.scale_by_learning_rate(1e-3))


def by_rank(path: str, leaf: Any) -> str:
    return "matrix" if leaf.ndim > 1 else "vector"


def ranks(params: Any) -> Any:
    return jax.tree.map(lambda x: by_rank("", x), params)


def in_groups() -> Iterator[Case]:
    """One clip with a limit for each label, beside the two ways to write it with Optax."""
    ours = optax_clip.clip_by_norm({"matrix": 1.0, "vector": 0.1}, scope=optax_clip.groups(by_rank))
    clips = {"matrix": optax.clip_by_global_norm(1.0), "vector": optax.clip_by_global_norm(0.1)}
    masked = (
        optax.masked(clip, lambda params, label=label: jax.tree.map(label.__eq__, ranks(params)))
        for label, clip in clips.items()
    )
    yield before("clip_by_norm, groups", ours, Peer("two optax.masked", optax.chain(*masked, ADAM)))
    parts = optax.partition(clips, ranks)
    yield before("clip_by_norm, groups (2)", ours, clipped("partition", parts))


def skipping(limit: float) -> optax.GradientTransformation:
    """Optax's way to leave out steps of a large norm: an accumulation over one step."""
    skip = functools.partial(optax.skip_large_updates, max_squared_norm=limit**2)
    return optax.MultiSteps(ADAM, 1, should_skip_update_fn=skip).gradient_transformation()


def cases() -> Iterator[Case]:
    """Each transform and set, with limits that the gradients and the weights exceed.

    The matrices of the gradients have a norm of about 1,000, their units 30; the weights 0.02 of it. The
    norm stays the same from step to step, so what learns its limit, and `skip_spikes`, lets it pass.
    """
    block_rms = optax.clip_by_block_rms(0.01)
    agc = clipped("adaptive_grad_clip", optax.adaptive_grad_clip(0.01))
    normalize = clipped("normalize_by_update_norm", optax.normalize_by_update_norm())
    yield before(
        "clip_by_global_norm",
        optax_clip.clip_by_global_norm(1.0),
        clipped("clip_by_global_norm", optax.clip_by_global_norm(1.0)),
    )
    yield before("clip_by_norm, leaf", optax_clip.clip_by_norm(1.0))
    yield before(
        "clip_by_norm, leaf, rms",
        optax_clip.clip_by_norm(0.01, ord="rms"),
        clipped("clip_by_block_rms", block_rms),
    )
    yield from in_groups()
    yield before("clip_by_norm, unit", optax_clip.clip_by_norm(1.0, scope="unit"))
    yield before("adaptive_grad_clip", optax_clip.adaptive_grad_clip(0.01), agc)
    yield before("clip_by_value", optax_clip.clip_by_value(1.0), clipped("clip", optax.clip(1.0)))
    yield before("normalize_by_norm", optax_clip.normalize_by_norm(), normalize)
    yield before("autoclip", optax_clip.autoclip())
    yield before("zclip", optax_clip.zclip())
    yield before("adagc", optax_clip.adagc())
    yield Case(
        "clip_by_update_rms, after scale_by_adam",
        after_adam(optax_clip.clip_by_update_rms(0.5)),
        Peer("optax.clip_by_block_rms", after_adam(optax.clip_by_block_rms(0.5))),
    )
    yield Case(
        "skip_spikes",
        optax_clip.skip_spikes(ADAM, 1e9),
        Peer("optax.MultiSteps, skip_large_updates", skipping(1e9)),
    )
    yield weights(
        "box",
        optax_clip.box(-0.01, 0.02),
        Peer("projection_box", finish=per_leaf(lambda x: in_box(x, -0.01, 0.02))),
    )
    yield weights(
        "non_negative",
        optax_clip.non_negative(),
        Peer("optax.keep_params_nonnegative", optax.chain(ADAM, optax.keep_params_nonnegative())),
    )
    yield weights("init_box", optax_clip.init_box(0.5))
    yield weights(
        "norm_ball, leaf",
        optax_clip.norm_ball(2.0),
        Peer("projection_l2_ball per leaf", finish=per_leaf(lambda x: l2_ball(x, 2.0))),
    )
    yield weights(
        "norm_ball, unit",
        optax_clip.norm_ball(0.1, scope="unit"),
        Peer("projection_l2_ball per unit (vmap)", finish=per_unit(lambda x: l2_ball(x, 0.1))),
    )
    yield weights(
        "norm_ball, global",
        optax_clip.norm_ball(5.0, scope="global"),
        Peer("projection_l2_ball", finish=lambda p: l2_ball(p, 5.0)),
    )
    yield weights(
        "norm_ball, leaf, ord=1",
        optax_clip.norm_ball(2.0, ord=1),
        Peer("projection_l1_ball per leaf", finish=per_leaf(lambda x: l1_ball(x, 2.0))),
    )
    yield weights(
        "norm_sphere, leaf",
        optax_clip.norm_sphere(2.0),
        Peer("projection_l2_sphere per leaf", finish=per_leaf(lambda x: l2_sphere(x, 2.0))),
    )
    yield weights("norm_sphere, initial", optax_clip.norm_sphere(optax_clip.initial()))
    yield weights("norm_shell, leaf", optax_clip.norm_shell(1.0, 2.0))
    yield weights(
        "simplex, leaf",
        optax_clip.simplex(),
        Peer("projection_simplex per leaf", finish=per_leaf(on_simplex)),
    )
    yield before("gradient_mapping, norm_ball", optax_clip.gradient_mapping(optax_clip.norm_ball(2.0)))
    yield arriving("norm_ball", optax_clip.norm_ball(2.0))
    yield arriving("box", optax_clip.box(-0.01, 0.02))
    yield Case("qk_clip", optax.chain(ADAM, by_logits()))
    yield weights("spectral_ball, power_iterations=1", optax_clip.spectral_ball(0.5, power_iterations=1))


def run(*, smoke: bool, only: Sequence[str] = ()) -> list[Row]:
    side, matrices, rounds = (8, 1, 1) if smoke else (SIDE, MATRICES, ROUNDS)
    layer = {"kernel": (side, side), "bias": (side,)}
    shapes = {str(i): layer for i in range(matrices)}
    params = normal(shapes, "float32", seed=0, scale=0.02)
    grads = normal(shapes, "float32", seed=1)
    print(f"All scopes and rules: an Adam step on {matrices} matrices of {side} x {side} and biases")
    print("as a multiple of Adam alone [quartiles]; Optax's projections come after apply_updates")
    line("", "Adam, ms", "ours", "Optax", "  with".ljust(36))
    alone = Step(ADAM, params, grads)
    chosen = [case for case in cases() if not only or case.label in only]
    return [_row(case, alone, params, grads, rounds) for case in chosen]


def _row(case: Case, alone: Step, params: Any, grads: Any, rounds: int) -> Row:
    contenders = {"alone": alone, "ours": Step(case.ours, params, grads)}
    if case.peer is not None:
        contenders["optax"] = Step(case.peer.tx, params, grads, case.peer.finish)
    row = ratios(interleaved(contenders, rounds))
    peer = case.peer.label if case.peer is not None else None
    line(
        case.label, f"{row['alone_ms']:.2f}", cell(row, "ours"), cell(row, "optax"), f"  {peer or '':34}"
    )
    return {
        "group": "overheads",
        "name": case.label,
        "peer": peer,
        "dtype": "float32",
        "optimizer": "adam",
        **row,
    }


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.overheads")
    names = [case.label for case in cases()]
    parser.add_argument("--only", nargs="+", choices=names, default=(), metavar="ROW")
    run(smoke=False, only=parser.parse_args().only)


if __name__ == "__main__":
    main()
