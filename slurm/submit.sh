#!/usr/bin/env bash
# The three stages, the export and the report as one chain of Slurm jobs, each after the one before it has finished.
#
#     slurm/submit.sh --name my-8b model=molmo2_8b               # a new run
#     slurm/submit.sh --name my-8b --nodes=16 stage3:--nodes=32 stage1:train.init_from=runs/start model=molmo2_8b
#     slurm/submit.sh --name my-8b --dry-run model=molmo2_8b     # shows every command, submits nothing
#     slurm/submit.sh --name my-8b --resume [MORE...]            # from the first stage that has not finished, as before
#     slurm/submit.sh --name my-8b --stop                        # saves, ends, and is not queued again
#
# KEY=VALUE is an override of all stages, --OPTION or --OPTION=VALUE one of sbatch; with stageN: in front, of that stage alone.
# train.init_from without a stage is of stage 1; the others start from the stage before. RUN_ROOT/NAME/slurm/ keeps the
# arguments, the job ids and the logs. Site settings: slurm/site.env, or the file that SITE_ENV names.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source slurm/common.sh

exec 3>&1  # what submit prints besides the job id that it returns
stages=(stage1 stage2 stage3)
name='' dry_run='' resume='' stop='' given=()

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"; }

read_arguments() {
  while (($#)); do
    case $1 in
      --name) (($# > 1)) || die "--name has no value: --name my-8b."; name=$2; shift ;;
      --name=*) name=${1#--name=} ;;
      --dry-run) dry_run=yes ;;
      --resume) resume=yes ;;
      --stop) stop=yes ;;
      -h | --help) usage; exit 0 ;;
      name=* | run_dir=* | stage[123]:name=* | stage[123]:run_dir=*) die "$1: the chain decides that: --name NAME, and RUN_ROOT in slurm/site.env." ;;
      *$'\n'*) die "an argument has a line break: ${1%%$'\n'*}" ;;
      stage[123]:--* | --*) given+=("$1") ;;
      -*) die "$1: give options of sbatch in their long form, --nodes=16." ;;
      stage[123]:*=* | stage[123]:~* | *=* | ~*) given+=("$1") ;;
      *) die "$1 is neither an option (--nodes=16) nor an override (key=value)." ;;
    esac
    shift
  done
  [[ -n $name ]] || die "--name is missing: slurm/submit.sh --name my-8b [OVERRIDE...]."
  [[ $name =~ ^[A-Za-z0-9][A-Za-z0-9\ ._+-]*$ ]] || die "--name '$name': use letters, digits, spaces and . _ + - alone; it becomes a folder."
}

# key_of ARGUMENT: an argument replaces an earlier one with the same key: --nodes, stage1:model.
key_of() { local key=${1%%=*}; printf '%s' "${key##+}"; }

# merge EARLIER... -- LATER...: into `merged`; a later one with the same key replaces the earlier one.
merge() {
  local -A at=()
  local argument key index
  merged=()
  for argument in "$@"; do
    [[ $argument == -- ]] && continue
    key=$(key_of "$argument")
    index=${at[$key]:-${#merged[@]}}
    merged[index]=$argument
    at[$key]=$index
  done
}

# options_of STAGE, overrides_of STAGE: into `options` and `overrides`, those of all stages first.
arguments_of() {
  local argument rest
  options=() overrides=()
  local common=() own=()
  for argument in "${merged[@]}"; do
    if [[ $argument == stage[123]:* ]]; then
      if [[ $argument == "$1:"* ]]; then own+=("${argument#*:}"); fi
    elif [[ $argument != train.init_from=* || $1 == stage1 ]]; then
      common+=("$argument")
    fi
  done
  local before=("${merged[@]}")
  merge "${common[@]}" -- "${own[@]}"
  for rest in "${merged[@]}"; do
    if [[ $rest == --* ]]; then options+=("$rest"); else overrides+=("$rest"); fi
  done
  merged=("${before[@]}")
}

# number_of OPTION FILE: the value in `options`, else in the #SBATCH lines of the script.
number_of() {
  local option found=''
  found=$(sed -n "s/^#SBATCH $1=\([0-9]*\).*/\1/p" "$2")
  for option in "${options[@]}"; do
    if [[ $option =~ ^$1=([0-9]+)$ ]]; then found=${BASH_REMATCH[1]}; fi
  done
  printf '%s' "$found"
}

# Refuse settings that cannot work now, before a job has waited days for its nodes.
check_settings() {
  local stage=$1 ranks
  ranks=$(($(number_of --nodes "slurm/$stage.sbatch") * $(number_of --ntasks-per-node "slurm/$stage.sbatch")))
  local program
  find_program tools/preflight
  bash slurm/python.sh "${python[@]}" "${program[@]}" --settings "$ranks" "$stage" "${overrides[@]}" name="$(quoted "$name")" || exit 2
}

# submit JOBNAME DEPENDENCY SBATCH_ARGUMENT...: prints the job id; in a dry run the command, too.
submit() {
  local job=$1 dependency=$2 id
  shift 2
  local command=(sbatch --parsable --job-name="$name-$job" --output="${state//%/%%}/$job-%j.log" --kill-on-invalid-dep=yes)
  [[ -n $dependency ]] && command+=(--dependency="$dependency")
  [[ -n ${MAIL_USER:-} ]] && command+=(--mail-user="$MAIL_USER" --mail-type="${MAIL_TYPE:-END,FAIL,REQUEUE,INVALID_DEPEND}")
  command+=(${SBATCH_MORE[@]+"${SBATCH_MORE[@]}"} "$@")
  if [[ -n $dry_run ]]; then
    { printf '%q ' "${command[@]}"; echo; } >&3
    echo "<$job>"
    return
  fi
  id=$("${command[@]}") || return 1
  id=${id%%;*}  # with --clusters: id;cluster
  echo "$job $id" >> "$state/jobs"
  printf '  %-8s job %s\n' "$job" "$id" >&3
  echo "$id"
}

# If sbatch refuses a job, cancel the jobs of the chain that are submitted already.
give_up() {
  if [[ -n $dry_run ]]; then exit 2; fi
  local ids
  ids=$(awk '{ print $2 }' "$state/jobs" | xargs)
  # shellcheck disable=SC2086
  [[ -n $ids ]] && scancel $ids
  die "sbatch refused the job above: nothing of the chain is left in the queue. Correct it and use --resume."
}

queued_jobs() { squeue -h -u "$(id -un)" -o '%A %j' | awk -v name="$name-" 'index($0, " " name) { print $1 }' | xargs; }

read_arguments "$@"
load_site
run=$RUN_ROOT/$name
[[ $run == /* ]] || run=$PWD/$run
state=$run/slurm
[[ -n $dry_run ]] || command -v sbatch > /dev/null || die "sbatch is not here: run this on a login node of the cluster."

if [[ -n $stop ]]; then
  [[ -d $state ]] || die "there is no run '$name' in $RUN_ROOT."
  jobs=$(queued_jobs)
  [[ -n $jobs ]] || { echo "nothing of '$name' is queued"; exit 0; }
  for stage in "${stages[@]}"; do
    if [[ -d $run/$stage/slurm ]]; then : > "$run/$stage/slurm/stop"; fi
  done
  for job in $jobs; do
    if [[ $(squeue -h -j "$job" -o %T) == RUNNING ]]; then
      scancel --signal=USR1 --batch "$job"
      echo "job $job saves and ends"
    else
      scancel "$job"
      echo "job $job is cancelled"
    fi
  done
  exit 0
fi

merged=()
if [[ -n $resume ]]; then
  [[ -d $run ]] || die "--resume: there is no run '$name' in $RUN_ROOT."
  if command -v squeue > /dev/null; then
    jobs=$(queued_jobs)
    [[ -z $jobs ]] || die "'$name' is still queued (jobs $jobs): nothing to resume; scancel them first, or wait."
  fi
  earlier=()
  if [[ -e $state/arguments ]]; then mapfile -t earlier < "$state/arguments"; fi
  merge ${earlier[@]+"${earlier[@]}"} -- ${given[@]+"${given[@]}"}
else
  [[ ! -e $run ]] || die "$run exists already: go on with it (--resume), or choose another --name."
  merge ${given[@]+"${given[@]}"}
fi

# On many clusters Python is in a container, and this machine has none that could check the settings.
python=()
case ${RUNTIME:-venv} in
  venv*) python=("${PYTHON:-$( [[ ${RUNTIME:-venv} == venv:* ]] && echo "${RUNTIME#venv:}" || echo .venv)/bin/python}") ;;
esac
first=''
for stage in "${stages[@]}"; do
  if finished "$run/$stage"; then echo "$stage has finished"; continue; fi
  first=${first:-$stage}
  arguments_of "$stage"
  if ((${#python[@]})) && command -v "${python[0]}" > /dev/null; then
    check_settings "$stage"
  else
    echo "settings of $stage are not checked here (RUNTIME=${RUNTIME:-venv}): the pre-flight does it" >&2
  fi
  # sbatch accepts a job that no nodes of the cluster can run, and it would wait for ever.
  if command -v sbatch > /dev/null; then
    answer=$(sbatch --test-only ${SBATCH_MORE[@]+"${SBATCH_MORE[@]}"} ${options[@]+"${options[@]}"} "slurm/$stage.sbatch" 2>&1) || die "$stage: $answer"
  fi
done

if [[ -z $dry_run ]]; then
  # mkdir without -p: of two submit.sh that run at the same time, only one can make the folder.
  if [[ -z $resume ]]; then
    mkdir -p "$RUN_ROOT"
    mkdir "$run" || die "$run exists already: go on with it (--resume), or choose another --name."
  fi
  mkdir -p "$state"
  printf '%s\n' ${merged[@]+"${merged[@]}"} > "$state/arguments"
  : > "$state/jobs"
fi

after=''
for stage in "${stages[@]}"; do
  if finished "$run/$stage"; then continue; fi
  arguments_of "$stage"
  id=$(submit "$stage" "$after" ${options[@]+"${options[@]}"} "slurm/$stage.sbatch" name="$(quoted "$name")" run_dir="$(quoted "$run/$stage")" ${overrides[@]+"${overrides[@]}"}) || give_up
  after=afterok:$id last=$id
done
cpu=()
[[ -n ${CPU_PARTITION:-} ]] && cpu+=(--partition="$CPU_PARTITION")
if [[ -z $first && -e $run/hf/config.json ]]; then
  echo "'$name' has finished and is exported to $run/hf: nothing to do"
  exit 0
fi
submit export "$after" ${cpu[@]+"${cpu[@]}"} slurm/export.sbatch "$run/stage3" "$run/hf" > /dev/null || give_up
# The report is also written if a stage fails.
submit report "${last:+afterany:$last}" ${cpu[@]+"${cpu[@]}"} slurm/report.sbatch "$run" > /dev/null || give_up
[[ -n $dry_run ]] || echo "watch it: python tools/status.py ${name@Q}; its logs are in $state"
