#!/usr/bin/env bash
# Runs on a TPU VM slice: requests it as a queued resource, installs, starts the run on all workers, fetches the logs,
# and repeats this after a preemption. Works with bash 3.2, which is what macOS has.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: tpu_vm.sh COMMAND [options] [key=value ...]

  create    request a queued resource and wait until it is ACTIVE
  install   install this project on all workers
  run       start `transllm run` on all workers where it is not running yet; it continues if ssh is lost
  up        create, install, run
  watch     keep a run going until it is done: create, install and run as needed, and again after a preemption.
            Exit codes: 0 done, 2 the input is wrong, 1 gave up
  status    print the state of the queued resource and of the run on each worker
  logs      fetch the log of every worker into --logs
  stop      ask the run on all workers to save and stop
  delete    delete the queued resource and its workers

Options, or environment variables:
  --project P            TRANSLLM_PROJECT           Google Cloud project
  --zone Z               TRANSLLM_ZONE              such as us-west4-a
  --name N               TRANSLLM_TPU_NAME          name of the queued resource and its node
  --accelerator-type T   TRANSLLM_ACCELERATOR_TYPE  v4-32, v5litepod-16, v5p-8, v6e-16 ...
  --runtime-version V    TRANSLLM_RUNTIME_VERSION   by default chosen by the accelerator type
  --spot | --on-demand   TRANSLLM_SPOT=1 | 0        spot by default
  --service-account S    TRANSLLM_SERVICE_ACCOUNT   of the workers; it must be allowed to write to the bucket
  --config FILE          TRANSLLM_CONFIG            a config file on this machine, which is copied to the workers
  --workdir gs://...     TRANSLLM_WORKDIR           for everything that must outlive a worker
  --wheel FILE           TRANSLLM_WHEEL             what to install: a wheel,
  --git URL[@REF]        TRANSLLM_GIT               or a repository
  --extras LIST          TRANSLLM_EXTRAS            extras to install with it (tpu,gcs,data,align)
  --setup COMMAND        TRANSLLM_SETUP             run on all workers at the end of install, in the run's directory;
                                                    for example to copy text from a bucket
  --max-restarts N       TRANSLLM_MAX_RESTARTS      restarts on a worker after a failure (10); code 75 does not count
  --logs DIR                                        where `logs` puts the workers' logs (logs/NAME)
  --poll SECONDS                                    time between two checks of the state (30)
  --delete-at-end                                   watch: fetch the logs and delete the resource when the run has ended
  --dry-run                                         print every gcloud command without running it

gcloud only reaches several workers at once if its key is in an ssh agent: ssh-add ~/.ssh/google_compute_engine
TEXT
}

fail() {
  echo "tpu_vm.sh: $*" >&2
  exit 2
}

say() { echo "tpu_vm.sh: $*" >&2; }

quote() { # quotes a word for the shell, if it needs quotes
  case $1 in
    '' | *[!A-Za-z0-9_./:=@,%+-]*) printf "'%s'" "$(printf '%s' "$1" | sed "s/'/'\\\\''/g")" ;;
    *) printf '%s' "$1" ;;
  esac
}

words() {
  local word line=''
  for word in "$@"; do line="$line$(quote "$word") "; done
  printf '%s' "${line% }"
}

project=${TRANSLLM_PROJECT:-} zone=${TRANSLLM_ZONE:-} name=${TRANSLLM_TPU_NAME:-}
accelerator_type=${TRANSLLM_ACCELERATOR_TYPE:-} runtime_version=${TRANSLLM_RUNTIME_VERSION:-} spot=${TRANSLLM_SPOT:-1}
service_account=${TRANSLLM_SERVICE_ACCOUNT:-} config=${TRANSLLM_CONFIG:-} workdir=${TRANSLLM_WORKDIR:-}
wheel=${TRANSLLM_WHEEL:-} git=${TRANSLLM_GIT:-} extras=${TRANSLLM_EXTRAS:-tpu,gcs,data,align} setup=${TRANSLLM_SETUP:-}
max_restarts=${TRANSLLM_MAX_RESTARTS:-10} logs='' poll=30 delete_at_end='' dry_run=''
overrides=()

(($#)) || fail "no command; see tpu_vm.sh --help"
case $1 in
  --help | -h) usage && exit 0 ;;
  create | install | run | up | watch | status | logs | stop | delete) todo=$1 && shift ;;
  *) fail "unknown command '$1'; see tpu_vm.sh --help" ;;
esac
while (($#)); do
  case $1 in
    --help | -h) usage && exit 0 ;;
    --spot) spot=1 && shift ;;
    --on-demand) spot=0 && shift ;;
    --delete-at-end) delete_at_end=yes && shift ;;
    --dry-run) dry_run=yes && shift ;;
    --project | --zone | --name | --accelerator-type | --runtime-version | --service-account | --config | --workdir | \
      --wheel | --git | --extras | --setup | --max-restarts | --logs | --poll)
      (($# > 1)) || fail "$1 needs a value"
      case $1 in
        --project) project=$2 ;;
        --zone) zone=$2 ;;
        --name) name=$2 ;;
        --accelerator-type) accelerator_type=$2 ;;
        --runtime-version) runtime_version=$2 ;;
        --service-account) service_account=$2 ;;
        --config) config=$2 ;;
        --workdir) workdir=$2 ;;
        --wheel) wheel=$2 ;;
        --git) git=$2 ;;
        --extras) extras=$2 ;;
        --setup) setup=$2 ;;
        --max-restarts) max_restarts=$2 ;;
        --logs) logs=$2 ;;
        --poll) poll=$2 ;;
      esac
      shift 2
      ;;
    -*) fail "unknown option '$1'; see tpu_vm.sh --help" ;;
    *=*) overrides+=("$1") && shift ;;
    *) fail "'$1' is neither an option nor key=value; see tpu_vm.sh --help" ;;
  esac
done

# Checks the options that the command needs before any request to the cloud.
need() {
  local option
  for option in "$@"; do
    case $option in
      project) [[ -n $project ]] || fail "--project is missing (or TRANSLLM_PROJECT)" ;;
      zone) [[ -n $zone ]] || fail "--zone is missing (or TRANSLLM_ZONE)" ;;
      name) [[ -n $name ]] || fail "--name is missing (or TRANSLLM_TPU_NAME)" ;;
      accelerator)
        [[ -n $accelerator_type ]] || fail "--accelerator-type is missing (or TRANSLLM_ACCELERATOR_TYPE)"
        [[ $spot == 0 || $spot == 1 ]] || fail "TRANSLLM_SPOT is 1 or 0, not '$spot'"
        [[ -n $runtime_version ]] || case $accelerator_type in
          v4-*) runtime_version=tpu-ubuntu2204-base ;;
          v5litepod-*) runtime_version=v2-alpha-tpuv5-lite ;;
          v5p-*) runtime_version=v2-alpha-tpuv5 ;;
          v6e-*) runtime_version=v2-alpha-tpuv6e ;;
          v5e-*) fail "accelerator type '$accelerator_type' is called v5litepod-${accelerator_type#v5e-} here" ;;
          *) fail "no runtime version is known for '$accelerator_type'; give --runtime-version" ;;
        esac
        ;;
      source)
        [[ -n $wheel || -n $git ]] || fail "--wheel or --git is missing; give what to install"
        [[ -z $wheel || -z $git ]] || fail "both --wheel and --git are given; give one"
        [[ -z $wheel || -f $wheel ]] || fail "--wheel $wheel: no such file; build one: make dist"
        ;;
      config)
        [[ -n $config ]] || fail "--config is missing (or TRANSLLM_CONFIG)"
        [[ -f $config ]] || fail "--config $config: no such file"
        [[ -n $workdir ]] || fail "--workdir is missing (or TRANSLLM_WORKDIR)"
        [[ $workdir == gs://?* ]] || fail "--workdir $workdir: a worker's disk is lost with it; give gs://bucket/path"
        [[ $max_restarts =~ ^[0-9]+$ ]] || fail "--max-restarts is a number, not '$max_restarts'"
        ;;
    esac
  done
}
need project zone name
case $todo in
  create) need accelerator ;;
  install) need source ;;
  run) need config ;;
  up | watch) need accelerator source config ;;
esac
[[ $poll =~ ^[0-9]+$ ]] || fail "--poll is a number of seconds, not '$poll'"
logs=${logs:-logs/$name}
[[ -n $dry_run ]] || command -v gcloud >/dev/null || fail "gcloud is missing; install the Google Cloud CLI"

# -- gcloud

where=("--project=$project" "--zone=$zone")
tpus() { # runs gcloud compute tpus ..., or prints it in a dry run
  if [[ -n $dry_run ]]; then
    words gcloud compute tpus "$@"
    echo
  else
    gcloud compute tpus "$@"
  fi
}
on_workers() { # runs one command line on all workers at once
  local line=$1
  shift
  tpus tpu-vm ssh "$name" "${where[@]}" --worker=all "--command=$line" "$@"
}
to_workers() { tpus tpu-vm scp "$@" "$name:transllm/" "${where[@]}" --worker=all; }

queued_state() { # sets `state` to the cloud's name for it, NONE, or UNKNOWN if the request failed
  local said
  if said=$(gcloud compute tpus queued-resources describe "$name" "${where[@]}" '--format=value(state.state)' 2>&1); then
    state=${said##*$'\n'}
    [[ -n $state ]] || state=UNKNOWN
  elif [[ $said == *NOT_FOUND* ]]; then
    state=NONE
  else
    state=UNKNOWN
    echo "$said" >&2
  fi
}

# -- the steps

request() {
  local flags=("--node-id=$name" "${where[@]}" "--accelerator-type=$accelerator_type"
    "--runtime-version=$runtime_version")
  [[ $spot == 0 ]] || flags+=(--spot)
  [[ -z $service_account ]] || flags+=("--service-account=$service_account"
    --scopes=https://www.googleapis.com/auth/cloud-platform)
  tpus queued-resources create "$name" "${flags[@]}" --async
}

remove() { tpus queued-resources delete "$name" "${where[@]}" --force --quiet; }

await_active() {
  if [[ -n $dry_run ]]; then
    echo "# every $poll seconds until it says ACTIVE:"
    tpus queued-resources describe "$name" "${where[@]}" '--format=value(state.state)'
    return
  fi
  local state last='' misses=0
  while :; do
    queued_state
    [[ $state == "$last" ]] || say "$name is $state"
    last=$state
    case $state in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDING | SUSPENDED) say "$name will not become ACTIVE; delete it, or use watch" && return 1 ;;
      NONE | UNKNOWN) # a new resource may not be visible at once
        misses=$((misses + 1))
        ((misses < 10)) || { say "$name: no state after $misses tries; giving up" && return 1; }
        ;;
      *) misses=0 ;;
    esac
    sleep "$poll"
  done
}

install() {
  local spec line files=("$(dirname "$0")/supervise.sh")
  if [[ -n $wheel ]]; then
    files+=("$wheel")
    spec="transllm/$(basename "$wheel")"
    [[ -z $extras ]] || spec="${spec}[$extras]"
    spec="./$spec"
  else
    spec="transllm-jax${extras:+[$extras]} @ git+$git"
  fi
  # The images' own Python is too old for this project; uv installs a newer one.
  # shellcheck disable=SC2016 # expanded on the workers
  line='set -eo pipefail; export PATH=$HOME/.local/bin:$PATH;'
  line="$line command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh;"
  line="$line test -x transllm/venv/bin/python || uv venv --quiet --python 3.12 transllm/venv;"
  line="$line uv pip install --quiet --python transllm/venv/bin/python --reinstall-package transllm-jax $(quote "$spec");"
  line="$line cd transllm; venv/bin/transllm --help >/dev/null"
  [[ -z $setup ]] || line="$line; $setup"
  on_workers 'mkdir -p transllm' && to_workers "${files[@]}" && on_workers "$line"
}

start() {
  local line command
  command=$(words venv/bin/transllm run "$(basename "$config")" ${overrides[@]+"${overrides[@]}"} \
    --workdir "$workdir" --distributed auto)
  # In its own session, so that it survives the end of ssh.
  line="cd transllm && (nohup setsid bash supervise.sh --dir . --max-restarts $max_restarts -- $command"
  line="$line >/dev/null 2>&1 </dev/null &) && sleep 2 && bash supervise.sh --dir . --state"
  to_workers "$config" && on_workers "$line"
}

# Prints one line per worker: its host name and the run's state from supervise.sh.
# shellcheck disable=SC2016 # expanded on the workers
ask='echo "transllm-state $(hostname) $(if [ -f transllm/supervise.sh ]; then bash transllm/supervise.sh --dir transllm --state; else echo absent; fi)"'

fetch_logs() {
  [[ -n $dry_run ]] || mkdir -p "$logs"
  on_workers 'cat transllm/run.log' "--output-directory=$logs"
}

ended() { # EXIT_CODE MESSAGE: ends a watch
  say "$2"
  if [[ -n $delete_at_end ]]; then
    fetch_logs || say "the logs could not be fetched"
    remove || say "$name could not be deleted; it still costs money"
  else
    say "$name still exists, and costs money: tpu_vm.sh delete"
  fi
  exit "$1"
}

missed() { # counts a failure that may be temporary; gives up after 10 in a row
  misses=$((misses + 1))
  say "$1 ($misses in a row)"
  ((misses < 10)) || { say "giving up; $name may still exist, and cost money: tpu_vm.sh delete" && exit 1; }
}

look_at_workers() {
  local said states node
  if ! said=$(on_workers "$ask" 2>/dev/null) || [[ $said != *transllm-state* ]]; then
    # A preempted node may stay in a queued resource that is still ACTIVE.
    node=$(gcloud compute tpus tpu-vm describe "$name" "${where[@]}" '--format=value(state)' 2>/dev/null) || node=''
    case $node in
      PREEMPTED | TERMINATED | STOPPED)
        say "$name is ACTIVE but its node is $node: deleting it"
        remove || missed "$name could not be deleted"
        ;;
      *) missed "the workers of $name do not answer" ;;
    esac
    return
  fi
  states=$(printf '%s\n' "$said" | sed -n 's/^.*transllm-state [^ ]* //p' | sort -u)
  [[ $states == "$shown" ]] || say "workers: $(printf '%s' "$states" | tr '\n' ',')"
  shown=$states
  case "$(printf '%s' "$states" | tr '\n' ';');" in
    *'exit 2;'*) ended 2 "the input is wrong; the logs say what: tpu_vm.sh logs" ;;
    'exit 0;') ended 0 "the run is done" ;;
  esac
  if printf '%s\n' "$states" | grep '^exit ' | grep -qvx -e 'exit 0' -e 'exit 75'; then
    ended 1 "the run failed more than $max_restarts times; the logs say why: tpu_vm.sh logs"
  fi
  case $states in
    # Nothing is installed on a new node. `start` does nothing on workers where the run is running.
    *absent*) if install && start; then misses=0; else missed "install or run failed"; fi ;;
    *dead* | *'exit 75'*) if start; then misses=0; else missed "run failed"; fi ;;
    *) misses=0 ;;
  esac
}

watch() {
  if [[ -n $dry_run ]]; then
    echo "# every $poll seconds:"
    tpus queued-resources describe "$name" "${where[@]}" '--format=value(state.state)'
    echo "# ACTIVE:"
    on_workers "$ask"
    echo "# ACTIVE, and a worker has no installation:"
    install
    echo "# ACTIVE, and the run is not running on a worker:"
    start
    echo "# FAILED or SUSPENDED (preempted):"
    remove
    echo "# not there:"
    request
    return
  fi
  local state last='' shown='' misses=0
  while :; do
    queued_state
    [[ $state == "$last" ]] || say "$name is $state"
    last=$state
    case $state in
      ACTIVE) look_at_workers ;;
      NONE) request || missed "$name could not be created" ;;
      FAILED) # not a preemption: there was no capacity in time, or the request was wrong
        missed "$name FAILED: deleting it"
        remove || missed "$name could not be deleted"
        ;;
      SUSPENDED)
        say "$name was preempted: deleting it"
        shown=''
        remove || missed "$name could not be deleted"
        ;;
      UNKNOWN) missed "the state of $name is unknown" ;;
    esac
    sleep "$poll"
  done
}

case $todo in
  create) request && await_active ;;
  install) install ;;
  run) start ;;
  up) request && await_active && install && start ;;
  watch) watch ;;
  status)
    tpus queued-resources describe "$name" "${where[@]}" '--format=value(state.state)' && on_workers "$ask"
    ;;
  logs) fetch_logs ;;
  stop) on_workers 'bash transllm/supervise.sh --dir transllm --stop' ;;
  delete) remove ;;
esac
