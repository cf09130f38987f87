#!/usr/bin/env bash
# Create .venv with Python 3.12 and install the locked packages. Sourced by quickstart.sh and test.sh, or run alone.
# Safe to run again: nothing is installed as long as requirements.lock, pyproject.toml and setup.py have not changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Where this is set, as in many containers, nothing that is compiled is kept: each start compiles thousands of modules.
unset PYTHONDONTWRITEBYTECODE

find_python() {
  if python3.12 -c 'import sys; assert sys.version_info[:2] == (3, 12)' 2>/dev/null; then
    echo python3.12
  elif command -v pyenv >/dev/null && pyenv_version=$(
    pyenv latest 3.12 2>/dev/null || pyenv versions --bare 2>/dev/null | grep '^3\.12\.' | tail -n 1
  ) && [[ -n $pyenv_version ]]; then
    echo "$(pyenv root)/versions/$pyenv_version/bin/python"
  elif command -v pyenv >/dev/null && pyenv install --skip-existing 3.12 >&2; then
    echo "$(pyenv root)/versions/$(pyenv latest 3.12)/bin/python"
  elif command -v uv >/dev/null; then
    uv python install 3.12 >&2 && uv python find 3.12
  else
    echo "Python 3.12 was not found: install it (python.org, your distribution's python3.12, pyenv or uv)" \
      "and run this again." >&2
    return 1
  fi
}

# show_progress TOTAL: pip's output as one line that counts the packages; every 25th where the output is no terminal.
show_progress() {
  local line name count=0
  while IFS= read -r line; do
    case $line in
      Collecting*)
        count=$((count + 1)) name=${line#Collecting }
        if [[ -t 1 ]]; then
          printf '\r\033[K  package %d of %d: %s' "$count" "$1" "${name%% *}"
        elif ((count % 25 == 0)); then
          printf '  package %d of %d: %s\n' "$count" "$1" "${name%% *}"
        fi ;;
      "Installing collected packages"*)
        if [[ -t 1 ]]; then printf '\r\033[K'; fi
        printf '  all %d packages are here; unpacking them\n' "$count" ;;
    esac
  done
}

wanted=$(cat requirements.lock pyproject.toml setup.py | cksum)
if [[ "$(cat .venv/.installed 2>/dev/null)" != "$wanted" ]]; then
  python=$(find_python)
  echo "Installing into .venv with $("$python" --version) (about 6 GB; some minutes) ..."
  # An environment that an interrupted run left incomplete is made again.
  if ! .venv/bin/python -c 'import sys; assert sys.version_info[:2] == (3, 12)' 2>/dev/null; then
    rm -rf .venv
    "$python" -m venv .venv
  fi
  # --no-compile: to compile all of it takes a third of the time, and most of it is never imported.
  .venv/bin/python -m pip install --progress-bar off --disable-pip-version-check --no-compile --require-hashes \
    --requirement requirements.lock | show_progress "$(grep -c '^[^ #].*==' requirements.lock)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
  # An import compiles what it loads and keeps it: here once, instead of in all ranks of the first run at the same time.
  # Python writes each file under a temporary name first, so an interruption does no harm.
  echo "  compiling what a run imports"
  imported="molmo2_nemo.training.run, molmo2_nemo.report, torch.distributed.run"
  imported+=", transformers.models.molmo2.modeling_molmo2"
  .venv/bin/python -W ignore -c "import $imported" > /dev/null
  .venv/bin/python -m molmo2_nemo.ffmpeg_links .venv/lib/ffmpeg > /dev/null  # for torchcodec, see there
  echo "$wanted" > .venv/.installed
fi
