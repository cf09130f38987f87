#!/usr/bin/env bash
# What tests/slurm needs, where apt is there: Slurm for a cluster on this machine alone, and shellcheck. Starts nothing.
set -euo pipefail
missing=()
for program in slurmctld:slurm-wlm slurmd:slurm-wlm munged:munge shellcheck:shellcheck; do
  PATH=$PATH:/usr/sbin:/sbin command -v "${program%%:*}" > /dev/null || missing+=("${program##*:}")
done
((${#missing[@]})) || exit 0
if ! command -v apt-get > /dev/null; then
  echo "No apt-get here, so ${missing[*]} cannot be installed: the tests of the Slurm scripts will be skipped." >&2
  exit 0
fi
if ((EUID != 0)); then
  echo "Not root, so ${missing[*]} are not installed: the tests of the Slurm scripts will be skipped, or fail under" \
    "CI=true." >&2
  exit 0
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq > /dev/null
apt-get install -y -qq --no-install-recommends "${missing[@]}" > /dev/null
