"""Writing our checkpoint: meshes and values that are refused, memory, and errors of the disk."""

from __future__ import annotations

import errno
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorstore
from tiny_store import BF16, CONFIG, F32, Source, finish, refused, source_of

from transllm_jax.conversion import store
from transllm_jax.conversion.names import EMBEDDING, OUTPUT, Tensor
from transllm_jax.conversion.store import MANIFEST, write_store
from transllm_jax.errors import UserError
from transllm_jax.new_directory import new_directory


@pytest.mark.parametrize(
    ("mesh", "wrong"),
    [
        ({"fsdp": 2, "model": 2, "tensor": 0}, "has model=2, tensor=0; its axes are data, fsdp, tensor"),
        ({"fsdp": True}, "has fsdp=True"),
        ({"tensor": 2.0}, "has tensor=2.0"),
        ({"data": -1}, "has data=-1"),
    ],
)
def test_a_bad_mesh_is_refused(tmp_path: Path, mesh: dict[str, int], wrong: str) -> None:
    with pytest.raises(UserError, match=wrong):
        write_store(tmp_path, source_of(), mesh=mesh)
    assert not any(tmp_path.iterdir())


def test_a_mesh_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        write_store(tmp_path, source_of(), mesh={"fsdp": 3, "tensor": 5})
    message = str(caught.value)
    # A table's D of 48 is divided by 3 * 5; 48 is a multiple of 3 only. The heads' 64 and 32 are divided by 5.
    assert message == (
        "the mesh fsdp=3,tensor=5 does not divide "
        "dimension 1 of vocabulary.base, 48, by fsdp=3,tensor=5; "
        "dimension 2 of blocks.attention.q.kernel, 64, by tensor=5; "
        "dimension 2 of blocks.attention.k.kernel, 32, by tensor=5; "
        "dimension 2 of blocks.attention.v.kernel, 32, by tensor=5; "
        "dimension 1 of blocks.attention.o.kernel, 64, by tensor=5; "
        "dimension 1 of vocabulary.output_base, 48, by fsdp=3,tensor=5; choose other sizes"
    )
    assert not any(tmp_path.iterdir())
    write_store(tmp_path, source_of(), mesh={"data": 7})  # the data axis divides no weight
    assert (tmp_path / MANIFEST).is_file()


def test_all_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    source = source_of()
    source.given[EMBEDDING][3, 4] = np.nan
    source.given["model.layers.0.mlp.up_proj.weight"][0] = -np.inf
    source.given["model.layers.1.mlp.up_proj.weight"][2, 2] = np.inf
    source.given[OUTPUT][-1, -1] = np.nan
    done: list[int] = []
    with pytest.raises(UserError) as caught:
        write_store(tmp_path, source, advance=done.append)
    message = str(caught.value)
    for part in ("SOURCE: 51 values", EMBEDDING, OUTPUT, "model.layers.{0,1}.mlp.up_proj.weight"):
        assert part in message
    assert len(done) == len(source.given)
    # Already the first tensor was bad.
    assert not (tmp_path / MANIFEST).exists() and not list(tmp_path.glob("weights/*/c"))
    assert "has no weights.json" in refused(finish(tmp_path, CONFIG))


def test_a_source_of_other_shapes_or_types_is_a_defect(tmp_path: Path) -> None:
    source = source_of()
    for number, wrong in enumerate((np.zeros((48, 80), BF16), np.zeros((80, 48), F32))):
        source.read = lambda t, w=wrong: w if t.name.endswith("up_proj.weight") else source.given[t.name]  # type: ignore
        directory = tmp_path / str(number)
        directory.mkdir()
        with pytest.raises(ValueError, match=r"SOURCE: model\.layers\.0\.mlp\.up_proj\.weight was read as"):
            write_store(directory, source)
        assert not (directory / MANIFEST).exists()


def test_one_tensor_is_held_at_a_time(tmp_path: Path) -> None:
    """When the next tensor is read, only the pending write may hold the one before."""
    source = source_of()
    alive: list[int] = []
    given: list[Any] = []

    def read(tensor: Tensor) -> np.ndarray:
        alive.append(sum(reference() is not None for reference in given))
        array = Source.read(source, tensor)
        given.append(weakref.ref(array))
        return array

    source.read = read  # type: ignore[method-assign]
    write_store(tmp_path, source)
    assert len(alive) == len(source.given) and max(alive) <= 1


class Faked:
    """A tensorstore whose arrays answer a write with the result of `write`."""

    def __init__(self, write: Callable[[], Any]) -> None:
        self.write = write

    def open(self, spec: Any, **options: Any) -> Any:
        real = tensorstore.open(spec, **options).result()

        class Array:
            def __getitem__(_, index: Any) -> Array:
                return _

            def write(_, array: np.ndarray) -> Any:
                return self.write()

        return SimpleNamespace(result=lambda: Array() if options["create"] else real)


def failed_write(text: str) -> Callable[[], Any]:
    """The result of a failed write in tensorstore 0.1.86: the copy succeeds, the rest raises ValueError."""

    def write() -> Any:
        promise, future = tensorstore.Promise.new()
        promise.set_exception(ValueError(text))
        done, copied = tensorstore.Promise.new()
        done.set_result(None)
        return SimpleNamespace(copy=copied, commit=future, result=future.result)

    return write


@pytest.mark.parametrize(
    ("code", "mended"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk is full"),
        (errno.EACCES, "cannot write"),
        (errno.EROFS, "cannot write"),
    ],
)
def test_a_failing_disk_is_a_user_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, mended: str
) -> None:
    text = (
        'RESOURCE_EXHAUSTED: Error writing local file "/x/w.a/c/0/0/0": Failed to write 29032576 bytes to file 3: '
        f"{os.strerror(code)} [os_error_code='{code}']"
    )
    monkeypatch.setattr(store, "tensorstore", Faked(failed_write(text)))
    with pytest.raises(OSError) as caught:
        write_store(tmp_path, source_of())
    assert caught.value.errno == code
    with pytest.raises(UserError, match=mended), new_directory(tmp_path / "new") as directory:
        write_store(directory, source_of())
    assert not (tmp_path / "new").exists() and not (tmp_path / ".new.partial").exists()


def test_other_errors_of_tensorstore_keep_their_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "tensorstore", Faked(failed_write("INTERNAL: something else")))
    with pytest.raises(ValueError, match="INTERNAL: something else"):
        write_store(tmp_path, source_of())
    assert not (tmp_path / MANIFEST).exists()


def test_a_failure_waits_for_the_pending_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the write would put its file into a directory that has just been removed."""
    promise, future = tensorstore.Promise.new()
    done, copied = tensorstore.Promise.new()
    done.set_result(None)
    monkeypatch.setattr(
        store, "tensorstore", Faked(lambda: SimpleNamespace(copy=copied, commit=future, result=future.result))
    )
    source = source_of()

    def read(tensor: Tensor) -> np.ndarray:
        if tensor.name != EMBEDDING:
            raise KeyboardInterrupt
        return Source.read(source, tensor)

    source.read = read  # type: ignore[method-assign]
    timer = threading.Timer(0.2, promise.set_result, [None])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        write_store(tmp_path, source)
    assert future.done()
    timer.join()
