"""The lease of a work directory: one run at a time, and the lease of a dead holder is taken over."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from pods import AFTER, BEFORE, Pod, mirror_of, read, write

from transllm_jax.errors import UserError
from transllm_jax.storage.lease import Lease
from transllm_jax.storage.store import Store


@pytest.fixture
def pod(tmp_path: Path) -> Pod:
    return Pod(tmp_path)


def lease(pod: Pod, **options: Any) -> Lease:
    """A lease that is renewed, and becomes stale, within a second."""
    return Lease(Store(str(pod.store)), **({"stale": 0.6, "renew": 0.05} | options))


def test_a_second_run_is_refused_while_the_first_lives(pod: Pod) -> None:
    said: list[str] = []
    with lease(pod):
        for options in ({"watch": False}, {"watch": True, "say": said.append}):
            began = time.monotonic()
            with pytest.raises(UserError, match="another run is at work here") as error, lease(pod, stale=9, **options):
                pass
            assert "\n" not in str(error.value) and f"process {os.getpid()}" in str(error.value)
            assert socket.gethostname() in str(error.value)
            # It saw the lease being renewed, and did not wait until it was stale.
            assert time.monotonic() - began < 6
        assert len(said) == 1 and "waiting to see whether it is still alive" in said[0]
    with lease(pod, watch=False):
        pass
    assert len(list((pod.store / ".lease").iterdir())) == 1


def dead(pod: Pod) -> Lease:
    """A lease whose holder was killed: it is never renewed."""
    held = lease(pod, renew=60)
    held.__enter__()
    return held


def test_a_stale_lease_is_taken_over_and_its_holder_stops(pod: Pod) -> None:
    held = dead(pod)
    began = time.monotonic()
    with lease(pod) as taken:
        assert 0.4 < time.monotonic() - began < 5
        taken.check()
        with pytest.raises(UserError, match="it took over after"):
            held.check()
        held.__exit__(None, None, None)
        taken.check()  # the first holder did not release the lease of the second
        assert len(list((pod.store / ".lease").iterdir())) == 1
        with pytest.raises(UserError), lease(pod, watch=False, stale=60):
            pass


@pytest.fixture(params=[-300.0, 300.0])
def skewed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    """Seconds by which the clock of this thread is wrong; the clock of threads that renew a lease is right."""
    right, us = time.time, threading.current_thread()
    off = float(request.param)
    monkeypatch.setattr(time, "time", lambda: right() + (off if threading.current_thread() is us else 0.0))
    return off


def test_a_live_lease_is_never_taken_by_a_host_with_a_wrong_clock(pod: Pod, skewed: float) -> None:
    with lease(pod, stale=180.0) as held:
        # The first record of a lease is written by this thread; later ones by a thread whose clock is right.
        held._store.write(held._name(1), json.dumps(json.loads(held._content()) | {"renewed": 0.0}).encode())
        for watch in (False, True):
            with pytest.raises(UserError, match=r"last seen at .* by its clock"), lease(pod, stale=180.0, watch=watch):
                pass
        held.check()


@pytest.mark.parametrize("by_store", [True, False], ids=["by the store's clock", "by watching"])
def test_a_dead_lease_is_taken_by_a_host_with_a_wrong_clock(pod: Pod, skewed: float, by_store: bool) -> None:
    held = dead(pod)
    path = next((pod.store / ".lease").iterdir())
    path.write_text(json.dumps(json.loads(path.read_text()) | {"renewed": time.time() - 2 * skewed}))
    if by_store:
        os.utime(path, (path.stat().st_mtime - 3600,) * 2)
    asked: list[str] = []
    taken = lease(pod, **({"stale": 180.0, "watch": False} if by_store else {}))
    for name in ("files", "read", "age"):
        real = getattr(taken._store, name)
        setattr(taken._store, name, lambda *given, name=name, real=real: (asked.append(name), real(*given))[1])
    if not by_store:
        taken._store.age = lambda name: None  # type: ignore[method-assign]
    with taken, pytest.raises(UserError, match="took over"):
        held._renew_lease()
        held.check()
    # Looking and taking cost few requests; watching repeats only every third of a renewal.
    assert asked.count("age") <= 1 and (not by_store or len(asked) <= 4)


def test_watching_a_lease_makes_few_requests(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the default times, and a clock that advances by each wait."""
    dead(pod)
    clock, requests, taken = [0.0], [0], Lease(Store(str(pod.store)))
    monkeypatch.setattr("transllm_jax.storage.lease._now", lambda: clock[0])
    monkeypatch.setattr(taken._ended, "wait", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    top = taken._top
    monkeypatch.setattr(taken, "_top", lambda: (requests.__setitem__(0, requests[0] + 1), top())[1])
    monkeypatch.setattr(taken, "_renew_loop", lambda: None)
    with taken:
        assert 180 <= clock[0] < 200 and requests[0] <= 21


def test_the_lease_of_a_process_that_died_on_this_machine_is_taken_at_once(pod: Pod) -> None:
    died = subprocess.Popen([sys.executable, "-c", "pass"])
    died.wait()
    first, second = lease(pod, stale=180.0), lease(pod, stale=180.0, watch=False)
    first._me["pid"] = died.pid
    with first, second:
        pass
    # A process number of another machine or container says nothing.
    first, second = lease(pod, stale=180.0), lease(pod, stale=180.0, watch=False)
    first._me |= {"pid": died.pid, "boot": "another"}
    with first, pytest.raises(UserError, match="another run is at work here"), second:
        pass


def test_a_lease_can_be_released_early(pod: Pod) -> None:
    host = pod.host("first")
    with host.lease():
        host.release()
        with pod.host("second").lease(watch=False):
            pass
    host.release()


def test_one_of_many_gets_a_stale_lease(pod: Pod) -> None:
    held = dead(pod)
    # An hour old; the lease of the winner does not become stale soon, however slow this machine is.
    os.utime(pod.store / held._name(1), (time.time() - 3600,) * 2)
    got: list[Lease] = []
    gate = threading.Barrier(8)

    def try_it() -> None:
        gate.wait()
        one = lease(pod, watch=False, stale=60)
        with suppress(UserError):
            got.append(one.__enter__())

    threads = [threading.Thread(target=try_it) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1
    got[0].check()
    got[0].__exit__(None, None, None)


def test_a_run_that_lost_its_lease_pushes_nothing(pod: Pod) -> None:
    host = pod.host("first")
    write(host.local / "step", BEFORE)
    with host.lease():
        host.push("step")
        write(host.local / "step", AFTER)
        held = next((pod.store / ".lease").iterdir())
        os.utime(held, (time.time() - 3600,) * 2)  # by the clock of the store, it was not renewed for an hour
        with lease(pod, watch=False, stale=180.0):
            host_lease = mirror_of(host).check.__self__  # type: ignore[attr-defined]
            host_lease._renew_lease()
            for call in (host.push, host.remove):
                with pytest.raises(UserError, match="took over"):
                    call("step")
    assert read(pod.store / "step") == BEFORE
