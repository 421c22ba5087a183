#!/usr/bin/env bash
#SBATCH --job-name=transllm
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=B:TERM@120
# Runs one process per node under SLURM. Two minutes before the time limit SIGTERM reaches the run: it saves and ends
# with exit code 75, and the job is requeued.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: sbatch --nodes=N [--gpus-per-node=G | --cpus-per-task=C] [--time=T] slurm.sh --config FILE --workdir DIR
              [--max-restarts N] [key=value ...]
       slurm.sh --dry-run --config FILE --workdir DIR [key=value ...]

Runs one process of `transllm run` per node. DIR is on a file system that all nodes share, or gs://bucket/path. What
happens next depends on the exit code. 0: done. 2: the input is wrong, and the job ends. 75: preempted, and the job is
requeued. Any other: the run is restarted in the same allocation, at most N times (default 3). A job that loses a node
is requeued by SLURM itself (--requeue). To end a job for good: scancel JOB.

  --max-restarts N   restarts after a failure in one allocation (3)
  --dry-run          print the directives and the commands without running them
TEXT
}

fail() {
  echo "slurm.sh: $*" >&2
  exit 2
}

quote() { # quotes a word for the shell, if it needs quotes
  case $1 in
    '' | *[!A-Za-z0-9_./:=@,%+-]*) printf "'%s'" "$(printf '%s' "$1" | sed "s/'/'\\\\''/g")" ;;
    *) printf '%s' "$1" ;;
  esac
}

show() {
  local word line=''
  for word in "$@"; do line+="$(quote "$word") "; done
  echo "${line% }"
}

config='' workdir='' max_restarts=3 dry_run=''
overrides=()
while (($#)); do
  case $1 in
    --help | -h) usage && exit 0 ;;
    --dry-run) dry_run=yes && shift ;;
    --config | --workdir | --max-restarts)
      (($# > 1)) || fail "$1 needs a value"
      case $1 in
        --config) config=$2 ;;
        --workdir) workdir=$2 ;;
        --max-restarts) max_restarts=$2 ;;
      esac
      shift 2
      ;;
    -*) fail "unknown option '$1'; see slurm.sh --help" ;;
    *=*) overrides+=("$1") && shift ;;
    *) fail "'$1' is neither an option nor key=value; see slurm.sh --help" ;;
  esac
done
[[ -n $config ]] || fail "--config is missing"
[[ -n $workdir ]] || fail "--workdir is missing"
[[ $max_restarts =~ ^[0-9]+$ ]] || fail "--max-restarts is a number, not '$max_restarts'"

job=${SLURM_JOB_ID:-}
nodes=${SLURM_JOB_NUM_NODES:-${SLURM_NNODES:-1}}
# When a task ends, srun must not kill the others: they may still be writing their parts of a checkpoint, and they stop
# by themselves. --wait is for a task that does not.
command=(srun "--nodes=$nodes" "--ntasks=$nodes" --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=300)
# Since SLURM 22.05 a step does not inherit --cpus-per-task from the job.
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || command+=("--cpus-per-task=$SLURM_CPUS_PER_TASK")
command+=(transllm run "$config" ${overrides[@]+"${overrides[@]}"} --workdir "$workdir" --distributed auto)
gpus=${SLURM_GPUS_ON_NODE:-0}
if [[ $gpus =~ ^[1-9][0-9]*$ ]]; then
  # By default jax uses only one device per process under SLURM.
  export JAX_LOCAL_DEVICE_IDS=0
  for ((i = 1; i < gpus; i++)); do JAX_LOCAL_DEVICE_IDS+=",$i"; done
fi

if [[ -n $dry_run ]]; then
  grep '^#SBATCH ' "$0"
  [[ -z ${JAX_LOCAL_DEVICE_IDS:-} ]] || echo "export JAX_LOCAL_DEVICE_IDS=$JAX_LOCAL_DEVICE_IDS"
  show "${command[@]}"
  echo "# after exit code 75:"
  show scontrol requeue Incomplete "${job:-JOB}"
  exit 0
fi
[[ -n $job ]] || fail "this is not a SLURM job; submit it: sbatch --nodes=N launch/slurm.sh --config FILE --workdir DIR"
for tool in srun scontrol transllm; do
  command -v "$tool" >/dev/null || fail "$tool is missing; put it on PATH before sbatch"
done

# The processes recognise each other by this secret. srun passes it to every task, and others on the cluster cannot know
# it.
if [[ -z ${TRANSLLM_SECRET:-} && -r /proc/sys/kernel/random/uuid ]]; then
  TRANSLLM_SECRET=$(</proc/sys/kernel/random/uuid)
fi
export TRANSLLM_SECRET=${TRANSLLM_SECRET:-}

child='' stopping='' interrupted=''
stop() {
  stopping=yes interrupted=yes
  [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true # srun passes the signal on to every task
}
trap stop TERM

requeue() {
  # With `Incomplete`, a job that was cancelled meanwhile is not requeued.
  echo "slurm.sh: the run ended with exit code $1; requeueing job $job"
  scontrol requeue Incomplete "$job" || echo "slurm.sh: job $job was not requeued; submit it again to continue" >&2
  exit "$1"
}

for ((failures = 0; ; )); do
  "${command[@]}" &
  child=$!
  [[ -z $stopping ]] || stop
  while :; do # a signal interrupts `wait`; then it is called again
    interrupted='' code=0
    wait "$child" || code=$?
    [[ -n $interrupted ]] || break
  done
  child=''
  case $code in
    0 | 2) exit "$code" ;;
    75) requeue 75 ;;
  esac
  # The run was killed while it was stopping; the requeued job resumes from its last checkpoint.
  [[ -z $stopping ]] || requeue "$code"
  failures=$((failures + 1))
  echo "slurm.sh: the run failed with exit code $code ($failures of at most $((max_restarts + 1)))" >&2
  ((failures <= max_restarts)) || exit "$code"
done
