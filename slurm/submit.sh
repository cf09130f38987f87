#!/usr/bin/env bash
# The three stages, the export and the report as one chain of Slurm jobs, each after the one before it has finished.
#
#     slurm/submit.sh --name my-8b model=molmo2_8b               # a new run
#     slurm/submit.sh --name my-8b --nodes=16 stage3:--nodes=32 stage1:train.init_from=runs/start model=molmo2_8b
#     slurm/submit.sh --name my-8b --dry-run model=molmo2_8b     # shows every command, submits nothing
#     slurm/submit.sh --name my-8b --resume [MORE...]            # from the first stage that has not finished, as before
#     slurm/submit.sh --name my-8b --resume --accept-changes     # with the code and conf/ as they are now
#     slurm/submit.sh --name my-8b --stop                        # saves, ends, and is not queued again
#
# KEY=VALUE is an override of all stages, --OPTION or --OPTION=VALUE one of sbatch; with stageN: in front, of that stage
# alone. train.init_from without a stage is of stage 1; the others start from the stage before. RUN_ROOT/NAME/slurm/
# keeps the arguments, a snapshot of conf/, the job ids and the logs. A stop holds until the next submit.sh of the run.
# Site settings: slurm/site.env, or the file that SITE_ENV names.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source slurm/common.sh

exec 3>&1  # what submit prints besides the job id that it returns
stages=(stage1 stage2 stage3)
name='' dry_run='' resume='' stop='' accept='' given=()

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"; }

read_arguments() {
  while (($#)); do
    case $1 in
      --name) (($# > 1)) || die "--name has no value: --name my-8b."; name=$2; shift ;;
      --name=*) name=${1#--name=} ;;
      --dry-run) dry_run=yes ;;
      --resume) resume=yes ;;
      --accept-changes) accept=yes ;;
      --stop) stop=yes ;;
      -h | --help) usage; exit 0 ;;
      name=* | run_dir=* | stage[123]:name=* | stage[123]:run_dir=*)
        die "$1: the chain decides that: --name NAME, and RUN_ROOT in slurm/site.env." ;;
      *$'\n'*) die "an argument has a line break: ${1%%$'\n'*}" ;;
      stage[123]:--* | --*) given+=("$1") ;;
      -*) die "$1: give options of sbatch in their long form, --nodes=16." ;;
      stage[123]:*=* | stage[123]:~* | *=* | ~*) given+=("$1") ;;
      *) die "$1 is neither an option (--nodes=16) nor an override (key=value)." ;;
    esac
    shift
  done
  [[ -n $name ]] || die "--name is missing: slurm/submit.sh --name my-8b [OVERRIDE...]."
  [[ $name =~ ^[A-Za-z0-9][A-Za-z0-9\ ._+-]*$ ]] ||
    die "--name '$name': use letters, digits, spaces and . _ + - alone; it becomes a folder."
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

# ranks_of STAGE: how many its job will have.
ranks_of() { echo $(($(number_of --nodes "slurm/$1.sbatch") * $(number_of --ntasks-per-node "slurm/$1.sbatch"))); }

# Refuse what cannot work now, before a job has waited days for its nodes.
check_stage() {
  local stage=$1 script=slurm/$1.sbatch
  if [[ $runtime_kind == venv ]] && command -v "$(venv_python)" > /dev/null; then
    local program
    find_program tools/preflight
    FACTS=$(bash slurm/python.sh "$(venv_python)" "${program[@]}" --settings "$(ranks_of "$stage")" "$stage" \
      "${overrides[@]}" name="$(quoted "$name")") || exit 2
  else
    # On many clusters Python is in a container, and this machine has none that could check the settings.
    echo "settings of $stage are not checked here (RUNTIME=$RUNTIME): the pre-flight does it" >&2
    FACTS=''
  fi
  FACTS=$FACTS "$host_python" slurm/checks.py "$stage" "$run" ${SBATCH_MORE[@]+"${SBATCH_MORE[@]}"} \
    ${options[@]+"${options[@]}"} ${overrides[@]+"${overrides[@]}"} || exit 2
  test_only "$stage" "$script" ${options[@]+"${options[@]}"}
}

# A step at full size without a GPU finds ranks that would wait for each other; docs/rehearsal.md.
rehearse_stage() {
  local stage=$1 program said status=0
  command -v "$(venv_python)" > /dev/null || return 0
  find_program tools/rehearse
  echo "$stage is rehearsed without a GPU, which takes minutes (REHEARSAL=no in slurm/site.env leaves it out)" >&2
  said=$(bash slurm/python.sh "$(venv_python)" "${program[@]}" --config-name "$stage" --jobs 4 \
    gpus="$(ranks_of "$stage")" ${overrides[@]+"${overrides[@]}"} 2>&1) || status=$?
  case $status in
    0) tail -n 1 <<< "$said" ;;
    3) echo "$stage is not rehearsed: ${said##*error: }" ;;
    *) printf '%s\n' "$said" >&2
       die "$stage: the rehearsal found what stands above: correct it; REHEARSAL=no submits all the same." ;;
  esac
}

# test_only WHAT SCRIPT OPTION...: ask Slurm. It accepts a job that no nodes can run, which would wait for ever.
test_only() {
  local what=$1 script=$2 answer
  shift 2
  command -v sbatch > /dev/null || return 0
  answer=$(sbatch --test-only ${SBATCH_MORE[@]+"${SBATCH_MORE[@]}"} "$@" "$script" 2>&1) && return
  answer=$(printf '%s\n' "$answer" | sed 's/^sbatch: error: //;/^$/d' | paste -sd ' ')
  case $answer in
    *[Aa]ccount*)
      die "$what: Slurm says: $answer. Correct --account or SBATCH_ACCOUNT in slurm/site.env$(
        choices "your accounts are" sacctmgr -nP show assoc user="$(id -un)" format=account)." ;;
    *[Pp]artition*)
      die "$what: Slurm says: $answer. Correct --partition or SBATCH_PARTITION in slurm/site.env$(
        choices "there are" sinfo -h -o %R)." ;;
    *) die "$what: Slurm says: $answer. Correct --nodes, --gpus-per-node, --time or the partition." ;;
  esac
}

# choices WORDS COMMAND...: "; WORDS A, B" from the lines that the command prints; nothing if it is missing or fails.
choices() {
  local words=$1 found
  shift
  found=$("$@" 2> /dev/null | sort -u | paste -sd , | sed 's/,/, /g') || true
  if [[ -n $found ]]; then printf '; %s %s' "$words" "$found"; fi
}

# submit JOBNAME DEPENDENCY SBATCH_ARGUMENT...: prints the job id; in a dry run the command, too.
submit() {
  local job=$1 dependency=$2 id
  shift 2
  local command=(sbatch --parsable --job-name="$name-$job" --output="${state//%/%%}/$job-%j.log")
  command+=(--kill-on-invalid-dep=yes)
  [[ -n $dependency ]] && command+=(--dependency="$dependency")
  if [[ -n ${MAIL_USER:-} ]]; then
    command+=(--mail-user="$MAIL_USER" --mail-type="${MAIL_TYPE:-END,FAIL,REQUEUE,INVALID_DEPEND}")
  fi
  command+=(${SBATCH_MORE[@]+"${SBATCH_MORE[@]}"} "$@")
  if [[ -n $dry_run ]]; then
    { printf '%q ' "${command[@]}"; echo; } >&3
    echo "<$job>"
    return
  fi
  if stop_asked "$run"; then return 1; fi
  id=$("${command[@]}") || return 1
  id=${id%%;*}  # with --clusters: id;cluster
  echo "$job $id" >> "$state/jobs"
  printf '  %-8s job %s\n' "$job" "$id" >&3
  echo "$id"
}

# If sbatch refuses a job, or a stop comes in the meantime, cancel the jobs of the chain that are submitted already.
give_up() {
  if [[ -n $dry_run ]]; then exit 2; fi
  local ids
  ids=$(awk '{ print $2 }' "$state/jobs" | xargs)
  # shellcheck disable=SC2086
  if [[ -n $ids ]]; then scancel $ids || true; fi
  if stop_asked "$run"; then die "'$name' was stopped while it was submitted: nothing of it is left in the queue."; fi
  die "sbatch refused the job above: nothing of the chain is left in the queue. Correct it and use --resume."
}

# "JOB STATE KIND" of each job of the run, also of one that sbatch alone submitted.
queued_jobs() { "$host_python" slurm/chain.py jobs "$run"; }

# Every job of the run reads the file before it trains, and looks for it while it trains: first the file, then Slurm.
stop_run() {
  local jobs job job_state kind pass signalled=' '
  if ! jobs=$(queued_jobs); then jobs=''; fi
  [[ -d $run || -n $jobs ]] || die "there is no run '$name' in $RUN_ROOT."
  mkdir -p "$state"
  id -un > "$state/.stop.$$"
  mv "$state/.stop.$$" "$state/stop"
  # Twice: a job that runs at the first look may be in the queue again at the second.
  for pass in 1 2; do
    jobs=$(queued_jobs) ||
      die "the stop is noted in $state/stop; running jobs see it in ${STOP_POLL:-10} s by themselves."
    while read -r job job_state kind; do
      case $kind:$job_state in
        :) ;;
        stage?:RUNNING | stage?:SUSPENDED | stage?:SIGNALING | stage?:STOPPED)
          [[ $signalled != *" $job "* ]] || continue
          signalled+="$job "
          if scancel --signal=USR1 --batch "$job" 2> /dev/null; then echo "job $job saves and ends"; fi ;;
        *) if scancel "$job" 2> /dev/null && ((pass == 1)); then echo "job $job is cancelled"; fi ;;
      esac
    done <<< "$jobs"
    [[ -n $jobs ]] || break
  done
  if [[ $signalled == ' ' && -z $jobs ]]; then echo "nothing of '$name' is queued"; fi
  echo "'$name' is stopped: slurm/submit.sh --name ${name@Q} --resume goes on"
}

# Which request to stop there is, so that only the one that was there when this program began is lifted.
stop_mark() { stat -c '%i %Y' "$state/stop" 2> /dev/null || true; }

read_arguments "$@"
load_site
if [[ -v NODE_LOCAL ]]; then export NODE_LOCAL; fi
export RUNTIME MOUNTS=${MOUNTS:-}
run=$RUN_ROOT/$name
[[ $run == /* ]] || run=$PWD/$run
state=$run/slurm
host_python=${HOST_PYTHON:-python3}
if [[ -z ${HOST_PYTHON:-} && $runtime_kind == venv ]] && command -v "$(venv_python)" > /dev/null; then
  host_python=$(venv_python)
fi
command -v "$host_python" > /dev/null || die "HOST_PYTHON=$host_python does not exist: it needs Python 3.6 or newer."
[[ -n $dry_run ]] || command -v sbatch > /dev/null || die "sbatch is not here: run this on a login node of the cluster."

if [[ -n $stop ]]; then
  stop_run
  exit 0
fi
stopped_before=$(stop_mark)

merged=()
if [[ -n $resume ]]; then
  [[ -d $run ]] || die "--resume: there is no run '$name' in $RUN_ROOT."
  earlier=()
  if [[ -e $state/arguments ]]; then mapfile -t earlier < "$state/arguments"; fi
  merge ${earlier[@]+"${earlier[@]}"} -- ${given[@]+"${given[@]}"}
else
  [[ ! -e $run ]] || die "$run exists already: go on with it (--resume), or choose another --name."
  merge ${given[@]+"${given[@]}"}
fi
if command -v squeue > /dev/null; then
  jobs=$(queued_jobs | awk '{ print $1 }' | xargs) || exit 2
  [[ -z $jobs ]] || die "'$name' is still queued (jobs $jobs): wait for them, or stop them first with --stop."
fi
if [[ -n $resume && -z $accept ]]; then
  changed=$("$host_python" slurm/chain.py changes "$run") ||
    die "${changed:-the snapshot in $state cannot be read}: put it back, or accept it with --accept-changes."
fi

first=''
for stage in "${stages[@]}"; do
  if finished "$run/$stage"; then echo "$stage has finished"; continue; fi
  first=${first:-$stage}
  arguments_of "$stage"
  check_stage "$stage"
done
if [[ ${REHEARSAL:-yes} == yes && $runtime_kind == venv && -z $dry_run && (-z $resume || ${#given[@]} -gt 0) ]]; then
  for stage in "${stages[@]}"; do
    if finished "$run/$stage"; then continue; fi
    arguments_of "$stage"
    rehearse_stage "$stage"
  done
fi
if [[ -z $first && -e $run/hf/config.json ]]; then
  echo "'$name' has finished and is exported to $run/hf: nothing to do"
  exit 0
fi
cpu=()
[[ -n ${CPU_PARTITION:-} ]] && cpu+=(--partition="$CPU_PARTITION")
for job in export report; do test_only "$job" "slurm/$job.sbatch" ${cpu[@]+"${cpu[@]}"}; done

if [[ -z $dry_run ]]; then
  # mkdir without -p: of two submit.sh that run at the same time, only one can make the folder.
  if [[ -z $resume ]]; then
    mkdir -p "$RUN_ROOT" || die "RUN_ROOT=$RUN_ROOT cannot be made: correct it in slurm/site.env."
    mkdir "$run" || die "$run exists already: go on with it (--resume), or choose another --name."
  fi
  mkdir -p "$state" || die "$run cannot be written: correct RUN_ROOT in slurm/site.env."
  printf '%s\n' ${merged[@]+"${merged[@]}"} > "$state/arguments"
  : > "$state/jobs"
  code=$("$host_python" slurm/chain.py record "$run") || die "the snapshot of the code could not be written to $state."
  echo "code: $code"
  # Only a person's submission lifts a stop; one that was given in the meantime stays.
  if [[ -n $stopped_before && $(stop_mark) == "$stopped_before" ]]; then rm -f "$state/stop"; fi
  rm -f "$run"/stage[123]/slurm/stop
fi

after=''
for stage in "${stages[@]}"; do
  if finished "$run/$stage"; then continue; fi
  arguments_of "$stage"
  id=$(submit "$stage" "$after" ${options[@]+"${options[@]}"} "slurm/$stage.sbatch" name="$(quoted "$name")" \
    run_dir="$(quoted "$run/$stage")" ${overrides[@]+"${overrides[@]}"}) || give_up
  after=afterok:$id last=$id
done
submit export "$after" ${cpu[@]+"${cpu[@]}"} slurm/export.sbatch "$run/stage3" "$run/hf" > /dev/null || give_up
# The report is also written if a stage fails.
submit report "${last:+afterany:$last}" ${cpu[@]+"${cpu[@]}"} slurm/report.sbatch "$run" > /dev/null || give_up
if [[ -z $dry_run ]]; then
  if stop_asked "$run"; then give_up; fi  # a stop that did not see the last jobs
  echo "watch it: python tools/status.py ${name@Q}; its logs are in $state"
fi
