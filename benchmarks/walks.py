"""Count what a reader of an update meets: the functions of the package that it enters, room by room.

python -m benchmarks.walks             # counts
python -m benchmarks.walks --functions  # and the functions, in the order in which they are entered
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_clip as oc

ROOT = Path(oc.__file__).parent
UPDATES = {
    "clip_by_global_norm(1.0)": oc.clip_by_global_norm(1.0),
    'project_weights(norm_ball(1.0, scope="unit"))': oc.project_weights(oc.norm_ball(1.0, scope="unit")),
    "project_weights(box(-1, 1))": oc.project_weights(oc.box(-1, 1)),
}


def walk(tx: optax.GradientTransformation) -> list[tuple[str, str]]:
    """Room and name of each function entered by a jitted update, in order; all ways of a platform."""
    found: dict[tuple[str, str], None] = {}

    def entered(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        path = Path(code.co_filename)
        if event == "call" and ROOT in path.parents and not code.co_name.startswith("<"):
            found[str(path.relative_to(ROOT)), code.co_qualname.replace("<locals>.", "")] = None

    params = {"kernel": jnp.ones((300, 400)), "bias": jnp.ones(400)}
    state = tx.init(params)
    sys.setprofile(entered)
    try:
        jax.jit(tx.update).lower(params, state, params)
    finally:
        sys.setprofile(None)
    return list(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--functions", action="store_true", help="list them")
    args = parser.parse_args()
    for name, tx in UPDATES.items():
        steps = walk(tx)
        print(f"{name}: {len(steps)} functions in {len({room for room, _ in steps})} files")
        if args.functions:
            print(*(f"    {room}  {function}" for room, function in steps), sep="\n")


if __name__ == "__main__":
    main()
