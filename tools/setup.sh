#!/usr/bin/env bash
# Create .venv with Python 3.12 and install the locked packages. Sourced by quickstart.sh and test.sh, or run alone.
# Safe to run again: nothing is installed while the lock file and pyproject.toml are what they were.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
  if python3.12 -c 'import sys; assert sys.version_info[:2] == (3, 12)' 2>/dev/null; then
    echo python3.12
  elif command -v pyenv >/dev/null && pyenv_version=$(pyenv latest 3.12 2>/dev/null || pyenv versions --bare 2>/dev/null | grep '^3\.12\.' | tail -n 1) && [[ -n $pyenv_version ]]; then
    echo "$(pyenv root)/versions/$pyenv_version/bin/python"
  elif command -v pyenv >/dev/null && pyenv install --skip-existing 3.12 >&2; then
    echo "$(pyenv root)/versions/$(pyenv latest 3.12)/bin/python"
  elif command -v uv >/dev/null; then
    uv python install 3.12 >&2 && uv python find 3.12
  else
    echo "Python 3.12 was not found: install it (python.org, your distribution's python3.12, pyenv or uv) and run this again." >&2
    return 1
  fi
}

wanted=$(cat requirements.lock pyproject.toml | cksum)
if [[ "$(cat .venv/.installed 2>/dev/null)" != "$wanted" ]]; then
  python=$(find_python)
  echo "Installing into .venv with $("$python" --version) (about 6 GB; some minutes) ..."
  # An environment left half made by an interrupted run is made again.
  [[ -x .venv/bin/python ]] && .venv/bin/python -c 'import sys; assert sys.version_info[:2] == (3, 12)' 2>/dev/null || { rm -rf .venv; "$python" -m venv .venv; }
  # Compiling all of it takes a third of the time; Python compiles what is imported.
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --require-hashes --requirement requirements.lock
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
  echo "$wanted" > .venv/.installed
fi
