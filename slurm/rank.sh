#!/usr/bin/env bash
# rank.sh COMMAND...: one rank of a job. srun starts it once for each GPU (common.sh).
#
# The job's log gets all output of rank 0, and of the other ranks the lines that report an error, with rank and host in
# front. With RANK_LOG_DIR=DIR, all output of each rank also goes to a file of its own.
set -euo pipefail

# A request to save and end may come before the trainer handles signals, which takes some seconds. A signal that the shell
# ignores is ignored by the program that it executes, until that installs a handler; common.sh repeats the request.
trap '' USR1 TERM

rank=${SLURM_PROCID:-0}
if [[ -n ${RANK_LOG_DIR:-} ]]; then
  mkdir -p "$RANK_LOG_DIR"
  log=$(printf '%s/rank_%04d.log' "$RANK_LOG_DIR" "$rank")
  exec > >(exec tee -a "$log") 2> >(exec tee -a "$log" >&2)
fi
if ((rank == 0)); then
  exec "$@"
fi
# Without fflush, mawk and gawk keep lines in a buffer.
exec "$@" > /dev/null 2> >(exec awk -v place="[rank $rank on ${SLURMD_NODENAME:-$(hostname)}] " '
  /^error: rank / { print; fflush(); next }
  tolower($0) ~ /error|exception|traceback|fatal|abort|killed|segmentation|nccl warn|out of memory/ { print place $0; fflush() }
' >&2)
