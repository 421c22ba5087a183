#!/usr/bin/env bash
# Runs several processes on this machine as a cluster: a smoke test of what the hosts of a pod do.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: local.sh --config FILE --workdir DIR [options] [key=value ...]

Starts N processes of `transllm run` on the CPU (gloo), which connect on 127.0.0.1, each with its own log, and waits
for them. When one fails, the others are asked to stop (SIGTERM), and are killed after --grace seconds. The exit code is
that of the first process that failed, or 0. Ctrl-C (or SIGTERM) asks all processes to stop: they save and end with exit
code 75. A second one kills them.

  --processes N   number of processes (2)
  --devices N     virtual CPU devices of each process (1)
  --port PORT     the first process's port, to which the others connect (a free port)
  --logs DIR      directory for one log per process (WORKDIR.logs)
  --grace SEC     how long the others may take to stop (90)
  --dry-run       print the commands without running them
TEXT
}

fail() {
  echo "local.sh: $*" >&2
  exit 2
}

quote() { # quotes a word for the shell, if it needs quotes
  case $1 in
    '' | *[!A-Za-z0-9_./:=@,%+-]*) printf "'%s'" "$(printf '%s' "$1" | sed "s/'/'\\\\''/g")" ;;
    *) printf '%s' "$1" ;;
  esac
}

config='' workdir='' processes=2 devices=1 port='' logs='' grace=90 dry_run=''
overrides=()
while (($#)); do
  case $1 in
    --help | -h) usage && exit 0 ;;
    --dry-run) dry_run=yes && shift ;;
    --config | --workdir | --processes | --devices | --port | --logs | --grace)
      (($# > 1)) || fail "$1 needs a value"
      case $1 in
        --config) config=$2 ;;
        --workdir) workdir=$2 ;;
        --processes) processes=$2 ;;
        --devices) devices=$2 ;;
        --port) port=$2 ;;
        --logs) logs=$2 ;;
        --grace) grace=$2 ;;
      esac
      shift 2
      ;;
    -*) fail "unknown option '$1'; see local.sh --help" ;;
    *=*) overrides+=("$1") && shift ;;
    *) fail "'$1' is neither an option nor key=value; see local.sh --help" ;;
  esac
done
[[ -n $config ]] || fail "--config is missing"
[[ -n $workdir ]] || fail "--workdir is missing"
for number in processes devices grace; do
  [[ ${!number} =~ ^[1-9][0-9]*$ ]] || fail "--$number is a number from 1, not '${!number}'"
done
if [[ -z $logs ]]; then
  [[ $workdir != *://* ]] || fail "--logs is missing: there is no default for the workdir $workdir"
  logs=${workdir%/}.logs
fi
if [[ -z $port ]]; then
  port=$((20000 + RANDOM % 10000))
  while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((20000 + RANDOM % 10000)); done
fi

command_of() { # process index -> the array `command`
  command=(env JAX_PLATFORMS=cpu JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo
    "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices"
    transllm run "$config" ${overrides[@]+"${overrides[@]}"} --workdir "$workdir"
    --coordinator "127.0.0.1:$port" --processes "$processes" --process "$1")
}

if [[ -n $dry_run ]]; then
  for ((i = 0; i < processes; i++)); do
    command_of "$i"
    for word in "${command[@]}"; do
      quote "$word"
      printf ' '
    done
    printf '> %s 2>&1 &\n' "$(quote "$logs/process-$i.log")"
  done
  exit 0
fi
command -v transllm >/dev/null || fail "transllm is missing; install this project, or put its .venv/bin on PATH"
mkdir -p "$logs"

pids=() stops=0
live() { # the pids of processes that have not been waited for
  local pid
  for pid in ${pids[@]+"${pids[@]}"}; do
    [[ -z $pid ]] || echo "$pid"
  done
}
send() {
  local pid
  for pid in $(live); do kill "-$1" "$pid" 2>/dev/null || true; done
}
# shellcheck disable=SC2329 # the trap calls it
interrupted() {
  stops=$((stops + 1))
  if ((stops == 1)); then
    echo "asking all processes to stop; a second signal kills them" >&2
    send TERM
    [[ -n $deadline ]] || deadline=$((SECONDS + grace))
  else
    send KILL
  fi
}

deadline='' first=0 failed='' left=$processes
trap interrupted INT TERM HUP
# Each process has its own process group: Ctrl-C in a terminal only reaches this script, which passes it on once.
set -m
for ((i = 0; i < processes; i++)); do
  command_of "$i"
  "${command[@]}" >"$logs/process-$i.log" 2>&1 &
  pids+=($!)
  echo "process $i: pid $!, log $logs/process-$i.log"
done
set +m
((stops == 0)) || send TERM # a signal came while the processes were being started
while ((left)); do
  for ((i = 0; i < processes; i++)); do
    pid=${pids[i]}
    if [[ -z $pid ]] || kill -0 "$pid" 2>/dev/null; then continue; fi
    code=0
    wait "$pid" || code=$?
    pids[i]='' left=$((left - 1))
    echo "process $i ended with exit code $code"
    if ((code && !first)); then
      first=$code failed=$i
      send TERM
      [[ -n $deadline ]] || deadline=$((SECONDS + grace))
    fi
  done
  if [[ -n $deadline ]] && ((left && SECONDS >= deadline)); then
    echo "killing the processes that have not stopped in $grace seconds" >&2
    send KILL
    deadline=$((SECONDS + 3600))
  fi
  ((left == 0)) || sleep 0.1 || true
done
if [[ -n $failed ]]; then
  echo "process $failed failed first, with exit code $first; the end of its log:" >&2
  tail -n 20 "$logs/process-$failed.log" >&2
fi
exit "$first"
