"""Host lists of clusters, read as SLURM reads them, and what a cluster says that cannot be."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.clusters import cloud_tpu_cluster

from transllm_jax.errors import UserError
from transllm_jax.hosts.connection import Connection, ConnectionOptions, connection_from
from transllm_jax.hosts.names import format_address, parse_address, slurm_hosts, worker_hosts


@pytest.fixture(autouse=True)
def no_scontrol(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node001", "node001"),
        ("127.0.0.1", "127.0.0.1"),
        ("n[01-04]-ib", "n01-ib n02-ib n03-ib n04-ib"),
        ("n[1]", "n1"),
        ("rack[1-2]n[1-2]", "rack1n1 rack1n2 rack2n1 rack2n2"),
        ("a,b[1,3-5],c[08-11]x[1-2]", "a b1 b3 b4 b5 c08x1 c08x2 c09x1 c09x2 c10x1 c10x2 c11x1 c11x2"),
        ("n[9-11]", "n9 n10 n11"),
        ("n[098-101,7]", "n098 n099 n100 n101 n7"),
        ("gpu-[2,1].example.org,login", "gpu-2.example.org gpu-1.example.org login"),
        ("r[1-2][01-02]", "r101 r102 r201 r202"),
    ],
)
def test_slurm_lists(text: str, hosts: str) -> None:
    assert slurm_hosts(text) == hosts.split()


# A part of a list: (text, the names it stands for, in order). Brackets: (first, last, width) each, one number or more.
NAMES = st.text("abcxyz-.", max_size=4)
RANGES = st.lists(st.tuples(st.integers(0, 120), st.integers(0, 12), st.integers(1, 4)), min_size=1, max_size=3)


@st.composite
def part(draw: st.DrawFn) -> tuple[str, list[str]]:
    text, names = (draw(st.sampled_from("nqr")),) * 2
    found = [names]
    for ranges in draw(st.lists(RANGES, max_size=3)):
        middle = draw(NAMES) + "e"
        written, numbers = [], []
        for first, more, width in ranges:
            digits = "%0*d"
            low = digits % (width, first)
            written.append(f"{low}-{digits % (width, first + more)}" if more else low)
            numbers += [digits % (len(low), number) for number in range(first, first + more + 1)]
        text += f"[{','.join(written)}]{middle}"
        found = [before + number + middle for before, number in itertools.product(found, numbers)]
    return text, found


@settings(deadline=None)
@given(st.lists(part(), min_size=1, max_size=4))
def test_any_slurm_list(parts: list[tuple[str, list[str]]]) -> None:
    wanted = [name for _, names in parts for name in names]
    if len(wanted) < 1 << 16:
        assert slurm_hosts(",".join(text for text, _ in parts)) == wanted


@settings(deadline=None)
@given(st.text("na1[]-,:/ \t", max_size=12))
def test_no_text_is_read_as_something_else(text: str) -> None:
    """It is refused, or what it says is in it: nothing of brackets is left in a name."""
    try:
        hosts = slurm_hosts(text)
    except ValueError:
        return
    assert hosts and all(set(host) <= set("na1-") and host.strip("-") == host for host in hosts)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "''"),
        ("a,,b", "''"),
        ("a,b,", "''"),
        ("n[1-4:2]", "no name with ranges"),
        ("n[1-4/2]", "no name with ranges"),
        ("n[]", "no name with ranges"),
        ("n[1,]", "no name with ranges"),
        ("n[a-c]", "no name with ranges"),
        ("n[1-2", "no name with ranges"),
        ("n1-2]", "no name with ranges"),
        ("n[[1-2]]", "no name with ranges"),
        ("n1 n2", "no name with ranges"),
        ("bgl[000x733]", "no name with ranges"),
        ("n[4-1]", "ends before it begins"),
        ("n[0-99999999999]", "more than 65536 hosts"),
        ("n[0-999]m[0-999]", "more than 65536 hosts"),
        ("-[1-2]", "is no name of a host"),
    ],
)
def test_no_slurm_list(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says.replace("[", r"\[")):
        slurm_hosts(text)


def test_scontrol_is_asked_what_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "scontrol"
    tool.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[1-4:2]" ] || exit 1\necho n1\necho n3\n')
    tool.chmod(0o755)
    monkeypatch.setattr("shutil.which", lambda name: str(tool))
    assert slurm_hosts("n[1-4:2]") == ["n1", "n3"]
    assert slurm_hosts("n[1-2]") == ["n1", "n2"]
    with pytest.raises(ValueError):
        slurm_hosts("n[1-4:3]")


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("h0", "h0"),
        ("h0,h1", "h0 h1"),
        (" h0 , h1,\th2\n", "h0 h1 h2"),
        ("10.0.0.2:8471 10.0.0.3:8471", "10.0.0.2:8471 10.0.0.3:8471"),
        ("thai-slice-0-0.thai,thai-slice-0-1.thai", "thai-slice-0-0.thai thai-slice-0-1.thai"),
    ],
)
def test_workers(text: str, hosts: str) -> None:
    assert worker_hosts(text) == hosts.split()


@pytest.mark.parametrize("text", ["", "h0,,h1", "h0,", "h0,fe80::1", "[fe80::1]:80", "h0;h1", "'h0'"])
def test_no_workers(text: str) -> None:
    with pytest.raises(ValueError):
        worker_hosts(text)


HOSTS = st.ip_addresses().map(str) | st.from_regex(r"[a-z][a-z0-9-]{0,8}[a-z0-9]", fullmatch=True)


@given(HOSTS, st.integers(1, 65535))
def test_an_address_is_read_as_it_is_written(host: str, port: int) -> None:
    assert parse_address(format_address(host, port)) == (host, port)


def slurm(nodes: str, number: int = 1, **more: str) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": nodes,
        "SLURM_NTASKS": "4",
        "SLURM_PROCID": str(number),
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NUM_NODES": "4",
        **more,
    }


def workers(names: str, number: int = 1, **more: str) -> dict[str, str]:
    mega = {f"MEGASCALE_{name}": "" for name in ("COORDINATOR_ADDRESS", "NUM_SLICES", "SLICE_ID")}
    return {**mega, "TPU_WORKER_HOSTNAMES": names, "TPU_WORKER_ID": str(number), **more}


@pytest.fixture
def auto(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """What --distributed auto makes of an environment."""

    def found(environ: dict[str, str]) -> Connection | None:
        tpu = cloud_tpu_cluster.BaseTpuCluster
        monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", "TPU_WORKER_ID" in environ)
        monkeypatch.setattr(tpu, "wait_for_coordinator", lambda *arguments: None)
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        return connection_from(ConnectionOptions(distributed="auto"), environ)

    return found


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        (slurm("n[01-04]-ib"), ("n01-ib", 61447, 4, 1)),
        (slurm("rack[1-2]n[1-2]", JAX_COORDINATOR_PORT="99"), ("rack1n1", 99, 4, 1)),
        (slurm("n[01-04]-ib", 0, SLURMD_NODENAME="n01-ib"), ("n01-ib", 61447, 4, 0)),
        (workers(" h0, h1"), ("h0", 8482, 2, 1)),
        (workers("h0,h1", TPU_PROCESS_ADDRESSES=""), ("h0", 8482, 2, 1)),
        (workers("h0 h1 h2"), ("h0", 8482, 3, 1)),
        (workers("x", TPU_PROCESS_ADDRESSES=" h0:8471, h1:8471"), ("h0", 8482, 2, 1)),
        (
            workers(
                "h2, h3",
                MEGASCALE_COORDINATOR_ADDRESS=" h0:8080 ",
                MEGASCALE_NUM_SLICES="2",
                MEGASCALE_SLICE_ID="1",
            ),
            ("h0", 8482, 4, 3),
        ),
        (
            {
                "OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp6://[fe80::b9b:ac5d:9cf0:b858,2620:10d::2]:43370",
                "OMPI_COMM_WORLD_SIZE": "2",
                "OMPI_COMM_WORLD_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_RANK": "0",
                "JAX_COORDINATOR_PORT": "99",
            },
            ("fe80::b9b:ac5d:9cf0:b858", 99, 2, 1, (0,)),
        ),
    ],
)
def test_a_cluster_places_a_process(auto, environ: dict[str, str], wanted: tuple) -> None:  # type: ignore
    assert auto(environ) == Connection(*wanted)


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        (slurm("n[1-4:2]"), "SLURM_STEP_NODELIST cannot be read: 'n[1-4:2]'"),
        (slurm("n[1-4]", 0, SLURMD_NODENAME="n3"), "process 0 is on node n3, and not on n1"),
        (slurm("n[1-4]", 4), "slurm says process 4 of 4"),
        (slurm("n[1-4]") | {"SLURM_NTASKS": "2(x2)"}, "SLURM_NTASKS is a whole number, not '2(x2)'"),
        (workers("h0,,h1"), "TPU_WORKER_HOSTNAMES cannot be read: 'h0,,h1' (a name is missing)"),
        (workers("h0,h1", TPU_PROCESS_ADDRESSES="[::1]:80"), "TPU_PROCESS_ADDRESSES cannot be read"),
        (workers("h0,h1", 2), "gketpu says process 2 of 2"),
        (workers("h0,h1") | {"TPU_WORKER_ID": "h1"}, "TPU_WORKER_ID is a whole number, not 'h1'"),
        (workers("h0,h1") | {"JAX_COORDINATOR_PORT": "tcp"}, "JAX_COORDINATOR_PORT is a whole number"),
        (workers("h0,h1") | {"JAX_COORDINATOR_PORT": "99999"}, "the coordinator's address cannot be read"),
    ],
)
def test_a_cluster_that_cannot_be_read(auto, environ: dict[str, str], says: str) -> None:  # type: ignore
    with pytest.raises(UserError) as refused:
        auto(environ)
    assert says in str(refused.value) and "give --coordinator HOST:PORT" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_run_has_a_key(auto) -> None:  # type: ignore[no-untyped-def]
    """The same in all its processes, another one in another job, and with another secret."""
    one, two = (auto(slurm("n[1-4]", number)).key for number in (0, 1))
    assert one == two and len(one) == 32
    assert auto(slurm("n[1-4]", SLURM_STEP_ID="1")).key != one
    assert auto(slurm("n[1-4]", TRANSLLM_SECRET="s")).key not in (one, auto(slurm("n[1-4]", TRANSLLM_SECRET="t")).key)
