"""Where a work directory may be, which errors of a store are retried, and which are reported in one line."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from etils import epath
from pods import BEFORE, Pod, mirror_of, read, write

from transllm_jax.errors import UserError
from transllm_jax.storage import Workdir, open_workdir
from transllm_jax.storage.store import Store


@pytest.fixture
def pod(tmp_path: Path) -> Pod:
    return Pod(tmp_path)


def test_a_local_directory_needs_no_store(tmp_path: Path) -> None:
    workdir = open_workdir(str(tmp_path / "run"))
    assert workdir.local == tmp_path / "run" and workdir.remote is None
    write(workdir.local / "base", BEFORE)
    with workdir.lease():
        assert workdir.push("base") == 0 and not workdir.pull("base") and not workdir.pull("none")
        workdir.remove("base")
    assert read(workdir.local) == {f"base/{name}": text for name, text in BEFORE.items()}
    assert os.fspath(workdir.checkpoints("pretrain")) == str(tmp_path / "run/pretrain/checkpoints")


@pytest.mark.parametrize("name", ["", "/etc", "../x", "a/../b", "a/", "./a"])
def test_a_name_outside_the_directory_is_refused(pod: Pod, name: str) -> None:
    for call in (pod.host("first").push, pod.host("first").pull, pod.host("first").remove):
        with pytest.raises(ValueError, match="no path below"):
            call(name)


def test_a_mirror_serves_one_store(tmp_path: Path) -> None:
    write(tmp_path / "mirror/step", BEFORE)
    Workdir(tmp_path / "mirror", epath.Path(tmp_path / "one")).push("step")
    with pytest.raises(UserError, match=r"mirrors .*/one, not .*/two; set TRANSLLM_MIRROR"):
        Workdir(tmp_path / "mirror", epath.Path(tmp_path / "two"))


class HttpError(Exception):
    def __init__(self, code: int) -> None:
        super().__init__(f"message, {code}")
        self.code = code


def failing(store: Store, method: str, errors: list[Exception]) -> None:
    """Makes a method of the file system raise these errors, one a call, before it works again."""
    call = getattr(store._fs, method)

    def fail(*arguments: Any, **options: Any) -> Any:
        if errors:
            raise errors.pop(0)
        return call(*arguments, **options)

    fs = type("Failing", (), {"__getattr__": lambda self, name: getattr(real, name)})()
    real = store._fs
    setattr(fs, method, fail)
    store._fs = fs


def test_only_temporary_errors_are_retried(tmp_path: Path) -> None:
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
def test_a_missing_permission_is_one_line(pod: Pod, error: Exception) -> None:
    host = pod.host("first")
    write(host.local / "step", BEFORE)
    failing(mirror_of(host).store, "put_file", [error] * 9)
    with pytest.raises(UserError, match="no permission to write") as error:
        host.push("step")
    assert "\n" not in str(error.value) and "https:" not in str(error.value) and str(pod.store) in str(error.value)


@pytest.mark.parametrize("given", ["gs:/bucket/run", "gs://", "gs:///", "gs://b/../c", "s3://b/run", "https://x/y"])
def test_a_malformed_workdir_is_refused(given: str) -> None:
    with pytest.raises(UserError, match="--workdir"):
        open_workdir(given)


def test_without_gcsfs_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gs", "gcs"):
        monkeypatch.delitem(sys.modules["fsspec.registry"].__dict__["_registry"], name, raising=False)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"pip install 'transllm-jax\[gcs\]'"):
        open_workdir("gs://bucket/run")
