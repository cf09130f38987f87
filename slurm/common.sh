# shellcheck shell=bash
# What the batch scripts share: site settings, how Python is started, and one run of a stage with its requeue.
#
# srun starts one task per GPU, not one torchrun agent per node: srun forwards SIGUSR1 to every rank, while the signal
# kills torchrun's agent, and with it the ranks in the middle of their checkpoint. srun also keeps the exit status of
# the ranks, which torchrun turns into 1. The trainer reads its ranks from Slurm's variables (molmo2_nemo/parallel.py).

say() { printf '%s | %s\n' "$(date '+%F %T')" "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 2; }

# Site settings from slurm/site.env, else from the job's environment.
load_site() {
  local file=${SITE_ENV:-slurm/site.env}
  if [[ -e $file ]]; then
    # shellcheck disable=SC1090
    source "$file"
  elif [[ -n ${SITE_ENV:-} ]]; then
    die "SITE_ENV=$SITE_ENV does not exist: copy slurm/site.example.env there."
  fi
  export RUN_ROOT=${RUN_ROOT:-runs}
  # An empty value would be taken for a path.
  [[ -n ${DATA_ROOT:-} ]] || unset DATA_ROOT
  # Which molmo2_nemo runs: that of this checkout, or the one that is installed where Python runs (python.sh reads it).
  if [[ -z ${CODE:-} ]]; then
    CODE=installed
    if [[ -d molmo2_nemo ]]; then CODE=checkout; fi
  fi
  [[ $CODE == checkout || $CODE == installed ]] || die "CODE=$CODE is unknown: use checkout or installed."
  [[ $CODE == installed || -d molmo2_nemo ]] || die "CODE=checkout, but $PWD has no molmo2_nemo/: use CODE=installed."
  # RUNTIME=KIND:WHAT
  RUNTIME=${RUNTIME:-venv}
  runtime_kind=${RUNTIME%%:*} runtime_what=''
  if [[ $RUNTIME == *:* ]]; then runtime_what=${RUNTIME#*:}; fi
  CODE_IMAGE=''
  if [[ $runtime_kind == pyxis || $runtime_kind == apptainer ]]; then CODE_IMAGE=$runtime_what; fi
  export CODE CODE_IMAGE
}

# find_program NAME: Python's arguments for a program such as tools/preflight, into `program`. -P: not from a
# molmo2_nemo/ in the working directory.
find_program() {
  program=("$1.py")
  if [[ $CODE == installed ]]; then program=(-P -m "molmo2_nemo.${1//\//.}"); fi
}

# The Python of the virtual environment, without a check.
venv_python() { printf '%s' "${PYTHON:-${runtime_what:-.venv}/bin/python}"; }

# Sets srun_options, inside, python and host_python from RUNTIME: `srun OPTIONS INSIDE PYTHON script.py` runs the script
# in the virtual environment, with the modules or in the container of RUNTIME; host_python runs slurm/starts.py.
set_runtime() {
  local what=$runtime_what mounts="$PWD:$PWD${MOUNTS:+,$MOUNTS}" name
  # --export=ALL: after sbatch --export=NONE the ranks would have no PATH.
  # --kill-on-bad-exit: if a rank dies, the step ends, and the other ranks do not wait for it.
  srun_options=(--export=ALL --kill-on-bad-exit=1)
  case $runtime_kind in
    venv)
      python=("$(venv_python)")
      command -v "${python[0]}" > /dev/null ||
        die "RUNTIME=$RUNTIME: ${python[0]} does not exist: run tools/setup.sh, or correct RUNTIME in slurm/site.env."
      ;;
    module)
      [[ -n $what ]] || die "RUNTIME=module needs names: RUNTIME=module:cuda/13.0,python/3.12."
      type module > /dev/null 2>&1 ||
        die "RUNTIME=$RUNTIME: there is no module command in this shell: source its init script in slurm/site.env."
      for name in ${what//,/ }; do
        module load "$name" || die "RUNTIME=$RUNTIME: module load $name failed on $(hostname)."
      done
      python=("${PYTHON:-python3}") ;;
    pyxis)
      [[ -n $what ]] || die "RUNTIME=pyxis needs an image: RUNTIME=pyxis:/images/molmo2.sqsh."
      # Options of srun only: with an #SBATCH line, clusters without pyxis would refuse the script.
      [[ $(srun --help 2>&1) == *--container-image* ]] ||
        die "RUNTIME=$RUNTIME needs pyxis, which this Slurm does not have: use apptainer:IMAGE or venv."
      srun_options+=(--container-image="$what" --container-mounts="$mounts" --container-workdir="$PWD")
      srun_options+=(--no-container-mount-home)
      python=("${PYTHON:-python}") ;;
    apptainer)
      [[ -n $what ]] || die "RUNTIME=apptainer needs an image: RUNTIME=apptainer:/images/molmo2.sif."
      command -v apptainer > /dev/null || die "RUNTIME=$RUNTIME: apptainer is not installed on $(hostname)."
      inside=(apptainer exec --nv --pwd "$PWD" --bind "$mounts" "$what")
      python=("${PYTHON:-python}") ;;
    *) die "RUNTIME=$RUNTIME is unknown: use venv[:DIR], module:NAMES, pyxis:IMAGE or apptainer:IMAGE." ;;
  esac
  host_python=${HOST_PYTHON:-python3}
  if [[ $runtime_kind == venv || $runtime_kind == module ]]; then host_python=${HOST_PYTHON:-${python[0]}}; fi
  command -v "$host_python" > /dev/null ||
    die "HOST_PYTHON=$host_python does not exist on $(hostname): slurm/starts.py needs Python 3.6 or newer."
  python=(bash "$PWD/slurm/python.sh" "${python[@]}")
}

# The environment of the ranks.
set_environment() {
  # The nodes in their order; rank 0 is on the first. Set here, since a container has no scontrol to ask.
  JOB_NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | xargs)
  MASTER_ADDR=${JOB_NODES%% *}
  # Below the ports that Linux gives to outgoing connections (from 32768). Each job has two: one for the pre-flight.
  export JOB_NODES MASTER_ADDR MASTER_PORT=$((15000 + 2 * (SLURM_JOB_ID % 8000)))
  local tasks=${SLURM_NTASKS:-$SLURM_NNODES}
  tasks_per_node=${SLURM_NTASKS_PER_NODE:-$((tasks / SLURM_NNODES))}
  ((tasks_per_node > 0 && (tasks == tasks_per_node * SLURM_NNODES))) ||
    die "$tasks task(s) on $SLURM_NNODES nodes: give each the same number, --ntasks-per-node=8."
  srun_options+=(--ntasks=$((tasks_per_node * SLURM_NNODES)) --ntasks-per-node="$tasks_per_node")
  # srun does not read SLURM_CPUS_PER_TASK since 22.05. Without --cpus-per-task a rank gets its part of the node.
  export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-$((SLURM_CPUS_ON_NODE / tasks_per_node))}
  if [[ $(scontrol show config) =~ TaskPlugin[[:space:]]*=[^$'\n']*affinity ]]; then
    # Neighbouring ranks on neighbouring cores: in a node of 8 GPUs the first four are connected to the first socket,
    # while Slurm's default alternates between sockets. Memory comes from the socket that the rank is bound to.
    srun_options+=(--distribution=block:block --cpu-bind=cores --mem-bind=local)
  fi
  # Threads of a rank; its loader workers need cores, too.
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
  # Tensor parallel overlap in Megatron needs one hardware queue.
  export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
  # NCCL is silent by default, also about why it fails.
  export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
  # Lines appear in the log as soon as they are printed.
  export PYTHONUNBUFFERED=1
  # A blend of a hundred sources has many shards open at a time.
  ulimit -n "$(ulimit -Hn)"
  # InfiniBand pins the memory that it sends from.
  ulimit -l unlimited 2> /dev/null ||
    say "ulimit -l stays at $(ulimit -l) KiB: InfiniBand may need more (PropagateResourceLimits in slurm.conf)"
}

# quoted VALUE: for Hydra's grammar, so that spaces, commas and brackets have no special meaning.
quoted() {
  local value=${1//\\/\\\\}
  printf "'%s'" "${value//\'/\\\'}"
}
unquoted() {
  local value=$1
  [[ $value =~ ^\'(.*)\'$ || $value =~ ^\"(.*)\"$ ]] && value=${BASH_REMATCH[1]//\\\'/\'}
  printf '%s' "$value"
}

finished() { [[ -e $1/ended.json ]] && grep -q '"reason": *"finished"' "$1/ended.json"; }

# wait_for PID: its exit status goes to `status`. A trapped signal ends `wait`, not the process, so wait again.
wait_for() {
  while kill -0 "$1" 2> /dev/null; do wait "$1" || true; done
  status=0
  wait "$1" || status=$?
}

# stop_asked FOLDER...: whether a person has asked to stop one of these runs or stages (submit.sh --stop). A folder is
# listed, not asked for the file: a network file system may remember for a minute that a file is not there, and asks its
# server again when a folder is opened.
stop_asked() {
  local folder
  for folder in "$@"; do
    if [[ $'\n'$(ls -A -- "$folder/slurm" 2> /dev/null)$'\n' == *$'\nstop\n'* ]]; then return 0; fi
  done
  return 1
}

# A request to stop reaches this script as SIGUSR1, or without a signal within STOP_POLL seconds.
watch_for_stop() {
  (while sleep "${STOP_POLL:-10}"; do
    if stop_asked "${stop_folders[@]}"; then kill -USR1 $$; exit; fi
  done) > /dev/null 2>&1 &
  watcher=$!
}

stopping='' term='' step='' repeat='' watcher=''
# SIGUSR1 comes from Slurm before the time limit (--signal=B:USR1@300), or from a user: the ranks save and end. It is
# repeated, since a rank ignores it while it is starting.
on_usr1() {
  if [[ -z $stopping ]]; then
    stopping=yes
    say "SIGUSR1: asking the ranks to save and end"
    if [[ -n $step ]]; then ask_to_stop; fi
  fi
}
ask_to_stop() {
  kill -USR1 "$step" 2> /dev/null || true
  (while sleep 15; do kill -USR1 "$step" || exit 0; done 2> /dev/null) &
  repeat=$!
}
# After scancel, scontrol requeue or a lost node, Slurm ends the job and decides what happens next. It also signals the
# ranks.
on_term() { term=yes; say "SIGTERM: Slurm ends this job"; }

# run_stage STAGE RECIPE [OVERRIDE...]: RECIPE is such as recipes/stage1_pretrain
run_stage() {
  local stage=$1 recipe=$2 argument name=molmo2 run_dir='' init_from='' previous=''
  shift 2
  trap on_usr1 USR1
  trap on_term TERM
  local inside=() srun_options python host_python program tasks_per_node
  load_site
  set_runtime
  set_environment

  # name and run_dir say where the state of the run is, so they are read here; all others only go to the recipe.
  local overrides=()
  for argument in "$@"; do
    case $argument in
      name=*) name=$(unquoted "${argument#name=}") ;;
      run_dir=*) run_dir=$(unquoted "${argument#run_dir=}") ;;
      train.init_from=*) init_from=$argument ;;
      *) overrides+=("$argument") ;;
    esac
  done
  run_dir=${run_dir:-$RUN_ROOT/$name/$stage}
  [[ $run_dir != *://* ]] || die "run_dir=$run_dir is an address: leave it out, and set train.upload_to=$run_dir."
  case $stage in
    stage2) previous=$(dirname "$run_dir")/stage1 ;;
    stage3) previous=$(dirname "$run_dir")/stage2 ;;
  esac
  mkdir -p "$run_dir/slurm" || die "$(hostname) cannot write to $run_dir: correct RUN_ROOT in slurm/site.env."
  # The stage's folder, and the run's that it is in (chain.py has the same rule).
  local stop_folders=("$run_dir")
  if [[ $(basename "$run_dir") == stage[123] ]]; then stop_folders+=("$(dirname "$run_dir")"); fi
  STOP_FILES=$(printf '%s/slurm/stop\n' "${stop_folders[@]}")
  export STOP_FILES
  if [[ -n $previous && -z $init_from ]]; then init_from=train.init_from=$(quoted "$previous"); else previous=''; fi
  overrides+=(name="$(quoted "$name")" run_dir="$(quoted "$run_dir")" ${init_from:+"$init_from"})

  say "$stage of '$name' in $run_dir: job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1))," \
    "$SLURM_NNODES node(s) x $tasks_per_node rank(s): $SLURM_JOB_NODELIST"
  "$host_python" slurm/starts.py begin "$run_dir" || exit $?
  watch_for_stop
  trap 'kill $watcher $repeat 2> /dev/null || true' EXIT
  # A stage that has a checkpoint continues from it, and does not need the stage before.
  local own=("$run_dir"/checkpoints/step_*/complete.json)
  if [[ -n $previous && ! -e ${own[0]} ]] && ! finished "$previous"; then
    local reason="$stage starts from $previous, which has not finished: train it first, or set"
    "$host_python" slurm/starts.py stop "$run_dir" "$reason train.init_from=CHECKPOINT" || exit $?
  fi

  local phase=preflight status=0 errors=$run_dir/slurm/srun_errors-$SLURM_JOB_ID.txt
  if [[ ${PREFLIGHT:-yes} == yes && -z $stopping && -z $term ]]; then
    # Twice its own limit: normally it ends by itself and says why.
    find_program tools/preflight
    timeout $((2 * ${PREFLIGHT_SECONDS:-60})) \
      srun "${srun_options[@]}" "${inside[@]}" "${python[@]}" "${program[@]}" "$stage" "${overrides[@]}" < /dev/null &
    wait_for $!
  fi
  if stop_asked "${stop_folders[@]}"; then stopping=yes; fi
  if ((status == 0)) && [[ -z $stopping && -z $term ]]; then
    phase=training
    [[ ${RANK_LOGS:-no} == yes ]] && export RANK_LOG_DIR=$run_dir/slurm/ranks
    { : > "$errors"; } 2> /dev/null || true  # on a full disk, the trainer says so
    find_program "$recipe"
    srun "${srun_options[@]}" "${inside[@]}" bash slurm/rank.sh "${python[@]}" "${program[@]}" "${overrides[@]}" \
      < /dev/null 2> >(exec tee -a "$errors" >&2) &
    step=$!
    [[ -n $stopping ]] && ask_to_stop  # the signal came while srun was being started
    wait_for "$step"
    step=''
    if [[ -n $repeat ]]; then kill "$repeat" 2> /dev/null || true; fi
    sleep 0.5  # until tee has written the last lines
  fi

  local decision action number nodes
  decision=$("$host_python" slurm/starts.py end "$run_dir" --exit "$status" --phase "$phase" \
    ${stopping:+--usr1} ${term:+--term}) || exit 1
  read -r action number nodes <<< "$decision"
  [[ $action == requeue ]] || exit "$number"
  requeue "$run_dir" "$number" "$nodes"
}

# requeue RUN_DIR SECONDS NODES: the same job again, not before SECONDS from now, without NODES (`-`: with all).
requeue() {
  local before
  before=$(scontrol show job -o "$SLURM_JOB_ID" | sed -n 's/.* ExcNodeList=\([^ ]*\).*/\1/p')
  if stop_asked "${stop_folders[@]}"; then "$host_python" slurm/starts.py stop "$1" || exit $?; fi
  # Slurm sends SIGTERM to this script when the job is requeued.
  trap '' TERM
  if ! scontrol requeue "$SLURM_JOB_ID"; then
    "$host_python" slurm/starts.py stop "$1" \
      "Slurm refused to queue the job again: leave out --no-requeue, or ask for JobRequeue=1 in slurm.conf" || exit $?
  fi
  # A request to stop that came since then; a job that starts nevertheless ends at once (starts.py begin).
  if stop_asked "${stop_folders[@]}"; then
    scancel "$SLURM_JOB_ID" || true
    "$host_python" slurm/starts.py stop "$1" || exit $?
  fi
  # Slurm refuses both settings for a running job, so they follow the requeue. The job cannot start before this script
  # ends.
  if [[ $3 != - ]]; then
    [[ $before == "(null)" ]] && before=''
    scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="${before:+$before,}$3" || say "$3 could not be excluded"
  fi
  if (($2 > 0)); then
    scontrol update JobId="$SLURM_JOB_ID" StartTime=now+"$2" || say "the wait of $2 s could not be set"
  fi
  exit 0
}

# run_program NAME [ARGUMENT...]: one process of a program such as tools/export_hf on the job's node, in RUNTIME.
run_program() {
  local inside=() srun_options python host_python program
  load_site
  set_runtime
  find_program "$1"
  shift
  export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
  srun "${srun_options[@]}" --ntasks=1 "${inside[@]}" "${python[@]}" "${program[@]}" "$@" < /dev/null
}

# run_tasks FILE: this array task's part of a list of commands (slurm/prepare.sbatch).
run_tasks() {
  local inside=() srun_options python host_python lines line key done_dir number=-1 failed=0 ran=0 kept=0
  load_site
  set_runtime
  export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
  # Define `python` for the line, with or without a container.
  local shell_start
  shell_start="python() { $(printf '%q ' "${python[@]}")\"\$@\"; }; export -f python; "
  done_dir=$RUN_ROOT/prepare/$(basename "$1")
  mkdir -p "$done_dir"
  # Lines are shared by their number, which works for an array that does not begin at 0.
  local first=${SLURM_ARRAY_TASK_MIN:-0} count=${SLURM_ARRAY_TASK_COUNT:-1} index=${SLURM_ARRAY_TASK_ID:-0}
  ((${SLURM_ARRAY_TASK_MAX:-0} - first + 1 == count)) || die "--array must be a range without gaps, such as 0-15."
  mapfile -t lines < "$1"
  for line in "${lines[@]}"; do
    [[ $line =~ ^[[:space:]]*(#|$) ]] && continue
    number=$((number + 1))
    ((number % count == index - first)) || continue
    key=$(sha256sum <<< "$line" | cut -c1-24)
    if [[ -e $done_dir/$key.done ]]; then
      kept=$((kept + 1))
      continue
    fi
    # An earlier submission of the list may still be running this line.
    exec 8> "$done_dir/$key.lock"
    if ! flock --nonblock 8; then
      say "task $number is being run by another job: $line"
      failed=$((failed + 1))
      continue
    fi
    say "task $number: $line"
    if srun "${srun_options[@]}" --ntasks=1 "${inside[@]}" bash -c "$shell_start$line" < /dev/null 8>&-; then
      printf '%s\n' "$line" > "$done_dir/$key.tmp"
      mv "$done_dir/$key.tmp" "$done_dir/$key.done"
      ran=$((ran + 1))
    else
      say "task $number FAILED: $line"
      failed=$((failed + 1))
    fi
  done
  say "$ran done, $kept done before, $failed failed, of $((number + 1)) tasks in the list"
  ((failed == 0))
}
