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
tools/install_slurm.sh
# Loader workers are forked, and a fork hangs in swscale when its parent has converted a video frame before (PyAV's
# contexts do not survive it). So tests of loaders with workers get processes that have touched no video.
log=$(mktemp)
{ .venv/bin/python -m pytest tests/test_loader.py && .venv/bin/python -m pytest tests/test_faults.py; } > "$log" 2>&1 &
status=0
# Two test files at a time: one rank of a test often waits for the other, or all of them for an import.
.venv/bin/python -m pytest --durations=40 --numprocesses 2 --dist loadfile --ignore tests/test_loader.py --ignore tests/test_faults.py || status=$?
wait $! || status=$?
cat "$log"
rm "$log"
exit "$status"
