"""A work directory on an emulator of Google Cloud Storage."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gcs_emulator import Emulator
from pods import AFTER, BEFORE, DONE, RUNNING, mirror_of, read, write

from transllm_jax.errors import UserError
from transllm_jax.storage import Workdir, open_workdir
from transllm_jax.storage.lease import Lease


@pytest.fixture(params=[-300.0, 300.0])
def skewed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    """Seconds by which the clock of this thread is wrong; the clock of threads that renew a lease is right."""
    right, us = time.time, threading.current_thread()
    off = float(request.param)
    monkeypatch.setattr(time, "time", lambda: right() + (off if threading.current_thread() is us else 0.0))
    return off


@pytest.fixture
def on_gcs(gcs: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Workdir]:
    """Opens the work directory of this test on a host."""

    def open_on(host: str) -> Workdir:
        monkeypatch.setenv("TRANSLLM_MIRROR", str(tmp_path / host))
        return open_workdir(f"gs://bucket/{tmp_path.name}/run/")

    return open_on


@pytest.mark.slow
def test_a_run_on_gcs(on_gcs: Callable[[str], Workdir], tmp_path: Path) -> None:
    first, second = on_gcs("first"), on_gcs("second")
    assert str(first.remote) == f"gs://bucket/{tmp_path.name}/run" and first.local == tmp_path / "first"
    assert str(first.checkpoints("pretrain")) == f"gs://bucket/{tmp_path.name}/run/pretrain/checkpoints"
    # A file above 5 MB is uploaded in pieces; `base2` is not part of `base`; an empty file is a file.
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
def test_only_the_first_create_on_gcs_succeeds(on_gcs: Callable[[str], Workdir]) -> None:
    store = mirror_of(on_gcs("first")).store
    assert store.create("x", b"one") and not store.create("x", b"two") and store.read("x") == b"one"
    for content in (b"\r", b"x\r\n", b"\n--==0==\n", bytes(range(256))):
        store.write("y", content)
        assert store.read("y") == content


@pytest.mark.slow
def test_the_age_of_an_object_on_gcs(on_gcs: Callable[[str], Workdir], monkeypatch: pytest.MonkeyPatch) -> None:
    store = mirror_of(on_gcs("first")).store
    store.write("x", b"one")
    assert store.age("none") is None and store.age("x") is not None and 0 <= store.age("x") < 60
    # Both times are by the clock of the store.
    answer = json.dumps({"updated": "2026-01-02T03:04:05.678Z"}).encode()
    for header, age in (({"Date": "Fri, 02 Jan 2026 03:14:05 GMT"}, 599.322), ({}, None)):
        with monkeypatch.context() as patch:
            patch.setattr(store._fs, "call", lambda *given, header=header: (header, answer))
            assert store.age("x") == age


@pytest.mark.slow
def test_a_lease_on_gcs_with_a_wrong_clock(on_gcs: Callable[[str], Workdir], skewed: float) -> None:
    store = mirror_of(on_gcs("first")).store
    with Lease(store, renew=0.2) as held:
        time.sleep(0.5)  # from now on another thread renews it
        for watch in (False, True):
            with pytest.raises(UserError, match="another run is at work here"), Lease(store, watch=watch, renew=0.2):
                pass
        held.check()


@pytest.mark.slow
def test_a_missing_or_forbidden_bucket_is_one_line(gcs: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="gs://none: no such bucket; create it"):
        open_workdir("gs://none/run")
    monkeypatch.setattr(gcs, "refuses", True)
    with pytest.raises(UserError, match=r"gs://bucket/run: no permission to list .*me does not have") as error:
        open_workdir("gs://bucket/run")
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_orbax_saves_to_gcs_and_restores(on_gcs: Callable[[str], Workdir]) -> None:
    import jax
    import orbax.checkpoint as ocp

    first, second = on_gcs("first"), on_gcs("second")
    wanted = {"a": jax.numpy.arange(1000.0).reshape(10, 100), "b": jax.numpy.int32(7)}
    args = {"state": ocp.args.StandardSave(wanted), "record": ocp.args.JsonSave({"score": 1.5})}
    options = ocp.CheckpointManagerOptions(max_to_keep=1, create=True)
    with ocp.CheckpointManager(first.checkpoints("pretrain"), options=options) as manager:
        # Listed before there are any; the listing must not be cached.
        assert not second.checkpoints("pretrain").exists() or not list(second.checkpoints("pretrain").iterdir())
        for step in (2, 4):
            manager.save(step, args=ocp.args.Composite(**args))
        manager.wait_until_finished()
        assert manager.all_steps() == [4]
    # A push of the stage's logs removes nothing that orbax wrote.
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
def test_epath_lists_what_another_host_wrote(on_gcs: Callable[[str], Workdir]) -> None:
    first = on_gcs("first")
    assert first.remote is not None
    mirror_of(first).store.write("pretrain/checkpoints/2/x", b"")
    place = first.checkpoints("pretrain")
    assert [path.name for path in place.iterdir()] == ["2"]
    mirror_of(first).store.write("pretrain/checkpoints/4/x", b"")
    assert sorted(path.name for path in place.iterdir()) == ["2", "4"]
