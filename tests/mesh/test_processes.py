"""Two processes that share a mesh mean what one process means."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
TOGETHER = 2  # processes, with two devices each
SECONDS = 240  # far more than it takes, and far less than a build may hang

# Runs in each process, and alone with four devices. It prints what every process must agree on, and the
# part of the leaves that its devices hold.
PROGRAM = """
import json, sys
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec as P
import optax_clip

address, processes, rank = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if processes > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, processes, rank, initialization_timeout=60)
assert (jax.process_count(), jax.device_count()) == (processes, 4)

mesh = jax.make_mesh((4,), ("data",))
values = {"kernel": np.linspace(-2, 3, 24).reshape(8, 3), "bias": np.linspace(1, 2, 3)}
specs = {"kernel": P("data"), "bias": P()}


def place(x, spec):
    x = np.asarray(x, np.float32)
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])


params = jax.tree.map(place, values, specs)
tx = optax.chain(
    optax_clip.clip_by_global_norm(1.0),
    optax_clip.clip_by_norm(0.1, scope="unit"),
    optax_clip.adagc(warmup=1, name="adagc"),
    optax_clip.project_weights(optax_clip.norm_ball(2.0)),
    optax_clip.project_weights(optax_clip.box(-0.7, 0.7), name="box"),
    optax_clip.project_weights(optax_clip.norm_ball(3.0, ord=1), name="one"),
)
state = tx.init(params)
updates, state = jax.jit(tx.update)(params, state, params)
said = {"norm": jax.jit(optax_clip.global_norm)(params), **optax_clip.metrics(state)}
parts = [
    [[index.indices(n)[:2] for index, n in zip(shard.index, x.shape)], np.asarray(shard.data).tolist()]
    for x in (updates["bias"], updates["kernel"])
    for shard in x.addressable_shards
]
print(json.dumps([{key: float(x) for key, x in said.items()}, parts]), flush=True)
if processes > 1:
    jax.distributed.shutdown()
"""


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def start(devices, processes, rank, port, folder):
    env = {key: x for key, x in os.environ.items() if not key.lower().endswith("_proxy")}
    flags = f"--xla_force_host_platform_device_count={devices}"
    env.pop("JAX_COMPILATION_CACHE_DIR", None)  # of two processes each compiles for itself
    env |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    with (
        open(folder / f"{processes}-{rank}.out", "wb") as out,
        open(folder / f"{processes}-{rank}.err", "wb") as err,
    ):
        command = [sys.executable, "-c", PROGRAM, f"127.0.0.1:{port}", str(processes), str(rank)]
        return subprocess.Popen(command, env=env, cwd=folder, stdout=out, stderr=err)


def together(folder):
    """Run all three at once: two that share a mesh, and one that has it for itself."""
    port = free_port()
    names = [(TOGETHER, rank) for rank in range(TOGETHER)] + [(1, 0)]
    running = []
    try:
        for processes, rank in names:
            running.append(start(4 // processes, processes, rank, port, folder))
        for each in running:
            each.wait(timeout=SECONDS)
    finally:
        for each in running:
            each.kill()
            each.wait()
    said = []
    for (processes, rank), each in zip(names, running, strict=True):
        error = (folder / f"{processes}-{rank}.err").read_text()
        assert each.returncode == 0, f"process {rank} of {processes}:\n{error[-3000:]}"
        lines = (folder / f"{processes}-{rank}.out").read_text().splitlines()
        said.append(json.loads(lines[-1]))
    return said


def assembled(parts):
    """The leaves from the parts that the devices hold."""
    whole = {1: np.full(3, np.nan), 2: np.full((8, 3), np.nan)}
    for index, values in parts:
        whole[len(index)][tuple(slice(*ends) for ends in index)] = values
    return whole


def has_gloo():
    try:
        from jax._src.lib import _jax
    except ImportError:
        return True  # Where to look has changed; then the test says what is missing.
    return hasattr(_jax, "make_gloo_tcp_collectives")


@pytest.mark.skipif(not has_gloo(), reason="jaxlib was built without gloo, its collectives for CPUs")
def test_two_processes_are_one(tmp_path):
    first, second, alone = together(tmp_path)
    assert first[0] == second[0]
    np.testing.assert_allclose(
        [first[0][key] for key in alone[0]], list(alone[0].values()), rtol=1e-6, atol=1e-7
    )
    values = {"kernel": np.linspace(-2, 3, 24), "bias": np.linspace(1, 2, 3)}
    exact = np.linalg.norm(np.concatenate([x.astype(np.float32) for x in values.values()]))
    np.testing.assert_allclose(first[0]["norm"], exact, rtol=1e-6)
    assert first[0]["project/fraction"] > 0 and first[0]["clip/fraction"] > 0
    assert len(first[1]) == len(second[1]) == 4  # Two devices hold a part of two leaves each.
    got, wanted = assembled(first[1] + second[1]), assembled(alone[1])
    for rank in got:
        assert np.isfinite(got[rank]).all()
        np.testing.assert_allclose(got[rank], wanted[rank], rtol=1e-6, atol=1e-7)
