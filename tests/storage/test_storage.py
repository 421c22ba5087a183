"""A work directory on a store: what a reader sees at every moment, one run at a time, and errors in one line.

A local directory stands for the store; the last tests talk to an emulator of Google Cloud Storage.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath
from gcs_emulator import Emulator

from transllm_jax.errors import UserError
from transllm_jax.storage import Workdir, open_workdir
from transllm_jax.storage.lease import Lease
from transllm_jax.storage.mirror import Mirror
from transllm_jax.storage.store import Store

DONE, RUNNING = '{"state": "done"}', '{"state": "running"}'
# A step, and what it is made anew: changed at the same size, new, gone, as it was.
BEFORE = {"a": "one", "b/c": "same", "gone": "x", "manifest.json": '{"state": "done", "v": 1}'}
AFTER = {"a": "two", "b/c": "same", "b/new": "y" * 5000, "manifest.json": '{"state": "done", "v": 2}'}


class Killed(BaseException):
    """The end of a process, wherever it is."""


def write(directory: Path, files: dict[str, str]) -> None:
    if directory.exists():
        shutil.rmtree(directory)
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text, encoding="utf-8")


def read(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): path.read_text(encoding="utf-8")
        for path in directory.rglob("*")
        if path.is_file() and path.name != ".mirror.json"
    }


class Pod:
    """Hosts with a store between them."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.store = directory, directory / "store"
        self.waited: list[float] = []

    def host(self, name: str) -> Workdir:
        """A process on a host; the second of a name finds what the first left."""
        return Workdir(self.directory / name, epath.Path(self.store), wait=self.waited.append)

    def seen(self, step: str = "step") -> dict[str, str]:
        """What a new host has after a pull."""
        shutil.rmtree(self.directory / "fresh", ignore_errors=True)
        host = self.host("fresh")
        there = host.pull(step)
        assert there == (host.local / step).exists()
        return read(host.local / step)


@pytest.fixture
def pod(tmp_path: Path) -> Pod:
    return Pod(tmp_path)


def mirror_of(host: Workdir) -> Mirror:
    assert host._mirror is not None
    return host._mirror


def kill_at(host: Workdir, moment: int, methods: tuple[str, ...] = ("upload", "write", "remove")) -> Callable[[], int]:
    """Let the first so many calls that change the store through, and none after. Gives the calls so far."""
    mirror, guard, calls = mirror_of(host), threading.Lock(), [0]

    def dying(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            with guard:
                calls[0] += 1
                if calls[0] > moment:
                    raise Killed
            return method(*arguments)

        return call

    for name in methods:
        setattr(mirror.store, name, dying(getattr(mirror.store, name)))
    return lambda: calls[0]


def test_a_local_directory_needs_no_store(tmp_path: Path) -> None:
    workdir = open_workdir(str(tmp_path / "run"))
    assert workdir.local == tmp_path / "run" and workdir.remote is None
    write(workdir.local / "base", BEFORE)
    with workdir.lease():
        assert workdir.push("base") == 0 and not workdir.pull("base") and not workdir.pull("none")
        workdir.remove("base")
    assert read(workdir.local) == {f"base/{name}": text for name, text in BEFORE.items()}
    assert os.fspath(workdir.checkpoints("pretrain")) == str(tmp_path / "run/pretrain/checkpoints")


def test_what_one_host_pushes_another_pulls(pod: Pod) -> None:
    first, second = pod.host("first"), pod.host("second")
    write(first.local / "step", BEFORE)
    write(first.local / "evaluation/base", {"results.json": "{}", "manifest.json": DONE})
    (first.local / "run.yaml").write_text("seed: 1\n")
    assert [first.push(name) for name in ("step", "evaluation/base", "run.yaml")] == [4, 2, 1]
    assert [first.push(name) for name in ("step", "evaluation/base", "run.yaml")] == [0, 0, 0]
    assert all(second.pull(name) for name in ("step", "evaluation/base", "run.yaml")) and not second.pull("other")
    for name in ("step", "evaluation/base"):
        assert read(second.local / name) == read(first.local / name) == read(pod.store / name)
    assert (second.local / "run.yaml").read_text() == "seed: 1\n"

    write(first.local / "step", AFTER)
    (first.local / "run.yaml").write_text("seed: 2\n")
    assert [pod.host("first").push(name) for name in ("step", "run.yaml")] == [3, 1]  # a, b/new, the manifest
    assert all(second.pull(name) for name in ("step", "run.yaml"))
    assert read(second.local / "step") == AFTER and (second.local / "run.yaml").read_text() == "seed: 2\n"


def test_a_pull_takes_only_what_differs(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = pod.host("first"), pod.host("second")
    write(first.local / "step", BEFORE)
    first.push("step")
    second.pull("step")
    (second.local / "step/a").write_text("bad")  # of the same size
    (second.local / "step/left").write_text("over")
    taken: list[str] = []
    download = Store.download
    monkeypatch.setattr(Store, "download", lambda self, name, file: taken.append(name) or download(self, name, file))
    assert second.pull("step") and second.pull("step")
    assert taken == ["step/a"] and read(second.local / "step") == BEFORE


def test_the_index_tells_size_and_hash(pod: Pod) -> None:
    host = pod.host("first")
    write(host.local / "step", BEFORE)
    host.push("step")
    index = json.loads((pod.store / "step/.mirror.json").read_text())["files"]
    assert index.keys() == BEFORE.keys()
    for name, text in BEFORE.items():
        digest = hashlib.sha256(text.encode()).hexdigest()
        assert (index[name]["size"], index[name]["sha256"]) == (len(text), digest)


def test_unfinished_files_and_checkpoints_stay_where_they_are(pod: Pod) -> None:
    host = pod.host("first")
    write(host.local / "step", {**BEFORE, "checkpoints/5/x": "here", "m.json.part": "", ".t.host-1-ab.partial": ""})
    write(pod.store / "step/checkpoints/7", {"state": "there"})
    host.push("step")
    assert read(pod.store / "step") == {**BEFORE, "checkpoints/7/state": "there"}
    assert pod.seen() == BEFORE
    assert host.checkpoints("step") == epath.Path(pod.store / "step/checkpoints")
    host.remove("step")
    assert read(pod.store) == {} and not pod.host("other").pull("step")


def test_a_step_that_was_cleared_goes_everywhere(pod: Pod) -> None:
    first, second = pod.host("first"), pod.host("second")
    write(first.local / "step", BEFORE)
    first.push("step")
    second.pull("step")
    write(pod.store / "step/checkpoints/7", {"state": "there"})
    shutil.rmtree(first.local / "step")
    order: list[str] = []
    remove = mirror_of(first).store.remove
    mirror_of(first).store.remove = lambda name: order.append(name) or remove(name)  # type: ignore[method-assign]
    first.push("step")
    assert order[0] == "step/manifest.json"
    assert read(pod.store / "step") == {"checkpoints/7/state": "there"}
    assert not second.pull("step") and not (second.local / "step").exists()


def test_what_the_store_never_had_is_neither_removed_nor_emptied(pod: Pod) -> None:
    host, other = pod.host("first"), pod.host("other")
    write(host.local / "step", BEFORE)
    assert not host.pull("step") and read(host.local / "step") == BEFORE
    host.push("step")
    with pytest.raises(ValueError, match="never was"):
        other.push("step")
    assert read(pod.store / "step") == BEFORE


def test_what_a_killed_push_left_here_is_kept_until_it_is_pushed_or_removed(pod: Pod) -> None:
    host = pod.host("first")
    write(host.local / "step", BEFORE)
    host.push("step")
    for mend in (True, False):
        write(host.local / "step", AFTER | {"again": str(mend)})
        dying = pod.host("first")
        kill_at(dying, 4)  # manifest and index are gone, two files have come
        with pytest.raises(Killed):
            dying.push("step")
        restarted = pod.host("first")
        assert not restarted.pull("step") and read(restarted.local / "step") == AFTER | {"again": str(mend)}
        if mend:
            restarted.push("step")
            assert pod.seen() == AFTER | {"again": "True"}
        else:
            restarted.remove("step")
            # It was to be begun anew: what is here must not count as done.
            assert not pod.host("first").pull("step") and not (restarted.local / "step").exists()


@pytest.mark.parametrize("name", ["", "/etc", "../x", "a/../b", "a/", "./a"])
def test_a_name_stays_below_the_directory(pod: Pod, name: str) -> None:
    for call in (pod.host("first").push, pod.host("first").pull, pod.host("first").remove):
        with pytest.raises(ValueError, match="no path below"):
            call(name)


def everywhere(pod: Pod, before: dict[str, str], after: dict[str, str]) -> Iterator[dict[str, str]]:
    """Kill a push of `after` over `before` at every moment; gives what a new host then sees, and checks the mend."""
    moment = 0
    while True:
        for name in ("store", "first"):
            shutil.rmtree(pod.directory / name, ignore_errors=True)
        host = pod.host("first")
        if before:
            write(host.local / "step", before)
            host.push("step")
        write(host.local / "step", after)
        calls = kill_at(host, moment)
        try:
            host.push("step")
        except Killed:
            yield {**read(pod.store / "step"), "": ""}
            yield pod.seen()
            restarted = pod.host("first")
            restarted.push("step")
            assert pod.seen() == after == read(pod.store / "step")
            moment += 1
            continue
        # Each file, the index and the manifest at least.
        assert calls() == moment >= len(after)
        return


@pytest.mark.parametrize("before", [BEFORE, {}], ids=["over another", "first"])
def test_a_killed_push_never_shows_a_done_step_in_part(pod: Pod, before: dict[str, str]) -> None:
    for seen in everywhere(pod, before, AFTER):
        if "" in seen:  # the store itself
            if "manifest.json" in seen:
                assert {k: v for k, v in seen.items() if k} in (before, AFTER)
        else:
            assert seen in (before, AFTER, {})


def test_a_killed_push_of_a_running_step_keeps_its_place(pod: Pod) -> None:
    before = {"metrics.jsonl": "1\n", "speed.jsonl": "1\n", "manifest.json": RUNNING}
    after = {"metrics.jsonl": "2\n", "speed.jsonl": "1\n2\n", "new.jsonl": "", "manifest.json": RUNNING}
    for last in (after, {**after, "manifest.json": DONE}):
        for seen in everywhere(pod, before, last):
            state = seen.pop("manifest.json")
            assert state in (RUNNING, last["manifest.json"])
            seen.pop("", None)
            if state == DONE:
                assert seen == {name: text for name, text in last.items() if name != "manifest.json"}
            else:
                assert all(seen[name] in (before[name], last[name]) for name in before if name in seen)
                assert before.keys() - {"manifest.json"} <= seen.keys() <= last.keys()


def test_a_killed_pull_leaves_no_done_step_in_part(pod: Pod) -> None:
    first = pod.host("first")
    write(first.local / "step", BEFORE)
    first.push("step")
    old = pod.host("old")
    old.pull("step")
    write(first.local / "step", {**AFTER, "more": "z"})
    first.push("step")
    for start in ("old", None):
        for moment in range(4 if start is None else 3):
            shutil.rmtree(pod.directory / "second", ignore_errors=True)
            if start is not None:
                shutil.copytree(pod.directory / start, pod.directory / "second")
            second = pod.host("second")
            kill_at(second, moment, ("download",))
            with pytest.raises(Killed):
                second.pull("step")
            assert "manifest.json" not in read(second.local / "step")
            assert not list(second.local.rglob("*.part"))
            restarted = pod.host("second")
            with pytest.raises(RuntimeError, match="not pulled to its end"):
                restarted.push("step")
            assert restarted.pull("step") and read(second.local / "step") == {**AFTER, "more": "z"}


def test_a_file_cut_off_while_it_comes_is_never_under_its_name(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    host = pod.host("first")
    write(host.local / "step", BEFORE)
    (host.local / "run.yaml").write_text("old")
    host.push("step")
    host.push("run.yaml")
    (pod.store / "run.yaml").write_text("new and longer")

    def half(self: Store, name: str, file: Path) -> None:
        file.write_text("hal")
        raise Killed

    monkeypatch.setattr(Store, "download", half)
    (host.local / "step/a").unlink()
    for name in ("step", "run.yaml"):
        with pytest.raises(Killed):
            host.pull(name)
    assert not (host.local / "step/a").exists() and (host.local / "run.yaml").read_text() == "old"


def test_damage_on_the_store_is_found(pod: Pod) -> None:
    host, other = pod.host("first"), pod.host("other")
    write(host.local / "step", BEFORE)
    host.push("step")
    (pod.store / "step/a").write_text("bad")
    with pytest.raises(UserError, match="step/a is not what was pushed") as told:
        other.pull("step")
    assert "\n" not in str(told.value) and not (other.local / "step/manifest.json").exists()
    # The tag tells that the object is another one, though it is as large and the index still knows the hash.
    assert host.push("step") > 0 and pod.seen() == BEFORE


def test_a_reader_waits_for_a_push_to_end(pod: Pod) -> None:
    host, other = pod.host("first"), pod.host("other")
    write(host.local / "step", BEFORE)
    host.push("step")
    mirror = mirror_of(other)
    download = mirror.store.download

    def late(name: str, file: Path) -> None:
        if not pod.waited and name == "step/a":
            write(host.local / "step", AFTER)
            host.push("step")
        download(name, file)

    mirror.store.download = late  # type: ignore[method-assign]
    assert other.pull("step") and read(other.local / "step") == AFTER and len(pod.waited) == 1


def test_a_file_that_changes_while_it_is_pushed_is_not_passed_off(pod: Pod) -> None:
    host = pod.host("first")
    write(host.local / "step", BEFORE)
    store = mirror_of(host).store
    upload = store.upload

    def appended(file: Path, name: str) -> None:
        upload(file, name)
        with file.open("a") as opened:
            opened.write("more")

    store.upload = appended  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="changed while it was pushed"):
        host.push("step")
    assert pod.seen() == {}


def test_a_mirror_serves_one_store(tmp_path: Path) -> None:
    write(tmp_path / "mirror/step", BEFORE)
    Workdir(tmp_path / "mirror", epath.Path(tmp_path / "one")).push("step")
    with pytest.raises(UserError, match=r"mirrors .*/one, not .*/two; set TRANSLLM_MIRROR"):
        Workdir(tmp_path / "mirror", epath.Path(tmp_path / "two"))


# The lease.


def lease(pod: Pod, **options: Any) -> Lease:
    return Lease(Store(str(pod.store)), **({"stale": 0.6, "renew": 0.05} | options))


def test_a_second_run_is_refused_while_the_first_lives(pod: Pod) -> None:
    said: list[str] = []
    with lease(pod):
        for options in ({"watch": False}, {"watch": True, "say": said.append}):
            began = time.monotonic()
            with pytest.raises(UserError, match="another run is at work here") as told, lease(pod, stale=9, **options):
                pass
            assert "\n" not in str(told.value) and f"process {os.getpid()}" in str(told.value)
            assert socket.gethostname() in str(told.value)
            # It saw a sign of life, and did not wait for the lease to go stale.
            assert time.monotonic() - began < 6
        assert len(said) == 1 and "waiting to see whether it is still alive" in said[0]
    with lease(pod, watch=False):
        pass
    assert len(list((pod.store / ".lease").iterdir())) == 1


def dead(pod: Pod) -> Lease:
    """A lease whose holder was killed: taken, and never renewed."""
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
        taken.check()  # the first gave nothing back that is not its own
        assert len(list((pod.store / ".lease").iterdir())) == 1
        with pytest.raises(UserError), lease(pod, watch=False, stale=60):
            pass


@pytest.fixture(params=[-300.0, 300.0])
def skewed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    """Seconds by which the wall clock is wrong for this thread, and is not for those that renew a lease."""
    right, us = time.time, threading.current_thread()
    off = float(request.param)
    monkeypatch.setattr(time, "time", lambda: right() + (off if threading.current_thread() is us else 0.0))
    return off


def test_a_lease_that_lives_is_never_taken_by_one_whose_clock_differs(pod: Pod, skewed: float) -> None:
    with lease(pod, stale=180.0) as held:
        # What the holder's first sign says, before its thread has given another, is of this thread.
        held._store.write(held._name(1), json.dumps(json.loads(held._content()) | {"renewed": 0.0}).encode())
        for watch in (False, True):
            with pytest.raises(UserError, match=r"last seen at .* by its clock"), lease(pod, stale=180.0, watch=watch):
                pass
        held.check()


@pytest.mark.parametrize("tells", [True, False], ids=["by the store's clock", "by watching"])
def test_a_lease_of_the_dead_is_taken_by_one_whose_clock_differs(pod: Pod, skewed: float, tells: bool) -> None:
    held = dead(pod)
    path = next((pod.store / ".lease").iterdir())
    path.write_text(json.dumps(json.loads(path.read_text()) | {"renewed": time.time() - 2 * skewed}))
    if tells:
        os.utime(path, (path.stat().st_mtime - 3600,) * 2)
    asked: list[str] = []
    taken = lease(pod, **({"stale": 180.0, "watch": False} if tells else {}))
    for name in ("files", "read", "age"):
        real = getattr(taken._store, name)
        setattr(taken._store, name, lambda *given, name=name, real=real: (asked.append(name), real(*given))[1])
    if not tells:
        taken._store.age = lambda name: None  # type: ignore[method-assign]
    with taken, pytest.raises(UserError, match="took over"):
        held._renew_lease()
        held.check()
    # To look and to take; to watch is dear, and done every third of a renewal only.
    assert asked.count("age") <= 1 and (not tells or len(asked) <= 4)


def test_a_watch_costs_few_requests(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a lease as it is by default, with a clock that runs as it is waited for."""
    dead(pod)
    clock, looks, one = [0.0], [0], Lease(Store(str(pod.store)))
    monkeypatch.setattr("transllm_jax.storage.lease._now", lambda: clock[0])
    monkeypatch.setattr(one._ended, "wait", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    top = one._top
    monkeypatch.setattr(one, "_top", lambda: (looks.__setitem__(0, looks[0] + 1), top())[1])
    monkeypatch.setattr(one, "_renew_loop", lambda: None)
    with one:
        assert 180 <= clock[0] < 200 and looks[0] <= 21


def test_the_lease_of_a_process_that_died_here_is_taken_at_once(pod: Pod) -> None:
    died = subprocess.Popen([sys.executable, "-c", "pass"])
    died.wait()
    first, second = lease(pod, stale=180.0), lease(pod, stale=180.0, watch=False)
    first._me["pid"] = died.pid
    with first, second:
        pass
    # A number of another machine, or of another container, says nothing.
    first, second = lease(pod, stale=180.0), lease(pod, stale=180.0, watch=False)
    first._me |= {"pid": died.pid, "boot": "another"}
    with first, pytest.raises(UserError, match="another run is at work here"), second:
        pass


def test_a_lease_is_given_back_before_an_end_by_force(pod: Pod) -> None:
    host = pod.host("first")
    with host.lease():
        host.release()
        with pod.host("second").lease(watch=False):
            pass
    host.release()


def test_files_that_never_change_come_and_go_in_their_order(pod: Pod) -> None:
    first, second = pod.host("first"), pod.host("second")
    write(first.local / "tokens", {"a.records": "1", "a": "2", "b.records": "3", "b": "4"})
    first.add("tokens", ["a.records", "b.records"], ["a", "b"])
    assert read(pod.store / "tokens") == read(first.local / "tokens")
    write(second.local / "tokens", {"b.records": "own"})
    second.fetch("tokens", ["a.records", "b.records", "c.records"], ["a", "c"])
    # What is here stays, what nobody has is passed over, what is not asked for does not come.
    assert read(second.local / "tokens") == {"a.records": "1", "a": "2", "b.records": "own"}
    write(second.local / "tokens", {"a": "other", "d": "5"})
    second.add("tokens", ["a"], ["d"])
    assert read(pod.store / "tokens") == read(first.local / "tokens") | {"d": "5"}
    # A killed one never leaves what says that a shard is whole without the shard.
    for moment in range(2):
        write(first.local / "tokens", {f"{moment}.records": "1", f"{moment}": "2"})
        dying = pod.host("first")
        kill_at(dying, moment)
        with pytest.raises(Killed):
            dying.add("tokens", [f"{moment}.records"], [f"{moment}"])
        assert not (pod.store / "tokens" / f"{moment}").exists()


def test_of_many_at_once_one_gets_a_stale_lease(pod: Pod) -> None:
    held = dead(pod)
    # Of an hour ago; that of the one who gets it is not stale soon, however slow this machine is.
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
        os.utime(held, (time.time() - 3600,) * 2)  # as the store has it, an hour without a sign
        with lease(pod, watch=False, stale=180.0):
            host_lease = mirror_of(host).check.__self__  # type: ignore[attr-defined]
            host_lease._renew_lease()
            for call in (host.push, host.remove):
                with pytest.raises(UserError, match="took over"):
                    call("step")
    assert read(pod.store / "step") == BEFORE


# Errors.


class HttpError(Exception):
    def __init__(self, code: int) -> None:
        super().__init__(f"message, {code}")
        self.code = code


def failing(store: Store, method: str, errors: list[Exception]) -> None:
    call = getattr(store._fs, method)

    def fail(*arguments: Any, **options: Any) -> Any:
        if errors:
            raise errors.pop(0)
        return call(*arguments, **options)

    fs = type("Failing", (), {"__getattr__": lambda self, name: getattr(real, name)})()
    real = store._fs
    setattr(fs, method, fail)
    store._fs = fs


def test_what_passes_is_tried_again_and_what_does_not_is_not(tmp_path: Path) -> None:
    waited: list[float] = []
    (tmp_path / "file").write_bytes(b"x")
    for error in (HttpError(503), HttpError(429), ConnectionResetError(), TimeoutError()):
        store = Store(str(tmp_path), wait=waited.append)
        failing(store, "put_file", [error] * 4)
        waited.clear()
        store.upload(tmp_path / "file", "a")
        assert store.read("a") == b"x" and len(waited) == 4
        assert all(0.5 * 2**k <= wait <= 1.5 * 2**k for k, wait in enumerate(waited))
        failing(store, "put_file", [error] * 5)
        with pytest.raises(type(error)):
            store.upload(tmp_path / "file", "a")
    waited.clear()
    full = OSError(28, "No space left on device")
    for error in (full, HttpError(400)):
        failing(store, "get_file", [error])
        with pytest.raises(type(error)):
            store.download("a", tmp_path / "b")
    assert not waited


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "Permission denied"),
        HttpError(401),
        OSError("Forbidden: https://storage/upload/b/x\nsomebody does not have storage.objects.create access."),
    ],
    ids=["local", "401", "403"],
)
def test_a_permission_that_lacks_is_one_line(pod: Pod, error: Exception) -> None:
    host = pod.host("first")
    write(host.local / "step", BEFORE)
    failing(mirror_of(host).store, "put_file", [error] * 9)
    with pytest.raises(UserError, match="no permission to write") as told:
        host.push("step")
    assert "\n" not in str(told.value) and "https:" not in str(told.value) and str(pod.store) in str(told.value)


@pytest.mark.parametrize("given", ["gs:/bucket/run", "gs://", "gs:///", "gs://b/../c", "s3://b/run", "https://x/y"])
def test_a_place_that_is_none_is_refused(given: str) -> None:
    with pytest.raises(UserError, match="--workdir"):
        open_workdir(given)


def test_without_gcsfs_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gs", "gcs"):
        monkeypatch.delitem(sys.modules["fsspec.registry"].__dict__["_registry"], name, raising=False)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"pip install 'transllm-jax\[gcs\]'"):
        open_workdir("gs://bucket/run")


# An emulator of Google Cloud Storage.


@pytest.fixture
def on_gcs(gcs: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Workdir]:
    """Opens the run of this test on a named host."""

    def open_on(host: str) -> Workdir:
        monkeypatch.setenv("TRANSLLM_MIRROR", str(tmp_path / host))
        return open_workdir(f"gs://bucket/{tmp_path.name}/run/")

    return open_on


@pytest.mark.slow
def test_a_run_on_gcs(on_gcs: Callable[[str], Workdir], tmp_path: Path) -> None:
    first, second = on_gcs("first"), on_gcs("second")
    assert str(first.remote) == f"gs://bucket/{tmp_path.name}/run" and first.local == tmp_path / "first"
    assert str(first.checkpoints("pretrain")) == f"gs://bucket/{tmp_path.name}/run/pretrain/checkpoints"
    # Above 5 MB it goes up in pieces; a neighbour whose name begins alike is another; an empty file is a file.
    files = {**BEFORE, "large": "0123456789" * 600_000, "empty": ""}
    write(first.local / "base", files)
    write(first.local / "base2", {"x": "y", "manifest.json": DONE})
    (first.local / "run.yaml").write_text("seed: 1\n")
    with first.lease(watch=False):
        assert [first.push(name) for name in ("base", "base2", "run.yaml")] == [6, 2, 1]
        assert [first.push(name) for name in ("base", "base2", "run.yaml")] == [0, 0, 0]
        assert all(second.pull(name) for name in ("base", "base2", "run.yaml")) and not second.pull("bas")
        assert read(second.local / "base") == files and (second.local / "run.yaml").read_text() == "seed: 1\n"
        write(first.local / "base", AFTER)
        assert first.push("base") == 3 and second.pull("base") and read(second.local / "base") == AFTER
        with pytest.raises(UserError, match="another run is at work here"), second.lease(watch=False):
            pass
        first.remove("base")
        assert not second.pull("base") and not (second.local / "base").exists() and second.pull("base2")
    with second.lease(watch=False):
        pass


@pytest.mark.slow
def test_of_two_that_create_on_gcs_one_does(on_gcs: Callable[[str], Workdir]) -> None:
    store = mirror_of(on_gcs("first")).store
    assert store.create("x", b"one") and not store.create("x", b"two") and store.read("x") == b"one"
    for content in (b"\r", b"x\r\n", b"\n--==0==\n", bytes(range(256))):
        store.write("y", content)
        assert store.read("y") == content


@pytest.mark.slow
def test_gcs_tells_how_old_an_object_is(on_gcs: Callable[[str], Workdir], monkeypatch: pytest.MonkeyPatch) -> None:
    store = mirror_of(on_gcs("first")).store
    store.write("x", b"one")
    assert store.age("none") is None and store.age("x") is not None and 0 <= store.age("x") < 60
    # Both times are the store's.
    answer = json.dumps({"updated": "2026-01-02T03:04:05.678Z"}).encode()
    for header, age in (({"Date": "Fri, 02 Jan 2026 03:14:05 GMT"}, 599.322), ({}, None)):
        with monkeypatch.context() as patch:
            patch.setattr(store._fs, "call", lambda *given, header=header: (header, answer))
            assert store.age("x") == age


@pytest.mark.slow
def test_a_lease_on_gcs_and_clocks_that_differ(on_gcs: Callable[[str], Workdir], skewed: float) -> None:
    store = mirror_of(on_gcs("first")).store
    with Lease(store, renew=0.2) as held:
        time.sleep(0.5)  # from now on its signs are of another thread
        for watch in (False, True):
            with pytest.raises(UserError, match="another run is at work here"), Lease(store, watch=watch, renew=0.2):
                pass
        held.check()


@pytest.mark.slow
def test_a_bucket_that_is_none_or_closed_is_one_line(gcs: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="gs://none: no such bucket; create it"):
        open_workdir("gs://none/run")
    monkeypatch.setattr(gcs, "refuses", True)
    with pytest.raises(UserError, match=r"gs://bucket/run: no permission to list .*me does not have") as told:
        open_workdir("gs://bucket/run")
    assert "\n" not in str(told.value)


@pytest.mark.slow
def test_orbax_saves_to_gcs_and_restores(on_gcs: Callable[[str], Workdir]) -> None:
    import jax
    import orbax.checkpoint as ocp

    first, second = on_gcs("first"), on_gcs("second")
    wanted = {"a": jax.numpy.arange(1000.0).reshape(10, 100), "b": jax.numpy.int32(7)}
    args = {"state": ocp.args.StandardSave(wanted), "record": ocp.args.JsonSave({"score": 1.5})}
    options = ocp.CheckpointManagerOptions(max_to_keep=1, create=True)
    with ocp.CheckpointManager(first.checkpoints("pretrain"), options=options) as manager:
        # Seen before anything is there: the listing must not be kept.
        assert not second.checkpoints("pretrain").exists() or not list(second.checkpoints("pretrain").iterdir())
        for step in (2, 4):
            manager.save(step, args=ocp.args.Composite(**args))
        manager.wait_until_finished()
        assert manager.all_steps() == [4]
    # Pushing the stage's logs, and clearing nothing of what orbax wrote.
    write(first.local / "pretrain", {"metrics.jsonl": "{}\n", "manifest.json": RUNNING})
    first.push("pretrain")
    assert second.pull("pretrain") and read(second.local / "pretrain").keys() == {"metrics.jsonl", "manifest.json"}
    with ocp.CheckpointManager(second.checkpoints("pretrain")) as manager:
        like = jax.tree.map(jax.numpy.zeros_like, wanted)
        items = {"state": ocp.args.StandardRestore(like), "record": ocp.args.JsonRestore()}
        found = manager.restore(4, args=ocp.args.Composite(**items))
    assert found["record"] == {"score": 1.5}
    assert all(np.array_equal(found["state"][name], wanted[name]) for name in wanted)


@pytest.mark.slow
def test_epath_sees_what_another_host_wrote(on_gcs: Callable[[str], Workdir]) -> None:
    first = on_gcs("first")
    assert first.remote is not None
    mirror_of(first).store.write("pretrain/checkpoints/2/x", b"")
    place = first.checkpoints("pretrain")
    assert [path.name for path in place.iterdir()] == ["2"]
    mirror_of(first).store.write("pretrain/checkpoints/4/x", b"")
    assert sorted(path.name for path in place.iterdir()) == ["2", "4"]
