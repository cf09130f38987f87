#!/usr/bin/env bash
# From nothing to a Hugging Face model on a CPU: sample data, three chained stages, export, questions (quickstart.py).
# Arguments are overrides for all three stages:
#
#     tools/quickstart.sh
#     tools/quickstart.sh train.max_steps=20
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup.sh
export OMP_NUM_THREADS=1
exec "${QUICKSTART_PYTHON:-.venv/bin/python}" tools/quickstart.py "$@"
