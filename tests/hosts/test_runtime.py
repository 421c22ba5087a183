"""Several real processes as one run: what they agree on, and how they end when one of them does not go on."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from multi_process import ROOT, Ended, Kill, free_port, run_processes

from transllm_jax.errors import UserError
from transllm_jax.hosts.agreement import Agreement
from transllm_jax.hosts.connection import Connection, ConnectionOptions, connection_from
from transllm_jax.hosts.runtime import Peers, join
from transllm_jax.hosts.wire import IDLE, INTERVAL, PROBES, with_keepalive

HOST = socket.gethostname()
AGAIN = "run the same command on all hosts again to go on"

# Each process runs this, with its `work(peers)` in place of WORK; it ends as the command line does.
PROGRAM = """
import os, sys, time
from transllm_jax.hosts import runtime
from transllm_jax.hosts.agreement import Agreement
from transllm_jax.hosts.connection import ConnectionOptions, connection_from
from transllm_jax.errors import Diverged, Preempted, UserError

def reduced():
    # A collective over all devices: waits for all processes.
    import jax
    from jax.sharding import NamedSharding, PartitionSpec as P
    mesh = jax.make_mesh((jax.device_count(),), ("all",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.make_array_from_callback((jax.device_count(),), NamedSharding(mesh, P("all")), lambda i: jax.numpy.ones(1))
    return float(jax.jit(jax.numpy.sum, out_shardings=NamedSharding(mesh, P()))(x))

def fail(error):
    raise error

def work(peers):
    me = peers.number
WORK

try:
    began = time.monotonic()
    with runtime.join(connection_from(ConnectionOptions(), os.environ), patience=PATIENCE) as peers:
        peers.require_equal(SAME)
        peers.start_jax(PATIENCE)
        print("connected", time.monotonic() - began)
        work(peers)
    print("closed")
except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
except (Diverged, runtime.PeerLost) as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(1)
except Preempted as stop:
    print(stop, file=sys.stderr)
    sys.exit(75)
"""


def program(work: str, *, same: str = "{}", patience: int = 20) -> str:
    body = "\n".join("    " + line for line in work.strip("\n").splitlines())
    return PROGRAM.replace("WORK", body).replace("SAME", same).replace("PATIENCE", str(patience))


def all_said(ended: list[Ended]) -> str:
    return "\n".join(f"{one.code} {one.out} {one.err}" for one in ended)


def check(ended: list[Ended], code: int, line: str, *, within: float) -> None:
    """All these processes ended so, with this one line, within so many seconds of the last kill (or of the start)."""
    for one in ended:
        assert (one.code, one.lines()) == (code, [line]), all_said(ended)
        assert (one.seconds if one.after is None else one.after) < within, all_said(ended)


def given(**flags: str) -> Connection | None:
    return connection_from(ConnectionOptions(**flags), {})


def test_the_place_of_a_process() -> None:
    whole = {"coordinator": "10.0.0.2:8482", "processes": "4", "process": "3"}
    assert given() is None
    assert given(**whole) == Connection("10.0.0.2", 8482, 4, 3)
    # The environment says what the flags do not.
    environ = {"TRANSLLM_COORDINATOR": "[fe80::1]:80", "TRANSLLM_PROCESSES": "2", "TRANSLLM_PROCESS": "1"}
    assert connection_from(ConnectionOptions(), environ) == Connection("fe80::1", 80, 2, 1)
    assert connection_from(ConnectionOptions(process=0), environ) == Connection("fe80::1", 80, 2, 0)
    assert connection_from(ConnectionOptions(), {"TRANSLLM_DISTRIBUTED": "", "TRANSLLM_COORDINATOR": ""}) is None


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"coordinator": "a:1"}, "without --processes and --process: all three are needed"),
        ({"processes": "2", "process": "0"}, "without --coordinator"),
        (
            {"coordinator": "a:1", "processes": "2", "process": "2"},
            "--process is from 0 to 1 with --processes 2, not 2",
        ),
        ({"coordinator": "a:1", "processes": "2", "process": "-1"}, "not -1"),
        ({"coordinator": "a:1", "processes": "0", "process": "0"}, "--processes is the number of processes, from 1"),
        (
            {"coordinator": "a:1", "processes": "two", "process": "0"},
            "--processes (TRANSLLM_PROCESSES) is a whole number",
        ),
        ({"coordinator": "a", "processes": "2", "process": "0"}, "is HOST:PORT, such as 10.0.0.2:8482, not 'a'"),
        ({"coordinator": "a:0", "processes": "2", "process": "0"}, "is HOST:PORT"),
        ({"coordinator": "::1:80", "processes": "2", "process": "0"}, "an IPv6 address needs brackets"),
        ({"coordinator": "[::1:80", "processes": "2", "process": "0"}, "an IPv6 address needs brackets"),
        ({"coordinator": "[::g]:80", "processes": "2", "process": "0"}, "is HOST:PORT"),
        ({"coordinator": "http://a:80", "processes": "2", "process": "0"}, "is HOST:PORT"),
        ({"coordinator": "a b:80", "processes": "2", "process": "0"}, "is HOST:PORT"),
        ({"coordinator": ":80", "processes": "2", "process": "0"}, "is HOST:PORT"),
        ({"distributed": "yes"}, "can be 'auto' or left out, not 'yes'"),
        ({"distributed": "auto", "process": "0"}, "leave --process out"),
        ({"distributed": "auto"}, "finds no TPU VM, GKE, SLURM or Open MPI here"),
    ],
)
def test_a_place_that_cannot_be(flags: dict[str, str], says: str) -> None:
    with pytest.raises(UserError) as refused:
        given(**flags)
    assert says in str(refused.value) and "\n" not in str(refused.value)


def slurm(number: int, port: int) -> dict[str, str]:
    """What srun gives two tasks, each on its own node."""
    return {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(number),
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NUM_NODES": "2",
        "JAX_COORDINATOR_PORT": str(port),
    }


def test_slurm_places_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in slurm(1, 4321).items():
        monkeypatch.setenv(name, value)
    # Alone on its node, it has all its devices; beside another one, its own.
    assert given(distributed="auto") == Connection("127.0.0.1", 4321, 2, 1)
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "1")
    assert given(distributed="auto") == Connection("127.0.0.1", 4321, 2, 1, (0,))


def test_one_process_waits_for_nobody() -> None:
    for place in (None, Connection("127.0.0.1", 1, 1, 0)):
        with join(place) as peers:
            peers.start_jax()
            assert (peers.count, peers.number, peers.primary) == (1, 0, True)
            peers.barrier("here", timeout=0)
            peers.require_equal({"jax": "1"})
            assert peers.share({"a": 1}) == {"a": 1} and peers.any(True) and not peers.any(False)
            assert peers.run_on_primary("work", lambda: Path("x")) == Path("x")
            agreement = Agreement(peers)
            assert [agreement.tell(step, step == 1) for step in range(3)] == [False, True, False]
            with pytest.raises(ValueError, match="step 2 is told after step 2"):
                agreement.tell(2, False)
    assert not jax.distributed.is_initialized()
    with pytest.raises(UserError, match="mine"), Peers():
        raise UserError("mine")


def test_nothing_heavy_is_loaded_to_read_the_flags() -> None:
    code = "import transllm_jax.hosts.runtime, sys; sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


TOGETHER = """
assert (peers.count, peers.primary, len(peers.hosts)) == (4, me == 0, 4)
peers.require_equal({"config": "abc", "devices": "2"})
assert peers.share({"x": [1, "ก"]} if me == 0 else None) == {"x": [1, "ก"]}
assert peers.any(me == 3) is True and peers.any(False) is False
peers.barrier("here", timeout=20)
assert peers.run_on_primary("count", lambda: {"rows": 7} if me == 0 else fail(ValueError())) == {"rows": 7}
assert peers.run_on_primary("path", lambda: ...) == (... if me == 0 else None)
assert reduced() == 8
agreement = Agreement(peers)
print("told", [agreement.tell(step, step == 2 and me == 2) for step in range(5)])
# Each only to its own.
try:
    peers.run_on_primary("stop", lambda: fail(Preempted("stopped")))
except Preempted as stop:
    print("caught", stop)
try:
    peers.run_on_primary("diverge", lambda: fail(Diverged("too many")))
except Diverged as error:
    print("caught", error)
peers.run_on_primary("data", lambda: fail(UserError("data.txt: no such file; give another")))
"""


def test_four_processes_agree() -> None:
    ended = run_processes(4, program(TOGETHER, same="{'a': '1'}"), devices=2)
    check(ended, 2, "error: data.txt: no such file; give another", within=60)
    for one in ended:
        # The flag of process 2 in step 2 is known to all in step 3, and in no other.
        assert "told [False, False, False, True, False]" in one.out, all_said(ended)
        assert "caught stopped\ncaught too many" in one.out and "closed" not in one.out


def test_an_end_without_an_error_takes_all_with_it() -> None:
    """0 for all when the work of the slowest is done, with none taken for lost before.

    Found through SLURM; in an environment with a proxy, which is not asked the way to the other process.
    """
    port = free_port()

    def env(number: int) -> dict[str, str]:
        unset = {f"TRANSLLM_{name}": "" for name in ("COORDINATOR", "PROCESSES", "PROCESS")}
        proxy = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
        return slurm(number, port) | unset | proxy | {"TRANSLLM_DISTRIBUTED": "auto"}

    ended = run_processes(2, program("assert reduced() == 2\nif me == 0: time.sleep(1)"), env=env)
    assert [(one.code, one.lines()) for one in ended] == [(0, [])] * 2, all_said(ended)
    assert all("closed" in one.out for one in ended)
    # Above what it takes, on a busy machine too (5 s were seen), and below the shortest of the limits, `patience`: one
    # that asks the proxy waits for that.
    assert all(float(one.out.split()[1]) < 15 for one in ended)


def test_processes_that_differ_end_at_once() -> None:
    def code(number: int) -> str:
        return program("", same=f"{{'jax': '{'0.12.0' if number == 2 else '0.10.2'}', 'config': 'abc'}}")

    line = (
        f"error: the processes of this run differ: jax is 0.12.0 in process 2 (host {HOST}) and 0.10.2 in process 0; "
        "make them equal"
    )
    check(run_processes(4, code), 2, line, within=20)


# The main thread of each is somewhere else when process 1 or 0 is lost.
WAITING = """
peers.last_saved = f"the checkpoint of step {10 * 2} is kept"
peers.on_peer_loss(lambda: print("last call"))
reduced()
print("ready", flush=True)
if me == LOST:
    time.sleep(100)
elif me == 3:
    while True:
        reduced()
elif me == 2:
    peers.barrier("never")
else:
    # As a collective of a TPU: nothing raises here.
    time.sleep(100)
"""


@pytest.mark.parametrize("lost", [1, 0])
def test_the_loss_of_a_process_ends_the_others(lost: int) -> None:
    kill = Kill(lost, "ready")
    ended = run_processes(4, program(WAITING.replace("LOST", str(lost))), kills=[kill])
    dead = ended.pop(lost)
    assert dead.code == -9
    line = f"error: process {lost} of 4 (host {HOST}) was lost; the checkpoint of step 20 is kept; {AGAIN}"
    check(ended, 1, line, within=15)
    assert all(one.out.count("last call") == 1 for one in ended)


@pytest.mark.parametrize(
    ("error", "own", "code", "line"),
    [
        # Bad input that only one process sees.
        (
            "UserError('local.txt: no such file')",
            "error: local.txt: no such file",
            2,
            f"error: process 1 of 2 (host {HOST}): local.txt: no such file",
        ),
        # A defect.
        (
            "ValueError('a\\nb')",
            "ValueError: a",
            1,
            f"error: process 1 of 2 (host {HOST}) failed, its log says more: ValueError: a b",
        ),
        # A signal that reached only one.
        ("Preempted('stopped')", "stopped", 75, f"process 1 of 2 (host {HOST}) was stopped; {AGAIN}"),
    ],
)
def test_an_error_of_one_process_ends_the_other(error: str, own: str, code: int, line: str) -> None:
    work = f"reduced()\nruntime.STOPPING = 1\nif me == 1: fail({error})\ntime.sleep(100)"
    other, failed = run_processes(2, program(work))
    assert failed.code == code and own in failed.lines(), failed.err
    check([other], code, line, within=20)


def test_a_defect_of_the_primary_while_it_leads() -> None:
    primary, other = run_processes(2, program("peers.run_on_primary('work', lambda: fail(KeyError('rows')))"))
    assert primary.code == 1 and primary.err.rstrip().endswith("KeyError: 'rows'"), primary.err
    line = f"error: process 0 of 2 (host {HOST}) failed, its log says more: KeyError: 'rows'"
    check([other], 1, line, within=20)


def absent(who: str, here: str) -> str:
    return (
        f"error: absent after 2 s: process {who} of 3; here: process {here}; "
        "is the command running on all hosts, with the same --coordinator?"
    )


def test_processes_that_never_come() -> None:
    code = program("", patience=2)
    check(run_processes(3, code, start=[0, 1]), 1, absent("2", f"0 (host {HOST}), 1 (host {HOST})"), within=15)
    check(run_processes(3, code, start=[0]), 1, absent("1, 2", f"0 (host {HOST})"), within=15)
    (alone,) = run_processes(3, code, start=[1])
    (line,) = alone.lines()
    assert alone.code == 1 and line.startswith("error: process 0 is absent: no answer at 127.0.0.1:"), line


@pytest.mark.parametrize(
    ("env", "line"),
    [
        (
            {"TRANSLLM_PROCESS": "0 1 1"},
            f"two processes are started with --process 1, on host {HOST} and on host {HOST}",
        ),
        (
            {"TRANSLLM_PROCESSES": "2 3"},
            f"process 1 (host {HOST}) is started with --processes 3, process 0 with --processes 2",
        ),
    ],
)
def test_processes_that_do_not_belong_together(env: dict[str, str], line: str) -> None:
    ((name, values),) = env.items()
    ended = run_processes(
        3 if name == "TRANSLLM_PROCESS" else 2, program(""), env=lambda number: {name: values.split()[number]}
    )
    check(ended, 2, f"error: {line}", within=15)


def test_processes_that_do_not_meet() -> None:
    """A process that does not come in time, or comes elsewhere, is named."""
    work = "peers.barrier('save', timeout=1) if me == 0 else time.sleep(100)"
    line = f"error: process 1 of 2 (host {HOST}) did not come to 'save'; what was saved is kept; {AGAIN}"
    check(run_processes(2, program(work)), 1, line, within=15)
    line = f"error: process 0 of 2 (host {HOST}) is at 'a' and process 1 of 2 (host {HOST}) at 'b': this is a defect"
    check(run_processes(2, program("peers.barrier('ab'[me])")), 1, line, within=15)


# Two network namespaces with a wire between them; process 1 is behind it. Then the wire is cut: no packet comes any
# more, and no end of a connection either.
VANISHING = """
set -e
ip link set lo up
unshare -n sleep 200 & far=$!
for try in $(seq 50); do
  ip link add name near type veth peer name far netns $far 2>/dev/null && break || sleep 0.1
done
ip addr add 10.9.0.1/24 dev near
ip link set near up
nsenter -n -t $far sh -c 'ip link set lo up; ip addr add 10.9.0.2/24 dev far; ip link set far up'
export TRANSLLM_COORDINATOR=10.9.0.1:8482 TRANSLLM_PROCESSES=2
TRANSLLM_PROCESS=0 "$1" -c "$2" > 0.out 2> 0.err & zero=$!
TRANSLLM_PROCESS=1 nsenter -n -t $far "$1" -c "$2" > 1.out 2> 1.err & one=$!
for try in $(seq 300); do
  grep -q ready 0.out && grep -q ready 1.out && break || sleep 0.1
done
ip link set near down
SECONDS=0
set +e
wait $zero; echo $? $SECONDS
wait $one; echo $? $SECONDS
kill $far
"""


@pytest.mark.slow
@pytest.mark.full
def test_the_loss_of_a_host_ends_the_others(tmp_path: Path) -> None:
    space = ["unshare", "--user", "--map-root-user", "--net"]
    try:
        subprocess.run([*space, "ip", "link", "add", "a1", "type", "veth", "peer", "name", "b1"], check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no network namespaces here (Linux, iproute2)")
    code = program("print('ready', flush=True); time.sleep(100)")
    done = subprocess.run(
        [*space, "bash", "-c", VANISHING, "-", sys.executable, code],
        cwd=tmp_path,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    ends = [line.split() for line in done.stdout.splitlines()]
    said = [(tmp_path / f"{number}.err").read_text() for number in range(2)]
    assert [code for code, _ in ends] == ["1", "1"], said
    # The probes take 20 seconds, the rest is for a busy machine.
    assert all(int(seconds) < 40 for _, seconds in ends)
    for number in range(2):
        lost = f"error: process {1 - number} of 2 (host {HOST}) was lost; what was saved is kept; {AGAIN}\n"
        assert said[number] == lost


def test_the_kernel_probes_each_connection() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        with_keepalive(socket.create_connection(server.getsockname())) as one,
    ):
        assert one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        if not hasattr(socket, "TCP_KEEPIDLE"):
            pytest.skip("this system keeps its probes to itself")
        options = [getattr(socket, f"TCP_KEEP{name}") for name in ("IDLE", "INTVL", "CNT")]
        assert [one.getsockopt(socket.IPPROTO_TCP, option) for option in options] == [IDLE, INTERVAL, PROBES]
        assert IDLE + INTERVAL * PROBES <= 20


def test_the_relay_ends_with_its_process() -> None:
    """It holds the connection open only as long as somebody is there to have the last word."""
    relays = "print('relay', peers._relay.pid if peers._relay else 0, flush=True); time.sleep(100)"
    ended = run_processes(2, program(relays), kills=[Kill(1, "relay")])
    pid = int(ended[1].out.split("relay")[1].split()[0])
    for _ in range(200):
        if not Path(f"/proc/{pid}").exists() or Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.02)
    raise AssertionError("the relay is still there")
