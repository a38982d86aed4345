"""Chips that need not be there: the real compilers of an H100 and of a TPU v5e, asked on any machine.

JAX has to run with JAX_PLATFORMS=cpu: beside the CUDA plugin it looks for a GPU at its start, and fails.
"""

import importlib.metadata
import os
from pathlib import Path

import jax
import numpy as np
from jax.experimental import topologies

PACKAGES = ("jax-cuda13-plugin", "nvidia-cuda-nvcc", "libtpu")
H100, V5E = "H100", "TPU v5e"
POD = "v5e:16x16"
# Read when the compilers are loaded: there is no TPU to ask, and nobody else's to keep away from.
ALONE = {
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def missing() -> str | None:
    """Why nothing can be compiled for these chips here; None where it can."""
    absent = [name for name in PACKAGES if not _installed(name)]
    if not absent:
        return None
    return f"not installed: {', '.join(absent)}. `make accelerators` makes an environment that has them"


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def chip(name: str) -> jax.Device:
    """One chip to compile for, by the name above."""
    if name == V5E:
        return _devices(platform="tpu", topology_name="v5e:2x2")[0]
    config = (Path(__file__).parent / "h100_sxm.txtpb").read_text("utf-8")
    return _devices(platform="cuda", target_config=config, topology="1x1x1")[0]


def pod(shape: tuple[int, int] = (32, 8)) -> jax.sharding.Mesh:
    """A TPU pod of 256 chips, as a mesh with the axes data and model."""
    devices = np.asarray(_devices(platform="tpu", topology_name=POD))
    return jax.sharding.Mesh(devices.reshape(shape), ("data", "model"))


def _devices(**description: str) -> list[jax.Device]:
    for name, value in ALONE.items():
        os.environ.setdefault(name, value)
    return list(topologies.get_topology_desc(**description).devices)
