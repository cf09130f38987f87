#!/usr/bin/env bash
# Write requirements.lock anew from pyproject.toml (needs uv). The lock holds a hash for every file of every package.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# setuptools and wheel build the project itself; torch and transformers are pinned to what was tried.
uv pip compile --universal --generate-hashes --python-version 3.12 --no-header --no-annotate --extra test \
  --allow-unsafe \
  --output-file requirements.lock pyproject.toml - <<'EOF'
torch==2.14.1
torchvision==0.29.1
transformers==5.23.0
setuptools>=77
wheel
EOF
