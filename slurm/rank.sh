#!/usr/bin/env bash
# rank.sh COMMAND...: one rank of a job. srun starts it once for each GPU (common.sh).
#
# The job's log gets all output of rank 0, and of the other ranks the lines that report an error, with rank and host in
# front. With RANK_LOG_DIR=DIR, all output of each rank also goes to a file of its own.
set -euo pipefail

# A request to save and end may come before the trainer handles signals, which takes some seconds. A signal that the
# shell ignores is ignored by the program that it executes until that installs a handler; common.sh repeats it.
trap '' USR1 TERM

# end_before_training PID: a person's request to stop (one of STOP_FILES) that comes before the trainer handles signals
# ends it at once: nothing is trained yet that could be saved. The trainer's handlers for SIGUSR1 and SIGTERM are bits 9
# and 14 of SigCgt.
end_before_training() {
  local key caught file listens=0x4200
  while [[ -e /proc/$1/status ]]; do
    caught=0
    while read -r key file; do [[ $key == SigCgt: ]] && caught=$file; done < "/proc/$1/status"
    # Looked at after the handler: what comes later reaches the handler.
    while IFS= read -r file; do
      [[ -n $file && -e $file ]] || continue
      if ((0x$caught & listens)); then kill -USR1 "$1"; else kill -KILL "$1"; fi
      return
    done <<< "${STOP_FILES:-}"
    if ((0x$caught & listens)); then return; fi
    sleep 0.5
  done || true
}

rank=${SLURM_PROCID:-0}
# --kill-on-bad-exit ends the other ranks. In a shell of a shell, which init adopts: the trainer has no child that it
# does not know.
if ((rank == 0)); then (end_before_training $$ > /dev/null 2>&1 &); fi
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
  tolower($0) ~ /error|exception|traceback|fatal|abort|killed|segmentation|nccl warn|out of memory/ {
    print place $0
    fflush()
  }
' >&2)
