"""PyTorch's clips and its own Adam beside that Adam alone, where torch is installed: as in `step`."""

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks._timing import LARGE, MAX_NORM, SMALL, Row, cell, interleaved, line, ratios

ROUNDS = 15


def run(*, smoke: bool) -> list[Row]:
    if importlib.util.find_spec("torch") is None:
        print("PyTorch: not installed, so it is left out. To have it here: pip install torch")
        return []
    # Else its threads spin while they wait, and on two cores a step may wait for the scheduler.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    torch: Any = importlib.import_module("torch")  # no dependency, so nothing imports it at the top
    print(f"PyTorch {torch.__version__}: clip and Adam, as a multiple of Adam alone [quartiles]")
    line("", "alone, ms", "clip_grad_norm_", "clip_grad_value_")
    return list(_rows(torch, smoke))


def _rows(torch: Any, smoke: bool) -> Iterator[Row]:
    utils = torch.nn.utils
    clips: dict[str, Callable[[Any], Any]] = {
        "alone": lambda weights: None,
        "norm": lambda weights: utils.clip_grad_norm_(weights, MAX_NORM),
        "value": lambda weights: utils.clip_grad_value_(weights, 1e-4),
    }
    for dtype in (torch.float32, torch.bfloat16):
        for kind in ("fused", "foreach"):
            steps = {name: _step(torch, clip, kind, dtype, smoke) for name, clip in clips.items()}
            row = ratios(interleaved(steps, 2 if smoke else ROUNDS))
            names = {
                "tree": "3 x 64" if smoke else "10 x 2.5 M",
                "dtype": str(dtype).removeprefix("torch."),
                "optimizer": f"Adam({kind}=True)",
            }
            label = ", ".join(names.values())
            line(label, f"{row['alone_ms']:.2f}", cell(row, "norm"), cell(row, "value"))
            yield {"group": "torch", **names, **row}


def _step(
    torch: Any, clip: Callable[[Any], Any], kind: str, dtype: Any, smoke: bool
) -> Callable[[], None]:
    """One step on gradients that stay: both clips do the same work whether or not they change them."""
    torch.manual_seed(0)
    weights = [
        torch.nn.Parameter(0.02 * torch.randn(shape, dtype=dtype))
        for shape in (SMALL if smoke else LARGE)
    ]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer = torch.optim.Adam(weights, lr=1e-3, **{kind: True})

    def once() -> None:
        clip(weights)
        optimizer.step()

    return once
