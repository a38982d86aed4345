#!/usr/bin/env bash
# All that wants a GPU to be there: where weights land, what a step costs, and the tests of what computes.
#   PYTHON=.venv/bin/python bash benchmarks/on_gpu.sh          a quarter of an hour
#   PYTHON=.venv/bin/python bash benchmarks/on_gpu.sh --small  on any machine, to see that it runs
# The environment is that of `make dev`, with a jax for CUDA. What follows the options goes to pytest.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
tests=(norms clipping projection sets adaptive thresholds)
smoke=() export_to=bench.json
if [ "${1:-}" = --small ]; then
    shift
    smoke=(--smoke) tests=(norms) export_to=$(mktemp)
    export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
fi
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda} PYTHONPATH=.
export XLA_PYTHON_CLIENT_PREALLOCATE=false  # so that several processes fit

part() {  # part TITLE COMMAND...: what fails does not keep the rest from running
    local title=$1 start=$SECONDS
    shift
    printf '\n=== %s\n' "$title"
    "$@"
    printf '=== %s: rc %d, %d s\n' "$title" $? $((SECONDS - start))
}

part card "$python" -c 'import jax; print(*(d.device_kind for d in jax.devices()), "jax", jax.__version__)'
part landing "$python" -m benchmarks.landing "${smoke[@]}"
part times "$python" -m benchmarks --only step overheads --json "$export_to" --figure /tmp/on_gpu.png "${smoke[@]}"
for name in "${tests[@]}"; do
    part "tests of $name" "$python" -m pytest -q --tb=no -p benchmarks._failures "tests/test_$name.py" "$@"
done
