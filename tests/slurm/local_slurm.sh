#!/usr/bin/env bash
# A real Slurm cluster on this machine alone, to run the sbatch scripts as they are:
# one slurmctld and NODES slurmd on 127.0.0.1, with counted GPUs that need no
# hardware. Installs nothing and changes nothing outside SLURM_LOCAL_DIR.
#
#   local_slurm.sh start    start the cluster, or leave it running; wait until
#                           every node is idle; print 'export SLURM_CONF=...'
#   local_slurm.sh status   exit 0 if every daemon runs and every node answers
#   local_slurm.sh stop     cancel the jobs and end every process of the cluster
#
#   conf=$(local_slurm.sh start) && eval "$conf" && sbatch job.sbatch
#
# A new cluster has an empty queue and job id 1. Its logs are in log/, where
# jobs.log has a line for each job that ended. Jobs in the partition `urgent`
# preempt (requeue) those in `main`, the default.
#
# Needs root: each daemon gets a host name and a hosts file of its own (unshare),
# so that a job sees `hostname` print node1, node2, ... and can resolve them.
# srun and salloc outside a job work only where this machine's own host name
# resolves to 127.0.0.1; sbatch, and srun in a job, work everywhere.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

NODES=${NODES:-2}                        # node1 ... nodeN
GPUS_PER_NODE=${GPUS_PER_NODE:-8}        # 0: none
CPUS_PER_NODE=${CPUS_PER_NODE:-128}      # only counted: nothing is pinned
DIR=${SLURM_LOCAL_DIR:-/tmp/local-slurm}
PORT=${SLURM_LOCAL_PORT:-11817}          # slurmctld's; the nodes have the next
                                         # NODES; if one is taken, further up;
                                         # apart from ranks' ports (warm.py)

say() { echo "local_slurm: $*" >&2; }
die() { say "$@"; exit 1; }

# until_true SECONDS COMMAND...: poll it
until_true() {
  local end=$((SECONDS + $1)); shift
  until "$@"; do ((SECONDS < end)) || return 1; sleep 0.2; done
}

# as_host NAME COMMAND...: start a daemon under that host name and with the
# cluster's hosts file, holding neither our output nor our lock.
as_host() {
  local name=$1; shift
  # shellcheck disable=SC2016
  unshare --uts --mount --propagation slave sh -ec '
    hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"' \
    sh "$name" "$DIR/etc/hosts" "$@" >"$DIR/log/start-$name.out" 2>&1 </dev/null 9>&-
}

# The pids of the cluster's daemons, jobs and whatever a job left behind: those
# that have the cluster's hosts file as /etc/hosts. A zombie is not among them.
processes() {
  local id
  id=$(stat -c %d:%i "$DIR/etc/hosts" 2>/dev/null) || return 0
  { stat -L -c '%d:%i %n' /proc/[0-9]*/root/etc/hosts 2>/dev/null || true; } |
    sed -n "s|^$id /proc/\([0-9]*\)/.*|\1|p"
}
no_processes() { [[ -z $(processes) ]]; }

alive() { grep -qxf "$DIR/run/$1.pid" 2>/dev/null <<<"$(processes)"; }
shape() { cat "$DIR/shape" 2>/dev/null || true; }    # "NODES GPUS_PER_NODE" of the cluster in DIR
daemons() { local i; echo munged slurmctld; for ((i = 1; i <= $1; i++)); do echo "slurmd-node$i"; done; }
all_alive() { local d; for d in $(daemons "$1"); do alive "$d" || return 1; done; }
nodes_up() { [[ $(sinfo -h -N -p main -t idle,mixed,alloc,comp -o %N 2>/dev/null | wc -l) == "$1" ]]; }
no_jobs() { [[ -z $(squeue -h 2>/dev/null) ]]; }

port_taken() {
  local p
  for ((p = PORT; p <= PORT + NODES; p++)); do (exec 3<>"/dev/tcp/127.0.0.1/$p") 2>/dev/null && return; done
  return 1
}

lay_out() {
  local gres='' i
  rm -rf "${DIR:?}"/{etc,dev,state,spool,run,log}
  mkdir -p "$DIR"/{etc,dev,state,spool,run,log}
  (umask 077; head -c 128 /dev/urandom > "$DIR/etc/munge.key")

  { echo "127.0.0.1 localhost controller"
    for ((i = 1; i <= NODES; i++)); do mkdir "$DIR/spool/node$i"; echo "127.0.0.1 node$i"; done
    cat /etc/hosts; } > "$DIR/etc/hosts"

  if ((GPUS_PER_NODE > 0)); then         # gres.conf wants a device file for each
    for ((i = 0; i < GPUS_PER_NODE; i++)); do ln -s /dev/null "$DIR/dev/gpu$i"; done
    gres="Gres=gpu:$GPUS_PER_NODE"
    printf '%s\n' AutoDetect=off "Name=gpu File=$DIR/dev/gpu[0-$((GPUS_PER_NODE - 1))]" > "$DIR/etc/gres.conf"
  fi

  while port_taken; do PORT=$((PORT + NODES + 1)); done
  cat > "$DIR/etc/slurm.conf" <<CONF
ClusterName=local
SlurmctldHost=controller(127.0.0.1)
SlurmctldPort=$PORT
# listen on what the daemon's host name resolves to: 127.0.0.1
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# a requeued job waits cred_expire + 1 seconds: at least 5, by default 120
AuthInfo=socket=$DIR/run/munge.socket,cred_expire=5
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmdPidFile=$DIR/run/slurmd-%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd-%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$DIR/log/jobs.log
# seconds that scontrol still shows a job that ended
MinJobAge=86400
# a second, not three or more, from submission or dependency to start
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
# SIGTERM to SIGKILL on scancel or time limit
KillWait=5
SlurmdTimeout=30
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# the sizes below count, not the machine's
SlurmdParameters=config_overrides
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=node[1-$NODES] NodeAddr=127.0.0.1 Port=[$((PORT + 1))-$((PORT + NODES))] \\
  CPUs=$CPUS_PER_NODE RealMemory=2000000 $gres
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=10
PartitionName=urgent Nodes=ALL PriorityTier=10
CONF
  echo "$NODES $GPUS_PER_NODE" > "$DIR/shape"
}

launch() {
  local i
  as_host munge munged --force --origin=127.0.0.1 --key-file="$DIR/etc/munge.key" \
    --socket="$DIR/run/munge.socket" --pid-file="$DIR/run/munged.pid" \
    --seed-file="$DIR/run/munged.seed" --log-file="$DIR/log/munged.log" || return 1
  as_host controller slurmctld -f "$SLURM_CONF" || return 1
  for ((i = 1; i <= NODES; i++)); do as_host "node$i" slurmd -f "$SLURM_CONF" -N "node$i" || return 1; done
  until_true 60 nodes_up "$NODES"
}

start() {
  local c missing='' old
  for c in munged slurmctld slurmd sinfo; do command -v "$c" >/dev/null || missing+=" $c"; done
  [[ -z $missing ]] || die "not installed:$missing (apt-get install --no-install-recommends slurm-wlm munge)"
  unshare --uts --mount true 2>/dev/null || die "unshare is refused: this needs CAP_SYS_ADMIN"

  old=$(shape)
  if [[ $old ]] && all_alive "${old% *}"; then
    [[ $old == "$NODES $GPUS_PER_NODE" ]] || die "$DIR runs ${old% *} nodes with ${old#* } GPUs: stop it first"
    nodes_up "$NODES" || die "$DIR runs, but not every node is up (see sinfo -R): stop it first"
    say "already running in $DIR"
  else
    stop                                 # what is left of a broken one
    lay_out
    say "starting $NODES nodes in $DIR"
    if ! launch; then
      tail -n 5 "$DIR"/log/*.out "$DIR"/log/*.log >&2 || true
      sinfo -N -o '%N %T %E' >&2 || true
      stop
      die "the cluster did not come up: see $DIR/log"
    fi
  fi
  echo "export SLURM_CONF=$SLURM_CONF"
}

status() {
  local d n rc=0
  n=$(shape | cut -d' ' -f1)
  [[ $n ]] || { say "no cluster in $DIR"; return 1; }
  for d in $(daemons "$n"); do
    if alive "$d"; then echo "$d: pid $(cat "$DIR/run/$d.pid")"; else echo "$d: not running"; rc=1; fi
  done
  ((rc == 0)) || return 1
  sinfo -N -o '%N %P %T %G %E'
  squeue
  nodes_up "$n"
}

stop() {
  local n jobs
  n=$(shape | cut -d' ' -f1)
  if [[ $n ]] && all_alive "$n"; then    # a broken one cannot end its jobs itself
    jobs=$(squeue -h -o %A | sort -u | xargs) || jobs=''
    if [[ $jobs ]]; then
      say "cancelling jobs $jobs"
      # shellcheck disable=SC2086
      scancel --quiet $jobs || true
      until_true 15 no_jobs || say "some have not ended after 15 seconds"
    fi
  fi
  if ! no_processes; then
    processes | xargs -r kill -TERM 2>/dev/null || true
    until_true 5 no_processes || processes | xargs -r kill -KILL 2>/dev/null || true
    until_true 5 no_processes || die "still running: $(processes | xargs)"
    say "stopped"
  fi
  rm -f "$DIR/shape"
}

[[ ${1-} =~ ^(start|stop|status)$ ]] || die "usage: $0 start|stop|status"
[[ $NODES =~ ^[1-9][0-9]{0,2}$ ]] || die "NODES must be 1 to 999, not '$NODES'"
[[ $GPUS_PER_NODE =~ ^[0-9]{1,2}$ ]] || die "GPUS_PER_NODE must be 0 to 99, not '$GPUS_PER_NODE'"
((EUID == 0)) || die "run it as root"
[[ $DIR == /* ]] || DIR=$PWD/$DIR
[[ $DIR =~ ^[A-Za-z0-9/._-]{2,60}$ ]] ||
  die "SLURM_LOCAL_DIR must be at most 60 plain characters (its sockets have a limit): $DIR"
export SLURM_CONF=$DIR/etc/slurm.conf

case $1 in
  start)
    [[ -e $DIR/lock || -z $(ls -A "$DIR" 2>/dev/null) ]] ||
      die "$DIR holds something else: set SLURM_LOCAL_DIR to a new directory"
    mkdir -p "$DIR" ;;
  stop) [[ -e $DIR/lock ]] || exit 0 ;;
esac
if [[ $1 != status ]]; then              # one start or stop at a time
  exec 9>"$DIR/lock"
  flock 9
fi
"$1"
