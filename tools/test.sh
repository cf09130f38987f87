#!/usr/bin/env bash
# Set up if needed, then check the code's form and run the tests: tests/README.md says which there are.
#   tools/test.sh             all of them
#   tools/test.sh --fast      what needs neither Slurm nor several ranks (three minutes)
#   tools/test.sh -k packing  any other arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup.sh
# Several processes share the cores; threads of their own would only get in each other's way.
export OMP_NUM_THREADS=1
which=(tests)
if [[ ${1-} == --fast ]]; then
  shift
  which=(tests/unit -m "not slow")
elif (($#)); then
  exec .venv/bin/python -m pytest "$@"
else
  tools/dev/install_slurm.sh
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# Two processes, each of which takes the next file, in the order of tests/conftest.py. A process that ends in the middle
# of a test is not replaced: xdist would give the next one the same test, time and again. Files, not groups: with pytest
# 9.2, xdist 3.8 does not see xdist_group marks.
exec .venv/bin/python -m pytest "${which[@]}" --durations=10 \
  --numprocesses 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 "$@"
