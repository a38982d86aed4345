"""Eight CPU devices, for tests of meshes and processes."""

import os

# Read when jax starts its backend, which the conftest above this one does not do.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
