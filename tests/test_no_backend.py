"""What is made before the devices are chosen, by `jax.distributed.initialize` or a flag, picks none."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent

MAKE_ALL = """
import math
import jax

jax.config.update("jax_transfer_guard", "disallow")
import numpy as np
import optax
import optax_clip as oc
import registry

made = [row.make() for row in registry.ROWS]
made += [row.make(0.5) for row in registry.ROWS if row.number]
table = {"w": np.full(3, 2.0), "b": 1.0}
by_label = oc.groups(registry.by_role)
made += [
    oc.clip_by_value(table, lower={"w": -1.0, "b": -np.ones(2)}),
    oc.clip_by_norm({"kernels": 1.0, "rest": optax.linear_schedule(1.0, 0.0, 10)}, scope=by_label),
    oc.clip_by_norm(oc.zscore(2.0, max_norm=1.0), record="scopes"),
    oc.normalize_by_norm(oc.relative_to_params(1.0, eps=0.0), scope=(-2, -1)),
    oc.adagc(), oc.zclip(), oc.autoclip(), oc.adaptive_grad_clip(), oc.clip_by_update_rms(),
    oc.skip_spikes(optax.identity(), oc.window_quantile(0.9), value_rule=oc.window_zscore(6.0)),
    optax.masked(oc.project_weights(oc.box(-1.0, table), every=10), oc.where(lambda path, leaf: True)),
    oc.project_weights(oc.norm_shell(oc.initial(0.5), oc.initial(2.0), scope="unit")),
    oc.project_weights(oc.norm_ball({"kernels": 1.0, "rest": math.inf}, scope=by_label)),
    oc.project_weights(oc.spectral_ball(oc.initial(), power_iterations=1, flatten=True)),
]
print(len(made), *map(repr, [oc.box(0.0, table), oc.threshold_table([1.0])]))
jax.config.update("jax_num_cpu_devices", 4)  # a RuntimeError once a backend is there
jax.config.update("jax_transfer_guard", "allow")
assert jax.device_count() == 4
"""


def test_factories_sets_rules_and_the_import_touch_no_backend():
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    environment = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", MAKE_ALL], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
