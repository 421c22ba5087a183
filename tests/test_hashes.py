"""Files are hashed once: known again by size, inode and time of change."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from transllm_jax import disk
from transllm_jax.disk import FileHashes


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def old(path: Path, text: str, age: float = 60) -> Path:
    """A file that was written a while ago."""
    path.write_text(text, encoding="utf-8")
    then = time.time() - age
    os.utime(path, (then, then))
    return path


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read for their hash, in order."""
    found: list[Path] = []
    hash_of = disk.sha256_of

    def noted(path: Path) -> str:
        found.append(path)
        return hash_of(path)

    monkeypatch.setattr(disk, "sha256_of", noted)
    return found


def test_a_file_is_read_once_also_by_another_run(tmp_path: Path, read: list[Path]) -> None:
    file = old(tmp_path / "a", "one")
    hashes = FileHashes(tmp_path / "hashes.json")
    assert hashes(file) == hashes(file) == sha("one")
    hashes.write()
    assert FileHashes(tmp_path / "hashes.json")(file) == sha("one")
    assert read == [file]


def test_a_change_is_seen(tmp_path: Path, read: list[Path]) -> None:
    file, hashes = old(tmp_path / "a", "one"), FileHashes(tmp_path / "hashes.json")
    hashes(file)
    # Of the same size, at another time; at the same time, of another size; and another file in its place.
    assert hashes(old(file, "two", age=50)) == sha("two")
    before = file.stat()
    file.write_text("three", encoding="utf-8")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert hashes(file) == sha("three")
    before = file.stat()
    (tmp_path / "b").write_text("forty", encoding="utf-8")
    os.utime(tmp_path / "b", ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(tmp_path / "b", file)
    assert hashes(file) == sha("forty")
    assert len(read) == 4


def test_a_file_that_was_written_just_now_is_not_trusted(tmp_path: Path, read: list[Path]) -> None:
    file, hashes = old(tmp_path / "a", "one", age=0), FileHashes(tmp_path / "hashes.json")
    hashes(file)
    hashes(file)
    assert len(read) == 2


def test_nothing_is_written_where_there_is_no_run(tmp_path: Path) -> None:
    hashes = FileHashes(tmp_path / "run" / "hashes.json")
    hashes(old(tmp_path / "a", "one"))
    hashes.write()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damaged", ["", "\0" * 50, "{", "[]", "null"], ids=["none", "zeros", "cut", "list", "null"])
def test_what_was_kept_and_is_damaged_is_made_anew(tmp_path: Path, read: list[Path], damaged: str) -> None:
    file, kept = old(tmp_path / "a", "one"), tmp_path / "hashes.json"
    kept.write_text(damaged)
    hashes = FileHashes(kept)
    assert hashes(file) == sha("one")
    hashes.write()
    assert FileHashes(kept)(file) == sha("one") and read == [file]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    sync, replace = os.fsync, os.replace

    def synced(number: int) -> None:
        sync(number)
        done.append(f"fsync of {os.fstat(number).st_size} bytes")

    def replaced(old: Path, new: Path) -> None:
        replace(old, new)
        done.append("rename")

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    disk.write_text(tmp_path / "a", "ก\n")
    assert done == ["fsync of 4 bytes", "rename"]
