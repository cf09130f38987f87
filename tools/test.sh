#!/usr/bin/env bash
# Set up if needed, then run all tests (arguments go to pytest: tools/test.sh -k packing).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup.sh
# Several processes share the cores; threads of their own would only get in each other's way.
export OMP_NUM_THREADS=1
# Two test files at a time: one rank of a test often waits for the other, or all of them for an import.
exec .venv/bin/python -m pytest --numprocesses 2 --dist loadfile "$@"
