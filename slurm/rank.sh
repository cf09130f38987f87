#!/usr/bin/env bash
# One rank of a job: common.sh has srun start `rank.sh COMMAND...` once for every GPU.
#
# The job's log gets what rank 0 prints, and of the other ranks the lines that report an error, with rank and host in
# front. RANK_LOG_DIR=DIR keeps everything that each rank prints in a file of its own as well.
set -euo pipefail

# A request to save and end may come before the trainer listens, which takes it some seconds. Ignored by a shell means
# ignored by what it executes, until that asks for the signal; common.sh repeats the request.
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
# mawk and gawk alike hold back lines without fflush.
exec "$@" > /dev/null 2> >(exec awk -v place="[rank $rank on ${SLURMD_NODENAME:-$(hostname)}] " '
  /^error: rank / { print; fflush(); next }
  tolower($0) ~ /error|exception|traceback|fatal|abort|killed|segmentation|nccl warn|out of memory/ { print place $0; fflush() }
' >&2)
