#!/usr/bin/env bash
# Install Transformer Engine for the torch that is installed, check that it can be imported, and print what a run uses.
# After tools/setup.sh, on a machine with the CUDA toolkit (nvcc) and cuDNN. NVIDIA's PyTorch images have it already.
#
#     tools/install_gpu.sh
#
# PYTHON=... takes another Python than .venv's. Safe to run again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONDONTWRITEBYTECODE
version=2.20.2  # the one of docs/gpu.md

python=${PYTHON:-.venv/bin/python}
versions='import torch; print(torch.__version__.split("+")[0], (torch.version.cuda or "none").split(".")[0])'
if ! torch=$("$python" -c "$versions"); then
  echo "error: $python has no torch: run tools/setup.sh first, or set PYTHON to the Python that has it." >&2
  exit 1
fi
read -r torch cuda <<< "$torch"
if [[ $cuda != 12 && $cuda != 13 ]]; then
  echo "error: torch $torch of $python is built for CUDA $cuda, and Transformer Engine $version needs 12 or 13:" \
    "install a torch for a GPU." >&2
  exit 1
fi

can_import() { "$python" -W ignore -c 'import torch, transformer_engine.pytorch'; }

if ! can_import 2> /dev/null; then
  # Nothing that the lock file names may change its version, torch least of all: its extension is compiled for this one.
  pins=$(mktemp)
  trap 'rm -f "$pins"' EXIT
  { grep -oE '^[A-Za-z0-9_.-]+==[^ ;]+' requirements.lock | grep -v '^torch=='; echo "torch==$torch"; } > "$pins"
  echo "Installing Transformer Engine $version for torch $torch and CUDA $cuda (0.5 GB; where there is no wheel for" \
    "this torch, its extension is compiled, which takes many minutes and needs nvcc) ..."
  # --no-build-isolation: in isolation pip would compile the extension for the newest torch, and it would not import.
  if ! "$python" -m pip install --disable-pip-version-check --progress-bar off --no-build-isolation \
    --constraint "$pins" "transformer-engine[pytorch,core_cu$cuda]==$version"; then
    echo "error: Transformer Engine $version could not be installed; what pip says is above. It needs nvcc, cuDNN and" \
      "the network: without a network see docs/gpu.md, and NVIDIA's PyTorch images bring it." >&2
    exit 1
  fi
  if ! can_import; then
    echo "error: Transformer Engine is installed, but cannot be imported with torch $torch; the reason is above. If" \
      "it was built for another torch: $python -m pip uninstall transformer-engine-torch, and run this again." >&2
    exit 1
  fi
fi
"$python" -W ignore -m molmo2_nemo.gpu
