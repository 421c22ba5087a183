#!/usr/bin/env bash
# Runs a command on one host until it is done, restarts it depending on its exit code, and writes its output to a log.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: supervise.sh --dir DIR [--max-restarts N] [--delay SECONDS] -- COMMAND [ARGUMENT ...]
       supervise.sh --dir DIR --state | --stop

Runs COMMAND with its output in DIR/run.log. What happens next depends on its exit code. 0: done. 2: the input is wrong,
so it is not restarted. 75: preempted, so it is restarted. Any other (a defect, a lost peer): it is restarted at most N
times (default 10). SIGTERM is passed on to COMMAND, which is then not restarted. The exit code is COMMAND's last one.
Only one supervisor runs in a DIR: a second one says so and exits with 0.

  --state   print one line: running, exit CODE, dead (killed, or the host was rebooted) or absent (never started)
  --stop    send SIGTERM to the supervisor that runs in DIR
TEXT
}

fail() {
  echo "supervise.sh: $*" >&2
  exit 2
}

dir='' max_restarts=10 delay=5 question=''
while (($#)); do
  case $1 in
    --help | -h) usage && exit 0 ;;
    --state | --stop) question=$1 && shift ;;
    --dir | --max-restarts | --delay)
      (($# > 1)) || fail "$1 needs a value"
      case $1 in
        --dir) dir=$2 ;;
        --max-restarts) max_restarts=$2 ;;
        --delay) delay=$2 ;;
      esac
      shift 2
      ;;
    --) shift && break ;;
    *) fail "unknown option '$1'; see supervise.sh --help" ;;
  esac
done
[[ -n $dir ]] || fail "--dir is missing"
[[ $max_restarts =~ ^[0-9]+$ ]] || fail "--max-restarts is a number, not '$max_restarts'"
command -v flock >/dev/null || fail "flock is missing; install util-linux"

if [[ -n $question ]]; then
  state=absent
  [[ -f $dir/state ]] && state=$(<"$dir/state")
  if [[ $state == running ]] && flock --nonblock "$dir/lock" true; then
    state=dead # no process holds the lock
  fi
  if [[ $question == --state ]]; then
    echo "$state"
  elif [[ $state == running ]]; then
    kill -TERM "$(<"$dir/pid")"
  fi
  exit 0
fi

(($#)) || fail "no command; write it after --"
mkdir -p "$dir"
# The command inherits the lock, so that no second one starts while it runs, even if its supervisor was killed.
exec 9>"$dir/lock"
flock --nonblock 9 || { echo "already running in $dir" && exit 0; }

say() { echo "[supervise $(date -u +%Y-%m-%dT%H:%M:%SZ)] $*" >>"$dir/run.log"; }

set_state() {
  echo "$1" >"$dir/state.new"
  mv "$dir/state.new" "$dir/state"
}

end() {
  say "ended with exit code $1"
  set_state "exit $1"
  exit "$1"
}

child='' stopping='' interrupted=''
stop() {
  stopping=yes interrupted=yes
  [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true
}
trap stop TERM INT

# Waits for the child, again if a signal interrupted the wait; sets `code`.
await() {
  while :; do
    interrupted='' code=0
    wait "$child" || code=$?
    [[ -n $interrupted ]] || break
  done
  child=''
}

echo $$ >"$dir/pid"
set_state running
failures=0
while :; do
  say "starts: $*"
  "$@" >>"$dir/run.log" 2>&1 &
  child=$!
  [[ -z $stopping ]] || stop # the signal came before there was a child
  await
  case $code in
    0 | 2) end "$code" ;;
    75) say "preempted (75)" ;;
    *)
      failures=$((failures + 1))
      say "failed with exit code $code ($failures of at most $((max_restarts + 1)))"
      ((failures <= max_restarts)) || end "$code"
      ;;
  esac
  [[ -z $stopping ]] || end "$code"
  sleep "$delay" 9>&- &
  child=$!
  last=$code
  await
  [[ -z $stopping ]] || end "$last"
done
