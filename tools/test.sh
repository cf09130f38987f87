#!/usr/bin/env bash
# Set up if needed, then run all tests (arguments go to pytest: tools/test.sh -k packing).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup.sh
# Several processes share the cores; threads of their own would only get in each other's way.
export OMP_NUM_THREADS=1
if (($#)); then
  exec .venv/bin/python -m pytest "$@"
fi
tools/dev/install_slurm.sh
# Two test files at a time: one rank of a test often waits for the other, or all of them for an import. A process that
# ends in the middle of a test is not replaced: xdist would give the next one the same test, time and again.
exec .venv/bin/python -m pytest --durations=40 --numprocesses 2 --dist loadfile --max-worker-restart 0
