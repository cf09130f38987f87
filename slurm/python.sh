#!/usr/bin/env bash
# python.sh PYTHON [ARGUMENT...]: start Python with the right molmo2_nemo, inside the container if there is one.
#
# CODE=checkout puts the checkout that slurm/ belongs to first on Python's path: nothing of it has to be installed in
# the container, virtual environment or module. This happens here and not in common.sh, since an image may set a
# PYTHONPATH of its own, which replaces that of the job under pyxis. CODE=installed leaves the path as it is.
set -euo pipefail
if [[ ${CODE:-checkout} == checkout ]]; then
  checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  export PYTHONPATH=$checkout${PYTHONPATH:+:$PYTHONPATH}
fi
exec "$@"
